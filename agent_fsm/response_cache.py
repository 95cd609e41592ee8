"""Replies that were given before, on a redis server: the same request asked again takes no model.

LiteLLM has a cache, too, but it is one for the process: whoever sets it up changes what every other user of LiteLLM in
the process gets. This one belongs to a client. A server that is down costs a run half a second, once, and nothing else.
"""

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from agent_fsm.errors import ConfigError
from agent_fsm.protocol import ModelRequest
from agent_fsm.redaction import redact, secret_values

if TYPE_CHECKING:
    from redis.asyncio import Redis

__all__ = ["KEPT_SECONDS", "PATIENCE_S", "ResponseCache"]

KEPT_SECONDS: Final = 86_400
"""How long a reply is kept."""
PATIENCE_S: Final = 0.5
"""Seconds that one look or one entry may take; a server that takes longer, or fails, is not asked again in the run."""

_WHOLE: Final = ("stop", "tool_calls")
"""Why a reply ended that may be given again: not because it was cut off or held back."""
_NOT_SENT: Final = {"timeout", "input_cost_per_token", "output_cost_per_token"}
_log = logging.getLogger(__name__)


class ResponseCache:
    """Remembers the replies that one client gets, for every client with the same settings. Close it on its event loop.

    What a reply is found by is a digest of all that the model is sent and of where that is, but for keys and passwords.
    So clients that share a server share replies, whoever pays for them. A request that this client has had answered
    already is not looked up: whoever asks twice wants another reply.

    Raises:
        ConfigError: the package redis is not installed.
    """

    def __init__(self, url: str, completion_kwargs: Mapping[str, Any]) -> None:
        if find_spec("redis") is None:
            raise ConfigError("response_cache needs the package redis: run pip install 'agent-fsm[redis_cache]'")
        self._url = url
        self._sent = {name: value for name, value in completion_kwargs.items() if name not in _NOT_SENT}
        self._redis: Redis | None = None
        self._down = False
        self._answered: set[str] = set()

    async def get(self, request: ModelRequest) -> dict[str, Any] | None:
        """Return the reply that *request* got before, or None. Takes `PATIENCE_S` at most, and never raises."""
        key = self._key(request)
        if key is None or key in self._answered:
            return None
        data = await self._tried(lambda redis: redis.get(key), min(PATIENCE_S, request.timeout_seconds / 2))
        reply = _reply(data)
        if reply is not None:
            self._answered.add(key)
        return reply

    async def put(self, request: ModelRequest, reply: Mapping[str, Any], timeout_s: float) -> None:
        """Remember *reply*, if it is a whole one. Takes `PATIENCE_S` and *timeout_s* at most, and never raises."""
        key = self._key(request)
        if key is None or not _may_be_given_again(reply):
            return
        self._answered.add(key)
        data = json.dumps(reply)  # it has come as JSON
        await self._tried(lambda redis: redis.set(key, data, ex=KEPT_SECONDS), min(PATIENCE_S, timeout_s))

    async def aclose(self) -> None:
        """Close the connection."""
        if self._redis is not None:
            redis, self._redis, self._down = self._redis, None, True
            await self._bounded(redis.aclose(), PATIENCE_S)

    async def _tried(self, ask: "Callable[[Redis], Awaitable[Any]]", timeout_s: float) -> Any:
        """Return what the server answers, or None; a server that failed once is not asked again."""
        if self._down:
            return None
        if self._redis is None:
            self._redis = _connection(self._url)
        fault, answer = await self._bounded(ask(self._redis), timeout_s)
        if fault:
            self._down = True
            parts = urlsplit(self._url)
            # of errors only the type: their texts may quote what was sent, and a password is
            _log.warning("response cache at %s:%s is not used: %s", parts.hostname, parts.port, fault)
        return answer

    async def _bounded(self, work: Awaitable[Any], timeout_s: float) -> tuple[str, Any]:
        """Return what went wrong, or nothing, and what *work* returned."""
        try:
            # The client's own timeouts are one per read
            async with asyncio.timeout(timeout_s):
                return "", await work
        except TimeoutError:
            return f"no answer within {timeout_s:g} s", None
        except Exception as error:  # noqa: BLE001 - what is no redis breaks its client in many ways; none may end a run
            return type(error).__name__, None

    def _key(self, request: ModelRequest) -> str | None:
        """Return what the reply to *request* is kept under; None if it is not to be told what would be sent."""
        bases = {name: value for name, value in os.environ.items() if name.endswith(("_API_BASE", "_BASE_URL"))}
        asked = {
            "model": request.model,
            "messages": request.messages,
            "tools": request.tools,
            "tool_choice": request.tool_choice,
            "max_tokens": request.max_tokens,
            "sent": _without_secrets(self._sent),
            "bases": _without_secrets(bases),
        }
        try:
            text = json.dumps(asked, sort_keys=True)
        except (TypeError, ValueError, RecursionError):  # an object in completion_kwargs
            return None
        return f"agent-fsm:reply:1:{hashlib.sha256(text.encode()).hexdigest()}"


def _connection(url: str) -> "Redis":
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    # retries would outlast our patience
    return Redis.from_url(url, retry=Retry(NoBackoff(), 0), socket_connect_timeout=PATIENCE_S, max_connections=2)


def _without_secrets(value: Any) -> Any:
    """Return the JSON value *value* without the members whose names look secret, and without passwords in URLs."""
    match value:
        case Mapping():
            return {name: _without_secrets(each) for name, each in value.items() if not secret_values({str(name): "x"})}
        case list() | tuple():
            return [_without_secrets(each) for each in value]
        case str():
            return redact(value, secret_values({"url": value}))
    return value


def _reply(data: Any) -> dict[str, Any] | None:
    """Return the reply that was kept as *data*, or None if it can't be one."""
    if not isinstance(data, bytes):
        return None
    try:
        reply = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return reply if isinstance(reply, dict) and _may_be_given_again(reply) else None


def _may_be_given_again(reply: Mapping[str, Any]) -> bool:
    match reply:
        case {"choices": [{"finish_reason": str(reason), "message": {} as message}]}:
            return reason in _WHOLE and bool(message.get("content") or message.get("tool_calls"))
    return False
