"""What a run may spend, and how it is to behave.

`Limits` is the part that guards may read. `AgentConfig` adds what only the edge needs. Every limit but money is finite
by default; None means "absent" where the field says so, and zero means zero.
"""

import re
import sys
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from attrs import Attribute, evolve, field, frozen

from agent_fsm.errors import ConfigError
from agent_fsm.protocol import Prices

__all__ = ["AgentConfig", "Limits"]


def _whole(minimum: int, *, absent: bool = False) -> Any:
    def check(instance: object, attribute: "Attribute[Any]", value: object) -> None:
        if value is None and absent:
            return
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            also = " or None" if absent else ""
            raise ConfigError(f"{attribute.name} must be a whole number >= {minimum}{also}, not {value!r}")

    return check


def _amount(*, zero: bool, absent: bool = False) -> Any:
    def check(instance: object, attribute: "Attribute[Any]", value: object) -> None:
        if value is None and absent:
            return
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= sys.float_info.max or (value == 0 and not zero):  # type: ignore[operator] # a number
            edge = ">= 0" if zero else "> 0"
            also = " or None" if absent else ""
            raise ConfigError(f"{attribute.name} must be a finite number {edge}{also}, not {value!r}")

    return check


def _switch(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{attribute.name} must be True or False, not {value!r}")


def _text(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{attribute.name} must be a name, not {value!r}")


def _names(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    if not isinstance(value, tuple) or not all(isinstance(name, str) and name.strip() for name in value):
        raise ConfigError(f"{attribute.name} must be a sequence of model names, not {value!r}")


def _redis_url(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    if value is None or (isinstance(value, str) and _is_redis_url(value)):
        return
    # without the value, which may hold a password
    raise ConfigError(f"{attribute.name} must be a URL like redis://:password@host:6379/0, or None")


def _is_redis_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        port = 1 if parts.port is None else parts.port  # raises for one that is no number, or too large
    except ValueError:
        return False
    whole = parts.scheme in ("redis", "rediss") and bool(parts.hostname) and port > 0
    plain = text.isprintable() and " " not in text and not parts.query and not parts.fragment
    return whole and plain and re.fullmatch("(/[0-9]{0,9})?", parts.path) is not None


def _without_password(value: str | None) -> str:
    if value is None:
        return repr(value)
    credentials, at, place = value.rpartition("@")
    return repr(f"{credentials.partition('://')[0]}://***@{place}" if at else value)


def _mapping(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{attribute.name} must be a mapping of argument names to values, not {value!r}")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


@frozen(kw_only=True)
class Limits:
    """What guards compare the ledger with."""

    max_iterations: int = field(default=8, validator=_whole(1))
    """Requests from Plan, Repair and Research; a run *at* the limit sends no further one."""
    max_wallclock_seconds: float = field(default=120.0, validator=_amount(zero=False))
    """Seconds from the first effect; a run *at* the limit is out of time."""
    max_tools_per_iter: int = field(default=8, validator=_whole(1))
    """Calls of one reply that are run; those beyond it are answered "not run"."""
    stagnation_window: int = field(default=3, validator=_whole(1))
    """Tool results in a row that bring nothing new before a run counts as stuck (`>=`); the last of them must also be
    there for the third time."""
    enable_repair: bool = field(default=True, validator=_switch)
    """After a failed turn, show the model what failed and tell it to mend it."""
    research_on_unsure: bool = field(default=True, validator=_switch)
    """Steer a hedging model to the research tools, if there are any."""
    max_research_hops: int = field(default=2, validator=_whole(0))
    """Requests from Research in a run; 0 means none."""
    research_after_failures: bool = field(default=True, validator=_switch)
    """Steer to the research tools after `max_failures_before_research` failed turns in a row."""
    max_failures_before_research: int = field(default=2, validator=_whole(1))
    """Failed turns in a row that lead to Research (`>=`)."""
    max_consecutive_failures: int = field(default=5, validator=_whole(1))
    """Failed turns in a row that end the run (`>=`)."""
    summarize_every: int | None = field(default=None, validator=_whole(1, absent=True))
    """Turns after which the context is summarized; None: never."""
    closing_summary: bool = field(default=True, validator=_switch)
    """When a cap ends the run, spend one request without tools on the best answer so far."""
    max_model_retries: int = field(default=2, validator=_whole(0))
    """Times that one request is sent again after a failure that a retry may mend."""
    max_tokens_total: int = field(default=500_000, validator=_whole(1))
    """Tokens of all requests and replies; a request is sent only if its worst case still fits (`<=`)."""
    max_reply_tokens: int = field(default=4_096, validator=_whole(1))
    """Ceiling of one reply, in tokens; sent to the provider."""
    max_cost_usd: float | None = field(default=None, validator=_amount(zero=False, absent=True))
    """US dollars of all requests, judged like `max_tokens_total`; None: no limit."""
    prompt_usd_per_token: float | None = field(default=None, validator=_amount(zero=True, absent=True))
    """Price of a prompt token; None: looked up for the model when `max_cost_usd` is set."""
    reply_usd_per_token: float | None = field(default=None, validator=_amount(zero=True, absent=True))
    """Price of a reply token; None: looked up for the model when `max_cost_usd` is set."""


@frozen(kw_only=True)
class AgentConfig(Limits):
    """The limits of a run and how its edge behaves.

    Raises:
        ConfigError: a field is out of range or of the wrong type; the message names it and says what would be right.
    """

    model: str = field(default="offline", validator=_text)
    """A LiteLLM model name, or `offline` for the planner that needs no model."""
    fallback_models: tuple[str, ...] = field(default=(), converter=_tuple, validator=_names)
    """Attempt n of a request goes to fallback n; attempts beyond them to the last."""
    completion_kwargs: Mapping[str, Any] = field(factory=dict, validator=_mapping)
    """Passed to the model client's provider with every request: temperature, api_base, ..."""
    max_history_messages: int | None = field(default=50, validator=_whole(1, absent=True))
    """Messages, system messages not counted, that a request carries at most. Whole turns are left out, oldest first;
    the caller's last message and the latest turn always stay. None: all."""
    tool_concurrency: int = field(default=4, validator=_whole(1))
    """Calls of one turn that run at the same time."""
    tool_timeout_seconds: float = field(default=30.0, validator=_amount(zero=False))
    """Seconds that one call may take; beyond it, it is a failed result."""
    observation_chars: int = field(default=8_000, validator=_whole(100))
    """Characters of a tool result that the model is shown; of a longer one it sees head and tail."""
    redact_secrets: bool = field(default=True, validator=_switch)
    """Show `***` for secrets of the environment (the values of `*_KEY`, `*_TOKEN`, `*_SECRET`, `*_PASSWORD`, ...) and
    for what has the shape of a known key, in all that comes from tools and in errors: before the model, an event, a log
    or the result has it. The caller's messages and the model's replies stay as they are."""
    response_cache: str | None = field(default=None, validator=_redis_url, repr=_without_password)
    """URL of a redis server that keeps replies for a day, `redis://:password@host:6379/0`. The same request asked again
    is answered from there: its tokens count, its cost is 0. A server that is down costs a run half a second. Only
    LiteLLM's replies are kept. None: no server."""

    def priced(self, prices: Prices) -> "AgentConfig":
        """Return this configuration with the prices that its cost budget is to be reckoned with."""
        return evolve(
            self,
            prompt_usd_per_token=prices.prompt_usd_per_token,
            reply_usd_per_token=prices.reply_usd_per_token,
        )
