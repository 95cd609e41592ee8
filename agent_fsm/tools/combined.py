"""Several tool backends as one: a dead, hanging or raising one never hides the tools of the others."""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Mapping
from types import MappingProxyType
from typing import Any, Literal

from attrs import frozen

from agent_fsm.errors import ConfigError
from agent_fsm.messages import cut
from agent_fsm.protocol import ToolInvoker, ToolResult, ToolsUnavailable
from agent_fsm.reading import looks_like_research, read_tools
from agent_fsm.tools.names import tool_name

__all__ = ["BackendHealth", "CombinedInvoker"]

_ERROR_CHARS = 500
_GRACE_S = 0.05
"""Seconds that a listing or a close may take to end once it is cancelled; then it is left behind."""


@frozen
class BackendHealth:
    """How one backend was when it was last asked for its tools."""

    state: Literal["unasked", "ready", "failed"]
    error: str = ""
    """Why it failed; empty unless it did."""
    tools: int = 0
    """How many tools it offers."""


@frozen
class _Place:
    """Where a tool is."""

    backend: str
    name: str
    """What its backend calls it."""


class CombinedInvoker:
    """Offers the tools of all its backends, and takes each call to the backend that has the tool.

    A tool keeps its name unless several backends offer that name: then it is `backend__name` in each of them, whoever
    answered first. A name that was given once stays: a backend that dies or comes back later in a run renames nothing.

    Args:
        positional: backends, named after their classes, with a number behind if that is taken; or one mapping of
            names to backends.
        list_timeout_s: seconds that each backend has to say what it offers; all are asked at once.

    Raises:
        ConfigError: there is no backend, or something is none.
    """

    def __init__(self, *backends: ToolInvoker | Mapping[str, ToolInvoker], list_timeout_s: float = 10.0) -> None:
        if isinstance(list_timeout_s, bool) or not 0 < list_timeout_s < math.inf:
            raise ConfigError(f"list_timeout_s must be a finite number of seconds > 0, not {list_timeout_s!r}")
        self._backends = _named(backends)
        self._list_timeout_s = list_timeout_s
        self._places: dict[str, _Place] = {}
        self._given: dict[_Place, str] = {}
        self._research: frozenset[str] = frozenset()
        self._health = dict.fromkeys(self._backends, BackendHealth("unasked"))

    @property
    def research_tools(self) -> frozenset[str]:
        """The names, as last listed, of the tools that look things up. Where a backend does not say which, they are
        judged by what it calls them."""
        return self._research

    @property
    def unavailable(self) -> tuple[str, ...]:
        """The backends, and parts of backends, that could not be asked when they were last listed, and why."""
        failed = {name: (each.error,) for name, each in self._health.items() if each.state == "failed"}
        missing = {name: failed.get(name) or _missing(backend) for name, backend in self._backends.items()}
        return tuple(f"{name}: {why}" for name, whys in missing.items() for why in whys)

    def health(self) -> Mapping[str, BackendHealth]:
        """Return how each backend was when it was last asked."""
        return MappingProxyType(dict(self._health))

    def tools_changed(self) -> bool:
        """Return whether a backend's tools have changed; one that can't say has not."""
        changed = [_changed(backend) for backend in self._backends.values()]  # all are asked: asking may reset it
        return any(changed)

    def for_run(self) -> "CombinedInvoker":
        """Return what one run uses: what the backends open for it is closed by its `aclose`, and nothing else is."""
        return _ForRun(self._backends, self._list_timeout_s)

    async def list_openai_tools(self) -> list[dict[str, Any]]:
        """Return the tools of all backends that answer in time, in the order in which the backends were given.

        Raises:
            RuntimeError: none of them did; says of each why.
        """
        asked = [self._asked(name, backend) for name, backend in self._backends.items()]
        listed = dict(zip(self._backends, await asyncio.gather(*asked), strict=True))
        self._health = {
            name: BackendHealth("failed", outcome)
            if isinstance(outcome, str)
            else BackendHealth("ready", "", len(outcome))
            for name, outcome in listed.items()
        }
        answers = {name: outcome for name, outcome in listed.items() if not isinstance(outcome, str)}
        if not answers:
            raise RuntimeError(
                "no tool backend answered: " + "; ".join(f"{name}: {each.error}" for name, each in self._health.items())
            )
        return self._offered(answers)

    async def call_openai_tool(self, call: dict[str, Any], /) -> str | dict[str, Any] | ToolResult:
        """Take *call* to the backend that has the tool, under the name that it has there. What it raises goes
        through."""
        function = call["function"]
        place = self._places.get(function["name"])
        if place is None:
            known = ", ".join(self._places) or "none"
            return ToolResult(f"error: there is no tool {function['name']!r}; there are: {known}", ok=False)
        backend = self._backends[place.backend]
        given: Any = backend.call_openai_tool({**call, "function": {**function, "name": place.name}})
        outcome: str | dict[str, Any] | ToolResult = await given if hasattr(given, "__await__") else given
        return outcome

    async def _asked(self, name: str, backend: ToolInvoker) -> "list[Mapping[str, Any]] | str":
        """Return the tools of *backend*, or why there are none."""

        async def ask() -> Any:
            given: Any = backend.list_openai_tools()
            return await given if hasattr(given, "__await__") else given

        outcome = await _within(self._list_timeout_s, ask)
        if isinstance(outcome, _Failed):
            return outcome.why
        read = read_tools(outcome, now=0.0, backend=name, research=())
        return read.error if isinstance(read, ToolsUnavailable) else list(read.tools)

    def _offered(self, answers: "Mapping[str, list[Mapping[str, Any]]]") -> list[dict[str, Any]]:
        """Return the tools under the names by which they are offered, and keep where each is."""
        counts = Counter(tool["function"]["name"] for tools in answers.values() for tool in tools)
        places: dict[str, _Place] = {}
        research: set[str] = set()
        offered = []
        plain = {name for name, count in counts.items() if count == 1} - set(self._given.values())
        for backend, tools in answers.items():
            named = _research_of(self._backends[backend])
            for tool in tools:
                own = tool["function"]["name"]
                place = _Place(backend, own)
                name = self._given.get(place) or (own if own in plain else "")
                if not name:
                    name = tool_name(backend, own, plain | places.keys() | set(self._given.values()))
                places[name] = place
                if looks_like_research(own) if named is None else own in named:
                    research.add(name)
                offered.append({**tool, "function": {**tool["function"], "name": name}})
        self._places, self._research = places, frozenset(research)
        self._given |= {place: name for name, place in places.items()}
        return offered


class _ForRun(CombinedInvoker):
    """The backends of one run."""

    def __init__(self, backends: Mapping[str, ToolInvoker], list_timeout_s: float) -> None:
        self._closes: list[Callable[[], Any]] = []
        super().__init__(
            {name: self._begun(backend) for name, backend in backends.items()}, list_timeout_s=list_timeout_s
        )

    def for_run(self) -> CombinedInvoker:
        """Return this: it is a run's already."""
        return self

    async def aclose(self) -> None:
        """Close what the backends opened for this run, all at once. One that fails or hangs does not stop the others;
        when this is cancelled, so are they."""
        closes, self._closes = self._closes, []
        tasks = {asyncio.ensure_future(_closed(close)) for close in closes}
        for task in tasks:
            task.add_done_callback(_look_at)
        if not tasks:
            return
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=_GRACE_S / 2)  # so that they have let go when this has ended
            raise

    def _begun(self, backend: ToolInvoker) -> ToolInvoker:
        for_run = getattr(backend, "for_run", None)
        if for_run is None:
            return backend
        try:
            own: ToolInvoker = for_run()
        except Exception as error:  # noqa: BLE001 - around a user-supplied tool backend: it must not stop the others
            return _Broken(_told(error))
        close = getattr(own, "aclose", None)
        if close is not None:
            self._closes.append(close)
        return own


@frozen
class _Broken:
    """Stands for a backend that could not begin a run."""

    why: str

    async def list_openai_tools(self) -> list[dict[str, Any]]:
        raise RuntimeError(self.why)

    async def call_openai_tool(self, call: dict[str, Any], /) -> ToolResult:
        return ToolResult(f"error: {self.why}", ok=False)


@frozen
class _Failed:
    """What a backend did instead of answering."""

    why: str


async def _closed(close: Callable[[], Any]) -> None:
    given = close()
    if hasattr(given, "__await__"):
        await given


async def _within(seconds: float, function: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Return what *function* returns within *seconds*, or a `_Failed`. What ignores its cancel is left behind."""
    task = asyncio.ensure_future(function())
    task.add_done_callback(_look_at)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=_GRACE_S)
            return _Failed(f"no answer within {seconds:g} s")
    finally:
        task.cancel()
    if task.cancelled():
        return _Failed("its listing was cancelled, but not by the run")
    error = task.exception()
    if isinstance(error, Exception):
        return _Failed(_told(error))
    return task.result()  # KeyboardInterrupt goes on


def _look_at(task: "asyncio.Task[Any]") -> None:
    if not task.cancelled():
        task.exception()  # looked at, so that asyncio does not log it


def _told(error: Exception) -> str:
    try:
        words = str(error)
    except Exception:  # noqa: BLE001 - around a user-supplied tool backend, whose exceptions may be anything
        words = "(it can't be put into words)"
    return cut(f"{type(error).__name__}: {words}" if words else type(error).__name__, _ERROR_CHARS)


def _named(given: tuple[Any, ...]) -> dict[str, ToolInvoker]:
    backends: dict[str, ToolInvoker] = {}
    for each in given:
        if isinstance(each, Mapping):
            for name in each:
                if not isinstance(name, str) or not name or name in backends:
                    raise ConfigError(f"a backend's name must be a text that no other has, not {name!r}")
            backends.update(each)
        else:
            backends[_numbered(type(each).__name__, backends)] = each
    for name, backend in backends.items():
        if not callable(getattr(backend, "list_openai_tools", None)) or not callable(
            getattr(backend, "call_openai_tool", None)
        ):
            raise ConfigError(f"{name} is no tool backend: it has no list_openai_tools and call_openai_tool")
    if not backends:
        raise ConfigError("there is no tool backend to combine")
    return backends


def _numbered(name: str, taken: Collection[str]) -> str:
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name}{number}"
    return unique


def _research_of(backend: ToolInvoker) -> Collection[str] | None:
    named = getattr(backend, "research_tools", None)
    return named if isinstance(named, list | tuple | set | frozenset | Mapping) else None


def _missing(backend: ToolInvoker) -> tuple[str, ...]:
    missing = getattr(backend, "unavailable", None)
    return tuple(missing) if isinstance(missing, list | tuple) else ()


def _changed(backend: ToolInvoker) -> bool:
    changed = getattr(backend, "tools_changed", None)
    if changed is None:
        return False
    try:
        return bool(changed())
    except Exception:  # noqa: BLE001 - around a user-supplied tool backend: it must not stop the others
        return False
