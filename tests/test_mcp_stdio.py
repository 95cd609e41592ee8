"""Lines, bodies and events of MCP servers, and their processes: bounded, mended where that can be, and nothing left."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_fsm.tools.mcp.reader import Events, named_id, read_message, wanted_by
from agent_fsm.tools.mcp.stdio import MAX_LINE_BYTES, Child, child_environment

SLACK_S = 0.25
MIB = 1024 * 1024

T = TypeVar("T")

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="what is left is counted in Linux's /proc")


# Processes


def alive(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def with_child(code: str, work: Callable[[Child], Awaitable[T]], wanted: Callable[[bytes], bool] | None = None) -> T:
    """Return what *work* does with a Python program; fails if it leaves descriptors."""

    async def main() -> T:
        held = descriptors()
        child = Child([sys.executable, "-I", "-S", "-c", code], dict(os.environ), None, wanted=wanted or bool)
        try:
            result = await work(child)
            await child.aclose()
        finally:
            child.kill()
        assert descriptors() == held
        return result

    return asyncio.run(main())


async def all_lines(child: Child) -> list[bytes]:
    found = []
    while (line := await child.next_line()) is not None:
        found.append(line)
    return found


def test_lines_go_in_and_come_out() -> None:
    async def work(child: Child) -> list[bytes | None]:
        await child.write(b"one\n")
        await child.write(b"two\n")
        return [await child.next_line(), await child.next_line()]

    found = with_child("import sys\nfor line in sys.stdin: print(line.upper(), end='', flush=True)", work)

    assert found == [b"ONE", b"TWO"]


def test_a_line_at_the_limit_is_whole_and_of_a_longer_one_only_the_head_is_left() -> None:
    code = f"print('a' * {MAX_LINE_BYTES}); print('b' * {MAX_LINE_BYTES + 1}); print('c')"

    whole, head, last = with_child(code, all_lines)

    assert whole == b"a" * MAX_LINE_BYTES
    assert (head, last) == (b"b" * 4_096 + b"\0", b"c")


def test_a_line_of_20_mb_is_read_in_no_time() -> None:
    began = time.process_time()

    lines = with_child("print('a' * 20_000_000); print('b')", all_lines)

    assert lines[1:] == [b"b"]
    assert time.process_time() - began < 1.0


def test_a_line_without_end_ends_the_reading() -> None:
    async def work(child: Child) -> tuple[list[bytes], str]:
        return await all_lines(child), child.why_ended

    lines, why = with_child("import sys\nwhile True: sys.stdout.write('x' * 100_000)", work)

    assert lines == []
    assert why == f"it wrote a line of more than {8 * MAX_LINE_BYTES:,} bytes"


def test_the_end_of_stderr_is_kept_however_much_there_is() -> None:
    async def work(child: Child) -> str:
        assert await child.next_line() == b"done"
        return child.stderr

    flood = "import sys\nfor _ in range(1000): sys.stderr.write('x' * 50_000)\n"
    code = f"{flood}sys.stderr.write('the end'); sys.stderr.flush(); print('done')"

    assert with_child(code, work)[-20:] == "x" * 13 + "the end"


def test_a_server_that_reads_nothing_does_not_hold_up_the_closing() -> None:
    async def work(child: Child) -> tuple[bool, float]:
        writing = asyncio.ensure_future(child.write(b"x" * MIB + b"\n"))
        await asyncio.wait({writing}, timeout=0.1)
        stuck = not writing.done()
        began = time.monotonic()
        await child.aclose()
        await asyncio.wait({writing}, timeout=SLACK_S)
        assert isinstance(writing.exception(), OSError)
        return stuck, time.monotonic() - began

    stuck, seconds = with_child("import time; time.sleep(60)", work)

    assert stuck
    assert seconds < 1.5 + SLACK_S


def test_a_server_that_ends_with_its_stdin_is_closed_in_peace() -> None:
    async def work(child: Child) -> int | None:
        await child.aclose()
        return child.returncode

    assert with_child("import sys; sys.stdin.read(); sys.exit(5)", work) == 5


def test_one_that_does_not_gets_sigterm_and_one_that_is_deaf_to_that_is_killed() -> None:
    async def work(child: Child) -> int | None:
        assert await child.next_line() == b"up"
        await child.aclose()
        return child.returncode

    sleep = "import signal, time; {}; print('up', flush=True); time.sleep(60)"

    assert with_child(sleep.format("pass"), work) == -signal.SIGTERM
    assert with_child(sleep.format("signal.signal(signal.SIGTERM, signal.SIG_IGN)"), work) == -signal.SIGKILL


@pytest.mark.parametrize("leaving", ["", "os.setsid(); os.fork() and os._exit(0)"])
@pytest.mark.parametrize("dies", [True, False])
def test_what_a_server_has_started_ends_with_it(leaving: str, dies: bool) -> None:
    code = (
        "import os, signal, sys, time\n"
        "if os.fork() == 0:\n"
        f"    signal.signal(signal.SIGTERM, signal.SIG_IGN); {leaving}\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
        f"{'time.sleep(0.2); sys.exit()' if dies else 'sys.stdin.read()'}"
    )

    async def work(child: Child) -> int:
        line = await child.next_line()
        assert line is not None
        pid = int(line)
        assert alive(pid)
        await child.aclose()
        return pid

    assert not alive(with_child(code, work))


def test_lines_that_nobody_wants_are_not_kept() -> None:
    lines = with_child("print('a'); print('b')", all_lines, wanted=lambda line: line != b"a")

    assert lines == [b"b"]


def test_a_server_that_writes_faster_than_it_is_read_has_to_wait() -> None:
    async def work(child: Child) -> int:
        await asyncio.sleep(0.5)
        return child._lines._waiting_bytes

    held = with_child("while True: print('x' * 100_000)", work)

    assert held <= MAX_LINE_BYTES + 2 * MIB


def test_a_process_gets_few_of_our_variables() -> None:
    ours = {"PATH": "/bin", "LC_ALL": "C", "OPENAI_API_KEY": "k", "PYTHONPATH": "x"}

    assert child_environment(ours, {"MINE": "1", "LC_ALL": "de"}) == {"PATH": "/bin", "LC_ALL": "de", "MINE": "1"}


# Messages


def test_half_a_character_is_mended() -> None:
    message = read_message(b'{"jsonrpc":"2.0","id":1,"result":{"a":"half \\ud83d"}}')

    assert message is not None
    assert message.model_dump()["result"] == {"a": "half ?"}


@given(st.binary() | st.lists(st.text() | st.none()).map(lambda value: json.dumps(value).encode()))
def test_no_bytes_can_make_the_reader_raise(data: bytes) -> None:
    assert read_message(data) is None
    assert named_id(data) is None


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b'{"jsonrpc":"2.0","id":7,"result":{"content":[', 7),
        (b'{"id" : "a\\"b" , "error":', 'a"b'),
        (b'{"id":1.5,"result":{}}', None),
        (b'{"id":7}', None),
        (b'{"method":"x","id":7,"result":1}', None),
        (b'[{"id":7,"result":1}]', None),
    ],
)
def test_the_request_that_an_unreadable_answer_is_to_is_found(data: bytes, named: object) -> None:
    assert named_id(data) == named


def test_a_storm_of_notifications_is_dropped_as_it_arrives_and_noted() -> None:
    changes: list[None] = []
    wanted = wanted_by(lambda: changes.append(None))
    storm = b'{"jsonrpc":"2.0","method":"notifications/tools/list_changed"}'

    dropped = [wanted(line) for line in (storm, storm, b'{"method":"notifications/progress","params":{}}')]
    kept = [wanted(line) for line in (b'{"id":1,"result":{}}', b'{"method":"notifications/cancelled"}', b"what?")]

    assert (dropped, kept, len(changes)) == ([False] * 3, [True] * 3, 2)


ANSWER = b'{"jsonrpc":"2.0","id":1,"result":{"a":"b"}}'


def passed(*chunks: bytes, limit: int = 1_000) -> list[bytes]:
    events = Events(wanted_by(lambda: None), limit, lambda why: f'{{"failed":"{why}"}}'.encode())
    return [event for event in b"".join(events.take(chunk) for chunk in chunks).split(b"\n\n") if event]


@given(st.integers(1, 40))
def test_an_event_is_passed_on_however_it_is_cut(size: int) -> None:
    stream = b": hello\r\nid: 7\r\nevent: message\r\ndata: " + ANSWER + b"\r\n\r\ndata: " + ANSWER + b"\n\n"
    chunks = [stream[at : at + size] for at in range(0, len(stream), size)]

    assert passed(*chunks) == [
        b"id: 7\nevent: message\ndata: " + ANSWER,
        b"event: message\ndata: " + ANSWER,
    ]


def test_what_is_no_message_is_left_out_of_a_stream() -> None:
    assert passed(b"event: odd\ndata: what\n\nno field\n\n\n\ndata: " + ANSWER + b"\n\n") == [
        b"event: message\ndata: " + ANSWER
    ]


def test_an_event_that_can_not_be_read_fails_its_request() -> None:
    assert passed(b"data: {what}\n\n") == [b'event: message\ndata: {"failed":"an event is no JSON-RPC"}']


@pytest.mark.parametrize("lines", [1, 50])
def test_an_event_over_the_limit_fails_its_request_and_is_not_kept(lines: int) -> None:
    stream = (b"data: " + b"x" * (2_000 // lines) + b"\n") * lines

    found = passed(stream + b"\ndata: " + ANSWER + b"\n\n")

    assert found == [
        b'event: message\ndata: {"failed":"the event has more than 1,000 bytes"}',
        b"event: message\ndata: " + ANSWER,
    ]
