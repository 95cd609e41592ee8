"""The model edge: one request through LiteLLM, and what became of it.

LiteLLM is told to do one thing, to send a request once. Retries, fallbacks, deadlines and budgets are the machine's, so
whatever LiteLLM has of these is off. It takes seconds to import, so nothing here imports it before the first request.
"""

import asyncio
import contextlib
import inspect
import itertools
import json
import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from copy import deepcopy
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from attrs import evolve

from agent_fsm.config import AgentConfig
from agent_fsm.errors import ConfigError
from agent_fsm.protocol import ModelError, ModelRequest, Prices
from agent_fsm.response_cache import ResponseCache

__all__ = ["LiteLLMClient", "default_model", "provider_key_present"]

_DEFAULT_MODELS: Final = (
    ("OPENAI_API_KEY", "gpt-4o-mini"),
    ("ANTHROPIC_API_KEY", "anthropic/claude-haiku-4-5"),
    ("GEMINI_API_KEY", "gemini/gemini-2.5-flash"),
    ("GOOGLE_API_KEY", "gemini/gemini-2.5-flash"),
    ("GROQ_API_KEY", "groq/openai/gpt-oss-120b"),
    ("MISTRAL_API_KEY", "mistral/mistral-small-latest"),
    ("DEEPSEEK_API_KEY", "deepseek/deepseek-v4-flash"),
    ("XAI_API_KEY", "xai/grok-4.20"),
    ("CEREBRAS_API_KEY", "cerebras/gpt-oss-120b"),
)
"""The variable that holds a provider's key, and a cheap model of that provider that can call tools."""

_OURS: Final = "is set by the run itself"
_ONE_REPLY: Final = "a run reads one whole reply per request"
_ONE_REQUEST: Final = "a run retries and falls back itself; set max_model_retries and fallback_models instead"
_REFUSED: Final = {
    "model": _OURS,
    "messages": _OURS,
    "tools": _OURS,
    "tool_choice": _OURS,
    "functions": _OURS,
    "function_call": _OURS,
    "stream": _ONE_REPLY,
    "n": _ONE_REPLY,
    "num_retries": _ONE_REQUEST,
    "max_retries": _ONE_REQUEST,
    "retry_policy": _ONE_REQUEST,
    "fallbacks": _ONE_REQUEST,
    "context_window_fallbacks": _ONE_REQUEST,
    "context_window_fallback_dict": _ONE_REQUEST,
    "content_policy_fallbacks": _ONE_REQUEST,
}

_CEILINGS: Final = ("max_tokens", "max_completion_tokens")
_PRICES: Final = ("input_cost_per_token", "output_cost_per_token")
_HANDLED_HERE: Final = {"timeout", *_CEILINGS, *_PRICES}

_RETRYABLE_STATUSES: Final = {408, 409, 425, 429}
"""Besides every status from 500 up."""


def default_model(environ: Mapping[str, str]) -> str:
    """Return a cheap model of the first provider whose key is in *environ*, or `offline`."""
    return next((model for name, model in _DEFAULT_MODELS if environ.get(name, "").strip()), "offline")


def provider_key_present(environ: Mapping[str, str]) -> bool:
    """Say whether *environ* holds the key of a provider that `default_model` knows a model of."""
    return default_model(environ) != "offline"


class LiteLLMClient:
    """Sends the requests of one run. Close it on the event loop that it was used on.

    Raises:
        ConfigError: `completion_kwargs` sets what is the run's to set, or a ceiling or timeout that is no number; or
            there is to be a response cache, and the package redis is not installed.
    """

    def __init__(self, config: AgentConfig) -> None:
        _check(config.completion_kwargs)
        self.used_model: str = ""
        """Who answered last, as the provider calls it."""
        self._config = config
        self._passed_on = {k: v for k, v in config.completion_kwargs.items() if k not in _HANDLED_HERE}
        self._timeout_s: float = min(config.max_wallclock_seconds, config.completion_kwargs.get("timeout", math.inf))
        self._choice_refused = False
        self._owner = f"-agent_fsm-{next(_owner_numbers)}"
        self._router: Any = None
        self._litellm: Any = None
        url = config.response_cache
        self._cache = None if url is None else ResponseCache(url, config.completion_kwargs)

    async def complete(self, request: ModelRequest) -> dict[str, Any]:
        """Return the reply to *request* as a chat.completion dict, with `cost_usd` (None if that is not known) beside.

        A reply from the response cache costs nothing; its usage is what it was when the provider gave it.

        Raises:
            ModelError: there is no reply; says whether asking again may help, and what to do about it if not.
        """
        if self._cache is None:
            return await self._ask(request)
        began = time.monotonic()
        kept = await self._cache.get(request)
        if kept is not None:
            self.used_model = str(kept.get("model") or request.model)
            return {**kept, "cost_usd": 0.0}
        left_s = request.timeout_seconds - (time.monotonic() - began)
        reply = await self._ask(evolve(request, timeout_seconds=left_s))
        left_s = request.timeout_seconds - (time.monotonic() - began)
        await self._cache.put(request, reply, left_s / 2)
        return reply

    async def _ask(self, request: ModelRequest) -> dict[str, Any]:
        litellm = await _litellm()
        timeout_s = min(request.timeout_seconds, self._timeout_s)
        try:
            # LiteLLM's own timeout is one per read, which a reply that drips never meets
            async with asyncio.timeout(timeout_s):
                response = await self._send(litellm, request)
        except TimeoutError:
            raise ModelError(f"{request.model}: no reply within {timeout_s:g} s", retryable=True) from None
        except (import_module("openai").OpenAIError, litellm.BudgetExceededError) as error:
            if _choice_refused(error, request):
                self._choice_refused = True
                text = f"{request.model} can't be told which tool to call; asked again, it is left the choice"
                raise ModelError(text, retryable=True) from None
            # from None: the chain holds headers, and they hold the key
            raise _model_error(litellm, error, request.model, self._config.completion_kwargs) from None
        return self._reply(response, request.model)

    def prices(self, model: str) -> Prices | None:
        """Return what *model* costs at most, or None if that is not known; asks no network.

        The dearest tier of context length counts. Service tiers and writing to a prompt cache are not looked at.
        """
        given = [self._config.completion_kwargs.get(name) for name in _PRICES]
        known = _listed_prices(model)
        prompt, reply = (price if price is not None else listed for price, listed in zip(given, known, strict=True))
        return None if prompt is None or reply is None else Prices(prompt, reply)

    async def aclose(self) -> None:
        """Close the connections that this run opened; those of other runs and of the caller stay."""
        if self._cache is not None:
            await self._cache.aclose()
        if self._litellm is None:
            return
        clients = self._litellm.in_memory_llm_clients_cache
        for key in [key for key in clients.cache_dict if key.endswith(self._owner)]:
            client = clients.cache_dict[key]
            clients.delete_cache(key)
            close = getattr(client, "aclose", None) or client.close
            with contextlib.suppress(OSError, RuntimeError):  # of a connection that is gone already
                closing = close()
                if inspect.isawaitable(closing):
                    await closing
        await asyncio.sleep(0)  # lets LiteLLM's last fire-and-forget tasks end

    async def _send(self, litellm: Any, request: ModelRequest) -> Any:
        if self._router is None:
            self._litellm, self._router = litellm, self._new_router(litellm)
        with _as_owner(self._owner), _without_logging(litellm):
            return await self._router.acompletion(
                model=request.model,
                messages=request.messages,
                # constant: LiteLLM opens a new client, hence a new connection, for each new value
                timeout=self._timeout_s,
                **_offered(request, free=self._choice_refused or not self._may_force(litellm, request.model)),
                **_ceilings(self._config.completion_kwargs, request.max_tokens),
            )

    def _may_force(self, litellm: Any, model: str) -> bool:
        """Return whether *model* may be told which tool to call. Models that think first refuse to be."""
        thinks = any(name in self._config.completion_kwargs for name in ("thinking", "reasoning_effort"))
        return not thinks and "tool_choice" in (litellm.get_supported_openai_params(model=model) or ())

    def _new_router(self, litellm: Any) -> Any:
        router = litellm.Router(
            model_list=[
                {"model_name": name, "litellm_params": {"model": name, **deepcopy(self._passed_on)}}
                for name in dict.fromkeys((self._config.model, *self._config.fallback_models))
            ],
            num_retries=0,
            disable_cooldowns=True,  # else a few failures turn into "No deployments available"
            cache_responses=False,
        )
        # takes it out of LiteLLM's global callbacks: they only feed cooldowns, and keep it alive
        getattr(router, "retire", router.discard)()
        return router

    def _reply(self, response: Any, model: str) -> dict[str, Any]:
        reply: dict[str, Any] = response.model_dump(warnings=False)
        for choice in reply.get("choices") or ():
            message = choice["message"]
            # LiteLLM moves a refusal there
            message.setdefault("refusal", (message.get("provider_specific_fields") or {}).get("refusal"))
        usage = reply.get("usage") or {}
        if not usage.get("prompt_tokens"):  # LiteLLM reports 0 where the provider reported nothing
            reply["usage"] = usage = None
        reported = (getattr(response, "_hidden_params", None) or {}).get("response_cost")
        reply["cost_usd"] = self._cost(model, usage, reported)
        self.used_model = reply.get("model") or model
        return reply

    def _cost(self, model: str, usage: Mapping[str, Any] | None, reported: Any) -> float | None:
        """Return US dollars; None where nobody knows. A reported 0 is LiteLLM's way to say "unknown", too."""
        if usage is None:
            return None
        overridden = any(self._config.completion_kwargs.get(name) is not None for name in _PRICES)
        if not overridden and isinstance(reported, int | float) and reported > 0:
            return float(reported)
        prices = self.prices(model)
        if prices is None:
            return None
        prompt, reply = usage["prompt_tokens"], usage.get("completion_tokens") or 0
        return float(prompt * prices.prompt_usd_per_token + reply * prices.reply_usd_per_token)


def _check(completion_kwargs: Mapping[str, Any]) -> None:
    for name, why in _REFUSED.items():
        if name in completion_kwargs:
            raise ConfigError(f"completion_kwargs must not set {name!r}: {why}")
    for name in _CEILINGS:
        value = completion_kwargs.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"completion_kwargs[{name!r}] must be a whole number >= 1, not {value!r}")
    for name, least in (("timeout", math.ulp(0.0)), *((name, 0.0) for name in _PRICES)):
        value = completion_kwargs.get(name, 1.0)
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value < math.inf:
            edge = ">= 0" if least == 0 else "> 0"
            raise ConfigError(f"completion_kwargs[{name!r}] must be a finite number {edge}, not {value!r}")


def _ceilings(completion_kwargs: Mapping[str, Any], max_tokens: int) -> dict[str, int]:
    """Return the reply ceiling under the name the caller used; LiteLLM renames `max_tokens` for models that need it."""
    lower = {name: min(completion_kwargs[name], max_tokens) for name in _CEILINGS if name in completion_kwargs}
    return lower or {"max_tokens": max_tokens}


# Importing LiteLLM

_loading: Future[Any] | None = None
_loading_lock = threading.Lock()


def _offered(request: ModelRequest, *, free: bool) -> dict[str, Any]:
    """Return the tools of *request* as LiteLLM takes them, and which to choose; *free* leaves that to the model."""
    tools: Sequence[Mapping[str, Any]] = request.tools
    if not tools and any(message["role"] == "tool" for message in request.messages):
        tools = (_PLACEHOLDER,)
    if not tools:
        return {}
    # a copy: LiteLLM's Gemini code strips schemas in place
    offered: dict[str, Any] = {"tools": [deepcopy(dict(tool)) for tool in tools]}
    if request.tools and request.tool_choice is not None:
        offered["tool_choice"] = "auto" if free else request.tool_choice
    return offered


def _choice_refused(error: Exception, request: ModelRequest) -> bool:
    """Return whether the provider refused *request* because it says which tool to call."""
    forced = request.tool_choice not in (None, "auto")
    return forced and getattr(error, "status_code", None) == 400 and "tool_choice" in str(error)


# Some providers take a conversation with calls in it only if tools are offered; a call of this is answered "not run"
_PLACEHOLDER: Final = {
    "type": "function",
    "function": {
        "name": "no_tool",
        "description": "There are no tools any more: do not call this.",
        "parameters": {"type": "object", "properties": {}},
    },
}


async def _litellm() -> Any:
    """Return the `litellm` package; the event loop stays alive during the seconds that the first import takes."""
    global _loading  # noqa: PLW0603 - a process imports a package once, whoever asks
    with _loading_lock:
        if _loading is None or (_loading.done() and _loading.exception() is not None):
            _loading = Future()
            # neither to_thread nor an executor: both join their threads when the loop or the interpreter ends
            threading.Thread(target=_load, args=(_loading,), name="import litellm", daemon=True).start()
        loading = _loading
    if loading.done():  # the usual case; wrapping a future costs a turn of the loop
        return loading.result()
    return await asyncio.wrap_future(loading)


def _load(loading: "Future[Any]") -> None:
    loading.set_running_or_notify_cancel()  # from here on, a cancelled waiter does not cancel it for the others
    try:
        loading.set_result(_import_litellm())
    except ImportError as error:
        loading.set_exception(
            ModelError(f"LiteLLM can't be imported ({error}): run `pip install litellm`", retryable=False)
        )
    except BaseException as error:  # noqa: BLE001 - a thread's last resort: those who wait must hear of it
        loading.set_exception(error)


def _import_litellm() -> Any:
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else importing it fetches prices
    if "litellm" not in sys.modules and "LITELLM_LOG" not in os.environ:
        for name in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # it writes to stderr what we raise
    litellm: Any = import_module("litellm")
    litellm.suppress_debug_info = True  # it prints advice to stdout
    litellm.telemetry = False
    _own_clients(litellm)
    _warm_up(litellm)
    return litellm


def _warm_up(litellm: Any) -> None:
    """Import what LiteLLM puts off until the first request: half a second during which the loop would be deaf."""
    with _without_logging(litellm):
        litellm.completion(
            model="openai/gpt-4o-mini",
            api_key="none",
            messages=[{"role": "user", "content": "hello"}],
            tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
            mock_response="hello",
        )
    import_module("openai.resources.chat.completions")


_owner_numbers = itertools.count(1)
_owner: ContextVar[str] = ContextVar("agent_fsm_llm_owner", default="")


@contextlib.contextmanager
def _as_owner(owner: str) -> Iterator[None]:
    token = _owner.set(owner)
    try:
        yield
    finally:
        _owner.reset(token)


def _own_clients(litellm: Any) -> None:
    """Let each run have HTTP clients of its own.

    LiteLLM keeps one cache of clients for the process and offers no way to close those of one user. With the owner in
    their keys a run can close what it opened and nothing else. Outside a run the keys are what they were.
    """
    clients = litellm.in_memory_llm_clients_cache
    by_loop = clients.update_cache_key_with_event_loop
    clients.update_cache_key_with_event_loop = lambda key: f"{by_loop(key)}{_owner.get()}"


_CALLBACKS: Final = (
    "callbacks",
    "success_callback",
    "failure_callback",
    "_async_success_callback",
    "_async_failure_callback",
)


@contextlib.contextmanager
def _without_logging(litellm: Any) -> Iterator[None]:
    """Spare LiteLLM's logging, and the task that it leaves on the loop, unless the caller registered callbacks."""
    try:
        internal = import_module("litellm._internal_context").is_internal_call
    except ImportError:  # private; without it a run is as right, and a little dearer
        internal = None
    registered = {str(each) for name in _CALLBACKS for each in getattr(litellm, name, None) or ()}
    if internal is None or registered - {"cache"}:  # its Gemini code registers that one
        yield
        return
    token = internal.set(True)
    try:
        yield
    finally:
        internal.reset(token)


# Prices


@cache
def _shipped_price_list() -> Mapping[str, Any]:
    """Return the price list in LiteLLM's package, empty if there is none. Reading it takes 30 ms, importing it 5 s."""
    spec = find_spec("litellm")
    if spec is None or spec.origin is None:
        return {}
    try:
        text = Path(spec.origin).with_name("model_prices_and_context_window_backup.json").read_bytes()
    except OSError:
        return {}
    listed: Mapping[str, Any] = json.loads(text)
    return listed


def _listed_prices(model: str) -> tuple[float | None, float | None]:
    """Return US dollars per token of prompt and of reply, as LiteLLM lists them."""
    provider, _, bare = model.partition("/")
    # the caller may have registered prices with a LiteLLM that is loaded
    for listed in (getattr(sys.modules.get("litellm"), "model_cost", None) or {}, _shipped_price_list()):
        entry = listed.get(model)
        if entry is None and bare and _is_of(listed.get(bare), provider):
            entry = listed[bare]
        if entry is not None:
            prices = _dearest(entry, "input_cost_per_token"), _dearest(entry, "output_cost_per_token")
            if None not in prices:
                return prices
    return None, None


def _is_of(entry: Mapping[str, Any] | None, provider: str) -> bool:
    listed = str((entry or {}).get("litellm_provider", ""))
    return listed == provider or listed.startswith((f"{provider}_", f"{provider}-"))


def _dearest(entry: Mapping[str, Any], name: str) -> float | None:
    if entry.get(name) is None:
        return None
    tier = re.compile(rf"{name}(_above_\w+_tokens)?")
    return max(float(price) for key, price in entry.items() if tier.fullmatch(key) and price is not None)


# What went wrong

_ADVICE: Final = {
    400: "the provider does not take this request: check completion_kwargs and that the model can call tools",
    401: "check the API key",
    402: "the account has no credit left",
    403: "this key may not use this model",
    404: "check the model's name and api_base",
    413: "the request is too large: lower max_history_messages or observation_chars",
    422: "the provider does not take this request: check completion_kwargs",
}

_FORBIDDEN: Final = "the provider's content policy forbids it, asking again will not help"


def _model_error(litellm: Any, error: Exception, model: str, completion_kwargs: Mapping[str, Any]) -> ModelError:
    """Return what *error*, raised by LiteLLM for a request to *model*, means to a run."""
    headers = _headers(error)
    status = getattr(error, "status_code", None)
    if status in {408, 500} and not headers:  # LiteLLM makes these up where no reply came, or none that can be read
        status = None
    if status in {None, 401}:
        variable = _missing_key(litellm, error, model, completion_kwargs)
        if variable:
            how = f"set {variable} in the environment, or api_key in completion_kwargs"
            return ModelError(f"{model}: no API key; {how}", retryable=False)
    advice = _why_fatal(litellm, error, status)
    what = f"status {status}" if status else "no reply that can be read"
    return ModelError(
        f"{model}: {what}: {_plain(error, completion_kwargs)}" + (f" ({advice})" if advice else ""),
        retryable=not advice,
        retry_after=None if advice else _retry_after(headers),
    )


def _why_fatal(litellm: Any, error: Exception, status: int | None) -> str:
    """Return what to do about *error*, or nothing if asking again may help."""
    match error:
        case litellm.ContextWindowExceededError():  # first: it is a BadRequestError
            return "the conversation is too long for this model: lower max_history_messages or set summarize_every"
        case litellm.ContentPolicyViolationError():
            return _FORBIDDEN
        case litellm.BudgetExceededError():
            return "LiteLLM's own litellm.max_budget is spent"
        case litellm.UnsupportedParamsError():
            return "take that parameter out of completion_kwargs, or add drop_params=True to them"
    if any(isinstance(each, ImportError) for each in _chain(error)):
        return "install the package that LiteLLM needs for this provider"
    body = str(getattr(error, "body", ""))
    if "insufficient_quota" in body:
        return "the account's quota is used up: check its plan and billing"
    if "content_policy_violation" in body or "content_filter" in body:
        return _FORBIDDEN
    if status is None or status >= 500 or status in _RETRYABLE_STATUSES:
        return ""
    return _ADVICE.get(status, "asking again will not help")


def _missing_key(litellm: Any, error: Exception, model: str, completion_kwargs: Mapping[str, Any]) -> str:
    """Return the environment variable whose absence explains *error*, or nothing.

    LiteLLM reports a missing key in half a dozen ways, most of them look like a lost connection.
    """
    provider = model.partition("/")[0]
    if "api_key" in completion_kwargs or getattr(litellm, "api_key", None) or getattr(litellm, f"{provider}_key", None):
        return ""
    # others, such as those of AWS, may be found elsewhere than in the environment
    lacking: list[str] = litellm.validate_environment(model)["missing_keys"]
    keys = [name for name in lacking if name.endswith(("_API_KEY", "_TOKEN"))]
    says_so = re.search(r"missing .*(credentials|api key)", str(error), re.IGNORECASE)
    if not keys or ("api_base" in completion_kwargs and not says_so):  # a server of one's own may need no key
        return ""
    return keys[-1]  # of GOOGLE_API_KEY and GEMINI_API_KEY, the one that names the provider


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _headers(error: Exception) -> Mapping[str, str]:
    """Return the headers of the reply that *error* is about; empty if none came."""
    for headers in (
        getattr(error, "litellm_response_headers", None),
        getattr(getattr(error, "response", None), "headers", None),
    ):
        if headers:
            return {str(name).lower(): str(value) for name, value in dict(headers).items()}
    return {}


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds, never negative, that the provider asked to be left alone for."""
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * unit_s
        except ValueError:
            try:
                until = parsedate_to_datetime(value)
            except ValueError:
                continue
            seconds = (until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None


_DECORATION: Final = re.compile(r"^(litellm\.)?\w*(Error|Exception|Timeout)( Error)?( - |: )")
_SECRET_NAME: Final = re.compile(r"(key|token|secret|password)$", re.IGNORECASE)
_KEY: Final = re.compile(r"\b(sk-|AIza|xai-|gsk_)[\w-]{3,}|(?<=Bearer )\S+")


def _plain(error: Exception, completion_kwargs: Mapping[str, Any]) -> str:
    """Return what *error* says without LiteLLM's wrapping, without keys, and in at most 500 characters."""
    text = re.split(r"\n(Traceback|\nLiteLLM: |\nDeployment Info|model=)", str(error))[0].strip()
    while (shorter := _DECORATION.sub("", text)) != text:
        text = shorter
    for name, value in (*completion_kwargs.items(), *os.environ.items()):
        if isinstance(value, str) and len(value) >= 6 and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return _KEY.sub("***", text)[:500]
