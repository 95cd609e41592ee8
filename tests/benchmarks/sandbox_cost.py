"""What containing a call costs: `print(1)` by exec_python beside a bare subprocess, and fifty such calls at once.

Run it as `python tests/benchmarks/sandbox_cost.py`. The exit code is 1 if a call fails. It is a script and not a test
because the time that a shared machine takes proves nothing about a commit; the ratio of two times taken in turns does
say something of it.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from agent_fsm.tools.local import LocalMCPInvoker
from agent_fsm.tools.sandbox import probe

RUNS = 20
AT_ONCE = 50
CALL = {"function": {"name": "exec_python", "arguments": {"code": "print(1)"}}}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "strict": {},
    "strict, no packages": {"packages": False},
    "basic": {"sandbox": "basic"},
    "off": {"sandbox": "off"},
    "bwrap": {"engine": "bwrap"},
    "monty": {"python": "monty"},
}


@frozen
class Cost:
    """What one way of running the call costs."""

    bare_ms: float
    call_ms: float
    ratio: float


def bare_s(flags: Sequence[str]) -> float:
    """Return the seconds that a bare interpreter takes to print, with the same packages as the call has."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, *flags, "-c", "print(1)"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        timeout=60,
    )
    return time.perf_counter() - started


async def call_s(tools: LocalMCPInvoker) -> float:
    started = time.perf_counter()
    result = await tools.call_openai_tool(CALL)
    if not result.ok:
        raise RuntimeError(json.loads(result.text)["error"])
    return time.perf_counter() - started


async def measure(tools: LocalMCPInvoker) -> Cost:
    """Return the medians of `RUNS` pairs, so that what else the machine does falls on both; each is first in turn."""
    await call_s(tools)  # probes, and writes the bytecode that a later call finds
    flags = [] if tools.packages else ["-S"]
    pairs = []
    for number in range(RUNS):
        first = bare_s(flags) if number % 2 else 0.0
        call = await call_s(tools)
        pairs.append((first or bare_s(flags), call))
    bare_ms, call_ms = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
    return Cost(bare_ms, call_ms, statistics.median(call / bare for bare, call in pairs))


async def failures_at_once(tools: LocalMCPInvoker) -> int:
    results = await asyncio.gather(*(tools.call_openai_tool(CALL) for _ in range(AT_ONCE)))
    return sum(not result.ok for result in results)


async def main() -> int:
    holds = probe()
    print(f"level {holds.level} holds here; medians of {RUNS} pairs{f' ({holds.why})' if holds.why else ''}")
    print(f"{'':22}{'bare':>9}{'call':>12}{'ratio':>8}   {AT_ONCE} at once")
    failed = 0
    for name, settings in WAYS.items():
        tools = LocalMCPInvoker(**settings)
        try:
            cost = await measure(tools)
        except RuntimeError as error:
            print(f"{name:22}not measured: {error}")
            failed += name.startswith(("strict", "off"))
            continue
        started = time.perf_counter()
        failures = await failures_at_once(tools)
        failed += failures
        figures = f"{cost.bare_ms:6.1f} ms{cost.call_ms:9.1f} ms{cost.ratio:8.2f}"
        print(f"{name:22}{figures}   {failures} failures, {time.perf_counter() - started:.1f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
