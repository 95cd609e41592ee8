"""Python functions as tools: what the model is told of them, what they are called with, what comes back."""

import asyncio
import dataclasses
import enum
import functools
import json
import threading
import time
from collections.abc import AsyncIterator
from contextvars import ContextVar
from datetime import date
from typing import Annotated, Any, Literal

import attrs
import pytest
from pydantic import BaseModel, Field

from agent_fsm import AgentConfig, run_agent
from agent_fsm.errors import ConfigError
from agent_fsm.protocol import StopReason, ToolResult
from agent_fsm.testing import ScriptedModel
from agent_fsm.tools.functions import FunctionTools

SLACK_S = 2.0
"""What a busy machine may add to a deadline; what hangs sleeps far longer."""
FOREVER_S = 60


def call(tools: FunctionTools, name: str, arguments: Any) -> ToolResult:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    wanted = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": text}}
    return asyncio.run(tools.call_openai_tool(wanted))


def tool_of(function: Any) -> dict[str, Any]:
    (tool,) = asyncio.run(FunctionTools(function).list_openai_tools())
    found: dict[str, Any] = tool["function"]
    return found


def weather(city: str, days: Annotated[int, Field(ge=1, le=7)] = 3, *, unit: Literal["C", "F"] = "C") -> str:
    """Tell the weather.

    It may be wrong.

    Args:
        city: where, as a name
            of a place
        days: how far ahead

    Returns:
        a sentence
    """
    return f"{city} {days} {unit}"


def numpy_style(title: str) -> str:
    """Find a book.

    Parameters
    ----------
    title : str
        what it is called
    """
    return title


def rest_style(title: str) -> str:
    """Find a book.

    :param title: what it is called
    """
    return title


# What the model is told


def test_hints_and_docstring_become_the_tool() -> None:
    assert asyncio.run(FunctionTools(weather).list_openai_tools()) == [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "Tell the weather.\n\nIt may be wrong.\n\nReturns: a sentence",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "city": {"type": "string", "description": "where, as a name of a place"},
                        "days": {
                            "type": "integer",
                            "minimum": 1,
                            "maximum": 7,
                            "default": 3,
                            "description": "how far ahead",
                        },
                        "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
                    },
                    "required": ["city"],
                    "additionalProperties": False,
                },
            },
        }
    ]


@pytest.mark.parametrize("function", [numpy_style, rest_style])
def test_numpy_and_rest_docstrings_are_read_too(function: Any) -> None:
    tool = tool_of(function)

    assert tool["description"] == "Find a book."
    assert tool["parameters"]["properties"] == {"title": {"type": "string", "description": "what it is called"}}


def test_a_function_without_docstring_or_parameters_is_a_tool() -> None:
    def now() -> str:
        return "noon"

    assert tool_of(now) == {
        "name": "now",
        "description": "",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    }
    assert call(FunctionTools(now), "now", "{}") == ToolResult("noon")


def test_a_property_called_title_keeps_its_name() -> None:
    class Book(BaseModel):
        title: str

    def shelve(title: str, book: Book) -> None: ...

    parameters = tool_of(shelve)["parameters"]

    assert parameters["properties"] == {"title": {"type": "string"}, "book": {"$ref": "#/$defs/Book"}}
    assert parameters["$defs"]["Book"]["properties"] == {"title": {"type": "string"}}


def test_names_that_pydantic_keeps_for_itself_are_fine_as_parameters() -> None:
    def odd(model_config: int, _hidden: int, schema: int, copy: int, self: int = 0) -> int:
        return model_config + _hidden + schema + copy + self

    arguments = {"model_config": 1, "_hidden": 2, "schema": 3, "copy": 4, "self": 5}

    assert call(FunctionTools(odd), "odd", arguments).text == "15"


def test_the_description_of_a_field_beats_the_docstrings() -> None:
    def find(what: Annotated[str, Field(description="of the field")], where: str = Field("here", max_length=9)) -> str:
        """Find.

        :param what: of the docstring
        """
        return f"{what} {where}"

    assert tool_of(find)["parameters"]["properties"] == {
        "what": {"type": "string", "description": "of the field"},
        "where": {"type": "string", "default": "here", "maxLength": 9},
    }
    assert call(FunctionTools(find), "find", {"what": "it"}).text == "it here"


def test_what_is_offered_can_be_written_into_without_harm() -> None:
    tools = FunctionTools(weather)
    asyncio.run(tools.list_openai_tools())[0]["function"]["parameters"].clear()

    assert asyncio.run(tools.list_openai_tools())[0]["function"]["parameters"]["required"] == ["city"]


def test_research_tools_are_named_by_name_or_function_and_otherwise_judged() -> None:
    assert FunctionTools(weather).research_tools is None
    assert FunctionTools(weather, research=()).research_tools == frozenset()
    assert FunctionTools(weather, research=("weather",)).research_tools == frozenset({"weather"})
    assert FunctionTools(weather, research=(weather,)).research_tools == frozenset({"weather"})


# What they are called with


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Order(BaseModel):
    items: list[Point]
    when: date | None = None


def paint(colour: Colour, order: Order, tags: set[str], *, where: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    return {"args": [repr(each) for each in (colour, order, sorted(tags), where)]}


def test_arguments_arrive_as_what_the_hints_say() -> None:
    arguments = {"colour": "red", "order": {"items": [{"x": 1}], "when": "2026-11-25"}, "tags": ["b", "a"]}

    said = json.loads(call(FunctionTools(paint), "paint", arguments).text)

    order = Order(items=[Point(1)], when=date(2026, 11, 25))
    assert said["args"] == [repr(Colour.RED), repr(order), "['a', 'b']", "(0, 0)"]


FAULTY = [
    ("weather", {}, "error: the argument city is missing; weather takes city: string,"),
    ("weather", {"city": "Rome", "days": 9}, "argument days: Input should be less than or equal to 7, not 9"),
    ("weather", {"city": 7}, "argument city: Input should be a valid string, not 7"),
    ("weather", {"city": "Rome", "unit": "K"}, "argument unit: Input should be 'C' or 'F', not \"K\""),
    ("weather", {"city": "Rome", "where": 1}, 'there is no argument "where"; weather takes city'),
    ("weather", "[1]", 'the arguments must be a JSON object, not "[1]"'),
    ("weather", '{"city": NaN}', "the arguments must be a JSON object"),
    ("weather", "{" * 100_000, "the arguments must be a JSON object"),
    (
        "paint",
        {"colour": "red", "order": {"items": [{"x": "a"}]}, "tags": []},
        "argument order.items.0.x: Input should",
    ),
    ("paint", {"colour": "blue", "order": {"items": []}, "tags": []}, "argument colour: Input should be 'red', not"),
    ("climate", {}, 'there is no tool "climate"; there are: weather, paint'),
]


@pytest.mark.parametrize(("name", "arguments", "told"), FAULTY)
def test_arguments_that_do_not_fit_are_told_to_the_model(name: str, arguments: Any, told: str) -> None:
    result = call(FunctionTools(weather, paint), name, arguments)

    assert not result.ok
    assert told in result.text
    assert "pydantic" not in result.text and "Traceback" not in result.text and len(result.text) < 1_000


def test_the_function_is_not_called_with_arguments_that_do_not_fit() -> None:
    called = []

    def note(number: int) -> None:
        called.append(number)

    call(FunctionTools(note), "note", {"number": "x"})
    call(FunctionTools(note), "note", {"number": "5"})

    assert called == [5]


def test_null_counts_as_left_out_where_it_would_not_fit() -> None:
    def pair(a: int = 1, b: int | None = 2) -> list[Any]:
        return [a, b]

    assert call(FunctionTools(pair), "pair", {"a": None, "b": None}).structured == [1, None]


def test_a_default_that_is_no_json_is_left_to_python() -> None:
    nothing = object()

    def pick(thing: int | str = nothing) -> bool:  # type: ignore[assignment] # what people write
        return thing is nothing

    assert call(FunctionTools(pick), "pick", {}).text == "true"


def test_further_arguments_are_taken_only_by_a_function_that_takes_them() -> None:
    def label(name: str, **numbers: int) -> dict[str, Any]:
        return {"name": name, **numbers}

    parameters = tool_of(label)["parameters"]

    assert parameters["additionalProperties"] == {"type": "integer"}
    assert (list(parameters["properties"]), parameters["required"]) == (["name"], ["name"])
    assert call(FunctionTools(label), "label", {"name": "n", "x": 1, "numbers": 2}).structured == {
        "name": "n",
        "x": 1,
        "numbers": 2,
    }
    assert (
        "argument x: Input should be a valid integer"
        in call(FunctionTools(label), "label", {"name": "n", "x": "y"}).text
    )


class Shop:
    """Sells."""

    def __init__(self, price: int) -> None:
        self.price = price

    def buy(self, count: int) -> int:
        return count * self.price

    async def __call__(self, count: int) -> str:
        return f"{count} ordered"


def test_methods_partials_and_callable_objects_are_tools() -> None:
    tools = FunctionTools(Shop(5).buy, functools.partial(weather, unit="F"), Shop(1))

    assert [tool["function"]["name"] for tool in asyncio.run(tools.list_openai_tools())] == ["buy", "weather", "Shop"]
    assert tool_of(Shop(1))["description"] == "Sells."
    assert call(tools, "buy", {"count": 3}).text == "15"
    assert call(tools, "weather", {"city": "Rome"}).text == "Rome 3 F"
    assert call(tools, "Shop", {"count": 3}).text == "3 ordered"


# What can't be a tool


class Plain:
    pass


@attrs.frozen
class Attrs:
    x: int


def unhinted(a):  # type: ignore[no-untyped-def] # noqa: ANN001, RUF100 - what is refused
    return a


def starred(*a: int) -> None: ...


def positional(a: int, /) -> None: ...


def plain(a: Plain) -> None: ...


def of_attrs(a: Attrs) -> None: ...


def unresolved(a: "Nowhere") -> None:  # type: ignore[name-defined] # noqa: F821 - what is refused
    ...


async def streaming(a: int) -> AsyncIterator[int]:
    yield a


def misnamed(a: int) -> None: ...


misnamed.__name__ = "größe"


NO_TOOLS = [
    ((lambda: None,), "a lambda can't be a tool"),
    ((unhinted,), "unhinted: the parameter a has no type hint"),
    ((Shop.buy,), "buy: the parameter self has no type hint"),
    ((starred,), "starred: *a can't be given by name"),
    ((positional,), "positional: a can't be given by name"),
    ((plain,), "plain: no schema can be made of the hint of a"),
    ((of_attrs,), "of_attrs: no schema can be made of the hint of a"),
    ((unresolved,), "unresolved: its type hints can't be read"),
    ((streaming,), "streaming: an async generator can't be a tool"),
    ((misnamed,), "the name of a tool is 1 to 64"),
    ((weather, weather), "two functions are named weather"),
    ((Shop,), "Shop is a class"),
    (("weather",), "'weather' can't be called"),
]


@pytest.mark.parametrize(("functions", "why"), NO_TOOLS, ids=[why for _, why in NO_TOOLS])
def test_what_can_be_no_tool_is_refused_at_once(functions: Any, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FunctionTools(*functions)

    assert why in str(caught.value)


@pytest.mark.parametrize("more", [{"research": ("nope",)}, {"research": "weather"}, {"timeout_s": 0}])
def test_a_setting_that_means_nothing_is_refused(more: Any) -> None:
    with pytest.raises(ConfigError):
        FunctionTools(weather, **more)


# What comes back


@attrs.frozen
class Found:
    where: str
    when: date


RETURNED = [
    ("as it is\n", "as it is\n"),
    (None, ""),
    ({"a": [1, None]}, '{"a":[1,null]}'),
    ([Point(1)], '[{"x":1,"y":0}]'),
    (Order(items=[]), '{"items":[],"when":null}'),
    (Found("here", date(2026, 1, 2)), '{"where":"here","when":"2026-01-02"}'),
    (Colour.RED, '"red"'),
    (float("nan"), '"NaN"'),
    (b"\xff", '"_w=="'),
    (True, "true"),
    ("é", "é"),
]


@pytest.mark.parametrize(("returned", "text"), RETURNED, ids=[text for _, text in RETURNED])
def test_what_is_returned_is_told(returned: Any, text: str) -> None:
    def give() -> Any:
        return returned

    async def give_later() -> Any:
        return returned

    results = [call(FunctionTools(give), "give", {}), call(FunctionTools(give_later), "give_later", {})]

    assert [(result.ok, result.text) for result in results] == [(True, text)] * 2


def test_a_result_is_returned_as_it_is() -> None:
    result = ToolResult("no", ok=False, parts=({"type": "image"},))

    def give() -> ToolResult:
        return result

    assert call(FunctionTools(give), "give", {}) is result


class MuteError(Exception):
    def __str__(self) -> str:
        raise ValueError("mute")


RAISED = [
    (ValueError("no such city"), "error: ValueError: no such city"),
    (KeyError(), "error: KeyError"),
    (TimeoutError("theirs"), "error: TimeoutError: theirs"),
    (MuteError(), "MuteError: (it can't be put into words)"),
]


@pytest.mark.parametrize(("error", "told"), RAISED, ids=[type(error).__name__ for error, _ in RAISED])
def test_what_is_raised_is_a_failed_result(error: Exception, told: str) -> None:
    def fail() -> None:
        raise error

    async def fail_later() -> None:
        raise error

    results = [call(FunctionTools(fail), "fail", {}), call(FunctionTools(fail_later), "fail_later", {})]

    assert [result.ok for result in results] == [False, False]
    assert all(told in result.text for result in results)


@pytest.mark.parametrize("error", [SystemExit("end"), StopIteration("end"), KeyboardInterrupt("end")])
def test_what_would_end_a_thread_ends_its_call_and_nothing_else(error: BaseException) -> None:
    def leave() -> None:
        raise error

    result = call(FunctionTools(leave), "leave", {})

    assert (result.ok, f"{type(error).__name__}: end" in result.text) == (False, True)


# Threads


def test_a_sync_function_blocks_no_loop_and_sees_context_variables() -> None:
    who: ContextVar[str] = ContextVar("who", default="nobody")
    met = threading.Barrier(2, timeout=5)

    def meet() -> str:
        met.wait()  # raises unless two calls are here at once
        return f"{who.get()} {threading.current_thread().daemon}"

    async def both() -> list[str]:
        who.set("me")
        tools = FunctionTools(meet)
        wanted = {"function": {"name": "meet", "arguments": "{}"}}
        return [each.text for each in await asyncio.gather(*(tools.call_openai_tool(wanted) for _ in range(2)))]

    assert asyncio.run(both()) == ["me True"] * 2


@pytest.mark.parametrize("waits", ["sync", "async"])
def test_a_call_that_hangs_is_given_up_in_time_and_that_is_said(waits: str) -> None:
    let_go = threading.Event()

    def sync() -> None:
        let_go.wait(FOREVER_S)

    async def async_() -> None:
        await asyncio.sleep(FOREVER_S)

    async_.__name__ = "async"
    began = time.monotonic()

    result = call(FunctionTools(sync, async_, timeout_s=0.1), waits, {})
    let_go.set()

    assert time.monotonic() - began < 0.1 + SLACK_S
    said = "may go on" if waits == "sync" else "it was cancelled"
    assert (result.ok, "was not done after 0.1 s" in result.text, said in result.text) == (False, True, True)


def test_a_thread_that_ends_after_its_loop_harms_nothing() -> None:
    let_go = threading.Event()
    started: list[threading.Thread] = []

    def late() -> None:
        started.append(threading.current_thread())
        let_go.wait(FOREVER_S)

    call(FunctionTools(late, timeout_s=0.05), "late", {})
    let_go.set()
    started[0].join(5)  # pytest fails a test in whose thread something is raised

    assert not started[0].is_alive()


def test_a_run_uses_functions_and_mends_its_arguments() -> None:
    model = ScriptedModel([[("weather", {"town": "Rome"})], [("weather", {"city": "Rome"})], "It rains."])

    result = run_agent(
        [{"role": "user", "content": "Weather?"}], FunctionTools(weather), AgentConfig(), model_client=model
    )

    told = [message["content"] for message in result.messages if message["role"] == "tool"]
    assert (result.stopped_reason, result.final_answer) == (StopReason.SUCCESS, "It rains.")
    assert ("the argument city is missing" in told[0], told[1]) == (True, "Rome 3 C")
