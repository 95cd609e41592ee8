"""What the operator of the agent by URL allows: whom, where to, and how much.

By default only this machine may ask, and then with any backend. Who sets a token may listen beyond loopback; then a
request may use the tool backend `echo` and what the operator names, and no host but those that are named.

From the environment (lists have commas between their entries, `none` is an empty one):

    AGENT_FSM_TOKEN                what a request must bear: Authorization: Bearer TOKEN
    AGENT_FSM_ALLOWED_BACKENDS     of echo, local, http, research, mcp
    AGENT_FSM_ALLOWED_TOOL_HOSTS   hosts, or host:port, of tool_http_base_url
    AGENT_FSM_ALLOWED_MODELS       models; any if not set
    AGENT_FSM_ALLOWED_MODEL_HOSTS  hosts, or host:port, of api_base in completion_kwargs; they get this machine's keys
    AGENT_FSM_ALLOWED_IMAGE_HOSTS  hosts, or host:port, of images and files in messages; data: URLs need none
    AGENT_FSM_SHELL_ALLOW          programs that exec_shell of the backend local may start
    AGENT_FSM_REQUIRE_SANDBOX      strict or basic: below that the backend local runs nothing
    AGENT_FSM_MCP_CONFIG           the file that names the servers of the backend mcp
    AGENT_FSM_MAX_CONCURRENT_RUNS  runs at the same time; one more is refused
    AGENT_FSM_MAX_BODY_BYTES       bytes of a request's body
    AGENT_FSM_CEILING_X            the most that a request may set the field X of AgentConfig to
    AGENT_FSM_X                    the field X of AgentConfig where a request leaves it out, as for `agent-fsm run`
"""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, get_args

from attrs import Attribute, evolve, field, frozen

from agent_fsm.cli.settings import PREFIX, configure, names
from agent_fsm.config import AgentConfig
from agent_fsm.errors import ConfigError
from agent_fsm.tools.local import LocalMCPInvoker
from agent_fsm.tools.sandbox import Level

__all__ = ["BACKENDS", "CEILINGS", "ServerSettings", "settings_from"]

BACKENDS: Final = ("echo", "local", "http", "research", "mcp")
"""What `tool_backend` may be."""

CEILINGS: Final[Mapping[str, float]] = {
    "max_iterations": 50,
    "max_wallclock_seconds": 600.0,
    "max_tools_per_iter": 32,
    "max_research_hops": 10,
    "max_model_retries": 5,
    "max_tokens_total": 500_000,
    "max_reply_tokens": 16_384,
    "max_history_messages": 500,
    "tool_concurrency": 16,
    "tool_timeout_seconds": 120.0,
    "observation_chars": 100_000,
}
"""The ceilings where the operator sets none. `max_cost_usd` has one only if it is set."""

_LOOPBACK: Final = ("localhost", "127.0.0.1", "[::1]")
_CEILING_PREFIX: Final = f"{PREFIX}CEILING_"
_NUMBERS: Final = frozenset((*CEILINGS, "max_cost_usd"))


def _count(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{attribute.name} must be a whole number >= 1, not {value!r}")


def _texts(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    if value is None:
        return
    if not isinstance(value, tuple) or not all(isinstance(each, str) and each.strip() for each in value):
        raise ConfigError(f"{attribute.name} must be a sequence of names, not {value!r}")


def _backends(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    _texts(instance, attribute, value)
    for each in value if isinstance(value, tuple) else ():
        if each not in BACKENDS:
            raise ConfigError(f"{attribute.name}: there is no backend {each!r}; there are {', '.join(BACKENDS)}")


def _secret(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    if value is not None and (not isinstance(value, str) or not value.isascii() or not value.isprintable()):
        raise ConfigError(f"{attribute.name} must be printable ASCII")
    if isinstance(value, str) and (not value or " " in value):
        raise ConfigError(f"{attribute.name} must not be empty nor have spaces in it")


def _level(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    if value not in (None, *get_args(Level)):
        raise ConfigError(f"{attribute.name} must be one of {', '.join(get_args(Level))}, not {value!r}")


def _ceilings(instance: object, attribute: "Attribute[Any]", value: Mapping[str, Any]) -> None:
    for name, most in value.items():
        if name not in _NUMBERS:
            nearest = get_close_matches(name, _NUMBERS, n=1, cutoff=0)[0]
            raise ConfigError(f"{attribute.name}: {name} can have none; the nearest that can is {nearest}")
        try:
            AgentConfig(**{name: most})
        except ConfigError as error:
            raise ConfigError(f"{attribute.name}: {error}") from None
        if most is None:
            raise ConfigError(f"{attribute.name}: {name} must be a number")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple | set | frozenset) else value


def _with_defaults(value: Any) -> Any:
    return {**CEILINGS, **value} if isinstance(value, Mapping) else value


@frozen(kw_only=True)
class ServerSettings:
    """What a request may do.

    Raises:
        ConfigError: a field can't mean anything; the message names it and says what would be right.
    """

    token: str | None = field(default=None, repr=False, validator=_secret)
    """What a request must bear; None: no token, and only requests to loopback are answered."""
    defaults: AgentConfig = field(factory=AgentConfig, repr=False)
    """What a request leaves out, lowered to the ceilings."""
    ceilings: Mapping[str, float] = field(factory=dict, converter=_with_defaults, validator=_ceilings)
    """The most that a request may ask for, by field of AgentConfig; what is left out is as in `CEILINGS`."""
    allowed_backends: tuple[str, ...] | None = field(default=None, converter=_tuple, validator=_backends)
    """None: with a token `echo`, without one all of `BACKENDS`."""
    allowed_tool_hosts: tuple[str, ...] | None = field(default=None, converter=_tuple, validator=_texts)
    """Hosts, or host:port, of tool_http_base_url. None: with a token none, without one loopback."""
    allowed_models: tuple[str, ...] | None = field(default=None, converter=_tuple, validator=_texts)
    """None: any whose name is no URL."""
    allowed_model_hosts: tuple[str, ...] = field(default=(), converter=_tuple, validator=_texts)
    """Hosts, or host:port, at which a request may have the model asked; LiteLLM sends them the operator's keys."""
    allowed_image_hosts: tuple[str, ...] = field(default=(), converter=_tuple, validator=_texts)
    """Hosts, or host:port, of which messages may name images and files: for some providers LiteLLM fetches them."""
    shell_allow: tuple[str, ...] = field(
        default=LocalMCPInvoker().shell_allow_prefixes, converter=_tuple, validator=_texts
    )
    """Programs that exec_shell may start."""
    require_sandbox: Level | None = field(default=None, validator=_level)
    """The containment below which the backend `local` runs nothing; None: what holds on this machine will do."""
    mcp_config: Path | None = None
    """The file that names the MCP servers of the backend `mcp`, which there is not without one."""
    max_concurrent_runs: int = field(default=8, validator=_count)
    """Runs at the same time; a request beyond them (`>`) is refused with 429."""
    max_body_bytes: int = field(default=2**20, validator=_count)
    """Bytes of a request's body; more (`>`) are refused with 413."""

    @property
    def backends(self) -> tuple[str, ...]:
        """The tool backends that a request may use."""
        by_default = BACKENDS if self.token is None else ("echo",)
        allowed = by_default if self.allowed_backends is None else self.allowed_backends
        return tuple(each for each in allowed if each != "mcp" or self.mcp_config is not None)

    @property
    def tool_hosts(self) -> tuple[str, ...]:
        """The hosts of which a request may use the tools."""
        by_default = _LOOPBACK if self.token is None else ()
        return by_default if self.allowed_tool_hosts is None else self.allowed_tool_hosts

    @property
    def base(self) -> AgentConfig:
        """The configuration of a request that sets nothing: the defaults, none of them above its ceiling."""
        lowered: dict[str, Any] = {
            name: most for name, most in self.ceilings.items() if _above(getattr(self.defaults, name), most)
        }
        return evolve(self.defaults, **lowered)


def _above(value: float | None, most: float) -> bool:
    return value is None or value > most  # None is: no limit


# From the environment


def settings_from(environ: Mapping[str, str]) -> ServerSettings:
    """Return the settings that *environ* makes; a variable that is empty counts as one that is not set.

    Raises:
        ConfigError: a variable can't mean anything; the message names it.
    """
    given: dict[str, Any] = {}
    for name, read in _READERS.items():
        variable = PREFIX + name.upper()
        if environ.get(variable, "").strip():
            given[name] = _checked(variable, name, read, environ[variable].strip())
    given["ceilings"] = dict(
        _ceiling(variable, environ) for variable in environ if variable.startswith(_CEILING_PREFIX)
    )
    given["ceilings"] = {name: most for name, most in given["ceilings"].items() if most is not None}
    return ServerSettings(defaults=configure({}, environ), **given)


def _checked(variable: str, name: str, read: Callable[[str], Any], text: str) -> Any:
    try:
        value = read(text)
        ServerSettings(**{name: value})
    except ConfigError as error:
        raise ConfigError(f"{variable}: {error}") from None
    except ValueError:
        raise ConfigError(f"{variable} must be a whole number >= 1, not {text!r}") from None
    return value


def _ceiling(variable: str, environ: Mapping[str, str]) -> tuple[str, float | None]:
    name, text = variable.removeprefix(_CEILING_PREFIX).lower(), environ[variable].strip()
    if not text:
        return name, None
    try:
        most: float = float(text) if "." in text or "e" in text.lower() else int(text)
        ServerSettings(ceilings={name: most})
    except ConfigError as error:
        raise ConfigError(f"{variable}: {error}") from None
    except ValueError:
        raise ConfigError(f"{variable} must be a number, not {text!r}") from None
    return name, most


_READERS: Final[Mapping[str, Callable[[str], Any]]] = {
    "token": str,
    "allowed_backends": names,
    "allowed_tool_hosts": names,
    "allowed_models": names,
    "allowed_model_hosts": names,
    "allowed_image_hosts": names,
    "shell_allow": names,
    "require_sandbox": str,
    "mcp_config": Path,
    "max_concurrent_runs": int,
    "max_body_bytes": int,
}
