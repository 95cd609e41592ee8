"""What hostile calls come to: nothing at level strict, and nothing is left; `tests.attacks` makes them."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agent_fsm import AgentConfig, run_agent
from agent_fsm.testing import ScriptedModel
from agent_fsm.tools.local import LocalMCPInvoker
from agent_fsm.tools.sandbox import Probe, probe
from tests.attack_snippets import ATTACKS
from tests.attacks import NOBODY, ROOT, SLACK_S, Outcome, Setting, attacks_at, distribution, run_attacks
from tests.honest_scripts import SCRIPTS

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or probe().level != "strict", reason="level strict does not hold here"
)

AS_ROOT = hasattr(os, "getuid") and os.getuid() == 0
NAMES = [attack.name for attack in attacks_at("strict", root=AS_ROOT)]
EVIDENT = (
    "leaves a double-forked daemon",
    "kills a process outside",
    "reads its parents' environments",
    "reads /etc/passwd",
    "writes a file outside",
    "connects by TCP",
    "sends by UDP",
    "sends to a socket in the file system",
    "fills its folder",
    "is a thread bomb",
    "makes a user namespace by unshare",
    "leaves files for the next call",
)
"""Attacks that get through where nothing contains them, whoever makes them."""


@pytest.fixture(scope="module")
def strict() -> Outcome:
    return run_attacks(Setting("strict", packages=False), attacks_at("strict", root=AS_ROOT))


def picked(names: Sequence[str]) -> list[Any]:
    return [attack for attack in ATTACKS if attack.name in names]


def late_twice(outcome: Outcome, setting: Setting) -> dict[str, float]:
    """Return the calls whose results came too late, also when made again by themselves: others use the machine too."""
    late = [run.name for run in outcome.runs if run.over_s > SLACK_S]
    again = run_attacks(setting, picked(late), workers=1).runs if late else ()
    return {run.name: run.over_s for run in again if run.over_s > SLACK_S}


# Each attack once


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_call_comes_to_nothing(strict: Outcome, name: str) -> None:
    [run] = [run for run in strict.runs if run.name == name]

    assert (run.level, run.tried, run.breaches, run.survivors) == ("strict", True, (), 0), run.said


def test_every_result_comes_soon_after_the_deadline(strict: Outcome) -> None:
    assert late_twice(strict, Setting("strict", packages=False)) == {}, distribution(strict.runs)


def test_hostile_calls_leave_no_process_and_no_file(strict: Outcome) -> None:
    assert (strict.processes, strict.files) == (0, ())


def test_the_same_attacks_get_through_where_nothing_contains_them() -> None:
    outcome = run_attacks(Setting("off", packages=False), picked(EVIDENT), workers=2)

    assert {run.name for run in outcome.runs if run.breaches} == set(EVIDENT)
    assert outcome.processes == 0  # what they leave, this harness ends


@pytest.mark.skipif(not AS_ROOT or not Path("/usr/bin/python3").exists(), reason="is an ordinary user already")
def test_an_ordinary_users_hostile_calls_come_to_nothing_too() -> None:
    names = (*EVIDENT, "has capabilities", "mounts", "kills whatever it can")

    outcome = run_attacks(Setting("strict", packages=False, user=NOBODY), picked(names), workers=2)

    assert {(run.level, run.tried, run.breaches) for run in outcome.runs} == {("strict", True, ())}
    assert (outcome.processes, outcome.files) == (0, ())


def called(invoker: LocalMCPInvoker, code: str = "print(1 + 1)") -> dict[str, Any]:
    """Return what the result of one call says."""
    call = {"function": {"name": "exec_python", "arguments": json.dumps({"code": code})}}
    said: dict[str, Any] = json.loads(asyncio.run(invoker.call_openai_tool(call)).text)
    return said


# Runs of the machine


async def list_tools(invoker: LocalMCPInvoker) -> None:
    await invoker.list_openai_tools()


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import ctypes; ctypes.PyDLL(None).sleep(20)",
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(20)",
        "import os, time\nif not os.fork():\n    os.setsid()\n    os.fork() or time.sleep(20)\ntime.sleep(20)",
        "import os\nwhile True: os.write(1, b'x' * 65536)",
        "import os, time\nfor _ in range(300):\n    os.fork() or time.sleep(20)",
    ],
)
def test_a_run_ends_soon_after_its_deadline_whatever_its_tools_do(code: str) -> None:
    deadline_s = 1.0
    invoker = LocalMCPInvoker(sandbox="strict")
    asyncio.run(list_tools(invoker))  # which level holds is found out once in a process
    never = 10_000
    config = AgentConfig(
        max_wallclock_seconds=deadline_s,
        max_iterations=never,
        stagnation_window=never,
        max_consecutive_failures=never,
        max_failures_before_research=never,
    )
    model = ScriptedModel([[("exec_python", {"code": code})] * 2])
    started = time.monotonic()

    result = run_agent([{"role": "user", "content": "Go on."}], invoker, config, model_client=model)

    assert time.monotonic() - started < deadline_s + SLACK_S
    assert result.stopped_reason == "max_wallclock"


# Many at once


def test_fifty_contained_calls_at_once_all_work() -> None:
    async def main() -> list[dict[str, Any]]:
        invoker = LocalMCPInvoker(sandbox="strict")
        calls = [
            {"function": {"name": "exec_python", "arguments": json.dumps({"code": f"print({number} ** 2)"})}}
            for number in range(50)
        ]
        results = await asyncio.gather(*(invoker.call_openai_tool(call) for call in calls))
        return [json.loads(result.text) for result in results]

    said = asyncio.run(main())

    assert [(each["sandbox"], each["rc"], each["stdout"]) for each in said] == [
        ("strict", 0, f"{number**2}\n") for number in range(50)
    ]


# Where a layer is missing


@pytest.mark.parametrize(
    ("without", "reached"),
    [
        ({"namespaces"}, {"basic", "off"}),  # root's Python can't be run by another at basic, if it is under its home
        ({"seccomp"}, {"off"}),
        ({"namespaces", "landlock"}, {"off"}),
        ({"namespaces", "landlock", "seccomp"}, {"off"}),
    ],
)
def test_where_a_layer_is_missing_the_level_is_said_and_a_higher_one_is_refused(
    without: set[str], reached: set[str]
) -> None:
    def probed() -> Probe:
        return probe(without=frozenset(without))

    said = called(LocalMCPInvoker(probe=probed))
    refused = called(LocalMCPInvoker(probe=probed, require_sandbox="strict"))

    assert said["sandbox"] in reached
    assert (said["sandbox"], said["stdout"]) == (probed().level, "2\n")
    assert probed().why
    assert (refused["ok"], refused["rc"]) == (False, None)
    assert probed().why in refused["error"]


def test_where_a_layer_is_missing_a_required_level_fails_before_the_first_call() -> None:
    invoker = LocalMCPInvoker(probe=lambda: probe(without=frozenset({"seccomp"})), require_sandbox="basic")

    with pytest.raises(RuntimeError, match="seccomp"):
        asyncio.run(list_tools(invoker))


REPORT = """
import json
from agent_fsm.tools.local import LocalMCPInvoker
from agent_fsm.tools.sandbox import probe
from tests.test_attacks import called

said, refused = called(LocalMCPInvoker()), called(LocalMCPInvoker(require_sandbox="strict"))
print(json.dumps([probe().level, probe().why, said, refused]))
"""
WITHOUT_NAMESPACES = (
    'for kind in user mnt pid net; do echo 0 > /proc/sys/user/max_${kind}_namespaces || exit 9; done; exec "$0" -c "$1"'
)


@pytest.mark.skipif(shutil.which("unshare") is None, reason="there is no unshare")
def test_where_the_kernel_gives_no_namespaces_that_is_said_and_strict_is_refused() -> None:
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", WITHOUT_NAMESPACES, sys.executable, REPORT]
    shown = subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False
    )
    if shown.returncode == 9 or "unshare" in shown.stderr:
        pytest.skip("namespaces can't be taken away here")

    level, why, said, refused = json.loads(shown.stdout)

    assert level in ("basic", "off"), shown.stderr
    assert why
    assert said["sandbox"] == level
    assert (refused["ok"], refused["rc"]) == (False, None)
    assert "'strict' is required" in refused["error"]


# The long forms


@pytest.mark.slow
@pytest.mark.parametrize("user", [None, *([NOBODY] if AS_ROOT else [])])
def test_five_hundred_hostile_calls_come_to_nothing_and_honest_ones_work_beside_them(user: int | None) -> None:
    attacks = attacks_at("strict", root=AS_ROOT and user is None)
    rounds = (attacks * 4)[:500]

    with ThreadPoolExecutor(1) as beside:
        hostile = beside.submit(run_attacks, Setting("strict", user=user), rounds)
        honest = {name: called(LocalMCPInvoker(sandbox="strict"), code) for name, code in SCRIPTS.items()}
        assert not hostile.done()
        outcome = hostile.result()

    print(f"\nas uid {os.getuid() if user is None else user}: {distribution(outcome.runs)}")
    assert len(outcome.runs) == 500
    assert {run.name: (run.breaches, run.said) for run in outcome.runs if run.breaches or not run.tried} == {}
    assert late_twice(outcome, Setting("strict", user=user)) == {}
    assert (outcome.processes, outcome.files) == (0, ())
    assert {name: said for name, said in honest.items() if not said["ok"]} == {}
