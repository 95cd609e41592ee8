"""Whole runs through LiteLLM and real HTTP: what the provider does shows in the reason, the usage and the trace."""

import asyncio
import time
from typing import Any

import pytest

from agent_fsm import AgentConfig, AgentResult, AgentRun, EchoMCP, run_agent
from agent_fsm.protocol import ModelFailed
from agent_fsm.testing import openai_faults
from tests.openai_server import HANG, OpenAIServer

TASK = [{"role": "user", "content": "Echo hello."}]
CALL = [("echo", {"text": "hello"})]


def run(server: OpenAIServer, **settings: Any) -> AgentResult:
    config = AgentConfig(model="openai/gpt-4o-mini", completion_kwargs=server.completion_kwargs, **settings)
    return run_agent(TASK, EchoMCP(), config)


def test_a_tool_call_goes_to_the_tool_and_its_result_to_the_model() -> None:
    with OpenAIServer([CALL, "It said hello."]) as server:
        result = run(server)

    assert (result.final_answer, result.stopped_reason) == ("It said hello.", "success")
    sent = server.requests[1].body["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "tool"]
    assert not openai_faults(sent)
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (24, 6)
    assert result.usage.cost_usd == pytest.approx(24 * 0.15e-6 + 6 * 0.6e-6)
    assert result.used_model.endswith("gpt-4o-mini")


def test_a_rate_limit_is_waited_out_by_the_machine_and_seen_in_the_trace() -> None:
    with OpenAIServer([(429, {"Retry-After": "1"}), "hello"]) as server:
        result = run(server)

    failures = [event for event in result.events if isinstance(event, ModelFailed)]
    assert (result.final_answer, result.iterations, result.usage.model_calls) == ("hello", 1, 2)
    assert [(event.retryable, event.retry_after) for event in failures] == [(True, 1.0)]
    assert result.seconds >= 1.0
    assert len(server.requests) == 2


def test_an_error_that_stays_ends_the_run_after_the_counted_retries() -> None:
    with OpenAIServer([500]) as server:
        result = run(server, max_model_retries=1)

    assert result.stopped_reason == "model_error"
    assert len(server.requests) == 2


def test_a_fallback_model_is_asked_when_the_first_fails() -> None:
    with OpenAIServer([503, "the other one answers"]) as server:
        result = run(server, fallback_models=["openai/gpt-4o"])

    assert result.final_answer == "the other one answers"
    assert [request.body["model"] for request in server.requests] == ["gpt-4o-mini", "gpt-4o"]


def test_a_provider_that_hangs_ends_the_run_at_its_deadline() -> None:
    with OpenAIServer(["warm", HANG]) as server:
        run(server)
        began = time.monotonic()
        result = run(server, max_wallclock_seconds=0.5)
        took = time.monotonic() - began

    assert result.stopped_reason == "max_wallclock"
    assert took < 0.5 + 0.25


def test_a_run_cancelled_while_the_provider_hangs_ends_at_once() -> None:
    async def main(server: OpenAIServer) -> AgentResult:
        config = AgentConfig(model="openai/gpt-4o-mini", completion_kwargs=server.completion_kwargs)
        agent = AgentRun(TASK, EchoMCP(), config)
        asyncio.get_running_loop().call_later(0.5, agent.cancel)
        result = await agent
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result

    with OpenAIServer([HANG]) as server:
        result = asyncio.run(main(server))

    assert result.stopped_reason == "cancelled"
    assert result.seconds < 0.5 + 0.25


def test_a_missing_key_ends_at_once_and_names_the_variable_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_API_BASE"):
        monkeypatch.delenv(name, raising=False)

    result = run_agent(TASK, config=AgentConfig(model="gpt-4o-mini"))

    assert (result.stopped_reason, result.usage.model_calls) == ("model_error", 1)
    assert "OPENAI_API_KEY" in result.detail


def test_a_cost_limit_uses_the_price_that_litellm_knows() -> None:
    function = {"name": "echo", "arguments": '{"text": "hello"}'}
    message = {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": function}]}
    usage = {"prompt_tokens": 10_000, "completion_tokens": 1_000, "total_tokens": 11_000}
    reply = {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}], "usage": usage}

    with OpenAIServer([reply]) as server:
        result = run(server, max_cost_usd=0.02, max_iterations=50, stagnation_window=50)

    assert result.stopped_reason == "budget"
    assert result.usage.cost_usd == pytest.approx(len(server.requests) * (10_000 * 0.15e-6 + 1_000 * 0.6e-6))
    assert 0.01 < result.usage.cost_usd <= 0.02
