"""Guards: below, at and past each limit of the shipped table, and what any guard can be asked."""

import math
import os
import random
import secrets
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from functools import lru_cache, partial
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from agent_fsm import table
from agent_fsm.config import Limits
from agent_fsm.errors import TableError
from agent_fsm.guards import ALWAYS, Both, Compare, Either, Guard, Is, Not, counter, ledger, limits, opaque
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
        (counter("searches") >= 3, "searches >= 3"),
        (ledger.calls_of("exec_shell") >= 3, "calls of exec_shell >= 3"),
        (ledger.tool_calls > ledger.calls_of("look"), "tool_calls > calls of look"),
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


def test_an_opaque_guard_that_raises_is_named_and_the_cause_kept() -> None:
    def broken(held: Ledger) -> bool:
        return 1 / held.failures > 1

    assert opaque(broken)(holding(failures=2)) is False
    with pytest.raises(TableError, match="guard broken raised ZeroDivisionError; a guard answers") as caught:
        opaque(broken)(holding())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_opaque_guard_that_writes_to_the_ledger_is_named_and_harms_nothing() -> None:
    def greedy(held: Ledger) -> bool:
        held.failures += 1
        held.tokens = 0
        return True

    held = holding(failures=1, tokens=7)

    with pytest.raises(TableError, match=r"guard greedy wrote to the ledger \(failures, tokens\); only a row's"):
        opaque(greedy)(held)
    assert held == holding(failures=1, tokens=7)


@pytest.mark.parametrize("name", ["counters", "calls", "limits"])
def test_an_opaque_guard_can_not_write_into_what_clones_share(name: str) -> None:
    def sly(held: Ledger) -> bool:
        if name == "limits":
            held.limits.max_iterations = 9  # type: ignore[misc] # what is tested
        getattr(held, name)["searches"] = 9
        return True

    held = holding(counters={"searches": 1}, calls={"searches": 1})

    with pytest.raises(TableError, match="guard sly raised"):
        opaque(sly)(held)
    assert held == holding(counters={"searches": 1}, calls={"searches": 1})


def test_an_opaque_guard_reads_counters_that_nobody_has_counted_yet_as_zero() -> None:
    guard = opaque(lambda held: held.counters["searches"] + held.calls["look"] >= 2, tools=["look"])

    assert guard(holding()) is False
    assert guard(holding(counters={"searches": 1}, calls={"look": 1})) is True


# What a function reads besides the ledger

GENERATOR = random.Random(7)
START = datetime(2024, 1, 1)


def late(held: Ledger) -> bool:
    return time.monotonic() > held.seconds


def late_too(held: Ledger) -> bool:
    return late(held)


def later(held: Ledger) -> bool:
    from time import perf_counter

    return perf_counter() > held.seconds


def by_default(held: Ledger, clock: Callable[[], float] = time.monotonic) -> bool:
    return clock() > held.seconds


def with_clock(clock: Callable[[], float]) -> Callable[[Ledger], bool]:
    return lambda held: clock() > held.seconds


def inside(held: Ledger) -> bool:
    def now() -> float:
        return time.time()

    return now() > held.seconds


class Judge:
    """A guard that is an object."""

    def __call__(self, held: Ledger) -> bool:
        return time.time() > held.seconds

    def judge(self, held: Ledger) -> bool:
        return random.random() > 0.5


@pytest.mark.parametrize(
    ("question", "fault"),
    [
        (late, r"guard late reads the clock \(time.monotonic\); a guard sees the ledger only: compare ledger.seconds"),
        (late_too, r"reads the clock \(time.monotonic\)"),
        (later, r"reads the clock \(time\)"),
        (by_default, r"reads the clock \(time.monotonic\)"),
        (with_clock(time.time), r"reads the clock \(time.time\)"),
        (inside, r"reads the clock \(time.time\)"),
        (Judge(), r"reads the clock \(time.time\)"),
        (Judge().judge, r"draws at random \(random.random\); .*: what else it is to know must be in a limit"),
        (partial(late), r"reads the clock \(time.monotonic\)"),
        (lru_cache(late), r"reads the clock \(time.monotonic\)"),
        (lambda _: monotonic() > 3, r"guard <lambda> reads the clock \(time.monotonic\)"),
        (lambda _: datetime.now() > START, r"reads the clock \(datetime.now\)"),
        (lambda _: GENERATOR.random() > 0.5, r"draws at random \(random.Random\)"),
        (lambda _: secrets.randbelow(2) == 1, r"draws at random \(secrets.randbelow\)"),
        (lambda _: uuid.uuid4().int > 7, r"draws at random \(uuid.uuid4\)"),
        (lambda _: any(random.random() > each for each in (0.1, 0.2)), r"draws at random"),
        (lambda _: "X" in os.environ, r"reads the world \(os.environ\)"),
        (lambda _: os.path.exists("x"), r"reads the world \(os.path.exists\)"),  # noqa: PTH110 # the same
        (lambda _: Path("x").exists(), r"reads the world \(pathlib.Path\)"),
        (lambda _: bool(socket.gethostname()), r"reads the world \(socket.gethostname\)"),
        (lambda _: bool(open("x")), r"reads the world \(open\)"),  # noqa: SIM115, PTH123 # what is tested
        (lambda _: input() == "y", r"reads the world \(input\)"),
        (7, "guard 7 is no function"),
    ],
)  # fmt: skip
def test_a_guard_that_reads_more_than_the_ledger_is_refused(question: Any, fault: str) -> None:
    with pytest.raises(TableError, match=fault):
        opaque(question)


def own_time(held: Any) -> bool:
    time = held.time()
    return bool(time > held.random.time + held.open)


@pytest.mark.parametrize(
    "question",
    [
        lucky,
        own_time,
        partial(lambda least, held: held.failures > least, 3),
        lambda held: held.said is Said.CALLS and min(held.failures, 3) == 3,
        lambda held: timedelta(seconds=3).total_seconds() > held.seconds,
        lambda held: START + timedelta(seconds=held.seconds) > START,
        lambda held: math.floor(held.seconds) > 3,
        with_clock(lambda: 3.0),
    ],
)
def test_a_guard_that_reads_the_ledger_only_is_not_refused(question: Any) -> None:
    opaque(question)


def test_a_function_that_calls_itself_is_read_once() -> None:
    def down(held: Ledger, most: int = 3) -> bool:
        return most == 0 or down(held, most - 1)

    assert opaque(down)(holding()) is True


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
    named = counters.map(lambda name: getattr(ledger, name))
    counted = st.sampled_from([counter("searches"), counter("dear"), ledger.calls_of("exec_shell")])
    compared = st.builds(Compare, named | counted, signs, numbers | counted)
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


@given(guards, guards, guards, ledgers)
def test_guards_obey_the_laws_of_logic(one: Guard, two: Guard, three: Guard, held: Ledger) -> None:
    equal = [
        (~~one, one),
        (~(one & two), ~one | ~two),
        (~(one | two), ~one & ~two),
        (one & two, two & one),
        (one | two, two | one),
        ((one & two) & three, one & (two & three)),
        ((one | two) | three, one | (two | three)),
        (one & (two | three), (one & two) | (one & three)),
        (one | (two & three), (one | two) & (one | three)),
        (one & (one | two), one),
        (one & ALWAYS, one),
        (one & ~one, ~ALWAYS),
    ]

    for left, right in equal:
        assert left(held) is right(held)
        assert compiled(left, held) is compiled(right, held) is left(held)


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


# What the search for the worst case takes for granted


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
