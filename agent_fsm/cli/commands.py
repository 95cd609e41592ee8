"""The command: what it takes, how it runs the agent, what it prints and with which code it ends."""

import asyncio
import errno
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import redirect_stdout
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

import attrs
import click

from agent_fsm.cli.settings import CONFIG_VARIABLE, PREFIX, Setting, configure, settings
from agent_fsm.cli.view import LiveView, clean, closing_lines, heading, plain_lines, reason_lines, transcript_lines
from agent_fsm.config import AgentConfig
from agent_fsm.driver import AgentRun, OnEvent, close_loop
from agent_fsm.errors import AgentFsmError, ConfigError, MessagesError
from agent_fsm.protocol import AgentResult, Event, Message, StopReason, ToolInvoker
from agent_fsm.tools.local import EchoMCP, LocalMCPInvoker

__all__ = ["ExitCode", "cli", "exit_code", "main"]


class ExitCode(IntEnum):
    """What the command ends with."""

    ANSWERED = 0
    FAILED = 1
    USAGE = 2
    LIMIT = 3
    HUNG_UP = 128 + 1  # SIGHUP, where there is one
    INTERRUPTED = 128 + 2
    PIPE_CLOSED = 128 + 13
    TERMINATED = 128 + 15


_REASONS: Final[Mapping[ExitCode, tuple[StopReason, ...]]] = {
    ExitCode.ANSWERED: (StopReason.SUCCESS,),
    ExitCode.FAILED: (StopReason.MODEL_ERROR, StopReason.TOOLS_UNAVAILABLE, StopReason.REFUSED),
    ExitCode.LIMIT: (
        StopReason.MAX_ITERATIONS,
        StopReason.MAX_WALLCLOCK,
        StopReason.STAGNATION,
        StopReason.MAX_FAILURES,
        StopReason.BUDGET,
    ),
    ExitCode.INTERRUPTED: (StopReason.CANCELLED,),
}

_EXIT_CODES: Final = """\b
Exit codes:
    0  the model answered: success
    1  it failed: model_error, tools_unavailable, refused
    2  the command was used wrongly
    3  a limit ended it: max_iterations, max_wallclock, stagnation,
       max_failures, budget
  130  cancelled by Ctrl-C (143: by SIGTERM, 129: by SIGHUP)
  141  nobody reads the output any more
"""


def exit_code(reason: StopReason | None, signal_number: int | None = None) -> int:
    """Return what the command ends with after a run that ended for *reason*, or was cancelled by a signal."""
    if reason is StopReason.CANCELLED and signal_number is not None:
        return 128 + signal_number
    return next((code for code, reasons in _REASONS.items() if reason in reasons), ExitCode.FAILED)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with *arguments*, those of the process if None, and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # else a terminal of few characters would end a run by UnicodeEncodeError
            stream.reconfigure(errors="backslashreplace")
    try:
        return cli.main(arguments, prog_name="agent-fsm", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return ExitCode.INTERRUPTED


@click.group(epilog=_EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="agent-fsm")
def cli() -> None:
    """An LLM agent loop as an explicit state machine."""


# Output


def _write(text: str) -> None:
    """Write to standard output, at once.

    Raises:
        click.exceptions.Exit: it can't be written; what there is to say about that has been said.
    """
    stream = sys.__stdout__
    if stream is None:  # closed from the start
        return
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        _give_up_output()
        if isinstance(error, BrokenPipeError):
            raise click.exceptions.Exit(ExitCode.PIPE_CLOSED) from None
        click.echo(f"agent-fsm: standard output could not be written: {error.strerror or error}", err=True)
        raise click.exceptions.Exit(ExitCode.FAILED) from None


def _give_up_output() -> None:
    """Send to nowhere what is still buffered; the interpreter would complain on its way out that it can't flush it."""
    if sys.__stdout__ is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())


def _write_file(path: Path, text: str) -> None:
    """Write *text* to *path*, all of it or nothing.

    Raises:
        OSError: it can't be written.
    """
    path = path.resolve()  # the file that a link names is replaced, not the link
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _plain(value: Any) -> Any:
    """Return *value* as JSON has it; an event says its class under `event`, and what JSON has no number for is null."""
    match value:
        case None | bool() | int():
            return value
        case str():
            return str(value)
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): _plain(each) for key, each in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(each) for each in value]
        case _ if attrs.has(type(value)):
            named = {"event": type(value).__name__} if isinstance(value, Event) else {}
            return named | {each.name: _plain(getattr(value, each.name)) for each in attrs.fields(type(value))}
        case _:
            return str(value)


# agent-fsm run


def _with_agent_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for setting in reversed(settings()):
        command = _option(setting)(command)
    return command


_METAVARS: Final[Mapping[type, str]] = {int: "N", float: "NUMBER", str: "NAME", tuple: "NAMES"}


def _option(setting: Setting) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    told = f"{setting.doc.replace('None:', 'none:')}  [default: {_default(setting)}]"
    if setting.kind is bool:
        return click.option(f"{setting.option}/--no-{setting.option[2:]}", setting.name, default=None, help=told)
    metavar = _METAVARS.get(setting.kind, "JSON") + ("|none" if setting.may_be_absent else "")
    return click.option(setting.option, setting.name, metavar=metavar, multiple=setting.kind is tuple, help=told)


def _default(setting: Setting) -> str:
    match setting.default:
        case default if setting.name == "model":
            return f"a model of the provider whose key is in the environment; {default} without one"
        case True | False as switch:
            return "on" if switch else "off"
        case None | ():
            return "none"
        case float(number):
            return f"{number:g}"
        case default:
            return str(default)


def _names(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    return () if value == "none" else tuple(name.strip() for name in value.split(","))


def _tool_options(*kinds: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
        allowed = ",".join(LocalMCPInvoker().shell_allow_prefixes)
        command = click.option(
            "--shell-allow",
            metavar="NAMES",
            callback=_names,
            help="Programs that the local exec_shell may start, by name; python or pip among them allow everything."
            f"  [default: {allowed}]",
        )(command)
        return click.option(
            "--tools",
            "kind",
            type=click.Choice(kinds),
            default="local",
            show_default=True,
            help="What the model may call; local: exec_python and exec_shell, with your rights on this machine.",
        )(command)

    return with_options


def _invoker(kind: str, shell_allow: tuple[str, ...] | None) -> ToolInvoker | None:
    if shell_allow is not None and kind != "local":
        raise click.UsageError("--shell-allow is for --tools local")
    match kind:
        case "local" if shell_allow is not None:
            try:
                return LocalMCPInvoker(shell_allow)
            except ConfigError as error:
                raise click.UsageError(str(error).replace("shell_allow_prefixes", "--shell-allow")) from None
        case "local":
            return LocalMCPInvoker()
        case "echo":
            return EchoMCP()
        case _:
            return None


@cli.command(
    epilog=f"""{_EXIT_CODES}

Each setting of the agent can also stand in the environment ({PREFIX}MAX_ITERATIONS=5) or in the TOML file
(max_iterations = 5, at the top or in a table [agent]). Options beat the environment, which beats the file."""
)
@click.argument("task")
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help=f"A TOML file with settings.  [default: what {CONFIG_VARIABLE} names, else none]",
)
@_tool_options("local", "echo", "none")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object, and nothing else.")
@click.option("--quiet", is_flag=True, help="Print the answer only.")
@click.option("--log", is_flag=True, help="Log a line a step to standard error.")
@click.option(
    "--save",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the messages there as JSON, however the run ends.",
)
@_with_agent_options
def run(
    task: str,
    *,
    config_file: Path | None,
    kind: str,
    shell_allow: tuple[str, ...] | None,
    as_json: bool,
    quiet: bool,
    log: bool,
    save: Path | None,
    **options: Any,
) -> int:
    """Run the agent on TASK, or on what standard input says if TASK is "-".

    On a terminal the run is shown as it goes; elsewhere a line a step is printed, and the answer last.
    """
    if as_json and quiet:
        raise click.UsageError("--json prints all of the result and --quiet only the answer; leave one of them out")
    _check_place(save)
    invoker = _invoker(kind, shell_allow)
    if log:
        _log_to_stderr()
    try:
        config = _config(options, config_file)
        display = _display(config, as_json=as_json, quiet=quiet, log=log)
        messages = [{"role": "user", "content": _task(task)}]
        agent = AgentRun(messages, invoker, config, on_event=display.on_event, log=log)
    except (ConfigError, MessagesError) as error:
        raise click.UsageError(str(error)) from None
    _say_heading(config, silent=as_json or quiet)
    return _perform(agent, display, save)


def _check_place(save: Path | None) -> None:
    if save is None:
        return
    if save.exists() and not save.is_file():
        raise click.UsageError(f"--save: {save} is not a file that could be replaced")
    if not save.resolve().parent.is_dir():
        raise click.UsageError(f"--save: there is no folder {save.resolve().parent}")


def _task(task: str) -> str:
    try:
        text = task
        if task == "-":
            text = "" if sys.stdin is None else sys.stdin.buffer.read().decode()
        text.encode()
    except UnicodeError as error:
        raise click.UsageError(f"TASK is not UTF-8: {error}") from None
    if not text.strip():
        raise click.UsageError("TASK is empty")
    return text


def _config(options: Mapping[str, Any], file: Path | None) -> AgentConfig:
    from agent_fsm.llm import default_model

    return configure(options, os.environ, file, default_model=default_model(os.environ))


def _log_to_stderr() -> None:
    import structlog

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


# How a run is shown


@attrs.frozen
class _Display:
    """What is done with a run before, while and after it goes."""

    on_event: OnEvent | None
    follow: Callable[[AgentRun], Coroutine[Any, Any, AgentResult]]
    """Waits for the run."""
    report: Callable[[AgentResult], None]


def _display(config: AgentConfig, *, as_json: bool, quiet: bool, log: bool) -> _Display:
    if as_json:
        return _Display(None, _wait_for, _report_as_json)
    if quiet:
        return _Display(None, _wait_for, _report_answer)
    if _live_fits(log):
        from rich.console import Console

        live = LiveView(config, Console(file=sys.stdout, highlight=False, markup=False, emoji=False))
        return _Display(live.on_event, live.follow, live.report)
    return _Display(plain_lines(_write), _wait_for, _report_in_lines)


def _live_fits(log: bool) -> bool:
    """Say whether standard output is a terminal that can be redrawn, and nobody else writes to it."""
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return sys.stdout is not None and sys.stdout.isatty() and not dumb and not (log and sys.stderr.isatty())


def _say_heading(config: AgentConfig, *, silent: bool) -> None:
    if not silent:
        _write(f"{heading(config)}\n")
    elif config.model == "offline":
        click.echo(heading(config), err=True)


async def _wait_for(agent: AgentRun) -> AgentResult:
    with redirect_stdout(sys.stderr):  # libraries print advice, and standard output is ours
        return await agent


def _report_as_json(result: AgentResult) -> None:
    _write(f"{json.dumps(_plain(result))}\n")


def _report_answer(result: AgentResult) -> None:
    if result.final_answer:
        _write(f"{clean(result.final_answer)}\n")
    if result.stopped_reason is not StopReason.SUCCESS:
        click.echo("\n".join(reason_lines(result)), err=True)


def _report_in_lines(result: AgentResult) -> None:
    lines = ["", *closing_lines(result)]
    if result.stopped_reason is StopReason.CANCELLED:
        lines += ["", *transcript_lines(result.messages)]
    elif result.final_answer:
        lines += ["", clean(result.final_answer)]
    _write("\n".join([*lines, ""]))


# How it is run

_SIGNALS: Final = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def _perform(agent: AgentRun, display: _Display, save: Path | None) -> int:
    """Run *agent* to its end, save its messages, report, and return the exit code.

    Signals cancel the run; from its end on they are ignored, so that they break nothing of what follows. One that was
    ignored before, as by nohup, stays so all along.
    """
    loop = asyncio.new_event_loop()
    received: list[int] = []

    def cancel(number: int) -> None:
        received.append(number)
        agent.cancel()

    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, cancel, number)
    try:
        try:
            result = loop.run_until_complete(display.follow(agent))
        finally:
            saved = _save(save, agent.result.messages)
        display.report(result)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        _give_up_output()  # the terminal is gone
        return ExitCode.HUNG_UP
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # to close the loop is to get the default handlers back
        close_loop(loop)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    return exit_code(result.stopped_reason, *received[:1]) if saved else ExitCode.FAILED


def _save(path: Path | None, messages: Sequence[Message]) -> bool:
    """Write the messages to *path*, if it is given; return False if that failed, having said so."""
    try:
        if path is not None:
            _write_file(path, json.dumps(_plain(messages), indent=2) + "\n")
    except OSError as error:
        click.echo(f"agent-fsm: --save: {path} could not be written: {error.strerror or error}", err=True)
        return False
    return True


# agent-fsm diagram, agent-fsm tools


@cli.command()
@click.option(
    "--format",
    "form",
    type=click.Choice(["mermaid", "dot", "svg"]),
    default="mermaid",
    show_default=True,
    help="An SVG takes Graphviz.",
)
@click.option("--output", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="Where to write it.")
def diagram(form: str, output: Path | None) -> int:
    """Print the diagram of the table that every run goes by."""
    from agent_fsm import diagrams

    draw: Callable[[], str] = getattr(diagrams, form)
    try:
        text = draw().rstrip("\n") + "\n"
        if output is None:
            _write(text)
        else:
            _write_file(output, text)
    except AgentFsmError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"--output: {output} could not be written: {error.strerror or error}") from None
    return ExitCode.ANSWERED


@cli.command()
@_tool_options("local", "echo")
@click.option("--json", "as_json", is_flag=True, help="Print them as a JSON list of OpenAI function tools.")
def tools(kind: str, shell_allow: tuple[str, ...] | None, as_json: bool) -> int:
    """Print the tools that the model would be offered."""
    invoker = _invoker(kind, shell_allow)
    offered = [] if invoker is None else asyncio.run(_listed(invoker))
    if as_json:
        _write(json.dumps(offered, indent=2) + "\n")
    else:
        _write("\n\n".join(_tool_text(tool["function"]) for tool in offered) + "\n")
    return ExitCode.ANSWERED


async def _listed(invoker: ToolInvoker) -> list[dict[str, Any]]:
    return await invoker.list_openai_tools()


def _tool_text(function: Mapping[str, Any]) -> str:
    schema = function.get("parameters", {})
    lines = [function["name"], click.wrap_text(function.get("description", ""), 100, "  ", "  ")]
    for name, parameter in schema.get("properties", {}).items():
        must = ", required" if name in schema.get("required", ()) else ""
        told = f"{name} ({parameter.get('type', 'any')}{must}): {parameter.get('description', '')}"
        lines.append(click.wrap_text(told, 100, "    ", "      "))
    return "\n".join(lines)
