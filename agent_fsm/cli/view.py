"""What people see of a run: plain lines, or a live view for a terminal.

Text of the model and of tools is shown as it is but for escape sequences and control characters, which go, and is never
read as markup.
"""

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from attrs import frozen

from agent_fsm.config import AgentConfig
from agent_fsm.driver import AgentRun, OnEvent
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
    ListTools,
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

__all__ = [
    "LiveView",
    "clean",
    "closing_lines",
    "heading",
    "path_text",
    "plain_lines",
    "reason_lines",
    "transcript_lines",
]

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
    """Return the arguments in short: the text alone, if there is but one and it is a text."""
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        return ""
    values = list(arguments.values())
    if len(values) == 1 and isinstance(values[0], str):
        return _one_line(values[0])
    pairs = (f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in arguments.items())
    return _one_line(" ".join(pairs))


def _why_failed(result: ToolResult) -> str:
    """Return the line that says most: the error, else the last line of what was printed."""
    try:
        told = json.loads(result.text)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        return _one_line(result.text)
    printed = str(told.get("error") or told.get("stderr") or told.get("stdout") or "")
    lines = clean(printed).split("\n")
    return _one_line(next((line for line in reversed(lines) if line.strip()), ""))


def _status(result: ToolResult) -> str:
    return "ok" if result.ok else "failed" if result.ran else "not run"


def _rc(result: ToolResult) -> str:
    return "" if result.rc is None else f"rc {result.rc}"


def _seconds(result: ToolResult) -> str:
    """Return how long the call took; nothing for one that has no time, as it was not run or not finished."""
    return "" if result.seconds == 0 else f"{result.seconds:.2f} s"


# Steps


@frozen
class _Step:
    """What happened, and where."""

    source: State
    """The state in which it happened."""
    calls: tuple[ToolCall, ...]
    """Of the turn: asked for by this event, or answered by it."""
    event: Event
    run: Run
    """The run that followed."""

    @property
    def outcomes(self) -> Iterator[tuple[ToolCall, ToolResult]]:
        """The calls that this event answers, with their results."""
        results = self.event.results if isinstance(self.event, ToolsFinished | Interrupted) else ()
        return zip(self.calls, results, strict=False)  # an interrupted request has no results

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
        step, source = _Step(source, calls, event, run), run.state
        show(step)

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
    match step.event:
        case ToolsListed(tools=tools):
            return f"tools: {', '.join(_one_line(tool['function']['name']) for tool in tools) or 'none'}"
        case ToolsUnavailable(backend=backend, error=error):
            return f"{backend} has no tools to offer: {_one_line(error)}"
        case ModelReplied() if step.source is SUMMARIZE:
            return "summarizes"
        case ModelReplied(said=Said.CALLS):
            return "asks for " + "; ".join(f"{call.name} {_arguments(call)}".strip() for call in step.calls)
        case ModelReplied(said=said, detail=detail):
            return f"{_SAYS[said]}: {_one_line(detail)}" if detail else _SAYS[said]
        case ModelFailed(error=error):
            return f"no reply: {_one_line(error, 300)}"
        case ToolsFinished():
            return _outcomes_in_line(step)
        case Interrupted(cancelled=cancelled):
            why = "cancelled" if cancelled else "out of time"
            return f"{why}: {_outcomes_in_line(step)}" if step.event.results else why


def _outcomes_in_line(step: _Step) -> str:
    said = []
    for call, result in step.outcomes:
        parts = (f"{call.name} {_status(result)}", _rc(result), _seconds(result))
        why = "" if result.ok else f": {_why_failed(result)}"
        said.append(", ".join(part for part in parts if part) + why)
    return "; ".join(said)


def plain_lines(write: Callable[[str], None]) -> OnEvent:
    """Return what gives *write* one line, newline included, for each step; no escape codes, nothing but text."""

    def show(step: _Step) -> None:
        line = f"{step.run.ledger.seconds:8.2f} s  {step.source:<9}  {_happened(step)} {step.turn_taken}"
        write(f"{line.rstrip()}\n")

    return _each_step(show)


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


def reason_lines(result: AgentResult) -> list[str]:
    """Return the lines that say why the run ended."""
    reason = result.stopped_reason
    ended = "not ended" if reason is None else f"{reason}: {_MEANS[reason]}"
    return [ended, clean(result.detail)] if result.detail else [ended]


def closing_lines(result: AgentResult) -> list[str]:
    """Return the lines that say why the run ended, what it took and which way it went."""
    usage = result.usage
    took = [
        _counted(result.iterations, "iteration"),
        _counted(usage.tool_calls, "tool call"),
        _counted(usage.charged_tokens, "token"),
        *([f"${usage.cost_usd:.4f}"] if usage.cost_usd > 0 else []),
        f"{result.seconds:.2f} s",
    ]
    return [*reason_lines(result), ", ".join(took), path_text(result.path)]


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


_LONGEST_LAP: Final = 12  # states; a lap with a repair and a research hop has 9
_WORTH_FOLDING: Final = 3  # states that need not be written


def path_text(path: Sequence[State]) -> str:
    """Return the states in order; a lap run several times in a row stands once: `(Plan > CallTools > Observe) x2`."""
    parts: list[str] = []
    at = 0
    while at < len(path):
        length, saved = _best_lap(path, at)
        if saved < _WORTH_FOLDING or _best_lap(path, at + 1)[1] >= saved:
            parts.append(path[at])
            at += 1
        else:
            parts.append(f"({' > '.join(path[at : at + length])}) x{saved // length + 1}")
            at += saved + length
    return " > ".join(parts)


def _best_lap(path: Sequence[State], at: int) -> tuple[int, int]:
    """Return how long the lap is that saves most if it is folded from *at* on, and how many states that saves."""
    best = 1, 0
    for length in range(1, _LONGEST_LAP + 1):
        lap, saved = path[at : at + length], 0
        while len(lap) == length and path[at + saved + length : at + saved + 2 * length] == lap:
            saved += length
        if saved > best[1]:
            best = length, saved
    return best


def transcript_lines(messages: Sequence[Message]) -> list[str]:
    """Return the conversation as text: who says what, call after call."""
    lines: list[str] = []
    for message in messages:
        content = message.get("content")
        text = content if isinstance(content, str) else json.dumps(content) if content else ""
        if text:
            lines.append(f"{message['role']}: {clean(text)}")
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        lines += [f"{message['role']} calls {call['name']}: {clean(call['arguments'])}" for call in calls]
    return lines


# The live view

_TICK_S: Final = 0.1
_RUNNING_SHOWN: Final = 6
_STYLES: Final[Mapping[str, str]] = {"ok": "green", "failed": "red", "not run": "yellow"}


class LiveView:
    """A run as it goes: finished calls scroll by; below them stand the states, what is being done and what is left.

    Args:
        config: of the run; gives the limits that are shown.
        console: of a terminal that can move its cursor.
    """

    def __init__(self, config: AgentConfig, console: "Console") -> None:
        self.on_event: OnEvent = _each_step(self._show)
        """To be given to the run."""
        self._config = config
        self._console = console
        self._run: Run | None = None
        self._visited = {PLAN}
        self._began = self._since = time.monotonic()

    async def follow(self, agent: AgentRun) -> AgentResult:
        """Show *agent* until it ends, and return its result."""
        from rich.live import Live

        self._run = agent.run
        self._began = self._since = time.monotonic()
        # auto_refresh=False: its thread would draw a frame while a step changes what is in it
        with Live(console=self._console, auto_refresh=False, get_renderable=self._frame) as live:

            async def tick() -> None:
                while True:
                    live.refresh()
                    await asyncio.sleep(_TICK_S)

            ticking = asyncio.ensure_future(tick())
            try:
                return await agent
            finally:
                ticking.cancel()
                live.refresh()

    def report(self, result: AgentResult) -> None:
        """Write why the run ended, which way it went and, last, the answer."""
        from rich.text import Text

        reason, *rest = closing_lines(result)
        style = "green" if result.stopped_reason is StopReason.SUCCESS else "yellow"
        self._console.print(Text(f"\n{reason}", style=style))
        for line in rest:
            self._console.print(Text(line, style="dim"))
        if result.stopped_reason is StopReason.CANCELLED:
            self._console.print(Text("\n".join(["", *transcript_lines(result.messages)])), soft_wrap=True)
        elif result.final_answer:
            self._console.print(Text(f"\n{clean(result.final_answer)}"), soft_wrap=True)

    def _show(self, step: _Step) -> None:
        self._run = step.run
        self._since = time.monotonic()
        self._visited |= {step.run.state, *(row.target for row in step.run.taken)}
        for call, result in step.outcomes:
            self._print(_outcome_line(call, result))
            if not result.ok:
                self._print(_text(f"{'':26}{_why_failed(result)}", "dim"))
        match step.event:
            case ModelFailed() | ToolsUnavailable():
                told = _happened(step)
            case ModelReplied(said=said) if said not in (Said.CALLS, Said.ANSWER) or step.source is SUMMARIZE:
                told = _happened(step)
            case _:
                told = ""
        if told or step.turn_taken:
            self._print(_text(f"  {' '.join(part for part in (told, step.turn_taken) if part)}", "dim"))

    def _print(self, line: "Text") -> None:
        self._console.print(line, no_wrap=True, overflow="ellipsis")

    def _frame(self) -> "Group":
        from rich.console import Group

        return Group(_text(""), self._strip(), *self._doing(), self._spent())

    def _strip(self) -> "Text":
        state = PLAN if self._run is None else self._run.state
        strip = _text(" ")
        for each in State:
            if each is state:
                strip.append(f" [{each}]", "bold green" if each is DONE else "bold cyan")
            else:
                strip.append(f"  {each} ", "" if each in self._visited else "dim")
        return strip

    def _doing(self) -> "list[Text]":
        run, config = self._run, self._config
        effect = None if run is None else next_effect(run)
        took = f"{time.monotonic() - self._since:.1f} s"
        match effect:
            case ListTools():
                return [_text(f"  asking for the tools, {took}")]
            case AskModel(attempt=0):
                return [_text(f"  asking {_one_line(config.model)}, {took}")]
            case AskModel(attempt=attempt):
                return [_text(f"  asking again (retry {attempt} of {config.max_model_retries}), {took}")]
            case RunTools(calls=calls):
                lines = [_text(f"  running {call.name}, {took}  {_arguments(call)}") for call in calls[:_RUNNING_SHOWN]]
                more = len(calls) - _RUNNING_SHOWN
                return [*lines, _text(f"  and {more} more")] if more > 0 else lines
            case None:
                return []

    def _spent(self) -> "Text":
        run, config = self._run, self._config
        if run is None:
            return _text("")
        ledger = run.ledger
        parts = [f"iterations {ledger.iterations}/{config.max_iterations}", f"tokens {ledger.tokens:,}"]
        if config.max_cost_usd is not None:
            parts.append(f"cost ${ledger.cost_usd:.4f} of ${config.max_cost_usd:g}")
        elif ledger.cost_usd > 0:
            parts.append(f"cost ${ledger.cost_usd:.4f}")
        if run.state is not DONE:
            left = max(0.0, config.max_wallclock_seconds - (time.monotonic() - self._began))
            parts.append(f"time left {int(left) // 60}:{int(left) % 60:02}")
        return _text(f"  {'   '.join(parts)}", "dim")


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
