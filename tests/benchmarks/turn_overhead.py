"""CPU time of a turn beside a bare while-loop that does the same work, and where the difference goes.

    python tests/benchmarks/turn_overhead.py

A turn is one reply of a fake model and one async tool call; each gives control to the event loop once, as real ones do.
The bare loop parses the reply and the arguments, calls the tool and appends both messages: no deadline, no limit, no
check, no record. The two run alternately in one process; what is printed is the median of the pairs.
"""

import asyncio
import functools
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Awaitable, Callable
from typing import Any

from agent_fsm import AgentConfig, AgentRun
from agent_fsm.machine import request, start, step
from agent_fsm.protocol import PLAN, AskModel, ModelReplied, ToolsFinished
from agent_fsm.reading import finished, read_outcome, read_reply
from agent_fsm.redaction import redactor

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look something up.",
            "parameters": {"type": "object", "properties": {"key": {"type": "integer"}}, "required": ["key"]},
        },
    }
]
TASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Look up all keys, then answer."}]


class Model:
    """Calls the tool `turns` times, then answers."""

    def __init__(self, turns: int) -> None:
        self.turns, self.asked = turns, 0

    async def complete(self, request: object) -> dict[str, Any]:
        await asyncio.sleep(0)
        self.asked += 1
        message: dict[str, Any] = {"role": "assistant", "content": "All keys are there."}
        if self.asked <= self.turns:
            function = {"name": "look", "arguments": f'{{"key": {self.asked}}}'}
            call = {"id": f"call_{self.asked}", "type": "function", "function": function}
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage, "model": "fake"}


class Tools:
    async def list_openai_tools(self) -> list[dict[str, Any]]:
        return TOOLS

    async def call_openai_tool(self, call: dict[str, Any]) -> str:
        await asyncio.sleep(0)
        return f"value {json.loads(call['function']['arguments'])['key']}"


async def bare(turns: int) -> None:
    model, tools = Model(turns), Tools()
    messages: list[dict[str, Any]] = list(TASK)
    offered = await tools.list_openai_tools()
    while True:
        reply = await model.complete({"messages": messages, "tools": offered})
        message = reply["choices"][0]["message"]
        messages.append(message)
        if not message.get("tool_calls"):
            return
        for call in message["tool_calls"]:
            json.loads(call["function"]["arguments"])
            result = await tools.call_openai_tool(call)
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})


def config(turns: int) -> AgentConfig:
    return AgentConfig(max_iterations=turns + 1, max_tokens_total=10**9)


async def ours(turns: int, settings: AgentConfig) -> None:
    result = await AgentRun(TASK, Tools(), settings, model_client=Model(turns))
    assert result.stopped_reason == "success", result
    assert result.iterations == turns + 1


def cpu(work: Callable[[], object]) -> float:
    """Return the CPU seconds of *work*, garbage collected beforehand."""
    gc.collect()
    began = time.process_time()
    work()
    return time.process_time() - began


def paired(turns: int, pairs: int) -> tuple[float, float]:
    """Return CPU microseconds a turn, bare and ours: medians over alternating measurements."""
    runs, settings = max(1, 300 // turns), config(turns)

    async def several(loop: Callable[[], Awaitable[None]]) -> None:
        for _ in range(runs):
            await loop()

    def timed(loop: Callable[[], Awaitable[None]]) -> float:
        return cpu(lambda: asyncio.run(several(loop))) / runs / turns * 1e6

    measured = [(timed(lambda: bare(turns)), timed(lambda: ours(turns, settings))) for _ in range(pairs)]
    return statistics.median(base for base, _ in measured), statistics.median(mine for _, mine in measured)


def print_turns() -> tuple[bool, float]:
    """Print the table; return whether it keeps the bounds, and the microseconds over bare at 100 turns."""
    rows = {turns: paired(turns, 25 if turns < 1_000 else 9) for turns in (10, 100, 1_000)}
    print(f"{'CPU us a turn':16}{'bare':>8}{'ours':>8}{'ratio':>8}   bound 5x, aim 3x")
    for turns, (base, mine) in rows.items():
        print(f"{turns:>6,} turns    {base:8.1f}{mine:8.1f}{mine / base:7.2f}x")
    growth = (rows[1_000][1] / rows[10][1]) / (rows[1_000][0] / rows[10][0])
    print(f"growth from 10 to 1,000 turns: {growth:.2f} times bare's own   bound 1.3")
    good = growth <= 1.3 and all(mine <= 5 * base for base, mine in rows.values())
    return good, rows[100][1] - rows[100][0]


# Many runs at once, each side in a process of its own, as memory that was freed stays with a process


async def crowd(side: str, runs: int) -> None:
    settings = config(10)
    await asyncio.gather(*(bare(10) if side == "bare" else ours(10, settings) for _ in range(runs)))


def measure_crowd(side: str) -> None:
    asyncio.run(crowd(side, 10))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = cpu(lambda: asyncio.run(crowd(side, 1_000)))
    print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1_024)


def print_crowd() -> bool:
    def measured(side: str) -> list[float]:
        command = [sys.executable, __file__, side]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
        return [float(figure) for figure in done.stdout.split()]

    pairs = [(measured("bare"), measured("ours")) for _ in range(9)]
    ratio = statistics.median(mine[0] / base[0] for base, mine in pairs)
    more = statistics.median(mine[1] - base[1] for base, mine in pairs)
    print(f"1,000 runs of 10 turns at once: {ratio:.2f} times bare's CPU (bound 6), {more:.1f} MB over it (bound 30)")
    return ratio <= 6 and more <= 30


# What each promise costs: the same functions as in a run, called on values of a run


def best(work: Callable[[], object]) -> float:
    """Return microseconds: the least of several repeats, as what disturbs a measurement only adds to it."""
    return min(timeit.repeat(work, number=2_000, repeat=9)) / 2_000 * 1e6


def shares() -> dict[str, float]:
    """Return CPU microseconds a turn, by promise."""
    settings = config(20)
    run = AgentRun(TASK, Tools(), settings, model_client=Model(20))
    asyncio.run(run_to_end(run))
    events = run.result.events
    planning = functools.reduce(step, events[:-3], start(TASK, settings))
    calling = step(planning, events[-3])
    reply = asyncio.run(Model(20).complete(None))
    asked, ended = events[-3], events[-2]
    assert isinstance(asked, ModelReplied)
    assert isinstance(ended, ToolsFinished)
    call, results = asked.calls[0], ended.results
    redact = redactor(("sk-a-secret-of-the-environment", "another-one-of-forty-characters-or-so-..."))
    return {
        "ends: rows taken, ledger kept, worst cases reckoned (2 steps)": best(lambda: step(planning, events[-3]))
        + best(lambda: step(calling, events[-2])),
        "transcript valid: reply read and checked": best(
            lambda: read_reply(reply, now=1.0, offered=("look",), max_calls=8, turn=1)
        ),
        "transcript valid: result read, request cut to whole turns": best(
            lambda: read_outcome(call, "value 1", seconds=0.0, chars=8_000)
        )
        + best(lambda: request(planning, AskModel(PLAN), settings, timeout_seconds=1.0)),
        "no secrets: result looked through, for two of the environment": best(lambda: redact("value 1")),
        "ends: repetition seen": best(lambda: finished((call,), results, {}, now=1.0)),
    }


async def run_to_end(run: AgentRun) -> None:
    await run


def print_shares(over_bare: float) -> None:
    parts = shares()
    parts["nothing left running: deadlines, cancellation, slots (the rest)"] = over_bare - sum(parts.values())
    print(f"\nwhere the {over_bare:.1f} us over bare go, at 100 turns")
    for promise, cost in parts.items():
        print(f"{cost:8.1f}   {promise}")


def main() -> int:
    if len(sys.argv) == 2:
        measure_crowd(sys.argv[1])
        return 0
    good, over_bare = print_turns()
    good = print_crowd() and good
    print_shares(over_bare)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
