"""Why a graph of boxes can't be gone round for ever, and how much a way through it adds up to at most.

Within a strongly connected part, a counter that no step there lowers or sets and that has an upper end there can be
raised only so often. Without the steps that raise it the part falls into smaller ones, of which the same is asked,
until there is no way round left. That nesting is a lexicographic ranking (Alias, Darte, Feautrier, Gonnord:
Multi-dimensional rankings, program termination, and complexity bounds, SAS 2010); a limit of a million is as good for
it as one of three.

The most that a way adds up to is reckoned along the same nesting. In a part whose counter can be raised K times, the
value after K rounds is the K-fold application of one monotone max-plus function; once a round adds the same everywhere,
the rest is a multiplication.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from math import inf
from typing import TypeAlias

from attrs import define, field, frozen

from agent_fsm.check.explore import Boxes, Edge, Graph

__all__ = ["Part", "Values", "Way", "most_of", "ranked", "ranks", "residue"]

Values: TypeAlias = dict[int, float]
MOST_CHOICES = 3
"""Ways to divide the same boxes that are tried for a tighter sum."""
ROUNDS = 40
"""Rounds that are gone through one by one, at most, before the rest is extrapolated."""
STEADY = 3
"""So many rounds that add the same let the rest be extrapolated."""


@define
class Part:
    """Boxes that belong together: a single one, a layer that a counter rises in, or a choice of such layers."""

    boxes: tuple[int, ...]
    counter: int | None = None
    """The place of the field that rises; None for a single box and a choice."""
    most: float = 0
    """The greatest value that it has in the layer."""
    least: float = 1
    """The least by which a step within the layer raises it."""
    rounds: int = 0
    """How often it can be raised while a run stays in the layer."""
    raising: frozenset[int] = frozenset()
    """The steps within the layer that raise it, by identity."""
    inner: "list[Part]" = field(factory=list)
    """The parts that are left without those steps, the last ones of a run first."""
    choices: "list[list[Part]]" = field(factory=list)
    """Ways to divide the same boxes, each by another counter, the best for a proof first."""
    unbounded: bool = False
    """Whether no counter bounds it, though there is a way round."""


def ranked(graph: Graph) -> list[Part]:
    """Return the nested parts of *graph*, the last ones of a run first."""
    return _Ranking(graph, graph.boxes).parts(range(len(graph.keys)), frozenset())


@frozen
class _Ranking:
    graph: Graph
    boxes: Boxes

    @property
    def charged(self) -> int:
        """The place of the field that stands for tokens charged."""
        return len(self.boxes.fields) - 1

    def parts(self, within: Iterable[int], without: frozenset[int]) -> list[Part]:
        inside = set(within)
        following = {
            box: [edge for edge in self.graph.edges[box] if edge.target in inside and id(edge) not in without]
            for box in inside
        }
        components = [tuple(each) for each in _components(following)]
        home = {box: place for place, component in enumerate(components) for box in component}
        round_about = [edge for each in following.values() for edge in each if home[edge.source] == home[edge.target]]
        if not round_about:
            return [Part(component) for component in components]
        every = [edge for each in following.values() for edge in each]
        choices = [
            self.layers(number, inside, every, without)
            for number in self.rising(every)
            if number != self.charged
            and any(edge.ops[number][1] > 0 and self.end(number, edge.source) < inf for edge in round_about)
        ]
        if choices:
            return [_choice(tuple(inside), choices)]
        found = []
        for component in components:
            members = set(component)
            steps = [edge for box in component for edge in following[box] if edge.target in members]
            if not steps:
                found.append(Part(component))
                continue
            rising = list(self.rising(steps))
            ways = [self.layers(number, members, steps, without) for number in rising if number != self.charged]
            if self.charged in rising and all(any(part.unbounded for part in way) for way in ways):
                ways.append(
                    self.layers(self.charged, members, steps, without)
                )  # the budget, where nothing else ends it
            found.append(_choice(component, ways) if ways else Part(component, unbounded=True))
        return found

    def rising(self, steps: Sequence[Edge]) -> Iterator[int]:
        """Yield the fields that some of *steps* raise and that none of them lowers or sets."""
        for number, counter in enumerate(self.boxes.rising):
            ops = {edge.ops[number] for edge in steps}
            if not counter or any(verb == "put" or amount < 0 for verb, amount in ops):
                continue
            if any(edge.ops[number][1] > 0 and self.end(number, edge.source) < inf for edge in steps):
                yield number

    def end(self, number: int, box: int) -> float:
        """Return the greatest value that a counter has in *box*."""
        return self.boxes.span(number, self.graph.keys[box][2][number])[1]

    def layers(self, number: int, inside: set[int], steps: Sequence[Edge], without: frozenset[int]) -> list[Part]:
        """Return *inside* divided by the range that the counter is in, the highest first, as it can only rise."""
        by_place: dict[int, list[int]] = {}
        for box in inside:
            key = self.graph.keys[box]
            by_place.setdefault(key[2][number] if key[2:] else 1 << 60, []).append(box)  # the end is above everything
        layers = []
        for place in sorted(by_place, reverse=True):
            members = tuple(by_place[place])
            staying = set(members)
            raising = [
                edge for edge in steps if edge.source in staying and edge.target in staying and edge.ops[number][1] > 0
            ]
            low, high = self.boxes.span(number, place) if raising else (0, 0)
            if not raising or high == inf:
                layers += self.parts(members, without)  # fewer boxes, or others: in this range the counter has no end
                continue
            inner_without = without | {id(edge) for edge in raising}
            inner = self.parts(members, inner_without)
            least = min(edge.ops[number][1] for edge in raising)
            rounds = int((high - low) // least)
            part = Part(members, number, high, least, rounds, frozenset(map(id, raising)), inner)
            part.unbounded = any(each.unbounded for each in inner)
            layers.append(part)
        return layers


def _choice(boxes: tuple[int, ...], choices: list[list[Part]]) -> Part:
    def badness(choice: list[Part]) -> tuple[bool, int]:
        return any(part.unbounded for part in choice), -sum(len(part.raising) for part in choice)

    choices.sort(key=badness)
    bounded = [choice for choice in choices if not badness(choice)[0]]
    return Part(boxes, choices=(bounded or choices)[:MOST_CHOICES], unbounded=not bounded)


def _components(following: Mapping[int, Sequence[Edge]]) -> Iterator[list[int]]:
    """Yield the strongly connected components, each before those that lead to it (Tarjan 1972, without recursion)."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    for root in following:
        if root in order:
            continue
        work = [(root, iter(following[root]))]
        order[root] = low[root] = len(order)
        stack.append(root)
        on_stack.add(root)
        while work:
            box, rest = work[-1]
            for edge in rest:
                to = edge.target
                if to not in order:
                    order[to] = low[to] = len(order)
                    stack.append(to)
                    on_stack.add(to)
                    work.append((to, iter(following[to])))
                    break
                if to in on_stack:
                    low[box] = min(low[box], order[to])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[box])
                if low[box] == order[box]:
                    component = []
                    while True:
                        member = stack.pop()
                        on_stack.discard(member)
                        component.append(member)
                        if member == box:
                            break
                    yield component


def residue(parts: Sequence[Part]) -> Iterator[Part]:
    """Yield the innermost parts that no counter bounds."""
    for part in parts:
        if part.unbounded:
            inner = list(residue(part.choices[0] if part.choices else part.inner))
            yield from inner or [part]


def ranks(parts: Sequence[Part], fields: Sequence[str]) -> dict[int, tuple[int | str, ...]]:
    """Return the rank of each box: places in the order of parts (they fall) and counters (they rise), in turn."""
    found: dict[int, tuple[int | str, ...]] = {}
    for place, part in enumerate(parts):
        inner = ranks(part.choices[0] if part.choices else part.inner, fields)
        rising = () if part.counter is None else (fields[part.counter],)
        found.update({box: (place, *rising, *inner.get(box, ())) for box in part.boxes})
    return found


# The most that a way adds up to

Way: TypeAlias = Callable[[int, Sequence[float] | None], Generator[Edge, None, int]]
"""From a box, the steps of a dearest way on; the iterator returns the box in which it leaves the part. Given the
numbers of a run in the box, the way is one that so many rounds are left for."""


def most_of(graph: Graph, parts: Sequence[Part], weight: Callable[[Edge], float]) -> tuple[float, Way]:
    """Return the most that the *weight* of all steps of a run can add up to, and ways on from each box that do so.

    All of *parts* are bounded. The ways go through boxes, so they are perhaps not ones of a run.
    """
    out = {number: 0.0 if not following else -inf for number, following in enumerate(graph.edges)}
    values, way = _Solver(graph, weight).solve(parts, out, frozenset())
    return values[0], way


@frozen
class _Solver:
    graph: Graph
    weight: Callable[[Edge], float]

    def solve(self, parts: Sequence[Part], out: Values, without: frozenset[int]) -> tuple[Values, Way]:
        """Return what a way from each box of *parts* adds up to at most, leaving by *out*, and how to walk one."""
        home = {box: part for part in parts for box in part.boxes}
        values: Values = {}
        chosen: dict[int, Edge | None] = {}
        walks: dict[int, Way] = {}
        for part in parts:
            leaving: Values = {}
            for box in part.boxes:
                best, edge = out[box], None
                for step in self.graph.edges[box]:
                    there = home.get(step.target)
                    if there is None or there is part or id(step) in without:
                        continue
                    value = self.weight(step) + values[step.target]
                    if value > best:
                        best, edge = value, step
                leaving[box], chosen[box] = best, edge
            if part.counter is None and not part.choices:
                values.update(leaving)
                continue
            inner, walk = (
                self._cheapest(part, leaving, without) if part.choices else self._rounds(part, leaving, without)
            )
            values.update(inner)
            walks[id(part)] = walk

        def walk_on(box: int, numbers: Sequence[float] | None) -> Generator[Edge, None, int]:
            while True:
                walk = walks.get(id(home[box]))
                if walk is not None:
                    box = yield from walk(box, numbers)
                edge, numbers = chosen[box], None
                if edge is None:
                    return box
                yield edge
                box = edge.target

        return values, walk_on

    def _cheapest(self, part: Part, leaving: Values, without: frozenset[int]) -> tuple[Values, Way]:
        solved = [self.solve(choice, leaving, without) for choice in part.choices]
        values = {box: min(each[0][box] for each in solved) for box in part.boxes}

        def walk(box: int, numbers: Sequence[float] | None) -> Generator[Edge, None, int]:
            return min(solved, key=lambda each: each[0][box])[1](box, numbers)

        return values, walk

    def _fastest(self, part: Part, added: Values, without: frozenset[int]) -> Values:
        """Return the most that one more round adds from any box on that a run may still get to from each.

        n rounds add no more than n times that, however early this is asked: a round is monotone, and where all that
        follows is worth D more, so is it, or less.
        """
        inside = set(part.boxes)
        following = {
            box: [edge for edge in self.graph.edges[box] if edge.target in inside and id(edge) not in without]
            for box in part.boxes
        }
        most: Values = {}
        for component in _components(following):
            reached = [added.get(box, 0.0) for box in component]
            reached += [most.get(edge.target, 0.0) for box in component for edge in following[box]]
            most.update(dict.fromkeys(component, max(reached)))
        return most

    def _rounds(self, part: Part, leaving: Values, without: frozenset[int]) -> tuple[Values, Way]:
        raising = [edge for box in part.boxes for edge in self.graph.edges[box] if id(edge) in part.raising]
        inner_without = without | part.raising
        layers: list[tuple[Values, Way, dict[int, Edge | None]]] = []
        entering, chosen = dict(leaving), dict.fromkeys(leaving, None)
        for number in range(min(part.rounds, ROUNDS) + 1):
            if number:
                entering, chosen = dict(leaving), dict.fromkeys(leaving, None)
                before = layers[-1][0]
                for edge in raising:
                    value = self.weight(edge) + before[edge.target]
                    if value > entering[edge.source]:
                        entering[edge.source], chosen[edge.source] = value, edge
            values, walk = self.solve(part.inner, entering, inner_without)
            layers.append((values, walk, chosen))
            if number >= STEADY and _steady([layer[0] for layer in layers[-STEADY - 1 :]]):
                break
        values, left = layers[-1][0], part.rounds - (len(layers) - 1)
        if left > 0:
            added = {box: value - layers[-2][0][box] for box, value in values.items() if value > -inf}
            faster = self._fastest(part, added, without)
            values = {box: value + left * faster.get(box, 0) for box, value in values.items()}

        def walk_rounds(box: int, numbers: Sequence[float] | None) -> Generator[Edge, None, int]:
            rounds = part.rounds
            if numbers is not None and part.counter is not None:
                rounds = max(0, int((part.most - numbers[part.counter]) // part.least))
            while True:
                _, walk, chosen = layers[min(rounds, len(layers) - 1)]
                box = yield from walk(box, numbers)
                numbers = None
                edge = chosen[box]
                if edge is None:
                    return box
                yield edge
                box, rounds = edge.target, rounds - 1

        return values, walk_rounds


def _steady(layers: Sequence[Values]) -> bool:
    """Return whether each round added the same, box by box."""
    added = [
        {box: value - before[box] for box, value in after.items() if value > -inf} for before, after in pairwise(layers)
    ]
    return all(each == added[0] for each in added)
