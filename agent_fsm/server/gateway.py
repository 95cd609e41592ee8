"""Gateway: the tools of MCP servers by HTTP, for clients that don't speak MCP (`/tools`, `/invoke`) or do (`/mcp`).

A call is refused before its server sees it if nobody offers the tool, if its arguments don't fit the tool's schema, or
if too many are under way. One that has begun ends when its tool ends, when its time is over, or when its client goes.
"""

import asyncio
import hashlib
import json
import math
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from attrs import define, field, frozen
from fastapi import FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError
from starlette.routing import Route

from agent_fsm.protocol import ToolResult
from agent_fsm.server.arguments import faults_of, read_arguments
from agent_fsm.server.listening import listen
from agent_fsm.server.problems import Problem, check_binding, documented, equip, is_loopback, problem, until_disconnect
from agent_fsm.tools.mcp.config import read_servers

if TYPE_CHECKING:
    from mcp.server.lowlevel.server import Server
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
    from starlette.types import Receive, Scope, Send

    from agent_fsm.tools.mcp.invoker import MCPInvoker, Servers

__all__ = ["create_app", "serve"]

_DAY_MS: Final = 86_400_000
_SHOWN_CHARS: Final = 100
_DEADLINE: Final = Header(le=1_000 * _DAY_MS, allow_inf_nan=False, description="Milliseconds that are left.")
_MAX_SESSIONS: Final = 1_000
"""Sessions of MCP clients of the old era at once."""


def create_app(
    servers: "Servers | MCPInvoker",
    *,
    token: str | None = None,
    max_body_bytes: int = 1_000_000,
    max_calls: int = 256,
) -> FastAPI:
    """Return the application; it starts *servers* when it starts, and closes them when it ends.

    Args:
        servers: what `MCPInvoker` takes; or one whose `async with` block we are in, which is then not closed.
        token: what every request must bear; None: none, and only requests of this machine are served.
        max_body_bytes: the most that a request may have.
        max_calls: calls under way at once; one more is refused with 429.

    Raises:
        ConfigError: a server can't be meant so.
    """
    from agent_fsm.tools.mcp.invoker import MCPInvoker

    kept = isinstance(servers, MCPInvoker)
    invoker = servers if isinstance(servers, MCPInvoker) else MCPInvoker(servers)
    app = FastAPI(
        title="agent_fsm gateway",
        lifespan=_lifespan_of(nullcontext(invoker) if kept else invoker, max_calls),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    equip(app, token=token, max_body_bytes=max_body_bytes)
    _add_routes(app)
    app.router.routes.append(Route("/mcp", endpoint=_McpDoor(app)))
    return app


def serve(path: Path | str, *, host: str = "127.0.0.1", port: int = 8787, token: str | None = None) -> None:
    """Serve the servers that the file at *path* names, until SIGINT or SIGTERM; port 0 is any that is free.

    Raises:
        ConfigError: the file can't be read or meant so, or *host* is not loopback and there is no token.
    """
    check_binding(host, token)
    found = read_servers(path, os.environ)
    for warning in found.warnings:
        sys.stderr.write(f"Warning: {warning}\n")
    names = ", ".join(each.name for each in found.servers if each.enabled) or "no servers"
    listen(create_app(found.servers, token=token), names, host=host, port=port, token=token)


# What goes over the wire


class Invocation(BaseModel):
    """A call."""

    name: str = Field(description="The tool's name, as GET /tools has it.")
    arguments: str | dict[str, Any] | None = Field(
        default=None, description="A JSON object, or the text of one, as models give it."
    )


_INVOCATION: Final = Invocation.model_json_schema()


def _invocation(body: bytes) -> Invocation:
    """Return the call in *body*. FastAPI's own reading has four answers to what is no JSON."""
    try:
        return Invocation.model_validate(json.loads(body))
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_input=False)) from None
    except (ValueError, RecursionError):
        raise Problem(400, "invalid_json", "the body is not valid JSON") from None


class Answer(BaseModel):
    """What a tool said: `text`, or `error` if it failed."""

    isError: bool  # noqa: N815 - as MCP calls it
    text: str | None = Field(default=None, description="What it said, in words; of a success.")
    error: str | None = Field(default=None, description="What it said, in words; of a failure.")
    content: list[dict[str, Any]] = Field(default=[], description="MCP content blocks that are no text.")
    structuredContent: Any = Field(default=None, description="Any JSON value.")  # noqa: N815 - as MCP calls it


class ServerState(BaseModel):
    """How one server is."""

    state: Literal["starting", "ready", "failed", "restarting", "closed"]
    error: str = Field(description="Why it failed; empty unless it did.")
    tools: int = Field(description="How many tools it offers.")
    restarts: int


class Health(BaseModel):
    """How all are: `ok` if each is ready, `failed` if none is, else `degraded`."""

    status: Literal["ok", "degraded", "failed"]
    servers: dict[str, ServerState]


def _encoded(value: Any) -> bytes:
    """Return JSON in ASCII: what a server sends may hold what UTF-8 has not, or numbers that JSON has not."""
    try:
        return json.dumps(value, allow_nan=False).encode()
    except ValueError:
        return json.dumps(_finite(value)).encode()


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {name: _finite(each) for name, each in value.items()}
        case list() | tuple():
            return [_finite(each) for each in value]
    return value


def _json(value: Any, **headers: str) -> Response:
    return Response(_encoded(value), media_type="application/json", headers=headers)


# Calls


@frozen
class _Offered:
    """A tool that the gateway offers."""

    server: str
    listed: Mapping[str, Any]
    """As GET /tools says it."""

    @property
    def schema(self) -> Mapping[str, Any]:
        parameters: Mapping[str, Any] = self.listed["function"]["parameters"]
        return parameters

    @property
    def repeatable(self) -> bool:
        """True if, by the word of its server, calling it twice does no more than calling it once."""
        hints = self.listed.get("annotations", {})
        return any(hints.get(each) is True for each in ("readOnlyHint", "idempotentHint"))


_NOT_SENT: Final = "error: the call was not sent"
_NOT_IN_TIME: Final = "error: no answer within "
_LOST: Final = "was lost in this call"
"""How the invoker begins what it says of a call that its tool did not answer."""


@define(eq=False)
class _Gateway:
    """What the routes share: the servers, what they offered when last asked, and how many calls are under way."""

    invoker: "MCPInvoker"
    max_calls: int
    calls: int = 0
    _offered: dict[str, _Offered] = field(factory=dict)
    _listing: "asyncio.Task[Problem | None] | None" = None

    def start(self) -> None:
        """Begin to list anew, unless that is going on: who lists first starts the servers."""
        if self._listing is None or self._listing.done():
            self._listing = asyncio.create_task(self._list())

    async def aclose(self) -> None:
        """End what `start` began."""
        if self._listing is not None:
            self._listing.cancel()
            await asyncio.wait({self._listing})

    async def tools(self) -> Mapping[str, _Offered]:
        """Return what is offered now, by name.

        Raises:
            Problem: no server answers.
        """
        self.start()
        assert self._listing is not None
        fault = await asyncio.shield(self._listing)  # others wait for it, too
        if fault is not None:
            raise fault
        return self._offered

    async def _list(self) -> Problem | None:
        try:
            listed = await self.invoker.list_openai_tools()
        except RuntimeError as error:
            return Problem(503, "unavailable", f"no server answers: {error}", True)
        self._offered = {each.listed["function"]["name"]: each for each in map(self._read, listed)}
        return None

    def _read(self, listed: Mapping[str, Any]) -> _Offered:
        name = listed["function"]["name"]
        server, _ = self.invoker.place_of(name) or ("", "")
        # Only what is true or false: a text may hold what was configured as a secret
        said = self.invoker.tools_of(server)[name].annotations
        hints = {hint: value for hint, value in said.items() if isinstance(value, bool)}
        return _Offered(server, {**listed, "annotations": hints} if hints else listed)

    async def call(self, name: str, arguments: str | Mapping[str, Any] | None, deadline_s: float) -> ToolResult:
        """Return what the tool said.

        Raises:
            Problem: it was not called, or did not answer.
        """
        ends = asyncio.get_running_loop().time() + deadline_s
        try:
            async with asyncio.timeout(max(0.0, deadline_s)):
                offered = await self._find(name)
        except TimeoutError:
            raise Problem(504, "timeout", "the deadline was over before the call was sent", True) from None
        try:
            checked = read_arguments(arguments)
        except ValueError as error:
            raise Problem(422, "invalid_arguments", str(error)) from None
        faults = faults_of(checked, offered.schema)
        if faults:
            raise Problem(422, "invalid_arguments", "; ".join(faults))
        timeout_s = ends - asyncio.get_running_loop().time()
        if timeout_s <= 0:
            raise Problem(504, "timeout", "the deadline was over before the call was sent", True)
        if self.calls >= self.max_calls:
            many = f"{self.max_calls} calls are under way, the most that are allowed"
            raise Problem(429, "too_many_calls", many, True, headers={"Retry-After": "1"})
        self.calls += 1
        try:
            result = await self.invoker.invoke(name, checked, timeout_s=timeout_s)
        finally:
            self.calls -= 1
        refused = _refusal(offered, result)
        if refused is not None:
            raise refused
        return result

    async def _find(self, name: str) -> _Offered:
        if name not in self._offered:
            await self.tools()
        elif self.invoker.tools_changed():
            self.start()  # without waiting: it may be another server that is not well
        if name in self._offered and self.invoker.place_of(name) is not None:
            return self._offered[name]
        near = get_close_matches(name[:_SHOWN_CHARS], self._offered, n=3, cutoff=0.8)
        also = f"; did you mean {' or '.join(near)}?" if near else "; GET /tools says what there is"
        raise Problem(404, "unknown_tool", f"there is no such tool{also}")


def _refusal(offered: _Offered, result: ToolResult) -> Problem | None:
    """Return how to refuse a call that its tool did not answer; None if it did."""
    if result.ok:
        return None
    told = result.text.removeprefix("error: ")
    if result.text.startswith(_NOT_SENT):
        return Problem(503, "server_unavailable", told, True, headers={"Retry-After": "1"})
    if result.text.startswith(_NOT_IN_TIME):
        return Problem(504, "timeout", told, offered.repeatable)
    if result.text.startswith(f"error: server {offered.server!r} {_LOST}"):
        return Problem(502, "server_died", told, offered.repeatable)
    return None


def _answer(result: ToolResult) -> dict[str, Any]:
    said = {"text": result.text} if result.ok else {"error": result.text}
    more = {} if result.structured is None else {"structuredContent": result.structured}
    return {**said, "content": list(result.parts), **more, "isError": not result.ok}


def _lifespan_of(
    invoker: "AbstractAsyncContextManager[MCPInvoker]", max_calls: int
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with invoker as entered:
            gateway = _Gateway(entered, max_calls)
            app.state.gateway, app.state.sessions = gateway, _sessions(gateway)
            gateway.start()
            try:
                async with app.state.sessions.run():
                    yield
            finally:
                await gateway.aclose()

    return lifespan


def _add_routes(app: FastAPI) -> None:
    @app.get("/healthz", responses=documented(), summary="Whether the gateway is up; needs no token")
    async def alive() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/health", response_model=Health, responses=documented(401, 403), summary="How each server is")
    async def health(request: Request) -> Response:
        states = request.app.state.gateway.invoker.health()
        ready = sum(each.state == "ready" for each in states.values())
        status = "ok" if ready == len(states) else "degraded" if ready else "failed"
        servers = {
            name: {"state": each.state, "error": each.error, "tools": each.tools, "restarts": each.restarts}
            for name, each in states.items()
        }
        return _json({"status": status, "servers": servers})

    @app.get(
        "/tools",
        response_model=list[dict[str, Any]],
        responses={304: {"description": "They are as If-None-Match has them"}, **documented(401, 403, 503)},
        summary="The tools, as OpenAI function tools",
    )
    async def tools(request: Request, if_none_match: Annotated[str | None, Header()] = None) -> Response:
        offered = await request.app.state.gateway.tools()
        body = _encoded([each.listed for each in offered.values()])
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        if if_none_match is not None and tag in if_none_match:
            return Response(status_code=304, headers={"ETag": tag})
        return Response(body, media_type="application/json", headers={"ETag": tag, "Cache-Control": "no-cache"})

    @app.post(
        "/invoke",
        response_model=Answer,
        responses=documented(400, 401, 403, 404, 408, 413, 422, 429, 502, 503, 504),
        summary="Call a tool; it is cancelled if the client goes away",
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": _INVOCATION}}}},
    )
    async def invoke(request: Request, x_deadline_ms: Annotated[float, _DEADLINE] = _DAY_MS) -> Response:
        invocation = _invocation(await request.body())
        call = request.app.state.gateway.call(invocation.name, invocation.arguments, x_deadline_ms / 1_000)
        result = await until_disconnect(request, call)
        return Response(status_code=499) if result is None else _json(_answer(result))  # nobody is there to read 499


# MCP itself


@frozen
class _McpDoor:
    """The ASGI app at `/mcp`."""

    app: FastAPI

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        refused = _foreign_page(dict(scope["headers"]))
        if refused:
            await problem(403, "origin_not_allowed", refused)(scope, receive, send)
        else:
            await self.app.state.sessions.asgi_app(scope, receive, send)


def _foreign_page(headers: Mapping[bytes, bytes]) -> str:
    """Return why a web page may not ask us, if one does; MCP asks for this where there is a token too."""
    origin = headers.get(b"origin", b"").partition(b"://")[2]
    host = origin.decode("latin-1").rpartition(":")[0] if b":" in origin else origin.decode("latin-1")
    if b"origin" not in headers or origin == headers.get(b"host") or is_loopback(host):
        return ""
    return "this answers to no page of another site"


def _sessions(gateway: _Gateway) -> "StreamableHTTPSessionManager":
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

    return StreamableHTTPSessionManager(_server(gateway), max_sessions=_MAX_SESSIONS)


def _server(gateway: _Gateway) -> "Server[Any]":
    """Return the tools of all servers as one MCP server, which speaks both eras of the protocol."""
    import mcp_types as types
    from mcp.server.lowlevel.server import Server
    from mcp.shared.exceptions import MCPError

    async def list_tools(context: Any, params: types.PaginatedRequestParams | None) -> types.ListToolsResult:
        try:
            offered = await gateway.tools()
        except Problem as refused:
            raise MCPError(types.INTERNAL_ERROR, refused.message) from None
        return types.ListToolsResult(tools=[types.Tool.model_validate(_mcp_tool(each)) for each in offered.values()])

    async def call_tool(context: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        try:
            result = await gateway.call(params.name, params.arguments, _DAY_MS / 1_000)
        except Problem as refused:
            result = ToolResult(f"error: {refused.message}", ok=False)
        return types.CallToolResult.model_validate(_mcp_result(result))

    return Server("agent_fsm gateway", on_list_tools=list_tools, on_call_tool=call_tool)


def _mcp_tool(offered: _Offered) -> dict[str, Any]:
    function = offered.listed["function"]
    return {
        "name": function["name"],
        "description": function["description"],
        "inputSchema": function["parameters"],
        "annotations": offered.listed.get("annotations"),
    }


def _mcp_result(result: ToolResult) -> dict[str, Any]:
    text = [{"type": "text", "text": result.text}] if result.text else []
    # The old era has objects only; the text tells the rest
    more = {"structuredContent": _finite(result.structured)} if isinstance(result.structured, Mapping) else {}
    return {"content": [*text, *result.parts], "isError": not result.ok, **more}
