"""What the guards of a table can tell apart: flags, and for each number the values at which a comparison turns.

A comparison of one number of the ledger with a limit or a constant is read exactly. Everything else is *free*: a
function, two counters compared with each other. The measures of the budget are free, too, because the world chooses
sizes; but only the others are named in a verdict, as a budget may really turn either way.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from attrs import field, frozen

from agent_fsm.config import Limits
from agent_fsm.guards import Always, Compare, Guard, Is, Number
from agent_fsm.protocol import CALL_TOOLS, PLAN, REPAIR, RESEARCH, Ended, ModelReplied, Said
from agent_fsm.table import Row

__all__ = ["FLAGS", "MEASURES", "TIMES", "Field", "Reads", "constant", "is_free", "partly", "reads_of", "turning"]

Field: TypeAlias = tuple[str, str]
"""A number of the ledger: its owner (`ledger`, `counters` or `calls`) and its name."""

FLAGS = ("asking", "ended", "ending", "research_tools", "said")
"""Fields of the ledger that are no numbers."""
MEASURES = frozenset(
    (
        *("tokens_needed", "cost_needed_usd", "closing_tokens_needed", "closing_cost_needed_usd"),
        *("request_tokens", "request_cost_usd"),
    )
)
"""Fields that say what requests may cost at worst; which side of a limit they are on is the world's choice."""
TIMES = frozenset(("seconds", "retry_at"))
AMOUNTS = frozenset(("tokens", "cost_usd"))
REAL = frozenset(("seconds", "retry_at", "cost_usd"))
"""Numbers that need not be whole."""


@frozen
class Reads:
    """What a table reads under some limits."""

    flags: frozenset[str]
    cuts: Mapping[Field, tuple[float, ...]]
    """By number, in rising order, the least values that are told apart from those below them."""
    live_between: frozenset[str] = field(factory=frozenset)
    """Of what the results of calls write (`repeats`) or a request does (`asking`), what is read later than at once."""

    def counted_tools(self) -> tuple[str, ...]:
        """Return the names of the tools whose calls are counted."""
        return tuple(sorted(name for owner, name in self.cuts if owner == "calls"))

    def reads(self, name: str) -> bool:
        """Return whether the field *name* of the ledger itself is compared with anything."""
        return ("ledger", name) in self.cuts


def turning(leaf: Compare, limits: Limits) -> tuple[Field, float] | None:
    """Return the number that *leaf* compares and the least value from which on its answer is another.

    None if the leaf is not one number of the ledger against a limit or constant; `nan` if the limit is absent.
    """
    left, sign, right = leaf.left, leaf.sign, leaf.right
    if left.owner == "limits" and isinstance(right, Number):
        left, sign, right = right, {"<": ">", ">": "<", "<=": ">=", ">=": "<="}[sign], left
    if left.owner == "limits" or (isinstance(right, Number) and right.owner != "limits"):
        return None
    if isinstance(left, Number) and left.owner == "ledger" and left.attribute in FLAGS:
        return None
    value = getattr(limits, right.attribute) if isinstance(right, Number) else right
    at = (left.owner, left.attribute)
    if value is None or math.isnan(value):
        return at, math.nan
    if math.isinf(value):
        return at, value
    if left.owner == "ledger" and left.attribute in REAL:
        return at, math.nextafter(value, math.inf) if sign in (">", "<=") else float(value)
    return at, math.floor(value) + 1 if sign in (">", "<=") else math.ceil(value)


def constant(leaf: Guard, limits: Limits) -> bool | None:
    """Return what *leaf* answers of every ledger with these limits; None if that depends on the ledger."""
    match leaf:
        case Always():
            return True
        case Is(Number("limits", name), value):
            return getattr(limits, name) is value
        case Compare(Number("limits", one), sign, right) if not isinstance(right, Number) or right.owner == "limits":
            other = getattr(limits, right.attribute) if isinstance(right, Number) else right
            mine = getattr(limits, one)
            if mine is None or other is None:
                return False
            return bool({"<": mine < other, "<=": mine <= other, ">": mine > other, ">=": mine >= other}[sign])
        case Compare():
            turns = turning(leaf, limits)
            if turns is not None and math.isnan(turns[1]):
                return False
    return None


def is_measure(leaf: Guard) -> bool:
    """Return whether *leaf* compares a measure of the budget with something."""
    if not isinstance(leaf, Compare):
        return False
    sides = [side for side in (leaf.left, leaf.right) if isinstance(side, Number)]
    return any(side.owner == "ledger" and side.attribute in MEASURES for side in sides)


def is_free(leaf: Guard, limits: Limits) -> bool:
    """Return whether *leaf* must be taken to answer anything."""
    match leaf:
        case Always() | Is(Number("limits")):
            return False
        case Is(Number("ledger", name)):
            return name not in FLAGS
        case Compare():
            return constant(leaf, limits) is None and (is_measure(leaf) or turning(leaf, limits) is None)
        case _:
            return True


def reads_of(table: Sequence[Row], limits: Limits) -> Reads:
    """Return what the guards of *table* tell apart under *limits*."""
    flags: set[str] = set()
    cuts: dict[Field, set[float]] = {}
    for leaf in (leaf for row in table for leaf in row.guard.leaves()):
        if isinstance(leaf, Is) and leaf.left.owner == "ledger" and leaf.left.attribute in FLAGS:
            flags.add(leaf.left.attribute)
        elif isinstance(leaf, Compare) and constant(leaf, limits) is None and not is_free(leaf, limits):
            turns = turning(leaf, limits)
            assert turns is not None  # else the leaf were free
            cuts.setdefault(turns[0], set()).add(turns[1])
    finite = {at: tuple(sorted(each for each in values if 0 < each < math.inf)) for at, values in cuts.items()}
    late = frozenset(_read_late(table, limits))
    return Reads(frozenset(flags), finite, late)


# What is read only right after it was written

_UNRUN = ((Said.ANSWER, Ended.WELL), (Said.UNSURE, Ended.WELL), (Said.REFUSED, Ended.WELL), (Said.EMPTY, Ended.FAILED))
_CUT = ((Said.CUT_OFF, Ended.FAILED),)
_BROKEN = tuple((Said.NOTHING, ended) for ended in (Ended.RETRYABLE, Ended.FATAL, Ended.CANCELLED, Ended.TIMED_OUT))
_IDLE = ((Said.NOTHING, Ended.WELL), (Said.CALLS, Ended.WELL))
_RAN = ((Said.CALLS, Ended.WELL), (Said.CALLS, Ended.FAILED))
_STOPPED = ((Said.NOTHING, Ended.CANCELLED), (Said.NOTHING, Ended.TIMED_OUT))


def _read_late(table: Sequence[Row], limits: Limits) -> Iterator[str]:
    """Yield `repeats` if anything reads it but right after calls were run, `asking` if anything does after them."""
    calls_are_run = _runs_every_call(table, limits)
    after_asking = (*_UNRUN, *_CUT, *_BROKEN, _IDLE[0], *(() if calls_are_run else _IDLE[1:]))
    if any(_live("repeats", row, outcome, limits) for row in table for outcome in (*after_asking, *_STOPPED)):
        yield "repeats"
    if any(_live("asking", row, outcome, limits) for row in table for outcome in (*_RAN, *_STOPPED)):
        yield "asking"


def _runs_every_call(table: Sequence[Row], limits: Limits) -> bool:
    """Return whether a reply that asks for tools leads to CallTools whatever else the ledger says."""
    replied = [row for row in table if ModelReplied in row.events]
    for source in (PLAN, REPAIR, RESEARCH):
        values = [
            (_partial(row.guard, Said.CALLS, Ended.WELL, limits), row) for row in replied if source in row.sources
        ]
        first = next(((value, row) for value, row in values if value is not False), None)
        if first is not None and (first[0] is not True or first[1].target is not CALL_TOOLS):
            return False
    return True


def _live(name: str, row: Row, outcome: tuple[Said, Ended], limits: Limits) -> bool:
    return any(name in _names(leaf) for leaf in partly(row.guard, *outcome, limits))


def _names(leaf: Guard) -> Iterator[str]:
    # A function may read anything, but it is free: its answer is never taken from the ledger
    for side in (getattr(leaf, "left", None), getattr(leaf, "right", None)):
        if isinstance(side, Number) and side.owner == "ledger":
            yield side.attribute


def partly(guard: Guard, said: Said, ended: Ended, limits: Limits) -> frozenset[Guard]:
    """Return the leaves on which *guard* still depends once it is known what the model said and how it ended."""
    found = _partial(guard, said, ended, limits)
    return frozenset() if isinstance(found, bool) else found


def _partial(guard: Guard, said: Said, ended: Ended, limits: Limits) -> "bool | frozenset[Guard]":
    kind = type(guard).__name__
    parts = [_partial(part, said, ended, limits) for part in guard.parts()]
    if kind in ("Both", "Either"):
        decides = kind == "Either"  # the value of one part that settles the whole
        if decides in [part for part in parts if isinstance(part, bool)]:
            return decides
        open_parts = [part for part in parts if not isinstance(part, bool)]
        return frozenset[Guard]().union(*open_parts) if open_parts else not decides
    if kind == "Not":
        return (not parts[0]) if isinstance(parts[0], bool) else parts[0]
    if parts:  # a name
        return parts[0]
    known = constant(guard, limits)
    if known is not None:
        return known
    if isinstance(guard, Is) and guard.left.owner == "ledger" and guard.left.attribute in ("said", "ended"):
        return guard.value is (said if guard.left.attribute == "said" else ended)
    return frozenset((guard,))
