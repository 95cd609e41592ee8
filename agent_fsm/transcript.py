"""The conversation, append-only, in whole turns, so that it is valid at every instant.

A unit is what can't be parted: a user message, an assistant's text, or an assistant message with its calls and the
answers to all of them. A unit is appended whole or not at all; trimming and summaries leave out whole units, and only
from requests. Sizes are upper bounds in tokens: no tokenizer makes more tokens of a text than it has UTF-8 bytes, and
every message costs a few more for its frame.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from attrs import define

from agent_fsm.errors import MessagesError
from agent_fsm.ledger import cloner
from agent_fsm.protocol import Message, ToolCall, ToolResult

__all__ = [
    "IMAGE_TOKENS",
    "Transcript",
    "assistant_message",
    "begin",
    "cut",
    "message_size",
    "not_run_results",
    "text_size",
    "tool_message",
    "user_message",
]

FRAME_TOKENS = 16
"""What a message or a call costs besides its text: role, separators, ids of the provider's own."""
IMAGE_TOKENS = 50_000
"""Ceiling for one image: the dearest way to count one that we know of makes some 48,000 tokens (gpt-4o-mini, high
detail)."""

_LEGAL = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


# Sizes and texts


def text_size(text: str) -> int:
    """Return an upper bound of the tokens in *text*: its length in UTF-8 bytes."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def value_size(value: object) -> int:
    """Return an upper bound of the tokens in a JSON value as it stands in a request."""
    match value:
        case str():
            return text_size(value)
        case Mapping():
            if value.get("type") in ("image_url", "image", "input_image"):
                return IMAGE_TOKENS + FRAME_TOKENS
            return sum(text_size(str(key)) + value_size(each) + 4 for key, each in value.items()) + 2
        case list() | tuple():
            return sum(value_size(each) + 1 for each in value) + 2
        case _:
            return len(str(value))


def message_size(message: Mapping[str, Any]) -> int:
    """Return an upper bound of the tokens that *message* adds to a request."""
    content = message.get("content")
    if len(message) == 2 and isinstance(content, str):
        return FRAME_TOKENS + text_size(content)
    calls = message.get("tool_calls") or ()
    return FRAME_TOKENS * (1 + len(calls)) + sum(value_size(value) for value in message.values())


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


def not_run_results(calls: Iterable[ToolCall]) -> tuple[ToolResult, ...]:
    """Return the answers to *calls*, none of which were run."""
    return tuple(
        ToolResult(f"not run: {call.not_run}", ok=False, call_id=call.id, name=call.name, ran=False) for call in calls
    )


# The transcript


@define
class Transcript:
    """A view of a conversation. Appending gives a new view; what they have in common is shared and never changes.

    Views that share must not be appended to from two threads at once.
    """

    system: tuple[Message, ...]
    """The caller's system messages at the front; they head every request."""
    system_size: int
    shared: list[Message]
    """Messages of all views that share them: only the first `count` are this one's."""
    starts: list[int]
    """How many messages come before each unit; only the first `length` are this one's."""
    sizes: list[int]
    """How much size comes before each unit, likewise."""
    length: int
    """Units of this view."""
    count: int
    size: int
    """Size of this view's messages."""
    keep: int | None
    """Messages that a request carries at most, without system messages."""
    anchor: int
    """Which unit holds the caller's last user message: every request carries it."""
    first: int = 0
    """The first unit that the next request carries in full."""
    summary: str = ""
    """What stands in requests for the units before `first`, or part of them."""
    summarized: int = 0
    """How many units the summary covers."""

    def plus(self, messages: tuple[Message, ...], size: int) -> "Transcript":
        """Return the transcript with *messages*, which can't be parted, of *size* tokens at most."""
        new = _clone(self)
        if len(self.starts) != self.length:  # another view has grown from this one
            new.starts, new.sizes = self.starts[: self.length], self.sizes[: self.length]
            new.shared = self.shared[: self.count]
        new.starts.append(self.count)
        new.sizes.append(self.size)
        new.shared.extend(messages)
        new.length += 1
        new.count += len(messages)
        new.size += size
        new.first = new._window()
        return new

    def _window(self) -> int:
        """Return where the next request begins: `keep` messages from the end at most, and with the user's words."""
        first, last, keep, starts = self.first, self.length - 1, self.keep, self.starts
        while keep is not None and first < last and self.count - starts[first] + (self.anchor < first) > keep:
            first += 1
        while first < self.anchor and self.shared[starts[first]]["role"] != "user":
            first += 1
        return first

    def summarized_as(self, summary: str) -> "Transcript":
        """Return the transcript whose requests carry *summary* for all units but the latest."""
        new = _clone(self)
        new.summary = summary
        new.summarized = new.first = max(self.first, self.length - 1)
        return new

    def request_size(self) -> int:
        """Return an upper bound of the tokens in the messages of the next request."""
        size = self.system_size + self.size - self.sizes[self.first]
        if self.anchor < self.first:
            size += self.sizes[self.anchor + 1] - self.sizes[self.anchor]
        if self.summary:
            size += text_size(self.summary) + 2 * FRAME_TOKENS
        return size

    def request_messages(self) -> list[Message]:
        """Return the messages of the next request; the caller may not change them."""
        messages = list(self.system)
        if self.summary:
            messages.append({"role": "system", "content": f"[Context Summary]\n{self.summary}"})
        if self.anchor < self.first:
            messages.append(self.shared[self.starts[self.anchor]])
        messages.extend(self.shared[self.starts[self.first] : self.count])
        return messages

    def messages(self) -> list[Message]:
        """Return the whole conversation, system messages included."""
        return [*self.system, *self.shared[: self.count]]

    def ends_with_assistant(self) -> bool:
        """Return whether the last message is the model's own."""
        return bool(self.shared[self.count - 1]["role"] == "assistant")

    def record_size(self) -> int:
        """Return an upper bound of the tokens in the whole record."""
        return self.size + text_size(self.summary) + 4 * FRAME_TOKENS

    def record(self, size: int) -> str:
        """Return what has not been summarized as a text of at most *size* tokens, for a request without tools."""
        parts = [f"Summary of what came before:\n{self.summary}"] if self.summary else []
        if self.anchor < self.summarized:
            parts.append(_told(self.shared[self.starts[self.anchor]]))
        parts.extend(map(_told, self.shared[self.starts[self.summarized] : self.count]))
        return cut_bytes("\n\n".join(parts), size)

    __hash__ = None  # type: ignore[assignment] # a list is part of it

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Transcript):
            return NotImplemented
        return self._key() == other._key()

    def _key(self) -> tuple[Any, ...]:
        return (
            self.system,
            self.shared[: self.count],
            self.starts[: self.length],
            self.sizes[: self.length],
            self.keep,
            self.anchor,
            self.first,
            self.summary,
            self.summarized,
        )


_clone = cloner(Transcript)


def _told(message: Message) -> str:
    """Return *message* as a paragraph of a record."""
    content = message.get("content")
    if isinstance(content, list):
        content = " ".join(str(part.get("text", f"[{part.get('type')}]")) for part in content if isinstance(part, dict))
    lines = [str(content)] if content else []
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    lines += [f"called {function['name']} with {function['arguments']}" for function in functions]
    return f"{message['role']}: " + "\n".join(lines)


# The caller's messages


def begin(messages: Sequence[Mapping[str, Any]], keep: int | None = None) -> Transcript:
    """Return the transcript of the caller's *messages*.

    Messages are passed on as they are, images included.

    Raises:
        MessagesError: no provider accepts these messages: the list is empty, a message has no role, a tool call has no
            answer or a tool message no call, or the last message is not from the user or a tool.
    """
    if isinstance(messages, str | Mapping) or not messages:
        raise MessagesError(
            "messages must be a list with at least one message, such as {'role': 'user', 'content': '...'}"
        )
    checked = [_checked(index, message) for index, message in enumerate(messages)]
    if checked[-1]["role"] not in ("user", "tool", "function"):
        raise MessagesError(
            f"message {len(checked) - 1} is the last and from {checked[-1]['role']!r};"
            " the last must be from the user or a tool"
        )
    lead = next((at for at, message in enumerate(checked) if message["role"] not in ("system", "developer")))
    system = tuple(checked[:lead])
    groups = list(_grouped(checked, lead))
    users = [at for at, group in enumerate(groups) if group[0]["role"] == "user"]
    if not users:
        raise MessagesError("no message is from the user; there must be one that says what is wanted")
    transcript = Transcript(system, sum(map(message_size, system)), [], [], [], 0, 0, 0, keep=None, anchor=0)
    for group in groups:
        transcript = transcript.plus(group, sum(map(message_size, group)))
    transcript.keep, transcript.anchor = keep, users[-1]
    transcript.first = transcript._window()
    return transcript


def _checked(index: int, message: object) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise MessagesError(f"message {index} is no mapping with a role: {cut(repr(message), 200)}")
    return dict(message)


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
        if message["role"] == "assistant":
            _check_assistant(at, message, calls)
        answers = messages[at + 1 : at + 1 + len(calls)]
        for offset, call in enumerate(calls):
            _check_answer(at, offset, call, answers)
        yield (message, *answers)
        at += 1 + len(calls)


def _check_assistant(at: int, message: Message, calls: object) -> None:
    if not isinstance(calls, list):
        raise MessagesError(f"message {at} has tool_calls that are no list")
    content = message.get("content")
    if not calls and not (content.strip() if isinstance(content, str) else content):
        raise MessagesError(f"message {at} is from the assistant and has neither text nor tool calls; leave it out")
    ids = [call.get("id") if isinstance(call, Mapping) else None for call in calls]
    for call_id in ids:
        if not isinstance(call_id, str) or not _LEGAL.match(call_id) or ids.count(call_id) > 1:
            raise MessagesError(
                f"message {at} has a tool call with id {call_id!r};"
                " ids are unique in a message and 1 to 64 of [A-Za-z0-9_-]"
            )


def _check_answer(at: int, offset: int, call: Mapping[str, Any], answers: list[Message]) -> None:
    answer = answers[offset] if offset < len(answers) else {}
    if answer.get("role") != "tool" or answer.get("tool_call_id") != call["id"]:
        raise MessagesError(
            f"message {at} has a tool call {call['id']!r} that message {at + 1 + offset} does not answer;"
            " each call needs one tool message, directly after it and in order"
        )
    function = call.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not _LEGAL.match(name):
        raise MessagesError(f"message {at} calls a function named {name!r}; a name is 1 to 64 of [A-Za-z0-9_-]")
    if not _is_json_object(function.get("arguments")):  # type: ignore[union-attr] # a mapping: it had a name
        raise MessagesError(f"message {at} calls {name} with arguments that are not a JSON object in a string")


def _is_json_object(text: object) -> bool:
    if not isinstance(text, str):
        return False
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
