"""Tables by number, sound and faulty, and what brute force knows of them. Shares no code with `agent_fsm.check`.

`case_of(number)` makes a table from `random.Random(number)`: a policy whose every way round counts and is capped, or
the shipped table, into which a fault of some kind may have been put. Limits are small, so that `brute` can go through
all runs with their exact numbers: two are the same only if the state, the calls in hand and every number and flag that
a guard reads (and what it is reckoned from) are equal.

Whether a fault makes a table run for ever is not known here: that is for `brute` to find out.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from attrs import define, evolve, field, frozen

from agent_fsm.config import AgentConfig
from agent_fsm.guards import ALWAYS, Compare, Guard, Is, Number, Opaque, counter, ledger, limits, opaque
from agent_fsm.ledger import Ledger
from agent_fsm.machine import Run, next_effect, start, step
from agent_fsm.messages import not_run_results
from agent_fsm.protocol import (
    CALL_TOOLS,
    DONE,
    OBSERVE,
    PLAN,
    REPAIR,
    RESEARCH,
    SUMMARIZE,
    AskModel,
    Ended,
    Event,
    Interrupted,
    ListTools,
    ModelFailed,
    ModelReplied,
    RunTools,
    Said,
    StopReason,
    ToolCall,
    ToolResult,
    ToolsFinished,
    ToolsListed,
    ToolsUnavailable,
)
from agent_fsm.reading import interrupted, read_reply, read_tools
from agent_fsm.table import DECIDED, TABLE, Row, Update, add, observe, put, reset

__all__ = ["FAULTS", "TASK", "Brute", "Case", "brute", "case_of", "tally", "unreadable", "visible"]

TASK = ({"role": "user", "content": "x"},)
ASKING = (PLAN, REPAIR, RESEARCH)
rounds, spare, phase = counter("rounds"), counter("spare"), counter("phase")

UNKNOWN = float("inf")
"""Where it is not known what a number is compared with."""

Rows = list[Row]
Chance = random.Random


@frozen
class Case:
    """A table, and where it comes from."""

    number: int
    fault: str
    rows: tuple[Row, ...]
    config: AgentConfig


# Sound tables


def _said(said: Said) -> Guard:
    guard: Guard = ledger.said.is_(said)
    return guard


def _ended(ended: Ended) -> Guard:
    guard: Guard = ledger.ended.is_(ended)
    return guard


def _waiting(states: Sequence[Any], *events: type[Event]) -> Row:
    return Row(tuple(states), events, ALWAYS, OBSERVE)


def _stop(guard: Guard, reason: StopReason | str = StopReason.SUCCESS, name: str = "") -> Row:
    return observe(guard, DONE, reason=reason, name=name)


_REPLIED = Row(ASKING, (ModelReplied,), _said(Said.CALLS), CALL_TOOLS, name="calls")
_ARRIVALS = (
    _waiting((PLAN,), ToolsListed),
    Row((PLAN,), (ToolsUnavailable,), ALWAYS, DONE, (), StopReason.TOOLS_UNAVAILABLE),
    _REPLIED,
    _waiting(ASKING, ModelReplied),
    _waiting(ASKING, ModelFailed),
    _waiting(ASKING, Interrupted),
    _waiting((CALL_TOOLS,), ToolsFinished),
    _waiting((CALL_TOOLS,), Interrupted),
    _waiting((SUMMARIZE,), ModelReplied, ModelFailed, Interrupted),
)
_STOPS = (
    _stop(_ended(Ended.CANCELLED), StopReason.CANCELLED),
    _stop(~ledger.ending.is_(None), DECIDED, "decided"),
    _stop(_ended(Ended.TIMED_OUT) | (ledger.seconds >= limits.max_wallclock_seconds), StopReason.MAX_WALLCLOCK),
    _stop(_ended(Ended.FATAL), StopReason.MODEL_ERROR),
)
_RETRYABLE = _ended(Ended.RETRYABLE)


def _limits(chance: Chance) -> AgentConfig:
    return AgentConfig(
        max_iterations=chance.randint(1, 3),
        max_tools_per_iter=chance.choice((1, 1, 2)),
        max_model_retries=chance.choice((0, 1, 1, 2)),
        stagnation_window=chance.randint(1, 2),
        max_research_hops=chance.randint(0, 2),
        max_failures_before_research=chance.randint(1, 2),
        max_consecutive_failures=chance.randint(1, 3),
        summarize_every=chance.choice((None, None, 1, 2)),
        closing_summary=chance.random() < 0.4,
        enable_repair=chance.random() < 0.8,
    )


def _policy(chance: Chance) -> Rows:
    """Return a small table of which every way round counts and is capped."""
    progress = chance.choice((ledger.iterations, ledger.iterations, rounds, rounds, spare, ledger.nudges))
    count = (add(progress),)
    most = chance.choice((limits.max_iterations, limits.max_consecutive_failures, chance.randint(1, 3)))
    wide = chance.random() < 0.25
    if wide:  # so that some values lie between those that guards tell apart
        count, most = (add(progress, chance.randint(1, 3)),), chance.randint(4, 9)
    cap = (progress >= most) if chance.random() < 0.8 else ~(progress < most)
    rows: Rows = [*_ARRIVALS, *_STOPS]
    rows += [_stop(_said(Said.ANSWER), name="answered"), _stop(_said(Said.REFUSED), StopReason.REFUSED)]
    if chance.random() < 0.6:
        rows += [
            observe(
                _RETRYABLE & (ledger.attempts <= limits.max_model_retries) & ledger.asking.is_(state),
                state,
                name="retry",
            )
            for state in ASKING
        ]
    rows.append(_stop(_RETRYABLE, StopReason.MODEL_ERROR, "retries exhausted"))
    if chance.random() < 0.35:
        rows.append(
            observe(cap & limits.closing_summary.is_(True), SUMMARIZE, put("ending", StopReason.BUDGET), name="closing")
        )
    rows.append(_stop(cap, StopReason.MAX_ITERATIONS, "cap"))
    extra = [
        observe(_ended(Ended.FAILED) & limits.enable_repair.is_(True), REPAIR, *count, name="repair"),
        observe(_said(Said.UNSURE) & (ledger.hops < limits.max_research_hops), RESEARCH, *count, add("hops")),
        observe((phase < chance.randint(1, 2)) & _said(Said.CALLS), PLAN, add(phase), name="phase"),
        observe(ledger.turns >= limits.summarize_every, SUMMARIZE, reset("turns"), *count, name="summary"),
        _stop(_ended(Ended.FAILED) & (ledger.failures >= limits.max_consecutive_failures), name="failures"),
        observe(ledger.failures >= 2, RESEARCH, put("failures", 0), *count, name="escalated"),
    ]
    rows += [row for row in extra if chance.random() < (0.2 if wide else 0.35)]
    rows.append(observe(ALWAYS, PLAN, *count, *([add("turns")] if chance.random() < 0.5 else []), name="loop"))
    return rows


# Faults

Fault = Callable[[Chance, Rows], None]
FAULTS: dict[str, Fault] = {}


def _fault(function: Fault) -> Fault:
    FAULTS[function.__name__.strip("_").replace("_", " ")] = function
    return function


def _choosing(rows: Rows) -> list[int]:
    return [at for at, row in enumerate(rows) if OBSERVE in row.sources]


def _going(rows: Rows) -> list[int]:
    """The rows of Observe that a run goes on by."""
    return [at for at in _choosing(rows) if rows[at].target is not DONE]


def _counting(rows: Rows) -> list[int]:
    return [at for at in _going(rows) if any(each.verb == "add" for each in rows[at].updates)]


def _caps(rows: Rows) -> list[int]:
    """The rows of Observe that end a run because of a number."""
    hard = len([row for row in rows if row in _STOPS or (OBSERVE in row.sources and row.name == "decided")])
    return [
        at
        for at in _choosing(rows)[hard:]
        if rows[at].guard is not ALWAYS
        and (rows[at].target is DONE or any(each.counter == "ending" for each in rows[at].updates))
        and any(isinstance(leaf, Compare) for leaf in rows[at].guard.leaves())
    ]


def _change(rows: Rows, at: int, **changes: Any) -> None:
    rows[at] = evolve(rows[at], **changes)


def _first_policy(rows: Rows) -> int:
    """Where the first row stands that hard stops may stand behind: after the last of the row's own kind."""
    stops = [
        at
        for at in _choosing(rows)
        if rows[at].target is DONE
        and any(isinstance(leaf, Is) and leaf.left.attribute in ("ended", "ending") for leaf in rows[at].guard.leaves())
        and rows[at].name not in ("retries exhausted", "failures", "failures at max")
    ]
    return stops[-1] + 1 if stops else _choosing(rows)[0]


def _number_of(rows: Rows, at: int) -> Number:
    """A counter that the row at *at* adds to."""
    update = next(each for each in rows[at].updates if each.verb == "add")
    return counter(update.counter) if update.own else getattr(ledger, update.counter)


def _compared(rows: Rows) -> list[Compare]:
    return [leaf for at in _caps(rows) for leaf in rows[at].guard.leaves() if isinstance(leaf, Compare)]


def _other_guard(guard: Guard, leaf: Callable[[Compare], Guard]) -> Guard:
    """Return *guard* with each comparison put through *leaf*."""
    parts = [_other_guard(part, leaf) for part in guard.parts()]
    match type(guard).__name__, parts:
        case "Both", [first, second]:
            return first & second
        case "Either", [first, second]:
            return first | second
        case "Not", [part]:
            return ~part
        case "Named", [part]:
            return part.named(guard.name)
    return leaf(guard) if isinstance(guard, Compare) else guard


@_fault
def _none(_chance: Chance, _rows: Rows) -> None:
    """The table as it is."""


@_fault
def _counter_reset(chance: Chance, rows: Rows) -> None:
    at = chance.choice(_counting(rows))
    _change(rows, chance.choice(_going(rows)), updates=(reset(_number_of(rows, at)),))


@_fault
def _missing_increment(chance: Chance, rows: Rows) -> None:
    at = chance.choice(_counting(rows))
    updates = list(rows[at].updates)
    updates.remove(chance.choice([each for each in updates if each.verb == "add"]))
    _change(rows, at, updates=tuple(updates))


@_fault
def _wrong_comparison(chance: Chance, rows: Rows) -> None:
    compared = [at for at in _going(rows) if any(isinstance(leaf, Compare) for leaf in rows[at].guard.leaves())]
    at = chance.choice((*_caps(rows), *compared))
    other = chance.choice(({">=": ">", ">": ">=", "<": "<=", "<=": "<"}, {">=": "<=", ">": "<", "<": ">", "<=": ">="}))
    _change(rows, at, guard=_other_guard(rows[at].guard, lambda leaf: evolve(leaf, sign=other[leaf.sign])))


@_fault
def _shadowed_cap(chance: Chance, rows: Rows) -> None:
    at = chance.choice(_caps(rows))
    leaf = next(each for each in rows[at].guard.leaves() if isinstance(each, Compare))
    flag = chance.choice((ALWAYS, _said(Said.CALLS), _said(Said.EMPTY), _ended(Ended.FAILED)))
    guard = leaf if flag is ALWAYS else leaf & flag
    rows.insert(at, observe(guard, chance.choice(ASKING), *chance.choice(((), (add(spare),)))))


@_fault
def _done_unreachable(chance: Chance, rows: Rows) -> None:
    if chance.random() < 0.3:
        for at, row in enumerate(rows):
            if row.target is DONE:
                _change(rows, at, target=OBSERVE if row.events else PLAN, reason=None)
        return
    for at in _caps(rows):
        _change(rows, at, target=chance.choice(ASKING), reason=None, updates=())


@_fault
def _cap_on_the_wrong_side(chance: Chance, rows: Rows) -> None:
    row = rows.pop(chance.choice(_caps(rows)))
    rows.insert(chance.choice((len(rows) - 1, len(rows))), row)


@_fault
def _cap_removed(chance: Chance, rows: Rows) -> None:
    del rows[chance.choice(_caps(rows))]


@_fault
def _add_on_the_wrong_row(chance: Chance, rows: Rows) -> None:
    at = chance.choice(_counting(rows))
    updates, other = rows[at].updates, chance.choice(range(len(rows)))
    _change(rows, at, updates=())
    _change(rows, other, updates=(*rows[other].updates, *updates))


@_fault
def _written_while_waiting(chance: Chance, rows: Rows) -> None:
    number = _number_of(rows, chance.choice(_counting(rows)))
    waiting = [at for at, row in enumerate(rows) if row.events]
    update = chance.choice((reset(number), put(number, 1), add(number, 2), add(number), add(number, 3)))
    _change(rows, chance.choice(waiting), updates=(update,))


@_fault
def _negative_add(chance: Chance, rows: Rows) -> None:
    number = _number_of(rows, chance.choice(_counting(rows)))
    at = chance.choice(_going(rows))
    _change(rows, at, updates=(*rows[at].updates, add(number, -chance.randint(1, 2))))


@_fault
def _wrong_limit(chance: Chance, rows: Rows) -> None:
    at = chance.choice(_caps(rows))
    right = chance.choice((limits.summarize_every, limits.max_research_hops, limits.max_cost_usd, 1.5, 0, -1, 9))
    _change(rows, at, guard=_other_guard(rows[at].guard, lambda leaf: evolve(leaf, right=right)))


@_fault
def _cap_behind_a_flag(chance: Chance, rows: Rows) -> None:
    flags = (*map(_said, Said), *map(_ended, Ended), ledger.research_tools.is_(True), limits.closing_summary.is_(True))
    flag = chance.choice(flags)
    for at in _caps(rows):
        _change(rows, at, guard=rows[at].guard & (flag if chance.random() < 0.7 else ~flag))


@_fault
def _cap_for_one_asking_state(chance: Chance, rows: Rows) -> None:
    for at in _caps(rows):
        _change(rows, at, guard=rows[at].guard & ledger.asking.is_(chance.choice(ASKING)))


@_fault
def _counters_reset_each_other(chance: Chance, rows: Rows) -> None:
    most = chance.randint(1, 3)
    rows[-1:] = [
        observe((spare < most) & _said(Said.CALLS), PLAN, add(spare), chance.choice((reset(rounds), add(phase)))),
        observe(ALWAYS, PLAN, add(rounds), chance.choice((reset(spare), add(spare))), name="loop"),
    ]
    rows.insert(len(rows) - 2, _stop(rounds >= most, name="rounds"))
    if chance.random() < 0.7:
        del rows[_caps(rows)[0]]


@_fault
def _opaque_guard_in_the_way(chance: Chance, rows: Rows) -> None:
    guard = opaque(chance.choice(OPAQUE))
    at = chance.choice(_caps(rows))
    if chance.random() < 0.5:
        _change(rows, at, guard=rows[at].guard & guard)
    else:
        rows.insert(at, observe(guard, chance.choice(ASKING), *chance.choice(((), (add(spare),), rows[-1].updates))))


@_fault
def _counters_compared_with_each_other(chance: Chance, rows: Rows) -> None:
    at = chance.choice(_caps(rows))
    other = chance.choice((ledger.failures, ledger.model_calls, ledger.tool_calls, spare, phase))
    _change(rows, at, guard=_other_guard(rows[at].guard, lambda leaf: evolve(leaf, right=other)))


@_fault
def _put_for_add(chance: Chance, rows: Rows) -> None:
    at = chance.choice(_counting(rows))
    _change(rows, at, updates=(put(_number_of(rows, at), chance.randint(0, 3)),))


@_fault
def _reset_and_added(chance: Chance, rows: Rows) -> None:
    """What a step resets a row adds to."""
    name = chance.choice(("failures", "attempts", "stale", "repeats"))
    at = chance.choice(_going(rows))
    _change(rows, at, updates=(*rows[at].updates, add(name, chance.randint(1, 2))))
    cap = chance.choice(_caps(rows))
    rows.insert(cap, _stop(getattr(ledger, name) >= chance.randint(2, 7), name=name))
    if chance.random() < 0.7:
        del rows[cap + 1]


@_fault
def _calls_run_or_not(chance: Chance, rows: Rows) -> None:
    """Any reply is followed by calls, though there may be none; or none is; or only some are."""
    at = next(at for at, row in enumerate(rows) if row.target is CALL_TOOLS)
    guard = chance.choice((ALWAYS, _said(Said.CALLS) | _said(Said.EMPTY), _said(Said.CALLS) & (spare < 1), None))
    if guard is None:
        del rows[at]
    elif guard is ALWAYS:
        sources = rows[at].sources
        rows[at : at + 2] = [evolve(rows[at], guard=ALWAYS, sources=(*sources, SUMMARIZE)[: chance.choice((3, 4))])]
        rows[:] = [row for row in rows if row.events != (ModelReplied, ModelFailed, Interrupted)]
        left = (SUMMARIZE,) if SUMMARIZE not in rows[at].sources else ()
        rows[at:at] = [_waiting(left, ModelReplied)] if left else []
        rows[at:at] = [_waiting((SUMMARIZE,), ModelFailed, Interrupted)]
    else:
        _change(rows, at, guard=guard)
        if chance.random() < 0.5:
            _add_to(rows, at, add(spare))


def _add_to(rows: Rows, at: int, update: Update) -> None:
    _change(rows, at, updates=(*rows[at].updates, update))


def _odd(chance: Chance) -> Guard:
    """A guard that reads what policies seldom do."""
    few = chance.randint(1, 3)
    guards: tuple[Callable[[], Guard], ...] = (
        lambda: ledger.tool_calls >= few,
        lambda: ledger.model_calls >= few,
        lambda: ledger.calls_of(chance.choice(("search", "work", "shell", "no_such_tool"))) >= few,
        lambda: ledger.tokens >= chance.choice((1, 10_000)),
        lambda: ledger.seconds >= chance.choice((0.1, 10.0, limits.max_wallclock_seconds)),
        lambda: ledger.retry_at > chance.choice((0.5, 1, 30)),
        lambda: ledger.stale >= few,
        lambda: ledger.repeats >= few,
        lambda: ledger.summaries >= few,
        lambda: ledger.tokens_needed > limits.max_tokens_total,
        lambda: ledger.closing_tokens_needed <= limits.max_tokens_total,
        lambda: ledger.request_tokens >= 1,
        lambda: ledger.cost_usd >= 0.5,
    )
    return chance.choice(guards)()


@_fault
def _odd_cap(chance: Chance, rows: Rows) -> None:
    at, guard = chance.choice(_caps(rows)), _odd(chance)
    if chance.random() < 0.5:
        _change(rows, at, guard=guard)
    else:
        rows.insert(at, _stop(guard, name="odd"))
        if chance.random() < 0.5:
            _change(rows, len(rows) - 1, updates=())


@_fault
def _odd_way_round(chance: Chance, rows: Rows) -> None:
    guard = _odd(chance)
    if chance.random() < 0.5:
        guard = guard & _odd(chance)
    place = chance.choice((chance.choice(_caps(rows)), len(rows) - 1))
    updates = chance.choice(((), (add(spare),), rows[-1].updates))
    rows.insert(place, observe(guard, chance.choice(ASKING), *updates))


@_fault
def _two_faults(chance: Chance, rows: Rows) -> None:
    for name in chance.sample([name for name in FAULTS if name not in ("two faults", "none")], 2):
        FAULTS[name](chance, rows)


def fair(ledger: Ledger) -> bool:
    """Answer one way and the other in turn."""
    return ledger.iterations % 2 == 0


def tired(ledger: Ledger) -> bool:
    """Answer yes from some time on."""
    return ledger.model_calls >= 3


def hopeful(ledger: Ledger) -> bool:
    """Answer yes as long as nothing fails."""
    return ledger.failures == 0


OPAQUE = (fair, tired, hopeful)
_OPAQUE_READS = {"fair": ("iterations",), "tired": ("model_calls",), "hopeful": ("failures",)}


def case_of(number: int) -> Case:
    """Return the table with this number; whether it can be run is not said."""
    chance = random.Random(number)
    config = _limits(chance)
    if chance.random() < 0.06:
        rows, config = list(TABLE), evolve(config, max_iterations=1, max_model_retries=chance.randint(0, 1))
    else:
        rows = _policy(chance)
    names = list(FAULTS)
    fault = names[number % len(names)]
    try:
        FAULTS[fault](chance, rows)
    except IndexError:  # the table has no row for the fault to be in
        fault = "none"
    if any(leaf.left.attribute.endswith("needed") for leaf in _leaves(rows) if isinstance(leaf, Compare)):
        config = evolve(config, max_tokens_total=chance.choice((8_000, 14_000, 25_000)), max_reply_tokens=1_000)
    return Case(number, fault, tuple(rows), config)


def _leaves(rows: Sequence[Row]) -> Iterator[Guard]:
    for row in rows:
        yield from row.guard.leaves()


def unreadable(rows: Sequence[Row]) -> bool:
    """Return whether a guard is a function, or compares two numbers of the ledger with each other."""
    return any(
        isinstance(leaf, Opaque)
        or (
            isinstance(leaf, Compare)
            and isinstance(leaf.right, Number)
            and "limits" not in (leaf.left.owner, leaf.right.owner)
        )
        for leaf in _leaves(rows)
    )


# Brute force

COUNTED = ("steps", "iterations", "model_calls", "tool_turns", "tool_calls", "repairs", "research_hops", "summaries")


def tally(before: Run, after: Run) -> tuple[int, ...]:
    """Return what one step adds, in the order of `COUNTED`."""
    old, new = before.ledger, after.ledger
    again = after.state is before.state and new.ended is Ended.RETRYABLE
    asked = after.state in ASKING and not again
    return (
        1,
        int(asked),
        new.model_calls - old.model_calls,
        int(before.state is CALL_TOOLS),
        new.tool_calls - old.tool_calls,
        int(asked and after.state is REPAIR),
        int(asked and after.state is RESEARCH),
        int(after.state is SUMMARIZE),
    )


@define
class Brute:
    """What brute force knows."""

    most: dict[str, int] | None = None
    """The most of each that a run comes to, if every run ends."""
    cycle: tuple[Event, ...] | None = None
    """How a run gets to where it has been before."""
    longest: dict[str, int] = field(factory=dict)
    """The most of each that a run was seen to come to, whether or not all were gone through."""
    states: int = 0


class Watched(NamedTuple):
    """What runs are told apart by."""

    numbers: tuple[tuple[str, str], ...]
    flags: tuple[str, ...]
    measured: bool
    """Whether a guard reads what requests may cost."""
    timed: bool
    """Whether a guard compares the seconds with anything but the deadline."""
    highest: Mapping[tuple[str, str], float]


def watched(rows: Sequence[Row], config: AgentConfig) -> Watched:
    """Return what the guards of *rows* read."""
    numbers: dict[tuple[str, str], float] = {}
    flags: set[str] = set()
    for leaf in _leaves(rows):
        sides = [each for each in (getattr(leaf, "left", None), getattr(leaf, "right", None)) if each is not None]
        values = [getattr(config, each.attribute, None) for each in sides if getattr(each, "owner", "") == "limits"]
        values += [each for each in sides if isinstance(each, int | float)]
        for side in sides:
            if isinstance(side, Number) and side.owner != "limits":
                if isinstance(leaf, Is):
                    flags.add(side.attribute)
                else:
                    at = (side.owner, side.attribute)
                    numbers[at] = max([numbers.get(at, 0.0), *(value for value in values if value is not None)])
        if isinstance(leaf, Opaque):
            numbers.update({("ledger", name): UNKNOWN for name in _OPAQUE_READS[leaf.name]})
    measured = any("needed" in name or name.startswith("request_") for _, name in numbers)
    seconds = [leaf for leaf in _leaves(rows) if isinstance(leaf, Compare) and leaf.left == ledger.seconds]
    timed = any(leaf.right != limits.max_wallclock_seconds for leaf in seconds)
    if measured:
        numbers.setdefault(("ledger", "tokens"), UNKNOWN)
        numbers.setdefault(("ledger", "request_tokens"), UNKNOWN)
    if ("ledger", "retry_at") in numbers:
        numbers.setdefault(("ledger", "attempts"), UNKNOWN)
    return Watched(tuple(sorted(numbers)), tuple(sorted(flags - {"said", "ended"})), measured, timed, numbers)


def visible(run: Run, watch: Watched, *, clipped: bool = False) -> tuple[Any, ...]:
    """Return all that can tell *run* from another.

    *clipped*: with numbers no higher than one above all that they are compared with, and without those that only the
    budget and functions read.
    """
    if run.state is DONE:
        return (DONE, run.reason)
    now = run.ledger
    values: list[float] = []
    for owner, name in watch.numbers:
        value = getattr(now, name) if owner == "ledger" else getattr(now, owner).get(name, 0)
        if clipped and ("needed" in name or name.startswith("request_") or watch.highest[(owner, name)] == UNKNOWN):
            continue
        values.append(min(value, watch.highest[(owner, name)] + 1) if clipped else value)
    size = run.transcript
    turn = None if run.pending is None else [(call.name, bool(call.not_run)) for call in run.pending.calls]
    return (
        run.state,
        run.listed,
        tuple(values),
        tuple([getattr(now, name) for name in watch.flags]),
        None if turn is None else tuple(turn),
        # Everywhere else the next step writes them before a guard asks
        (now.said, now.ended) if run.state is CALL_TOOLS or not run.listed else None,
        (size.request_size(), size.record_size(), run.tools_size) if watch.measured and not clipped else None,
    )


@frozen
class _World:
    """What may happen, by effect; written from what the driver may send, whatever the table has rows for."""

    config: AgentConfig
    watch: Watched
    replies: tuple[ModelReplied, ...]
    listings: tuple[Event, ...]

    def events(self, run: Run) -> Iterator[Event]:
        deadline, now = self.config.max_wallclock_seconds, run.ledger.seconds
        calls = run.pending.calls if run.pending is not None else ()
        for cancelled, at in product((True, False), {now, deadline}):
            results = tuple(_result(call, ok=False) for call in calls)
            yield interrupted(results, now=at, cancelled=cancelled, started=now < deadline)
        if now >= deadline:
            return
        for at in self._times(now):
            match next_effect(run):
                case ListTools():
                    yield from (evolve(event, now=at) for event in self.listings)
                case AskModel(purpose):
                    for reply in self.replies[-5:-4] if purpose is SUMMARIZE else self.replies:
                        yield from (evolve(reply, now=at, **spent) for spent in self._spent())
                    yield ModelFailed(at, False, "error")
                    yield ModelFailed(at, True, "error")
                    if ("ledger", "retry_at") in self.watch.numbers:
                        yield from (ModelFailed(at, True, "error", retry_after=wait) for wait in (1.1, 31.0, deadline))
                case RunTools():
                    yield from self._results(calls, at, run.ledger.research_tools)

    def _times(self, now: float) -> list[float]:
        cuts = (0.1, 10.0) if self.watch.timed else ()
        return sorted({now, *(cut for cut in cuts if cut > now), self.config.max_wallclock_seconds})

    def _spent(self) -> Iterator[dict[str, Any]]:
        read = [("ledger", name) in self.watch.numbers for name in ("tokens", "cost_usd")]
        for tokens in (0, 1, 10_000, None) if read[0] else (0,):
            for cost in (0.0, 0.6) if read[1] else (None,):
                used = None if tokens is None else 0
                yield {"prompt_tokens": tokens, "completion_tokens": used, "cost_usd": cost}

    def _results(self, calls: Sequence[ToolCall], now: float, research: bool) -> Iterator[ToolsFinished]:
        runnable = [call for call in calls if not call.not_run]
        for ok in (True, False) if runnable else (not calls,):
            results = tuple(_result(call, ok=ok) for call in calls)
            for fresh, stale, repeats in self._news(bool(calls)):
                yield ToolsFinished(now, results, not ok, fresh, stale, repeats)
                if calls and "research_tools" in self.watch.flags:
                    listed = (each for each in self.listings if isinstance(each, ToolsListed))
                    other = next(each for each in listed if bool(each.research) is not research)
                    yield ToolsFinished(now, results, not ok, fresh, stale, repeats, listing=other)

    def _news(self, any_calls: bool) -> list[tuple[bool, int, int]]:
        if not any_calls:
            return [(False, 0, 0)]
        read = [self.watch.highest.get(("ledger", name)) for name in ("stale", "repeats")]
        if read == [None, None]:
            return [(True, 0, 1)]
        seen = range(2, max(3, int(read[1] or 0)) + 1)
        return [(True, 0, 1), *product((True, False), range(1, max(1, int(read[0] or 0)) + 1), seen)]


def _result(call: ToolCall, *, ok: bool) -> ToolResult:
    if call.not_run:
        return not_run_results((call,))[0]
    return ToolResult("x", ok, call_id=call.id, name=call.name)


def _world_of(rows: Sequence[Row], config: AgentConfig, watch: Watched) -> _World:
    counted = [name for owner, name in watch.numbers if owner == "calls"]
    offered = tuple(dict.fromkeys(("work", "search", "other", *counted)))
    most = config.max_tools_per_iter
    # Of each counted tool any number, the rest of the turn something else; turns shorter than they may be, too
    turns = [
        (*[name for name, times in zip(counted, several, strict=True) for _ in range(times)], *["other"] * rest)
        for several in product(range(most + 1), repeat=len(counted))
        for rest in range(most + 1)
        if 0 < sum(several) + rest <= most
    ]
    messages: list[tuple[dict[str, Any], str]] = [
        ({"tool_calls": [{"function": {"name": name}} for name in turn]}, "tool_calls") for turn in turns
    ]
    messages += [
        ({"tool_calls": [{"function": {"name": "unheard_of"}}]}, "tool_calls"),
        ({"content": "It is so."}, "stop"),
        ({"content": "I am not sure."}, "stop"),
        ({"content": " "}, "stop"),
        ({"content": "It is"}, "length"),
        ({"refusal": "No."}, "stop"),
    ]
    replies = []
    for message, finish in messages:
        raw = {"choices": [{"message": message, "finish_reason": finish}]}
        reply = read_reply(raw, now=0.0, offered=offered, max_calls=most)
        assert isinstance(reply, ModelReplied)
        replies.append(reply)
    tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in offered]
    listed = [read_tools(tools, now=0.0, backend="backend", research=research) for research in ((), ("search",))]
    sizes = (0, config.max_tokens_total // 3, config.max_tokens_total) if watch.measured else (0,)
    listings = [evolve(each, size=size) for each in listed for size in sizes if isinstance(each, ToolsListed)]
    return _World(config, watch, tuple(replies), (ToolsUnavailable(0.0, "backend", "error"), *listings))


@define
class _Visit:
    run: Run
    rest: Iterator[tuple[Event, Run, tuple[Any, ...], tuple[int, ...]]]
    event: Event | None
    added: tuple[int, ...]
    best: list[int] = field(factory=lambda: [0] * len(COUNTED))


def brute(rows: Sequence[Row], config: AgentConfig, *, most_states: int = 4_000, most_depth: int = 150) -> Brute:
    """Go through all runs of *rows*, up to so many states and so deep.

    Raises:
        TableError: the table can't be run.
    """
    first, watch = start(TASK, config, rows), watched(rows, config)
    world, found = _world_of(rows, config, watch), Brute()
    worst: dict[tuple[Any, ...], list[int]] = {}
    path: dict[tuple[Any, ...], None] = {}
    stack: list[_Visit] = []
    whole = True

    def following(run: Run) -> Iterator[tuple[Event, Run, tuple[Any, ...], tuple[int, ...]]]:
        met: set[Any] = set()
        for event in world.events(run):
            after = step(run, event)
            key, added = visible(after, watch), tally(run, after)
            if (key, added) not in met:
                met.add((key, added))
                yield event, after, key, added

    key = visible(first, watch)
    stack.append(_Visit(first, following(first), None, (0,) * len(COUNTED)))
    path[key] = None
    while stack:
        visit = stack[-1]
        for event, after, to, added in visit.rest:
            if after.state is DONE:
                visit.best = [max(one, other) for one, other in zip(visit.best, added, strict=True)]
            elif to in path:
                found.cycle = (*[each.event for each in stack if each.event is not None], event)
                found.states = len(worst) + len(path)
                return found
            elif to in worst:
                visit.best = [max(b, a + w) for b, a, w in zip(visit.best, added, worst[to], strict=True)]
            elif len(stack) >= most_depth or len(worst) + len(path) >= most_states:
                whole = False
                if len(stack) >= most_depth:
                    _deep(found, stack)
                    found.states = len(worst) + len(path)
                    return found
                continue
            else:
                path[to] = None
                stack.append(_Visit(after, following(after), event, added))
                break
        else:
            done = stack.pop()
            at = next(reversed(path))
            del path[at]
            worst[at] = done.best
            if stack:
                up = stack[-1]
                up.best = [max(b, a + w) for b, a, w in zip(up.best, done.added, done.best, strict=True)]
            else:
                found.longest = dict(zip(COUNTED, done.best, strict=True))
    found.states = len(worst)
    found.most = found.longest if whole else None
    return found


def _deep(found: Brute, stack: Sequence[_Visit]) -> None:
    total = [sum(each) for each in zip(*(visit.added for visit in stack), strict=True)]
    found.longest = dict(zip(COUNTED, total, strict=True))
