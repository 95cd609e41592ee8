"""Every run ends, within bounds known beforehand: the shipped table is checked, and tables are broken on purpose."""

import functools
import itertools
from collections.abc import Callable
from functools import cache

import pytest
from attrs import evolve
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from agent_fsm.check import Report, Verdict, check, verify
from agent_fsm.check.explore import COUNTS, TASK, Graph, boxes_of, counted, explore
from agent_fsm.check.reads import reads_of
from agent_fsm.check.world import world_of
from agent_fsm.config import AgentConfig
from agent_fsm.errors import TableError
from agent_fsm.guards import ALWAYS, Compare, Guard, Named, counter, ledger, limits, opaque
from agent_fsm.ledger import Ledger
from agent_fsm.machine import Run, next_effect, start, step
from agent_fsm.protocol import (
    DONE,
    PLAN,
    REPAIR,
    Ended,
    Event,
    Interrupted,
    ModelFailed,
    ModelReplied,
    Said,
    State,
    StopReason,
    ToolsFinished,
    ToolsListed,
    ToolsUnavailable,
)
from agent_fsm.table import TABLE, Row, Table, Update, add, observe, reset

SMALL = AgentConfig(max_iterations=3, max_tools_per_iter=2)
COSTLY = AgentConfig(
    max_iterations=2, max_tokens_total=10**9, max_cost_usd=1.0, prompt_usd_per_token=1e-6, reply_usd_per_token=2e-6
)
CONFIGS = {
    "default": AgentConfig(),
    "default but for iterations": SMALL,
    "no closing summary": evolve(SMALL, closing_summary=False, max_consecutive_failures=2),
    "one iteration": evolve(SMALL, max_iterations=1),
    "summaries": evolve(SMALL, summarize_every=1, closing_summary=False),
    "impatient": evolve(
        SMALL,
        max_iterations=4,
        max_model_retries=0,
        stagnation_window=1,
        max_consecutive_failures=2,
        max_research_hops=0,
    ),
    "no help": evolve(SMALL, enable_repair=False, research_on_unsure=False, research_after_failures=False),
    "stuck soon": evolve(SMALL, max_iterations=4, stagnation_window=1, max_model_retries=0, closing_summary=False),
    "money": COSTLY,
    "no money for anything": evolve(COSTLY, max_cost_usd=1e-9),
    "no room for a closing request": evolve(SMALL, max_tokens_total=100),
}
BROKE = ("no money for anything", "no room for a closing request")


@cache
def checked(name: str) -> Report:
    return check(TABLE, CONFIGS[name])


slow = pytest.mark.slow
each_config = pytest.mark.parametrize("name", CONFIGS)


def worst(report: Report) -> dict[str, float | None]:
    return {name: report.bound(name).at_most for name in COUNTS}


# The shipped table


@each_config
def test_every_run_ends(name: str) -> None:
    assert checked(name).verdict is Verdict.PROVED


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("default", "summaries", "impatient") else slow) for name in CONFIGS],
)
def test_every_run_ends_says_a_verifier_that_does_without_the_search(name: str) -> None:
    certificate = checked(name).certificate

    assert certificate is not None
    assert verify(certificate, TABLE, CONFIGS[name]) == []


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in BROKE])
def test_the_worst_case_is_what_the_limits_add_up_to(name: str) -> None:
    config = CONFIGS[name]
    turns, attempts, closing = config.max_iterations, 1 + config.max_model_retries, int(config.closing_summary)
    summaries = 0 if config.summarize_every is None else (turns - 1) // config.summarize_every
    expected = {
        "steps": 1 + turns * (attempts + 1) + summaries + closing,
        "iterations": turns,
        "model_calls": turns * attempts + summaries + closing,
        "tool_turns": turns,
        "tool_calls": turns * config.max_tools_per_iter,
        "summaries": summaries + closing,
    }

    assert {name: most for name, most in worst(checked(name)).items() if name in expected} == expected


@pytest.mark.parametrize("name", ["default", "default but for iterations", "no closing summary", "summaries"])
def test_a_run_comes_to_each_bound(name: str) -> None:
    report = checked(name)

    assert [bound.name for bound in report.bounds if not bound.exact] == []


@each_config
def test_the_witness_of_a_bound_comes_to_what_is_said_of_it(name: str) -> None:
    for bound in (bound for bound in checked(name).bounds if bound.name in COUNTS):
        runs = [start(TASK, CONFIGS[name])]
        for event in bound.witness:
            runs.append(step(runs[-1], event))
        place = COUNTS.index(bound.name)

        total = sum(counted(before, after)[place] for before, after in itertools.pairwise(runs))

        assert total == bound.reached


@pytest.mark.parametrize("name", BROKE)
def test_a_budget_too_small_for_one_request_sends_none(name: str) -> None:
    report = checked(name)

    assert (report.bound("model_calls").at_most, report.bound("steps").at_most) == (0, 1)
    assert StopReason.BUDGET in report.reasons


def test_every_row_is_taken_in_some_run() -> None:
    untaken = [set(checked(name).untaken) for name in CONFIGS]

    assert set.intersection(*untaken) == set()


def test_a_run_can_end_for_every_reason() -> None:
    assert {reason for name in CONFIGS for reason in checked(name).reasons} == set(StopReason)


@pytest.mark.slow
def test_a_limit_of_a_million_is_proved_and_verified_like_one_of_three() -> None:
    config = AgentConfig(max_iterations=10**6)

    report = check(TABLE, config)

    assert (report.verdict, report.bound("model_calls").at_most) == (Verdict.PROVED, 3 * 10**6 + 1)
    assert report.boxes < 2_000
    assert report.certificate is not None
    assert verify(report.certificate, TABLE, config) == []


def test_no_provider_that_bills_honestly_is_paid_more_than_the_token_budget() -> None:
    bound = checked("default").bound("tokens")

    run = functools.reduce(step, bound.witness, start(TASK, AgentConfig()))

    assert (bound.at_most, run.ledger.tokens, run.state) == (500_000, 500_000, DONE)


# The search is to be trusted

amounts = st.sampled_from([0, 0, 1, 1_000, 9_500, 100_000, 10**6])
waits = st.sampled_from([0.0, 0.0, 0.1, 5.0, 60.0, 200.0])


@cache
def explored(name: str) -> Graph:
    config = CONFIGS[name]
    return explore(TABLE, config, boxes_of(TABLE, config), most=10_000)


@st.composite
def any_event(draw: st.DrawFn, run: Run, config: AgentConfig) -> Event:
    """Draw something that may happen to *run*, of any size, at any time, for any price."""
    now = run.ledger.seconds + draw(waits)
    move = draw(st.sampled_from(list(world_of(config, reads_of(TABLE, config)).moves(run))))
    match event := move.event:
        case ModelReplied():
            used = draw(st.none() | amounts)
            return evolve(event, now=now, prompt_tokens=used, completion_tokens=draw(amounts))
        case ModelFailed():
            return evolve(event, now=now, retry_after=draw(st.none() | waits.filter(bool)))
        case ToolsListed():
            return evolve(event, now=now, size=draw(amounts))
        case ToolsFinished():
            fresh, repeats = draw(st.booleans()), draw(st.integers(2, 9))
            return evolve(
                event, now=now, fresh=fresh, stale=draw(st.integers(1, 9)), repeats=repeats, size=draw(amounts)
            )
        case ToolsUnavailable() | Interrupted():
            return evolve(event, now=now)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_run_leaves_what_the_search_has_seen(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["default but for iterations", "summaries", "stuck soon", "money"]))
    config, graph = CONFIGS[name], explored(name)
    run = start(TASK, config)

    while next_effect(run) is not None:
        before, run = run, step(run, data.draw(any_event(run, config)))

        key = graph.boxes.key(run, graph.boxes.places(run))
        assert key in graph.numbers
        source = graph.numbers[graph.boxes.key(before, graph.boxes.places(before))]
        assert graph.numbers[key] in {edge.target for edge in graph.edges[source]}


# It finds what is wrong with a table


def changed(change: Callable[[Row], Row | None]) -> Table:
    return Table(new for row in TABLE if (new := change(row)) is not None)


def to_plan_with(*updates: Update) -> Table:
    return changed(lambda row: evolve(row, updates=updates) if row is TABLE[-1] else row)


def goes_round(report: Report, table: Table, config: AgentConfig) -> State:
    """Return the state in which a run of the report's lasso is, having gone round it ten times."""
    lasso = report.lasso
    assert lasso is not None
    run = functools.reduce(step, lasso.entry, start(TASK, config, table))
    began, before = run.state, run.ledger
    for _ in range(10):
        run = functools.reduce(step, lasso.loop, run)
        assert (run.state, run.ledger.failures, run.ledger.iterations >= before.iterations) == (
            began,
            before.failures,
            True,
        )
    return run.state


def test_a_row_that_resets_the_iterations_goes_round_for_ever() -> None:
    table = to_plan_with(reset("iterations"))

    report = check(table, SMALL)

    assert report.verdict is Verdict.REFUTED
    assert goes_round(report, table, SMALL) in (PLAN, State.CALL_TOOLS)


def test_a_row_that_forgets_to_count_goes_round_for_ever() -> None:
    table = to_plan_with(add("turns"))

    report = check(table, SMALL)

    assert report.verdict is Verdict.REFUTED
    assert goes_round(report, table, SMALL) in (PLAN, State.CALL_TOOLS)


def test_a_table_without_the_cap_on_iterations_goes_round_for_ever() -> None:
    report = check(TABLE.without("iterations at max, closing", "iterations at max"), SMALL)

    assert report.verdict is Verdict.REFUTED


def test_retries_without_a_cap_end_when_the_budget_does() -> None:
    retryable = ledger.ended.is_(Ended.RETRYABLE)
    table = changed(lambda row: evolve(row, guard=retryable & row.guard.parts()[1]) if row.label == "retry" else row)

    report = check(table, SMALL)

    assert report.verdict is Verdict.PROVED
    assert "tokens" in report.why


def test_retries_without_a_cap_or_a_budget_go_round_for_ever() -> None:
    retryable = ledger.ended.is_(Ended.RETRYABLE)
    table = Table(
        evolve(row, guard=retryable & row.guard.parts()[1]) if row.label == "retry" else row for row in TABLE
    ).without("over budget, closing", "over budget")

    report = check(table, SMALL)

    assert report.verdict is Verdict.REFUTED
    assert report.lasso is not None
    assert [type(event) for event in report.lasso.loop] == [ModelFailed]


def test_a_budget_that_is_not_asked_bounds_no_tokens() -> None:
    report = check(TABLE.without("over budget, closing", "over budget"), SMALL)

    assert report.verdict is Verdict.PROVED
    assert report.bound("tokens").at_most is None


def test_a_transcript_that_grows_for_ever_is_not_taken_for_a_way_round() -> None:
    config = evolve(SMALL, max_history_messages=None)

    report = check(TABLE.without("iterations at max, closing", "iterations at max"), config)

    assert report.verdict is Verdict.UNDECIDED  # some day it is too long for the budget


def test_a_cap_that_decides_no_reason_is_refused_or_goes_round() -> None:
    table = changed(lambda row: evolve(row, updates=()) if row.label == "iterations at max, closing" else row)

    report = check(table, SMALL)

    assert report.verdict is Verdict.REFUTED  # its closing request counts as a periodic summary, time and again


@pytest.mark.parametrize("event", [ToolsUnavailable, ModelFailed, Interrupted])
def test_an_event_without_a_row_is_found_though_no_row_names_it(event: type[Event]) -> None:
    def without(row: Row) -> Row | None:
        if event not in row.events:
            return row
        others = tuple(each for each in row.events if each is not event)
        return evolve(row, events=others) if others else None

    with pytest.raises(TableError, match=event.__name__):
        check(changed(without), SMALL)


def test_an_off_by_one_in_a_limit_changes_the_bounds() -> None:
    def lenient(guard: Guard) -> Guard:
        if isinstance(guard, Compare) and guard.name == "iterations >= max_iterations":
            return evolve(guard, sign=">")
        if isinstance(guard, Named):
            return evolve(guard, guard=lenient(guard.guard))
        parts = guard.parts()
        return type(guard)(*map(lenient, parts)) if parts else guard

    report = check(changed(lambda row: evolve(row, guard=lenient(row.guard))), SMALL)

    assert report.bound("iterations").at_most == SMALL.max_iterations + 1


# Guards of users

CAPPED = "iterations at max, closing", "iterations at max"
searches = counter("searches")


@pytest.mark.parametrize(
    ("guard", "most"),
    [
        pytest.param(ledger.model_calls >= 5, {"model_calls": 5}, marks=slow),
        (ledger.model_calls > 5, {"model_calls": 6}),
        pytest.param(  # two at a time: three, and two more
            ledger.tool_calls >= 4, {"tool_calls": 5}, marks=slow
        ),
        pytest.param(ledger.iterations >= 5, {"iterations": 5}, marks=slow),
        (ledger.model_calls >= 1, {"model_calls": 1}),
    ],
    ids=lambda each: getattr(each, "name", None),
)
def test_a_stop_of_a_users_own_bounds_just_what_it_says(guard: Guard, most: dict[str, int]) -> None:
    table = TABLE.without(*CAPPED).stopping(guard, StopReason.BUDGET, closing=False)

    report = check(table, evolve(SMALL, max_model_retries=0))

    assert report.verdict is Verdict.PROVED
    assert {name: report.bound(name).at_most for name in most} == most


def test_a_counter_of_a_users_own_ends_what_nothing_else_does() -> None:
    counting = TABLE.replaced(TABLE[-1], evolve(TABLE[-1], updates=(add(searches),)))
    table = counting.without(*CAPPED).stopping(searches >= 3, StopReason.BUDGET, closing=False)

    report = check(table, evolve(SMALL, enable_repair=False, max_research_hops=0, max_model_retries=0))

    assert report.verdict is Verdict.PROVED
    assert report.bound("iterations").at_most == 4  # three that are counted, and the nudge


@pytest.mark.slow
def test_calls_of_one_tool_are_bounded_and_those_of_others_are_not() -> None:
    table = TABLE.stopping(ledger.calls_of("exec_shell") >= 3, StopReason.BUDGET, closing=False)

    report = check(table, SMALL)

    assert report.verdict is Verdict.PROVED
    assert [
        (bound.at_most, bound.exact) for bound in (report.bound("tool_calls"), report.bound("calls_of_exec_shell"))
    ] == [
        (6, True),
        (4, True),  # two at a time: two, and two more
    ]


def lucky(_: Ledger) -> bool:
    """Say no."""
    return False


def test_a_guard_that_can_not_be_read_is_taken_to_answer_anything() -> None:
    table = TABLE.stopping(opaque(lucky), StopReason.BUDGET, closing=False)

    report = check(table, SMALL)

    assert (report.verdict, report.guards) == (Verdict.PROVED_WHATEVER, ("lucky",))
    assert worst(report) == worst(checked("default but for iterations"))


@pytest.mark.slow
def test_a_run_that_only_an_unreadable_guard_ends_is_not_proved() -> None:
    table = TABLE.without(*CAPPED).stopping(opaque(lucky), StopReason.BUDGET, closing=False)

    report = check(table, SMALL)

    assert (report.verdict, report.guards) == (Verdict.ASSUMED, ("lucky",))


def test_two_counters_compared_with_each_other_are_taken_to_answer_anything() -> None:
    table = TABLE.stopping(ledger.failures > ledger.hops, StopReason.BUDGET, closing=False)

    assert check(table, SMALL).verdict is Verdict.PROVED_WHATEVER


@st.composite
def stop_rows(draw: st.DrawFn) -> Row:
    name = draw(
        st.sampled_from(["failures", "hops", "model_calls", "nudges", "stale", "turns", "attempts", "iterations"])
    )
    compared = Compare(getattr(ledger, name), draw(st.sampled_from(["<", "<=", ">", ">="])), draw(st.integers(0, 4)))
    flag = draw(
        st.sampled_from(
            [ALWAYS, ledger.said.is_(Said.EMPTY), ledger.asking.is_(REPAIR), ~limits.enable_repair.is_(True)]
        )
    )
    guard = draw(st.sampled_from([compared & flag, compared, compared | flag]))
    return observe(guard, DONE, reason=StopReason.BUDGET, name="a stop")


@settings(max_examples=25, deadline=None)
@given(stop_rows(), st.integers(0, len(TABLE)))
def test_adding_a_stop_row_never_makes_a_bound_larger(row: Row, place: int) -> None:
    config = evolve(SMALL, max_iterations=2, max_model_retries=1)
    table = Table((*TABLE[:place], row, *TABLE[place:]))
    before = checked_with_two()

    try:
        after = check(table, config)
    except TableError:
        assume(False)  # not a place for it

    for name in COUNTS:
        most = before.bound(name).at_most
        assert most is not None
        assert (after.bound(name).at_most or 0) <= most


@cache
def checked_with_two() -> Report:
    return check(TABLE, evolve(SMALL, max_iterations=2, max_model_retries=1))
