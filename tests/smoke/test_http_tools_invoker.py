"""The seed's smoke: tools behind a gateway, over its contract to the letter. It patches no HTTP client but has a real
gateway on loopback."""

from agent_fsm import AgentConfig, run_agent
from agent_fsm.testing import ScriptedModel
from agent_fsm.tools.http import HttpToolsInvoker
from tests.tools_gateway import ToolsGateway

SEARCH_DOCS = {
    "type": "function",
    "function": {
        "name": "search_docs",
        "description": "Search docs",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string"}},
            "required": ["query"],
            "additionalProperties": False,
        },
    },
}


def test_http_tools_invoker_monkeypatch() -> None:
    model = ScriptedModel([[("search_docs", {"query": "auth tokens"})], "There are 3."])
    found = {"text": "Found 3 relevant docs...", "data": {"hits": [1, 2, 3]}}

    with ToolsGateway([SEARCH_DOCS], [found]) as gateway:
        tools = HttpToolsInvoker(gateway.url, headers={"Authorization": "Bearer abcdef123"})
        result = run_agent(
            [{"role": "user", "content": "How do tokens work?"}], tools, AgentConfig(), model_client=model
        )

    assert result.final_answer == "There are 3."
    assert model.requests[0].tools == (SEARCH_DOCS,)
    assert [request.headers["authorization"] for request in gateway.requests] == ["Bearer abcdef123"] * 2
    assert gateway.invoked[0].body == {"name": "search_docs", "arguments": {"query": "auth tokens"}}
    assert result.messages[2]["content"] == 'Found 3 relevant docs...\n{"hits":[1,2,3]}'
