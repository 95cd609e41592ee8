"""The HTTP client under an MCP connection: what goes wrong with one request stays with that request.

In the SDK an error of the network ends the connection with all of its calls, by way of cancelling the task that holds
it; here it is the answer to the request. Bodies are bounded, and so is the time for what nobody waits for.

Imports httpx2, and so is itself imported only where a connection is opened.
"""

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, suppress
from functools import cache
from ssl import SSLContext
from typing import Any

import anyio
import httpx2

from agent_fsm.messages import cut
from agent_fsm.redaction import redact
from agent_fsm.tools.mcp.config import ServerSpec
from agent_fsm.tools.mcp.reader import LOST, SESSION_GONE, UNREADABLE, UNSENT, Events, read_message

__all__ = ["MAX_BODY_BYTES", "HttpClient"]

MAX_BODY_BYTES = 8 * 1024 * 1024
"""Of a body, or of one event in a stream."""

_CONNECT_S = 10.0
_WRITE_S = 30.0
_COURTESY_S = 5.0
"""For a notification or an answer to the server."""
_FAREWELL_S = 0.5
"""For the end of a session."""
_PAGE_BYTES = 8_192
_PAGE_S = 1.0
"""How much of a page that is no answer is read, and for how long."""
_SHOWN_CHARS = 300


@cache
def _trusted() -> SSLContext:
    """Return the certificates that all connections trust: loading them holds up the event loop for 0.1 s."""
    return httpx2.create_ssl_context()


class HttpClient(httpx2.AsyncClient):
    """Sends the requests of one connection.

    Args:
        spec: whose headers each request carries; redirects to other hosts are not followed with them.
        wanted: says of a message in a stream whether it is to be read.
    """

    def __init__(self, spec: ServerSpec, wanted: Callable[[bytes], bool]) -> None:
        super().__init__(
            headers={**spec.headers, "Accept-Encoding": "identity"},  # else a small body may become an endless one
            timeout=httpx2.Timeout(None, connect=_CONNECT_S, write=_WRITE_S),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=20),
            max_redirects=3,
            verify=_trusted(),
        )
        self._wanted = wanted
        self._secrets = spec.secrets
        self.hurried = False
        """True once there is no time left for farewells."""

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Send *request*; the answer to a JSON-RPC request is always one that the SDK can read."""
        if request.method == "GET":
            response = await super().send(request, **options)
            return self._streamed(response, lambda why: None)
        rpc_id = _id_of(request)
        if rpc_id is None:
            return await self._told(request, options)
        try:
            response = await super().send(request, **options)
            return await self._answer(request, rpc_id, response)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.UnsupportedProtocol, httpx2.PoolTimeout) as error:
            return _error(request, rpc_id, UNSENT, f"the server can't be reached: {_words(error)}")
        except httpx2.HTTPError as error:
            return _error(request, rpc_id, LOST, f"the connection failed: {_words(error)}")

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

    async def _answer(self, request: httpx2.Request, rpc_id: Any, response: httpx2.Response) -> httpx2.Response:
        """Return *response* as the SDK is to see it.

        Raises:
            httpx2.HTTPError: the body breaks off.
        """
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        plain = response.headers.get("content-encoding", "identity").strip().lower() in ("identity", "")
        if response.next_request is not None or response.status_code == 202:
            return response  # the SDK knows what to do about it
        if response.status_code >= 400:
            return await self._refusal(request, rpc_id, response)
        if plain and kind == "text/event-stream":
            return self._streamed(response, lambda why: _failure(rpc_id, UNREADABLE, why))
        if not plain or kind != "application/json":
            shown = self._shown(await _page(response))
            why = f"HTTP {response.status_code} with {kind or 'no type'}{'' if plain else ', compressed,'} where JSON "
            return _error(request, rpc_id, UNREADABLE, f"{why}was expected: {shown}")
        body = await _body(response, MAX_BODY_BYTES)
        if len(body) > MAX_BODY_BYTES:
            return _error(request, rpc_id, UNREADABLE, f"the body has more than {MAX_BODY_BYTES:,} bytes")
        message = read_message(body)
        if message is None:
            return _error(request, rpc_id, UNREADABLE, f"the body is no JSON-RPC: {self._shown(body[:_PAGE_BYTES])}")
        content = message.model_dump_json(by_alias=True, exclude_unset=True).encode()
        headers = {**_kept(response), "Content-Type": "application/json"}
        return httpx2.Response(response.status_code, headers=headers, content=content, request=request)

    async def _refusal(self, request: httpx2.Request, rpc_id: Any, response: httpx2.Response) -> httpx2.Response:
        """Return what a response of status 400 or more says, as a JSON-RPC error."""
        page = await _page(response)
        status, shown = response.status_code, self._shown(page)
        why = f"HTTP {status} {response.reason_phrase}".rstrip() + (f": {shown}" if shown else "")
        if status in (400, 404) and "mcp-session-id" in request.headers:
            return _error(request, rpc_id, SESSION_GONE, why, status)
        try:
            told = json.loads(page)
        except (ValueError, RecursionError):
            told = None
        if (
            isinstance(told, dict)
            and isinstance(told.get("error"), dict)
            and isinstance(told["error"].get("code"), int)
        ):
            return httpx2.Response(status, json={**told, "id": rpc_id}, request=request)
        return _error(request, rpc_id, -32603, why, status)

    def _shown(self, page: bytes) -> str:
        return cut(redact(page.decode("utf-8", "replace").strip(), self._secrets), _SHOWN_CHARS)

    def _streamed(self, response: httpx2.Response, failed: Callable[[str], bytes | None]) -> httpx2.Response:
        response.stream = _Stream(response, Events(self._wanted, MAX_BODY_BYTES, failed))
        return response


def _id_of(request: httpx2.Request) -> Any:
    """Return the id of the JSON-RPC request in *request*; None if it is none."""
    try:
        message = json.loads(request.read())
    except (ValueError, RecursionError):
        return None
    return message.get("id") if isinstance(message, dict) and "method" in message else None


def _kept(response: httpx2.Response) -> dict[str, str]:
    session = response.headers.get("mcp-session-id")
    return {"mcp-session-id": session} if session else {}


def _failure(rpc_id: Any, code: int, why: str) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": rpc_id, "error": {"code": code, "message": why}}).encode()


def _error(request: httpx2.Request, rpc_id: Any, code: int, why: str, status: int = 200) -> httpx2.Response:
    headers = {"Content-Type": "application/json"}
    return httpx2.Response(status, headers=headers, content=_failure(rpc_id, code, why), request=request)


async def _page(response: httpx2.Response) -> bytes:
    """Return the beginning of a body, or what of it comes in time."""
    head = b""
    with anyio.move_on_after(_PAGE_S):
        with suppress(httpx2.HTTPError):
            head = await _body(response, _PAGE_BYTES)
    return head[:_PAGE_BYTES]


async def _body(response: httpx2.Response, limit: int) -> bytes:
    """Return the body as it came; of one that is longer than *limit*, a little more than that."""
    pieces: list[bytes] = []
    length = 0
    try:
        async with aclosing(response.aiter_raw()) as chunks:
            async for chunk in chunks:
                pieces.append(chunk)
                length += len(chunk)
                if length > limit:
                    break
    finally:
        await response.aclose()
    return b"".join(pieces)


class _Stream(httpx2.AsyncByteStream):
    """A stream of events: what is of no use is left out of it, and where it breaks off it ends."""

    def __init__(self, response: httpx2.Response, events: Events) -> None:
        assert isinstance(response.stream, httpx2.AsyncByteStream)  # an AsyncClient's
        self._stream = response.stream
        self._events = events

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._stream:
                passed = self._events.take(chunk)
                if passed:
                    yield passed
        except httpx2.HTTPError:  # the SDK tells whoever waits
            return

    async def aclose(self) -> None:
        await self._stream.aclose()


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
