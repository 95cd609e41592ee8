"""Every run ends, within bounds known beforehand: all of them are searched, and tables are broken on purpose."""

from collections.abc import Callable
from functools import cache

import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_fsm.config import AgentConfig
from agent_fsm.guards import ALWAYS, Compare, Guard, Named, opaque
from agent_fsm.machine import Run, next_effect, start, step
from agent_fsm.protocol import (
    OBSERVE,
    PLAN,
    Event,
    Interrupted,
    ModelFailed,
    ModelReplied,
    StopReason,
    ToolsFinished,
    ToolsListed,
    ToolsUnavailable,
)
from agent_fsm.table import TABLE, Row, Table, Update, add, reset
from tests.search import TASK, Explored, Tally, every_run, explore, watch_of, world_of

SMALL = AgentConfig(max_iterations=3, max_tools_per_iter=2)
COSTLY = AgentConfig(
    max_iterations=2, max_tokens_total=10**9, max_cost_usd=1.0, prompt_usd_per_token=1e-6, reply_usd_per_token=2e-6
)
CONFIGS = {
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
    "stuck soon": evolve(SMALL, max_iterations=4, stagnation_window=1, max_model_retries=0),
    "money": COSTLY,
    "no money for anything": evolve(COSTLY, max_cost_usd=1e-9),
    "no room for a closing request": evolve(SMALL, max_tokens_total=100),
}
BROKE = ("no money for anything", "no room for a closing request")


@cache
def explored(name: str) -> Explored:
    return explore(CONFIGS[name])


each_config = pytest.mark.parametrize("name", CONFIGS)


# The shipped table


@each_config
def test_every_run_ends(name: str) -> None:
    found = explored(name)

    assert (found.cycle, found.trapped) == ([], set())


@each_config
def test_nothing_can_happen_that_a_state_has_no_row_for(name: str) -> None:
    assert explored(name).missing == set()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in BROKE])
def test_the_worst_case_is_what_the_limits_add_up_to(name: str) -> None:
    config, found = CONFIGS[name], explored(name)
    turns, attempts, closing = config.max_iterations, 1 + config.max_model_retries, int(config.closing_summary)
    summaries = 0 if config.summarize_every is None else (turns - 1) // config.summarize_every
    expected = Tally(
        steps=1 + turns * (attempts + 1) + summaries + closing,
        iterations=turns,
        model_calls=turns * attempts + summaries + closing,
        summaries=summaries,
        tool_turns=turns,
        tool_calls=turns * config.max_tools_per_iter,
    )

    assert found.worst == expected


@pytest.mark.parametrize("name", BROKE)
def test_a_budget_too_small_for_one_request_sends_none(name: str) -> None:
    found = explored(name)

    assert found.worst == Tally(steps=1, iterations=0, model_calls=0, summaries=0, tool_turns=0, tool_calls=0)
    assert StopReason.BUDGET in found.reasons


def test_every_row_is_taken_in_some_run() -> None:
    taken = {number for name in CONFIGS for number in explored(name).rows}

    assert [row.label for row in TABLE if id(row) not in taken] == []


def test_a_run_can_end_for_every_reason() -> None:
    assert set().union(*(explored(name).reasons for name in CONFIGS)) == set(StopReason)


@pytest.mark.slow
def test_every_run_ends_under_the_default_limits() -> None:
    found = explore(AgentConfig())

    assert (found.cycle, found.trapped, found.missing) == ([], set(), set())
    assert found.worst == Tally(steps=34, iterations=8, model_calls=25, summaries=0, tool_turns=8, tool_calls=64)


# The search is to be trusted


@pytest.mark.parametrize("closing_summary", [True, False])
def test_without_merging_the_same_configurations_and_bounds_are_found(closing_summary: bool) -> None:
    config = AgentConfig(
        max_iterations=1,
        max_model_retries=1,
        stagnation_window=1,
        max_tools_per_iter=2,
        closing_summary=closing_summary,
    )
    found = explore(config)

    assert every_run(config, wild=True) == (set(found.edges), found.worst)


@pytest.mark.parametrize("summarize_every", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_without_merging_two_turns_have_the_same_bounds(summarize_every: int | None) -> None:
    config = AgentConfig(
        max_iterations=2,
        max_model_retries=1,
        stagnation_window=1,
        max_tools_per_iter=2,
        summarize_every=summarize_every,
    )
    found = explore(config)

    keys, worst = every_run(config, wild=False)

    assert keys <= found.edges.keys()
    assert worst == found.worst


amounts = st.sampled_from([0, 0, 1, 1_000, 9_500, 100_000, 10**6])
waits = st.sampled_from([0.0, 0.0, 0.1, 5.0, 60.0, 200.0])


@st.composite
def any_event(draw: st.DrawFn, run: Run, config: AgentConfig) -> Event:
    """Draw something that may happen to *run*, of any size, at any time, for any price."""
    now = run.ledger.seconds + draw(waits)
    answer = draw(st.sampled_from(world_of(config).answers(run)))
    match event := answer.event:
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
    config, found = CONFIGS[name], explored(name)
    watch, run = watch_of(TABLE, config), start(TASK, config)

    while next_effect(run) is not None:
        run = step(run, data.draw(any_event(run, config)))

        assert watch.key(run) in found.edges


# It finds what is wrong with a table


def changed(change: Callable[[Row], Row | None]) -> Table:
    return tuple(new for row in TABLE if (new := change(row)) is not None)


def labelled(label: str) -> Row:
    return next(row for row in TABLE if row.label == label)


def to_plan_with(*updates: Update) -> Table:
    return changed(lambda row: evolve(row, updates=updates) if row is TABLE[-1] else row)


def test_a_row_that_resets_the_iterations_is_a_cycle() -> None:
    table = to_plan_with(reset("iterations"))

    found = explore(SMALL, table)

    assert found.worst is None
    assert PLAN in {key[0] for key in found.cycle}


def test_a_row_that_forgets_to_count_is_a_cycle() -> None:
    assert explore(SMALL, to_plan_with(add("turns"))).cycle


def test_a_table_without_the_cap_on_iterations_has_a_cycle() -> None:
    table = changed(lambda row: None if row.label.startswith("iterations at max") else row)

    assert explore(SMALL, table).cycle


def test_retries_without_a_cap_are_a_cycle() -> None:
    retryable = labelled("retries exhausted").guard
    table = changed(lambda row: evolve(row, guard=retryable & row.guard.parts()[1]) if row.label == "retry" else row)

    assert explore(SMALL, table).cycle


def test_a_cap_that_leads_back_to_plan_traps_runs_in_it() -> None:
    dead_end = Row((OBSERVE,), (), ALWAYS, PLAN)
    table = (*(row for row in TABLE if OBSERVE not in row.sources), dead_end)

    found = explore(SMALL, table)

    assert PLAN in {key[0] for key in found.trapped}


@pytest.mark.parametrize("event", [ToolsUnavailable, ModelFailed, Interrupted])
def test_an_event_without_a_row_is_found_though_no_row_names_it(event: type[Event]) -> None:
    def without(row: Row) -> Row | None:
        if event not in row.events:
            return row
        others = tuple(each for each in row.events if each is not event)
        return evolve(row, events=others) if others else None

    found = explore(evolve(SMALL, max_iterations=1), changed(without))

    assert f"no row for {event.__name__} in Plan" in found.missing


def test_a_cap_that_decides_no_reason_is_a_cycle() -> None:
    table = changed(lambda row: evolve(row, updates=()) if "closing" in row.label else row)

    assert explore(SMALL, table).cycle  # its closing request counts as a periodic summary, time and again


def test_an_off_by_one_in_a_limit_changes_the_bounds() -> None:
    def lenient(guard: Guard) -> Guard:
        if isinstance(guard, Compare) and guard.name == "iterations >= max_iterations":
            return evolve(guard, sign=">")
        if isinstance(guard, Named):
            return evolve(guard, guard=lenient(guard.guard))
        parts = guard.parts()
        return type(guard)(*map(lenient, parts)) if parts else guard

    found = explore(SMALL, changed(lambda row: evolve(row, guard=lenient(row.guard))))

    assert found.worst is not None
    assert found.worst.iterations == SMALL.max_iterations + 1


def test_a_table_with_an_opaque_guard_can_not_be_searched() -> None:
    def fair(_: object) -> bool:
        return False

    table = (*TABLE[:-1], evolve(labelled("failed"), guard=opaque(fair)), TABLE[-1])

    with pytest.raises(ValueError, match="fair"):
        explore(SMALL, table)
