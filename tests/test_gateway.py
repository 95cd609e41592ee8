"""What our gateway does beyond the contract: MCP itself, limits, and how it begins and ends."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from agent_fsm.errors import ConfigError
from agent_fsm.server.gateway import create_app, serve
from tests.gateway_server import PNG, TOOLS
from tests.gateways import children_of, is_running, running_gateway, serving, text_of_config

SERVER = str(Path(__file__).with_name("gateway_server.py"))
TOKEN = "gateway-token-27182818"
SLACK_S = 5.0
"""For what should happen at once, on a machine that is busy."""

T = TypeVar("T")


def spec(*args: str, **more: Any) -> dict[str, Any]:
    return {"command": sys.executable, "args": [SERVER, *args], **more}


@asynccontextmanager
async def gateway(**settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of a gateway with one server, `one`, unless `servers` says which."""
    servers = settings.pop("servers", {"one": spec()})
    headers = {"Authorization": f"Bearer {settings['token']}"} if "token" in settings else {}
    async with (
        serving(create_app(servers, **settings)) as url,
        httpx.AsyncClient(base_url=url, headers=headers, timeout=30) as client,
    ):
        yield client


def alone(test: Callable[[httpx.AsyncClient], Awaitable[T]], **settings: Any) -> T:
    """Return what *test* returns, given a client of a gateway."""

    async def run() -> T:
        async with gateway(**settings) as client:
            return await test(client)

    return asyncio.run(run())


def invocation(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


async def until(is_so: Callable[[], bool]) -> bool:
    """Whether it is so, now or soon."""
    async with asyncio.timeout(SLACK_S):
        while not is_so():  # noqa: ASYNC110 - another process makes it so
            await asyncio.sleep(0.02)
    return True


# MCP


@pytest.mark.parametrize("mode", ["legacy", "2026-07-28"])
def test_the_gateway_is_an_mcp_server_of_either_era(mode: str) -> None:
    async def ask(client: httpx.AsyncClient) -> tuple[list[str], Any, Any, Any, Any]:
        async with Client(streamable_http_client(str(client.base_url.join("/mcp"))), mode=mode) as mcp:
            listed = await mcp.list_tools()
            return (
                [f"{tool.name} {tool.annotations and tool.annotations.read_only_hint}" for tool in listed.tools],
                await mcp.call_tool("one__add", {"a": 1, "b": 2}),
                await mcp.call_tool("one__picture", {}),
                await mcp.call_tool("one__fail", {}),
                await mcp.call_tool("one__echo", {"text": 1}),
            )

    names, added, picture, failed, refused = alone(ask)

    assert names == [f"one__{each['name']} {True if each['name'] == 'echo' else None}" for each in TOOLS]
    assert (added.structured_content, added.content[0].text, added.is_error) == ({"total": 3}, '{"total": 3}', False)
    assert [(each.type, getattr(each, "data", None)) for each in picture.content] == [("text", None), ("image", PNG)]
    assert (failed.content[0].text, failed.is_error) == ("it did not work", True)
    assert refused.content[0].text == "error: arguments.text: must be of type string"


@pytest.mark.parametrize("mode", ["legacy", "2026-07-28"])
def test_an_mcp_client_that_goes_away_cancels_its_call(mode: str, tmp_path: Path) -> None:
    log = tmp_path / "log"

    async def go_away(client: httpx.AsyncClient) -> bool:
        async with Client(streamable_http_client(str(client.base_url.join("/mcp"))), mode=mode) as mcp:
            call = asyncio.create_task(mcp.call_tool("one__wait", {"seconds": 30, "key": "x"}))
            await until(lambda: log.exists() and "began x" in log.read_text())
            call.cancel()
            return await until(lambda: "cancelled x" in log.read_text())

    assert alone(go_away, servers={"one": spec("--log", str(log))})


@pytest.mark.parametrize(
    ("token", "headers", "expected"),
    [
        (None, {"Origin": "https://evil.example"}, 403),
        (None, {"Host": "evil.example"}, 403),
        (TOKEN, {"Origin": "https://evil.example"}, 403),
        (TOKEN, {"Origin": "null"}, 403),
        (TOKEN, {"Authorization": "Bearer other"}, 401),
        (TOKEN, {"Origin": "http://localhost:3000"}, 200),
        (None, {}, 200),
    ],
)
def test_mcp_is_behind_the_token_and_closed_to_foreign_pages(
    token: str | None, headers: dict[str, str], expected: int
) -> None:
    params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "x", "version": "1"}}
    hello = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}

    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        accept = {"Accept": "application/json, text/event-stream"}
        return await client.post("/mcp", json=hello, headers={**accept, **headers})

    answer = alone(ask, **({} if token is None else {"token": token}), servers={})

    assert answer.status_code == expected


# Limits


def test_one_call_too_many_is_refused_and_one_fewer_is_not(tmp_path: Path) -> None:
    log = tmp_path / "log"

    async def ask(client: httpx.AsyncClient) -> tuple[httpx.Response, httpx.Response]:
        first = asyncio.create_task(client.post("/invoke", json=invocation("one__wait", seconds=1, key="x")))
        await until(lambda: log.exists() and "began x" in log.read_text())
        refused = await client.post("/invoke", json=invocation("one__echo", text="x"))
        await first
        return refused, await client.post("/invoke", json=invocation("one__echo", text="x"))

    refused, then = alone(ask, servers={"one": spec("--log", str(log))}, max_calls=1)

    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert refused.json()["error"]["retryable"] is True
    assert then.json()["text"] == "x"


@pytest.mark.parametrize(("more", "expected"), [(0, 404), (1, 413)])
def test_the_limit_of_a_body_is_the_last_byte_that_is_read(more: int, expected: int) -> None:
    body = json.dumps({"name": "x", "arguments": {"a": "x" * (1_000 + more - 37)}}).encode()
    assert len(body) == 1_000 + more

    answer = alone(lambda client: client.post("/invoke", content=body), max_body_bytes=1_000, servers={"one": spec()})

    assert answer.status_code == expected


# Listing


def test_the_tools_are_sent_once_as_long_as_they_are_the_same() -> None:
    async def ask(client: httpx.AsyncClient) -> tuple[httpx.Response, httpx.Response, httpx.Response]:
        first = await client.get("/tools")
        again = await client.get("/tools", headers={"If-None-Match": first.headers["etag"]})
        other = await client.get("/tools", headers={"If-None-Match": '"other"'})
        return first, again, other

    first, again, other = alone(ask)

    assert (first.status_code, len(first.json())) == (200, len(TOOLS))
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert other.content == first.content


def test_without_a_living_server_there_are_no_tools_and_a_reason() -> None:
    async def ask(client: httpx.AsyncClient) -> tuple[httpx.Response, httpx.Response, httpx.Response]:
        call = client.post("/invoke", json=invocation("gone__echo", text="x"))
        return await client.get("/tools"), await call, await client.get("/health")

    tools, call, health = alone(ask, servers={"gone": {"command": "/nowhere/to/be/found"}})

    assert (tools.status_code, tools.json()["error"]["retryable"]) == (503, True)
    assert "gone" in tools.json()["error"]["message"]
    assert call.status_code == 503
    assert (health.status_code, health.json()["status"]) == (200, "failed")


def test_the_document_tells_of_every_route_but_mcp() -> None:
    answer = alone(lambda client: client.get("/openapi.json"), servers={})

    assert sorted(answer.json()["paths"]) == ["/health", "/healthz", "/invoke", "/tools"]
    assert "422" in answer.json()["paths"]["/invoke"]["post"]["responses"]


def test_tools_that_are_near_are_named_for_one_that_is_not_there() -> None:
    answer = alone(lambda client: client.post("/invoke", json=invocation("one_picture")))

    assert answer.json()["error"]["message"] == "there is no such tool; did you mean one__picture?"


# Beginning and ending


def test_the_servers_start_with_the_gateway_and_not_with_the_first_request() -> None:
    async def ask(client: httpx.AsyncClient) -> Any:
        async with asyncio.timeout(SLACK_S):
            while (body := (await client.get("/health")).json())["status"] != "ok":  # noqa: ASYNC110 - it is asked
                await asyncio.sleep(0.05)
        return body["servers"]

    assert alone(ask) == {"one": {"state": "ready", "error": "", "tools": len(TOOLS), "restarts": 0}}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 0)])
def test_a_signal_closes_the_gateway_and_every_server(
    tmp_path: Path, pytestconfig: pytest.Config, number: signal.Signals, code: int
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(text_of_config({"one": spec(), "two": {**spec(), "nonsense": 1}}))
    cache = pytestconfig.cache
    assert cache is not None
    with running_gateway("python", config, cache, {}) as (url, process):
        assert len(httpx.get(f"{url}/tools", timeout=30).json()) == 2 * len(TOOLS)
        children = children_of(process.pid)

        os.kill(process.pid, number)

        assert process.wait(10) == code
    assert len(children) == 2
    assert asyncio.run(until(lambda: not any(map(is_running, children))))


def test_a_file_that_is_wrong_or_an_open_door_is_refused_before_anything_starts(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[mcp_servers.one]\n")

    with pytest.raises(ConfigError, match="neither command nor url"):
        serve(config)
    with pytest.raises(ConfigError, match="takes a token"):
        serve(config, host="0.0.0.0")
