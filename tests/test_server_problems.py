"""The one form of refusals, and what is asked of every request."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel

from agent_fsm.errors import ConfigError
from agent_fsm.server.problems import Problem, check_binding, documented, equip, is_loopback, until_disconnect
from tests.serving import serving

TOKEN = "s3cret-token"
MOST = 1_000


class Item(BaseModel):
    count: int


def app_of(token: str | None = None) -> FastAPI:
    app = FastAPI()
    equip(app, token=token, max_body_bytes=MOST)

    @app.get("/healthz")
    async def healthz() -> str:
        return "fine"

    @app.post("/items", responses=documented(422))
    async def items(item: Item) -> int:
        return item.count

    @app.post("/raw")
    async def raw(request: Request) -> int:
        return len(await request.body())

    @app.get("/problem")
    async def refused() -> None:
        raise Problem(409, "taken", "the name \ud800 is taken", retryable=True)

    @app.get("/http")
    async def http() -> None:
        raise HTTPException(503, "later", headers={"Retry-After": "2"})

    @app.get("/bug")
    async def bug() -> None:
        raise RuntimeError(f"the token is {TOKEN}")

    return app


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(app_of()) as url:
        yield url


@pytest.fixture(scope="module")
def guarded_url() -> Iterator[str]:
    with serving(app_of(TOKEN)) as url:
        yield url


def code_of(answer: httpx.Response) -> str:
    """The refusal's code; the body has the one form and nothing else."""
    body = answer.json()
    assert list(body) == ["error"]
    assert {name: type(value) for name, value in body["error"].items()} == {
        "code": str,
        "message": str,
        "retryable": bool,
    }
    return str(body["error"]["code"])


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("method", "path", "more", "refusal"),
    [
        ("GET", "/nowhere", {}, (404, "not_found")),
        ("GET", "/items", {}, (405, "method_not_allowed")),
        ("POST", "/items", {"content": "{", "headers": JSON}, (400, "invalid_json")),
        ("POST", "/items", {"content": b'"\xff"', "headers": JSON}, (400, "bad_request")),
        ("POST", "/items", {"content": "[" * 900, "headers": JSON}, (400, "invalid_json")),
        ("POST", "/items", {"json": {"count": "many"}}, (422, "invalid_request")),
        ("POST", "/items", {"json": [1]}, (422, "invalid_request")),
        ("POST", "/items", {}, (422, "invalid_request")),
        ("POST", "/items", {"content": b"x" * (MOST + 1)}, (413, "too_large")),
        ("POST", "/items", {"content": (b"x" * 500 for _ in range(3))}, (413, "too_large")),
        ("GET", "/problem", {}, (409, "taken")),
        ("GET", "/http", {}, (503, "unavailable")),
        ("GET", "/bug", {}, (500, "internal_error")),
        ("GET", "/healthz/", {"headers": {"Host": "evil.example"}}, (403, "host_not_allowed")),
        ("GET", "/problem", {"headers": {"Host": "["}}, (403, "host_not_allowed")),
        ("GET", "/problem", {"headers": {"Origin": "http://evil.example"}}, (403, "origin_not_allowed")),
        ("GET", "/problem", {"headers": {"Origin": "null"}}, (403, "origin_not_allowed")),
        ("GET", "/problem", {"headers": {"X-Forwarded-For": "192.0.2.1"}}, (403, "token_required")),
    ],
)
def test_every_refusal_has_the_one_form(
    url: str, method: str, path: str, more: dict[str, Any], refusal: tuple[int, str]
) -> None:
    answer = httpx.request(method, url + path, **more)

    assert (answer.status_code, code_of(answer)) == refusal


def test_a_refusal_keeps_its_headers(url: str) -> None:
    assert httpx.get(f"{url}/http").headers["Retry-After"] == "2"
    assert httpx.get(f"{url}/items").headers["Allow"] == "POST"


def test_a_fault_of_ours_tells_nothing_of_itself(url: str) -> None:
    assert TOKEN not in httpx.get(f"{url}/bug").text


def test_what_is_wrong_is_named_but_not_repeated(url: str) -> None:
    answer = httpx.post(f"{url}/items", json={"count": TOKEN})

    assert "count: " in answer.json()["error"]["message"]
    assert TOKEN not in answer.text


@pytest.mark.parametrize("size", [0, MOST])
def test_a_body_at_the_limit_is_read_whole(url: str, size: int) -> None:
    assert httpx.post(f"{url}/raw", content=b"x" * size).json() == size


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:80", "LOCALHOST:8080", "[::1]:80"])
def test_a_loopback_name_is_answered_without_a_token(url: str, host: str) -> None:
    headers = {"Host": host, "Origin": f"http://{host}"}

    assert httpx.get(f"{url}/problem", headers=headers).status_code == 409


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "Bearer wrong")],
        [("Authorization", f"Basic {TOKEN}")],
        [("Authorization", TOKEN)],
        [("Authorization", f"Bearer {TOKEN}x")],
        [("Authorization", f"Bearer {TOKEN[:-1]}")],
        [("Authorization", b"Bearer \xff")],
        [("Authorization", f"Bearer {TOKEN}"), ("Authorization", "Bearer wrong")],
    ],
)
def test_without_the_token_nothing_is_answered(guarded_url: str, headers: list[tuple[str, str]]) -> None:
    answer = httpx.get(f"{guarded_url}/nowhere", headers=headers)

    assert (answer.status_code, code_of(answer)) == (401, "unauthorized")
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert TOKEN not in answer.text


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_with_the_token_any_host_may_ask(guarded_url: str, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {TOKEN}", "Host": "agent.example", "Origin": "https://page.example"}

    assert httpx.get(f"{guarded_url}/problem", headers=headers).status_code == 409


def test_an_open_path_needs_neither_token_nor_name(url: str, guarded_url: str) -> None:
    answers = [httpx.get(f"{each}/healthz", headers={"Host": "probe.example"}) for each in (url, guarded_url)]

    assert [answer.status_code for answer in answers] == [200, 200]


def test_a_body_is_not_read_before_the_token_is_seen(guarded_url: str) -> None:
    answer = httpx.post(f"{guarded_url}/items", content=b"x" * (MOST + 1))

    assert answer.status_code == 401


@pytest.mark.parametrize("server", [("10.0.0.1", 80), ("/run/agent.sock", None), None])
def test_without_a_token_only_what_came_to_loopback_is_answered(server: Any) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/problem", "query_string": b"", "server": server}
    asyncio.run(app_of()({**scope, "headers": [(b"host", b"localhost")]}, receive, send))

    assert sent[0]["status"] == 403
    assert json.loads(sent[1]["body"])["error"]["code"] == "token_required"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "[::1]", "localhost", "::ffff:127.0.0.1"])
def test_loopback_needs_no_token(host: str) -> None:
    assert is_loopback(host)
    check_binding(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "127.0.0.1.example", "localhost.example"])
def test_beyond_loopback_a_token_is_needed(host: str) -> None:
    check_binding(host, TOKEN)

    for token in (None, ""):
        with pytest.raises(ConfigError, match="takes a token"):
            check_binding(host, token)


def test_a_client_that_goes_away_cancels_its_work() -> None:
    app = FastAPI()
    equip(app, token=None, max_body_bytes=MOST)
    began, ended = threading.Event(), threading.Event()
    given: list[object] = []

    async def work() -> str:
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            ended.set()
        return "done"

    @app.post("/work")
    async def route(request: Request) -> None:
        given.append(await until_disconnect(request, work()))

    with serving(app) as url:
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"POST /work HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
            assert began.wait(5)
        assert ended.wait(5)

    assert given == [None]


def test_work_that_ends_first_is_given_or_raised() -> None:
    app = FastAPI()
    equip(app, token=None, max_body_bytes=MOST)

    async def work(fails: bool) -> str:
        if fails:
            raise Problem(409, "taken", "it is taken")
        return "done"

    @app.get("/work")
    async def route(request: Request, fails: bool) -> str | None:
        return await until_disconnect(request, work(fails))

    with serving(app) as url:
        answers = [httpx.get(f"{url}/work", params={"fails": fails}) for fails in (False, True)]

    assert [answer.status_code for answer in answers] == [200, 409]
    assert answers[0].json() == "done"
