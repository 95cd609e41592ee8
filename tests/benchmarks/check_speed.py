"""What a check costs, beside taking as many bare steps: `python tests/benchmarks/check_speed.py`.

CPU seconds of this process, the best of three. The bare loop takes as many steps, and nothing else.
"""

import functools
import time
from collections.abc import Callable

from agent_fsm.check import Report, check, verify
from agent_fsm.check.explore import TASK
from agent_fsm.config import AgentConfig
from agent_fsm.machine import start, step
from agent_fsm.table import TABLE

TEN_TIMES = AgentConfig(
    max_iterations=80,
    max_wallclock_seconds=1_200,
    max_tools_per_iter=80,
    stagnation_window=30,
    max_research_hops=20,
    max_failures_before_research=20,
    max_consecutive_failures=50,
    max_model_retries=20,
    max_tokens_total=5_000_000,
    max_reply_tokens=40_960,
)
CONFIGS = {
    "default limits": AgentConfig(),
    "summaries every 2": AgentConfig(summarize_every=2),
    "ten times the limits": TEN_TIMES,
    "a million iterations": AgentConfig(max_iterations=10**6),
}


def cpu_seconds(function: Callable[[], object]) -> float:
    """Return what a call of *function* takes, the best of three."""
    taken = []
    for _ in range(3):
        began = time.process_time()
        function()
        taken.append(time.process_time() - began)
    return min(taken)


def bare_steps(steps: int) -> float:
    """Return what *steps* steps take by themselves, in CPU seconds."""
    events = check().bound("steps").witness
    begin = start(TASK, AgentConfig())
    rounds = max(1, steps // len(events))
    return (
        cpu_seconds(lambda: [functools.reduce(step, events, begin) for _ in range(rounds)])
        * steps
        / (rounds * len(events))
    )


def main() -> None:
    """Print the table."""
    print("                       boxes     steps   check    bare steps   ratio   boxes/s   verify   not exact")
    for name, config in CONFIGS.items():
        reports: list[Report] = []
        taken = cpu_seconds(lambda: reports.append(check(TABLE, config)))  # noqa: B023 # called at once
        report = reports[0]
        certificate = report.certificate
        assert certificate is not None
        verified = cpu_seconds(lambda: verify(certificate, TABLE, config))  # noqa: B023 # called at once
        bare = bare_steps(report.steps)
        inexact = ", ".join(bound.name for bound in report.bounds if not bound.exact) or "-"
        print(
            f"{name:<22} {report.boxes:>5,} {report.steps:>9,} {taken:>5.2f} s {bare:>10.2f} s {taken / bare:>7.1f}"
            f" {report.boxes / taken:>9,.0f} {verified:>6.2f} s   {inexact}"
        )


if __name__ == "__main__":
    main()
