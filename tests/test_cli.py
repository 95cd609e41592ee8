"""The command `agent-fsm`, run as people run it: in a process of its own, with signals, pipes and terminals."""

import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fcntl import ioctl
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from attrs import fields, frozen
from hypothesis import given
from hypothesis import strategies as st

from agent_fsm.check import verify
from agent_fsm.cli.commands import ExitCode, cli, exit_code
from agent_fsm.cli.settings import settings
from agent_fsm.cli.view import clean, path_text
from agent_fsm.config import AgentConfig
from agent_fsm.diagrams import dot, mermaid, svg
from agent_fsm.protocol import CALL_TOOLS, DONE, OBSERVE, PLAN, REPAIR, AgentResult, State, StopReason
from agent_fsm.table import TABLE
from tests.examples.draw_terminal import draw

ROOT = Path(__file__).parent.parent
ROOT = Path(__file__).parent.parent
HELLO = "Run python: print('hello') then summarize the result."
SLEEP = "Run python: import time; time.sleep(30)"
TWO_TURNS = "1. Run python: print(1)\n2. Run python: print(2)"

DEADLINE_S = 1.0
"""Within which a cancelled run ends."""
SLACK_S = 5.0
"""What a busy machine may add. What must not delay the end sleeps far longer."""
TIMEOUT_S = 60.0
"""After which a test gives up."""

linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")


# Running the command


def environment(**more: str) -> dict[str, str]:
    """This process's variables, but for what would configure an agent or a terminal."""
    ours = re.compile(r"AGENT_FSM_|.*_API_KEY$|(TERM|COLUMNS|LINES|NO_COLOR|FORCE_COLOR)$")
    return {name: value for name, value in os.environ.items() if not ours.match(name)} | more


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "agent_fsm.cli", *arguments]


def ran(*arguments: str, stdin: str = "", **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(*arguments),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=environment(**variables),
        check=False,
    )


@contextmanager
def started(*arguments: str) -> "Iterator[subprocess.Popen[str]]":
    process = subprocess.Popen(
        command(*arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def children(pid: int) -> set[int]:
    """Return the living children of *pid*."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # gone meanwhile
            continue
        if int(parent) == pid and state != "Z":
            found.add(int(stat.parent.name))
    return found


def descendants(pid: int) -> set[int]:
    """Return the living children of *pid*, and theirs: a contained process is further down."""
    below = children(pid)
    return below.union(*(descendants(each) for each in below))


def tool_process(parent: int) -> int:
    """Return the process of the tool that *parent* runs, once there is one."""
    give_up = time.monotonic() + TIMEOUT_S
    while time.monotonic() < give_up:
        for pid in descendants(parent):
            with suppress(OSError):
                # The probe of the sandbox gives its script arguments
                if Path(f"/proc/{pid}/cmdline").read_text().endswith("script.py\0"):
                    return pid
        time.sleep(0.02)
    raise AssertionError("no tool was started")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@frozen
class Stopped:
    """What a command did that a signal came to while its tool was running."""

    code: int
    seconds: float
    """From the signal to the end."""
    stdout: str
    stderr: str
    tool_alive: bool


def stopped_by(number: signal.Signals, *arguments: str, times: int = 1) -> Stopped:
    with started("run", SLEEP, *arguments) as process:
        tool = tool_process(process.pid)
        began = time.monotonic()
        for _ in range(times):
            process.send_signal(number)
            time.sleep(0.03)
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)
        return Stopped(process.returncode, time.monotonic() - began, stdout, stderr, alive(tool))


# What comes out


def test_an_answer_is_exit_code_0_and_stands_last() -> None:
    done = ran("run", HELLO)

    assert done.returncode == ExitCode.ANSWERED
    assert done.stdout.startswith("model: offline planner, not a language model")
    assert "exec_python ok, rc 0" in done.stdout
    assert "Plan > Observe > Plan > CallTools > Observe > Plan > Observe > Done" in done.stdout
    assert done.stdout.endswith("| hello\n")
    assert done.stderr == ""


def test_each_step_is_one_line() -> None:
    done = ran("run", "1. Run python: print('a\\nb')\n2. Run python: 1/0")

    steps = re.findall(r"^ +[0-9.]+ s  (\w+ +\w+ ?\w*)", done.stdout, re.MULTILINE)
    assert [" ".join(step.split()) for step in steps] == [
        "Plan tools",
        "Plan asks for",
        "CallTools exec_python ok",
        "Plan asks for",
        "CallTools exec_python failed",
        "Repair answers",
    ]


@pytest.mark.parametrize("more", [(), ("--closing-summary",)])
def test_a_run_that_a_limit_ended_is_exit_code_3(more: tuple[str, ...]) -> None:
    done = ran("run", TWO_TURNS, "--max-iterations", "1", *(more or ["--no-closing-summary"]))

    assert done.returncode == ExitCode.LIMIT
    assert "max_iterations: the requests of --max-iterations were used up" in done.stdout


def test_every_reason_has_its_exit_code() -> None:
    codes = {reason: exit_code(reason) for reason in StopReason}

    limits = ("max_iterations", "max_wallclock", "stagnation", "max_failures", "budget")
    assert codes == {
        "success": 0,
        "model_error": 1,
        "tools_unavailable": 1,
        "refused": 1,
        **dict.fromkeys(limits, 3),
        "cancelled": 130,
    }


def test_quiet_prints_the_answer_only() -> None:
    done = ran("run", "Run python: print('hello')", "--quiet")

    assert done.stdout == "Offline planner (not a language model):\nhello\n"


def test_quiet_without_an_answer_says_why_on_standard_error() -> None:
    done = ran("run", TWO_TURNS, "--max-iterations", "1", "--no-closing-summary", "--quiet")

    assert (done.returncode, done.stdout) == (ExitCode.LIMIT, "")
    assert "max_iterations" in done.stderr


def test_json_is_one_object_with_the_whole_result() -> None:
    done = ran("run", HELLO, "--json")

    told = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert told.keys() == {each.name for each in fields(AgentResult)}
    assert told["stopped_reason"] == "success"
    assert told["path"] == ["Plan", "Observe", "Plan", "CallTools", "Observe", "Plan", "Observe", "Done"]
    assert [message["role"] for message in told["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert [event["event"] for event in told["events"]] == [
        "ToolsListed",
        "ModelReplied",
        "ToolsFinished",
        "ModelReplied",
    ]
    assert done.stderr == ""


def test_plain_output_has_no_escape_codes_and_reads_no_markup() -> None:
    done = ran("run", r"""Run python: print("\x1b[31mred\x1b[0m \x07 \x9b5m [bold]x[/bold] \x1b]0;title\x07")""")

    assert done.returncode == ExitCode.ANSWERED
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", done.stdout)
    assert "[bold]x[/bold]" in done.stdout


def test_log_lines_go_to_standard_error() -> None:
    done = ran("run", HELLO, "--log")

    assert done.stdout.endswith("| hello\n")
    assert len(re.findall(r"stepped .*target=", done.stderr)) == 4


def test_the_task_may_come_by_standard_input() -> None:
    done = ran("run", "-", "--quiet", stdin="Run python: print('by pipe')")

    assert done.stdout.endswith("by pipe\n")


def test_a_reader_that_leaves_ends_the_run_quietly_and_the_transcript_is_saved(tmp_path: Path) -> None:
    saved = tmp_path / "messages.json"
    with started("run", "Run python: import time; time.sleep(1)", "--save", str(saved)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        stderr = process.stderr.read()
        code = process.wait(TIMEOUT_S)

    assert (code, stderr) == (ExitCode.FAILED, "")
    assert json.loads(saved.read_text())[0]["role"] == "user"


# How it is used


USAGE_ERRORS = [
    ((), "Missing argument 'TASK'"),
    (("",), "TASK is empty"),
    ((HELLO, "--max-iteration", "5"), "No such option"),
    ((HELLO, "--max-iterations", "five"), "--max-iterations: max_iterations must be a whole number >= 1, not 'five'"),
    ((HELLO, "--config", "nowhere.toml"), "nowhere.toml can't be read: No such file or directory"),
    ((HELLO, "--tools", "http"), "'http' is not one of 'local', 'echo', 'research', 'none'"),
    ((HELLO, "--shell-allow", "a b"), "each must be one bare name or absolute path, not 'a b'"),
    ((HELLO, "--save", "no/such/folder/x.json"), "--save: there is no folder no/such/folder"),
]


@pytest.mark.parametrize(("arguments", "told"), USAGE_ERRORS)
def test_wrong_use_is_exit_code_2_and_told(arguments: tuple[str, ...], told: str) -> None:
    done = ran("run", *arguments)

    assert (done.returncode, done.stdout) == (ExitCode.USAGE, "")
    assert told in " ".join(done.stderr.split())


def test_an_option_beats_a_variable_which_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text("max_iterations = 1\nclosing_summary = false\n")
    one, five = "1", "5"

    codes = [
        ran("run", TWO_TURNS, "--config", str(file)).returncode,
        ran("run", TWO_TURNS, AGENT_FSM_CONFIG=str(file), AGENT_FSM_MAX_ITERATIONS=five).returncode,
        ran("run", TWO_TURNS, "--max-iterations", one, AGENT_FSM_MAX_ITERATIONS=five).returncode,
    ]

    assert codes == [ExitCode.LIMIT, ExitCode.ANSWERED, ExitCode.LIMIT]


def test_every_field_has_an_option_with_its_words() -> None:
    options = {each.name: each for each in cli.commands["run"].params if isinstance(each, click.Option)}

    for each in settings():
        assert each.option in options[each.name].opts
        assert f"--no-{each.option[2:]}" in options[each.name].secondary_opts or each.kind is not bool
        assert (options[each.name].help or "").startswith(f"{each.doc} [")


def test_help_lists_every_option_once_and_what_most_people_want_first() -> None:
    told = ran("run", "--help").stdout

    listed = re.findall(r"^  (?:-h, )?--(?:\[no-\])?([a-z-]+)", told, re.MULTILINE)
    options = [each.opts[0][2:] for each in cli.commands["run"].params if isinstance(each, click.Option)]
    assert sorted(listed) == sorted([*options, "help"])
    assert listed[:4] == ["model", "tools", "mcp-config", "tools-url"]


def test_help_says_what_each_exit_code_means() -> None:
    told = ran("run", "--help").stdout.partition("Exit codes:")[2]

    assert [int(code) for code in re.findall(r"^ +(\d+)  ", told, re.MULTILINE)] == list(ExitCode)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("run", "--help"),
        ("check", "--help"),
        ("tools",),
        ("diagram",),
        ("--version",),
        ("check", "--max-iterations", "1"),
    ],
)
def test_help_tools_diagram_and_check_load_nothing_heavy(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "agent_fsm.cli", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=environment(),
        check=True,
    )

    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "click" in loaded
    assert not loaded & {"litellm", "rich", "httpx", "mcp", "structlog", "pydantic"}


def test_the_version_is_that_of_the_package() -> None:
    assert ran("--version").stdout == f"agent-fsm, version {version('agent-fsm')}\n"


def test_tools_are_those_the_model_is_offered() -> None:
    offered = json.loads(ran("tools", "--json", "--shell-allow", "ls").stdout)
    told = ran("tools", "--tools", "echo").stdout

    assert [tool["function"]["name"] for tool in offered] == ["exec_python", "exec_shell"]
    assert "Allowed programs: ls." in offered[1]["function"]["description"]
    assert told.startswith("echo\n  Returns the text it is given.\n    text (string, required)")


def test_without_allowed_programs_there_is_no_shell() -> None:
    offered = json.loads(ran("tools", "--json", "--shell-allow", "none").stdout)

    assert [tool["function"]["name"] for tool in offered] == ["exec_python"]


@pytest.mark.parametrize(("form", "draw"), [("mermaid", mermaid), ("dot", dot), ("svg", svg)])
def test_a_diagram_is_written_as_it_is_drawn(tmp_path: Path, form: str, draw: Callable[[], str]) -> None:
    file = tmp_path / "diagram"

    done = ran("diagram", "--format", form, "--output", str(file))

    assert (done.returncode, done.stdout) == (0, "")
    assert file.read_bytes() == draw().encode(), "the same each time: no date, no order of chance"


def test_the_diagram_in_the_repository_is_the_one_that_is_printed() -> None:
    kept = Path(__file__).parent.parent / "diagrams" / "agent.mmd"

    assert ran("diagram").stdout == kept.read_text(encoding="utf-8")


# agent-fsm check


POLICIES = """
from agent_fsm import TABLE, StopReason, opaque
from agent_fsm.table import ledger

print("imported")
SHELLS = (ledger.calls_of("exec_shell") >= 3).named("three shells")
CAREFUL = TABLE.stopping(SHELLS, StopReason.BUDGET)
ENDLESS = TABLE.without("iterations at max, closing", "iterations at max")
CUT = TABLE.without("always")
TRUTHY = TABLE.stopping(opaque(lambda ledger: 1), StopReason.BUDGET)
NUMBER = 5
"""
TWO = ("--max-iterations", "2")


@pytest.fixture
def policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the command is called, with a module of policies."""
    (tmp_path / "policies.py").write_text(POLICIES)
    (tmp_path / "broken.py").write_text("import nowhere")
    (tmp_path / "raising.py").write_text("1 / 0")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "agent.toml").write_text("max_iterations = 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))))
    return tmp_path


def bounds(done: "subprocess.CompletedProcess[str]") -> dict[str, str]:
    """The bounds that a report tells."""
    return dict(re.findall(r"^  (\w+) +(?:exactly|at most) +([\d,.]+)", done.stdout, re.MULTILINE))


def test_check_tells_the_verdict_first_and_the_bounds_in_columns() -> None:
    done = ran("check", *TWO)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("every run ends    proved\n")
    assert bounds(done)["iterations"] == "2"
    assert bounds(done)["seconds"] == "120"
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_shows_the_report_in_colour_and_breaks_no_line(columns: int) -> None:
    code, sent = on_terminal("check", *TWO, columns=columns)

    assert code == 0
    assert sent.startswith("\x1b[32m\x1b[1mevery run ends    proved\x1b[0m\r\n")
    assert max(map(len, shown(sent).splitlines())) <= columns


def test_check_takes_settings_from_where_a_run_takes_them(policies: Path) -> None:
    told = [
        ran("check", "agent.toml"),
        ran("check", "--config", "agent.toml"),
        ran("check", AGENT_FSM_CONFIG="agent.toml"),
        ran("check", "agent.toml", AGENT_FSM_CONFIG="nowhere.toml"),
        ran("check", "agent.toml", AGENT_FSM_MAX_ITERATIONS="2"),
        ran("check", "agent.toml", *TWO, AGENT_FSM_MAX_ITERATIONS="3"),
    ]

    assert [bounds(done).get("iterations") for done in told] == ["1", "1", "1", "1", "2", "2"]


def test_a_table_of_a_module_is_checked(policies: Path) -> None:
    done = ran("check", "policies:CAREFUL", *TWO)

    assert done.returncode == 0
    assert "34 (summary due)" in done.stdout, "two rows further down than in the shipped table"
    assert (done.stdout[:5], done.stderr) == ("every", "imported\n"), "what a module prints is not the report"


def test_a_table_of_which_runs_may_not_end_is_exit_code_1_and_nothing_is_written(policies: Path) -> None:
    done = ran("check", "policies:ENDLESS", *TWO, "--write", "contract.toml", "--certificate", "certificate.json")

    assert done.returncode == 1
    assert "goes round by" in done.stdout
    assert "not written, as it is not proved that every run ends: contract.toml and certificate.json" in done.stderr
    assert not list(policies.glob("c*"))


def test_what_was_written_is_kept_and_less_is_too(policies: Path) -> None:
    assert ran("check", *TWO, "--write", "contract.toml").returncode == 0

    same = ran("check", *TWO, "--against", "contract.toml")
    less = ran("check", *TWO, "--max-model-retries", "1", "--against", "contract.toml")

    assert (same.returncode, same.stdout.splitlines()[-1]) == (0, "contract contract.toml: kept")
    assert less.returncode == 0
    assert "contract contract.toml: kept\n  though\n" in less.stdout
    assert "    model_calls fell from 7 to 5\n" in less.stdout
    assert less.stdout.endswith("    max_model_retries was 2, is 1\n")


def test_a_broken_contract_is_exit_code_1_with_what_broke_and_why(policies: Path) -> None:
    ran("check", *TWO, "--write", "contract.toml")

    done = ran("check", *TWO, "--against", "contract.toml", "--summarize-every", "1", "--write", "contract.toml")

    assert done.returncode == 1
    assert re.search(
        r"contract contract.toml: broken\n(  .*\n)*  model_calls grew from 7 to 8\n(  .*\n)*"
        r"  because\n    summarize_every was none, is 1\n",
        done.stdout,
    )
    assert "summarize_every = 1" in (policies / "contract.toml").read_text(), "accepted: it was compared with the old"


def test_a_reason_that_vanished_is_told(policies: Path) -> None:
    ran("check", *TWO, "--write", "contract.toml")
    text = (policies / "contract.toml").read_text()
    (policies / "contract.toml").write_text(text.replace('    "max_iterations",\n', '    "max_failures",\n'))

    done = ran("check", *TWO, "--against", "contract.toml")

    assert done.returncode == 1
    assert "broken\n  no run can end for max_failures any more\n" in done.stdout
    assert "  besides\n    runs can now also end for max_iterations\n" in done.stdout


def test_check_as_json_is_one_object_with_the_contract(policies: Path) -> None:
    ran("check", *TWO, "--write", "contract.toml")

    done = ran("check", "--max-iterations", "3", "--against", "contract.toml", "--json")

    told = json.loads(done.stdout)
    assert (done.returncode, done.stdout.count("\n")) == (1, 1)
    assert (told["verdict"], told["terminates"], told["lasso"]) == ("proved", True, None)
    assert told["bounds"]["iterations"] == {
        "at_most": 3,
        "exact": True,
        "reached": 3,
        "events": told["bounds"]["iterations"]["events"],
        "note": "",
    }
    assert "certificate" not in told
    broken = [each["promise"] for each in told["contract"] if each["broken"]]
    assert {"steps", "iterations", "model_calls"} <= set(broken)
    assert "max_iterations was 2, is 3" in told["contract"][0]["why"]


def test_a_lasso_as_json_is_told_in_short(policies: Path) -> None:
    told = json.loads(ran("check", "policies:ENDLESS", *TWO, "--json").stdout)

    assert (told["verdict"], told["bounds"]) == ("refuted", {})
    assert told["lasso"]["entry"][0] == "ToolsListed"
    assert told["lasso"]["loop"]


def test_a_certificate_is_written_as_json_and_is_verified(policies: Path) -> None:
    assert ran("check", *TWO, "--certificate", "certificate.json").returncode == 0

    certificate = json.loads((policies / "certificate.json").read_text())
    assert verify(certificate, TABLE, AgentConfig(max_iterations=2)) == []


@pytest.mark.parametrize(
    ("arguments", "ending"),
    [
        (("--events", "model_calls"), "Done max_iterations\n"),
        (("policies:CAREFUL", "--events", "tool_calls"), "Done max_iterations\n"),
        (("policies:ENDLESS", "--events", "lasso"), ""),
    ],
)
def test_events_are_printed_as_python_that_runs(policies: Path, arguments: tuple[str, ...], ending: str) -> None:
    done = ran("check", *TWO, *arguments)
    replayed = subprocess.run(
        [sys.executable, "-c", done.stdout], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )

    assert done.returncode == int("lasso" in arguments)
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert (replayed.returncode, replayed.stderr) == (0, "")
    assert replayed.stdout.removeprefix("imported\n").endswith(ending)


CHECK_ERRORS = [
    (("policies",), "TARGET is a file.toml or module:TABLE, such as policies:CAREFUL, not 'policies'"),
    (("policies.py",), "TARGET is a file.toml or module:TABLE"),
    (("nowhere:TABLE",), "there is no module nowhere in "),
    (("policies.nowhere:TABLE",), "policies.nowhere"),
    (("broken:TABLE",), "broken can't be imported: ModuleNotFoundError: No module named 'nowhere'"),
    (("raising:TABLE",), "raising can't be imported: ZeroDivisionError: division by zero"),
    (("empty:TABLE",), "empty has no TABLE; it has no table at all"),
    (("policies:NOWHERE",), "policies has no NOWHERE; its tables are TABLE, CAREFUL, ENDLESS, CUT, TRUTHY"),
    (("policies:NUMBER",), "policies:NUMBER is no table of rows but of type int; its tables are TABLE, "),
    (("policies:CUT",), "must end in one row that is always taken"),
    (("policies:TRUTHY",), "returned 1; a guard returns True or False"),
    (("nowhere.toml",), "nowhere.toml can't be read: No such file or directory"),
    (("agent.toml", "--config", "agent.toml"), "TARGET and --config both name a file with settings"),
    (("--max-iterations", "0"), "--max-iterations: max_iterations must be a whole number >= 1, not 0"),
    (("--max-cost-usd", "1"), "max_cost_usd is set, so prompt_usd_per_token and reply_usd_per_token must be, too"),
    (("--against", "nowhere.toml"), "nowhere.toml can't be read: No such file or directory"),
    (("--against", "agent.toml"), "agent.toml: max_iterations is not a key of a contract"),
    (("--against", "policies.py"), "policies.py: this is not valid TOML"),
    (("--write", "no/such/folder/x.toml"), "--write: there is no folder no/such/folder"),
    (("--json", "--events", "steps"), "--events prints Python and --json prints JSON"),
    ((*TWO, "--events", "model_call"), "--events: there is no bound model_call; there are steps, iterations,"),
]


@pytest.mark.parametrize(("arguments", "told"), CHECK_ERRORS)
def test_a_wrong_check_is_exit_code_2_and_told(policies: Path, arguments: tuple[str, ...], told: str) -> None:
    done = ran("check", *arguments)

    assert (done.returncode, done.stdout) == (ExitCode.USAGE, "")
    assert told in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--events", "lasso"), "there is no lasso: that every run ends is proved"),
        (("policies:ENDLESS", "--events", "steps"), "there are no bounds: that every run ends is refuted"),
    ],
)
def test_events_that_there_are_none_of_are_exit_code_1(policies: Path, arguments: tuple[str, ...], told: str) -> None:
    done = ran("check", *TWO, *arguments)

    assert (done.returncode, done.stdout) == (1, "")
    assert told in done.stderr


def test_help_of_check_says_what_each_exit_code_means() -> None:
    told = ran("check", "--help").stdout

    assert re.findall(r"^ +(\d)  ", told.partition("Exit codes:")[2], re.MULTILINE) == ["0", "1", "2"]
    listed = re.findall(r"^  (?:-h, )?--(?:\[no-\])?([a-z-]+)", told, re.MULTILINE)
    assert listed[:6] == ["config", "write", "against", "events", "json", "certificate"]
    assert len(listed) == len(set(listed)) == len(settings()) + 7


# Signals


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_in_time_and_keeps_the_transcript(tmp_path: Path, number: signal.Signals) -> None:
    saved = tmp_path / "messages.json"

    stopped = stopped_by(number, "--save", str(saved))

    assert stopped.code == ExitCode.CANCELLED
    assert stopped.seconds < DEADLINE_S + SLACK_S
    assert not stopped.tool_alive
    assert "cancelled: stopped by a signal" in stopped.stdout
    assert 'assistant calls exec_python: {"code": "import time; time.sleep(30)"}' in stopped.stdout
    assert [message["role"] for message in json.loads(saved.read_text())] == ["user", "assistant", "tool"]
    assert stopped.stderr == ""


@linux
def test_a_second_ctrl_c_breaks_nothing(tmp_path: Path) -> None:
    saved = tmp_path / "messages.json"

    stopped = stopped_by(signal.SIGINT, "--json", "--save", str(saved), times=4)

    told = json.loads(stopped.stdout)
    assert (stopped.code, told["stopped_reason"]) == (ExitCode.CANCELLED, "cancelled")
    assert told["messages"] == json.loads(saved.read_text())
    assert not stopped.tool_alive


# On a terminal


def on_terminal(*arguments: str, columns: int = 80, meanwhile: Callable[[int], None] | None = None) -> tuple[int, str]:
    """Return the exit code of the command and what it sent to a terminal."""
    ours, its = pty.openpty()
    ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    process = subprocess.Popen(
        command(*arguments), stdin=subprocess.DEVNULL, stdout=its, stderr=its, env=environment(TERM="xterm-256color")
    )
    os.close(its)
    sent = b""
    try:
        if meanwhile is not None:
            meanwhile(process.pid)
        give_up = time.monotonic() + TIMEOUT_S
        while time.monotonic() < give_up:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    sent += os.read(ours, 65_536)
                except OSError:  # EIO: nobody holds the other end any more
                    break
        return process.wait(TIMEOUT_S), sent.decode()
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def shown(sent: str) -> str:
    """What was sent, less colours and cursor movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent)


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_shows_the_run_as_it_goes(columns: int) -> None:
    code, sent = on_terminal("run", "Run python: import time; time.sleep(1); print('[red]x')", columns=columns)

    seen = shown(sent)
    assert code == ExitCode.ANSWERED
    assert "\x1b[" in sent
    assert seen.startswith("model: offline planner, not a language model")
    assert "  Plan 2 [CallTools 1] Observe 1  Repair  Research  Summarize  Done" in seen
    assert re.search(r"running exec_python, [0-9.]+ s  import time", seen)
    assert re.search(r"1 of 8 iterations, 0 tool calls, 0 tokens, 1:5\d left", seen)
    assert re.search(r"  ok +rc 0 +[0-9.]+ s  exec_python  import time", seen)
    assert "  Plan 3  CallTools 1  Observe 3  Repair  Research  Summarize [Done]" in seen
    assert "success: the model answered" in seen
    assert "Plan > Observe > Plan > CallTools > Observe > Plan > Observe > Done" in seen
    assert seen.endswith("[red]x\r\n")
    assert max(len(line) for line in re.split(r"[\r\n]+", seen)) <= columns


def test_a_terminal_is_told_why_a_call_failed() -> None:
    _, sent = on_terminal("run", "Run python: 1/0")

    seen = shown(sent)
    assert re.search(r"  failed +rc 1 +[0-9.]+ s  exec_python  1/0\r\n", seen)
    assert re.search(r" {20,}ZeroDivisionError: division by zero\r\n", seen)
    assert "  -> Repair (failed)\r\n" in seen


def test_json_on_a_terminal_shows_nothing_else() -> None:
    code, sent = on_terminal("run", HELLO, "--json")

    assert (code, json.loads(sent)["stopped_reason"]) == (ExitCode.ANSWERED, "success")


def test_the_picture_of_a_terminal_shows_every_state_and_loads_nothing() -> None:
    picture = draw()

    assert [state for state in State if state not in picture] == []
    assert "NameError" in picture
    assert re.findall(r"@import|@font-face|href|url\((?!#)", picture) == []


# The parts


CLEANED: Mapping[str, str] = {
    "a\x1b[1;31mb\x1b[0mc": "abc",
    "a\x1b]8;;http://x\x1b\\link\x1b]8;;\x07b": "alinkb",
    "a\x1b]never ended\nb": "anever ended\nb",
    "a\x9b31mb\x00\x07\x7f\x85c": "abc",
    "one\r\ntwo\rthree\tfour": "one\ntwo\nthree\tfour",
    "a\u202eb\u2066c": "abc",
    "a\x1b": "a",
    "naïve – 中文 🙂": "naïve – 中文 🙂",
}


@pytest.mark.parametrize(("text", "left"), CLEANED.items())
def test_text_of_others_keeps_its_words_and_loses_its_powers(text: str, left: str) -> None:
    assert clean(text) == left


LAP = (PLAN, CALL_TOOLS, OBSERVE)
PATHS: list[tuple[tuple[State, ...], str]] = [
    ((), ""),
    ((PLAN, OBSERVE, PLAN, OBSERVE, DONE), "(Plan > Observe) x2 > Done"),
    ((PLAN, OBSERVE, *LAP, *LAP, DONE), "Plan > Observe > (Plan > CallTools > Observe) x2 > Done"),
    (
        (*LAP * 3, REPAIR, CALL_TOOLS, OBSERVE, *LAP * 20),
        "(Plan > CallTools > Observe) x3 > Repair > CallTools > Observe > (Plan > CallTools > Observe) x20",
    ),
]


@pytest.mark.parametrize(("path", "text"), PATHS)
def test_laps_of_a_path_stand_once(path: tuple[State, ...], text: str) -> None:
    assert path_text(path) == text


def unfolded(text: str) -> list[str]:
    """Return the states that a folded path stands for."""
    laps = re.sub(r"\(([^)]*)\) x(\d+)", lambda lap: " > ".join([lap[1]] * int(lap[2])), text)
    return laps.split(" > ") if laps else []


@given(st.lists(st.sampled_from([PLAN, CALL_TOOLS, OBSERVE, REPAIR]), max_size=40))
def test_a_folded_path_unfolds_to_itself(path: list[State]) -> None:
    assert unfolded(path_text(path)) == path
