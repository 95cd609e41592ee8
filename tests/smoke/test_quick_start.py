"""The seed's quick start, to the letter but for its import line, as a process of its own against loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.openai_server import OpenAIServer

SCRIPT = Path(__file__).parent.parent / "examples" / "quick_start.py"


def run_quick_start(server: OpenAIServer | None) -> "subprocess.CompletedProcess[str]":
    known = {
        key: value for key, value in os.environ.items() if not key.endswith(("_API_KEY", "_API_BASE", "_BASE_URL"))
    }
    if server is not None:
        known |= {"OPENAI_API_KEY": "sk-test", "OPENAI_BASE_URL": server.base_url}
    command = [sys.executable, str(SCRIPT)]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=known, timeout=120, check=False
    )


def test_the_quick_start_answers_with_what_the_tool_printed() -> None:
    script = [[("exec_python", {"code": "print('hello')"})], "The code printed hello."]

    with OpenAIServer(script) as server:
        done = run_quick_start(server)

    assert (done.stdout, done.stderr, done.returncode) == ("The code printed hello. success\n", "", 0)
    asked = [request.body for request in server.requests]
    assert [body["model"] for body in asked] == ["gpt-4o-mini"] * 2
    assert {tool["function"]["name"] for tool in asked[0]["tools"]} == {"exec_python", "exec_shell"}
    assert json.loads(asked[1]["messages"][-1]["content"])["stdout"] == "hello\n"


def test_without_a_key_it_ends_at_once() -> None:
    done = run_quick_start(None)

    assert (done.stdout, done.returncode) == ("None model_error\n", 0)
