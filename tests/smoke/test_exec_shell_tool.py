"""The seed's smoke: only programs on the allowlist are run, by their exact name, and never by a shell."""

import json
from typing import Any

import pytest

from agent_fsm.mini_agent import AgentConfig, LocalMCPInvoker, run_mcp_mini_agent
from agent_fsm.testing import ScriptedModel


def shell(command: str) -> dict[str, Any]:
    model = ScriptedModel([[("exec_shell", {"cmd": command})], "Done."])
    result = run_mcp_mini_agent(
        [{"role": "user", "content": "Run it."}],
        mcp=LocalMCPInvoker(shell_allow_prefixes=("echo", "python", "pip")),
        cfg=AgentConfig(enable_repair=False),
        model_client=model,
    )
    fields: dict[str, Any] = json.loads(result.messages[2]["content"])
    return fields


def test_exec_shell_tool_allowlist() -> None:
    allowed = shell("echo hello")

    assert (allowed["ok"], allowed["rc"], allowed["stdout"]) == (True, 0, "hello\n")


@pytest.mark.parametrize(
    "command", ["ls", "echo_evil hi", "./echo hi", "/tmp/echo hi", "", "echo hi; ls", "echo $(ls) | cat"]
)
def test_what_is_not_on_the_list_is_refused_and_says_what_is(command: str) -> None:
    refused = shell(command)

    assert refused["ok"] is False
    assert refused["rc"] is None
    assert refused["error"]
