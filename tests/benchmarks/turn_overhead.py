"""CPU time of a turn beside a bare while-loop that does the same work, and where the difference goes.

    python tests/benchmarks/turn_overhead.py

A turn is one reply of a fake model and one async tool call; each gives control to the event loop once, as a real one would.
The bare loop parses the reply and the arguments, calls the tool and appends both messages: no deadline, no limit, no
check, no record. The two run alternately in one process; what is printed is the median of the pairs.
"""

import asyncio
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from agent_fsm import AgentConfig, AgentRun

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


async def ours(turns: int) -> None:
    result = await AgentRun(TASK, Tools(), config(turns), model_client=Model(turns))
    assert result.stopped_reason == "success", result
    assert result.iterations == turns + 1


def cpu(run: Callable[[], Any]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def paired(turns: int, runs: int) -> tuple[float, float]:
    """Return CPU microseconds a turn, bare and ours: medians over alternating runs."""

    def timed(loop_of: Callable[[int], Any]) -> float:
        async def several() -> None:
            for _ in range(max(1, 300 // turns)):
                await loop_of(turns)

        return cpu(lambda: asyncio.run(several())) / max(1, 300 // turns) / turns * 1e6

    pairs = [(timed(bare), timed(ours)) for _ in range(runs)]
    return statistics.median(b for b, _ in pairs), statistics.median(o for _, o in pairs)


async def crowd(loop_of: Callable[[int], Any], runs: int, turns: int) -> None:
    await asyncio.gather(*(loop_of(turns) for _ in range(runs)))


def main() -> int:
    timed(ours, bare) if False else None
    rows = {turns: paired(turns, 15 if turns < 1000 else 7) for turns in (10, 100, 1000)}
    print("CPU us a turn      bare     ours    ratio")
    for turns, (base, mine) in rows.items():
        print(f"{turns:>6} turns   {base:9.1f}{mine:9.1f}{mine / base:8.2f}x")
    growth = (rows[1000][1] / rows[10][1]) / (rows[1000][0] / rows[10][0])
    print(f"growth from 10 to 1,000 turns: {growth:.2f} times bare's own (bound 1.3)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
