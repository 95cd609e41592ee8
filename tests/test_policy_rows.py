"""What each row of the shipped table is for: claims about runs, each named after what breaks without it.

Each takes the table, so that mutants of it can be put to them: see `tests.mutants`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from attrs import evolve

from agent_fsm.config import AgentConfig
from agent_fsm.machine import Run, next_effect, start, step
from agent_fsm.protocol import (
    CALL_TOOLS,
    DONE,
    PLAN,
    REPAIR,
    RESEARCH,
    SUMMARIZE,
    AskModel,
    Event,
    ModelReplied,
    RunTools,
    State,
    StopReason,
    ToolsUnavailable,
)
from agent_fsm.table import TABLE, Table
from tests.test_machine import (
    ANSWER,
    BROKEN,
    BUSY,
    CALLS,
    CANCEL,
    CUT_OFF,
    EMPTY,
    FAILED,
    LATE,
    OK,
    REFUSED,
    SO_FAR,
    TASK,
    TIME_UP,
    UNSURE,
    WITH_SEARCH,
    WORK,
    ran,
    stopped,
)

ASKING: dict[State, list[Event]] = {
    PLAN: [WITH_SEARCH],
    REPAIR: [WITH_SEARCH, EMPTY],
    RESEARCH: [WITH_SEARCH, UNSURE],
}
"""Ways into each state that asks the model for work."""
STALE = ran(fresh=False, stale=3, repeats=3)
STUCK: list[Event] = [CALLS, STALE, CALLS, STALE]
BARE = {"closing_summary": False}
NO_RESEARCH = {"research_on_unsure": False, "research_after_failures": False}
MOST = 500_000
"""Tokens, by default."""


@pytest.fixture
def table() -> Table:
    """Return the table that is shipped."""
    return TABLE


def after(table: Sequence[Any], *events: Event, **settings: Any) -> Run:
    """Return the run to which *events* happened, as far as it went on."""
    run = start(TASK, AgentConfig(**settings), table)
    for event in events:
        run = step(run, event)
    return run


def outcome(run: Run) -> tuple[State, StopReason | None]:
    """Return where the run is, and for what reason it ends, or is about to."""
    return run.state, run.reason or run.ledger.ending


def ends(run: Run, reason: StopReason) -> bool:
    return outcome(run) == (DONE, reason)


def closes(run: Run, reason: StopReason) -> bool:
    return outcome(run) == (SUMMARIZE, reason)


def goes_on(run: Run, state: State) -> bool:
    return outcome(run) == (state, None)


# Where an effect is waited for


def test_a_run_asks_the_model_once_it_knows_its_tools(table: Table) -> None:
    assert next_effect(after(table, WORK)) == AskModel(PLAN)


def test_without_tools_to_be_had_a_run_ends_and_says_so(table: Table) -> None:
    assert ends(after(table, ToolsUnavailable(0.0, "backend", "down")), StopReason.TOOLS_UNAVAILABLE)


def test_calls_are_run_whichever_state_asked_for_them(table: Table) -> None:
    for events in ASKING.values():
        assert next_effect(after(table, *events, CALLS)) == RunTools(CALLS.calls)


def test_replies_without_calls_run_no_tools(table: Table) -> None:
    for reply in (ANSWER, UNSURE, EMPTY, CUT_OFF, REFUSED):
        assert after(table, WITH_SEARCH, reply).state is not CALL_TOOLS


# What has happened


def test_a_cancel_ends_the_run_wherever_it_waits(table: Table) -> None:
    ways: list[list[Event]] = [[], [WORK, BUSY], *ASKING.values()]
    for events in ways:
        assert ends(after(table, *events, CANCEL), StopReason.CANCELLED)
    assert ends(after(table, WORK, CALLS, stopped(cancelled=True)), StopReason.CANCELLED)


def test_a_cancel_during_the_closing_summary_is_a_cancel(table: Table) -> None:
    assert ends(after(table, WORK, CALLS, OK, CANCEL, max_iterations=1), StopReason.CANCELLED)


def test_a_cancel_at_the_deadline_is_a_cancel(table: Table) -> None:
    assert ends(after(table, WORK, evolve(CANCEL, now=LATE)), StopReason.CANCELLED)


def test_a_run_that_was_not_cancelled_goes_on(table: Table) -> None:
    assert goes_on(after(table, WORK, CALLS, OK), PLAN)


def test_after_the_closing_summary_a_run_ends_for_the_reason_decided(table: Table) -> None:
    for reply in (SO_FAR, EMPTY, BUSY, BROKEN, TIME_UP, evolve(SO_FAR, now=LATE)):
        assert ends(after(table, WORK, CALLS, OK, reply, max_iterations=1), StopReason.MAX_ITERATIONS)


def test_a_periodic_summary_ends_no_run(table: Table) -> None:
    assert goes_on(after(table, WORK, CALLS, OK, SO_FAR, summarize_every=1), PLAN)


def test_an_answer_ends_the_run_even_when_it_comes_late_or_at_a_cap(table: Table) -> None:
    assert ends(after(table, WORK, ANSWER), StopReason.SUCCESS)
    assert ends(after(table, WORK, evolve(ANSWER, now=LATE)), StopReason.SUCCESS)
    assert ends(after(table, WORK, ANSWER, max_iterations=1), StopReason.SUCCESS)
    assert ends(after(table, WORK, evolve(ANSWER, prompt_tokens=MOST)), StopReason.SUCCESS)


def test_a_hedged_answer_counts_where_there_are_no_research_tools(table: Table) -> None:
    assert ends(after(table, WORK, UNSURE), StopReason.SUCCESS)


def test_a_hedged_answer_counts_where_research_is_switched_off(table: Table) -> None:
    assert ends(after(table, WITH_SEARCH, UNSURE, research_on_unsure=False), StopReason.SUCCESS)


def test_a_hedged_answer_counts_when_the_last_hop_is_spent(table: Table) -> None:
    for hops in (0, 1, 2):
        hedging = [UNSURE] * hops

        assert ends(after(table, WITH_SEARCH, *hedging, UNSURE, max_research_hops=hops), StopReason.SUCCESS)


def test_a_hedged_answer_counts_when_the_last_iteration_is_spent(table: Table) -> None:
    assert ends(after(table, WITH_SEARCH, UNSURE, max_iterations=1), StopReason.SUCCESS)


def test_a_hedged_answer_counts_at_the_deadline(table: Table) -> None:
    assert ends(after(table, WITH_SEARCH, evolve(UNSURE, now=LATE)), StopReason.SUCCESS)
    assert goes_on(after(table, WITH_SEARCH, evolve(UNSURE, now=LATE - 0.001)), RESEARCH)


def test_a_run_is_out_of_time_at_the_deadline_and_not_before(table: Table) -> None:
    for now, reason in ((LATE - 0.001, None), (LATE, StopReason.MAX_WALLCLOCK)):
        assert after(table, WORK, CALLS, evolve(OK, now=now)).reason is reason


def test_a_timer_that_fires_early_ends_the_run_for_its_deadline(table: Table) -> None:
    assert ends(after(table, WORK, TIME_UP), StopReason.MAX_WALLCLOCK)


def test_the_deadline_precedes_what_went_wrong_at_it(table: Table) -> None:
    for event in (BROKEN, REFUSED, BUSY, EMPTY):
        assert ends(after(table, WORK, evolve(event, now=LATE)), StopReason.MAX_WALLCLOCK)


def test_a_fatal_model_error_ends_the_run_without_another_try(table: Table) -> None:
    for events in ASKING.values():
        assert ends(after(table, *events, BROKEN), StopReason.MODEL_ERROR)


def test_a_fatal_model_error_is_named_even_when_the_budget_went_with_it(table: Table) -> None:
    assert ends(after(table, evolve(WORK, size=_room(table)), BROKEN), StopReason.MODEL_ERROR)


def test_a_refusal_ends_the_run_even_when_the_budget_went_with_it(table: Table) -> None:
    assert ends(after(table, WORK, REFUSED), StopReason.REFUSED)
    assert ends(_spending(table, REFUSED, "tokens_needed", 1), StopReason.REFUSED)


# What it may still spend


def _spending(table: Table, event: ModelReplied, what: str, beyond: int, **settings: Any) -> Run:
    """Return the run in which *event* leaves the need of `what` so many tokens beyond the budget."""
    free = evolve(event, prompt_tokens=0, completion_tokens=0)
    needed = getattr(after(table, WITH_SEARCH, free, **settings).ledger, what)
    return after(table, WITH_SEARCH, evolve(free, prompt_tokens=MOST - needed + beyond), **settings)


def _room(table: Table, **settings: Any) -> int:
    """Return the size of a list of tools so long that the first request just fits."""
    return MOST - after(table, evolve(WORK, size=0), **settings).ledger.tokens_needed


def test_work_goes_on_as_long_as_its_worst_case_just_fits_the_tokens(table: Table) -> None:
    assert goes_on(_spending(table, EMPTY, "tokens_needed", 0), REPAIR)
    assert closes(_spending(table, EMPTY, "tokens_needed", 1), StopReason.BUDGET)
    assert goes_on(_spending(table, EMPTY, "tokens_needed", 0, **BARE), REPAIR)
    assert ends(_spending(table, EMPTY, "tokens_needed", 1, **BARE), StopReason.BUDGET)


def test_the_closing_summary_is_written_as_long_as_it_just_fits_the_tokens(table: Table) -> None:
    assert closes(_spending(table, EMPTY, "closing_tokens_needed", 0), StopReason.BUDGET)
    assert ends(_spending(table, EMPTY, "closing_tokens_needed", 1), StopReason.BUDGET)


def test_research_is_done_as_long_as_its_worst_case_just_fits_the_tokens(table: Table) -> None:
    assert goes_on(_spending(table, UNSURE, "tokens_needed", 0), RESEARCH)
    assert ends(_spending(table, UNSURE, "tokens_needed", 1), StopReason.SUCCESS)


FREE = {"prompt_usd_per_token": 0.0, "reply_usd_per_token": 0.0, "max_cost_usd": 1.0}
"""What a request costs is known only when it is billed, so a run can come to just the limit."""
PRICED = {"prompt_usd_per_token": 0.25, "reply_usd_per_token": 0.25}
"""Sums of quarters are exact."""


def billed(event: ModelReplied, cost: float = 1.0) -> ModelReplied:
    return evolve(event, cost_usd=cost)


def test_work_goes_on_as_long_as_its_worst_case_just_fits_the_money(table: Table) -> None:
    for settings, over in (({}, DONE), (BARE, DONE)):
        assert goes_on(after(table, WORK, billed(EMPTY), **FREE, **settings), REPAIR)
        run = after(table, WORK, billed(EMPTY, 1.001), **FREE, **settings)
        assert outcome(run) == (over, StopReason.BUDGET)


def test_the_closing_summary_is_written_as_long_as_it_just_fits_the_money(table: Table) -> None:
    ledger = after(table, WORK, billed(EMPTY, 0.0), **PRICED, max_cost_usd=1e9).ledger
    assert ledger.closing_cost_needed_usd < ledger.cost_needed_usd
    spent = 1e9 - ledger.closing_cost_needed_usd

    assert closes(after(table, WORK, billed(EMPTY, spent), **PRICED, max_cost_usd=1e9), StopReason.BUDGET)
    assert ends(after(table, WORK, billed(EMPTY, spent + 0.25), **PRICED, max_cost_usd=1e9), StopReason.BUDGET)


def test_research_is_done_as_long_as_its_worst_case_just_fits_the_money(table: Table) -> None:
    assert goes_on(after(table, WITH_SEARCH, billed(UNSURE), **FREE), RESEARCH)
    assert ends(after(table, WITH_SEARCH, billed(UNSURE, 1.001), **FREE), StopReason.SUCCESS)


def test_failures_lead_to_research_as_long_as_it_just_fits_the_budget(table: Table) -> None:
    assert goes_on(_spending(table, EMPTY, "tokens_needed", 0, max_failures_before_research=1), RESEARCH)
    assert goes_on(after(table, WITH_SEARCH, billed(EMPTY), **FREE, max_failures_before_research=1), RESEARCH)


def test_at_other_caps_the_closing_summary_is_written_if_it_just_fits_the_money(table: Table) -> None:
    for reason, (events, settings) in CAPS.items():
        assert closes(after(table, WORK, *_billed(events), **settings, **FREE), reason)


def _billed(events: Iterable[Event]) -> list[Event]:
    """Return *events* of which the first reply costs all the money there is, and the others nothing."""
    bills = iter((1.0,))
    return [billed(each, next(bills, 0.0)) if isinstance(each, ModelReplied) else each for each in events]


def test_a_budget_that_is_gone_ends_the_run_before_a_failed_request_is_sent_again(table: Table) -> None:
    for settings, end in (({}, closes), (BARE, ends)):
        full = evolve(WORK, size=_room(table, **settings))

        assert end(after(table, full, BUSY, **settings), StopReason.BUDGET)


def test_a_budget_that_is_gone_precedes_the_failures_that_went_with_it(table: Table) -> None:
    gone = evolve(EMPTY, prompt_tokens=MOST)

    assert ends(after(table, WORK, gone, max_consecutive_failures=1), StopReason.BUDGET)


def test_a_failed_request_is_sent_again_by_the_state_that_asked(table: Table) -> None:
    for state, events in ASKING.items():
        run = after(table, *events, BUSY)

        assert next_effect(run) == AskModel(state, attempt=1, not_before=1.5)


def test_a_request_is_sent_again_so_many_times_and_no_more(table: Table) -> None:
    for state, events in ASKING.items():
        for retries in (0, 1, 2):
            tries = [*events, *[BUSY] * retries]

            assert goes_on(after(table, *tries, max_model_retries=retries), state)
            assert ends(after(table, *tries, BUSY, max_model_retries=retries), StopReason.MODEL_ERROR)


def test_a_retry_that_could_only_come_at_the_deadline_is_not_waited_for(table: Table) -> None:
    at_once, in_time = evolve(BUSY, retry_after=LATE - 1.0), evolve(BUSY, retry_after=LATE - 1.001)
    for state, events in ASKING.items():
        assert ends(after(table, *events, at_once), StopReason.MODEL_ERROR)
        assert goes_on(after(table, *events, in_time), state)


def test_a_retry_spends_no_iteration_and_no_hop(table: Table) -> None:
    for events in ASKING.values():
        before, again = after(table, *events).ledger, after(table, *events, BUSY).ledger

        assert (again.iterations, again.turns, again.hops) == (before.iterations, before.turns, before.hops)


def test_only_a_failed_request_can_exhaust_the_retries(table: Table) -> None:
    for event in (EMPTY, CUT_OFF):
        assert goes_on(after(table, WORK, event, max_model_retries=0), REPAIR)


CAPS: dict[StopReason, tuple[list[Event], dict[str, Any]]] = {
    StopReason.MAX_FAILURES: ([EMPTY, CALLS, FAILED], {"max_consecutive_failures": 2}),
    StopReason.STAGNATION: (STUCK, {}),
    StopReason.MAX_ITERATIONS: ([CALLS, OK, CALLS, OK], {"max_iterations": 2}),
}
"""Ways that just come to a cap."""


def test_at_a_cap_the_best_answer_so_far_is_asked_for(table: Table) -> None:
    for reason, (events, settings) in CAPS.items():
        run = after(table, WORK, *events, **settings)
        assert closes(run, reason)
        assert ends(step(run, SO_FAR), reason)


def test_without_a_closing_summary_a_cap_ends_the_run(table: Table) -> None:
    for reason, (events, settings) in CAPS.items():
        assert ends(after(table, WORK, *events, **settings, **BARE), reason)


def test_one_turn_before_the_cap_on_failures_the_run_goes_on(table: Table) -> None:
    for settings in ({}, BARE):
        assert goes_on(after(table, WORK, EMPTY, max_consecutive_failures=2, **settings), REPAIR)


def test_one_turn_before_the_cap_on_iterations_the_run_goes_on(table: Table) -> None:
    for settings in ({}, BARE):
        assert goes_on(after(table, WORK, CALLS, OK, max_iterations=2, **settings), PLAN)


def test_a_run_that_repeats_itself_is_nudged_before_it_is_stopped(table: Table) -> None:
    for settings in ({}, BARE):
        run = after(table, WORK, CALLS, STALE, **settings)

        assert (outcome(run), run.ledger.nudges) == ((REPAIR, None), 1)


def test_repetition_after_the_nudge_ends_the_run_at_just_the_window(table: Table) -> None:
    anew = evolve(STALE, fresh=True)  # so that what was stale before the nudge is not counted
    for settings, end in (({}, closes), (BARE, ends)):
        assert end(after(table, WORK, CALLS, STALE, CALLS, anew, **settings), StopReason.STAGNATION)
        assert goes_on(after(table, WORK, CALLS, STALE, CALLS, evolve(anew, stale=2), **settings), PLAN)


def test_polling_that_brings_news_is_never_taken_for_repetition(table: Table) -> None:
    for busy in (ran(fresh=False, stale=2, repeats=3), ran(fresh=False, stale=3, repeats=2)):
        for settings in ({}, BARE):
            assert goes_on(after(table, WORK, CALLS, busy, **settings), PLAN)

            stuck = after(table, WORK, CALLS, STALE, CALLS, evolve(busy, fresh=True), **settings)

            assert goes_on(stuck, PLAN)


def test_a_reply_without_calls_does_not_count_as_repetition(table: Table) -> None:
    for settings in ({}, BARE):
        assert goes_on(after(table, WORK, CALLS, STALE, EMPTY, **settings), REPAIR)


def test_of_several_caps_failures_precede_stagnation_and_stagnation_iterations(table: Table) -> None:
    failing: list[Event] = [CALLS, evolve(STALE, failed=True)] * 2
    for settings, end in (({}, closes), (BARE, ends)):
        both = {"max_iterations": 2, **NO_RESEARCH, **settings}

        assert end(after(table, WORK, *failing, max_consecutive_failures=2, **both), StopReason.MAX_FAILURES)
        assert end(after(table, WORK, *failing, **both), StopReason.STAGNATION)
        last = {"max_iterations": 1, "max_consecutive_failures": 1, **settings}
        assert end(after(table, WORK, EMPTY, **last), StopReason.MAX_FAILURES)


# What to do next


def test_a_hedged_answer_leads_to_research_and_counts_as_a_turn_and_a_hop(table: Table) -> None:
    run = after(table, WITH_SEARCH, UNSURE)

    assert goes_on(run, RESEARCH)
    assert (run.ledger.iterations, run.ledger.turns, run.ledger.hops) == (2, 2, 1)


def test_failures_lead_to_research_and_count_as_a_turn_and_a_hop(table: Table) -> None:
    run = after(table, WITH_SEARCH, CALLS, FAILED, EMPTY)

    assert goes_on(run, RESEARCH)
    assert (run.ledger.iterations, run.ledger.turns, run.ledger.hops) == (3, 3, 1)


def test_failures_do_not_lead_to_research_too_soon(table: Table) -> None:
    assert goes_on(after(table, WITH_SEARCH, CALLS, FAILED), REPAIR)


def test_failures_do_not_lead_to_research_when_the_last_hop_is_spent(table: Table) -> None:
    for hops in (0, 1):
        failing = [EMPTY] * (1 + hops)

        assert goes_on(after(table, WITH_SEARCH, *failing, EMPTY, max_research_hops=hops), REPAIR)


def test_failures_do_not_lead_to_research_where_it_is_switched_off_or_has_no_tools(table: Table) -> None:
    assert goes_on(after(table, WITH_SEARCH, EMPTY, EMPTY, research_after_failures=False), REPAIR)
    assert goes_on(after(table, WORK, EMPTY, EMPTY), REPAIR)


def test_failures_lead_to_research_before_repetition_is_pointed_out(table: Table) -> None:
    failing: list[Event] = [CALLS, FAILED, CALLS, evolve(STALE, failed=True)]

    assert goes_on(after(table, WITH_SEARCH, *failing), RESEARCH)


def test_repetition_is_pointed_out_even_where_failures_are_to_be_mended(table: Table) -> None:
    run = after(table, WORK, CALLS, evolve(STALE, failed=True))

    assert (outcome(run), run.ledger.nudges) == ((REPAIR, None), 1)


def test_repetition_is_pointed_out_before_a_summary_is_due_and_without_repair(table: Table) -> None:
    run = after(table, WORK, CALLS, STALE, summarize_every=1, enable_repair=False)

    assert (outcome(run), run.ledger.nudges) == ((REPAIR, None), 1)


def test_a_nudge_counts_as_a_turn(table: Table) -> None:
    run = after(table, WORK, CALLS, STALE)

    assert (run.ledger.iterations, run.ledger.turns) == (2, 2)


def test_a_failed_turn_is_mended_and_the_repair_counts_as_a_turn(table: Table) -> None:
    failures: list[list[Event]] = [[CALLS, FAILED], [EMPTY], [CUT_OFF]]
    for failure in failures:
        run = after(table, WORK, *failure)

        assert (outcome(run), run.ledger.nudges) == ((REPAIR, None), 0)
        assert (run.ledger.iterations, run.ledger.turns) == (2, 2)


def test_a_turn_that_went_well_is_not_mended(table: Table) -> None:
    run = after(table, WORK, CALLS, OK)

    assert goes_on(run, PLAN)
    assert (run.ledger.iterations, run.ledger.turns) == (2, 2)


def test_without_repair_a_failed_turn_is_not_mended(table: Table) -> None:
    assert goes_on(after(table, WORK, CALLS, FAILED, enable_repair=False), PLAN)


def test_a_failed_turn_is_mended_before_a_summary_is_written(table: Table) -> None:
    assert goes_on(after(table, WORK, CALLS, FAILED, summarize_every=1), REPAIR)


def test_a_summary_is_written_after_so_many_turns_and_not_sooner(table: Table) -> None:
    assert goes_on(after(table, WORK, CALLS, OK, summarize_every=2), PLAN)
    assert goes_on(after(table, WORK, CALLS, OK, CALLS, OK, summarize_every=2), SUMMARIZE)
    assert goes_on(after(table, WORK, CALLS, OK), PLAN)


def test_a_summary_is_counted_and_the_count_of_turns_begins_anew(table: Table) -> None:
    run = after(table, WORK, CALLS, OK, summarize_every=1)

    assert (run.ledger.summaries, run.ledger.turns, run.ledger.iterations) == (1, 0, 1)


def test_a_plain_run_ends_in_its_answer(table: Table) -> None:
    assert ends(after(table, WORK, CALLS, OK, ANSWER), StopReason.SUCCESS)
