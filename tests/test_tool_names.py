"""What the model calls the tools of MCP servers: always legal, never the same for two tools, reversible by a map."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_fsm.messages import LEGAL_NAME
from agent_fsm.tools.names import tool_name


def digest(server: str, tool: str) -> str:
    return hashlib.sha256(f"{server}\0{tool}".encode()).hexdigest()[:8]


def test_a_legal_name_is_the_server_and_the_tool() -> None:
    assert tool_name("git", "git_status") == "git__git_status"


@pytest.mark.parametrize(("chars", "whole"), [(64, True), (65, False)])
def test_a_name_of_64_characters_stays_and_one_of_65_is_cut(chars: int, whole: bool) -> None:
    tool = "t" * (chars - len("server__"))

    name = tool_name("server", tool)

    assert name == (f"server__{tool}" if whole else f"server__{'t' * 47}_{digest('server', tool)}")


@pytest.mark.parametrize("tool", ["a.b", "größe", "a b", "\0", "a/b\n"])
def test_what_is_illegal_becomes_an_underscore_and_a_hash_tells_it_from_others(tool: str) -> None:
    legal = "".join(each if each.isascii() and (each.isalnum() or each in "_-") else "_" for each in tool)

    assert tool_name("s", tool) == f"s__{legal}_{digest('s', tool)}"


def test_a_taken_name_gets_a_hash() -> None:
    assert tool_name("a__b", "c", {"a__b__c"}) == f"a__b__c_{digest('a__b', 'c')}"


def test_an_empty_name_is_legal() -> None:
    assert tool_name("s", "") == "s__"


@given(st.lists(st.tuples(st.text(min_size=1), st.text()), max_size=30, unique=True))
def test_names_are_legal_and_each_leads_back_to_its_tool(tools: list[tuple[str, str]]) -> None:
    places: dict[str, tuple[str, str]] = {}
    for server, tool in tools:
        places[tool_name(server, tool, places)] = (server, tool)

    assert all(LEGAL_NAME.match(name) for name in places)
    assert list(places.values()) == tools


def test_a_tool_that_is_named_after_the_hash_of_another_does_not_take_its_place() -> None:
    first = tool_name("s", "a.b")
    forged = first.removeprefix("s__")
    taken = {tool_name("s", forged)}

    name = tool_name("s", "a.b", taken)

    assert taken == {first}
    assert name != first
    assert LEGAL_NAME.match(name)
