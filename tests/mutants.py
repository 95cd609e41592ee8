"""Mutants of the shipped table: what a slip of the pen could make of it, and how each is caught.

One row dropped; two neighbours swapped; a guard negated, made always or made never; the sign of a comparison turned
into its neighbour (`>=` and `>`, `<` and `<=`), in one place or wherever its definition is used; an update left out.
A mutant is caught if it is refused when a run is made of it, or if a test fails by it. The tests are those of KILLERS:
about what runs do. Drawings and texts of the table are not among them; they would catch any change.

`python tests/mutants.py` runs those files for each mutant and prints what caught it: of the tests that failed, one that
makes a claim about rows, and fails for the fewest mutants. AGENT_FSM_MUTANT=NAME runs any test with that mutant in the
table's place.
"""

import operator
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NoReturn

import pytest
from attrs import define, evolve, field, frozen

from agent_fsm.guards import ALWAYS, Always, Both, Compare, Either, Guard, Is, Named, Not, Number
from agent_fsm.protocol import (
    PLAN,
    REPAIR,
    RESEARCH,
    SUMMARIZE,
    Ended,
    Event,
    Said,
    State,
    StopReason,
)
from agent_fsm.table import Row, Table

KILLERS = ("tests/test_policy_rows.py", "tests/test_machine.py")
NEIGHBOUR = {">=": ">", ">": ">=", "<=": "<", "<": "<="}


@frozen
class Mutant:
    """A table that is not the shipped one by one slip."""

    kind: str
    """dropped, swapped, negated, always, never, sign, definition or update."""
    name: str
    table: Table


def mutants_of(table: Table) -> list[Mutant]:
    """Return the mutants of *table*, always the same in the same order; none is *table* itself."""
    return [*_rows_moved(table), *_guards_made(table), *_signs_turned(table), *_updates_left_out(table)]


def _called(table: Table, number: int) -> str:
    return f"{number} {table[number].label}"


def _with(table: Table, number: int, row: Row) -> Table:
    return Table((*table[:number], row, *table[number + 1 :]))


def _rows_moved(table: Table) -> Iterator[Mutant]:
    for number in range(len(table)):
        yield Mutant("dropped", f"{_called(table, number)}: dropped", Table((*table[:number], *table[number + 1 :])))
    for number, after in pairwise(range(len(table))):
        rows = [*table]
        rows[number], rows[after] = rows[after], rows[number]
        yield Mutant("swapped", f"{_called(table, number)}: swapped with {_called(table, after)}", Table(rows))


def _guards_made(table: Table) -> Iterator[Mutant]:
    for number, row in enumerate(table):
        where = _called(table, number)
        yield Mutant("negated", f"{where}: negated", _with(table, number, evolve(row, guard=~row.guard)))
        if row.guard is not ALWAYS:  # it would be the same row; and never what negated is
            yield Mutant("always", f"{where}: made always", _with(table, number, evolve(row, guard=ALWAYS)))
            yield Mutant("never", f"{where}: made never", _with(table, number, evolve(row, guard=~ALWAYS)))


def _signs_turned(table: Table) -> Iterator[Mutant]:
    rows_of: Counter[Compare] = Counter()
    for number, row in enumerate(table):
        leaves = [leaf for leaf in row.guard.leaves() if isinstance(leaf, Compare)]
        rows_of.update(dict.fromkeys(leaves, 1))
        for place, leaf in enumerate(leaves):
            again = "" if leaf not in leaves[:place] else f" ({place})"
            guard = _turned(row.guard, leaf, [leaves[:place].count(leaf)])
            yield Mutant(
                "sign",
                f"{_called(table, number)}: {leaf.name}{again} turned to {NEIGHBOUR[leaf.sign]}",
                _with(table, number, evolve(row, guard=guard)),
            )
    for leaf, rows in rows_of.items():
        if rows > 1:
            everywhere = Table(evolve(row, guard=_turned(row.guard, leaf, None)) for row in table)
            name = f"everywhere: {leaf.name} turned to {NEIGHBOUR[leaf.sign]}"
            yield Mutant("definition", name, everywhere)


def _turned(guard: Guard, leaf: Compare, skipping: list[int] | None) -> Guard:
    """Return *guard* with the sign of *leaf* turned: where so many of its like were passed, or everywhere."""
    if isinstance(guard, Compare):
        if guard != leaf:
            return guard
        if skipping is not None:
            skipping[0] -= 1
            if skipping[0] != -1:
                return guard
        return evolve(guard, sign=NEIGHBOUR[guard.sign])
    match guard:
        case Named(inner):
            return evolve(guard, guard=_turned(inner, leaf, skipping))
        case Not(inner):
            return Not(_turned(inner, leaf, skipping))
        case Both(first, second):
            return Both(_turned(first, leaf, skipping), _turned(second, leaf, skipping))
        case Either(first, second):
            return Either(_turned(first, leaf, skipping), _turned(second, leaf, skipping))
    return guard


def _updates_left_out(table: Table) -> Iterator[Mutant]:
    for number, row in enumerate(table):
        for place, update in enumerate(row.updates):
            rest = (*row.updates[:place], *row.updates[place + 1 :])
            name = f"{_called(table, number)}: without {update.verb} {update.counter}"
            yield Mutant("update", name, _with(table, number, evolve(row, updates=rest)))


# Mutants that no run can tell from the table

_APART = "they answer different events or states, so that neither stands before the other"
_ROOM = "where work has room, the closing request has more: it is shorter, and its reply is reckoned with"
_CAPPED = "no run comes here with it reached: a row before ends it"
EQUIVALENT = {
    "0 always: swapped with 1 always": _APART,
    "1 always: swapped with 2 asked for tools": _APART,
    "3 always: swapped with 4 always": _APART,
    "4 always: swapped with 5 always": _APART,
    "5 always: swapped with 6 always": _APART,
    "6 always: swapped with 7 always": _APART,
    "7 always: swapped with 8 always": _APART,
    "8 always: swapped with 9 cancelled": _APART,
    "11 answered: swapped with 12 unsure, no research": "a reply is sure or unsure",
    "14 fatal model error: swapped with 15 refused": "a request that failed brought no refusal",
    "18 retry: swapped with 19 retry": "only one state asked",
    "19 retry: swapped with 20 retry": "only one state asked",
    "21 retries exhausted: swapped with 22 failures at max, closing": "an effect ends failed or retryable, not both",
    "23 failures at max: swapped with 24 stagnated after a nudge, closing": (
        "both hold only where closing does not fit, or the row before 23 would have been taken; then 24 does not"
    ),
    "25 stagnated after a nudge: swapped with 26 iterations at max, closing": (
        "both hold only where closing does not fit, or the row before 25 would have been taken; then 26 does not"
    ),
    "27 iterations at max: swapped with 28 unsure, may research": "research is possible below the cap only",
    "28 unsure, may research: swapped with 29 failures escalate": "a hedged answer is no failure",
    "22 failures at max, closing: closing_tokens_needed > max_tokens_total turned to >=": _ROOM,
    "24 stagnated after a nudge, closing: closing_tokens_needed > max_tokens_total turned to >=": _ROOM,
    "26 iterations at max, closing: closing_tokens_needed > max_tokens_total turned to >=": _ROOM,
    "28 unsure, may research: hops < max_research_hops turned to <=": (
        "a hedged answer after the last hop is a success by row 12"
    ),
    "28 unsure, may research: iterations >= max_iterations turned to >": _CAPPED,
    "28 unsure, may research: seconds >= max_wallclock_seconds turned to >": _CAPPED,
    "29 failures escalate: iterations >= max_iterations turned to >": _CAPPED,
    "29 failures escalate: seconds >= max_wallclock_seconds turned to >": _CAPPED,
}
"""Why, by name. `equivalent` goes through all ledgers to show it."""

OCCURRING = (
    *((said, Ended.WELL) for said in (Said.NOTHING, Said.CALLS, Said.ANSWER, Said.UNSURE, Said.REFUSED)),
    *((said, Ended.FAILED) for said in (Said.CALLS, Said.EMPTY, Said.CUT_OFF)),
    *((Said.NOTHING, ended) for ended in (Ended.RETRYABLE, Ended.FATAL, Ended.CANCELLED, Ended.TIMED_OUT)),
)
"""All that `said` and `ended` can be together where a row of Observe is chosen."""

_ORDERS: tuple[int | None, ...] = (-1, 0, 1)
_OPERATORS: dict[str, Callable[[int, int], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_FLAGS: dict[str, tuple[Any, ...]] = {
    "moment": OCCURRING,
    "ending": (None, StopReason.MAX_ITERATIONS),
    "asking": (PLAN, REPAIR, RESEARCH, SUMMARIZE),
}


@define
class _AnyLedger:
    """A ledger of which nothing is settled but what was asked: by number, which of its values was chosen."""

    chosen: list[int]
    """The choices to make, in the order in which they come up; beyond them the first."""
    options: list[int] = field(factory=list)
    """How many there were of each choice made."""
    known: dict[Any, Any] = field(factory=dict)

    def ask(self, what: Any, values: Sequence[Any]) -> Any:
        if what not in self.known:
            place = len(self.options)
            self.options.append(len(values))
            self.known[what] = values[self.chosen[place] if place < len(self.chosen) else 0]
        return self.known[what]

    def holds(self, guard: Guard) -> bool:
        match guard:
            case Always():
                return True
            case Named(inner):
                return self.holds(inner)
            case Not(inner):
                return not self.holds(inner)
            case Both(first, second):
                return self.holds(first) and self.holds(second)
            case Either(first, second):
                return self.holds(first) or self.holds(second)
            case Is(Number("ledger", "said"), value):
                return self.ask("moment", OCCURRING)[0] is value
            case Is(Number("ledger", "ended"), value):
                return self.ask("moment", OCCURRING)[1] is value
            case Is(Number(_, name), value):
                return self.ask(name, _FLAGS.get(name, (False, True))) is value
            case Compare(left, sign, right):
                order = self._order(left, right)
                return order is not None and _OPERATORS[sign](order, 0)
        raise ValueError(f"can't tell what {guard.name} answers")

    def possible(self) -> bool:
        """Whether the numbers can be so: where work has room, the closing request, if it is wanted, has more."""
        if self.known.get("closing_summary") is not True:
            return True
        order = {what[0].attribute: how for what, how in self.known.items() if isinstance(what, tuple)}
        tokens, closing = order.get("tokens_needed"), order.get("closing_tokens_needed")
        cost, closing_cost = order.get("cost_needed_usd"), order.get("closing_cost_needed_usd")
        if tokens in (-1, 0) and closing in (0, 1):
            return False
        return cost is None or closing_cost is None or cost == 1 or closing_cost <= cost

    def _order(self, left: Number, right: Number | float) -> int | None:
        absent = isinstance(right, Number) and right.absent
        order: int | None = self.ask((left, right), (*_ORDERS, None) if absent else _ORDERS)
        return order


def equivalent(table: Sequence[Row], mutant: Sequence[Row]) -> bool:
    """Return whether both lead to the same from every ledger that can occur, in every state, whatever happens.

    All ledgers are gone through, as far as guards can tell them apart: each number less than, equal to and more than
    what it is compared with, each flag both ways, `said` and `ended` as they can occur together. That is more than can
    occur: numbers that depend on one another are taken not to, but for the needs of work and of the closing request.
    """
    ours, others = _blocks(table), _blocks(mutant)
    return ours.keys() == others.keys() and all(_alike(ours[at], others[at]) for at in ours)


def _blocks(table: Sequence[Row]) -> dict[tuple[State, type[Event] | None], list[Row]]:
    blocks: dict[tuple[State, type[Event] | None], list[Row]] = {}
    for row in table:
        for source in row.sources:
            for event in row.events or (None,):
                blocks.setdefault((source, event), []).append(row)
    return blocks


def _alike(ours: Sequence[Row], others: Sequence[Row]) -> bool:
    before = next((at for at, (one, other) in enumerate(zip(ours, others, strict=False)) if one != other), None)
    if before is None:
        return len(ours) == len(others)
    shortest = min(len(ours), len(others)) - before
    backwards = zip(reversed(ours), reversed(others), strict=False)
    behind = next((at for at, (one, other) in enumerate(backwards) if one != other or at == shortest), shortest)
    todo: list[list[int]] = [[]]
    while todo:
        ledger = _AnyLedger(todo.pop())
        if _parted(ours, others, before, behind, ledger):
            return False
        for place in range(len(ledger.chosen), len(ledger.options)):
            made = [*ledger.chosen, *[0] * (place - len(ledger.chosen))]
            todo += [[*made, option] for option in range(1, ledger.options[place])]
    return True


def _parted(ours: Sequence[Row], others: Sequence[Row], before: int, behind: int, ledger: _AnyLedger) -> bool:
    """Whether *ledger* gets elsewhere by the *others*, whose rows *before* and *behind* are the same as ours."""
    one, other = (_outcome(rows[before : len(rows) - behind], ledger) for rows in (ours, others))
    if one == other or any(ledger.holds(row.guard) for row in ours[:before]):
        return False
    end = ours[len(ours) - behind :]
    one, other = (_outcome(end, ledger) if each is None else each for each in (one, other))
    return one != other and ledger.possible()


def _outcome(rows: Iterable[Row], ledger: _AnyLedger) -> Any:
    row = next((row for row in rows if ledger.holds(row.guard)), None)
    return None if row is None else (row.target, row.reason, row.updates)


# Caught


@define
class Caught:
    """How a mutant was caught."""

    mutant: Mutant
    refused: str = ""
    """What was said when a run was made of it."""
    tests: tuple[str, ...] = ()
    """The tests that failed."""
    claims: tuple[str, ...] = ()
    """Those of them whose claim did not hold, while the others could not even be put."""

    def best(self, failing: Mapping[str, int]) -> str:
        """Return the test whose name says best what broke: a claim about rows, which *failing* has for few mutants."""
        rank = {test: (not test.startswith(KILLERS[0]), test not in self.claims, failing[test]) for test in self.tests}
        return min(rank, key=rank.__getitem__).partition("::")[2]


def refusal(table: Sequence[Row]) -> str:
    """Return what is said when a run is made of *table*; nothing if it is not refused."""
    from agent_fsm.errors import TableError
    from agent_fsm.rules import rules_of

    try:
        rules_of(table)
    except TableError as error:
        return str(error)
    return ""


SECONDS = 120
"""After which the tests are taken to hang."""


def caught(mutant: Mutant) -> Caught:
    """Run the tests of KILLERS with *mutant* in the table's place, in a process of their own."""
    if refused := refusal(mutant.table):
        return Caught(mutant, refused)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run_tests(mutant.name, writing)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = [line.split("\t") for line in pipe.read().splitlines()]
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"the tests could not be run to their end for {mutant.name}: {status}")
    return Caught(
        mutant,
        tests=tuple(test for test, _ in told),
        claims=tuple(test for test, claim in told if claim == "True"),
    )


def _run_tests(name: str, writing: int) -> NoReturn:
    """Write the names of the tests that fail, and exit."""
    signal.alarm(SECONDS)

    class Recorder:
        def pytest_exception_interact(self, node: pytest.Item, call: pytest.CallInfo[Any]) -> None:
            claim = call.excinfo is not None and call.excinfo.errisinstance(AssertionError)
            if isinstance(node, pytest.Item):  # what can't be collected catches nothing
                os.write(writing, f"{node.nodeid}\t{claim}\n".encode())

    os.environ["AGENT_FSM_MUTANT"] = name
    for module in [each for each in sys.modules if each.split(".")[0] in ("agent_fsm", "tests")]:
        del sys.modules[module]
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    options = ("-q", "-n0", "-p", "no:cacheprovider", "-m", "not slow and not hypothesis", "--tb=no")
    os._exit(pytest.main([*options, *KILLERS], plugins=[Recorder()]))


_MUTANTS: list[Mutant] = []
"""What workers, which are forked, are to work on."""


def _caught_by_number(number: int) -> Caught:
    return evolve(caught(_MUTANTS[number]), mutant=Mutant("", "", Table()))  # not sent back


def all_caught(mutants: Sequence[Mutant], workers: int = 2) -> list[Caught]:
    """Return how each was caught, in order."""
    import hypothesis
    import transitions

    assert hypothesis and transitions  # once for all children
    _MUTANTS[:] = mutants
    with get_context("fork").Pool(workers) as pool:
        found = pool.map(_caught_by_number, range(len(mutants)), chunksize=1)
    return [evolve(each, mutant=mutant) for each, mutant in zip(found, mutants, strict=True)]


def printed(every: Sequence[Caught]) -> str:
    """Return a table of what caught each mutant."""
    failing = Counter(test for each in every for test in each.tests)
    lines = []
    for each in every:
        if each.refused:
            how = f"refused when built: {each.refused}"
        elif each.tests:
            how = each.best(failing)
        elif each.mutant.name in EQUIVALENT:
            how = f"equivalent: {EQUIVALENT[each.mutant.name]}"
        else:
            how = "NOT CAUGHT"
        lines.append(f"{each.mutant.name:<70} {how}")
    return "\n".join(lines)


def summed_up(every: Sequence[Caught]) -> str:
    """Return how many of each kind were caught in which way."""
    lines = [f"{'':<12}{'all':>6}{'refused':>10}{'by a test':>11}{'equivalent':>12}{'left':>6}"]
    kinds = list(dict.fromkeys(each.mutant.kind for each in every))
    for kind in (*kinds, ""):
        some = [each for each in every if kind in ("", each.mutant.kind)]
        refused = sum(bool(each.refused) for each in some)
        tested = sum(bool(each.tests) for each in some)
        same = sum(not each.tests and each.mutant.name in EQUIVALENT for each in some)
        left = len(some) - refused - tested - same
        lines.append(f"{kind or 'all':<12}{len(some):>6}{refused:>10}{tested:>11}{same:>12}{left:>6}")
    return "\n".join(lines)


def main() -> None:
    """Print how each mutant of the shipped table is caught."""
    from agent_fsm.table import TABLE

    os.chdir(Path(__file__).parent.parent)
    began = time.monotonic()
    every = all_caught(mutants_of(TABLE))
    print(printed(every))
    print()
    print(summed_up(every))
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
