"""Scripted worlds: a model, tools and a clock that do what a list says.

An item of a script is played like this, wherever one is asked for:

    an exception, or a class of them    is raised
    HANG                                never returns; only a cancel ends it
    a function                          is called, may be async, and what it returns is played in turn

What is left is the reply or the outcome.
"""

import asyncio
import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from typing import Any, Final, NoReturn, TypeAlias

from attrs import evolve, frozen

from agent_fsm.protocol import Message, ModelRequest

__all__ = ["HANG", "Hang", "ListClock", "ScriptOverError", "ScriptedModel", "ScriptedTools"]

Item: TypeAlias = Any
"""One of the kinds above."""


class ScriptOverError(AssertionError):
    """Raised when more is asked of a script than it has; a run ends with `model_error` by it."""


@frozen
class Hang:
    """The item that never returns."""


HANG: Final = Hang()


class _Script:
    """Gives its items in turn, and the last one again when it is over, unless *repeat* is False."""

    def __init__(self, items: Sequence[Item], *, repeat: bool) -> None:
        self._items = tuple(items)
        self._repeat = repeat
        self._played = 0

    def next(self) -> Item:
        number = self._played
        self._played += 1
        if number < len(self._items):
            return self._items[number]
        if self._repeat and self._items:
            return self._items[-1]
        raise ScriptOverError(f"the script is over: {len(self._items)} items, and item {number + 1} is asked for")


async def _play(item: Item, *arguments: Any, **named: Any) -> Any:
    if isinstance(item, BaseException) or (isinstance(item, type) and issubclass(item, BaseException)):
        raise item
    if item is Hang or isinstance(item, Hang):
        await _never()
    if callable(item):
        given = item(*arguments, **named)
        return await _play(await given if inspect.isawaitable(given) else given)
    return item


async def _never() -> NoReturn:
    await asyncio.Event().wait()
    raise AssertionError("an event that nobody has was set")


# The model


class ScriptedModel:
    """A model client that gives the replies of a script, one a request.

    Args:
        script: each item is played (see the module); of what is left, a str answers, a list of (name, arguments) pairs
            calls tools, arguments being a dict or a str that is sent as it is, and anything else is the reply itself:
            a message, a whole completion, an object, or what no model should send.
        repeat: the last item repeats when the script is over; else a ScriptOverError is raised, which is fatal.
        usage: prompt and completion tokens that replies report which do not report any themselves.
    """

    def __init__(self, script: Sequence[Item], *, repeat: bool = True, usage: tuple[int, int] | None = None) -> None:
        self._script = _Script(script, repeat=repeat)
        self._usage = usage
        self.requests: list[ModelRequest] = []
        """What was asked, as it was when it was asked."""

    async def complete(self, request: ModelRequest, /) -> Any:
        """Return the next reply, or raise what stands in its place."""
        self.requests.append(evolve(request, messages=deepcopy(request.messages)))
        given = await _play(self._script.next(), request)
        if isinstance(given, str):
            given = {"role": "assistant", "content": given}
        elif isinstance(given, list) and given and all(isinstance(pair, tuple) and len(pair) == 2 for pair in given):
            given = calling(given, turn=len(self.requests))
        return given if self._usage is None else _reporting(given, *self._usage)


def calling(pairs: Sequence[tuple[str, Any]], turn: int) -> Message:
    """Return the assistant message that makes the calls in *pairs*, with ids of their own in every *turn*."""
    calls = [
        {
            "id": f"scripted_{turn}_{position}",
            "type": "function",
            "function": {
                "name": name,
                "arguments": json.dumps(arguments) if isinstance(arguments, Mapping) else arguments,
            },
        }
        for position, (name, arguments) in enumerate(pairs)
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def _reporting(reply: Any, prompt: int, completion: int) -> Any:
    if not isinstance(reply, dict) or "usage" in reply:
        return reply
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    if "choices" in reply:
        return {**reply, "usage": usage}
    finish = "tool_calls" if reply.get("tool_calls") else "stop"
    return {"choices": [{"index": 0, "message": reply, "finish_reason": finish}], "usage": usage}


# The tools


class ScriptedTools:
    """A tool invoker whose tools are functions.

    Args:
        functions: by name; each is called with the arguments that the model gave, as keywords, and what it returns is
            played (see the module). A list instead of a function is a script of outcomes, of which the last repeats.
        research: names of those that look things up.
        listing: played, if given, in place of the list of tools: a backend that is broken.
    """

    def __init__(
        self,
        functions: Mapping[str, Callable[..., Any] | Sequence[Item]],
        research: Collection[str] = (),
        *,
        listing: Item = None,
    ) -> None:
        self._functions = {name: _as_function(given) for name, given in functions.items()}
        self._listing = listing
        self.research_tools = tuple(research)
        self.calls: list[tuple[str, dict[str, Any]]] = []
        """Names and arguments of the calls, in the order in which they were started."""

    async def list_openai_tools(self) -> list[dict[str, Any]]:
        """Return the tools, each taking whatever arguments the model gives."""
        listed = [_permissive(name) for name in self._functions] if self._listing is None else self._listing
        tools: list[dict[str, Any]] = await _play(listed)
        return tools

    async def call_openai_tool(self, call: dict[str, Any], /) -> Any:
        """Return what the function gives, or raise what it raises."""
        name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
        self.calls.append((name, arguments))
        return await _play(self._functions[name], **arguments)


def _as_function(given: Callable[..., Any] | Sequence[Item]) -> Callable[..., Any]:
    if callable(given):
        return given
    script = _Script(given, repeat=True)
    return lambda **arguments: script.next()


def _permissive(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {}, "additionalProperties": True}
    function = {"name": name, "description": f"The scripted tool {name}.", "parameters": parameters}
    return {"type": "function", "function": function}


# The clock


class ListClock:
    """A clock that shows the given times, one a look, and the last one for ever.

    A run asks it once at its start and once for each event. Waiting by it takes no time and does not move it.
    """

    def __init__(self, times: Sequence[float]) -> None:
        if not times:
            raise ValueError("a clock needs at least one time to show")
        self._times = tuple(times)
        self._looks = 0
        self.slept: list[float] = []
        """Seconds of each wait."""

    def __call__(self) -> float:
        """Return the next time, in seconds."""
        time = self._times[min(self._looks, len(self._times) - 1)]
        self._looks += 1
        return time

    async def sleep(self, seconds: float) -> None:
        """Note that somebody waits for *seconds*, and return at once."""
        self.slept.append(seconds)
