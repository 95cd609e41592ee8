"""The command with tools from elsewhere: MCP servers of a file, an HTTP gateway; and the two commands that serve."""

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from agent_fsm.cli.commands import ExitCode
from agent_fsm.tools.sandbox import probe
from tests.test_cli import alive, children, command, environment, ran
from tests.tools_gateway import ToolsGateway, tool

CHAOS = Path(__file__).parent / "chaos_server.py"
SECRET = "tools-token-3f9a1c"
ECHO = 'Call good__echo {"text": "hello"}'


def server(case: str, **more: Any) -> dict[str, Any]:
    return {"command": sys.executable, "args": [str(CHAOS), case], **more}


def config(tmp_path: Path, **servers: Mapping[str, Any]) -> str:
    file = tmp_path / "servers.json"
    file.write_text(json.dumps({"mcpServers": servers}))
    return str(file)


def test_a_run_uses_the_servers_of_a_file(tmp_path: Path) -> None:
    done = ran("run", ECHO, "--quiet", "--mcp-config", config(tmp_path, good=server("healthy")))

    assert (done.returncode, done.stderr) == (ExitCode.ANSWERED, "")
    assert done.stdout.splitlines()[-1] == "echo says hello"


def test_a_dead_server_is_told_of_and_hides_nothing(tmp_path: Path) -> None:
    file = config(tmp_path, good=server("healthy"), bad=server("dies_at_start"))

    done = ran("run", ECHO, "--mcp-config", file)
    listed = ran("tools", "--json", "--mcp-config", file)

    assert (done.returncode, done.stdout.splitlines()[-1]) == (ExitCode.ANSWERED, "echo says hello")
    assert re.search(
        r"tools: good__work, good__echo; not there: MCP server 'bad'.*cannot open the database", done.stdout
    )
    assert [each["function"]["name"] for each in json.loads(listed.stdout)] == ["good__work", "good__echo"]
    assert listed.stderr.startswith("not there: MCP server 'bad'")


def test_without_a_living_server_nothing_is_asked_of_the_model(tmp_path: Path) -> None:
    file = config(tmp_path, bad=server("dies_at_start"))

    done = ran("run", ECHO, "--json", "--mcp-config", file)
    listed = ran("tools", "--mcp-config", file)

    assert (done.returncode, json.loads(done.stdout)["stopped_reason"]) == (ExitCode.FAILED, "tools_unavailable")
    assert (listed.returncode, listed.stdout) == (1, "")
    assert "cannot open the database" in listed.stderr


def test_servers_may_stand_beside_tools_of_this_machine(tmp_path: Path) -> None:
    file = config(tmp_path, good=server("healthy"))
    done = ran("run", f"{ECHO} then echo here", "--tools", "echo", "--quiet", "--mcp-config", file)

    assert done.stdout.splitlines()[-2:] == ["echo says hello", "here"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is no JSON"),
        ('{"mcpServers": {"x": {"args": []}}}', "'x'"),
        ('{"mcpServers": {"x": {"command": "${NO_SUCH_VARIABLE}"}}}', "NO_SUCH_VARIABLE"),
    ],
)
def test_a_file_that_is_no_good_is_exit_code_2_and_told(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "servers.json"
    file.write_text(text)

    done = ran("run", ECHO, "--mcp-config", str(file))

    assert (done.returncode, done.stdout) == (ExitCode.USAGE, "")
    assert str(file) in done.stderr
    assert told in done.stderr


def test_what_a_file_says_in_vain_is_told(tmp_path: Path) -> None:
    file = config(tmp_path, good=server("healthy", comand="x"))

    done = ran("run", ECHO, "--quiet", "--mcp-config", file)

    assert done.returncode == ExitCode.ANSWERED
    assert re.match(r"Warning: .*comand.*command", done.stderr)


def test_a_run_uses_a_gateway_and_its_token_shows_nowhere() -> None:
    with ToolsGateway([tool("look_up")], [{"text": f"found, with {SECRET}"}]) as gateway:
        task = 'Call look_up {"q": 1}'
        done = ran("run", task, "--tools-url", gateway.url, "--json", AGENT_FSM_TOOLS_TOKEN=SECRET)

    assert done.returncode == ExitCode.ANSWERED
    assert [each.headers["authorization"] for each in gateway.invoked] == [f"Bearer {SECRET}"]
    assert "found, with ***" in done.stdout
    assert SECRET not in done.stdout + done.stderr


def test_local_tools_see_what_they_are_shown_and_no_more(tmp_path: Path) -> None:
    if probe().level == "off":
        pytest.skip(f"nothing is hidden here: {probe().why}")
    (tmp_path / "shown.txt").write_text("it is shown")
    task = f"Run python: print(open({str(tmp_path / 'shown.txt')!r}).read())"

    shown = ran("run", task, "--quiet", "--read", str(tmp_path))
    hidden = ran("run", task, "--quiet")

    assert shown.stdout.splitlines()[-1] == "it is shown"
    assert "No such file or directory" in hidden.stdout


def test_a_sandbox_that_is_required_and_not_used_is_exit_code_2() -> None:
    done = ran("run", "Run python: print(1)", "--sandbox", "basic", "--require-sandbox", "strict")

    assert (done.returncode, done.stdout) == (ExitCode.USAGE, "")
    assert "require_sandbox" in done.stderr


def test_images_that_a_task_names_are_attached(tmp_path: Path) -> None:
    file, saved = tmp_path / "dot.png", tmp_path / "messages.json"
    Image.new("RGB", (4, 4)).save(file)

    ran("run", f"Echo {file}", "--tools", "echo", "--images", "--save", str(saved))

    text, image = json.loads(saved.read_text())[0]["content"]
    assert text == {"type": "text", "text": f"Echo {file}"}
    assert image["image_url"]["url"].startswith("data:image/png;base64,")


# The commands that serve


@contextmanager
def serving(*arguments: str, **variables: str) -> "Iterator[tuple[subprocess.Popen[str], str]]":
    """Start a command that serves on a free port; give its process and its address."""
    process = subprocess.Popen(
        command(*arguments, "--port", "0"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(**variables),
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://[0-9.:]+", process.stdout.readline())
        assert found
        yield process, found[0]
    finally:
        process.kill()
        process.wait()


def asked(url: str, body: Any = None, token: str = "") -> Any:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=20) as answer:
        return json.load(answer)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_gateway_serves_the_servers_of_a_file_and_ends_with_them(tmp_path: Path, number: signal.Signals) -> None:
    file = config(tmp_path, good=server("healthy"))
    with serving("gateway", "--config", file, AGENT_FSM_GATEWAY_TOKEN=SECRET) as (process, url):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            asked(f"{url}/tools")
        answer = asked(f"{url}/invoke", {"name": "good__echo", "arguments": {"text": "hi"}}, SECRET)
        servers = children(process.pid)

        process.send_signal(number)
        process.wait(10)

    assert answer["text"] == "echo says hi"
    assert len(servers) == 1
    assert not any(alive(pid) for pid in servers)


def test_the_agent_is_served_and_really_runs() -> None:
    body = {"messages": [{"role": "user", "content": "Echo hi"}], "model": "offline", "tool_backend": "echo"}
    with serving("serve") as (process, url):
        answer = asked(f"{url}/agent/run", body)
        process.send_signal(signal.SIGTERM)
        process.wait(10)

    assert answer["stopped_reason"] == "success"
    assert answer["final_answer"].endswith("hi")


@pytest.mark.parametrize("name", ["serve", "gateway"])
def test_nothing_listens_beyond_loopback_without_a_token(tmp_path: Path, name: str) -> None:
    more = ("--config", config(tmp_path, good=server("healthy"))) if name == "gateway" else ()

    done = ran(name, *more, "--host", "0.0.0.0", "--port", "0")

    assert done.returncode == ExitCode.USAGE
    assert "token" in done.stderr
