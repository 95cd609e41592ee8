"""What the model asked of a local tool: read, or refused in words for the model."""

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["RefusedError", "check_program", "read_arguments", "read_call", "read_text", "shown", "split"]

_SHOWN_CHARS = 100
"""Characters of the model's own words that a refusal repeats."""


class RefusedError(Exception):
    """The call can't be run; says in words for the model why, and what would be right."""


def shown(value: object) -> str:
    """Return *value* as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def _member(thing: Any, name: str) -> Any:
    return thing.get(name) if isinstance(thing, Mapping) else getattr(thing, name, None)


def read_call(call: Any) -> tuple[str, Mapping[str, Any]]:
    """Return the name and the arguments of a tool call.

    Raises:
        RefusedError: it is none.
    """
    function = _member(call, "function")
    name, arguments = _member(function, "name"), _member(function, "arguments")
    if not isinstance(name, str):
        raise RefusedError(f"the call names no tool: {shown(call)}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise RefusedError(f"the arguments are not valid JSON: {error}") from None
    if not isinstance(arguments, Mapping):
        raise RefusedError(f"the arguments must be a JSON object, not {shown(arguments)}")
    return name, arguments


def read_arguments(arguments: Mapping[str, Any], required: str, ceiling_s: float) -> tuple[str, float, str]:
    """Return the text of the required argument, the seconds to allow, and a note if they are fewer than asked for.

    Raises:
        RefusedError: an argument is missing, unknown, or of the wrong kind.
    """
    unknown = [name for name in arguments if name not in (required, "timeout_s")]
    if unknown:
        raise RefusedError(f"unknown argument {shown(unknown[0])}; the arguments are {required} and timeout_s")
    text = read_text(arguments, required)
    if "\0" in text:
        raise RefusedError(f"{required} must not contain NUL characters")
    asked = arguments.get("timeout_s")
    if asked is None:  # models write null for what they leave out
        return text, ceiling_s, ""
    if isinstance(asked, bool) or not isinstance(asked, int | float) or not 0 < asked < math.inf:
        raise RefusedError(f"timeout_s must be a number of seconds > 0, not {shown(asked)}")
    if asked > ceiling_s:
        return text, ceiling_s, f"timeout_s was lowered to {ceiling_s:g} s, the most that is allowed"
    return text, float(asked), ""


def read_text(arguments: Mapping[str, Any], name: str) -> str:
    """Return the text of that argument.

    Raises:
        RefusedError: there is none, or it can't be encoded.
    """
    if name not in arguments:
        raise RefusedError(f"the argument {name} is missing")
    value = arguments[name]
    if not isinstance(value, str):
        raise RefusedError(f"{name} must be a string, not {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RefusedError(f"{name} must be valid Unicode: {error.reason} at position {error.start}") from None
    return value


_QUOTED = re.compile(r"""\\.|'[^']*'|"(?:\\.|[^"\\])*\"""", re.DOTALL)
_OPERATOR = re.compile(r"\|\|?|&&?|;|>>?|<<?|\$\(|`|[\r\n]")


def split(command: str) -> list[str]:
    """Return the words of a command line, of which there is at least one.

    Raises:
        RefusedError: it can't be split, or means something to a shell only.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise RefusedError(f"cmd can't be split into words: {error}") from None
    if not words:
        raise RefusedError("cmd is empty")
    # shlex would pass `hello; ls` on as two harmless-looking words, and the model would believe that ls was run.
    operator = _OPERATOR.search(_QUOTED.sub("_", command.strip()))
    if operator:
        sign = operator.group()
        shown = f"`{sign}`" if sign.strip() else "a line break"
        raise RefusedError(
            f"there is no shell, so {shown} means nothing here: run one program per call, "
            "and quote the character if it belongs to an argument"
        )
    return words


def check_program(words: Sequence[str], allowed: Sequence[str], rules: Mapping[str, Sequence[str]]) -> None:
    """Check that a command's first word is *allowed*, and that the others match a rule where there are rules for it.

    Raises:
        RefusedError: it isn't, or one of them doesn't.
    """
    program, *arguments = words
    if program not in allowed:
        names = ", ".join(allowed) or "none"
        raise RefusedError(f"{shown(program)} is not allowed; allowed programs, by exactly these names: {names}")
    patterns = rules.get(program)
    if patterns is None:
        return
    for argument in arguments:
        if not any(re.fullmatch(pattern, argument) for pattern in patterns):
            wanted = "; ".join(patterns) or "none"
            raise RefusedError(
                f"{program} may not be given the argument {shown(argument)}; "
                f"each argument must match one of these regular expressions as a whole: {wanted}"
            )
