"""What local tools promise: a deadline, bounded output, a clean environment, and nothing left running.

At the level that holds here, unless a test names one. What contains them has tests of its own.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent_fsm.errors import ConfigError
from agent_fsm.protocol import ToolInvoker, ToolResult
from agent_fsm.tools.local import EchoMCP, LocalMCPInvoker
from agent_fsm.tools.sandbox import Level, probe

SLACK_S = 2.0
"""What a busy machine may add to a deadline. Every process that must not delay a result sleeps far longer."""
FOREVER_S = 60
HERE = probe().level
LEVELS: tuple[Level, ...] = ("strict", "off")
needs_strict = pytest.mark.skipif(HERE != "strict", reason=f"only level {HERE} holds here: {probe().why}")

REFUSED = [
    ("exec_python", {}, "code is missing"),
    ("exec_python", {"code": None}, "code must be a string"),
    ("exec_python", {"code": 7}, "code must be a string"),
    ("exec_python", {"code": "print('\0')"}, "NUL"),
    ("exec_python", {"code": "print('\ud800')"}, "valid Unicode"),
    ("exec_python", {"code": "1", "timeout_s": "5"}, "timeout_s must be a number"),
    ("exec_python", {"code": "1", "timeout_s": -1}, "timeout_s must be a number"),
    ("exec_python", {"code": "1", "timeout_s": 0}, "timeout_s must be a number"),
    ("exec_python", {"code": "1", "timeout_s": True}, "timeout_s must be a number"),
    ("exec_python", {"code": "1", "timeout_s": float("nan")}, "timeout_s must be a number"),
    ("exec_python", {"code": "1", "timeout_s": float("inf")}, "timeout_s must be a number"),
    ("exec_python", {"code": "1", "timeout": 5}, "unknown argument 'timeout'"),
    ("exec_shell", {}, "cmd is missing"),
    ("exec_shell", {"cmd": ["echo", "hi"]}, "cmd must be a string"),
    ("exec_shell", {"cmd": ""}, "cmd is empty"),
    ("exec_shell", {"cmd": " \n "}, "cmd is empty"),
    ("exec_shell", {"cmd": "echo 'hi"}, "No closing quotation"),
    ("exec_shell", {"cmd": "echo hi\\"}, "No escaped character"),
    ("exec_shell", {"cmd": "echo \0"}, "NUL"),
    ("exec_shell", {"cmd": "rm -r x"}, "'rm' is not allowed; allowed programs, by exactly these names: echo, python"),
    ("exec_rm", {"cmd": "echo"}, "there is no tool 'exec_rm'"),
]

NOT_CALLS: list[Any] = [
    None,
    {},
    "exec_python",
    {"function": None},
    {"function": {"name": None, "arguments": "{}"}},
    {"function": {"name": "exec_python"}},
    {"function": {"name": "exec_python", "arguments": "{"}},
    {"function": {"name": "exec_python", "arguments": ""}},
    {"function": {"name": "exec_python", "arguments": "[" * 100_000}},
    {"function": {"name": "exec_python", "arguments": '{"code": "1", "timeout_s": ' + "9" * 5000 + "}"}},
    {"function": {"name": "exec_python", "arguments": '["code"]'}},
    {"function": {"name": "exec_python", "arguments": "null"}},
    {"function": {"name": "exec_python", "arguments": 5}},
]


def tool_call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


def finish(work: Coroutine[Any, Any, ToolResult]) -> tuple[ToolResult, dict[str, Any]]:
    """Run one call; return its result and what its text says, once both are seen to agree."""
    result = asyncio.run(work)
    said = json.loads(result.text)
    assert (result.ok, result.rc, result.seconds) == (said["ok"], said["rc"], said["seconds"])
    return result, said


def python(code: str, invoker: LocalMCPInvoker | None = None, **more: Any) -> dict[str, Any]:
    tools = invoker or LocalMCPInvoker()
    return finish(tools.call_openai_tool(tool_call("exec_python", {"code": code, **more})))[1]


def shell(command: str, invoker: LocalMCPInvoker | None = None, **more: Any) -> dict[str, Any]:
    tools = invoker or LocalMCPInvoker()
    return finish(tools.call_openai_tool(tool_call("exec_shell", {"cmd": command, **more})))[1]


def at(level: Level, **more: Any) -> LocalMCPInvoker:
    if level == "strict" != HERE:
        pytest.skip(f"only level {HERE} holds here: {probe().why}")
    return LocalMCPInvoker(sandbox=level, **more)


def running(token: str) -> list[int]:
    """Return the processes of this machine that have *token* among their arguments; what is dead has none left."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and token.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it has just ended
            continue
    return found


@pytest.fixture
def token() -> Any:
    """A word by which the processes of a test are found, in whatever namespace; none of them outlives the test."""
    word = f"token{uuid.uuid4().hex}"
    yield word
    for pid in running(word):
        os.kill(pid, signal.SIGKILL)


def within_slack(claim: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SLACK_S
    while not claim() and time.monotonic() < deadline:
        time.sleep(0.01)
    return claim()


def open_descriptors() -> list[Path]:
    return sorted(Path("/dev/fd").iterdir())


def starts_sleeper(token: str, *, new_session: bool = False, quiet: bool = False) -> str:
    """Return code that starts a process which lives for ever, and holds our pipes unless it is quiet."""
    return f"""
import os, subprocess, sys, time
sleep = [sys.executable, "-S", "-c", "import time; time.sleep({FOREVER_S})", {token!r}]
pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) if {quiet} else {{}}
subprocess.Popen(sleep, start_new_session={new_session}, **pipes)
print("started", flush=True)
"""


def in_a_strict_process(code: str) -> str:
    """Run *code* where a descriptor or process left to the garbage collector is an error; return what it prints."""
    shown = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code],
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=30,
        check=False,
    )
    return shown.stdout


# What works


def test_python_prints_and_succeeds() -> None:
    result, said = finish(LocalMCPInvoker().call_openai_tool(tool_call("exec_python", {"code": "print('hello')"})))

    assert said == {"ok": True, "rc": 0, "stdout": "hello\n", "stderr": "", "seconds": result.seconds} | {
        "sandbox": HERE
    }


def test_a_failure_has_its_code_and_a_traceback_with_source_lines() -> None:
    said = python("def half(x):\n    return x / 0  # oops\n\nhalf(1)")

    assert (said["ok"], said["rc"]) == (False, 1)
    assert 'File "script.py", line 2, in half' in said["stderr"]
    assert "return x / 0  # oops" in said["stderr"]
    assert "ZeroDivisionError" in said["stderr"]


def test_the_same_failure_reads_the_same_every_time() -> None:
    assert python("1 / 0")["stderr"] == python("1 / 0")["stderr"]


def test_an_exit_code_is_reported() -> None:
    said = python("import sys; sys.exit(7)")

    assert (said["ok"], said["rc"]) == (False, 7)
    assert "error" not in said


def test_a_signal_is_named() -> None:
    said = python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")

    assert said["rc"] == -signal.SIGSEGV
    assert "ended by signal 11" in said["error"]


def test_an_honest_script_can_use_modules_of_its_own_and_other_processes() -> None:
    code = """
import json, multiprocessing, pathlib, sqlite3, subprocess, sys
pathlib.Path("mine.py").write_text("def double(x): return 2 * x")
import mine
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        doubled = pool.map(mine.double, [1, 2])
    shown = subprocess.run([sys.executable, "-c", "print('child')"], capture_output=True, text=True).stdout
    print(json.dumps([doubled, shown, sqlite3.connect(":memory:").execute("select 3").fetchone()]))
"""

    assert json.loads(python(code)["stdout"]) == [[2, 4], "child\n", [3]]


def test_code_may_be_longer_than_an_argument_list() -> None:
    assert python(f"text = '{'x' * 300_000}'\nprint(len(text))")["stdout"] == "300000\n"


def test_unicode_goes_in_and_comes_out() -> None:
    assert python("print('naïve 漢字 🎉')")["stdout"] == "naïve 漢字 🎉\n"
    assert shell("echo 'naïve 漢字 🎉'")["stdout"] == "naïve 漢字 🎉\n"


def test_bytes_that_are_no_text_are_replaced() -> None:
    assert python(r"import sys; sys.stdout.buffer.write(b'a\xffb')")["stdout"] == "a\ufffdb"


def test_a_character_written_in_two_halves_arrives_whole() -> None:
    code = r"import os, time; os.write(1, b'\xc3'); time.sleep(0.2); os.write(1, b'\xa9')"

    assert python(code)["stdout"] == "é"


def test_the_shell_runs_a_program_with_quoted_arguments() -> None:
    assert shell("""echo 'a  b'"|"c""")["stdout"] == "a  b|c\n"


def test_nothing_is_expanded() -> None:
    assert shell("echo $HOME * ~ {a,b}")["stdout"] == "$HOME * ~ {a,b}\n"


def test_an_absolute_path_is_allowed_by_itself_only() -> None:
    tools = LocalMCPInvoker([sys.executable])

    assert shell(f"{sys.executable} -c 'print(1)'", tools)["stdout"] == "1\n"
    assert "not allowed" in shell(f"{Path(sys.executable).name} -c 'print(1)'", tools)["error"]


@pytest.mark.parametrize(("command", "begins"), [("python -c 'print(6)'", "6"), ("pip --version", "pip ")])
def test_python_and_pip_work_where_they_are_not_on_the_path(command: str, begins: str, tmp_path: Path) -> None:
    assert shell(command, LocalMCPInvoker(env={"PATH": str(tmp_path)}))["stdout"].startswith(begins)


@pytest.mark.parametrize("name", ["exec_python", "exec_shell"])
def test_a_call_may_be_an_object_or_carry_a_dict(name: str) -> None:
    arguments = {"code": "print('hi')"} if name == "exec_python" else {"cmd": "echo hi"}
    as_object = SimpleNamespace(id="1", function=SimpleNamespace(name=name, arguments=json.dumps(arguments)))
    as_dict = {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}

    for call in (as_object, as_dict):
        assert finish(LocalMCPInvoker().call_openai_tool(call))[1]["stdout"] == "hi\n"


def test_twenty_calls_at_once_get_their_own_output() -> None:
    async def main() -> list[ToolResult]:
        tools = LocalMCPInvoker()
        calls = [tool_call("exec_python", {"code": f"import sys; print({n}); sys.exit({n})"}) for n in range(20)]
        return await asyncio.gather(*map(tools.call_openai_tool, calls))

    results = asyncio.run(main())

    assert list(range(20)) == [result.rc for result in results]
    assert [f"{n}\n" for n in range(20)] == [json.loads(result.text)["stdout"] for result in results]


def test_calls_leave_no_descriptor_and_no_thread_behind() -> None:
    async def main() -> None:
        tools = LocalMCPInvoker()
        codes = ["print(1)", "import time; time.sleep(60)"] * 3
        calls = [tool_call("exec_python", {"code": code, "timeout_s": 0.5}) for code in codes]
        await tools.call_openai_tool(calls[0])
        descriptors, threads = open_descriptors(), threading.active_count()
        await asyncio.gather(*map(tools.call_openai_tool, calls))

        assert descriptors == open_descriptors()
        assert threads == threading.active_count()

    asyncio.run(main())


def test_a_system_without_pidfd_gives_the_same_results() -> None:
    # In a process of its own: the call is taken away before anything can have used it.
    code = """
import asyncio, os
if hasattr(os, "pidfd_open"):
    del os.pidfd_open
from agent_fsm.tools.local import LocalMCPInvoker
def run(code, timeout_s):
    call = {"function": {"name": "exec_python", "arguments": {"code": code, "timeout_s": timeout_s}}}
    return asyncio.run(LocalMCPInvoker().call_openai_tool(call))
print(run("print(1)", 20).rc, run("import time; time.sleep(60)", 0.3).rc)
"""

    assert in_a_strict_process(code) == "0 -9\n"


# Time, and what is left behind


def test_a_timeout_kills_and_keeps_what_was_printed() -> None:
    started = time.monotonic()

    said = python(f"print('so far'); import time; time.sleep({FOREVER_S})", timeout_s=0.5)

    assert time.monotonic() - started < 0.5 + SLACK_S
    assert (said["ok"], said["rc"], said["stdout"]) == (False, -signal.SIGKILL, "so far\n")
    assert said["error"] == "timed out after 0.5 s; the process group was killed"


def test_a_shell_call_times_out_too() -> None:
    said = shell(f"python -c 'import time; time.sleep({FOREVER_S})'", timeout_s=0.5)

    assert said["error"] == "timed out after 0.5 s; the process group was killed"


@pytest.mark.parametrize("deaf", ["signal.signal(signal.SIGTERM, signal.SIG_IGN)", "os.kill(os.getpid(), 19)"])
def test_a_process_that_ignores_or_is_stopped_dies_all_the_same(deaf: str) -> None:
    said = python(f"import os, signal, time; {deaf}; time.sleep({FOREVER_S})", timeout_s=0.5)

    assert said["rc"] == -signal.SIGKILL


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("new_session", [False, True])
@pytest.mark.parametrize("ends_first", [False, True])
def test_a_grandchild_that_holds_the_pipe_delays_nothing(
    level: Level, new_session: bool, ends_first: bool, token: str
) -> None:
    tools = at(level)
    code = starts_sleeper(token, new_session=new_session) + ("" if ends_first else f"time.sleep({FOREVER_S})")
    started = time.monotonic()

    said = python(code, tools, timeout_s=1.5)

    assert time.monotonic() - started < 1.5 + SLACK_S
    assert ends_first is said["ok"]
    assert said["stdout"] == "started\n"
    if level == "strict" or not new_session:  # nothing but containment holds one that has left the group
        assert within_slack(lambda: not running(token))


@pytest.mark.parametrize("level", LEVELS)
def test_a_process_left_in_the_background_is_killed_even_if_it_holds_no_pipe(level: Level, token: str) -> None:
    tools = at(level)

    said = python(starts_sleeper(token, quiet=True), tools)

    assert said["ok"]
    assert within_slack(lambda: not running(token))


def test_what_a_test_would_find_running_is_found(token: str) -> None:
    sleeper = subprocess.Popen(
        [sys.executable, "-S", "-c", f"import time; time.sleep({FOREVER_S})", token], stdin=subprocess.DEVNULL
    )
    try:
        assert within_slack(lambda: [sleeper.pid] == running(token))
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_child_may_still_write_just_after_its_parent_has_ended() -> None:
    assert python("import subprocess; subprocess.Popen(['echo', 'last words'])")["stdout"] == "last words\n"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("cancels", [1, 2])
def test_a_cancelled_call_leaves_no_process_and_no_folder(
    level: Level, cancels: int, token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tools = at(level)
    code = starts_sleeper(token) + "os.execv(sys.executable, sleep)"

    async def main() -> float:
        call = asyncio.ensure_future(tools.call_openai_tool(tool_call("exec_python", {"code": code})))
        while len(running(token)) < 2 and not call.done():  # noqa: ASYNC110 # no child can tell us
            await asyncio.sleep(0.01)
        started = time.monotonic()
        for _ in range(cancels):
            call.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await call
        return time.monotonic() - started

    seconds = asyncio.run(main())

    assert seconds < SLACK_S
    assert within_slack(lambda: not running(token))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cancels", [1, 2])
def test_a_call_cancelled_at_any_of_its_first_steps_leaves_nothing(cancels: int, token: str) -> None:
    code = f"""
import asyncio, contextlib, os, time
from pathlib import Path
from agent_fsm.tools.local import LocalMCPInvoker

async def both():
    tools = LocalMCPInvoker()
    await tools.list_openai_tools()  # so that no step goes by in the probe
    await tools.call_openai_tool({{"function": {{"name": "exec_shell", "arguments": {{"cmd": "echo"}}}}}})

def descriptors():
    return sorted(os.listdir("/dev/fd"))

asyncio.run(both())
before = descriptors()

async def cancelled_after(steps):
    arguments = {{"code": {starts_sleeper(token) + f"time.sleep({FOREVER_S})"!r}}}
    call = {{"function": {{"name": "exec_python", "arguments": arguments}}}}
    running = asyncio.ensure_future(LocalMCPInvoker().call_openai_tool(call))
    for _ in range(steps):
        await asyncio.sleep(0)
    for _ in range({cancels}):
        running.cancel()
        await asyncio.sleep(0)
    await asyncio.wait([running])
    assert running.cancelled()

for steps in range(8):
    asyncio.run(cancelled_after(steps))
    with contextlib.suppress(ChildProcessError):
        print("left", os.waitpid(-1, os.WNOHANG))
    if before != descriptors():
        print("open", before, descriptors())
"""

    assert in_a_strict_process(code) == ""
    assert not running(token)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("ending", ["", f"; import time; time.sleep({FOREVER_S})"])
def test_the_working_folder_is_empty_private_and_gone_afterwards(
    level: Level, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tools = at(level)
    code = "import os; os.makedirs('d' * 200 + '/e'); open('x', 'w'); print(sorted(os.listdir()))" + ending

    shown = [python(code, tools, timeout_s=1.5)["stdout"] for _ in range(2)]

    assert shown == [f"{sorted(['d' * 200, 'script.py', 'x'])}\n"] * 2
    assert list(tmp_path.iterdir()) == []


def test_a_timeout_above_the_ceiling_is_lowered_and_said_so() -> None:
    tools = LocalMCPInvoker(python_timeout_s=20, shell_timeout_s=10)

    assert python("1", tools, timeout_s=20.5)["note"] == "timeout_s was lowered to 20 s, the most that is allowed"
    assert shell("echo", tools, timeout_s=10**400)["note"] == "timeout_s was lowered to 10 s, the most that is allowed"
    assert "note" not in python("1", tools, timeout_s=20)
    assert "note" not in python("1", tools, timeout_s=None)


# Output


def test_long_output_is_cut_in_the_middle_and_the_cut_is_stated() -> None:
    tools = LocalMCPInvoker(output_chars=10)

    said = python("import sys; print('abcde' + '漢' * 12345 + 'vwxyz', end='', file=sys.stderr); print('short')", tools)

    assert said["stderr"] == "abcde\n[... 12,345 characters cut ...]\nvwxyz"
    assert said["stdout"] == "short\n"


@pytest.mark.parametrize(("length", "is_cut"), [(10, False), (11, True)])
def test_output_is_cut_only_beyond_the_limit(length: int, is_cut: bool) -> None:
    said = python(f"print('x' * {length}, end='')", LocalMCPInvoker(output_chars=10))

    assert is_cut is ("[... 1 characters cut ...]" in said["stdout"])
    assert length - is_cut == said["stdout"].count("x")


def test_more_output_than_a_pipe_holds_blocks_nobody() -> None:
    code = "import sys\nfor _ in range(40):\n    print('o' * 50_000)\n    print('e' * 50_000, file=sys.stderr)"

    said = python(code)

    assert said["ok"]
    assert "1,996,040 characters cut" in said["stdout"]
    assert "1,996,040 characters cut" in said["stderr"]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output_is_stopped_at_the_ceiling(stream: str) -> None:
    tools = LocalMCPInvoker(max_output_bytes=2**20)
    started = time.monotonic()

    said = python(f"import sys\nwhile True: print('y' * 9999, file=sys.{stream})", tools)

    assert time.monotonic() - started < 5 + SLACK_S  # of the 25 s that it has
    assert (said["ok"], said["rc"]) == (False, -signal.SIGKILL)
    assert said["error"] == "wrote more than 1,048,576 bytes to stdout and stderr; the process group was killed"
    assert "characters cut" in said[stream]


@pytest.mark.parametrize(("length", "ok"), [(50_000, True), (50_001, False)])
def test_output_of_both_streams_at_the_ceiling_is_not_beyond_it(length: int, ok: bool) -> None:
    tools = LocalMCPInvoker(max_output_bytes=50_000)

    said = python(f"import os; os.write(2, b'x' * 20_000); os.write(1, b'x' * {length - 20_000})", tools)

    assert ok is said["ok"]


# What a child gets to see


def test_stdin_is_empty() -> None:
    assert python("import sys; print(repr(sys.stdin.read()))")["stdout"] == "''\n"


def test_a_key_in_our_environment_is_not_in_the_childs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("LC_TIME", "C")
    code = "import os; print(sorted(os.environ)); print('sk-secret' in str(os.environ))"

    in_python, in_shell = python(code)["stdout"], shell(f'python -c "{code}"')["stdout"]

    for shown in (in_python, in_shell):
        assert "OPENAI_API_KEY" not in shown
        assert "'LC_TIME'" in shown
        assert "'PATH'" in shown
        assert shown.endswith("False\n")


def test_variables_that_are_given_are_there() -> None:
    assert (
        python("import os; print(os.environ['COLOUR'])", LocalMCPInvoker(env={"COLOUR": "blue"}))["stdout"] == "blue\n"
    )


# What is refused


@pytest.mark.parametrize(
    "program", ["echo_evil", "./echo", "/tmp/echo", "/bin/echo", "ECHO", "ech", "echo/", "X=1 echo", "'echo '", "''"]
)
def test_a_program_must_be_named_exactly_as_allowed(program: str, tmp_path: Path) -> None:
    evil = tmp_path / "echo_evil"
    evil.write_text("#!/bin/sh\necho ran\n")
    evil.chmod(0o755)
    tools = LocalMCPInvoker(["echo"], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})

    said = shell(f"{program} hi", tools)

    assert (said["ok"], said["rc"], said["stdout"]) == (False, None, "")
    assert "not allowed; allowed programs, by exactly these names: echo" in said["error"]


@pytest.mark.parametrize(
    ("command", "sign"),
    [
        ("echo a | cat", "|"),
        ("echo a|cat", "|"),
        ("echo a || echo b", "||"),
        ("echo a && echo b", "&&"),
        ("echo a; echo b", ";"),
        ("echo a ; echo b", ";"),
        ("echo a > {file}", ">"),
        ("echo a >{file}", ">"),
        ("echo a >> {file}", ">>"),
        ("echo a 2>&1", ">"),
        ("echo < {file}", "<"),
        ("python - <<EOF", "<<"),
        ("echo a &", "&"),
        ("echo $(id)", "$("),
        ("echo `id`", "`"),
    ],
)
def test_what_only_a_shell_would_understand_is_refused(command: str, sign: str, tmp_path: Path) -> None:
    file = tmp_path / "written"

    said = shell(command.format(file=file))

    assert (said["ok"], said["rc"], said["stdout"]) == (False, None, "")
    assert said["error"].startswith(f"there is no shell, so `{sign}` means nothing here")
    assert not file.exists()


def test_a_second_line_is_refused_and_the_last_line_break_is_not() -> None:
    assert "a line break means nothing here" in shell("echo a\necho b")["error"]
    assert shell("\necho a\n")["stdout"] == "a\n"


@pytest.mark.parametrize("word", ["'a | b'", '"a;b"', r"a\>b", '"it\'s a && b"', r'"\"; echo"', "'$(id)'"])
def test_a_quoted_operator_is_an_argument(word: str) -> None:
    assert shell(f"echo {word}")["ok"]


@pytest.mark.parametrize(("name", "arguments", "error"), REFUSED)
def test_what_the_model_does_wrong_is_a_failed_result_that_says_so(name: str, arguments: Any, error: str) -> None:
    said = finish(LocalMCPInvoker().call_openai_tool(tool_call(name, arguments)))[1]

    assert (said["ok"], said["rc"]) == (False, None)
    assert error in said["error"]


@pytest.mark.parametrize("call", NOT_CALLS, ids=range(len(NOT_CALLS)))
@pytest.mark.parametrize("tools", [LocalMCPInvoker(), EchoMCP()], ids=["local", "echo"])
def test_what_is_no_call_is_a_failed_result(tools: LocalMCPInvoker | EchoMCP, call: Any) -> None:
    said = finish(tools.call_openai_tool(call))[1]

    assert (said["ok"], said["rc"]) == (False, None)
    assert said["error"]
    assert len(said["error"]) < 500


def test_a_program_that_is_allowed_but_missing_is_a_failed_result() -> None:
    tools = LocalMCPInvoker(["no-such-program", "/no/such/program"])

    assert shell("no-such-program", tools)["error"] == "no-such-program is allowed, but it is not installed"
    assert "could not be started" in shell("/no/such/program", tools)["error"]


@pytest.mark.parametrize(
    "settings",
    [
        {"shell_allow_prefixes": "echo"},
        {"shell_allow_prefixes": [""]},
        {"shell_allow_prefixes": ["echo hi"]},
        {"shell_allow_prefixes": ["./echo"]},
        {"shell_allow_prefixes": [7]},
        {"python_timeout_s": 0},
        {"shell_timeout_s": float("nan")},
        {"shell_timeout_s": True},
        {"output_chars": 1},
        {"max_output_bytes": 2.5},
        {"env": {"A": 1}},
        {"sandbox": "tight"},
        {"require_sandbox": "most"},
        {"require_sandbox": "strict", "sandbox": "basic"},
        {"require_sandbox": "strict", "engine": "bwrap"},
        {"require_sandbox": "strict", "python": "monty"},
        {"network": 1},
        {"read_paths": ["data"]},
        {"write_paths": ["/data/../etc"]},
        {"write_paths": "/data"},
        {"memory_bytes": 0},
        {"disk_bytes": 1.5},
        {"processes": True},
        {"packages": None},
        {"keep_files": "*.txt"},
        {"keep_files": ["*"], "engine": "bwrap"},
        {"engine": "docker"},
        {"engine": "bwrap", "sandbox": "off"},
        {"python": "pypy"},
        {"shell_arguments": {"git": ["log"]}},
        {"shell_arguments": {"echo": "log"}},
        {"shell_arguments": {"echo": ["("]}},
    ],
)
def test_a_setting_that_means_nothing_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        LocalMCPInvoker(**settings)


# The sandbox


@pytest.mark.parametrize("level", ["basic", "off"])
def test_less_containment_can_be_asked_for_and_is_said(level: Level) -> None:
    said = shell("echo hi", LocalMCPInvoker(sandbox=level))

    assert said["sandbox"] == ("off" if HERE == "off" else level)


@needs_strict
def test_where_a_layer_is_missing_the_level_reached_is_said_and_less_than_required_refused() -> None:
    without = partial(probe, frozenset({"namespaces"}))
    allowed, strict_only = LocalMCPInvoker(probe=without), LocalMCPInvoker(probe=without, require_sandbox="strict")

    said, refused = shell("echo hi", allowed), shell("echo hi", strict_only)

    assert said["sandbox"] == refused["sandbox"] == without().level != "strict"
    assert (refused["ok"], refused["rc"], refused["stdout"]) == (False, None, "")
    for part in ("'strict' is required", "namespaces are missing", "What would help: "):
        assert part in refused["error"]
    with pytest.raises(RuntimeError, match="namespaces are missing"):
        asyncio.run(strict_only.list_openai_tools())


@needs_strict
def test_what_is_required_and_holds_is_run() -> None:
    assert shell("echo hi", LocalMCPInvoker(require_sandbox="strict"))["stdout"] == "hi\n"


@needs_strict
def test_a_call_that_takes_too_much_memory_is_killed_and_says_so() -> None:
    tools = LocalMCPInvoker(memory_bytes=128 * 2**20)
    code = """
import os, time
for _ in range(4):
    if not os.fork():
        taken = b"x" * (50 * 2**20)
        time.sleep(20)
time.sleep(20)
"""

    said = python(code, tools)

    assert (said["ok"], said["error"]) == (False, "took more than 128 MiB of memory, so it was killed")


@needs_strict
@pytest.mark.parametrize(
    ("code", "hint"),
    [
        ("b'x' * 2**31", "a process has 512 MiB of memory here"),
        ("open('x', 'wb').write(b'x' * 2**27)", "files may take 64 MiB here"),
        ("import socket; socket.create_connection(('192.0.2.1', 80), 2)", "there is no network here"),
    ],
)
def test_a_program_that_fails_at_a_bound_is_told_of_it(code: str, hint: str) -> None:
    said = python(code)

    assert not said["ok"]
    assert hint in said["note"]


@pytest.mark.parametrize("level", LEVELS)
def test_files_are_kept_where_that_is_asked_for(level: Level) -> None:
    tools = at(level, keep_files=["*.txt", "**/*.bin"])
    code = """
import os
os.mkdir("d")
open("a.txt", "w").write("naïve")
open("d/b.bin", "wb").write(b"\\0\\xff")
open("other", "w").write("x")
"""

    result, said = finish(tools.call_openai_tool(tool_call("exec_python", {"code": code})))

    assert said["files"] == {"a.txt": 6, "d/b.bin": 2}
    assert [part["resource"] for part in result.parts] == [
        {"uri": "sandbox:/a.txt", "mimeType": "text/plain", "text": "naïve"},
        {"uri": "sandbox:/d/b.bin", "mimeType": "application/octet-stream", "blob": "AP8="},
    ]


@needs_strict
def test_paths_that_are_opened_are_there_and_others_are_not(tmp_path: Path) -> None:
    seen, written, hidden = (tmp_path / name for name in ("seen", "written", "hidden"))
    for folder in (seen, written, hidden):
        folder.mkdir()
        folder.chmod(0o777)
        (folder / "file").write_text("hello")
    code = f"""
import os
print(open({str(seen / "file")!r}).read(), os.path.exists({str(hidden)!r}), os.path.exists("/etc/shadow"))
open({str(written / "new")!r}, "w").write("made")
open({str(seen / "new")!r}, "w")
"""

    said = python(code, LocalMCPInvoker(read_paths=[seen], write_paths=[written]))

    assert said["stdout"] == "hello False False\n"
    assert (written / "new").read_text() == "made"
    assert "Read-only file system" in said["stderr"]
    assert "[Errno 2]" in python(f"open({str(seen / 'file')!r})")["stderr"]


@needs_strict
def test_a_path_that_is_not_there_fails_the_call_and_says_so(tmp_path: Path) -> None:
    said = shell("echo hi", LocalMCPInvoker(read_paths=[tmp_path / "gone"]))

    assert (said["ok"], said["rc"]) == (False, None)
    assert "No such file" in said["error"]


def test_packages_are_there_unless_they_are_not_wanted() -> None:
    assert python("import attrs")["ok"]
    if HERE == "strict":
        assert "No module named 'attrs'" in python("import attrs", LocalMCPInvoker(packages=False))["stderr"]


def test_an_allowed_program_is_found_wherever_it_is(tmp_path: Path) -> None:
    program = tmp_path / "tool"
    program.write_text('#!/bin/sh\necho "ran $1"\n')
    program.chmod(0o755)
    tools = LocalMCPInvoker([str(program), "tool"], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})

    assert shell(f"{program} well", tools)["stdout"] == "ran well\n"
    assert shell("tool well", tools)["stdout"] == "ran well\n"


@pytest.mark.parametrize(
    ("command", "ok"),
    [
        ("echo", True),
        ("echo yes 12", True),
        ("echo yes no", False),
        ("echo 12x", False),
        ("echo -n", False),
        ("echo 'yes\n'", False),
    ],
)
def test_arguments_must_match_a_rule_as_a_whole_where_there_are_rules(command: str, ok: bool) -> None:
    tools = LocalMCPInvoker(["echo", "python"], shell_arguments={"echo": ["yes", r"\d+"]})

    said = shell(command, tools)

    assert ok is said["ok"]
    if not ok:
        assert "each argument must match one of these regular expressions as a whole: yes; \\d+" in said["error"]


# What is offered


@pytest.mark.parametrize("tools", [LocalMCPInvoker(), EchoMCP()], ids=["local", "echo"])
def test_the_tools_are_openai_functions_with_closed_schemas(tools: ToolInvoker) -> None:
    async def main() -> list[dict[str, Any]]:
        return await tools.list_openai_tools()

    for tool in asyncio.run(main()):
        function = tool["function"]
        schema = function["parameters"]

        assert {"type", "function"} == set(tool)
        assert {"name", "description", "parameters"} == set(function)
        assert (schema["type"], schema["additionalProperties"]) == ("object", False)
        assert set(schema["required"]) <= set(schema["properties"])
        assert json.loads(json.dumps(tool)) == tool


def test_the_model_is_told_what_it_may_do() -> None:
    tools = asyncio.run(LocalMCPInvoker(["echo", "git"], python_timeout_s=7, shell_timeout_s=9).list_openai_tools())
    described = [tool["function"]["description"] for tool in tools]

    assert "7 seconds" in described[0]
    assert "Allowed programs: echo, git. There is no shell" in described[1]
    assert "9 seconds" in described[1]


@needs_strict
def test_the_model_is_told_what_the_sandbox_lacks() -> None:
    async def told(**settings: Any) -> str:
        tools = await LocalMCPInvoker(**settings).list_openai_tools()
        return " ".join(str(tool["function"]["description"]) for tool in tools)

    closed = asyncio.run(told())
    opened = asyncio.run(told(network=True, read_paths=["/data"], shell_arguments={"echo": ["a", "b"]}))

    assert closed.count("none of this machine's files, no network") == 2
    assert "no network" not in opened
    assert "/data (read-only)" in opened
    assert "echo (arguments: a | b)" in opened
    assert "sandbox" not in asyncio.run(told(sandbox="off"))


def test_no_shell_is_offered_where_no_program_is_allowed() -> None:
    tools = asyncio.run(LocalMCPInvoker(()).list_openai_tools())

    assert [tool["function"]["name"] for tool in tools] == ["exec_python"]
    assert "none" in shell("echo", LocalMCPInvoker(()))["error"]


@pytest.mark.parametrize("text", ["hi", "", '{"ok": false}', "naïve\n漢字"])
def test_echo_returns_its_text(text: str) -> None:
    result = asyncio.run(EchoMCP().call_openai_tool(tool_call("echo", {"text": text})))

    assert ToolResult(text=text) == result


def test_echo_refuses_what_it_does_not_know() -> None:
    said = finish(EchoMCP().call_openai_tool(tool_call("exec_python", {"code": "1"})))[1]

    assert said["error"] == "there is no tool 'exec_python'; there is only echo"
