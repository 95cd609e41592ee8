"""Whether a function that is to be a guard reads more than the ledger: the clock, chance, the world.

What can be said without calling it: the function's code is read, that of functions inside it and of functions of the
same module that it names, and the defaults of its parameters. A name counts only where it is looked up outside the
function, so that an attribute or a variable called `time` means nothing. Not seen are: functions of other modules, what
is reached through a variable, a container, an instance's attribute or `getattr`, and globals that change. A replay of
the run may find those, as it goes another way.
"""

import builtins
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

__all__ = ["suspicious"]

_FILES = ("os", "posix", "nt", "posixpath", "ntpath", "genericpath", "io", "pathlib")
_READS = {
    "reads the clock": ("time", "datetime"),
    "draws at random": ("random", "secrets", "uuid"),
    "reads the world": (*_FILES, "socket", "asyncio", "subprocess", "urllib"),
}
_HOW = {module: how for how, modules in _READS.items() for module in modules}
_CLOCK_OF_DATETIME = ("now", "utcnow", "today")
"""The rest of datetime only reckons."""
_BUILTINS: dict[object, str] = {builtins.open: "open", builtins.input: "input"}

_Names: TypeAlias = Mapping[str, Any]


def suspicious(question: Callable[..., object]) -> str | None:
    """Return what *question* reads besides its arguments, such as "reads the clock (time.monotonic)"; None if nothing.

    The module's docstring says what is not seen.
    """
    return next(_faults(question, set()), None)


def _faults(question: object, seen: set[object]) -> Iterator[str]:
    function = _function(question)
    if function is None or function.__code__ in seen:
        return
    closed = {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        if _filled(cell)
    }
    names = {**vars(builtins), **function.__globals__, **closed}
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    for name, value in (*_looked_up(function.__code__, names, seen), *(("", each) for each in defaults)):
        if fault := _fault(name, value):
            yield fault
        elif (called := _function(value)) is not None and called.__module__ == function.__module__:
            yield from _faults(called, seen)


def _function(value: object) -> FunctionType | None:
    if isinstance(value, partial):
        return _function(value.func)
    if isinstance(value, MethodType):
        return _function(value.__func__)
    if isinstance(value, FunctionType):
        return value
    if isinstance(wrapped := getattr(value, "__wrapped__", None), FunctionType):
        return wrapped
    call = None if isinstance(value, type | BuiltinFunctionType) else getattr(type(value), "__call__", None)  # noqa: B004 # which function it is, not whether there is one
    return call if isinstance(call, FunctionType) else None


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a variable that has no value yet
        return False


def _looked_up(code: CodeType, names: _Names, seen: set[object]) -> Iterator[tuple[str, Any]]:
    """Yield what *code* looks up outside itself: dotted name and value, attributes of modules and classes followed."""
    from dis import get_instructions  # needed only where a table has opaque guards

    seen.add(code)
    name, value = "", None
    for instruction in get_instructions(code):
        known = instruction.argval
        if name and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(value, ModuleType | type):
            name, value = f"{name}.{known}", getattr(value, known, None)
            continue
        if name:
            yield name, value
        name, value = "", None
        match instruction.opname:
            case "LOAD_GLOBAL" | "LOAD_NAME" | "LOAD_DEREF" | "LOAD_CLASSDEREF" if known in names:
                name, value = known, names[known]
            case "IMPORT_NAME" if known.partition(".")[0] in _HOW:
                name, value = known, ModuleType(known)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _looked_up(constant, names, seen)


def _fault(name: str, value: object) -> str | None:
    if isinstance(value, BuiltinFunctionType) and value in _BUILTINS:
        return f"reads the world ({_BUILTINS[value]})"
    module = _home(value).partition(".")[0].lstrip("_")
    how = _HOW.get(module)
    if module == "datetime" and name.rpartition(".")[2] not in _CLOCK_OF_DATETIME and not isinstance(value, ModuleType):
        return None
    return None if how is None else f"{how} ({name if '.' in name else _title(module, value)})"


def _home(value: object) -> str:
    """The module that *value* is, is defined in, or is an instance of a class of."""
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, BuiltinFunctionType) and not isinstance(value.__self__, ModuleType | None):
        owner = value.__self__
        return (owner if isinstance(owner, type) else type(owner)).__module__
    home = getattr(value, "__module__", None)
    return home if isinstance(home, str) else type(value).__module__


def _title(module: str, value: object) -> str:
    if isinstance(value, ModuleType):
        return value.__name__
    return f"{module}.{getattr(value, '__qualname__', type(value).__name__)}"
