"""Messages as providers take them: their sizes, how they are made, and which of the caller's are taken.

Sizes are upper bounds in tokens: no tokenizer makes more tokens of a text than it has UTF-8 bytes, and every message
costs a few more for its frame.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from agent_fsm.errors import MessagesError
from agent_fsm.protocol import Message, ToolCall, ToolResult

__all__ = [
    "FRAME_TOKENS",
    "LEGAL_NAME",
    "PART_TOKENS",
    "admit",
    "assistant_message",
    "cut",
    "cut_bytes",
    "decode_object",
    "encodable",
    "message_size",
    "not_run_results",
    "results_size",
    "text_size",
    "tool_message",
    "user_message",
    "value_size",
]

FRAME_TOKENS = 16
"""What a message or a call costs besides its text: role, separators, ids of the provider's own."""
PART_TOKENS = 50_000
"""What an image or a file counts as, a file's data if they are more: the dearest way to count an image that we know of
makes some 48,000 tokens of it (gpt-4o-mini, high detail)."""

LEGAL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
"""Names of functions and ids of calls that every provider takes."""


# Sizes and texts


def text_size(text: str) -> int:
    """Return an upper bound of the tokens in *text*: its length in UTF-8 bytes."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def value_size(value: object) -> int:
    """Return an upper bound of the tokens in a JSON value: its length with everything escaped."""
    return text_size(value) if isinstance(value, str) else len(json.dumps(value))


def _content_size(content: object) -> int:
    if not isinstance(content, list):
        return 0 if content is None else value_size(content)
    return sum(FRAME_TOKENS + _part_size(part) for part in content)


def _part_size(part: Mapping[str, Any]) -> int:
    if part.get("type") in _TEXT_PARTS:
        return value_size(part)
    if part.get("type") in _IMAGE_PARTS:
        return PART_TOKENS
    return max(PART_TOKENS, value_size(part))  # a file by its name may be long; its data are no longer than they are


_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_IMAGE_PARTS = ("image_url", "image", "input_image")


def message_size(message: Mapping[str, Any]) -> int:
    """Return an upper bound of the tokens that *message* adds to a request."""
    content = message.get("content")
    if len(message) == 2 and isinstance(content, str):
        return FRAME_TOKENS + text_size(content)
    size = FRAME_TOKENS * (1 + len(message.get("tool_calls") or ()))
    for key, value in message.items():
        if key != "role":
            size += _content_size(value) if key == "content" else value_size(value)
    return size


def encodable(text: str) -> str:
    """Return *text* with `?` in place of lone surrogates, which no provider takes."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def cut(text: str, chars: int) -> str:
    """Return *text* if it has at most *chars* characters, else its head and tail with what was cut stated."""
    if len(text) <= chars:
        return text
    head = chars // 2
    tail = chars - head
    return f"{text[:head]}\n[... {len(text) - chars:,} characters cut ...]\n{text[-tail:]}"


def cut_bytes(text: str, size: int) -> str:
    """Return *text* cut to head and tail so that it has at most *size* UTF-8 bytes."""
    if text_size(text) <= size:
        return text
    note = "\n[... cut ...]\n"
    raw = text.encode("utf-8", "replace")
    half = max(0, (size - len(note)) // 2)
    return raw[:half].decode("utf-8", "ignore") + note + (raw[-half:].decode("utf-8", "ignore") if half else "")


# Messages


def user_message(text: str) -> Message:
    """Return *text* as the user's."""
    return {"role": "user", "content": text}


def assistant_message(text: str, calls: Sequence[ToolCall] = ()) -> Message:
    """Return the assistant message with *text* and *calls*; one of the two must not be empty."""
    if not calls:
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": text or None, "tool_calls": [call.as_openai() for call in calls]}


def tool_message(result: ToolResult) -> Message:
    """Return the answer to a call."""
    return {"role": "tool", "tool_call_id": result.call_id, "content": result.text}


def not_run_results(calls: Iterable[ToolCall], why: str = "") -> tuple[ToolResult, ...]:
    """Return the answers to *calls*, none of which were run: because of *why*, or each for its own reason."""
    return tuple(
        ToolResult(f"not run: {why or call.not_run}", ok=False, call_id=call.id, name=call.name, ran=False)
        for call in calls
    )


def results_size(results: Sequence[ToolResult]) -> int:
    """Return an upper bound of the tokens that the tool messages of *results* add."""
    return sum([FRAME_TOKENS + 64 + text_size(result.text) for result in results])


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):  # 1e999 is JSON, but what it stands for can't be sent on
        _refuse(digits)
    return number


# Built once: json.loads with any argument builds a decoder for each call. NaN and Infinity are Python's, not JSON's.
_decode = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite).decode


def decode_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object in *text*; None if it is anything else."""
    try:
        value = _decode(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


# The caller's messages

_ROLES = ("system", "developer", "user", "assistant", "tool")


def admit(messages: Sequence[Mapping[str, Any]]) -> tuple[tuple[Message, ...], list[tuple[Message, ...]]]:
    """Return copies of the caller's messages: the system messages at the front, and the rest in units.

    Raises:
        MessagesError: no provider accepts these messages; it says which one is wrong and what would be right.
    """
    if isinstance(messages, str | Mapping) or not messages:
        raise MessagesError(
            "messages must be a list with at least one message, such as {'role': 'user', 'content': '...'}"
        )
    checked = [_checked(f"message {index}", message) for index, message in enumerate(messages)]
    if checked[-1]["role"] not in ("user", "tool"):
        raise MessagesError(
            f"message {len(checked) - 1} is the last and from {checked[-1]['role']!r};"
            " the last must be from the user or a tool"
        )
    lead = next(at for at, message in enumerate(checked) if message["role"] not in ("system", "developer"))
    units = list(_grouped(checked, lead))
    if not any(unit[0]["role"] == "user" for unit in units):
        raise MessagesError("no message is from the user; there must be one that says what is wanted")
    return tuple(checked[:lead]), units


def _checked(which: str, message: object) -> Message:
    if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
        shown = cut(repr(message), 200) if isinstance(message, Mapping) else type(message).__name__
        raise MessagesError(f"{which} is no mapping with a role of {', '.join(_ROLES)}: {shown}")
    copy = _sendable(which, message)
    if len(copy) == 2 and isinstance(copy.get("content"), str) and copy["content"].strip() and copy["role"] != "tool":
        return copy  # the usual case
    role, content, calls = copy["role"], copy.get("content"), copy.get("tool_calls")
    if calls is not None and (role != "assistant" or not isinstance(calls, list) or not calls):
        raise MessagesError(f"{which} has tool_calls that are no list of calls by the assistant; leave them out")
    if role == "tool" and content == "":
        return copy
    if not _says_something(content) and not (calls and content in (None, "")):
        raise MessagesError(
            f"{which} is from {role!r} and its content is {cut(repr(content), 100)}; it must be a text that is not"
            " blank or a list of parts" + (", or leave the message out" if role == "assistant" else "")
        )
    return copy


def _sendable(which: str, message: Mapping[str, Any]) -> Message:
    """Return a copy that shares nothing with the caller's."""
    content = message.get("content")
    try:
        if len(message) == 2 and isinstance(content, str):
            content.encode()
            return dict(message)
        text = json.dumps(dict(message), allow_nan=False, ensure_ascii=False)
        text.encode()
        copy: Message = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:  # a lone surrogate is a ValueError, too
        raise MessagesError(f"{which} can't be sent as JSON: {error}") from None
    return copy


def _says_something(content: object) -> bool:
    if isinstance(content, str):
        return bool(content.strip())
    if not isinstance(content, list) or not content:
        return False
    return all(isinstance(part, dict) and str(part.get("text", "image or file")).strip() for part in content)


def _grouped(messages: list[Message], start: int) -> Iterator[tuple[Message, ...]]:
    """Yield the units from *start*. Calls and answers are paired by adjacency: ids repeat in real recordings."""
    at = start
    while at < len(messages):
        message = messages[at]
        if message["role"] == "tool":
            raise MessagesError(
                f"message {at} answers a tool call, but none is open; leave it out or put the call before it"
            )
        calls = message.get("tool_calls") or []
        _check_calls(at, calls)
        answers = messages[at + 1 : at + 1 + len(calls)]
        for offset, call in enumerate(calls):
            _check_answer(at, offset, call, answers)
        yield (message, *answers)
        at += 1 + len(calls)


def _check_calls(at: int, calls: list[Any]) -> None:
    ids = [call.get("id") if isinstance(call, dict) else None for call in calls]
    for call, call_id in zip(calls, ids, strict=True):
        if not isinstance(call_id, str) or not LEGAL_NAME.match(call_id) or ids.count(call_id) > 1:
            raise MessagesError(
                f"message {at} has a tool call with id {call_id!r};"
                " ids are unique in a message and 1 to 64 of [A-Za-z0-9_-]"
            )
        function = call.get("function")
        if call.get("type") != "function" or not isinstance(function, dict):
            raise MessagesError(f"message {at} has a tool call without 'type': 'function' and a function")
        name, arguments = function.get("name"), function.get("arguments")
        if not isinstance(name, str) or not LEGAL_NAME.match(name):
            raise MessagesError(f"message {at} calls a function named {name!r}; a name is 1 to 64 of [A-Za-z0-9_-]")
        if not isinstance(arguments, str) or decode_object(arguments) is None:
            raise MessagesError(f"message {at} calls {name} with arguments that are not a JSON object in a string")


def _check_answer(at: int, offset: int, call: Mapping[str, Any], answers: list[Message]) -> None:
    answer = answers[offset] if offset < len(answers) else {}
    if answer.get("role") != "tool" or answer.get("tool_call_id") != call["id"]:
        raise MessagesError(
            f"message {at} has a tool call {call['id']!r} that message {at + 1 + offset} does not answer;"
            " each call needs one tool message, directly after it and in order"
        )
