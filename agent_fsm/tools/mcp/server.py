"""One MCP server: its owner task opens, holds and closes the connection, and opens it again when it breaks.

What the SDK opens must be left by the task that entered it, and a connection that fails may end that task; so nothing
but the owner ever enters one. A call is a task of its own, raced against its time and the end of the connection.
"""

import asyncio
import importlib
import inspect
import math
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from attrs import evolve, frozen

from agent_fsm.messages import cut, encodable
from agent_fsm.protocol import ToolResult
from agent_fsm.redaction import redact, redact_json
from agent_fsm.tools.mcp.config import ServerSpec
from agent_fsm.tools.mcp.content import McpTool, read_result, read_tool
from agent_fsm.tools.mcp.logs import kept_out_of_logs

if TYPE_CHECKING:
    import anyio

    from agent_fsm.tools.mcp.wire import Session, Wire, WireError

__all__ = ["MAX_PAGES", "MAX_RESTARTS", "MAX_TOOLS", "OnElicit", "Server", "ServerHealth"]

OnElicit: TypeAlias = Callable[
    [str, Mapping[str, Any]], "Awaitable[Mapping[str, Any] | None] | Mapping[str, Any] | None"
]
"""Given a server's name and what it asks (`message`, `requestedSchema`), gives the content it wants; None declines."""

MAX_PAGES = 100
MAX_TOOLS = 2_000
MAX_RESTARTS = 5
"""In a row, that is after less than `_WELL_S` seconds of work each."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_WELL_S = 60.0
_ANEW_S = 30.0
"""A server that was given up is tried again when it is asked for its tools, but only after so long."""
_GRACE_S = 0.05
"""For a task that was told to end, before it is left to end by itself."""
_CLEARING_S = 0.15
"""For a server that was not ready in time, until it is known to be gone."""
_WORDS_CHARS = 1_500
_WIRE = "agent_fsm.tools.mcp.wire"

State: TypeAlias = Literal["starting", "ready", "failed", "restarting", "closed"]
T = TypeVar("T")


@frozen
class ServerHealth:
    """How a server is."""

    state: State
    """`starting` until it was used and has answered; `failed` once it was given up."""
    error: str = ""
    """Why it is not ready; or what is amiss though it is, such as a listing that had to be cut."""
    tools: int = 0
    """How many tools it offers."""
    restarts: int = 0
    """How often it was started again."""


class Server:
    """A server and its tools, on one event loop. It is started when it is first asked for something."""

    def __init__(self, spec: ServerSpec, on_elicit: OnElicit | None = None) -> None:
        self.spec = spec
        self.changes = 0
        """Grows when its tools may have changed."""
        self.listed_changes = 0
        """What `changes` was when it was last asked for its tools."""
        self._on_elicit = on_elicit
        self._secrets = spec.secrets
        self._state: State = "starting"
        self._error = ""
        self._tools: dict[str, McpTool] = {}
        self._stale = False
        self._legacy = False
        """True once it is known to be of the old era: it is then not asked again."""
        self._restarts = 0
        self._failed_at = 0.0
        self._owner: asyncio.Task[None] | None = None
        self._stop: asyncio.Future[None] | None = None
        self._wire: Wire | None = None
        self._scope: anyio.CancelScope | None = None
        self._session: Session | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._calls: set[asyncio.Task[Any]] = set()

    def health(self) -> ServerHealth:
        """Return how it is now."""
        return ServerHealth(self._state, self._error, len(self._tools), self._restarts)

    @property
    def why_down(self) -> str:
        """Why it can't be asked anything now; empty if it can."""
        if self._state == "ready":
            return ""
        return f"server {self.spec.name!r}, {self._state}: {self._error or 'it has not answered yet'}"

    # What it is asked for

    async def tools(self) -> tuple[McpTool, ...] | str:
        """Return what it offers, or why it offers nothing, after at most `startup_timeout_s`. What it says has changed
        is listed anew; where that fails, what it offered before stays."""
        self._ensure(anew=self._state == "failed" and time.monotonic() >= self._failed_at + _ANEW_S)
        try:
            await _load_wire()
        except ImportError as error:
            return self._redacted(f"its library can't be imported: {error}")
        session = await self._ready(self.spec.startup_timeout_s + _CLEARING_S)
        self.listed_changes = self.changes
        if isinstance(session, str):
            return session
        if self._stale:
            await self._list_anew(session)
        return tuple(self._tools.values())

    async def call(self, name: str, arguments: Mapping[str, Any], timeout_s: float) -> ToolResult:
        """Return what comes of calling the tool that the server calls *name*, at most 0.1 s after *timeout_s*."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        self._ensure()
        tries = 0
        while True:
            session = await self._ready(deadline - loop.time())
            if isinstance(session, str):
                return self._shown(_failed(f"error: the call was not sent: {session}"))
            tries += 1
            outcome = await self._attempt(session, name, arguments, deadline)
            if outcome is None:
                late = f"error: no answer within {timeout_s:g} s; outcome unknown: the server was told to stop, but it "
                return self._shown(_failed(f"{late}may have done its work, or part of it{self._remarks(session)}"))
            if isinstance(outcome, ToolResult):
                return self._shown(outcome)
            if tries > 1 or not self._may_repeat(outcome, name):
                return self._shown(_failed(await self._told(session, outcome)))

    async def _attempt(
        self, session: "Session", name: str, arguments: Mapping[str, Any], deadline: float
    ) -> "ToolResult | WireError | None":
        """Return what comes of one try; None if nothing does in time."""
        outcome = await self._raced(session, _outcome(session, name, arguments), deadline)
        wire = await _load_wire()
        if outcome is None:
            return wire.WireError(wire.Failure.LOST, "") if session.ended.done() else None
        if not isinstance(outcome, ToolResult) and outcome.failure in (wire.Failure.UNSENT, wire.Failure.SESSION_GONE):
            session.lose(str(outcome))
        return outcome

    async def _raced(self, session: "Session", work: Coroutine[Any, Any, T], deadline: float) -> T | None:
        """Return what *work* returns; None if it was not done by *deadline* or by the end of the connection."""
        loop = asyncio.get_running_loop()
        task = loop.create_task(work)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        try:
            left = max(0.0, deadline - loop.time())
            either: set[asyncio.Future[Any]] = {task, session.ended}
            await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not task.done() and session.ended.done():
                await asyncio.wait({task}, timeout=_GRACE_S)  # it hears of it, too
            if not task.done():
                task.cancel()  # which tells the server
                await asyncio.wait({task}, timeout=_GRACE_S)
        finally:
            task.cancel()
        return task.result() if task.done() and not task.cancelled() else None

    def _may_repeat(self, error: "WireError", name: str) -> bool:
        """Return whether a call may be sent again: nothing was done, or by its own word doing it twice is no harm."""
        match error.failure.name:
            case "UNSENT" | "SESSION_GONE":
                return True
            case "LOST":
                return name in self._tools and self._tools[name].repeatable
        return False

    async def _told(self, session: "Session", error: "WireError") -> str:
        """Return what the model is told of a call that has no result."""
        match error.failure.name:
            case "REFUSED":
                return f"error: {error}"
            case "UNREADABLE":
                may = "outcome unknown: the call may have been carried out, or part of it"
                return f"error: what came back can't be read ({error}); {may}"
            case "UNSENT" | "SESSION_GONE":
                return f"error: the call was not carried out: {error}"
        why = session.ended.done() and (session.ended.result() or await session.why_ended())
        return (
            f"error: server {self.spec.name!r} was lost in this call ({why or error}); outcome unknown: the call may "
            f"have been carried out, or part of it{self._remarks(session)}"
        )

    def _remarks(self, session: "Session") -> str:
        remarks = session.remarks()
        return f" ({cut(remarks, _WORDS_CHARS)})" if remarks else ""

    def _shown(self, result: ToolResult) -> ToolResult:
        """Return *result* without the secrets that the server was given."""
        if not self._secrets:
            return result
        try:
            return evolve(
                result,
                text=redact(result.text, self._secrets),
                parts=tuple(redact_json(part, self._secrets) for part in result.parts),
                structured=redact_json(result.structured, self._secrets),
            )
        except RecursionError:
            return _failed("error: the call was carried out, but its result is nested too deeply to be read")

    def _redacted(self, text: str) -> str:
        return cut(redact(encodable(text), self._secrets), _WORDS_CHARS)

    # The connection

    async def _ready(self, seconds: float) -> "Session | str":
        """Return the session, or why there is none after *seconds*."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while True:
            if self._session is not None and not self._session.ended.done():
                return self._session
            left = deadline - loop.time()
            if self._state in ("failed", "closed") or left <= 0:
                return self.why_down or f"server {self.spec.name!r} has gone away"
            waiter = loop.create_future()
            self._waiters.append(waiter)
            await asyncio.wait({waiter}, timeout=left)

    def _ensure(self, *, anew: bool = False) -> None:
        """Start the owner if there is none yet."""
        if self._owner is None or (anew and self._owner.done()):
            loop = asyncio.get_running_loop()
            self._state, self._error = "starting", ""
            self._stop = loop.create_future()
            self._owner = loop.create_task(self._own(self._stop))
            self._owner.add_done_callback(_look_at)

    def _become(self, state: State, error: str = "") -> None:
        self._state, self._error = state, self._redacted(error)
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _own(self, stop: "asyncio.Future[None]") -> None:
        """Hold the connection until *stop* is done, or until it has broken too often."""
        end: State = "closed"
        why = ""
        in_a_row = 0
        ready_once = False
        try:
            await _load_wire(unless=stop)
            while not stop.done():
                seconds, why = await self._live(stop)
                if stop.done():
                    break
                if seconds >= _WELL_S:
                    in_a_row = 0
                ready_once = ready_once or seconds > 0
                if not ready_once or in_a_row >= MAX_RESTARTS:
                    end = "failed"
                    why += f" (after {in_a_row} restarts)" if in_a_row else ""
                    return
                self._become("restarting", why)
                await asyncio.wait({stop}, timeout=min(_FIRST_PAUSE_S * 2**in_a_row, _LONGEST_PAUSE_S))
                in_a_row += 1
                self._restarts += not stop.done()
        except ImportError as error:
            end, why = "failed", f"its library can't be imported: {error}"
        finally:
            self._failed_at = time.monotonic()
            self._tools = {}
            self.changes += 1
            self._become(end, why)

    async def _live(self, stop: "asyncio.Future[None]") -> tuple[float, str]:
        """Open the connection and hold it; return for how many seconds it was ready, and why it no longer is."""
        import anyio

        spec, loop = self.spec, asyncio.get_running_loop()
        module = await _load_wire()
        elicit = None if self._on_elicit is None else self._asked
        wire: Wire = module.Wire(spec, module.Hooks(self._changed, elicit), legacy=self._legacy)
        self._wire = wire
        began = math.inf
        why = ""
        try:
            # One scope round everything: what was entered in it must be left in it
            deadline = loop.time() + spec.startup_timeout_s
            with kept_out_of_logs(self._secrets), anyio.CancelScope(deadline=deadline) as scope:
                self._scope = scope
                async with wire.connected() as session:
                    self._legacy = not session.modern
                    note = await self._list(session)
                    scope.deadline = math.inf
                    began = loop.time()
                    self._session = session
                    self._become("ready", note)
                    either: set[asyncio.Future[Any]] = {stop, session.ended}
                    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                    self._session = None
                    if not stop.done():
                        why = session.ended.result() or await wire.why_ended()
                        wire.kill()  # a broken one has no claim to a polite close
            if began == math.inf:
                why = f"it was not ready within {spec.startup_timeout_s:g} s"
        except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001 - the SDK raises what its tasks and the network raise
            why = why or wire.how_ended or _words(error)
        finally:
            self._session = self._scope = None
            wire.kill()
        remarks = wire.remarks()
        why = f"{why} ({remarks})" if remarks and not stop.done() else why
        return max(0.0, loop.time() - began), why

    def stop(self, *, hurried: bool = False) -> None:
        """Begin to close: politely, unless *hurried* or not ready yet. What runs meanwhile is cancelled."""
        for task in list(self._calls):
            task.cancel()
        if self._stop is None:
            self._become("closed")
        elif not self._stop.done():
            self._stop.set_result(None)
        if hurried or self._session is None:
            if self._wire is not None:
                self._wire.kill()
            if self._scope is not None:
                self._scope.cancel()

    @property
    def tasks(self) -> "set[asyncio.Task[Any]]":
        """What has not ended yet."""
        owner = set() if self._owner is None or self._owner.done() else {self._owner}
        return owner | {task for task in self._calls if not task.done()}

    def _changed(self) -> None:
        self._stale = True
        self.changes += 1

    async def _asked(self, question: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Pass a question on to the handler; one that fails or gives nonsense has declined."""
        assert self._on_elicit is not None  # else nobody is asked
        try:
            given = self._on_elicit(self.spec.name, question)
            answer = await given if inspect.isawaitable(given) else given
        except Exception:  # noqa: BLE001 - around a user-supplied handler
            return None
        return answer if isinstance(answer, Mapping) else None

    # The listing

    async def _list_anew(self, session: "Session") -> None:
        loop = asyncio.get_running_loop()
        self._stale = False
        before = self._tools
        note = await self._raced(session, self._noted(session), loop.time() + self.spec.startup_timeout_s)
        if note is None:
            self._tools = before
            note = f"its tools have changed, but it did not list them within {self.spec.startup_timeout_s:g} s"
        if self._session is session:
            self._error = self._redacted(note)

    async def _noted(self, session: "Session") -> str:
        module = await _load_wire()
        try:
            return await self._list(session)
        except module.WireError as error:
            return f"its tools have changed, but it did not list them: {error}"

    async def _list(self, session: "Session") -> str:
        """Take the tools that the server offers; return what was amiss with the listing."""
        tools: dict[str, McpTool] = {}
        notes: list[str] = []
        cursors: set[str] = set()
        self._stale = False
        cursor: str | None = None
        while True:
            page = await session.page(cursor)
            notes += self._take(page.get("tools"), tools)
            cursor = page.get("nextCursor")
            if not isinstance(cursor, str) or not cursor:
                break
            if cursor in cursors:
                notes.append("the listing was cut: its cursor comes again")
                break
            cursors.add(cursor)
            if len(cursors) >= MAX_PAGES or len(tools) >= MAX_TOOLS:
                notes.append(f"the listing was cut after {len(cursors)} pages and {len(tools):,} tools")
                break
        self._tools = {name: tool for name, tool in tools.items() if self.spec.offers(name)}
        more = f" and {len(notes) - 3} more" if len(notes) > 3 else ""
        return "; ".join((*notes[:2], notes[-1]) if len(notes) > 3 else notes) + more

    def _take(self, listed: object, tools: dict[str, McpTool]) -> list[str]:
        """Add the tools of a page to *tools*; return what was amiss with those that are left out."""
        if not isinstance(listed, list):
            return ["a page of the listing has no list of tools"]
        notes: list[str] = []
        for each in listed:
            tool = read_tool(each)
            if isinstance(tool, str):
                notes.append(tool)
            elif tool.name in tools:
                notes.append(f"tool {tool.name!r} is there twice: the first counts")
            elif len(tools) >= MAX_TOOLS:
                notes.append(f"the listing was cut after {MAX_TOOLS:,} tools")
                break
            else:
                tools[tool.name] = tool
        return [cut(note, 200) for note in notes]


async def _outcome(session: "Session", name: str, arguments: Mapping[str, Any]) -> "ToolResult | WireError":
    """Return what comes of a call."""
    module = await _load_wire()
    try:
        return read_result(await session.call(name, arguments))
    except module.WireError as error:
        wire_error: WireError = error
        return wire_error
    except Exception as error:  # noqa: BLE001 - a fault of the SDK's must not end the run
        return _failed(f"error: outcome unknown: {_words(error)}")


def _failed(text: str) -> ToolResult:
    return ToolResult(text, ok=False)


def _look_at(task: "asyncio.Task[Any]") -> None:
    if not task.cancelled():
        task.exception()  # looked at, so that asyncio does not log it


def _words(error: BaseException) -> str:
    """Return what went wrong, however many groups it is wrapped in: the first that has words for it."""
    leaves = list(_leaves(error))
    error = next((each for each in leaves if str(each)), leaves[0])
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        yield error
        return
    for each in error.exceptions:
        yield from _leaves(each)


async def _load_wire(unless: "asyncio.Future[None] | None" = None) -> Any:
    """Return the module that speaks to servers; None if *unless* is done before it is there. Its libraries take a
    second or two to import: in a thread, so that what else runs on this loop goes on."""
    if _loaded:
        return _loaded[0]
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def tell(error: Exception | None) -> None:
        if not done.done():
            done.set_result(None) if error is None else done.set_exception(error)

    def load() -> None:
        failed: Exception | None = None
        try:
            _loaded.append(importlib.import_module(_WIRE))
        except Exception as error:  # noqa: BLE001 - whatever a library does on import
            failed = ImportError(_words(error))
        try:
            loop.call_soon_threadsafe(tell, failed)
        except RuntimeError:  # nobody waits any more: the loop is closed
            return

    threading.Thread(target=load, name="agent-fsm-import-mcp", daemon=True).start()
    await (done if unless is None else asyncio.wait({done, unless}, return_when=asyncio.FIRST_COMPLETED))
    if not done.done():
        done.cancel()
        return None
    done.result()  # raises what the import has
    return _loaded[0]


_loaded: list[ModuleType] = []
