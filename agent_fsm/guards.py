"""Guards: one small question each, put to the ledger.

A guard is a value. `ledger.failures >= limits.max_consecutive_failures` compares a counter with a limit,
`ledger.said.is_(Said.CALLS)` reads a flag, and `&`, `|`, `~` combine guards. Declared like this, a guard can be drawn,
compiled and searched for its thresholds; `opaque` makes one of a function, which can only be called. Besides the
ledger's fields a guard may compare counters of its table's own, `counter("searches")`, and how often a tool was called,
`ledger.calls_of("exec_shell")`.

A comparison with an absent limit (None) is false.
"""

import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from types import MappingProxyType
from typing import Any

from attrs import field, fields, frozen

from agent_fsm.config import Limits
from agent_fsm.errors import TableError
from agent_fsm.ledger import Ledger, clone
from agent_fsm.suspicion import suspicious

__all__ = [
    "ALWAYS",
    "Both",
    "Compare",
    "Either",
    "Guard",
    "Is",
    "Not",
    "Number",
    "Opaque",
    "counter",
    "ledger",
    "limits",
    "opaque",
]

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}

_COUNTED = ("counters", "calls")
"""Fields of the ledger that hold counts by name; a count that is missing is 0."""
_LEDGER_FIELDS = frozenset(each.name for each in fields(Ledger))
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Guard:
    """A named question whose answer is a bool. Call it with a ledger."""

    name: str

    def __call__(self, ledger: Ledger, /) -> bool:
        raise NotImplementedError

    def code(self, bound: dict[str, Any]) -> str:
        """Return a Python expression over `ledger` and `limits`; what it needs besides is put into *bound*."""
        raise NotImplementedError

    def parts(self) -> "tuple[Guard, ...]":
        """The guards that this one combines."""
        return ()

    def __and__(self, other: "Guard") -> "Guard":
        return Both(self, other)

    def __or__(self, other: "Guard") -> "Guard":
        return Either(self, other)

    def __invert__(self) -> "Guard":
        return Not(self)

    def __bool__(self) -> bool:
        # `a and b` would be b alone, and `1 <= a <= 2` its second half
        raise TableError(
            f"guard {self.name} has no truth of its own: combine guards with &, | and ~, not with and, or, not or a"
            " chain of comparisons; call it with a ledger to ask it"
        )

    def named(self, name: str) -> "Guard":
        """Return the same guard under *name*, which diagrams and messages show."""
        return Named(self, name)

    def leaves(self) -> "Iterator[Guard]":
        """The comparisons, flags and functions that this guard is made of."""
        if not self.parts():
            yield self
        for part in self.parts():
            yield from part.leaves()


@frozen
class Always(Guard):
    """True of every ledger."""

    name: str = field(default="always", init=False)

    def __call__(self, ledger: Ledger, /) -> bool:
        return True

    def code(self, bound: dict[str, Any]) -> str:
        return "True"


ALWAYS = Always()


@frozen(order=False)  # the comparisons are its own, below
class Number:
    """A number that a guard compares: a counter of the ledger or a limit."""

    owner: str
    """`ledger`, `limits`, `counters` (the table's own) or `calls` (started, by the tool's name)."""
    attribute: str
    absent: bool
    """Whether it can be None."""

    def __str__(self) -> str:
        return f"{self.owner}.{self.attribute}"

    @property
    def title(self) -> str:
        """What names of guards call the number."""
        return f"calls of {self.attribute}" if self.owner == "calls" else self.attribute

    @property
    def code(self) -> str:
        """A Python expression over `ledger` and `limits`."""
        if self.owner in _COUNTED:
            return f"ledger.{self.owner}.get({self.attribute!r}, 0)"
        return f"{self.owner}.{self.attribute}"

    def read(self, ledger: Ledger) -> Any:
        """The number's value now; None if it is absent."""
        if self.owner in _COUNTED:
            return getattr(ledger, self.owner).get(self.attribute, 0)
        return getattr(ledger if self.owner == "ledger" else ledger.limits, self.attribute)

    def __ge__(self, other: Any) -> Guard:
        return Compare(self, ">=", other)

    def __gt__(self, other: Any) -> Guard:
        return Compare(self, ">", other)

    def __le__(self, other: Any) -> Guard:
        return Compare(self, "<=", other)

    def __lt__(self, other: Any) -> Guard:
        return Compare(self, "<", other)

    def is_(self, value: Any) -> Guard:
        """True when the field is exactly *value*: a member of an enum, a bool or None.

        Raises:
            TableError: it is a count; two equal numbers need not be the same object.
        """
        if self.owner in _COUNTED:
            raise TableError(f"{self.title} is a count, to be compared with >=, >, <= or <, not with is_({value!r})")
        return Is(self, value)


@frozen
class Compare(Guard):
    """One number compared with another."""

    left: Number
    sign: str
    """One of `<`, `<=`, `>`, `>=`."""
    right: Number | float

    @property
    def name(self) -> str:  # type: ignore[override] # derived from the fields, so that it can't disagree with them
        right = self.right.title if isinstance(self.right, Number) else self.right
        return f"{self.left.title} {self.sign} {right}"

    def __call__(self, ledger: Ledger, /) -> bool:
        left = self.left.read(ledger)
        right = self.right.read(ledger) if isinstance(self.right, Number) else self.right
        return left is not None and right is not None and _OPERATORS[self.sign](left, right)

    def code(self, bound: dict[str, Any]) -> str:
        absent = [each for each in (self.left, self.right) if isinstance(each, Number) and each.absent]
        tests = [f"{each.code} is not None" for each in absent]
        if isinstance(self.right, Number):
            right = self.right.code
        else:
            right = f"number_{len(bound)}"  # bound, as inf and nan have no literal
            bound[right] = self.right
        return "(" + " and ".join([*tests, f"{self.left.code} {self.sign} {right}"]) + ")"


@frozen
class Is(Guard):
    """One field that is exactly one value."""

    left: Number
    value: Any

    @property
    def name(self) -> str:  # type: ignore[override] # derived from the fields
        if self.value is True:
            return self.left.attribute
        if self.value is False:
            return f"not {self.left.attribute}"
        return f"{self.left.attribute} is {self.value.value if isinstance(self.value, Enum) else self.value}"

    def __call__(self, ledger: Ledger, /) -> bool:
        return self.left.read(ledger) is self.value

    def code(self, bound: dict[str, Any]) -> str:
        if self.value is None or isinstance(self.value, bool):
            return f"({self.left.code} is {self.value})"
        key = f"value_{len(bound)}"
        bound[key] = self.value
        return f"({self.left.code} is {key})"


@frozen
class Both(Guard):
    """True when both guards are."""

    first: Guard
    second: Guard

    @property
    def name(self) -> str:  # type: ignore[override] # derived from the parts
        return " and ".join(f"({each.name})" if isinstance(each, Either) else each.name for each in self.parts())

    def parts(self) -> tuple[Guard, ...]:
        return (self.first, self.second)

    def __call__(self, ledger: Ledger, /) -> bool:
        return self.first(ledger) and self.second(ledger)

    def code(self, bound: dict[str, Any]) -> str:
        return f"({self.first.code(bound)} and {self.second.code(bound)})"


@frozen
class Either(Guard):
    """True when one of the guards is, or both."""

    first: Guard
    second: Guard

    @property
    def name(self) -> str:  # type: ignore[override] # derived from the parts
        return " or ".join(each.name for each in self.parts())

    def parts(self) -> tuple[Guard, ...]:
        return (self.first, self.second)

    def __call__(self, ledger: Ledger, /) -> bool:
        return self.first(ledger) or self.second(ledger)

    def code(self, bound: dict[str, Any]) -> str:
        return f"({self.first.code(bound)} or {self.second.code(bound)})"


@frozen
class Not(Guard):
    """True when the guard is not."""

    guard: Guard

    @property
    def name(self) -> str:  # type: ignore[override] # derived from the part
        return f"not ({self.guard.name})" if isinstance(self.guard, Both | Either) else f"not {self.guard.name}"

    def parts(self) -> tuple[Guard, ...]:
        return (self.guard,)

    def __call__(self, ledger: Ledger, /) -> bool:
        return not self.guard(ledger)

    def code(self, bound: dict[str, Any]) -> str:
        return f"(not {self.guard.code(bound)})"


@frozen
class Named(Guard):
    """A guard under a name of its own."""

    guard: Guard
    name: str

    def parts(self) -> tuple[Guard, ...]:
        return (self.guard,)

    def __call__(self, ledger: Ledger, /) -> bool:
        return self.guard(ledger)

    def code(self, bound: dict[str, Any]) -> str:
        return self.guard.code(bound)


@frozen
class Opaque(Guard):
    """A guard that is a function of the ledger. It must not read the clock, write, or return anything but a bool."""

    question: Callable[[Ledger], bool]
    name: str
    tools: tuple[str, ...] = ()
    """The tools whose `ledger.calls` it reads."""

    def __call__(self, ledger: Ledger, /) -> bool:
        """Return what the function says of a copy of *ledger*.

        Raises:
            TableError: the function raises, writes to the ledger, or returns no bool.
        """
        shown, given = _shown(ledger), _shown(ledger)
        try:
            answer = self.question(shown)
        except Exception as error:  # whatever a caller's function raises, the table is to blame
            raise TableError(
                f"guard {self.name} raised {type(error).__name__}; a guard answers True or False of every ledger"
            ) from error
        if shown != given:
            wrote = [each.name for each in fields(Ledger) if getattr(shown, each.name) != getattr(given, each.name)]
            raise TableError(f"guard {self.name} wrote to the ledger ({', '.join(wrote)}); only a row's updates may")
        if answer is not True and answer is not False:
            raise TableError(f"guard {self.name} returned {answer!r}; a guard returns True or False")
        return answer

    def code(self, bound: dict[str, Any]) -> str:
        key = f"opaque_{len(bound)}"
        bound[key] = self
        return f"{key}(ledger)"


def _shown(ledger: Ledger) -> Ledger:
    """Return a copy whose counts can't be written to, and are 0 where they are missing."""
    shown = clone(ledger)
    shown.counters = MappingProxyType(Counter(ledger.counters))
    shown.calls = MappingProxyType(Counter(ledger.calls))
    return shown


def opaque(question: Callable[[Ledger], bool], *, tools: Iterable[str] = ()) -> Guard:
    """Return a guard that asks *question*, under the function's name.

    The function gets a copy of the ledger. *tools* are those whose `ledger.calls` it reads; others are not counted.

    Raises:
        TableError: the function reads the clock, chance or the world, as far as `suspicion.suspicious` can see; or a
            tool can't be called that.
    """
    name = getattr(question, "__name__", repr(question))
    if not callable(question):
        raise TableError(f"guard {name} is no function of the ledger")
    if fault := suspicious(question):
        instead = "compare ledger.seconds" if "the clock" in fault else "what else it is to know must be in a limit"
        raise TableError(f"guard {name} {fault}; a guard sees the ledger only: {instead}")
    return Opaque(question, name, tuple(ledger.calls_of(tool).attribute for tool in tools))


def counter(name: str) -> Number:
    """Return a counter of the table's own. It begins at 0; rows change it: `add(counter("searches"))`.

    Raises:
        TableError: *name* is no identifier, or the ledger has a field of that name.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise TableError(f"a counter's name is an identifier, such as searches; {name!r} is none")
    if name in _LEDGER_FIELDS:
        raise TableError(f"the ledger has a field {name!r} already: write ledger.{name}, or choose another name")
    return Number("counters", name, absent=False)


class _Fields:
    """The fields of a class, as numbers to compare: `ledger.failures`."""

    def __init__(self, owner: str, cls: type) -> None:
        self._owner = owner
        self._absent = {
            each.name: "None" in str(each.type) for each in fields(cls) if each.name not in ("limits", *_COUNTED)
        }

    def __getattr__(self, attribute: str) -> Number:
        if attribute not in self._absent:
            raise AttributeError(f"the {self._owner} has no {attribute!r}; it has {', '.join(sorted(self._absent))}")
        return Number(self._owner, attribute, self._absent[attribute])


class _LedgerFields(_Fields):
    def calls_of(self, tool: str) -> Number:
        """Return how many calls of *tool* were started.

        Raises:
            TableError: no tool can be called that.
        """
        if not isinstance(tool, str) or not _TOOL_NAME.fullmatch(tool):
            raise TableError(f"a tool's name is 1 to 64 of [A-Za-z0-9_-]; {tool!r} is none")
        return Number("calls", tool, absent=False)


ledger: Any = _LedgerFields("ledger", Ledger)
"""The ledger's fields, to write guards with."""
limits: Any = _Fields("limits", Limits)
"""The limits, to write guards with."""
