"""What people see of a run: plain lines, or a live view for a terminal.

Text of the model and of tools is shown as it is but for escape sequences and control characters, which go, and is never
read as markup.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final

import click
from attrs import frozen

from agent_fsm.config import AgentConfig
from agent_fsm.driver import OnEvent
from agent_fsm.machine import Run, next_effect
from agent_fsm.protocol import (
    CALL_TOOLS,
    DONE,
    PLAN,
    SUMMARIZE,
    AgentResult,
    AskModel,
    Event,
    Interrupted,
    Message,
    ModelFailed,
    ModelReplied,
    RunTools,
    Said,
    State,
    StopReason,
    ToolCall,
    ToolResult,
    ToolsFinished,
    ToolsListed,
    ToolsUnavailable,
)

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.text import Text

__all__ = ["View", "clean", "heading", "live_view", "path_text", "plain_view", "reason_text"]


@frozen
class View:
    """How a run is shown."""

    on_event: OnEvent | None
    """To be given to the run."""
    showing: AbstractContextManager[Any]
    """To be entered while the run goes."""
    report: Callable[[AgentResult], None]
    """To be called with what has come of it."""


# Text that others wrote

_ESCAPES: Final = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours, cursor
    r"|\x1b[\]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\)"  # titles, links; without its end it is no more than two characters
    r"|\x1b[ -/]*[0-~]"
)
_CONTROLS: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Of C0 all but tab and newline; DEL and C1; what turns the direction of the text around it."""


def clean(text: str) -> str:
    """Return *text* without escape sequences and control characters; line ends become newlines."""
    text = _ESCAPES.sub("", text.replace("\r\n", "\n"))
    return _CONTROLS.sub("", text.replace("\r", "\n"))


def _one_line(text: str, chars: int = 100) -> str:
    text = " ".join(clean(text[: 8 * chars]).split())
    return text if len(text) <= chars else f"{text[: chars - 3]}..."


def _arguments(call: ToolCall) -> str:
    """Return the arguments in short: the value alone, if there is but one."""
    values = {name: value if isinstance(value, str) else json.dumps(value) for name, value in _read(call.arguments)}
    named = [f"{name}={value}" for name, value in values.items()]
    return _one_line(" ".join(values.values() if len(values) == 1 else named))


def _why_failed(result: ToolResult) -> str:
    """Return the line that says most: the error, else the last line of what was printed."""
    told = dict(_read(result.text))
    printed = told.get("error") or told.get("stderr") or told.get("stdout") or result.text
    return _one_line(str(printed).strip().rpartition("\n")[2])


def _read(text: str) -> Iterable[tuple[str, Any]]:
    """Return what the JSON object *text* says; nothing if it is none."""
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    return told.items() if isinstance(told, dict) else ()


# Steps


@frozen
class _Step:
    """What happened, and where."""

    source: State
    """The state in which it happened."""
    event: Event
    run: Run
    """The run that followed."""
    outcomes: tuple[tuple[ToolCall, ToolResult], ...]
    """The calls that the event answers, with their results."""

    @property
    def turn_taken(self) -> str:
        """Where the run goes, and why, if that is not the usual next thing."""
        state, retried = self.run.state, isinstance(self.event, ModelFailed)
        usual = state is DONE or (state in (PLAN, CALL_TOOLS) and not retried)
        return "" if usual else f"-> {state} ({self.run.taken[-1].label})"


def _each_step(show: Callable[[_Step], None]) -> OnEvent:
    source = PLAN
    calls: tuple[ToolCall, ...] = ()

    def on_event(event: Event, run: Run) -> None:
        nonlocal source, calls
        if isinstance(event, ModelReplied):
            calls = event.calls
        results = event.results if isinstance(event, ToolsFinished | Interrupted) else ()
        outcomes = zip(calls, results, strict=False)  # an interrupted request has no results
        show(_Step(source, event, run, tuple(outcomes)))
        source = run.state

    return on_event


_SAYS: Final = {
    Said.NOTHING: "replies",
    Said.ANSWER: "answers",
    Said.UNSURE: "answers, but is unsure",
    Said.EMPTY: "replies with nothing",
    Said.CUT_OFF: "replies, cut off",
    Said.REFUSED: "refuses",
}


def _happened(step: _Step) -> str:
    outcomes = "; ".join(_outcome(*each) for each in step.outcomes)
    match step.event:
        case ToolsListed(tools=tools, unavailable=unavailable):
            names = ", ".join(_one_line(tool["function"]["name"]) for tool in tools) or "none"
            return "; ".join((f"tools: {names}", *(f"not there: {_one_line(each, 300)}" for each in unavailable)))
        case ToolsUnavailable(backend=backend, error=error):
            return f"{backend} has no tools to offer: {_one_line(error)}"
        case ModelReplied() if step.source is SUMMARIZE:
            return "summarizes"
        case ModelReplied(said=Said.CALLS, calls=calls):
            return "asks for " + "; ".join(f"{call.name} {_arguments(call)}".strip() for call in calls)
        case ModelReplied(said=said, detail=detail):
            return f"{_SAYS[said]}: {_one_line(detail)}" if detail else _SAYS[said]
        case ModelFailed(error=error):
            return f"no reply: {_one_line(error, 300)}"
        case ToolsFinished():
            return outcomes
        case Interrupted(cancelled=cancelled):
            why = "cancelled" if cancelled else "out of time"
            return f"{why}: {outcomes}" if outcomes else why


def _outcome(call: ToolCall, result: ToolResult) -> str:
    parts = (f"{call.name} {_status(result)}", _rc(result), _seconds(result))
    return ", ".join(part for part in parts if part) + ("" if result.ok else f": {_why_failed(result)}")


def _status(result: ToolResult) -> str:
    return "ok" if result.ok else "failed" if result.ran else "not run"


def _rc(result: ToolResult) -> str:
    return "" if result.rc is None else f"rc {result.rc}"


def _seconds(result: ToolResult) -> str:
    """Return how long the call took; nothing for one that has no time, as it was not run."""
    return "" if result.seconds == 0 else f"{result.seconds:.2f} s"


# Before and after


def heading(config: AgentConfig) -> str:
    """Return the line that comes first: who is going to plan."""
    if config.model == "offline":
        return "model: offline planner, not a language model (set a provider's key or --model)"
    return f"model: {_one_line(config.model)}"


_MEANS: Final = {
    StopReason.SUCCESS: "the model answered",
    StopReason.MAX_ITERATIONS: "the requests of --max-iterations were used up",
    StopReason.MAX_WALLCLOCK: "the time of --max-wallclock-seconds was up",
    StopReason.STAGNATION: "the calls brought nothing new (--stagnation-window)",
    StopReason.MAX_FAILURES: "too many turns failed in a row (--max-consecutive-failures)",
    StopReason.BUDGET: "the next request might not fit the budget (--max-tokens-total, --max-cost-usd)",
    StopReason.REFUSED: "the model refused",
    StopReason.TOOLS_UNAVAILABLE: "the tools could not be listed",
    StopReason.CANCELLED: "stopped by a signal",
    StopReason.MODEL_ERROR: "the model could not be asked",
}


def reason_text(result: AgentResult) -> str:
    """Return why the run ended, and what is known about it."""
    reason = result.stopped_reason
    ended = "not ended" if reason is None else f"{reason}: {_MEANS[reason]}"
    return f"{ended}\n{clean(result.detail)}" if result.detail else ended


def _spent(config: AgentConfig, iterations: int, tool_calls: int, tokens: int, cost_usd: float) -> str:
    limit = "" if config.max_cost_usd is None else f" of ${config.max_cost_usd:g}"
    return ", ".join(
        [
            f"{iterations} of {_counted(config.max_iterations, 'iteration')}",
            _counted(tool_calls, "tool call"),
            _counted(tokens, "token"),
            *([f"${cost_usd:.4f}{limit}"] if limit or cost_usd > 0 else []),
        ]
    )


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


_LAPS: Final = re.compile(r"\b((?:(?:(?!Observe)\w+ > )+Observe > ){1,4}?)\1+")
"""One to four turns, each of which ends in Observe, and the same again."""


def path_text(path: Sequence[State]) -> str:
    """Return the states in order; a lap run several times in a row stands once: `(Plan > CallTools > Observe) x2`."""
    text = "".join(f"{state} > " for state in path)
    folded = _LAPS.sub(lambda laps: f"({laps[1][:-3]}) x{len(laps[0]) // len(laps[1])} > ", text)
    return folded.removesuffix(" > ")


def _ending_text(result: AgentResult) -> str:
    """Return what the run leaves: its answer; the whole conversation if it was cancelled."""
    if result.stopped_reason is StopReason.CANCELLED:
        return "\n".join(line for message in result.messages for line in _message_lines(message))
    return clean(result.final_answer or "")


def _message_lines(message: Message) -> Iterator[str]:
    content = message.get("content")
    if content:
        yield f"{message['role']}: {clean(content if isinstance(content, str) else json.dumps(content))}"
    for call in message.get("tool_calls") or ():
        yield f"{message['role']} calls {call['function']['name']}: {clean(call['function']['arguments'])}"


# Plain lines


def plain_view(config: AgentConfig) -> View:
    """Return what prints a line a step, then the reason, the path and the answer; no escape codes, nothing but text."""

    def show(step: _Step) -> None:
        click.echo(f"{step.run.ledger.seconds:8.2f} s  {step.source:<9}  {_happened(step)} {step.turn_taken}".rstrip())

    def report(result: AgentResult) -> None:
        usage = result.usage
        spent = _spent(config, result.iterations, usage.tool_calls, usage.charged_tokens, usage.cost_usd)
        lines = [reason_text(result), f"{spent}, {result.seconds:.2f} s", path_text(result.path)]
        click.echo("\n".join(["", *lines]))
        ending = _ending_text(result)
        if ending:
            click.echo(f"\n{ending}")

    return View(_each_step(show), nullcontext(), report)


# The live view

_REFRESHES_A_SECOND: Final = 10
_STYLES: Final[Mapping[str, str]] = {"ok": "green", "failed": "red", "not run": "yellow"}


def live_view(config: AgentConfig, console: "Console") -> View:
    """Return what shows a run as it goes.

    Finished calls scroll by; below them stand the states with how often each was entered, what is being done, and what
    is spent and left.
    """
    from rich.live import Live

    screen = _Screen(config, console)
    live = Live(console=console, get_renderable=screen.frame, refresh_per_second=_REFRESHES_A_SECOND)
    return View(_each_step(screen.show), live, screen.report)


class _Screen:
    """The state of a live view. Frames are drawn by a thread: `show` changes each attribute at one stroke."""

    def __init__(self, config: AgentConfig, console: "Console") -> None:
        self._config = config
        self._console = console
        self._run: Run | None = None
        self._since = time.monotonic()
        self._entered = Counter([PLAN])

    def show(self, step: _Step) -> None:
        """Take in what happened, and print what is to stay of it."""
        self._run = step.run
        self._since = time.monotonic()
        self._entered.update(row.target for row in step.run.taken)
        for call, result in step.outcomes:
            self._console.print(_outcome_line(call, result))
            if not result.ok:
                self._console.print(_text(f"{'':26}{_why_failed(result)}", "dim"))
        match step.event:
            case ToolsListed(unavailable=()) | ToolsFinished() | Interrupted():
                told = ""
            case ModelReplied(said=Said.CALLS | Said.ANSWER) if step.source is not SUMMARIZE:
                told = ""
            case _:
                told = _happened(step)
        if told:
            self._console.print(_text(f"  {told}", "dim"))
        if step.turn_taken:
            self._console.print(_text(f"  {step.turn_taken}", "yellow"))

    def report(self, result: AgentResult) -> None:
        """Print why the run ended, which way it went and, last, what it leaves."""
        from rich.text import Text

        style = "bold green" if result.stopped_reason is StopReason.SUCCESS else "bold yellow"
        self._console.print(Text.assemble("\n", (reason_text(result), style), "\n", (path_text(result.path), "dim")))
        ending = _ending_text(result)
        if ending:
            self._console.print(Text(f"\n{ending}"), soft_wrap=True)

    def frame(self) -> "Group":
        """Return what stands below the calls."""
        from rich.console import Group

        run, waited = self._run, time.monotonic() - self._since
        doing = [_text(f"  {line}") for line in _doing(run, self._config, waited)]
        spent = _text("" if run is None else f"  {self._counters(run, waited)}", "dim")
        return Group(_text(""), self._strip(PLAN if run is None else run.state), *doing, spent)

    def _strip(self, state: State) -> "Text":
        strip = _text(" ")
        for each in State:
            count = self._entered[each]
            told = f"{each} {count}" if count and each is not DONE else f"{each}"
            if each is state:
                strip.append(f"[{told}]", "bold green" if each is DONE else "bold cyan")
            else:
                strip.append(f" {told} ", "" if count else "dim")
        return strip

    def _counters(self, run: Run, waited: float) -> str:
        ledger = run.ledger
        spent = _spent(self._config, ledger.iterations, ledger.tool_calls, ledger.tokens, ledger.cost_usd)
        if run.state is DONE:
            return f"{spent}, {ledger.seconds:.2f} s"
        left = max(0, int(self._config.max_wallclock_seconds - ledger.seconds - waited))
        return f"{spent}, {left // 60}:{left % 60:02} left"


def _doing(run: Run | None, config: AgentConfig, waited: float) -> list[str]:
    effect = None if run is None else next_effect(run)
    match effect:
        case AskModel(attempt=attempt):
            retry = f" (retry {attempt} of {config.max_model_retries})" if attempt else ""
            return [f"asking {_one_line(config.model)}{retry}, {waited:.1f} s"]
        case RunTools(calls=calls):
            return [f"running {call.name}, {waited:.1f} s  {_arguments(call)}" for call in calls]
        case _:
            return [f"asking for the tools, {waited:.1f} s"] if run is None else []


def _text(text: str, style: str = "") -> "Text":
    from rich.text import Text

    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _outcome_line(call: ToolCall, result: ToolResult) -> "Text":
    status = _status(result)
    line = _text(f"  {status:<7}", _STYLES[status])
    line.append(f"  {_rc(result):<6}{_seconds(result):>9}  ", "default")
    line.append(call.name, "bold default")
    line.append(f"  {_arguments(call)}", "default")
    return line
