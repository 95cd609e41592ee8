"""MCP servers that nobody here wrote, called directly, through our gateway and through the one in Node: all say the
same."""

import asyncio
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from agent_fsm.protocol import ToolInvoker, ToolResult
from agent_fsm.server.gateway import create_app
from agent_fsm.tools.http import HttpToolsInvoker
from agent_fsm.tools.mcp.invoker import MCPInvoker
from tests.gateways import FOREIGN, npm_installed, running_gateway, serving, text_of_config

TOKEN = "foreign-token-1618033"
WAYS = ("direct", "python", "node")
COUNTS = {"everything": 13, "files": 14, "time": 2, "git": 12, "fetch": 1}


@frozen
class Told:
    """What the servers said, by the way to them."""

    tools: Mapping[str, list[dict[str, Any]]]
    results: Mapping[str, Mapping[str, ToolResult]]
    folder: Path


def calls_in(folder: Path, page: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """What is called; all but `resource` say the same whenever they are called."""
    repository, files = str(folder / "repository"), folder / "files"
    at = {"source_timezone": "Asia/Tokyo", "time": "12:30", "target_timezone": "Asia/Kolkata"}
    return {
        "echo": ("everything__echo", {"message": "größe 🙂\n"}),
        "sum": ("everything__get-sum", {"a": 2, "b": 40}),
        "structured": ("everything__get-structured-content", {"location": "New York"}),
        "image": ("everything__get-tiny-image", {}),
        "annotated": ("everything__get-annotated-message", {"messageType": "error", "includeImage": True}),
        "links": ("everything__get-resource-links", {"count": 2}),
        "resource": ("everything__get-resource-reference", {"resourceType": "Blob", "resourceId": 1}),
        "file": ("files__read_text_file", {"path": str(files / "a.txt")}),
        "folder": ("files__list_directory", {"path": str(files)}),
        "forbidden": ("files__read_text_file", {"path": "/etc/passwd"}),
        "time": ("time__convert_time", at),
        "nowhere": ("time__convert_time", {**at, "source_timezone": "Mars/Olympus"}),
        "log": ("git__git_log", {"repo_path": repository}),
        "status": ("git__git_status", {"repo_path": repository}),
        "outside": ("git__git_status", {"repo_path": "/"}),
        "page": ("fetch__fetch", {"url": page}),
        "no page": ("fetch__fetch", {"url": f"{page}/nowhere"}),
    }


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b"<html><body><h1>Loopback</h1><p>A page for the test.</p></body></html>"
        self.send_response(200 if self.path == "/" else 404)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class calls it so
        pass


@contextmanager
def page() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def prepare(folder: Path) -> None:
    (folder / "files").mkdir()
    (folder / "files" / "a.txt").write_text("one\ntwo\n")
    (folder / "files" / "sub").mkdir()
    repository = folder / "repository"
    git = ["git", "-c", "user.name=Tester", "-c", "user.email=tester@example.com", "-C", str(repository)]
    subprocess.run(["git", "init", "-q", "-b", "main", str(repository)], check=True, stdin=subprocess.DEVNULL)
    (repository / "a.txt").write_text("one\n")
    subprocess.run([*git, "add", "a.txt"], check=True, stdin=subprocess.DEVNULL)
    subprocess.run([*git, "commit", "-q", "-m", "Begin"], check=True, stdin=subprocess.DEVNULL)
    (repository / "b.txt").write_text("two\n")


def servers_in(folder: Path, modules: Path) -> dict[str, dict[str, Any]]:
    packages = modules / "node_modules" / "@modelcontextprotocol"
    start: dict[str, Any] = {"startup_timeout_sec": 30}
    return {
        "everything": {"command": "node", "args": [str(packages / "server-everything/dist/index.js")], **start},
        "files": {
            "command": "node",
            "args": [str(packages / "server-filesystem/dist/index.js"), str(folder / "files")],
            **start,
        },
        "time": {"command": sys.executable, "args": ["-m", "mcp_server_time", "--local-timezone", "UTC"], **start},
        "git": {
            "command": sys.executable,
            "args": ["-m", "mcp_server_git", "--repository", str(folder / "repository")],
            **start,
        },
        "fetch": {
            "command": sys.executable,
            "args": ["-m", "mcp_server_fetch", "--allow-private-ips", "--ignore-robots-txt"],
            **start,
        },
    }


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Told]:
    missing = [name for name in ("mcp_server_time", "mcp_server_git", "mcp_server_fetch") if find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    if shutil.which("git") is None:
        pytest.skip("needs git")
    cache = pytestconfig.cache
    assert cache is not None
    modules = npm_installed(FOREIGN, cache)
    folder = tmp_path_factory.mktemp("foreign").resolve()
    prepare(folder)
    config = folder / "config.toml"
    config.write_text(text_of_config(servers_in(folder, modules)))
    environ = {"GATEWAY_TOKEN": TOKEN}
    with (
        page() as url,
        running_gateway("node", config, cache, environ) as (node, _),
    ):
        yield asyncio.run(_ask(config, node, calls_in(folder, url), folder))


async def _ask(config: Path, node: str, calls: Mapping[str, tuple[str, dict[str, Any]]], folder: Path) -> Told:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    # One set of processes for both: five more would double the time that this takes
    async with MCPInvoker(config) as direct, serving(create_app(direct, token=TOKEN)) as python:
        invokers: dict[str, ToolInvoker] = {
            "direct": direct,
            "python": HttpToolsInvoker(python, headers),
            "node": HttpToolsInvoker(node, headers),
        }
        await _all_of(direct, {"page": calls["page"]})  # the first time, that server installs something
        both = await asyncio.gather(*(_all_of(invoker, calls) for invoker in invokers.values()))
    tools = {way: listed for way, (listed, _) in zip(invokers, both, strict=True)}
    return Told(tools, {way: results for way, (_, results) in zip(invokers, both, strict=True)}, folder)


async def _all_of(
    invoker: ToolInvoker, calls: Mapping[str, tuple[str, dict[str, Any]]]
) -> tuple[list[dict[str, Any]], dict[str, ToolResult]]:
    listed: Any = await invoker.list_openai_tools()
    results: dict[str, ToolResult] = {}
    for key, (name, arguments) in calls.items():
        function = {"name": name, "arguments": json.dumps(arguments)}
        given: Any = invoker.call_openai_tool({"id": key, "type": "function", "function": function})
        results[key] = await given
    return list(listed), results


@pytest.mark.parametrize("way", WAYS)
def test_every_server_is_listed(told: Told, way: str) -> None:
    names = [each["function"]["name"] for each in told.tools[way]]

    counts = {server: sum(name.startswith(f"{server}__") for name in names) for server in COUNTS}
    assert counts == COUNTS
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("way", WAYS[1:])
def test_the_tools_are_the_same_every_way(told: Told, way: str) -> None:
    direct = {each["function"]["name"]: each for each in told.tools["direct"]}

    assert {each["function"]["name"]: each for each in told.tools[way]} == direct


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("call", [each for each in calls_in(Path("/"), "") if each != "resource"])  # it tells the time
def test_a_call_comes_to_the_same_every_way(told: Told, way: str, call: str) -> None:
    direct, other = told.results["direct"][call], told.results[way][call]

    assert (other.text, other.ok, other.parts, other.structured) == (
        direct.text,
        direct.ok,
        direct.parts,
        direct.structured,
    )


@pytest.mark.parametrize(
    ("call", "ok", "said"),
    [
        ("echo", True, "Echo: größe 🙂\n"),
        ("sum", True, "The sum of 2 and 40 is 42."),
        ("structured", True, '"temperature"'),
        ("image", True, "[image image/png, "),
        ("links", True, "[resource_link "),
        ("resource", True, "[resource demo://resource/dynamic/blob/1, "),
        ("file", True, "one\ntwo\n"),
        ("folder", True, "[FILE] a.txt\n[DIR] sub"),
        ("forbidden", False, "Access denied"),
        ("time", True, '"time_difference": "-3.5h"'),
        ("nowhere", False, "Mars/Olympus"),
        ("log", True, "Begin"),
        ("status", True, "b.txt"),
        ("outside", False, "outside the allowed repository"),
        ("page", True, "A page for the test."),
        ("no page", False, "404"),
    ],
)
def test_a_call_says_what_it_should(told: Told, call: str, ok: bool, said: str) -> None:
    result = told.results["direct"][call]

    assert result.ok is ok
    assert said in result.text


def test_what_is_no_text_is_handed_on(told: Told) -> None:
    results = told.results["direct"]

    assert [part["type"] for part in results["image"].parts] == ["image"]
    assert results["structured"].structured == json.loads(results["structured"].text)
    assert [part["type"] for part in results["links"].parts] == ["resource_link"] * 2
