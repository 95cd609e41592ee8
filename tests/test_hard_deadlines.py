"""A run ends within its deadline and 250 ms whatever it was doing, and so does the process that it was all of.

On a busy machine the time for which this thread was ready to run, and had no core, is not counted.
"""

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve, field, frozen

from agent_fsm import AgentConfig, AgentResult, AgentRun, FunctionTools, HttpToolsInvoker, LocalMCPInvoker
from agent_fsm.testing import HANG, ScriptedModel, ScriptedTools, request_faults
from tests import openai_server, tools_gateway
from tests.openai_server import OpenAIServer
from tests.tools_gateway import ToolsGateway

TASK = [{"role": "user", "content": "Do it."}]
PROMPT = {"role": "user", "content": "Go on."}
DEADLINE_S = 0.3
SLACK_S = 0.25
FOREVER_S = 60.0
SCHEDSTAT = Path("/proc/thread-self/schedstat")

linux = pytest.mark.skipif(not SCHEDSTAT.exists(), reason="processes are found in Linux's /proc")


def starved_s() -> float:
    """Return for how many seconds this thread has been ready to run while the machine had no core for it."""
    return int(SCHEDSTAT.read_text("ascii").split()[1]) / 1e9 if SCHEDSTAT.exists() else 0.0


@frozen
class World:
    """What a run is put into, and what lets go of what still hangs there once it is over."""

    tools: Any = None
    script: Any = ("Done.",)
    model: Any = None
    let_go: Callable[[], object] = lambda: None
    settings: dict[str, Any] = field(factory=dict)
    reason: str = "max_wallclock"


def calling(*names: str, **arguments: Any) -> list[Any]:
    return [[(name, arguments) for name in names], "Done."]


# Who does not listen


async def deaf(**arguments: Any) -> str:
    """Ignore every cancellation for a while."""
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(until - time.monotonic())
    return "deaf is done"


async def slow_to_clean_up(**arguments: Any) -> None:
    try:
        await asyncio.sleep(FOREVER_S)
    finally:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(1.0)


async def shielded(**arguments: Any) -> None:
    await asyncio.shield(asyncio.sleep(1.0))


async def spawns(**arguments: Any) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(deaf())


class Deaf:
    """Does not listen, whatever it is asked."""

    def __init__(self, *where: str) -> None:
        self._where = where

    def for_run(self) -> "Deaf":
        return self

    async def _asked(self, what: str, answer: Any) -> Any:
        return await deaf() if what in self._where else answer

    async def list_openai_tools(self) -> Any:
        parameters = {"type": "object", "properties": {}}
        return await self._asked("list", [{"type": "function", "function": {"name": "work", "parameters": parameters}}])

    async def call_openai_tool(self, call: Any, /) -> Any:
        return await self._asked("call", "worked")

    async def aclose(self) -> Any:
        return await self._asked("close", None)


def _async_tool(tool: Callable[..., Any], *names: str) -> World:
    return World(ScriptedTools({"work": tool, "fine": lambda: "fine"}), calling(*names))


def _blocked(block: Callable[[threading.Event], Callable[[], Any]], number: int = 1) -> World:
    let_go = threading.Event()
    return World(FunctionTools(block(let_go)), calling(*["work"] * number), let_go=let_go.set)


def waiting(let_go: threading.Event) -> Callable[[], Any]:
    def work() -> None:
        let_go.wait(FOREVER_S)

    return work


def sleeping(let_go: threading.Event) -> Callable[[], Any]:
    def work() -> None:
        time.sleep(2.0)

    return work


def busy(let_go: threading.Event) -> Callable[[], Any]:
    def work() -> None:
        while not let_go.is_set():
            pass

    return work


def receiving(let_go: threading.Event) -> Callable[[], Any]:
    ours, its = socket.socketpair()

    def close() -> None:
        let_go.wait(FOREVER_S)
        ours.close()

    def work() -> None:
        threading.Thread(target=close, daemon=True).start()
        its.recv(1)  # no bytecode runs until the other end is closed
        its.close()

    return work


def _model(complete: Callable[[Any], Any]) -> World:
    return World(model=ScriptedModel([complete]))


def _threaded_model() -> World:
    let_go = threading.Event()
    return World(model=ScriptedModel([lambda request: asyncio.to_thread(let_go.wait, FOREVER_S)]), let_go=let_go.set)


async def _raises_late(request: Any) -> None:
    try:
        await asyncio.sleep(FOREVER_S)
    except asyncio.CancelledError:
        await asyncio.sleep(0.08)
        raise ConnectionError("closed") from None


WORLDS: dict[str, Callable[[], World]] = {
    "a tool that is deaf": lambda: _async_tool(deaf, "work"),
    "a tool that is deaf, beside others": lambda: _async_tool(deaf, "work", "fine", "work"),
    "a tool that cleans up for long": lambda: _async_tool(slow_to_clean_up, "work"),
    "a tool that cleans up for long, beside others": lambda: _async_tool(slow_to_clean_up, "work", "fine"),
    "a tool that is shielded": lambda: _async_tool(shielded, "work"),
    "a tool whose task group is deaf": lambda: _async_tool(spawns, "work"),
    "a function that waits": lambda: _blocked(waiting),
    "five functions that wait": lambda: _blocked(waiting, 5),
    "a function that sleeps": lambda: _blocked(sleeping),
    "a function that is busy": lambda: _blocked(busy),
    "a function in a blocked C call": lambda: _blocked(receiving),
    "a model that hangs": lambda: World(script=[HANG]),
    "a model that is deaf": lambda: _model(lambda request: deaf()),
    "a model that blocks a thread": _threaded_model,
    "a model that raises late": lambda: _model(_raises_late),
    "a listing that is deaf": lambda: World(Deaf("list")),
    "a tool and a close that are deaf": lambda: World(Deaf("call", "close"), calling("work")),
    "tools and a close that are deaf": lambda: World(Deaf("call", "close"), calling("work", "work")),
    "a listing and a close that are deaf": lambda: World(Deaf("list", "close")),
    "a model and a close that are deaf": lambda: World(Deaf("close"), model=ScriptedModel([lambda request: deaf()])),
    "a closing request that is deaf": lambda: World(
        ScriptedTools({"work": lambda: "fine"}),
        [[("work", {})], lambda request: deaf()],
        settings={"max_iterations": 1, "closing_summary": True},
        reason="max_iterations",
    ),
}


async def _timed(world: World) -> tuple[AgentResult, float, list[str]]:
    """Return what came of a run, its seconds, and what is wrong with a follow-up to it."""
    config = AgentConfig(**{"max_wallclock_seconds": DEADLINE_S, "closing_summary": False, **world.settings})
    model = ScriptedModel(world.script) if world.model is None else world.model
    began = time.monotonic() - starved_s()
    try:
        result = await AgentRun(TASK, world.tools, config, model_client=model)
        took_s = time.monotonic() - starved_s() - began
    finally:
        world.let_go()
    again = ScriptedModel(["Well."])
    await AgentRun([*result.messages, PROMPT], model_client=again)
    return result, took_s, [fault for each in again.requests for fault in request_faults(each.messages)]


def _ended(world: World) -> tuple[AgentResult, float, list[str]]:
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(_timed(world))
    finally:
        for task in (left := asyncio.all_tasks(loop)):
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


@pytest.mark.parametrize("name", WORLDS)
def test_a_run_ends_in_time_whatever_it_was_doing(name: str) -> None:
    world = WORLDS[name]()

    result, took_s, faults = _ended(world)

    assert (result.stopped_reason, faults) == (world.reason, [])
    assert took_s <= DEADLINE_S + SLACK_S


ABANDONED = "before this call finished; it was abandoned and may go on, and what it does is unknown"


@pytest.mark.parametrize("limit", ["max_wallclock_seconds", "tool_timeout_seconds"])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("kind", ["deaf", "in a thread"])
def test_a_call_that_was_abandoned_is_told_as_such(kind: str, number: int, limit: str) -> None:
    world = _blocked(waiting, number) if kind == "in a thread" else _async_tool(deaf, *["work"] * number)
    world = evolve(world, settings={"max_wallclock_seconds": 5.0, limit: 0.2})

    result, _, _ = _ended(world)

    told = [message["content"] for message in result.messages if message["role"] == "tool"]
    assert [text[-len(ABANDONED) :] for text in told] == [ABANDONED] * number


# Servers and processes


def _model_server(world: ExitStack, reply: Any) -> World:
    from agent_fsm.llm import LiteLLMClient

    server = world.enter_context(OpenAIServer([reply]))
    config = AgentConfig(model="openai/gpt-4o-mini", completion_kwargs=server.completion_kwargs)
    return World(model=LiteLLMClient(config))


def _gateway(world: ExitStack, tools: Any, answer: Any) -> World:
    gateway = world.enter_context(ToolsGateway(tools, [answer]))
    return World(HttpToolsInvoker(gateway.url), calling("work"))


TOOLS = [tools_gateway.tool("work")]
LONG = {"text": "x" * 1_000}
SERVED: dict[str, Callable[[ExitStack], World]] = {
    "a model server that drips": lambda world: _model_server(world, openai_server.Drip("x" * 1_000, pause_s=0.01)),
    "a model server that hangs": lambda world: _model_server(world, openai_server.HANG),
    "a gateway that hangs": lambda world: _gateway(world, TOOLS, tools_gateway.HANG),
    "a gateway that drips": lambda world: _gateway(world, TOOLS, tools_gateway.Drip(LONG, pause_s=0.01)),
    "a gateway whose list drips": lambda world: _gateway(world, tools_gateway.Drip(TOOLS, pause_s=0.02), LONG),
    "a gateway whose list hangs": lambda world: _gateway(world, tools_gateway.HANG, LONG),
}


@pytest.fixture(scope="module")
def libraries() -> None:
    """Have what is imported late imported: that takes seconds, once."""
    with ExitStack() as world:
        _ended(_model_server(world, "Done."))
        _ended(_gateway(world, TOOLS, LONG))


@pytest.mark.parametrize("name", SERVED)
def test_a_run_ends_in_time_whatever_a_server_does(name: str, libraries: None) -> None:
    with ExitStack() as stack:
        world = SERVED[name](stack)
        result, took_s, faults = _ended(world)

    assert (result.stopped_reason, faults) == ("max_wallclock", [])
    assert took_s <= DEADLINE_S + SLACK_S


DEFIANT = """
import os, signal, subprocess, sys, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
child = os.fork()
while True:
    time.sleep(60)
"""


@linux
@pytest.mark.parametrize("number", [1, 3])
def test_a_run_ends_in_time_though_its_processes_ignore_every_signal_they_can(number: int) -> None:
    script = calling(*["exec_python"] * number, code=DEFIANT)
    world = World(LocalMCPInvoker(), script, settings={"max_wallclock_seconds": 1.5})
    before = _children()

    result, took_s, faults = _ended(world)

    told = [message["content"] for message in result.messages if message["role"] == "tool"]
    assert (result.stopped_reason, faults, _children() - before) == ("max_wallclock", [], set())
    assert [text.partition(":")[0] for text in told] == ["interrupted"] * number
    assert took_s <= 1.5 + SLACK_S


def _children() -> set[int]:
    files = Path("/proc/self/task").glob("*/children")
    return {int(pid) for file in files for pid in file.read_text("ascii").split()}


# The process


PROGRAM = """
import asyncio, time
from agent_fsm import AgentConfig, arun_agent, run_agent
from agent_fsm.testing import ScriptedModel, ScriptedTools

def functions():
    from agent_fsm import FunctionTools
    return FunctionTools(work)

def work() -> None: time.sleep({hang_s})
async def deaf():
    until = time.monotonic() + {hang_s}
    while time.monotonic() < until:
        try: await asyncio.sleep({hang_s})
        except asyncio.CancelledError: pass

messages = [{{"role": "user", "content": "Do it."}}]
config = AgentConfig(max_wallclock_seconds=0.3, closing_summary=False)
script = [[("work", {{}}), ("work", {{}})], "Done."]
model = ScriptedModel(script)
{run}
starved_s = int(open("/proc/self/schedstat").read().split()[1]) / 1e9
print(time.monotonic(), starved_s, result.stopped_reason, flush=True)
"""
RUNS = {
    "functions": "result = run_agent(messages, functions(), config, model_client=model)",
    "functions, asyncio.run": "result = asyncio.run(arun_agent(messages, functions(), config, model_client=model))",
    "a model in a thread": "result = run_agent(messages, config=config, model_client="
    "ScriptedModel([lambda request: asyncio.to_thread(work)]))",
    "deaf tools": "result = run_agent(messages, ScriptedTools({'work': deaf}), config, model_client=model)",
}


def _exit(run: str, hang_s: float) -> tuple[float, str]:
    """Return the seconds from the end of a run to that of its process, less those without a core, and its reason."""
    command = [sys.executable, "-c", PROGRAM.format(run=run, hang_s=hang_s)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        killer = threading.Timer(FOREVER_S / 3, process.kill)
        killer.start()
        try:
            at, starved, reason = process.stdout.readline().split()
            own_s = starved_s()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            ended = time.monotonic() - (starved_s() - own_s)
            starved_then = int(Path(f"/proc/{process.pid}/schedstat").read_text("ascii").split()[1]) / 1e9
        finally:
            killer.cancel()
            process.kill()
    return ended - starved_then - (float(at) - float(starved)), reason


@linux
@pytest.mark.parametrize(
    "name",
    [
        "functions",
        "a model in a thread",
        pytest.param("functions, asyncio.run", marks=pytest.mark.slow),
        pytest.param("deaf tools", marks=pytest.mark.slow),
    ],
)
def test_the_process_ends_at_once_though_something_hangs_in_it(name: str) -> None:
    plain_s, _ = _exit(RUNS[name], 0.0)

    hung_s, reason = _exit(RUNS[name], FOREVER_S)

    assert reason == "max_wallclock"
    assert hung_s <= plain_s + SLACK_S
