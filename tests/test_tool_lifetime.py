"""What a run opens ends with it: an invoker's view for one run, how it is closed, and tools that change in between."""

import asyncio
from typing import Any

import pytest

from agent_fsm import AgentConfig, AgentRun, StopReason, ToolResult, arun_agent, run_agent
from agent_fsm.protocol import ToolsFinished
from agent_fsm.testing import HANG, ScriptedModel

TASK = [{"role": "user", "content": "Go."}]


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


class View:
    """What one run uses; closing takes *closing_s*, and notes whether it was let finish."""

    def __init__(self, closing_s: float = 0.0) -> None:
        self.called: list[str] = []
        self.closed: list[str] = []
        self._closing_s = closing_s

    async def list_openai_tools(self) -> list[dict[str, Any]]:
        return [tool("work")]

    async def call_openai_tool(self, call: dict[str, Any], /) -> ToolResult:
        self.called.append(call["function"]["name"])
        return ToolResult("done", parts=({"type": "image", "data": "AA==", "mimeType": "image/png"},), structured=[1])

    async def aclose(self) -> None:
        try:
            await asyncio.sleep(self._closing_s)
        except asyncio.CancelledError:
            self.closed.append("cut short")
            raise
        self.closed.append("in peace")


class Backend(View):
    """Gives each run a view of its own."""

    def __init__(self, closing_s: float = 0.0) -> None:
        super().__init__(closing_s)
        self.views: list[View] = []

    def for_run(self) -> View:
        self.views.append(View(self._closing_s))
        return self.views[-1]


def model() -> ScriptedModel:
    return ScriptedModel([[("work", {})], "Done."])


def test_each_run_has_a_view_of_its_own_which_is_closed_with_it() -> None:
    backend = Backend()

    for _ in range(2):
        assert run_agent(TASK, backend, model_client=model()).stopped_reason is StopReason.SUCCESS

    assert [(view.called, view.closed) for view in backend.views] == [(["work"], ["in peace"])] * 2
    assert (backend.called, backend.closed) == ([], [])


def test_an_invoker_that_is_used_as_it_is_is_not_closed() -> None:
    shared = View()

    run_agent(TASK, shared, model_client=model())

    assert (shared.called, shared.closed) == (["work"], [])


def test_a_view_is_closed_in_peace_while_the_run_has_time_left() -> None:
    backend = Backend(closing_s=0.3)

    run_agent(TASK, backend, model_client=model())

    assert backend.views[0].closed == ["in peace"]


def test_closing_may_take_no_longer_than_the_grace_once_the_time_is_up() -> None:
    async def main() -> None:
        loop, backend = asyncio.get_running_loop(), Backend(closing_s=30)
        began = loop.time()

        config = AgentConfig(max_wallclock_seconds=0.2)
        result = await arun_agent(TASK, backend, config, model_client=ScriptedModel([HANG]))

        assert loop.time() - began <= 0.2 + 0.25  # the slack that is promised
        assert (result.stopped_reason, backend.views[0].closed) == (StopReason.MAX_WALLCLOCK, ["cut short"])

    asyncio.run(main())


def test_a_cancel_while_tools_are_closing_cuts_that_short() -> None:
    async def main() -> None:
        loop, backend = asyncio.get_running_loop(), Backend(closing_s=30)
        run = AgentRun(TASK, backend, model_client=ScriptedModel(["Done."]))
        waiting = asyncio.ensure_future(_awaited(run))
        while run.run.reason is None:  # noqa: ASYNC110 - the run has no event to wait for here
            await asyncio.sleep(0.01)
        began = loop.time()

        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

        assert loop.time() - began <= 0.25
        assert (run.result.stopped_reason, backend.views[0].closed) == (StopReason.SUCCESS, ["cut short"])

    asyncio.run(main())


async def _awaited(run: AgentRun) -> None:
    await run


def test_a_view_that_can_not_be_closed_costs_the_run_nothing() -> None:
    async def main() -> None:
        class Broken(Backend):
            def for_run(self) -> View:
                view = super().for_run()
                view.aclose = self.fail  # type: ignore[method-assign] # this view closes badly
                return view

            async def fail(self) -> None:
                raise RuntimeError("it is stuck")

        result = await arun_agent(TASK, Broken(), model_client=model())

        assert result.stopped_reason is StopReason.SUCCESS

    asyncio.run(main())


# Tools that change


class Changing:
    """Offers one more tool after each call; lists them as *listing* says: at once, never, or with an error."""

    def __init__(self, listing: str = "at once") -> None:
        self.listed = 0
        self._listing = listing
        self._names = ["work"]
        self._changed = False

    async def list_openai_tools(self) -> list[dict[str, Any]]:
        self.listed += 1
        self._changed = False
        if self.listed > 1 and self._listing == "never":
            await asyncio.Event().wait()
        if self.listed > 1 and self._listing == "error":
            raise RuntimeError("no list to be had")
        return [tool(name) for name in self._names]

    async def call_openai_tool(self, call: dict[str, Any], /) -> str:
        self._names.append(f"search_{len(self._names)}")
        self._changed = True
        name: str = call["function"]["name"]
        return name

    def tools_changed(self) -> bool:
        return self._changed


def offered(script: ScriptedModel) -> list[list[str]]:
    return [[each["function"]["name"] for each in request.tools] for request in script.requests]


def test_tools_that_changed_are_listed_again_before_the_next_request() -> None:
    script = ScriptedModel([[("work", {})], [("search_1", {})], "Done."])

    result = run_agent(TASK, Changing(), model_client=script)

    assert offered(script) == [["work"], ["work", "search_1"], ["work", "search_1", "search_2"]]
    assert [each.listing is not None for each in result.events if isinstance(each, ToolsFinished)] == [True, True]
    assert result.stopped_reason is StopReason.SUCCESS


def test_research_tools_that_come_later_are_researched_with() -> None:
    script = ScriptedModel([[("work", {})], "I am not sure.", [("search_1", {})], "It is so."])

    result = run_agent(TASK, Changing(), model_client=script)

    assert "Research" in result.path
    assert script.requests[2].tool_choice == {"type": "function", "function": {"name": "search_1"}}


@pytest.mark.parametrize("listing", ["never", "error"])
def test_a_new_list_that_does_not_come_leaves_the_old_one(listing: str) -> None:
    script = ScriptedModel([[("work", {})], "Done."])

    result = run_agent(TASK, Changing(listing), AgentConfig(tool_timeout_seconds=0.2), model_client=script)

    assert offered(script) == [["work"], ["work"]]
    assert result.stopped_reason is StopReason.SUCCESS


def test_a_cancel_while_tools_are_listed_again_loses_no_result() -> None:
    async def main() -> None:
        tools = Changing("never")
        run = AgentRun(TASK, tools, model_client=ScriptedModel([[("work", {})], "Done."]))
        waiting = asyncio.ensure_future(_awaited(run))
        while tools.listed < 2:  # noqa: ASYNC110 - neither has a backend that is just being asked
            await asyncio.sleep(0.01)

        run.cancel()
        await waiting

        assert run.result.stopped_reason is StopReason.CANCELLED
        assert run.result.messages[-1]["content"] == "work"

    asyncio.run(main())


def test_what_came_back_beside_text_is_in_the_events() -> None:
    result = run_agent(TASK, View(), model_client=model())

    finished = next(event for event in result.events if isinstance(event, ToolsFinished))
    assert finished.results[0].parts == ({"type": "image", "data": "AA==", "mimeType": "image/png"},)
    assert finished.results[0].structured == [1]
