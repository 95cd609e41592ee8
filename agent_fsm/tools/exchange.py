"""One HTTP exchange: a request is sent once, and whatever becomes of it is a value.

Deadlines here are absolute. httpx's timeouts are one per read, which a body that drips never meets. Redirects are not
followed, as what a request carries is meant for one address; and bodies are asked for uncompressed, so that a limit of
bytes is one of memory, too.
"""

import asyncio
import ipaddress
import json
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from copy import copy
from email.utils import parsedate_to_datetime
from functools import cache
from http import HTTPStatus
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import urlsplit

from attrs import evolve, field, frozen

from agent_fsm.errors import ConfigError
from agent_fsm.redaction import redact

if TYPE_CHECKING:
    import ssl

    import httpx

__all__ = ["Fault", "Reply", "Request", "Wire", "Wired", "base_of", "may_pass", "sent_until", "shown"]

_KEEPALIVE_S: Final = 2.0
"""How long an idle connection is kept. Servers close theirs after 5 s or more (Node, uvicorn); a request that meets
that moment is lost, and nobody can tell whether it was run."""
_SHOWN_CHARS: Final = 300
_LEAST_S: Final = 0.2
"""Seconds that must be left for a request to be worth sending again."""
_PASSING: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


@frozen
class Request:
    """What is to be sent."""

    method: str
    url: str
    headers: Mapping[str, str] = field(factory=dict, repr=False)
    params: Mapping[str, str] = field(factory=dict)
    content: bytes | None = field(default=None, repr=False)
    """JSON."""
    tells_deadline: bool = False
    """Whether the header X-Deadline-Ms says how many milliseconds are left."""


@frozen
class Reply:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    """By names in lower case."""
    body: bytes
    broken: str = ""
    """Why the body is not whole; empty if it is."""
    note: str = ""
    """Why the request was not sent again, where its sender would have."""

    @property
    def ok(self) -> bool:
        """Whether the status says success, and all of the body is there."""
        return 200 <= self.status < 300 and not self.broken

    @property
    def kind(self) -> str:
        """The media type, in lower case and without parameters; empty if the server gave none."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    def json(self) -> Any:
        """Return the body as a JSON value.

        Raises:
            ValueError: it is none.
        """
        try:
            return json.loads(self.body)
        except RecursionError:
            raise ValueError("it is nested too deep") from None

    def told(self, secrets: Sequence[str] = ()) -> str:
        """Return status, media type, and what the body says first, cleaned and without *secrets*: for a text that says
        what came back."""
        phrase = HTTPStatus(self.status).phrase if self.status in set(HTTPStatus) else ""
        head = " ".join(part for part in (str(self.status), phrase, f"({self.kind})" if self.kind else "") if part)
        said = shown(self._message(), secrets=secrets) or shown(self.body.decode("utf-8", "replace"), secrets=secrets)
        told = f"{head}: {said}" if said else f"{head}, with an empty body"
        return f"{told} [{self.broken}]" if self.broken else told

    def _message(self) -> str:
        """Return what an error's JSON body says in words; empty if it is none of the usual forms."""
        try:
            body = self.json()
        except ValueError:
            return ""
        if not isinstance(body, Mapping):
            return ""
        error = body.get("error")
        found = [body.get("message"), error.get("message") if isinstance(error, Mapping) else error, body.get("detail")]
        return next((each for each in found if isinstance(each, str) and each.strip()), "")

    def retry_after_s(self) -> float | None:
        """Return the seconds that the server asked to be left alone for; None if it did not, or not readably."""
        wrote = self.headers.get("retry-after", "").strip()
        try:
            seconds = float(wrote)
        except ValueError:
            try:
                seconds = parsedate_to_datetime(wrote).timestamp() - time.time()
            except (ValueError, OverflowError):
                return None
        return max(0.0, seconds) if math.isfinite(seconds) else None


@frozen
class Fault:
    """Why nothing came back."""

    why: str
    sent: bool
    """Whether the server may have got the request."""
    passing: bool = True
    """Whether asking again may help."""
    note: str = ""
    """Why the request was not sent again, where its sender would have."""


class Wire:
    """Sends requests over connections of its own, which are opened by the first and closed by `aclose`.

    It belongs to the event loop on which it first sends.

    Args:
        max_body_bytes: what a body may have at most.
    """

    def __init__(self, *, max_body_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._clients: dict[bool, httpx.AsyncClient] = {}
        self._closed = False

    async def send(self, request: Request, deadline: float, secrets: Sequence[str]) -> Reply | Fault:
        """Send *request*, once, and return what came of it by *deadline*, in the loop's time.

        None of *secrets* is in what httpx logs meanwhile: at DEBUG it tells the headers of a reply, and a server may
        send back what it was sent.
        """
        import httpx

        if self._closed:
            return Fault("this run's connections are closed", sent=False, passing=False)
        reading = _Reading(self._max_body_bytes)
        began = asyncio.get_running_loop().time()
        try:
            client = self._client(request.url)
        except (ValueError, ImportError, OSError) as error:  # a proxy that is no URL or needs SOCKS, no certificates
            why = f"no HTTP client can be made ({type(error).__name__}): see HTTP_PROXY, SSL_CERT_FILE and their like"
            return Fault(why, sent=False, passing=False)
        token = _hidden.set(tuple(secrets))
        try:
            async with asyncio.timeout_at(deadline):
                return await self._exchange(client, request, deadline - began, reading)
        except TimeoutError:
            return reading.broken(f"it was not done after {deadline - began:.3g} s", passing=False)
        except (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ProxyError, OSError) as error:
            return reading.broken(_told(error, secrets))
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, ValueError) as error:
            return reading.broken(_told(error, secrets), passing=False)
        finally:
            _hidden.reset(token)

    async def aclose(self) -> None:
        """Close the connections; what still waits for an answer gets none."""
        self._closed = True
        clients, self._clients = self._clients, {}
        for client in clients.values():
            await client.aclose()

    async def _exchange(
        self, client: "httpx.AsyncClient", request: Request, left_s: float, reading: "_Reading"
    ) -> Reply | Fault:
        import httpx

        headers = httpx.Headers(dict(request.headers))  # so that ours replace those of other letters
        headers["Accept-Encoding"] = "identity"
        if request.content is not None:
            headers["Content-Type"] = "application/json"
        if request.tells_deadline:
            headers["X-Deadline-Ms"] = str(max(1, int(left_s * 1000)))
        async with client.stream(
            request.method,
            request.url,
            headers=headers,
            params=request.params or None,
            content=request.content,
            extensions={"trace": reading.trace},
        ) as response:
            return await reading.read(response)

    def _client(self, url: str) -> "httpx.AsyncClient":
        import httpx

        direct = _is_loopback(urlsplit(url).hostname or "")
        client = self._clients.get(direct)
        if client is None:
            _guard_logs()
            client = self._clients[direct] = httpx.AsyncClient(
                verify=_tls(),
                trust_env=not direct,  # else a proxy is asked for this machine's own loopback, where it has none
                timeout=None,
                follow_redirects=False,
                limits=httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=_KEEPALIVE_S),
                headers={"User-Agent": "agent-fsm"},
            )
        return client


class Wired:
    """What an invoker that sends requests has: a wire for each run, or for each call outside of one."""

    def __init__(self, *, timeout_s: float, max_body_bytes: int) -> None:
        self._timeout_s = _positive(timeout_s, "timeout_s")
        self._max_body_bytes = int(_positive(max_body_bytes, "max_body_bytes"))
        self._wire: Wire | None = None

    def for_run(self) -> Self:
        """Return what one run uses: its calls share connections, which its `aclose` closes. Without it every call has
        a connection of its own."""
        own = copy(self)
        own._wire = Wire(max_body_bytes=self._max_body_bytes)
        return own

    async def aclose(self) -> None:
        """Close the run's connections; what is no run's has none."""
        if self._wire is not None:
            await self._wire.aclose()

    def _deadline(self) -> float:
        """Return when a call that begins now must be done, in the loop's time."""
        import_module("httpx")  # before the clock starts: the first time it takes longer than a call
        return asyncio.get_running_loop().time() + self._timeout_s

    @asynccontextmanager
    async def _wires(self) -> AsyncIterator[Wire]:
        wire = Wire(max_body_bytes=self._max_body_bytes) if self._wire is None else self._wire
        try:
            yield wire
        finally:
            if wire is not self._wire:
                await wire.aclose()


class _Reading:
    """How far an exchange has come."""

    def __init__(self, max_body_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._sent = False
        self._response: httpx.Response | None = None
        self._body = bytearray()

    async def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Note that the request goes out; httpcore calls this."""
        self._sent = self._sent or event.endswith("send_request_headers.started")

    async def read(self, response: "httpx.Response") -> Reply | Fault:
        self._response = response
        encoding = response.headers.get("content-encoding", "").strip().lower()
        if encoding not in ("", "identity"):
            return self.broken(f"the body is compressed ({shown(encoding)}), which was not asked for")
        declared = response.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_body_bytes:
            return self.broken(f"the body has {int(declared):,} bytes; {self._max_body_bytes:,} are allowed")
        async for chunk in response.aiter_raw():
            self._body += chunk
            if len(self._body) > self._max_body_bytes:
                return self.broken(f"the body has more than the {self._max_body_bytes:,} bytes that are allowed")
        return self.broken("")

    def broken(self, why: str, *, passing: bool = True) -> Reply | Fault:
        """Return what has come until now; *why* says why it is not all."""
        if self._response is None:
            return Fault(why, self._sent, passing)
        headers = {name.lower(): value for name, value in self._response.headers.items()}
        if why and self._body:
            why = f"{why}; {len(self._body):,} bytes were read"
        return Reply(self._response.status_code, headers, bytes(self._body), why)


async def sent_until(
    wire: Wire,
    request: Request,
    *,
    deadline: float,
    pauses: Sequence[float],
    again: Callable[[Reply | Fault], bool],
    secrets: Sequence[str],
) -> Reply | Fault:
    """Return what came of *request*, sent again after each of *pauses* while *again* says so of what came.

    A pause is the seconds the server asked for, if it did. One that leaves no time before *deadline* is not made: what
    came then carries a note that says so.
    """
    loop = asyncio.get_running_loop()
    for pause in pauses:
        outcome = await wire.send(request, deadline, secrets)
        if not again(outcome):
            return outcome
        asked = outcome.retry_after_s() if isinstance(outcome, Reply) else None
        wait = pause if asked is None else asked
        left = deadline - loop.time()
        if wait + _LEAST_S > left:
            whose = "asked to wait" if asked is not None else "would wait"
            return evolve(
                outcome, note=f"not sent again: it {whose} {wait:,.1f} s, and {max(0.0, left):.1f} s are left"
            )
        await asyncio.sleep(wait)
    return await wire.send(request, deadline, secrets)


def may_pass(outcome: Reply | Fault) -> bool:
    """Return whether asking again may help: what a server says of it itself counts more than its status."""
    if isinstance(outcome, Fault):
        return outcome.passing
    if outcome.ok or outcome.broken:
        return False
    try:
        body = outcome.json()
    except ValueError:
        body = None
    error = body.get("error") if isinstance(body, Mapping) else None
    says = error.get("retryable") if isinstance(error, Mapping) else None
    return says if isinstance(says, bool) else outcome.status in _PASSING


def base_of(url: str, what: str) -> str:
    """Return *url* as that to which paths are appended.

    Raises:
        ConfigError: it is no URL with http or https and a host, or has a query or a fragment; *what* names it.
    """
    try:
        parts = urlsplit(url.strip())
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
    if not known or re.search(r"[\s\x00-\x1f\\]", url.strip()):
        raise ConfigError(f"{what} must be a URL such as http://127.0.0.1:8787")  # not shown: it may hold a password
    if parts.query or parts.fragment:
        raise ConfigError(f"{what} must have no query and no fragment: paths are appended to it")
    return url.strip().rstrip("/")


def _positive(value: float, what: str) -> float:
    """Return *value*.

    Raises:
        ConfigError: it is no finite number > 0; *what* names it.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{what} must be a finite number > 0, not {value!r}")
    return value


_UNSHOWN = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]+")


def shown(text: str, chars: int = _SHOWN_CHARS, *, secrets: Sequence[str] = ()) -> str:
    """Return *text* on one line, without control characters and *secrets*, cut to *chars*."""
    text = redact(text, secrets)  # first: a cut through a secret would leave a part of it
    text = _UNSHOWN.sub(" ", text[: 200 * chars].encode("utf-8", "replace").decode()).strip()
    return text if len(text) <= chars else f"{text[:chars]}..."


def _told(error: Exception, secrets: Sequence[str]) -> str:
    words = shown(str(error), secrets=secrets)
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@cache
def _tls() -> "ssl.SSLContext":
    """Return what verifies servers; made once, as it takes longer than a call."""
    import httpx

    return httpx.create_ssl_context()


# Logs

_hidden: ContextVar[tuple[str, ...]] = ContextVar("agent_fsm_hidden", default=())
"""What must not be logged while this task sends."""


class _Redacting(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        secrets = _hidden.get()
        if secrets:
            record.msg, record.args = redact(record.getMessage(), secrets), ()
        return True


@cache
def _guard_logs() -> None:
    for name in ("httpx", "httpcore.connection", "httpcore.http11", "httpcore.http2", "httpcore.proxy"):
        logging.getLogger(name).addFilter(_Redacting())  # on each: a logger's filters don't see its children's records
