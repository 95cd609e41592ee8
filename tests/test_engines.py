"""The engines that are extras, bubblewrap and Monty: what they contain, and that they keep what local tools promise."""

import asyncio
import json
import os
import signal
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from agent_fsm.tools import bwrap, monty
from agent_fsm.tools.local import LocalMCPInvoker
from tests.test_local_tools import running

SLACK_S = 2.0
FOREVER_S = 60
needs_bwrap = pytest.mark.skipif(bool(bwrap.fault()), reason=f"no bubblewrap: {bwrap.fault()}")
needs_monty = pytest.mark.skipif(not monty.is_installed(), reason="Monty is not installed (extra monty)")
BWRAP = LocalMCPInvoker(engine="bwrap")
MONTY = LocalMCPInvoker(python="monty")


def said(tools: LocalMCPInvoker, name: str = "exec_python", **arguments: Any) -> dict[str, Any]:
    result = asyncio.run(tools.call_openai_tool({"function": {"name": name, "arguments": arguments}}))
    text: dict[str, Any] = json.loads(result.text)
    return text


def workers() -> list[int]:
    """Return Monty's workers that this process has started and that live."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            state, parent = (
                (entry / "stat").read_text().rpartition(")")[2].split()[:2] if entry.name.isdigit() else "ZZ"
            )
            if parent == str(os.getpid()) and state != "Z" and b"monty" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def within_slack(claim: Any) -> bool:
    deadline = time.monotonic() + SLACK_S
    while not claim() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(claim())


# Bubblewrap


@needs_bwrap
@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("print(1)", "1\n"),
        ("import attrs; print(attrs.__name__)", "attrs\n"),
        ("open('mine.py', 'w').write('x = 2'); import mine; print(mine.x)", "2\n"),
        ("import multiprocessing as m\nif __name__ == '__main__': print(m.Pool(1).map(abs, [-1]))", "[1]\n"),
        ("import tempfile, os; print(os.path.exists(tempfile.mkdtemp()))", "True\n"),
        ("import os; print(sorted(os.listdir()))", "['script.py']\n"),
    ],
)
def test_bubblewrap_runs_honest_scripts(code: str, printed: str) -> None:
    found = said(BWRAP, code=code)

    assert (found["stdout"], found["sandbox"]) == (printed, "bwrap"), found


@needs_bwrap
@pytest.mark.parametrize(
    ("code", "fails_with"),
    [
        ("open('/etc/passwd')", "FileNotFoundError"),
        (f"open({__file__!r})", "FileNotFoundError"),
        ("import os; os.kill(PID, 0)", "ProcessLookupError"),  # ours, put in later: names of tests have none
        ("import socket; socket.create_connection(('192.0.2.1', 80), 2)", "Network is unreachable"),
        ("open('/usr/new', 'w')", "Read-only file system"),
        ("open('/new', 'w')", "Read-only file system"),
        ("open('/dev/new', 'w')", "Read-only file system"),
        ("b'x' * 2**31", "MemoryError"),
        ("for n in range(20): open(f'{n}', 'wb').write(b'x' * 2**23)", "No space left on device"),
        ("import os\nwhile os.fork() == 0 or True: pass", "BlockingIOError"),
    ],
)
def test_bubblewrap_keeps_inside_what_is_inside(code: str, fails_with: str) -> None:
    code = code.replace("PID", str(os.getpid()))

    assert fails_with in said(BWRAP, code=code, timeout_s=10)["stderr"]


@needs_bwrap
def test_bubblewrap_shows_what_is_opened_and_no_more(tmp_path: Path) -> None:
    seen, written = tmp_path / "seen", tmp_path / "written"
    for folder in (seen, written):
        folder.mkdir()
        folder.chmod(0o777)
        (folder / "file").write_text("hello")
    tools = LocalMCPInvoker(engine="bwrap", read_paths=[seen], write_paths=[written])

    found = said(tools, code=f"print(open('{seen}/file').read()); open('{written}/new', 'w'); open('{seen}/new', 'w')")

    assert found["stdout"] == "hello\n"
    assert (written / "new").exists()
    assert "Read-only file system" in found["stderr"]


@needs_bwrap
def test_nothing_of_a_call_in_bubblewrap_outlives_it() -> None:
    token = f"token{uuid.uuid4().hex}"
    sleep = f"[sys.executable, '-S', '-c', 'import time; time.sleep({FOREVER_S})', '{token}']"
    code = f"import subprocess, sys, time; subprocess.Popen({sleep}, start_new_session=True); print('started')"
    started = time.monotonic()

    ended = said(BWRAP, code=code)
    killed = said(BWRAP, code=f"{code}; time.sleep({FOREVER_S})", timeout_s=1.5)

    try:
        assert time.monotonic() - started < 20 + SLACK_S
        assert (ended["ok"], ended["stdout"]) == (True, "started\n")
        assert killed["error"] == "timed out after 1.5 s; the process group was killed"
        assert within_slack(lambda: not running(token))
    finally:
        for pid in running(token):
            os.kill(pid, signal.SIGKILL)


@needs_bwrap
def test_programs_run_in_bubblewrap_too() -> None:
    assert said(BWRAP, "exec_shell", cmd="echo hi")["stdout"] == "hi\n"
    assert said(BWRAP, "exec_shell", cmd="python -c 'print(6)'")["stdout"] == "6\n"


# Monty


@needs_monty
def test_monty_runs_a_snippet_and_says_that_it_did() -> None:
    found = said(MONTY, code="import json, sys\nprint(json.dumps([1]))\nprint('oops', file=sys.stderr)")

    del found["seconds"]
    assert found == {"ok": True, "rc": 0, "stdout": "[1]\n", "stderr": "oops\n", "sandbox": "monty"}


@needs_monty
@pytest.mark.parametrize("code", ["def half(x):\n    return x / 0\n\nhalf(1)", "x = (", "raise ValueError('no')"])
def test_a_snippet_that_fails_has_a_traceback(code: str) -> None:
    found = said(MONTY, code=code)

    assert (found["ok"], found["rc"]) == (False, 1)
    assert 'File "script.py", line ' in found["stderr"]


@needs_monty
@pytest.mark.parametrize("code", ["open('/etc/passwd').read()", "import os; os.environ['PATH']", "import socket"])
def test_a_snippet_reaches_nothing_outside(code: str) -> None:
    found = said(MONTY, code=code)

    assert not found["ok"]
    assert "Error: " in found["stderr"]


@needs_monty
@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("print('so far')\nwhile True: pass", "timed out after 0.5 s"),
        ("print('so far')\nimport time; time.sleep(9)", "timed out after 0.5 s"),
        ("print('so far')\nwhile True: print('x' * 1000)", "wrote more than 100,000 bytes"),
        ("print('so far')\nx = 'x' * 10**10", "used more than 536,870,912 bytes of memory"),
    ],
)
def test_a_snippet_that_goes_on_is_ended_and_what_it_printed_kept(code: str, error: str) -> None:
    tools = LocalMCPInvoker(python="monty", max_output_bytes=100_000)
    started = time.monotonic()

    found = said(tools, code=code, timeout_s=0.5)

    assert time.monotonic() - started < 0.5 + SLACK_S
    assert not found["ok"]
    assert error in found["error"]
    assert found["stdout"].startswith("so far\n")


@needs_monty
@pytest.mark.parametrize("cancels", [1, 2])
def test_a_cancelled_snippet_leaves_no_worker_that_works(cancels: int) -> None:
    async def main() -> None:
        call = {"function": {"name": "exec_python", "arguments": {"code": "while True: pass"}}}
        for wait_s in (0, 0.001, 0.2):
            running = asyncio.ensure_future(MONTY.call_openai_tool(call))
            await asyncio.sleep(wait_s)
            for _ in range(cancels):
                running.cancel()
                await asyncio.sleep(0)
            await asyncio.wait([running])
            assert running.cancelled()
        await asyncio.sleep(0.1)
        busy = [pid for pid in workers() if not is_idle(pid)]

        assert busy == []  # asked before the loop ends, which would cancel what is left

    asyncio.run(main())


def is_idle(pid: int) -> bool:
    try:
        before = Path(f"/proc/{pid}/stat").read_text().split()[13]
        time.sleep(0.05)
        return Path(f"/proc/{pid}/stat").read_text().split()[13] == before
    except OSError:
        return True


@needs_monty
def test_one_snippet_knows_nothing_of_another() -> None:
    assert said(MONTY, code="x = 1\nimport math\nmath.pi = 3")["rc"] in (0, 1)

    found = said(MONTY, code="import math; print(math.pi > 3); x")

    assert found["stdout"] == "True\n"
    assert "NameError" in found["stderr"]


@needs_monty
def test_many_snippets_at_once_get_their_own_output() -> None:
    async def main() -> list[str]:
        calls = [{"function": {"name": "exec_python", "arguments": {"code": f"print({n})"}}} for n in range(50)]
        return [json.loads(each.text)["stdout"] for each in await asyncio.gather(*map(MONTY.call_openai_tool, calls))]

    assert asyncio.run(main()) == [f"{n}\n" for n in range(50)]


@needs_monty
def test_programs_run_in_processes_beside_monty() -> None:
    found = said(LocalMCPInvoker(python="monty", sandbox="off"), "exec_shell", cmd="echo hi")

    assert (found["stdout"], found["sandbox"]) == ("hi\n", "off")


@needs_monty
def test_the_model_is_told_that_it_has_less() -> None:
    tools = asyncio.run(MONTY.list_openai_tools())

    assert "restricted interpreter" in tools[0]["function"]["description"]


# Where they are missing


@pytest.mark.skipif(monty.is_installed(), reason="Monty is installed")
def test_without_monty_calls_fail_and_say_what_would_help() -> None:
    assert "install agent-fsm[monty]" in said(MONTY, code="print(1)")["error"]


@pytest.mark.skipif(not bwrap.fault(), reason="bubblewrap works here")
def test_without_bubblewrap_calls_fail_and_say_why() -> None:
    assert "bubblewrap contains nothing here: " in said(BWRAP, code="print(1)")["error"]
