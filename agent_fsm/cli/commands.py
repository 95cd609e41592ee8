"""The command: what it takes, how it runs the agent, what it prints and with which code it ends."""

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any, Final

import attrs
import click

from agent_fsm.cli.checking import check
from agent_fsm.cli.options import SectionedCommand, config_option, with_settings
from agent_fsm.cli.serving import gateway, serve
from agent_fsm.cli.settings import PREFIX, configure
from agent_fsm.cli.tooling import TOOL_OPTIONS, chosen_tools, tool_options, tools
from agent_fsm.cli.view import View, clean, heading, live_view, plain_view, reason_text
from agent_fsm.config import AgentConfig
from agent_fsm.driver import AgentRun, close_loop, open_loop
from agent_fsm.errors import AgentFsmError, ConfigError, ContractError, MessagesError, TableError
from agent_fsm.protocol import AgentResult, Event, StopReason

__all__ = ["ExitCode", "cli", "exit_code", "main"]


class ExitCode(IntEnum):
    """What the command ends with."""

    ANSWERED = 0
    FAILED = 1
    USAGE = 2
    LIMIT = 3
    CANCELLED = 130


_EXIT_CODES: Final = """\b
Exit codes:
    0  the model answered (success). It may have answered that something
       failed: whether the answer is good is for its reader to say.
    1  there is no answer: model_error, tools_unavailable, refused; or a
       file or the output could not be written
    2  the command was used wrongly
    3  a limit ended the run: max_iterations, max_wallclock, stagnation,
       max_failures, budget; the best answer so far is printed
  130  cancelled by Ctrl-C or SIGTERM; the conversation so far is printed"""


def exit_code(reason: StopReason | None) -> ExitCode:
    """Return what the command ends with after a run that ended for *reason*."""
    match reason:
        case StopReason.SUCCESS:
            return ExitCode.ANSWERED
        case StopReason.CANCELLED:
            return ExitCode.CANCELLED
        case StopReason.MODEL_ERROR | StopReason.TOOLS_UNAVAILABLE | StopReason.REFUSED | None:
            return ExitCode.FAILED
        case _:
            return ExitCode.LIMIT


_MISUSED: Final = (ConfigError, ContractError, MessagesError, TableError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with *arguments*, those of the process if None, and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks would end a run by UnicodeEncodeError
            stream.reconfigure(errors="backslashreplace")
    try:
        return cli.main(arguments, prog_name="agent-fsm", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return ExitCode.CANCELLED
    except (AgentFsmError, OSError) as error:
        click.echo(f"Error: {error}", err=True)
        return ExitCode.USAGE if isinstance(error, _MISUSED) else ExitCode.FAILED


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="agent-fsm")
def cli() -> None:
    """An LLM agent loop as an explicit state machine."""


for command in (check, tools, gateway, serve):
    cli.add_command(command)


# agent-fsm run


@cli.command(
    cls=SectionedCommand,
    first=(
        *("model", *TOOL_OPTIONS),
        *("max_iterations", "max_wallclock_seconds", "max_cost_usd"),
        *("config_file", "as_json", "quiet", "save", "log"),
    ),
    epilog=f"""{_EXIT_CODES}

Each setting of the agent can also stand in the environment ({PREFIX}MAX_ITERATIONS=5) or in a TOML file
(max_iterations = 5). Options beat the environment, which beats the file.""",
)
@click.argument("task")
@tool_options
@config_option
@click.option("--images", is_flag=True, help="Attach the images that TASK names, by path or URL")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object, and nothing else")
@click.option("--quiet", is_flag=True, help="Print the answer only")
@click.option("--save", metavar="FILE", type=click.Path(path_type=Path), help="Write the messages there, as JSON")
@click.option("--log", is_flag=True, help="Log a line a step to standard error")
@with_settings
def run(
    task: str,
    *,
    config_file: Path | None,
    images: bool,
    as_json: bool,
    quiet: bool,
    save: Path | None,
    log: bool,
    **options: Any,
) -> int:
    """Run the agent on TASK, or on what standard input says if TASK is "-".

    On a terminal the run is shown as it goes; elsewhere a line a step is printed, and the answer last. Defaults stand
    in brackets.
    """
    offered = chosen_tools(**{name: options.pop(name) for name in TOOL_OPTIONS})
    config = configure(options, os.environ, config_file)
    if task == "-":
        task = sys.stdin.buffer.read().decode(errors="replace")
    if not task.strip():
        raise click.UsageError("TASK is empty")
    if save is not None and not save.parent.is_dir():
        raise click.UsageError(f"--save: there is no folder {save.parent}")
    if log:
        _log_to_stderr()
    view = _view(config, as_json=as_json, quiet=quiet, log=log)
    messages: list[dict[str, Any]] = [{"role": "user", "content": task}]
    if images:
        from agent_fsm.images import with_images

        messages = with_images(messages)
    agent = AgentRun(messages, offered, config, on_event=view.on_event, log=log)
    if not (as_json or quiet):
        click.echo(heading(config))
    try:
        with view.showing:
            result = _ended(agent)
    finally:
        if save is not None:
            save.write_text(json.dumps(agent.result.messages, default=_as_json, indent=2) + "\n", encoding="utf-8")
    view.report(result)
    return exit_code(result.stopped_reason)


def _ended(agent: AgentRun) -> AgentResult:
    """Run *agent* to its end. SIGINT and SIGTERM cancel it, and are ignored from its end on: what follows is short."""
    loop = open_loop()

    def cancel(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(agent.cancel)

    # not loop.add_signal_handler: closing the loop would bring the default handlers back before all is written
    _handle_signals(cancel)
    try:
        return loop.run_until_complete(agent)
    finally:
        _handle_signals(signal.SIG_IGN)
        close_loop(loop)


def _handle_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _view(config: AgentConfig, *, as_json: bool, quiet: bool, log: bool) -> View:
    if as_json or quiet:
        # libraries print advice, and standard output is ours
        return View(None, redirect_stdout(sys.stderr), _report_as_json if as_json else _report_answer)
    if log or not sys.stdout.isatty():
        return plain_view(config)
    from rich.console import Console

    return live_view(config, Console())


def _report_as_json(result: AgentResult) -> None:
    click.echo(json.dumps(result, default=_as_json))


def _report_answer(result: AgentResult) -> None:
    if result.final_answer:
        click.echo(clean(result.final_answer))
    if result.stopped_reason is not StopReason.SUCCESS:
        click.echo(reason_text(result), err=True)


def _as_json(value: Any) -> Any:
    """Return what JSON has for *value*: for an attrs instance its fields; an event says its class under `event`."""
    if not attrs.has(type(value)):
        return dict(value) if isinstance(value, Mapping) else str(value)
    named = {"event": type(value).__name__} if isinstance(value, Event) else {}
    return named | {each.name: getattr(value, each.name) for each in attrs.fields(type(value))}


def _log_to_stderr() -> None:
    import structlog

    structlog.configure(
        processors=[
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


# agent-fsm diagram


@cli.command()
@click.option(
    "--format",
    "form",
    type=click.Choice(["mermaid", "dot", "svg"]),
    default="mermaid",
    show_default=True,
    help="An SVG takes Graphviz.",
)
@click.option("--output", metavar="FILE", type=click.Path(path_type=Path), help="Where to write it, in UTF-8.")
def diagram(form: str, output: Path | None) -> None:
    """Print the diagram of the table that every run goes by."""
    from agent_fsm.diagrams import dot, mermaid, svg

    draw: Mapping[str, Callable[[], str]] = {"mermaid": mermaid, "dot": dot, "svg": svg}
    if output is None:
        click.echo(draw[form](), nl=False)
    else:
        output.write_text(draw[form](), encoding="utf-8", newline="\n")
