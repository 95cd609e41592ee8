"""What users get for their own tests: scripts that do as they say, and validators that can fail."""

import asyncio
from typing import Any

import pytest

from agent_fsm import AgentConfig, ModelError, ModelRequest, State, StopReason, run_agent
from agent_fsm.protocol import PLAN, Message
from agent_fsm.testing import (
    HANG,
    Hang,
    ListClock,
    ScriptedModel,
    ScriptedTools,
    ScriptOverError,
    anthropic_faults,
    openai_faults,
    request_faults,
)

USER: Message = {"role": "user", "content": "Do it."}
DONE: Message = {"role": "assistant", "content": "Done."}


def call(call_id: Any = "a", name: Any = "run", arguments: Any = "{}") -> Message:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls: Any) -> Message:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


def answer(call_id: Any = "a", text: Any = "ok") -> Message:
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def ask(model: ScriptedModel) -> Any:
    return asyncio.run(model.complete(ModelRequest([dict(USER)], (), None, PLAN, 1.0, "m", 100)))


# The validators

VALID: list[list[Message]] = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER, calling(call()), answer(), DONE, USER],
    [USER, calling(call("a"), call("b")), answer("a"), answer("b")],
    [USER, {**calling(call()), "content": "Let me see."}, answer("a", ""), USER],
    [USER, calling(call("a")), answer("a"), calling(call("a")), answer("a")],  # as recorded: an id a turn
    [
        {
            "role": "user",
            "content": [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": "data:,"}}],
        }
    ],
]
OPENAI: list[tuple[list[Any], str]] = [
    ([], "there are no messages"),
    ([USER, "hello"], "message 1 is 'hello', no mapping"),
    ([{"role": "robot", "content": "x"}], "message 0 has the role 'robot'"),
    ([{"role": "user", "content": None}], "message 0 (user) has the content None"),
    ([{"role": "user", "content": {"a": 1}}], "message 0 (user) has the content {'a': 1}"),
    ([{"role": "user", "content": [{"type": "video"}]}], "a content part 0 of type 'video'"),
    ([{"role": "system", "content": [{"type": "image_url"}]}], "a content part 0 of type 'image_url'"),
    ([{"role": "user", "content": "x", "name": "a b"}], "has the name 'a b'"),
    ([{"role": "user", "content": "\ud800"}], "can't be sent as JSON"),
    ([{"role": "user", "content": "x", "more": float("nan")}], "can't be sent as JSON"),
    ([USER, {"role": "assistant", "content": " "}], "neither calls nor text that is more than white space"),
    ([USER, {**DONE, "tool_calls": []}], "has the tool_calls []"),
    ([USER, calling("junk")], "message 1 (assistant) call 0 is 'junk'"),
    ([USER, calling(call("a.b")), answer("a.b")], "has the id 'a.b'"),
    ([USER, calling(call("a" * 65)), answer("a" * 65)], "an id is 1 to 64"),
    ([USER, calling(call(name="a b")), answer()], "calls 'a b'"),
    ([USER, calling(call(arguments="[]")), answer()], "has the arguments '[]'"),
    ([USER, calling(call(arguments={})), answer()], "has the arguments {}"),
    ([USER, calling(call("a"), call("a")), answer("a"), answer("a")], "call 1 has the id 'a' of an earlier one"),
    ([USER, answer()], "message 1 (tool) answers 'a', but no call is open"),
    ([USER, calling(call())], "the messages end before the calls ['a'] are answered"),
    ([USER, calling(call()), USER, answer()], "message 2 (user) comes before the calls ['a'] are answered"),
    ([USER, calling(call("a"), call("b")), answer("b"), answer("a")], "message 2 (tool) answers 'b' out of turn"),
    ([USER, calling(call()), answer(), answer()], "message 3 (tool) answers 'a', but no call is open"),
    ([USER, calling(call()), {"role": "tool", "content": "x"}], "has the tool_call_id None"),
]
ANTHROPIC: list[tuple[list[Any], str]] = [
    ([{"role": "system", "content": "Be brief."}], "no messages besides those of the system"),
    ([DONE, USER], "message 0 (assistant) is the first, which must be the user's"),
    ([{"role": "user", "content": " "}], "message 0 (user) has a text block that is empty"),
    ([{"role": "system", "content": ""}, USER], "message 0 (system) has a text block that is empty"),
    ([USER, {**calling(call()), "content": "\n"}, answer()], "message 1 (assistant) has a text block that is empty"),
    ([USER, calling(call("a")), answer("a"), USER, DONE, answer("a")], "has no tool_use in the message before"),
    ([USER, calling(call("a"), call("b")), answer("a")], "tool_use 'b' has no tool_result in the message that follows"),
    ([USER, calling(call("a"), call("a")), answer("a")], "tool_use 'a': ids must be unique"),
    ([USER, calling(call("a!")), answer("a!")], "ids and names are 1 to 64"),
    ([USER, calling(call()), answer(), answer()], "is the second for its tool_use"),
    ([USER, calling(call()), USER, answer()], "comes after other content"),
    ([USER, calling(call(arguments='{"a": "\\ud800"}')), answer()], "input that can't be sent as JSON"),
]


@pytest.mark.parametrize("messages", VALID)
def test_what_providers_take_has_no_faults(messages: list[Message]) -> None:
    assert request_faults(messages) == []


@pytest.mark.parametrize(("messages", "fault"), OPENAI)
def test_what_openai_refuses_is_named_with_its_position(messages: list[Any], fault: str) -> None:
    assert any(fault in each for each in openai_faults(messages)), openai_faults(messages)


@pytest.mark.parametrize(("messages", "fault"), ANTHROPIC)
def test_what_anthropic_refuses_is_named_with_its_position(messages: list[Any], fault: str) -> None:
    assert any(fault in each for each in anthropic_faults(messages)), anthropic_faults(messages)


@pytest.mark.parametrize("last", [DONE, {"role": "system", "content": "x"}])
def test_a_request_ends_with_the_user_or_a_tool(last: Message) -> None:
    assert any("message 1 is the last" in fault for fault in request_faults([USER, last]))


# The model


def test_the_last_item_of_a_script_repeats() -> None:
    model = ScriptedModel(["one", "two"])

    assert [ask(model)["content"] for _ in range(3)] == ["one", "two", "two"]


def test_a_script_that_must_not_repeat_says_that_it_is_over() -> None:
    result = run_agent([USER], None, AgentConfig(), model_client=ScriptedModel([[("x", {})]], repeat=False))

    assert result.stopped_reason is StopReason.MODEL_ERROR
    assert "the script is over: 1 items, and item 2 is asked for" in result.detail


@pytest.mark.parametrize("item", [ModelError("x", retryable=False), ValueError, lambda request: KeyError("x")])
def test_an_exception_is_raised(item: Any) -> None:
    with pytest.raises((ModelError, ValueError, KeyError)):
        ask(ScriptedModel([item]))


@pytest.mark.parametrize("item", [HANG, Hang(), Hang, lambda request: HANG])
def test_a_hang_ends_only_by_a_cancel(item: Any) -> None:
    async def main() -> None:
        await asyncio.wait_for(ScriptedModel([item]).complete(ModelRequest([], (), None, PLAN, 1.0, "m", 1)), 0.01)

    with pytest.raises(TimeoutError):
        asyncio.run(main())


def test_a_function_gets_the_request_and_may_be_async() -> None:
    async def echo(request: ModelRequest) -> str:
        return f"{request.messages[-1]['content']} {request.model}"

    assert ask(ScriptedModel([echo]))["content"] == "Do it. m"


def test_calls_are_made_of_pairs_whose_arguments_may_be_no_json() -> None:
    functions = [each["function"] for each in ask(ScriptedModel([[("a", {"x": 1}), ("b", "{")]]))["tool_calls"]]

    assert functions == [{"name": "a", "arguments": '{"x": 1}'}, {"name": "b", "arguments": "{"}]


def test_usage_is_reported_by_replies_that_have_none_of_their_own() -> None:
    own = {"choices": [{"message": DONE}], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
    model = ScriptedModel(["x", own], usage=(50, 10))

    assert ask(model)["usage"] == {"prompt_tokens": 50, "completion_tokens": 10, "total_tokens": 60}
    assert ask(model) == own


def test_requests_are_kept_as_they_were() -> None:
    def spoil(request: ModelRequest) -> str:
        request.messages[0]["content"] = "spoilt"
        return "x"

    model = ScriptedModel([spoil])
    ask(model)

    assert model.requests[0].messages == [USER]


def test_an_empty_script_is_over_at_once() -> None:
    with pytest.raises(ScriptOverError):
        ask(ScriptedModel([]))


# Tools and clock


def test_tools_are_functions_or_scripts_and_keep_their_calls() -> None:
    async def add(a: int, b: int) -> str:
        return str(a + b)

    tools = ScriptedTools({"add": add, "look_up": ["first", ValueError("none left")]}, research=["look_up"])
    calls = [("add", {"a": 1, "b": 2}), ("look_up", {}), ("look_up", {})]
    result = run_agent([USER], tools, AgentConfig(tool_concurrency=1), model_client=ScriptedModel([calls, "Done."]))

    assert [each["content"] for each in result.messages[2:5]] == ["3", "first", "error: ValueError: none left"]
    assert tools.calls == calls


def test_a_broken_backend_is_a_listing() -> None:
    result = run_agent([USER], ScriptedTools({}, listing=OSError("down")), model_client=ScriptedModel(["x"]))

    assert result.stopped_reason is StopReason.TOOLS_UNAVAILABLE
    assert "down" in result.detail


def test_a_clock_made_of_a_list_shows_its_times_and_waits_at_once() -> None:
    clock = ListClock([5, 6, 9])
    model = ScriptedModel([TimeoutError(), "Done."])
    result = run_agent([USER], model_client=model, clock=clock)

    assert [event.now for event in result.events] == [1, 4, 4]
    assert clock.slept == [0.5]
    assert result.path[-1] is State.DONE


def test_a_clock_without_times_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one time"):
        ListClock([])
