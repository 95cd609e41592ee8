"""Every run of a table, searched exhaustively: `explore` lets the world answer each effect in every way it can.

What the world may answer comes from the driver, not from the rows of the table: replies are raw messages read by
`read_reply`, listings come from `read_tools`, results and interruptions have the form that the driver gives them. With
no time left no effect starts, so it is answered `Interrupted`. The step taken is `agent_fsm.machine.step`, the one that
runs.

Runs are merged into configurations. Two runs are in the same one if no guard can tell them apart, now or later:

- A counter counts up to where the last comparison that a guard makes with it turns; beyond that all are alike.
- The clock is before the deadline or at it. It stands still until the world lets the deadline pass: what may happen
  later may happen at once. Whether a retry comes before the deadline is the world's choice too (`retry_after`).
- The budget has room for work and for the closing request, for the closing one only, or for neither. A run that waits
  for the model has room for both, as Observe checked; how much more, guards can't see. So a configuration is kept with
  little spent, and the world may also answer it as if it were `poor`: what there is room for now is all that is left.
  Missing usage counts as the worst case and a liar may report anything, so a reply can lead to each of the three.
- The transcript bears on guards through its size alone, which the budget above covers: it is cut back to its start.
- `said`, `ended`, `retry_at` and the measures of the budget are written by `step` before any guard reads them again.
  `repeats` is read only beside `said is calls`, `asking` only beside `ended is retryable`: right after their writing.

Some runs so merged may not exist: the world is not asked whether a result can be stale that early. What is never there
in the search can't be there in a run; `every_run` goes through the runs of small limits without merging, to show it.

`python tests/search.py` prints what the shipped table does at its worst under the default limits.
"""

import operator
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from graphlib import CycleError, TopologicalSorter
from itertools import product
from typing import Any, NamedTuple, TypeAlias

from attrs import define, evolve, field, frozen

from agent_fsm.config import AgentConfig, Limits
from agent_fsm.errors import NoRowError
from agent_fsm.guards import Always, Compare, Is, Number
from agent_fsm.ledger import clone, cloner
from agent_fsm.machine import Run, next_effect, start, step
from agent_fsm.messages import not_run_results
from agent_fsm.protocol import (
    CALL_TOOLS,
    DONE,
    AskModel,
    Event,
    ListTools,
    ModelFailed,
    ModelReplied,
    RunTools,
    StopReason,
    ToolCall,
    ToolResult,
    ToolsFinished,
    ToolsListed,
    ToolsUnavailable,
)
from agent_fsm.reading import interrupted, read_reply, read_tools
from agent_fsm.table import TABLE, Row, Table

Key: TypeAlias = tuple[Any, ...]
"""A configuration: the state, and all that guards can tell apart."""

TASK = ({"role": "user", "content": "x"},)


# What the world may do


@frozen
class Answer:
    """One thing that may happen."""

    event: Event
    poor: bool = False
    """Whether it happens to a run that has no more left than it has room for."""


Answers: TypeAlias = tuple[Answer, ...]


@frozen
class World:
    """What may be answered to each effect."""

    deadline: float
    listings: Answers
    replies: Answers
    results: Mapping[bool, Answers]
    """By whether any call of the turn may be run."""
    too_late: Mapping[bool | None, Answers]
    """To each effect where no time is left; by the same, None for an effect that is no turn of calls."""

    def answers(self, run: Run) -> Answers:
        """Return what may happen to *run* next; nothing if it is over."""
        late = run.ledger.seconds >= self.deadline
        match next_effect(run):
            case ListTools():
                return self.too_late[None] if late else self.listings
            case AskModel():
                return self.too_late[None] if late else self.replies
            case RunTools(calls):
                return self.too_late[bool(calls)] if late else self.results[bool(calls)]
            case None:
                return ()


def world_of(config: AgentConfig) -> World:
    """Return the world under the limits of *config*; its turns make as many calls as may be run."""
    deadline = config.max_wallclock_seconds
    times = (0.0, deadline)
    turns = {any_run: _reply(config, message).calls for any_run, message in ((True, _work(config)), (False, STRANGE))}
    stops = {any_run: tuple(_stops(calls, times)) for any_run, calls in (*turns.items(), (None, ()))}
    return World(
        deadline,
        listings=(*_listings(config, times), *stops[None]),
        replies=(*_replies(config, times), *_failures(times), *stops[None]),
        results={any_run: (*_results(config, calls, times), *stops[any_run]) for any_run, calls in turns.items()},
        too_late={any_run: tuple(each for each in every if each.event.now) for any_run, every in stops.items()},
    )


def _tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


def _listings(config: AgentConfig, times: Iterable[float]) -> Iterator[Answer]:
    for now in times:
        yield Answer(ToolsUnavailable(now, "backend", "error"))
        for tools in ([], [_tool("work")], [_tool("work"), _tool("search")]):
            listed = read_tools(tools, now=now, backend="backend")
            assert isinstance(listed, ToolsListed)
            yield Answer(listed)
            yield Answer(evolve(listed, size=config.max_tokens_total))  # too long for any working request


STRANGE = {"tool_calls": [{"function": {"name": "no_such_tool"}}]}


def _work(config: AgentConfig) -> dict[str, Any]:
    return {"tool_calls": [{"function": {"name": "work"}}] * config.max_tools_per_iter}


_Message: TypeAlias = tuple[dict[str, Any], str]
"""An assistant message and why it ended."""


def _kinds(config: AgentConfig) -> list[_Message]:
    """Return one message for each thing that a reply can amount to."""
    return [
        (_work(config), "tool_calls"),
        (STRANGE, "tool_calls"),
        ({"content": "It is so."}, "stop"),
        ({"content": "I am not sure."}, "stop"),
        ({"content": " "}, "stop"),
        ({"content": "It is"}, "length"),
        ({"refusal": "No."}, "stop"),
    ]


def _lookalikes(config: AgentConfig) -> list[_Message]:
    """Return messages that guards can't tell from others, but that enter the transcript in another form."""
    return [({"content": None}, "length"), (_work(config), "length"), (_work(config), "content_filter")]


def _reply(config: AgentConfig, message: Mapping[str, Any], finish: str = "stop", **more: Any) -> ModelReplied:
    reply = read_reply(
        {"choices": [{"message": message, "finish_reason": finish}], **more},
        now=0.0,
        offered=("work", "search"),
        max_calls=config.max_tools_per_iter,
    )
    assert isinstance(reply, ModelReplied)
    return reply


def _replies(config: AgentConfig, times: Iterable[float]) -> Iterator[Answer]:
    nothing = {"prompt_tokens": 0, "completion_tokens": 0}
    lie = {"prompt_tokens": config.max_tokens_total, "completion_tokens": config.max_tokens_total}
    for (message, finish), now in product(_kinds(config), times):
        yield Answer(evolve(_reply(config, message, finish, usage=nothing), now=now))
        yield Answer(evolve(_reply(config, message, finish, usage=lie), now=now))
        yield Answer(evolve(_reply(config, message, finish), now=now), poor=True)
    for message, finish in _lookalikes(config):
        yield Answer(_reply(config, message, finish, usage=nothing))


def _failures(times: Sequence[float]) -> Iterator[Answer]:
    deadline = max(times)
    for now, poor in product(times, (False, True)):
        yield Answer(ModelFailed(now, False, "error"), poor)
        yield Answer(ModelFailed(now, True, "error"), poor)
        yield Answer(ModelFailed(now, True, "error", retry_after=deadline), poor)


def _told(calls: Sequence[ToolCall], *, ok: bool) -> tuple[ToolResult, ...]:
    ran = [ToolResult("x", ok, call_id=call.id, name=call.name) for call in calls if not call.not_run]
    return tuple(ran) or not_run_results(calls)


def _results(config: AgentConfig, calls: Sequence[ToolCall], times: Iterable[float]) -> Iterator[Answer]:
    """Yield what may come of a turn whose *calls* may either all be run, or none of them."""
    stale_turns = product((True, False), range(1, config.stagnation_window + 1), (2, 3))
    news = [(True, 0, 1), *stale_turns]
    outcomes = (True,) if calls[0].not_run else (False, True)
    for now, failed, (fresh, stale, repeats) in product(times, outcomes, news):
        for size in (0, config.max_tokens_total):
            results = _told(calls, ok=not failed)
            yield Answer(ToolsFinished(now, results, failed, fresh, stale, repeats, size), poor=size > 0)


def _stops(calls: Sequence[ToolCall], times: Iterable[float]) -> Iterator[Answer]:
    """Yield the deadline, which a timer may call early, and a cancel."""
    for now, cancelled in product(times, (False, True)):
        yield Answer(interrupted(_told(calls, ok=False), now=now, cancelled=cancelled))


# What guards can tell apart

_THE_WORLDS = frozenset(
    ("seconds", "retry_at", "tokens_needed", "cost_needed_usd", "closing_tokens_needed", "closing_cost_needed_usd")
)
"""Fields of the ledger whose crossings the world chooses."""
_JUST_WRITTEN = frozenset(("said", "ended", "repeats", "asking"))
"""Fields that a guard of the shipped table reads only right after they were written; see the module's docstring."""
_UNSEARCHABLE = frozenset(("tokens", "cost_usd", "request_tokens", "request_cost_usd"))


@frozen
class Watch:
    """How runs are told apart."""

    limits: Limits
    flags: tuple[str, ...]
    counters: tuple[tuple[str, float], ...]
    """Each with the number at which it stops counting."""

    def key(self, run: Run) -> Key:
        """Return the configuration that *run* is in."""
        if run.state is DONE:
            return (DONE, run.reason)
        ledger = run.ledger
        return (
            run.state,
            run.listed,
            ledger.seconds >= self.limits.max_wallclock_seconds,
            *[getattr(ledger, name) for name in self.flags],
            *[min(getattr(ledger, name), most) for name, most in self.counters],
            *(_turn(run) if run.state is CALL_TOOLS else ()),
        )


def _turn(run: Run) -> Key:
    """Return what matters only while calls are run: whether any is, and what the budget has room for."""
    assert run.pending is not None  # calls are being run
    runs_any = any(not call.not_run for call in run.pending.calls)
    return (runs_any, *_over_budget(_reckoned(run)))


def _reckoned(run: Run) -> Run:
    """Return a run whose ledger says what the next requests need; if calls are run, after the least that can come."""
    if run.pending is None:
        return run
    return step(run, ToolsFinished(run.ledger.seconds, not_run_results(run.pending.calls)))


def _over_budget(run: Run) -> tuple[bool, bool]:
    """Return whether work is too dear for what is left, and whether the closing request, if it is wanted, is too."""
    ledger, limits = run.ledger, run.ledger.limits
    most = float("inf") if limits.max_cost_usd is None else limits.max_cost_usd
    return (
        ledger.tokens_needed > limits.max_tokens_total or ledger.cost_needed_usd > most,
        limits.closing_summary
        and (ledger.closing_tokens_needed > limits.max_tokens_total or ledger.closing_cost_needed_usd > most),
    )


def watch_of(table: Table, limits: Limits) -> Watch:
    """Return how the guards of *table* tell runs apart under *limits*.

    Raises:
        ValueError: a guard asks what a search can't answer: a function, the tokens spent, one counter against another.
    """
    flags: set[str] = set()
    most: dict[str, float] = {}
    for leaf in (leaf for row in table for leaf in row.guard.leaves()):
        match leaf:
            case Always() | Is(Number("limits")):
                pass
            case Is(Number("ledger", name)):
                flags.add(name)
            case Compare(Number("ledger", name), sign, Number("limits") | int() | float() as right) if (
                name not in _UNSEARCHABLE
            ):
                number = getattr(limits, right.attribute) if isinstance(right, Number) else right
                if number is not None:
                    most[name] = max(most.get(name, 0), number + (sign in ("<=", ">")))
            case _:
                raise ValueError(f"can't search a table with the guard {leaf.name}")
    counters = tuple(sorted((name, number) for name, number in most.items() if name not in _THE_WORLDS | _JUST_WRITTEN))
    return Watch(limits, tuple(sorted(flags - _JUST_WRITTEN)), counters)


# The search


class Tally(NamedTuple):
    """What a step adds, or a run comes to."""

    steps: int
    iterations: int
    model_calls: int
    summaries: int
    tool_turns: int
    tool_calls: int


def tally(before: Run, after: Run) -> Tally:
    """Return what the one step from *before* to *after* adds."""
    old, new = before.ledger, after.ledger
    return Tally(
        1,
        new.iterations - old.iterations,
        new.model_calls - old.model_calls,
        new.summaries - old.summaries,
        int(before.state is CALL_TOOLS),
        new.tool_calls - old.tool_calls,
    )


def _sum(one: Tally, other: Tally) -> Tally:
    return Tally(*map(operator.add, one, other))


def _most(one: Tally, other: Tally) -> Tally:
    return Tally(*map(max, one, other))


NOTHING = Tally(0, 0, 0, 0, 0, 0)


@define
class Explored:
    """What a search found."""

    start: Key
    edges: dict[Key, dict[Key, Tally]] = field(factory=dict)
    """By configuration, what may follow it and the most that such a step adds."""
    steps: int = 0
    """Steps taken in the search."""
    seconds: float = 0.0
    rows: dict[int, Row] = field(factory=dict)
    """The rows taken, by their `id`."""
    missing: set[str] = field(factory=set)
    """What may happen that a state has no row for."""
    cycle: list[Key] = field(factory=list)
    """Configurations that lead round in a circle; empty if there are none."""
    trapped: set[Key] = field(factory=set)
    """Configurations from which no run gets to Done."""
    worst: Tally | None = None
    """The most of each that a run can come to, not all of it in one run; None if there is a cycle."""

    @property
    def reasons(self) -> set[StopReason]:
        """Why runs end."""
        return {key[1] for key in self.edges if key[0] is DONE}


def explore(config: AgentConfig, table: Table = TABLE) -> Explored:
    """Search all runs of *table* under the limits of *config*.

    Raises:
        ValueError: a guard asks what a search can't answer.
    """
    began = time.perf_counter()
    first = start(TASK, config, table)
    world, watch = world_of(config), watch_of(table, config)
    found = Explored(watch.key(first))
    todo = [(found.start, first)]
    while todo:
        key, run = todo.pop()
        if key in found.edges:
            continue
        following = found.edges[key] = {}
        for before, after in _steps(run, world, found):
            to, added = watch.key(after), tally(before, after)
            known = following.get(to, added)
            following[to] = added if known == added else _most(known, added)
            if to not in found.edges:
                todo.append((to, _plain(after, first)))
    _judge(found)
    found.seconds = time.perf_counter() - began
    return found


def _steps(run: Run, world: World, found: Explored) -> Iterator[tuple[Run, Run]]:
    poor = _poor(run)
    for answer in world.answers(run):
        before = poor if answer.poor else run
        try:
            after = step(before, answer.event)
        except NoRowError as error:
            found.missing.add(str(error))
            continue
        over = after.state is DONE
        assert over is (after.reason is not None), f"{after.state} with the reason {after.reason}"
        assert over is (next_effect(after) is None), f"{after.state} wants {next_effect(after)}"
        found.steps += 1
        for row in after.taken:
            found.rows[id(row)] = row
        yield before, after


_clone_run = cloner(Run)


def _poor(run: Run) -> Run:
    """Return *run* with exactly as much left of its budget as it has room for."""
    limits, needs = run.ledger.limits, _reckoned(run)
    work, closing = _over_budget(needs)
    if work and (closing or not limits.closing_summary):
        return run
    least = needs.ledger
    poor = _clone_run(run)
    poor.ledger = ledger = clone(run.ledger)
    ledger.tokens += limits.max_tokens_total - (least.closing_tokens_needed if work else least.tokens_needed)
    if limits.max_cost_usd is not None:
        ledger.cost_usd += limits.max_cost_usd - (least.closing_cost_needed_usd if work else least.cost_needed_usd)
    return poor


def _plain(run: Run, first: Run) -> Run:
    """Return *run* with the transcript of the *first*, and nothing spent if it waits for the model."""
    plain = _clone_run(run)
    plain.transcript = first.transcript
    if run.state is not CALL_TOOLS and not _over_budget(run)[0]:
        plain.ledger = ledger = clone(run.ledger)
        ledger.tokens_needed -= ledger.tokens
        ledger.closing_tokens_needed -= ledger.tokens
        ledger.cost_needed_usd -= ledger.cost_usd
        ledger.closing_cost_needed_usd -= ledger.cost_usd
        ledger.tokens, ledger.cost_usd = 0, 0.0
    return plain


def _judge(found: Explored) -> None:
    leading: dict[Key, list[Key]] = {}
    for key, following in found.edges.items():
        for to in following:
            leading.setdefault(to, []).append(key)
    ending = {key for key in found.edges if key[0] is DONE}
    todo = list(ending)
    while todo:
        new = [key for key in leading.get(todo.pop(), ()) if key not in ending]
        ending.update(new)
        todo += new
    found.trapped = found.edges.keys() - ending
    try:
        # what follows comes first in the order: to the sorter it is what must be done before
        order = list(TopologicalSorter(found.edges).static_order())
    except CycleError as error:
        found.cycle = error.args[1]
        return
    worst: dict[Key, Tally] = {}
    for key in order:
        worst[key] = reduce(_most, (_sum(added, worst[to]) for to, added in found.edges[key].items()), NOTHING)
    found.worst = worst[found.start]


# The same without merging


def every_run(config: AgentConfig, *, wild: bool) -> tuple[set[Key], Tally]:
    """Go through all runs of the shipped table, one by one; for small limits only.

    Args:
        config: the limits.
        wild: whether deadlines pass and budgets run out; else only what a run does within both is gone through.

    Returns:
        The configurations met, and the most of each that a run came to.
    """
    world, watch = world_of(config), watch_of(TABLE, config)
    keys: set[Key] = set()
    worst = NOTHING
    todo = [(start(TASK, config), NOTHING)]
    while todo:
        run, so_far = todo.pop()
        keys.add(watch.key(run))
        worst = _most(worst, so_far)
        for answer in world.answers(run):
            for event in _wild(run, answer.event) if wild else _calm(run, answer):
                after = step(run, event)
                todo.append((after, _sum(so_far, tally(run, after))))
    return keys, worst


def _calm(run: Run, answer: Answer) -> Iterator[Event]:
    after = step(run, answer.event)
    if not (answer.poor or answer.event.now or _over_budget(after)[0]):
        yield answer.event


def _wild(run: Run, event: Event) -> Iterator[Event]:
    """Yield *event*, and as it is when it leaves a budget just big enough for one more request, or for two."""
    yield event
    after = step(run, event)
    most = run.ledger.limits.max_tokens_total
    if after.state in (CALL_TOOLS, DONE) or _over_budget(after)[0]:
        return
    if isinstance(event, ModelReplied) and event.prompt_tokens == 0:
        left = most - after.ledger.tokens_needed
        yield evolve(event, prompt_tokens=left)
        yield evolve(event, prompt_tokens=left - after.ledger.request_tokens)
    elif isinstance(event, ToolsListed | ToolsFinished):
        size = most // 4  # more than a closing request, so that the working one is the dearest
        ledger = step(run, evolve(event, size=size)).ledger
        left = most - ledger.tokens_needed
        yield evolve(event, size=size + left)
        yield evolve(event, size=size + (left - ledger.request_tokens) // 2)


def main() -> None:
    """Print what the shipped table comes to under the default limits."""
    found = explore(AgentConfig())
    print(f"configurations  {len(found.edges):,}")
    print(f"steps searched  {found.steps:,} in {found.seconds:.1f} s")
    print(f"cycles          {'one' if found.cycle else 'none'}")
    print(f"rows taken      {len(found.rows)} of {len(TABLE)}")
    print(f"runs end in     {', '.join(sorted(found.reasons))}")
    for name, number in zip(Tally._fields, found.worst or (), strict=False):
        print(f"at most         {number} {name.replace('_', ' ')}")


if __name__ == "__main__":
    main()
