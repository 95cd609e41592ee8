"""Hypothesis strategies for worlds that mean harm: replies no model should send, tools that break, settings at edges.

    replies, outcomes, timings    for the scripts of `ScriptedModel` and `ScriptedTools`, and for `ListClock`
    configs, tables               settings of a run, and policies made of the table that ships
    events                        what may happen to a run next, for tests that need no driver

Most replies are calls that a run can
make, so that runs get deep: a hostile reply in the tenth turn finds more than ten in the first.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any

from attrs import evolve, frozen
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from agent_fsm.check.reads import reads_of
from agent_fsm.config import AgentConfig
from agent_fsm.errors import TableError
from agent_fsm.guards import Guard, Number
from agent_fsm.machine import Run, next_effect
from agent_fsm.messages import not_run_results
from agent_fsm.protocol import (
    AskModel,
    Event,
    Interrupted,
    ListTools,
    ModelError,
    ModelFailed,
    RunTools,
    StopReason,
    ToolCall,
    ToolResult,
    ToolsFinished,
    ToolsUnavailable,
)
from agent_fsm.reading import finished, interrupted, read_outcome, read_reply, read_tools
from agent_fsm.rules import rules_of
from agent_fsm.table import TABLE, Row, Table, add, counter, ledger
from agent_fsm.testing.scripted import HANG

__all__ = ["Edges", "configs", "delays", "edges_of", "events", "outcomes", "replies", "tables", "timings"]

HUGE_CHARS = 20_000
"""A long text; longer ones find nothing more and take the time of other examples."""


class Sour:
    """An object whose every property raises."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"there is no reading {name}")

    def __repr__(self) -> str:
        return "Sour()"


class SourMapping(dict[str, Any]):
    """A mapping that can't be read."""

    def get(self, *_: Any) -> Any:
        """Raise, whatever is asked."""
        raise RuntimeError("there is no reading this mapping")


class Unpronounceable(Exception):  # noqa: N818 # it is one in no other sense
    """An exception that can't be turned into text."""

    def __str__(self) -> str:
        raise RuntimeError("no words for it")


def weighted(*choices: tuple[int, SearchStrategy[Any]]) -> SearchStrategy[Any]:
    """Return a strategy that draws from each of *choices* in proportion to its weight."""
    tickets = [strategy for weight, strategy in choices for _ in range(weight)]
    return st.integers(0, len(tickets) - 1).flatmap(tickets.__getitem__)


# Junk

texts = st.one_of(
    st.text(max_size=30),
    st.text(st.characters(categories=["Cs", "Cc", "Zs", "So"]), max_size=8),  # lone surrogates, controls, emoji
    st.sampled_from(
        ["", " \n\t", "\x00", "\u200b", "\u3000", "null", "{}", '{"ok": false}', "\ud800", "x" * HUGE_CHARS]
    ),
)
numbers = st.sampled_from([0, -1, 7, True, 1.5, math.inf, math.nan, 10**400])
scalars = st.one_of(st.none(), st.booleans(), numbers, texts, st.binary(max_size=8))


def _deep_list() -> list[Any]:
    deep: list[Any] = []
    for _ in range(5_000):
        deep = [deep]
    return deep


def _ring() -> dict[str, Any]:
    ring: dict[str, Any] = {}
    ring["self"] = ring
    return ring


_MONSTERS: Mapping[str, Callable[[], Any]] = {
    "deep": _deep_list,
    "ring": _ring,
    "sour": Sour,
    "sour mapping": lambda: SourMapping(content="x"),
    "proxy": lambda: MappingProxyType({"a": 1}),
    "object": object,
    "keys": lambda: {(1, 2): 3},
    "set": lambda: {1, 2},
    "number": lambda: 10**5_000,  # its repr raises, and Hypothesis shows the repr of what it samples from
}
monsters = st.sampled_from(sorted(_MONSTERS)).map(lambda kind: _MONSTERS[kind]())
junk = st.one_of(
    scalars,
    st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
    ),
    monsters,
)

# Calls

_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
valid_arguments = weighted(
    (2, st.just({})),
    (4, st.fixed_dictionaries({"query": st.sampled_from(["a", "b", "c"])})),
    (2, st.dictionaries(st.text(max_size=5), _VALUES, max_size=3)),
)
broken_arguments = st.one_of(
    junk,
    _VALUES.map(json.dumps),
    st.sampled_from(
        [
            "{",
            '{"a": NaN}',
            '{"a": Infinity}',
            '{"a": 1e999}',
            '{"a": "\\ud800"}',
            '{"a": "\ud800"}',
            '{"\\udfff": 1}',
            '{"a": 1, "a": 2}',
            '{"a": 1} trailing',
            "[" * 100_000,
            '{"a": ' * 100_000,
            '{"a": ' * 400 + "1" + "}" * 400,
            '{"a": ' + "9" * 5_000 + "}",
            '{"a": "' + "x" * HUGE_CHARS + '"}',
            "\ufeff{}",
            " {} ",
            "'{}'",
        ]
    ),
)
ids = st.one_of(
    st.sampled_from(["call_1", "call_1", "call_1", "call_1_0", "toolu.1", "a b", "", "é", "x" * 64, "x" * 65]),
    st.just("\ud800"),
    junk,
)


@st.composite
def valid_call(draw: DrawFn, tool_names: Sequence[str]) -> dict[str, Any]:
    """Return a call that a run can make."""
    function = {"name": draw(st.sampled_from(tool_names)), "arguments": json.dumps(draw(valid_arguments))}
    return {"id": f"call_{draw(st.integers(0, 10**6))}", "type": "function", "function": function}


@st.composite
def hostile_call(draw: DrawFn, tool_names: Sequence[str]) -> Any:
    """Return what stands where a call should, with at least one thing wrong in it."""
    if draw(st.integers(0, 9)) == 0:
        return draw(junk)
    names = st.sampled_from([*tool_names, "no_such_tool", "../etc", "a" * 65, "", "tool name", "werkzeüg"]) | junk
    call = draw(valid_call(tool_names))
    wrong = draw(st.sets(st.sampled_from(["id", "name", "arguments", "fields", "flat", "missing"]), min_size=1))
    if "id" in wrong:
        call["id"] = draw(ids)
    if "name" in wrong:
        call["function"]["name"] = draw(names)
    if "arguments" in wrong:
        call["function"]["arguments"] = draw(broken_arguments)
    if "fields" in wrong:
        call["provider_specific_fields"] = draw(junk | st.just({"thought_signature": "c2ln"}))
    if "missing" in wrong:
        call.pop(draw(st.sampled_from(["id", "type", "function"])))
    return call.get("function") if "flat" in wrong else call


# Replies

prose = st.sampled_from(["Done.", "The answer is 4.", "I'm not sure.", "I don't know, my best guess is 3."])
contents = st.one_of(
    prose,
    texts,
    junk,
    st.lists(
        st.one_of(
            st.builds(lambda text: {"type": "text", "text": text}, texts | junk),
            st.just({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}),
            st.just({"type": "refusal", "refusal": "I can't help with that."}),
            junk,
        ),
        max_size=3,
    ),
)
finish_reasons = st.sampled_from(["stop", "stop", "tool_calls", "length", "content_filter", "function_call"]) | junk
usages = st.one_of(
    st.none(),
    st.builds(lambda prompt, reply: {"prompt_tokens": prompt, "completion_tokens": reply}, numbers, numbers),
    st.just({"prompt_tokens": 50, "completion_tokens": 10}),
    junk,
)


def as_object(value: Any) -> Any:
    """Return *value* with every dict that has only names as keys turned into an object with these attributes."""
    if type(value) is dict and all(isinstance(key, str) and key.isidentifier() for key in value):
        return SimpleNamespace(**{key: as_object(each) for key, each in value.items() if each is not value})
    return [as_object(each) for each in value] if type(value) is list and len(value) != 1 else value


@st.composite
def completions(draw: DrawFn, message: dict[str, Any], finish: SearchStrategy[Any]) -> Any:
    """Return *message* as a reply: bare or as a completion, with or without usage, of dicts or objects."""
    if draw(st.booleans()):
        reply: dict[str, Any] = {"choices": [{"index": 0, "message": message, "finish_reason": draw(finish)}]}
        if draw(st.booleans()):
            reply["usage"] = draw(usages)
        reply |= draw(st.sampled_from([{}, {}, {"model": "m"}, {"model": 5}, {"cost_usd": 0.0}, {"cost_usd": 10**400}]))
    else:
        reply = message
    return as_object(reply) if draw(st.booleans()) else reply


def calls_replies(tool_names: Sequence[str]) -> SearchStrategy[Any]:
    """Return replies whose calls can all be made; few calls, and now and then more than any cap."""
    several = weighted((6, st.just(1)), (3, st.integers(2, 3)), (1, st.integers(4, 12)))
    calls = several.flatmap(lambda count: st.lists(valid_call(tool_names), min_size=count, max_size=count))
    message = calls.map(lambda each: {"role": "assistant", "content": None, "tool_calls": each})
    return message.flatmap(lambda each: completions(each, st.sampled_from(["tool_calls", "stop", None])))


@st.composite
def hostile_replies(draw: DrawFn, tool_names: Sequence[str]) -> Any:
    """Return replies in which anything may be wrong."""
    message: dict[str, Any] = {"role": "assistant", "content": draw(contents)}
    calls = st.lists(hostile_call(tool_names) | valid_call(tool_names), max_size=4)
    match draw(st.integers(0, 5)):
        case 0:
            message["tool_calls"] = draw(junk)
        case 1:
            message["function_call"] = draw(hostile_call(tool_names).map(_function_of) | junk)
        case _:
            message["tool_calls"] = draw(calls)
    for key in ("refusal", "thinking_blocks", "reasoning_content"):
        if draw(st.integers(0, 5)) == 0:
            message[key] = draw(texts | junk | st.just([{"type": "thinking", "thinking": "hm", "signature": "s"}]))
    return draw(completions(message, finish_reasons))


def _function_of(call: Any) -> Any:
    return call.get("function") if type(call) is dict else call


odd_replies = st.one_of(
    junk.filter(lambda reply: not callable(reply)),
    st.builds(lambda choices: {"choices": choices}, st.none() | st.just([]) | st.just([None]) | junk),
    st.builds(lambda message: {"choices": [{"message": message}]}, junk),
    st.builds(lambda error: {"error": error}, junk),
)

waits = st.sampled_from([None, 0, 0.5, 30, 1e9, -1, math.inf, math.nan, 10**400, "5"])
errors = st.one_of(
    st.builds(lambda after: ModelError("overloaded", retryable=True, retry_after=after), waits),
    st.builds(lambda: TimeoutError("slow")),
    st.builds(lambda: ValueError("odd")),
    st.builds(Unpronounceable),
)
fatal_errors = st.one_of(
    st.builds(lambda: ModelError("no such model", retryable=False)), st.builds(lambda: TypeError("a bug"))
)


def replies(tool_names: Sequence[str], *, hangs: bool = True) -> SearchStrategy[Any]:
    """Return what a hostile model may do in answer to one request.

    Args:
        tool_names: the tools that exist; there must be one at least.
        hangs: whether it may also never answer; give such a run a deadline that you are willing to wait for.
    """
    choices = [
        (48, calls_replies(tool_names)),
        (8, hostile_replies(tool_names)),
        (2, odd_replies),
        (2, errors),
        (1, fatal_errors),
        (1, prose.flatmap(lambda text: completions({"role": "assistant", "content": text}, st.just("stop")))),
        (1, st.sampled_from([{"content": "No.", "refusal": "I won't."}, {"choices": [{"finish_reason": "length"}]}])),
    ]
    return weighted(*choices, *([(1, st.just(HANG))] if hangs else []))


# Outcomes


def outcomes(*, hangs: bool = True) -> SearchStrategy[Any]:
    """Return what a hostile tool may make of one call.

    Args:
        hangs: whether it may also never return; give such a run a time limit that you are willing to wait for.
    """
    fields = st.dictionaries(
        st.sampled_from(["ok", "rc", "stdout", "stderr", "error", "text", "result", "answer", "seconds"]),
        junk,
        max_size=4,
    )
    failures = st.sampled_from([{"ok": False, "rc": 1, "stderr": "no"}, '{"ok":false,"rc":2}', {"error": "it broke"}])
    results = st.builds(
        lambda text, ok, rc, seconds: ToolResult(text, ok=ok, rc=rc, seconds=seconds),
        *(texts | junk, st.booleans() | junk, st.none() | junk, st.sampled_from([0.0, 0.1, -1.0, math.nan]) | junk),
    )
    raised = st.sampled_from([ValueError("bad"), TimeoutError, KeyError("k"), RuntimeError("\ud800")]) | st.builds(
        Unpronounceable
    )
    choices = [
        (12, st.sampled_from(["ok", "fine", '{"ok": true, "rc": 0, "stdout": "4"}'])),
        (4, failures),
        (3, fields),
        (3, texts | junk),
        (2, results),
        (2, raised),
    ]
    return weighted(*choices, *([(1, st.just(HANG))] if hangs else []))


# Settings


_KNOBS: Mapping[str, Sequence[Any]] = {
    "max_iterations": (12, 12, 12, 8, 8, 5, 3, 2, 1),
    "max_wallclock_seconds": (120.0, 120.0, 20.0, 2.0),
    "max_tools_per_iter": (8, 2, 1),
    "stagnation_window": (3, 2, 1, 10),
    "enable_repair": (True, False),
    "research_on_unsure": (True, False),
    "max_research_hops": (2, 1, 0),
    "research_after_failures": (True, False),
    "max_failures_before_research": (2, 1, 3),
    "max_consecutive_failures": (5, 10, 10, 3, 2, 1),
    "summarize_every": (None, None, 1, 2, 3),
    "closing_summary": (True, False),
    "max_model_retries": (2, 1, 0),
    "max_tokens_total": (10_000_000, 10_000_000, 500_000, 60_000, 20_000, 1),
    "max_reply_tokens": (4_096, 100, 1),
    "max_cost_usd": (None, None, 100.0, 0.05),
    "prompt_usd_per_token": (1e-6, 0.0),
    "reply_usd_per_token": (2e-6, 0.0),
    "fallback_models": ((), ("second",), ("second", "third")),
    "max_history_messages": (50, None, 4, 2, 1),
    "tool_concurrency": (4, 2, 1),
    "tool_timeout_seconds": (30.0, 5.0),
    "observation_chars": (8_000, 100),
}
"""Values of each field of AgentConfig: below, at and above what a short run meets."""


@st.composite
def configs(draw: DrawFn) -> AgentConfig:
    """Return a configuration for a short run: most knobs as they are by default, a few anywhere in their range."""
    turned = draw(st.sets(st.sampled_from(sorted(_KNOBS)), max_size=6))
    chosen = {name: draw(st.sampled_from(_KNOBS[name])) for name in sorted(turned)}
    if chosen.get("max_cost_usd") is not None:
        chosen = {"prompt_usd_per_token": 1e-6, "reply_usd_per_token": 2e-6} | chosen
    return AgentConfig(**chosen)


# Times


def delays(config: AgentConfig, *, since: float = 0.0) -> SearchStrategy[float]:
    """Return seconds that one effect may take: mostly none; else just before, at and just past what stops it.

    Args:
        config: whose deadlines count.
        since: seconds of the run at which the effect begins.
    """
    left = max(0.0, config.max_wallclock_seconds - since)
    edges = [edge for each in (config.tool_timeout_seconds, left) for edge in _around(each)]
    return st.sampled_from([0.0] * 40 + [0.001, 0.5, 1.0, *edges, 10.0 * left + 1.0])


def _around(value: float) -> tuple[float, float, float]:
    return math.nextafter(value, 0.0), value, math.nextafter(value, math.inf)


@st.composite
def timings(draw: DrawFn, config: AgentConfig | None = None, *, looks: int = 12) -> list[float]:
    """Return times for a `ListClock`, which never fall: as many as *looks*, and some of them at a deadline's edge.

    Args:
        draw: Hypothesis gives it.
        config: whose deadlines count; None: the defaults.
        looks: how often the clock is asked before it stands still: once at the start and once for each event.
    """
    config = AgentConfig() if config is None else config
    times = [draw(st.sampled_from([0.0, 0.0, 1e9]))]
    for _ in range(looks - 1):
        times.append(times[-1] + draw(delays(config, since=times[-1] - times[0])))
    return times


# What may happen to a run


@frozen
class Edges:
    """Where the guards of a table turn, and what else payloads are drawn around."""

    config: AgentConfig
    tools: tuple[str, ...]
    times: tuple[float, ...]
    """Seconds of the run; one at random happens now and then."""
    retries: tuple[float, ...]
    tokens: tuple[int, ...]
    costs: tuple[float, ...]
    stale: tuple[int, ...]
    repeats: tuple[int, ...]


def edges_of(table: Sequence[Row], config: AgentConfig) -> Edges:
    """Return where the guards of *table* turn under the limits of *config*."""
    reads = reads_of(Table(table), config)

    def cuts(name: str) -> tuple[float, ...]:
        return reads.cuts.get(("ledger", name), ())

    deadline = config.max_wallclock_seconds
    times = (*_around(deadline), deadline + 1.0, *(edge for cut in cuts("seconds") for edge in _around(cut)))
    return Edges(
        config,
        ("work", "search", *(name for name in reads.counted_tools() if name not in ("work", "search"))),
        tuple(dict.fromkeys(times)),
        tuple(dict.fromkeys((*_around(deadline), *(edge for cut in cuts("retry_at") for edge in _around(cut))))),
        tuple(int(cut) for cut in (*cuts("tokens"), config.max_tokens_total)),
        (*cuts("cost_usd"), config.max_cost_usd or 1.0),
        tuple(range(1, 2 + int(max((1, *cuts("stale")))))),
        tuple(range(2, 3 + int(max((2, *cuts("repeats")))))),
    )


def events(run: Run, config: AgentConfig, *, edges: Edges | None = None) -> SearchStrategy[Event]:
    """Return what a driver may tell *run* next, read from what a model or a tool said; the run must not be over.

    Sizes, usage, times, what is stale and how long to wait before a retry are drawn around what the guards compare them
    with, and far off it. Most events let the run go on. Who reports more tokens than a request can take is not honest.

    Args:
        run: what it happens to.
        config: of the run.
        edges: as `edges_of` gives them for the run's table; None: those of TABLE.
    """
    return _events(run, edges_of(TABLE, config) if edges is None else edges)


# The simplest first, as that is where failures are shrunk to: calls make two steps of one
_ASKED = (
    *("empty", "retryable", "retryable", "retryable", "retryable", "cut off", "unsure", "strange"),
    *("answer", "refused", "fatal", "interrupted"),
    *(("calls",) * 40),
)
_RAN = ("ok",) * 12 + ("failed",) * 8 + ("mixed",) * 4 + ("interrupted",)
_LISTED = ("listed",) * 20 + ("unavailable", "interrupted")


@st.composite
def _events(draw: DrawFn, run: Run, edges: Edges) -> Event:
    effect, deadline = next_effect(run), edges.config.max_wallclock_seconds
    assert effect is not None, "the run is over"
    began = run.ledger.seconds
    if began >= deadline:  # nothing is started any more
        return _stopped(draw, run, began, started=False)
    now = _moment(draw, began, edges)
    match effect:
        case ListTools():
            return _listing(draw, run, edges, now)
        case AskModel(not_before=not_before):
            if not_before >= deadline or (now < not_before and now >= deadline):
                return _stopped(draw, run, max(now, deadline), started=False)
            kind = draw(st.sampled_from(_ASKED))
            if kind == "interrupted" and now < not_before:
                return _stopped(draw, run, now, started=False)
            return _answered(draw, run, edges, kind, max(now, not_before))
        case RunTools():
            return _run(draw, run, edges, now)


def _moment(draw: DrawFn, began: float, edges: Edges) -> float:
    """Return when an effect that *began* then ends."""
    moment = draw(st.sampled_from([0] * 16 + [1] * 3 + [2]))
    if moment == 1:
        return began + draw(st.sampled_from([0.001, 0.5, 1.0, edges.config.tool_timeout_seconds]))
    return max(began, draw(st.sampled_from(edges.times))) if moment == 2 else began


def _stopped(draw: DrawFn, run: Run, now: float, *, started: bool) -> Interrupted:
    """Return the event that an effect was stopped: by a cancel, or by the time."""
    deadline = run.ledger.limits.max_wallclock_seconds
    cancelled = draw(st.booleans())
    calls = run.pending.calls if run.pending is not None else ()
    results = tuple(draw(st.sampled_from(_partly(call))) if started else _partly(call)[0] for call in calls)
    # A timer that fires early still counts as the deadline
    at = now if cancelled or now >= deadline else draw(st.sampled_from([now, deadline]))
    return interrupted(results, now=at, cancelled=cancelled, started=started)


def _partly(call: ToolCall) -> tuple[ToolResult, ...]:
    """Return what may have become of *call* when its turn is interrupted: not started, not finished, finished."""
    if call.not_run:
        return not_run_results([call])
    stopped = ToolResult("interrupted", ok=False, call_id=call.id, name=call.name, ran=False)
    return stopped, evolve(stopped, ran=True), ToolResult("x", call_id=call.id, name=call.name)


def _listing(draw: DrawFn, run: Run, edges: Edges, now: float) -> Event:
    kind = draw(st.sampled_from(_LISTED))
    if kind == "interrupted":
        return _stopped(draw, run, now, started=True)
    if kind == "unavailable":
        return ToolsUnavailable(now, "backend", "error")
    research = draw(st.sampled_from([("search",), ()]))
    listed = draw(st.sampled_from([edges.tools] * 9 + [()]))
    words = draw(st.sampled_from(["", "", "", "x" * 3_000]))
    tools = [
        {"type": "function", "function": {"name": name, **({"description": words} if words else {})}} for name in listed
    ]
    return read_tools(tools, now=now, backend="backend", research=research)


def _answered(draw: DrawFn, run: Run, edges: Edges, kind: str, now: float) -> Event:
    """Return what comes of a request."""
    if kind == "interrupted":
        return _stopped(draw, run, now, started=draw(st.sampled_from([True, False])))
    if kind in ("retryable", "fatal"):
        waits = [None, None, 0.0, 1.0, 1e9, *(at - now for at in edges.retries if at > now)]
        return ModelFailed(now, kind == "retryable", "error", draw(st.sampled_from(waits)))
    message, finish = _message(draw, run, edges, kind)
    reply: dict[str, Any] = {"choices": [{"message": message, "finish_reason": finish}]}
    prompt, completion, cost = _usage(draw, run, edges)
    if prompt is not None:
        reply["usage"] = {"prompt_tokens": prompt, "completion_tokens": completion}
    if cost is not None:
        reply["cost_usd"] = cost
    most = edges.config.max_tools_per_iter
    return read_reply(reply, now=now, offered=run.names, max_calls=most, turn=run.ledger.iterations)


def _message(draw: DrawFn, run: Run, edges: Edges, kind: str) -> tuple[dict[str, Any], str]:
    long = "y" * draw(st.sampled_from([0, 0, 0, 0, 3_000]))
    match kind:
        case "calls":
            most = edges.config.max_tools_per_iter
            count = draw(st.sampled_from([1, 1, 1, 2, most, most + 1]))
            names = st.sampled_from(run.names or ("no_such_tool",))
            queries = st.sampled_from(["a", "b", long or "c"])
            calls = [(draw(names), json.dumps({"query": draw(queries)})) for _ in range(count)]
            made = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
            return {"content": draw(st.sampled_from(["", "Let me see."])), "tool_calls": made}, "tool_calls"
        case "strange":
            return {"tool_calls": [{"function": {"name": "no_such_tool"}}]}, "tool_calls"
        case "empty":
            return {"content": " "}, "stop"
        case "cut off":
            return {"content": f"It is{long}"}, "length"
        case "unsure":
            return {"content": f"I am not sure.{long}"}, "stop"
        case "refused":
            return {"refusal": "No."}, "stop"
    return {"content": f"It is so.{long}"}, "stop"


def _usage(draw: DrawFn, run: Run, edges: Edges) -> tuple[int | None, int, float | None]:
    """Return tokens of prompt and reply as a provider reports them, and what it says that they cost."""
    config, spent = edges.config, run.ledger
    reply = min(config.max_reply_tokens, max(0, spent.request_tokens))
    prompt = max(0, spent.request_tokens - reply)
    told = draw(st.sampled_from(["zero"] * 10 + ["some"] * 6 + ["none", "worst", "edge", "far"]))
    cost = None
    if config.max_cost_usd is not None:
        dear = [each - spent.cost_usd for each in edges.costs if each > spent.cost_usd]
        cost = draw(st.sampled_from([None, None, None, 0.0, spent.request_cost_usd, *dear]))
    match told:
        case "some":
            return min(50, prompt), min(10, reply), cost
        case "none":
            return None, 0, cost
        case "worst":
            return prompt, reply, cost
        case "edge":
            return max(0, draw(st.sampled_from(edges.tokens)) - spent.tokens + draw(st.integers(-1, 1))), 0, cost
        case "far":
            return 10 * config.max_tokens_total, 0, cost
    return 0, 0, cost


def _run(draw: DrawFn, run: Run, edges: Edges, now: float) -> Event:
    kind = draw(st.sampled_from(_RAN))
    if kind == "interrupted":
        return _stopped(draw, run, now, started=True)
    calls = run.pending.calls if run.pending is not None else ()
    texts = st.sampled_from(["x", "x", "x", "", "z" * 3_000])
    results: list[ToolResult] = []
    for call in calls:
        if call.not_run:
            results += not_run_results([call])
            continue
        ok = draw(st.booleans()) if kind == "mixed" else kind == "ok"
        outcome = draw(texts) if ok else {"ok": False, "rc": 1, "stderr": draw(texts)}
        results.append(read_outcome(call, outcome, seconds=0.0, chars=edges.config.observation_chars))
    return _aged(draw, edges, finished(calls, tuple(results), {}, now=now))


def _aged(draw: DrawFn, edges: Edges, event: ToolsFinished) -> ToolsFinished:
    """Return *event* with as much of it seen before as may be: a driver counts this beside the run."""
    count = len(event.results)
    match draw(st.sampled_from(["fresh", "fresh", "stale", "partly"])):
        case "stale":
            return evolve(event, fresh=False, stale=count, repeats=draw(st.sampled_from(edges.repeats)))
        case "partly" if count > 1:
            stale = draw(st.sampled_from([each for each in edges.stale if each < count] or [1]))
            return evolve(event, fresh=True, stale=stale, repeats=draw(st.sampled_from(edges.repeats)))
    return evolve(event, fresh=True, stale=0, repeats=1)


# Policies

own = counter("own")
_COUNTED = (
    *(ledger.iterations, ledger.model_calls, ledger.tool_calls, ledger.failures, ledger.hops, ledger.stale),
    *(ledger.tokens, ledger.calls_of("work"), ledger.calls_of("search"), own),
)
_CHOSEN = ("unsure, may research", "failures escalate", "stagnated", "failed", "summary due", "retry")
"""Rows of TABLE that a policy may do without."""


@st.composite
def tables(draw: DrawFn) -> Table:
    """Return a policy: TABLE with more reasons to stop, narrower guards, fewer rows and a counter of its own.

    It can be run; whether all of its runs end is for `check` to say.
    """
    table = TABLE
    for _ in range(draw(st.integers(0, 3))):
        changed = _changed(draw, table)
        try:
            rules_of(changed)
        except TableError:  # a row that can't be reached any more, an answer that doesn't count, ...
            continue
        table = changed
    return table


def _changed(draw: DrawFn, table: Table) -> Table:
    guard = _comparison(draw)
    here = [label for label in _CHOSEN if any(row.label == label for row in table)]
    match draw(st.sampled_from(["stopping", "own", "guarded", "without"])):
        case "stopping":
            reasons = st.sampled_from([StopReason.BUDGET, StopReason.MAX_FAILURES, StopReason.MAX_ITERATIONS])
            return table.stopping(guard, draw(reasons), closing=draw(st.booleans()))
        case "guarded" if here:
            label = draw(st.sampled_from(here))
            return table.guarded(label, lambda old: (old & guard).named(old.name))
        case "without" if here:
            return table.without(draw(st.sampled_from(here)))
    counted = [row for row in table if not row.events and row.target.value in ("Plan", "Repair", "Research")]
    row = draw(st.sampled_from(counted))
    amount = draw(st.sampled_from([1, 2, 3]))
    added = table.replaced(row, evolve(row, updates=(*row.updates, add(own, amount))))
    return added.stopping(own >= draw(st.integers(1, 9)), StopReason.BUDGET, name="own at max")


def _comparison(draw: DrawFn) -> Guard:
    number: Number = draw(st.sampled_from(_COUNTED))
    least = draw(st.sampled_from([1, 2, 3, 5, 8, 1_000]))
    guard = number >= least
    return ~guard if draw(st.booleans()) else guard
