"""The body of POST /agent/run, and what a request that may be served becomes: messages, tools and a configuration.

The body has a field for each of AgentConfig, taken from there, so that a new one appears by itself. A request that asks
for more than it may is refused, never lowered in silence.
"""

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Final, Literal

from attrs import evolve, field, frozen
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, create_model, model_validator

from agent_fsm.cli.settings import Setting
from agent_fsm.cli.settings import settings as config_settings
from agent_fsm.config import AgentConfig
from agent_fsm.errors import ConfigError
from agent_fsm.messages import cut
from agent_fsm.protocol import ToolInvoker
from agent_fsm.redaction import redact, secret_values
from agent_fsm.server.addresses import check_host, check_url
from agent_fsm.server.problems import Problem
from agent_fsm.server.settings import ServerSettings
from agent_fsm.tools.local import EchoMCP, LocalMCPInvoker

__all__ = ["OPERATOR_ONLY", "PASSED_ON", "Asked", "RunRequest", "admitted", "request_model"]

OPERATOR_ONLY: Final = frozenset(("response_cache", "redact_secrets"))
"""Fields of AgentConfig that no request may set."""

PASSED_ON: Final = frozenset((
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty", "logit_bias"),
    *("response_format", "reasoning_effort", "verbosity", "parallel_tool_calls", "max_tokens", "max_completion_tokens"),
    *("timeout", "user", "api_key", "api_base", "base_url"),
))  # fmt: skip
"""What `completion_kwargs` of a request may hold. Of the others some name files, hosts or prices."""
_MODEL_HOSTS: Final = ("api_base", "base_url")
_PRICES: Final = ("prompt_usd_per_token", "reply_usd_per_token")
_LINKS: Final = frozenset(("url", "image_url", "file_url", "video_url", "uri", "file_id", "file_data"))
"""Members of a message's parts that name what somebody is to fetch, if only a path; others do if they are URLs."""
_WITH_SCHEME: Final = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*://")

_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}")
_OWN_HEADERS: Final = frozenset((
    *("connection", "content-length", "content-type", "expect", "host", "keep-alive", "proxy-authorization"),
    *("proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"),
))  # fmt: skip
_MOST_DEEP: Final = 64
_MOST_HEADERS: Final = 20
_MOST_HEADER_CHARS: Final = 4_096


# The body

_SAID: Final = {
    "anyOf": [
        {"type": "string", "pattern": r"\S"},
        {"type": "array", "minItems": 1, "items": {"type": "object", "required": ["type"]}},
    ]
}
_MESSAGE_SCHEMA: Final = {
    "type": "object",
    "required": ["role"],
    "anyOf": [
        {"properties": {"role": {"enum": ["user", "system", "developer"]}, "content": _SAID}, "required": ["content"]},
        {"properties": {"role": {"const": "assistant"}, "content": {"anyOf": [_SAID, {"type": "null"}]}}},
        {"properties": {"role": {"const": "tool"}, "content": {}}, "required": ["content", "tool_call_id"]},
    ],
}
"""What is told of a message; what is right of it depends on those around it, and the run checks it."""


class RunRequest(BaseModel):
    """The fields of the body that AgentConfig does not have."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    messages: list[Annotated[dict[str, Any], WithJsonSchema(_MESSAGE_SCHEMA)]] = Field(
        description="OpenAI chat messages; the last is from the user or a tool.",
        min_length=1,
        examples=[[{"role": "user", "content": "Say hi with exec_python then finish."}]],
    )
    tool_backend: Literal["echo", "local", "http", "research", "mcp"] = Field(
        "echo", description="What the model may call."
    )
    tool_http_base_url: str | None = Field(None, description="Where the tools of the backend http are.")
    tool_http_headers: dict[str, str] | None = Field(
        None, description="What is sent to them with every request; is never logged, told or kept."
    )

    @model_validator(mode="before")
    @classmethod
    def _names_are_known(cls, data: Any) -> Any:
        for name in data if isinstance(data, Mapping) else ():
            if name in OPERATOR_ONLY:
                raise ValueError(f"{name} is for this server's operator to set")
            if name not in cls.model_fields:
                nearest = get_close_matches(name, cls.model_fields, n=1, cutoff=0)[0]
                raise ValueError(f"there is no field {cut(name, 80)!r}; the nearest is {nearest}")
        if _depth(data) > _MOST_DEEP:  # who walks over it later does so recursively
            raise ValueError(f"it is nested more than {_MOST_DEEP} levels deep")
        return data


def _depth(value: Any) -> int:
    """Return how deep lists and objects are nested in *value*, itself included; at most a level more than may be."""
    deep, level = 0, [value]
    while level and deep <= _MOST_DEEP:
        level = [each for each in level if isinstance(each, list | dict)]
        deep += bool(level)
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return deep


def request_model(settings: ServerSettings) -> type[RunRequest]:
    """Return the model of the body, with this server's defaults and limits in its schema."""
    base = settings.base
    fields: dict[str, Any] = {
        each.name: _field(each, getattr(base, each.name), settings)
        for each in config_settings()
        if each.name not in OPERATOR_ONLY
    }
    backend = RunRequest.model_fields["tool_backend"]
    allowed = WithJsonSchema({"type": "string", "enum": list(settings.backends)})
    fields["tool_backend"] = (Annotated[backend.annotation, allowed], backend)
    return create_model("RunRequest", __base__=RunRequest, **fields)


def _field(setting: Setting, default: Any, settings: ServerSettings) -> tuple[Any, Any]:
    most = settings.ceilings.get(setting.name)
    kind: Any
    match setting.kind.__name__:
        case "int" | "float" as name:
            kind = Annotated[int, BeforeValidator(_whole)] if name == "int" else float
            schema: dict[str, Any] = {"type": "integer" if name == "int" else "number", **_edges(setting, most)}
        case "bool":
            kind, schema = bool, {"type": "boolean"}
        case "str":
            kind, schema = str, _name_schema(settings)
        case "tuple":
            kind, schema = list[str], {"type": "array", "items": _name_schema(settings)}
        case _:
            kind, schema = dict[str, Any], {"type": "object", "propertyNames": {"enum": sorted(PASSED_ON)}}
    if setting.may_be_absent:
        kind = kind | None
        if most is None:  # null is no limit, which is above every ceiling
            schema = {"anyOf": [schema, {"type": "null"}]}
    # of names and mappings the default is not told: it may hold what is only the operator's business
    told: dict[str, Any] = (
        {"default": default} if setting.kind in (int, float, bool) else {"default_factory": lambda: None}
    )
    return Annotated[kind, WithJsonSchema(schema)], Field(description=setting.doc, **told)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value  # to JSON 8.0 is a whole number


def _name_schema(settings: ServerSettings) -> dict[str, Any]:
    allowed = settings.allowed_models
    return {"type": "string", "minLength": 1} if allowed is None else {"type": "string", "enum": list(allowed)}


def _edges(setting: Setting, most: float | None) -> dict[str, Any]:
    """Return the least and the most that a number may be, as JSON schema has them."""
    more: dict[str, Any] = {} if most is None else {"maximum": most}
    for least in (0, 1, 100):
        if _is_taken(setting.name, least):
            return {**more, "minimum": least} if setting.kind is int or least == 0 else {**more, "exclusiveMinimum": 0}
    return more


def _is_taken(name: str, value: Any) -> bool:
    try:
        AgentConfig(**{name: value})
    except ConfigError:
        return False
    return True


# What it becomes


@frozen
class Asked:
    """What is to be run."""

    messages: list[dict[str, Any]] = field(repr=False)
    tools: ToolInvoker
    config: AgentConfig = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)
    """What came with the request and must not be told by any answer."""


async def admitted(body: RunRequest, settings: ServerSettings, mcp: ToolInvoker | None) -> Asked:
    """Return what *body* asks for; *mcp* is what the backend mcp uses.

    Raises:
        Problem: it can't be, or may not be, asked for.
    """
    given = {name: getattr(body, name) for name in body.model_fields_set if name not in RunRequest.model_fields}
    secrets = _secrets(body, {**settings.defaults.completion_kwargs, **given.get("completion_kwargs", {})})
    try:
        _check_ceilings(given, settings)
        _check_models(given, settings)
        await _check_completion_kwargs(given.get("completion_kwargs", {}), settings)
        for link in _links(body.messages):
            if not link.startswith("data:"):
                check_host(
                    "messages: the URL of an image or file (if it is no data: URL)", link, settings.allowed_image_hosts
                )
        tools = await _tools(body, settings, mcp)
        config = _config(given, settings)
    except ConfigError as error:
        raise Problem(422, "invalid_request", redact(str(error), secrets)) from None
    except Problem as refused:
        raise Problem(refused.status, refused.code, redact(refused.message, secrets)) from None
    return Asked(body.messages, tools, config, secrets)


def _secrets(body: RunRequest, completion_kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    headers = body.tool_http_headers or {}
    named = {name: value for name, value in completion_kwargs.items() if isinstance(value, str)}
    return (*headers.values(), *secret_values(headers), *secret_values(named))


def _config(given: Mapping[str, Any], settings: ServerSettings) -> AgentConfig:
    base = settings.base
    passed_on = {**base.completion_kwargs, **given.get("completion_kwargs", {})}
    return evolve(base, **{**given, "completion_kwargs": passed_on})


def _check_ceilings(given: Mapping[str, Any], settings: ServerSettings) -> None:
    for name, most in settings.ceilings.items():
        if name in given and (given[name] is None or given[name] > most):
            asked = "no limit" if given[name] is None else cut(str(given[name]), 40)
            raise Problem(422, "above_ceiling", f"{name}: {asked} is above the ceiling of this server, {most:g}")
    if "max_cost_usd" in settings.ceilings:
        for name in _PRICES:
            if name in given:
                text = f"{name} is for this server's operator to set, as there is a ceiling of max_cost_usd"
                raise Problem(422, "above_ceiling", text)


def _check_models(given: Mapping[str, Any], settings: ServerSettings) -> None:
    for model in (given.get("model"), *given.get("fallback_models", ())):
        if model is None or (settings.allowed_models is not None and model in settings.allowed_models):
            continue
        if settings.allowed_models is not None:
            which = ", ".join(settings.allowed_models) or "none"
            raise Problem(
                403, "model_not_allowed", f"the model {cut(model, 80)!r} is not allowed here; allowed: {which}"
            )
        if "://" in model:  # for some providers LiteLLM takes it as where to ask
            raise Problem(403, "model_not_allowed", "a model whose name is a URL must be allowed by name")


async def _check_completion_kwargs(given: Mapping[str, Any], settings: ServerSettings) -> None:
    for name in given:
        if name not in PASSED_ON:
            nearest = get_close_matches(name, PASSED_ON, n=1, cutoff=0)[0]
            text = f"completion_kwargs: {cut(name, 80)!r} is not passed on; the nearest that is: {nearest}"
            raise Problem(422, "invalid_request", text)
    for name in _MODEL_HOSTS:
        if name in given:
            await check_url(f"completion_kwargs.{name}", given[name], settings.allowed_model_hosts)


def _links(value: Any, *, in_part: bool = False) -> Iterator[str]:
    """Yield what the parts of messages name for somebody to fetch."""
    match value:
        case list():
            for each in value:
                yield from _links(each, in_part=in_part)
        case dict():
            for name, each in value.items():
                if in_part and isinstance(each, str):
                    if name in _LINKS or (name != "text" and _WITH_SCHEME.match(each)):
                        yield each
                else:
                    yield from _links(each, in_part=in_part or name == "content")


# Tools


async def _tools(body: RunRequest, settings: ServerSettings, mcp: ToolInvoker | None) -> ToolInvoker:
    backend = body.tool_backend
    if backend not in settings.backends:
        text = f"tool_backend: {backend} is not allowed here; allowed: {', '.join(settings.backends) or 'none'}"
        raise Problem(403, "backend_not_allowed", text)
    if backend != "http" and (body.tool_http_base_url is not None or body.tool_http_headers is not None):
        text = f"tool_http_base_url and tool_http_headers are for the tool_backend http, not for {backend}"
        raise Problem(422, "invalid_request", text)
    match backend:
        case "echo":
            return EchoMCP()
        case "local":
            return LocalMCPInvoker(settings.shell_allow, require_sandbox=settings.require_sandbox)
        case "research":
            from agent_fsm.tools.research import ResearchPythonInvoker

            return ResearchPythonInvoker()
        case "mcp":
            assert mcp is not None  # the backend is not allowed without
            return mcp
        case "http":
            return await _http_tools(body, settings)


async def _http_tools(body: RunRequest, settings: ServerSettings) -> ToolInvoker:
    from agent_fsm.tools.http import HttpToolsInvoker

    if body.tool_http_base_url is None:
        raise Problem(422, "invalid_request", "tool_http_base_url: the tool_backend http needs one")
    headers = body.tool_http_headers or {}
    _check_headers(headers)
    await check_url("tool_http_base_url", body.tool_http_base_url, settings.tool_hosts)
    return HttpToolsInvoker(body.tool_http_base_url, headers=headers)


def _check_headers(headers: Mapping[str, str]) -> None:
    if len(headers) > _MOST_HEADERS:
        raise Problem(422, "invalid_request", f"tool_http_headers: {len(headers)} are more than {_MOST_HEADERS}")
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or name.lower() in _OWN_HEADERS:
            raise Problem(422, "invalid_request", f"tool_http_headers: {cut(name, 80)!r} can't be set")
        if len(value) > _MOST_HEADER_CHARS or not (value.isascii() and value.isprintable()):
            text = f"tool_http_headers: {name} must be one line of at most {_MOST_HEADER_CHARS} characters of ASCII"
            raise Problem(422, "invalid_request", text)
