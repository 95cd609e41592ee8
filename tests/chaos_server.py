"""An MCP server that goes wrong in one way, on stdio or streamable HTTP, without the SDK and in either protocol era.

    python tests/chaos_server.py CASE [--era legacy|modern]         speaks stdio
    python tests/chaos_server.py CASE --http PORT                   listens on 127.0.0.1 (0: any port), prints the port
    python tests/chaos_server.py --cases                            says what the cases are
    python tests/chaos_server.py --table                            runs them all and prints what the model was told

Whatever is not wrong in a case is right: a server that dies in a call lists its tools before. Every `tools/call` that
arrives is a line in the file that `--log` names. On HTTP the server ends when its stdin does. Nothing but the standard
library is imported, and not much of that, so that a start costs some 30 ms.
"""

import argparse
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias

__all__ = ["BOTH", "CASES", "HTTP", "STDIO", "Case"]

Message: TypeAlias = dict[str, Any]


class Signal(Enum):
    """What a server does instead of saying something."""

    HANG = "waits for ever"
    DIE = "exits at once"
    STREAM = "says what follows as server-sent events, where there is a choice"
    CUT = "closes the connection, in the middle of a body that it has begun"


class Page(NamedTuple):
    """A whole HTTP response, for cases that have one of their own."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    pause_s: float = 0.0
    """Seconds between two bytes."""


Item: TypeAlias = Message | bytes | Page | Signal
"""A message; bytes as they are; what only HTTP has; or a signal."""
Handler: TypeAlias = Callable[["Server", Message], Iterable[Item]]
"""Gives what follows upon a request or a notification."""

STDIO, HTTP = ("stdio",), ("http",)
BOTH = (*STDIO, *HTTP)
LEGACY, MODERN = "legacy", "modern"


class Case(NamedTuple):
    """One way to go wrong."""

    about: str
    on: Mapping[str, Handler] = {}
    """By method: what takes the place of the right answer; `*` stands for every method."""
    transports: tuple[str, ...] = BOTH
    eras: tuple[str, ...] = (MODERN,)
    """In which a test should try it: both where the protocol differs in what matters to the case."""
    start: Callable[[], object] | None = None
    """Done before anything is read."""
    deaf: bool = False
    """True for a server that stays when its stdin ends."""


# What a right server says


def _tool(name: str, **more: Any) -> Message:
    schema = {"type": "object", "properties": {"text": {"type": "string"}}}
    return {"name": name, "description": f"The tool {name}.", "inputSchema": schema, **more}


def _result(request: Message, **fields: Any) -> Message:
    return {"jsonrpc": "2.0", "id": request["id"], "result": {"resultType": "complete", **fields}}


def _error(request: Message, code: int, text: str) -> Message:
    return {"jsonrpc": "2.0", "id": request["id"], "error": {"code": code, "message": text}}


def _text(request: Message, text: str, **fields: Any) -> Message:
    return _result(request, content=[{"type": "text", "text": text}], **fields)


def _listed(request: Message, tools: list[Any], **fields: Any) -> Message:
    return _result(request, tools=tools, ttlMs=0, cacheScope="private", **fields)


_CAPABILITIES = {"tools": {"listChanged": True}}
_INFO = {"name": "chaos", "version": "1"}


def _right(server: "Server", message: Message) -> Iterable[Item]:
    """Give what a server without fault says."""
    if "id" not in message:
        return
    match message["method"], server.era:
        case ("initialize", "legacy"):
            yield _result(message, protocolVersion="2025-11-25", capabilities=_CAPABILITIES, serverInfo=_INFO)
        case ("server/discover", "modern"):
            versions = ["2026-07-28"]
            about = {"serverInfo": _INFO, "ttlMs": 0, "cacheScope": "private"}
            yield _result(message, supportedVersions=versions, capabilities=_CAPABILITIES, **about)
        case ("subscriptions/listen", "modern"):
            yield Signal.STREAM
            yield _acknowledged(message)
            yield Signal.HANG
        case ("ping", "legacy"):
            yield _result(message)
        case ("tools/list", _):
            yield _listed(message, [_tool("work"), _tool("echo")])
        case ("tools/call", _):
            params = message["params"]
            arguments = params.get("arguments") or {}
            yield _text(message, f"{params['name']} says {arguments.get('text', 'nothing')}")
        case (method, _):
            yield _error(message, -32601, f"Method not found: {method}")


def _acknowledged(listen: Message) -> Message:
    return _notification("subscriptions/acknowledged", listen, notifications={"toolsListChanged": True})


def _notification(name: str, listen: Message | None = None, **params: Any) -> Message:
    if listen is not None:
        params["_meta"] = {"io.modelcontextprotocol/subscriptionId": listen["id"]}
    return {"jsonrpc": "2.0", "method": f"notifications/{name}", "params": params}


# What wrong ones do


def _always(*items: Item) -> Handler:
    return lambda server, request: items


def _hang(server: "Server", request: Message) -> Iterable[Item]:
    return [Signal.HANG]


def _die(server: "Server", request: Message) -> Iterable[Item]:
    return [Signal.DIE]


def _says(make: Callable[[Message], Item]) -> Handler:
    return lambda server, request: [make(request)]


def _says_of_work(**fields: Any) -> Handler:
    return _says(lambda request: _result(request, **fields))


def _die_at_start() -> NoReturn:
    sys.stderr.write("chaos: cannot open the database at /nowhere\n")
    sys.stderr.flush()
    os._exit(3)


def _same_cursor(server: "Server", request: Message) -> Iterable[Item]:
    yield _listed(request, [_tool("work")], nextCursor="again")


def _new_cursors(server: "Server", request: Message) -> Iterable[Item]:
    page = int(request.get("params", {}).get("cursor", "0"))
    yield _listed(request, [_tool("work" if page == 0 else f"page_{page}")], nextCursor=str(page + 1))


def _many_tools(server: "Server", request: Message) -> Iterable[Item]:
    first = int(request.get("params", {}).get("cursor", "0"))
    more = {} if first == 9_000 else {"nextCursor": str(first + 1_000)}
    tools = [_tool("work" if number == 0 else f"work_{number}") for number in range(first, first + 1_000)]
    yield _listed(request, tools, **more)


ODD_NAMES = (
    "work",
    "work",
    "n" * 200,
    "n" * 199 + "m",
    "sp ace/slash.dot",
    "sp_ace_slash_dot",
    "größe",
    "",
    "__",
    "\0",
)


def _odd_names(server: "Server", request: Message) -> Iterable[Item]:
    tools = [_tool(name, description=f"number {number}") for number, name in enumerate(ODD_NAMES)]
    yield _listed(request, tools)


def _broken_schemas(server: "Server", request: Message) -> Iterable[Item]:
    broken = [
        _tool("string_schema", inputSchema="an object, please"),
        _tool("null_schema", inputSchema=None),
        _tool("list_schema", inputSchema=[]),
        _tool("odd_type", inputSchema={"type": 7, "properties": ["text"]}),
        _tool("array_input", inputSchema={"type": "array"}),
        _tool("odd_description", description={"en": "?"}),
        _tool("odd_annotations", annotations=[1, 2]),
        {"name": "no_schema"},
        {"description": "no name", "inputSchema": {"type": "object"}},
        {"name": 7, "inputSchema": {"type": "object"}},
        "not even an object",
        None,
    ]
    yield _listed(request, [broken[0], _tool("work"), *broken[1:]])


def _huge_result(server: "Server", request: Message) -> Iterable[Item]:
    yield _text(request, "x" * 20_000_000)


def _huge_event(server: "Server", request: Message) -> Iterable[Item]:
    return [Signal.STREAM, _text(request, "x" * 20_000_000)]


def _endless_line(server: "Server", request: Message) -> Iterable[Item]:
    """Begin a line, or a body, and never end it."""
    head = f'{{"jsonrpc":"2.0","id":{json.dumps(request["id"])},"result":{{"content":[{{"type":"text","text":"'
    if server.http:
        yield Page(200, {"Content-Type": "application/json", "Content-Length": "1000000000000"}, head.encode())
    else:
        yield head.encode()
    for _ in range(2_000):
        yield b"x" * 1_000_000
    yield Signal.HANG


def _flood(server: "Server", request: Message) -> Iterable[Item]:
    line = b"chaos: what a day " * 3_641 + b"\n"
    for _ in range(100_000_000 // len(line)):
        os.write(2, line)
    return _right(server, request)


def _endless_flood(server: "Server", request: Message) -> Iterable[Item]:
    def flood() -> None:
        while True:
            os.write(2, b"\xff\xfe chaos " * 1_000)

    threading.Thread(target=flood, daemon=True).start()
    return _right(server, request)


def _storm(server: "Server", request: Message) -> Iterable[Item]:
    """Say for ever that the tools have changed: on the stream where this era wants it said."""
    if server.era == MODERN:
        yield Signal.STREAM
        yield _acknowledged(request)
        while True:
            yield _notification("tools/list_changed", request)
    yield Signal.STREAM
    while True:
        yield _notification("tools/list_changed")


_QUESTION = {
    "mode": "form",
    "message": "What is your password?",
    "requestedSchema": {"type": "object", "properties": {"password": {"type": "string"}}},
}


def _ask_for_ever(server: "Server", request: Message) -> Iterable[Item]:
    if server.era == MODERN:
        asked = {"question": {"method": "elicitation/create", "params": _QUESTION}}
        yield _result(request, resultType="input_required", inputRequests=asked, requestState="s" * 9)
        return
    yield Signal.STREAM
    for number in range(1_000_000):
        question = f"question-{request['id']}-{number}"
        yield {"jsonrpc": "2.0", "id": question, "method": "elicitation/create", "params": _QUESTION}
        server.wait_for(question)


def _input_required(**fields: Any) -> Handler:
    return lambda server, request: [_result(request, **{"resultType": "input_required", **fields})]


_ELICITATION = {"method": "elicitation/create", "params": _QUESTION}


def _garbage(server: "Server", request: Message) -> Iterable[Item]:
    """Say everything that nobody should say, then give the right answer, twice, and then another one."""
    right = list(_right(server, request))
    yield Signal.STREAM
    yield from _HTTP_GARBAGE if server.http else _STDIO_GARBAGE
    yield _notification("no/such", anything=[1, {"a": None}])
    yield _notification("progress", progressToken="nobody's", progress="much")
    yield {"jsonrpc": "2.0", "id": "nobody's", "method": "no/such"}
    if not server.http:  # where any response on this stream is the one to this request, whatever its id
        for nobody in (10_000, -1, "nobody's", 1.5, None):
            yield {"jsonrpc": "2.0", "id": nobody, "result": {"content": [{"type": "text", "text": "for another"}]}}
        yield {"jsonrpc": "2.0", "id": None, "error": {"code": -32700, "message": "for nobody"}}
    yield from right
    yield from right
    yield _error(request, -32603, "a second answer")


_STDIO_GARBAGE = (
    b"Listening on port 7\n\n\r\n   \n",
    b"\xff\xfe\x00 no UTF-8 \xc3\x28\n",
    b'{"jsonrpc": "2.0", "id": \n',
    b"[" * 5_000 + b"\n",
    b'7\nnull\n[]\n"text"\n{}\n{"jsonrpc": "1.0", "id": "no request\'s"}\n[[]]\nNaN\n',
)
_HTTP_GARBAGE = (
    b": comment\n\n",
    b"event: odd\ndata: what\n\n",
    b"retry: soon\n\n",
    b"id: \xff\n\n",
    b"\n\n\n",
    b"no field\n\n",
)


def _wrong_id(server: "Server", request: Message) -> Iterable[Item]:
    yield {**_text(request, "for another"), "id": 1_000_000}


def _heir(*, daemon: bool, dies: bool) -> Handler:
    """Leave a child behind that holds stdin, stdout and stderr: in the server's group, or out of all of them."""

    def on_call(server: "Server", request: Message) -> Iterable[Item]:
        _leave_child(daemon=daemon)
        return [Signal.DIE] if dies else _right(server, request)

    return on_call


def _leave_child(*, daemon: bool) -> None:
    if os.fork():
        return
    if daemon:
        os.setsid()
        if os.fork():
            os._exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        signal.pause()


def _ignore_signals() -> None:
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)


def _stop_reading(server: "Server", request: Message) -> Iterable[Item]:
    server.reading.clear()
    return _right(server, request)


def _deep(server: "Server", request: Message) -> Iterable[Item]:
    deep = "[" * 100_000 + "]" * 100_000
    head = f'{{"jsonrpc":"2.0","id":{json.dumps(request["id"])},"result":{{"resultType":"complete",'
    body = f'{head}"content":[{{"type":"text","text":"deep"}}],"structuredContent":{{"a":{deep}}}}}}}'
    return [Page(200, _JSON, body.encode()) if server.http else f"{body}\n".encode()]


_JSON = {"Content-Type": "application/json"}
_HTML = b"<!doctype html><title>502 Bad Gateway</title><h1>502 Bad Gateway</h1>"
_OUTPUT = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def _page(status: int, body: bytes = b"", **headers: str) -> Handler:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return _always(Page(status, named, body))


def _drip(server: "Server", request: Message) -> Iterable[Item]:
    return [Page(200, _JSON, json.dumps(next(iter(_right(server, request)))).encode(), pause_s=1.0)]


def _cut(server: "Server", request: Message) -> Iterable[Item]:
    return [Page(200, {**_JSON, "Content-Length": "1000"}, b'{"jsonrpc": "2.0", '), Signal.CUT]


def _wrong_type(server: "Server", request: Message) -> Iterable[Item]:
    return [Page(200, {"Content-Type": "text/csv"}, json.dumps(next(iter(_right(server, request)))).encode())]


def _bad_event(server: "Server", request: Message) -> Iterable[Item]:
    return [Signal.STREAM, b"event: message\ndata: {what}\n\n", *_right(server, request)]


def _list_and(*tools: Message) -> Handler:
    return _says(lambda request: _listed(request, [_tool("echo"), *tools]))


CALL, LIST = "tools/call", "tools/list"

CASES: Mapping[str, Case] = {
    "healthy": Case("does everything right", eras=(LEGACY, MODERN)),
    "never_answers": Case("answers nothing, the handshake included", {"*": _hang}),
    "dies_at_start": Case("exits as soon as it is started", start=_die_at_start),
    "dies_in_handshake": Case("exits when it is first spoken to", {"*": _die}),
    "dies_in_call": Case("exits in a call", {CALL: _die}, eras=(LEGACY, MODERN)),
    "hangs_in_call": Case("never answers a call", {CALL: _hang}, eras=(LEGACY, MODERN)),
    "hangs_in_list": Case("never answers tools/list", {LIST: _hang}, eras=(LEGACY, MODERN)),
    "dies_in_list": Case("exits when asked for its tools", {LIST: _die}),
    "list_error": Case("answers tools/list with an error", {LIST: _says(lambda r: _error(r, -32603, "no disk"))}),
    "list_nonsense": Case("answers tools/list with what is no list", {LIST: _says(lambda r: _listed(r, 7))}),  # type: ignore[arg-type] # on purpose
    "same_cursor": Case("its cursor does not advance", {LIST: _same_cursor}),
    "new_cursors": Case("its cursor never ends", {LIST: _new_cursors}),
    "many_tools": Case("has 10,000 tools", {LIST: _many_tools}),
    "odd_names": Case("has tools with names twice, of 200 characters, illegal", {LIST: _odd_names}),
    "broken_schemas": Case("has tools that are none beside a good one", {LIST: _broken_schemas}),
    "huge_result": Case("answers with 20 MB in a line", {CALL: _huge_result}),
    "huge_event": Case("answers with 20 MB in an event", {CALL: _huge_event}, HTTP),
    "endless_line": Case("begins an answer that never ends", {CALL: _endless_line}),
    "floods_stderr": Case("writes 100 MB to stderr, then answers", {CALL: _flood}, STDIO),
    "endless_flood": Case("writes to stderr for ever, no UTF-8", {CALL: _endless_flood}, STDIO),
    "list_changed_storm": Case(
        "says without end that its tools have changed",
        {"subscriptions/listen": _storm, "notifications/initialized": _storm, "GET": _storm},
        eras=(LEGACY, MODERN),
    ),
    "asks_for_ever": Case("asks the user again and again", {CALL: _ask_for_ever}, eras=(LEGACY, MODERN)),
    "asks_more_and_more": Case(
        "asks a thousand questions at once",
        {CALL: _input_required(inputRequests={f"q{number}": _ELICITATION for number in range(1_000)})},
    ),
    "polls_for_ever": Case("says to come again, for ever", {CALL: _input_required(requestState="later")}),
    "garbage": Case("says much that is no answer before it answers", {CALL: _garbage}, eras=(LEGACY, MODERN)),
    "garbage_from_the_start": Case("the same, to everything", {"*": _garbage}, STDIO, (LEGACY, MODERN)),
    "wrong_id": Case("answers under the id of another request", {CALL: _wrong_id}),
    "error_reply": Case("answers a call with a protocol error", {CALL: _says(lambda r: _error(r, -32603, "no disk"))}),
    "is_error": Case(
        "says that the tool failed", {CALL: _says(lambda r: _text(r, "there is no such city", isError=True))}
    ),
    "bad_output": Case(
        "answers with what its own schema forbids",
        {
            LIST: _list_and(_tool("work", outputSchema=_OUTPUT)),
            CALL: _says(lambda r: _text(r, "so many", structuredContent={"n": "many"})),
        },
    ),
    "no_output": Case(
        "leaves out the output that its schema demands",
        {LIST: _list_and(_tool("work", outputSchema=_OUTPUT)), CALL: _says(lambda r: _text(r, "so many"))},
    ),
    "broken_output_schema": Case(
        "its output schema is none",
        {
            LIST: _list_and(_tool("work", outputSchema={"type": 7, "$ref": "http://127.0.0.1:9/schema"})),
            CALL: _says(lambda r: _text(r, "so many", structuredContent={"n": 7})),
        },
    ),
    "odd_content": Case(
        "answers with a kind of content that nobody knows",
        {CALL: _says_of_work(content=[{"type": "hologram", "beam": 7}, {"type": "text", "text": "and a word"}])},
    ),
    "nonsense_content": Case("answers with what is no result", {CALL: _says_of_work(content="not a list")}),
    "null_result": Case("answers null", {CALL: _says(lambda r: {"jsonrpc": "2.0", "id": r["id"], "result": None})}),
    "bad_base64": Case(
        "answers with an image that is none",
        {CALL: _says_of_work(content=[{"type": "image", "data": "not base64!", "mimeType": "image/png"}])},
    ),
    "lone_surrogate": Case("answers with half a character", {CALL: _says(lambda r: _text(r, "half \ud83d a face"))}),
    "deep": Case("answers with lists 100,000 deep", {CALL: _deep}),
    "stops_reading": Case("reads nothing any more once it has listed its tools", {LIST: _stop_reading}),
    "deaf": Case("works, but ignores SIGTERM and the end of its stdin", {}, STDIO, start=_ignore_signals, deaf=True),
    "deaf_and_hangs": Case("the same, and hangs", {CALL: _hang}, STDIO, start=_ignore_signals, deaf=True),
    "heir": Case("leaves a child that holds its pipes", {CALL: _heir(daemon=False, dies=False)}, STDIO),
    "heir_of_the_dead": Case(
        "dies in a call, but a child holds its pipes", {CALL: _heir(daemon=False, dies=True)}, STDIO
    ),
    "daemon": Case("leaves a daemon of a session of its own", {CALL: _heir(daemon=True, dies=False)}, STDIO),
    "http_500": Case("answers a call with 500", {CALL: _page(500, b"out of order", Content_Type="text/plain")}, HTTP),
    "http_html": Case("answers a call with a page", {CALL: _page(200, _HTML, Content_Type="text/html")}, HTTP),
    "http_redirect": Case("sends a call elsewhere", {CALL: _page(307, Location="http://127.0.0.2:9/mcp")}, HTTP),
    "http_loop": Case("sends a call round in circles", {CALL: _page(307, Location="/mcp")}, HTTP),
    "http_401": Case("wants a token for a call", {CALL: _page(401, WWW_Authenticate="Bearer")}, HTTP),
    "http_drip": Case("answers a call with a byte a second", {CALL: _drip}, HTTP),
    "http_cut": Case("closes the connection in an answer", {CALL: _cut}, HTTP, (LEGACY, MODERN)),
    "http_silence": Case(
        "closes the connection instead of an answer", {CALL: _always(Signal.CUT)}, HTTP, (LEGACY, MODERN)
    ),
    "http_empty": Case(
        "answers a call with 200 and nothing", {CALL: _page(200, Content_Type="application/json")}, HTTP
    ),
    "http_202": Case("answers a call with 202", {CALL: _page(202)}, HTTP),
    "http_bad_event": Case("answers a call with an event that is no JSON", {CALL: _bad_event}, HTTP),
    "http_type": Case("answers a call as CSV", {CALL: _wrong_type}, HTTP),
    "http_500_always": Case("answers everything with 500", {"*": _page(500, b"out of order")}, HTTP),
    "http_html_always": Case(
        "answers everything with a page", {"*": _page(200, _HTML, Content_Type="text/html")}, HTTP
    ),
    "http_redirect_always": Case("sends everything elsewhere", {"*": _page(302, Location="http://127.0.0.2:9/")}, HTTP),
    "http_drip_always": Case("answers everything with a byte a second", {"*": _drip}, HTTP),
    "http_silence_always": Case("closes every connection", {"*": _always(Signal.CUT)}, HTTP),
}


# The server itself


class Server:
    """What both transports share: the case, the era, and the client's answers to questions."""

    def __init__(self, case: Case, era: str, log: str, *, http: bool) -> None:
        self.case, self.era, self.http = case, era, http
        self.reading = threading.Event()
        self.reading.set()
        self._log = log
        self._answers: dict[Any, threading.Event] = {}

    def items(self, message: Message) -> Iterator[Item]:
        """Give what is to be said and done upon a request or a notification."""
        method = message["method"]
        if method == CALL and self._log:
            with Path(self._log).open("a", encoding="utf-8") as file:
                file.write(f"{message['params']['name']}\n")
        handler = self.case.on.get(method) or (self.case.on.get("*") if "id" in message else None) or _right
        return iter(handler(self, message))

    def heard(self, answer: Message) -> None:
        """Note that the client answered a question."""
        self._answers.setdefault(answer.get("id"), threading.Event()).set()

    def wait_for(self, question: str) -> None:
        """Wait until the client has answered."""
        self._answers.setdefault(question, threading.Event()).wait()


def _wait_for_ever() -> None:
    threading.Event().wait()


def _speak_stdio(server: Server) -> None:
    lock = threading.Lock()

    def write(data: bytes) -> None:
        with lock:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()

    def say(items: Iterator[Item]) -> None:
        for item in items:
            match item:
                case Signal.HANG:
                    return
                case Signal.DIE:
                    os._exit(1)
                case dict():
                    write(json.dumps(item).encode() + b"\n")
                case bytes():
                    write(item)

    while server.reading.is_set() and (line := sys.stdin.buffer.readline()):
        try:
            message = json.loads(line)
        except ValueError:
            write(b'{"jsonrpc": "2.0", "id": null, "error": {"code": -32700, "message": "Parse error"}}\n')
            continue
        if "method" in message:
            threading.Thread(target=say, args=(server.items(message),), daemon=True).start()
        else:
            server.heard(message)
    if server.case.deaf or not server.reading.is_set():
        _wait_for_ever()
    os._exit(0)


def _speak_http(server: Server, port: int) -> None:
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # else every request gets a connection of its own
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            """Say nothing."""

        def do_GET(self) -> None:
            handler = server.case.on.get("GET") if server.era == LEGACY else None
            self.say(iter([Page(405, {}, b"")] if handler is None else handler(server, {"method": "GET"})))

        def do_DELETE(self) -> None:
            self.say(iter([Page(200, {}, b"")]))

        def do_POST(self) -> None:
            if not server.reading.is_set():
                _wait_for_ever()
            message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if "method" in message and "id" in message:
                self.say(server.items(message))
                return
            if "method" not in message:
                server.heard(message)
            self.say(iter([Page(202, {}, b"")]))

        def say(self, items: Iterator[Item]) -> None:
            try:
                for item in items:
                    self.say_one(item)
            except OSError:  # the client did not wait
                self.close_connection = True

        def say_one(self, item: Item) -> None:
            match item:
                case Page():
                    self.head(item.status, {"Content-Length": str(len(item.body)), **item.headers})
                    for start in range(0, len(item.body), 1 if item.pause_s else max(1, len(item.body))):
                        self.wfile.write(item.body[start : start + (1 if item.pause_s else len(item.body))])
                        time.sleep(item.pause_s)
                case Signal.STREAM:
                    self.head(200, {"Content-Type": "text/event-stream", "Connection": "close"})
                    self.close_connection = self.streams = True
                case Signal.HANG:
                    _wait_for_ever()
                case Signal.DIE:
                    os._exit(1)
                case Signal.CUT:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                case bytes():
                    self.wfile.write(item)
                case dict() if self.streams:
                    self.wfile.write(b"event: message\ndata: " + json.dumps(item).encode() + b"\n\n")
                case dict():
                    body = json.dumps(item).encode()
                    self.head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
                    self.wfile.write(body)

        streams = False

        def head(self, status: int, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            session = {"Mcp-Session-Id": "session-7"} if server.era == LEGACY else {}
            for name, value in {**session, **headers}.items():
                self.send_header(name, value)
            self.end_headers()

    class QuietServer(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 100

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Say nothing: clients that hang up are part of the tests."""

    listener = QuietServer(("127.0.0.1", port), Handler)
    print(listener.server_port, flush=True)
    if server.case.start is not None:
        server.case.start()
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    listener.serve_forever(0.05)


def _end_with_stdin() -> None:
    while sys.stdin.buffer.read(1):
        continue
    os._exit(0)


def _print_table() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tests.test_mcp_chaos import print_table

    print_table()


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="?", choices=CASES, metavar="CASE")
    parser.add_argument("--era", choices=(LEGACY, MODERN), default=MODERN)
    parser.add_argument("--http", type=int, metavar="PORT")
    parser.add_argument("--log", default="", metavar="FILE")
    parser.add_argument("--cases", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.cases:
        for name, case in CASES.items():
            print(f"{name:24} {'/'.join(case.transports):10} {'/'.join(case.eras):14} {case.about}")
    elif options.table:
        _print_table()
    elif options.case is None:
        parser.error("which CASE?")
    else:
        case = CASES[options.case]
        server = Server(case, options.era, options.log, http=options.http is not None)
        if options.http is not None:
            _speak_http(server, options.http)
        if case.start is not None:
            case.start()
        _speak_stdio(server)


if __name__ == "__main__":
    main()
