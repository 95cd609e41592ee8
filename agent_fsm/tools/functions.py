"""Tools made of typed Python functions: the hints are the schema, the docstring is the description.

Arguments are checked before the call. A sync function runs in a daemon thread of its own, so that one that hangs holds
up neither the run nor the interpreter's exit. A thread can't be stopped: a call that is cancelled, or that takes longer
than `timeout_s`, abandons its thread, and what the function does there goes on.
"""

import asyncio
import contextlib
import functools
import inspect
import json
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import copy_context
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

from attrs import frozen

from agent_fsm.errors import ConfigError
from agent_fsm.messages import LEGAL_NAME, cut, decode_object
from agent_fsm.protocol import ABANDONED, ToolResult

if TYPE_CHECKING:
    from docstring_parser import Docstring
    from pydantic import BaseModel, ValidationError

__all__ = ["FunctionTools"]

_SHOWN_CHARS = 100
"""Characters of the model's own words that a refusal repeats."""
_SHOWN_FAULTS = 5
"""Faults in the arguments of one call that a refusal names."""
_DRAWN_BY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY)
"""Kinds of parameters that arguments with names can't reach."""


class FunctionTools:
    """Makes tools of functions, bound methods, `functools.partial`s and objects with a `__call__`, sync or async.

    A parameter's JSON schema is pydantic's of its hint (`Annotated[..., Field(...)]` counts), its description the
    docstring's (Google, numpy or reST). Arguments that don't fit are a failed result that says which, and what would be
    right; so is what a function raises. A `str` is the text of the result as it is, and a `ToolResult` the result;
    None is no text, and anything else is told as JSON.

    Args:
        functions: what to make tools of; each is named like its function.
        research: those that look things up, as names or as the functions themselves; None: they are judged by name.
        timeout_s: seconds that one call may take.

    Raises:
        ConfigError: something that can't be a tool: a lambda, a class, a parameter without a hint, one that can't be
            given by name, a hint that has no JSON schema, a name that providers don't take or that two functions have.
    """

    def __init__(
        self,
        *functions: Callable[..., Any],
        research: Collection[str | Callable[..., Any]] | None = None,
        timeout_s: float = 25.0,  # below AgentConfig.tool_timeout_seconds: what was abandoned can still be said
    ) -> None:
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s < math.inf:
            raise ConfigError(f"timeout_s must be a finite number of seconds > 0, not {timeout_s!r}")
        self._timeout_s = timeout_s
        self._tools: dict[str, _Tool] = {}
        for function in functions:
            tool = _tool_of(function)
            if tool.name in self._tools:
                raise ConfigError(f"two functions are named {tool.name}; give one of them another name")
            self._tools[tool.name] = tool
        self.research_tools: frozenset[str] | None = None if research is None else self._names_of(research)
        """The names of the tools that look things up; None: judged by name."""

    async def list_openai_tools(self) -> list[dict[str, Any]]:
        """Return the tools, in the order in which the functions were given."""
        return [tool.as_openai() for tool in self._tools.values()]

    async def call_openai_tool(self, call: Any, /) -> ToolResult:
        """Check the arguments of an OpenAI tool call, call the function and return what came of it."""
        function = call.get("function") if isinstance(call, Mapping) else None
        name, wrote = (function.get("name"), function.get("arguments")) if isinstance(function, Mapping) else ("", None)
        tool = self._tools.get(name) if isinstance(name, str) else None
        if tool is None:
            return _failed(f"there is no tool {_shown(name)}; there are: {', '.join(self._tools) or 'none'}")
        arguments = decode_object(wrote) if isinstance(wrote, str) else wrote
        if not isinstance(arguments, Mapping):
            return _failed(f"the arguments must be a JSON object, not {_shown(wrote)}; {tool.usage()}")
        clock = asyncio.timeout(self._timeout_s)
        try:
            async with clock:
                return await tool.called(arguments)
        except _RefusedError as refused:
            return _failed(f"{refused}; {tool.usage()}")
        except Exception as error:  # noqa: BLE001 - around a user-supplied tool, which may raise anything
            if clock.expired():
                return _failed(f"{name} was not done after {self._timeout_s:g} s; {tool.leftover()}")
            return _failed(_told(error))

    def _names_of(self, research: Collection[str | Callable[..., Any]]) -> frozenset[str]:
        if isinstance(research, str):
            raise ConfigError(f"research must be a collection of names or functions, not {research!r}")
        names = frozenset(each if isinstance(each, str) else _name_of(each) for each in research)
        if names - self._tools.keys():
            strange = ", ".join(sorted(names - self._tools.keys()))
            raise ConfigError(f"research names {strange}; the tools are: {', '.join(self._tools) or 'none'}")
        return names


class _RefusedError(Exception):
    """The arguments don't fit; says in words for the model which, and what would be right."""


@frozen
class _Tool:
    """A function, and what it takes."""

    name: str
    function: Callable[..., Any]
    is_async: bool
    description: str
    parameters: Mapping[str, Any]
    model: "type[BaseModel]"
    """Its fields are named p0, p1, ... (a name of the function's may be one that pydantic keeps for itself), and have
    the names of the parameters as aliases."""
    fields: Mapping[str, inspect.Parameter]
    """The parameters, by the names of the model's fields."""
    not_null: frozenset[str]
    """The parameters that may be left out, but not be null."""
    rest: str | None
    """The alias under which arguments for `**kwargs` are checked; None if there are none."""

    def as_openai(self) -> dict[str, Any]:
        parameters = json.loads(json.dumps(self.parameters))  # a copy: what it is sent through may write into it
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    async def called(self, arguments: Mapping[str, Any]) -> ToolResult:
        """Return what the function makes of *arguments*.

        Raises:
            _RefusedError: they don't fit. What the function raises goes through.
        """
        fitting = self._fitting(arguments)
        if self.is_async:
            return _result(await self.function(**fitting))
        outcome = await _in_thread(lambda: _unless_awaitable(self.function(**fitting)))
        return outcome if isinstance(outcome, ToolResult) else _result(await outcome)

    def usage(self) -> str:
        """Return in one line what the function takes."""
        required = self.parameters.get("required", ())
        takes = [
            f"{name}: {_brief(schema)}{'' if name in required else ' (may be left out)'}"
            for name, schema in self.parameters["properties"].items()
        ]
        if self.rest:
            takes.append("further arguments of any name")
        return cut(f"{self.name} takes {', '.join(takes) or 'no arguments'}", 1_000)

    def leftover(self) -> str:
        """Return what becomes of a call that is given up."""
        if self.is_async:
            return "it was cancelled, and what it did until then is unknown"
        return "it was left to itself in its thread, where it may go on, and what it does there is unknown"

    def _fitting(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        from pydantic import ValidationError

        # models write null for what they leave out
        given = {key: value for key, value in arguments.items() if value is not None or key not in self.not_null}
        if self.rest is not None:
            known = {parameter.name for parameter in self.fields.values()} - {self.rest.lstrip("*")}
            given = {key: value for key, value in given.items() if key in known} | {
                self.rest: {key: value for key, value in given.items() if key not in known}
            }
        try:
            values = self.model.model_validate(given)
        except ValidationError as error:
            raise _RefusedError(self._faults(error)) from None
        fitting: dict[str, Any] = {}
        for field, parameter in self.fields.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                fitting |= getattr(values, field)
            elif field in values.model_fields_set or parameter.default is inspect.Parameter.empty:
                fitting[parameter.name] = getattr(values, field)
        return fitting

    def _faults(self, error: "ValidationError") -> str:
        faults = [self._fault(each) for each in error.errors(include_url=False)]
        more = len(faults) - _SHOWN_FAULTS
        return "; ".join(faults[:_SHOWN_FAULTS]) + (f"; and {more} more" if more > 0 else "")

    def _fault(self, error: Mapping[str, Any]) -> str:
        place = ".".join(str(part) for part in error["loc"] if part != self.rest)
        match error["type"]:
            case "missing":
                return f"the argument {place} is missing"
            case "extra_forbidden":
                return f"there is no argument {_shown(place)}"
        return f"argument {place}: {error['msg']}, not {_shown(error['input'])}"


def _failed(text: str) -> ToolResult:
    return ToolResult(f"error: {text}", ok=False)


def _shown(value: object) -> str:
    try:
        text = value if isinstance(value, str) and not value.isprintable() else json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def _told(error: BaseException) -> str:
    try:
        words = str(error)
    except Exception:  # noqa: BLE001 - around a user-supplied tool, whose exceptions may be unable to say what they are
        words = "(it can't be put into words)"
    return cut(f"{type(error).__name__}: {words}" if words else type(error).__name__, 2_000)


def _brief(schema: Mapping[str, Any]) -> str:
    """Return a schema in a word or a few."""
    if "enum" in schema or "const" in schema:
        return "one of " + ", ".join(json.dumps(each) for each in schema.get("enum", [schema.get("const")]))
    if "anyOf" in schema:
        return " or ".join(_brief(each) for each in schema["anyOf"])
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    items = schema.get("items")
    return f"array of {_brief(items)}" if isinstance(items, Mapping) else str(schema.get("type", "any value"))


# Calling


async def _in_thread(work: Callable[[], Any]) -> Any:
    """Return what *work* returns in a daemon thread of its own, with the caller's context variables.

    Not the loop's executor: it joins its threads when the loop or the interpreter ends, however long they hang.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    context = copy_context()
    given: list[tuple[Any, Exception | None]] = []

    def settle() -> None:
        if not done.done():  # else the call was given up
            done.set_result(None)

    def run() -> None:
        value, failure = None, None
        try:
            value = context.run(work)
        except Exception as error:  # noqa: BLE001 - around a user-supplied tool, which may raise anything
            failure = error if not isinstance(error, StopIteration) else RuntimeError(_told(error))
        except BaseException as error:  # noqa: BLE001 - and a SystemExit in a tool must end the call, not the thread
            failure = RuntimeError(_told(error))
        given.append((value, failure))
        with contextlib.suppress(RuntimeError):  # the loop was closed while this went on
            loop.call_soon_threadsafe(settle)

    threading.Thread(target=run, name="agent_fsm tool", daemon=True).start()
    try:
        await done
    except asyncio.CancelledError as error:
        if not given:  # else the function was done before the loop had a turn to hear of it, and that is no loss
            error.add_note(ABANDONED)
            raise
    value, failure = given[0]
    if failure is not None:
        raise failure
    return value


def _unless_awaitable(value: Any) -> Any:
    return value if inspect.isawaitable(value) else _result(value)


def _result(value: Any) -> ToolResult:
    """Return what a function returned as a result."""
    if isinstance(value, ToolResult):
        return value
    if value is None:
        return ToolResult("")
    if isinstance(value, str):
        return ToolResult(str.__str__(value))  # an enum's own __str__ may say Color.RED
    from pydantic_core import to_json

    # base64: bytes need not be UTF-8; NaN as a string: it is no JSON
    text = to_json(value, bytes_mode="base64", inf_nan_mode="strings", fallback=_plain).decode()
    return ToolResult(text, structured=json.loads(text))


def _plain(value: Any) -> Any:
    """Return what stands for a value that pydantic knows nothing of."""
    from attrs import asdict, has

    return asdict(value, recurse=False) if has(type(value)) else str(value)


# Making a tool


def _tool_of(function: Callable[..., Any]) -> _Tool:
    name = _name_of(function)
    parameters = _parameters_of(name, function)
    hints = _hints_of(name, function)
    documented = _documented(function)
    described = {each.arg_name.lstrip("*"): each.description or "" for each in documented.params}
    rest = next((f"**{each.name}" for each in parameters if each.kind is inspect.Parameter.VAR_KEYWORD), None)
    fields: dict[str, inspect.Parameter] = {}
    definitions: dict[str, Any] = {}
    not_null: set[str] = set()
    for number, parameter in enumerate(parameters):
        if parameter.name not in hints:
            raise ConfigError(f"{name}: the parameter {parameter.name} has no type hint; the model has to be told one")
        hint, parameter = _without_field(hints[parameter.name], parameter)  # noqa: PLW2901 - the same, read rightly
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            hint = dict[str, hint]  # type: ignore[valid-type] # a hint that is known when this runs
        takes_null = _takes_null(name, parameter.name, hint)
        if parameter.default is not inspect.Parameter.empty and not takes_null:
            not_null.add(parameter.name)
        fields[f"p{number}"] = parameter
        definitions[f"p{number}"] = _definition(hint, parameter, described.get(parameter.name, ""))
    model, schema = _model(name, definitions, rest)
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - not whether it can be called, but how
    )
    return _Tool(name, function, is_async, _description(documented), schema, model, fields, frozenset(not_null), rest)


def _inner(function: Callable[..., Any]) -> Any:
    """Return the function that carries hints, name and docstring."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isroutine(function):
        return function
    return type(function).__call__


def _name_of(function: Any) -> str:
    if not callable(function):
        raise ConfigError(f"{cut(repr(function), 100)} can't be called; a tool is made of a function")
    if isinstance(function, type):
        raise ConfigError(f"{function.__name__} is a class; a tool is made of a function, write one that returns it")
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", None) or type(function).__name__
    if name == "<lambda>":
        raise ConfigError("a lambda can't be a tool: it has neither name nor type hints; write a function")
    if not LEGAL_NAME.match(name):
        raise ConfigError(f"{name}: the name of a tool is 1 to 64 of [A-Za-z0-9_-]; rename the function")
    return str(name)


def _parameters_of(name: str, function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: it doesn't say what it takes ({error}); wrap it in a function") from None
    if inspect.isasyncgenfunction(_inner(function)):
        raise ConfigError(f"{name}: an async generator can't be a tool; return a list")
    for each in parameters:
        if each.kind in _DRAWN_BY:
            stars = "*" if each.kind is inspect.Parameter.VAR_POSITIONAL else ""
            raise ConfigError(f"{name}: {stars}{each.name} can't be given by name, as a model gives arguments")
    return parameters


def _hints_of(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(_inner(function), include_extras=True)
    except (NameError, TypeError, AttributeError, SyntaxError) as error:
        raise ConfigError(f"{name}: its type hints can't be read: {error}") from None


def _documented(function: Callable[..., Any]) -> "Docstring":
    from docstring_parser import Docstring, ParseError, parse

    inner = _inner(function)
    text = inspect.getdoc(inner) or ""
    if inner is getattr(type(function), "__call__", None):  # noqa: B004 - an object's class tells more than its method
        text = text if inner.__doc__ else inspect.getdoc(type(function)) or ""
    try:
        return parse(text)
    except ParseError:  # it says something all the same
        whole = Docstring()
        whole.short_description = text
        return whole


def _description(documented: "Docstring") -> str:
    text = (documented.description or "").strip()
    returns = documented.returns.description if documented.returns else ""
    return f"{text}\n\nReturns: {returns.strip()}".strip() if returns and returns.strip() else text


def _without_field(hint: Any, parameter: inspect.Parameter) -> tuple[Any, inspect.Parameter]:
    """Return both with a `= Field(...)` moved from the default to the hint, where it means the same."""
    from pydantic.fields import FieldInfo

    if isinstance(parameter.default, FieldInfo):
        return Annotated[hint, parameter.default], parameter.replace(default=inspect.Parameter.empty)
    return hint, parameter


def _takes_null(name: str, parameter: str, hint: Any) -> bool:
    from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

    try:
        TypeAdapter(hint).validate_python(None)
    except ValidationError:
        return False
    except (PydanticSchemaGenerationError, PydanticUserError, TypeError, NameError) as error:
        why = str(error).partition("\n")[0]
        raise ConfigError(f"{name}: no schema can be made of the hint of {parameter}: {why}") from None
    return True


def _definition(hint: Any, parameter: inspect.Parameter, description: str) -> Any:
    from pydantic import Field
    from pydantic.fields import FieldInfo

    is_rest = parameter.kind is inspect.Parameter.VAR_KEYWORD
    alias = f"**{parameter.name}" if is_rest else parameter.name
    more = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    own = any(isinstance(each, FieldInfo) and each.description for each in more)
    said: dict[str, Any] = {} if own or not description else {"description": " ".join(description.split())}
    field: Any = Field(alias=alias, validation_alias=alias, **said)
    hint = Annotated[hint, field]
    return (hint, parameter.default) if parameter.default is not inspect.Parameter.empty else hint


def _model(name: str, definitions: Mapping[str, Any], rest: str | None) -> "tuple[type[BaseModel], dict[str, Any]]":
    """Return the model that checks arguments, and its JSON schema."""
    from pydantic import ConfigDict, PydanticUserError, create_model
    from pydantic.json_schema import GenerateJsonSchema

    class Quiet(GenerateJsonSchema):
        ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012 - as the base class has it

    try:
        model: type[BaseModel] = create_model(name, __config__=ConfigDict(extra="forbid"), **definitions)
        schema = _untitled(model.model_json_schema(schema_generator=Quiet))
    except PydanticUserError as error:
        why = str(error).partition("\n")[0]
        raise ConfigError(f"{name}: no schema can be made of its hints: {why}") from None
    schema = {"type": "object", "properties": {}, **schema}
    schema.pop("description", None)
    if rest is not None:
        more = schema["properties"].pop(rest)
        schema["required"] = [each for each in schema.get("required", ()) if each != rest]
        schema["additionalProperties"] = more.get("additionalProperties", True)
    return model, schema


_BY_NAME = frozenset(("properties", "$defs", "patternProperties"))
"""Where the keys of a mapping are names, and not words of JSON schema."""
_VALUES = frozenset(("default", "const", "enum", "examples"))


def _untitled(schema: Any) -> Any:
    """Return a schema without the titles that pydantic makes of names, which only cost tokens."""
    if isinstance(schema, list):
        return [_untitled(each) for each in schema]
    return dict(_untitled_items(schema)) if isinstance(schema, Mapping) else schema


def _untitled_items(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in schema.items():
        if key in _BY_NAME:
            yield key, {name: _untitled(each) for name, each in value.items()}
        elif key in _VALUES:
            yield key, value
        elif key != "title":
            yield key, _untitled(value)
