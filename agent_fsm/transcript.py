"""The conversation, append-only, in whole turns, so that it is valid at every instant.

A unit is what can't be parted: a user message, an assistant's text, or an assistant message with its calls and the
answers to all of them. A unit is appended whole or not at all; trimming and summaries leave out whole units, and only
from requests. Sizes are upper bounds in tokens, as `messages` reckons them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import define

from agent_fsm.ledger import cloner
from agent_fsm.messages import FRAME_TOKENS, admit, cut_bytes, message_size, text_size
from agent_fsm.protocol import Message

__all__ = ["Transcript", "begin"]


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
        while last > self.anchor and self.shared[starts[last]]["role"] == "user":
            last -= 1  # a directive: the turn that it is about stays with it
        while keep is not None and first < last and self.count - starts[first] + (self.anchor < first) > keep:
            first += 1
        while first < self.anchor and self.shared[starts[first]]["role"] != "user":
            first += 1
        return first

    def summarized_as(self, summary: str) -> "Transcript":
        """Return the transcript whose requests carry *summary* for all units but the latest."""
        new = _clone(self)
        new.summary = summary
        new.summarized = new.first = self.length - 1
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
        """Return an upper bound of the tokens in the record, uncut."""
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


def begin(messages: Sequence[Mapping[str, Any]], keep: int | None = None) -> Transcript:
    """Return the transcript of the caller's *messages*, which are passed on as they are, images included.

    Raises:
        MessagesError: no provider accepts these messages; it says which one is wrong and what would be right.
    """
    system, units = admit(messages)
    transcript = Transcript(system, sum(map(message_size, system)), [], [], [], 0, 0, 0, keep=None, anchor=0)
    for unit in units:
        transcript = transcript.plus(unit, sum(map(message_size, unit)))
    transcript.keep = keep
    transcript.anchor = max(at for at, unit in enumerate(units) if unit[0]["role"] == "user")
    transcript.first = transcript._window()
    return transcript
