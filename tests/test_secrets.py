"""Secrets: what is given as a key, a token or a password goes where it is needed, and shows nowhere else.

One run with every backend at once, each of which sends back what it was given; then everything that the run has left is
searched: its events, transcript, result and log, the requests to the model, both standard streams, every library's log
at its most talkative, and the environments of the processes that were started.
"""

import asyncio
import base64
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from agent_fsm import (
    AgentConfig,
    AgentResult,
    CombinedInvoker,
    FunctionTools,
    HttpToolsInvoker,
    LocalMCPInvoker,
    MCPInvoker,
    ResearchPythonInvoker,
    ToolInvoker,
    arun_agent,
    run_agent,
)
from agent_fsm.diagrams import DiagramError, svg
from agent_fsm.protocol import ModelError, ModelReplied, ToolResult, ToolsFinished
from agent_fsm.testing import ScriptedModel, ScriptedTools
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
    ("own_environment", {}),
    ("own_failure", {}),
    ("exec_python", {"code": "import os; print(dict(os.environ))"}),
    ("exec_shell", {"cmd": "python -c 'import os; print(dict(os.environ))'"}),
]


def own_environment() -> dict[str, str]:
    """Tell all that the process of the agent has."""
    return dict(os.environ)


def own_failure() -> str:
    """Fail with it."""
    raise RuntimeError(f"I don't like {dict(os.environ)}")


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
                "local": LocalMCPInvoker(env={"GIVEN_TOKEN": SECRETS["ambient key"]}),
                "functions": FunctionTools(own_environment, own_failure),
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
    told = {message["tool_call_id"]: message["content"] for message in result.messages if message["role"] == "tool"}
    assert all("***" in text for text in list(told.values())[-4:])  # the ambient key was in there


def called(result: AgentResult) -> list[Any]:
    return [call["function"] for message in result.messages for call in message.get("tool_calls") or ()]


def test_the_search_finds_what_shows() -> None:
    with ToolsGateway([tool("look_up")], [reflected]) as gateway:
        headers = {"X-Plain": SECRETS["gateway token"]}  # by its name it is no secret, so that it is shown
        call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
        result = asyncio.run(HttpToolsInvoker(gateway.url, headers).call_openai_tool(call))

    assert SECRETS["gateway token"] in result.text


# What the environment holds, and what looks like a key

SECRET = "canary-environment-3f80"
SHAPED = f"ghp_{'Aa0' * 12}"
TASK = [{"role": "user", "content": "Go."}]


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SOME_SERVICE_TOKEN", SECRET)
    return SECRET


def outcome_of(outcome: Any, **settings: Any) -> tuple[ToolResult, AgentResult]:
    """Return the result of a call whose tool gives *outcome*, or raises it, and that of its run."""
    config = AgentConfig(enable_repair=False, **settings)
    tools = ScriptedTools({"look": [outcome]})
    result = run_agent(TASK, tools, config, model_client=ScriptedModel([[("look", {})], "Done."]))
    return next(event for event in result.events if isinstance(event, ToolsFinished)).results[0], result


BLOB = base64.b64encode(f"x{SECRET}y".encode()).decode()
OUTCOMES = [
    f"it is {SECRET} and {SHAPED}",
    {"ok": True, "stdout": f"{SECRET}\n{SHAPED}"},
    {"ok": False, "error": SECRET, "stdout": f"{'x' * 10}{SECRET}{'y' * 590}", "stderr": f"\t{SHAPED}"},
    json.dumps({"ok": False, "rc": 1, "stderr": f"\n{SHAPED} {SECRET}"}),
    RuntimeError(f"no {SECRET} and {SHAPED}"),
    ToolResult(SECRET, structured={SECRET: [SHAPED]}, parts=({"type": "text", "text": SECRET}, {"blob": BLOB})),
    base64.b64encode(f"key: {SECRET}".encode()).decode(),
    f"{'x' * 40}{SECRET}{'y' * 1_000}",
]


@pytest.mark.parametrize("outcome", OUTCOMES, ids=range(len(OUTCOMES)))
def test_no_result_has_a_secret_in_any_of_its_fields(secret: str, outcome: Any) -> None:
    told, result = outcome_of(outcome, observation_chars=100)

    assert "***" in told.text or "cut" in told.text
    text = f"{result!r} {json.dumps(result.messages)}"
    halves = (secret[:12], secret[-12:])  # none is left by a cut either
    assert [each for each in (*halves, SHAPED, base64.b64encode(secret.encode()).decode()[:20]) if each in text] == []


def test_what_is_redacted_does_not_decide_whether_a_call_succeeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODD_TOKEN", '"ok": false')

    told, _ = outcome_of('{"ok": false, "rc": 3}')

    assert (told.text, told.ok, told.rc) == ('{***, "rc": 3}', False, 3)


def test_structured_content_that_can_not_be_looked_through_is_left_out(secret: str) -> None:
    deep: list[Any] = []
    deep.append(deep)

    told, _ = outcome_of(ToolResult("text", structured=deep))

    assert (told.text, told.structured) == ("text", "***")


def test_no_listing_has_a_secret_in_it_and_tools_keep_their_names(secret: str) -> None:
    parameters = {"type": "object", "properties": {"key": {"type": "string", "default": SECRET}}}
    function = {"name": SECRET, "description": f"Give it {SECRET}, not {SHAPED}.", "parameters": parameters}
    tools = ScriptedTools({}, listing=[{"type": "function", "function": function}])
    tools.unavailable = (f"other: refused {SECRET}",)  # type: ignore[attr-defined] # what invokers may have
    model = ScriptedModel(["Done."])

    result = run_agent(TASK, tools, AgentConfig(), model_client=model)

    offered = model.requests[0].tools[0]["function"]
    assert (offered["name"], offered["description"]) == (SECRET, "Give it ***, not ***.")
    assert offered["parameters"]["properties"] == {"key": {"type": "string", "default": "***"}}
    assert result.events[0].unavailable == ("other: refused ***",)  # type: ignore[union-attr] # tools were listed


def test_no_error_has_a_secret_in_it(secret: str) -> None:
    told = f"{'x' * 1_990} {SECRET} {SHAPED}"
    no_tools = run_agent(TASK, ScriptedTools({}, listing=OSError(told)), model_client=ScriptedModel(["Done."]))
    refused = run_agent(TASK, model_client=ScriptedModel([ModelError(told, retryable=False)]))
    faulty = run_agent(TASK, model_client=ScriptedModel([LookupError(told)]))
    unread = run_agent(
        TASK, None, AgentConfig(max_model_retries=0), model_client=ScriptedModel([{"error": {"message": told}}])
    )

    ended = [result.stopped_reason for result in (no_tools, refused, faulty, unread)]
    assert ended == ["tools_unavailable", "model_error", "model_error", "model_error"]
    for result in (no_tools, refused, faulty, unread):
        assert [each for each in (SECRET[:12], SECRET[-12:], SHAPED[:12]) if each in repr(result)] == []
    assert "***" in refused.detail


def test_what_the_caller_and_the_model_say_stays_as_it_is(secret: str) -> None:
    tools = ScriptedTools({"look": lambda key: f"with {key}"})
    model = ScriptedModel([[("look", {"key": SECRET})], f"Done with {SECRET}."])

    result = run_agent([{"role": "user", "content": f"Take {SECRET}."}], tools, AgentConfig(), model_client=model)

    assert tools.calls == [("look", {"key": SECRET})]
    assert [message["content"] for message in result.messages] == [
        f"Take {SECRET}.",
        None,
        "with ***",
        f"Done with {SECRET}.",
    ]
    assert any(isinstance(event, ModelReplied) and SECRET in event.text for event in result.events)


def test_a_key_that_the_configuration_has_is_redacted_too() -> None:
    kwargs = {"api_key": "canary-configured-1", "extra_headers": {"X-Api-Key": "canary-configured-2"}}

    told, _ = outcome_of("canary-configured-1, canary-configured-2", completion_kwargs=kwargs)

    assert told.text == "***, ***"


def test_redaction_can_be_switched_off(secret: str) -> None:
    told, _ = outcome_of(f"{SECRET} {SHAPED}", redact_secrets=False)

    assert told.text == f"{SECRET} {SHAPED}"


def test_the_environment_counts_as_it_is_when_a_run_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    before, _ = outcome_of(SECRET)
    monkeypatch.setenv("SOME_SERVICE_TOKEN", SECRET)
    after, _ = outcome_of(SECRET)

    assert (before.text, after.text) == (SECRET, "***")


# Child processes

LISTED = {
    *("HOME", "LANG", "LANGUAGE", "LOGNAME", "PATH", "SHELL", "SYSTEMROOT", "TEMP", "TERM", "TMP", "TMPDIR", "TZ"),
    *("USER", "AGENT_FSM_MCP_SERVER", "MALLOC_ARENA_MAX", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
}
"""What a child may have of the parent's environment, or is given by us, beside `LC_*`."""
CODE = "import json, os; print(json.dumps(dict(os.environ)))"


def unlisted(environ: Mapping[str, str]) -> set[str]:
    return {name for name in environ if name not in LISTED and not name.startswith("LC_")}


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment with much that is nobody's business, some of it under names that say nothing."""
    for name in ("OPENAI_API_KEY", "SSH_AUTH_SOCK", "PYTHONPATH", "DATABASE_URL", "MY_NOTES", "lowercase", "LANGUAGES"):
        monkeypatch.setenv(name, "canary-in-the-parent")


@pytest.mark.parametrize("sandbox", ["off", "basic", "strict"])
def test_what_the_model_runs_has_only_what_is_listed(crowded: None, sandbox: Any) -> None:
    invoker = LocalMCPInvoker((sys.executable,), sandbox=sandbox, env={"GIVEN": "yes"})

    for name, arguments in (("exec_python", {"code": CODE}), ("exec_shell", {"cmd": f"{sys.executable} -c '{CODE}'"})):
        call = {"id": "1", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        told = json.loads(asyncio.run(invoker.call_openai_tool(call)).text)
        if sandbox == "basic" and told["rc"] is None:
            pytest.skip(told["error"])  # as root, another user runs it, who may not get at this interpreter
        assert told["ok"], str(told)
        environ = json.loads(told["stdout"])
        assert (unlisted(environ), environ["GIVEN"]) == ({"GIVEN"}, "yes")
        assert "canary-in-the-parent" not in str(environ)


def test_an_mcp_server_has_only_what_is_listed(crowded: None) -> None:
    async def asked() -> ToolResult:
        invoker = MCPInvoker({"one": {"command": sys.executable, "args": [PLAIN], "env": {"API_TOKEN": "given-1"}}})
        call = {"id": "1", "type": "function", "function": {"name": "one__environment", "arguments": "{}"}}
        async with invoker:
            await invoker.list_openai_tools()
            return await invoker.call_openai_tool(call)

    environ = json.loads(asyncio.run(asked()).text)

    assert unlisted(environ) == {"API_TOKEN"}
    assert "canary-in-the-parent" not in str(environ)


def test_graphviz_has_only_what_is_listed(crowded: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dot = tmp_path / "dot"
    dot.write_text(f"#!{sys.executable}\nimport sys; sys.stdout = sys.stderr; {CODE}; sys.exit(1)\n", encoding="utf-8")
    dot.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(DiagramError) as raised:
        svg()

    environ = json.loads(str(raised.value).partition("): ")[2])
    assert unlisted(environ) == set()
    assert "canary-in-the-parent" not in str(environ)
