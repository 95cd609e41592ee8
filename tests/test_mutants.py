"""Each slip of the pen in the shipped table is refused, or breaks a claim about its rows, or changes nothing."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from agent_fsm.config import AgentConfig
from agent_fsm.guards import ALWAYS
from agent_fsm.machine import Run, start, step
from agent_fsm.protocol import CALL_TOOLS, DONE, Event, Interrupted
from agent_fsm.table import TABLE, Table
from tests import test_policy_rows
from tests.mutants import EQUIVALENT, KILLERS, OCCURRING, Caught, Mutant, all_caught, equivalent, mutants_of, refusal
from tests.test_machine import (
    ANSWER,
    BROKEN,
    BUSY,
    CALLS,
    CANCEL,
    CUT_OFF,
    EMPTY,
    FAILED,
    OK,
    REFUSED,
    TASK,
    TIME_UP,
    UNSURE,
    WITH_SEARCH,
    stopped,
)

MUTANTS = mutants_of(TABLE)
CLAIMS: Sequence[Callable[[Table], None]] = [
    claim for name, claim in vars(test_policy_rows).items() if name.startswith("test_")
]


def broken(table: Table) -> str:
    """Return the name of the first claim that does not hold of *table*; nothing if all do."""
    for claim in CLAIMS:
        try:
            claim(table)
        except Exception:  # noqa: BLE001 # however it fails
            return claim.__name__
    return ""


def named(name: str) -> Mutant:
    return next(mutant for mutant in MUTANTS if mutant.name == name)


def test_mutants_have_names_of_their_own_and_none_is_the_table() -> None:
    kinds = Counter(mutant.kind for mutant in MUTANTS)
    plain = sum(row.guard is ALWAYS for row in TABLE)

    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert TABLE not in [mutant.table for mutant in MUTANTS]
    assert (kinds["dropped"], kinds["swapped"], kinds["negated"]) == (len(TABLE), len(TABLE) - 1, len(TABLE))
    assert kinds["always"] == kinds["never"] == len(TABLE) - plain


def test_every_mutant_is_refused_or_breaks_a_claim_or_changes_nothing() -> None:
    uncaught = [mutant.name for mutant in MUTANTS if not refusal(mutant.table) and not broken(mutant.table)]

    assert broken(TABLE) == ""
    assert sorted(uncaught) == sorted(EQUIVALENT)


# That those which change nothing change nothing


@pytest.mark.parametrize("name", EQUIVALENT)
def test_from_no_ledger_does_it_lead_elsewhere(name: str) -> None:
    assert equivalent(TABLE, named(name).table)


@pytest.mark.parametrize(
    "name",
    [
        "12 unsure, no research: swapped with 13 out of time",
        "26 iterations at max, closing: closing_cost_needed_usd > max_cost_usd turned to >=",
        "29 failures escalate: hops < max_research_hops turned to <=",
        "33 always: without add turns",
    ],
)
def test_a_mutant_that_does_lead_elsewhere_is_not_taken_for_equivalent(name: str) -> None:
    assert not equivalent(TABLE, named(name).table)


EVENTS: list[Event] = [
    *(WITH_SEARCH, ANSWER, UNSURE, EMPTY, CUT_OFF, REFUSED, CALLS, OK, FAILED),
    *(BUSY, BROKEN, CANCEL, TIME_UP, stopped(cancelled=True), stopped(cancelled=False)),
]


def test_what_was_said_and_how_it_ended_occur_together_as_the_proof_takes_for_granted() -> None:
    found = set()
    for config in (AgentConfig(max_iterations=1), AgentConfig(max_iterations=3, summarize_every=1)):
        seen, todo = set(), [start(TASK, config)]
        while todo:
            run = todo.pop()
            for event in EVENTS:
                if not _may_happen(run, event):
                    continue
                new = step(run, event)
                moment = (new.ledger.said, new.ledger.ended)
                if new.state is not CALL_TOOLS:
                    found.add(moment)
                # All that `step` makes said and ended of, and the count that ends the search
                key = (new.state, new.listed, moment, new.ledger.ending, new.ledger.iterations)
                if key not in seen and new.state is not DONE:
                    seen.add(key)
                    todo.append(new)

    assert found == set(OCCURRING)


def _may_happen(run: Run, event: Event) -> bool:
    if isinstance(event, Interrupted):
        return bool(event.results) is (run.pending is not None)
    return type(event) in run.rules.waiting.get(run.state, {}) and (event is WITH_SEARCH) is not run.listed


def test_where_work_has_room_the_closing_request_has_more_as_the_proof_takes_for_granted() -> None:
    prices: dict[str, Any] = {"max_cost_usd": 9.0, "prompt_usd_per_token": 1e-6, "reply_usd_per_token": 0.0}
    cases: list[dict[str, Any]] = [
        {},
        {"summarize_every": 1},
        {"max_history_messages": 1},
        {"max_tokens_total": 20_000},
    ]
    for settings in (*cases, prices):
        run = start(TASK, AgentConfig(**settings))
        for event in (WITH_SEARCH, CALLS, FAILED, EMPTY, UNSURE, BUSY, CALLS, OK, CUT_OFF):
            if type(event) in run.rules.waiting.get(run.state, {}):
                run = step(run, event)
                ledger = run.ledger
                if run.state is not CALL_TOOLS:
                    assert ledger.closing_tokens_needed < ledger.tokens_needed
                    assert ledger.closing_cost_needed_usd <= ledger.cost_needed_usd


# The long form


def _told(every: Sequence[Caught]) -> list[str]:
    return [each.mutant.name for each in every if not each.refused and not each.tests]


def test_the_tests_that_run_for_a_mutant_get_it_in_the_tables_place() -> None:
    (found,) = all_caught([named("15 refused: made never")], workers=1)

    refusal_ends = "test_a_refusal_ends_the_run_even_when_the_budget_went_with_it"
    assert f"{KILLERS[0]}::{refusal_ends}" in found.claims
    assert found.best(Counter(found.tests)).startswith("test_")
    assert len(found.tests) < 10


@pytest.mark.slow
def test_every_mutant_is_refused_or_fails_a_test_or_changes_nothing() -> None:
    assert sorted(_told(all_caught(MUTANTS))) == sorted(EQUIVALENT)
