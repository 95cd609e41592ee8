"""Tools of MCP servers: real servers, on stdio and HTTP, in both eras: what they are asked, what is left."""

import asyncio
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
from attrs import evolve, frozen

from agent_fsm import AgentConfig, AgentRun, StopReason, run_agent
from agent_fsm.errors import ConfigError
from agent_fsm.protocol import ToolResult, ToolsFinished
from agent_fsm.testing import ScriptedModel
from agent_fsm.tools.combined import CombinedInvoker
from agent_fsm.tools.local import EchoMCP
from agent_fsm.tools.mcp import MCPInvoker, ServerSpec

SERVERS = Path(__file__).parent / "mcp_servers"
SLACK_S = 0.25
TASK = [{"role": "user", "content": "Go."}]
SECRET = "sesame-open-now"

T = TypeVar("T")

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="what is left is counted in Linux's /proc")


# Setting


def plain(log: Path, *more: str, name: str = "s", **fields: Any) -> ServerSpec:
    """A server without the SDK, which notes each call in *log*."""
    log.touch()
    args = (str(SERVERS / "plain.py"), "--log", str(log), *more)
    return ServerSpec(name=name, command=sys.executable, args=args, **{"tool_timeout_s": 10.0, **fields})


def sdk(log: Path, **fields: Any) -> ServerSpec:
    return ServerSpec(
        name="s", command=sys.executable, args=(str(SERVERS / "sdk.py"),), env={"LOG": str(log)}, **fields
    )


@frozen
class Reached:
    """A server made with the SDK that is reached at a URL."""

    url: str
    log: Path

    def spec(self, **fields: Any) -> ServerSpec:
        self.log.write_text("")
        return ServerSpec(name="s", url=self.url, **fields)


@pytest.fixture(scope="module")
def reached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reached]:
    log = tmp_path_factory.mktemp("http") / "log"
    command = [sys.executable, str(SERVERS / "sdk.py"), "--http"]
    environment = {**os.environ, "LOG": str(log)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            yield Reached(f"http://127.0.0.1:{int(process.stdout.readline())}/mcp", log)
        finally:
            process.kill()


def call(name: str, text: str | None = None, **arguments: Any) -> dict[str, Any]:
    given = arguments if text is None else {"text": text}
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": json.dumps(given)}}


def children() -> set[int]:
    return {int(pid) for pid in Path("/proc/self/task").joinpath(str(os.getpid()), "children").read_text().split()}


def descriptors() -> set[str]:
    """What pipes and sockets we hold."""
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that reads the folder
            found.add(str(path.readlink()))
    return {each for each in found if each.startswith(("socket:", "pipe:"))}


def with_tools(specs: Any, work: Callable[[MCPInvoker], Awaitable[T]], *, on_elicit: Any = None) -> T:
    """Return what *work* returns; whatever the servers had open when they were closed is a failure."""

    async def main() -> T:
        import agent_fsm.tools.mcp.wire  # noqa: F401 - so that its import is not part of what is timed

        tasks, held, before = asyncio.all_tasks(), descriptors(), children()
        async with MCPInvoker(specs, on_elicit=on_elicit) as tools:
            result = await work(tools)
        found = (children() - before, asyncio.all_tasks() - tasks)
        assert found == (set(), set())
        await until(lambda: descriptors() <= held, 1.0)  # a server in this process may take a moment to hang up
        assert descriptors() <= held
        return result

    return asyncio.run(main())


def names(listed: list[dict[str, Any]]) -> list[str]:
    return [tool["function"]["name"] for tool in listed]


def lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8").splitlines()


async def until(done: Callable[[], bool], seconds: float = 5.0) -> None:
    for _ in range(round(seconds / 0.02)):
        if done():
            return
        await asyncio.sleep(0.02)


ERAS = pytest.mark.parametrize("era", ["legacy", "modern"])


# Listing and calling


@ERAS
def test_tools_are_listed_and_each_call_is_sent_exactly_once(era: str, tmp_path: Path) -> None:
    async def work(tools: MCPInvoker) -> tuple[list[str], ToolResult]:
        return names(await tools.list_openai_tools())[:2], await tools.call_openai_tool(call("s__echo", "hi"))

    log = tmp_path / "log"
    listed, result = with_tools([plain(log, "--era", era)], work)

    assert (listed, result) == (["s__echo", "s__content"], ToolResult("hi"))
    assert lines(log) == ["echo"]


def test_a_tool_is_offered_as_its_server_lists_it_but_for_the_schema_of_the_schema(tmp_path: Path) -> None:
    listed = with_tools([plain(tmp_path / "log")], MCPInvoker.list_openai_tools)

    parameters = {"type": "object", "properties": {"text": {"type": "string"}}}
    function = {"name": "s__echo", "description": "The tool echo.", "parameters": parameters}
    assert listed[0] == {"type": "function", "function": function}


def test_tools_made_with_the_sdk_are_called_over_both_transports(reached: Reached, tmp_path: Path) -> None:
    async def work(tools: MCPInvoker) -> list[ToolResult]:
        calls = call("s__add", a=1, b=2), call("s__picture"), call("s__fail")
        return [await tools.call_openai_tool(each) for each in calls]

    log = tmp_path / "log"
    over_stdio = with_tools([sdk(log, startup_timeout_s=30.0)], work)
    over_http = with_tools([reached.spec()], work)

    image = {"data": "iVBORw==", "mimeType": "image/png", "type": "image"}
    assert over_stdio == over_http
    assert over_stdio == [
        ToolResult("3", structured={"result": 3}),
        ToolResult("[image image/png, 4 bytes]", parts=(image,)),
        ToolResult("Error executing tool fail", ok=False),
    ]
    assert (lines(log), lines(reached.log)) == (["add"], ["add"])


def test_all_that_came_back_is_told_and_kept(tmp_path: Path) -> None:
    async def work(tools: MCPInvoker) -> ToolResult:
        return await tools.call_openai_tool(call("s__content"))

    result = with_tools([plain(tmp_path / "log")], work)

    assert result.text.splitlines() == [
        *("one", "two", "[image image/png, 4 bytes]", "[audio audio/wav, 3 bytes]"),
        *("[resource_link a.txt file:///a.txt text/plain]", "[resource file:///b.txt, text/plain]", "inside"),
        *("[resource file:///c.bin, application/x, 5 bytes]", '{"n":7}'),
    ]
    assert [part["type"] for part in result.parts] == ["image", "audio", "resource_link", "resource", "resource"]
    assert result.structured == {"n": 7}


def test_only_the_tools_that_are_enabled_are_offered_and_can_be_called(tmp_path: Path) -> None:
    async def work(tools: MCPInvoker) -> tuple[list[str], str]:
        return names(await tools.list_openai_tools()), (await tools.call_openai_tool(call("s__die"))).text

    spec = plain(tmp_path / "log", enabled_tools=("echo", "die"), disabled_tools=("die",))
    listed, told = with_tools([spec], work)

    assert listed == ["s__echo"]
    assert told == "error: there is no tool 's__die'; there are: s__echo"


@pytest.mark.parametrize("arguments", ["", "[1]", "{", "null"])
def test_arguments_that_are_no_object_are_not_sent(arguments: str, tmp_path: Path) -> None:
    async def work(tools: MCPInvoker) -> ToolResult:
        return await tools.call_openai_tool({"function": {"name": "s__echo", "arguments": arguments}})

    result = with_tools([plain(tmp_path / "log")], work)

    assert (result.ok, result.text.startswith("error: the arguments must be a JSON object")) == (False, True)
    assert lines(tmp_path / "log") == []


def test_arguments_that_can_not_be_written_harm_nobody(reached: Reached, tmp_path: Path) -> None:
    async def work(tools: MCPInvoker) -> list[Any]:
        await tools.list_openai_tools()
        deep: Any = []
        for _ in range(10_000):
            deep = [deep]
        half = [
            await tools.invoke("s__echo", {"text": "half \ud83d"}),
            await tools.invoke("h__wait", {"seconds": "\ud83d"}),
        ]
        nested = [await tools.invoke(name, {"text": deep}) for name in ("s__echo", "h__wait")]
        after = await tools.call_openai_tool({"function": {"name": "s__echo", "arguments": {"text": "after"}}})
        return [half[0].text, half[1].ok, *(each.text for each in nested), after.text, tools.health()]

    *found, health = with_tools([plain(tmp_path / "log"), evolve(reached.spec(), name="h")], work)

    deep = "error: the arguments are nested too deeply to be sent"
    assert found == ["half ?", False, deep, deep, "after"]
    assert [(each.state, each.restarts) for each in health.values()] == [("ready", 0)] * 2


def test_a_name_leads_back_to_its_server_and_tool(tmp_path: Path) -> None:
    async def work(tools: MCPInvoker) -> list[Any]:
        await tools.list_openai_tools()
        return [tools.place_of("a_b__echo"), *(tools.place_of(name) for name in names(await tools.list_openai_tools()))]

    specs = [plain(tmp_path / "log", name="a.b", enabled_tools=("echo",)), plain(tmp_path / "log", name="c")]
    missing, first, second, *_ = with_tools(specs, work)

    assert (missing, first, second) == (None, ("a.b", "echo"), ("c", "echo"))


# Time


@ERAS
def test_a_call_ends_at_its_limit_and_the_server_is_told(era: str, tmp_path: Path) -> None:
    async def work(tools: MCPInvoker) -> tuple[float, ToolResult, ToolResult]:
        await tools.list_openai_tools()
        began = time.monotonic()
        late = await tools.call_openai_tool(call("s__sleep", "30"))
        seconds = time.monotonic() - began
        await until(lambda: "cancelled" in lines(log))
        return seconds, late, await tools.call_openai_tool(call("s__echo", "still there"))

    log = tmp_path / "log"
    seconds, late, after = with_tools([plain(log, "--era", era, tool_timeout_s=0.5)], work)

    assert 0.5 <= seconds < 0.5 + SLACK_S
    assert (late.ok, late.text.startswith("error: no answer within 0.5 s; outcome unknown")) == (False, True)
    assert lines(log) == ["sleep", "cancelled", "echo"]
    assert after == ToolResult("still there")


def test_progress_does_not_put_the_limit_off(tmp_path: Path) -> None:
    async def work(tools: MCPInvoker) -> tuple[float, str]:
        await tools.list_openai_tools()
        began = time.monotonic()
        result = await tools.call_openai_tool(call("s__progress"))
        return time.monotonic() - began, result.text

    seconds, told = with_tools([plain(tmp_path / "log", tool_timeout_s=0.5)], work)

    assert seconds < 0.5 + SLACK_S
    assert "no answer within 0.5 s" in told


def test_a_cancelled_call_is_told_to_the_server_over_http(reached: Reached) -> None:
    async def work(tools: MCPInvoker) -> list[str]:
        await tools.list_openai_tools()
        task = asyncio.create_task(tools.call_openai_tool(call("s__wait", seconds=30)))
        await until(lambda: "wait" in lines(log))
        task.cancel()
        await asyncio.wait({task}, timeout=SLACK_S)
        assert task.cancelled()
        await until(lambda: "cancelled" in lines(log))
        return lines(log)

    log = reached.log
    noted = with_tools([reached.spec()], work)

    assert noted == ["wait", "cancelled"]


def test_a_shorter_time_may_be_asked_for_and_a_longer_may_not(tmp_path: Path) -> None:
    async def work(tools: MCPInvoker) -> list[str]:
        await tools.list_openai_tools()
        return [(await tools.invoke("s__sleep", {"text": "30"}, timeout_s=each)).text for each in (0.2, 30.0)]

    shorter, longer = with_tools([plain(tmp_path / "log", tool_timeout_s=0.4)], work)

    assert "no answer within 0.2 s" in shorter
    assert "no answer within 0.4 s" in longer


def test_servers_start_side_by_side_and_one_that_is_silent_hides_none(tmp_path: Path) -> None:
    async def work(tools: MCPInvoker) -> tuple[float, list[str], Mapping[str, Any]]:
        began = time.monotonic()
        listed = names(await tools.list_openai_tools())
        seconds = time.monotonic() - began
        await until(lambda: all(each.state != "starting" for each in tools.health().values()))
        return seconds, listed, tools.health()

    silent = [
        ServerSpec(name=f"silent{n}", command="/bin/sleep", args=("60",), startup_timeout_s=1.0) for n in range(3)
    ]
    closing = ServerSpec(name="closing", command="/bin/true", startup_timeout_s=1.0)
    missing = ServerSpec(name="missing", command="/no/such/program")
    seconds, listed, health = with_tools([*silent, closing, missing, plain(tmp_path / "log")], work)

    assert seconds < 1.0 + 2 * SLACK_S
    assert listed[0] == "s__echo"
    states = {name: each.state for name, each in health.items()}
    assert states == {**dict.fromkeys(["silent0", "silent1", "silent2", "closing", "missing"], "failed"), "s": "ready"}
    assert "not ready within 1 s" in health["silent2"].error
    assert "No such file or directory: /no/such/program" in health["missing"].error


def test_when_no_server_lives_the_listing_says_of_each_why(tmp_path: Path) -> None:
    async def work(tools: MCPInvoker) -> str:
        with pytest.raises(RuntimeError) as raised:
            await tools.list_openai_tools()
        return str(raised.value)

    dying = ServerSpec(name="dying", command="/bin/sh", args=("-c", "echo no disk >&2; exit 3"))
    told = with_tools([dying, ServerSpec(name="missing", command="/no/such/program")], work)

    assert re.search(r"server 'dying'.* failed: it exited with code 3 \(its stderr ends with: no disk\)", told)
    assert re.search(r"server 'missing'.* failed: No such file or directory: /no/such/program", told)


def test_a_modern_server_that_is_slower_to_start_than_the_probe_is_asked_again(tmp_path: Path) -> None:
    # A third of the time is for the probe; what was asked meanwhile is answered when the server is up
    code = f"import sys, time; time.sleep(0.8); sys.path.insert(0, {str(SERVERS)!r}); import plain; plain.main()"
    spec = ServerSpec(name="s", command=sys.executable, args=("-c", code), startup_timeout_s=2.0)

    listed = with_tools([spec], MCPInvoker.list_openai_tools)

    assert names(listed)[0] == "s__echo"


# Servers that die


@ERAS
def test_a_call_in_which_the_server_dies_has_an_unknown_outcome_and_the_server_is_started_again(
    era: str, tmp_path: Path
) -> None:
    async def work(tools: MCPInvoker) -> tuple[ToolResult, ToolResult, int]:
        await tools.list_openai_tools()
        lost = await tools.call_openai_tool(call("s__die"))
        after = await tools.call_openai_tool(call("s__echo", "back"))
        return lost, after, tools.health()["s"].restarts

    log = tmp_path / "log"
    lost, after, restarts = with_tools([plain(log, "--era", era)], work)

    assert not lost.ok
    assert "was lost in this call (it exited with code 7); outcome unknown" in lost.text
    assert "out of memory" in lost.text
    assert (after, restarts) == (ToolResult("back"), 1)
    assert lines(log) == ["die", "echo"]


@pytest.mark.parametrize(
    ("tool", "sent", "ok"),
    [("die_once", 1, False), ("die_once_read", 2, True), ("die_once_same", 2, True), ("die_read", 2, False)],
)
def test_only_what_may_be_done_twice_is_sent_again_and_only_once(
    tool: str, sent: int, ok: bool, tmp_path: Path
) -> None:
    async def work(tools: MCPInvoker) -> ToolResult:
        return await tools.call_openai_tool(call(f"s__{tool}"))

    log = tmp_path / "log"
    result = with_tools([plain(log)], work)

    assert (lines(log), result.ok) == ([tool] * sent, ok)
    assert result.text == f"{tool} lives" or "outcome unknown" in result.text


def test_calls_beside_one_that_kills_the_server_have_an_unknown_outcome_too(tmp_path: Path) -> None:
    async def work(tools: MCPInvoker) -> list[ToolResult]:
        await tools.list_openai_tools()
        sleeping = asyncio.ensure_future(tools.call_openai_tool(call("s__sleep", "30")))
        await until(lambda: "sleep" in lines(log))
        return list(await asyncio.gather(sleeping, tools.call_openai_tool(call("s__die"))))

    log = tmp_path / "log"
    results = with_tools([plain(log)], work)

    assert [("outcome unknown" in each.text, each.ok) for each in results] == [(True, False)] * 2


def test_a_server_that_dies_again_and_again_is_given_up_after_five_restarts(tmp_path: Path) -> None:
    # Lists its tools, then ends: by itself, whoever calls
    marks = tmp_path / "starts"
    code = (
        f"import sys, threading, os; sys.argv = ['plain', '--era', 'legacy']; sys.path.insert(0, {str(SERVERS)!r});"
        f"open({str(marks)!r}, 'a').write('x'); import plain;"
        "threading.Timer(0.1, lambda: os._exit(1)).start(); plain.main()"
    )
    spec = ServerSpec(name="s", command=sys.executable, args=("-c", code), tool_timeout_s=20.0)

    async def work(tools: MCPInvoker) -> tuple[Any, str]:
        await tools.list_openai_tools()
        await until(lambda: tools.health()["s"].state == "failed", 20.0)
        return tools.health()["s"], (await tools.call_openai_tool(call("s__echo"))).text

    health, told = with_tools([spec], work)

    assert (health.state, health.restarts, marks.read_text()) == ("failed", 5, "x" * 6)
    assert re.match(r"error: the call was not sent: server 's'.* failed: it exited with code 1", told)


class Sessions(BaseHTTPRequestHandler):
    """A server of the old era, over HTTP: it knows its sessions, until it forgets them."""

    sessions: ClassVar[set[str]] = set()
    asked: ClassVar[list[str]] = []

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Say nothing."""

    def do_POST(self) -> None:
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        session = self.headers.get("Mcp-Session-Id")
        known = session in self.sessions
        self.asked.append(f"{message['method']}{'' if known or session is None else ' (gone)'}")
        match message["method"]:
            case "initialize":
                session = f"session-{len(self.asked)}"
                self.sessions.add(session)
                info = {"name": "old", "version": "1"}
                about = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": info}
                self.say(200, message, result=about, session=session)
            case _ if not known:
                self.say(400 if session is None else 404, message, error={"code": -32000, "message": "No session"})
            case "tools/list":
                self.say(200, message, result={"tools": [{"name": "t", "inputSchema": {"type": "object"}}]})
            case "tools/call":
                self.say(200, message, result={"content": [{"type": "text", "text": "done"}]})
            case _:
                self.say(202, message)

    def do_GET(self) -> None:
        self.send_error(405)

    def do_DELETE(self) -> None:
        self.asked.append("DELETE")
        self.say(200, {})

    def say(self, status: int, message: Mapping[str, Any], session: str = "", **answer: Any) -> None:
        body = json.dumps({"jsonrpc": "2.0", "id": message.get("id"), **answer}).encode() if answer else b""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if session:
            self.send_header("Mcp-Session-Id", session)
        self.end_headers()
        self.wfile.write(body)


def test_a_server_that_has_forgotten_the_session_is_greeted_anew_and_the_call_is_sent_again() -> None:
    async def work(tools: MCPInvoker) -> list[str]:
        first = await tools.call_openai_tool(call("s__t"))
        Sessions.sessions.clear()
        second = await tools.call_openai_tool(call("s__t"))
        return [first.text, second.text, str(tools.health()["s"].restarts)]

    with ThreadingHTTPServer(("127.0.0.1", 0), Sessions) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            said = with_tools([ServerSpec(name="s", url=f"http://127.0.0.1:{server.server_port}/mcp")], work)
        finally:
            server.shutdown()

    greeting = ["server/discover", "initialize", "notifications/initialized", "tools/list"]
    assert said == ["done", "done", "1"]
    asked = [each for each in Sessions.asked if each != "DELETE"]
    assert asked == [*greeting, "tools/call", "tools/call (gone)", *greeting[1:], "tools/call"]
    assert Sessions.asked[-1] == "DELETE"


def test_a_call_that_does_not_reach_the_server_was_not_sent() -> None:
    async def work(tools: MCPInvoker) -> list[str]:
        await tools.list_openai_tools()
        server.shutdown()
        server.server_close()
        return [(await tools.invoke("s__t", {}, timeout_s=1.0)).text for _ in range(2)]

    with ThreadingHTTPServer(("127.0.0.1", 0), Sessions) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        told = with_tools([ServerSpec(name="s", url=f"http://127.0.0.1:{server.server_port}/mcp")], work)

    assert all(each.startswith("error: the call was not ") for each in told)
    assert "the server can't be reached" in told[1]


# Changes


@ERAS
def test_changed_tools_are_offered_from_the_next_turn_on(era: str, tmp_path: Path) -> None:
    async def work(tools: MCPInvoker) -> list[Any]:
        listed = names(await tools.list_openai_tools())
        before = tools.tools_changed()
        await asyncio.sleep(0.1)  # so that a modern client has its subscription
        await tools.call_openai_tool(call("s__grow"))
        await until(tools.tools_changed)
        again = names(await tools.list_openai_tools())
        called = await tools.call_openai_tool(call("s__new_0"))
        return [before, [name for name in again if name not in listed], tools.tools_changed(), called.text]

    found = with_tools([plain(tmp_path / "log", "--era", era)], work)

    assert found == [False, ["s__new_0"], False, "new_0 is new"]


def test_changed_tools_are_noticed_over_http(reached: Reached) -> None:
    async def work(tools: MCPInvoker) -> list[str]:
        before = names(await tools.list_openai_tools())
        await asyncio.sleep(0.3)  # so that there is a subscription
        await tools.call_openai_tool(call("s__grow"))
        await until(tools.tools_changed)
        return [name for name in names(await tools.list_openai_tools()) if name not in before]

    assert with_tools([reached.spec()], work) == ["s__new"]


def test_a_run_offers_new_tools_to_the_model(tmp_path: Path) -> None:
    model = ScriptedModel([[("s__echo", {"text": "wait"})], [("s__grow", {})], [("s__new_0", {})], "Done."])

    result = run_agent(TASK, MCPInvoker([plain(tmp_path / "log", "--era", "legacy")]), model_client=model)

    assert result.stopped_reason is StopReason.SUCCESS
    told = [event.results[0].text for event in result.events if isinstance(event, ToolsFinished)]
    assert told == ["wait", "grown", "new_0 is new"]


# Questions


@ERAS
def test_a_question_is_declined_where_nobody_answers(era: str, tmp_path: Path) -> None:
    async def work(tools: MCPInvoker) -> Any:
        return json.loads((await tools.call_openai_tool(call("s__ask"))).text)

    said = with_tools([plain(tmp_path / "log", "--era", era)], work)

    assert said["answer"] == {"action": "decline"}


@ERAS
def test_a_question_is_answered_by_the_handler(era: str, tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    async def on_elicit(server: str, question: Mapping[str, Any]) -> Mapping[str, Any]:
        asked.append((server, question["message"]))
        return {"colour": "blue"}

    async def work(tools: MCPInvoker) -> Any:
        return json.loads((await tools.call_openai_tool(call("s__ask"))).text)

    said = with_tools([plain(tmp_path / "log", "--era", era)], work, on_elicit=on_elicit)

    assert (said["answer"], asked) == (
        {"action": "accept", "content": {"colour": "blue"}},
        [("s", "Which colour?")],
    )
    assert era == "legacy" or said["state"] == "s7"


@pytest.mark.parametrize("answer", [None, 7, ZeroDivisionError("oh")])
def test_a_handler_that_gives_no_answer_has_declined(answer: Any, tmp_path: Path) -> None:
    def on_elicit(server: str, question: Mapping[str, Any]) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def work(tools: MCPInvoker) -> Any:
        return json.loads((await tools.call_openai_tool(call("s__ask"))).text)

    said = with_tools([plain(tmp_path / "log")], work, on_elicit=on_elicit)

    assert said["answer"] == {"action": "decline"}


# Secrets


def test_a_secret_that_a_server_gives_away_is_shown_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    spec = plain(tmp_path / "log", env={"API_TOKEN": SECRET})

    async def gathered(tools: MCPInvoker) -> list[Any]:
        await tools.list_openai_tools()
        calls = call("s__secret"), call("s__secret", "fail"), call("s__die")
        return [*[await tools.call_openai_tool(each) for each in calls], tools.health(), repr(tools)]

    found = with_tools([spec], gathered)

    assert found[0].text.splitlines()[0] == "it is ***"
    assert found[0].structured == {"token": "***"}
    assert SECRET not in repr(found)
    assert SECRET not in caplog.text


def test_headers_reach_the_server_and_nobody_else(reached: Reached, caplog: pytest.LogCaptureFixture) -> None:
    async def work(tools: MCPInvoker) -> ToolResult:
        return await tools.call_openai_tool(call("s__headers"))

    caplog.set_level(logging.DEBUG)
    headers = {"Authorization": f"Bearer {SECRET}", "X-Team": "blue"}
    result = with_tools([reached.spec(headers=headers)], work)

    said = result.text.splitlines()
    assert {"authorization: ***", "x-team: blue"} <= set(said)
    assert SECRET not in repr(result)
    assert SECRET not in caplog.text


def test_a_password_in_a_url_is_in_no_log(reached: Reached, caplog: pytest.LogCaptureFixture) -> None:
    async def work(tools: MCPInvoker) -> ToolResult:
        return await tools.call_openai_tool(call("s__headers"))

    caplog.set_level(logging.DEBUG)
    url = reached.url.replace("http://", f"http://user:{SECRET}@")
    result = with_tools([evolve(reached.spec(), url=url)], work)

    assert result.ok
    assert "POST http://user:***@127.0.0.1" in caplog.text
    assert SECRET not in caplog.text


def test_a_server_gets_few_of_our_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(tools: MCPInvoker) -> Any:
        return json.loads((await tools.call_openai_tool(call("s__environment"))).text)

    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    found = with_tools([plain(tmp_path / "log", env={"MINE": "yes"})], work)

    assert (found["MINE"], found["PATH"], found["LC_ALL"]) == ("yes", os.environ["PATH"], "C.UTF-8")
    assert SECRET not in json.dumps(found)


# Runs


def test_each_run_has_servers_of_its_own_which_end_with_it(tmp_path: Path) -> None:
    before = children()
    tools = MCPInvoker([plain(tmp_path / "log")])

    for _ in range(2):
        model = ScriptedModel([[("s__echo", {"text": "hi"})], "Done."])
        assert run_agent(TASK, tools, model_client=model).stopped_reason is StopReason.SUCCESS
        assert children() == before

    assert lines(tmp_path / "log") == ["echo", "echo"]


def test_runs_in_the_block_share_the_servers(tmp_path: Path) -> None:
    async def work(tools: MCPInvoker) -> list[set[int]]:
        found = []
        for _ in range(2):
            model = ScriptedModel([[("s__echo", {"text": "hi"})], "Done."])
            result = await AgentRun(TASK, tools, model_client=model)
            assert result.stopped_reason is StopReason.SUCCESS
            found.append(children() - before)
        return found

    before = children()
    first, second = with_tools([plain(tmp_path / "log")], work)

    assert (len(first), first) == (1, second)


def test_a_run_without_living_servers_ends_as_tools_unavailable() -> None:
    tools = MCPInvoker({"missing": {"command": "/no/such/program"}})

    result = run_agent(TASK, tools, model_client=ScriptedModel(["Never asked."]))

    assert result.stopped_reason is StopReason.TOOLS_UNAVAILABLE
    assert re.search(r"server 'missing'.* failed: No such file or directory", result.detail)


def test_a_run_that_is_over_time_leaves_no_process_of_a_server_that_will_not_end(tmp_path: Path) -> None:
    before = children()
    model = ScriptedModel([[("s__sleep", {"text": "30"})], "Done."])

    async def main() -> float:
        import agent_fsm.tools.mcp.wire  # noqa: F401 - so that its import is not part of what is timed

        began = time.monotonic()
        config = AgentConfig(max_wallclock_seconds=1.5)
        result = await AgentRun(TASK, MCPInvoker([plain(tmp_path / "log")]), config, model_client=model)
        assert result.stopped_reason is StopReason.MAX_WALLCLOCK
        return time.monotonic() - began

    assert asyncio.run(main()) < 1.5 + SLACK_S
    assert children() == before


def test_a_combined_backend_offers_its_tools_beside_others(tmp_path: Path) -> None:
    before = children()
    tools = CombinedInvoker({"mcp": MCPInvoker([plain(tmp_path / "log")]), "echo": EchoMCP()})
    model = ScriptedModel([[("s__echo", {"text": "hi"})], "Done."])

    result = run_agent(TASK, tools, model_client=model)

    assert (result.stopped_reason, children()) == (StopReason.SUCCESS, before)
    assert [event.results[0].text for event in result.events if isinstance(event, ToolsFinished)] == ["hi"]


def test_a_lower_level_that_is_cancelled_in_its_close_kills_at_once(tmp_path: Path) -> None:
    async def main() -> float:
        before = children()
        stubborn = (
            "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
            f"sys.path.insert(0, {str(SERVERS)!r}); import plain, time;"
            "plain.os._exit = lambda code: time.sleep(60); plain.main()"
        )
        tools = MCPInvoker([ServerSpec(name="s", command=sys.executable, args=("-c", stubborn))]).for_run()
        await tools.list_openai_tools()
        assert isinstance(tools, MCPInvoker)
        closing = asyncio.create_task(tools.aclose())
        await asyncio.sleep(0.05)
        assert children() != before
        began = time.monotonic()
        closing.cancel()
        await asyncio.wait({closing})
        assert children() == before
        return time.monotonic() - began

    assert asyncio.run(main()) < 0.15


# What can be given


def test_servers_come_from_mappings_specs_and_files(tmp_path: Path) -> None:
    spec = plain(tmp_path / "log")
    entry = {"command": spec.command, "args": list(spec.args)}
    file = tmp_path / "mcp.json"
    file.write_text(json.dumps({"mcpServers": {"s": entry, "off": {**entry, "disabled": True}}}))

    for given in ({"s": entry}, {"s": spec}, [spec], iter([spec]), file, str(file)):
        assert list(MCPInvoker(given).health()) == ["s"]


@pytest.mark.parametrize("given", [{"s": {}}, {"s": {"command": "x", "url": "http://x/"}}, [7], "/no/such/file.json"])
def test_what_is_no_server_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError):
        MCPInvoker(given)


def test_two_servers_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two servers are called 's'"):
        MCPInvoker([ServerSpec(name="s", command="x"), ServerSpec(name="s", command="y")])


def test_importing_it_loads_neither_mcp_nor_httpx() -> None:
    code = (
        "import agent_fsm.tools.mcp, sys; print([m for m in ('mcp', 'httpx', 'httpx2', 'anyio') if m in sys.modules])"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=60
    )

    assert done.stdout.strip() == "[]"
