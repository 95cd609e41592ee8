"""Both gateways, ours and the one in Node, as processes for tests; and the npm packages that tests need.

What is installed is kept in pytest's cache, by what is to be installed, and so is there at once the next time.
"""

import asyncio
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO

import pytest
import uvicorn
from fastapi import FastAPI

__all__ = [
    "FOREIGN",
    "NODE_GATEWAY",
    "children_of",
    "is_running",
    "npm_installed",
    "running_gateway",
    "serving",
    "text_of_config",
]

NODE_GATEWAY = Path(__file__).parent / "examples" / "node_gateway"
FOREIGN = Path(__file__).parent / "data" / "npm_servers"
ROOT = Path(__file__).parent.parent
_START_S = 30.0
_SERVE = """
import os, sys
from agent_fsm.server.gateway import serve
serve(sys.argv[1], port=int(sys.argv[2]), token=os.environ.get("GATEWAY_TOKEN"))
"""


def npm_installed(folder: Path, cache: pytest.Cache) -> Path:
    """Return a copy of *folder* in which `npm ci` has been run; skip the test where that can't be."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("needs node and npm")
    sources = sorted(path for path in folder.iterdir() if path.is_file())
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in sources if path.name.startswith("package")))
    copy = cache.mkdir(f"npm-{folder.name}-{wanted.hexdigest()[:12]}")
    with (copy / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests may run in several processes
        return _installed(copy, sources)


def _installed(copy: Path, sources: Sequence[Path]) -> Path:
    for path in sources:
        shutil.copy(path, copy)
    if not (copy / "installed").exists():
        done = subprocess.run(
            ["npm", "ci", "--no-fund", "--no-audit"],
            cwd=copy,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        if done.returncode:
            pytest.skip(f"npm ci failed: {done.stderr.strip()[-300:]}")
        (copy / "installed").touch()
    return copy


@contextmanager
def running_gateway(
    kind: str, config: Path, cache: pytest.Cache, environ: Mapping[str, str]
) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """Yield the address of a gateway (`python` or `node`) that serves what *config* names, and its process.

    It ends by SIGTERM, as its operator would end it.
    """
    if kind == "node":
        argv = ["node", str(npm_installed(NODE_GATEWAY, cache) / "server.mjs"), "--config", str(config), "--port", "0"]
        argv += ["--token-env", "GATEWAY_TOKEN"] if "GATEWAY_TOKEN" in environ else []
    else:
        argv = [sys.executable, "-c", _SERVE, str(config), "0"]
    process = subprocess.Popen(
        argv,
        cwd=ROOT,
        env={**os.environ, **environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    errors: list[str] = []
    reader = threading.Thread(target=_collect, args=(process.stderr, errors), daemon=True)
    reader.start()
    watchdog = threading.Timer(_START_S, process.kill)
    watchdog.start()
    try:
        line = process.stdout.readline()
        watchdog.cancel()
        if "http://" not in line:
            reader.join(5)
            raise AssertionError(f"the {kind} gateway did not start: {line}{''.join(errors)}")
        yield line.strip().rpartition(" ")[2], process
    finally:
        watchdog.cancel()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            reader.join(5)
            process.stderr.close()


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[str]:
    """Yield the address at which *app* is served by this event loop."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=2))
    task = asyncio.create_task(server._serve())  # serve() would take over the signals
    try:
        async with asyncio.timeout(_START_S):
            while not server.started:
                assert not task.done(), "the application did not start"
                await asyncio.sleep(0.01)
        (socket,) = server.servers[0].sockets
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


def children_of(pid: int) -> set[int]:
    """The processes that *pid* started, and those that they did."""
    found = subprocess.run(
        ["ps", "-e", "-o", "pid=,ppid="], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    )
    parents = {int(child): int(parent) for child, parent in map(str.split, found.stdout.splitlines())}
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return below - {pid}


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def _collect(stream: IO[str], lines: list[str]) -> None:
    lines.extend(stream)


def text_of_config(servers: Mapping[str, Mapping[str, object]]) -> str:
    """Return a file of servers as Codex has it."""
    return "\n".join(
        f"[mcp_servers.{json.dumps(name)}]\n" + "\n".join(f"{key} = {_toml(value)}" for key, value in entry.items())
        for name, entry in servers.items()
    )


def _toml(value: object) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_toml(each)}" for key, each in value.items()) + " }"
    return json.dumps(value)  # strings, numbers, truth values and lists are the same in both
