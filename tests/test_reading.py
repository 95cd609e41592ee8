"""Whatever a model or a tool sends becomes something that can be gone on from: read through whole runs."""

import json
from collections.abc import Iterator
from types import MappingProxyType, SimpleNamespace
from typing import Any, TypeVar

import pytest

from agent_fsm import AgentConfig, AgentResult, State, StopReason, ToolResult, run_agent
from agent_fsm.protocol import (
    Message,
    ModelFailed,
    ModelReplied,
    Said,
    ToolCall,
    ToolsFinished,
    ToolsListed,
    ToolsUnavailable,
)
from agent_fsm.reading import looks_like_research, read_outcome, read_reply, read_tools, sounds_unsure
from agent_fsm.testing import ScriptedModel, ScriptedTools, anthropic_faults, openai_faults, request_faults
from agent_fsm.testing.strategies import SourMapping

TASK = [{"role": "user", "content": "What is 2 + 2?"}]
Kind = TypeVar("Kind")
HALF = "\ud800"
"""Half a surrogate pair: text in Python and nowhere else."""


class Sour:
    """An object whose properties raise."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("__") else RuntimeError(name)

    def __repr__(self) -> str:
        return "Sour()"  # without an address: it is part of the names of tests


class Played:
    """A run that a scripted model and a tool `add` have been through, seen to be valid all along."""

    def __init__(
        self, *script: Any, outcomes: Any = ("4",), research: Any = (), messages: Any = TASK, **settings: Any
    ) -> None:
        self.model = ScriptedModel(script)
        self.tools = ScriptedTools({"add": outcomes, "lookup": ["found"]}, research)
        settings = {"closing_summary": False, "max_model_retries": 0} | settings
        self.result: AgentResult = run_agent(messages, self.tools, AgentConfig(**settings), model_client=self.model)
        for request in self.model.requests:
            assert request_faults(request.messages) == []
        assert openai_faults(self.result.messages) + anthropic_faults(self.result.messages) == []

    @property
    def reply(self) -> ModelReplied:
        """What the first reply was read as."""
        return self.first(ModelReplied)

    def first(self, kind: type[Kind]) -> Kind:
        return next(event for event in self.result.events if isinstance(event, kind))

    @property
    def told(self) -> list[str]:
        """What the model is told of its first calls."""
        return [result.text for result in self.first(ToolsFinished).results]


def call(name: Any = "add", arguments: Any = "{}", call_id: Any = "c1") -> Message:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls: Any) -> Message:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


def completion(message: Any, finish: Any = "stop", **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": message, "finish_reason": finish}], **more}


def as_object(value: Any) -> Any:
    if isinstance(value, dict):
        return SimpleNamespace(**{key: as_object(each) for key, each in value.items()})
    return [as_object(each) for each in value] if isinstance(value, list) else value


# Shapes and contents


@pytest.mark.parametrize("shaped", [lambda reply: reply, as_object], ids=["dict", "object"])
@pytest.mark.parametrize("whole", [lambda message: message, completion], ids=["message", "completion"])
def test_a_reply_may_be_a_dict_or_an_object_and_bare_or_whole(shaped: Any, whole: Any) -> None:
    played = Played(shaped(whole(calling(call()))), shaped(whole({"role": "assistant", "content": "Four."})))

    assert played.result.final_answer == "Four."
    assert played.tools.calls == [("add", {})]


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("Four.", "Four."),
        (b"Four.", "Four."),
        (b"\xff4", "\ufffd4"),
        ({"answer": 4}, '{"answer": 4}'),
        ([{"type": "text", "text": "Fo"}, {"type": "text", "text": "ur."}], "Four."),
        (["Fo", "ur."], "Four."),
        ([{"type": "image_url", "image_url": {}}, {"type": "text", "text": "Four."}, None, 5], "Four."),
        (4, "4"),
        (2.5, "2.5"),
        (f"4{HALF}", "4?"),
        ({"answer": HALF}, '{"answer": "?"}'),
        ("  4  ", "  4  "),
        ("null", "null"),
    ],
)
def test_content_of_every_type_is_read_as_text(content: Any, answer: str) -> None:
    assert Played({"role": "assistant", "content": content}).result.final_answer == answer


def test_text_beside_calls_is_kept_in_the_transcript() -> None:
    played = Played({**calling(call()), "content": "Let me add."}, "Four.")

    assert played.result.messages[1]["content"] == "Let me add."


def test_white_space_beside_calls_is_not_sent_back() -> None:
    played = Played({**calling(call()), "content": " \n"}, "Four.")

    assert played.result.messages[1]["content"] is None


@pytest.mark.parametrize("key", ["thinking_blocks", "reasoning_content"])
@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ([{"type": "thinking", "thinking": "hm", "signature": "s"}], True),
        ("hm", True),
        ([object()], False),
        ([float("nan")], False),
        (HALF, False),
        (MappingProxyType({}), False),
        ([], False),
    ],
)
def test_thoughts_go_back_with_their_calls_if_they_can_be_sent(key: str, value: Any, kept: bool) -> None:
    message = Played({**calling(call()), key: value}, "Four.").result.messages[1]

    assert (message.get(key) == value) is kept


@pytest.mark.parametrize(("fields", "kept"), [({"thought_signature": "c2ln"}, True), ({"a": object()}, False)])
def test_a_providers_own_fields_go_back_with_their_call_if_they_can_be_sent(fields: Any, kept: bool) -> None:
    played = Played(calling({**call(), "provider_specific_fields": fields}), "Four.")

    assert (played.result.messages[1]["tool_calls"][0].get("provider_specific_fields") == fields) is kept


def test_image_parts_of_the_caller_pass_through_untouched() -> None:
    parts = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}},
    ]

    played = Played(calling(call()), "A cat.", messages=[{"role": "user", "content": parts}])

    assert [request.messages[0]["content"] for request in played.model.requests] == [parts, parts]


def test_ten_megabytes_of_text_are_an_answer() -> None:
    answer = "word " * 2_000_000

    assert Played(answer).result.final_answer == answer


def test_ten_megabytes_of_arguments_reach_the_tool() -> None:
    arguments = {"text": "x" * 10_000_000}

    played = Played([("add", arguments)], "Four.", max_tokens_total=100_000_000)

    assert played.tools.calls == [("add", arguments)]


# Calls


@pytest.mark.parametrize(
    ("wrote", "arguments"),
    [
        ('{"a": 1}', {"a": 1}),
        ({"a": 1}, {"a": 1}),
        (MappingProxyType({}), None),
        ("", {}),
        (" \n", {}),
        (None, {}),
        ('{"a": "\\ud83d\\ude00"}', {"a": "😀"}),
        ('{"a": "\\ud800"}', {"a": "?"}),
        (f'{{"a": "{HALF}"}}', {"a": "?"}),
        ("{", None),
        ('{"a": 1} and more', None),
        ('{"a": NaN}', None),
        ('{"a": 1e999}', None),
        ("[1]", None),
        ('"text"', None),
        ("null", None),
        ("4", None),
        (4, None),
        ([("a", 1)], None),
        ({"a": object()}, None),
        ({"a": float("inf")}, None),
        ("[" * 100_000, None),
        ('{"a": ' * 100_000, None),
        ('{"a": ' + "9" * 5_000 + "}", None),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_arguments_are_a_json_object_or_the_model_is_told_what_it_wrote(wrote: Any, arguments: Any) -> None:
    played = Played(calling(call(arguments=wrote)), "Four.")

    if arguments is None:
        assert played.tools.calls == []
        assert played.told[0].startswith("not run: the arguments must be a JSON object; you wrote: ")
        assert played.result.messages[1]["tool_calls"][0]["function"]["arguments"] == "{}"
    else:
        assert played.tools.calls == [("add", arguments)]


@pytest.mark.parametrize("name", ["subtract", "", None, "a b", "é" * 5, "x" * 65, 7, HALF])
def test_of_an_unknown_tool_the_model_is_told_which_exist(name: Any) -> None:
    played = Played(calling(call(name=name)), "Four.")

    assert played.told[0].startswith("not run: there is no tool ")
    assert played.told[0].endswith("the tools are: add, lookup")
    assert played.tools.calls == []


@pytest.mark.parametrize(
    "ids", [("c", "c"), (None, None), ("", " "), ("a.b", "é"), ("x" * 65, "x" * 65), (HALF, 5), ([], {})]
)
def test_missing_duplicate_and_illegal_ids_are_mended(ids: tuple[Any, Any]) -> None:
    played = Played(calling(*(call(call_id=each) for each in ids)), "Four.")

    assert len(played.tools.calls) == 2
    assert len({message["tool_call_id"] for message in played.result.messages[2:4]}) == 2


def test_a_legal_id_is_kept() -> None:
    played = Played(calling(call(call_id="toolu_01-A")), "Four.")

    assert played.result.messages[2]["tool_call_id"] == "toolu_01-A"


def test_calls_over_the_cap_are_answered_not_run() -> None:
    played = Played(calling(*(call(call_id=f"c{number}") for number in range(5))), "Four.", max_tools_per_iter=2)

    assert len(played.tools.calls) == 2
    assert played.told[:2] == ["4", "4"]
    assert played.told[2:] == ["not run: only the first 2 calls of a turn are run; ask for it again"] * 3


@pytest.mark.parametrize("finish", ["stop", None, "tool_calls", "function_call", 5])
def test_calls_count_whatever_the_reply_says_it_ended_for(finish: Any) -> None:
    assert Played(completion(calling(call()), finish), "Four.").tools.calls == [("add", {})]


def test_a_legacy_function_call_is_a_call() -> None:
    played = Played(
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}}, "Four."
    )

    assert played.tools.calls == [("add", {})]


@pytest.mark.parametrize(
    "calls", [call(), {"name": "add", "arguments": {}}, [{"name": "add", "arguments": {}}], (call(),)]
)
def test_a_call_that_is_no_list_or_flat_is_a_call(calls: Any) -> None:
    assert Played({"role": "assistant", "tool_calls": calls}, "Four.").tools.calls == [("add", {})]


# Replies that are none


@pytest.mark.parametrize(
    "reply",
    [
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": " \n\t"},
        {"role": "assistant", "content": []},
        {"role": "assistant", "content": "", "tool_calls": []},
        {"role": "assistant", "tool_calls": "junk"},
        completion({"content": None}, "tool_calls"),
        completion({}),
        completion(None),
        completion(Sour()),
        completion([]),
        {},
        {"choices": []},
        {"choices": None},
        {"choices": [None]},
        {"choices": "junk"},
        {"choices": {"0": {}}},
        None,
        5,
        b"",
        Sour(),
    ],
    ids=repr,
)
def test_an_empty_reply_is_a_failure_and_never_a_silent_success(reply: Any) -> None:
    played = Played(reply, max_consecutive_failures=2)

    assert played.reply.said is Said.EMPTY
    assert played.result.stopped_reason is StopReason.MAX_FAILURES
    assert "empty" in played.model.requests[1].messages[-1]["content"]


def test_an_error_in_place_of_a_reply_is_asked_again() -> None:
    played = Played({"error": {"message": "overloaded"}}, "Four.", max_model_retries=1, max_wallclock_seconds=5.0)

    assert played.result.final_answer == "Four."
    assert "overloaded" in played.result.events[1].error  # type: ignore[union-attr] # asserted by the field it has


@pytest.mark.parametrize(
    "reply",
    [
        {"role": "assistant", "content": None, "refusal": "I won't."},
        {"role": "assistant", "content": "Well.", "refusal": "I won't."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "I won't."}]},
        completion({"content": "I won't."}, "content_filter"),
        completion({"content": None}, "content_filter"),
        completion({"content": "I won't."}, "refusal"),
        completion({**calling(call()), "refusal": "I won't."}),
        completion(calling(call()), "SAFETY"),
    ],
)
def test_a_refusal_ends_the_run_and_runs_nothing(reply: Any) -> None:
    played = Played(reply)

    assert played.result.stopped_reason is StopReason.REFUSED
    assert played.result.detail
    assert played.tools.calls == []


@pytest.mark.parametrize("refusal", [None, "", " ", False, {}, []])
def test_no_refusal_is_no_refusal(refusal: Any) -> None:
    played = Played({"role": "assistant", "content": "Four.", "refusal": refusal})

    assert played.result.stopped_reason is StopReason.SUCCESS


@pytest.mark.parametrize("finish", ["length", "max_tokens", "MAX_TOKENS"])
@pytest.mark.parametrize(
    "message", [{"content": "The answer is"}, {"content": None}, calling(call(), call(arguments='{"a'))]
)
def test_a_reply_that_was_cut_off_is_a_failure_to_repair_and_runs_nothing(finish: str, message: Message) -> None:
    played = Played(completion(message, finish), "Four.")

    assert played.reply.said is Said.CUT_OFF
    assert State.REPAIR in played.result.path
    assert "cut off" in played.model.requests[1].messages[-1]["content"]
    assert played.tools.calls == []


def test_a_reply_that_was_cut_off_is_followed_by_the_user_without_repair_too() -> None:
    played = Played(completion({"content": "The answer is"}, "length"), "Four.", enable_repair=False)

    assert played.result.final_answer == "Four."


# What a reply says beside its message


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({"prompt_tokens": 50, "completion_tokens": 10}, (50, 10)),
        ({"prompt_tokens": 0, "completion_tokens": 0}, (0, 0)),
        ({"prompt_tokens": -1, "completion_tokens": True}, (None, None)),
        ({"prompt_tokens": 1.5, "completion_tokens": "10"}, (None, None)),
        ({"prompt_tokens": 10**400, "completion_tokens": 10**5000}, (None, None)),
        (None, (None, None)),
        ("junk", (None, None)),
        (Sour(), (None, None)),
    ],
)
def test_usage_counts_only_if_it_can_be_true(usage: Any, counted: tuple[int | None, int | None]) -> None:
    prices = {"max_cost_usd": 10.0, "prompt_usd_per_token": 1e-6, "reply_usd_per_token": 1e-6}

    reply = Played(completion({"content": "Four."}, usage=usage), **prices).reply

    assert (reply.prompt_tokens, reply.completion_tokens) == counted


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf"), 10**400, True, "1"])
def test_a_cost_that_can_not_be_is_not_taken(cost: Any) -> None:
    assert Played(completion({"content": "Four."}, cost_usd=cost)).reply.cost_usd is None


# Outcomes


@pytest.mark.parametrize(
    ("outcome", "ok", "rc", "text"),
    [
        ("4", True, None, "4"),
        ("", True, None, "(no output)"),
        (" \n", True, None, "(no output)"),
        (None, True, None, "(no output)"),
        (b"4", True, None, "4"),
        (4, True, None, "4"),
        (HALF, True, None, "?"),
        ("error: not really", True, None, "error: not really"),
        ('["ok", false]', True, None, '["ok", false]'),
        ({"sum": 4}, True, None, '{"sum": 4}'),
        ({"ok": True, "rc": 3}, True, 3, '{"ok": true, "rc": 3}'),
        ({"ok": False}, False, None, '{"ok": false}'),
        ('{"ok": false, "rc": 1}', False, 1, '{"ok": false, "rc": 1}'),
        ('\n {"ok": false}', False, None, '\n {"ok": false}'),
        ('{"ok": false, "value": NaN}', False, None, '{"ok": false, "value": NaN}'),
        ('{"ok": false', True, None, '{"ok": false'),
        ({"rc": 0}, True, 0, '{"rc": 0}'),
        ({"rc": 2}, False, 2, '{"rc": 2}'),
        ({"rc": None, "error": None}, True, None, '{"rc": null, "error": null}'),
        ({"error": "no"}, False, None, '{"error": "no"}'),
        ({"error": "", "text": "4"}, True, None, '{"error": "", "text": "4"}'),
        ({"rc": 10**5000}, False, None, "[dict]"),
        (ToolResult("4"), True, None, "4"),
        (ToolResult("no", ok=False, rc=1), False, 1, "no"),
        (ToolResult(None, ok="yes", rc="1", seconds="?"), False, None, "(no output)"),  # type: ignore[arg-type] # junk
        (ValueError("no"), False, None, "error: ValueError: no"),
        (KeyError, False, None, "error: KeyError: "),
        (object(), True, None, '"[object]"'),
    ],
    ids=lambda value: repr(value)[:20] if not isinstance(value, dict) else str(list(value)),
)
def test_what_a_tool_gives_is_read_as_success_or_failure(outcome: Any, ok: bool, rc: int | None, text: str) -> None:
    finished = Played([("add", {})], "Four.", outcomes=[outcome]).first(ToolsFinished)

    assert [(each.ok, each.rc, each.text) for each in finished.results] == [(ok, rc, text)]


@pytest.mark.parametrize(("size", "cut"), [(100, False), (101, True)])
def test_a_long_result_is_cut_to_head_and_tail_with_what_was_cut_stated(size: int, cut: bool) -> None:
    text = "a" * 50 + "b" * (size - 50)

    told = Played([("add", {})], "Four.", outcomes=[text], observation_chars=100).told[0]

    assert told == (text if not cut else "a" * 50 + "\n[... 1 characters cut ...]\n" + "b" * 50)


@pytest.mark.parametrize("error", [{"error": json.dumps(HALF)[1:-1]}, {"ok": False, "stderr": HALF}])
def test_what_failed_is_told_in_words_that_can_be_sent(error: Any) -> None:
    played = Played([("add", {})], "Four.", outcomes=[json.dumps(error)])

    assert State.REPAIR in played.result.path


# Doubt, and tools that look things up

UNSURE = [
    "I'm not sure.",
    "I am not sure about that.",
    "I’m not entirely sure.",
    "I'm not 100% sure.",
    "I'm not too sure which it is.",
    "I'm really not sure.",
    "I'm still unsure.",
    "I'm just guessing here.",
    "I am uncertain which applies.",
    "I'm not certain.",
    "It is 4. I'm not very confident in that.",
    "I don't know.",
    "I do not know the answer.",
    "I don't really know.",
    "I'm afraid I don't know.",
    "I honestly don't remember.",
    "I can't recall the exact figure.",
    "I cannot be certain.",
    "I can't say for sure.",
    "I might be wrong, but it is 4.",
    "I may be mistaken.",
    "My best guess is 4.",
    "I'd guess 4.",
    "I can only guess.",
    "I have no idea.",
    "Not sure.",
    "Honestly, not sure.",
    "It may be 4. Not certain though.",
    "x" * 20_000 + " I'm not sure.",
    "I'm not sure. " + "x" * 20_000,
]
SURE = [
    "",
    "The answer is 4.",
    "I am sure that it is 4.",
    "I'm certain.",
    "I know.",
    "I'm not guessing: I measured it.",
    "I don't see any errors.",
    "I can't run that: the file is missing.",
    "Analysts are not sure about the outcome.",
    "She doesn't know.",
    "They might be wrong.",
    "If you are not sure, run the tests.",
    "If you're unsure, ask.",
    "Users who are unsure should read the docs.",
    "You don't know until you try.",
    "Make sure that it isn't running.",
    "I made sure that it works.",
    "'Not sure' is an option of the survey.",
    "The uncertainty is 0.3.",
    "Step 2. Uncertainty is estimated by bootstrap.",
    "The guess was right.",
    "Let me know if I can help.",
    "I was not sure at first, so I ran it: the answer is 4.",
    "There is no doubt.",
    "Certain inputs are rejected.",
]


@pytest.mark.parametrize("text", UNSURE, ids=lambda text: text[:30])
def test_doubt_in_the_first_person_sounds_unsure(text: str) -> None:
    assert sounds_unsure(text)


@pytest.mark.parametrize("text", SURE, ids=lambda text: text[:30])
def test_other_words_and_the_doubts_of_others_do_not(text: str) -> None:
    assert not sounds_unsure(text)


def test_a_hedged_answer_is_looked_up_where_that_is_possible() -> None:
    script: list[Any] = ["I'm not sure.", [("lookup", {})], "Four."]

    assert Played(*script, research=["lookup"]).result.final_answer == "Four."
    assert Played(*script, research=["lookup"], research_on_unsure=False).result.final_answer == "I'm not sure."
    assert Played(*script).result.final_answer == "I'm not sure."


@pytest.mark.parametrize(
    "name",
    [
        "web_search",
        "perplexity_ask",
        "get-docs",
        "lookup",
        "brave_web_search",
        "tavily-search",
        "fetch_url",
        "wikipedia",
    ],
)
def test_tools_that_look_things_up_are_known_by_their_names(name: str) -> None:
    assert looks_like_research(name)


@pytest.mark.parametrize(
    "name", ["task", "mask_image", "websocket_send", "docstring", "docker_ps", "dispatch", "researcher"]
)
def test_other_tools_are_not(name: str) -> None:
    assert not looks_like_research(name)


# Every place of a reply, a result or a listing, filled with junk

JUNK: list[Any] = [
    *(None, True, -1, 10**400, float("nan"), "", "\ud800", b"\xff", object(), Sour()),
    *([], [None], [Sour()], {}, {1: 2}, SourMapping(), SourMapping({"type": "text", "text": "t"})),
    *([SourMapping({"function": {"name": "f"}})], [[[]]], {"type": "image"}),
]


def places(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def with_junk(value: Any, path: tuple[Any, ...], junk: object) -> Any:
    if not path:
        return junk
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = with_junk(copy[path[0]], path[1:], junk)
    return copy


FULL_REPLY: dict[str, Any] = {
    "choices": [
        {
            "message": {
                "content": [{"type": "text", "text": "x"}],
                "refusal": None,
                "thinking_blocks": [{"type": "thinking", "thinking": "hm"}],
                "reasoning_content": "hm",
                "function_call": None,
                "tool_calls": [
                    {
                        "id": "a",
                        "type": "function",
                        "function": {"name": "f", "arguments": "{}"},
                        "provider_specific_fields": {"signature": "s"},
                    }
                ],
            },
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1},
    "model": "m",
    "cost_usd": 0.1,
    "error": None,
}
FULL_TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("path", list(places(FULL_REPLY)), ids=str)
def test_junk_anywhere_in_a_reply_is_read(path: tuple[Any, ...]) -> None:
    for junk in JUNK:
        event = read_reply(with_junk(FULL_REPLY, path, junk), now=0.0, offered=("f",), max_calls=2)

        assert isinstance(event, ModelReplied | ModelFailed)
        json.dumps(event.message if isinstance(event, ModelReplied) else None, allow_nan=False)


@pytest.mark.parametrize("path", list(places(FULL_TOOLS)), ids=str)
def test_junk_anywhere_in_a_list_of_tools_is_read(path: tuple[Any, ...]) -> None:
    for junk in JUNK:
        event = read_tools(with_junk(FULL_TOOLS, path, junk), now=0.0, backend="backend")

        assert isinstance(event, ToolsListed | ToolsUnavailable)
        json.dumps(event.tools if isinstance(event, ToolsListed) else None, allow_nan=False)


@pytest.mark.parametrize("key", ["ok", "rc", "stdout", "stderr", "error", "text"])
def test_junk_anywhere_in_a_result_is_read(key: str) -> None:
    call = ToolCall("a", "f", "{}")
    for junk in JUNK:
        for outcome in (junk, {"ok": False, key: junk}, ToolResult(junk, ok=junk, rc=junk, seconds=junk)):
            result = read_outcome(call, outcome, seconds=0.1, chars=1_000)

            assert result.text
            result.text.encode()
