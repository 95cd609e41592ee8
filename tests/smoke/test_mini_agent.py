"""The seed's smoke: a tool is called, its result read, and an answer given."""

import asyncio

from agent_fsm.mini_agent import AgentConfig, EchoMCP, arun_mcp_mini_agent, run_mcp_mini_agent
from agent_fsm.testing import ScriptedModel, openai_faults

QUESTION = [{"role": "user", "content": "Echo hello, then finish."}]


def test_mini_agent_echo_tool_roundtrip() -> None:
    model = ScriptedModel([[("echo", {"text": "hello"})], "It said hello."])

    result = run_mcp_mini_agent(QUESTION, mcp=EchoMCP(), cfg=AgentConfig(max_iterations=3), model_client=model)

    assert (result.final_answer, result.stopped_reason, result.iterations) == ("It said hello.", "success", 2)
    assert [message["role"] for message in result.messages] == ["user", "assistant", "tool", "assistant"]
    assert result.messages[2]["content"] == "hello"
    assert not openai_faults(result.messages)


def test_the_async_twin_gives_the_same() -> None:
    model = ScriptedModel([[("echo", {"text": "hello"})], "It said hello."])

    result = asyncio.run(arun_mcp_mini_agent(QUESTION, mcp=EchoMCP(), cfg=AgentConfig(), model_client=model))

    assert result.final_answer == "It said hello."


def test_the_model_reads_the_result_before_it_answers() -> None:
    model = ScriptedModel([[("echo", {"text": "hello"})], lambda request: request.messages[-1]["content"].upper()])

    result = run_mcp_mini_agent(QUESTION, mcp=EchoMCP(), cfg=AgentConfig(), model_client=model)

    assert result.final_answer == "HELLO"
