"""The planner: one tool call a turn, then an answer that states only what tool results in the transcript show.

`reply_to` is a pure function of the request. What was done is read from the transcript each time, so a run can be
replayed, trimmed or resumed.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from attrs import evolve, frozen

from agent_fsm.directives import DIRECTIVE_MARK, nudge
from agent_fsm.messages import cut
from agent_fsm.offline.mending import mend
from agent_fsm.offline.tasks import Call, Step, Task, read_task, understood
from agent_fsm.protocol import REPAIR, RESEARCH, SUMMARIZE, Message, ModelRequest, Prices, State, ToolCall
from agent_fsm.reading import read_outcome

__all__ = ["FIRST_LINE", "USED_MODEL", "OfflinePlanner", "reply_to"]

FIRST_LINE = "Offline planner (not a language model):"
"""The first line of every answer."""
USED_MODEL = "offline (a planner, not a language model)"

_ARGUMENT = {"exec_python": "code", "exec_shell": "cmd", "echo": "text"}


class OfflinePlanner:
    """A model client that asks nobody: see the module's docstring."""

    async def complete(self, request: ModelRequest) -> dict[str, Any]:
        """Return a chat.completion with a tool call or an answer."""
        return reply_to(request)

    def prices(self, model: str) -> Prices:
        """Return zero prices: nothing is sent to anybody."""
        return Prices(0.0, 0.0)


@frozen
class _Attempt:
    """A call that was answered."""

    step: int
    """Which step of the task it was for, from 0."""
    mended: bool
    call: Call
    ok: bool
    rc: int | None
    stdout: str
    stderr: str

    def mending(self) -> tuple[str, Call] | None:
        """Return what would mend it, if it failed and something would: what is done, and the call."""
        of_python = self.call.tool == "exec_python" and not self.call.whole
        found = mend(self.call.text, self.stderr or self.stdout) if of_python else None
        return (found[0], Call(self.call.tool, found[1])) if found else None


@frozen
class _Situation:
    """What a request shows."""

    task: Task
    attempts: tuple[_Attempt, ...]
    offered: frozenset[str]
    purpose: State


_Move: TypeAlias = tuple[str, Call]
"""`step` or `mend` with the number of the step, and the call to make for it."""


def reply_to(request: ModelRequest) -> dict[str, Any]:
    """Return the chat.completion that follows from *request* alone: one tool call, or an answer."""
    move = _next_move(_situation(request), request.messages)
    message: Message = {"role": "assistant", "content": None}
    if isinstance(move, str):
        message["content"] = f"{FIRST_LINE}\n{move}"
    else:
        aim, call = move
        arguments = call.text if call.whole else json.dumps({_ARGUMENT[call.tool]: call.text})
        function = {"name": call.tool, "arguments": arguments}
        # the id carries the step, so that a trimmed transcript still shows how far the task has come
        message["tool_calls"] = [{"id": f"{aim}_{len(request.messages)}", "type": "function", "function": function}]
    finish_reason = "tool_calls" if "tool_calls" in message else "stop"
    return {
        "id": f"offline-{len(request.messages)}",
        "object": "chat.completion",
        "created": 0,
        "model": USED_MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }


def _next_move(here: _Situation, messages: Sequence[Message]) -> str | _Move:
    task, attempts = here.task, here.attempts
    if here.purpose == SUMMARIZE:
        return _copied(_text_of(messages[-1]))
    if not task.steps or task.unread:
        return _not_understood(task)
    if attempts and not attempts[-1].ok:
        return _after_failure(here, attempts[-1])
    following = attempts[-1].step + 1 if attempts else 0
    if following == len(task.steps):
        as_asked = [attempt.call for attempt in attempts] == [step.ways[0] for step in task.steps]
        return _outputs(here) if as_asked and not task.summarize else _report(here)
    calls = [step.way(here.offered) for step in task.steps[following:]]
    if calls[0] is None or (not attempts and None in calls):  # don't begin what can't be finished
        return _tools_missing(here, following)
    return f"step{following}", calls[0]


def _after_failure(here: _Situation, latest: _Attempt) -> str | _Move:
    if here.purpose == RESEARCH:
        return _report(here, "This planner does no research.")
    if latest.mended:
        return _report(here, "The mended version failed too.")
    if here.purpose != REPAIR:
        return _report(here)
    if any(attempt.mended for attempt in here.attempts):
        return _report(here, "It mends one failure in a task, and did.")
    mending = latest.mending()
    if mending is None or latest.call.tool not in here.offered:
        return _report(here, "Nothing in its repair table mends this.")
    return f"mend{latest.step}", mending[1]


# Where the run stands


def _situation(request: ModelRequest) -> _Situation:
    messages = request.messages
    start = next((at for at in reversed(range(len(messages))) if _from_caller(messages[at])), None)
    task = Task() if start is None else read_task(_text_of(messages[start]))
    attempts = list(_attempts(messages[start:], task))
    if attempts and _told_that_it_failed(request):
        attempts[-1] = evolve(attempts[-1], ok=False)
    tools = () if request.tool_choice == "none" else request.tools
    offered = frozenset(str(tool.get("function", {}).get("name")) for tool in tools)
    return _Situation(task, tuple(attempts), offered, request.purpose)


def _from_caller(message: Message) -> bool:
    return message.get("role") == "user" and not _text_of(message).startswith(DIRECTIVE_MARK)


def _told_that_it_failed(request: ModelRequest) -> bool:
    """Return whether the machine wants the latest call mended: in plain text a failure may not show."""
    *_, before, directive = [{}, *request.messages]
    wanted = request.purpose in (REPAIR, RESEARCH) and before.get("role") == "tool"
    return wanted and _text_of(directive) != nudge()  # that one follows a call that was well, only not new


def _text_of(message: Message) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(str(part["text"]) for part in content if isinstance(part, dict) and "text" in part)
    return content if isinstance(content, str) else ""


def _attempts(messages: Sequence[Message], task: Task) -> Iterator[_Attempt]:
    """Yield the planner's own calls that were answered, in order; it does not speak of another model's."""
    asked: dict[str, dict[str, Any]] = {}
    for message in messages:
        asked.update((call["id"], call["function"]) for call in message.get("tool_calls") or ())
        call_id = str(message.get("tool_call_id"))
        ours = re.fullmatch(r"(step|mend)(\d+)_\d+", call_id) if call_id in asked else None
        if ours and int(ours[2]) < len(task.steps):
            name, arguments = asked[call_id]["name"], json.loads(asked[call_id]["arguments"])
            whole = task.steps[int(ours[2])].ways[0].whole
            text = json.dumps(arguments) if whole else str(arguments.get(_ARGUMENT.get(name)))
            call = Call(name, text, whole)
            yield _Attempt(int(ours[2]), ours[1] == "mend", call, *_outcome(call, _text_of(message)))


# How the driver tells of calls without a result, and how a failed result begins whose middle was cut out
_FAILED = re.compile(r'(?:not run|interrupted|error): |\{"ok": ?false\b')


def _outcome(call: Call, content: str) -> tuple[bool, int | None, str, str]:
    """Return what a tool message tells: ok, rc, stdout, stderr."""
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        failed = _FAILED.match(content) and content != call.text  # what was to be echoed may look like a failure
        return (False, None, "", content) if failed else (True, None, content, "")
    # the machine's own verdict, so that both call the same thing a failure
    judged = read_outcome(ToolCall("", call.tool, "{}"), content, seconds=0.0, chars=len(content))
    outputs = [told[key] for key in ("stdout", "text", "result", "answer") if told.get(key) is not None]
    output = outputs[0] if outputs else content if judged.ok else ""
    errors = [str(told[key]).strip("\n") for key in ("stderr", "error") if told.get(key)]
    return judged.ok, judged.rc, output if isinstance(output, str) else json.dumps(output), "\n".join(errors)


# Answers


def _not_understood(task: Task) -> str:
    where = f"It stopped reading at: {_one_line(task.unread)}\n" if task.unread else ""
    return f"Nothing was run, because the task is not one that this planner understands.\n{where}{understood()}"


def _tools_missing(here: _Situation, following: int) -> str:
    missing = {step.ways[0].tool for step in here.task.steps[following:] if step.way(here.offered) is None}
    offered = ", ".join(sorted(here.offered)) or "none"
    return _report(here, f"This needs tools that are not offered: {', '.join(sorted(missing))} (offered: {offered}).")


def _copied(request: str) -> str:
    """Return the ends of the record that a request for a summary holds."""
    record = re.search(r"<record>\n(.*)\n</record>", request, re.DOTALL)
    return f"Copied from the record, not rephrased:\n{cut(record[1] if record else request, 2_000)}"


def _outputs(here: _Situation) -> str:
    """Return what the steps printed, where all went as asked."""
    lines = []
    for step, attempt in zip(here.task.steps, here.attempts, strict=True):
        output = attempt.stdout.rstrip("\n") or "(no output)"
        lines.append(f"{step.expression} = {output}" if step.expression else output)
    return "\n".join(lines)


def _report(here: _Situation, closing: str = "") -> str:
    """Return what was run with what result, and what was not."""
    steps, attempts = here.task.steps, here.attempts
    reached = attempts[-1].step + 1 if attempts else 0
    ended = f"; step {reached} failed" if attempts and not attempts[-1].ok else ""
    lines = [f"Ran {reached} of {len(steps)} step{'' if len(steps) == 1 else 's'}{ended}."]
    for number, step in enumerate(steps):
        made = [attempt for attempt in attempts if attempt.step == number]
        for before, attempt in zip([None, *made], made, strict=False):
            lines += _told(attempt, before, step)
        if not made:
            untold = "its result is no longer in the transcript" if number < reached else "not run"
            lines.append(f"{number + 1}. {_named(step.ways[0])}: {untold}")
    return "\n".join([*lines, closing]).rstrip("\n")


def _told(attempt: _Attempt, before: _Attempt | None, step: Step) -> Iterator[str]:
    mending = before.mending() if before and attempt.mended else None
    remark = f" (mended: {mending[0]})" if mending else " (mended)" if attempt.mended else ""
    if attempt.call.tool != step.ways[0].tool:
        remark += f" ({step.ways[0].tool} is not offered)"
    succeeded = "answered" if attempt.rc is None else "succeeded"  # a plain text may tell of a failure
    verdict = succeeded if attempt.ok else "failed"
    rc = "" if attempt.rc is None else f" with rc {attempt.rc}"
    silent = "" if (attempt.stdout + attempt.stderr).strip() else ", no output"
    yield f"{attempt.step + 1}. {_named(attempt.call)}{remark}: {verdict}{rc}{silent}"
    for stream, text in (("stdout", attempt.stdout), ("stderr", attempt.stderr)):
        if text.strip():
            yield f"   {stream}:"
            yield from (f"   | {line}" for line in cut(text, 600).splitlines())


def _named(call: Call) -> str:
    return f"{call.tool} `{_one_line(call.text)}`"


def _one_line(text: str) -> str:
    line, _, more = text.rstrip().partition("\n")
    return line if len(line) <= 100 and not more else f"{line[:100]} ..."
