"""Ways through boxes made into runs: events that the real `step` takes, on the very table that runs.

A way through boxes need not be a run. Replaying it tells: either each step leads where the way says, or the field is
named in which they part, and finer boxes may know better.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import NamedTuple

from attrs import evolve, frozen

from agent_fsm.check.explore import COUNTS, TASK, Boxes, Counts, Edge, Graph, Key, counted
from agent_fsm.check.ranking import Part, Way
from agent_fsm.check.reads import AMOUNTS, Field
from agent_fsm.config import AgentConfig
from agent_fsm.errors import NoRowError, TableError
from agent_fsm.guards import Compare
from agent_fsm.machine import Run, start, step
from agent_fsm.protocol import DONE, Event, ModelReplied, ToolsFinished, ToolsListed
from agent_fsm.table import Row

__all__ = ["Lasso", "Replayed", "find_lasso", "replayed"]

MOST_EVENTS = 20_000
"""Steps of a way that are replayed; a longer one is not."""
TURNS = 3
"""How often a lasso is gone round at least."""
MOST_TURNS = 500
"""How often it is gone round until what requests may cost no longer changes; trimming takes some turns."""


class Replayed(NamedTuple):
    """What came of replaying a way."""

    run: Run
    events: tuple[Event, ...]
    counts: Counts
    whole: bool
    """Whether the way was replayed to its end."""
    parted: Field | None = None
    """The field in which way and run parted, if it was one."""


def replayed(table: Sequence[Row], config: AgentConfig, graph: Graph, way: Way) -> Replayed:
    """Return what comes of a run of *table* that goes the *way* from its box on, time and again until its end.

    Where a step leads to another box than the way says, the run goes on from there.
    """
    run, box, parted = start(TASK, config, table), 0, None
    events: list[Event] = []
    counts = [0] * len(COUNTS)
    while run.state is not DONE and len(events) < MOST_EVENTS:
        gone = _gone(run, graph, way(box, graph.boxes.values(run.ledger)), MOST_EVENTS - len(events))
        events += gone.events
        counts = [one + other for one, other in zip(counts, gone.counts, strict=True)]
        run, parted = gone.run, parted or gone.parted
        known = graph.numbers.get(graph.boxes.key(run, graph.boxes.places(run)))
        if known is None or not gone.events:
            break
        box = known
    return Replayed(run, tuple(events), Counts(*counts), run.state is DONE, parted)


def _gone(run: Run, graph: Graph, way: Iterable[Edge], most: int = MOST_EVENTS) -> Replayed:
    """Return what comes of *run* on its *way*, up to and with the first step that leads to another box."""
    boxes, events = graph.boxes, list[Event]()
    total = [0] * len(COUNTS)
    for edge in way:
        if len(events) >= most:
            return Replayed(run, tuple(events), Counts(*total), whole=False)
        event = _fitted(run, edge, graph)
        try:
            after = step(run, event)
        except (NoRowError, TableError):
            return Replayed(run, tuple(events), Counts(*total), whole=False)
        events.append(event)
        total = [one + other for one, other in zip(total, counted(run, after), strict=True)]
        key, places = graph.keys[edge.target], boxes.places(after)
        if boxes.key(after, places) != key:
            parted = _parted(boxes, run, after, places, key)
            return Replayed(after, tuple(events), Counts(*total), whole=False, parted=parted)
        run = after
    return Replayed(run, tuple(events), Counts(*total), whole=True)


def _parted(boxes: Boxes, run: Run, after: Run, places: Sequence[int], key: Key) -> Field | None:
    """Return the field in which *after* is in another range than *key* says; else one whose range was too wide."""
    if len(key) > 2 and after.state is key[0]:
        for number, (one, other) in enumerate(zip(places, key[2], strict=True)):
            if one != other:
                return boxes.fields[number] if boxes.counters[number] else None
    for number, at in enumerate(boxes.fields):
        low, high = boxes.span(number, boxes.places(run)[number])
        if boxes.counters[number] and low < high < inf and boxes.cuts[number]:
            return at
    return None


def _fitted(run: Run, edge: Edge, graph: Graph) -> Event:
    """Return the event of *edge* as it is to be for *run*, which may be another one in the same box."""
    event, boxes = edge.move.event, graph.boxes
    key = graph.keys[edge.target]
    places = dict(zip(boxes.fields, key[2], strict=True)) if len(key) > 2 else {}
    if isinstance(event, ToolsFinished) and not event.fresh and ("ledger", "stale") in places:
        low = boxes.span(boxes.fields.index(("ledger", "stale")), places[("ledger", "stale")])[0]
        event = evolve(event, stale=max(1, int(low) - run.ledger.stale))
    if isinstance(event, ModelReplied) and ("ledger", "tokens") in places:
        low = boxes.span(boxes.fields.index(("ledger", "tokens")), places[("ledger", "tokens")])[0]
        event = evolve(event, prompt_tokens=max(0, int(low) - run.ledger.tokens))
    if isinstance(event, ModelReplied) and ("ledger", "cost_usd") in places:
        low = boxes.span(boxes.fields.index(("ledger", "cost_usd")), places[("ledger", "cost_usd")])[0]
        event = evolve(event, cost_usd=max(0.0, low - run.ledger.cost_usd))
    over = {
        oracle.leaf.left.attribute: answer
        for oracle, answer in edge.answers.items()
        if oracle.measure and isinstance(oracle.leaf, Compare)
    }
    return _squeezed(run, event, over) if any(over.values()) else event


def _squeezed(run: Run, event: Event, over: Mapping[str, bool]) -> Event:
    """Return *event* as it is when it leaves too little of a budget."""
    most = run.ledger.limits.max_tokens_total
    if isinstance(event, ToolsListed | ToolsFinished):
        return evolve(event, size=most)
    if isinstance(event, ModelReplied):
        if over.get("closing_tokens_needed", True):
            return evolve(event, prompt_tokens=2 * most)
        try:
            needed = step(run, event).ledger.tokens_needed
        except NoRowError:
            return event
        return evolve(event, prompt_tokens=max(0, (event.prompt_tokens or 0) + most - needed + 1))
    return event


# Ways that never end


@frozen
class Lasso:
    """A run that never ends: how it gets in, and how it goes round."""

    entry: tuple[Event, ...]
    loop: tuple[Event, ...]
    guards: tuple[str, ...] = ()
    """Opaque guards that were asked on the way; empty if it goes round whatever such guards answer."""


def find_lasso(
    table: Sequence[Row], config: AgentConfig, graph: Graph, stuck: Sequence[Part]
) -> tuple[Lasso | None, Field | None, tuple[str, ...]]:
    """Return the shortest lasso that replays; or the field to refine; or the opaque guards on which it depends."""
    inside = {box for part in stuck for box in part.boxes}
    home = {box: number for number, part in enumerate(stuck) for box in part.boxes}
    entries = _shortest(graph, 0, None)
    ways: list[tuple[list[Edge], list[Edge]]] = []
    for box in sorted(inside & entries.keys(), key=lambda box: len(entries[box])):
        if len(ways) >= 300:
            break
        round_about = _round(graph, box, {other for other in inside if home[other] == home[box]})
        if round_about:
            ways.append((entries[box], round_about))
    ways.sort(key=lambda way: len(way[0]) + len(way[1]))
    parted: Field | None = None
    doubtful: tuple[str, ...] = ()
    for entry, loop in ways[:40]:
        run = _gone(start(TASK, config, table), graph, entry)
        again = _gone(run.run, graph, loop) if run.whole else run
        guards = _opaque(entry, loop)
        if not again.whole:
            parted = parted or again.parted
            doubtful = doubtful or guards
            continue
        moved = _moved(graph.boxes, run.run, again.run)
        if moved:
            parted = parted or next((at for at in moved if at[1] not in AMOUNTS), None)
            continue
        if guards:
            doubtful = doubtful or guards
            continue
        if _goes_round(graph, loop, again.run):
            return Lasso(run.events, again.events), None, ()
    return None, parted, doubtful


def _goes_round(graph: Graph, loop: Sequence[Edge], run: Run) -> bool:
    """Return whether *loop* is gone round for ever: nothing that a guard reads changes in it any more."""
    judged = any(oracle.measure for edge in loop for oracle in edge.answers)
    for turn in range(1, MOST_TURNS + 1):
        before = _spent(run)
        further = _gone(run, graph, loop)
        if not further.whole:
            return False
        run = further.run
        if turn >= TURNS and (not judged or _spent(run) == before):
            return True
    return False  # a transcript that grows for ever, or tokens charged, will be too much for the budget in the end


def _spent(run: Run) -> tuple[float, ...]:
    """Return what the measures of the budget are made of."""
    ledger, transcript = run.ledger, run.transcript
    record = min(run.record_tokens, transcript.record_size())
    return ledger.tokens, ledger.cost_usd, ledger.request_tokens, transcript.request_size(), record


def _opaque(*ways: Sequence[Edge]) -> tuple[str, ...]:
    names = {oracle.name for way in ways for edge in way for oracle in edge.answers if not oracle.measure}
    return tuple(sorted(names))


def _moved(boxes: Boxes, before: Run, after: Run) -> list[Field]:
    """Return the numbers that are not as they were and whose range ends somewhere: going round will leave it."""
    moved = []
    for number, at in enumerate(boxes.fields):
        old, new = boxes.values(before.ledger)[number], boxes.values(after.ledger)[number]
        high = boxes.span(number, boxes.place(number, new))[1]
        if (boxes.counters[number] or at[1] in AMOUNTS) and old != new and (high < inf or new < old):
            moved.append(at)
    return moved


def _shortest(graph: Graph, start_box: int, within: set[int] | None) -> dict[int, list[Edge]]:
    """Return the shortest way to each box."""
    ways: dict[int, list[Edge]] = {start_box: []}
    todo = deque([start_box])
    while todo:
        box = todo.popleft()
        for edge in graph.edges[box]:
            if edge.target not in ways and (within is None or edge.target in within):
                ways[edge.target] = [*ways[box], edge]
                todo.append(edge.target)
    return ways


def _round(graph: Graph, box: int, within: set[int]) -> list[Edge]:
    """Return the shortest way from *box* back to it."""
    ways = _shortest(graph, box, within)
    back = [
        [*way, edge] for end, way in ways.items() for edge in graph.edges[end] if edge.target == box and end in within
    ]
    return min(back, key=len, default=[])
