"""An OpenAI-compatible chat server on loopback that says what a test tells it to, and keeps what it was asked.

    with OpenAIServer([[("look_up", {"city": "Paris"})], "It rains."]) as server:
        config = AgentConfig(model="openai/gpt-4o-mini", completion_kwargs=server.completion_kwargs)
        ...
    assert server.requests[0].body["messages"][-1]["content"] == "What is the weather?"

The n-th POST /v1/chat/completions gets the n-th reply, those beyond the last get the last again. A reply is

    "text"                      the assistant says it
    {"content": ..., ...}       the assistant's message as it is
    {"choices": [...], ...}     the whole completion as it is
    [(name, arguments), ...]    tool calls; arguments are a dict, or a string to be sent as it is
    429                         an error with this status
    (429, headers)              ... and these headers
    (429, headers, body)        ... and this JSON body
    HANG                        no answer until the server is closed
    b"..."                      these bytes, as if they were JSON
    Drip("text", pause_s=0.1)   a reply of any other kind, its body one byte at a time
"""

import json
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, TypeAlias

from attrs import frozen

__all__ = ["HANG", "USAGE", "Drip", "OpenAIServer", "Request"]

Reply: TypeAlias = Any
"""One of the kinds above."""

HANG: Final = "hang"

USAGE: Final = {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}
"""What every reply that is not given as a whole completion reports."""


@frozen
class Drip:
    """A reply that trickles, so that no single read ever times out."""

    reply: Reply
    pause_s: float = 0.05
    """Seconds between two bytes of the body."""


@frozen
class Request:
    """What the server was asked."""

    body: dict[str, Any]
    headers: Mapping[str, str]
    """By names in lower case."""
    connection: int
    """The client's port: equal for requests that came over the same connection."""


@frozen
class _Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes
    pause_s: float = 0.0


def _completion(message: dict[str, Any], model: str) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": None, **message},
                "finish_reason": "tool_calls" if message.get("tool_calls") else "stop",
            }
        ],
        "usage": USAGE,
    }


def _tool_calls(calls: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    return {
        "tool_calls": [
            {
                "id": f"call_{number}",
                "type": "function",
                "function": {
                    "name": name,
                    "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments),
                },
            }
            for number, (name, arguments) in enumerate(calls, 1)
        ]
    }


def _error(status: int, headers: Mapping[str, str] | None = None, body: Any = None) -> _Answer:
    default = {"error": {"message": f"scripted error {status}", "type": "scripted", "param": None, "code": None}}
    return _Answer(status, headers or {}, json.dumps(default if body is None else body).encode())


def _answer(reply: Reply, model: str) -> _Answer:
    match reply:
        case Drip():
            whole = _answer(reply.reply, model)
            return _Answer(whole.status, whole.headers, whole.body, reply.pause_s)
        case bytes():
            return _Answer(200, {}, reply)
        case int():
            return _error(reply)
        case tuple():
            return _error(*reply)
        case {"choices": _}:
            completion = reply
        case dict():
            completion = _completion(reply, model)
        case list():
            completion = _completion(_tool_calls(reply), model)
        case _:
            completion = _completion({"content": reply}, model)
    return _Answer(200, {}, json.dumps(completion).encode())


class _QuietHTTPServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # clients that hang up are part of the tests
            super().handle_error(request, client_address)


class OpenAIServer:
    """Serves from entering to leaving; leaving also ends what hangs and cuts every connection."""

    def __init__(self, replies: Sequence[Reply] = ("hello",)) -> None:
        self.requests: list[Request] = []
        self._replies = list(replies)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._connections: list[socket.socket] = []
        self._http = _QuietHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    @property
    def completion_kwargs(self) -> dict[str, Any]:
        """What makes LiteLLM ask this server."""
        return {"api_base": self.base_url, "api_key": "sk-test"}

    def __enter__(self) -> "OpenAIServer":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()
        for connection in self._connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # the client was first
                continue

    def _record(self, request: Request) -> Reply:
        with self._lock:
            self.requests.append(request)
            return self._replies[min(len(self.requests), len(self._replies)) - 1]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # else every request gets a connection of its own

            def setup(self) -> None:
                super().setup()
                server._connections.append(self.connection)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
                """Say nothing."""

            def do_GET(self) -> None:
                models = {"object": "list", "data": [{"id": "gpt-4o-mini", "object": "model"}]}
                self.send(_Answer(200, {}, json.dumps(models).encode()) if self.path == "/v1/models" else _error(404))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path != "/v1/chat/completions":
                    return self.send(_error(404))
                headers = {name.lower(): value for name, value in self.headers.items()}
                reply = server._record(Request(body, headers, self.client_address[1]))
                if isinstance(reply, str) and reply == HANG:
                    server._closing.wait()
                    self.close_connection = True
                    return None
                return self.send(_answer(reply, body["model"]))

            def send(self, answer: _Answer) -> None:
                headers = {"Content-Type": "application/json", "Content-Length": str(len(answer.body))}
                try:
                    self.send_response(answer.status)
                    for name, value in (headers | dict(answer.headers)).items():
                        self.send_header(name, value)
                    self.end_headers()
                    step = 1 if answer.pause_s else max(1, len(answer.body))
                    for start in range(0, len(answer.body), step):
                        self.wfile.write(answer.body[start : start + step])
                        if answer.pause_s and server._closing.wait(answer.pause_s):
                            break
                except OSError:  # the client did not wait
                    self.close_connection = True

        return Handler
