"""Tasks: what the caller wrote, read phrase by phrase into steps.

A task is read as a whole before anything is run: one phrase that is not understood, and nothing is begun.
"""

import ast
import json
import re
import shlex
import textwrap
from collections.abc import Callable
from typing import TypeAlias

from attrs import frozen

__all__ = ["MAX_STEPS", "MAX_TASK_CHARS", "PHRASES", "Call", "Step", "Task", "parses", "read_task", "understood"]

MAX_TASK_CHARS = 20_000
MAX_STEPS = 50
_MAX_ENDS = 20
"""Places at which one phrase may end; each costs a parse of what stands before it."""


@frozen
class Call:
    """A tool call in the planner's terms: a tool that it knows takes one text; for any other the caller gives all."""

    tool: str
    text: str
    whole: bool = False
    """Whether `text` is all arguments, as a JSON object."""


@frozen
class Step:
    """One thing to do."""

    ways: tuple[Call, ...]
    """Calls that would do it, best first."""
    expression: str = ""
    """The arithmetic that is asked for, if that is what the step is."""

    def way(self, offered: frozenset[str]) -> Call | None:
        """Return the best call whose tool is *offered*, if there is one."""
        return next((call for call in self.ways if call.tool in offered), None)


@frozen
class Task:
    """The caller's last message as a list of steps."""

    steps: tuple[Step, ...] = ()
    summarize: bool = False
    unread: str = ""
    """The text from the first words on that are not understood."""


Reading: TypeAlias = tuple[tuple[Step, ...], str]
"""The steps that a phrase asks for, and the text after it."""


@frozen
class _Phrase:
    """A form of words that is understood."""

    example: str
    means: str
    head: re.Pattern[str]
    """How it begins."""
    read: Callable[[re.Match[str]], Reading | None]
    """Reads on from a match of `head`; None if it is not this phrase after all."""
    summarizes: bool = False


def understood() -> str:
    """Return what the planner understands, one phrase a line."""
    width = max(len(phrase.example) for phrase in PHRASES)
    rows = [f"  {phrase.example:<{width}}  {phrase.means}" for phrase in PHRASES]
    return "\n".join(["It understands these, joined by `then`, new lines or list numbers:", *rows])


def read_task(text: str) -> Task:
    """Return the steps that *text* asks for."""
    if len(text) > MAX_TASK_CHARS:
        return Task(unread=text[MAX_TASK_CHARS:])
    steps: tuple[Step, ...] = ()
    summarize, rest = False, _unjoined(f"\n{text}")  # a list mark stands after a new line
    while rest:
        phrase, more, after = _read_phrase(rest)
        if phrase is None or (phrase.summarizes and not steps) or len(steps + more) > MAX_STEPS:
            break
        steps, summarize, rest = steps + more, summarize or phrase.summarizes, _unjoined(after)
    return Task(steps, summarize, unread=rest)


def _read_phrase(text: str) -> tuple[_Phrase | None, tuple[Step, ...], str]:
    for phrase in PHRASES:
        head = phrase.head.match(text)
        reading = phrase.read(head) if head else None
        if reading:
            return phrase, *reading
    return None, (), text


# Where a phrase ends

_JOINT = re.compile(
    r"""(?ix)(?:
      [^\S\n]+
    | \n[ \t]* (?P<mark>(?:(?:step\s)?\d{1,2}[.):]|[-*\u2022])\s)?
    | (?<!\s)[.,;!]+(?=\s|$)  # a dot that stands alone is a folder
    | (?P<then>\b(?:then|next|finally)\b)
    | \b(?:and|first|now|also|please|can\syou|could\syou)\b
    | \b(?:run|execute|do)(?:\s(?:this|these|the\sfollowing))?(?:\s(?:code|script|commands?|steps?))?:?(?=\s*\n)
    )+"""
)
"""What joins phrases: blanks, punctuation, list marks and such words, as many as there are."""
_LIKE_CODE = re.compile(r"(?i)[-+(.\d]|echo\b(?!\s*:)")
"""How phrases begin that could also be a line of code: they end what is before them only after "then" or a mark."""


def _unjoined(text: str) -> str:
    joint = _JOINT.match(text)
    return text[joint.end() :] if joint else text


def _ends(text: str) -> list[tuple[int, int]]:
    """Return where a phrase in *text* may end because another begins: its end, the start of the next."""
    ends: list[tuple[int, int]] = []
    for joint in _JOINT.finditer(text):
        end, start = joint.span()
        firm = joint["then"] or joint["mark"] or (joint[0].strip(" \t") and not _LIKE_CODE.match(text, start))
        if firm and len(ends) < _MAX_ENDS and any(phrase.head.match(text, start) for phrase in PHRASES):
            ends.append((end, start))
    return ends


def _split_line(text: str) -> tuple[str, str]:
    """Split *text* after its first line, or where another phrase begins before that, if possible outside quotes."""
    line, newline, below = text.partition("\n")
    if not line.strip():  # a block that begins below its head
        line, newline, below = below, "", ""
    ends = [(end, start) for end, start in _ends(line) if line[end] != ";"]  # `if x; then y` is the shell's own
    unquoted = [each for each in ends if all(line[: each[0]].count(quote) % 2 == 0 for quote in "'\"")]
    end, start = next(iter(unquoted or ends), (len(line), len(line)))  # `or`: an apostrophe is no quote
    return line[:end].strip(), line[start:] + newline + below


def _split_python(text: str) -> tuple[str, str]:
    """Split *text* after code that parses and is followed by another phrase, by nothing, or by an unknown "then"."""
    ends, whole = _ends(text), (len(text), len(text))
    thens = [joint.span() for joint in _JOINT.finditer(text) if joint["then"]]
    for end, start in [*ends, whole, *thens[:_MAX_ENDS]]:
        code = _code(text[:end])
        for each in (code, code.rstrip(" .,;")):  # a full stop may end the sentence, not the code
            if each and parses(each):
                return each, text[start:]
    end, start = next(iter(ends), whole)  # broken code: let it run, fail and be mended
    return _code(text[:end]), text[start:]


def _code(text: str) -> str:
    """Return *text* as code: dedented if it begins on a line of its own."""
    return textwrap.dedent(text.lstrip(" \t")).strip()


def parses(code: str) -> bool:
    """Return whether *code* is Python."""
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


# What follows a head

_FENCE = r"```(?P<language>\w*)[^\n`]*\n(?P<block>(?s:.*?))(?:(?m:^)[ \t]*```|\Z)"
_QUOTED = re.compile(rf"\s*(?:{_FENCE}|`(?P<inline>[^`\n]+)`)")


def _after(match: re.Match[str]) -> str:
    return match.string[match.end() :]


def _read_fence(fence: re.Match[str]) -> Reading | None:
    language, code = fence["language"].lower(), _code(f"\n{fence['block']}")
    in_shell = language in ("sh", "bash", "shell", "console")
    known = in_shell or language in ("python", "python3", "py") or (not language and parses(code))
    return (_steps(code, in_shell=in_shell), _after(fence)) if known and code else None


def _read_run(head: re.Match[str]) -> Reading | None:
    in_shell = "py" not in head[0].lower()  # python, exec_python; no other head has it
    if quoted := _QUOTED.match(head.string, head.end()):
        code, rest = _code(f"\n{quoted['block'] or quoted['inline']}"), _after(quoted)
    else:
        code, rest = _split_line(_after(head)) if in_shell else _split_python(_after(head))
    return (_steps(code, in_shell=in_shell), rest) if code else None


def _steps(code: str, *, in_shell: bool) -> tuple[Step, ...]:
    if not in_shell:
        return (Step((Call("exec_python", code),)),)
    lines = [line.strip().removeprefix("$ ") for line in code.splitlines()]
    return tuple(Step((Call("exec_shell", line),)) for line in lines if line and not line.startswith("#"))


def _read_say(head: re.Match[str]) -> Reading:
    words = _unquoted(head["words"])
    by_python, by_shell = Call("exec_python", f"print({words!r})"), Call("exec_shell", f"echo {shlex.quote(words)}")
    named = by_shell if "shell" in head["tool"].lower() else by_python
    return (Step((named, Call("echo", words))),), _after(head)


def _read_echo(head: re.Match[str]) -> Reading:
    line, rest = _split_line(_after(head))
    words = _unquoted(line)
    return (Step((Call("echo", words), Call("exec_shell", f"echo {shlex.quote(words)}"))),), rest


def _read_call(head: re.Match[str]) -> Reading | None:
    try:
        arguments, end = json.JSONDecoder().raw_decode(head.string, head.end())
    except (ValueError, RecursionError):
        return None
    return (Step((Call(head["tool"], json.dumps(arguments), whole=True),)),), head.string[end:]


def _unquoted(text: str) -> str:
    wrapped = re.fullmatch(r"([\"'`])(.*)\1", text.strip())
    return wrapped[2] if wrapped else text.strip()


def _read_arithmetic(head: re.Match[str]) -> Reading | None:
    expression = head["expression"].strip(" \t.")
    small_powers = re.findall(r"\*\*\s*\d{1,4}(?![\d.])", expression)
    computable = expression.count("**") == len(small_powers) <= 1  # 9**9**9 would compute for ever
    if not computable or not re.search(r"[\d)]\s*[-+*/%]", expression) or not parses(expression):
        return None
    return (Step((Call("exec_python", f"print({expression})"),), expression),), _after(head)


def _read_nothing(head: re.Match[str]) -> Reading:
    return (), _after(head)


# The phrases

_RUN = r"(?:(?:run|execute)\s+(?:this\s+|the\s+)?)"
_WHAT_IS = r"(?i)(?:(?:what\s+is|what's|how\s+much\s+is|calculate|compute|evaluate)(?:\s*:\s*|\s+))?"
_SUMMARY_WORDS = (
    "all|and|briefly|did|everything|happened|in|it|me|of|on|one|outputs?|printed|results?|sentence|steps|that|the|them|"
    "this|to|value|was|were|what|you"
)

PHRASES: tuple[_Phrase, ...] = (
    _Phrase("```python ... ```", "run the block, or each line of an ```sh block", re.compile(_FENCE), _read_fence),
    _Phrase(
        "Run python: CODE",
        "run it with exec_python; the code may go on over lines",
        re.compile(rf"(?i){_RUN}?(?:exec_)?python3?(?:\s+(?:code|script))?\s*(?::|(?=`))"),
        _read_run,
    ),
    _Phrase(
        "Run shell: COMMAND",
        "run it with exec_shell; Run: `COMMAND` too",
        re.compile(
            rf"(?i)(?:{_RUN}?(?:exec_shell|shell|bash)(?:\s+command)?|{_RUN}(?:sh|command))\s*(?::|(?=`))"
            r"|(?:run|execute):?\s*(?=`[^`])"
        ),
        _read_run,
    ),
    _Phrase(
        "What is 17 * 23?",
        "compute it with exec_python: + - * / // % ** and parentheses; also `calculate (3+4)/2` or `2**10`",
        re.compile(rf"{_WHAT_IS}(?P<expression>[-+(.\d][-+*/%(). \t\d]{{0,300}})(?=[?=,;\n]|$|and\b|then\b)[?=]*"),
        _read_arithmetic,
    ),
    _Phrase(
        "Say WORDS with exec_python",
        "print the words; with exec_shell too",
        re.compile(
            r"(?i)say\b:?[ \t]+(?P<words>\S[^\n]{0,2000}?)[ \t](?:with|using|via)[ \t]+(?:the[ \t]+)?"
            r"(?P<tool>exec_python|exec_shell|python|shell)\b(?:[ \t]+tool\b)?"
        ),
        _read_say,
    ),
    _Phrase(
        "Echo WORDS", "with the tool echo, or exec_shell", re.compile(r"(?i)echo\b\s*:?(?=[ \t]*[^\s:])"), _read_echo
    ),
    _Phrase(
        'Call TOOL {"x": 1}',
        "call any tool that is offered, with a JSON object",
        re.compile(r"(?i)call[ \t]+(?:the[ \t]+)?(?:tool[ \t]+)?(?P<tool>[a-z0-9_-]{1,64})[ \t]+(?:with[ \t]+)?(?=\{)"),
        _read_call,
    ),
    _Phrase(
        "summarize the result",
        "after steps: say what was run and what came of it",
        re.compile(
            r"(?i)(?:give\s+me\s+)?(?:a\s+)?(?:(?:short|brief)\s+)?(?:summari[sz]e|summary|report|tell\s+me|show\s+me)\b"
            rf"(?:[ \t]+(?:{_SUMMARY_WORDS})\b)*(?=[ \t]*(?:[.!?;,](?:\s|$)|\n|$|then\b))"
        ),
        _read_nothing,
        summarizes=True,
    ),
    _Phrase("finish", "nothing more to do", re.compile(r"(?i)(?:finish|stop|end)\b(?=[ .!]*(?:\n|$))"), _read_nothing),
)
"""What is understood, in the order in which it is tried."""
