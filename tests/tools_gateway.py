"""A server on loopback that answers what a test tells it to, faults included, and keeps what it was asked.

    with ToolsGateway([tool("add")], [{"text": "3"}]) as gateway:
        invoker = HttpToolsInvoker(gateway.url)
        ...
    assert gateway.invoked[0].body == {"name": "add", "arguments": {"a": 1, "b": 2}}

The n-th request to a path gets the n-th of its answers, those beyond the last get the last again. An answer is

    {...} or [...]              this JSON
    429                         an error with this status
    (429, headers)              ... and these headers
    (429, headers, body)        ... and this body: JSON, or bytes as they are
    b"..."                      these bytes, as if they were JSON
    HANG                        none until the server is closed
    RESET                       none: the connection is reset once the request was read
    Drip(answer, pause_s=0.1)   an answer of any other kind, its body one byte at a time
    Endless()                   a body in chunks, without an end
    Short(answer)               an answer whose body ends before the length that it declared
    Closing(answer)             an answer that keeps the connection, which is then closed without a word
    a function                  what it makes of the request
"""

import json
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, TypeAlias
from urllib.parse import parse_qsl, urlsplit

from attrs import frozen

__all__ = ["HANG", "RESET", "Closing", "Drip", "Endless", "Request", "Scripted", "Short", "ToolsGateway", "tool"]

Answer: TypeAlias = Any
"""One of the kinds above."""

HANG: Final = "hang"
RESET: Final = "reset"


@frozen
class Drip:
    """An answer that trickles, so that no single read ever times out."""

    answer: Answer
    pause_s: float = 0.05
    """Seconds between two bytes of the body."""


@frozen
class Endless:
    """A body that declares no length and never ends."""


@frozen
class Short:
    """An answer that breaks off after half of its body."""

    answer: Answer


@frozen
class Closing:
    """An answer after which the server closes the connection that it said it would keep."""

    answer: Answer


@frozen
class Request:
    """What the server was asked."""

    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    """By names in lower case; those sent twice are joined by a comma."""
    body: Any
    """The JSON value sent; None if nothing was."""
    connection: int
    """The client's port: equal for requests that came over the same connection."""


def tool(name: str, **beside: Any) -> dict[str, Any]:
    """Return an OpenAI function tool; *beside* is put beside its `function`."""
    parameters = {"type": "object", "properties": {}}
    function = {"name": name, "description": f"Does {name}.", "parameters": parameters}
    return {"type": "function", "function": function, **beside}


def _bytes(answer: Answer) -> tuple[int, dict[str, str], bytes]:
    match answer:
        case int():
            return _bytes((answer, {}))
        case list():
            return 200, {}, json.dumps(answer).encode()
        case (int() as status, headers):
            return _bytes((status, headers, {"error": {"code": "scripted", "message": f"scripted error {status}"}}))
        case (int() as status, headers, body):
            return status, dict(headers), body if isinstance(body, bytes) else json.dumps(body).encode()
        case bytes():
            return 200, {}, answer
        case _:
            return 200, {}, json.dumps(answer).encode()


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # clients that hang up are part of the tests
            super().handle_error(request, client_address)


class Scripted:
    """Serves *answers*, by method and path (`"POST /invoke"`), from entering to leaving; other paths are 404.

    Leaving also ends what hangs and cuts every connection.
    """

    def __init__(self, answers: Mapping[str, Sequence[Answer]]) -> None:
        self.requests: list[Request] = []
        self._answers = {path: list(each) for path, each in answers.items()}
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._connections: list[socket.socket] = []
        self._ended = 0
        self._http = _QuietServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def drained(self, within_s: float = 2.0) -> bool:
        """Return whether every connection is closed, or is so within *within_s* seconds."""
        until = time.monotonic() + within_s
        while self._ended < len(self._connections) and time.monotonic() < until:
            time.sleep(0.01)
        return self._ended == len(self._connections)

    def asked(self, path: str) -> list[Request]:
        """Return the requests to *path*, in the order in which they came."""
        return [request for request in self.requests if request.path == path]

    def __enter__(self) -> "Scripted":
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

    def _record(self, method: str, request: Request) -> Answer:
        with self._lock:
            self.requests.append(request)
            place = f"{method} {request.path}"
            answers = self._answers.get(place, [404])
            self._asked[place] += 1
            return answers[min(self._asked[place], len(answers)) - 1]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # else every request gets a connection of its own

            def setup(self) -> None:
                super().setup()
                server._connections.append(self.connection)

            def finish(self) -> None:
                super().finish()
                with server._lock:
                    server._ended += 1

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
                """Say nothing."""

            def do_GET(self) -> None:
                self.answer(None)

            def do_POST(self) -> None:
                body = self.rfile.read(length := int(self.headers["Content-Length"]))
                if len(body) < length:  # the client hung up in the middle of its request
                    self.close_connection = True
                    return
                self.answer(json.loads(body))

            def answer(self, body: Any) -> None:
                url = urlsplit(self.path)
                headers = {name.lower(): ", ".join(self.headers.get_all(name, [])) for name in self.headers}
                asked = Request(url.path, dict(parse_qsl(url.query)), headers, body, self.client_address[1])
                scripted = server._record(self.command, asked)
                self.send(scripted(asked) if callable(scripted) else scripted)

            def send(self, answer: Answer, *, pause_s: float = 0.0, short: bool = False) -> None:
                match answer:
                    case Drip():
                        self.send(answer.answer, pause_s=answer.pause_s)
                    case Short():
                        self.send(answer.answer, short=True)
                        self.close_connection = True
                    case Closing():
                        self.send(answer.answer)
                        self.close_connection = True
                    case Endless():
                        self.head(200, {"Transfer-Encoding": "chunked"})
                        while not server._closing.is_set():
                            self.wfile.write(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
                    case "hang":
                        server._closing.wait()
                    case "reset":
                        # closing with no time to linger sends a reset instead of an end
                        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        self.close_connection = True
                        self.connection.close()
                    case _:
                        status, headers, body = _bytes(answer)
                        self.head(status, {"Content-Length": str(len(body)), **headers})
                        self.write(body[: len(body) // 2] if short else body, pause_s)

            def head(self, status: int, headers: Mapping[str, str]) -> None:
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.end_headers()

            def write(self, body: bytes, pause_s: float) -> None:
                if not pause_s:
                    self.wfile.write(body)
                    return
                for byte in body:
                    if server._closing.is_set():
                        return
                    self.wfile.write(bytes([byte]))
                    time.sleep(pause_s)

        return Handler


class ToolsGateway(Scripted):
    """Answers `GET /tools` with *tools* and `POST /invoke` with one after another of *answers*."""

    def __init__(self, tools: Answer = (), answers: Sequence[Answer] = ({"text": "done"},)) -> None:
        super().__init__({"GET /tools": [list(tools) if tools == () else tools], "POST /invoke": answers})

    def __enter__(self) -> "ToolsGateway":
        super().__enter__()
        return self

    @property
    def invoked(self) -> list[Request]:
        """What the gateway was told to run."""
        return self.asked("/invoke")
