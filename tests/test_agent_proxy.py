"""The agent by URL. `python -m tests.test_agent_proxy` prints the table of refused requests."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest
import schemathesis
from attrs import frozen
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from agent_fsm import AgentConfig
from agent_fsm.errors import ConfigError
from agent_fsm.server.agent import create_app, serve
from agent_fsm.server.request import OPERATOR_ONLY, request_model
from agent_fsm.server.settings import CEILINGS, ServerSettings, settings_from
from tests.openai_server import OpenAIServer
from tests.serving import serving
from tests.test_cli import tool_process
from tests.tools_gateway import ToolsGateway, tool

TOKEN = "tok-5f0c2d"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
SAY_HI = [{"role": "user", "content": "Say hi with exec_python then finish."}]
SEED_CURL = """curl -s http://127.0.0.1:8080/agent/run -H 'Content-Type: application/json' -d '{
  "messages": [{"role":"user","content":"Say hi with exec_python then finish."}],
  "model": "gpt-4o-mini",
  "tool_backend": "echo"
}'"""
"""The seed's example, as typed but for the comment in its JSON."""

OPEN = ServerSettings(defaults=AgentConfig(completion_kwargs={"api_key": "sk-operator"}))
GUARDED = ServerSettings(token=TOKEN)
NARROW = ServerSettings(
    token=TOKEN,
    allowed_backends=("echo", "http", "local"),
    allowed_tool_hosts=("tools.example:8080", "169.254.169.254", "localhost"),
    allowed_models=("offline",),
    allowed_image_hosts=("images.example",),
    ceilings={"max_iterations": 5, "max_cost_usd": 1.5},
    max_body_bytes=10_000,
)
CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance, content_type_conformance]
APPS = {"open": OPEN, "guarded": GUARDED, "narrow": NARROW}


def asked(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/agent/run", json={"messages": SAY_HI, "model": "offline", **body}, timeout=60)


@pytest.fixture(scope="module")
def urls() -> Iterator[Mapping[str, str]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(serving(create_app(settings))) for name, settings in APPS.items()}


# What is refused


@frozen
class Refused:
    """A request and what it is answered with."""

    what: str
    app: str
    status: int
    code: str
    gist: str
    """What the message says, in part."""
    body: Mapping[str, Any] | bytes | None = None
    """JSON is added to a body that would be fine."""
    headers: Mapping[str, str] = {}
    """Beside token and type, or in their place; an empty one is left out."""
    path: str = "/agent/run"
    method: str = "POST"


def http(url: str | None, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
    return {"tool_backend": "http", "tool_http_base_url": url, "tool_http_headers": headers}


LOCAL = "http://localhost:1"
METADATA = "http://169.254.169.254/latest"
IMAGE = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": METADATA}}]
WITH_IMAGE = {"messages": [{"role": "user", "content": IMAGE}]}
NO_ROLE = {"messages": [{"content": "hi"}]}
DEEP = {"messages": [{"role": "user", "content": json.loads("[" * 70 + "]" * 70)}]}
NAN = {"max_wallclock_seconds": float("nan")}
ELSEWHERE = {"completion_kwargs": {"api_base": "http://127.0.0.1:1"}}
OWN_HEADERS: Mapping[str, Any] = {"completion_kwargs": {"extra_headers": {}}}
PRICE = {"reply_usd_per_token": 0}
MANY = {f"X-{number}": "" for number in range(21)}

REFUSED = (
    # who may ask
    Refused("no token", "guarded", 401, "unauthorized", "takes a bearer token", {}, {"Authorization": ""}),
    Refused("a wrong token", "guarded", 401, "unauthorized", "not the right one", {}, {"Authorization": "Bearer x"}),
    Refused("a foreign Host, no token set", "open", 403, "host_not_allowed", "localhost", {}, {"Host": "a.example"}),
    Refused("a foreign Origin, no token set", "open", 403, "origin_not_allowed", "page", {}, {"Origin": "http://a.b"}),
    # what is no request
    Refused("an unknown path", "open", 404, "not_found", "Not Found", {}, path="/agent/walk"),
    Refused("GET", "open", 405, "method_not_allowed", "Method Not Allowed", None, method="GET"),
    Refused("no JSON", "open", 400, "invalid_json", "at character 1", b"{,}"),
    Refused("a comment in the JSON", "open", 400, "invalid_json", "at character", b'{"model": "x" // or\n}'),
    Refused("more bytes than are read", "narrow", 413, "too_large", "10000 bytes", b" " * 10_001),
    Refused("no messages", "open", 422, "invalid_request", "messages: ", {"messages": []}),
    Refused("a message without role", "open", 422, "invalid_request", "message 0", NO_ROLE),
    Refused("lists in lists in lists ...", "open", 422, "invalid_request", "64 levels deep", DEEP),
    Refused("a field misspelt", "open", 422, "invalid_request", "nearest is max_iterations", {"max_iteration": 3}),
    Refused("a number as text", "open", 422, "invalid_request", "max_iterations: ", {"max_iterations": "3"}),
    Refused("a limit out of range", "open", 422, "invalid_request", "whole number >= 1", {"max_iterations": 0}),
    Refused("a limit that is NaN", "open", 422, "invalid_request", "finite", NAN),
    # how much
    Refused("above a ceiling", "narrow", 422, "above_ceiling", "6 is above", {"max_iterations": 6}),
    Refused("no limit where a ceiling is", "narrow", 422, "above_ceiling", "no limit", {"max_cost_usd": None}),
    Refused("own prices under a cost ceiling", "narrow", 422, "above_ceiling", "operator", PRICE),
    Refused("the operator's own setting", "open", 422, "invalid_request", "operator", {"response_cache": "redis://a"}),
    # with what
    Refused("a model not allowed", "narrow", 403, "model_not_allowed", "allowed: offline", {"model": "gpt-4o-mini"}),
    Refused("a fallback not allowed", "narrow", 403, "model_not_allowed", "'gpt-5'", {"fallback_models": ["gpt-5"]}),
    Refused("a URL as model", "open", 403, "model_not_allowed", "URL", {"model": "huggingface/http://a.example"}),
    Refused("an argument not passed on", "open", 422, "invalid_request", "'extra_headers'", OWN_HEADERS),
    Refused("a backend not allowed", "guarded", 403, "backend_not_allowed", "allowed: echo", {"tool_backend": "local"}),
    Refused("mcp, and no file of servers", "open", 403, "backend_not_allowed", "mcp", {"tool_backend": "mcp"}),
    # where to
    Refused("http without a URL", "open", 422, "invalid_request", "needs one", {"tool_backend": "http"}),
    Refused("a URL, but not http", "open", 422, "invalid_request", "not for echo", {"tool_http_base_url": LOCAL}),
    Refused("a host not allowed", "narrow", 403, "host_not_allowed", "10.0.0.8:80", http("http://10.0.0.8")),
    Refused("another port of one that is", "narrow", 403, "host_not_allowed", ":80 ", http("http://tools.example")),
    Refused("a cloud's metadata, even listed", "narrow", 403, "host_not_allowed", "never called", http(METADATA)),
    Refused("a URL with a user", "narrow", 422, "invalid_request", "without a user", http("http://localhost@10.0.0.8")),
    Refused("another scheme", "narrow", 422, "invalid_request", "http://HOST", http("file:///etc/passwd")),
    Refused("an api_base not allowed", "open", 403, "host_not_allowed", "allowed none", ELSEWHERE),
    Refused("an image at a host not allowed", "open", 403, "host_not_allowed", "169.254.169.254", WITH_IMAGE),
    Refused("the header Host", "open", 422, "invalid_request", "'Host'", http(LOCAL, {"Host": "a"})),
    Refused("a header of two lines", "open", 422, "invalid_request", "one line", http(LOCAL, {"X-A": "a\r\nB: c"})),
    Refused("more headers than are sent on", "open", 422, "invalid_request", "more than 20", http(LOCAL, MANY)),
)  # fmt: skip


def answer_to(request: Refused, urls: Mapping[str, str]) -> httpx.Response:
    headers = {**BEARER, "Content-Type": "application/json", **request.headers}
    headers = {name: value for name, value in headers.items() if value}
    body = request.body
    if isinstance(body, Mapping):
        body = json.dumps({"messages": SAY_HI, **body}).encode()
    return httpx.request(request.method, urls[request.app] + request.path, content=body, headers=headers)


@pytest.mark.parametrize("request_", REFUSED, ids=[each.what for each in REFUSED])
def test_what_may_not_be_asked_is_refused_in_one_form(request_: Refused, urls: Mapping[str, str]) -> None:
    answer = answer_to(request_, urls)

    problem = answer.json()["error"]
    assert list(answer.json()) == ["error"] and set(problem) == {"code", "message", "retryable"}
    assert (answer.status_code, problem["code"]) == (request_.status, request_.code)
    assert request_.gist in problem["message"]


# Runs


@contextmanager
def running(url: str, server: int) -> Iterator[tuple[socket.socket, int]]:
    """A run whose tool sleeps until it is killed: the connection that waits for its answer, and the tool's process."""
    task = "Run python: import time; time.sleep(60)"
    body = json.dumps({"messages": [{"role": "user", "content": task}], "model": "offline", "tool_backend": "local"})
    head = "POST /agent/run HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    port = int(url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        yield connection, tool_process(server)


def eventually(holds: Callable[[], bool], within_s: float = 10.0) -> bool:
    end = time.monotonic() + within_s
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(0.02)
    return held


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_a_run_is_answered_with_all_that_it_came_to(urls: Mapping[str, str]) -> None:
    answer = asked(urls["open"], tool_backend="local")

    said = answer.json()
    assert answer.status_code == 200
    assert list(said) == [
        *(
            "final_answer",
            "stopped_reason",
            "detail",
            "messages",
            "iterations",
            "usage",
            "path",
            "used_model",
            "seconds",
        ),
    ]
    assert said["final_answer"].endswith("\nhi")
    assert (said["stopped_reason"], said["iterations"], said["usage"]["tool_calls"]) == ("success", 2, 1)
    assert [message["role"] for message in said["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert (said["path"][0], said["path"][-1]) == ("Plan", "Done")


def test_a_run_that_a_limit_ends_is_answered_too(urls: Mapping[str, str]) -> None:
    answer = asked(urls["open"], tool_backend="local", max_iterations=1, closing_summary=False)

    assert (answer.status_code, answer.json()["stopped_reason"]) == (200, "max_iterations")


def test_without_a_backend_the_model_has_only_an_echo(urls: Mapping[str, str]) -> None:
    messages = [{"role": "user", "content": "Echo: hello"}]

    answer = httpx.post(f"{urls['guarded']}/agent/run", json={"messages": messages}, headers=BEARER)

    assert answer.json()["final_answer"].endswith("\nhello")


@pytest.mark.parametrize("depth", [50, 200, 480, 900, 100_000])
@pytest.mark.parametrize(
    "place",
    [
        '"messages": [{"role": "user", "content": [{"type": "x", "x": %s}]}]',
        '"messages": [{"role": "user", "content": "hi"}], "completion_kwargs": {"stop": %s}',
    ],
)
def test_no_depth_of_nesting_is_too_much_for_the_server(urls: Mapping[str, str], depth: int, place: str) -> None:
    body = "{%s}" % (place % ("[" * depth + "]" * depth))

    answer = httpx.post(f"{urls['open']}/agent/run", content=body, headers={"Content-Type": "application/json"})

    assert answer.status_code in (200, 400, 422)


def test_one_run_too_many_is_refused_and_told_when_to_come_again() -> None:
    with serving(create_app(ServerSettings(max_concurrent_runs=1))) as url:
        with running(url, os.getpid()):
            refused = asked(url)
        taken_again = eventually(lambda: asked(url).status_code == 200)

    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
    assert refused.json()["error"]["code"] == "too_many_runs"
    assert refused.json()["error"]["retryable"]
    assert taken_again


def test_a_client_that_goes_away_ends_its_run_and_the_tools_process(urls: Mapping[str, str]) -> None:
    with running(urls["open"], os.getpid()) as (_, pid):
        assert not gone(pid)

    assert eventually(lambda: gone(pid))


# The command that the seed has


@contextmanager
def uvicorn(*arguments: str, **environ: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """uvicorn as the seed starts it, on a free port: the process and its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "agent_fsm.agent_proxy:app", "--host", "127.0.0.1", "--port", str(port)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AGENT_FSM_", "OPENAI_"))}
    process = subprocess.Popen(
        [*command, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**inherited, **environ},
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        assert eventually(lambda: answers(url), 30.0)
        yield process, url
    finally:
        process.kill()
        process.communicate()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz").status_code == 200
    except httpx.TransportError:
        return False


def curl(command: str, url: str) -> dict[str, Any]:
    done = subprocess.run(
        ["bash", "-c", command.replace("http://127.0.0.1:8080", url)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_the_seeds_command_serves_a_run_and_leaves_nothing_when_it_is_told_to_end() -> None:
    with uvicorn() as (process, url):
        said = curl(SEED_CURL.replace("gpt-4o-mini", "offline"), url)
        with running(url, process.pid) as (connection, pid):
            process.send_signal(signal.SIGTERM)
            status, _, rest = read_all(connection).partition("\r\n")
        code = process.wait(10)

    assert said["stopped_reason"] == "success"
    assert "echo `hi` (exec_python is not offered)" in said["final_answer"]
    assert status == "HTTP/1.1 200 OK"
    assert json.loads(rest.partition("\r\n\r\n")[2])["stopped_reason"] == "cancelled"
    assert gone(pid)
    assert code in (0, -signal.SIGTERM)


def read_all(connection: socket.socket) -> str:
    parts = []
    while part := connection.recv(65_536):
        parts.append(part)
    return b"".join(parts).decode()


@pytest.mark.slow
def test_the_seeds_curl_example_is_answered_by_a_real_run() -> None:
    calls = [[("echo", {"text": "hi"})], "hi"]
    with ExitStack() as stack:
        model = stack.enter_context(OpenAIServer(calls))
        _, url = stack.enter_context(uvicorn(OPENAI_API_KEY="sk-test", OPENAI_API_BASE=model.base_url))
        said = curl(SEED_CURL, url)

    assert (said["final_answer"], said["stopped_reason"], said["used_model"]) == ("hi", "success", "gpt-4o-mini")
    assert [message["role"] for message in said["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert [tool["function"]["name"] for tool in model.requests[0].body["tools"]] == ["echo"]


# Tool backends and secrets


def test_the_tools_of_an_http_gateway_are_called_with_the_headers_of_the_request() -> None:
    headers = {"Authorization": "Bearer tool-token", "X-Tenant": "blue"}
    with ExitStack() as stack:
        gateway = stack.enter_context(ToolsGateway([tool("add")], [{"text": "3"}]))
        model = stack.enter_context(OpenAIServer([[("add", {"a": 1})], "3 it is"]))
        url = stack.enter_context(serving(create_app(asking(model))))
        answer = asked(url, model="gpt-4o-mini", **http(gateway.url, headers))

    assert answer.json()["final_answer"] == "3 it is"
    assert [request.body for request in gateway.invoked] == [{"name": "add", "arguments": {"a": 1}}]
    assert {request.headers["authorization"] for request in gateway.requests} == {"Bearer tool-token"}
    assert {request.headers["x-tenant"] for request in gateway.requests} == {"blue"}


def test_a_gateway_that_does_not_answer_ends_the_run_and_not_the_server(urls: Mapping[str, str]) -> None:
    answer = asked(urls["open"], **http(LOCAL))

    assert (answer.status_code, answer.json()["stopped_reason"]) == (200, "tools_unavailable")


def test_the_servers_of_the_operators_file_are_the_tools_of_the_backend_mcp(tmp_path: Path) -> None:
    file = tmp_path / "servers.json"
    server = {"command": sys.executable, "args": [str(Path(__file__).with_name("chaos_server.py")), "healthy"]}
    file.write_text(json.dumps({"mcpServers": {"calm": server}}))
    with ExitStack() as stack:
        model = stack.enter_context(OpenAIServer(["done"]))
        url = stack.enter_context(serving(create_app(attrs.evolve(asking(model), mcp_config=file))))
        answer = asked(url, model="gpt-4o-mini", tool_backend="mcp")

    assert answer.json()["stopped_reason"] == "success", answer.text
    names = [tool["function"]["name"] for tool in model.requests[0].body["tools"]]
    assert names and all(name.startswith("calm__") for name in names)


def test_a_file_of_servers_that_can_not_be_read_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"servers\.json"):
        create_app(ServerSettings(mcp_config=tmp_path / "servers.json"))


def test_the_backend_research_offers_what_looks_things_up() -> None:
    with ExitStack() as stack:
        model = stack.enter_context(OpenAIServer(["done"]))
        url = stack.enter_context(serving(create_app(asking(model))))
        answer = asked(url, model="gpt-4o-mini", tool_backend="research")

    assert answer.json()["stopped_reason"] == "success"
    names = {tool["function"]["name"] for tool in model.requests[0].body["tools"]}
    assert names and names <= {"research_perplexity", "research_context7_docs"}


def asking(model: OpenAIServer) -> ServerSettings:
    """Settings by which every model is asked at *model*."""
    return ServerSettings(defaults=AgentConfig(completion_kwargs=model.completion_kwargs))


def test_what_is_secret_is_in_no_answer_and_no_log(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    tool_token, key = "tool-9d1f7c", "sk-77aa42c0"
    secrets = (TOKEN, tool_token, key)
    told = f"I was given {', '.join(secrets)}"
    tools = [[tool("look")], (500, {}, {"error": told})]
    bodies: list[str] = []
    caplog.set_level("DEBUG")
    with ExitStack() as stack:
        gateway = stack.enter_context(ToolsGateway(tools[0], [{"text": told}, tools[1]]))
        model = stack.enter_context(OpenAIServer([[("look", {})], [("look", {})], told, (401, {}, {"error": told})]))
        host = model.base_url.removeprefix("http://").partition("/")[0]
        gateway_host = gateway.url.removeprefix("http://")
        settings = ServerSettings(
            token=TOKEN,
            allowed_backends=("echo", "http"),
            allowed_tool_hosts=(gateway_host,),
            allowed_model_hosts=(host,),
        )
        url = stack.enter_context(serving(create_app(settings)))
        body = {
            "messages": SAY_HI,
            "model": "gpt-4o-mini",
            "completion_kwargs": {"api_key": key, "api_base": model.base_url},
            **http(gateway.url, {"X-Custom": tool_token}),
        }
        for more in (
            {},
            {},
            {"max_iterations": 0},
            {"max_iteration": 1},
            {"tool_http_base_url": f"http://{tool_token}"},
        ):
            answer = httpx.post(f"{url}/agent/run", json={**body, **more}, headers=BEARER, timeout=60)
            bodies.append(f"{answer.status_code} {answer.text}")

    out = capfd.readouterr()
    assert [text[:3] for text in bodies] == ["200", "200", "422", "422", "403"]
    assert "I was given" in bodies[0]
    for text in (*bodies, caplog.text, out.out, out.err):
        assert [secret for secret in secrets if secret in text] == []


# Settings, and what a request makes of them


@pytest.mark.parametrize("field", attrs.fields(AgentConfig), ids=lambda field: str(field.name))
def test_of_each_setting_it_is_known_how_far_a_request_may_set_it(field: "attrs.Attribute[Any]") -> None:
    """A new field of AgentConfig belongs in one of these: think through what it may cost, name or reveal."""
    harmless = {
        *("stagnation_window", "enable_repair", "research_on_unsure", "research_after_failures", "summarize_every"),
        *("max_failures_before_research", "max_consecutive_failures", "closing_summary"),
    }
    checked = {"model", "fallback_models", "completion_kwargs", "prompt_usd_per_token", "reply_usd_per_token"}
    kinds = [set(CEILINGS) | {"max_cost_usd"}, harmless, checked, OPERATOR_ONLY]

    assert sum(field.name in kind for kind in kinds) == 1
    assert (field.name in request_model(OPEN).model_fields) == (field.name not in OPERATOR_ONLY)


def test_a_field_that_is_left_out_is_the_operators_default_lowered_to_its_ceiling() -> None:
    defaults = AgentConfig(max_iterations=9, max_tools_per_iter=3, max_history_messages=None)
    settings = ServerSettings(defaults=defaults, ceilings={"max_iterations": 4, "max_cost_usd": 0.5})

    base = settings.base

    assert (base.max_iterations, base.max_tools_per_iter, base.max_cost_usd) == (4, 3, 0.5)
    assert base.max_history_messages == CEILINGS["max_history_messages"]


@pytest.mark.parametrize(
    ("part", "status"),
    [
        ({"type": "text", "text": "http://a.example/x.png"}, 200),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}, 200),
        ({"type": "image_url", "image_url": {"url": "https://images.example/x.png"}}, 200),
        ({"type": "image_url", "image_url": {"url": "https://a.example/x.png"}}, 403),
        ({"type": "image_url", "image_url": "http://169.254.169.254/"}, 403),
        ({"type": "image_url", "image_url": {"url": "/etc/passwd"}}, 422),
        ({"type": "file", "file": {"file_data": "file:///etc/passwd"}}, 422),
        ({"type": "file", "file": {"file_id": "gs://bucket/x"}}, 422),
        ({"type": "image", "source": {"type": "url", "url": "http://a.example"}}, 403),
        ({"type": "new", "new": [{"where": "ftp://a.example"}]}, 422),
    ],
)
def test_a_message_names_only_images_and_files_that_may_be_fetched(
    urls: Mapping[str, str], part: Any, status: int
) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "look"}, part]}]

    answer = httpx.post(f"{urls['narrow']}/agent/run", json={"messages": messages}, headers=BEARER)

    assert answer.status_code == status


@pytest.mark.parametrize(("iterations", "status"), [(1, 200), (5, 200), (6, 422)])
def test_a_request_may_go_up_to_the_ceiling_and_not_beyond(
    urls: Mapping[str, str], iterations: int, status: int
) -> None:
    body = {"messages": SAY_HI, "max_iterations": iterations}

    assert httpx.post(f"{urls['narrow']}/agent/run", json=body, headers=BEARER).status_code == status


def test_with_a_token_nothing_is_allowed_but_an_echo_and_without_one_all_on_this_machine() -> None:
    file = Path("servers.json")

    assert (GUARDED.backends, GUARDED.tool_hosts) == (("echo",), ())
    assert OPEN.backends == ("echo", "local", "http", "research")
    assert OPEN.tool_hosts == ("localhost", "127.0.0.1", "[::1]")
    assert "mcp" in ServerSettings(mcp_config=file).backends


def test_settings_are_read_from_the_environment() -> None:
    environ = {
        "AGENT_FSM_TOKEN": TOKEN,
        "AGENT_FSM_ALLOWED_BACKENDS": "echo, http",
        "AGENT_FSM_ALLOWED_TOOL_HOSTS": "tools.example:8787",
        "AGENT_FSM_ALLOWED_MODELS": "none",
        "AGENT_FSM_MAX_CONCURRENT_RUNS": "3",
        "AGENT_FSM_REQUIRE_SANDBOX": "strict",
        "AGENT_FSM_CEILING_MAX_ITERATIONS": "6",
        "AGENT_FSM_CEILING_MAX_COST_USD": "0.25",
        "AGENT_FSM_CEILING_MAX_TOKENS_TOTAL": " ",
        "AGENT_FSM_MAX_ITERATIONS": "4",
        "AGENT_FSM_MAX_BODY_BYTES": "",
    }

    settings = settings_from(environ)

    assert settings == ServerSettings(
        token=TOKEN,
        allowed_backends=("echo", "http"),
        allowed_tool_hosts=("tools.example:8787",),
        allowed_models=(),
        max_concurrent_runs=3,
        require_sandbox="strict",
        ceilings={"max_iterations": 6, "max_cost_usd": 0.25},
        defaults=AgentConfig(max_iterations=4),
    )
    assert TOKEN not in repr(settings)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AGENT_FSM_TOKEN", "two words"),
        ("AGENT_FSM_ALLOWED_BACKENDS", "echo, shell"),
        ("AGENT_FSM_MAX_CONCURRENT_RUNS", "0"),
        ("AGENT_FSM_MAX_BODY_BYTES", "1 MiB"),
        ("AGENT_FSM_REQUIRE_SANDBOX", "yes"),
        ("AGENT_FSM_CEILING_MAX_ITERATION", "3"),
        ("AGENT_FSM_CEILING_MAX_ITERATIONS", "many"),
        ("AGENT_FSM_CEILING_MAX_ITERATIONS", "2.5"),
        ("AGENT_FSM_MAX_ITERATIONS", "0"),
    ],
)
def test_a_variable_that_means_nothing_is_named(variable: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^{variable}\\b"):
        settings_from({variable: value})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_without_a_token_it_does_not_listen_beyond_loopback(host: str) -> None:
    with pytest.raises(ConfigError, match="takes a token"):
        serve(host=host, port=0, settings=ServerSettings())


def test_an_api_base_that_is_allowed_is_asked_with_the_arguments_of_the_request() -> None:
    with OpenAIServer(["hello"]) as model:
        host = model.base_url.removeprefix("http://").partition("/")[0]
        with serving(create_app(ServerSettings(allowed_model_hosts=(host,)))) as url:
            arguments = {**model.completion_kwargs, "temperature": 0.5}
            answer = asked(url, model="gpt-4o-mini", completion_kwargs=arguments)

    assert answer.json()["final_answer"] == "hello"
    assert model.requests[0].body["temperature"] == 0.5


def test_an_answer_is_json_whatever_the_model_sent() -> None:
    odd = {"content": "a \ud800 b", "provider_specific_fields": {"score": float("nan")}}
    with OpenAIServer([odd]) as model:
        settings = ServerSettings(defaults=AgentConfig(model="gpt-4o-mini", completion_kwargs=model.completion_kwargs))
        with serving(create_app(settings)) as url:
            answer = httpx.post(f"{url}/agent/run", json={"messages": SAY_HI}, timeout=60)

    assert answer.status_code == 200
    assert "NaN" not in answer.text
    assert answer.json()["final_answer"].startswith("a ")


# The OpenAPI document


def test_the_document_tells_limits_and_defaults_and_nothing_of_the_operators(urls: Mapping[str, str]) -> None:
    text = httpx.get(f"{urls['narrow']}/openapi.json", headers=BEARER).text
    fields = json.loads(text)["components"]["schemas"]["RunRequest"]["properties"]

    assert (fields["max_iterations"]["default"], fields["max_iterations"]["maximum"]) == (5, 5)
    assert "sk-operator" not in httpx.get(f"{urls['open']}/openapi.json").text
    assert TOKEN not in text


def statuses_of_documented_requests(examples: int) -> Counter[int]:
    """What requests are answered with that schemathesis makes of the OpenAPI document, *examples* of a kind.

    Each answer is checked: it is no server error, and it is documented, its body too.
    """
    settings = ServerSettings(allowed_models=("offline",), allowed_backends=("echo",))
    found: Counter[int] = Counter()
    with serving(create_app(settings)) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @given(case=schema["/agent/run"]["POST"].as_strategy(mode))
            @hypothesis_settings(
                max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
            )
            def check(case: schemathesis.Case[Any]) -> None:
                answer = case.call_and_validate(checks=CHECKS)
                found[answer.status_code] += 1

            check()
    return found


def test_schemathesis_finds_no_server_error() -> None:
    found = statuses_of_documented_requests(examples=8)

    assert found[200] >= 1
    assert found[422] >= 1


@pytest.mark.slow
def test_schemathesis_finds_no_server_error_in_many_requests() -> None:
    found = statuses_of_documented_requests(examples=150)

    print(dict(found))
    assert found[200] >= 10


def table(rows: Iterable[tuple[object, ...]]) -> str:
    return "\n".join("| " + " | ".join(str(each) for each in row) + " |" for row in rows)


def refused_table() -> str:
    """The refused requests and what they are answered with, as served at this moment."""
    rows: list[tuple[object, ...]] = [("request", "status", "code", "message"), ("---",) * 4]
    with ExitStack() as stack:
        urls = {name: stack.enter_context(serving(create_app(settings))) for name, settings in APPS.items()}
        for request in REFUSED:
            answer = answer_to(request, urls)
            problem = answer.json()["error"]
            rows.append((request.what, answer.status_code, f"`{problem['code']}`", problem["message"]))
    return table(rows)


if __name__ == "__main__":
    print(refused_table())
