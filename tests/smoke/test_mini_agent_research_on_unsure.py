"""The seed's smoke: a hedging model is steered to the research tools."""

from agent_fsm import State
from agent_fsm.mini_agent import AgentConfig, EchoMCP, run_mcp_mini_agent
from agent_fsm.testing import ScriptedModel, ScriptedTools

QUESTION = [{"role": "user", "content": "How high is the tower?"}]


def test_mini_agent_research_on_unsure() -> None:
    tools = ScriptedTools({"web_search": lambda query: "The tower is 330 m high."}, research=["web_search"])
    model = ScriptedModel(["I'm not sure.", [("web_search", {"query": "tower"})], "It is 330 m high."])

    result = run_mcp_mini_agent(QUESTION, mcp=tools, cfg=AgentConfig(research_on_unsure=True), model_client=model)

    assert (result.final_answer, result.stopped_reason) == ("It is 330 m high.", "success")
    assert model.requests[1].purpose is State.RESEARCH
    assert "web_search" in model.requests[1].messages[-1]["content"]
    assert tools.calls == [("web_search", {"query": "tower"})]


def test_research_hops_are_counted_and_capped() -> None:
    tools = ScriptedTools({"web_search": lambda query: "nothing found"}, research=["web_search"])

    result = run_mcp_mini_agent(
        QUESTION, mcp=tools, cfg=AgentConfig(max_research_hops=2), model_client=ScriptedModel(["I'm not sure."])
    )

    assert result.path.count(State.RESEARCH) == 2
    assert (result.final_answer, result.stopped_reason) == ("I'm not sure.", "success")


def test_without_research_tools_a_hedged_answer_is_the_answer() -> None:
    result = run_mcp_mini_agent(
        QUESTION, mcp=EchoMCP(), cfg=AgentConfig(), model_client=ScriptedModel(["I'm not sure, perhaps 300 m."])
    )

    assert (result.final_answer, result.iterations) == ("I'm not sure, perhaps 300 m.", 1)
    assert State.RESEARCH not in result.path
