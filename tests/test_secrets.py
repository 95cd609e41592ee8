"""Secrets: what is given as a key, a token or a password goes where it is needed, and shows nowhere else.

One run with every backend at once, each of which sends back what it was given; then everything that the run has left is
searched: its events, transcript, result and log, the requests to the model, both standard streams, every library's log
at its most talkative, and the environments of the processes that were started.
"""

import asyncio
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from agent_fsm import (
    AgentConfig,
    AgentResult,
    CombinedInvoker,
    HttpToolsInvoker,
    LocalMCPInvoker,
    MCPInvoker,
    ResearchPythonInvoker,
    ToolInvoker,
    arun_agent,
)
from tests.openai_server import OpenAIServer
from tests.tools_gateway import Request, Scripted, ToolsGateway, tool

PLAIN = str(Path(__file__).parent / "mcp_servers" / "plain.py")
SECRETS = {
    "model key": "sk-canary-model-7d21",
    "gateway token": "canary-gateway-91ab",
    "server token": "canary-server-5c3e",
    "other server token": "canary-other-server-e88b",
    "research key": "pplx-canary-research-02f6",
    "ambient key": "canary-ambient-key-b47a",
}


def servers() -> dict[str, Any]:
    def server(token: str) -> dict[str, Any]:
        return {"command": sys.executable, "args": [PLAIN], "env": {"API_TOKEN": token}}

    return {"one": server(SECRETS["server token"]), "two": server(SECRETS["other server token"])}


CALLS: list[tuple[str, dict[str, Any]]] = [
    ("look_up", {"q": "reflect"}),
    ("look_up", {"q": "reflect in an error"}),
    ("look_up", {"q": "reflect with a 500"}),
    ("one__secret", {}),
    ("one__secret", {"text": "fail"}),
    ("one__environment", {}),
    ("two__environment", {}),
    ("one__die", {}),
    ("research_perplexity", {"query": "reflect"}),
    ("exec_python", {"code": "import os; print(dict(os.environ))"}),
    ("exec_shell", {"cmd": "python -c 'import os; print(dict(os.environ))'"}),
]


def reflecting(status: int, **body: Any) -> Any:
    """Return an answer that holds all headers of the request."""
    return lambda request: (status, {"X-Seen": str(request.headers)}, {**body, "seen": str(request.headers)})


def reflected(request: Request) -> Mapping[str, Any]:
    return {"text": f"seen: {request.headers}", "data": {"headers": dict(request.headers)}}


@pytest.fixture
def talkative(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """Every logger there is, at DEBUG."""
    caplog.set_level(logging.DEBUG)
    for name in ("httpx", "httpx2", "httpcore", "httpcore2", "mcp", "asyncio", "openai", "agent_fsm"):
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "propagate", True)
        caplog.set_level(logging.DEBUG, logger=name)
    return caplog


async def run(model: OpenAIServer, tools: ToolInvoker) -> AgentResult:
    kwargs = {**model.completion_kwargs, "api_key": SECRETS["model key"]}
    config = AgentConfig(
        model="openai/gpt-4o-mini", max_iterations=20, max_consecutive_failures=9, completion_kwargs=kwargs
    )
    return await arun_agent([{"role": "user", "content": "Go."}], tools, config, log=True)


def test_no_secret_shows_where_it_is_not_needed(
    talkative: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", SECRETS["ambient key"])
    monkeypatch.setenv("PPLX_API_KEY", SECRETS["research key"])
    answers: list[Any] = [reflected, lambda request: {"error": str(request.headers)}, reflecting(500)]
    said = {"choices": [{"message": {"content": "seen"}}]}
    with (
        OpenAIServer([[call] for call in CALLS] + ["Done."]) as model,
        ToolsGateway([tool("look_up")], answers) as gateway,
        Scripted({"POST /chat/completions": [lambda request: {**said, "citations": [str(request.headers)]}]}) as pplx,
    ):
        tools = CombinedInvoker(
            {
                "gateway": HttpToolsInvoker(gateway.url, {"Authorization": f"Bearer {SECRETS['gateway token']}"}),
                "servers": MCPInvoker(servers()),
                "research": ResearchPythonInvoker(pplx_api_base=pplx.url),
                "local": LocalMCPInvoker(),
            }
        )
        result = asyncio.run(run(model, tools))

    left = {
        "the result": repr(result),
        "the answer as JSON": json.dumps(result.messages),
        "a backend": repr(tools) + repr(vars(tools)),
        "the requests to the model": "".join(json.dumps(each.body) for each in model.requests),
        "standard output or error": "".join(capfd.readouterr()),
        "a log": "".join(f"{each.getMessage()} {each.args} {each.exc_text}\n" for each in talkative.records),
    }
    asked = [message["name"] for message in called(result)]
    assert (asked, result.final_answer) == ([name for name, _ in CALLS], "Done.")
    assert gateway.invoked[0].headers["authorization"].endswith(SECRETS["gateway token"])  # where it is needed, it is
    assert pplx.asked("/chat/completions")[0].headers["authorization"].endswith(SECRETS["research key"])
    assert model.requests[0].headers["authorization"].endswith(SECRETS["model key"])
    assert [(what, where) for where, text in left.items() for what, secret in SECRETS.items() if secret in text] == []


def called(result: AgentResult) -> list[Any]:
    return [call["function"] for message in result.messages for call in message.get("tool_calls") or ()]


def test_the_search_finds_what_shows() -> None:
    with ToolsGateway([tool("look_up")], [reflected]) as gateway:
        headers = {"X-Plain": SECRETS["gateway token"]}  # by its name it is no secret, so that it is shown
        call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
        result = asyncio.run(HttpToolsInvoker(gateway.url, headers).call_openai_tool(call))

    assert SECRETS["gateway token"] in result.text
