"""All runs of a table, explored by the real `step` and merged into boxes.

A box is a state and, for each number that guards read, a range of values that no guard can tell apart, or narrower. Of
each box one run is stepped, the one with the least values; what a step did to a counter (kept, added, put) then holds
for every run in the box, and where a sum falls into several boxes all of them follow. So every run there is goes
through the boxes found; some that are found may not be runs, which is why each claim that one exists is replayed.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import inf
from typing import Any, NamedTuple, TypeAlias

from attrs import define, evolve, field, fields_dict, frozen

from agent_fsm.check.oracle import Oracle, Script, answers_of, with_oracles
from agent_fsm.check.reads import AMOUNTS, FLAGS, REAL, TIMES, Field, Reads, reads_of
from agent_fsm.check.world import Move, World, charged, world_of
from agent_fsm.config import AgentConfig
from agent_fsm.errors import NoRowError
from agent_fsm.guards import Compare, Number
from agent_fsm.ledger import Ledger, clone, cloner
from agent_fsm.machine import Run, start, step
from agent_fsm.protocol import CALL_TOOLS, DONE, PLAN, REPAIR, RESEARCH, SUMMARIZE, Ended, ModelReplied, ToolsListed
from agent_fsm.table import Row, Update

__all__ = [
    "CALLS_OF",
    "COUNTS",
    "TASK",
    "Boxes",
    "Edge",
    "Graph",
    "Key",
    "Op",
    "TooManyError",
    "amount_of",
    "boxes_of",
    "counted",
    "explore",
]

TASK = ({"role": "user", "content": "x"},)
"""The conversation that runs begin with here; a longer one only leaves less room in the budget."""
CALLS_OF = "calls_of_"
"""How the bounds begin that are about one tool: those whose calls a guard counts."""
CHARGED: Field = ("charged", "tokens")
"""Stands for the tokens of requests without a reply. They cost their worst case, and where the budget is asked before
the next request, there is room for so many only; nothing else is known of tokens, as a reply may report none."""
Key: TypeAlias = tuple[Any, ...]
"""A box: the state, the number of the range that each number is in, and the flags."""
Op: TypeAlias = tuple[str, float]
"""What a step did to a counter: ("keep", 0), ("add", 2) or ("put", 0)."""
KEEP: Op = ("keep", 0)
_ASKING = (PLAN, REPAIR, RESEARCH)
_BLANK = tuple(name for name in fields_dict(Ledger) if name not in {*FLAGS, "limits", "counters", "calls", "seconds"})
_TOKENS: Field = ("ledger", "tokens")
_TRIES: Field = ("ledger", "attempts")
_WORLDS = frozenset(("stale", "repeats"))


class TooManyError(Exception):
    """Raised when there are more boxes than can be searched."""


# Boxes


@frozen
class Boxes:
    """How the runs of a table are told apart."""

    reads: Reads
    fields: tuple[Field, ...]
    cuts: tuple[tuple[float, ...] | None, ...]
    """By field, the least values of its ranges but the first; None if each value is a range of its own."""
    flags: tuple[str, ...]
    counters: tuple[bool, ...]
    """By field, whether only steps and rows change it; the world sets the others as it likes."""
    most_tokens: int

    @property
    def rising(self) -> tuple[bool, ...]:
        """By field, whether what steps do to it is known: of tokens, the least that they add."""
        return tuple([counter or at == _TOKENS for at, counter in zip(self.fields, self.counters, strict=True)])

    def values(self, ledger: Ledger) -> list[float]:
        """Return the numbers of *ledger*, in the order of the fields."""
        return [value_of(ledger, at) for at in self.fields]

    def place(self, number: int, value: float) -> int:
        """Return the range in which *value* of the field with this *number* is."""
        cuts = self.cuts[number]
        return int(value) if cuts is None else bisect_right(cuts, value)

    def span(self, number: int, place: int) -> tuple[float, float]:
        """Return the least and the greatest value of a range."""
        cuts = self.cuts[number]
        if cuts is None:
            return place, place
        if self.fields[number] == CHARGED:
            return 0, self.most_tokens
        low = cuts[place - 1] if place else 0
        if place == len(cuts):
            return low, inf
        return low, (cuts[place] if self.fields[number][1] in REAL else cuts[place] - 1)

    def key(self, run: Run, places: tuple[int, ...]) -> Key:
        """Return the box of *run*, whose numbers are in *places*."""
        if run.state is DONE:
            return (DONE, run.reason)
        ledger = run.ledger
        flags = tuple([getattr(ledger, name) for name in self.flags])
        if run.state is CALL_TOOLS:
            asking = ledger.asking if "asking" in self.reads.live_between else None
            # Without a turn the last reply asked for no calls, and what it said is not "calls"
            return (run.state, True, places, flags, turn_of(run) if run.pending else ledger.said, asking)
        if not run.listed:
            return (run.state, False, places, flags, (ledger.said, ledger.ended), None)
        return (run.state, True, places, flags, None, None)

    def places(self, run: Run) -> tuple[int, ...]:
        """Return the ranges that the numbers of *run* are in."""
        return tuple([self.place(number, value) for number, value in enumerate(self.values(run.ledger))])

    def finer(self, at: Field) -> "Boxes":
        """Return boxes in which each value of the field *at* is told apart up to its last cut."""
        number = self.fields.index(at)
        cuts = self.cuts[number]
        assert cuts  # there is something to refine
        every = tuple(float(value) for value in range(1, int(cuts[-1]) + 1))
        return evolve(self, cuts=(*self.cuts[:number], every, *self.cuts[number + 1 :]))


def turn_of(run: Run) -> tuple[str, ...]:
    """Return the names of the calls that are to be run."""
    return () if run.pending is None else tuple([call.name for call in run.pending.calls if not call.not_run])


def value_of(ledger: Ledger, at: Field) -> float:
    """Return a number of *ledger*."""
    owner, name = at
    if at == CHARGED:
        return 0
    value: float = getattr(ledger, name) if owner == "ledger" else getattr(ledger, owner).get(name, 0)
    return value


def boxes_of(table: Sequence[Row], limits: AgentConfig) -> Boxes:
    """Return the coarsest boxes in which no guard of *table* can tell two runs apart."""
    reads = reads_of(table, limits)
    falling = {
        ("counters" if update.own else "ledger", update.counter)
        for row in table
        for update in row.updates
        if _amount(update) < 0
    }
    fields = tuple(
        at
        for at, cuts in sorted(reads.cuts.items())
        if (cuts or at in falling) and not (at == ("ledger", "repeats") and "repeats" not in reads.live_between)
    )
    counters = tuple(at[1] not in TIMES | AMOUNTS | _WORLDS or at[0] != "ledger" for at in fields)
    cuts = [
        None if at in falling else tuple(sorted(_cuts(at, reads, table, limits) if counter else reads.cuts[at]))
        for at, counter in zip(fields, counters, strict=True)
    ]
    # What a step resets and a row then adds to comes to the same whatever it was: each value is told apart, so that
    # what one run shows need not hold for others
    mixed = {update.counter for row in table for update in row.updates if update.verb == "add" and not update.own}
    for number, (owner, name) in enumerate(fields):
        known = cuts[number]
        if owner == "ledger" and name in mixed and name in ("failures", "attempts", *_WORLDS) and known:
            cuts[number] = tuple(map(float, range(1, int(known[-1]) + 1)))
    flags = tuple(sorted(reads.flags - {"said", "ended", "asking"}))
    return Boxes(reads, (*fields, CHARGED), (*cuts, ()), flags, (*counters, True), limits.max_tokens_total)


def _cuts(at: Field, reads: Reads, table: Sequence[Row], limits: AgentConfig) -> set[float]:
    """Return where to cut a counter so that no guard turns within a range, wherever in a step it is asked.

    A guard is asked after the step has counted, and Observe after the row of the state that waited has: so each cut is
    made so much earlier, too. One is the first cut of all, as that tells a counter set to 0 from one that was kept.
    """
    owner, name = at
    by_step = {"attempts": 1, "failures": 1, "model_calls": 1}.get(name, 0) if owner == "ledger" else 0
    if at == ("ledger", "tool_calls") or owner == "calls":
        by_step = limits.max_tools_per_iter
    by_row = {
        sum(_amount(each) for each in row.updates if each.counter == name and each.own is (owner == "counters"))
        for row in table
        if row.events
    }
    before = {counted + added for counted in range(by_step + 1) for added in {0, *by_row}}
    return {1, *(cut - amount for cut in reads.cuts[at] for amount in before if cut - amount > 1), *reads.cuts[at]}


def _amount(update: Update) -> int:
    return update.value if update.verb == "add" and isinstance(update.value, int) else 0


# The graph


class Counts(NamedTuple):
    """What a step adds to what a run comes to."""

    steps: int
    iterations: int
    model_calls: int
    tool_turns: int
    tool_calls: int
    repairs: int
    research_hops: int
    summaries: int


COUNTS = Counts._fields


def counted(before: Run, after: Run) -> Counts:
    """Return what the step from *before* to *after* adds."""
    old, new, state = before.ledger, after.ledger, after.state
    asks = state in _ASKING and not (new.ended is Ended.RETRYABLE and state is before.state)
    return Counts(
        1,
        int(asks),
        new.model_calls - old.model_calls,
        int(before.state is CALL_TOOLS),
        new.tool_calls - old.tool_calls,
        int(asks and state is REPAIR),
        int(asks and state is RESEARCH),
        int(state is SUMMARIZE),
    )


def amount_of(ledger: Ledger, name: str) -> float:
    """Return what a run has come to by its *ledger*, of what is no count: `tokens`, `calls_of_deploy`, ..."""
    if name.startswith(CALLS_OF):
        return ledger.calls.get(name.removeprefix(CALLS_OF), 0)
    value: float = getattr(ledger, name)
    return value


class Edge(NamedTuple):
    """A step from one box to another."""

    source: int
    target: int
    ops: tuple[Op, ...]
    counts: Counts
    move: Move
    answers: Mapping[Oracle, bool]
    rows: tuple[Row, ...]


@define
class Graph:
    """All the boxes that runs of a table go through, and the steps between them."""

    boxes: Boxes
    keys: list[Key] = field(factory=list)
    numbers: dict[Key, int] = field(factory=dict)
    """The keys' places in `keys`; the run starts in 0."""
    edges: list[list[Edge]] = field(factory=list)
    """By box, what may follow."""
    steps: int = 0
    missing: set[str] = field(factory=set)
    """What may happen that a state has no row for."""
    rows: set[int] = field(factory=set)
    """Places in the table of the rows taken."""
    oracles: set[Oracle] = field(factory=set)
    """Those that were asked."""
    unbudgeted: dict[str, Row] = field(factory=dict)
    """For `tokens` and `cost_usd`, a row that leads to a request though the budget may not hold it."""


_clone_run = cloner(Run)


@define
class _Search:
    boxes: Boxes
    world: World
    script: Script
    first: Run
    least: Ledger
    closing_summary: bool
    replied: dict[Any, list[tuple[Run, dict[Oracle, bool]]]] = field(factory=dict)
    taken: set[int] = field(factory=set)
    """The rows taken, by identity."""

    def represented(self, run: Run, places: Sequence[int]) -> Run:
        """Return the run with the least numbers in the same box as *run* would have in *places*."""
        new, ledger = _clone_run(run), clone(run.ledger)
        new.ledger, new.transcript, new.answer, new.detail, new.taken = ledger, self.first.transcript, None, "", ()
        for name in _BLANK:  # of what no guard reads nothing may be left of whoever came here first
            setattr(ledger, name, 0)
        ledger.request_tokens, ledger.request_cost_usd = self.cheapest(run), 0.0
        for number, (owner, name) in enumerate(self.boxes.fields[:-1]):
            low = self.boxes.span(number, places[number])[0]
            if owner == "ledger":
                setattr(ledger, name, low if name in REAL else int(low))
            else:
                setattr(ledger, owner, {**getattr(ledger, owner), name: int(low)})
        return new

    def charge(self, run: Run, counts: Counts, move: Move) -> Op:
        """Return what the step adds at least to the tokens of requests without a reply."""
        if not counts.model_calls or isinstance(move.event, ModelReplied):
            return KEEP
        return ("add", self.cheapest(run))

    def cheapest(self, run: Run) -> int:
        """Return the least that the request in hand can cost in tokens."""
        least = self.least
        return least.closing_tokens_needed - least.tokens if run.state is SUMMARIZE else least.request_tokens

    def followers(self, run: Run, key: Key, graph: Graph) -> Iterator[tuple[Run, Move, dict[Oracle, bool]]]:
        """Yield what may follow *run*, and by which move and answers."""
        # A reply ends all attempts before anything is asked about them: after three it is what it is after none
        alike = (
            *key[:2],
            tuple([place for at, place in zip(self.boxes.fields, key[2], strict=True) if at != _TRIES]),
            *key[3:],
        )
        for move in self.world.moves(run):
            if not isinstance(move.event, ModelReplied):
                yield from ((after, move, asked) for after, asked in self.stepped(run, move, graph))
                continue
            known = self.replied.get((alike, id(move)))
            if known is None:
                known = self.replied[alike, id(move)] = list(self.stepped(run, move, graph))
            yield from ((after, move, asked) for after, asked in known)

    def stepped(self, run: Run, move: Move, graph: Graph) -> Iterator[tuple[Run, dict[Oracle, bool]]]:
        """Yield what follows *run* by *move*, for all answers of the oracles."""
        script = self.script
        before = run
        if move.charged is not None:
            before = _clone_run(run)
            before.ledger = charged(run.ledger, move)
        todo: list[dict[Oracle, bool]] = [{}]
        while todo:
            script.wanted, script.asked = todo.pop(), {}
            graph.steps += 1
            try:
                after = step(before, move.event)
            except NoRowError as error:
                graph.missing.add(str(error))
            else:
                yield after, script.asked
            if script.asked:
                todo += answers_of(script, closing_summary=self.closing_summary)


def explore(table: Sequence[Row], config: AgentConfig, boxes: Boxes, *, most: int) -> Graph:
    """Return all the *boxes* that runs of *table* go through under the limits of *config*.

    Raises:
        TooManyError: there are more than *most*.
    """
    least = step(start(TASK, config, table), ToolsListed(0.0)).ledger
    rows, script = with_oracles(table, config, least)
    first = start(TASK, config, rows)
    search = _Search(boxes, world_of(config, boxes.reads), script, first, least, config.closing_summary)
    graph = Graph(boxes)
    runs: list[Run] = []
    _number(graph, runs, search, first, boxes.places(first))
    source = 0
    while source < len(runs):
        _expand(graph, runs, search, source)
        runs[source] = first  # no longer needed
        source += 1
        if len(runs) > most:
            raise TooManyError(f"more than {most:,} boxes")
    graph.rows = {place for place, row in enumerate(rows) if id(row) in search.taken}
    return graph


_ROOM = {"tokens_needed": "max_tokens_total", "cost_needed_usd": "max_cost_usd"}


def within_budget(after: Run, asked: Mapping[Oracle, bool]) -> tuple[bool, bool]:
    """Return whether the next request is known to fit the budget of tokens, and that of money."""
    closing = after.ledger.ending is not None
    known = {"tokens_needed": False, "cost_needed_usd": False}
    for oracle, answer in asked.items():
        leaf = oracle.leaf
        if oracle.waiting:
            continue  # asked before the next requests were reckoned
        if isinstance(leaf, Compare) and isinstance(leaf.right, Number) and answer is (leaf.sign in ("<", "<=")):
            name = leaf.left.attribute.removeprefix("closing_") if closing else leaf.left.attribute
            if _ROOM.get(name) == leaf.right.attribute:
                known[name] = True
    return known["tokens_needed"], known["cost_needed_usd"]


def _number(graph: Graph, runs: list[Run], search: _Search, run: Run, places: tuple[int, ...]) -> int:
    key = graph.boxes.key(run, places)
    number = graph.numbers.get(key)
    if number is None:
        number = graph.numbers[key] = len(runs)
        graph.keys.append(key)
        graph.edges.append([])
        runs.append(run if run.state is DONE else search.represented(run, places))
    return number


def _expand(graph: Graph, runs: list[Run], search: _Search, source: int) -> None:
    run, boxes, key, following = runs[source], graph.boxes, graph.keys[source], graph.edges[source]
    if run.state is DONE:
        return
    spans = [boxes.span(number, place) for number, place in enumerate(key[2])]
    old, kept = boxes.values(run.ledger), (KEEP,) * len(boxes.fields)
    counts_tools = bool(boxes.reads.counted_tools())
    seen: set[tuple[int, tuple[Op, ...], Counts]] = set()
    for after, move, asked in search.followers(run, key, graph):
        for row in after.taken:
            search.taken.add(id(row))
        if asked:
            graph.oracles.update(asked)
        counts, ops = counted(run, after), kept
        reached: Sequence[tuple[int, ...]] = ((),)
        if after.state is DONE:
            if counts_tools:
                ops = (*_ops(boxes, old, after, KEEP), KEEP)
        else:
            within = (True, True) if after.state is CALL_TOOLS else within_budget(after, asked)
            for measure, fits in zip(("tokens", "cost_usd"), within, strict=True):
                if not fits:
                    graph.unbudgeted.setdefault(measure, after.taken[-1])
            charge = search.charge(run, counts, move)
            ops = (*_ops(boxes, old, after, charge), charge if within[0] else KEEP)
            reached = _reached(boxes, spans, after, ops)
        for places in reached:
            target = _number(graph, runs, search, after, places)
            mark = (target, ops, counts)
            if mark not in seen:
                seen.add(mark)
                following.append(Edge(source, target, ops, counts, move, asked, after.taken))


def _ops(boxes: Boxes, old: Sequence[float], after: Run, charge: Op) -> tuple[Op, ...]:
    fields = zip(boxes.fields[:-1], boxes.counters, old, boxes.values(after.ledger), strict=False)
    written = [update for row in after.taken for update in row.updates]
    return tuple(
        [
            op_of(at, was, now, written) if counter else charge if at == _TOKENS else KEEP
            for at, counter, was, now in fields
        ]
    )


def op_of(at: Field, was: float, now: float, written: Sequence[Update]) -> Op:
    """Return what a step did to a counter that *was* so much and is so much *now*.

    Ranges of several values begin at 1 at least, so that for them a counter reset to 0 is told from one that was kept.
    """
    if now < was and not any(_amount(update) < 0 for update in written):
        return ("put", now)
    for update in written:
        if update.verb == "put" and update.counter == at[1] and update.own is (at[0] == "counters"):
            return ("put", now)
    return KEEP if now == was else ("add", now - was)


def _reached(
    boxes: Boxes, spans: Sequence[tuple[float, float]], after: Run, ops: Sequence[Op]
) -> tuple[tuple[int, ...], ...]:
    """Return the ranges that the numbers of all runs of a box are in after a step that did *ops*."""
    ranges: list[Sequence[int]] = []
    several = False
    for number, (low, high) in enumerate(spans):
        verb, amount = ops[number]
        if not boxes.counters[number] or verb == "put" or low == high:
            ranges.append((boxes.place(number, value_of(after.ledger, boxes.fields[number])),))
            continue
        least = boxes.place(number, low + amount)
        greatest = len(boxes.cuts[number] or ()) if high == inf else boxes.place(number, high + amount)
        ranges.append(range(least, greatest + 1))
        several = several or greatest > least
    return tuple(product(*ranges)) if several else (tuple([each[0] for each in ranges]),)
