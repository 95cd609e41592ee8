"""The LiteLLM edge against a real server on loopback: what is sent, what comes back, what a failure means."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any, TypeVar

import pytest

from agent_fsm.config import AgentConfig
from agent_fsm.errors import ConfigError
from agent_fsm.llm import LiteLLMClient, default_model, provider_key_present
from agent_fsm.protocol import PLAN, ModelError, ModelRequest, Prices
from tests.openai_server import HANG, USAGE, Drip, OpenAIServer

MODEL = "openai/gpt-4o-mini"
TOOL = {
    "type": "function",
    "function": {"name": "look_up", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
Result = TypeVar("Result")


def request(model: str = MODEL, *, timeout_seconds: float = 30.0, **more: Any) -> ModelRequest:
    fields = {"messages": [{"role": "user", "content": "hi"}], "tools": (), "tool_choice": None, "max_tokens": 100}
    return ModelRequest(purpose=PLAN, model=model, timeout_seconds=timeout_seconds, **(fields | more))


def using(config: AgentConfig, work: Callable[[LiteLLMClient], Awaitable[Result]]) -> Result:
    """Do *work* with a client and close it, on a loop of their own."""

    async def main() -> Result:
        client = LiteLLMClient(config)
        try:
            return await work(client)
        finally:
            await client.aclose()

    return asyncio.run(main())


def at(server: OpenAIServer, **more: Any) -> AgentConfig:
    kwargs = server.completion_kwargs | more.pop("completion_kwargs", {})
    return AgentConfig(**{"model": MODEL, "completion_kwargs": kwargs} | more)


def ask(config: AgentConfig, **more: Any) -> dict[str, Any]:
    return using(config, lambda client: client.complete(request(config.model, **more)))


def failure(config: AgentConfig, **more: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        ask(config, **more)
    return caught.value


def failed_with(reply: Any, **more: Any) -> ModelError:
    """Return what a client makes of *reply*, having seen that the server was asked once."""
    with OpenAIServer([reply]) as server:
        error = failure(at(server), **more)

        assert len(server.requests) == 1
    return error


def scripted_error(status: int, *, code: str, text: str) -> tuple[int, dict[str, str], Any]:
    return status, {}, {"error": {"message": text, "type": code, "param": None, "code": code}}


# What comes back


def test_a_reply_arrives_with_its_usage_and_cost() -> None:
    with OpenAIServer(["hello"]) as server:
        reply = ask(at(server))

    choice = reply["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("hello", "stop")
    assert {name: reply["usage"][name] for name in USAGE} == USAGE
    assert reply["model"] == "gpt-4o-mini"
    assert reply["cost_usd"] == pytest.approx(12 * 0.15e-6 + 3 * 0.6e-6)


def test_tool_calls_make_the_round_trip() -> None:
    with OpenAIServer([[("look_up", {"city": "Paris"}), ("look_up", "{broken")], "it rains"]) as server:

        async def work(client: LiteLLMClient) -> dict[str, Any]:
            first = await client.complete(request(tools=[TOOL], tool_choice="auto"))
            calls = first["choices"][0]["message"]["tool_calls"]
            answers = [{"role": "tool", "tool_call_id": call["id"], "content": "rain"} for call in calls]
            turn = {"role": "assistant", "content": None, "tool_calls": calls}
            await client.complete(request(messages=[{"role": "user", "content": "hi"}, turn, *answers], tools=[TOOL]))
            return first

        reply = using(at(server), work)

    functions = [call["function"] for call in reply["choices"][0]["message"]["tool_calls"]]
    assert functions == [
        {"name": "look_up", "arguments": '{"city": "Paris"}'},
        {"name": "look_up", "arguments": "{broken"},
    ]
    assert (server.requests[0].body["tools"], server.requests[0].body["tool_choice"]) == ([TOOL], "auto")
    sent = server.requests[1].body["messages"]
    assert [call["function"] for call in sent[1]["tool_calls"]] == functions
    assert [message["tool_call_id"] for message in sent[2:]] == ["call_1", "call_2"]


def test_a_refusal_and_what_a_provider_adds_are_kept() -> None:
    thinking = [{"type": "thinking", "thinking": "hm", "signature": "s"}]
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    signed = call | {"provider_specific_fields": {"thought_signature": "zz"}}
    message = {"thinking_blocks": thinking, "reasoning_content": "because", "tool_calls": [signed]}
    with OpenAIServer([{"refusal": "I will not"}, message]) as server:

        async def work(client: LiteLLMClient) -> list[dict[str, Any]]:
            return [(await client.complete(request()))["choices"][0]["message"] for _ in range(2)]

        refused, thought = using(at(server), work)

    assert refused["refusal"] == "I will not"
    assert (thought["thinking_blocks"], thought["reasoning_content"]) == (thinking, "because")
    assert thought["tool_calls"][0]["provider_specific_fields"] == {"thought_signature": "zz"}


def test_usage_that_was_not_reported_is_not_taken_for_zero() -> None:
    completion = {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt-4o-mini",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
    }
    with OpenAIServer([completion]) as server:
        reply = ask(at(server))

    assert (reply["usage"], reply["cost_usd"]) == (None, None)


# What is sent


def test_a_request_says_what_the_run_decided_and_no_more() -> None:
    with OpenAIServer() as server:
        ask(at(server, completion_kwargs={"temperature": 0.5}))

    messages = [{"role": "user", "content": "hi"}]
    assert server.requests[0].body == {
        "model": "gpt-4o-mini",
        "messages": messages,
        "max_tokens": 100,
        "temperature": 0.5,
    }
    assert server.requests[0].headers["authorization"] == "Bearer sk-test"


@pytest.mark.parametrize(
    ("model", "given", "sent"),
    [
        (MODEL, {}, {"max_tokens": 100}),
        (MODEL, {"max_tokens": 7}, {"max_tokens": 7}),
        (MODEL, {"max_tokens": 900}, {"max_tokens": 100}),
        (MODEL, {"max_completion_tokens": 7}, {"max_completion_tokens": 7}),
        (MODEL, {"max_completion_tokens": 900}, {"max_completion_tokens": 100}),
        ("openai/gpt-5-mini", {}, {"max_completion_tokens": 100}),
        ("openai/o3-mini", {"max_tokens": 7}, {"max_completion_tokens": 7}),
    ],
)
def test_the_reply_ceiling_can_be_lowered_but_not_raised(
    model: str, given: Mapping[str, int], sent: Mapping[str, int]
) -> None:
    with OpenAIServer() as server:
        ask(at(server, model=model, completion_kwargs=given))

    body = server.requests[0].body
    assert {name: value for name, value in body.items() if name.startswith("max_")} == sent


def test_all_requests_of_a_run_share_a_connection_whatever_time_they_have_left() -> None:
    with OpenAIServer() as server:

        async def work(client: LiteLLMClient) -> None:
            for timeout_seconds in (30.0, 20.0, 10.0):
                await client.complete(request(timeout_seconds=timeout_seconds))

        using(at(server), work)

    assert len({each.connection for each in server.requests}) == 1


def test_an_attempt_goes_to_the_fallback_model_it_names() -> None:
    with OpenAIServer([503, "hello"]) as server:

        async def work(client: LiteLLMClient) -> str:
            with pytest.raises(ModelError):
                await client.complete(request())
            await client.complete(request("openai/other"))
            return client.used_model

        used = using(at(server, fallback_models=["openai/other"]), work)

    assert [each.body["model"] for each in server.requests] == ["gpt-4o-mini", "other"]
    assert used == "other"


def test_a_model_that_keeps_failing_is_still_asked() -> None:
    with OpenAIServer([429, 500, 429, 500, 429, "at last"]) as server:

        async def work(client: LiteLLMClient) -> dict[str, Any]:
            for _ in range(5):
                with pytest.raises(ModelError):
                    await client.complete(request())
            return await client.complete(request())

        reply = using(at(server), work)

    assert reply["choices"][0]["message"]["content"] == "at last"
    assert len(server.requests) == 6


FORCED: dict[str, Any] = {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look_up"}}}


def test_a_model_is_told_which_tool_to_call() -> None:
    with OpenAIServer() as server:
        ask(at(server), **FORCED)

    assert server.requests[0].body["tool_choice"] == FORCED["tool_choice"]


@pytest.mark.parametrize(
    "settings",
    [
        {"completion_kwargs": {"reasoning_effort": "low"}, "model": "openai/gpt-5-mini"},
        {"completion_kwargs": {"thinking": {"type": "enabled", "budget_tokens": 1024}, "drop_params": True}},
    ],
)
def test_a_model_that_thinks_first_is_left_the_choice_for_it_would_refuse(settings: dict[str, Any]) -> None:
    with OpenAIServer() as server:
        ask(at(server, **settings), **FORCED)

    assert server.requests[0].body["tool_choice"] == "auto"


def test_a_server_that_can_not_force_a_tool_is_asked_again_without_and_never_told_to_again() -> None:
    refusal = scripted_error(400, code="invalid_request_error", text="tool_choice must be 'auto' with this model")
    with OpenAIServer([refusal, "so", "so"]) as server:

        async def work(client: LiteLLMClient) -> ModelError:
            with pytest.raises(ModelError) as caught:
                await client.complete(request(**FORCED))
            for _ in range(2):
                await client.complete(request(**FORCED))
            return caught.value

        error = using(at(server), work)

    assert error.retryable
    assert [each.body["tool_choice"] for each in server.requests] == [FORCED["tool_choice"], "auto", "auto"]


def test_a_400_that_is_not_about_the_tool_choice_is_fatal_as_ever() -> None:
    assert not failed_with(400, **FORCED).retryable


def test_the_offered_tools_are_not_touched() -> None:
    parameters = {"type": "object", "properties": {}, "additionalProperties": False, "$schema": "x"}
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": parameters}}
    with OpenAIServer() as server:
        failure(at(server, model="gemini/gemini-2.5-flash"), tools=[tool])

    assert parameters == {"type": "object", "properties": {}, "additionalProperties": False, "$schema": "x"}


# What a failure means


def test_a_rate_limit_says_how_long_to_wait() -> None:
    error = failed_with((429, {"Retry-After": "7"}))

    assert (error.retryable, error.retry_after) == (True, 7.0)
    assert MODEL in str(error)
    assert "429" in str(error)


def test_a_rate_limit_may_name_the_date_to_wait_for() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)

    error = failed_with((429, {"Retry-After": date}))

    assert error.retry_after is not None
    assert 30 < error.retry_after <= 60


@pytest.mark.parametrize("header", ["soon", "-5", "nan", ""])
def test_a_senseless_retry_after_delays_nothing(header: str) -> None:
    error = failed_with((429, {"Retry-After": header}))

    assert error.retryable
    assert not error.retry_after


def test_a_used_up_quota_is_no_rate_limit() -> None:
    error = failed_with(scripted_error(429, code="insufficient_quota", text="You exceeded your current quota"))

    assert not error.retryable
    assert "billing" in str(error)


@pytest.mark.parametrize("status", [408, 409, 500, 502, 503, 504, 529])
def test_a_server_in_trouble_may_be_asked_again(status: int) -> None:
    assert failed_with(status).retryable


@pytest.mark.parametrize("garbage", [b"{not json", b"<html>oops</html>", b"", b"null", b"[]", b"{}"])
def test_a_reply_that_can_not_be_read_may_be_asked_for_again(garbage: bytes) -> None:
    assert failed_with(garbage).retryable


def test_a_server_that_is_not_there_may_be_asked_again() -> None:
    with socket.socket() as placeholder:
        placeholder.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{placeholder.getsockname()[1]}/v1"
        error = failure(AgentConfig(model=MODEL, completion_kwargs={"api_base": base, "api_key": "sk-test"}))

    assert error.retryable
    assert "status" not in str(error)


@pytest.mark.parametrize(
    ("reply", "advice"),
    [
        (400, "completion_kwargs"),
        (401, "check the API key"),
        (402, "credit"),
        (403, "may not use this model"),
        (404, "model's name"),
        (413, "max_history_messages"),
        (422, "completion_kwargs"),
        (418, "will not help"),
        (
            scripted_error(400, code="context_length_exceeded", text="This model's maximum context length is 8192"),
            "set summarize_every",
        ),
        (
            scripted_error(400, code="content_policy_violation", text="rejected as a result of our safety system"),
            "content policy",
        ),
    ],
)
def test_a_request_that_will_always_fail_is_not_repeated_and_says_what_to_do(reply: Any, advice: str) -> None:
    error = failed_with(reply)

    assert not error.retryable
    assert advice in str(error)


def test_a_parameter_that_the_model_does_not_take_is_fatal() -> None:
    with OpenAIServer() as server:
        error = failure(at(server, model="openai/o3-mini", completion_kwargs={"temperature": 0.3}))

        assert server.requests == []
    assert not error.retryable
    assert "drop_params" in str(error)


def test_a_model_without_a_provider_is_fatal() -> None:
    error = failure(AgentConfig(model="nonsense"))

    assert not error.retryable
    assert "LLM Provider NOT provided" in str(error)


@pytest.mark.parametrize(
    ("model", "variable"),
    [
        (MODEL, "OPENAI_API_KEY"),
        ("anthropic/claude-haiku-4-5", "ANTHROPIC_API_KEY"),
        ("gemini/gemini-2.5-flash", "GEMINI_API_KEY"),
    ],
)
def test_a_missing_key_is_fatal_and_named(model: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.endswith(("_API_KEY", "_TOKEN")):
            monkeypatch.delenv(name)

    error = failure(AgentConfig(model=model))

    assert not error.retryable
    assert variable in str(error)


def test_a_server_of_ones_own_wants_any_key_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with OpenAIServer() as server:
        error = failure(AgentConfig(model=MODEL, completion_kwargs={"api_base": server.base_url}))

    assert not error.retryable
    assert "api_key in completion_kwargs" in str(error)


def test_no_message_holds_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "from-the-environment")
    text = "Incorrect key sk-abcdefgh, private-key-1 or from-the-environment provided"
    with OpenAIServer([scripted_error(401, code="invalid_api_key", text=text)]) as server:
        error = failure(at(server, completion_kwargs={"api_key": "private-key-1"}))

    assert "Incorrect key ***, *** or *** provided" in str(error)
    assert (error.__cause__, error.__suppress_context__) == (None, True)


# Time


@pytest.mark.parametrize("reply", [HANG, Drip("hello", pause_s=0.05)])
def test_a_reply_that_takes_too_long_is_given_up(reply: Any) -> None:
    error = failed_with(reply, timeout_seconds=0.5)

    assert error.retryable
    assert "within 0.5 s" in str(error)


def test_the_callers_timeout_holds_if_it_is_the_shorter() -> None:
    with OpenAIServer([HANG]) as server:
        error = failure(at(server, completion_kwargs={"timeout": 0.3}))

    assert "within 0.3 s" in str(error)


def test_a_cancelled_request_ends_at_once_and_leaves_nothing() -> None:
    async def work(client: LiteLLMClient) -> float:
        await client.complete(request())
        task = asyncio.create_task(client.complete(request()))
        await asyncio.sleep(0.2)
        cancelled_at = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        took = time.monotonic() - cancelled_at
        await client.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return took

    with OpenAIServer(["hello", HANG]) as server:
        took = using(at(server), work)

    assert took < 0.25  # the promise to callers; measured: 1 ms


def test_closing_a_run_closes_its_connections_and_no_others() -> None:
    with OpenAIServer() as server:

        async def main() -> list[int]:
            ours, theirs = LiteLLMClient(at(server)), LiteLLMClient(at(server))
            await theirs.complete(request())
            await ours.complete(request())
            await ours.aclose()
            await theirs.complete(request())
            await theirs.aclose()
            return [each.connection for each in server.requests]

        first, second, third = asyncio.run(main())

    assert first == third != second


# Prices


def test_prices_are_listed_given_or_unknown() -> None:
    given = {"input_cost_per_token": 1e-3, "output_cost_per_token": 2e-3}
    client = LiteLLMClient(AgentConfig(model=MODEL))

    assert client.prices("gpt-4o-mini") == client.prices(MODEL) == Prices(0.15e-6, 0.6e-6)
    assert client.prices("openai/no-such-model") is None
    assert client.prices("together_ai/gpt-4o-mini") is None  # another seller, another price
    assert client.prices("gemini/gemini-2.5-pro") == Prices(2.5e-6, 15e-6)  # those of long prompts
    assert LiteLLMClient(AgentConfig(model="x", completion_kwargs=given)).prices("x") == Prices(1e-3, 2e-3)


def test_given_prices_are_what_a_reply_costs() -> None:
    given = {"input_cost_per_token": 1e-3, "output_cost_per_token": 2e-3}
    with OpenAIServer() as server:
        reply = ask(at(server, completion_kwargs=given))

    assert reply["cost_usd"] == pytest.approx(12e-3 + 6e-3)


def test_a_reply_of_unknown_price_is_not_free() -> None:
    with OpenAIServer() as server:

        async def work(client: LiteLLMClient) -> tuple[float | None, Prices | None]:
            reply = await client.complete(request("openai/no-such-model"))
            return reply["cost_usd"], client.prices("openai/no-such-model")

        assert using(at(server, model="openai/no-such-model"), work) == (None, None)


# Configuration


@pytest.mark.parametrize(
    "kwargs",
    [
        {"stream": True},
        {"n": 2},
        {"model": "x"},
        {"messages": []},
        {"tools": []},
        {"tool_choice": "auto"},
        {"num_retries": 3},
        {"max_retries": 3},
        {"fallbacks": []},
        {"max_tokens": 0},
        {"max_completion_tokens": "7"},
        {"timeout": 0},
        {"timeout": None},
        {"input_cost_per_token": -1.0},
    ],
)
def test_what_a_run_can_not_keep_is_refused_by_name(kwargs: Mapping[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"'{next(iter(kwargs))}'"):
        LiteLLMClient(AgentConfig(model=MODEL, completion_kwargs=kwargs))


def test_the_default_model_follows_the_first_key_found() -> None:
    assert default_model({}) == default_model({"OPENAI_API_KEY": " "}) == "offline"
    assert default_model({"GROQ_API_KEY": "k", "OPENAI_API_KEY": "k"}) == "gpt-4o-mini"
    assert provider_key_present({"ANTHROPIC_API_KEY": "k"})
    assert not provider_key_present({"HOME": "/"})


@pytest.mark.parametrize(
    "variable", ["OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY", "GROQ_API_KEY", "MISTRAL_API_KEY"]
)
def test_every_default_model_has_a_known_price(variable: str) -> None:
    model = default_model({variable: "k"})

    assert LiteLLMClient(AgentConfig(model=model)).prices(model) is not None


# Importing LiteLLM


def python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_calls_in_the_conversation_without_tools_go_with_a_placeholder_that_providers_insist_on() -> None:
    called = {"id": "a", "type": "function", "function": {"name": "gone", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "a", "content": "x"},
    ]

    with OpenAIServer(["done"]) as server:
        ask(at(server), messages=messages)

    assert [tool["function"]["name"] for tool in server.requests[0].body["tools"]] == ["no_tool"]
    assert "tool_choice" not in server.requests[0].body


def test_litellm_is_not_imported_before_the_first_request() -> None:
    done = python(
        "import sys, agent_fsm.llm as llm\n"
        "from agent_fsm.config import AgentConfig\n"
        "llm.LiteLLMClient(AgentConfig(model='gpt-4o-mini')).prices('gpt-4o-mini')\n"
        "print({'litellm', 'openai', 'httpx', 'pydantic'} & set(sys.modules))"
    )

    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_a_run_given_up_while_litellm_is_imported_ends_at_once() -> None:
    done = python(
        "import asyncio, time, agent_fsm.llm as llm\n"
        "from agent_fsm.config import AgentConfig\n"
        "from tests.test_llm import request\n"
        "started = time.monotonic()\n"
        "async def main():\n"
        "    async with asyncio.timeout(0.3):\n"
        "        await llm.LiteLLMClient(AgentConfig(model='gpt-4o-mini')).complete(request())\n"
        "try:\n"
        "    asyncio.run(main())\n"
        "except TimeoutError:\n"
        "    print(time.monotonic() - started < 1.5)\n"  # importing takes 2.5 s at the very least
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
