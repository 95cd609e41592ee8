"""A reply that was given before is given again without the model; a cache that fails costs half a second at most."""

import asyncio
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from attrs import evolve

from agent_fsm import AgentConfig, AgentResult, ConfigError, EchoMCP, run_agent
from agent_fsm.llm import LiteLLMClient
from agent_fsm.protocol import ModelRequest, State
from agent_fsm.response_cache import KEPT_SECONDS, PATIENCE_S
from tests.openai_server import HANG, OpenAIServer

REDIS = shutil.which("redis-server")
PASSWORD = "open-sesame-1234"
TASK = [{"role": "user", "content": "Echo hello."}]
SCRIPT = [[("echo", {"text": "hello"})], "It said hello."]
SLACK_S = 1.5
"""What a busy machine adds."""

needs_redis = pytest.mark.skipif(REDIS is None, reason="redis-server is not installed (Debian: redis-server)")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    folder = tmp_path_factory.mktemp("redis")
    asked = ("--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--requirepass", PASSWORD)
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([str(REDIS), *asked], stdin=quiet, stdout=quiet, stderr=quiet)
    try:
        url = f"redis://:{PASSWORD}@127.0.0.1:{port}/0"
        for _ in range(200):
            try:
                redis.Redis.from_url(url).ping()
                break
            except redis.ConnectionError:
                time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def url(server_url: str) -> str:
    """The URL of a redis server that remembers nothing."""
    redis.Redis.from_url(server_url).flushall()
    return server_url


def config(model: OpenAIServer, url: str | None, **settings: Any) -> AgentConfig:
    given = {"completion_kwargs": model.completion_kwargs, **settings}
    return AgentConfig(model="openai/gpt-4o-mini", response_cache=url, **given)


def run(model: OpenAIServer, url: str | None, **settings: Any) -> AgentResult:
    return run_agent(TASK, EchoMCP(), config(model, url, **settings))


REQUEST = ModelRequest(
    messages=[{"role": "user", "content": "hello"}],
    tools=(),
    tool_choice=None,
    purpose=State.PLAN,
    timeout_seconds=10.0,
    model="openai/gpt-4o-mini",
    max_tokens=100,
)


def replies(settings: AgentConfig, *requests: ModelRequest) -> list[dict[str, Any]]:
    """What one client gets for *requests*, one after the other."""

    async def work() -> list[dict[str, Any]]:
        client = LiteLLMClient(settings)
        try:
            return [await client.complete(request) for request in requests]
        finally:
            await client.aclose()

    return asyncio.run(work())


def said(reply: dict[str, Any]) -> Any:
    return reply["choices"][0]["message"]["content"]


# What is kept


@needs_redis
def test_the_second_of_two_equal_runs_asks_no_model(url: str) -> None:
    with OpenAIServer(SCRIPT) as model:
        first, asked = run(model, url), len(model.requests)
        second = run(model, url)

    assert (asked, len(model.requests)) == (2, 2)
    assert (first.final_answer, first.stopped_reason) == ("It said hello.", "success")
    assert (second.final_answer, second.stopped_reason, second.messages) == (
        "It said hello.",
        "success",
        first.messages,
    )
    assert (second.used_model, second.usage.model_calls) == (first.used_model, 2)


@needs_redis
def test_a_kept_reply_counts_its_tokens_and_no_dollars(url: str) -> None:
    with OpenAIServer(SCRIPT) as model:
        first, second = run(model, url), run(model, url)

    assert first.usage.cost_usd > 0.0
    assert second.usage == evolve(first.usage, cost_usd=0.0)


@needs_redis
def test_a_client_knows_who_gave_the_reply_that_was_kept(url: str) -> None:
    async def last(settings: AgentConfig) -> str:
        client = LiteLLMClient(settings)
        try:
            await client.complete(REQUEST)
            return client.used_model
        finally:
            await client.aclose()

    with OpenAIServer(["hello"]) as model:
        told = [asyncio.run(last(config(model, url))) for _ in range(2)]

    assert told == ["gpt-4o-mini", "gpt-4o-mini"]
    assert len(model.requests) == 1


@needs_redis
def test_without_a_cache_every_run_asks_the_model(url: str) -> None:
    with OpenAIServer([*SCRIPT, *SCRIPT]) as model:
        run(model, None)
        run(model, None)

    assert len(model.requests) == 4
    assert redis.Redis.from_url(url).dbsize() == 0


@needs_redis
@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "user", "content": "good-bye"}]},
        {"model": "openai/gpt-4o"},
        {"max_tokens": 99},
        {
            "tools": (
                {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}},
            )
        },
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_request_that_differs_in_anything_the_model_sees_is_asked(url: str, change: dict[str, Any]) -> None:
    with OpenAIServer(["first", "second"]) as model:
        settings = config(model, url, fallback_models=["openai/gpt-4o"])
        told = [said(replies(settings, asked)[0]) for asked in (REQUEST, evolve(REQUEST, **change), REQUEST)]

    assert told == ["first", "second", "first"]


@needs_redis
def test_another_temperature_or_server_is_asked_and_another_key_or_deadline_is_not(url: str) -> None:
    with OpenAIServer(["one", "two"]) as model, OpenAIServer(["elsewhere"]) as other:
        sent = model.completion_kwargs
        given = (sent, sent | {"temperature": 0.5}, other.completion_kwargs, sent | {"api_key": "sk-of-another"})
        asked = [config(model, url, completion_kwargs=each) for each in given]
        told = [said(replies(each, REQUEST)[0]) for each in asked]
        told.append(said(replies(asked[0], evolve(REQUEST, timeout_seconds=3.0))[0]))

    assert told == ["one", "two", "elsewhere", "one", "one"]


@needs_redis
def test_whoever_asks_twice_gets_another_reply(url: str) -> None:
    with OpenAIServer(["unusable", "better"]) as model:
        first = replies(config(model, url), REQUEST, REQUEST)
        kept = replies(config(model, url), REQUEST)

    assert [said(reply) for reply in (*first, *kept)] == ["unusable", "better", "better"]
    assert len(model.requests) == 2


CUT_OFF = {
    "choices": [{"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": "It sa"}}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12},
}


@needs_redis
@pytest.mark.parametrize("reply", [CUT_OFF, ""], ids=["cut off", "empty"])
def test_a_reply_that_is_not_whole_is_not_kept(url: str, reply: Any) -> None:
    with OpenAIServer([reply, "whole"]) as model:
        told = [said(replies(config(model, url), REQUEST)[0]) for _ in range(3)]

    assert told[1:] == ["whole", "whole"]
    assert len(model.requests) == 2


@needs_redis
@pytest.mark.parametrize("kept", [b"", b"garbage", b"[]", b"{}", b'{"choices": []}', b"\xff", b"[" * 100_000])
def test_what_is_no_reply_is_not_given_as_one(url: str, kept: bytes) -> None:
    store = redis.Redis.from_url(url)
    with OpenAIServer(["first", "second"]) as model:
        replies(config(model, url), REQUEST)
        (key,) = store.keys()
        store.set(key, kept)
        told = said(replies(config(model, url), REQUEST)[0])

    assert told == "second"


@needs_redis
def test_the_store_holds_no_key_and_forgets_after_a_day(url: str) -> None:
    secrets = {"api_key": "sk-very-secret-1", "extra_headers": {"X-Api-Key": "sk-very-secret-2"}}
    with OpenAIServer(["hello"]) as model:
        settings = config(model, url, completion_kwargs=model.completion_kwargs | secrets)
        replies(settings, REQUEST)
    store = redis.Redis.from_url(url)
    (key,) = store.keys()
    kept: Any = (key, store.get(key))

    assert model.requests[0].headers["x-api-key"] == "sk-very-secret-2"
    assert b"very-secret" not in b"".join(kept) and b"hello" in kept[1]
    assert KEPT_SECONDS - 60 < store.ttl(key) <= KEPT_SECONDS


@needs_redis
def test_no_connection_is_left_open(url: str) -> None:
    store = redis.Redis.from_url(url)
    with OpenAIServer(SCRIPT) as model:
        before = len(store.client_list())
        run(model, url)
        for _ in range(100):  # the server hears of it a little later
            if len(store.client_list()) == before:
                break
            time.sleep(0.01)

    assert len(store.client_list()) == before


@needs_redis
def test_litellms_own_cache_and_callbacks_stay_what_they_are(url: str) -> None:
    with OpenAIServer(SCRIPT) as model:
        run(model, None)
        litellm = sys.modules["litellm"]
        before = litellm.cache, list(litellm.success_callback), list(litellm.input_callback)
        run(model, url)

    assert (litellm.cache, list(litellm.success_callback), list(litellm.input_callback)) == before


# A server that fails


@contextmanager
def server(serve: Callable[[socket.socket], None]) -> Iterator[tuple[str, list[Any]]]:
    """A server that does with each connection what *serve* does; gives its URL, and the connections so far."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            try:
                serve(connection)
            except OSError:  # its client has gone
                continue

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"redis://:{PASSWORD}@127.0.0.1:{listener.getsockname()[1]}/0", connections
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for connection in connections:
            connection.close()
        thread.join(5)


def silent(connection: socket.socket) -> None:
    """Take what comes and never answer."""


def greeting(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def rejecting(connection: socket.socket) -> None:
    connection.sendall(b"-ERR you may not\r\n" * 20)


def promising(connection: socket.socket) -> None:
    connection.sendall(b"+OK\r\n" * 5 + b"$99999999999\r\nand so on")


def closing(connection: socket.socket) -> None:
    connection.close()


def seconds_of(model: OpenAIServer, url: str | None) -> float:
    result = run(model, url)
    assert (result.final_answer, result.stopped_reason) == ("It said hello.", "success")
    return result.seconds


@pytest.mark.parametrize("serve", [silent, greeting, rejecting, promising, closing])
def test_a_server_that_is_no_redis_costs_a_run_half_a_second_at_most(serve: Callable[[socket.socket], None]) -> None:
    with OpenAIServer([*SCRIPT, *SCRIPT]) as model, server(serve) as (url, connections):
        bare_s = seconds_of(model, None)
        seconds = seconds_of(model, url)

    assert len(connections) == 1
    assert seconds < bare_s + PATIENCE_S + SLACK_S


def test_a_closed_port_is_told_of_once_and_without_the_password(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    with OpenAIServer(SCRIPT) as model, caplog.at_level(logging.DEBUG):
        seconds_of(model, f"redis://:{PASSWORD}@127.0.0.1:{port}/0")

    told = [record.getMessage() for record in caplog.records if record.name == "agent_fsm.response_cache"]
    assert told == [f"response cache at 127.0.0.1:{port} is not used: ConnectionError"]
    assert PASSWORD not in caplog.text


@needs_redis
def test_a_wrong_password_costs_no_run(url: str, caplog: pytest.LogCaptureFixture) -> None:
    wrong = url.replace(PASSWORD, "not-the-password")
    with OpenAIServer(SCRIPT) as model:
        seconds_of(model, wrong)

    assert len(model.requests) == 2
    assert "is not used" in caplog.text and "not-the-password" not in caplog.text


def test_a_run_ends_in_time_though_cache_and_model_are_silent() -> None:
    with OpenAIServer([HANG]) as model, server(silent) as (url, _):
        result = run(model, url, max_wallclock_seconds=1.0, closing_summary=False)

    assert result.stopped_reason == "max_wallclock"
    assert result.seconds < 1.0 + SLACK_S


def test_a_run_that_is_cancelled_in_the_cache_is_over_at_once() -> None:
    async def cancelled(settings: AgentConfig) -> float:
        client = LiteLLMClient(settings)
        began = time.monotonic()
        task = asyncio.create_task(client.complete(REQUEST))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await client.aclose()
        return time.monotonic() - began

    with OpenAIServer(["hello"]) as model, server(silent) as (url, _):
        seconds = asyncio.run(cancelled(config(model, url)))

    assert seconds < PATIENCE_S + SLACK_S
    assert model.requests == []


# Settings


@pytest.mark.parametrize(
    "given",
    ["redis://a", "redis://:word@127.0.0.1:6379/0", "rediss://me:word@a.example:1/15", "redis://[::1]:6379", None],
)
def test_a_url_of_redis_is_taken(given: str | None) -> None:
    assert AgentConfig(response_cache=given).response_cache == given


@pytest.mark.parametrize(
    "given",
    [
        *(
            "",
            "a",
            "redis:",
            "redis://",
            "http://a",
            "unix:///a",
            f"redis://:{PASSWORD}@",
            f"redis://:{PASSWORD}@a:x/0",
        ),
        *(
            f"redis://:{PASSWORD}@a:0/0",
            f"redis://:{PASSWORD}@a:99999",
            f"redis://:{PASSWORD}@a/zero",
            "redis://a/0?db=1",
        ),
        *("redis://a/0#1", "redis://a b/0", "redis://a\n", "redis://[::1", 5, True, b"redis://a"),
    ],
)
def test_a_url_of_something_else_is_refused_without_being_repeated(given: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        AgentConfig(response_cache=given)

    assert str(raised.value) == "response_cache must be a URL like redis://:password@host:6379/0, or None"


@pytest.mark.parametrize("user", ["", "me", "me:and@"])
def test_the_password_is_not_shown_with_the_configuration(user: str) -> None:
    shown = repr(AgentConfig(response_cache=f"redis://{user}:{PASSWORD}@127.0.0.1:1/0"))

    assert "response_cache='redis://***@127.0.0.1:1/0'" in shown
    assert PASSWORD not in shown
    assert "response_cache='redis://a'" in repr(AgentConfig(response_cache="redis://a"))


def test_a_missing_package_is_told_with_what_installs_it() -> None:
    program = """
import sys
sys.modules["redis"] = None
from agent_fsm import AgentConfig, EchoMCP, run_agent
try:
    run_agent([{"role": "user", "content": "hi"}], EchoMCP(), AgentConfig(model="gpt-4o", response_cache="redis://a"))
except ValueError as error:
    print(type(error).__name__, error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert ran.stdout.strip() == (
        "ConfigError response_cache needs the package redis: run pip install 'agent-fsm[redis_cache]'"
    )
