"""How a policy fails: a sentence, the run as lines to read, as a program to paste, and as a diagram."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from enum import Enum
from typing import Any

from attrs import field, frozen

from agent_fsm import protocol
from agent_fsm import table as tables
from agent_fsm.check.code import classes, code, pasted, short
from agent_fsm.check.explore import TASK
from agent_fsm.check.report import Report
from agent_fsm.diagrams import mermaid, rows_of
from agent_fsm.errors import NoRowError
from agent_fsm.guards import Always, Compare, Guard, Is, Not, Number, Opaque
from agent_fsm.guards import Both as BothOf
from agent_fsm.protocol import Event
from agent_fsm.table import DECIDED, TABLE, Row, Update

__all__ = ["Broken", "PolicyError", "table_code"]


@frozen
class Broken:
    """What broke, and the run that shows it."""

    claim: str
    """Which promise it is; the same for every run that breaks it."""
    what: str
    """One sentence."""
    events: tuple[Event, ...] = ()
    loop: tuple[Event, ...] = ()
    """What happens for ever after *events*, if anything does."""
    shown: tuple[str, ...] = ()
    """The last lines of the program, which show what broke. They may use `runs`, `events` and `table`."""
    imports: Mapping[str, str] = field(factory=dict)
    """By name, the module that the program needs it from."""


class PolicyError(AssertionError):
    """Raised when a policy does not keep what it is to keep; the message is for people, the attributes for programs."""

    def __init__(self, broken: Broken, report: Report) -> None:
        super().__init__(_message(broken, report))
        self.what = broken.what
        self.events = broken.events
        """From the start of a run to where it breaks."""
        self.loop = broken.loop
        """What happens for ever after *events*, if anything does."""
        self.report = report


def _message(broken: Broken, report: Report) -> str:
    parts = [broken.what, "", *_listed(broken)]
    parts += ["As a program:", "", "```python", program(broken, report), "```", "", "As a diagram:", "", "```mermaid"]
    return "\n".join((*parts, _drawn(broken, report).rstrip(), "```"))


def _listed(broken: Broken) -> list[str]:
    numbered = [f"{number:>4}  {short(event)}" for number, event in enumerate((*broken.events, *broken.loop), 1)]
    if broken.loop:
        numbered.append(f"      and again from {len(broken.events) + 1} on, for ever")
    return ["What happens:", "", *numbered, ""] if numbered else []


def _drawn(broken: Broken, report: Report) -> str:
    events = (*broken.events, *broken.loop)
    try:
        path = rows_of(events, report.table, report.config, TASK)
    except NoRowError:
        path = rows_of(events[:-1], report.table, report.config, TASK)
    return mermaid(report.table, path=path)


# As a program


def program(broken: Broken, report: Report) -> str:
    """Return Python that replays the run and shows what broke."""
    imports = {"start": "agent_fsm.machine", "step": "agent_fsm.machine", "accumulate": "itertools", **broken.imports}
    written, needed = table_code(report.table)
    lists = {"events": broken.events} | ({"loop": broken.loop} if broken.loop else {})
    for cls in classes((report.config, *lists.values())):
        imports[cls.__name__] = cls.__module__
    happened = "[*events, *loop * 3]" if broken.loop else "events"
    ran = f"runs = list(accumulate({happened}, step, initial=start(messages, config, table)))"
    blocks = [
        f"table = {written}",
        f"config = {code(report.config, 0, 9)}",
    ]
    if broken.events or broken.loop:
        blocks += [f"messages = {code(list(TASK))}", *(pasted(each, name) for name, each in lists.items()), ran]
    else:
        imports = {name: module for name, module in imports.items() if name not in ("start", "step", "accumulate")}
    blocks += ["\n".join(broken.shown)] if broken.shown else []
    return "\n\n".join(("\n".join(_imported(imports | needed)), *blocks))


def _imported(imports: Mapping[str, str]) -> list[str]:
    modules: dict[str, list[str]] = {}
    for name, module in sorted(imports.items()):
        modules.setdefault(module, []).append(name)
    ordered = sorted(modules.items(), key=lambda each: (each[0].partition(".")[0] not in sys.stdlib_module_names, each))
    return [f"from {module} import {', '.join(names)}" for module, names in ordered]


def importable(function: Callable[..., Any]) -> bool:
    """Return whether *function* can be imported by its name from its module."""
    module, name = getattr(function, "__module__", None), getattr(function, "__name__", "")
    return module != "__main__" and getattr(sys.modules.get(str(module)), name, None) is function


def table_code(table: Sequence[Row]) -> tuple[str, dict[str, str]]:
    """Return *table* as an expression, told by how it differs from TABLE, and by name the modules that it needs.

    A guard that is a function is written by its name, and can be pasted only if it can be imported.
    """
    if table is TABLE or tuple(table) == tuple(TABLE):
        return "TABLE", {"TABLE": "agent_fsm.table"}
    parts: list[str] = []
    matcher = SequenceMatcher(None, tuple(TABLE), tuple(table), autojunk=False)
    for kind, first, end, begin, stop in matcher.get_opcodes():
        if kind == "equal":
            parts.append(f"TABLE[{first}]" if end - first == 1 else f"*TABLE[{first or ''}:{end}]")
        else:
            parts += map(_row, table[begin:stop])
    written = "Table((\n    " + ",\n    ".join(parts) + ",\n))"
    names = set(re.findall(r"\w+", written))
    needed = dict.fromkeys(names & {*tables.__all__}, "agent_fsm.table")
    needed |= dict.fromkeys(names & {*protocol.__all__}, "agent_fsm.protocol")
    for leaf in (leaf for row in table for leaf in row.guard.leaves()):
        if isinstance(leaf, Opaque) and importable(leaf.question):
            needed[leaf.name] = leaf.question.__module__
    return written, needed


def _row(row: Row) -> str:
    label = [f"name={row.name!r}"] if row.name else []
    target = f"State.{row.target.name}"
    reason = "DECIDED" if row.reason == DECIDED else _value(row.reason)
    if not row.events:
        ends = [] if row.reason is None else [f"reason={reason}"]
        return f"observe({', '.join((_guard(row.guard), target, *map(_update, row.updates), *ends, *label))})"
    sources, events = code(row.sources), ", ".join(event.__name__ for event in row.events)
    updates = "".join(f"{_update(update)}, " for update in row.updates)
    given = [sources, f"({events},)", _guard(row.guard), target, f"({updates})", reason, *label]
    return f"Row({', '.join(given)})"


def _update(update: Update) -> str:
    counter = f"counter({update.counter!r})" if update.own else repr(update.counter)
    return f"{update.verb}({counter}, {_value(update.value)})"


def _value(value: object) -> str:
    return f"{type(value).__name__}.{value.name}" if isinstance(value, Enum) else repr(value)


def _guard(guard: Guard) -> str:
    """Return *guard* as it is written in a table."""
    match guard:
        case Always():
            return "ALWAYS"
        case Compare(left, sign, right):
            return f"({_number(left)} {sign} {_number(right)})"
        case Is(left, value):
            return f"{_number(left)}.is_({_value(value)})"
        case Not(inner):
            return f"~{_guard(inner)}"
        case Opaque(_, name, used):
            return f"opaque({name}{f', tools={used!r}' if used else ''})"
    parts = guard.parts()
    if len(parts) == 2:
        return f"({_guard(parts[0])} {'&' if isinstance(guard, BothOf) else '|'} {_guard(parts[1])})"
    return f"{_guard(parts[0])}.named({guard.name!r})"


def _number(number: Number | float) -> str:
    if not isinstance(number, Number):
        return repr(number)
    match number.owner:
        case "counters":
            return f"counter({number.attribute!r})"
        case "calls":
            return f"ledger.calls_of({number.attribute!r})"
        case _:
            return str(number)
