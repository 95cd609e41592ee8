"""Whether a tool result is news. The ledger holds no text: this is decided beside it and arrives in the event."""

import re
from collections.abc import Sequence
from typing import TypeAlias

from agent_fsm.protocol import ToolCall, ToolResult

__all__ = ["Pair", "novelty"]

Pair: TypeAlias = int
"""The hash, of 64 bits, of a tool's name, a call's arguments and its result's text; good for this process only."""

_VOLATILE = re.compile(r'"seconds": ?[0-9.eE+-]+')


def novelty(seen: dict[Pair, int], calls: Sequence[ToolCall], results: Sequence[ToolResult]) -> tuple[bool, int, int]:
    """Count each (call, result) pair of a turn in *seen*, and return what a `ToolsFinished` says of it.

    Returns:
        Whether any pair was new; how many at the end of the turn, in a row, were not; how often the last one has now
        been seen. How long a call took makes no result new.
    """
    fresh, stale, repeats = False, 0, 0
    for call, result in zip(calls, results, strict=True):
        text = _VOLATILE.sub("", result.text) if '"seconds"' in result.text else result.text
        pair = hash((call.name, call.wrote or call.arguments, text))
        repeats = seen[pair] = seen.get(pair, 0) + 1
        if repeats == 1:
            fresh, stale = True, 0
        else:
            stale += 1
    return fresh, stale, repeats
