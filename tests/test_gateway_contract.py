"""The contract of tools gateways, kept by ours and by the one in Node: the same files, answers and refusals."""

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from attrs import frozen

from tests.gateway_server import PNG, TOOLS
from tests.gateways import running_gateway, text_of_config

TOKEN = "gateway-token-27182818"
SECRET = "server-secret-31415926"
SERVER = str(Path(__file__).with_name("gateway_server.py"))
CANCEL_S = 5.0
"""Slack for a cancel to reach the server, on a machine that is busy."""


@frozen
class Gateway:
    kind: str
    url: str
    log: Path

    def client(self, token: str | None = TOKEN) -> httpx.Client:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30)

    def invoke(self, name: str, arguments: Any = None, **headers: str) -> httpx.Response:
        with self.client() as client:
            return client.post("/invoke", json={"name": name, "arguments": arguments}, headers=headers)

    def logged(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    async def log_has(self, line: str) -> bool:
        """Whether *line* is logged, now or soon."""
        async with asyncio.timeout(CANCEL_S):
            while line not in self.logged():  # noqa: ASYNC110 - another process writes it
                await asyncio.sleep(0.02)
        return True


@pytest.fixture(scope="module", params=["python", "node"])
def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp(request.param)
    log = folder / "log"
    config = folder / "config.toml"
    plain = {"command": sys.executable, "args": [SERVER]}
    logging = {"command": sys.executable, "args": [SERVER, "--log", str(log)]}
    config.write_text(
        text_of_config(
            {
                "one": {**logging, "env": {"SOME_TOKEN": "${SERVER_SECRET}"}},
                "two.dots": {**plain, "enabled_tools": ["echo", "add"], "disabled_tools": ["add"]},
                "short": {**logging, "tool_timeout_sec": 0.3, "enabled_tools": ["wait", "echo"]},
                "mortal": {**plain, "enabled_tools": ["die", "echo"]},
                "dead": {"command": "/nowhere/to/be/found"},
                "off": {**plain, "enabled": False},
            }
        )
    )
    cache = pytestconfig.cache
    assert cache is not None
    environ = {"GATEWAY_TOKEN": TOKEN, "SERVER_SECRET": SECRET}
    with running_gateway(request.param, config, cache, environ) as (url, _):
        yield Gateway(request.param, url, log)


def problem(answer: httpx.Response) -> tuple[int, str, bool]:
    """The status, the code and whether it is worth another try, of a refusal in the one form."""
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"code", "message", "retryable"}
    assert answer.headers["content-type"].startswith("application/json")
    return answer.status_code, body["error"]["code"], body["error"]["retryable"]


def listed(server: str, tool: str, name: str | None = None) -> dict[str, Any]:
    """A tool of the test server as a gateway should list it."""
    (found,) = [each for each in TOOLS if each["name"] == tool]
    parameters = {key: value for key, value in found["inputSchema"].items() if key != "$schema"}
    function = {
        "name": name or f"{server}__{tool}",
        "description": found["description"],
        "parameters": parameters,
    }
    hints = {"annotations": found["annotations"]} if "annotations" in found else {}
    return {"type": "function", "function": function, **hints}


def test_the_tools_of_all_servers_are_listed_and_a_dead_one_hides_none(gateway: Gateway) -> None:
    with gateway.client() as client:
        answer = client.get("/tools")

    expected = [
        *(listed("one", each["name"]) for each in TOOLS),
        listed("two.dots", "echo", "two_dots__echo_8066ed50"),
        listed("short", "echo"),
        listed("short", "wait"),
        listed("mortal", "echo"),
        listed("mortal", "die"),
    ]
    assert answer.status_code == 200
    assert answer.json() == expected


def test_health_says_how_each_server_is(gateway: Gateway) -> None:
    with gateway.client() as client:
        client.get("/tools")
        body = client.get("/health").json()

    states = {name: (each["state"], each["tools"]) for name, each in body["servers"].items()}
    assert body["status"] == "degraded"
    assert states["one"] == ("ready", len(TOOLS))
    assert states["two.dots"] == ("ready", 1)
    assert states["dead"][0] in ("failed", "restarting")
    assert "/nowhere/to/be/found" in body["servers"]["dead"]["error"]
    assert "off" not in states


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("one__echo", {"text": "hello"}, {"text": "hello", "content": [], "isError": False}),
        ("one__echo", '{"text": "größe 🙂"}', {"text": "größe 🙂", "content": [], "isError": False}),
        ("two_dots__echo_8066ed50", {"text": ""}, {"text": "", "content": [], "isError": False}),
        (
            "one__add",
            {"a": 1, "b": 2},
            {"text": '{"total": 3}', "content": [], "structuredContent": {"total": 3}, "isError": False},
        ),
        ("one__fail", None, {"error": "it did not work", "content": [], "isError": True}),
        ("one__fail", "", {"error": "it did not work", "content": [], "isError": True}),
        (
            "one__picture",
            {},
            {
                "text": "a dot\n[image image/png, 70 bytes]",
                "content": [{"type": "image", "data": PNG, "mimeType": "image/png"}],
                "isError": False,
            },
        ),
    ],
)
def test_a_call_is_answered(gateway: Gateway, name: str, arguments: Any, expected: dict[str, Any]) -> None:
    answer = gateway.invoke(name, arguments)

    assert (answer.status_code, answer.json()) == (200, expected)


def test_a_secret_of_a_server_is_not_told(gateway: Gateway) -> None:
    answer = gateway.invoke("one__secret", {})

    assert answer.json() == {"text": "***", "content": [], "isError": False}


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN}x",
        f"Basic {TOKEN}",
        TOKEN,
        "Bearer größe",
    ],
)
@pytest.mark.parametrize("path", ["/tools", "/health", "/nowhere"])
def test_who_has_not_the_token_is_told_nothing(gateway: Gateway, given: str | None, path: str) -> None:
    with gateway.client(None) as client:
        headers = [] if given is None else [(b"Authorization", given.encode())]
        answer = client.get(path, headers=headers)

    assert problem(answer) == (401, "unauthorized", False)
    assert answer.headers["www-authenticate"] == "Bearer"


def test_whether_the_gateway_is_up_is_told_to_everybody(gateway: Gateway) -> None:
    with gateway.client(None) as client:
        answer = client.get("/healthz")

    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    "name", ["one__nothing", "two_dots__add", "off__echo", "dead__echo", "", "echo", "\0", "x" * 9_000]
)
def test_a_tool_that_is_not_offered_is_not_found(gateway: Gateway, name: str) -> None:
    answer = gateway.invoke(name, {"text": "x", "a": 1, "b": 2})

    assert problem(answer) == (404, "unknown_tool", False)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"text": 1}, {"text": "x", "more": 1}, '{"text": ', "[]", '"text"', {"text": None}, '{"text": NaN}'],
)
def test_arguments_that_do_not_fit_never_reach_the_server(gateway: Gateway, arguments: Any) -> None:
    before = gateway.logged()

    answer = gateway.invoke("one__echo", arguments)

    assert problem(answer) == (422, "invalid_arguments", False)
    assert "argument" in answer.json()["error"]["message"]
    assert gateway.logged() == before


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{", (400, "invalid_json", False)),
        (b"", (400, "invalid_json", False)),
        (b"\xff", (400, "invalid_json", False)),
        (b"[" * 100_000, (400, "invalid_json", False)),
        (b"[]", (422, "invalid_request", False)),
        (b"{}", (422, "invalid_request", False)),
        (b'{"name": 1}', (422, "invalid_request", False)),
        (b'{"name": "x", "arguments": {"a": "' + b"x" * 1_000_001 + b'"}}', (413, "too_large", False)),
    ],
)
def test_a_body_that_is_no_call_is_refused(gateway: Gateway, body: bytes, expected: tuple[int, str, bool]) -> None:
    with gateway.client() as client:
        answer = client.post("/invoke", content=body, headers={"Content-Type": "application/json"})

    assert problem(answer) == expected


@pytest.mark.parametrize("deadline", ["soon", "", "NaN", "1e3x", "inf"])
def test_a_deadline_that_is_no_number_is_refused(gateway: Gateway, deadline: str) -> None:
    answer = gateway.invoke("one__echo", {"text": "x"}, **{"X-Deadline-Ms": deadline})

    assert problem(answer) == (422, "invalid_request", False)


def test_the_wrong_method_and_path_are_refused(gateway: Gateway) -> None:
    with gateway.client() as client:
        found = [problem(client.get("/invoke")), problem(client.post("/tools")), problem(client.get("/nowhere"))]

    assert found == [
        (405, "method_not_allowed", False),
        (405, "method_not_allowed", False),
        (404, "not_found", False),
    ]


def test_a_call_that_takes_longer_than_its_server_may_is_cancelled(gateway: Gateway) -> None:
    answer = gateway.invoke("short__wait", {"seconds": 30, "key": "timeout"})

    assert problem(answer) == (504, "timeout", False)
    assert asyncio.run(gateway.log_has("cancelled timeout"))


def test_a_call_that_takes_longer_than_its_caller_waits_is_cancelled(gateway: Gateway) -> None:
    answer = gateway.invoke("one__wait", {"seconds": 30, "key": "deadline"}, **{"X-Deadline-Ms": "300"})

    assert problem(answer) == (504, "timeout", False)
    assert asyncio.run(gateway.log_has("cancelled deadline"))


@pytest.mark.parametrize("deadline", ["0", "-5"])
def test_a_call_whose_deadline_is_over_is_not_sent(gateway: Gateway, deadline: str) -> None:
    before = gateway.logged()

    answer = gateway.invoke("one__echo", {"text": "x"}, **{"X-Deadline-Ms": deadline})

    assert answer.status_code == 504
    assert gateway.logged() == before


def test_a_client_that_goes_away_cancels_its_call_and_no_other(gateway: Gateway) -> None:
    async def go_away() -> httpx.Response:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(base_url=gateway.url, headers=headers, timeout=30) as other:
            wait = {"name": "one__wait", "arguments": {"seconds": 1, "key": "stays"}}
            stays = asyncio.create_task(other.post("/invoke", json=wait))
            async with httpx.AsyncClient(base_url=gateway.url, headers=headers) as client:
                wait = {"name": "one__wait", "arguments": {"seconds": 30, "key": "goes"}}
                goes = asyncio.create_task(client.post("/invoke", json=wait))
                await gateway.log_has("began goes")
                goes.cancel()
            await gateway.log_has("cancelled goes")
            return await stays

    answer = asyncio.run(go_away())

    assert answer.json()["text"] == "waited for stays"


def test_a_server_that_dies_in_a_call_is_told_and_started_again(gateway: Gateway) -> None:
    answer = gateway.invoke("mortal__die", {})
    again = [gateway.invoke("mortal__echo", {"text": "back"}) for _ in range(1)]
    for _ in range(50):
        if again[-1].status_code == 200:
            break
        again.append(gateway.invoke("mortal__echo", {"text": "back"}))
        asyncio.run(asyncio.sleep(0.1))

    assert problem(answer)[:2] == (502, "server_died")
    assert "outcome unknown" in answer.json()["error"]["message"]
    assert again[-1].json()["text"] == "back"
    assert {each.status_code for each in again[:-1]} <= {503}


def test_the_answers_are_json_of_the_one_form_for_what_nobody_expects(gateway: Gateway) -> None:
    with gateway.client() as client:
        answers = [
            client.request("PURGE", "/tools"),
            client.get("/tools/"),
            client.get("/invoke/../tools%00"),
            client.post("/invoke", content=json.dumps({"name": ["x"]}), headers={"Content-Type": "application/json"}),
        ]

    assert [problem(each)[0] // 100 for each in answers] == [4, 4, 4, 4]
