"""Loop bugs of real agents are caught: refused, refuted, out of bounds, or ended where the original went on."""

import pytest

from agent_fsm import AgentConfig
from agent_fsm.check import check
from agent_fsm.table import TABLE, Table, ledger
from tests.loop_bugs import BUGS, CAP, GO_ON, SMALL, Bug, How, calls_capped, from_scratch, how_caught

NAMES = [pytest.param(bug, id=bug.name, marks=pytest.mark.slow if bug.slow else ()) for bug in BUGS]


@pytest.mark.parametrize("bug", NAMES)
def test_a_bug_is_caught_as_it_says_or_listed_as_not_caught(bug: Bug) -> None:
    how, found = how_caught(bug)

    assert how is bug.how, found


def test_at_least_25_of_30_are_caught_and_the_rest_say_why() -> None:
    caught = [bug for bug in BUGS if bug.how is not How.NOT_CAUGHT]

    assert len(BUGS) >= 30
    assert len(caught) >= 25
    assert all(bool(bug.why_not) is (bug.how is How.NOT_CAUGHT) for bug in BUGS)


def test_each_bug_has_a_name_and_a_model_of_its_own() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    assert all((bug.table is None) is not (bug.run is None) for bug in BUGS)


# Without the bug there is nothing to catch


@pytest.mark.parametrize(
    ("table", "config", "promised"),
    [
        (TABLE, SMALL, {"model_calls": 5, "tokens": 500_000}),
        (from_scratch(CAP, GO_ON), SMALL, {"iterations": 2, "tool_turns": 2}),
        (from_scratch(CAP, GO_ON), AgentConfig(max_iterations=12, max_tools_per_iter=1), {"model_calls": 12}),
        (calls_capped(ledger.tool_calls >= 3), SMALL, {"tool_calls": 3}),
    ],
)
def test_the_tables_that_bugs_are_made_of_keep_what_was_promised(
    table: Table, config: AgentConfig, promised: dict[str, int]
) -> None:
    report = check(table, config)

    assert report.terminates
    assert {name: report.bound(name).at_most for name in promised} == promised


def test_two_strikes_are_reached_where_three_are_not() -> None:
    strikes = next(bug for bug in BUGS if bug.meant == "three strikes")
    assert strikes.table is not None

    untaken = check(strikes.table(), strikes.config).untaken

    assert any("three strikes" in row for row in untaken)
    assert not any("two strikes" in row for row in untaken)
