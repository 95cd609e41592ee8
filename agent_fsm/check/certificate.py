"""A certificate that every run ends: boxes, steps and ranks as plain JSON, for `agent_fsm.check.verifier`.

boxes   a list; of each: `state`, `listed`, `flags`, `turn`, `fields` (for each field the least and the greatest
        value, null for no end) and `rank`: whole numbers, which may only fall along a step, and names of fields,
        which may only rise; the first that moves decides
steps   by box, a list of [target, changes]; for each field that a step changes: ["add", 2] or ["put", 0]
"""

from math import inf
from typing import Any

from agent_fsm.check.explore import Graph, Op
from agent_fsm.check.ranking import Part, ranks
from agent_fsm.check.report import Certificate
from agent_fsm.protocol import DONE, Said

__all__ = ["certificate_of"]


def certificate_of(graph: Graph, parts: list[Part]) -> Certificate:
    """Return the certificate of *graph*, whose *parts* are all bounded."""
    names = [".".join(at) for at in graph.boxes.fields]
    rank = ranks(parts, names)
    boxes = [_box(graph, number, rank[number]) for number in range(len(graph.keys))]
    steps = [sorted({(edge.target, edge.ops) for edge in following}, key=repr) for following in graph.edges]
    return {
        "fields": names,
        "boxes": boxes,
        "steps": [[[target, _changes(names, ops)] for target, ops in following] for following in steps],
    }


def _changes(names: list[str], ops: tuple[Op, ...]) -> dict[str, Any]:
    return {name: list(op) for name, op in zip(names, ops, strict=True) if op[0] != "keep"}


def _box(graph: Graph, number: int, rank: tuple[int | str, ...]) -> dict[str, Any]:
    key = graph.keys[number]
    if key[0] is DONE:
        return {"state": DONE.value, "reason": str(key[1]), "rank": list(rank)}
    state, listed, places, flags, extra, asking = key
    spans = [graph.boxes.span(at, place) for at, place in enumerate(places)]
    return {
        "state": state.value,
        "listed": listed,
        "flags": {
            name: value.value if hasattr(value, "value") else value
            for name, value in zip(graph.boxes.flags, flags, strict=True)
        },
        "turn": list(extra) if isinstance(extra, tuple) and listed else None,
        "said": [extra.value] if isinstance(extra, Said) else None if listed else [each.value for each in extra],
        "asking": None if asking is None else asking.value,
        "fields": [[low, None if high == inf else high] for low, high in spans],
        "rank": list(rank),
    }
