"""Reading what a server says, a line, a body or an event at a time: what is of no use is dropped, what is nearly right
is mended.

Imports mcp's types, and so is itself imported only where a connection is opened.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import mcp_types as types

from agent_fsm.messages import encodable

__all__ = ["LOST", "SESSION_GONE", "UNREADABLE", "UNSENT", "Events", "named_id", "read_message", "wanted_by", "whole"]

UNSENT, LOST, SESSION_GONE, UNREADABLE = -32901, -32902, -32903, -32904
"""Codes of the errors with which we answer a request ourselves: it was not sent; it was, and nothing came back; the
server does not know our session, and has done nothing; what came back can't be read."""

_NOTIFICATION = re.compile(rb'\s*\{\s*(?:"jsonrpc"\s*:\s*"2\.0"\s*,\s*)?"method"\s*:\s*"notifications/([^"\\]{0,64})"')
_METHOD = re.compile(rb'"method"\s*:')
_ANSWER = re.compile(rb'"(?:result|error)"\s*:')
_ID = re.compile(rb'"id"\s*:\s*("(?:[^"\\]|\\.){0,200}"|-?\d{1,18})\s*[,}]')
_HEAD_BYTES = 4_096


def wanted_by(changed: Callable[[], object]) -> Callable[[bytes], bool]:
    """Return what says of each message as it arrives whether it is to be read, and calls *changed* where it only says
    that the tools have changed. It takes a millionth of a second: some servers say nothing else, without end."""

    def wanted(data: bytes) -> bool:
        found = _NOTIFICATION.match(data)
        if found is None:
            return True
        if found.group(1) == b"tools/list_changed":
            changed()
        return found.group(1) in (b"cancelled", b"subscriptions/acknowledged")

    return wanted


def read_message(data: bytes) -> types.JSONRPCMessage | None:
    """Return the message in *data*, also if there is half a character in it, or it is nested deeply; None if it is
    none."""
    try:
        return types.jsonrpc_message_adapter.validate_json(data, by_name=False)
    except ValueError:
        pass
    try:
        return types.jsonrpc_message_adapter.validate_python(whole(json.loads(data)), by_name=False)
    except (ValueError, RecursionError):
        return None


def whole(value: Any) -> Any:
    """Return a JSON value without lone surrogates."""
    match value:
        case str():
            return encodable(value)
        case dict():
            return {encodable(key): whole(each) for key, each in value.items()}
        case list():
            return [whole(each) for each in value]
    return value


def named_id(data: bytes) -> types.RequestId | None:
    """Return the id that the beginning of *data*, which can't be read, names; None if it is no answer to anything."""
    head = data[:_HEAD_BYTES]
    if not head.lstrip().startswith(b"{") or _METHOD.search(head[:200]) or not _ANSWER.search(head):
        return None
    found = _ID.search(head)
    if found is None:
        return None
    named: types.RequestId = json.loads(found.group(1))
    return named


class Events:
    """Server-sent events, read chunk by chunk and written anew: what has no message in it is left out.

    Args:
        wanted: says of a message whether it is to be passed on.
        max_bytes: how many bytes of data an event may have.
        failed: gives the data that take the place of an event which can't be passed on, given why; None: nothing does.
    """

    def __init__(self, wanted: Callable[[bytes], bool], max_bytes: int, failed: Callable[[str], bytes | None]) -> None:
        self._wanted = wanted
        self._max_bytes = max_bytes
        self._failed = failed
        self._pieces: list[bytes] = []
        self._length = 0
        self._kind = b""
        self._other: dict[bytes, bytes] = {}
        self._data: list[bytes] = []
        self._bytes = 0

    def take(self, chunk: bytes) -> bytes:
        """Return the events that end in *chunk*, as they are to be passed on."""
        *whole, rest = chunk.split(b"\n")
        out = [event for piece in whole for event in self._line(piece)]
        self._add(rest)
        return b"".join(out)

    def _add(self, piece: bytes) -> None:
        self._length += len(piece)
        if self._length + self._bytes <= self._max_bytes:
            self._pieces.append(piece)
        else:
            self._pieces = [b"".join((*self._pieces, piece))[:_HEAD_BYTES]]  # only to know which field it is

    def _line(self, last: bytes) -> Iterator[bytes]:
        self._add(last)
        line, length = b"".join(self._pieces).rstrip(b"\r"), self._length
        self._pieces, self._length = [], 0
        if not line:
            yield from self._event()
            return
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        match field:
            case b"data":
                self._bytes += length
                if self._bytes <= self._max_bytes:
                    self._data.append(value)
            case b"event":
                self._kind = value
            case b"id" | b"retry" if value.isascii() and value.decode().isprintable():
                self._other[field] = field + b": " + value + b"\n"

    def _event(self) -> Iterator[bytes]:
        data, length, kind, other = b"\n".join(self._data), self._bytes, self._kind, b"".join(self._other.values())
        self._data, self._bytes, self._kind, self._other = [], 0, b"", {}
        passed: bytes | None = data
        if length > self._max_bytes:
            passed = self._failed(f"the event has more than {self._max_bytes:,} bytes")
        elif data and kind in (b"", b"message"):
            passed = self._checked(data)
        elif kind != b"endpoint":  # which the old transport begins with
            passed = None
        if passed or other:
            lines = b"".join(b"data: " + line + b"\n" for line in (passed or b"").split(b"\n"))
            yield other + b"event: " + (kind or b"message") + b"\n" + lines + b"\n"

    def _checked(self, data: bytes) -> bytes | None:
        if not self._wanted(data):
            return None
        message = read_message(data)
        if message is None:
            return self._failed("an event is no JSON-RPC")
        return message.model_dump_json(by_alias=True, exclude_unset=True).encode()
