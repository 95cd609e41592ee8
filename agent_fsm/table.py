"""The one table of rows that says where a run may go. Nothing else does.

Read a row aloud: *in Observe, when stagnated, go to Repair and count a nudge.* Rows of the same state and event are
tried in order and the first whose guard holds is taken, so every such block ends in a row that is always taken.

The rows of Observe stand in order of priority: what has happened to the run (cancelled, already ending, answered, out
of time, broken), then what it may still spend, then what to do next.
"""

from typing import TypeAlias

from attrs import field, frozen

from agent_fsm.guards import ALWAYS, Guard, ledger, limits
from agent_fsm.protocol import (
    CALL_TOOLS,
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
    ToolsFinished,
    ToolsListed,
    ToolsUnavailable,
)

__all__ = ["DECIDED", "TABLE", "Row", "Table", "Update", "add", "put", "reset"]


@frozen
class Update:
    """A change that a row makes to one field of the ledger."""

    verb: str
    """`add` or `put`."""
    counter: str
    value: object


def add(counter: str, amount: int = 1) -> Update:
    """Return the update that adds *amount* to *counter*."""
    return Update("add", counter, amount)


def put(counter: str, value: object) -> Update:
    """Return the update that sets *counter* to *value*."""
    return Update("put", counter, value)


def reset(counter: str) -> Update:
    """Return the update that sets *counter* to zero."""
    return Update("put", counter, 0)


DECIDED = "reason decided"
"""As a row's reason: the one that the ledger holds as `ending`."""


@frozen
class Row:
    """One permitted transition."""

    sources: tuple[State, ...]
    events: tuple[type[Event], ...]
    """Empty for the rows of Observe, where no event is waited for."""
    guard: Guard
    target: State
    updates: tuple[Update, ...] = ()
    reason: StopReason | str | None = None
    """Why the run ends; given exactly for rows to Done. DECIDED stands for the ledger's `ending`."""
    name: str = field(default="", kw_only=True)
    """What diagrams call the row, where the guard's name would not do."""

    @property
    def label(self) -> str:
        """What a diagram writes on this row."""
        return self.name or self.guard.name


Table: TypeAlias = tuple[Row, ...]


# The questions

cancelled = ledger.ended.is_(Ended.CANCELLED).named("cancelled")
out_of_time = (ledger.ended.is_(Ended.TIMED_OUT) | (ledger.seconds >= limits.max_wallclock_seconds)).named(
    "out of time"
)
over_budget = ((ledger.tokens_needed > limits.max_tokens_total) | (ledger.cost_needed_usd > limits.max_cost_usd)).named(
    "over budget"
)
closing_fits = (
    limits.closing_summary.is_(True)
    & ~(
        (ledger.closing_tokens_needed > limits.max_tokens_total)
        | (ledger.closing_cost_needed_usd > limits.max_cost_usd)
    )
).named("closing fits")

asked_for_tools = ledger.said.is_(Said.CALLS).named("asked for tools")
answered = ledger.said.is_(Said.ANSWER).named("answered")
unsure = ledger.said.is_(Said.UNSURE)
refused = ledger.said.is_(Said.REFUSED).named("refused")
failed = ledger.ended.is_(Ended.FAILED)
fatal = ledger.ended.is_(Ended.FATAL).named("fatal model error")
retryable = ledger.ended.is_(Ended.RETRYABLE)
may_retry = (
    retryable & (ledger.attempts <= limits.max_model_retries) & (ledger.retry_at < limits.max_wallclock_seconds)
).named("may retry")

at_max_iterations = (ledger.iterations >= limits.max_iterations).named("iterations at max")
at_max_failures = (failed & (ledger.failures >= limits.max_consecutive_failures)).named("failures at max")
# Asked straight after a turn of calls only: a reply without calls says nothing new about repetition
repeating = asked_for_tools & (ledger.stale >= limits.stagnation_window) & (ledger.repeats >= 3)
stagnated = (repeating & (ledger.nudges >= 1)).named("stagnated after a nudge")
to_nudge = repeating.named("stagnated")

may_research = (
    ledger.research_tools.is_(True)
    & (ledger.hops < limits.max_research_hops)
    & ~at_max_iterations
    & ~out_of_time
    & ~over_budget
).named("may research")
hedged = (unsure & limits.research_on_unsure.is_(True) & may_research).named("unsure, may research")
to_escalate = (
    failed
    & limits.research_after_failures.is_(True)
    & (ledger.failures >= limits.max_failures_before_research)
    & may_research
).named("failures escalate")
to_repair = (failed & limits.enable_repair.is_(True)).named("failed")
summary_due = (ledger.turns >= limits.summarize_every).named("summary due")


# The rows

_ASKING = (PLAN, REPAIR, RESEARCH)
_ASK = (add("iterations"), add("turns"))
_HOP = (*_ASK, add("hops"))


def _waiting(sources: tuple[State, ...], *events: type[Event]) -> Row:
    return Row(sources, events, ALWAYS, OBSERVE)


def _observe(
    guard: Guard, target: State, *updates: Update, reason: StopReason | str | None = None, name: str = ""
) -> Row:
    return Row((OBSERVE,), (), guard, target, updates, reason, name=name)


def _cap(guard: Guard, reason: StopReason) -> tuple[Row, Row]:
    """A cap ends a run by way of the closing summary, if one is wanted and fits."""
    return (
        _observe(guard & closing_fits, SUMMARIZE, put("ending", reason), name=f"{guard.name}, closing"),
        _observe(guard, DONE, reason=reason),
    )


def _retry(state: State) -> Row:
    return _observe(may_retry & ledger.asking.is_(state), state, name="retry")


TABLE: Table = (
    # Where an effect is waited for
    _waiting((PLAN,), ToolsListed),
    Row((PLAN,), (ToolsUnavailable,), ALWAYS, DONE, (), StopReason.TOOLS_UNAVAILABLE),
    Row(_ASKING, (ModelReplied,), asked_for_tools, CALL_TOOLS),
    _waiting(_ASKING, ModelReplied),
    _waiting(_ASKING, ModelFailed),
    _waiting(_ASKING, Interrupted),
    _waiting((CALL_TOOLS,), ToolsFinished),
    _waiting((CALL_TOOLS,), Interrupted),
    _waiting((SUMMARIZE,), ModelReplied, ModelFailed, Interrupted),
    # Observe: what has happened
    _observe(cancelled, DONE, reason=StopReason.CANCELLED),
    _observe(~ledger.ending.is_(None), DONE, reason=DECIDED, name="closing done"),
    # An answer counts even when it comes late or at a cap
    _observe(answered, DONE, reason=StopReason.SUCCESS),
    _observe(unsure & ~hedged, DONE, reason=StopReason.SUCCESS, name="unsure, no research"),
    _observe(out_of_time, DONE, reason=StopReason.MAX_WALLCLOCK),
    _observe(fatal, DONE, reason=StopReason.MODEL_ERROR),
    _observe(refused, DONE, reason=StopReason.REFUSED),
    # what it may still spend
    *_cap(over_budget, StopReason.BUDGET),
    _retry(PLAN),
    _retry(REPAIR),
    _retry(RESEARCH),
    _observe(retryable, DONE, reason=StopReason.MODEL_ERROR, name="retries exhausted"),
    *_cap(at_max_failures, StopReason.MAX_FAILURES),
    *_cap(stagnated, StopReason.STAGNATION),
    *_cap(at_max_iterations, StopReason.MAX_ITERATIONS),
    # and what to do next
    _observe(hedged, RESEARCH, *_HOP),
    _observe(to_escalate, RESEARCH, *_HOP),
    # The nudge comes once and whatever enable_repair says: it is what stagnation is answered with
    _observe(to_nudge, REPAIR, *_ASK, add("nudges")),
    _observe(to_repair, REPAIR, *_ASK),
    _observe(summary_due, SUMMARIZE, reset("turns"), add("summaries")),
    _observe(ALWAYS, PLAN, *_ASK),
)
