"""A run that is cancelled at any point keeps a valid transcript and every result, goes on if asked, leaves nothing."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from agent_fsm import AgentRun, FunctionTools
from agent_fsm.testing import ScriptedModel
from tests.cancellation_sweep import KINDS, HungError, Variant, Way, attempt, print_table, sweep
from tests.cancelled_runs import TASK, after, children, deterministic, quick, real

DETERMINISTIC = {variant.name: variant for variant in deterministic(long=False)}
LONG = {variant.name: variant for variant in deterministic(long=True)}
KINDS_OF_TOOLS = ("functions in threads", "HTTP tools", "MCP tools", "processes")
in_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are counted in Linux's /proc")


# That it can fail


class Careless:
    """A loop as it is often written: results are appended when all are there, and nobody thinks of cancellation."""

    def __init__(self) -> None:
        self.returned: list[str] = []
        self.messages: list[dict[str, Any]] = [*TASK]
        self._logging: set[asyncio.Task[None]] = set()

    async def work(self) -> object:
        for turn in range(2):
            await asyncio.sleep(0)
            ids = [f"call_{turn}_{number}" for number in range(2)]
            function = {"name": "work", "arguments": "{}"}
            calls = [{"id": each, "type": "function", "function": function} for each in ids]
            self.messages.append({"role": "assistant", "content": None, "tool_calls": calls})
            self._logging.add(asyncio.ensure_future(asyncio.sleep(0.1)))
            texts = await asyncio.gather(*(self._tool(f"{each} is done", number) for number, each in enumerate(ids)))
            for each, text in zip(ids, texts, strict=True):
                self.messages.append({"role": "tool", "tool_call_id": each, "content": text})
        return None

    async def _tool(self, text: str, ticks: int) -> str:
        await after(1 + 2 * ticks)(text)
        self.returned.append(text)
        return text

    def cancel(self, task: "asyncio.Task[Any]", way: Way) -> None:
        task.cancel()

    def faults(self, task: "asyncio.Task[Any]") -> Iterator[str]:
        if task.cancelled():
            yield "there is no result, and so no reason"

    async def saved(self) -> list[dict[str, Any]]:
        return self.messages

    async def follow_up(self) -> Iterator[str]:
        await AgentRun([*self.messages, {"role": "user", "content": "Go on."}], model_client=ScriptedModel(["Well."]))
        return iter(())

    def released(self) -> Iterator[str]:
        return iter(())


def test_every_kind_of_fault_is_found_in_a_careless_loop(capsys: pytest.CaptureFixture[str]) -> None:
    variant = Variant("careless", Careless)

    found = sweep(variant)

    assert all(found.count(kind) > 2 for kind in KINDS)
    assert found.count("transcript") < found.cancelled < len(found.outcomes)
    assert print_table([found]) == len(found.faults())
    assert capsys.readouterr().out.count("careless at (") == 3


class Stuck(Careless):
    async def work(self) -> object:
        return await asyncio.Event().wait()


class Busy(Careless):
    async def work(self) -> object:
        while True:  # noqa: ASYNC110 - it is to wait for nothing
            await asyncio.sleep(0)


@pytest.mark.parametrize("subject", [Stuck, Busy])
def test_a_run_that_never_ends_is_found_and_not_waited_for(subject: type[Careless]) -> None:
    with pytest.raises(HungError):
        attempt(Variant("endless", subject), (10**9, 0))


def test_the_same_sweep_twice_is_the_same() -> None:
    variant = DETERMINISTIC["2 side by side, task"]

    assert sweep(variant) == sweep(variant)


def test_every_callback_is_a_point_at_which_the_run_was_cancelled() -> None:
    found = sweep(DETERMINISTIC["2 side by side, task"])

    assert [outcome.point[0] for outcome in found.outcomes] == list(range(len(found.outcomes)))
    assert found.cancelled == len(found.outcomes) - 1 > 20


# Our runs


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_cancel_at_any_point_harms_nothing(name: str) -> None:
    found = sweep(DETERMINISTIC[name])

    assert found.faults() == []
    assert found.cancelled > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_a_cancel_at_any_point_harms_nothing_long(name: str) -> None:
    assert sweep(LONG[name]).faults() == []


def test_a_cancel_at_any_tick_harms_nothing() -> None:
    variant = evolve(DETERMINISTIC["2 side by side, task"], unit="tick")

    assert sweep(variant).faults() == []


@in_proc
@pytest.mark.parametrize("kind", KINDS_OF_TOOLS)
def test_a_cancel_harms_nothing_whatever_the_tools_are(kind: str) -> None:
    with real(long=False) as variants:
        swept = [sweep(variant) for variant in variants if variant.name.startswith(kind)]

    assert [fault for each in swept for fault in each.faults()] == []
    assert all(each.cancelled for each in swept)


@in_proc
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS_OF_TOOLS)
def test_a_cancel_harms_nothing_whatever_the_tools_are_long(kind: str) -> None:
    before = children()
    with real(long=True) as variants:
        swept = [sweep(variant) for variant in variants if variant.name.startswith(kind)]

    assert [fault for each in swept for fault in each.faults()] == []
    assert children() == before


# Faults that it found


@in_proc
def test_a_cancel_while_mcp_is_being_imported_leaves_no_task() -> None:
    code = (
        "from tests.cancellation_sweep import attempt\n"
        "from tests.cancelled_runs import real\n"
        "with real(long=True) as variants:\n"
        "    variant = next(each for each in variants if each.name == 'MCP tools, run')\n"
        "    print([fault for point in range(3, 6) for fault in attempt(variant, (point, 0)).faults])\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )

    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("siblings", [0, 1])
def test_what_a_function_gave_before_the_cancel_is_told_though_the_loop_had_not_heard_of_it(siblings: int) -> None:
    let_go, done = threading.Event(), threading.Event()

    def work(number: int) -> str:
        let_go.wait(10)
        done.set()
        return f"work {number} is done"

    async def main() -> AgentRun:
        calls = [("work", {"number": number}) for number in range(1 + siblings)]
        run = AgentRun(TASK, FunctionTools(work), quick(), model_client=ScriptedModel([calls, "Done."]))
        waiting = asyncio.ensure_future(_awaited(run))
        await asyncio.sleep(0.1)
        let_go.set()
        done.wait(10)  # the loop does nothing else meanwhile
        time.sleep(0.05)  # noqa: ASYNC251 - nor while the threads end
        run.cancel()
        await waiting
        return run

    result = asyncio.run(main()).result

    told = [message["content"] for message in result.messages if message["role"] == "tool"]
    assert (result.stopped_reason, told) == ("cancelled", [f"work {number} is done" for number in range(1 + siblings)])


async def _awaited(run: AgentRun) -> None:
    await run
