"""The one table of rows that says where a run may go. Nothing else does.

Read a row aloud: *in Observe, when stagnated, go to Repair and count a nudge.* Rows of the same state and event are
tried in order and the first whose guard holds is taken, so every such block ends in a row that is always taken.

The rows of Observe stand in order of priority: what has happened to the run (cancelled, already ending, answered, out
of time, broken), then what it may still spend, then what to do next.
"""

from collections.abc import Callable, Sequence
from difflib import get_close_matches

from attrs import evolve, field, frozen

from agent_fsm.errors import TableError
from agent_fsm.guards import ALWAYS, Guard, Number, counter, ledger, limits, opaque
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

__all__ = [
    "ALWAYS",
    "DECIDED",
    "TABLE",
    "Row",
    "Table",
    "Update",
    "add",
    "counter",
    "ledger",
    "limits",
    "observe",
    "opaque",
    "put",
    "reset",
]


@frozen
class Update:
    """A change that a row makes to one field of the ledger."""

    verb: str
    """`add` or `put`."""
    counter: str
    value: object
    own: bool = False
    """Whether the counter is one of the table's own, not a field of the ledger."""


def add(counter: str | Number, amount: int = 1) -> Update:
    """Return the update that adds *amount*, a whole number other than 0, to a field of the ledger or an own counter."""
    return _update("add", counter, amount)


def put(counter: str | Number, value: object) -> Update:
    """Return the update that sets a field of the ledger or an own counter to *value*, a whole number >= 0.

    The one field that is no counter is `ending`: a StopReason, or None.
    """
    return _update("put", counter, value)


def reset(counter: str | Number) -> Update:
    """Return the update that sets a field of the ledger or an own counter to zero."""
    return _update("put", counter, 0)


def _update(verb: str, counter: str | Number, value: object) -> Update:
    if not isinstance(counter, Number):
        return Update(verb, counter, value)
    if counter.owner not in ("ledger", "counters"):
        raise TableError(f"a row can't {verb} {counter.title}: only counters of the ledger and your own can be written")
    return Update(verb, counter.attribute, value, own=counter.owner == "counters")


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


class Table(tuple[Row, ...]):
    """Rows, and how to make other tables of them. A table is a value: each method returns a new one.

    A row is found by its label, or is given itself. A label is looked for among the rows of Observe first, where
    policies live, and elsewhere only if none of them has it. Where rows next to one another share a label, as the three
    of "retry" do, they are meant together. Whether a table can be run is judged when a run, a diagram or a check is
    made of it, so that the tables on the way to it need not be whole.
    """

    __slots__ = ()

    def row(self, label: str | Row) -> Row:
        """Return the row with *label*.

        Raises:
            TableError: there is no such row, or more than one.
        """
        first, end = self._found(label)
        if end - first > 1:
            raise TableError(f"{end - first} rows are called {_quoted(label)}: {_numbers(range(first, end))}")
        return self[first]

    def before(self, label: str | Row, *rows: Row) -> "Table":
        """Return a table in which *rows* stand just before the row with *label*, or the first of several.

        Raises:
            TableError: there is no such row; or several, and not next to one another.
        """
        first, _ = self._found(label)
        return self._spliced(first, first, rows)

    def after(self, label: str | Row, *rows: Row) -> "Table":
        """Return a table in which *rows* stand just after the row with *label*, or the last of several.

        Raises:
            TableError: as `before`.
        """
        _, end = self._found(label)
        return self._spliced(end, end, rows)

    def replaced(self, label: str | Row, *rows: Row) -> "Table":
        """Return a table in which *rows* stand in the place of the row, or all the rows, with *label*.

        Raises:
            TableError: as `before`; or no rows are given.
        """
        first, end = self._found(label)
        if not rows:
            raise TableError(f"nothing is given to replace {_quoted(label)} with; without({_quoted(label)}) removes it")
        return self._spliced(first, end, rows)

    def without(self, *labels: str | Row) -> "Table":
        """Return a table that lacks the rows with *labels*.

        Raises:
            TableError: as `before`.
        """
        table = self
        for label in labels:
            table = table._spliced(*table._found(label), ())
        return table

    def guarded(self, label: str | Row, guard: Guard | Callable[[Guard], Guard]) -> "Table":
        """Return a table in which the row with *label* asks *guard*, or what *guard* makes of its old guard.

        Of several rows each gets its own: `TABLE.guarded("retry", lambda old: old & ~dear)`. A row without a name is
        called after its guard, so its label changes; `(old & ~dear).named("failed")` keeps one.

        Raises:
            TableError: as `before`; or *guard* is no guard and makes none.
        """
        first, end = self._found(label)
        return self._spliced(first, end, [evolve(row, guard=_new_guard(guard, row)) for row in self[first:end]])

    def stopping(self, guard: Guard, reason: StopReason, *, name: str = "", closing: bool = True) -> "Table":
        """Return a table whose runs also end for *reason* when *guard* holds.

        It is asked after the rows of Observe that lead to Done come what may (cancelled, answered, out of time, ...)
        and before all else. With *closing* the run ends as at any cap: by way of the closing summary, where one is
        wanted and fits.

        Raises:
            TableError: *guard* is no guard, or *reason* no StopReason.
        """
        _check_guard(guard, name or "stopping")
        if not isinstance(reason, StopReason):
            raise TableError(f"{reason!r} is no reason to stop for; take one of {', '.join(map(str, StopReason))}")
        named = guard.named(name) if name else guard
        rows = _cap(named, reason) if closing else (observe(named, DONE, reason=reason),)
        choosing = [number for number, row in enumerate(self) if OBSERVE in row.sources]
        place = next((number for number in choosing if self[number].target is not DONE), len(self))
        return self._spliced(place, place, rows)

    def _found(self, label: str | Row) -> tuple[int, int]:
        """Where the rows with *label* begin and end."""
        numbers = self._numbers(label)
        if not numbers:
            known = list(dict.fromkeys(row.label for row in self))
            near = get_close_matches(label if isinstance(label, str) else label.label, known, n=5, cutoff=0.4)
            raise TableError(f"no row is called {_quoted(label)}; there are {', '.join(map(repr, near or known))}")
        if numbers[-1] - numbers[0] >= len(numbers):
            near = [f"{number} in {'/'.join(self[number].sources)}" for number in numbers]
            raise TableError(f"{_quoted(label)} may be any of the rows {', '.join(near)}; give the row itself")
        return numbers[0], numbers[-1] + 1

    def _numbers(self, label: str | Row) -> list[int]:
        if isinstance(label, Row):
            same = [number for number, row in enumerate(self) if row is label]
            return same or [number for number, row in enumerate(self) if row == label]
        called = [number for number, row in enumerate(self) if row.label == label]
        return [number for number in called if OBSERVE in self[number].sources] or called

    def _spliced(self, first: int, end: int, rows: Sequence[Row]) -> "Table":
        for row in rows:
            if not isinstance(row, Row):
                raise TableError(f"{row!r} is no row; rows are given one by one, as observe(guard, target) makes them")
        return Table((*self[:first], *rows, *self[end:]))


def _quoted(label: str | Row) -> str:
    return repr(label.label if isinstance(label, Row) else label)


def _numbers(numbers: range) -> str:
    return ", ".join(map(str, numbers))


def _new_guard(guard: Guard | Callable[[Guard], Guard], row: Row) -> Guard:
    return _check_guard(guard if isinstance(guard, Guard) or not callable(guard) else guard(row.guard), row.label)


def _check_guard(guard: object, label: str) -> Guard:
    if not isinstance(guard, Guard):
        raise TableError(f"{guard!r} is no guard for {label!r}; compare with >=, >, <= or <, or ask is_(...)")
    return guard


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


def observe(
    guard: Guard, target: State, *updates: Update, reason: StopReason | str | None = None, name: str = ""
) -> Row:
    """Return a row of Observe: when *guard* holds, make *updates* and go to *target*, or end for *reason*."""
    return Row((OBSERVE,), (), guard, target, updates, reason, name=name)


def _cap(guard: Guard, reason: StopReason) -> tuple[Row, Row]:
    """A cap ends a run by way of the closing summary, if one is wanted and fits."""
    return (
        observe(guard & closing_fits, SUMMARIZE, put("ending", reason), name=f"{guard.name}, closing"),
        observe(guard, DONE, reason=reason),
    )


def _retry(state: State) -> Row:
    return observe(may_retry & ledger.asking.is_(state), state, name="retry")


TABLE = Table(
    (
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
        observe(cancelled, DONE, reason=StopReason.CANCELLED),
        observe(~ledger.ending.is_(None), DONE, reason=DECIDED, name="closing done"),
        # An answer counts even when it comes late or at a cap
        observe(answered, DONE, reason=StopReason.SUCCESS),
        observe(unsure & ~hedged, DONE, reason=StopReason.SUCCESS, name="unsure, no research"),
        observe(out_of_time, DONE, reason=StopReason.MAX_WALLCLOCK),
        observe(fatal, DONE, reason=StopReason.MODEL_ERROR),
        observe(refused, DONE, reason=StopReason.REFUSED),
        # what it may still spend
        *_cap(over_budget, StopReason.BUDGET),
        _retry(PLAN),
        _retry(REPAIR),
        _retry(RESEARCH),
        observe(retryable, DONE, reason=StopReason.MODEL_ERROR, name="retries exhausted"),
        *_cap(at_max_failures, StopReason.MAX_FAILURES),
        *_cap(stagnated, StopReason.STAGNATION),
        *_cap(at_max_iterations, StopReason.MAX_ITERATIONS),
        # and what to do next
        observe(hedged, RESEARCH, *_HOP),
        observe(to_escalate, RESEARCH, *_HOP),
        # The nudge comes once and whatever enable_repair says: it is what stagnation is answered with
        observe(to_nudge, REPAIR, *_ASK, add("nudges")),
        observe(to_repair, REPAIR, *_ASK),
        observe(summary_due, SUMMARIZE, reset("turns"), add("summaries")),
        observe(ALWAYS, PLAN, *_ASK),
    )
)
