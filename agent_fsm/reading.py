"""Reading: whatever a model or a tool sends becomes an event, and nothing in it can raise.

Text is looked at here, once. Past this module nobody reads what a model wrote.
"""

import json
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from agent_fsm.messages import (
    FRAME_TOKENS,
    LEGAL_NAME,
    assistant_message,
    cut,
    decode_object,
    encodable,
    results_size,
    text_size,
    value_size,
)
from agent_fsm.protocol import (
    Interrupted,
    Message,
    ModelFailed,
    ModelReplied,
    Said,
    ToolCall,
    ToolResult,
    ToolsFinished,
    ToolsListed,
    ToolsUnavailable,
)
from agent_fsm.redaction import REDACTED, Redactor
from agent_fsm.stagnation import Pair, novelty

__all__ = [
    "finished",
    "interrupted",
    "looks_like_research",
    "read_field",
    "read_outcome",
    "read_reply",
    "read_tools",
    "sounds_unsure",
]

_CUT_OFF = frozenset({"length", "max_tokens", "model_length"})
_REFUSING = frozenset({"content_filter", "refusal", "safety", "guardrail_intervened"})
_LEGAL_ID = re.compile(r"[A-Za-z0-9_-]{1,40}\Z")  # 64 by the documents, but OpenAI has refused more than 40
_ILLEGAL = re.compile(r"[^A-Za-z0-9_-]")
_SHOWN_CHARS = 500
"""Characters of what a model wrote amiss that it is shown again."""


# Replies


def read_reply(
    reply: object,
    *,
    now: float,
    offered: Collection[str],
    max_calls: int,
    turn: int = 0,
    redact: Redactor | None = None,
) -> ModelReplied | ModelFailed:
    """Return what *reply* amounts to.

    Args:
        reply: an OpenAI assistant message or a chat.completion, as dicts or objects; or anything else.
        now: seconds of the run.
        offered: names of the tools that exist.
        max_calls: calls that may be run; those beyond it are answered "not run".
        turn: what makes ids that we give unique in the run.
        redact: what redacts an error in place of a reply; replies stay as they are, or the calls in them would not do
            what they were made for.
    """
    whole = _fields({"content": reply} if isinstance(reply, str | bytes) else reply, _REPLY)
    message, finish = _message_of(whole)
    if message is None and whole.get("error"):
        error = f"the provider sent an error instead of a reply: {_shown(whole['error'], redact)}"
        return ModelFailed(now, retryable=True, error=error)
    known = message or {}
    refusal = _refusal_of(known)
    text = _text_of(known.get("content"))
    if finish in _REFUSING and not refusal:
        refusal = text or f"the provider stopped the reply: {finish}"
    cut_off = finish in _CUT_OFF
    why_not = "the reply was refused" if refusal else "the reply was cut off before its end" if cut_off else ""
    raw_calls = _raw_calls(known)
    calls = tuple(_calls(raw_calls, offered, max_calls, turn, why_not)) if raw_calls else ()
    said = _said(text, calls, refused=bool(refusal), cut_off=cut_off)
    entering = _entering(known, text, calls)
    usage = _fields(whole.get("usage"), _USAGE)
    model = whole.get("model")
    return ModelReplied(
        now,
        said,
        text,
        calls,
        entering,
        _reply_size(entering, text, calls),
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
        _amount(whole.get("cost_usd")),
        model if isinstance(model, str) else "",
        refusal or _oddity(said, message),
    )


_MESSAGE = ("content", "tool_calls", "function_call", "refusal", "thinking_blocks", "reasoning_content")
_REPLY = ("choices", "error", "usage", "cost_usd", "model", "finish_reason", *_MESSAGE)
_CHOICE = ("message", "finish_reason")
_USAGE = ("prompt_tokens", "completion_tokens")
_CALL = ("id", "function", "name", "arguments", "provider_specific_fields")


def _fields(thing: object, names: Sequence[str]) -> Mapping[str, Any]:
    """Return the fields of *thing*, a mapping or an object, that have one of *names*."""
    if type(thing) is dict:  # the usual case; asking for a Mapping takes ten times as long
        return thing
    return {} if thing is None else {name: read_field(thing, name) for name in names}


def read_field(thing: object, name: str) -> Any:
    """Return a field of a foreign mapping or object; None if it has none, or raises."""
    try:
        return thing.get(name) if isinstance(thing, Mapping) else getattr(thing, name, None)
    except Exception:  # noqa: BLE001 # a foreign object's property may raise anything; then it has no such field
        return None


def _message_of(reply: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, str]:
    """Return the assistant message in *reply* and why it ended, in lower case; None where there is no message."""
    choices = reply.get("choices")
    if isinstance(choices, list | tuple) and choices:
        choice = _fields(choices[0], _CHOICE)
        message = choice.get("message")
        return None if message is None else _fields(message, _MESSAGE), _finish(choice)
    if choices is None and any(reply.get(key) is not None for key in _MESSAGE):
        return reply, _finish(reply)
    return None, ""


def _finish(choice: Mapping[str, Any]) -> str:
    reason = choice.get("finish_reason")
    return reason.lower() if isinstance(reason, str) else ""


def _said(text: str, calls: Sequence[ToolCall], *, refused: bool, cut_off: bool) -> Said:
    if refused:
        return Said.REFUSED
    if cut_off:
        return Said.CUT_OFF
    if calls:
        return Said.CALLS
    if not text.strip():
        return Said.EMPTY
    return Said.UNSURE if sounds_unsure(text) else Said.ANSWER


def _oddity(said: Said, message: Mapping[str, Any] | None) -> str:
    if said is not Said.EMPTY:
        return ""
    return "it had no message in it" if message is None else "it had neither text nor calls"


def _entering(message: Mapping[str, Any], text: str, calls: Sequence[ToolCall]) -> Message | None:
    """Return what enters the transcript; None where a provider would take nothing of it."""
    if not calls and not text.strip():
        return None
    entering = assistant_message(text if text.strip() else "", calls)
    if calls:
        for key in ("thinking_blocks", "reasoning_content"):  # some providers want them back beside the calls
            value = message.get(key)
            if isinstance(value, list | str) and (plain := _plain(value)):
                entering[key] = plain
    return entering


def _plain(value: object) -> Any:
    """Return *value*, which is to be sent back as it came, as plain JSON values; None if it can't be sent."""
    text = _dumped(value)
    if text is None:
        return None
    try:
        text.encode()
        plain = json.loads(text)
        value_size(plain)  # it is taken later, when a nesting too deep would be an exception
    except (ValueError, RecursionError):  # a lone surrogate is a ValueError, too
        return None
    return plain


def _dumped(value: object, *, allow_nan: bool = False, default: Callable[[object], str] | None = None) -> str | None:
    """Return a foreign value as JSON; None if it is none."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=allow_nan, default=default)
    except Exception:  # noqa: BLE001 # circular, too deep, keys of other types; and a foreign mapping may raise anything
        return None


def _refusal_of(message: Mapping[str, Any]) -> str:
    """Return what the model refused with, in a field of its own or in parts of the content."""
    content = message.get("content")
    refusals = [message.get("refusal")]
    if content is not None and isinstance(content, list | tuple):
        refusals += [_fields(part, ("refusal",)).get("refusal") for part in content if not isinstance(part, str)]
    return "\n".join([encodable(each) for each in refusals if isinstance(each, str) and each.strip()])


def _reply_size(entering: Message | None, text: str, calls: Sequence[ToolCall]) -> int:
    if entering is None:
        return 0
    size = FRAME_TOKENS + text_size(text)
    for call in calls:
        size += FRAME_TOKENS + len(call.id) + len(call.name) + text_size(call.arguments)
        if call.provider_fields is not None:
            size += value_size(call.provider_fields)
    if len(entering) > 3:
        size += sum(
            value_size(value) for key, value in entering.items() if key not in ("role", "content", "tool_calls")
        )
    return size


def _amount(value: object) -> float | None:
    if value is None or not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if 0 <= value <= sys.float_info.max else None  # false of NaN, too


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


# Text


def _text_of(content: object) -> str:
    """Return the text of a message's content, whatever its type."""
    if content is None:
        return ""
    match content:
        case str():
            return encodable(content)
        case bytes() | bytearray():
            return content.decode("utf-8", "replace")
        case list() | tuple():
            return "".join(_text_of_part(part) for part in content)
        case _:
            return _as_json(content)


def _text_of_part(part: object) -> str:
    if isinstance(part, str):
        return encodable(part)
    for key in ("text", "refusal"):
        text = part.get(key) if type(part) is dict else read_field(part, key)
        if isinstance(text, str):
            return encodable(text)
    return ""


def _as_json(value: object) -> str:
    text = _dumped(value, allow_nan=True, default=_named)
    return _named(value) if text is None else encodable(text)


def _named(value: object) -> str:
    return f"[{type(value).__name__}]"


def _shown(value: object, redact: Redactor | None = None) -> str:
    """Return what the model wrote, short enough to be shown to it again."""
    text = encodable(value) if isinstance(value, str) else _as_json(value)
    return cut(text if redact is None else redact(text), _SHOWN_CHARS)


_SURE = r"(?:sure|certain|confident|positive)"
_HOW = r"(?:(?:really|quite|too|so|very|at all|100 ?%|entirely|completely|totally|absolutely|fully|altogether) )?"
_DOUBT = re.compile(
    rf"\bI(?:['’]?m| am) (?:(?:still|really|just|honestly|a bit|fairly|pretty|quite|rather|somewhat) )?"
    rf"(?:not {_HOW}{_SURE}|unsure|uncertain|guessing)\b"
    r"|\bI (?:(?:really|honestly|just) )?(?:do not|don['’]?t|can(?:not|['’]?t)|could(?: not|n['’]?t)) "
    r"(?:(?:really|actually|quite) )?(?:know(?! of any)|(?:recall|remember)(?! (?:\w+ )?\w+ing)"
    r"|be (?:sure|certain)|(?:say|tell) for (?:sure|certain))\b"
    r"|\bI (?:might|may|could) (?:well )?be (?:wrong|mistaken)\b"
    r"|\b(?:my best guess|I(?:['’]d| would| can only| could only) guess|I(?:['’]ve| have) no idea)\b"
    rf"|(?:^|[.!?]\s+|\n\s*)(?:honestly, |sorry, )?(?:not {_HOW}(?:sure|certain)\b|no idea\b"
    r"|(?:unsure|uncertain)(?=\s*(?:$|[.,!?;]|(?:if|about|whether|what|which|how)\b)))",
    re.IGNORECASE,
)


def sounds_unsure(text: str) -> bool:
    """Return whether *text* hedges in the first person: "I'm not sure", "I don't know", "my best guess".

    Only the first and last 4,000 characters are read. What others doubt ("analysts are not sure") does not count.
    """
    if len(text) > 8_000:
        text = f"{text[:4_000]}\n{text[-4_000:]}"
    return _DOUBT.search(text) is not None


# Calls


def _raw_calls(message: Mapping[str, Any]) -> Sequence[object]:
    calls = message.get("tool_calls")
    if isinstance(calls, list | tuple):
        return calls
    if isinstance(calls, Mapping):
        return [calls]
    legacy = message.get("function_call")
    return [{"function": legacy}] if legacy else []


def _calls(
    raw_calls: Sequence[object], offered: Collection[str], max_calls: int, turn: int, why_not: str
) -> Iterator[ToolCall]:
    taken: set[str] = set()
    for position, each in enumerate(raw_calls):
        raw = _fields(each, _CALL)
        function = raw if raw.get("function") is None else _fields(raw["function"], _CALL)
        wrote_name, wrote_arguments = function.get("name"), function.get("arguments")
        name = wrote_name if isinstance(wrote_name, str) and LEGAL_NAME.match(wrote_name) else ""
        arguments = _arguments(wrote_arguments)
        not_run, wrote = why_not, ""
        over_cap = position >= max_calls and not why_not
        if over_cap:
            not_run = f"only the first {max_calls} calls of a turn are run; ask for it again"
        if name not in offered:
            wrote = "" if name else _shown(wrote_name)
            not_run = not_run or f"there is no tool {name or wrote!r}; the tools are: {', '.join(offered) or 'none'}"
        if arguments is None:
            wrote = _shown(wrote_arguments)
            not_run = not_run or f"the arguments must be a JSON object; you wrote: {wrote}"
        yield ToolCall(
            _call_id(raw.get("id"), taken, turn, position),
            name or _legal_name(wrote_name),
            "{}" if arguments is None else arguments,
            not_run,
            over_cap,
            wrote,
            _provider_fields(raw.get("provider_specific_fields")),
        )


def _provider_fields(fields: object) -> Mapping[str, Any] | None:
    return _plain(fields) if fields and isinstance(fields, Mapping) else None


def _call_id(wrote: object, taken: set[str], turn: int, position: int) -> str:
    if isinstance(wrote, str) and wrote not in taken and _LEGAL_ID.match(wrote):
        taken.add(wrote)
        return wrote
    call_id = f"call_{turn}_{position}"
    while call_id in taken:
        call_id += "_"
    taken.add(call_id)
    return call_id


def _legal_name(wrote: object) -> str:
    return _ILLEGAL.sub("_", wrote)[:64] if isinstance(wrote, str) and wrote else "unnamed"


def _arguments(wrote: object) -> str | None:
    """Return the arguments as a JSON object in a string; None if they are anything else."""
    if isinstance(wrote, str):
        if not wrote.strip():
            return "{}"  # what many models send to a function without parameters
        decoded = decode_object(wrote)
        if decoded is None:
            return None
        if "\\u" not in wrote or not _HALF_ESCAPED.search(wrote):
            return encodable(wrote)
        wrote = decoded
    if wrote is None:
        return "{}"
    if not isinstance(wrote, Mapping):
        return None
    text = _dumped(wrote)
    return None if text is None else encodable(text)


# Perhaps half a surrogate pair, in ASCII: the text can be sent on, but not what it stands for
_HALF_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")


# Tools

_WORD = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+")
_LOOKING_UP = re.compile(
    r"research|search|lookup|ask|docs|documentation|web|google|wiki|wikipedia|fetch|browse|perplexity|context7"
)
_CHANGING = re.compile(r"user|replace|delete|remove|write|create|update|deploy|git|send")


def looks_like_research(name: str) -> bool:
    """Return whether a tool's name says that it looks things up: `web_search`, `askPerplexity`, `get-docs`."""
    words = [word.lower() for word in _WORD.findall(name)]
    return any(map(_LOOKING_UP.fullmatch, words)) and not any(map(_CHANGING.fullmatch, words))


def read_tools(
    listed: object,
    *,
    now: float,
    backend: str,
    research: Collection[str] | None = None,
    unavailable: Sequence[str] | None = None,
    redact: Redactor | None = None,
) -> ToolsListed | ToolsUnavailable:
    """Return the function tools in *listed*. What is none, or has an illegal name or a taken one, is left out.

    Args:
        listed: what the backend answered.
        now: seconds of the run.
        backend: what to call it in an error.
        research: names of the tools that look things up; None: judge by name.
        unavailable: what the backend says of parts of it that could not be asked.
        redact: what redacts all of it but the names of tools.
    """
    if not isinstance(listed, list | tuple):
        return ToolsUnavailable(now, backend, f"it answered with {_named(listed)} where a list of tools was expected")
    tools: dict[str, Mapping[str, Any]] = {}
    size = 0
    for each in listed:
        name = _fields(_fields(each, ("function",)).get("function"), ("name",)).get("name")
        if isinstance(name, str) and LEGAL_NAME.match(name) and name not in tools and (text := _encoded(each)):
            tool = each
            if redact is not None and redact(text) is not text:
                tool = _redacted_tool(each, name, redact)
                text = _encoded(tool)
            tools[name] = tool if tool.get("type") == "function" else {**tool, "type": "function"}
            size += len(text) + FRAME_TOKENS
    named = research if isinstance(research, list | tuple | set | frozenset | Mapping) else None
    looks_up = tuple(name for name in tools if (looks_like_research(name) if named is None else name in named))
    missing = unavailable if isinstance(unavailable, list | tuple) else ()
    said = [_text_of(each) for each in missing[:_SHOWN_MISSING]]
    told = tuple(cut(each if redact is None else redact(each), _MISSING_CHARS) for each in said)
    return ToolsListed(now, tuple(tools.values()), looks_up, size, told)


_MISSING_CHARS = 1_000
_SHOWN_MISSING = 100


_encode = json.JSONEncoder(allow_nan=False).encode  # built once, like a decoder


def _encoded(value: object) -> str:
    """Return a mapping that is to be sent as JSON, which has at most a token a character; nothing if it can't be."""
    try:
        text = _encode(value)
        if "\\ud" in text:  # perhaps half a surrogate pair
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError):
        return ""
    return text if text.startswith("{") else ""


def _redacted_tool(tool: Mapping[str, Any], name: str, redact: Redactor) -> Mapping[str, Any]:
    redacted = redact.json(tool, names=False)  # by its names it is called
    return {**redacted, "function": {**redacted["function"], "name": name}}


_RESULT = ("ok", "rc", "error", "stdout", "stderr")
"""The fields of a result that say what became of the call."""


def read_outcome(
    call: ToolCall, outcome: object, *, seconds: float, chars: int, redact: Redactor | None = None
) -> ToolResult:
    """Return the result of *call*, given what its tool returned.

    A mapping, or a string that is a JSON object, with one of `ok`, `rc`, `stdout`, `stderr`, `error`, `text`, `result`,
    `answer` says itself whether it is a success: `ok` if it is a bool, else no `error` and an `rc` of 0 or none. Any
    other string is the text of a success. More than *chars* characters are cut to head and tail. What *redact* finds is
    redacted before: half a secret would not be found. It does not change what counts as a success.
    """
    parts: tuple[Mapping[str, Any], ...] = ()
    structured: Any = None
    if isinstance(outcome, ToolResult):
        text, seconds = _text_of(outcome.text), _amount(outcome.seconds) or seconds
        ok, rc = outcome.ok is True, _exit_code(outcome.rc)
        told = {} if ok else _told(text)
        parts, structured = outcome.parts, outcome.structured
    else:
        text = encodable(outcome) if isinstance(outcome, str) else _text_of(outcome)
        told = _told(outcome)
        ok, rc = _verdict(told) if told else (True, None)
    if redact is not None:
        text = redact(text)
        if parts or structured is not None:
            parts = tuple(_redacted_json(parts, redact, ()))
            structured = _redacted_json(structured, redact, REDACTED)
    shown = cut(text, chars) if text.strip() else "(no output)"
    observation = "" if ok else _observation(told, redact)
    return ToolResult(shown, ok, rc, seconds, call.id, call.name, True, observation, parts, structured)


def _told(outcome: object) -> Mapping[str, Any]:
    """Return the fields in which a tool tells what became of a call; none if it tells it in prose."""
    if not isinstance(outcome, str):
        return _fields(outcome, _RESULT) if isinstance(outcome, Mapping) else {}
    if not outcome.lstrip().startswith("{"):
        return {}
    try:
        fields = json.loads(outcome)  # NaN is fine here: many tools are Python, and it goes nowhere
    except (ValueError, RecursionError):
        return {}
    return _fields(fields, _RESULT)


def _verdict(told: Mapping[str, Any]) -> tuple[bool, int | None]:
    ok, rc = told.get("ok"), told.get("rc")
    if not isinstance(ok, bool):
        ok = not told.get("error") and (not isinstance(rc, int) or isinstance(rc, bool) or rc == 0)
    return ok, _exit_code(rc)


def _redacted_json(value: Any, redact: Redactor, otherwise: Any) -> Any:
    """Return *value* redacted, or *otherwise* if it can't be looked through."""
    try:
        return redact.json(value)
    except Exception:  # noqa: BLE001 # too deep; and a foreign mapping may raise anything
        return otherwise


def _observation(told: Mapping[str, Any], redact: Redactor | None) -> str:
    lines = []
    for key in ("error", "stdout", "stderr"):
        value = told.get(key)
        if isinstance(value, str) and value.strip():
            if redact is not None:
                value = redact(value)
            lines.append(f"  {key}: {'...' if len(value) > _TAIL_CHARS else ''}{value[-_TAIL_CHARS:]}")
    return encodable("\n".join(lines))


_TAIL_CHARS = 600
"""Characters of each of error, stdout and stderr that a directive repeats."""


def _exit_code(rc: object) -> int | None:
    return rc if isinstance(rc, int) and not isinstance(rc, bool) and abs(rc) < 2**63 else None


def finished(
    calls: Sequence[ToolCall],
    results: tuple[ToolResult, ...],
    seen: dict[Pair, int],
    *,
    now: float,
    listing: ToolsListed | None = None,
) -> ToolsFinished:
    """Return the event that every one of *calls* has its result; *seen* counts the pairs met so far."""
    fresh, stale, repeats = novelty(seen, calls, results)
    return ToolsFinished(now, results, _failed(calls, results), fresh, stale, repeats, results_size(results), listing)


def interrupted(results: tuple[ToolResult, ...], *, now: float, cancelled: bool, started: bool = True) -> Interrupted:
    """Return the event that a turn was interrupted, with the *results* of all its calls."""
    return Interrupted(now, cancelled, results, results_size(results), started)


def _failed(calls: Sequence[ToolCall], results: Sequence[ToolResult]) -> bool:
    """Return whether a call failed and none of the same tool succeeded after it."""
    if False not in [result.ok for result in results]:
        return False
    mended: set[str] = set()
    for call, result in zip(reversed(calls), reversed(results), strict=True):
        if result.ok:
            mended.add(result.name)
        elif result.name not in mended and not call.over_cap:
            return True
    return False
