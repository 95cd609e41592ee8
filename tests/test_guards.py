"""Guards: below, at and past each limit of the shipped table, and what any guard can be asked."""

from collections.abc import Iterator
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from agent_fsm import table
from agent_fsm.config import Limits
from agent_fsm.errors import TableError
from agent_fsm.guards import ALWAYS, Both, Compare, Either, Guard, Is, Not, ledger, limits, opaque
from agent_fsm.ledger import Ledger
from agent_fsm.protocol import CALL_TOOLS, OBSERVE, PLAN, Ended, Said, State, StopReason
from agent_fsm.table import TABLE
from tests.test_dispatch import ledgers

TIME_UP = 120.0
"""The default deadline."""
TOKENS = 500_000
"""The default budget."""


def holding(**fields: Any) -> Ledger:
    """Return a ledger with *fields*; those that are limits are set as limits."""
    known = {name: fields.pop(name) for name in list(fields) if hasattr(Limits(), name)}
    return Ledger(Limits(**known), **fields)


CALLED: dict[str, Any] = {"said": Said.CALLS}
FAILED: dict[str, Any] = {"ended": Ended.FAILED}
UNSURE: dict[str, Any] = {"said": Said.UNSURE, "research_tools": True}
RETRY: dict[str, Any] = {"ended": Ended.RETRYABLE}
COST: dict[str, Any] = {"max_cost_usd": 1.0}
STUCK: dict[str, Any] = {**CALLED, "stale": 3, "repeats": 3}
ESCALATES: dict[str, Any] = {**FAILED, "failures": 2, "research_tools": True}


@pytest.mark.parametrize(
    ("guard", "fields", "expected"),
    [
        (table.cancelled, {"ended": Ended.CANCELLED}, True),
        (table.cancelled, {"ended": Ended.TIMED_OUT}, False),
        (table.out_of_time, {"seconds": TIME_UP - 0.001}, False),
        (table.out_of_time, {"seconds": TIME_UP}, True),
        (table.out_of_time, {"seconds": TIME_UP + 0.001}, True),
        (table.out_of_time, {"ended": Ended.TIMED_OUT}, True),
        (table.over_budget, {"tokens_needed": TOKENS - 1}, False),
        (table.over_budget, {"tokens_needed": TOKENS}, False),
        (table.over_budget, {"tokens_needed": TOKENS + 1}, True),
        (table.over_budget, {"cost_needed_usd": 0.999, **COST}, False),
        (table.over_budget, {"cost_needed_usd": 1.0, **COST}, False),
        (table.over_budget, {"cost_needed_usd": 1.001, **COST}, True),
        (table.over_budget, {"cost_needed_usd": 1e9}, False),
        (table.closing_fits, {"closing_tokens_needed": TOKENS - 1}, True),
        (table.closing_fits, {"closing_tokens_needed": TOKENS}, True),
        (table.closing_fits, {"closing_tokens_needed": TOKENS + 1}, False),
        (table.closing_fits, {"closing_cost_needed_usd": 1.0, **COST}, True),
        (table.closing_fits, {"closing_cost_needed_usd": 1.001, **COST}, False),
        (table.closing_fits, {"closing_cost_needed_usd": 1e9}, True),
        (table.closing_fits, {"closing_summary": False}, False),
        (table.asked_for_tools, CALLED, True),
        (table.asked_for_tools, {}, False),
        (table.answered, {"said": Said.ANSWER}, True),
        (table.answered, {"said": Said.UNSURE}, False),
        (table.refused, {"said": Said.REFUSED}, True),
        (table.refused, {"said": Said.CUT_OFF}, False),
        (table.fatal, {"ended": Ended.FATAL}, True),
        (table.fatal, RETRY, False),
        (table.may_retry, {**RETRY, "attempts": 1}, True),
        (table.may_retry, {**RETRY, "attempts": 2}, True),
        (table.may_retry, {**RETRY, "attempts": 3}, False),
        (table.may_retry, {**RETRY, "attempts": 1, "max_model_retries": 0}, False),
        (table.may_retry, {**RETRY, "attempts": 1, "retry_at": TIME_UP - 0.001}, True),
        (table.may_retry, {**RETRY, "attempts": 1, "retry_at": TIME_UP}, False),
        (table.may_retry, {"ended": Ended.FATAL, "attempts": 1}, False),
        (table.at_max_iterations, {"iterations": 7}, False),
        (table.at_max_iterations, {"iterations": 8}, True),
        (table.at_max_iterations, {"iterations": 9}, True),
        (table.at_max_failures, {**FAILED, "failures": 4}, False),
        (table.at_max_failures, {**FAILED, "failures": 5}, True),
        (table.at_max_failures, {**FAILED, "failures": 6}, True),
        (table.at_max_failures, {"failures": 6}, False),
        (table.to_nudge, {**STUCK, "stale": 2}, False),
        (table.to_nudge, STUCK, True),
        (table.to_nudge, {**STUCK, "stale": 4}, True),
        (table.to_nudge, {**STUCK, "repeats": 2}, False),
        (table.to_nudge, {**STUCK, "repeats": 4}, True),
        (table.to_nudge, {**STUCK, "said": Said.EMPTY}, False),
        (table.stagnated, STUCK, False),
        (table.stagnated, {**STUCK, "nudges": 1}, True),
        (table.stagnated, {**STUCK, "nudges": 2}, True),
        (table.hedged, UNSURE, True),
        (table.hedged, {**UNSURE, "research_on_unsure": False}, False),
        (table.hedged, {**UNSURE, "research_tools": False}, False),
        (table.hedged, {**UNSURE, "said": Said.ANSWER}, False),
        (table.hedged, {**UNSURE, "hops": 1}, True),
        (table.hedged, {**UNSURE, "hops": 2}, False),
        (table.hedged, {**UNSURE, "hops": 3}, False),
        (table.hedged, {**UNSURE, "max_research_hops": 0}, False),
        (table.hedged, {**UNSURE, "iterations": 8}, False),
        (table.hedged, {**UNSURE, "seconds": TIME_UP}, False),
        (table.hedged, {**UNSURE, "tokens_needed": TOKENS + 1}, False),
        (table.to_escalate, {**ESCALATES, "failures": 1}, False),
        (table.to_escalate, ESCALATES, True),
        (table.to_escalate, {**ESCALATES, "failures": 3}, True),
        (table.to_escalate, {**ESCALATES, "ended": Ended.WELL}, False),
        (table.to_escalate, {**ESCALATES, "research_after_failures": False}, False),
        (table.to_escalate, {**ESCALATES, "hops": 2}, False),
        (table.to_repair, FAILED, True),
        (table.to_repair, {**FAILED, "enable_repair": False}, False),
        (table.to_repair, {}, False),
        (table.summary_due, {"turns": 1, "summarize_every": 2}, False),
        (table.summary_due, {"turns": 2, "summarize_every": 2}, True),
        (table.summary_due, {"turns": 3, "summarize_every": 2}, True),
        (table.summary_due, {"turns": 10**9, "summarize_every": None}, False),
    ],
    ids=lambda each: each.name if isinstance(each, Guard) else None,
)
def test_a_guard_turns_exactly_at_its_limit(guard: Guard, fields: dict[str, Any], expected: bool) -> None:
    assert guard(holding(**fields)) is expected


# Comparisons


@pytest.mark.parametrize("sign", ["<", "<=", ">", ">="])
@pytest.mark.parametrize("summarize_every", [None, 1])
def test_a_comparison_with_an_absent_limit_is_false(sign: str, summarize_every: int | None) -> None:
    guard = Compare(ledger.turns, sign, limits.summarize_every)
    held = holding(turns=1, summarize_every=summarize_every)

    assert guard(held) is (summarize_every is not None and sign in ("<=", ">="))
    assert (~guard)(held) is not guard(held)


def test_the_four_signs_make_the_four_comparisons() -> None:
    guards = [ledger.failures < 2, ledger.failures <= 2, ledger.failures > 2, ledger.failures >= 2]

    held = [[guard(holding(failures=failures)) for guard in guards] for failures in (1, 2, 3)]

    assert held == [[True, True, False, False], [False, True, False, True], [False, False, True, True]]


@pytest.mark.parametrize(
    ("fields", "known"), [(ledger, "failures, .*seconds"), (limits, "max_iterations, .*summarize_every")]
)
def test_an_unknown_field_is_named_and_so_are_those_there_are(fields: Any, known: str) -> None:
    with pytest.raises(AttributeError, match=f"has no 'failure'; it has .*{known}"):
        fields.failure  # noqa: B018 # asking is the test


# Combinations

YES, NO = ledger.failures >= 0, ledger.failures < 0


@pytest.mark.parametrize(("first", "second"), [(YES, YES), (YES, NO), (NO, YES), (NO, NO)])
def test_guards_combine_like_bools(first: Guard, second: Guard) -> None:
    held = holding()

    assert (first & second)(held) is (first(held) and second(held))
    assert (first | second)(held) is (first(held) or second(held))
    assert (~first)(held) is (not first(held))


@pytest.mark.parametrize(
    ("guard", "name"),
    [
        (ALWAYS, "always"),
        (ledger.failures >= limits.max_consecutive_failures, "failures >= max_consecutive_failures"),
        (ledger.repeats > 2, "repeats > 2"),
        (ledger.said.is_(Said.CUT_OFF), "said is cut_off"),
        (ledger.ending.is_(None), "ending is None"),
        (limits.enable_repair.is_(True), "enable_repair"),
        (limits.enable_repair.is_(False), "not enable_repair"),
        (YES & NO, "failures >= 0 and failures < 0"),
        ((YES | NO) & YES, "(failures >= 0 or failures < 0) and failures >= 0"),
        (~(YES | NO), "not (failures >= 0 or failures < 0)"),
        (~YES, "not failures >= 0"),
        ((YES | NO).named("odd") & YES, "odd and failures >= 0"),
    ],
)
def test_a_guard_has_a_name_that_says_what_it_asks(guard: Guard, name: str) -> None:
    assert guard.name == name


def test_the_leaves_of_a_guard_are_what_it_is_made_of() -> None:
    assert list(((YES | NO).named("odd") & ~YES).leaves()) == [YES, NO, YES]


# Functions


def lucky(held: Ledger) -> bool:
    """Say whether the number of failures is seven."""
    return held.failures == 7


def test_an_opaque_guard_asks_its_function_under_its_name() -> None:
    guard = opaque(lucky)

    assert (guard.name, guard(holding(failures=7)), guard(holding(failures=6))) == ("lucky", True, False)


@pytest.mark.parametrize("answer", [1, 0, None, "yes", []])
def test_an_opaque_guard_that_returns_no_bool_is_named(answer: Any) -> None:
    def vague(_: Ledger) -> bool:
        return answer  # type: ignore[no-any-return] # what is tested

    with pytest.raises(TableError, match="vague returned"):
        opaque(vague)(holding())


# Compiled


def compiled(guard: Guard, held: Ledger) -> object:
    bound: dict[str, Any] = {}
    code = guard.code(bound)
    return eval(code, {**bound, "ledger": held, "limits": held.limits})


def leaf_guards() -> st.SearchStrategy[Guard]:
    counters = st.sampled_from(["failures", "iterations", "turns", "stale", "tokens", "cost_usd", "seconds"])
    numbers = st.integers(-2, 9) | st.sampled_from([limits.max_cost_usd, limits.summarize_every, limits.max_iterations])
    signs = st.sampled_from(["<", "<=", ">", ">="])
    flags = [ledger.said.is_(Said.CALLS), ledger.ended.is_(Ended.FAILED), ledger.asking.is_(PLAN)]
    flags += [ledger.ending.is_(None), ledger.ending.is_(StopReason.BUDGET), limits.enable_repair.is_(True)]
    compared = st.builds(
        lambda name, sign, number: Compare(getattr(ledger, name), sign, number), counters, signs, numbers
    )
    return compared | st.sampled_from([*flags, ALWAYS, opaque(lucky)])


guards = st.recursive(
    leaf_guards(),
    lambda inner: (
        st.builds(Both, inner, inner)
        | st.builds(Either, inner, inner)
        | st.builds(Not, inner)
        | inner.map(lambda guard: guard.named("a name"))
    ),
    max_leaves=8,
)


@given(guards, ledgers)
def test_a_compiled_guard_agrees_with_the_guard_when_called(guard: Guard, held: Ledger) -> None:
    assert compiled(guard, held) is guard(held)


@given(ledgers)
def test_every_compiled_guard_of_the_table_agrees_with_the_guard_when_called(held: Ledger) -> None:
    for row in TABLE:
        assert compiled(row.guard, held) is row.guard(held)


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_a_comparison_with_an_infinite_number_compiles(number: float) -> None:
    assert compiled(ledger.failures < number, holding()) is (number > 0)


# What the search in tests/search.py takes for granted


def picks(held: Ledger) -> Iterator[bool]:
    return (row.guard(held) for row in TABLE if OBSERVE in row.sources)


@given(ledgers, st.integers(0, 9), st.sampled_from([PLAN, CALL_TOOLS]))
def test_repeats_and_asking_are_read_only_right_after_they_were_written(
    held: Ledger, repeats: int, asking: State
) -> None:
    if held.said is not Said.CALLS:
        assert list(picks(held)) == list(picks(evolve(held, repeats=repeats)))
    if held.ended is not Ended.RETRYABLE:
        assert list(picks(held)) == list(picks(evolve(held, asking=asking)))


def test_an_is_guard_is_no_comparison_by_value() -> None:
    assert Is(ledger.research_tools, True)(holding(research_tools=1)) is False
