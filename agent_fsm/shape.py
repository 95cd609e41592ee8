"""The shape of a table: what is refused before anything runs, and the row that is to blame.

A table may hold any rows, but some can't do what they say: a row that an earlier one always takes the place of, a state
that a run can't leave, a hard stop that something stands before. `decide` says what is known of a guard where some
other guards are known to be true or false; it answers None unless it is certain, so nothing is refused on suspicion.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

from attrs import Factory, define, fields, frozen

from agent_fsm.config import Limits
from agent_fsm.errors import TableError
from agent_fsm.guards import ALWAYS, Always, Both, Compare, Either, Guard, Is, Named, Not, Number, Opaque, counter
from agent_fsm.guards import ledger as the_ledger
from agent_fsm.guards import limits as the_limits
from agent_fsm.ledger import Ledger
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
    State,
    StopReason,
    ToolsFinished,
    ToolsListed,
    ToolsUnavailable,
)
from agent_fsm.table import DECIDED, Row, Update

__all__ = ["ANSWERS", "OBSERVED", "Fact", "check_table", "decide", "facts_of", "trigger_of"]

OBSERVED = "Observed"
"""The trigger of the rows of Observe, where no event is waited for."""

_ASKED: tuple[type[Event], ...] = (ModelReplied, ModelFailed, Interrupted)
ANSWERS: dict[State, tuple[type[Event], ...]] = {
    PLAN: (ToolsListed, ToolsUnavailable, *_ASKED),
    CALL_TOOLS: (ToolsFinished, Interrupted),
    REPAIR: _ASKED,
    RESEARCH: _ASKED,
    SUMMARIZE: _ASKED,
}
"""What the world may answer to the effect that a state asks for."""


def trigger_of(event: type[Event] | None) -> str:
    """Return the name under which the machine knows an event; None stands for the choice made in Observe."""
    return OBSERVED if event is None else event.__name__


# What is known of a guard

Fact: TypeAlias = tuple[Guard, bool]
"""A guard, and whether it is true."""

_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_NEGATED = {"<": ">=", "<=": ">", ">": "<=", ">=": "<"}
_WHOLE = {
    "ledger": {each.name for each in fields(Ledger) if each.type is int},
    "limits": {each.name for each in fields(Limits) if each.type in (int, int | None)},
}


def facts_of(guard: Guard, holds: bool = True) -> tuple[Fact, ...]:
    """Return what is known where *guard* is true, or is not: of its leaves, as far as that follows, and of itself."""
    match guard:
        case Named(inner):
            return facts_of(inner, holds)
        case Not(inner):
            return facts_of(inner, not holds)
        case Both(first, second) if holds:
            return (*facts_of(first), *facts_of(second))
        case Either(first, second) if not holds:
            return (*facts_of(first, False), *facts_of(second, False))
    return ((guard, holds),)


def decide(guard: Guard, facts: Iterable[Fact]) -> bool | None:
    """Return whether *guard* is true of every ledger of which *facts* are, or of none; None if neither is certain.

    Numbers are taken to be numbers, not NaN. What one field has to do with another is not known here.
    """
    return _Known(facts).decide(guard)


@define
class _Range:
    """Where a number, or the difference of two, must lie."""

    low: float = -math.inf
    above: bool = False
    """Whether it must be more than `low`."""
    high: float = math.inf
    below: bool = False

    def narrow(self, sign: str, number: float) -> None:
        if sign in (">", ">="):
            self.low, self.above = max((self.low, self.above), (number, sign == ">"))
        else:
            self.high, reached = min((self.high, not self.below), (number, sign != "<"))
            self.below = not reached

    def implies(self, sign: str, number: float) -> bool:
        match sign:
            case ">=":
                return self.low >= number
            case ">":
                return self.low > number or (self.low == number and self.above)
            case "<=":
                return self.high <= number
        return self.high < number or (self.high == number and self.below)


_Key: TypeAlias = tuple[Number, Number | None]


class _Known:
    """Facts, put in the order in which they are asked for."""

    def __init__(self, facts: Iterable[Fact]) -> None:
        self.guards: list[Fact] = []
        self.values: dict[Number, object] = {}
        self.present: set[Number] = set()
        self.ranges: dict[_Key, _Range] = {}
        for guard, holds in [each for fact in facts for each in facts_of(*fact)]:
            self.guards.append((guard, holds))
            match guard:
                case Is(left, value) if holds:
                    self.values[left] = value
                    if value is not None:
                        self.present.add(left)
                case Is(left, None):
                    self.present.add(left)
                case Compare() if holds:
                    self.present.update(_numbers(guard))
        for guard, holds in self.guards:
            if isinstance(guard, Compare) and self._ordered(guard):
                key, sign, number = _normal(guard, holds)
                self.ranges.setdefault(key, _Range()).narrow(sign, number)

    def _ordered(self, guard: Compare) -> bool:
        """Whether a comparison that does not hold means that its opposite does: nothing is absent, nothing NaN."""
        return guard.right == guard.right and all(map(self._present, _numbers(guard)))

    def _present(self, number: Number) -> bool:
        return not number.absent or number in self.present

    def decide(self, guard: Guard) -> bool | None:
        match guard:
            case Always():
                return True
            case Named(inner):
                return self.decide(inner)
            case Not(inner):
                answer = self.decide(inner)
                return None if answer is None else not answer
        for known, holds in self.guards:
            if _same(known, guard):
                # Other facts may still say the opposite, where the facts can't all be true
                return holds if not isinstance(guard, Is | Compare) else self._leaf(guard, holds)
        match guard:
            case Both(first, second):
                return _both(self.decide(first), self.decide(second))
            case Either(first, second):
                neither = _both(_opposite(self.decide(first)), _opposite(self.decide(second)))
                return _opposite(neither)
            case Is() | Compare():
                return self._leaf(guard, None)
        return None

    def _leaf(self, guard: Is | Compare, known: bool | None) -> bool | None:
        if isinstance(guard, Is):
            if guard.left in self.values:
                return self.values[guard.left] is guard.value
            return False if guard.value is None and guard.left in self.present else known
        if guard.right != guard.right or any(self.values.get(each, each) is None for each in _numbers(guard)):
            return False
        key, sign, number = _normal(guard)
        within = self.ranges.get(key)
        if within is None:
            return known
        _, opposite, edge = _normal(guard, False)
        if within.implies(opposite, edge):
            return False
        return True if within.implies(sign, number) else known


def _opposite(answer: bool | None) -> bool | None:
    return None if answer is None else not answer


def _both(first: bool | None, second: bool | None) -> bool | None:
    if first is False or second is False:
        return False
    return True if first and second else None


def _numbers(guard: Compare) -> Iterator[Number]:
    return (each for each in (guard.left, guard.right) if isinstance(each, Number))


def _normal(guard: Compare, holds: bool = True) -> tuple[_Key, str, float]:
    """Return what is compared, the sign that holds, and with what number: 0 where it is the difference of two."""
    sign = guard.sign if holds else _NEGATED[guard.sign]
    left, right, edge = guard.left, None, 0.0
    if isinstance(guard.right, Number):
        right = guard.right
        if str(right) < str(left):
            left, right, sign = right, left, _FLIPPED[sign]
    else:
        edge = guard.right
    if math.isfinite(edge) and _whole(left) and (right is None or _whole(right)):
        # More than 2 is at least 3
        sign, edge = (">=", math.floor(edge) + 1) if sign == ">" else (sign, edge)
        sign, edge = ("<=", math.ceil(edge) - 1) if sign == "<" else (sign, edge)
    return (left, right), sign, edge


def _whole(number: Number) -> bool:
    return number.owner in ("counters", "calls") or number.attribute in _WHOLE[number.owner]


def _same(one: Guard, other: Guard) -> bool:
    """Whether two guards ask the same; == would not do, as it takes Is(x, 1) for Is(x, True)."""
    match one, other:
        case Named(inner), _:
            return _same(inner, other)
        case _, Named(inner):
            return _same(one, inner)
        case Is(left, value), Is(other_left, other_value):
            return left == other_left and value is other_value
        case Compare(left, sign, right), Compare(other_left, other_sign, other_right):
            return (left, sign, right) == (other_left, other_sign, other_right)
        case Opaque(question), Opaque(other_question):
            return question is other_question
        case (Both(), Both()) | (Either(), Either()) | (Not(), Not()):
            return all(map(_same, one.parts(), other.parts()))
    return one is other


# What is refused


@frozen
class _Blocks:
    """A table, and its rows as they are tried."""

    table: Sequence[Row]
    rows: dict[tuple[State, type[Event] | None], list[int]] = Factory(dict)
    """The numbers of the rows, by state and event; None for Observe."""

    def where(self, number: int) -> str:
        return f"row {number} ({self.table[number].label})"

    @property
    def observe(self) -> list[int]:
        return self.rows.get((OBSERVE, None), [])

    def entries(self) -> dict[State, str]:
        """The states that rows lead to from Plan, and how a run gets there."""
        found = {PLAN: "a run begins in Plan"}
        waiting = [PLAN]
        while waiting:
            source = waiting.pop(0)
            for number, row in enumerate(self.table):
                if source in row.sources and row.target not in found:
                    found[row.target] = f"{self.where(number)} leads to {row.target}"
                    waiting.append(row.target)
        return found


def check_table(table: Sequence[Row]) -> None:
    """Refuse *table* if it can't be run, or has a row that can't mean what it says.

    Raises:
        TableError: the message names the row, and says what would be right.
    """
    blocks = _Blocks(table)
    for number, row in enumerate(table):
        _check_row(number, row)
        for source in row.sources:
            for event in row.events or (None,):
                blocks.rows.setdefault((source, event), []).append(number)
    _check_lasts(blocks)
    _check_ways(blocks)
    _check_answers(blocks)
    _check_shadows(blocks)
    _check_stops(blocks)


def _check_row(number: int, row: Row) -> None:
    if not isinstance(row, Row):
        raise TableError(f"row {number} is {row!r}, which is no Row; observe(guard, target) makes one")
    if not isinstance(row.guard, Guard):
        raise TableError(f"row {number}: {row.guard!r} is no guard; compare with >=, >, <= or <, or ask is_(...)")
    where = f"row {number} ({row.label})"
    if (row.reason is None) is (row.target is DONE):
        raise TableError(f"{where}: a row has a reason exactly if its target is Done")
    if DONE in row.sources or (row.target is OBSERVE and OBSERVE in row.sources):
        raise TableError(f"{where}: nothing leaves Done, and Observe does not lead to itself")
    if (OBSERVE in row.sources) is bool(row.events) or not row.sources:
        raise TableError(f"{where}: a row names its sources, and an event exactly if they are not Observe")
    if row.target is DONE and not isinstance(row.reason, StopReason) and row.reason != DECIDED:
        raise TableError(f"{where}: {row.reason!r} is no reason; take a StopReason or DECIDED")
    if row.reason == DECIDED and decide(the_ledger.ending.is_(None), facts_of(row.guard)) is not False:
        raise TableError(f"{where}: ends for the reason decided, so it must ask ~ledger.ending.is_(None)")
    if row.events and row.target not in (OBSERVE, CALL_TOOLS, DONE):
        raise TableError(f"{where}: a waiting state leads to Observe, CallTools or Done, not straight to a request")
    if row.target is CALL_TOOLS and row.events != (ModelReplied,):
        raise TableError(f"{where}: only a ModelReplied leads to CallTools, as it brings the calls")
    _check_updates(where, row.updates)


_COUNTERS = ("iterations", "attempts", "failures", "hops", "nudges", "stale", "repeats", "turns", "summaries")
"""The counters of the ledger that rows may write. All else in it is measured, but for `ending`."""
_FIELDS = frozenset(each.name for each in fields(Ledger))


def _check_updates(where: str, updates: Sequence[Update]) -> None:
    for update in updates:
        doing = f"{where}: can't {update.verb} {update.counter!r}"
        if update.verb not in ("add", "put"):
            raise TableError(f"{doing}; the verbs are add and put")
        if update.own:
            try:
                counter(update.counter)
            except TableError as error:
                raise TableError(f"{doing}: {error}") from None
        elif update.counter not in (*_COUNTERS, "ending"):
            why = "it is measured, not counted by rows" if update.counter in _FIELDS else "the ledger has no such field"
            raise TableError(
                f"{doing}: {why}; a row may write {', '.join(_COUNTERS)}, ending, and counters of its own:"
                ' counter("searches")'
            )
        _check_value(doing, update)


def _check_value(doing: str, update: Update) -> None:
    value = update.value
    if update.counter == "ending" and not update.own:
        if update.verb == "add" or not (value is None or isinstance(value, StopReason)):
            raise TableError(f"{doing} {value!r}; a row may put a StopReason or None")
    elif not isinstance(value, int) or isinstance(value, bool):
        raise TableError(f"{doing} {value!r}; it counts in whole numbers")
    elif update.verb == "add" and value == 0:
        raise TableError(f"{doing} 0, which changes nothing")
    elif update.verb == "put" and value < 0:
        raise TableError(f"{doing} {value}; a counter is put to 0 or more")


def _check_lasts(blocks: _Blocks) -> None:
    for (source, event), numbers in blocks.rows.items():
        always = [number for number in numbers if blocks.table[number].guard is ALWAYS]
        if always != numbers[-1:]:
            wrong = next((number for number in always if number != numbers[-1]), numbers[-1])
            raise TableError(
                f"{blocks.where(wrong)}: the rows for {trigger_of(event)} in {source} must end in one row that is"
                f" always taken; always taken: {always}"
            )


def _check_ways(blocks: _Blocks) -> None:
    """Refuse a state that a run can't leave, and a table that no run can reach Done in."""
    entries = blocks.entries()
    if DONE not in entries:
        last = blocks.where(blocks.observe[-1] if blocks.observe else len(blocks.table) - 1) if blocks.table else "none"
        raise TableError(f"Done can't be reached: no row that a run can take leads there; the last is {last}")
    # ToolsUnavailable answers a run's first effect only, so it is no way out later
    ways = [row for row in blocks.table if row.events != (ToolsUnavailable,)]
    ending = {DONE}
    while more := {source for row in ways if row.target in ending for source in row.sources} - ending:
        ending |= more
    left = {source for row in ways for source in row.sources}
    # Those that nothing leaves first
    stuck = sorted([state for state in entries if state not in ending], key=lambda state: state in left)
    if stuck:
        why = "no rows lead on to Done" if stuck[0] in left else "no row leaves it"
        raise TableError(f"{entries[stuck[0]]}, which can be entered and never left: {why}")


def _check_answers(blocks: _Blocks) -> None:
    for state, entry in blocks.entries().items():
        for event in ANSWERS.get(state, ()):
            if (state, event) not in blocks.rows:
                raise TableError(
                    f"{entry}, where {event.__name__} may happen, and no row is for that; the plainest is"
                    f" Row(({state.name},), ({event.__name__},), ALWAYS, OBSERVE)"
                )


def _check_shadows(blocks: _Blocks) -> None:
    """Refuse a row that can't be taken in any of its blocks, as an earlier one holds whenever it does."""
    shadows: dict[int, list[int | None]] = {}
    known = [_Known(facts_of(row.guard)) for row in blocks.table]
    decided: dict[tuple[int, int], bool | None] = {}
    for numbers in blocks.rows.values():
        for place, number in enumerate(numbers):
            before = (each for each in numbers[:place] if _holds(blocks, known, decided, each, number))
            shadows.setdefault(number, []).append(next(before, None))
    for number, shadowing in sorted(shadows.items()):
        first = shadowing[0]
        # From a guard that never holds anything follows, but nothing stands in its row's way
        never = known[number].decide(blocks.table[number].guard) is False
        if first is not None and None not in shadowing and not never:
            raise TableError(
                f"{blocks.where(number)} can't be taken: whenever it holds, {blocks.where(first)} does, too, and"
                " stands before it; change the order, or remove one of them"
            )


def _holds(
    blocks: _Blocks, known: Sequence[_Known], decided: dict[tuple[int, int], bool | None], earlier: int, later: int
) -> bool:
    """Whether the *earlier* row's guard holds whenever that of the *later* one does."""
    if (earlier, later) not in decided:
        decided[earlier, later] = known[later].decide(blocks.table[earlier].guard)
    return decided[earlier, later] is True


# The hard stops


@frozen
class _Stop:
    """A stop that nothing may stand before."""

    name: str
    """Whom it stops, after "a run that"."""
    facts: tuple[Fact, ...]
    row: str
    """The row that would be right."""
    good: Callable[[Row], bool]
    """Whether a row that holds is as good as the stop."""
    first: bool = False
    """Whether it must be the first row that may hold at all."""


def _ends_for(reason: StopReason | str) -> Callable[[Row], bool]:
    return lambda row: row.target is DONE and row.reason == reason


def _ends(row: Row) -> bool:
    return row.target is DONE


_CANCELLED = the_ledger.ended.is_(Ended.CANCELLED)
_UNDECIDED = the_ledger.ending.is_(None)
_OUT_OF_TIME_ROW = "observe(out_of_time, DONE, reason=StopReason.MAX_WALLCLOCK)"
_CANCEL = _Stop(
    "was cancelled",
    ((_CANCELLED, True),),
    "observe(cancelled, DONE, reason=StopReason.CANCELLED)",
    _ends_for(StopReason.CANCELLED),
    first=True,
)
_CLOSING = _Stop(
    "has its reason to end decided",
    ((_CANCELLED, False), (_UNDECIDED, False)),
    "observe(~ledger.ending.is_(None), DONE, reason=DECIDED)",
    _ends_for(DECIDED),
    first=True,
)
_OTHERS = (
    _Stop(
        "was stopped by its deadline",
        ((the_ledger.ended.is_(Ended.TIMED_OUT), True), (_UNDECIDED, True)),
        _OUT_OF_TIME_ROW,
        _ends,
    ),
    _Stop(
        "is out of time",
        (
            (the_ledger.seconds >= the_limits.max_wallclock_seconds, True),
            (_CANCELLED, False),
            (_UNDECIDED, True),
        ),
        _OUT_OF_TIME_ROW,
        _ends,
    ),
    _Stop(
        "met a fatal model error",
        ((the_ledger.ended.is_(Ended.FATAL), True), (_UNDECIDED, True)),
        "observe(fatal, DONE, reason=StopReason.MODEL_ERROR)",
        _ends,
    ),
)


def _check_stops(blocks: _Blocks) -> None:
    closes = any(
        row.target is SUMMARIZE or any(each.counter == "ending" and not each.own for each in row.updates)
        for row in blocks.table
    )
    for stop in (_CANCEL, *([_CLOSING] if closes else []), *_OTHERS):
        _check_stop(blocks, stop)


def _check_stop(blocks: _Blocks, stop: _Stop) -> None:
    known = _Known(stop.facts)
    answers = [(number, known.decide(blocks.table[number].guard)) for number in blocks.observe]
    for number, answer in answers:
        row = blocks.table[number]
        if answer is False or (answer is None and not stop.first and stop.good(row)):
            continue
        if answer is True and stop.good(row):
            return
        stops = [each for each, holds in answers if holds is True and stop.good(blocks.table[each])]
        if not stops:
            raise TableError(
                f"no row of Observe stops a run that {stop.name} before {blocks.where(number)}; put {stop.row}"
                " at the front"
            )
        raise TableError(
            f"{blocks.where(number)} stands before the row that stops a run that {stop.name},"
            f" {blocks.where(stops[0])}; move it behind that"
        )
