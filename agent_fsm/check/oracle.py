"""A table whose free guards answer what a script says, so that both of their answers can be explored.

The table explored is the table that runs but for these leaves: each is replaced by an oracle, which looks its answer up
and notes that it was asked. One question put twice to the same ledger has the same answer, so an oracle answers once in
the rows that wait and once in Observe.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from attrs import define, evolve, field, frozen

from agent_fsm.check.reads import is_free, is_measure
from agent_fsm.config import Limits
from agent_fsm.guards import Both, Compare, Either, Guard, Not
from agent_fsm.ledger import Ledger
from agent_fsm.table import Row

__all__ = ["Oracle", "Script", "answers_of", "with_oracles"]


@define
class Script:
    """What the oracles are to answer in one step, and what they were asked."""

    wanted: Mapping["Oracle", bool] = field(factory=dict)
    asked: dict["Oracle", bool] = field(factory=dict)

    def answer(self, oracle: "Oracle") -> bool:
        """Return the answer of *oracle*, and note it."""
        known = self.asked.get(oracle)
        if known is None:
            known = self.asked[oracle] = self.wanted.get(oracle, False)
        return known


@frozen(eq=False)
class Oracle(Guard):
    """A leaf that answers what the script says."""

    leaf: Guard
    waiting: bool
    """Whether it stands in a row of a state that waits; else in Observe."""
    script: Script
    measure: bool
    """Whether it judges the budget, so that the world may really choose."""

    @property
    def name(self) -> str:  # type: ignore[override] # the leaf's
        return self.leaf.name

    def __call__(self, ledger: Ledger, /) -> bool:
        return self.script.answer(self)

    def code(self, bound: dict[str, Any]) -> str:
        key = f"oracle_{len(bound)}"
        bound[key] = self
        return f"{key}(ledger)"


def with_oracles(table: Sequence[Row], limits: Limits, least: Ledger) -> tuple[tuple[Row, ...], Script]:
    """Return *table* with its free leaves replaced, and the script by which they answer.

    Args:
        table: the table to explore.
        limits: what absent and constant comparisons are judged by.
        least: the ledger of a run for which every measure of the budget is as small as it can be: what is over a limit
            there is so always.
    """
    script = Script()
    known: dict[tuple[Guard, bool], Oracle] = {}

    def oracle(leaf: Guard, waiting: bool) -> Guard:
        # Only in Observe have the measures just been reckoned
        if not is_free(leaf, limits) or (not waiting and is_measure(leaf) and _always(leaf, least)):
            return leaf
        key = (leaf, waiting)
        if key not in known:
            known[key] = Oracle(leaf, waiting, script, is_measure(leaf))
        return known[key]

    def answering(row: Row) -> Row:
        return evolve(row, guard=replaced(row.guard, lambda leaf: oracle(leaf, bool(row.events))))

    rows = tuple(map(answering, table))
    return rows, script


def _always(leaf: Guard, least: Ledger) -> bool:
    return isinstance(leaf, Compare) and leaf.sign in (">", ">=") and leaf(least)


def replaced(guard: Guard, leaf: Callable[[Guard], Guard]) -> Guard:
    """Return *guard* with each of its leaves put through *leaf*."""
    parts = [replaced(part, leaf) for part in guard.parts()]
    if not parts:
        return leaf(guard)
    if all(new is old for new, old in zip(parts, guard.parts(), strict=True)):
        return guard
    match guard:
        case Both() | Either():
            return type(guard)(*parts)
        case Not():
            return Not(parts[0])
        case _:
            return parts[0].named(guard.name)


def answers_of(script: Script, *, closing_summary: bool) -> Iterator[dict[Oracle, bool]]:
    """Yield the answers left to try after a step under *script*: those not wanted so far, turned one by one."""
    before: dict[Oracle, bool] = {}
    for oracle, answer in script.asked.items():
        if oracle not in script.wanted and not (closing_summary and _settled(oracle, before)):
            yield {**before, oracle: not answer}
        before[oracle] = answer


def _settled(oracle: Oracle, before: Mapping[Oracle, bool]) -> bool:
    """Return whether the closing request fits for certain, because it and a working request together do."""
    leaf = oracle.leaf
    if not (oracle.measure and isinstance(leaf, Compare) and leaf.left.attribute.startswith("closing_")):
        return False
    if oracle.waiting or leaf.sign not in (">", ">="):
        return False
    name = leaf.left.attribute.removeprefix("closing_")
    for each, answer in before.items():
        other = each.leaf
        if not (answer or each.waiting) and isinstance(other, Compare) and other.left.attribute == name:
            return other.sign == leaf.sign and other.right == leaf.right
    return False
