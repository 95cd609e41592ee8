"""The seed's smoke: code fails, the model is shown why and mends it."""

import json
from typing import Any

from agent_fsm import ModelRequest, State
from agent_fsm.mini_agent import AgentConfig, LocalMCPInvoker, run_mcp_mini_agent
from agent_fsm.testing import ScriptedModel


def test_mini_agent_repair_loop_exec_python() -> None:
    seen: list[list[dict[str, Any]]] = []

    def mend(request: ModelRequest) -> Any:
        seen.append(request.messages)
        return [("exec_python", {"code": "import math; print(math.floor(2.5))"})]

    model = ScriptedModel([[("exec_python", {"code": "print(math.floor(2.5))"})], mend, "It is 2."])

    result = run_mcp_mini_agent(
        [{"role": "user", "content": "Round 2.5 down with Python."}],
        mcp=LocalMCPInvoker(),
        cfg=AgentConfig(enable_repair=True),
        model_client=model,
    )

    assert (result.final_answer, result.stopped_reason) == ("It is 2.", "success")
    failure, directive = seen[0][-2:]
    assert "NameError" in json.loads(failure["content"])["stderr"]
    assert directive["role"] == "user"
    assert "rc=1" in directive["content"]
    assert "NameError: name 'math' is not defined" in directive["content"]
    assert State.REPAIR in result.path


def test_without_enable_repair_the_model_goes_on_without_a_directive() -> None:
    model = ScriptedModel([[("exec_python", {"code": "1/0"})], "It can't be divided."])

    result = run_mcp_mini_agent(
        [{"role": "user", "content": "Divide."}],
        mcp=LocalMCPInvoker(),
        cfg=AgentConfig(enable_repair=False),
        model_client=model,
    )

    assert State.REPAIR not in result.path
    assert [message["role"] for message in result.messages] == ["user", "assistant", "tool", "assistant"]
