"""A planner that stands in for a language model, and says so: it follows a short list of phrases, word by word.

`reply_to` is a pure function of the request. What was done is read from the transcript each time, so a run can be
replayed, trimmed or resumed. An answer states only what tool results in the transcript show.
Two tables say what it can do: `PHRASES` (what it understands) and `MENDERS` (which failures it mends, once a task).
"""

import ast
import hashlib
import json
import math
import re
import shlex
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from attrs import evolve, field, frozen

from agent_fsm.directives import DIRECTIVE_MARK
from agent_fsm.protocol import REPAIR, RESEARCH, SUMMARIZE, Message, ModelRequest, Prices

__all__ = ["FIRST_LINE", "MENDERS", "PHRASES", "USED_MODEL", "OfflinePlanner", "reply_to", "understood"]

FIRST_LINE = "Offline planner (not a language model):"
"""The first line of every answer."""
USED_MODEL = "offline (a planner, not a language model)"

MAX_STEPS = 100
MAX_TASK_CHARS = 20_000
MAX_CUTS = 50  # places at which one phrase may end; each costs a parse of what stands before it
MAX_DIGITS = 4_000  # of an arithmetic result; Python prints no integer of more than 4,300

_ARGUMENT = {"exec_python": "code", "exec_shell": "cmd", "echo": "text"}


class OfflinePlanner:
    """A model client that asks nobody: see the module's docstring."""

    used_model = USED_MODEL

    async def complete(self, request: ModelRequest) -> dict[str, Any]:
        """Return a chat.completion with tool calls or an answer."""
        return reply_to(request)

    def prices(self, model: str) -> Prices:
        """Return zero prices: nothing is sent to anybody."""
        return Prices(0.0, 0.0)


@frozen
class Call:
    """A tool call in the planner's terms: every tool that it uses takes one text."""

    tool: str
    text: str


@frozen
class Step:
    """One thing to do."""

    ways: tuple[Call, ...]
    """Calls that would do it, best first; the first whose tool is offered is made."""
    expression: str = ""
    """The arithmetic that is asked for, if that is what the step is."""


@frozen
class Reading:
    """What one phrase amounts to."""

    rest: str
    """The text after it."""
    steps: tuple[Step, ...] = ()
    summarize: bool = False


@frozen
class Phrase:
    """A form of words that is understood."""

    example: str
    means: str
    head: re.Pattern[str]
    """How it begins."""
    read: Callable[[str, re.Match[str]], Reading | None]
    """Takes a text and the match of `head` at its start; None if it is not this phrase after all."""
    bare: bool = False
    """Reads like code too, so it ends the phrase before it only after "then" or a list mark."""


@frozen
class Task:
    """The caller's last message as a list of steps."""

    steps: tuple[Step, ...] = ()
    summarize: bool = False
    unread: str = ""
    """The text from the first words that are not understood on; with it, nothing is run."""


@frozen
class Outcome:
    """What a tool message says."""

    ok: bool
    rc: int | None = None
    stdout: str = ""
    stderr: str = ""


@frozen
class Attempt:
    """A call that was answered, and the step (from 0) that it was for."""

    step: int
    call: Call
    outcome: Outcome
    mended: bool = False


@frozen
class Mender:
    """A failure that can be mended without understanding the code."""

    means: str
    """What is done; `{0}` is the first group of `sees`."""
    tool: str
    sees: re.Pattern[str]
    """Searched in what the tool said on failing."""
    mend: Callable[[str, re.Match[str]], tuple[str, ...]]
    """Candidates for the mended text; the first that parses and differs is tried."""


@frozen
class _Situation:
    """What a request shows."""

    task: Task
    attempts: tuple[Attempt, ...]
    offered: frozenset[str]
    request: ModelRequest = field(repr=False)

    @property
    def latest(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None


# The reply


def reply_to(request: ModelRequest) -> dict[str, Any]:
    """Return the chat.completion that follows from *request* alone: one tool call, or an answer."""
    digest = hashlib.sha256(json.dumps(request.messages, sort_keys=True, default=str).encode()).hexdigest()[:8]
    move = _next_move(request)
    if isinstance(move, str):
        return _completion(digest, {"role": "assistant", "content": f"{FIRST_LINE}\n{move}"}, "stop")
    step, call, mended = move
    # the id carries the step, so that trimming the transcript can't make the planner lose count
    function = {"name": call.tool, "arguments": json.dumps({_ARGUMENT[call.tool]: call.text})}
    tool_call = {"id": f"{'mend' if mended else 'step'}{step}_{digest}", "type": "function", "function": function}
    return _completion(digest, {"role": "assistant", "content": None, "tool_calls": [tool_call]}, "tool_calls")


def _completion(digest: str, message: Message, finish_reason: str) -> dict[str, Any]:
    return {
        "id": f"offline-{digest}",
        "object": "chat.completion",
        "created": 0,
        "model": USED_MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }


def _next_move(request: ModelRequest) -> str | tuple[int, Call, bool]:
    """Return an answer, or (step, call, whether it is a mended one)."""
    here = _situation(request)
    if not here.task.steps or here.task.unread:
        return _record_summary(request.messages) if request.purpose == SUMMARIZE else _not_understood(here.task)
    if request.purpose == SUMMARIZE:
        return _report(here)
    latest = here.latest
    if latest and not latest.outcome.ok:
        return _after_failure(here, latest)
    following = latest.step + 1 if latest else 0
    if following == len(here.task.steps):
        return _report(here) if here.task.summarize else _plain(here)
    calls = [_way(step, here.offered) for step in here.task.steps[following:]]
    if calls[0] is None or (latest is None and None in calls):  # don't begin what can't be finished
        return _tools_missing(here, following)
    return following, calls[0], False


def _after_failure(here: _Situation, latest: Attempt) -> str | tuple[int, Call, bool]:
    if here.request.purpose == RESEARCH:
        return _report(here, "This planner does no research.")
    if latest.mended:
        return _report(here, "The mended version failed too.")
    if here.request.purpose != REPAIR:
        return _report(here)
    found = mend(latest.call, latest.outcome.stderr or latest.outcome.stdout)
    if found is None or latest.call.tool not in here.offered:
        return _report(here, "Nothing in its repair table mends this.")
    if any(attempt.mended for attempt in here.attempts):
        return _report(here, "It mends one failure in a task, and did.")
    return latest.step, found[1], True


def _way(step: Step, offered: frozenset[str]) -> Call | None:
    return next((call for call in step.ways if call.tool in offered), None)


# Where the run stands


def _situation(request: ModelRequest) -> _Situation:
    messages = request.messages
    start = next((i for i in reversed(range(len(messages))) if _from_caller(messages[i])), len(messages))
    task = read_task(_text_of(messages[start].get("content"))) if start < len(messages) else Task()
    attempts = tuple(_attempts(messages[start:], task))
    if attempts and request.purpose in (REPAIR, RESEARCH) and _tool_answer_is_last(messages):
        latest = attempts[-1]
        if latest.outcome.rc is None:  # plain text; that we are asked to mend it says that it failed
            attempts = (*attempts[:-1], evolve(latest, outcome=evolve(latest.outcome, ok=False)))
    tools = () if request.tool_choice == "none" else request.tools
    offered = frozenset(str(tool.get("function", {}).get("name")) for tool in tools)
    return _Situation(task, attempts, offered, request)


def _from_caller(message: Message) -> bool:
    return message.get("role") == "user" and not _text_of(message.get("content")).startswith(DIRECTIVE_MARK)


def _tool_answer_is_last(messages: Sequence[Message]) -> bool:
    roles = [message.get("role") for message in messages if message.get("role") != "user"]
    return roles[-1:] == ["tool"]


def _text_of(content: object) -> str:
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if part.get("type") == "text")
    return content if isinstance(content, str) else ""


def _attempts(messages: Sequence[Message], task: Task) -> Iterator[Attempt]:
    """Yield the answered calls that are steps of *task*, in order; other calls are not ours to speak of."""
    asked: dict[str, dict[str, Any]] = {}
    latest: Attempt | None = None
    for message in messages:
        asked.update((call["id"], call) for call in message.get("tool_calls") or ())
        call = asked.pop(str(message.get("tool_call_id")), None) if message.get("role") == "tool" else None
        if call is None:
            continue
        made = _call_of(call)
        place = _place(call["id"], made, task, latest)
        if place is not None:
            latest = Attempt(place[0], made, _outcome(_text_of(message.get("content"))), mended=place[1])
            yield latest


def _call_of(call: dict[str, Any]) -> Call:
    name = call["function"]["name"]
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (ValueError, RecursionError):
        arguments = None
    text = arguments.get(_ARGUMENT.get(name, "text")) if isinstance(arguments, dict) else None
    return Call(name, text if isinstance(text, str) else "")


def _place(call_id: str, call: Call, task: Task, latest: Attempt | None) -> tuple[int, bool] | None:
    """Return which step a call was for, and whether it was a mended one: from its id, else from what it does."""
    ours = re.fullmatch(r"(step|mend)(\d{1,3})_[0-9a-f]{8}", call_id)
    if ours and int(ours[2]) < len(task.steps):
        return int(ours[2]), ours[1] == "mend"
    following = latest.step + 1 if latest else 0
    for number in range(following, len(task.steps)):
        if call in task.steps[number].ways:
            return number, False
    if latest and not latest.outcome.ok and call.tool == latest.call.tool:
        return latest.step, True
    return None


_FAILED_TEXT = re.compile(r"(?i)(?:not run|error|failed)\b[^\n]{0,80}?:|interrupted\b|timed out\b")
_ESCAPE = re.compile(r'(?:\\u[0-9a-fA-F]{4})+|\\["\\/bfnrt]')
_OUTCOME_KEYS = frozenset({"ok", "rc", "stdout", "stderr", "error", "text", "result", "answer"})


def _outcome(content: str) -> Outcome:
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        return _outcome_of_text(content)
    if not isinstance(told, dict) or not _OUTCOME_KEYS & told.keys():
        return Outcome(ok=True, stdout=content)
    rc = told.get("rc") if isinstance(told.get("rc"), int) else None
    error = str(told.get("error") or "")
    output = next((told[key] for key in ("stdout", "text", "result", "answer") if told.get(key)), "")
    return Outcome(
        ok=told.get("ok", True) is not False and not rc and not error,
        rc=rc,
        stdout=output if isinstance(output, str) else json.dumps(output),
        stderr=f"{told.get('stderr') or ''}\n{error}".strip("\n"),
    )


def _outcome_of_text(content: str) -> Outcome:
    """Read plain text, or a JSON result whose middle was cut out: its head still says how the call ended."""
    head = re.match(r'\s*\{"ok":\s*(true|false)\b(?:,\s*"rc":\s*(-?\d+))?', content)
    if head is None:
        failed = _FAILED_TEXT.match(content) is not None
        return Outcome(ok=not failed, stdout="" if failed else content, stderr=content if failed else "")
    rc = int(head[2]) if head[2] else None
    stdout, stderr, error = (_cut_string(key, content) for key in ("stdout", "stderr", "error"))
    return Outcome(head[1] == "true" and not rc, rc, stdout, f"{stderr}\n{error}".strip("\n"))


def _cut_string(key: str, content: str) -> str:
    found = re.search(rf'"{key}":\s*"((?:[^"\\]|\\.)*)', content, re.DOTALL)
    # escape by escape: the cut may have gone through one
    return _ESCAPE.sub(lambda escape: str(json.loads(f'"{escape[0]}"')), found[1]) if found else ""


# Answers


def understood() -> str:
    """Return what the planner understands, one phrase a line."""
    width = max(len(phrase.example) for phrase in PHRASES)
    rows = [f"  {phrase.example:<{width}}  {phrase.means}" for phrase in PHRASES]
    return "\n".join(["It understands these, joined by `then`, new lines or list numbers:", *rows])


def _not_understood(task: Task) -> str:
    where = f"It stopped reading at: {_one_line(task.unread)}\n" if task.unread else ""
    return f"Nothing was run, because the task is not one that this planner understands.\n{where}{understood()}"


def _tools_missing(here: _Situation, following: int) -> str:
    missing = [step for step in here.task.steps[following:] if _way(step, here.offered) is None]
    wanted = ", ".join(dict.fromkeys(" or ".join(call.tool for call in step.ways) for step in missing))
    offered = ", ".join(sorted(here.offered)) or "none"
    told = f"This needs a tool that is not offered: {wanted} (offered: {offered})."
    return f"{_report(here, told)}\n{understood()}"


def _plain(here: _Situation) -> str:
    lines = _notes(here)
    for attempt in here.attempts:
        if attempt.outcome.ok:
            output = attempt.outcome.stdout.rstrip("\n") or "(no output)"
            expression = here.task.steps[attempt.step].expression
            lines.append(f"{expression} = {output}" if expression else output)
    return "\n".join(lines)


def _report(here: _Situation, closing: str = "") -> str:
    """Return what was run with what result, and what was not."""
    steps = here.task.steps
    last = {attempt.step: attempt for attempt in here.attempts}
    failed = [number + 1 for number, attempt in last.items() if not attempt.outcome.ok]
    reached = max(last, default=-1) + 1
    ended = f"step {failed[-1]} failed" if failed else ("all succeeded" if len(last) == len(steps) else "none failed")
    lines = [f"Ran {reached} of {_counted(len(steps), 'step')}" + (f"; {ended}." if last else ".")]
    for attempt in here.attempts:
        lines += _told(attempt)
    for number, step in enumerate(steps[reached:], reached + 1):
        lines.append(f"{number}. {_named(step.ways[0])}: not run")
    return "\n".join(lines + _notes(here) + ([closing] if closing else []))


_WAS_CUT = re.compile(r"(?m)^\[\.\.\. [\d,]+ characters cut \.\.\.\]$")


def _told(attempt: Attempt) -> list[str]:
    outcome = attempt.outcome
    rc = "" if outcome.rc is None else f" with rc {outcome.rc}"
    again = " (mended)" if attempt.mended else ""
    title = f"{attempt.step + 1}. {_named(attempt.call)}{again}: {'succeeded' if outcome.ok else 'failed'}{rc}"
    lines = [title]
    for stream, text in (("stdout", outcome.stdout), ("stderr", outcome.stderr)):
        if text.strip():
            least = "at least " if _WAS_CUT.search(text) else ""
            count = _counted(len(text.splitlines()), "line")
            lines.append(f"   {stream}, {least}{count}:")
            lines += [f"   | {line}" for line in _excerpt(text, tail=stream == "stderr")]
    return lines if len(lines) > 1 else [f"{title}, no output"]


def _notes(here: _Situation) -> list[str]:
    """Return what a reader would not expect: lost results, mended steps, a tool in another's place."""
    notes = []
    seen = {attempt.step for attempt in here.attempts}
    lost = [str(number + 1) for number in range(max(seen, default=0)) if number not in seen]
    if lost:
        notes.append(f"No longer in the transcript: the results of step {', '.join(lost)}.")
    for before, after in zip(here.attempts, here.attempts[1:], strict=False):
        if after.mended and before.step == after.step:
            said = before.outcome.stderr or before.outcome.stdout
            found = mend(before.call, said)
            why = found[0] if found else "changed"
            notes.append(f"Step {after.step + 1} first failed ({_last_line(said)}) and was mended: {why}.")
    for attempt in here.attempts:
        meant = here.task.steps[attempt.step].ways[0].tool
        if attempt.call.tool != meant:
            notes.append(f"Step {attempt.step + 1} used {attempt.call.tool}, because {meant} is not offered.")
    return notes


def _record_summary(messages: Sequence[Message]) -> str:
    """Return the ends of the record that a request for a summary holds: how it began and what came last."""
    text = "\n".join(_text_of(message.get("content")) for message in messages if message.get("role") == "user")
    record = re.search(r"<record>\n(.*)\n</record>", text, re.DOTALL)
    shown = [_one_line(line, 300) for line in (record[1] if record else text).splitlines() if line.strip()]
    if len(shown) > 16:
        shown = [*shown[:4], f"... {len(shown) - 16} lines left out ...", *shown[-12:]]
    return "\n".join(["Copied from the record, not rephrased:", *shown]) if shown else "The record is empty."


def _excerpt(text: str, *, tail: bool) -> list[str]:
    lines = [_one_line(line, 300) for line in text.splitlines()]
    if len(lines) <= 12:
        return lines
    first = 0 if tail else 6
    return [*lines[:first], f"... {len(lines) - first - 6} lines left out ...", *lines[-6:]]


def _named(call: Call) -> str:
    return f"{call.tool} `{_one_line(call.text)}`"


def _one_line(text: str, limit: int = 100) -> str:
    line, _, more = text.rstrip().partition("\n")
    return line if len(line) <= limit and not more else f"{line[:limit]} ..."


def _last_line(text: str) -> str:
    return _one_line((text.strip().splitlines() or [""])[-1])


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


# Reading a task


def read_task(text: str) -> Task:
    """Return the steps that *text* asks for."""
    task, rest = Task(), _unlinked(text[:MAX_TASK_CHARS])
    while rest:
        reading = next((found for phrase in PHRASES if (found := _reading(phrase, rest))), None)
        useless = reading is None or (reading.summarize and not task.steps)
        if reading is None or useless or len(task.steps) + len(reading.steps) > MAX_STEPS:
            return evolve(task, unread=rest)
        task = Task((*task.steps, *reading.steps), task.summarize or reading.summarize)
        rest = _unlinked(reading.rest)
    return evolve(task, unread=text[MAX_TASK_CHARS:])


def _reading(phrase: Phrase, text: str) -> Reading | None:
    head = phrase.head.match(text)
    return phrase.read(text, head) if head else None


_MARK = r"(?:step\s+)?\d{1,3}[.):]\s+|[-*\u2022]\s+"
_LINK = re.compile(
    rf"""(?ix)(?: [\s,;.!]+ | {_MARK}
    | (?:and|then|next|finally|lastly|first|firstly|second|secondly|third|thirdly|afterwards|after\s+that|now|also
       |please|can\s+you|could\s+you)\b
    | (?:run|execute|try|do|perform)\s+(?:this|these|the\s+following)(?:\s+(?:python|shell|bash))?
      (?:\s+(?:code|scripts?|snippets?|programs?|commands?|steps?|things?|blocks?))?(?:\s+in\s+order)?
      (?:\s*:|(?=\s*```))
    )+"""
)
_CUT = re.compile(
    rf"""(?ix)(?: (?<![\s,;.]) [,;.]* \s+ | (?<=\s[,;.]) \s+ )  # each run of blanks is tried once: no quadratic search
    (?: (?P<then>(?:and\s+)?then\b[\s,:]*) | (?P<mark>{_MARK}|(?:next|finally)\b[\s,:]*) | (?P<and>and\s+) )?
    (?:please\s+)?"""
)


def _unlinked(text: str) -> str:
    """Return *text* without the words that only join steps."""
    linked = _LINK.match(text)
    return text[linked.end() :] if linked else text


def _cuts(text: str) -> list[tuple[int, int, bool]]:
    """Return where a phrase in *text* may end because another begins: (end, start of the next, at a new line)."""
    found = []
    for cut in _CUT.finditer(text):
        at_line = "\n" in cut[0]
        firm = cut["then"] or (cut["mark"] and at_line)
        if not (firm or at_line or cut["and"] or cut[0][0] in ",;."):
            continue
        if any(phrase.head.match(text, cut.end()) for phrase in PHRASES if firm or not phrase.bare):
            found.append((cut.start(), cut.end(), at_line))
            if len(found) == MAX_CUTS:
                break
    return found


def _balanced(text: str) -> bool:
    try:
        shlex.split(text)
    except ValueError:
        return False
    return True


def _split_words(text: str) -> tuple[str, str]:
    """Split *text* at the first place outside quotes where another phrase begins; if all are inside, at the first."""
    cuts = [(end, start) for end, start, _ in _cuts(text) if text[end] != ";"]  # `if x; then y` is the shell's own
    end, start = next((cut for cut in cuts if _balanced(text[: cut[0]])), cuts[0] if cuts else (len(text), len(text)))
    return text[:end].strip(), text[start:]


def _split_python(text: str) -> tuple[str, str]:
    """Split *text* after the longest code that parses; a line that begins another phrase ends it sooner."""
    cuts = _cuts(text)
    for end, start, at_line in cuts:
        if at_line and (code := _parsing(text[:end])):
            return code, text[start:]
    thens = [(cut.start(), cut.end()) for cut in _CUT.finditer(text) if cut["then"]][:MAX_CUTS]
    for end, start in [(len(text), len(text)), *((end, start) for end, start, _ in reversed(cuts)), *reversed(thens)]:
        if code := _parsing(text[:end]):
            return code, text[start:]
    return _split_words(text)  # broken code: let it run, fail and be mended


def _parsing(text: str) -> str:
    """Return *text* as code, less a full stop that ends the sentence; empty if it does not parse."""
    code = _code(text)
    return next((each for each in (code, code.rstrip(" .,;")) if each and _parses(each)), "")


def _code(text: str) -> str:
    """Return *text* as code: dedented if it begins on a line of its own."""
    first, newline, rest = text.partition("\n")
    return f"{first}{newline}{rest}".strip() if first.strip() else textwrap.dedent(rest).strip()


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


_QUOTED = re.compile(r"(?sm)\s*(?:```[^\n`]*\n(?P<block>.*?)(?:^[ \t]*```|\Z)|`(?P<inline>[^`\n]+)`)")


def _read_fence(text: str, head: re.Match[str]) -> Reading | None:
    quoted = _QUOTED.match(text)
    language = head["language"].lower()
    if quoted is None or quoted["block"] is None:
        return None
    if language in ("sh", "bash", "shell", "zsh", "console"):
        return Reading(text[quoted.end() :], _shell_steps(quoted["block"]))
    code = _code(f"\n{quoted['block']}")
    if code and (language in ("python", "python3", "py") or (not language and _parses(code))):
        return Reading(text[quoted.end() :], (_python_step(code),))
    return None


def _read_python(text: str, head: re.Match[str]) -> Reading | None:
    rest = text[head.end() :]
    if quoted := _QUOTED.match(rest):
        code, rest = _code(f"\n{quoted['block'] or quoted['inline']}"), rest[quoted.end() :]
    else:
        code, rest = _split_python(rest)
    return Reading(rest, (_python_step(code),)) if code else None


def _read_shell(text: str, head: re.Match[str]) -> Reading | None:
    rest = text[head.end() :]
    if quoted := _QUOTED.match(rest):
        commands, rest = quoted["block"] or quoted["inline"] or "", rest[quoted.end() :]
    elif re.match(r"[ \t]*\n", rest):
        ends = [(end, start) for end, start, at_line in _cuts(rest) if at_line and rest[:end].strip()]
        end, start = ends[0] if ends else (len(rest), len(rest))
        commands, rest = rest[:end], rest[start:]
    else:
        line, newline, below = rest.partition("\n")
        commands, after = _split_words(line)
        rest = after + newline + below
    steps = _shell_steps(commands)
    return Reading(rest, steps) if steps else None


def _read_say(text: str, head: re.Match[str]) -> Reading | None:
    words = _unquoted(head["words"])
    by_python, by_shell = Call("exec_python", f"print({words!r})"), Call("exec_shell", f"echo {shlex.quote(words)}")
    named = by_shell if "shell" in head["tool"].lower() else by_python
    return Reading(text[head.end() :], (Step((named, Call("echo", words))),))


def _read_echo(text: str, head: re.Match[str]) -> Reading | None:
    line, newline, below = text[head.end() :].partition("\n")
    words, after = _split_words(line)
    words = _unquoted(words)
    by_shell = Call("exec_shell", f"echo {shlex.quote(words)}")
    return Reading(after + newline + below, (Step((Call("echo", words), by_shell)),)) if words else None


def _read_arithmetic(text: str, head: re.Match[str]) -> Reading | None:
    expression = head["expression"].strip(" \t.")
    if not _is_arithmetic(expression):
        return None
    return Reading(text[head.end() :], (Step((Call("exec_python", f"print({expression})"),), expression),))


def _read_summarize(text: str, head: re.Match[str]) -> Reading | None:
    return Reading(text[head.end() :], summarize=True)


def _read_finish(text: str, head: re.Match[str]) -> Reading | None:
    return Reading(text[head.end() :])


def _python_step(code: str) -> Step:
    return Step((Call("exec_python", code),))


def _shell_steps(commands: str) -> tuple[Step, ...]:
    lines = (re.sub(r"^\$\s+", "", line.strip()) for line in commands.splitlines())
    return tuple(Step((Call("exec_shell", line),)) for line in lines if line and not line.startswith("#"))


def _unquoted(text: str) -> str:
    text = text.strip()
    wrapped = re.fullmatch(r"(?s)([\"'`])(.*)\1", text)
    return wrapped[2] if wrapped and wrapped[1] not in wrapped[2] else text


def _is_arithmetic(expression: str) -> bool:
    """Say whether *expression* is a sum, product, ... of numbers whose value is not too long to print."""
    if len(expression) > 300:  # far from the depth at which a recursive walk fails
        return False
    try:
        tree = ast.parse(expression, mode="eval").body
        return any(isinstance(node, ast.BinOp) for node in ast.walk(tree)) and _digits(tree) <= MAX_DIGITS
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _digits(node: ast.expr) -> float:
    """Return an upper bound of the decimal digits of any integer that computing *node* makes; floats are never long.

    Raises:
        ValueError: it is not arithmetic, or an exponent is over 10,000.
    """
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return math.log10(value) if value else 0.0
        case ast.Constant(value=float()):
            return 0.0
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
            return _digits(operand)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _digits(left) + _digits(right)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Div() | ast.FloorDiv() | ast.Mod(), right=right):
            return max(_digits(left), _digits(right)) + 0.31  # log10 of 2
        case ast.BinOp(left=left, op=ast.Pow(), right=right) if (power := _digits(right)) <= 4:
            return float(max(_digits(left) * 10**power, power))
    raise ValueError("not arithmetic, or too large")


_SUMMARY_WORDS = (
    r"all|and|back|both|brief|briefly|did|everything|happened|in|it|its|me|of|on|one|output|outputs|printed|result|"
    r"results|sentence|steps|that|the|them|these|they|this|to|us|value|was|were|what|you"
)

PHRASES: tuple[Phrase, ...] = (
    Phrase(
        "```python ... ```",
        "run the block; ```sh blocks too, each line a command; a block of no language if it is Python",
        re.compile(r"```(?P<language>[\w+-]*)[^\n`]*\n"),
        _read_fence,
    ),
    Phrase(
        "Run python: CODE",
        "run it with exec_python; the code may go on over lines",
        re.compile(
            r"(?i)(?:(?:run|execute)\s+(?:this\s+|the\s+)?(?:python3?|exec_python)(?:\s+(?:code|script))?|python3?)"
            r"\s*(?::|(?=`))"
        ),
        _read_python,
    ),
    Phrase(
        "Run shell: COMMAND",
        "run it with exec_shell; Run: `COMMAND` too",
        re.compile(
            r"(?i)(?:(?:run|execute)\s+(?:this\s+|the\s+)?(?:shell|bash|sh|command|exec_shell)(?:\s+command)?|shell|bash)"
            r"\s*(?::|(?=`))|(?:run|execute)(?:\s*:)?\s*(?=`[^`])"
        ),
        _read_shell,
    ),
    Phrase(
        "What is 17 * 23?",
        "compute it with exec_python: + - * / // % ** and parentheses; also `calculate (3+4)/2`",
        re.compile(
            r"(?i)(?:what\s+is|what's|how\s+much\s+is|calculate|compute|evaluate|work\s+out)(?:\s*:\s*|\s+)"
            r"(?P<expression>[-+(.\d][-+*/%(). \t\d]*)(?=[?=,;\n]|$|and\b|then\b)[?=]*"
        ),
        _read_arithmetic,
    ),
    Phrase(
        "2**10",
        "the same",
        re.compile(r"(?P<expression>[-+(.\d][-+*/%(). \t\d]*)(?=[?=,;\n]|$|and\b|then\b)[?=]*"),
        _read_arithmetic,
        bare=True,
    ),
    Phrase(
        "Say WORDS with exec_python",
        "print the words; with exec_shell too",
        re.compile(
            r"(?i)say\b:?[ \t]+(?P<words>\S[^\n]{0,2000}?)[ \t](?:with|using|via)[ \t]+(?:the[ \t]+)?"
            r"(?P<tool>exec_python|exec_shell|python|shell)\b(?:[ \t]+tool\b)?"
        ),
        _read_say,
    ),
    Phrase("Echo: WORDS", "call the tool echo, or exec_shell's", re.compile(r"(?i)echo[ \t]*:"), _read_echo),
    Phrase("Echo WORDS", "the same", re.compile(r"(?i)echo[ \t]+(?=\S)"), _read_echo, bare=True),
    Phrase(
        "summarize the result",
        "after steps: say what was run and what came of it",
        re.compile(
            r"(?i)(?:give\s+me\s+|write\s+)?(?:a\s+)?(?:(?:short|brief)\s+)?"
            rf"(?:summari[sz]e|summary|sum\s+up|report|tell\s+me|show\s+me)\b(?:[ \t]+(?:{_SUMMARY_WORDS})\b)*"
            r"(?=[ \t]*(?:[.!?;,](?:\s|$)|\n|$|then\b))"
        ),
        _read_summarize,
    ),
    Phrase(
        "finish",
        "nothing more is to be done",
        re.compile(r"(?i)(?:finish|stop|end|be\s+done)\b(?:[ \t]+(?:up|here|now)\b)?(?=[ \t.!]*(?:\n|$))"),
        _read_finish,
    ),
)
"""What is understood, in the order in which it is tried."""


# Mending


def mend(call: Call, said: str) -> tuple[str, Call] | None:
    """Return what would be done to a call that failed and *said* why, and the mended call; None if nothing fits."""
    for mender in MENDERS:
        seen = mender.sees.search(said) if mender.tool == call.tool else None
        for text in mender.mend(call.text, seen) if seen else ():
            if text != call.text and (call.tool != "exec_python" or _parses(text)):
                return mender.means.format(*seen.groups()) if seen else "", Call(call.tool, text)
    return None


# Modules whose name is rarely that of a variable, and which need no `from` to be used
_MODULES = (
    "asyncio|base64|bisect|collections|csv|datetime|decimal|fractions|functools|glob|hashlib|heapq|inspect|itertools|json|"
    "math|operator|os|pathlib|platform|pprint|random|re|shutil|statistics|string|subprocess|sys|tempfile|textwrap|time|uuid"
)
_STRAIGHT = str.maketrans("“”„‘’‚\u00a0", "\"\"\"''' ")


def _import_first(code: str, seen: re.Match[str]) -> tuple[str, ...]:
    return (f"import {seen[1]}\n{code}",) if re.search(rf"\b{seen[1]}\s*\.", code) else ()


def _call_print(code: str, seen: re.Match[str]) -> tuple[str, ...]:
    return (re.sub(r"(?m)(^|[:;])([ \t]*)print[ \t]+([^;\n]+)", r"\1\2print(\3)", code),)


def _indent_evenly(code: str, seen: re.Match[str]) -> tuple[str, ...]:
    first, _, rest = code.partition("\n")
    return textwrap.dedent(code), f"{first.strip()}\n{textwrap.dedent(rest)}"


def _expand_tabs(code: str, seen: re.Match[str]) -> tuple[str, ...]:
    return code.expandtabs(8), code.expandtabs(4)


def _close(code: str, seen: re.Match[str]) -> tuple[str, ...]:
    """Close the quotes and brackets that are open at the end; a quote goes before brackets that were closed in it."""
    quote, closers = "", ""
    for token in re.findall(r"(?s)\\.|\"\"\"|'''|[\"'()\[\]{}#\n]", code):
        if quote:
            quote = "" if token == quote else quote
        elif token == "#":
            quote = "\n"  # a comment ends like a string
        elif token in ('"""', "'''", '"', "'"):
            quote = token
        elif token in "([{":
            closers = {"(": ")", "[": "]", "{": "}"}[token] + closers
        elif token == closers[:1]:
            closers = closers[1:]
    within = code.removesuffix(closers) if quote in ('"', "'") else code
    return within + quote + closers, code + quote + closers


def _straighten(code: str, seen: re.Match[str]) -> tuple[str, ...]:
    return (code.translate(_STRAIGHT),)


def _lower_module(code: str, seen: re.Match[str]) -> tuple[str, ...]:
    name = {"maths": "math"}.get(seen[1].lower(), seen[1].lower())
    return (re.sub(rf"\b{re.escape(seen[1])}\b", name, code),) if re.fullmatch(_MODULES, name) else ()


def _python3(command: str, seen: re.Match[str]) -> tuple[str, ...]:
    return (re.sub(r"(?<![\w./-])python(?![\w.-])", "python3", command),)


MENDERS: tuple[Mender, ...] = (
    Mender(
        "added `import {0}`",
        "exec_python",
        re.compile(rf"NameError: name '({_MODULES})' is not defined"),
        _import_first,
    ),
    Mender(
        "corrected the name of the module {0}",
        "exec_python",
        re.compile(r"ModuleNotFoundError: No module named '(\w+)'"),
        _lower_module,
    ),
    Mender(
        "wrote print as a function",
        "exec_python",
        re.compile(r"SyntaxError: Missing parentheses in call to 'print'"),
        _call_print,
    ),
    Mender(
        "made the indentation even",
        "exec_python",
        re.compile(r"IndentationError: (?:unexpected indent|unindent does not match)"),
        _indent_evenly,
    ),
    Mender("replaced tabs by spaces", "exec_python", re.compile(r"TabError|IndentationError"), _expand_tabs),
    Mender(
        "replaced curly quotes and odd spaces by plain ones",
        "exec_python",
        re.compile(r"SyntaxError: invalid (?:non-printable )?character"),
        _straighten,
    ),
    Mender(
        "closed what was open at the end",
        "exec_python",
        re.compile(r"SyntaxError: .*(?:was never closed|unexpected EOF|unterminated .*string|EO[FL] while)"),
        _close,
    ),
    Mender(
        "used python3 for python",
        "exec_shell",
        re.compile(r"\bpython\b.*(?:not found|No such file)|(?:not found|No such file).*\bpython\b"),
        _python3,
    ),
)
"""Which failures are mended, in the order in which it is tried."""
