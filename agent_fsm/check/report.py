"""What a check found: verdict, bounds, witnesses, a lasso or a ranking."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from enum import StrEnum
from textwrap import TextWrapper
from typing import Any, Final, TypeAlias

from attrs import field, frozen

from agent_fsm.check.code import short
from agent_fsm.check.witness import Lasso
from agent_fsm.config import AgentConfig
from agent_fsm.protocol import Event, StopReason
from agent_fsm.table import Row

__all__ = ["Bound", "Certificate", "Report", "Verdict"]

Certificate: TypeAlias = dict[str, Any]
"""A ranking of the boxes that runs go through, as JSON: see `agent_fsm.check.certificate`."""


class Verdict(StrEnum):
    """Whether every run ends."""

    PROVED = "proved"
    PROVED_WHATEVER = "proved whatever the opaque guards answer"
    REFUTED = "refuted"
    """There is a run that never ends, or something may happen that a state has no row for."""
    ASSUMED = "assumed"
    """It depends on what opaque guards answer: with some answers of theirs a run never ends."""
    UNDECIDED = "undecided"
    """Neither was found: too many configurations, or a loop that only the growth of the transcript may end."""


@frozen
class Bound:
    """The most of something that a run can come to."""

    name: str
    at_most: float | None
    """No run comes to more; None if there is no bound."""
    reached: float | None
    """What the run of `witness` comes to; None if there is no witness."""
    witness: tuple[Event, ...] = ()
    """Events that `functools.reduce(step, witness, start(...))` takes, from the start of a run."""
    note: str = ""
    """Why there is no bound, or what it takes for granted."""

    @property
    def exact(self) -> bool:
        """Whether the witness comes to just as much."""
        return self.at_most is not None and self.reached == self.at_most


@frozen
class Report:
    """What `check` found out about a table under some limits."""

    table: Sequence[Row]
    config: AgentConfig
    verdict: Verdict
    why: str
    """What the verdict rests on, or what is wrong, in words."""
    bounds: tuple[Bound, ...] = ()
    """Empty unless every run ends."""
    reasons: tuple[StopReason, ...] = ()
    """Why runs can end."""
    untaken: tuple[str, ...] = ()
    """Rows that no run takes under these limits: number and label."""
    guards: tuple[str, ...] = ()
    """The guards that were taken to answer anything."""
    lasso: Lasso | None = None
    _certifying: Callable[[], Certificate] | None = field(default=None, eq=False, repr=False, alias="certifying")
    boxes: int = 0
    """Configurations told apart."""
    steps: int = 0
    """Steps taken by the search."""

    @property
    def certificate(self) -> Certificate | None:
        """The certificate that every run ends, which `verify` judges; None unless that is proved."""
        return None if self._certifying is None else self._certifying()

    @property
    def terminates(self) -> bool:
        """Whether it is proved that every run ends."""
        return self.verdict in (Verdict.PROVED, Verdict.PROVED_WHATEVER)

    def bound(self, name: str) -> Bound:
        """Return the bound called *name*: `model_calls`, `tool_calls`, ...

        Raises:
            KeyError: there is none of that name.
        """
        for each in self.bounds:
            if each.name == name:
                return each
        raise KeyError(name)

    def __str__(self) -> str:
        """The verdict first, then the bounds; no line is longer than 80 characters but one that holds a long name."""
        blocks = [
            _titled("every run ends", self._verdict(), *self.why.splitlines()),
            _bounds_told(self.bounds),
            _lasso_told(self.lasso),
            "\n".join(
                (
                    *([_titled("runs can end in", _listed(self.reasons))] if self.reasons else []),
                    *([_titled("rows never taken", _listed(self.untaken))] if self.untaken else []),
                    _titled("searched", f"{self.boxes:,} configurations, {self.steps:,} steps"),
                )
            ),
        ]
        return "\n\n".join(filter(None, blocks))

    def _verdict(self) -> str:
        if self.verdict is Verdict.PROVED_WHATEVER:
            return f"proved whatever {_names(self.guards)} {'answers' if len(self.guards) == 1 else 'answer'}"
        return self.verdict.value


# As text

_WIDTH: Final = 80
_INDENT: Final = 18
_UNBROKEN: Final = "\u00a0"
"""Stands for a space at which no line is to end."""


def _titled(title: str, *lines: str) -> str:
    """Return *lines*, broken where they are too long, beside their title."""
    return "\n".join(_wrapped(line, f"{'' if number else title:<{_INDENT}}") for number, line in enumerate(lines))


def _wrapped(line: str, first: str, more: str = " " * _INDENT) -> str:
    wrapper = TextWrapper(
        _WIDTH, initial_indent=first, subsequent_indent=more, break_long_words=False, break_on_hyphens=False
    )
    return wrapper.fill(line).replace(_UNBROKEN, " ")


def _listed(items: Iterable[str]) -> str:
    return ", ".join(item.replace(" ", _UNBROKEN) for item in items)


def _names(guards: Sequence[str]) -> str:
    return " and ".join(", ".join(guards).rsplit(", ", 1))


def _bounds_told(bounds: Sequence[Bound]) -> str:
    if not bounds:
        return ""
    marks = {note: f"[{number}]" for number, note in enumerate(dict.fromkeys(_notes(bounds)), 1)}
    told = {bound.name: "none" if bound.at_most is None else number_text(bound.at_most) for bound in bounds}
    width = max(map(len, told.values()))
    names = max(_INDENT - 2, 2 + max(len(bound.name) for bound in bounds))
    return "\n".join(
        (
            "at worst a run comes to",
            *(_bound_line(bound, f"{bound.name:<{names}}", f"{told[bound.name]:>{width}}", marks) for bound in bounds),
            *(_wrapped(note, f"  {mark} ", " " * 6) for note, mark in marks.items()),
        )
    )


def _notes(bounds: Iterable[Bound]) -> list[str]:
    return [bound.note for bound in bounds if bound.note]


def _bound_line(bound: Bound, name: str, most: str, marks: Mapping[str, str]) -> str:
    how = "no bound" if bound.at_most is None else "exactly" if bound.exact else "at most"
    line = f"  {name}{how:<10}{most}  {marks.get(bound.note, ''):<5}"
    if how == "at most":
        reached = bound.reached
        line += "no run of it is known" if reached is None else f"a run of {number_text(reached, up=False)} is known"
    return line.rstrip()


def number_text(value: float, *, up: bool = True) -> str:
    """Return *value* with at most four decimals, rounded *up* or else down: what is at most so much stays true."""
    if value == int(value):
        return f"{int(value):,}"
    rounded = Decimal(repr(value)).quantize(Decimal("0.0001"), ROUND_CEILING if up else ROUND_FLOOR)
    return f"{rounded.normalize():,f}"


def _lasso_told(lasso: Lasso | None) -> str:
    if lasso is None:
        return ""
    lines = [f"  {number:>3}  {short(event)}" for number, event in enumerate((*lasso.entry, *lasso.loop), 1)]
    gets_in = len(lasso.entry)
    return "\n".join(
        (
            *(("gets in by", *lines[:gets_in]) if gets_in else ()),
            "goes round by",
            *lines[gets_in:],
            f"       and again from {gets_in + 1} on, for ever",
        )
    )
