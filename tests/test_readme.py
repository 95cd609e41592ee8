"""The README is true: its examples run, its settings are the ones there are, its commands are CI's."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from attrs import fields

from agent_fsm import AgentConfig, StopReason
from agent_fsm.protocol import State
from tests.test_agent_proxy import refused_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def faultless(*command: str) -> str:
    """Run *command* in the root, and return what it printed, having seen that nothing went wrong."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs_as_it_stands(example: str) -> None:
    faultless(sys.executable, "-c", example)


def test_the_command_that_uses_two_mcp_servers_does() -> None:
    command = re.search(r"^.*--mcp-config.*$", README, re.MULTILINE)
    assert command is not None
    words = shlex.split(command[0].rpartition("&& ")[2])
    if not (ROOT / ".venv/bin/python").exists():
        pytest.skip("its servers are started by .venv/bin/python")

    printed = faultless(sys.executable, "-m", "agent_fsm.cli", *words[1:])

    assert words[0] == ".venv/bin/agent-fsm"
    assert re.findall(r"CallTools  (\w+) ok", printed) == ["time__convert_time", "git__git_branch"]


def test_every_setting_stands_there_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", README, re.MULTILINE))
    config = AgentConfig()

    defaults = {each.name: repr(getattr(config, each.name)).replace("'", '"') for each in fields(AgentConfig)}

    assert rows == defaults


def test_every_state_and_reason_is_named() -> None:
    assert [state for state in State if f"| {state} |" not in README] == []
    assert [reason for reason in StopReason if f"`{reason}`" not in README] == []


def test_its_pictures_and_files_exist() -> None:
    named = re.findall(r"\]\((?!http)([^)]+)\)", README) + re.findall(
        r"`((?:tests|agent_fsm|diagrams)/[\w./]+)`", README
    )

    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_refused_requests_are_refused_just_so() -> None:
    rows = re.findall(r"^\| .* \| \d{3} \| .*$", README, re.MULTILINE)
    printed = refused_table().splitlines()

    assert len(rows) > 20
    assert [row for row in rows if row not in printed] == []
