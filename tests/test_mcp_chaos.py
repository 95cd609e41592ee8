"""MCP servers that go wrong: each use of one ends in time, in words for the model, alone, and leaves nothing behind.

A trial is a case of `tests/chaos_server.py` on one transport in one era, beside a server that does everything right:
their tools are listed, the wrong one's is called, the right one's meanwhile and afterwards, and both are closed.
`python tests/chaos_server.py --table` prints what came of all of them.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
from attrs import evolve, frozen

from agent_fsm import AgentConfig, AgentRun, StopReason, ToolResult, arun_agent
from agent_fsm.protocol import AgentResult
from agent_fsm.testing import HANG, ScriptedModel, request_faults
from agent_fsm.tools.mcp import MCPInvoker
from agent_fsm.tools.mcp.config import ServerSpec
from tests.chaos_server import CASES

SLACK_S = 0.25
"""How far beyond its deadline anything may end, on a machine that has a core for it."""
CLOSING_S = 2.0
"""What the driver gives an invoker to close, while the run has time left."""
BLOCKED_S = 1.0
"""For how long the event loop may do nothing else: a process is started and reaped in place, and on a busy machine that
waits for a core too."""
PATIENT_S = 10.0
"""The deadline of what is to be done in time, however busy the machine."""
GIVE_UP_S = 30.0
"""When a trial is given up that does not end at all."""
START_S, CALL_S = 1.0, 0.5
"""The deadlines of what never comes."""

Given = TypeVar("Given")
SERVER = Path(__file__).with_name("chaos_server.py")

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="what is left is counted in Linux's /proc")


# What is expected


@frozen
class Expected:
    """What must come of a case."""

    told: str
    """A regular expression that is found in what the model is told of the call."""
    ok: bool = False
    sent: int = 1
    """How many calls reach the server."""
    at_most: int | None = None
    """How many may, if a server can ask to be called again."""
    startup_s: float = PATIENT_S
    tool_s: float = PATIENT_S
    text: str = "hello"
    """The argument of the call."""


def _works(**more: Any) -> Expected:
    return Expected("^work says hello$", ok=True, **more)


def _no_start(told: str) -> Expected:
    return Expected(told, sent=0, startup_s=START_S)


def _no_answer(told: str = r"no answer within 0\.5 s.*outcome unknown", **more: Any) -> Expected:
    return Expected(told, tool_s=CALL_S, **more)


_DIED = r"server 'chaos' was lost in this call.*outcome unknown"

EXPECTED: Mapping[str, Expected] = {
    "healthy": _works(),
    "never_answers": _no_start(r"not ready within 1 s"),
    "dies_at_start": _no_start(r"cannot open the database at /nowhere"),
    "dies_at_start http": _no_start(r"can't be reached"),
    "dies_in_handshake": _no_start(r"exited with code 1"),
    "dies_in_handshake http": _no_start(r"can't be reached|the connection failed"),
    "dies_in_call": Expected(_DIED),
    "hangs_in_call": _no_answer(),
    "hangs_in_list": _no_start(r"not ready within 1 s"),
    "dies_in_list": _no_start(r"exited with code 1"),
    "dies_in_list http": _no_start(r"can't be reached|the connection failed"),
    "list_error": _no_start(r"no disk"),
    "list_nonsense": _no_start(r"no list of tools"),
    "same_cursor": _works(),
    "new_cursors": _works(),
    "many_tools": _works(),
    "odd_names": _works(),
    "broken_schemas": _works(),
    "huge_result": Expected(r"more than 8,388,608 bytes.*outcome unknown"),
    "huge_event": Expected(r"more than 8,388,608 bytes.*outcome unknown"),
    "endless_line": Expected(r"more than [0-9,]+ bytes.*outcome unknown"),
    "floods_stderr": _works(),
    "endless_flood": _works(),
    "list_changed_storm": _works(),
    "asks_for_ever": Expected(r"asks for input again and again", at_most=11, tool_s=CALL_S),
    "asks_for_ever legacy": _no_answer(),
    "asks_more_and_more": Expected(r"asks 1000 questions", tool_s=CALL_S),
    "polls_for_ever": _no_answer(at_most=30),
    "garbage": _works(),
    "garbage_from_the_start": _works(),
    "wrong_id": _no_answer(),
    "error_reply": Expected(r"no disk"),
    "is_error": Expected(r"^there is no such city$"),
    "bad_output": Expected(r"so many(.|\n)*many", ok=True),
    "no_output": Expected(r"so many", ok=True),
    "broken_output_schema": Expected(r"so many", ok=True),
    "odd_content": Expected(r"hologram(.|\n)*and a word|and a word(.|\n)*hologram", ok=True),
    "nonsense_content": Expected(r"carried out, but its result has no list of content"),
    "null_result": Expected(r"no JSON-RPC.*outcome unknown"),
    "bad_base64": Expected(r"\[image image/png", ok=True),
    "lone_surrogate": Expected(r"half . a face", ok=True),
    "deep": Expected(r"(no JSON-RPC|deep).*outcome unknown"),
    "stops_reading": _no_answer(sent=0, text="x" * 1_000_000),
    "deaf": _works(),
    "deaf_and_hangs": _no_answer(),
    "heir": _works(),
    "heir_of_the_dead": Expected(_DIED, tool_s=2.0),
    "daemon": _works(),
    "http_500": Expected(r"HTTP 500 .*out of order"),
    "http_html": Expected(r"HTTP 200 with text/html.*outcome unknown"),
    "http_redirect": Expected(r"Redirect to .* not followed"),
    "http_loop": Expected(r"Redirect to .* not followed", at_most=4),
    "http_401": Expected(r"HTTP 401"),
    "http_drip": _no_answer(),
    "http_cut": Expected(_DIED, tool_s=2.0),
    "http_silence": Expected(_DIED, tool_s=2.0),
    "http_empty": Expected(r"no JSON-RPC.*outcome unknown"),
    "http_202": Expected(r"202 Accepted"),
    "http_bad_event": Expected(r"an event is no JSON-RPC.*outcome unknown"),
    "http_type": Expected(r"HTTP 200 with text/csv.*outcome unknown"),
    "http_500_always": _no_start(r"HTTP 500"),
    "http_html_always": _no_start(r"HTTP 200 with text/html"),
    "http_redirect_always": _no_start(r"Redirect to .* not followed"),
    "http_drip_always": _no_start(r"not ready within 1 s"),
    "http_silence_always": _no_start(r"the connection failed"),
}
"""By case, or by case and transport or era where that matters."""


# A trial and what came of it


@frozen
class Trial:
    """A case, where and how it is tried."""

    case: str
    transport: str
    era: str

    @property
    def name(self) -> str:
        return f"{self.case}-{self.transport}-{self.era}"

    @property
    def expected(self) -> Expected:
        kinds = (f"{self.case} {self.transport}", f"{self.case} {self.era}", self.case)
        return next(EXPECTED[kind] for kind in kinds if kind in EXPECTED)


RIGHT = Trial("healthy", "either", "modern")
"""The server beside the one that goes wrong."""
TRIALS = [
    Trial(name, transport, era) for name, case in CASES.items() for transport in case.transports for era in case.eras
]


@frozen
class Outcome:
    """What came of a trial."""

    trial: Trial
    listing_s: float
    """This and the next two are less what a busy machine kept this thread waiting."""
    call_s: float
    closing_s: float
    names: tuple[str, ...]
    result: ToolResult
    sent: int
    """Calls that reached the server."""
    beside: tuple[ToolResult, ...]
    """What the server that is right said: meanwhile and afterwards."""
    blocked_s: float
    """The longest time for which nothing else had a turn on the event loop."""
    left: tuple[str, ...]
    """Processes, tasks and open files that were still there when the invoker was closed."""

    def faults(self) -> Iterator[str]:
        """Give what is not as it must be, in words."""
        expected, result = self.trial.expected, self.result
        times = {
            "listing": (self.listing_s, expected.startup_s),
            "the call": (self.call_s, expected.tool_s),
            "closing": (self.closing_s, CLOSING_S),
        }
        for what, (seconds, deadline_s) in times.items():
            if seconds > deadline_s + SLACK_S:
                yield f"{what} took {seconds:.2f} s of {deadline_s:g} s"
        if self.blocked_s > BLOCKED_S:
            yield f"nothing else had a turn for {self.blocked_s:.2f} s"
        if not isinstance(result, ToolResult) or not re.search(expected.told, result.text, re.DOTALL):
            yield f"the model was told {_shown(result)}"
        elif result.ok is not expected.ok:
            yield f"ok is {result.ok}: {_shown(result)}"
        if not expected.sent <= self.sent <= (expected.at_most or expected.sent):
            yield f"{self.sent} calls reached the server"
        if [(each.ok, each.text) for each in self.beside] != [(True, "echo says there")] * 2:
            yield f"the server beside it said {[_shown(each) for each in self.beside]}"
        if "beside__echo" not in self.names:
            yield f"the tools of the server beside it are not listed, but {self.names[:9]}"
        yield from _illegal(self.names)
        yield from self.left


def _illegal(names: Collection[str]) -> Iterator[str]:
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
            yield f"a tool is named {name!r}"
    if len(set(names)) < len(names):
        yield "two tools have one name"


def _shown(result: object) -> str:
    return repr(result.text[:300] if isinstance(result, ToolResult) else result)


# Trying


def _command(trial: Trial, directory: Path, *more: str) -> list[str]:
    log = ["--log", str(directory / f"{'beside' if trial is RIGHT else trial.name}.log")]
    return [sys.executable, "-I", "-S", str(SERVER), trial.case, "--era", trial.era, *log, *more]


_TICK_S = 0.01
_LISTENING: set[int] = set()
"""The processes that are ours, and no invoker's."""


@contextmanager
def _listening(trial: Trial, directory: Path) -> Iterator[str]:
    """Give the URL at which the server of a trial listens, for as long as the block lasts."""
    command = _command(trial, directory, "--http", "0")
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        assert process.stdout is not None
        _LISTENING.add(process.pid)
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/mcp"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            _LISTENING.discard(process.pid)


def _spec(name: str, trial: Trial, directory: Path, url: str | None) -> ServerSpec:
    program, *arguments = [None] if url is not None else _command(trial, directory)
    expected = trial.expected
    return ServerSpec(
        name=name,
        command=program,
        args=tuple(arguments),
        url=url,
        startup_timeout_s=expected.startup_s,
        tool_timeout_s=expected.tool_s,
    )


def _call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


def _starved_s() -> float:
    """Return for how many seconds this thread has been ready to run while the machine had no core for it."""
    return int(Path("/proc/thread-self/schedstat").read_text("ascii").split()[1]) / 1e9


async def _timed(awaitable: Awaitable[Given]) -> tuple[Given, float]:
    """Return what comes of it and in how many seconds, less those for which a busy machine kept this thread waiting."""
    clock = asyncio.get_running_loop().time
    began = clock() - _starved_s()
    given = await awaitable
    return given, clock() - _starved_s() - began


async def _try(trial: Trial, directory: Path, url: str | None, beside: ServerSpec) -> Outcome:
    invoker: Any = MCPInvoker([_spec("chaos", trial, directory, url), beside]).for_run()
    with _none_left_open() as opened:
        async with _watched_loop() as blocked:
            try:
                tools, listing_s = await _timed(invoker.list_openai_tools())
                meanwhile = asyncio.ensure_future(invoker.call_openai_tool(_call("beside__echo", text="there")))
                call = _call("chaos__work", text=trial.expected.text)
                result, call_s = await _timed(invoker.call_openai_tool(call))
                neighbours = (await meanwhile, await invoker.call_openai_tool(_call("beside__echo", text="there")))
            finally:
                _, closing_s = await _timed(invoker.aclose())
        left = [*await _settled(lambda: processes(str(directory))), *await _settled(opened)]
    log = directory / f"{trial.name}.log"
    return Outcome(
        trial=trial,
        listing_s=listing_s,
        call_s=call_s,
        closing_s=closing_s,
        names=tuple(tool["function"]["name"] for tool in tools),
        result=result,
        sent=len(log.read_text("utf-8").splitlines()) if log.exists() else 0,
        beside=neighbours,
        blocked_s=max(blocked),
        left=tuple(left),
    )


@asynccontextmanager
async def _watched_loop() -> AsyncIterator[list[float]]:
    """Give the seconds by which a timer was late, each time that it was due while the block lasted."""
    late: list[float] = []

    async def watch() -> None:
        while True:
            _, seconds = await _timed(asyncio.sleep(_TICK_S))
            late.append(seconds - _TICK_S)

    watching = asyncio.ensure_future(watch())
    try:
        await asyncio.sleep(2 * _TICK_S)
        yield late
    finally:
        watching.cancel()
        await asyncio.wait({watching})


async def _settled(count: Callable[[], Sequence[str]]) -> Sequence[str]:
    """Return what *count* finds once it finds nothing, or after the slack."""
    loop = asyncio.get_running_loop()
    until = loop.time() + SLACK_S
    while (left := count()) and loop.time() < until:  # noqa: ASYNC110 - processes have no event to wait for
        await asyncio.sleep(0.01)
    return left


def processes(marker: str) -> list[str]:
    """Return the processes, zombies among our children included, that have *marker* among their arguments."""
    return [f"process {pid} is left {what}" for pid, what in _processes(marker).items()]


def _processes(marker: str) -> dict[int, str]:
    found = {}
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit() and int(directory.name) not in _LISTENING:
            try:
                arguments = (directory / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                state, parent = (directory / "stat").read_text("utf-8").rpartition(")")[2].split()[:2]
            except OSError:  # it has ended meanwhile
                continue
            if marker in arguments or (state == "Z" and int(parent) == os.getpid()):
                found[int(directory.name)] = f"({state}): {arguments.strip() or 'a zombie'}"
    return found


@contextmanager
def _no_trace(marker: str) -> Iterator[None]:
    """See to it that what a failing test leaves does not outlive it."""
    try:
        yield
    finally:
        for pid in _processes(marker):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _open_files() -> dict[str, str]:
    found = {}
    for each in Path("/proc/self/fd").iterdir():
        try:
            found[each.name] = str(each.readlink())
        except OSError:  # the directory itself, by now
            continue
    return {name: target for name, target in found.items() if not target.endswith("/fd")}


@contextmanager
def _none_left_open() -> Iterator[Callable[[], list[str]]]:
    """Give a function that tells which tasks and open files there are that were not there when the block began."""
    files, tasks = set(_open_files().items()), asyncio.all_tasks()

    def left() -> list[str]:
        new = [f"an open file is left: {target}" for _, target in set(_open_files().items()) - files]
        return new + [f"a task is left: {task!r}" for task in asyncio.all_tasks() - tasks]

    yield left


def attempt(trial: Trial, directory: Path, right_url: str) -> Outcome:
    """Return what comes of a trial. The server beside it speaks the same transport: the one at *right_url*, or one of
    its own."""

    async def main() -> Outcome:
        async with asyncio.timeout(GIVE_UP_S):
            return await _try(trial, directory, url, beside)

    with ExitStack() as servers, _no_trace(str(directory)):
        over_http = trial.transport == "http"
        url = servers.enter_context(_listening(trial, directory)) if over_http else None
        beside = _spec("beside", RIGHT, directory, right_url if over_http else None)
        return asyncio.run(main())


@contextmanager
def _warm() -> Iterator[str]:
    """Give the URL of a server that does everything right, once what is imported late or opened once and for all is."""
    with tempfile.TemporaryDirectory() as directory, _listening(RIGHT, Path(directory)) as url:
        for transport in ("stdio", "http"):
            attempt(Trial("healthy", transport, "modern"), Path(directory), url)
        yield url


def print_table() -> None:
    """Try everything, one after the other, and print what came of it."""
    titles = f"{'list':>5} {'call':>5} {'close':>5} {'block':>5} sent left"
    print(f"{'case':22} {'transport':9} {'era':6} {titles}  what the model was told")
    faults = 0
    with _warm() as right_url:
        for trial in TRIALS:
            with tempfile.TemporaryDirectory() as directory:
                outcome = attempt(trial, Path(directory), right_url)
            faults += _print_row(outcome)
    print(f"{len(TRIALS)} trials of {len(CASES)} cases, {faults} faults; in seconds, waiting for a core not counted")


def _print_row(outcome: Outcome) -> int:
    """Print what came of a trial; return how much of it is wrong."""
    trial, faults = outcome.trial, list(outcome.faults())
    seconds = (outcome.listing_s, outcome.call_s, outcome.closing_s, outcome.blocked_s)
    counts = f"{' '.join(f'{each:5.2f}' for each in seconds)} {outcome.sent:4} {len(outcome.left):4}"
    told = json.dumps(outcome.result.text, ensure_ascii=False)
    print(f"{trial.case:22} {trial.transport:9} {trial.era:6} {counts}  {told}", flush=True)
    for fault in faults:
        print(f"    NOT AS IT MUST BE: {fault}", flush=True)
    return len(faults)


@pytest.fixture(scope="module", autouse=True)
def right_url() -> Iterator[str]:
    """Give the URL of a server that does everything right, in a process that has everything imported."""
    with _warm() as url:
        yield url


# That they can fail


def test_every_case_says_what_must_come_of_it() -> None:
    cases = {name.partition(" ")[0] for name in EXPECTED}

    assert cases == set(CASES)


def test_the_checks_find_whatever_is_wrong() -> None:
    wrong = Outcome(
        trial=Trial("healthy", "stdio", "modern"),
        listing_s=PATIENT_S + 2 * SLACK_S,
        call_s=PATIENT_S + 2 * SLACK_S,
        closing_s=CLOSING_S + 2 * SLACK_S,
        names=("a b", "a b"),
        result=ToolResult("MCPError(-32000)"),
        sent=2,
        beside=(ToolResult("echo says there"), ToolResult("Connection closed", ok=False)),
        blocked_s=2 * BLOCKED_S,
        left=("a process is left",),
    )

    assert len(list(wrong.faults())) == 12


def test_what_is_left_is_found(tmp_path: Path) -> None:
    async def main() -> list[str]:
        with _none_left_open() as left, (tmp_path / "file").open("w"):
            task = asyncio.ensure_future(asyncio.sleep(60))
            found = left()
            task.cancel()
        return found

    with subprocess.Popen([sys.executable, "-c", "input()", str(tmp_path)], stdin=subprocess.PIPE) as process:
        running = processes(str(tmp_path))
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        zombies = processes(str(tmp_path))

    assert [each.partition(" (")[0] for each in running] == [f"process {process.pid} is left"]
    assert [each.partition(":")[0] for each in zombies] == [f"process {process.pid} is left (Z)"]
    assert processes(str(tmp_path)) == []
    assert sorted(each.partition(":")[0] for each in asyncio.run(main())) == ["a task is left", "an open file is left"]


# Server by server

QUICK = (
    *("never_answers", "dies_in_call", "hangs_in_call", "same_cursor", "odd_names", "asks_for_ever", "garbage"),
    *("many_tools", "huge_result", "floods_stderr", "list_changed_storm"),
)
"""The cases that stand for the others where there is little time."""


def _parameter(trial: Trial) -> Any:
    quick = trial.case in QUICK and (trial.era == "modern" or trial.case in ("dies_in_call", "asks_for_ever"))
    return pytest.param(trial, id=trial.name, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("trial", list(map(_parameter, TRIALS)))
def test_a_server_that_goes_wrong_harms_nobody(trial: Trial, tmp_path: Path, right_url: str) -> None:
    assert list(attempt(trial, tmp_path, right_url).faults()) == []


# In whole runs

TASK = [{"role": "user", "content": "Go."}]


@frozen
class Setting:
    """The servers of a run, and what their processes have among their arguments."""

    specs: tuple[ServerSpec, ServerSpec]
    marker: str


@contextmanager
def _setting(trial: Trial, directory: Path, timeout_s: float | None = None) -> Iterator[Setting]:
    """Give the servers of a run; *timeout_s*, if given, is how long the one that goes wrong may take for anything."""
    with ExitStack() as servers, _no_trace(str(directory)):
        url = servers.enter_context(_listening(trial, directory)) if trial.transport == "http" else None
        chaos = _spec("chaos", trial, directory, url)
        if timeout_s is not None:
            chaos = evolve(chaos, startup_timeout_s=timeout_s, tool_timeout_s=timeout_s)
        beside = _spec("beside", RIGHT, directory, None)
        yield Setting((chaos, beside), str(directory))


async def _left(setting: Setting, opened: Callable[[], list[str]]) -> list[str]:
    """Return the processes, open files and tasks that a run has left."""
    return [*await _settled(lambda: processes(setting.marker)), *await _settled(opened)]


async def _run(setting: Setting, seconds: float, model: ScriptedModel) -> tuple[AgentResult, float, list[str]]:
    """Return what came of a run, the seconds that it took, and what it left."""
    with _none_left_open() as left:
        config = AgentConfig(max_wallclock_seconds=seconds)
        tools: Any = MCPInvoker(setting.specs)
        result, took_s = await _timed(arun_agent(TASK, tools, config, model_client=model))
        return result, took_s, await _left(setting, left)


def _running(setting: Setting, seconds: float, model: ScriptedModel) -> tuple[AgentResult, float, list[str]]:
    return asyncio.run(_run(setting, seconds, model))


def _told(result: AgentResult) -> list[str]:
    return [str(message["content"]) for message in result.messages if message["role"] == "tool"]


@pytest.mark.parametrize(
    "case", ["dies_in_call-http-modern", "dies_in_call-stdio-legacy", "hangs_in_call-stdio-modern"]
)
def test_a_run_goes_on_when_a_tool_goes_wrong(case: str, tmp_path: Path) -> None:
    trial = next(trial for trial in TRIALS if trial.name == case)
    model = ScriptedModel([[("chaos__work", {})], [("beside__echo", {"text": "there"})], "Done."])

    with _setting(trial, tmp_path) as setting:
        result, _, left = _running(setting, 20.0, model)

    assert (result.stopped_reason, result.final_answer, left) == (StopReason.SUCCESS, "Done.", [])
    assert re.search(trial.expected.told, _told(result)[0], re.DOTALL)
    assert "echo says there" in _told(result)[1]
    assert [request_faults(request.messages) for request in model.requests] == [[]] * 3


def test_a_run_goes_on_without_a_server_that_never_answers(tmp_path: Path) -> None:
    model = ScriptedModel([[("chaos__work", {})], [("beside__echo", {"text": "there"})], "Done."])

    with _setting(Trial("never_answers", "stdio", "modern"), tmp_path) as setting:
        result, _, left = _running(setting, 20.0, model)

    assert (result.stopped_reason, left) == (StopReason.SUCCESS, [])
    assert [tool["function"]["name"] for tool in model.requests[0].tools] == ["beside__work", "beside__echo"]
    assert "echo says there" in _told(result)[1]


@pytest.mark.parametrize(
    ("case", "transport"),
    [
        ("never_answers", "stdio"),
        ("never_answers", "http"),
        ("hangs_in_call", "http"),
        ("deaf_and_hangs", "stdio"),
        ("list_changed_storm", "stdio"),
    ],
)
def test_a_run_ends_at_its_deadline_whatever_its_tools_do(case: str, transport: str, tmp_path: Path) -> None:
    deadline_s = 1.0
    model = ScriptedModel([[("chaos__work", {})], HANG])

    with _setting(Trial(case, transport, "modern"), tmp_path, timeout_s=9.0) as setting:
        result, took_s, left = _running(setting, deadline_s, model)

    assert (result.stopped_reason, left) == (StopReason.MAX_WALLCLOCK, [])
    assert took_s <= deadline_s + SLACK_S
    assert [request_faults(request.messages) for request in model.requests] == [[]] * len(model.requests)


@pytest.mark.parametrize("case", ["never_answers", "deaf_and_hangs"])
def test_a_cancelled_run_leaves_nothing(case: str, tmp_path: Path) -> None:
    async def main(setting: Setting) -> tuple[AgentResult, float, list[str]]:
        with _none_left_open() as left:
            tools: Any = MCPInvoker(setting.specs)
            run = AgentRun(TASK, tools, model_client=ScriptedModel([[("chaos__work", {})], "Done."]))
            waiting = asyncio.ensure_future(_awaited(run))
            await asyncio.sleep(0.4)
            run.cancel()
            _, took_s = await _timed(waiting)
            return run.result, took_s, await _left(setting, left)

    with _setting(Trial(case, "stdio", "modern"), tmp_path, timeout_s=9.0) as setting:
        result, took_s, left = asyncio.run(main(setting))

    assert (result.stopped_reason, left) == (StopReason.CANCELLED, [])
    assert took_s <= SLACK_S


async def _awaited(run: AgentRun) -> None:
    await run


def test_runs_that_share_an_invoker_do_not_share_its_faults(tmp_path: Path) -> None:
    async def main(setting: Setting) -> list[tuple[AgentResult, list[str]]]:
        tools: Any = MCPInvoker(setting.specs)
        script = [[("chaos__work", {})], [("chaos__echo", {"text": "there"})], "Done."]
        with _none_left_open() as left:
            results = await asyncio.gather(
                *(arun_agent(TASK, tools, model_client=ScriptedModel(script)) for _ in range(3))
            )
            found = await _left(setting, left)
        return [(result, found) for result in results]

    with _setting(Trial("dies_in_call", "stdio", "modern"), tmp_path) as setting:
        outcomes = asyncio.run(main(setting))

    assert [(result.stopped_reason, left) for result, left in outcomes] == [(StopReason.SUCCESS, [])] * 3
    assert len((tmp_path / "dies_in_call-stdio-modern.log").read_text("utf-8").splitlines()) == 6
