"""`verify`: whether a certificate shows that every run of a table ends, without the search that wrote it.

What the world may answer, what guards read and the oracles it has in common with the search: a fault there passes both.

It takes no step of the certificate on trust. The run with the least and the one with the greatest numbers of each box
are put together anew and the real `step` is asked what follows, whatever the world and the free guards may answer; all
of it must be among the steps that the certificate names, and along each of those the rank must fall.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product, zip_longest
from math import inf, nextafter
from typing import Any, TypeAlias

from attrs import evolve

from agent_fsm.check.oracle import Script, answers_of, with_oracles
from agent_fsm.check.reads import Reads, reads_of
from agent_fsm.check.world import World, charged, world_of
from agent_fsm.config import AgentConfig
from agent_fsm.errors import NoRowError
from agent_fsm.ledger import Ledger
from agent_fsm.machine import Run, start, step
from agent_fsm.protocol import CALL_TOOLS, DONE, Ended, Said, State, StopReason, ToolsListed
from agent_fsm.table import Row, Update

__all__ = ["verify"]

_TASK = ({"role": "user", "content": "x"},)
_FAR = 10**9
"""So far above the least number of a box without an end is the other one that is tried."""
_REAL = ("ledger.seconds", "ledger.retry_at", "ledger.cost_usd")
_WORLDS = (*_REAL, "ledger.stale", "ledger.repeats", "ledger.tokens", "charged.tokens")
"""Fields that the world sets as it likes, or of which only the least is known."""
_FLAGS: Mapping[str, Any] = {"ending": StopReason, "research_tools": bool, "asking": State}


def verify(certificate: Mapping[str, Any], table: Sequence[Row], config: AgentConfig) -> list[str]:
    """Return what is wrong with *certificate* for *table* under *config*; nothing if every run ends, as it says."""
    fields, boxes, steps = certificate["fields"], certificate["boxes"], certificate["steps"]
    reads = reads_of(table, config)
    faults = _misshapen(fields, boxes, steps, reads)
    if faults:
        return faults
    faults = [
        f"the rank does not fall from box {box} to box {to}"
        for box, following in enumerate(steps)
        for to, changes in following
        if not _falls(boxes[box]["rank"], boxes[to], fields, changes)
    ]
    first_measures = step(start(_TASK, config, table), ToolsListed(0.0)).ledger
    rows, script = with_oracles(table, config, first_measures)
    ranking = {each for box in boxes for each in box["rank"] if isinstance(each, str)}
    first, world = start(_TASK, config, rows), world_of(config, reads)
    if not _holds(boxes[0], fields, first, reads):
        faults.append("runs do not start in box 0")
    begins = {
        name: {box["fields"][number][0] for box in boxes if "fields" in box} for number, name in enumerate(fields)
    }
    turning = {name: _turning(name, begins[name], reads, table, config.max_tools_per_iter) for name in fields}
    faults += [
        f"a step from box {box} leads to box {to} and not to all those beside it"
        for box, following in enumerate(steps)
        for to, changes in following
        if not _covered(boxes[box], boxes[to], changes, [boxes[other] for other, _ in following], begins)
    ]
    for number, box in enumerate(boxes):
        faults += [
            f"in box {number} a guard turns between two values of {name}" for name in _split(box, fields, turning)
        ]
        for values in _values(box, fields, turning):
            run = _run(box, values, first, world, first_measures)
            for after, charge in _following(run, world, script, config):
                named = any(
                    _holds(boxes[to], fields, after, reads) and _fits(changes, ranking, run, after, charge)
                    for to, changes in steps[number]
                )
                if not named:
                    faults.append(f"what may follow box {number} in {after.state} is not among its steps")
    return sorted(set(faults))


def _misshapen(fields: list[str], boxes: list[Any], steps: list[Any], reads: Reads) -> list[str]:
    if len(boxes) != len(steps) or not all(to in range(len(boxes)) for following in steps for to, _ in following):
        return ["a step leads to no box, or a box is without its list of steps"]
    read = {".".join(at) for at, cuts in reads.cuts.items() if cuts} - {"ledger.repeats"}
    read |= {"ledger.repeats"} if "repeats" in reads.live_between and reads.reads("repeats") else set()
    flags = sorted(reads.flags - {"said", "ended", "asking"})
    faults = [f"guards read {name}, which is no field of it" for name in sorted(read - set(fields))]
    if any("flags" in box and sorted(box["flags"]) != flags for box in boxes):
        faults.append(f"the flags of its boxes are not the ones that guards read: {', '.join(flags)}")
    if any("fields" in box and len(box["fields"]) != len(fields) for box in boxes):
        faults.append("a box has not one range for each field")
    return faults


_KIND = ("state", "listed", "flags", "turn", "said", "asking")


def _covered(
    box: Mapping[str, Any],
    target: Mapping[str, Any],
    changes: Mapping[str, Any],
    targets: Sequence[Mapping[str, Any]],
    begins: Mapping[str, set[float]],
) -> bool:
    """Return whether a step that makes *changes* to any of the numbers in *box* leads to one of *targets*."""
    if target["state"] == DONE.value:
        return True
    alike = [each for each in targets if all(each.get(name) == target[name] for name in _KIND)]
    axes: list[list[float]] = []
    for name, (low, high), (first, _) in zip(begins, box["fields"], target["fields"], strict=True):
        verb, amount = changes.get(name, ("add", 0))
        if name in _WORLDS:
            axes.append([first])
        elif verb == "put":
            axes.append([amount])
        else:
            last = inf if high is None else high + amount
            axes.append([low + amount, *(each for each in begins[name] if low + amount < each <= last)])
    return all(any(_within(each, values) for each in alike) for values in product(*axes))


def _within(box: Mapping[str, Any], values: Sequence[float]) -> bool:
    ends = zip(values, box["fields"], strict=True)
    return all(low <= value <= (inf if high is None else high) for value, (low, high) in ends)


_Turning: TypeAlias = tuple[set[float], set[float]]
"""Of a field, the values at which a guard may turn, however a step counts first; and those at which a box begins."""


def _turning(name: str, begins: set[float], reads: Reads, table: Sequence[Row], most_calls: int) -> _Turning:
    owner, at = name.split(".", 1)
    counted = {"attempts": 1, "failures": 1, "model_calls": 1, "tool_calls": most_calls}.get(at, 0)
    counted = {"ledger": counted, "calls": most_calls}.get(owner, 0)
    raised = [
        (bool(row.events), sum(each.value for each in row.updates if _raises(each, owner, at)))  # type: ignore[misc] # adds numbers
        for row in table
    ]
    early = {by + added for by in range(counted + 1) for added in {0, *(by for waits, by in raised if waits)}}
    all_in_all = {by + added for by in early for added in {0, *(by for waits, by in raised if not waits)}}
    return (
        {cut - by for cut in reads.cuts.get((owner, at), ()) for by in early},
        {begin - by for begin in begins for by in all_in_all},
    )


def _raises(update: Update, owner: str, name: str) -> bool:
    return update.verb == "add" and update.counter == name and update.own is (owner == "counters")


def _split(box: Mapping[str, Any], fields: list[str], turning: Mapping[str, _Turning]) -> Iterator[str]:
    for name, (low, high) in zip(fields, box.get("fields", ()), strict=bool(box.get("fields"))):
        turns = [cut for cut in turning[name][0] if low < cut <= (inf if high is None else high)]
        if [cut for cut in turns if not (name in _REAL and cut == high)]:  # such a range is without its end
            yield name


def _falls(rank: list[Any], target: Mapping[str, Any], fields: list[str], changes: Mapping[str, Any]) -> bool:
    for mine, other in zip_longest(rank, target["rank"]):
        if isinstance(mine, int) and isinstance(other, int):
            if mine != other:
                return other < mine
        elif mine != other or mine is None:
            return False
        elif mine in changes:  # a counter: it must rise, and have an end where it gets to
            verb, amount = changes[mine]
            return bool(verb == "add" and amount > 0 and target["fields"][fields.index(mine)][1] is not None)
    return False


def _following(run: Run, world: World, script: Script, config: AgentConfig) -> Iterator[tuple[Run, int]]:
    """Yield what may follow *run*, and the tokens charged to a request without a reply for which there was room."""
    for move in world.moves(run):
        todo: list[Any] = [{}]
        while todo:
            script.wanted, script.asked = todo.pop(), {}
            before = run if move.charged is None else evolve(run, ledger=charged(run.ledger, move))
            try:
                after = step(before, move.event)
            except NoRowError:
                yield evolve(before, state=DONE, reason=None), 0
                continue
            asked = [(oracle.name.split(" ", 1)[0], oracle.name, said) for oracle, said in script.asked.items()]
            fits = any(not said and "> max_tokens_total" in name and "needed" in left for left, name, said in asked)
            unanswered = type(move.event).__name__ != "ModelReplied" and after.state is not DONE and fits
            yield after, after.ledger.tokens - run.ledger.tokens if unanswered else 0
            todo += answers_of(script, closing_summary=config.closing_summary)


def _values(
    box: Mapping[str, Any], fields: list[str], turning: Mapping[str, _Turning]
) -> Iterator[Mapping[str, float]]:
    """Yield numbers that a run in *box* may have: the least, the greatest, and each at which something turns."""
    if box["state"] == DONE.value:
        return
    lows = {name: low for name, (low, _) in zip(fields, box["fields"], strict=True)}
    highs = {name: _greatest(name, *ends) for name, ends in zip(fields, box["fields"], strict=True)}
    yield lows
    if highs != lows:
        yield highs
    for name in fields:
        near = {value for turn in set().union(*turning[name]) for value in (turn - 1, turn)}
        yield from (
            {**lows, name: value} for value in sorted(near) if lows[name] < value < highs[name] and name not in _REAL
        )


def _greatest(name: str, low: float, high: float | None) -> float:
    if high is None:
        return low + _FAR
    return nextafter(high, 0) if name in _REAL and high > low else high  # such a range is without its end


def _run(box: Mapping[str, Any], values: Mapping[str, float], first: Run, world: World, least: Ledger) -> Run:
    replies = {
        tuple(call.name for call in each.calls if not call.not_run): each for each in world.replies if each.calls
    }
    ledger = evolve(first.ledger, request_tokens=least.request_tokens)
    if box["state"] == State.SUMMARIZE.value:
        ledger.request_tokens = least.closing_tokens_needed - least.tokens
    for name, value in values.items():
        owner, at = name.split(".", 1)
        if owner == "ledger":
            setattr(ledger, at, value)
        elif owner != "charged":
            setattr(ledger, owner, {**getattr(ledger, owner), at: int(value)})
    flags = {**box["flags"], "asking": box["state"] if box["asking"] is None else box["asking"]}
    for at, value in flags.items():
        if at != "asking" or value != "CallTools":
            setattr(ledger, at, None if value is None else _FLAGS[at](value))
    if box["said"] is not None:
        ledger.said = Said(box["said"][0])
        ledger.ended = Ended(box["said"][-1]) if not box["listed"] else ledger.ended
    pending = None if box["turn"] is None else replies[tuple(box["turn"])]
    ledger.said = ledger.said if pending is None else Said.CALLS
    return evolve(first, state=State(box["state"]), listed=box["listed"], pending=pending, ledger=ledger)


def _holds(box: Mapping[str, Any], fields: list[str], run: Run, reads: Reads) -> bool:
    """Return whether *run* is in *box*."""
    if box["state"] != run.state.value or run.state is DONE:
        return bool(box["state"] == run.state.value and box["reason"] == str(run.reason))
    ledger = run.ledger
    turn = None if run.pending is None else [call.name for call in run.pending.calls if not call.not_run]
    said = None if run.listed and (run.state is not CALL_TOOLS or turn is not None) else [ledger.said.value]
    if not run.listed and turn is None:
        said = [ledger.said.value, ledger.ended.value]
    flags = {name: getattr(each := getattr(ledger, name), "value", each) for name in box["flags"]}
    asking = ledger.asking.value if run.state is CALL_TOOLS and "asking" in reads.live_between else None
    if (box["turn"], box["said"], box["flags"], box["asking"]) != (turn, said, flags, asking):
        return False
    for name, (low, high) in zip(fields, box["fields"], strict=True):
        value = _value(run, name)
        if not low <= value <= (inf if high is None else high) or (name in _REAL and value == high != low):
            return False
    return True


def _value(run: Run, name: str) -> float:
    owner, at = name.split(".", 1)
    value: float = (
        0
        if owner == "charged"
        else getattr(run.ledger, at)
        if owner == "ledger"
        else getattr(run.ledger, owner).get(at, 0)
    )
    return value


def _fits(changes: Mapping[str, Any], ranking: set[str], before: Run, after: Run, charge: int) -> bool:
    """Return whether a step did just the *changes*, as far as the ranking rests on them."""
    if after.state is DONE:
        return True
    for name in ranking | changes.keys():
        verb, amount = changes.get(name, ("add", 0))
        if name == "charged.tokens":
            if charge < amount:
                return False
        elif name == "ledger.tokens":
            if _value(after, name) < _value(before, name) + amount:
                return False
        elif _value(after, name) != (amount if verb == "put" else _value(before, name) + amount):
            return False
    return True
