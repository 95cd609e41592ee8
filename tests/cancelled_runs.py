"""Our runs that are swept: turns of calls side by side, and all that they may wait for, race with or clean up."""

import asyncio
import functools
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from agent_fsm import AgentConfig, AgentRun
from agent_fsm.testing import ScriptedModel, ScriptedTools, request_faults
from tests.cancellation_sweep import PROMPT, Subject, Variant, Way
from tests.tools_gateway import ToolsGateway, tool

TASK = [{"role": "user", "content": "Do it."}]


class _Noting(AgentRun):
    """Notes whether a cancel came in time: that of a task comes when it next runs, and by then the run may be over."""

    accepted = False

    def cancel(self) -> bool:
        came = super().cancel()
        self.accepted = self.accepted or came
        return came


class OurRun:
    """A run of agent_fsm."""

    def __init__(
        self,
        tools: Any,
        script: Sequence[Any],
        config: AgentConfig | None = None,
        *,
        returned: list[str] | None = None,
        gone: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        self.returned: list[str] = [] if returned is None else returned
        self._config = quick() if config is None else config
        self._model = ScriptedModel(script)
        self._tools = tools
        self._gone = gone
        self._begun = False
        self._due_raise = False
        self.run = _Noting(TASK, tools, self._config, model_client=self._model)

    async def work(self) -> object:
        """Await the run."""
        self._begun = True
        return await self.run

    def cancel(self, task: "asyncio.Task[Any]", way: Way) -> None:
        """Cancel the task or the run."""
        if way == "run":
            self.run.cancel()
        elif task.cancel():
            self._due_raise = True

    def faults(self, task: "asyncio.Task[Any]") -> Iterator[str]:
        """Give what is wrong with the reason, and with what the awaiting task raises."""
        result = self.run.result
        if self._begun and self.run.accepted is not (result.stopped_reason == "cancelled"):
            came = "in time" if self.run.accepted else "late"
            yield f"the cancel came {came}, and the reason is {result.stopped_reason}"
        if self._begun and result.stopped_reason is None:
            yield "there is no reason"
        if not self._begun and (result.stopped_reason is not None or self._model.requests):
            yield "it had not begun"
        if self._due_raise is not task.cancelled():
            yield f"the task {'does not raise' if not task.cancelled() else 'raises'} CancelledError"
        elif not task.cancelled() and task.exception() is not None:
            yield f"the task raises {task.exception()!r}"
        elif not task.cancelled() and task.result() != result:
            yield "what is awaited is not what `run.result` is"

    async def saved(self) -> list[dict[str, Any]]:
        """Return the messages of `run.result`."""
        return [*self.run.result.messages]

    async def follow_up(self) -> Iterator[str]:
        """Run the saved messages and one more prompt."""
        model = ScriptedModel(["All is well."])
        messages = [*json.loads(json.dumps(self.run.result.messages)), PROMPT]
        result = await AgentRun(messages, config=quick(), model_client=model)
        wrong = [fault for request in model.requests for fault in request_faults(request.messages)]
        if result.stopped_reason != "success":
            wrong.append(f"it ended with {result.stopped_reason}: {result.detail}")
        return iter(wrong)

    def released(self) -> Iterator[str]:
        """Give what *gone* finds."""
        yield from self._gone()


def quick(**settings: Any) -> AgentConfig:
    """Return a configuration without a closing request."""
    return AgentConfig(**{"closing_summary": False, "max_iterations": 20, **settings})


Tool: TypeAlias = Callable[[str], Awaitable[str]]
"""Returns the text it is given, in its own way."""


def after(ticks: int) -> Tool:
    """Return a tool that takes so many ticks."""

    async def tool(text: str) -> str:
        for _ in range(ticks):
            await asyncio.sleep(0)
        return text

    return tool


def seconds(duration: float) -> Tool:
    """Return a tool that takes so long."""
    return lambda text: asyncio.sleep(duration, text)


def cleaning(ticks: int, duration: float = 0.0) -> Tool:
    """Return a tool that takes time to clean up, once it is cancelled or done: ticks, then seconds."""

    async def tool(text: str) -> str:
        try:
            return await after(4)(text)
        finally:
            for _ in range(ticks):
                await asyncio.sleep(0)
            if duration:
                await asyncio.sleep(duration)

    return tool


async def swallowing(text: str) -> str:
    """Return half of its text when it is cancelled, after a tick."""
    try:
        return await after(4)(text)
    except asyncio.CancelledError:
        await asyncio.sleep(0)
        return f"half of {text}"


async def raising(text: str) -> str:
    """Raise over its cancellation, and without one too."""
    try:
        await after(3)(text)
    except asyncio.CancelledError:
        raise ConnectionError("cut off") from None
    raise ValueError("no good")


async def deaf(text: str) -> str:
    """Ignore cancellation for half a second."""
    loop = asyncio.get_running_loop()
    until = loop.time() + 0.5
    while loop.time() < until:
        try:
            await asyncio.sleep(until - loop.time())
        except asyncio.CancelledError:
            continue
    return text


def counted(returned: list[str], tools: Sequence[Tool]) -> Callable[..., Awaitable[str]]:
    """Return the one tool of a run: it plays the n-th of *tools*, and notes in *returned* what it gives.

    Of a deaf one it is not noted: what it returns once it was given up comes to nothing, as is promised.
    """

    async def work(number: int, turn: int) -> str:
        tool = tools[number]
        text = await tool(f"turn {turn} call {number} is done")
        if tool is not deaf:
            returned.append(text)
        return text

    return work


def calls(number: int, turn: int) -> Callable[[object], Awaitable[Any]]:
    """Return a model's turn, which takes a tick and makes so many calls."""
    asked = [("work", {"number": each, "turn": turn}) for each in range(number)]
    return lambda request: asyncio.sleep(0, asked)


def our_run(*tools: Tool, turns: int = 2, config: AgentConfig | None = None, view: bool = False) -> OurRun:
    """Return a run whose every turn calls all *tools* side by side."""
    returned: list[str] = []
    functions = ScriptedTools({"work": counted(returned, tools)})
    script = [*(calls(len(tools), turn) for turn in range(turns)), lambda request: asyncio.sleep(0, "Done.")]
    return OurRun(_Backend(functions) if view else functions, script, config, returned=returned)


class _Backend:
    """Gives each run a view that takes ticks to close, and whose tools change with every call."""

    def __init__(self, tools: Any) -> None:
        self._tools = tools
        self._changed = False

    def for_run(self) -> "_Backend":
        return _Backend(self._tools)

    async def list_openai_tools(self) -> Any:
        self._changed = False
        await after(2)("")
        return await self._tools.list_openai_tools()

    async def call_openai_tool(self, call: dict[str, Any], /) -> Any:
        self._changed = True
        return await self._tools.call_openai_tool(call)

    def tools_changed(self) -> bool:
        return self._changed

    async def aclose(self) -> None:
        await after(3)("")


TWO = (after(1), after(3))
TWICE: tuple[tuple[Way, ...], ...] = (("task", "task"), ("run", "run"), ("run", "task"), ("task", "run"))


def _twice(name: str, subject: Callable[[], Subject], between: Iterable[int], **more: Any) -> Iterator[Variant]:
    for ways in TWICE:
        yield Variant(f"{name}, {' then '.join(ways)}", subject, ways, tuple(between), **more)


def deterministic(*, long: bool) -> Iterator[Variant]:
    """Give the variants in virtual time, which are the same every time."""
    between = range(12) if long else (1,)
    ways: tuple[Way, ...] = ("task", "run")
    for way, number in itertools.product(ways, range(1, 6)):
        tools = [after(1 + 2 * each) for each in range(number)]
        yield Variant(f"{number} side by side, {way}", functools.partial(our_run, *tools), (way,))
    for way in ways:
        three = functools.partial(our_run, *TWO, after(2), config=quick(tool_concurrency=2))
        yield Variant(f"3 side by side, two at once, {way}", three, (way,))
        yield Variant(
            f"a view that closes and tools that change, {way}", functools.partial(our_run, *TWO, view=True), (way,)
        )
        yield Variant(
            f"a tool that raises beside one that doesn't, {way}", functools.partial(our_run, raising, after(2)), (way,)
        )
        yield Variant(
            f"a tool that is deaf beside one that isn't, {way}",
            functools.partial(our_run, deaf, after(2)),
            (way,),
            deaf=True,
        )
        yield from _racing(way, long=long)
        yield from _models(way)
    yield from _twice("2 side by side", functools.partial(our_run, *TWO), between)
    yield from _twice("1 alone", functools.partial(our_run, after(2)), between)
    yield from _twice("a clean-up of ticks", functools.partial(our_run, cleaning(4), cleaning(2)), between)
    yield from _twice("a clean-up of ticks, 1 alone", functools.partial(our_run, cleaning(4)), between)
    yield from _twice("a clean-up of 40 ms", functools.partial(our_run, cleaning(1, 0.04), after(2), turns=1), between)
    yield from _twice(
        "a clean-up of 200 ms", functools.partial(our_run, cleaning(1, 0.2), after(2), turns=1), between, deaf=True
    )
    yield from _twice("a cancel that is swallowed", functools.partial(our_run, swallowing, swallowing), between)
    yield from _twice("a cancel that is swallowed, 1 alone", functools.partial(our_run, swallowing), between)
    yield from _twice("a view that closes", functools.partial(our_run, *TWO, turns=1, view=True), between)


def _racing(way: Way, *, long: bool) -> Iterator[Variant]:
    """Give the variants where a timer fires as a result arrives."""
    limit_s = 2.0
    for name, tools in {
        "1 alone": (seconds(limit_s),),
        "2 side by side": (seconds(limit_s), seconds(limit_s)),
        "1 just before it": (seconds(limit_s - 1e-6), after(1)),
        "1 that swallows it": (swallowing_after(limit_s),),
        "2 that swallow it": (swallowing_after(limit_s), swallowing_after(limit_s)),
        "1 that cleans up": (cleaning_after(limit_s), after(1)),
    }.items():
        for what in ("tool_timeout_seconds", "max_wallclock_seconds"):
            config = quick(**{what: limit_s})
            label = "the tool's timeout" if what.startswith("tool") else "the run's deadline"
            make = functools.partial(our_run, *tools, turns=2 if long else 1, config=config)
            yield Variant(f"{label} races the result, {name}, {way}", make, (way,))


def swallowing_after(duration: float) -> Tool:
    """Return a tool that makes a result of its cancellation, and takes so long without one."""

    async def tool(text: str) -> str:
        try:
            await asyncio.sleep(duration)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            return f"half of {text}"
        await asyncio.sleep(0)
        return text

    return tool


def cleaning_after(duration: float) -> Tool:
    """Return a tool that takes so long, and two ticks to clean up."""

    async def tool(text: str) -> str:
        try:
            await asyncio.sleep(duration)
        finally:
            await after(2)("")
        return text

    return tool


def _models(way: Way) -> Iterator[Variant]:
    """Give the variants of what else a run waits for: a back-off, a closing request, a summary, a model's clean-up."""
    work = [after(1), after(2)]

    def run(script: Sequence[Any], **settings: Any) -> OurRun:
        returned: list[str] = []
        return OurRun(ScriptedTools({"work": counted(returned, work)}), script, quick(**settings), returned=returned)

    async def cleans_up(request: object) -> object:
        try:
            return await asyncio.sleep(0, [("work", {"number": 0, "turn": 0})])
        finally:
            await after(3)("")

    down = ConnectionError("down")
    yield Variant(f"a back-off, {way}", functools.partial(run, [calls(2, 0), down, down, "Done."]), (way,))
    closing = functools.partial(
        run, [calls(2, 0), lambda request: asyncio.sleep(0, "In short.")], closing_summary=True, max_iterations=1
    )
    yield Variant(f"a closing request, {way}", closing, (way,))
    summary = functools.partial(run, [calls(2, 0), calls(2, 1), "In short.", calls(2, 2), "Done."], summarize_every=2)
    yield Variant(f"a summary, {way}", summary, (way,))
    yield Variant(f"a model that cleans up, {way}", functools.partial(run, [cleans_up, "Done."]), (way,))


# In real time: servers, processes, threads


class _Recorded:
    """An invoker that notes what its calls have given."""

    def __init__(self, invoker: Any, returned: list[str]) -> None:
        self._invoker, self._returned = invoker, returned

    def __getattr__(self, name: str) -> Any:
        given = getattr(self._invoker, name)
        return (lambda: _Recorded(given(), self._returned)) if name == "for_run" else given

    async def call_openai_tool(self, call: Mapping[str, Any], /) -> Any:
        result = await self._invoker.call_openai_tool(call)
        self._returned.append(result.text)
        return result


def _recorded_run(invoker: Any, turn: Callable[[int], Sequence[tuple[str, Mapping[str, Any]]]], **more: Any) -> OurRun:
    returned: list[str] = []
    return OurRun(_Recorded(invoker, returned), [turn(0), turn(1), "Done."], returned=returned, **more)


class _ThreadRun(OurRun):
    """A run of functions in threads, which go on when they are cancelled: what counts is what they gave before."""

    def __init__(self, pause_s: float) -> None:
        from agent_fsm import FunctionTools

        self._gave: list[tuple[float, str]] = []

        def work(number: int, turn: int) -> str:
            time.sleep(pause_s * (1 + number))
            text = f"turn {turn} call {number} is done"
            self._gave.append((time.monotonic(), text))
            return text

        turns = [[("work", {"number": number, "turn": turn}) for number in (0, 1)] for turn in (0, 1)]
        super().__init__(FunctionTools(work), [*turns, "Done."])

    def cancel(self, task: "asyncio.Task[Any]", way: Way) -> None:
        returning_s = 0.002  # from the note to the end of the function, where another thread may have the interpreter
        self.returned += [text for at, text in self._gave if at < time.monotonic() - returning_s]
        super().cancel(task, way)


def children() -> set[int]:
    """Return the processes that are ours, zombies among them."""
    files = Path("/proc/self/task").glob("*/children")
    return {int(pid) for file in files for pid in file.read_text("ascii").split()}


def _new_children(before: set[int]) -> list[str]:
    return [f"the process {pid}" for pid in sorted(children() - before)]


def _mcp_run(directory: Path, before: set[int]) -> OurRun:
    from agent_fsm import MCPInvoker
    from agent_fsm.tools.mcp.config import ServerSpec

    server = Path(__file__).parent / "mcp_servers" / "plain.py"
    arguments = ("-I", "-S", str(server), "--log", str(directory / "log"))
    invoker = MCPInvoker([ServerSpec(name="plain", command=sys.executable, args=arguments)])

    def turn(number: int) -> list[tuple[str, Mapping[str, Any]]]:
        return [("plain__echo", {"text": f"turn {number} call {each} is done"}) for each in (0, 1)]

    return _recorded_run(invoker, turn, gone=functools.partial(_new_children, before))


def _http_run(gateway: ToolsGateway) -> OurRun:
    from agent_fsm import HttpToolsInvoker

    def turn(number: int) -> list[tuple[str, Mapping[str, Any]]]:
        return [("echo", {"text": f"turn {number} call {each} is done"}) for each in (0, 1)]

    def gone() -> list[str]:
        return [] if gateway.drained(0.0) else ["a connection"]

    return _recorded_run(HttpToolsInvoker(gateway.url), turn, gone=gone)


def _local_run(before: set[int]) -> OurRun:
    from agent_fsm import LocalMCPInvoker

    def turn(number: int) -> list[tuple[str, Mapping[str, Any]]]:
        return [
            ("exec_python", {"code": f"print('turn {number} call 0 is done')"}),
            ("exec_shell", {"cmd": f"echo turn {number} call 1 is done"}),
        ]

    return _recorded_run(LocalMCPInvoker(), turn, gone=functools.partial(_new_children, before))


@contextmanager
def real(*, long: bool) -> Iterator[Iterator[Variant]]:
    """Give the variants that ask servers and start processes and threads; the servers live while the block lasts."""
    answers = [lambda request: {"text": request.body["arguments"]["text"]}]
    with tempfile.TemporaryDirectory() as directory, ToolsGateway([tool("echo")], answers) as gateway:
        yield _real(Path(directory), gateway, long=long)


def _real(directory: Path, gateway: ToolsGateway, *, long: bool) -> Iterator[Variant]:
    before = children()
    kinds: dict[str, tuple[Callable[[], OurRun], int, int]] = {  # with strides, long and short
        "functions in threads": (functools.partial(_ThreadRun, 0.002), 1, 1),
        "HTTP tools": (functools.partial(_http_run, gateway), 1, 8),
        "MCP tools": (functools.partial(_mcp_run, directory, before), 1, 40),
        "processes": (functools.partial(_local_run, before), 1, 10),
    }
    for name, (make, stride, quick_stride) in kinds.items():
        every = stride if long else quick_stride
        for way in ("task", "run"):
            yield Variant(f"{name}, {way}", make, (way,), virtual=False, stride=every, settling_s=0.25)
        yield Variant(
            f"{name}, task then task", make, ("task", "task"), (1,), virtual=False, stride=2 * every, settling_s=0.25
        )
        yield Variant(f"{name}, by the clock", make, ("run",), virtual=False, stride=every, unit="ms", settling_s=0.25)
