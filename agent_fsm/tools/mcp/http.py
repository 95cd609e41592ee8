"""The HTTP client under an MCP connection: what goes wrong with one request stays with that request.

In the SDK an error of the network ends the connection with all of its calls, by way of cancelling the task that holds
it; here it is the answer to the request. Bodies are bounded, and so is the time for what nobody waits for.

Imports httpx2, and so is itself imported only where a connection is opened.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import anyio
import httpx2

from agent_fsm.messages import cut

__all__ = ["LOST", "MAX_BODY_BYTES", "SESSION_GONE", "UNSENT", "HttpClient"]

MAX_BODY_BYTES = 8 * 1024 * 1024

UNSENT, LOST, SESSION_GONE = -32901, -32902, -32903
"""Codes of the errors that we answer a request with: it was not sent; it was, and there is no answer; the server does
not know our session any more, and so has done nothing."""

_CONNECT_S = 10.0
_WRITE_S = 30.0
_COURTESY_S = 5.0
"""For a notification or an answer to the server."""
_FAREWELL_S = 0.5
"""For the end of a session."""
_ERROR_PAGE_BYTES = 8_192
_ERROR_PAGE_S = 1.0
_SHOWN_CHARS = 300
_TRICKLE_BYTES, _TRICKLE_S = 4_096, 0.1
"""What is read at once, and how often, of a stream of notifications, of which none is urgent."""


class _BodyError(httpx2.StreamError):
    """Raised where a body can't be read to its end: the one kind of error that the SDK expects there."""


class HttpClient(httpx2.AsyncClient):
    """Sends the requests of one connection.

    Args:
        headers: what each request carries; redirects to other hosts are not followed with it.
        trickle: True if what comes in answer to GET are notifications only.
    """

    def __init__(self, headers: Mapping[str, str], *, trickle: bool) -> None:
        super().__init__(
            headers={**headers, "Accept-Encoding": "identity"},  # else a small body may become an endless one
            timeout=httpx2.Timeout(None, connect=_CONNECT_S, write=_WRITE_S),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=20),
            max_redirects=3,
        )
        self._trickle = trickle
        self.hurried = False
        """True once there is no time left for farewells."""

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Send *request*; the answer to a JSON-RPC request is always one that the SDK can read."""
        rpc_id, method = _rpc_of(request)
        if request.method == "GET":
            response = await super().send(request, **options)
            response.stream = _Body(response, None, trickle=self._trickle)
            return response
        if rpc_id is None:
            return await self._told(request, options)
        try:
            response = await super().send(request, **options)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.UnsupportedProtocol, httpx2.PoolTimeout) as error:
            return _error(request, rpc_id, UNSENT, f"the server can't be reached: {_words(error)}")
        except httpx2.HTTPError as error:
            return _error(request, rpc_id, LOST, f"the connection failed: {_words(error)}")
        if response.headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
            await response.aclose()
            return _error(request, rpc_id, LOST, "the server sent a compressed body, which it was asked not to")
        if response.status_code >= 400:
            return await _refusal(request, rpc_id, response)
        events = response.headers.get("content-type", "").lower().startswith("text/event-stream")
        limit = None if events else MAX_BODY_BYTES
        response.stream = _Body(response, limit, trickle=method == "subscriptions/listen")
        return response

    async def _told(self, request: httpx2.Request, options: Mapping[str, Any]) -> httpx2.Response:
        """Send what no answer is waited for: for so long, and whatever comes of it."""
        seconds = _COURTESY_S if request.method == "POST" else _FAREWELL_S
        if not (self.hurried and request.method == "DELETE"):
            with anyio.move_on_after(seconds):
                try:
                    response = await super().send(request, **options)
                    await response.aclose()
                except httpx2.HTTPError:  # nobody could do anything about it; the next request will tell
                    pass
        return httpx2.Response(202 if request.method == "POST" else 204, request=request)


def _rpc_of(request: httpx2.Request) -> tuple[Any, str]:
    """Return the id and the method of the JSON-RPC request in *request*; no id if it is a notification or none."""
    try:
        message = json.loads(request.content)
    except (ValueError, RecursionError, httpx2.RequestNotRead):
        return None, ""
    if not isinstance(message, dict) or not isinstance(message.get("method"), str):
        return None, ""
    return message.get("id"), message["method"]


def _error(request: httpx2.Request, rpc_id: Any, code: int, why: str, status: int = 200) -> httpx2.Response:
    body = {"jsonrpc": "2.0", "id": rpc_id, "error": {"code": code, "message": why}}
    return httpx2.Response(status, json=body, request=request)


async def _refusal(request: httpx2.Request, rpc_id: Any, response: httpx2.Response) -> httpx2.Response:
    """Return what a response of status 400 or more says, as a JSON-RPC error."""
    page = await _head_of(response)
    status = response.status_code
    shown = cut(page.decode("utf-8", "replace").strip(), _SHOWN_CHARS)
    why = f"HTTP {status} {response.reason_phrase}".rstrip() + (f": {shown}" if shown else "")
    if status in (400, 404) and "mcp-session-id" in request.headers:
        return _error(request, rpc_id, SESSION_GONE, why, status)
    try:
        told = json.loads(page)
    except (ValueError, RecursionError):
        told = None
    if isinstance(told, dict) and isinstance(told.get("error"), dict) and isinstance(told["error"].get("code"), int):
        return httpx2.Response(status, json={**told, "id": rpc_id}, request=request)
    return _error(request, rpc_id, -32603, why, status)


async def _head_of(response: httpx2.Response) -> bytes:
    """Return the beginning of a body, or what of it comes in time."""
    head = b""
    with anyio.move_on_after(_ERROR_PAGE_S):
        try:
            async for chunk in response.aiter_raw():
                head += chunk
                if len(head) >= _ERROR_PAGE_BYTES:
                    break
        except httpx2.HTTPError:
            pass
    await response.aclose()
    return head[:_ERROR_PAGE_BYTES]


class _Body(httpx2.AsyncByteStream):
    """The body of a response: bounded, and what breaks it off is an error of its own."""

    def __init__(self, response: httpx2.Response, limit: int | None, *, trickle: bool) -> None:
        assert isinstance(response.stream, httpx2.AsyncByteStream)  # an AsyncClient's
        self._stream = response.stream
        self._left = limit
        self._limit = limit
        self._trickle = trickle

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._stream:
                if self._left is not None:
                    self._left -= len(chunk)
                    if self._left < 0:
                        raise _BodyError(f"the body has more than {self._limit:,} bytes")
                if not self._trickle:
                    yield chunk
                    continue
                for start in range(0, len(chunk), _TRICKLE_BYTES):
                    yield chunk[start : start + _TRICKLE_BYTES]
                    await asyncio.sleep(_TRICKLE_S)
        except httpx2.HTTPError as error:
            raise _BodyError(f"the connection failed in the body: {_words(error)}") from None

    async def aclose(self) -> None:
        await self._stream.aclose()


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
