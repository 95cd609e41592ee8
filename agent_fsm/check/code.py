"""Events as Python code, ready to paste, and as short lines to read."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import Enum

from attrs import NOTHING, Factory, fields, has

from agent_fsm.protocol import Event, Interrupted, ModelFailed, ModelReplied, ToolsFinished

__all__ = ["WIDTH", "classes", "code", "pasted", "short"]

WIDTH = 100
"""Characters of a line; an expression that is longer stands on several."""


def code(value: object, indent: int = 0, column: int = 0) -> str:
    """Return *value*, an event or a part of one, as an expression; fields at their defaults are left out.

    Args:
        value: attrs instances, enums, tuples, lists, dicts, and whatever else has a `repr` that makes it.
        indent: of the line on which it begins.
        column: where on that line it begins.
    """
    opening, parts, closing = _taken_apart(value)
    if not parts:
        return opening + closing
    line = opening + ", ".join(f"{name}{code(part)}" for name, part in parts) + _comma(value, parts) + closing
    if max(column, indent) + len(line) < WIDTH and "\n" not in line:
        return line
    inner = indent + 4
    lines = [f"{' ' * inner}{name}{code(part, inner, inner + len(name))},\n" for name, part in parts]
    return f"{opening}\n{''.join(lines)}{' ' * indent}{closing}"


def _comma(value: object, parts: Sequence[object]) -> str:
    return "," if isinstance(value, tuple) and len(parts) == 1 else ""


def _taken_apart(value: object) -> tuple[str, list[tuple[str, object]], str]:
    """Return how the expression for *value* begins, its parts with what stands before each, and how it ends."""
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}", [], ""
    if isinstance(value, tuple):
        return "(", [("", each) for each in value], ")"
    if isinstance(value, list):
        return "[", [("", each) for each in value], "]"
    if isinstance(value, Mapping):
        return "{", [(f"{_plain(key)}: ", each) for key, each in value.items()], "}"
    if has(type(value)):
        return f"{type(value).__name__}(", _given(value), ")"
    return _plain(value), [], ""


def _plain(value: object) -> str:
    text = repr(value)
    return f'"{text[1:-1]}"' if text.startswith("'") and '"' not in text else text


def _given(value: object) -> list[tuple[str, object]]:
    """Return the arguments that make *value*: the first ones by position, up to one that is left out or a switch."""
    given: list[tuple[str, object]] = []
    positional = True
    for each in fields(type(value)):  # type: ignore[arg-type] # an attrs class, as asked
        held = getattr(value, each.name)
        default = each.default.factory() if isinstance(each.default, Factory) else each.default  # type: ignore[arg-type] # attrs types it as a value
        if default is not NOTHING and held == default:
            positional = False
            continue
        positional = positional and not each.kw_only and not isinstance(held, bool)
        given.append(("" if positional else f"{each.name}=", held))
    return given


def pasted(events: Sequence[Event], name: str = "events") -> str:
    """Return *events* as a list to paste. An event that occurs again is given a name first."""
    written = [code(event) for event in events]
    again = [text for text, times in Counter(written).items() if times > 1]
    names = {text: _name(events[written.index(text)], number) for number, text in enumerate(again, 1)}
    lines = [f"{called} = {text}" for text, called in names.items()]
    items = [f"    {names.get(text) or code(event, 4)},\n" for text, event in zip(written, events, strict=True)]
    return "\n".join((*lines, f"{name} = [\n{''.join(items)}]" if events else f"{name} = []"))


def _name(event: Event, number: int) -> str:
    return f"{re.sub('(?<!^)(?=[A-Z])', '_', type(event).__name__).lower()}_{number}"


def classes(value: object) -> set[type]:
    """Return the classes that must be imported for the expression `code(value)`."""
    found = {type(value)} if isinstance(value, Enum) or has(type(value)) else set()
    for _, part in _taken_apart(value)[1]:
        found |= classes(part)
    return found


def short(event: Event) -> str:
    """Return *event* as a short line."""
    when = f" at {event.now:g} s" if event.now else ""
    match event:
        case ModelReplied():
            calls = sum(not call.not_run for call in event.calls)
            said = (
                f"asks for {calls} call{'' if calls == 1 else 's'}"
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
