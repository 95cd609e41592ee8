"""What MCP servers send, as results and as tools: nothing is dropped silently, and nothing in it can raise."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_fsm.protocol import ToolResult
from agent_fsm.tools.mcp.content import McpTool, openai_tool, read_result, read_tool

IMAGE = {"type": "image", "data": "AAECAw==", "mimeType": "image/png"}
LINK = {"type": "resource_link", "uri": "file:///a", "name": "a"}
FILE = {"type": "resource", "resource": {"uri": "file:///b", "mimeType": "text/plain", "text": "inside"}}
BLOB = {"type": "resource", "resource": {"uri": "file:///c", "mimeType": "application/x", "blob": "AAECAwQ="}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def test_text_comes_first_and_a_line_for_each_other_block_after_it() -> None:
    audio = {"type": "audio", "data": "AAEC", "mimeType": "audio/wav"}

    result = read_result({"content": [IMAGE, text("one"), audio, LINK, text("two"), FILE, BLOB]})

    assert result.text == (
        "one\ntwo\n[image image/png, 4 bytes]\n[audio audio/wav, 3 bytes]\n[resource_link a file:///a]\n"
        "[resource file:///b, text/plain]\ninside\n[resource file:///c, application/x, 5 bytes]"
    )
    assert result.parts == (IMAGE, audio, LINK, FILE, BLOB)


@pytest.mark.parametrize(
    ("block", "line"),
    [
        ({"type": "hologram", "beam": 7}, '[hologram] {"type":"hologram","beam":7}'),
        ({"beam": 7}, '[unknown] {"beam":7}'),
        (7, "[unknown] 7"),
        ({"type": "text", "text": 7}, '[text] {"type":"text","text":7}'),
        ({"type": "image"}, '[image] {"type":"image"}'),
        ({**LINK, "mimeType": "text/csv"}, "[resource_link a file:///a text/csv]"),
        ({"type": "resource", "resource": {"uri": "x:y"}}, "[resource x:y]"),
    ],
)
def test_what_nobody_knows_is_told_whole(block: Any, line: str) -> None:
    assert read_result({"content": [block]}).text == line


@pytest.mark.parametrize(
    ("said", "structured", "lines"),
    [
        ([], {"n": 7}, ['{"n":7}']),
        (["seven"], {"n": 7}, ["seven", '{"n":7}']),
        (['{"n": 7}'], {"n": 7}, ['{"n": 7}']),
        (["seven"], {"result": "seven"}, ["seven"]),
        (["7"], {"result": 7}, ["7"]),
        (["7"], {"result": 8}, ["7", '{"result":8}']),
        (["7"], {"result": 7, "more": 1}, ["7", '{"result":7,"more":1}']),
        (["1"], True, ["1", "true"]),
        (["x"], [1, "é"], ["x", '[1,"é"]']),
    ],
)
def test_structured_content_is_told_unless_a_text_says_it(said: list[str], structured: Any, lines: list[str]) -> None:
    result = read_result({"content": [text(each) for each in said], "structuredContent": structured})

    assert (result.text, result.structured) == ("\n".join(lines), structured)


def test_nothing_is_an_empty_text() -> None:
    assert read_result({"content": []}) == read_result({}) == ToolResult("")


@pytest.mark.parametrize(("flag", "ok"), [(True, False), (False, True), (None, True), ("yes", True)])
def test_only_true_makes_it_an_error(flag: Any, ok: bool) -> None:
    assert read_result({"content": [text("x")], "isError": flag}) == ToolResult("x", ok=ok)


def test_content_that_is_no_list_is_a_failure_that_says_so() -> None:
    result = read_result({"content": "words"})

    assert not result.ok
    assert result.text == 'error: the call was carried out, but its result has no list of content: "words"'


def test_half_a_character_does_not_get_through() -> None:
    assert read_result({"content": [text("half \ud83d")]}).text == "half ?"


def test_what_is_nested_too_deeply_is_a_failure_that_says_so() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]

    result = read_result({"content": [text("x")], "structuredContent": deep})

    assert (result.ok, "too deeply" in result.text) == (False, True)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
BLOCKS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "audio", "resource", "resource_link"]) | JSON},
    optional=dict.fromkeys(("text", "data", "mimeType", "uri", "name", "resource"), JSON),
)


@given(st.fixed_dictionaries({"content": JSON | st.lists(BLOCKS), "structuredContent": JSON, "isError": JSON}))
def test_no_answer_can_make_it_raise(answer: dict[str, Any]) -> None:
    read_result(answer).text.encode()


# Tools


def test_a_tool_is_offered_as_openai_wants_it() -> None:
    listed = {
        "name": "t",
        "title": "Title",
        "inputSchema": {"$schema": "x", "required": ["a"]},
        "annotations": {"readOnlyHint": True},
        "outputSchema": {"type": "object"},
    }

    tool = read_tool(listed)

    parameters = {"type": "object", "properties": {}, "required": ["a"]}
    assert tool == McpTool("t", "Title", parameters, {"readOnlyHint": True}, {"type": "object"})
    function = {"name": "s__t", "description": "Title", "parameters": parameters}
    assert openai_tool("s__t", tool) == {"type": "function", "function": function}


@pytest.mark.parametrize(
    ("annotations", "repeatable"),
    [
        ({}, False),
        ({"readOnlyHint": True}, True),
        ({"idempotentHint": True}, True),
        ({"readOnlyHint": False, "idempotentHint": "yes"}, False),
        ({"destructiveHint": False}, False),
        ([1], False),
    ],
)
def test_only_its_own_word_makes_a_tool_repeatable(annotations: Any, repeatable: bool) -> None:
    tool = read_tool({"name": "t", "inputSchema": {}, "annotations": annotations})

    assert isinstance(tool, McpTool)
    assert tool.repeatable is repeatable


@pytest.mark.parametrize(
    "listed",
    [
        None,
        "tool",
        {"name": "t"},
        {"name": 7, "inputSchema": {}},
        {"name": "t", "inputSchema": []},
        {"name": "t", "inputSchema": {"type": "array"}},
        {"name": "t", "inputSchema": {"properties": ["a"]}},
    ],
)
def test_what_is_no_tool_is_told(listed: Any) -> None:
    assert isinstance(read_tool(listed), str)


@given(JSON | st.fixed_dictionaries({"name": JSON, "inputSchema": JSON, "description": JSON, "annotations": JSON}))
def test_no_listing_can_make_it_raise(listed: Any) -> None:
    tool = read_tool(listed)

    assert isinstance(tool, str) or json.dumps(openai_tool("x", tool))
