"""What a server refuses, in one form, and what it asks of every request before anything else looks at it.

Every 4xx and 5xx has the body `{"error": {"code": ..., "message": ..., "retryable": ...}}`. No message repeats what the
client sent but the names of fields: values may be secrets.
"""

import asyncio
import ipaddress
import secrets
from collections.abc import Collection, Coroutine, Mapping
from http import HTTPStatus
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from attrs import frozen
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent_fsm.errors import ConfigError

__all__ = [
    "BODY_SECONDS",
    "Problem",
    "ProblemBody",
    "check_binding",
    "documented",
    "equip",
    "is_loopback",
    "problem",
    "until_disconnect",
]

BODY_SECONDS: Final = 30.0
"""Seconds that a request's body may take to arrive."""

_DRAIN_S: Final = 1.0
"""Seconds for which a body that is too large is read and forgotten: a client that is still sending would not read the
answer."""
_SHOWN_ERRORS: Final = 5
_SHOWN_CHARS: Final = 80
_MESSAGE_CHARS: Final = 2_000
_CODES: Final[Mapping[int, str]] = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    413: "too_large",
    415: "unsupported_media_type",
    422: "invalid_request",
    429: "too_many_requests",
    500: "internal_error",
    502: "bad_gateway",
    503: "unavailable",
    504: "timeout",
}

_PROXIED: Final = frozenset((b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via"))

_Result = TypeVar("_Result")


# The form


class ProblemDetail(BaseModel):
    """What was refused and why."""

    code: str = Field(description="What kind of refusal it is, for programs.")
    message: str = Field(description="What is wrong and what would be right, for people.")
    retryable: bool = Field(description="Whether the same request may succeed later.")


class ProblemBody(BaseModel):
    """The body of every answer of 400 and above."""

    error: ProblemDetail


class Problem(Exception):  # noqa: N818 - not every one is an error of ours
    """Raised to answer a request with a refusal."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        retryable: bool = False,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retryable = retryable
        self.headers = headers

    def response(self) -> JSONResponse:
        """Return the answer."""
        return problem(self.status, self.code, self.message, retryable=self.retryable, headers=self.headers)


def problem(
    status: int, code: str, message: str, *, retryable: bool = False, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return a refusal in the one form; what can't be sent in *message* becomes a question mark."""
    text = _cut(message, _MESSAGE_CHARS).encode(errors="replace").decode()  # of a lone surrogate there is no UTF-8
    content = {"error": {"code": code, "message": text, "retryable": retryable}}
    return JSONResponse(content, status, headers=None if headers is None else dict(headers))


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what a route's `responses` say of these statuses, for the OpenAPI document."""
    return {status: {"model": ProblemBody, "description": HTTPStatus(status).phrase} for status in statuses}


# What every request is asked


def equip(app: FastAPI, *, token: str | None, max_body_bytes: int, open_paths: Collection[str] = ("/healthz",)) -> None:
    """Put *app* behind the checks that are the same for all, and its refusals into the one form.

    With a token every request must bear it. Without one only those are served that came to a loopback address, name it
    as their host and come from no foreign web page. A body of more than *max_body_bytes* (`>`) is refused, declared or
    not. *open_paths* need no token and may be asked under any address and name.
    """
    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_error)
    app.add_middleware(_Door, token=token or None, max_body_bytes=max_body_bytes, open_paths=frozenset(open_paths))


def check_binding(host: str, token: str | None) -> None:
    """Refuse to listen where others can reach us, unless they need a token.

    Raises:
        ConfigError: *host* is no loopback address, and there is no token.
    """
    if not token and not is_loopback(host):
        raise ConfigError(f"listening on {host or 'every address'} takes a token; without one only loopback will do")


def is_loopback(host: str) -> bool:
    """Say whether *host*, a name or an address without port, is this machine's own and nobody else's."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


@frozen
class _Door:
    """ASGI middleware; not Starlette's BaseHTTPMiddleware, which hides from the app that its client has gone."""

    app: ASGIApp
    token: str | None
    max_body_bytes: int
    open_paths: frozenset[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no websockets here
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            if scope["path"] not in self.open_paths:
                self._admit(scope)
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._body(scope, receive)
        except TimeoutError:
            late = problem(408, _CODES[408], f"the body took more than {BODY_SECONDS:g} s to arrive", retryable=True)
            await late(scope, receive, send)
        except Problem as refused:
            await refused.response()(scope, receive, send)
        else:
            if body is not None:
                await self.app(scope, _Replayed(body, receive), send)

    def _admit(self, scope: Scope) -> None:
        headers = [(name.lower(), value) for name, value in scope["headers"]]
        if self.token is None:
            _check_local(scope, headers)
            return
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, credentials = (given[0] if len(given) == 1 else b"").partition(b" ")
        right = secrets.compare_digest(credentials.strip(), self.token.encode())
        if not right or scheme.lower() != b"bearer":
            what = "the bearer token is not the right one" if given else "this takes a bearer token"
            text = f"{what}: send the header Authorization: Bearer TOKEN, once"
            raise Problem(401, _CODES[401], text, headers={"WWW-Authenticate": "Bearer"})

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the whole body, or None if its client went away."""
        declared = next((value for name, value in scope["headers"] if name.lower() == b"content-length"), b"0")
        too_large = declared.isdigit() and int(declared[:20]) > self.max_body_bytes
        body, more = bytearray(), True
        while more and not too_large:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            too_large = len(body) > self.max_body_bytes
        if too_large:
            if more:
                await _drain(receive)
            text = f"the body has more than {self.max_body_bytes} bytes, the most that is read"
            raise Problem(413, _CODES[413], text, headers={"Connection": "close"})
        return bytes(body)


async def _drain(receive: Receive) -> None:
    try:
        async with asyncio.timeout(_DRAIN_S):
            while (message := await receive()).get("more_body", False):
                assert message["type"] == "http.request"  # a disconnect has no more body
    except TimeoutError:
        return


class _Replayed:
    """Gives the body, which has been read, and then what comes after it: that the client has gone."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._first: Message | None = {"type": "http.request", "body": body, "more_body": False}
        self._receive = receive

    async def __call__(self) -> Message:
        first, self._first = self._first, None
        return await self._receive() if first is None else first


def _check_local(scope: Scope, headers: list[tuple[bytes, bytes]]) -> None:
    """Refuse what did not come from this machine by its own name.

    A web page may make its reader's browser ask us (Origin tells), or may give itself an address of ours (Host tells).
    """
    server = scope.get("server")
    if server is None or not is_loopback(str(server[0])):
        text = "without a token this is served on loopback only; its operator can set one"
        raise Problem(403, "token_required", text)
    if not _PROXIED.isdisjoint(name for name, _ in headers):
        text = "this came through a proxy, so that others may come, too; without a token that is not served"
        raise Problem(403, "token_required", text)
    host = b"".join(value for name, value in headers if name == b"host").decode("latin-1")
    if not is_loopback(_host_name(f"//{host}")):
        raise Problem(403, "host_not_allowed", "without a token this answers only to localhost and loopback addresses")
    for name, value in headers:
        if name == b"origin" and not is_loopback(_host_name(value.decode("latin-1"))):
            raise Problem(403, "origin_not_allowed", "without a token this answers to no page of another site")


def _host_name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # brackets that don't close
        return ""


# Handlers


async def _on_problem(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Problem)
    return error.response()


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status = error.status_code
    code = _CODES.get(status, "error")
    return problem(status, code, str(error.detail), retryable=status in (429, 503), headers=error.headers)


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    # What happened is raised on, for the server to log; it may hold what is nobody's business
    return problem(500, _CODES[500], "the server failed at this request; its log says how")


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    if any(each["type"] == "json_invalid" for each in errors):
        why = errors[0].get("ctx", {}).get("error", "")
        return problem(400, "invalid_json", f"the body is not valid JSON: {why}, at character {errors[0]['loc'][-1]}")
    told = [_told(each) for each in errors[:_SHOWN_ERRORS]]
    if len(errors) > len(told):
        told.append(f"and {len(errors) - len(told)} more")
    return problem(422, _CODES[422], "; ".join(told))


def _told(error: Mapping[str, Any]) -> str:
    where = ".".join(_cut(str(each), _SHOWN_CHARS) for each in error["loc"] if each != "body") or "the body"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


# Clients that go away


async def until_disconnect(request: Request, coroutine: Coroutine[Any, Any, _Result]) -> _Result | None:
    """Return what *coroutine* returns; None if the client went away first, after the coroutine was cancelled and ended.

    If whoever awaits this is cancelled, the coroutine is too.
    """
    work = asyncio.create_task(coroutine)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        cut_short = work.cancel()
        if cut_short:
            await asyncio.wait({work})
    return None if cut_short and work.cancelled() else work.result()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
