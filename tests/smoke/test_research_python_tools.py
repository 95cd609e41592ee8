"""The seed's smoke: Perplexity and Context7 answer, and their citations arrive. Both are real servers on loopback."""

from typing import Any

from agent_fsm import run_agent
from agent_fsm.testing import ScriptedModel
from agent_fsm.tools.research import ResearchPythonInvoker
from tests.tools_gateway import Scripted


def test_research_python_tools_basic() -> None:
    answers: dict[str, list[Any]] = {
        "POST /chat/completions": [
            {"choices": [{"message": {"content": "Paris.[1]"}}], "citations": ["https://a.example/"]}
        ],
        "GET /api/v2/libs/search": [{"results": [{"id": "/encode/httpx", "title": "HTTPX"}]}],
        "GET /api/v2/context": [
            {"infoSnippets": [{"content": "Timeouts are 5 s.", "pageId": "https://b.example/"}], "codeSnippets": []}
        ],
    }
    calls = [
        ("research_perplexity", {"query": "What is the capital of France?"}),
        ("research_context7_docs", {"library": "httpx", "topic": "timeouts"}),
    ]

    with Scripted(answers) as services:
        tools = ResearchPythonInvoker(
            pplx_api_key="pplx-test", pplx_api_base=services.url, c7_api_base=services.url, c7_api_key="", environ={}
        )
        result = run_agent(
            [{"role": "user", "content": "Look both up."}], tools, model_client=ScriptedModel([calls, "Done."])
        )

    perplexity, context7 = (message["content"] for message in result.messages if message["role"] == "tool")
    assert perplexity == "Paris.[1]\n\nSources:\n[1] https://a.example/"
    assert "Timeouts are 5 s." in context7
    assert "[1] https://b.example/" in context7
