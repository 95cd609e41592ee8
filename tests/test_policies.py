"""Policies as values: other tables made of a table, counters of their own, and what is refused when they are built."""

import re
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_fsm import table
from agent_fsm.config import AgentConfig
from agent_fsm.errors import TableError
from agent_fsm.guards import ALWAYS, Both, Compare, Either, Guard, Is, Not, Number, counter, ledger, limits, opaque
from agent_fsm.ledger import Ledger
from agent_fsm.machine import Run, next_effect, start, step
from agent_fsm.messages import not_run_results
from agent_fsm.protocol import (
    DONE,
    OBSERVE,
    PLAN,
    REPAIR,
    RESEARCH,
    SUMMARIZE,
    Ended,
    Event,
    Interrupted,
    ModelFailed,
    ModelReplied,
    Said,
    State,
    StopReason,
    ToolResult,
    ToolsListed,
    ToolsUnavailable,
)
from agent_fsm.reading import finished, interrupted, read_reply, read_tools
from agent_fsm.rules import rules_of
from agent_fsm.shape import ANSWERS, check_table, decide, facts_of
from agent_fsm.table import DECIDED, TABLE, Row, Table, Update, add, observe, put, reset
from tests.test_dispatch import GOOD, ledgers
from tests.test_guards import guards

SEARCHES = counter("searches")
SHELLS = ledger.calls_of("exec_shell")
DEAR = (ledger.cost_usd >= 0.5).named("dear")
STOP_DEAR = observe(DEAR, DONE, reason=StopReason.BUDGET)


def labels(rows: Sequence[Row]) -> list[str]:
    """The labels of the rows of Observe."""
    return [row.label for row in rows if OBSERVE in row.sources]


# Tables of tables


def test_a_row_is_found_by_its_label_or_as_itself() -> None:
    assert TABLE.row("failed").guard is table.to_repair
    assert TABLE.row(TABLE.row("failed")) is TABLE.row("failed")
    assert TABLE.row(evolve(TABLE.row("failed"))) is TABLE.row("failed")


def test_a_label_means_a_row_of_observe_where_there_is_one() -> None:
    assert TABLE.row("always") is TABLE[-1]
    assert TABLE.row("asked for tools").sources == (PLAN, REPAIR, RESEARCH)


def test_rows_are_put_before_and_after_one_another_and_the_table_stays_as_it_was() -> None:
    old = labels(TABLE)
    at = old.index("failed")

    assert labels(TABLE.before("failed", STOP_DEAR)) == [*old[:at], "dear", *old[at:]]
    assert labels(TABLE.after("failed", STOP_DEAR)) == [*old[: at + 1], "dear", *old[at + 1 :]]
    assert labels(TABLE.replaced("failed", STOP_DEAR)) == [*old[:at], "dear", *old[at + 1 :]]
    assert labels(TABLE.without("failed", "stagnated")) == [each for each in old if each not in ("failed", "stagnated")]
    assert labels(TABLE) == old


def test_rows_side_by_side_that_share_a_label_are_meant_together() -> None:
    old = labels(TABLE)
    at = old.index("retry")

    assert labels(TABLE.before("retry", STOP_DEAR)) == [*old[:at], "dear", *old[at:]]
    assert labels(TABLE.after("retry", STOP_DEAR)) == [*old[: at + 3], "dear", *old[at + 3 :]]
    assert labels(TABLE.replaced("retry", STOP_DEAR)) == [*old[:at], "dear", *old[at + 3 :]]
    assert labels(TABLE.without("retry")) == [*old[:at], *old[at + 3 :]]


def test_a_new_guard_is_given_or_made_of_the_old_one_of_each_row() -> None:
    given = TABLE.guarded("summary due", DEAR)
    made = TABLE.guarded("retry", lambda old: old & ~DEAR)
    old = [row.guard for row in TABLE if row.label == "retry"]

    assert given.row("dear") == evolve(TABLE.row("summary due"), guard=DEAR)
    assert [row.guard for row in made if row.label == "retry"] == [guard & ~DEAR for guard in old]


def test_a_row_without_a_name_is_called_after_its_new_guard() -> None:
    renamed = TABLE.guarded("failed", lambda old: old & ~DEAR)
    kept = TABLE.guarded("failed", lambda old: (old & ~DEAR).named("failed"))

    assert renamed.row("failed and not dear").target is REPAIR
    assert kept.row("failed").target is REPAIR


def test_every_change_gives_a_table_again() -> None:
    changed = [
        TABLE.before("failed", STOP_DEAR),
        TABLE.after("failed", STOP_DEAR),
        TABLE.replaced("failed", STOP_DEAR),
        TABLE.without("failed"),
        TABLE.guarded("failed", DEAR),
        TABLE.stopping(DEAR, StopReason.BUDGET),
    ]

    assert {type(each) for each in (TABLE, *changed)} == {Table}
    assert not hasattr(TABLE, "__dict__")


ANY_TABLE: Any = TABLE
ODD_ONES = Table((*TABLE[:-1], observe(ALWAYS, PLAN, name="failed")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: TABLE.without("faild"), r"no row is called 'faild'; there are 'failed'"),
        (lambda: TABLE.before(STOP_DEAR), r"no row is called 'dear'"),
        (lambda: TABLE.row("qqq"), r"no row is called 'qqq'; there are 'always', .*'summary due'"),
        (lambda: TABLE.row("retry"), r"3 rows are called 'retry': 18, 19, 20"),
        (lambda: ODD_ONES.without("failed"), r"'failed' may be any of the rows 31 in Observe, 33 in Observe; give"),
        (lambda: TABLE.replaced("failed"), r"nothing is given to replace 'failed' with; without\('failed'\)"),
        (lambda: ANY_TABLE.before("failed", [STOP_DEAR]), r"is no row; rows are given one by one"),
        (lambda: TABLE.after("failed", DEAR), r"is no row"),
        (lambda: ANY_TABLE.guarded("failed", False), r"False is no guard for 'failed'"),
        (lambda: ANY_TABLE.guarded("failed", lambda _: None), r"None is no guard for 'failed'"),
        (lambda: ANY_TABLE.stopping(True, StopReason.BUDGET), r"True is no guard for 'stopping'"),
        (lambda: ANY_TABLE.stopping(DEAR, "bored"), r"'bored' is no reason to stop for; take one of success, "),
        (lambda: DEAR and table.failed, r"guard dear has no truth of its own: combine guards with &"),
        (lambda: 1 <= ledger.failures <= 2, r"guard failures >= 1 has no truth"),
        (lambda: not DEAR, r"guard dear has no truth"),
    ],
)  # fmt: skip
def test_what_can_not_be_meant_is_refused_and_named(change: Callable[[], Any], message: str) -> None:
    with pytest.raises(TableError, match=message):
        change()


def test_a_list_of_rows_is_a_table_too_and_is_read_anew_when_it_has_changed() -> None:
    rows = list(TABLE)
    before = rules_of(rows)
    assert rules_of(rows) is before

    rows.remove(TABLE.row("failed"))

    assert rules_of(rows) is not before


# Stopping


TASK = [{"role": "user", "content": "How much is 6 times 7?"}]


def replied(*names: str, text: str | None = None) -> ModelReplied:
    calls = {"tool_calls": [{"function": {"name": name}} for name in names]} if names else {}
    message = {"role": "assistant", "content": text, **calls}
    usage = {"prompt_tokens": 0, "completion_tokens": 0}
    reply = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}
    event = read_reply(reply, now=1.0, offered=("look", "exec_shell"), max_calls=8)
    assert isinstance(event, ModelReplied)
    return event


def turn(*names: str, named: bool = True, ran: bool = True) -> list[Event]:
    """Return a turn in which the model calls the tools with *names*."""
    reply = replied(*names)
    results = tuple(
        ToolResult(f"result {number}", call_id=call.id, name=call.name if named else "", ran=ran)
        for number, call in enumerate(reply.calls)
    )
    return [reply, finished(reply.calls, results, {}, now=2.0)]


def listed() -> Event:
    tools = [{"type": "function", "function": {"name": name}} for name in ("look", "exec_shell")]
    return read_tools(tools, now=0.0, backend="backend")


def after(rows: Sequence[Row], *events: Event, **settings: Any) -> Run:
    return reduce(step, [listed(), *events], start(TASK, AgentConfig(**settings), rows))


def test_a_stop_comes_after_the_rows_that_end_a_run_come_what_may_and_before_all_others() -> None:
    old = labels(TABLE)
    at = old.index("over budget, closing")

    closing = labels(TABLE.stopping(DEAR, StopReason.BUDGET))
    at_once = labels(TABLE.stopping(DEAR, StopReason.BUDGET, closing=False, name="too dear"))

    assert closing == [*old[:at], "dear, closing", "dear", *old[at:]]
    assert at_once == [*old[:at], "too dear", *old[at:]]


@pytest.mark.parametrize("closing", [True, False])
@pytest.mark.parametrize("reason", StopReason)
def test_a_run_can_be_made_to_stop_for_every_reason(reason: StopReason, closing: bool) -> None:
    stopping = TABLE.stopping(SHELLS >= 2, reason, closing=closing)
    below = after(stopping, *turn("exec_shell"))
    at = after(stopping, *turn("exec_shell"), *turn("exec_shell"))

    assert (below.state, below.reason) == (PLAN, None)
    if closing:
        assert (at.state, at.ledger.ending) == (SUMMARIZE, reason)
        at = step(at, replied(text="the best so far"))
    assert (at.state, at.reason) == (DONE, reason)


def test_a_stop_without_a_closing_summary_ends_at_once() -> None:
    stopping = TABLE.stopping(SHELLS >= 1, StopReason.BUDGET)

    assert after(stopping, *turn("exec_shell"), closing_summary=False).reason is StopReason.BUDGET


@settings(deadline=None)
@given(guards, st.sampled_from(StopReason), st.booleans(), ledgers)
def test_a_stop_is_refused_only_with_a_row_that_can_not_be_taken(
    guard: Guard, reason: StopReason, closing: bool, held: Ledger
) -> None:
    stopping = TABLE.stopping(guard, reason, closing=closing)

    try:
        check_table(stopping)
    except TableError as error:
        refused = re.search(r"row (\d+) .*can't be taken", str(error))
        if refused is None:  # an always that is not last
            assert "must end in one row that is always taken" in str(error)
            return
        taken = next(row for row in stopping if OBSERVE in row.sources and row.guard(held))
        assert taken is not stopping[int(refused[1])]


# Counters of a table's own, and calls by tool


def test_a_row_counts_what_a_guard_reads() -> None:
    counting = TABLE.before("always", observe(SEARCHES < 2, REPAIR, add(SEARCHES), add("iterations")))

    states = [after(counting, *turn("look") * turns).state for turns in range(3)]
    counts = [after(counting, *turn("look") * turns).ledger.counters for turns in range(3)]

    assert states == [REPAIR, REPAIR, PLAN]
    assert counts == [{"searches": 1}, {"searches": 2}, {"searches": 2}]


def test_a_counter_is_put_reset_and_lowered() -> None:
    rows = (add(SEARCHES, 3), add(SEARCHES, -1), put(counter("hints"), 2), reset(counter("looks")))
    counting = TABLE.replaced("always", observe(ALWAYS, PLAN, add("iterations"), *rows))

    assert after(counting).ledger.counters == {"searches": 2, "hints": 2, "looks": 0}


def test_a_step_leaves_the_counters_of_the_run_before_as_they_were() -> None:
    counting = TABLE.replaced("always", observe(ALWAYS, PLAN, add("iterations"), add(SEARCHES)))
    before = after(counting)

    later = reduce(step, turn("look"), before)

    assert (before.ledger.counters, later.ledger.counters) == ({"searches": 1}, {"searches": 2})


def test_a_run_whose_table_reads_no_calls_counts_none() -> None:
    run = after(TABLE, *turn("exec_shell"))

    assert (run.rules.counted_tools, run.ledger.calls, run.ledger.tool_calls) == (frozenset(), {}, 1)


@pytest.mark.parametrize(
    "guard",
    [
        SHELLS >= 3,
        ~(DEAR | (SHELLS < 3)).named("few"),
        Compare(ledger.tool_calls, "<=", SHELLS) & (SHELLS > 2),
        opaque(lambda held: held.calls["exec_shell"] >= 3, tools=["exec_shell"]),
    ],
)
def test_calls_are_counted_by_the_tools_that_guards_read(guard: Guard) -> None:
    stopping = TABLE.stopping(guard, StopReason.BUDGET, closing=False)

    two = after(stopping, *turn("exec_shell", "look"), *turn("exec_shell"))
    three = after(stopping, *turn("exec_shell", "exec_shell", "exec_shell"))

    assert rules_of(stopping).counted_tools == {"exec_shell"}
    assert (two.reason, two.ledger.calls) == (None, {"exec_shell": 2})
    assert (three.reason, three.ledger.calls) == (StopReason.BUDGET, {"exec_shell": 3})


def test_a_result_without_a_name_counts_for_the_call_and_one_that_did_not_run_not_at_all() -> None:
    stopping = TABLE.stopping(SHELLS >= 9, StopReason.BUDGET)

    assert after(stopping, *turn("exec_shell", named=False)).ledger.calls == {"exec_shell": 1}
    assert after(stopping, *turn("exec_shell", ran=False)).ledger.calls == {}


def test_calls_that_were_interrupted_count_if_they_had_been_started() -> None:
    stopping = TABLE.stopping(SHELLS >= 9, StopReason.BUDGET)
    reply = replied("exec_shell", "exec_shell")
    results = (ToolResult("done", call_id=reply.calls[0].id), not_run_results(reply.calls)[1])

    run = after(stopping, reply, interrupted(results, now=2.0, cancelled=True))

    assert (run.reason, run.ledger.calls) == (StopReason.CANCELLED, {"exec_shell": 1})


@pytest.mark.parametrize("name", ["failures", "counters", "two words", "1st", "", None])
def test_a_counter_that_can_not_be_called_that_is_refused(name: Any) -> None:
    with pytest.raises(TableError, match=r"counter's name is an identifier|the ledger has a field"):
        counter(name)


@pytest.mark.parametrize("name", ["exec shell", "", "x" * 65, None])
def test_a_tool_that_can_not_be_called_that_is_refused(name: Any) -> None:
    with pytest.raises(TableError, match="1 to 64 of"):
        ledger.calls_of(name)


@pytest.mark.parametrize("number", [SEARCHES, SHELLS])
def test_a_count_is_compared_not_identified(number: Number) -> None:
    with pytest.raises(TableError, match="is a count, to be compared"):
        number.is_(3)


@pytest.mark.parametrize("make", [add, lambda number: put(number, 1), reset])
def test_a_row_can_not_write_a_limit_or_calls(make: Callable[[Number], Update]) -> None:
    assert make(SEARCHES).own
    assert not make(ledger.failures).own

    for number in (limits.max_iterations, SHELLS):
        with pytest.raises(TableError, match="only counters of the ledger and your own"):
            make(number)


WRITABLE = ("iterations", "attempts", "failures", "hops", "nudges", "stale", "repeats", "turns", "summaries")


@pytest.mark.parametrize("update", [*map(add, WRITABLE), *map(reset, WRITABLE), put("ending", StopReason.BUDGET)])
def test_a_row_may_write_counters(update: Update) -> None:
    check_table(TABLE.before("failed", observe(SEARCHES > 2, PLAN, update)))


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (put("seconds", 0), r"can't put 'seconds': it is measured.*a row may write iterations, .*counter\("),
        (add("tokens"), r"can't add 'tokens': it is measured"),
        (reset("model_calls"), r"can't put 'model_calls': it is measured"),
        (put("said", Said.ANSWER), r"can't put 'said': it is measured"),
        (put("limits", None), r"can't put 'limits': it is measured"),
        (add("searches"), r"can't add 'searches': the ledger has no such field"),
        (Update("raise", SEARCHES.attribute, 1, own=True), r"can't raise 'searches'; the verbs are add and put"),
        (Update("add", "failures", 1, own=True), r"can't add 'failures': the ledger has a field 'failures' already"),
        (add("ending"), r"can't add 'ending' 1; a row may put a StopReason or None"),
        (put("ending", "budget"), r"can't put 'ending' 'budget'"),
        (add(SEARCHES, 0), r"can't add 'searches' 0, which changes nothing"),
        (add("hops", 0), r"can't add 'hops' 0"),
        (add(SEARCHES, 0.5), r"can't add 'searches' 0.5; it counts in whole numbers"),  # type: ignore[arg-type] # tested
        (add(SEARCHES, True), r"can't add 'searches' True; it counts in whole numbers"),
        (put(SEARCHES, -1), r"can't put 'searches' -1; a counter is put to 0 or more"),
        (put("turns", None), r"can't put 'turns' None; it counts in whole numbers"),
    ],
)  # fmt: skip
def test_an_update_that_no_row_may_make_is_refused_and_the_row_named(update: Update, message: str) -> None:
    with pytest.raises(TableError, match=rf"row 31 \(mine\): {message}"):
        check_table(TABLE.before("failed", observe(SEARCHES > 2, PLAN, update, name="mine")))


# What is known of a guard


LEVELS: list[Guard] = [
    Compare(number, sign, edge)
    for number in (SEARCHES, ledger.turns, ledger.seconds)
    for sign in ("<", "<=", ">", ">=")
    for edge in (3, 3.5, 4, limits.summarize_every, limits.max_iterations)
]
FLAGS = [Is(ledger.said, said) for said in Said] + [
    Is(limits.summarize_every, None),
    Is(ledger.research_tools, 1),
    ledger.research_tools.is_(True),
]
close_guards = st.recursive(
    st.sampled_from([*LEVELS, *FLAGS, Compare(limits.max_iterations, ">", ledger.turns)]),
    lambda inner: st.builds(Not, inner) | st.builds(Both, inner, inner) | st.builds(Either, inner, inner),
    max_leaves=3,
)
"""Guards that have much to do with one another."""
close_ledgers = st.builds(
    lambda held, count, turns, seconds: evolve(held, counters=count, turns=turns, seconds=seconds),
    ledgers,
    st.fixed_dictionaries({"searches": st.integers(2, 5)}),
    st.integers(2, 5),
    st.sampled_from([2.9, 3.0, 3.2, 3.5, 4.0, 4.1]),
)


@settings(max_examples=1_000)
@given(close_guards, st.lists(close_guards, max_size=4), close_ledgers)
def test_what_is_decided_from_near_facts_is_so_wherever_they_are(
    guard: Guard, known: list[Guard], held: Ledger
) -> None:
    facts = [(each, each(held)) for each in known]

    assert decide(guard, facts) in (None, guard(held))


@given(guards, st.lists(guards, max_size=4), ledgers)
def test_what_is_decided_from_facts_is_so_wherever_they_are(guard: Guard, known: list[Guard], held: Ledger) -> None:
    facts = [(each, each(held)) for each in known]

    assert decide(guard, facts) in (None, guard(held))


@given(guards, ledgers)
def test_what_follows_from_a_guard_is_so_wherever_it_holds(guard: Guard, held: Ledger) -> None:
    assert all(fact(held) is holds for fact, holds in facts_of(guard, guard(held)))


CALLED, EMPTY = ledger.said.is_(Said.CALLS), ledger.said.is_(Said.EMPTY)
AT_MAX = ledger.iterations >= limits.max_iterations


@pytest.mark.parametrize(
    ("guard", "fact", "expected"),
    [
        (ALWAYS, ~ALWAYS, True),
        (CALLED, CALLED, True),
        (CALLED, EMPTY, False),
        (CALLED, ~EMPTY, None),
        (~CALLED, ~CALLED, True),
        (CALLED | EMPTY, CALLED, True),
        (CALLED & EMPTY, CALLED, False),
        (CALLED | DEAR, EMPTY, None),
        (~(CALLED | DEAR), ~DEAR & EMPTY, True),
        ((CALLED | DEAR).named("either"), CALLED | DEAR, True),
        (Is(ledger.research_tools, 1), ledger.research_tools.is_(True), False),
        (ledger.research_tools.is_(True), ~Is(ledger.research_tools, 1), None),
        (ledger.ending.is_(None), ledger.ending.is_(StopReason.BUDGET), False),
        (ledger.ending.is_(StopReason.BUDGET), ~ledger.ending.is_(None), None),
        (SEARCHES >= 3, SEARCHES >= 3, True),
        (SEARCHES >= 2, SEARCHES >= 3, True),
        (SEARCHES >= 4, SEARCHES >= 3, None),
        (SEARCHES > 2, SEARCHES >= 3, True),
        (SEARCHES > 3, SEARCHES >= 3, None),
        (SEARCHES < 3, SEARCHES >= 3, False),
        (SEARCHES <= 3, SEARCHES >= 3, None),
        (SEARCHES <= 2, SEARCHES >= 3, False),
        (SEARCHES < 3, SEARCHES <= 2, True),
        (SEARCHES < 2, SEARCHES <= 2, None),
        (SEARCHES <= 2, ~(SEARCHES >= 3), True),
        (SEARCHES >= 3, (SEARCHES > 2) & (SEARCHES < 9), True),
        (SEARCHES >= 2.5, SEARCHES > 2, True),
        (ledger.seconds >= 3, ledger.seconds > 2, None),
        (ledger.seconds > 2, ledger.seconds >= 3, True),
        (ledger.seconds > 2, ledger.seconds >= 2, None),
        (ledger.seconds < 2, ledger.seconds >= 2, False),
        (ledger.seconds < 2, ledger.seconds <= 2, None),
        (ledger.seconds < 2, ledger.seconds < 2, True),
        (ledger.seconds <= 2, ledger.seconds < 2, True),
        (ledger.seconds < 2, (ledger.seconds < 2) & (ledger.seconds <= 2), True),
        (ledger.seconds < 2, ~(ledger.seconds >= 2), True),
        (ledger.seconds > 2, (ledger.seconds >= 2) & (ledger.seconds > 2), True),
        (SHELLS >= 2, SEARCHES >= 2, None),
        (AT_MAX, AT_MAX, True),
        (ledger.iterations > limits.max_iterations, AT_MAX, None),
        (ledger.iterations < limits.max_iterations, AT_MAX, False),
        (limits.max_iterations <= ledger.iterations, AT_MAX, True),
        (limits.max_iterations > ledger.iterations, AT_MAX, False),
        (AT_MAX, ledger.iterations >= 8, None),
        (table.summary_due, table.summary_due, True),
        (ledger.turns < limits.summarize_every, table.summary_due, False),
        (ledger.turns < limits.summarize_every, ~table.summary_due, None),
        (ledger.turns < limits.summarize_every, ~table.summary_due & ~limits.summarize_every.is_(None), True),
        (table.summary_due, limits.summarize_every.is_(None), False),
        (limits.summarize_every.is_(None), table.summary_due, False),
        (Compare(ledger.failures, "<", float("nan")), ALWAYS, False),
        (opaque(lambda _: True), ALWAYS, None),
    ],
    ids=lambda each: each.name if isinstance(each, Guard) else None,
)  # fmt: skip
def test_a_fact_decides_what_follows_from_it_and_nothing_else(guard: Guard, fact: Guard, expected: bool | None) -> None:
    assert decide(guard, [(fact, True)]) is expected


def test_a_function_is_known_by_being_asked_again() -> None:
    guard = opaque(lambda held: held.failures == 7)

    assert [decide(guard, [(guard, known)]) for known in (True, False)] == [True, False]


# What is refused when a table is built


def test_the_shipped_table_is_not_refused() -> None:
    check_table(TABLE)
    check_table(GOOD)


def refused(rows: Sequence[Row], message: str) -> None:
    with pytest.raises(TableError, match=message):
        rules_of(rows)


NO_TOOLS = TABLE[1]
ANY_ROW = Row((PLAN,), (ToolsListed, ToolsUnavailable, ModelReplied, ModelFailed, Interrupted), ALWAYS, OBSERVE)


def test_what_is_no_row_or_has_no_guard_is_refused() -> None:
    refused((*GOOD, ANY_TABLE), "row 5 is .*which is no Row")
    refused((*GOOD, observe(ledger.failures == 3, PLAN)), "row 5: False is no guard; compare with")


@pytest.mark.parametrize("rows", [(), (ANY_ROW,), (ANY_ROW, observe(ALWAYS, PLAN))], ids=len)
def test_a_table_that_never_leads_to_done_is_refused(rows: Sequence[Row]) -> None:
    refused(rows, "Done can't be reached: .* the last is (none|row [01])")


def test_a_state_that_no_row_leaves_is_refused() -> None:
    refused((*GOOD[:-1], observe(SEARCHES > 2, REPAIR), GOOD[-1]), r"row 4 .*leads to Repair, .*no row leaves it")
    refused((NO_TOOLS, Row((PLAN,), (ToolsListed,), ALWAYS, OBSERVE)), r"leads to Observe, .*no row leaves it")


def test_a_state_from_which_no_rows_lead_on_to_done_is_refused() -> None:
    waiting = Row((PLAN,), (ToolsListed, ModelReplied, ModelFailed, Interrupted), ALWAYS, OBSERVE)

    refused((NO_TOOLS, waiting, observe(ALWAYS, PLAN)), r"a run begins in Plan, .*never left: no rows lead on to Done")


def without_event(state: State, event: type[Event]) -> list[Row]:
    """The shipped rows, but for those that *state* has for *event*."""
    rows = []
    for row in TABLE:
        if event not in row.events or state not in row.sources:
            rows.append(row)
            continue
        if others := tuple(each for each in row.sources if each is not state):
            rows.append(evolve(row, sources=others))
        if other_events := tuple(each for each in row.events if each is not event):
            rows.append(evolve(row, events=other_events))
    return rows


@pytest.mark.parametrize(("state", "event"), [(state, event) for state, events in ANSWERS.items() for event in events])
def test_a_state_without_a_row_for_what_may_happen_there_is_refused(state: State, event: type[Event]) -> None:
    refused(without_event(state, event), rf"{state}, where {event.__name__} may happen, and no row is for that")


def test_a_state_that_no_row_leads_to_needs_no_rows() -> None:
    nowhere = [row for row in without_event(RESEARCH, ModelFailed) if row.target is not RESEARCH]

    check_table(nowhere)


@pytest.mark.parametrize(
    ("guard", "shadowing"),
    [
        (table.to_repair, "failed"),
        (table.to_repair & DEAR, "failed"),
        (table.answered & (ledger.failures >= 1), "answered"),
        (ledger.ended.is_(Ended.CANCELLED), "cancelled"),
        (table.at_max_failures & limits.enable_repair.is_(True), "failures at max"),
        (ledger.seconds > limits.max_wallclock_seconds, "out of time"),
    ],
)
def test_a_row_that_an_earlier_one_takes_the_place_of_is_refused(guard: Guard, shadowing: str) -> None:
    late = TABLE.after("failed", observe(guard, PLAN, add("iterations"), name="late"))

    refused(late, rf"row 32 \(late\) can't be taken: whenever it holds, row \d+ \({shadowing}\) does")


@pytest.mark.parametrize(
    "guard",
    [
        ledger.ended.is_(Ended.FAILED),
        ledger.failures >= limits.max_consecutive_failures,
        ledger.seconds >= limits.max_failures_before_research,
        table.cancelled & ~table.cancelled,
        ~ALWAYS,
        opaque(lambda held: held.failures > 3),
    ],
)
def test_a_row_that_could_be_taken_or_never_holds_anyway_is_not_refused(guard: Guard) -> None:
    check_table(TABLE.after("failed", observe(guard, PLAN, add("iterations"))))


def test_a_row_may_be_overruled_for_one_of_its_states_but_not_for_all() -> None:
    mine = Row((PLAN,), (ModelReplied,), table.asked_for_tools, OBSERVE, name="mine")

    check_table(TABLE.before("asked for tools", mine))
    refused(
        TABLE.before("asked for tools", evolve(mine, sources=(PLAN, REPAIR, RESEARCH))),
        r"row 3 \(asked for tools\) can't be taken: whenever it holds, row 2 \(mine\)",
    )


# Hard stops

FIRST = observe(SEARCHES >= 3, PLAN, add("iterations"), name="first")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (TABLE.before("cancelled", FIRST), r"row 9 \(first\) stands before .* was cancelled, row 10 \(cancelled\)"),
        (TABLE.without("answered").before("cancelled", TABLE.row("answered")), r"was cancelled"),
        (TABLE.guarded("cancelled", table.cancelled & DEAR), r"no row of Observe stops a run that was cancelled"),
        (TABLE.without("cancelled"), r"no row of Observe stops a run that was cancelled before .*reason=StopReason.CA"),
        (
            TABLE.replaced("cancelled", observe(table.cancelled, DONE, reason=StopReason.SUCCESS)),
            r"no row of Observe stops a run that was cancelled before row 9 \(cancelled\)",
        ),
        (TABLE.before("closing done", FIRST), r"row 10 \(first\) .* has its reason to end decided, row 11 \(closing"),
        (TABLE.without("closing done"), r"no row of Observe stops a run that has its reason to end decided"),
        (TABLE.before("out of time", FIRST), r"row 13 \(first\) .* was stopped by its deadline, row 14 \(out of time"),
        (TABLE.without("out of time"), r"no row of Observe stops a run that was stopped by its deadline"),
        (TABLE.guarded("out of time", ledger.ended.is_(Ended.TIMED_OUT)), r"a run that is out of time before row 16"),
        (
            TABLE.guarded("out of time", ledger.seconds >= limits.max_wallclock_seconds),
            r"a run that was stopped by its deadline before row 16",
        ),
        (
            TABLE.guarded("out of time", table.out_of_time & ~DEAR),
            r"no row of Observe stops a run that was stopped by its deadline",
        ),
        (TABLE.before("fatal model error", FIRST), r"row 14 \(first\) .* met a fatal model error, row 15 \(fatal"),
        (TABLE.without("fatal model error"), r"no row of Observe stops a run that met a fatal model error"),
    ],
)  # fmt: skip
def test_a_hard_stop_that_something_stands_before_or_that_is_missing_is_refused(rows: Table, message: str) -> None:
    refused(rows, message)


@pytest.mark.parametrize(
    "rows",
    [
        TABLE.after("fatal model error", FIRST),
        TABLE.before("out of time", observe(SEARCHES >= 3, DONE, reason=StopReason.STAGNATION)),
        TABLE.before("out of time", observe(CALLED & ~table.out_of_time & ~table.fatal, PLAN, add("iterations"))),
        TABLE.replaced("cancelled", observe(ledger.ended.is_(Ended.CANCELLED), DONE, reason=StopReason.CANCELLED)),
        TABLE.replaced("out of time", observe(table.out_of_time, DONE, reason=StopReason.BUDGET)),
        TABLE.replaced(
            "out of time",
            observe(ledger.ended.is_(Ended.TIMED_OUT), DONE, reason=StopReason.MAX_WALLCLOCK),
            observe(ledger.seconds >= limits.max_wallclock_seconds, DONE, reason=StopReason.MAX_WALLCLOCK),
        ),
        TABLE.before("cancelled", observe(~ALWAYS, PLAN)),
    ],
)  # fmt: skip
def test_a_row_that_no_hard_stop_waits_for_may_stand_before_it(rows: Table) -> None:
    check_table(rows)


def test_a_table_that_never_closes_needs_no_row_for_a_reason_decided() -> None:
    check_table(GOOD)
    closing = observe(SEARCHES > 2, PLAN, put("ending", StopReason.BUDGET))

    refused((*GOOD[:-1], closing, GOOD[-1]), "has its reason to end decided")


def test_a_row_that_ends_for_the_reason_decided_must_ask_whether_one_was() -> None:
    refused(TABLE.after("refused", observe(DEAR, DONE, reason=DECIDED)), r"row 16 \(dear\): .*must ask ~ledger.ending")


def test_a_counted_run_ends_within_its_iterations_whatever_the_world_answers() -> None:
    counting = TABLE.before("always", observe(SEARCHES < 2, REPAIR, add(SEARCHES), add("iterations")))

    run = after(counting, *turn("look") * 8, stagnation_window=99, closing_summary=False)

    assert (run.reason, next_effect(run), run.ledger.iterations) == (StopReason.MAX_ITERATIONS, None, 8)
