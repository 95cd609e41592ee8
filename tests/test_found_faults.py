"""Tables that a proof was once false of: each goes round for ever, by the events given with it."""

import copy
from collections.abc import Sequence
from functools import reduce
from typing import Any

import pytest
from attrs import evolve, frozen

from agent_fsm.check import Verdict, check, verify
from agent_fsm.config import AgentConfig
from agent_fsm.guards import ALWAYS, Guard, counter, ledger, limits
from agent_fsm.machine import start, step
from agent_fsm.messages import not_run_results
from agent_fsm.protocol import (
    CALL_TOOLS,
    DONE,
    OBSERVE,
    PLAN,
    REPAIR,
    RESEARCH,
    Ended,
    Event,
    Interrupted,
    ModelFailed,
    ModelReplied,
    Said,
    State,
    StopReason,
    ToolResult,
    ToolsFinished,
    ToolsListed,
    ToolsUnavailable,
)
from agent_fsm.reading import read_reply
from agent_fsm.table import Row, Table, add, observe

TASK = ({"role": "user", "content": "x"},)
CONFIG = AgentConfig(max_iterations=3, max_tools_per_iter=2)
ASKING = (PLAN, REPAIR, RESEARCH)


def said(what: Said) -> Guard:
    guard: Guard = ledger.said.is_(what)
    return guard


def ended(how: Ended) -> Guard:
    guard: Guard = ledger.ended.is_(how)
    return guard


def end(guard: Guard) -> Row:
    return observe(guard, DONE, reason=StopReason.SUCCESS)


def waits(states: Sequence[State], *events: type[Event]) -> Row:
    return Row(tuple(states), events, ALWAYS, OBSERVE)


RETRYABLE, AT_FIRST = ended(Ended.RETRYABLE), said(Said.NOTHING)
TOO_DEAR = ledger.tokens_needed > limits.max_tokens_total
LISTED = (
    waits((PLAN,), ToolsListed),
    Row((PLAN,), (ToolsUnavailable,), ALWAYS, DONE, (), StopReason.TOOLS_UNAVAILABLE),
)
CALLED = Row(ASKING, (ModelReplied,), said(Said.CALLS), CALL_TOOLS)
REPLIED = waits(ASKING, ModelReplied)
BROKEN = (waits(ASKING, ModelFailed), waits(ASKING, Interrupted))
RAN = waits((CALL_TOOLS,), ToolsFinished, Interrupted)
STOPS = (
    observe(ended(Ended.CANCELLED), DONE, reason=StopReason.CANCELLED),
    observe(
        ended(Ended.TIMED_OUT) | (ledger.seconds >= limits.max_wallclock_seconds),
        DONE,
        reason=StopReason.MAX_WALLCLOCK,
    ),
    observe(ended(Ended.FATAL), DONE, reason=StopReason.MODEL_ERROR),
)
ALL = (*LISTED, CALLED, REPLIED, *BROKEN, RAN, *STOPS)
UNCALLED = (*LISTED, REPLIED, *BROKEN, *STOPS)
"""Rows of a policy that lets no call be run."""


def reply(message: dict[str, Any], *, tokens: int = 0) -> ModelReplied:
    usage = {"prompt_tokens": tokens, "completion_tokens": 0}
    raw = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}
    read = read_reply(raw, now=0.0, offered=("work", "search"), max_calls=CONFIG.max_tools_per_iter)
    assert isinstance(read, ModelReplied)
    return read


def calling(name: str, *, tokens: int = 0) -> ModelReplied:
    return reply({"tool_calls": [{"function": {"name": name}}]}, tokens=tokens)


def finished(asked: ModelReplied) -> ToolsFinished:
    ran = tuple(ToolResult("x", call_id=call.id, name=call.name) for call in asked.calls if not call.not_run)
    return ToolsFinished(0.0, ran or not_run_results(asked.calls), failed=not ran)


TOOLS = ToolsListed(0.0)
EMPTY, ANSWER = reply({"content": " "}), reply({"content": "It is so."})
SEARCH, STRANGE = calling("search"), calling("unheard_of")
FAILED = ModelFailed(0.0, retryable=True, error="error")
trap, first, second = counter("trap"), counter("first"), counter("second")


@frozen
class Endless:
    """Rows, how a run gets in, and how it goes round."""

    rows: tuple[Row, ...]
    loop: tuple[Event, ...]
    entry: tuple[Event, ...] = (TOOLS,)


ENDLESS = {
    "other tools are called than the one counted": Endless(
        (
            *ALL,
            end((~said(Said.CALLS) & ~AT_FIRST) | RETRYABLE | ended(Ended.FAILED)),
            end(ledger.calls_of("work") >= 2),
            observe(ALWAYS, PLAN),
        ),
        (SEARCH, finished(SEARCH)),
    ),
    "no call can be run though any name is counted": Endless(
        (
            *ALL,
            end((~said(Said.CALLS) & ~AT_FIRST) | RETRYABLE),
            end((ledger.tool_calls >= 2) | (ledger.calls_of("no_such_tool") >= 2)),
            observe(ALWAYS, PLAN),
        ),
        (STRANGE, finished(STRANGE)),
    ),
    "a reply without calls leads to CallTools": Endless(
        (
            *LISTED,
            evolve(CALLED, guard=ALWAYS),
            *BROKEN,
            RAN,
            *STOPS,
            end(said(Said.CALLS)),
            observe(said(Said.EMPTY) | (AT_FIRST & ~RETRYABLE), PLAN),
            end(ALWAYS),
        ),
        (EMPTY, ToolsFinished(0.0, (), fresh=False)),
    ),
    "a state that waits asks what the request in hand may cost": Endless(
        (
            *LISTED,
            evolve(CALLED, guard=CALLED.guard & (ledger.request_tokens >= 1)),
            Row(ASKING, (ModelReplied,), ALWAYS, DONE, (), StopReason.SUCCESS),
            *BROKEN,
            RAN,
            *STOPS,
            end(RETRYABLE),
            observe(ALWAYS, PLAN),
        ),
        (SEARCH, finished(SEARCH)),
    ),
    "work does not fit, the closing request does, and both are asked with <=": Endless(
        (
            *ALL,
            end((~said(Said.EMPTY) & ~AT_FIRST) | RETRYABLE),
            observe(
                ~(ledger.tokens_needed <= limits.max_tokens_total)
                & (ledger.closing_tokens_needed <= limits.max_tokens_total),
                PLAN,
            ),
            end(ledger.iterations >= 3),
            observe(ALWAYS, PLAN, add("iterations")),
        ),
        (EMPTY,),
        (ToolsListed(0.0, size=CONFIG.max_tokens_total - 10_000),),
    ),
    "work did fit before the results, the closing request does not after them": Endless(
        (
            *LISTED,
            CALLED,
            REPLIED,
            *BROKEN,
            Row((CALL_TOOLS,), (ToolsFinished,), TOO_DEAR, DONE, (), StopReason.BUDGET),
            RAN,
            *STOPS,
            end(RETRYABLE | (ledger.iterations >= 3)),
            observe(trap >= 1, PLAN),
            end(~said(Said.CALLS) & ~AT_FIRST),
            observe(said(Said.CALLS) & (ledger.closing_tokens_needed > limits.max_tokens_total), PLAN, add(trap)),
            observe(ALWAYS, PLAN, add("iterations")),
        ),
        (EMPTY,),
        (TOOLS, calling("search", tokens=499_500), finished(SEARCH)),
    ),
    "a row raises what results also set": Endless(
        (
            *UNCALLED,
            end((~said(Said.EMPTY) & ~AT_FIRST) | RETRYABLE),
            observe(ledger.stale >= 3, PLAN),
            end(ledger.iterations >= 5),
            observe(ALWAYS, PLAN, add("iterations"), add("stale")),
        ),
        (EMPTY,),
    ),
    "a step resets the failures and its row adds one": Endless(
        (
            *UNCALLED,
            end(RETRYABLE),
            observe(said(Said.EMPTY) & ledger.asking.is_(PLAN) & (ledger.failures < 9), REPAIR),
            observe(said(Said.ANSWER) & ledger.asking.is_(REPAIR), PLAN, add("failures")),
            observe(AT_FIRST, PLAN),
            end(ALWAYS),
        ),
        (EMPTY, ANSWER),
    ),
    "a step resets the attempts and its row adds one": Endless(
        (
            *UNCALLED,
            observe(RETRYABLE & ledger.asking.is_(PLAN) & (ledger.attempts < 9), REPAIR),
            observe(said(Said.ANSWER) & ledger.asking.is_(REPAIR), PLAN, add("attempts")),
            observe(AT_FIRST & ~RETRYABLE, PLAN),
            end(ALWAYS),
        ),
        (FAILED, ANSWER),
    ),
    "a wait is short only after no attempt": Endless(
        (
            *ALL,
            observe(RETRYABLE & ledger.asking.is_(REPAIR) & (ledger.retry_at < 0.75), PLAN),
            observe(RETRYABLE & ledger.asking.is_(PLAN), REPAIR),
            observe(said(Said.CALLS) & ledger.asking.is_(PLAN), REPAIR),
            end(~AT_FIRST | RETRYABLE),
            observe(ALWAYS, PLAN),
        ),
        (SEARCH, finished(SEARCH), FAILED),
    ),
    "a time is reached by a sum that rounds": Endless(
        (
            *UNCALLED,
            observe(RETRYABLE & (ledger.seconds >= 0.2) & (ledger.retry_at >= 0.9), PLAN),
            end(~AT_FIRST | RETRYABLE),
            observe(ALWAYS, PLAN),
        ),
        (ModelFailed(0.2, retryable=True, error="error", retry_after=5.0),),
    ),
    "a cost is reached by a sum that rounds": Endless(
        (
            *UNCALLED,
            end(RETRYABLE),
            observe((ledger.cost_usd >= 0.9) & (ledger.iterations >= 1), PLAN),
            end(~AT_FIRST & ~said(Said.EMPTY)),
            observe(
                (ledger.cost_usd >= 0.2) & (ledger.cost_usd < 0.9) & (ledger.iterations < 1), PLAN, add("iterations")
            ),
            end(ledger.iterations >= 1),
            observe(AT_FIRST, PLAN),
            end(ALWAYS),
        ),
        (EMPTY,),
        (TOOLS, evolve(EMPTY, cost_usd=0.2), evolve(EMPTY, cost_usd=5.0)),
    ),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_table_that_goes_round_for_ever_is_not_proved(name: str) -> None:
    endless = ENDLESS[name]
    run = reduce(step, endless.entry, start(TASK, CONFIG, endless.rows))
    for _ in range(20):
        run = reduce(step, endless.loop, run)

    assert run.state is not DONE
    assert not check(Table(endless.rows), CONFIG).terminates


def test_a_way_round_that_costs_tokens_each_time_is_no_lasso_where_tokens_end_it() -> None:
    table = Table(
        (*UNCALLED, end(~RETRYABLE & ~AT_FIRST), end(ledger.tokens >= 200_000), observe(ALWAYS, PLAN)),
    )

    assert check(table, CONFIG).verdict is not Verdict.REFUTED


def test_tokens_have_no_bound_where_the_budget_is_asked_before_it_is_reckoned() -> None:
    judging = [
        Row(states, (event,), TOO_DEAR, DONE, (), StopReason.BUDGET)
        for states, event in (
            ((PLAN,), ToolsListed),
            (ASKING, ModelReplied),
            (ASKING, ModelFailed),
            ((CALL_TOOLS,), ToolsFinished),
        )
    ]
    table = Table(
        (
            *judging,
            *ALL,
            end((~said(Said.CALLS) & ~AT_FIRST) | RETRYABLE),
            end(ledger.iterations >= 3),
            observe(ALWAYS, PLAN, add("iterations")),
        )
    )
    dear = calling("search", tokens=450_000)
    events: tuple[Event, ...] = (ToolsListed(0.0, size=450_000), dear, finished(dear), dear)
    run = reduce(step, events, start(TASK, CONFIG, table))

    most = check(table, CONFIG).bound("tokens").at_most
    assert most is None or most >= run.ledger.tokens


# Certificates


def counting(*rows: Row) -> Table:
    return Table(
        (
            *UNCALLED,
            end(RETRYABLE),
            observe(AT_FIRST, PLAN, add(first, 3), add(second)),
            end(~said(Said.EMPTY)),
            *rows,
            end((first >= 5) & (second >= 5)),
            end(first >= 5),
            observe(ALWAYS, PLAN, add(first), add(second)),
        )
    )


def test_a_certificate_without_what_guards_read_is_not_accepted() -> None:
    rows = (end(ledger.iterations >= 5), observe(ALWAYS, PLAN, add("iterations"), add(trap)))
    plain = Table((*UNCALLED, end(RETRYABLE), *rows))
    trapped = Table((*UNCALLED, end(RETRYABLE), observe(trap >= 2, PLAN), *rows))
    certificate = check(plain, CONFIG).certificate
    assert certificate is not None

    assert verify(certificate, plain, CONFIG) == []
    assert verify(certificate, trapped, CONFIG) != []


def test_a_certificate_is_not_accepted_where_a_guard_turns_within_a_box() -> None:
    rows = (end(trap >= 9), observe(ALWAYS, PLAN, add(trap)))
    plain = Table((*UNCALLED, end(RETRYABLE), *rows))
    banded = Table((*UNCALLED, end(RETRYABLE), observe((trap >= 4) & (trap < 6), PLAN), *rows))
    certificate = check(plain, CONFIG).certificate
    assert certificate is not None

    assert verify(certificate, banded, CONFIG) != []


def test_a_certificate_is_not_accepted_without_a_box_that_only_mixed_numbers_lead_to() -> None:
    certificate = copy.deepcopy(check(counting(), CONFIG).certificate)
    assert certificate is not None
    one, other = certificate["fields"].index("counters.first"), certificate["fields"].index("counters.second")
    ranges = [box.get("fields", [[0]] * len(certificate["fields"])) for box in certificate["boxes"]]
    gone = next(at for at, each in enumerate(ranges) if each[one][0] == 5 and each[other][0] == 1)
    del certificate["boxes"][gone], certificate["steps"][gone]
    certificate["steps"] = [
        [[to - (to > gone), changes] for to, changes in following if to != gone] for following in certificate["steps"]
    ]
    endless = counting(observe((first >= 5) & (second < 5), PLAN))

    assert verify(certificate, counting(), CONFIG) != []
    assert verify(certificate, endless, CONFIG) != []
