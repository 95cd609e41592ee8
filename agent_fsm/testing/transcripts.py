"""The rules of OpenAI and Anthropic for a conversation: what in a list of messages either would refuse.

Each function returns faults in words, with the message's position; an empty list means that the provider takes it. A
provider's rules are here as far as they are documented or known from its error messages, and where the two differ on
what a call may be named, the narrower one holds for both.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from attrs import define, field

__all__ = ["anthropic_faults", "openai_faults", "request_faults"]

_LEGAL = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
_PARTS = {
    "system": frozenset({"text"}),
    "developer": frozenset({"text"}),
    "tool": frozenset({"text"}),
    "user": frozenset({"text", "image_url", "input_audio", "file"}),
    "assistant": frozenset({"text", "refusal"}),
}
"""Roles, and the content parts that OpenAI takes from each."""


def request_faults(messages: Sequence[Any]) -> list[str]:
    """Return what either provider would refuse in *messages* as a request: its last message is the user's or a tool's.

    A trailing assistant message is a prefill to some providers and an error to others.
    """
    faults = openai_faults(messages) + anthropic_faults(messages)
    last = messages[-1] if messages else None
    role = last.get("role") if isinstance(last, Mapping) else None
    if role not in ("user", "tool"):
        faults.append(f"message {len(messages) - 1} is the last and from {role!r}, not from the user or a tool")
    return faults


# OpenAI


def openai_faults(messages: Sequence[Any]) -> list[str]:
    """Return what OpenAI would refuse in *messages*, or what agent_fsm promises beyond that.

    The promises: answers stand in the order of their calls, arguments are a JSON object, an assistant says something.
    """
    if not isinstance(messages, list | tuple) or not messages:
        return ["there are no messages"]
    faults = [fault for at, message in enumerate(messages) for fault in _message_faults(at, message)]
    return faults + list(_pairing_faults(messages))


def _message_faults(at: int, message: object) -> Iterator[str]:
    if not isinstance(message, Mapping):
        yield f"message {at} is {_shown(message)}, no mapping"
        return
    role = message.get("role")
    if not isinstance(role, str) or role not in _PARTS:
        yield f"message {at} has the role {_shown(role)}"
        return
    where = f"message {at} ({role})"
    if (reason := _unsendable(message)) is not None:
        yield f"{where} can't be sent as JSON: {reason}"
    name = message.get("name")
    if name is not None and not _is_legal(name):
        yield f"{where} has the name {_shown(name)}; a name is 1 to 64 of [A-Za-z0-9_-]"
    if "tool_calls" in message and role != "assistant":
        yield f"{where} has tool_calls; only the assistant has"
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        yield f"{where} has the tool_call_id {_shown(message.get('tool_call_id'))}"
    calls = message.get("tool_calls")
    if role == "assistant":
        yield from _calls_faults(where, message)
        if calls and message.get("content") is None:
            return
    yield from _content_faults(where, role, message.get("content"))


def _content_faults(where: str, role: str, content: object) -> Iterator[str]:
    if isinstance(content, str):
        return
    if not isinstance(content, list) or not content:
        yield f"{where} has the content {_shown(content)}, neither a string nor a list of parts"
        return
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in _PARTS[role]:
            yield f"{where} has a content part {number} of type {_shown(kind)}"
        elif kind == "text" and not isinstance(part.get("text"), str):
            yield f"{where} has a text part {number} without text"
        elif kind == "image_url" and not _is_image(part.get("image_url")):
            yield f"{where} has an image part {number} without a url"


def _is_image(image: object) -> bool:
    return isinstance(image, Mapping) and isinstance(image.get("url"), str)


def _calls_faults(where: str, message: Mapping[str, Any]) -> Iterator[str]:
    calls = message.get("tool_calls")
    if calls is None:
        if not _says_something(message.get("content")):
            yield f"{where} has neither calls nor text that is more than white space"
        return
    if not isinstance(calls, list) or not calls:
        yield f"{where} has the tool_calls {_shown(calls)}; leave them out where there are none"
        return
    ids = [call.get("id") if isinstance(call, Mapping) else None for call in calls]
    for number, call in enumerate(calls):
        yield from _call_faults(f"{where} call {number}", call)
        if ids[number] in ids[:number]:
            yield f"{where} call {number} has the id {_shown(ids[number])} of an earlier one"


def _says_something(content: object) -> bool:
    if isinstance(content, list):
        texts = [part.get("text") or part.get("refusal") for part in content if isinstance(part, Mapping)]
        return any(isinstance(text, str) and text.strip() for text in texts)
    return isinstance(content, str) and bool(content.strip())


def _call_faults(where: str, call: object) -> Iterator[str]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or call.get("type") != "function":
        yield f"{where} is {_shown(call)}, no function call"
        return
    if not _is_legal(call.get("id")):
        yield f"{where} has the id {_shown(call.get('id'))}; an id is 1 to 64 of [A-Za-z0-9_-]"
    if not _is_legal(function.get("name")):
        yield f"{where} calls {_shown(function.get('name'))}; a name is 1 to 64 of [A-Za-z0-9_-]"
    arguments = function.get("arguments")
    if not isinstance(arguments, str) or not isinstance(_parsed(arguments), dict):
        yield f"{where} has the arguments {_shown(arguments)}, no JSON object in a string"


def _pairing_faults(messages: Sequence[Any]) -> Iterator[str]:
    expected: list[Any] = []
    for at, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role == "tool":
            call_id = message.get("tool_call_id")
            if not expected:
                yield f"message {at} (tool) answers {_shown(call_id)}, but no call is open"
            elif call_id != expected.pop(0):
                yield f"message {at} (tool) answers {_shown(call_id)} out of turn"
            continue
        if expected:
            yield f"message {at} ({role}) comes before the calls {_shown(expected)} are answered"
        calls = message.get("tool_calls") if isinstance(message, Mapping) else None
        expected = [call.get("id") for call in calls if isinstance(call, Mapping)] if isinstance(calls, list) else []
    if expected:
        yield f"the messages end before the calls {_shown(expected)} are answered"


# Anthropic


_Block: TypeAlias = dict[str, Any]


@define
class _Turn:
    """One message as Anthropic sees it: neighbours of the same role are merged."""

    role: str
    blocks: list[tuple[int, _Block]] = field(factory=list)
    """Each with the position of the OpenAI message that it comes from."""

    def of_type(self, kind: str) -> list[tuple[int, _Block]]:
        return [(at, block) for at, block in self.blocks if block["type"] == kind]


def anthropic_faults(messages: Sequence[Any]) -> list[str]:
    """Return what Anthropic would refuse in *messages*, once they are mapped to its form.

    The mapping is the usual one: system messages are hoisted, tool messages become tool_result blocks of a user
    message, neighbours of the same role are merged. What is no message at all is left to `openai_faults`.
    """
    known = [(at, message) for at, message in enumerate(messages) if isinstance(message, Mapping)]
    system = [(at, block) for at, message in known if _is_system(message) for block in _blocks(message)]
    turns = _merged([(at, message) for at, message in known if not _is_system(message)])
    if not turns:
        return ["there are no messages besides those of the system"]
    faults = list(_text_faults("system", system))
    if turns[0].role != "user":
        at = turns[0].blocks[0][0] if turns[0].blocks else 0
        faults.append(f"message {at} ({turns[0].role}) is the first, which must be the user's")
    for number, turn in enumerate(turns):
        faults += _text_faults(turn.role, turn.blocks)
        faults += _use_faults(turn, turns[number + 1] if number + 1 < len(turns) else None)
        faults += _result_faults(turn, turns[number - 1] if number else None)
    return faults


def _is_system(message: Mapping[str, Any]) -> bool:
    return message.get("role") in ("system", "developer")


def _merged(messages: Sequence[tuple[int, Mapping[str, Any]]]) -> list[_Turn]:
    turns: list[_Turn] = []
    for at, message in messages:
        role = "assistant" if message.get("role") == "assistant" else "user"
        if not turns or turns[-1].role != role:
            turns.append(_Turn(role))
        turns[-1].blocks += [(at, block) for block in _blocks(message)]
    return turns


def _blocks(message: Mapping[str, Any]) -> list[_Block]:
    content = message.get("content")
    parts: list[Any] = content if isinstance(content, list) else [] if content is None else [content]
    blocks = [_text_block(part) for part in parts]
    if message.get("role") == "tool":
        return [{"type": "tool_result", "tool_use_id": message.get("tool_call_id"), "content": blocks}]
    if message.get("role") == "assistant" and content == "" and message.get("tool_calls"):
        blocks = []
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, Mapping) else None
        function = function if isinstance(function, Mapping) else {}
        use = {"id": call.get("id"), "name": function.get("name")} if isinstance(call, Mapping) else {}
        blocks.append({"type": "tool_use", "input": _parsed(function.get("arguments")), **use})
    return blocks


def _text_block(part: object) -> _Block:
    if isinstance(part, Mapping) and part.get("type") != "text":
        return {"type": "other"}
    return {"type": "text", "text": part.get("text") if isinstance(part, Mapping) else part}


def _text_faults(role: str, blocks: Sequence[tuple[int, _Block]]) -> Iterator[str]:
    for at, block in blocks:
        text = block.get("text")
        if block["type"] == "text" and not (isinstance(text, str) and text.strip()):
            yield f"message {at} ({role}) has a text block that is empty or white space: {_shown(text)}"


def _use_faults(turn: _Turn, following: _Turn | None) -> Iterator[str]:
    uses = turn.of_type("tool_use")
    answered = [block["tool_use_id"] for _, block in following.of_type("tool_result")] if following else []
    seen: list[Any] = []
    for at, use in uses:
        use_id, where = use.get("id"), f"message {at} ({turn.role}) tool_use {_shown(use.get('id'))}"
        if not _is_legal(use_id) or not _is_legal(use.get("name")):
            yield f"{where} of {_shown(use.get('name'))}: ids and names are 1 to 64 of [A-Za-z0-9_-]"
        if use_id in seen:
            yield f"{where}: ids must be unique"
        seen.append(use_id)
        if not isinstance(use.get("input"), dict):
            yield f"{where} has the input {_shown(use.get('input'))}, no object"
        elif (reason := _unsendable(use["input"])) is not None:
            yield f"{where} has an input that can't be sent as JSON: {reason}"
        if use_id not in answered:
            yield f"{where} has no tool_result in the message that follows"


def _result_faults(turn: _Turn, before: _Turn | None) -> Iterator[str]:
    used = [block.get("id") for _, block in before.of_type("tool_use")] if before else []
    seen: list[Any] = []
    others = False
    for at, block in turn.blocks:
        if block["type"] != "tool_result":
            others = True
            continue
        result_id = block["tool_use_id"]
        where = f"message {at} (tool) tool_result {_shown(result_id)}"
        if result_id not in used:
            yield f"{where} has no tool_use in the message before"
        if result_id in seen:
            yield f"{where} is the second for its tool_use"
        if others:
            yield f"{where} comes after other content; results come first"
        seen.append(result_id)
        yield from _text_faults("tool", [(at, inner) for inner in block["content"] if inner.get("text") != ""])


# Both


def _is_legal(name: object) -> bool:
    return isinstance(name, str) and _LEGAL.match(name) is not None


def _parsed(text: object) -> Any:
    """Return what the JSON in *text* stands for; None if it is none."""
    if not isinstance(text, str):
        return None
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _unsendable(value: object) -> str | None:
    """Return why *value* can't be sent as JSON in UTF-8, which is how clients send it; None if it can."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError) as error:  # a lone surrogate is a ValueError too
        return f"{type(error).__name__}: {str(error)[:100]}"
    return None


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits, a list within a list within ...
        text = f"[{type(value).__name__}]"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"
