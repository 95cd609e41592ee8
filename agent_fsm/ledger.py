"""The ledger: all that a guard sees. Counts, flags and what the last event amounted to; no text and no digests."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from attrs import define, fields

from agent_fsm.config import Limits
from agent_fsm.protocol import PLAN, Ended, Said, State, StopReason

__all__ = ["Ledger", "clone", "cloner"]

T = TypeVar("T")

_NO_COUNTS: Mapping[str, int] = MappingProxyType({})


@define
class Ledger:
    """What a run has spent and what has just happened. A step writes to a clone of it and to nothing else."""

    limits: Limits
    seconds: float = 0.0
    """Seconds of the run at the last event; never falls."""
    iterations: int = 0
    """Requests begun from Plan, Repair and Research."""
    attempts: int = 0
    """Failures of the request that is being asked."""
    retry_at: float = 0.0
    """Seconds of the run before which that request must not be sent again."""
    failures: int = 0
    """Failed turns in a row."""
    hops: int = 0
    """Requests begun from Research."""
    nudges: int = 0
    """Times that the model was told that it repeats itself."""
    stale: int = 0
    """Tool results in a row that brought no (call, result) pair not seen before."""
    repeats: int = 0
    """How often the last pair has been seen."""
    turns: int = 0
    """Requests begun from Plan, Repair and Research since the last summary."""
    summaries: int = 0
    """Periodic summaries begun."""
    model_calls: int = 0
    """Requests sent, retries and summaries included."""
    tool_calls: int = 0
    """Calls that were started."""
    said: Said = Said.NOTHING
    ended: Ended = Ended.WELL
    asking: State = PLAN
    """The state that asked last."""
    ending: StopReason | None = None
    """The reason already decided, while the closing summary is written."""
    research_tools: bool = False
    """Whether there are tools that look things up."""
    tokens: int = 0
    """Tokens charged: as reported, or the worst case where nothing was reported."""
    cost_usd: float = 0.0
    """US dollars charged, like `tokens`."""
    request_tokens: int = 0
    """Worst case of the request that is being asked."""
    request_cost_usd: float = 0.0
    tokens_needed: int = 0
    """`tokens` if one more request, working or for a periodic summary, and the closing one where it is wanted, took
    their worst case."""
    cost_needed_usd: float = 0.0
    closing_tokens_needed: int = 0
    """`tokens` if the closing request took its worst case."""
    closing_cost_needed_usd: float = 0.0
    counters: Mapping[str, int] = _NO_COUNTS
    """Counters that a table's rows declare, by name; one that is missing is 0. Replaced, never written to: clones
    share it."""
    calls: Mapping[str, int] = _NO_COUNTS
    """Calls that were started, by the tool's name, of the tools that a guard of the table reads. Like `counters`."""


def cloner(cls: type[T]) -> Callable[[T], T]:
    # attrs.evolve of as many fields takes 14 us, this 0.8: it is called for every event of every run.
    lines = "\n".join(f"    new.{each.name} = old.{each.name}" for each in fields(cls))  # type: ignore[arg-type] # an attrs class
    space: dict[str, Any] = {"cls": cls, "blank": object.__new__}
    exec(f"def clone(old):\n    new = blank(cls)\n{lines}\n    return new", space)
    function: Callable[[T], T] = space["clone"]
    return function


clone: Callable[[Ledger], Ledger] = cloner(Ledger)
