"""Events as Python code, ready to paste, and as short lines to read."""

from collections.abc import Sequence
from enum import Enum

from attrs import NOTHING, Factory, fields, has

from agent_fsm.protocol import Event, Interrupted, ModelFailed, ModelReplied, ToolsFinished

__all__ = ["code", "pasted", "short"]


def code(value: object) -> str:
    """Return *value*, an event or a part of one, as an expression; fields at their defaults are left out."""
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, tuple):
        inner = ", ".join(map(code, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, list):
        return f"[{', '.join(map(code, value))}]"
    if has(type(value)):
        given = []
        positional = True
        for each in fields(type(value)):  # type: ignore[arg-type] # an attrs class, as asked
            held = getattr(value, each.name)
            default = each.default.factory() if isinstance(each.default, Factory) else each.default  # type: ignore[arg-type] # attrs types it as a value
            if default is not NOTHING and held == default:
                positional = False
            elif positional:
                given.append(code(held))
            else:
                given.append(f"{each.name}={code(held)}")
        return f"{type(value).__name__}({', '.join(given)})"
    return repr(value)


def pasted(events: Sequence[Event], name: str = "events") -> str:
    """Return *events* as a list to paste, equal calls and results folded into names."""
    lines = ",\n    ".join(map(code, events))
    return f"{name} = [\n    {lines},\n]" if events else f"{name} = []"


def short(event: Event) -> str:
    """Return *event* as a short line."""
    when = f" at {event.now:g} s" if event.now else ""
    match event:
        case ModelReplied():
            calls = sum(not call.not_run for call in event.calls)
            said = (
                f"asks for {calls} calls"
                if calls
                else f"said {event.said}"
                if not event.calls
                else "asks for an unknown tool"
            )
            spent = f", {event.prompt_tokens:,} tokens" if event.prompt_tokens else ""
            return f"ModelReplied: {said}{spent}{when}"
        case ModelFailed():
            wait = f", retry after {event.retry_after:g} s" if event.retry_after else ""
            return f"ModelFailed: {'retryable' if event.retryable else 'fatal'}{wait}{when}"
        case ToolsFinished():
            news = "" if event.fresh else f", nothing new, {event.stale} in a row"
            return f"ToolsFinished: {'failed' if event.failed else 'succeeded'}{news}{when}"
        case Interrupted():
            return f"Interrupted: {'cancelled' if event.cancelled else 'timed out'}{when}"
        case _:
            return f"{type(event).__name__}{when}"
