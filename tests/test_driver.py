"""The driver: deadlines, cancellation, calls side by side, and what a run leaves behind. Nothing is patched.

Deadlines are asserted with a slack of 250 ms over what was promised.
"""

import asyncio
import functools
import time
from collections.abc import Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from agent_fsm import (
    AgentConfig,
    AgentResult,
    AgentRun,
    ConfigError,
    MessagesError,
    ModelError,
    RunningLoopError,
    State,
    ToolResult,
    arun_agent,
    run_agent,
)
from agent_fsm.machine import start, step
from agent_fsm.testing import HANG, ListClock, ScriptedModel, ScriptedTools, openai_faults

TASK = [{"role": "user", "content": "Do it."}]
SLACK = 0.25


def quick(**settings: Any) -> AgentConfig:
    return AgentConfig(**{"max_wallclock_seconds": 5.0, "closing_summary": False, **settings})


def call(*names: str) -> list[tuple[str, dict[str, Any]]]:
    return [(name, {}) for name in names]


def texts(result: AgentResult) -> list[str]:
    return [message["content"] for message in result.messages if message["role"] == "tool"]


def seconds_of(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


async def deaf(**arguments: Any) -> str:
    """Ignore every cancellation for half a second."""
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        try:
            await asyncio.sleep(until - time.monotonic())
        except asyncio.CancelledError:
            continue
    return "deaf is done"


# Deadlines


def test_a_hung_model_call_ends_the_run() -> None:
    results: list[AgentResult] = []

    took = seconds_of(
        lambda: results.append(
            run_agent(TASK, config=quick(max_wallclock_seconds=0.2), model_client=ScriptedModel([HANG]))
        )
    )

    assert results[0].stopped_reason == "max_wallclock"
    assert took < 0.2 + SLACK


def test_a_model_client_that_ignores_cancellation_is_abandoned() -> None:
    async def main() -> tuple[AgentResult, float]:
        began = time.monotonic()
        model = ScriptedModel([lambda request: deaf()])
        result = await arun_agent(TASK, config=quick(max_wallclock_seconds=0.1), model_client=model)
        took = time.monotonic() - began
        await asyncio.sleep(0.6)  # what it returns at last comes to nothing
        return result, took

    result, took = asyncio.run(main())

    assert (result.stopped_reason, result.final_answer) == ("max_wallclock", None)
    assert took < 0.1 + SLACK


def test_a_backend_that_hangs_when_asked_for_its_tools_ends_the_run() -> None:
    tools = ScriptedTools({}, listing=HANG)

    result = run_agent(TASK, tools, quick(max_wallclock_seconds=0.1), model_client=ScriptedModel(["never asked"]))

    assert result.stopped_reason == "max_wallclock"


def test_a_hung_tool_is_a_failed_result_and_the_run_goes_on() -> None:
    model = ScriptedModel([call("stuck"), "It hangs."])
    tools = ScriptedTools({"stuck": [HANG]})

    result = run_agent(TASK, tools, quick(tool_timeout_seconds=0.1), model_client=model)

    assert (result.final_answer, result.stopped_reason) == ("It hangs.", "success")
    assert texts(result) == [
        "interrupted: its time limit of 0.1 s was over before this call finished; what it did until then is unknown"
    ]
    assert State.REPAIR in result.path


@pytest.mark.parametrize("names", [("deaf",), ("deaf", "fine")])
def test_a_tool_that_ignores_cancellation_is_abandoned_and_the_run_goes_on(names: tuple[str, ...]) -> None:
    async def main() -> AgentResult:
        model = ScriptedModel([call(*names), "It does not listen."])
        tools = ScriptedTools({"deaf": deaf, "fine": lambda: "fine is done"})
        result = await arun_agent(TASK, tools, quick(tool_timeout_seconds=0.1), model_client=model)
        await asyncio.sleep(0.6)  # the abandoned call returns into nothing
        return result

    result = asyncio.run(main())

    assert (result.final_answer, result.stopped_reason) == ("It does not listen.", "success")
    assert texts(result)[0].startswith("interrupted: its time limit of 0.1 s")
    assert texts(result)[1:] == ["fine is done"] * (len(names) - 1)
    assert result.seconds < 0.1 + SLACK


def test_one_hung_call_does_not_hold_up_its_siblings() -> None:
    model = ScriptedModel([call("stuck", "fine", "fine"), "Two of three."])
    tools = ScriptedTools({"stuck": [HANG], "fine": lambda: "fine"})

    result = run_agent(TASK, tools, quick(tool_timeout_seconds=0.1, tool_concurrency=2), model_client=model)

    assert [text[:11] for text in texts(result)] == ["interrupted", "fine", "fine"]


def test_a_run_out_of_time_keeps_the_results_that_had_come() -> None:
    model = ScriptedModel([call("stuck", "fine")])
    tools = ScriptedTools({"stuck": [HANG], "fine": lambda: "fine"})

    result = run_agent(TASK, tools, quick(max_wallclock_seconds=0.1), model_client=model)

    assert result.stopped_reason == "max_wallclock"
    assert texts(result) == [
        "interrupted: the time of the run was up before this call finished; what it did until then is unknown",
        "fine",
    ]


def test_with_no_time_left_no_effect_starts() -> None:
    model = ScriptedModel([call("fine"), "late"])
    tools = ScriptedTools({"fine": lambda: "fine"})
    clock = ListClock([0, 1, 5, 5])

    result = run_agent(TASK, tools, quick(), model_client=model, clock=clock)

    assert result.stopped_reason == "max_wallclock"
    assert tools.calls == []
    assert texts(result) == ["not run: the time of the run was up before this call was started"]


def test_an_answer_that_comes_late_counts() -> None:
    result = run_agent(TASK, config=quick(), model_client=ScriptedModel(["late"]), clock=ListClock([0, 1, 9]))

    assert (result.final_answer, result.stopped_reason, result.seconds) == ("late", "success", 9)


# Calls of one turn


def test_results_stand_in_the_order_asked() -> None:
    async def after(seconds: float) -> str:
        await asyncio.sleep(seconds)
        return str(seconds)

    model = ScriptedModel([[("after", {"seconds": s}) for s in (0.06, 0.0, 0.03)], "done"])

    result = run_agent(TASK, ScriptedTools({"after": after}), quick(), model_client=model)

    assert texts(result) == ["0.06", "0.0", "0.03"]


@pytest.mark.parametrize("concurrency", [1, 2, 5])
def test_no_more_calls_run_at_once_than_allowed(concurrency: int) -> None:
    running, most = 0, 0

    async def work() -> str:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.005)
        running -= 1
        return "done"

    model = ScriptedModel([call(*["work"] * 6), "done"])

    run_agent(TASK, ScriptedTools({"work": work}), quick(tool_concurrency=concurrency), model_client=model)

    assert most == min(concurrency, 6)


@pytest.mark.parametrize("trouble", [ValueError("boom"), KeyError, asyncio.CancelledError()])
def test_one_failing_call_never_loses_its_siblings(trouble: object) -> None:
    model = ScriptedModel([call("fine", "bad", "fine"), "done"])
    tools = ScriptedTools({"fine": lambda: "fine", "bad": [trouble]})

    result = run_agent(TASK, tools, quick(enable_repair=False), model_client=model)

    first, bad, last = texts(result)
    assert (first, last, result.stopped_reason) == ("fine", "fine", "success")
    assert bad.startswith(("error: ValueError: boom", "error: KeyError", "interrupted: it was cancelled, but not by"))


def test_a_tool_need_not_be_async_and_may_return_any_form() -> None:
    class Plain:
        def list_openai_tools(self) -> list[dict[str, Any]]:
            return [{"type": "function", "function": {"name": name}} for name in ("text", "fields", "result", "none")]

        def call_openai_tool(self, call: dict[str, Any]) -> Any:
            kinds = {"text": "a", "fields": {"ok": False, "error": "b"}, "result": ToolResult("c", rc=0), "none": None}
            return kinds[call["function"]["name"]]

    model = ScriptedModel([call("text", "fields", "result", "none"), "done"])

    plain: Any = Plain()
    result = run_agent(TASK, plain, quick(), model_client=model)

    assert texts(result) == ["a", '{"ok": false, "error": "b"}', "c", "(no output)"]
    assert State.REPAIR in result.path


# The model


def test_a_retry_waits_as_long_as_the_provider_asks_and_goes_to_the_fallback() -> None:
    model = ScriptedModel([ModelError("slow down", retryable=True, retry_after=3.0), TimeoutError("slow"), "there"])
    clock = ListClock([0, 0, 0, 3, 4])

    result = run_agent(TASK, config=quick(model="a", fallback_models=["b", "c"]), model_client=model, clock=clock)

    assert (result.final_answer, result.iterations, result.usage.model_calls) == ("there", 1, 3)
    assert [request.model for request in model.requests] == ["a", "b", "c"]
    assert clock.slept == [3.0, 1.0]


def test_a_fatal_error_ends_the_run_at_once_and_says_what_to_do() -> None:
    model = ScriptedModel([ModelError("no key: set OPENAI_API_KEY", retryable=False)])

    result = run_agent(TASK, config=quick(), model_client=model)

    assert (result.stopped_reason, result.detail) == ("model_error", "no key: set OPENAI_API_KEY")
    assert len(model.requests) == 1


def test_a_bug_in_a_model_client_is_not_retried() -> None:
    model = ScriptedModel([TypeError("oops")])

    result = run_agent(TASK, config=quick(), model_client=model)

    assert (result.stopped_reason, result.detail, len(model.requests)) == ("model_error", "TypeError: oops", 1)


def test_retries_are_exhausted() -> None:
    model = ScriptedModel([ConnectionError("down")])

    result = run_agent(TASK, config=quick(max_model_retries=2), model_client=model, clock=ListClock([0]))

    assert (result.stopped_reason, result.detail) == ("model_error", "ConnectionError: down")
    assert len(model.requests) == 3


def test_a_cap_spends_one_request_without_tools_on_the_best_answer() -> None:
    model = ScriptedModel([call("fine"), "The best so far."])
    tools = ScriptedTools({"fine": lambda: "fine"})

    result = run_agent(TASK, tools, quick(max_iterations=1, closing_summary=True), model_client=model)

    assert (result.final_answer, result.stopped_reason) == ("The best so far.", "max_iterations")
    assert (model.requests[1].purpose, model.requests[1].tools) == (State.SUMMARIZE, ())
    assert result.messages[-1] == {"role": "assistant", "content": "The best so far."}


def test_a_periodic_summary_shortens_requests_and_not_the_result() -> None:
    model = ScriptedModel([call("fine"), call("fine2"), "in short", call("fine"), "done"])
    tools = ScriptedTools({"fine": lambda: "fine", "fine2": lambda: "fine2"})

    result = run_agent(TASK, tools, quick(summarize_every=2), model_client=model)

    asked = model.requests[3].messages
    assert [message["role"] for message in asked] == ["system", "user", "assistant", "tool"]
    assert asked[0]["content"] == "[Context Summary]\nin short"
    assert [message["role"] for message in result.messages] == ["user", *["assistant", "tool"] * 3, "assistant"]


def test_a_cost_limit_needs_a_known_price() -> None:
    with pytest.raises(ConfigError, match="price of 'mystery' is unknown: give prompt_usd_per_token"):
        AgentRun(TASK, config=AgentConfig(model="mystery", max_cost_usd=1.0), model_client=ScriptedModel(["hi"]))


def test_a_cost_limit_stops_before_the_request_that_could_break_it() -> None:
    model = ScriptedModel([call("fine")], usage=(1_000, 100))
    config = quick(
        max_iterations=50,
        stagnation_window=50,
        max_cost_usd=0.05,
        prompt_usd_per_token=1e-6,
        reply_usd_per_token=4e-6,
        max_reply_tokens=1_000,
    )

    result = run_agent(TASK, ScriptedTools({"fine": lambda: "fine"}), config, model_client=model)

    assert result.stopped_reason == "budget"
    assert result.usage.cost_usd == pytest.approx(len(model.requests) * 0.0014)
    assert 0.03 < result.usage.cost_usd <= 0.05


# Cancellation


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 # what is waited for is a script's progress, which sets no event
        await asyncio.sleep(0)


def test_cancelling_the_awaiting_task_loses_nothing_and_raises() -> None:
    async def main() -> AgentRun:
        tools = ScriptedTools({"fine": lambda: "fine", "stuck": [HANG]})
        run = AgentRun(TASK, tools, quick(), model_client=ScriptedModel([call("fine", "stuck")]))
        task = asyncio.ensure_future(_wait(run))
        await _until(lambda: len(tools.calls) == 2)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return run

    run = asyncio.run(main())

    assert run.result.stopped_reason == "cancelled"
    assert texts(run.result) == [
        "fine",
        "interrupted: the run was cancelled before this call finished; what it did until then is unknown",
    ]


async def _wait(run: AgentRun) -> AgentResult:
    return await run


@pytest.mark.parametrize("script", [[HANG], [call("stuck")], [call("stuck", "stuck")]])
def test_cancel_ends_the_run_with_its_result(script: list[object]) -> None:
    async def main() -> tuple[AgentResult, bool]:
        tools = ScriptedTools({"stuck": [HANG]})
        run = AgentRun(TASK, tools, quick(), model_client=ScriptedModel(script))
        asyncio.get_running_loop().call_later(0.02, run.cancel)
        return await run, run.cancel()

    result, after = asyncio.run(main())

    assert result.stopped_reason == "cancelled"
    assert after is False


def test_cancelling_twice_or_before_the_start_changes_nothing() -> None:
    async def main() -> AgentResult:
        run = AgentRun(TASK, config=quick(), model_client=ScriptedModel(["never asked"]))
        assert run.cancel()
        assert run.cancel()
        return await run

    result = asyncio.run(main())

    assert (result.stopped_reason, result.usage.model_calls) == ("cancelled", 0)


def test_a_run_may_be_cancelled_from_on_event() -> None:
    runs: list[AgentRun] = []

    async def main() -> AgentResult:
        model = ScriptedModel([call("fine")])
        tools = ScriptedTools({"fine": lambda: "fine"})
        runs.append(
            AgentRun(TASK, tools, quick(), model_client=model, on_event=lambda event, run: _on(run.ledger.tool_calls))
        )
        return await runs[0]

    def _on(tool_calls: int) -> None:
        if tool_calls:
            runs[0].cancel()

    result = asyncio.run(main())

    assert (result.stopped_reason, texts(result)) == ("cancelled", ["fine"])


def test_a_cancel_during_the_closing_request_is_cancelled() -> None:
    async def main() -> AgentResult:
        model = ScriptedModel([call("fine"), HANG])
        tools = ScriptedTools({"fine": lambda: "fine"})
        run = AgentRun(TASK, tools, quick(max_iterations=1, closing_summary=True), model_client=model)
        asyncio.get_running_loop().call_later(0.05, run.cancel)
        return await run

    assert asyncio.run(main()).stopped_reason == "cancelled"


# What a run gives and leaves


def test_the_events_replay_to_the_same_run() -> None:
    model = ScriptedModel([call("fine", "bad"), call("fine"), "done"])
    tools = ScriptedTools({"fine": lambda: "fine", "bad": [ValueError("boom")]})

    async def main() -> AgentRun:
        run = AgentRun(TASK, tools, quick(), model_client=model)
        await run
        return run

    run = asyncio.run(main())

    assert functools.reduce(step, run.result.events, start(TASK, quick())) == run.run


def test_the_result_so_far_is_valid_after_every_step() -> None:
    seen: list[AgentResult] = []
    runs: list[AgentRun] = []
    model = ScriptedModel([call("fine"), call("fine", "nope"), "done"])

    async def main() -> None:
        tools = ScriptedTools({"fine": lambda: "fine"})
        runs.append(AgentRun(TASK, tools, quick(), model_client=model, on_event=lambda *_: seen.append(runs[0].result)))
        await runs[0]

    asyncio.run(main())

    assert len(seen) == 6
    assert not any(openai_faults(result.messages) for result in seen)
    assert [result.stopped_reason for result in seen] == [None] * 5 + ["success"]


def test_an_error_of_the_callers_callback_reaches_the_caller() -> None:
    def broken(event: object, run: object) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        run_agent(TASK, config=quick(), model_client=ScriptedModel(["hi"]), on_event=broken)


def test_a_run_that_is_awaited_twice_gives_the_same_result() -> None:
    async def main() -> tuple[AgentResult, AgentResult]:
        run = AgentRun(TASK, config=quick(), model_client=ScriptedModel(["hi"]))
        return await run, await run

    first, second = asyncio.run(main())

    assert first == second


def test_where_a_loop_runs_run_agent_says_what_to_write() -> None:
    async def main() -> None:
        run_agent(TASK, config=quick(), model_client=ScriptedModel(["hi"]))

    with pytest.raises(RunningLoopError, match=r"await arun_agent\(\.\.\.\)"):
        asyncio.run(main())


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "at least one message"),
        ("hi", "must be a list"),
        ([{"content": "hi"}], "message 0 is no mapping with a role"),
        ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}], "message 1 is the last"),
        ([{"role": "tool", "tool_call_id": "a", "content": "x"}], "message 0 answers a tool call, but none is open"),
    ],
)
def test_messages_that_no_provider_takes_are_refused(messages: Any, said: str) -> None:
    with pytest.raises(MessagesError, match=said):
        run_agent(messages, model_client=ScriptedModel(["hi"]))


def test_one_line_is_logged_a_step_when_asked_for() -> None:
    model = ScriptedModel([call("fine"), "done"])

    with capture_logs() as lines:
        run_agent(TASK, ScriptedTools({"fine": lambda: "fine"}), quick(), model_client=model, log=True)

    assert [(line["source"], line["on"], line["target"]) for line in lines] == [
        ("Plan", "ToolsListed", "Plan"),
        ("Plan", "ModelReplied", "CallTools"),
        ("CallTools", "ToolsFinished", "Plan"),
        ("Plan", "ModelReplied", "Done"),
    ]
    assert lines[-1]["reason"] == "success"
