"""Hypothesis strategies for worlds that mean harm: replies no model should send, tools that break, settings at edges.

What they draw are items for the scripts of `ScriptedModel` and `ScriptedTools`. Most replies are calls that a run can
make, so that runs get deep: a hostile reply in the tenth turn finds more than ten in the first.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from agent_fsm.config import AgentConfig
from agent_fsm.protocol import ModelError, ToolResult
from agent_fsm.testing.scripted import HANG

__all__ = ["configs", "outcomes", "replies"]

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
