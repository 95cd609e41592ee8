"""The wire: one connection to an MCP server, in either era of the protocol, over its process or over HTTP.

It stands on the SDK's session, for the handshakes and for what each era wants in a request, but takes the results of
`tools/list` and `tools/call` as they came: the session refuses a page for one odd tool, and a result that does not fit
the tool's own schema, after the tool has done its work.

Imports mcp, and so is itself imported only where a connection is opened.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from enum import Enum
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.abc
import mcp_types as types
from anyio.lowlevel import checkpoint
from attrs import frozen
from mcp.client.session import ClientSession
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client
from mcp.client.subscriptions import SubscriptionLost, listen
from mcp.shared.dispatcher import CallOptions, DispatchContext, OnNotify, OnNotifyIntercept, OnRequest
from mcp.shared.exceptions import MCPError
from mcp.shared.inbound import find_invalid_x_mcp_header, mcp_param_headers, x_mcp_header_map
from mcp.shared.jsonrpc_dispatcher import JSONRPCDispatcher
from mcp.shared.message import SessionMessage
from mcp.shared.transport_context import TransportContext
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from pydantic import ValidationError

from agent_fsm.messages import cut, encodable
from agent_fsm.redaction import redact
from agent_fsm.tools.mcp.config import ServerSpec
from agent_fsm.tools.mcp.http import MAX_BODY_BYTES, HttpClient
from agent_fsm.tools.mcp.reader import LOST, SESSION_GONE, UNREADABLE, UNSENT, named_id, read_message, wanted_by, whole
from agent_fsm.tools.mcp.stdio import MAX_LINE_BYTES, Child, child_environment

__all__ = ["Failure", "Hooks", "Session", "Wire", "WireError"]

_PROBE_SHARE = 1 / 3
"""How much of the time to start a server may take to answer `server/discover`: old ones may not answer at all."""
_MAX_QUESTIONS = 16
_MAX_ROUNDS = 8
"""How often a tool may ask for input in one call."""
_SHOWN_CHARS = 200
_STDERR_CHARS = 1_000


class Failure(Enum):
    """What is known of a call that has no result."""

    REFUSED = "the server refused it"
    UNSENT = "it was not sent"
    SESSION_GONE = "the server does not know our session, and has done nothing"
    LOST = "it was sent, and nothing came back"
    UNREADABLE = "what came back can't be read"


class WireError(Exception):
    """Raised where a request has no result; says why, in words for the model."""

    def __init__(self, failure: Failure, why: str) -> None:
        super().__init__(why)
        self.failure = failure


@frozen
class Hooks:
    """What a connection tells, and asks."""

    changed: Callable[[], object]
    """The server says that its tools have changed; called very often by some."""
    elicit: Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any] | None]] | None
    """Answers a question of the server's with the content that it wants; None: declined. None: there is nobody."""


class Wire:
    """A connection: `async with wire.connected() as session`, in one task; `kill()` from anywhere in the same loop."""

    def __init__(self, spec: ServerSpec, hooks: Hooks, *, legacy: bool = False) -> None:
        self._spec = spec
        self._hooks = hooks
        self._legacy = legacy
        self._child: Child | None = None
        self._http: HttpClient | None = None
        self._junk = _Junk()
        self.how_ended = ""
        """How the process ended, if it did before it was told to."""

    @asynccontextmanager
    async def connected(self) -> AsyncIterator["Session"]:
        """Give a session, its handshake done.

        Raises:
            OSError: the process can't be started.
            MCPError: the server refused, or went away.
        """
        spec, hooks = self._spec, self._hooks
        async with self._transport() as (reading, writing):
            dispatcher = _Dispatcher(reading, writing, hooks, probe_s=spec.startup_timeout_s * _PROBE_SHARE)

            async def heard(message: object) -> None:
                if isinstance(message, types.ToolListChangedNotification):
                    hooks.changed()
                await checkpoint()

            client = ClientSession(
                dispatcher=dispatcher,
                message_handler=heard,
                client_info=types.Implementation(name="agent-fsm", version="1"),
                elicitation_callback=None if hooks.elicit is None else _never,  # only says that there is somebody
            )
            async with client, anyio.create_task_group() as beside:
                await _shake_hands(client, legacy=self._legacy)
                modern = client.protocol_version in MODERN_PROTOCOL_VERSIONS
                if modern and _says_when_changed(client):
                    beside.start_soon(_listen, client, hooks.changed)
                try:
                    yield Session(self, client, dispatcher, modern=modern)
                finally:
                    if self._child is not None:  # the SDK says goodbye for 5 s to a server that reads nothing
                        self._child.stop_waiting()
                beside.cancel_scope.cancel()

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must not be shown."""
        return self._spec.secrets

    @property
    def over_http(self) -> bool:
        """Whether the server is reached at a URL."""
        return self._spec.url is not None

    def kill(self) -> None:
        """Let go of all that would take time to close."""
        if self._child is not None:
            self._child.kill()
        if self._http is not None:
            self._http.hurried = True

    async def why_ended(self) -> str:
        """Return why the connection is over, as far as that is known."""
        child = self._child
        if child is None:
            return "the connection ended"
        if not self.how_ended:
            await asyncio.wait({child.exited}, timeout=0.05)  # its stdout ends a moment before it does
            self.how_ended = _how_ended(child)
        return self.how_ended

    def remarks(self) -> str:
        """Return what else is known that may explain a failure: what it wrote to stderr, and to stdout amiss."""
        secrets = self._spec.secrets  # before anything is cut: half a secret would not be found
        told = []
        if self._junk.lines:
            sample = cut(redact(self._junk.sample, secrets), _SHOWN_CHARS)
            told.append(f"{self._junk.lines:,} lines on its stdout were no JSON-RPC, such as {sample!r}")
        if self._child is not None and (said := redact(self._child.stderr, secrets)):
            told.append(f"its stderr ends with: {said[-_STDERR_CHARS:]}")
        return "; ".join(told)

    def _transport(self) -> AbstractAsyncContextManager[tuple[Any, Any]]:
        spec = self._spec
        if spec.url is None:
            return self._process()
        return self._events(spec.url) if spec.transport == "sse" else self._streamable(spec.url)

    @asynccontextmanager
    async def _streamable(self, url: str) -> AsyncIterator[tuple[Any, Any]]:
        async with HttpClient(self._spec, wanted_by(self._hooks.changed)) as self._http:
            client = streamable_http_client(url, http_client=self._http, max_sse_event_size=2 * MAX_BODY_BYTES)
            async with client as streams:
                yield streams

    @asynccontextmanager
    async def _events(self, url: str) -> AsyncIterator[tuple[Any, Any]]:
        def make(headers: Any = None, timeout: Any = None, auth: Any = None) -> HttpClient:
            self._http = HttpClient(self._spec, wanted_by(self._hooks.changed))
            return self._http

        async with sse_client(url, httpx_client_factory=make) as streams:
            yield streams

    @asynccontextmanager
    async def _process(self) -> AsyncIterator[tuple["_Reading", "_Writing"]]:
        spec = self._spec
        assert spec.command is not None  # else it would have a URL
        environment = child_environment(os.environ, spec.env)
        argv = [spec.command, *spec.args]
        self._child = child = Child(argv, environment, spec.cwd, wanted=wanted_by(self._hooks.changed))
        outstanding: set[Any] = set()
        try:
            yield _Reading(child, outstanding, self._junk), _Writing(child, outstanding)
        except BaseException:
            try:
                if child.ended:
                    await self.why_ended()
            finally:
                child.kill()
            raise
        await child.aclose()


def _how_ended(child: Child) -> str:
    code = child.returncode
    if child.why_ended or code is None:
        return child.why_ended or "it closed its stdout"
    return f"it exited with code {code}" if code >= 0 else f"it was ended by signal {-code}"


async def _never(context: Any, params: Any) -> types.ErrorData:
    """Stand for whoever answers questions, who is asked elsewhere."""
    return types.ErrorData(code=types.INVALID_REQUEST, message="Elicitation not supported")


async def _shake_hands(client: ClientSession, *, legacy: bool) -> None:
    """Find out the era of the server: the handshake of old where it does not answer as a new one does, or is known to
    be *legacy*."""
    if not legacy:
        with suppress(MCPError, RuntimeError, ValidationError):
            await client.discover()
            return
    try:
        await client.initialize()
    except MCPError as error:
        if error.code not in (types.UNSUPPORTED_PROTOCOL_VERSION, types.METHOD_NOT_FOUND):
            raise
        await client.discover()  # a new one that was slow to start: it has answered by now


def _says_when_changed(client: ClientSession) -> bool:
    capabilities = client.server_capabilities
    return capabilities is not None and capabilities.tools is not None and capabilities.tools.list_changed is True


async def _listen(client: ClientSession, changed: Callable[[], object]) -> None:
    """Tell of changes as long as the connection lasts."""
    pause_s = 1.0
    while True:
        with suppress(MCPError, SubscriptionLost, TimeoutError):
            async with listen(client, tools_list_changed=True) as changes:
                async for _ in changes:
                    changed()
        await anyio.sleep(pause_s)
        pause_s = min(2 * pause_s, 60.0)


class Session:
    """What can be asked of a server, from any task."""

    def __init__(self, wire: Wire, client: ClientSession, dispatcher: "_Dispatcher", *, modern: bool) -> None:
        self.why_ended = wire.why_ended
        self.remarks = wire.remarks
        self._client = client
        self._dispatcher = dispatcher
        self.modern = modern
        self._http = wire.over_http
        self._secrets = wire.secrets
        self.ended = dispatcher.ended
        """Done once nothing more can come; its result is why, if that is known."""

    def lose(self, why: str) -> None:
        """Give the connection up, because of *why*."""
        if not self.ended.done():
            self.ended.set_result(why)

    async def page(self, cursor: str | None) -> Mapping[str, Any]:
        """Return a page of `tools/list` as it came, but for tools that HTTP forbids to use.

        Raises:
            WireError: there is none.
        """
        params = None if cursor is None else types.PaginatedRequestParams(cursor=cursor)
        page = await self._answer(self._client.list_tools(params=params))
        listed = page.get("tools")
        if self.modern and self._http and isinstance(listed, list):
            page = {**page, "tools": [each for each in listed if self._dispatcher.learn(each)]}
        return page

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the result of `tools/call` as it came; what the tool asks meanwhile is answered.

        Raises:
            WireError: there is none; says what that means.
        """
        responses: dict[str, Any] | None = None
        state: str | None = None
        asked, pause_s = 0, 0.05
        try:
            sent = whole(dict(arguments))  # half a character can't be written
        except RecursionError:
            raise WireError(Failure.REFUSED, "the arguments are nested too deeply to be sent") from None
        while True:
            answer = await self._answer(
                self._client.call_tool(tool, sent, input_responses=responses, request_state=state)
            )
            if not self.modern or answer.get("resultType") != "input_required":
                return answer
            state = answer["requestState"] if isinstance(answer.get("requestState"), str) else None
            questions = answer.get("inputRequests") or None
            if questions is None:
                responses = None
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, 1.0)
                continue
            asked += 1
            responses = await self._answers(questions, asked)

    async def _answers(self, questions: Any, asked: int) -> dict[str, Any]:
        known = isinstance(questions, Mapping) and all(isinstance(each, Mapping) for each in questions.values())
        if not known or len(questions) > _MAX_QUESTIONS:
            raise WireError(Failure.REFUSED, f"the tool asks {len(questions) if known else 'no proper'} questions")
        first = next(iter(questions.values()))
        words = str((first.get("params") or {}).get("message") or first.get("method"))
        shown = cut(redact(words, self._secrets), _SHOWN_CHARS)
        if asked > (_MAX_ROUNDS if self._dispatcher.answers else 1):
            raise WireError(Failure.REFUSED, f"the tool asks for input again and again ({shown!r}), and got none")
        found: dict[str, Any] = {}
        for key, question in questions.items():
            if question.get("method") != "elicitation/create":
                method = str(question.get("method"))
                raise WireError(Failure.REFUSED, f"the tool wants {method!r} of us, which is not on offer")
            answer = await self._dispatcher.elicit(question.get("params") or {})
            found[key] = types.ElicitResult.model_validate(answer)
        return found

    async def _answer(self, request: Awaitable[object]) -> Mapping[str, Any]:
        try:
            await request
        except _Answered as answered:
            return answered.result
        except MCPError as error:
            raise _wire_error(error, self._secrets) from None
        except (ValidationError, ValueError, RecursionError) as error:
            raise WireError(Failure.REFUSED, f"it can't be written as a request: {error}") from None
        raise AssertionError("no answer is let pass")  # an answer never gets past the dispatcher: it raises _Answered


_FAILURES = {
    UNSENT: Failure.UNSENT,
    SESSION_GONE: Failure.SESSION_GONE,
    LOST: Failure.LOST,
    UNREADABLE: Failure.UNREADABLE,
    types.PARSE_ERROR: Failure.UNREADABLE,
}
_SDK_LOST = ("Connection closed", "SSE stream")
"""How messages begin with which the SDK itself uses a code that is many a server's own."""


def _wire_error(error: MCPError, secrets: Sequence[str]) -> WireError:
    failure, why = _FAILURES.get(error.code), error.message
    if failure is None and error.code == types.CONNECTION_CLOSED and why.startswith(_SDK_LOST):
        failure = Failure.LOST
    if failure is None:
        failure, why = Failure.REFUSED, f"MCP error {error.code}: {why}"
    return WireError(failure, cut(redact(encodable(why), secrets), 2_000))


class _Answered(Exception):  # noqa: N818 - no error: takes a result past the session, which would judge it
    def __init__(self, result: Mapping[str, Any]) -> None:
        super().__init__()
        self.result = result


class _Dispatcher(JSONRPCDispatcher[TransportContext]):
    """The SDK's, but results of tools go past the session, and questions of the server are answered here."""

    def __init__(self, reading: Any, writing: Any, hooks: Hooks, *, probe_s: float) -> None:
        super().__init__(reading, writing)
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.answers = hooks.elicit is not None
        self._elicit = hooks.elicit
        self._probe_s = probe_s
        self._headers: dict[str, dict[tuple[str, ...], str]] = {}
        self._declined = 0

    def learn(self, tool: Any) -> bool:
        """Note which arguments of *tool* are headers too; False if it has no right to what it wants there."""
        schema = tool.get("inputSchema") if isinstance(tool, Mapping) else None
        if not isinstance(schema, Mapping):
            return True
        if find_invalid_x_mcp_header(schema) is not None:
            return False
        self._headers[str(tool.get("name"))] = x_mcp_header_map(schema)
        return True

    async def send_raw_request(
        self,
        method: str,
        params: Mapping[str, Any] | None,
        opts: CallOptions | None = None,
        *,
        _related_request_id: types.RequestId | None = None,
    ) -> dict[str, Any]:
        options = opts or CallOptions()
        if method == "server/discover":
            options["timeout"] = self._probe_s
        if method == "tools/call" and params is not None and (known := self._headers.get(params["name"])):
            options.setdefault("headers", {}).update(mcp_param_headers(known, params.get("arguments") or {}))
        result = await super().send_raw_request(method, params, options, _related_request_id=_related_request_id)
        if method in ("tools/list", "tools/call"):
            self._declined = 0
            raise _Answered(result)
        return result

    async def run(
        self,
        on_request: OnRequest,
        on_notify: OnNotify,
        on_notify_intercept: OnNotifyIntercept | None = None,
        *,
        task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        async def answer(
            context: DispatchContext[TransportContext], method: str, params: Mapping[str, Any] | None
        ) -> dict[str, Any]:
            if method == "elicitation/create":
                # One that asks without end would else keep us busy
                self._declined += 1
                await asyncio.sleep(min(1.0, 0.001 * 2 ** min(self._declined, 10)))
                return await self.elicit(params or {})
            return await on_request(context, method, params)

        try:
            await super().run(answer, on_notify, on_notify_intercept, task_status=task_status)
        finally:
            if not self.ended.done():
                self.ended.set_result("")

    async def elicit(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a question, in the protocol's form."""
        content = None if self._elicit is None else await self._elicit(question)
        return {"action": "decline"} if content is None else {"action": "accept", "content": dict(content)}


# Lines


class _Junk:
    """Lines that were nothing."""

    def __init__(self) -> None:
        self.lines = 0
        self.sample = ""

    def add(self, line: bytes) -> None:
        self.lines += 1
        if not self.sample:
            self.sample = line[:1_000].decode("utf-8", "replace").strip()


class _Stream:
    """What reading and writing have in common: there is nothing to close, the process is closed elsewhere."""

    async def aclose(self) -> None:
        """Do nothing."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class _Reading(_Stream):
    """The messages in the lines of a process."""

    def __init__(self, child: Child, outstanding: set[Any], junk: _Junk) -> None:
        self._child = child
        self._outstanding = outstanding
        self._junk = junk
        self._ready: list[SessionMessage] = []

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SessionMessage:
        while not self._ready:
            line = await self._child.next_line()
            if line is None:
                raise StopAsyncIteration
            self._ready = self._messages(line)
        return self._ready.pop(0)

    async def receive(self) -> SessionMessage:
        try:
            return await self.__anext__()
        except StopAsyncIteration:
            raise anyio.EndOfStream from None

    def _messages(self, line: bytes) -> list[SessionMessage]:
        long = line.endswith(b"\0")
        message = None if long else read_message(line)
        if message is None:
            return self._failures(line, long=long)
        if isinstance(message, types.JSONRPCResponse | types.JSONRPCError):
            self._outstanding.discard(message.id)
        return [SessionMessage(message)]

    def _failures(self, line: bytes, *, long: bool) -> list[SessionMessage]:
        """Return errors for the requests that a line which can't be read may answer; none if it answers none."""
        ids = {named_id(line)} & self._outstanding or (self._outstanding if long else set())
        if not ids:
            self._junk.add(line)
            return []
        why = f"the answer is a line of more than {MAX_LINE_BYTES:,} bytes" if long else "the answer is no JSON-RPC"
        error = types.ErrorData(code=UNREADABLE, message=why)
        self._outstanding -= ids
        return [SessionMessage(types.JSONRPCError(jsonrpc="2.0", id=each, error=error)) for each in ids]


class _Writing(_Stream):
    """Messages, as lines into a process."""

    def __init__(self, child: Child, outstanding: set[Any]) -> None:
        self._child = child
        self._outstanding = outstanding

    async def send(self, item: SessionMessage, /) -> None:
        message = item.message
        match message:
            case types.JSONRPCRequest():
                self._outstanding.add(message.id)
            case types.JSONRPCNotification(method="notifications/cancelled", params=dict() as params):
                self._outstanding.discard(params.get("requestId"))
        try:
            await self._child.write(message.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n")
        except OSError:
            raise anyio.BrokenResourceError from None
