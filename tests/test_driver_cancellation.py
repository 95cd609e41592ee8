"""The driver against what tools and models do to cancellation: swallow it, answer it late, raise over it, cause it."""

import asyncio
import gc
import sys
import time
from typing import Any

import pytest

from agent_fsm import AgentResult, AgentRun, ModelError, StopReason, arun_agent, run_agent
from agent_fsm.protocol import Event, Interrupted
from agent_fsm.testing import HANG, ListClock, ScriptedModel, ScriptedTools
from tests.test_driver import SLACK, TASK, call, quick, texts


async def _ended(run: AgentRun, *, seconds: float = 2.0) -> AgentResult:
    """Return the result of *run*; fail instead of waiting for ever (a hung run ignores the cancel of its awaiter)."""

    async def wait() -> AgentResult:
        return await run

    waiting = asyncio.ensure_future(wait())
    done, _ = await asyncio.wait({waiting}, timeout=seconds)
    assert done, "the run hangs"
    return waiting.result()


async def _partial() -> str:
    """Turn a cancellation into a result, as many tools do."""
    try:
        await asyncio.sleep(5)
    except asyncio.CancelledError:
        return "partial"
    return "whole"


async def _cut_short() -> str:
    """Turn a cancellation into an error of its own, as many clients do."""
    try:
        await asyncio.sleep(5)
    except asyncio.CancelledError:
        raise ValueError("cut short") from None
    return "whole"


@pytest.mark.parametrize(("tool", "said"), [(_partial, "partial"), (_cut_short, "error: ValueError: cut short")])
def test_a_tool_that_swallows_its_time_limit_does_not_switch_off_the_watchdog(tool: Any, said: str) -> None:
    async def main() -> AgentResult:
        model = ScriptedModel([call("tool"), HANG])
        config = quick(tool_timeout_seconds=0.05, max_wallclock_seconds=0.3)
        return await _ended(AgentRun(TASK, ScriptedTools({"tool": tool}), config, model_client=model))

    result = asyncio.run(main())

    assert (result.stopped_reason, texts(result)) == ("max_wallclock", [said])


def test_a_tool_that_swallows_its_time_limit_does_not_make_the_run_deaf_to_cancel() -> None:
    async def main() -> AgentResult:
        model = ScriptedModel([call("tool"), HANG])
        config = quick(tool_timeout_seconds=0.05)
        run = AgentRun(TASK, ScriptedTools({"tool": _partial}), config, model_client=model)
        asyncio.get_running_loop().call_later(0.2, run.cancel)
        return await _ended(run)

    assert asyncio.run(main()).stopped_reason == "cancelled"


def test_an_abandoned_tool_that_ends_in_its_cancellation_does_not_cancel_the_run() -> None:
    async def slow_to_clean_up() -> None:
        try:
            await asyncio.sleep(5)
        finally:
            await asyncio.sleep(0.2)  # longer than the grace

    model = ScriptedModel([call("slow"), lambda request: asyncio.sleep(0.3, call("fine")), "done"])
    tools = ScriptedTools({"slow": slow_to_clean_up, "fine": lambda: "fine"})

    result = run_agent(TASK, tools, quick(tool_timeout_seconds=0.05), model_client=model)

    assert (result.stopped_reason, texts(result)[1:]) == ("success", ["fine"])


def _cancelling(outcome: object) -> AgentResult:
    """Return the result of a run whose only tool cancels the run and then plays *outcome*."""

    async def main() -> AgentResult:
        def tool() -> object:
            run.cancel()
            return outcome

        run = AgentRun(TASK, ScriptedTools({"tool": tool}), quick(), model_client=ScriptedModel([call("tool"), "end"]))
        return await _ended(run)

    return asyncio.run(main())


def test_the_result_of_a_tool_that_cancels_the_run_is_kept() -> None:
    result = _cancelling("all done")

    assert (result.stopped_reason, texts(result)) == ("cancelled", ["all done"])


def test_a_tool_that_cancels_the_run_and_raises_gives_a_result_and_no_cancelled_error() -> None:
    result = _cancelling(ValueError("after the cancel"))

    assert (result.stopped_reason, texts(result)) == ("cancelled", ["error: ValueError: after the cancel"])


def test_a_model_that_cancels_the_run_and_raises_gives_a_result_and_no_cancelled_error() -> None:
    async def main() -> AgentResult:
        def reply(request: object) -> None:
            run.cancel()
            raise ConnectionError("after the cancel")

        run = AgentRun(TASK, config=quick(), model_client=ScriptedModel([reply]))
        return await _ended(run)

    assert asyncio.run(main()).stopped_reason == "cancelled"


def _cancelled_in(seconds: float, model: ScriptedModel, tools: ScriptedTools | None, **settings: Any) -> StopReason:
    async def main() -> AgentResult:
        run = AgentRun(TASK, tools, quick(**settings), model_client=model)
        accepted: list[bool] = []
        asyncio.get_running_loop().call_later(seconds, lambda: accepted.append(run.cancel()))
        result = await _ended(run)
        assert accepted == [True]
        return result

    reason = asyncio.run(main()).stopped_reason
    assert reason is not None
    return reason


async def _answer_anyway(request: object) -> str:
    try:
        await asyncio.sleep(5)
    except asyncio.CancelledError:
        return "answered anyway"
    return "never"


def test_a_cancel_holds_though_the_model_swallows_it_and_answers() -> None:
    assert _cancelled_in(0.05, ScriptedModel([_answer_anyway]), None) == "cancelled"


def test_a_cancel_holds_though_the_tools_list_fails_by_it() -> None:
    async def listing() -> None:
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            raise ConnectionError("closed") from None

    tools = ScriptedTools({}, listing=listing)

    assert _cancelled_in(0.05, ScriptedModel(["never"]), tools) == "cancelled"


def test_a_cancel_in_the_grace_of_a_tool_that_is_out_of_time_holds_at_a_cap() -> None:
    async def slow_to_clean_up() -> None:
        try:
            await asyncio.sleep(5)
        finally:
            await asyncio.sleep(0.06)

    tools = ScriptedTools({"slow": slow_to_clean_up})
    model = ScriptedModel([call("slow")])

    assert _cancelled_in(0.13, model, tools, max_iterations=1, tool_timeout_seconds=0.1) == "cancelled"


def test_a_model_client_whose_request_fails_at_the_deadline_is_out_of_time_and_no_model_error() -> None:
    async def fails(request: object) -> None:
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            raise ModelError("the connection was closed", retryable=False) from None

    config, clock = quick(max_wallclock_seconds=0.1), ListClock([0])  # a timer that fires early counts all the same
    result = run_agent(TASK, config=config, model_client=ScriptedModel([fails]), clock=clock)

    assert result.stopped_reason == "max_wallclock"


def test_what_a_models_own_task_group_leaves_behind_does_not_cancel_the_run() -> None:
    async def grouped(request: object) -> object:
        async def fails() -> None:
            await asyncio.sleep(0)
            raise KeyError

        try:
            async with asyncio.TaskGroup() as group:  # up to 3.12 it leaves the task's cancelling() at 1
                group.create_task(fails())
        except* KeyError:
            pass
        return call("tool")

    tools = ScriptedTools({"tool": [asyncio.CancelledError()]})

    result = run_agent(TASK, tools, quick(), model_client=ScriptedModel([grouped, "done"]))

    assert (result.final_answer, result.stopped_reason) == ("done", "success")


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with 3.12")
def test_a_run_ends_in_a_loop_with_eager_tasks() -> None:
    async def main() -> AgentResult:
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore] # 3.12
        model = ScriptedModel([lambda request: asyncio.sleep(0, call("fine", "fine")), "done"])
        tools = ScriptedTools({"fine": lambda: asyncio.sleep(0, "fine")})
        return await arun_agent(TASK, tools, quick(), model_client=model)

    result = asyncio.run(main())

    assert (result.stopped_reason, texts(result)) == ("success", ["fine", "fine"])


def test_a_result_that_came_in_the_grace_is_kept_though_a_sibling_blocks_the_loop() -> None:
    async def blocks() -> None:
        try:
            await asyncio.sleep(5)
        finally:
            time.sleep(0.15)  # noqa: ASYNC251 # the point: the loop stands still for longer than the grace

    async def main() -> AgentResult:
        model = ScriptedModel([call("blocks", "partial")])
        run = AgentRun(TASK, ScriptedTools({"blocks": blocks, "partial": _partial}), quick(), model_client=model)
        asyncio.get_running_loop().call_later(0.05, run.cancel)
        return await _ended(run)

    result = asyncio.run(main())

    assert (result.stopped_reason, texts(result)[1]) == ("cancelled", "partial")


def test_what_an_abandoned_call_raises_later_is_not_logged() -> None:
    complaints: list[object] = []

    async def deaf_and_broken() -> None:
        for _ in range(3):
            try:
                await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                continue
        raise ValueError("too late")

    async def main() -> AgentResult:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        model = ScriptedModel([call("deaf", "fine"), "done"])
        tools = ScriptedTools({"deaf": deaf_and_broken, "fine": lambda: "fine"})
        result = await arun_agent(TASK, tools, quick(tool_timeout_seconds=0.05), model_client=model)
        await asyncio.sleep(0.4)
        gc.collect()
        return result

    result = asyncio.run(main())

    assert (result.stopped_reason, complaints) == ("success", [])


@pytest.mark.parametrize("names", [("kill",), ("fine", "kill", "fine")])
def test_ctrl_c_in_a_tool_ends_the_run_as_cancelled_and_says_what_had_been_started(names: tuple[str, ...]) -> None:
    events: list[Event] = []
    tools = ScriptedTools({"kill": [KeyboardInterrupt()], "fine": lambda: "fine"})

    model = ScriptedModel([call(*names)])

    with pytest.raises(KeyboardInterrupt):
        run_agent(TASK, tools, quick(), model_client=model, on_event=lambda event, run: events.append(event))

    last = events[-1]
    assert isinstance(last, Interrupted)
    assert [result.ran for result in last.results] == [True] * len(names)
    assert [result.text[:11] for result in last.results] == ["interrupted" if n == "kill" else n for n in names]


def test_ctrl_c_in_a_model_call_charges_the_request_that_was_sent() -> None:
    charged: list[int] = []

    with pytest.raises(KeyboardInterrupt):
        run_agent(
            TASK,
            config=quick(),
            model_client=ScriptedModel([KeyboardInterrupt()]),
            on_event=lambda event, run: charged.append(run.ledger.model_calls),
        )

    assert charged[-1] == 1


def test_an_async_generator_that_does_not_close_does_not_hold_up_run_agent() -> None:
    kept = []

    async def numbers() -> Any:
        try:
            yield "1"
        finally:
            await asyncio.sleep(2)

    async def tool() -> str:
        kept.append(numbers())
        return str(await anext(kept[0]))

    began = time.monotonic()
    result = run_agent(TASK, ScriptedTools({"tool": tool}), quick(), model_client=ScriptedModel([call("tool"), "done"]))
    took = time.monotonic() - began

    assert result.final_answer == "done"
    assert took < 0.25 + SLACK


def test_a_back_off_that_takes_longer_than_asked_does_not_put_off_the_deadline() -> None:
    class Slow:
        def __call__(self) -> float:
            return time.monotonic()

        async def sleep(self, seconds: float) -> None:
            await asyncio.sleep(seconds + 0.4)

    began = time.monotonic()
    model = ScriptedModel([ConnectionError("down"), HANG])
    result = run_agent(TASK, config=quick(max_wallclock_seconds=1.0), model_client=model, clock=Slow())
    took = time.monotonic() - began

    assert result.stopped_reason == "max_wallclock"
    assert took < 1.0 + SLACK


def test_an_error_in_what_an_invoker_calls_its_research_tools_is_the_worlds() -> None:
    class Broken:
        @property
        def research_tools(self) -> list[str]:
            raise RuntimeError("not connected")

        async def list_openai_tools(self) -> list[dict[str, Any]]:
            return []

        async def call_openai_tool(self, call: dict[str, Any]) -> str:
            return ""

    result = run_agent(TASK, Broken(), quick(), model_client=ScriptedModel(["done"]))

    assert result.stopped_reason in ("success", "tools_unavailable")


def test_a_model_error_that_skips_its_constructor_is_the_worlds() -> None:
    class BareError(ModelError):
        def __init__(self) -> None:
            Exception.__init__(self, "bare")

    result = run_agent(TASK, config=quick(), model_client=ScriptedModel([BareError()]))

    assert (result.stopped_reason, result.detail) == ("model_error", "bare")


def test_the_callers_own_error_is_not_lost_to_a_cancel_of_the_same_tick() -> None:
    async def main() -> None:
        def broken(event: object, state: object) -> None:
            if not run.result.stopped_reason:
                asyncio.get_running_loop().call_soon(run.cancel)
                raise ZeroDivisionError("mine")

        run = AgentRun(TASK, config=quick(), model_client=ScriptedModel(["hi"]), on_event=broken)
        await run

    with pytest.raises(ZeroDivisionError, match="mine"):
        asyncio.run(main())
