"""What importing agent_fsm costs in CPU time, beside what it can't do without.

Run it as `python tests/benchmarks/import_cost.py`. The exit code is 1 if the difference is over the bound. It is a
script and not a test because the time that a shared machine takes proves nothing about a commit.
"""

import resource
import statistics
import subprocess
import sys

BASELINE = "import asyncio, attrs, transitions"
OURS = f"{BASELINE}\nfrom agent_fsm import AgentConfig, run_agent"
BOUND_MS = 60.0
RUNS = 15


def cpu_ms(code: str) -> float:
    """Return the user and system time, in milliseconds, of a fresh interpreter that runs *code*."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, check=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1000 * (after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)


def main() -> int:
    for code in (BASELINE, OURS):  # writes the bytecode, which a later run finds
        cpu_ms(code)
    # Taken in turns, so that what else the machine does falls on both
    pairs = [(cpu_ms(BASELINE), cpu_ms(OURS)) for _ in range(RUNS)]
    baseline, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"asyncio, attrs, transitions   {baseline:6.0f} ms")
    print(f"agent_fsm and those           {ours:6.0f} ms")
    print(f"agent_fsm alone               {ours - baseline:6.0f} ms   bound {BOUND_MS:.0f} ms, medians of {RUNS}")
    return int(ours - baseline > BOUND_MS)


if __name__ == "__main__":
    sys.exit(main())
