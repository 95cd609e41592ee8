"""Several tool backends as one: names, routing, health, and what a bad backend can't do to the others."""

import asyncio
import copy
import hashlib
import itertools
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from agent_fsm import AgentConfig, run_agent
from agent_fsm.errors import ConfigError
from agent_fsm.protocol import StopReason, ToolInvoker, ToolResult
from agent_fsm.testing import ScriptedModel
from agent_fsm.tools.combined import BackendHealth, CombinedInvoker
from agent_fsm.tools.functions import FunctionTools
from agent_fsm.tools.local import EchoMCP, LocalMCPInvoker

SLACK_S = 2.0
FOREVER_S = 60


class Backend:
    """Offers tools of these names after a while, and says which was called."""

    def __init__(self, *names: str, pause_s: float = 0.0, error: Exception | None = None, key: str = "") -> None:
        self.names = names
        self.pause_s = pause_s
        self.error = error
        self.key = key
        self.listings = 0
        self.calls: list[dict[str, Any]] = []
        self.changed = False

    async def list_openai_tools(self) -> list[dict[str, Any]]:
        self.listings += 1
        await asyncio.sleep(self.pause_s)
        if self.error is not None:
            raise self.error
        return [{"type": "function", "function": {"name": name, "parameters": {}}} for name in self.names]

    async def call_openai_tool(self, call: dict[str, Any], /) -> str:
        self.calls.append(call)
        return f"{self.key}:{call['function']['name']}"

    def tools_changed(self) -> bool:
        changed, self.changed = self.changed, False
        return changed


class Opening(Backend):
    """Opens something for each run; notes what became of it."""

    def __init__(self, *names: str, closing: Callable[[], Awaitable[None]]) -> None:
        super().__init__(*names)
        self.closing = closing
        self.noted: list[str] = []

    def for_run(self) -> ToolInvoker:
        self.noted.append("begun")
        return self

    async def aclose(self) -> None:
        try:
            await self.closing()
        except asyncio.CancelledError:
            self.noted.append("cancelled")
            raise
        self.noted.append("closed")


def tool_call(name: str) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": "{}"}}


async def names_of(tools: CombinedInvoker) -> list[str]:
    return [tool["function"]["name"] for tool in await tools.list_openai_tools()]


def listed(tools: CombinedInvoker) -> list[str]:
    return asyncio.run(names_of(tools))


# Names


def test_names_stay_where_only_one_backend_has_them() -> None:
    tools = CombinedInvoker({"local": LocalMCPInvoker(), "echo": EchoMCP()})

    assert listed(tools) == ["exec_python", "exec_shell", "echo"]


@pytest.mark.parametrize("pauses", list(itertools.permutations((0.0, 0.02, 0.04))))
def test_shared_names_get_prefixes_whoever_answers_first(pauses: Sequence[float]) -> None:
    a, b, c = (Backend("go", name, pause_s=pause) for name, pause in zip(("x", "y", "z"), pauses, strict=True))

    assert listed(CombinedInvoker({"a": a, "b": b, "c": c})) == ["a__go", "x", "b__go", "y", "c__go", "z"]


def test_a_prefixed_name_is_always_legal_and_taken_by_nobody() -> None:
    def hashed(backend: str, tool: str) -> str:
        return hashlib.sha256(f"{backend}\0{tool}".encode()).hexdigest()[:8]

    tools = CombinedInvoker(
        {
            "my web": Backend("go"),
            "k" * 60: Backend("go"),
            "l" * 61: Backend("go"),
            "a": Backend("go"),
            "b": Backend("a__go"),
        }
    )

    assert listed(tools) == [
        f"my_web__go_{hashed('my web', 'go')}",
        f"{'k' * 60}__go",
        f"{'l' * 55}_{hashed('l' * 61, 'go')}",
        f"a__go_{hashed('a', 'go')}",
        "a__go",
    ]


def test_a_name_once_given_stays_when_a_backend_dies_and_comes_back() -> None:
    a, b = Backend("go"), Backend("go")
    tools = CombinedInvoker({"a": a, "b": b})

    async def main() -> list[list[str]]:
        seen = [await names_of(tools)]
        b.error = OSError("gone")
        seen.append(await names_of(tools))
        b.error = None
        return [*seen, await names_of(tools)]

    assert asyncio.run(main()) == [["a__go", "b__go"], ["a__go"], ["a__go", "b__go"]]


def test_a_name_once_given_stays_when_a_second_backend_takes_it_up() -> None:
    a, b = Backend("go"), Backend("go", error=OSError("late"))
    tools = CombinedInvoker({"a": a, "b": b})

    async def main() -> list[list[str]]:
        seen = [await names_of(tools)]
        b.error = None
        return [*seen, await names_of(tools)]

    assert asyncio.run(main()) == [["go"], ["go", "b__go"]]


def test_backends_without_names_are_called_after_their_classes() -> None:
    tools = CombinedInvoker(Backend("a"), EchoMCP(), Backend("a"), {"third": Backend("b")})

    assert listed(tools) == ["Backend__a", "echo", "Backend2__a", "b"]
    assert list(tools.health()) == ["Backend", "EchoMCP", "Backend2", "third"]


@pytest.mark.parametrize(
    "given", [(), ({},), ("local",), ({"a": None},), ({"": EchoMCP()},), ({"a": EchoMCP()}, {"a": EchoMCP()})]
)
def test_what_is_no_backend_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError):
        CombinedInvoker(*given)


# Calls


def test_a_call_reaches_its_backend_under_its_own_name_once_and_lists_nothing() -> None:
    a, b = Backend("go", key="a"), Backend("go", key="b")
    tools = CombinedInvoker({"a": a, "b": b})
    wanted = tool_call("b__go")
    before = copy.deepcopy(wanted)

    async def main() -> Any:
        await tools.list_openai_tools()
        return await tools.call_openai_tool(wanted)

    assert asyncio.run(main()) == "b:go"
    assert wanted == before
    assert (a.calls, b.calls) == ([], [tool_call("go")])
    assert (a.listings, b.listings) == (1, 1)


def test_a_call_of_no_tool_is_a_result_that_says_so() -> None:
    tools = CombinedInvoker({"a": Backend("go"), "b": Backend("go")})

    async def main() -> Any:
        await tools.list_openai_tools()
        return await tools.call_openai_tool(tool_call("go"))

    assert asyncio.run(main()) == ToolResult("error: there is no tool 'go'; there are: a__go, b__go", ok=False)


# Health


def test_dead_hanging_raising_and_mad_backends_hide_nothing_of_the_others() -> None:
    mad: Any = type("Mad", (), {"list_openai_tools": lambda self: 7, "call_openai_tool": None.__class__})()
    tools = CombinedInvoker(
        {
            "hanging": Backend("never", pause_s=FOREVER_S),
            "raising": Backend("never", error=ConnectionError("refused")),
            "mad": mad,
            "well": Backend("go", pause_s=0.05),
        },
        list_timeout_s=0.3,
    )
    began = time.monotonic()

    assert listed(tools) == ["go"]
    assert time.monotonic() - began < 0.3 + SLACK_S
    assert tools.health() == {
        "hanging": BackendHealth("failed", "no answer within 0.3 s"),
        "raising": BackendHealth("failed", "ConnectionError: refused"),
        "mad": BackendHealth("failed", "it answered with [int] where a list of tools was expected"),
        "well": BackendHealth("ready", "", 1),
    }


def test_a_backend_that_ignores_its_cancel_is_left_behind() -> None:
    let_go = asyncio.Event()

    class Stubborn(Backend):
        async def list_openai_tools(self) -> list[dict[str, Any]]:
            while not let_go.is_set():
                try:
                    await let_go.wait()
                except asyncio.CancelledError:
                    continue
            return []

    async def main() -> list[str]:
        names = await names_of(CombinedInvoker(Stubborn(), Backend("go"), list_timeout_s=0.05))
        let_go.set()
        return names

    assert asyncio.run(asyncio.wait_for(main(), 5)) == ["go"]


def test_backends_are_asked_at_the_same_time() -> None:
    met = asyncio.Barrier(3)

    class Meeting(Backend):
        async def list_openai_tools(self) -> list[dict[str, Any]]:
            await met.wait()
            return await super().list_openai_tools()

    tools = CombinedInvoker({"a": Meeting("a"), "b": Meeting("b"), "c": Meeting("c")}, list_timeout_s=5)

    assert listed(tools) == ["a", "b", "c"]


def test_health_is_unasked_at_first() -> None:
    assert CombinedInvoker({"a": Backend()}).health() == {"a": BackendHealth("unasked")}


def test_all_dead_is_an_error_that_names_each_and_ends_the_run() -> None:
    tools = CombinedInvoker(
        {"a": Backend(error=OSError("no route")), "b": Backend(pause_s=FOREVER_S)}, list_timeout_s=0.1
    )

    result = run_agent(
        [{"role": "user", "content": "go"}], tools, AgentConfig(), model_client=ScriptedModel(["unasked"])
    )

    assert result.stopped_reason is StopReason.TOOLS_UNAVAILABLE
    assert "a: OSError: no route; b: no answer within 0.1 s" in result.detail


# Research and changes


def test_research_tools_are_those_of_all_under_the_names_they_are_offered_by() -> None:
    def find(what: str) -> str:
        return what

    def web_search(what: str) -> str:
        return what

    said = FunctionTools(find, web_search, research=(find,))
    judged = Backend("web_search", "go")
    tools = CombinedInvoker({"said": said, "judged": judged})

    listed(tools)

    assert tools.research_tools == frozenset({"find", "judged__web_search"})


def test_a_backends_prefix_makes_no_research_tool() -> None:
    tools = CombinedInvoker({"web": Backend("go"), "docs": Backend("go")})

    listed(tools)

    assert tools.research_tools == frozenset()


def test_a_change_of_any_is_a_change_and_all_are_asked() -> None:
    a, b = Backend("a"), Backend("b")
    tools = CombinedInvoker(a, EchoMCP(), b)
    seen = [tools.tools_changed()]
    a.changed = b.changed = True

    seen += [tools.tools_changed(), tools.tools_changed()]

    assert seen == [False, True, False]


# Runs


async def _at_once() -> None:
    return None


async def _fails() -> None:
    raise OSError("can't close")


async def _hangs() -> None:
    await asyncio.sleep(FOREVER_S)


def test_what_a_run_opens_is_closed_with_it_whatever_another_does() -> None:
    backends = [Opening("a", closing=_fails), Opening("b", closing=_hangs), Opening("c", closing=_at_once)]
    shared = Backend("d")
    tools = CombinedInvoker(*backends, shared)
    model = ScriptedModel([[("a", {}), ("d", {})], "Done."])
    config = AgentConfig(max_wallclock_seconds=1.0)
    began = time.monotonic()

    result = run_agent([{"role": "user", "content": "go"}], tools, config, model_client=model)

    assert time.monotonic() - began < 1.0 + SLACK_S
    assert [message["content"] for message in result.messages if message["role"] == "tool"] == [":a", ":d"]
    assert [each.noted for each in backends] == [["begun"], ["begun", "cancelled"], ["begun", "closed"]]


def test_a_backend_that_can_not_begin_a_run_is_a_dead_one() -> None:
    class Unable(Backend):
        def for_run(self) -> ToolInvoker:
            raise OSError("no room")

    run = CombinedInvoker({"unable": Unable("x"), "well": Backend("go")}).for_run()

    assert listed(run) == ["go"]
    assert run.health()["unable"] == BackendHealth("failed", "RuntimeError: OSError: no room")


def test_runs_side_by_side_share_no_names() -> None:
    tools = CombinedInvoker({"a": Backend("go", key="a"), "b": Backend("go", key="b")})
    first, second = tools.for_run(), tools.for_run()

    listed(first)
    outcome = asyncio.run(second.call_openai_tool(tool_call("a__go")))

    assert isinstance(outcome, ToolResult) and not outcome.ok


def test_a_run_uses_tools_of_several_backends() -> None:
    tools = CombinedInvoker({"local": LocalMCPInvoker(), "echo": EchoMCP()})
    model = ScriptedModel([[("exec_python", {"code": "print(6 * 7)"}), ("echo", {"text": "hi"})], "42"])

    result = run_agent([{"role": "user", "content": "go"}], tools, AgentConfig(), model_client=model)

    told = [message["content"] for message in result.messages if message["role"] == "tool"]
    assert (json.loads(told[0])["stdout"], told[1]) == ("42\n", "hi")
