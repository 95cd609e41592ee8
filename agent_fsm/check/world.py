"""What the world may answer to each effect: the events that a driver can build, one for each that guards tell apart.

Replies are raw messages read by `read_reply`, listings come from `read_tools`, interruptions from `interrupted`, and
results have the form that the driver gives them. With no time left no effect starts: it is answered `Interrupted`.

- The clock stands still until the world lets it reach the next time that a guard tells apart: what may happen later may
  happen at once.
- A turn runs as many calls as may be run. Fewer are a turn of their own where calls are counted; a turn of which only
  some were run counts like the shorter one.
- Of tokens and dollars a reply may report any number, and a request without a reply may have cost any.
- A turn may end with another list of tools, which has research tools where there were none, or none any more.
- How many results are stale, and how often the last has been seen, is whatever a guard tells apart.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import inf, nextafter
from typing import Any

from attrs import evolve, field, frozen

from agent_fsm.check.reads import Reads
from agent_fsm.config import AgentConfig
from agent_fsm.errors import ConfigError
from agent_fsm.ledger import Ledger, clone
from agent_fsm.machine import Run, next_effect
from agent_fsm.messages import not_run_results
from agent_fsm.protocol import (
    SUMMARIZE,
    AskModel,
    Effect,
    Event,
    Interrupted,
    ListTools,
    ModelFailed,
    ModelReplied,
    RunTools,
    ToolCall,
    ToolResult,
    ToolsFinished,
    ToolsListed,
    ToolsUnavailable,
)
from agent_fsm.reading import interrupted, read_reply, read_tools

__all__ = ["Move", "World", "world_of"]

MOST_TURNS = 600
"""Kinds of turns that are told apart by the tools they call; more can't be searched."""


@frozen
class Move:
    """One thing that may happen."""

    event: Event
    charged: Mapping[str, float] | None = None
    """What the request in hand turns out to have cost, where nobody reports it: fields of the ledger."""


@frozen
class World:
    """What may be answered to each effect."""

    deadline: float
    times: tuple[float, ...]
    reads: Reads
    listings: tuple[Event, ...]
    replies: tuple[ModelReplied, ...]
    """Replies to a working request; to a request for a summary, one of each that matters there."""
    summaries: tuple[ModelReplied, ...]
    _made: dict[Any, tuple[Any, tuple[Move, ...]]] = field(factory=dict, eq=False)

    def moves(self, run: Run) -> Sequence[Move]:
        """Return what may happen to *run* next, the calmest first; nothing if it is over."""
        effect, ledger = next_effect(run), run.ledger
        if effect is None:
            return ()
        calls = run.pending.calls if run.pending is not None else ()
        # What the moves are made of; runs that share it have the same, so that few are made anew
        key = (
            type(effect),
            run.state is SUMMARIZE,
            id(calls),
            ledger.research_tools,
            ledger.seconds,
            ledger.stale,
            ledger.tokens,
            ledger.cost_usd,
        )
        known = self._made.get(key)
        if known is None:
            moves = tuple(self._moves(effect, calls, ledger))
            known = self._made[key] = (calls, moves)
        return known[1]

    def _moves(self, effect: Effect, calls: Sequence[ToolCall], ledger: Ledger) -> Iterator[Move]:
        times = [ledger.seconds, *(time for time in self.times if time > ledger.seconds)]
        late = ledger.seconds >= self.deadline
        for now in () if late else times:
            match effect:
                case ListTools():
                    yield from (Move(evolve(event, now=now)) for event in self.listings)
                case AskModel(purpose):
                    replies = self.summaries if purpose is SUMMARIZE else self.replies
                    yield from (Move(each) for reply in replies for each in self._reporting(reply, now, ledger))
                    yield from self._failures(now, ledger)
                case RunTools():
                    yield from (Move(event) for event in self._results(calls, now, ledger))
        for now, cancelled in product(times, (False, True)):
            event = interrupted(_told(calls, ok=False), now=now, cancelled=cancelled, started=not late)
            if isinstance(effect, AskModel) and not late:
                yield from self._charging(event, ledger)
                if self.reads.reads("model_calls"):
                    yield Move(evolve(event, started=False))
            else:
                yield Move(event)

    def _reporting(self, reply: ModelReplied, now: float, ledger: Ledger) -> Iterator[ModelReplied]:
        for tokens in self._levels("tokens", ledger.tokens):
            for cost in self._levels("cost_usd", ledger.cost_usd):
                reported = max(0, int(tokens) - ledger.tokens)
                paid = _left(ledger.cost_usd, cost) if self.reads.reads("cost_usd") else None
                yield evolve(reply, now=now, prompt_tokens=reported, completion_tokens=0, cost_usd=paid)

    def _charging(self, event: ModelFailed | Interrupted, ledger: Ledger) -> Iterator[Move]:
        if not (self.reads.reads("tokens") or self.reads.reads("cost_usd")):
            yield Move(event)
            return
        # `ledger` holds the least that the request can cost
        for tokens in self._levels("tokens", ledger.tokens + ledger.request_tokens):
            for cost in self._levels("cost_usd", ledger.cost_usd + ledger.request_cost_usd):
                dollars = _left(ledger.cost_usd, cost)
                yield Move(event, {"request_tokens": int(tokens) - ledger.tokens, "request_cost_usd": dollars})

    def _levels(self, name: str, least: float) -> list[float]:
        """Return *least* and the values above it that guards tell apart."""
        return [least, *(cut for cut in self.reads.cuts.get(("ledger", name), ()) if cut > least)]

    def _failures(self, now: float, ledger: Ledger) -> Iterator[Move]:
        yield from self._charging(ModelFailed(now, False, "error"), ledger)
        for at in self._levels("retry_at", now):
            after = _left(now, at) if at > now else None
            yield from self._charging(ModelFailed(now, True, "error", retry_after=after), ledger)

    def _results(self, calls: Sequence[ToolCall], now: float, ledger: Ledger) -> Iterator[ToolsFinished]:
        if not calls:  # a policy may run the calls of a reply that has none: just what the driver makes of it
            yield ToolsFinished(now, (), failed=False, fresh=False, stale=0, repeats=0)
            return
        for ok in (False,) if all(call.not_run for call in calls) else (True, False):
            results = _told(calls, ok=ok)
            for listing, (fresh, stale, repeats) in product(self._listed_anew(ledger), tuple(self._news(ledger))):
                yield ToolsFinished(now, results, not ok, fresh, stale, repeats, listing=listing)

    def _listed_anew(self, ledger: Ledger) -> Iterator[ToolsListed | None]:
        """Yield None, and a new list of tools if a guard would see it: research tools are gone, or are there now."""
        yield None
        if "research_tools" in self.reads.flags:
            listed = (each for each in self.listings if isinstance(each, ToolsListed))
            yield from (each for each in listed if bool(each.research) is not ledger.research_tools)

    def _news(self, ledger: Ledger) -> Iterator[tuple[bool, int, int]]:
        """Yield what may be new about results: whether any is, how many are not, how often the last was seen."""
        yield True, 0, 1
        seen = [2, *(int(cut) for cut in self.reads.cuts.get(("ledger", "repeats"), ()) if cut > 2)]
        stale = [1, *(int(cut) for cut in self.reads.cuts.get(("ledger", "stale"), ()) if cut > 1)]
        if not (self.reads.reads("repeats") or self.reads.reads("stale")):
            return
        for repeats in seen:
            yield from ((True, each, repeats) for each in stale)
            above = [each for each in (*stale, ledger.stale + 1) if each > ledger.stale]
            yield from ((False, each - ledger.stale, repeats) for each in sorted(set(above)))


def world_of(config: AgentConfig, reads: Reads) -> World:
    """Return the world under the limits of *config*, as far as guards that read *reads* can tell it apart.

    Raises:
        ConfigError: the table counts the calls of too many tools, for so many calls a turn.
    """
    deadline = config.max_wallclock_seconds
    times = {0.0, deadline, *reads.cuts.get(("ledger", "seconds"), ())} - {inf}
    counted = reads.counted_tools()
    work, unknown = _unlike("work", counted), _unlike("no_such_tool", counted)
    offered = (work, _unlike("search", counted), *counted)
    kinds: list[tuple[Mapping[str, Any], str]] = [
        *(({"tool_calls": [_call(name) for name in turn]}, "tool_calls") for turn in _turns(config, reads, work)),
        ({"tool_calls": [_call(unknown)]}, "tool_calls"),
        ({"content": "It is so."}, "stop"),
        ({"content": "I am not sure."}, "stop"),
        ({"content": " "}, "stop"),
        ({"content": "It is"}, "length"),
        ({"refusal": "No."}, "stop"),
    ]
    replies = tuple(_reply(config, offered, message, finish) for message, finish in kinds)
    return World(deadline, tuple(sorted(times)), reads, _listings(offered), replies, tuple(replies[-5:-4]))


def _left(value: float, end: float) -> float:
    """Return what *value* lacks to *end*, so that the sum of both is no less, however it is rounded."""
    lacks = max(0.0, end - value)
    while value + lacks < end:
        lacks = nextafter(lacks, inf)
    return lacks


def _unlike(name: str, taken: Sequence[str]) -> str:
    """Return *name*, or one like it that is not *taken*: calls of it must count as nothing else."""
    return name if name not in taken else _unlike(f"{name}_", taken)


def _turns(config: AgentConfig, reads: Reads, work: str) -> list[tuple[str, ...]]:
    """Return the calls of each kind of turn that guards tell apart."""
    most, tools = config.max_tools_per_iter, reads.counted_tools()
    totals = range(1, most + 1) if reads.reads("tool_calls") else (most,)
    turns = []
    kinds = []
    for tool in tools:
        # As many calls as the last cut are as good as any number above them; the most is what a bound is about
        last = int(max(reads.cuts["calls", tool], default=0))
        kinds.append(sorted({*range(min(last, most) + 1), most}))
    for counts in product(*kinds):
        for total in totals:
            if sum(counts) <= total:
                named = [name for name, count in zip(tools, counts, strict=True) for _ in range(count)]
                turns.append((*named, *(work for _ in range(total - len(named)))))
            if len(turns) > MOST_TURNS:
                raise ConfigError(
                    f"the table counts the calls of {', '.join(tools)}: with max_tools_per_iter={most} that makes more"
                    f" than {MOST_TURNS} kinds of turns; count fewer tools, or lower max_tools_per_iter"
                )
    return turns


def _call(name: str) -> dict[str, Any]:
    return {"function": {"name": name}}


def _tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


def _listings(offered: Sequence[str]) -> tuple[Event, ...]:
    listed = []
    for research in ((), offered[1:2]):
        read = read_tools([_tool(name) for name in offered], now=0.0, backend="backend", research=research)
        assert isinstance(read, ToolsListed)  # a list of tools is what it is given
        listed.append(evolve(read, size=0))
    return (ToolsUnavailable(0.0, "backend", "error"), *listed)


def _reply(config: AgentConfig, offered: Sequence[str], message: Mapping[str, Any], finish: str) -> ModelReplied:
    reply = read_reply(
        {
            "choices": [{"message": message, "finish_reason": finish}],
            "usage": {"prompt_tokens": 0, "completion_tokens": 0},
        },
        now=0.0,
        offered=offered,
        max_calls=config.max_tools_per_iter,
    )
    assert isinstance(reply, ModelReplied)  # a message is what it is given
    return reply


def _told(calls: Sequence[ToolCall], *, ok: bool) -> tuple[ToolResult, ...]:
    ran = [ToolResult("x", ok, call_id=call.id, name=call.name) for call in calls if not call.not_run]
    return tuple(ran) or not_run_results(calls)


def charged(ledger: Ledger, move: Move) -> Ledger:
    """Return *ledger* with the cost of the request in hand that *move* makes it turn out to have."""
    if move.charged is None:
        return ledger
    new = clone(ledger)
    for name, value in move.charged.items():
        setattr(new, name, value)
    return new
