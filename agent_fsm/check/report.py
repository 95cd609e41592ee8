"""What a check found: verdict, bounds, witnesses, a lasso or a ranking."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, TypeAlias

from attrs import frozen

from agent_fsm.check.witness import Lasso
from agent_fsm.config import AgentConfig
from agent_fsm.protocol import Event, StopReason
from agent_fsm.table import Table

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

    table: Table
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
    certificate: Certificate | None = None
    """Given if every run ends."""
    boxes: int = 0
    """Configurations told apart."""
    steps: int = 0
    """Steps taken by the search."""

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
        lines = [f"every run ends     {self._verdict()}"]
        lines += [f"                   {line}" for line in self.why.splitlines()]
        if self.reasons:
            lines.append(f"runs end in        {', '.join(self.reasons)}")
        lines += [_line(bound) for bound in self.bounds]
        if self.untaken:
            lines.append(f"rows never taken   {'; '.join(self.untaken)}")
        if self.lasso is not None:
            lines += ["gets in by", *_listed(self.lasso.entry), "goes round by", *_listed(self.lasso.loop)]
        lines.append(f"searched           {self.boxes:,} configurations, {self.steps:,} steps")
        return "\n".join(lines)

    def _verdict(self) -> str:
        if self.verdict is Verdict.PROVED_WHATEVER:
            return f"proved whatever {_names(self.guards)} {'answers' if len(self.guards) == 1 else 'answer'}"
        return self.verdict.value


def _names(guards: Sequence[str]) -> str:
    return " and ".join(", ".join(guards).rsplit(", ", 1))


def _line(bound: Bound) -> str:
    name = bound.name.replace("_", " ")
    if bound.at_most is None:
        return f"{name:<18} no bound: {bound.note}"
    most = _number(bound.at_most)
    if bound.exact:
        how = f"exactly: {len(bound.witness):,} events come to it"
    elif bound.reached is not None:
        how = f"no run is known to come to more than {_number(bound.reached)}"
    else:
        how = "no run was built that comes to it"
    return f"{name:<18} at most {most:<12} {how}{f'; {bound.note}' if bound.note else ''}"


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:,.4f}"


def _listed(events: Sequence[Event]) -> list[str]:
    return [f"    {number + 1:>3} {_told(event)}" for number, event in enumerate(events)] or ["    (at once)"]


def _told(event: Event) -> str:
    """Return *event* as a short line."""
    from agent_fsm.check.code import short

    return short(event)
