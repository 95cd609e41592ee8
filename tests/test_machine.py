"""What a run does, as lists of events: `reduce(step, events, start(...))`."""

import json
from collections.abc import Mapping
from functools import reduce
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_fsm.config import AgentConfig
from agent_fsm.directives import DIRECTIVE_MARK
from agent_fsm.errors import MessagesError, NoRowError
from agent_fsm.ledger import clone
from agent_fsm.machine import Run, next_effect, request, start, step
from agent_fsm.messages import message_size, not_run_results
from agent_fsm.protocol import (
    CALL_TOOLS,
    DONE,
    PLAN,
    REPAIR,
    RESEARCH,
    SUMMARIZE,
    AskModel,
    Event,
    Interrupted,
    ListTools,
    Message,
    ModelFailed,
    ModelReplied,
    RunTools,
    State,
    StopReason,
    ToolResult,
    ToolsFinished,
    ToolsListed,
    ToolsUnavailable,
)
from agent_fsm.reading import finished, interrupted, read_reply, read_tools
from agent_fsm.table import TABLE
from agent_fsm.testing import openai_faults, request_faults

TASK = [{"role": "user", "content": "How much is 6 times 7?"}]
LATE = 120.0
"""The default deadline."""


def listed(*names: str, now: float = 0.0) -> ToolsListed:
    tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in names]
    event = read_tools(tools, now=now, backend="backend")
    assert isinstance(event, ToolsListed)
    return event


WORK = listed("work")
WITH_SEARCH = listed("work", "search")


def replied(message: Mapping[str, Any], finish: str = "stop", *, now: float = 1.0, **more: Any) -> ModelReplied:
    usage = {"usage": {"prompt_tokens": 10, "completion_tokens": 5}}
    reply = {"choices": [{"message": message, "finish_reason": finish}], **usage, **more}
    event = read_reply(reply, now=now, offered=("work", "search"), max_calls=8)
    assert isinstance(event, ModelReplied)
    return event


def calls(*names: str, **more: Any) -> ModelReplied:
    return replied({"tool_calls": [{"function": {"name": name}} for name in names or ("work",)]}, **more)


ANSWER = replied({"content": "42"})
UNSURE = replied({"content": "I am not sure, perhaps 42."})
EMPTY = replied({"content": ""})
CUT_OFF = replied({"content": "It is"}, "length")
REFUSED = replied({"refusal": "I won't."})
CALLS = calls()


def ran(reply: ModelReplied = CALLS, *, ok: bool = True, now: float = 2.0, **more: Any) -> ToolsFinished:
    results = tuple(ToolResult("a result", ok, call_id=call.id, name=call.name) for call in reply.calls)
    return evolve(finished(reply.calls, results, {}, now=now), **more)


def stopped(reply: ModelReplied = CALLS, *, cancelled: bool, now: float = 2.0) -> Interrupted:
    return interrupted(not_run_results(reply.calls), now=now, cancelled=cancelled)


OK = ran()
FAILED = ran(ok=False)
SAME_AGAIN = ran(fresh=False, stale=1, repeats=3)
BUSY = ModelFailed(1.0, True, "busy")
BROKEN = ModelFailed(1.0, False, "the key is wrong")
CANCEL = Interrupted(1.0, True)
TIME_UP = Interrupted(1.0, False)


def after(*events: Event, **settings: Any) -> Run:
    return reduce(step, events, start(TASK, AgentConfig(**settings)))


def ended(run: Run) -> StopReason | None:
    assert (run.reason is None) is (run.state is not DONE)
    return run.reason


def asked(run: Run, **settings: Any) -> list[Message]:
    """Return the messages of the request that *run* wants to be sent."""
    ask = next_effect(run)
    assert isinstance(ask, AskModel)
    return request(run, ask, AgentConfig(**settings), timeout_seconds=1.0).messages


# Effects and the way of a plain run


def test_a_run_first_lists_the_tools() -> None:
    assert next_effect(after()) == ListTools()


def test_calls_lead_to_call_tools_and_from_there_back_to_plan() -> None:
    run = after(WORK, CALLS)

    assert (run.state, next_effect(run)) == (CALL_TOOLS, RunTools(CALLS.calls))
    assert next_effect(step(run, OK)) == AskModel(PLAN)


def test_an_answer_is_success() -> None:
    run = after(WORK, ANSWER)

    assert (ended(run), run.answer, next_effect(run)) == (StopReason.SUCCESS, "42", None)


def test_calls_that_may_not_be_run_are_answered_without_being_asked_for() -> None:
    reply = calls("work", "no_such_tool", *["work"] * 8)

    effect = next_effect(after(WORK, reply))

    assert effect == RunTools((reply.calls[0], *reply.calls[2:8]))
    assert [call.not_run.split()[0] for call in reply.calls if call.not_run] == ["there", "only", "only"]


def test_no_tools_to_be_had_names_the_backend_and_its_error() -> None:
    run = after(ToolsUnavailable(0.0, "Gateway", "connection refused"))

    assert ended(run) is StopReason.TOOLS_UNAVAILABLE
    assert "Gateway" in run.detail
    assert "connection refused" in run.detail


# Time


def test_an_event_never_turns_time_back() -> None:
    run = after(WORK, evolve(CALLS, now=50.0), evolve(OK, now=3.0))

    assert run.ledger.seconds == 50.0


@pytest.mark.parametrize(("now", "reason"), [(LATE - 0.001, None), (LATE, StopReason.MAX_WALLCLOCK)])
def test_a_run_at_the_deadline_is_out_of_time(now: float, reason: StopReason | None) -> None:
    assert ended(after(WORK, CALLS, evolve(OK, now=now))) is reason


def test_a_timer_that_fires_early_still_counts_as_the_deadline() -> None:
    assert ended(after(WORK, evolve(TIME_UP, now=LATE - 1))) is StopReason.MAX_WALLCLOCK


def test_the_deadline_holds_while_the_tools_are_listed() -> None:
    assert ended(after(TIME_UP)) is StopReason.MAX_WALLCLOCK
    assert ended(after(evolve(WORK, now=LATE))) is StopReason.MAX_WALLCLOCK


def test_an_answer_that_comes_late_is_still_success() -> None:
    assert ended(after(WORK, evolve(ANSWER, now=LATE + 9))) is StopReason.SUCCESS


def test_a_hedged_answer_that_comes_late_is_still_success() -> None:
    assert ended(after(WITH_SEARCH, evolve(UNSURE, now=LATE))) is StopReason.SUCCESS


def test_calls_that_come_late_wait_for_their_answers() -> None:
    late = evolve(CALLS, now=LATE)

    run = after(WORK, late, stopped(late, cancelled=False, now=LATE))

    assert (ended(run), run.ledger.tool_calls) == (StopReason.MAX_WALLCLOCK, 0)
    assert openai_faults(run.transcript.messages()) == []


# Iterations


def test_iterations_are_requests_from_plan_repair_and_research() -> None:
    run = after(WITH_SEARCH, CALLS, FAILED, UNSURE, CALLS, OK)

    assert (run.state, run.ledger.iterations, run.ledger.hops) == (PLAN, 4, 1)


def test_retries_and_summaries_are_no_iterations() -> None:
    run = after(WORK, BUSY, CALLS, OK, ANSWER, summarize_every=1)

    assert (run.state, run.ledger.iterations, run.ledger.summaries, run.ledger.model_calls) == (PLAN, 2, 1, 3)


def test_a_run_at_the_iteration_limit_sends_no_further_request() -> None:
    run = after(WORK, CALLS, OK, CALLS, OK, max_iterations=2, closing_summary=False)

    assert (ended(run), run.ledger.iterations) == (StopReason.MAX_ITERATIONS, 2)


def test_an_answer_at_the_iteration_cap_is_success() -> None:
    assert ended(after(WORK, ANSWER, max_iterations=1)) is StopReason.SUCCESS


def test_a_hedged_answer_at_the_iteration_cap_is_success() -> None:
    assert ended(after(WITH_SEARCH, UNSURE, max_iterations=1)) is StopReason.SUCCESS


# What comes first


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (evolve(CANCEL, now=LATE), StopReason.CANCELLED),
        (evolve(BROKEN, now=LATE), StopReason.MAX_WALLCLOCK),
        (evolve(REFUSED, now=LATE), StopReason.MAX_WALLCLOCK),
        (evolve(BUSY, now=LATE), StopReason.MAX_WALLCLOCK),
        (evolve(REFUSED, prompt_tokens=10**9), StopReason.REFUSED),
        (evolve(ANSWER, prompt_tokens=10**9), StopReason.SUCCESS),
        (evolve(UNSURE, prompt_tokens=10**9), StopReason.SUCCESS),
        (evolve(EMPTY, prompt_tokens=10**9), StopReason.BUDGET),
    ],
)
def test_of_two_reasons_to_end_the_earlier_in_observe_holds(last: Event, reason: StopReason) -> None:
    assert ended(after(WITH_SEARCH, last)) is reason


def test_the_failure_cap_precedes_stagnation_and_stagnation_the_iteration_cap() -> None:
    stuck = evolve(SAME_AGAIN, failed=True)
    settings = {"stagnation_window": 1, "max_iterations": 2, "closing_summary": False, "enable_repair": False}
    events: list[Event] = [WORK, CALLS, stuck, CALLS, stuck]

    assert ended(after(*events, **settings, max_consecutive_failures=2)) is StopReason.MAX_FAILURES
    assert ended(after(*events, **settings)) is StopReason.STAGNATION
    assert ended(after(*events[:4], OK, **settings)) is StopReason.MAX_ITERATIONS


def test_a_failed_turn_is_mended_before_a_summary_is_written() -> None:
    assert after(WORK, CALLS, FAILED, summarize_every=1).state is REPAIR
    assert after(WORK, CALLS, OK, summarize_every=1).state is SUMMARIZE


# Failed requests


@pytest.mark.parametrize(
    ("before", "state"),
    [([WITH_SEARCH], PLAN), ([WITH_SEARCH, EMPTY], REPAIR), ([WITH_SEARCH, UNSURE], RESEARCH)],
)
def test_a_failed_request_returns_to_the_state_that_asked(before: list[Event], state: State) -> None:
    run = after(*before)
    again = step(run, BUSY)

    assert next_effect(again) == AskModel(state, attempt=1, not_before=1.5)
    assert (again.ledger.iterations, again.ledger.hops) == (run.ledger.iterations, run.ledger.hops)
    assert asked(again) == asked(run)


def test_retries_wait_longer_each_time_and_as_long_as_they_are_asked_to() -> None:
    polite = evolve(BUSY, retry_after=30.0)

    assert next_effect(after(WORK, BUSY, BUSY)) == AskModel(PLAN, attempt=2, not_before=2.0)
    assert next_effect(after(WORK, polite)) == AskModel(PLAN, attempt=1, not_before=31.0)


def test_an_attempt_goes_to_its_fallback_model_and_those_beyond_them_to_the_last() -> None:
    config = AgentConfig(model="first", fallback_models=("second", "third"), max_model_retries=3)
    run, models = after(WORK, max_model_retries=3), []
    for _ in range(4):
        ask = next_effect(run)
        assert isinstance(ask, AskModel)
        models.append(request(run, ask, config, timeout_seconds=1.0).model)
        run = step(run, BUSY)

    assert models == ["first", "second", "third", "third"]


@pytest.mark.parametrize("retries", [0, 1, 2])
def test_a_request_is_retried_so_many_times_and_no_more(retries: int) -> None:
    run = after(WORK, *[BUSY] * retries, max_model_retries=retries)

    assert ended(run) is None
    assert ended(step(run, BUSY)) is StopReason.MODEL_ERROR


def test_a_reply_gives_the_next_request_all_its_retries_again() -> None:
    run = after(WORK, BUSY, CALLS, OK, BUSY, max_model_retries=1)

    assert next_effect(run) == AskModel(PLAN, attempt=1, not_before=2.5)


def test_a_retry_that_would_come_past_the_deadline_is_a_model_error_at_once() -> None:
    run = after(WORK, evolve(BUSY, retry_after=LATE - 1.0))

    assert (ended(run), run.detail) == (
        StopReason.MODEL_ERROR,
        "busy; the next try would come after max_wallclock_seconds",
    )
    assert ended(after(WORK, evolve(BUSY, retry_after=LATE - 1.1))) is None


def test_a_fatal_failure_is_a_model_error_and_says_what_happened() -> None:
    run = after(WORK, BROKEN)

    assert (ended(run), run.detail) == (StopReason.MODEL_ERROR, "the key is wrong")


# Caps and the closing request

CAPPED: list[Event] = [WORK, CALLS, OK]
SO_FAR = replied({"content": "So far: 6 times 7 was asked."})


def test_a_cap_ends_in_one_closing_request() -> None:
    run = after(*CAPPED, max_iterations=1)

    assert next_effect(run) == AskModel(SUMMARIZE)

    run = step(run, SO_FAR)

    assert (ended(run), run.answer) == (StopReason.MAX_ITERATIONS, "So far: 6 times 7 was asked.")
    assert run.transcript.messages()[-1] == {"role": "assistant", "content": "So far: 6 times 7 was asked."}


@pytest.mark.parametrize(
    ("listing", "tools", "choice"),
    [
        (WITH_SEARCH, ["work", "search"], {"type": "function", "function": {"name": "search"}}),
        (listed("work", "search", "docs_lookup"), ["search", "docs_lookup"], "required"),
    ],
)
def test_a_research_request_wants_a_research_tool_called(listing: ToolsListed, tools: list[str], choice: Any) -> None:
    assert offered(after(listing, UNSURE)) == (tools, choice)


def test_any_other_request_leaves_the_model_the_choice() -> None:
    assert offered(after(WITH_SEARCH)) == (["work", "search"], "auto")
    assert offered(after(WITH_SEARCH, EMPTY)) == (["work", "search"], "auto")
    assert offered(after(listed())) == ([], None)


def offered(run: Run) -> tuple[list[str], Any]:
    """Return the names of the tools that the next request offers, and which the model may choose."""
    ask = next_effect(run)
    assert isinstance(ask, AskModel)
    sent = request(run, ask, AgentConfig(), timeout_seconds=1.0)
    return [tool["function"]["name"] for tool in sent.tools], sent.tool_choice


def test_the_closing_request_has_no_tools() -> None:
    run = after(*CAPPED, max_iterations=1)
    ask = next_effect(run)
    assert isinstance(ask, AskModel)

    sent = request(run, ask, AgentConfig(), timeout_seconds=1.0)

    assert (sent.tools, sent.tool_choice, request_faults(sent.messages)) == ((), None, [])


@pytest.mark.parametrize("failure", [BUSY, BROKEN, TIME_UP, EMPTY, REFUSED, evolve(SO_FAR, now=LATE)])
def test_however_the_closing_request_ends_the_reason_stays(failure: Event) -> None:
    assert ended(after(*CAPPED, failure, max_iterations=1)) is StopReason.MAX_ITERATIONS


def test_a_cancel_during_the_closing_request_is_cancelled() -> None:
    assert ended(after(*CAPPED, CANCEL, max_iterations=1)) is StopReason.CANCELLED


def test_calls_in_the_closing_reply_never_enter_the_transcript_and_text_cut_off_is_kept() -> None:
    reply = replied({"content": "Half of it", **{"tool_calls": [{"function": {"name": "work"}}]}}, "length")

    run = after(*CAPPED, reply, max_iterations=1)

    assert run.answer == "Half of it"
    assert run.transcript.messages()[-1] == {"role": "assistant", "content": "Half of it"}


def test_without_a_closing_summary_a_cap_ends_the_run() -> None:
    assert ended(after(*CAPPED, max_iterations=1, closing_summary=False)) is StopReason.MAX_ITERATIONS


@pytest.mark.parametrize("last", [TIME_UP, CANCEL, BROKEN])
def test_after_a_deadline_a_cancel_or_a_model_error_there_is_no_closing_request(last: Event) -> None:
    assert ended(after(WORK, last)) is not None


def test_a_hedged_answer_is_the_best_so_far_until_there_is_a_better_one() -> None:
    run = after(WITH_SEARCH, UNSURE, CALLS, OK, EMPTY, max_iterations=2)

    assert (ended(run), run.answer) == (StopReason.MAX_ITERATIONS, "I am not sure, perhaps 42.")


def test_a_closing_request_is_asked_at_once_whatever_failed_before_it() -> None:
    left = 500_000 - after(WORK, evolve(EMPTY, prompt_tokens=0)).ledger.tokens_needed

    run = after(WORK, evolve(EMPTY, prompt_tokens=left), evolve(BUSY, retry_after=10_000.0))

    assert (run.ledger.ending, next_effect(run)) == (StopReason.BUDGET, AskModel(SUMMARIZE))


# Periodic summaries


@pytest.mark.parametrize("failure", [BUSY, BROKEN, EMPTY])
def test_a_failed_periodic_summary_is_no_failure(failure: Event) -> None:
    run = after(WORK, CALLS, OK, failure, summarize_every=1)

    assert (next_effect(run), run.ledger.failures, run.ledger.turns) == (AskModel(PLAN), 0, 1)


def test_a_periodic_summary_stands_in_for_what_came_before_the_latest_turn() -> None:
    run = after(WORK, CALLS, OK, CALLS, OK, replied({"content": "6 * 7 was tried."}), summarize_every=2)

    messages = asked(run)

    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool"]
    assert "6 * 7 was tried." in messages[0]["content"]
    assert len(run.transcript.messages()) == 5


def test_a_summary_is_due_only_after_so_many_turns() -> None:
    assert after(WORK, CALLS, OK, summarize_every=2).state is PLAN
    assert after(WORK, CALLS, OK, CALLS, OK, summarize_every=2).state is SUMMARIZE


# Budgets


def test_reported_usage_is_what_is_charged() -> None:
    assert after(WORK, evolve(CALLS, prompt_tokens=700, completion_tokens=30)).ledger.tokens == 730


@pytest.mark.parametrize("unknown", [{"prompt_tokens": None}, {"completion_tokens": None}])
def test_missing_usage_counts_as_the_worst_case(unknown: dict[str, Any]) -> None:
    run = after(WORK)

    charged = step(run, evolve(CALLS, **unknown)).ledger.tokens

    assert charged == run.ledger.request_tokens > 4_096


@pytest.mark.parametrize("event", [BUSY, BROKEN, TIME_UP, CANCEL])
def test_a_request_without_a_reply_counts_as_the_worst_case(event: Event) -> None:
    run = after(WORK)

    assert step(run, event).ledger.tokens == run.ledger.request_tokens


def test_interrupted_tools_cost_no_request() -> None:
    run = after(WORK, CALLS)

    assert step(run, stopped(cancelled=True)).ledger.tokens == run.ledger.tokens


def test_a_request_is_sent_if_its_worst_case_just_fits_and_not_if_it_does_not() -> None:
    left = 500_000 - after(WORK, evolve(EMPTY, prompt_tokens=0)).ledger.tokens_needed

    assert after(WORK, evolve(EMPTY, prompt_tokens=left)).state is REPAIR
    short = after(WORK, evolve(EMPTY, prompt_tokens=left + 1))
    assert (short.state, short.ledger.ending) == (SUMMARIZE, StopReason.BUDGET)


def test_work_leaves_room_for_the_closing_request() -> None:
    left = 500_000 - after(WORK, evolve(EMPTY, prompt_tokens=0)).ledger.tokens_needed

    run = after(WORK, evolve(EMPTY, prompt_tokens=left), evolve(EMPTY, prompt_tokens=None))

    assert (run.state, run.ledger.ending) == (SUMMARIZE, StopReason.BUDGET)
    assert run.ledger.tokens + run.ledger.request_tokens <= 500_000


def test_a_budget_that_holds_not_even_the_closing_request_ends_the_run() -> None:
    assert ended(after(WORK, evolve(EMPTY, prompt_tokens=499_000))) is StopReason.BUDGET


def test_money_is_judged_like_tokens() -> None:
    prices = {"prompt_usd_per_token": 1e-6, "reply_usd_per_token": 2e-6, "closing_summary": False}
    needed = after(WORK, **prices, max_cost_usd=1.0).ledger.cost_needed_usd

    assert needed > 0
    assert ended(after(WORK, **prices, max_cost_usd=needed)) is None
    assert ended(after(WORK, **prices, max_cost_usd=needed * 0.999)) is StopReason.BUDGET
    assert ended(after(WORK, evolve(EMPTY, cost_usd=0.999), **prices, max_cost_usd=1.0)) is StopReason.BUDGET


DULL: list[Event] = [CALLS, CALLS, CALLS, EMPTY, CUT_OFF, UNSURE, BUSY]
honest_usage = st.none() | st.floats(0, 1)
"""Nothing reported, or so much of the worst case."""


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_as_long_as_usage_is_reported_honestly_no_budget_is_exceeded(data: st.DataObject) -> None:
    config = AgentConfig(
        max_iterations=6,
        max_tokens_total=data.draw(st.integers(1_000, 60_000)),
        max_reply_tokens=500,
        summarize_every=2,
        max_history_messages=4,
        closing_summary=data.draw(st.booleans()),
    )
    run = step(start(TASK, config), WITH_SEARCH)
    while (effect := next_effect(run)) is not None:
        if isinstance(effect, RunTools):
            text = "x" * data.draw(st.integers(0, 9_000))
            results = tuple(ToolResult(text, data.draw(st.booleans()), call_id=each.id) for each in effect.calls)
            run = step(run, finished(effect.calls, results, {}, now=0.0))
            continue
        assert isinstance(effect, AskModel)
        sent = request(run, effect, config, timeout_seconds=1.0)
        worst = run.ledger.request_tokens

        assert sum(map(message_size, sent.messages)) + config.max_reply_tokens <= worst
        assert run.ledger.tokens + worst <= config.max_tokens_total

        part = data.draw(honest_usage)
        event = data.draw(st.sampled_from(DULL))
        if isinstance(event, ModelReplied):
            used = None if part is None else int(part * worst)
            event = evolve(event, prompt_tokens=used, completion_tokens=0)
        run = step(run, event)

    assert run.ledger.tokens <= config.max_tokens_total


# Failures, research and stagnation


@pytest.mark.parametrize("failure", [[CALLS, FAILED], [EMPTY], [CUT_OFF]])
def test_a_turn_that_failed_is_mended(failure: list[Event]) -> None:
    run = after(WORK, *failure)

    assert (run.state, run.ledger.failures) == (REPAIR, 1)
    assert asked(run)[-1]["content"].startswith(DIRECTIVE_MARK)


def test_a_turn_in_which_another_call_of_the_tool_succeeded_is_no_failure() -> None:
    reply = calls("work", "work")
    results = [
        ToolResult("no", False, call_id="call_0_0", name="work"),
        ToolResult("yes", call_id="call_0_1", name="work"),
    ]
    mended = finished(reply.calls, tuple(results), {}, now=2.0)
    spoiled = finished(reply.calls, tuple(reversed(results)), {}, now=2.0)

    assert after(WORK, reply, mended).state is PLAN
    assert after(WORK, reply, spoiled).state is REPAIR


def test_a_turn_that_succeeds_ends_the_row_of_failures() -> None:
    assert after(WORK, CALLS, FAILED, CALLS, OK).ledger.failures == 0


def test_so_many_failures_in_a_row_end_the_run() -> None:
    settings = {"max_consecutive_failures": 2, "closing_summary": False}

    assert ended(after(WORK, CALLS, FAILED, **settings)) is None
    assert ended(after(WORK, CALLS, FAILED, EMPTY, **settings)) is StopReason.MAX_FAILURES


def test_without_repair_a_failure_leads_back_to_plan() -> None:
    assert after(WORK, CALLS, FAILED, enable_repair=False).state is PLAN


def test_a_refusal_ends_the_run_with_its_words() -> None:
    run = after(WORK, REFUSED)

    assert (ended(run), run.detail) == (StopReason.REFUSED, "I won't.")


def test_a_hedged_answer_leads_to_research_where_there_is_any() -> None:
    assert after(WITH_SEARCH, UNSURE).state is RESEARCH
    assert ended(after(WORK, UNSURE)) is StopReason.SUCCESS
    assert ended(after(WITH_SEARCH, UNSURE, research_on_unsure=False)) is StopReason.SUCCESS
    assert ended(after(WITH_SEARCH, UNSURE, UNSURE, max_research_hops=1)) is StopReason.SUCCESS
    assert ended(after(WITH_SEARCH, UNSURE, max_research_hops=0)) is StopReason.SUCCESS


def test_failures_escalate_to_research_where_there_is_any() -> None:
    failures: list[Event] = [CALLS, FAILED, CALLS, FAILED]

    assert after(WITH_SEARCH, *failures).state is RESEARCH
    assert after(WORK, *failures).state is REPAIR
    assert after(WITH_SEARCH, *failures, research_after_failures=False).state is REPAIR


STUCK: list[Event] = [CALLS, SAME_AGAIN]


def test_escalation_precedes_the_nudge() -> None:
    stuck: list[Event] = [CALLS, evolve(SAME_AGAIN, failed=True)] * 2
    settings = {"stagnation_window": 2}

    assert after(WITH_SEARCH, *stuck, **settings).state is RESEARCH
    assert after(WORK, *stuck, **settings).ledger.nudges == 1


def test_the_nudge_comes_once_even_without_enable_repair() -> None:
    settings = {"stagnation_window": 1, "enable_repair": False, "closing_summary": False}

    run = after(WORK, *STUCK, **settings)

    assert (run.state, run.ledger.nudges) == (REPAIR, 1)
    assert asked(run)[-1]["content"].startswith(DIRECTIVE_MARK)
    assert ended(reduce(step, STUCK, run)) is StopReason.STAGNATION


@pytest.mark.parametrize(("stale", "repeats", "state"), [(3, 3, REPAIR), (2, 3, PLAN), (3, 2, PLAN)])
def test_a_run_is_stuck_when_nothing_is_new_and_the_last_is_there_for_the_third_time(
    stale: int, repeats: int, state: State
) -> None:
    assert after(WORK, CALLS, ran(fresh=False, stale=stale, repeats=repeats)).state is state


def test_stale_results_add_up_over_turns_until_something_is_new() -> None:
    stale: list[Event] = [CALLS, ran(fresh=False, stale=1, repeats=2)]
    fresh: list[Event] = [CALLS, ran(fresh=True, stale=1, repeats=2)]

    assert after(WORK, *stale, *stale).ledger.stale == 2
    assert after(WORK, *stale, *stale, *fresh).ledger.stale == 1


def test_an_empty_reply_says_nothing_new_about_repetition() -> None:
    run = after(WORK, *STUCK, EMPTY, stagnation_window=1, closing_summary=False)

    assert (ended(run), run.ledger.nudges) == (None, 1)


def test_a_turn_with_more_calls_than_are_run_is_no_failure_if_those_that_ran_succeeded() -> None:
    reply = calls(*["work"] * 9)
    results = [ToolResult("fine", call_id=call.id, name=call.name) for call in reply.calls[:8]]

    run = after(WORK, reply, finished(reply.calls, (*results, *not_run_results(reply.calls[8:])), {}, now=2.0))

    assert (run.state, run.ledger.failures) == (PLAN, 0)


# Interruptions


@pytest.mark.parametrize("before", [[], [WORK], [WORK, EMPTY], [WITH_SEARCH, UNSURE], [WORK, BUSY]])
def test_a_cancel_holds_wherever_a_run_waits(before: list[Event]) -> None:
    assert ended(after(*before, CANCEL)) is StopReason.CANCELLED


@pytest.mark.parametrize(("cancelled", "reason"), [(True, StopReason.CANCELLED), (False, StopReason.MAX_WALLCLOCK)])
def test_interrupted_calls_are_answered_and_finished_results_kept(cancelled: bool, reason: StopReason) -> None:
    reply = calls("work", "search")
    results = (ToolResult("found", call_id="call_0_0", name="work"), *not_run_results(reply.calls[1:]))

    run = after(WITH_SEARCH, reply, interrupted(results, now=2.0, cancelled=cancelled))

    assert (ended(run), run.ledger.tool_calls) == (reason, 1)
    assert [message["role"] for message in run.transcript.messages()] == ["user", "assistant", "tool", "tool"]
    assert run.transcript.messages()[2]["content"] == "found"
    assert openai_faults(run.transcript.messages()) == []


@pytest.mark.parametrize("results", [(), (ToolResult("a"), ToolResult("b"))])
def test_each_call_has_exactly_one_result_or_the_event_is_refused(results: tuple[ToolResult, ...]) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        after(WORK, CALLS, ToolsFinished(2.0, results))


# Replies that are no answer


@pytest.mark.parametrize(("finish", "state"), [("length", REPAIR), ("content_filter", DONE)])
def test_calls_of_a_reply_cut_off_or_refused_are_answered_not_run(finish: str, state: State) -> None:
    reply = replied({"content": "So", "tool_calls": [{"function": {"name": "work"}}]}, finish)

    run = after(WORK, reply)

    assert (run.state, run.ledger.tool_calls) == (state, 0)
    assert run.transcript.messages()[2]["content"].startswith("not run: ")
    assert openai_faults(run.transcript.messages()) == []


def test_an_empty_reply_enters_no_transcript() -> None:
    assert len(after(WORK, EMPTY, enable_repair=False).transcript.messages()) == 1


@pytest.mark.parametrize("summarize_every", [None, 1])
def test_a_request_after_a_reply_cut_off_ends_with_a_user_message_without_repair_too(
    summarize_every: int | None,
) -> None:
    settings = {"enable_repair": False, "summarize_every": summarize_every}
    events: list[Event] = [WORK, CUT_OFF] if summarize_every is None else [WORK, CUT_OFF, SO_FAR]

    run = after(*events, **settings)

    assert (run.state, request_faults(asked(run, **settings))) == (PLAN, [])


# A run is a value


def test_step_leaves_the_run_it_was_given_as_it_was() -> None:
    run = after(WORK)
    ledger, messages = clone(run.ledger), run.transcript.messages()
    for event in (CALLS, EMPTY, CUT_OFF, UNSURE, ANSWER, BUSY, CANCEL):
        step(run, event)

        assert (run.ledger, run.state, run.pending, run.transcript.messages()) == (ledger, PLAN, None, messages)


def test_two_runs_may_go_on_from_the_same_one() -> None:
    run = after(WORK, CALLS)

    one, other = step(run, ran()), step(run, stopped(cancelled=True))

    assert [message["content"] for message in one.transcript.messages()[2:]] == ["a result"]
    assert [message["content"] for message in other.transcript.messages()[2:]] == ["not run: "]


def test_the_same_events_give_the_same_run() -> None:
    events: list[Event] = [WITH_SEARCH, CALLS, FAILED, BUSY, UNSURE, CALLS, OK]

    assert after(*events) == after(*events)


@pytest.mark.parametrize("event", [WORK, ANSWER, BUSY, CANCEL])
def test_nothing_happens_to_a_run_that_is_over(event: Event) -> None:
    run = after(WORK, ANSWER)

    with pytest.raises(NoRowError, match="in Done"):
        step(run, event)


def test_an_event_out_of_place_names_itself_and_the_state() -> None:
    with pytest.raises(NoRowError, match="no row for ModelReplied in CallTools"):
        after(WORK, CALLS, ANSWER)


def test_results_out_of_place_have_no_row() -> None:
    with pytest.raises(NoRowError, match="no row for ToolsFinished in Plan"):
        after(WORK, OK)


# What a review found


def test_half_a_surrogate_in_broken_arguments_is_not_shown_again() -> None:
    reply = replied({"tool_calls": [{"function": {"name": "work", "arguments": '{"a": "\ud800"'}}]})

    run = after(WORK, reply, finished(reply.calls, not_run_results(reply.calls), {}, now=2.0))

    assert "you wrote" in str(run.transcript.messages()[2]["content"])
    json.dumps(run.transcript.messages(), ensure_ascii=False).encode()


def test_a_refusal_is_no_summary() -> None:
    refusal = replied({"content": "I can't help with that."}, "content_filter")

    run = after(WORK, CALLS, OK, refusal, summarize_every=1)

    assert (run.state, run.transcript.summary) == (PLAN, "")


def test_a_refusal_is_no_closing_answer() -> None:
    refusal = replied({"content": "I can't help with that."}, "content_filter")

    run = after(WORK, CALLS, OK, refusal, max_iterations=1)

    assert (ended(run), run.answer) == (StopReason.MAX_ITERATIONS, None)


@pytest.mark.parametrize("keep", [1, 3, 4])
def test_trimming_keeps_the_turn_that_a_directive_is_about(keep: int) -> None:
    run = after(WORK, calls("work", "work"), ran(calls("work", "work"), ok=False), max_history_messages=keep)

    assert [message["role"] for message in asked(run, max_history_messages=keep)] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "user",
    ]


def test_a_hedged_answer_between_two_failures_is_no_failure_in_a_row() -> None:
    run = after(WITH_SEARCH, CALLS, FAILED, UNSURE, CALLS, FAILED, max_consecutive_failures=2)

    assert (ended(run), run.ledger.failures) == (None, 1)


def test_the_backoff_of_very_many_retries_is_capped() -> None:
    limits = {"max_model_retries": 2_000, "max_wallclock_seconds": 1e6, "max_tokens_total": 10**9}

    run = after(WORK, *[BUSY] * 1_100, **limits)

    assert (run.ledger.attempts, run.ledger.retry_at) == (1_100, 9.0)


def test_a_run_that_ends_over_budget_says_what_would_not_fit() -> None:
    run = after(WORK, max_tokens_total=5_000)

    assert ended(run) is StopReason.BUDGET
    assert "max_tokens_total=5,000" in run.detail
    assert "max_reply_tokens" in run.detail


def test_calls_that_a_policy_does_not_let_be_run_are_answered() -> None:
    first = next(number for number, row in enumerate(TABLE) if row.target is CALL_TOOLS)
    policy = (*TABLE[:first], *TABLE[first + 1 :])  # nothing leads to CallTools any more

    run = step(step(start(TASK, AgentConfig(), policy), WORK), CALLS)

    assert run.transcript.messages()[2]["content"] == "not run: the policy of this run did not allow it"
    assert run.state is PLAN


def test_what_a_provider_wants_back_counts_with_all_its_data() -> None:
    call = {"function": {"name": "work"}, "provider_specific_fields": {"type": "image", "data": "x" * 100_000}}

    assert replied({"tool_calls": [call]}).size > 100_000


def test_a_file_counts_with_all_its_data_and_an_image_as_an_image() -> None:
    file = {"type": "file", "file": {"file_data": "x" * 200_000}}
    image = {"type": "image_url", "image_url": {"url": "data:" + "x" * 200_000}}

    assert message_size({"role": "user", "content": [file]}) > 200_000
    assert 50_000 <= message_size({"role": "user", "content": [image]}) < 51_000


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "banana", "content": "x"}, "no mapping with a role of system, developer"),
        ({"role": "user"}, "its content is None; it must be a text that is not blank"),
        ({"role": "user", "content": 5}, "its content is 5"),
        ({"role": "user", "content": [{"type": "text", "text": " "}]}, "must be a text that is not blank"),
        ({"role": "user", "content": "\ud800"}, "can't be sent as JSON"),
        ({"role": "user", "content": "x", "when": object()}, "can't be sent as JSON"),
        ({"role": "user", "content": "x", "tool_calls": []}, "tool_calls that are no list of calls"),
        ({"role": "assistant", "content": "x", "tool_calls": 5}, "tool_calls that are no list of calls"),
        ({"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f"}}]}, "without 'type': 'function'"),
        ({"role": "assistant", "content": ""}, "or leave the message out"),
    ],
)
def test_a_message_that_no_provider_takes_is_refused_by_its_number(message: Message, said: str) -> None:
    with pytest.raises(MessagesError, match=f"message 1 .*{said}"):
        start([*TASK, message, *TASK], AgentConfig())


def test_the_callers_messages_are_copied() -> None:
    part = {"type": "text", "text": "short"}
    run = start([{"role": "user", "content": [part]}], AgentConfig())

    part["text"] = "long" * 1_000

    assert run.transcript.messages()[0]["content"] == [{"type": "text", "text": "short"}]
