"""Contracts: what a check proved, as a small TOML file that diffs, and what a later check breaks of it.

The promises are the verdict, the guards that it holds whatever they answer, the reasons why runs can end, and the
bounds. Limits, rows and questions stand beside them so that a broken promise can be told with what has changed.
"""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches, unified_diff
from math import inf
from typing import Any, Final, TypeAlias

from attrs import field, fields, frozen

from agent_fsm.check.explore import CALLS_OF, COUNTS
from agent_fsm.check.report import Report, Verdict
from agent_fsm.config import Limits
from agent_fsm.errors import ConfigError, ContractError
from agent_fsm.guards import Guard, Named
from agent_fsm.protocol import StopReason
from agent_fsm.table import Row, Update

__all__ = ["Change", "Contract", "changes", "contract_of", "read_contract"]

Number: TypeAlias = int | float

_NONE: Final = "none"
"""How TOML, which has no null, says that there is no bound or no limit."""
_BOUNDS: Final = (*COUNTS, "seconds", "tokens", "cost_usd")
_LIMITS: Final = tuple(each.name for each in fields(Limits))
_HEADER: Final = """\
# What this policy permits at worst: a contract. No run comes to more, whatever the model and the tools do.
# Made by       agent-fsm check ... --write FILE
# Compare with  agent-fsm check ... --against FILE    It exits with 1 when a promise is broken: a bound grew, a reason
# to end vanished, the verdict got weaker, or a guard that can't be read is new.
"""


@frozen
class Contract:
    """What is promised, and of which policy."""

    verdict: Verdict
    reasons: tuple[StopReason, ...]
    """Why runs can end."""
    bounds: Mapping[str, Number | None]
    """The most that a run can come to; None: no bound. One that is missing is not promised."""
    guards: tuple[str, ...] = ()
    """Guards that can't be read, and were taken to answer anything."""
    limits: Mapping[str, object] = field(factory=dict)
    rows: tuple[str, ...] = ()
    questions: Mapping[str, str] = field(factory=dict)
    """What the guards with names ask."""


@frozen
class Change:
    """Something that is not as a contract has it."""

    promise: str
    """What it is about: a bound by its name, `verdict`, `reasons`, `guards`, `limits`, `rows` or `questions`."""
    told: str
    broken: bool
    """Whether it breaks the contract. What got better, or is merely different, does not."""
    why: tuple[str, ...] = ()
    """What changed in the policy, if this is a broken promise: what is to blame is among it."""

    def __str__(self) -> str:
        return f"{self.told}: {'; '.join(self.why)}" if self.why else self.told


# Writing


def contract_of(report: Report) -> str:
    """Return what *report* found as TOML, the same text each time."""
    contract = _contract(report)
    blocks = [
        _HEADER,
        f"verdict = {_text(contract.verdict)}",
        _list("guards", contract.guards),
        _list("reasons", contract.reasons),
        _table("bounds", contract.bounds),
        _table("limits", contract.limits),
        f"[policy]\n{_list('rows', contract.rows)}",
        _table("policy.questions", contract.questions),
    ]
    return "\n".join((_HEADER, *blocks[1:4])) + "\n\n" + "\n\n".join(blocks[4:]) + "\n"


def _contract(report: Report) -> Contract:
    limits = {name: getattr(report.config, name) for name in _LIMITS}
    return Contract(
        report.verdict,
        report.reasons,
        {bound.name: None if bound.at_most is None else _whole(bound.at_most) for bound in report.bounds},
        report.guards,
        limits,
        tuple(map(_row, report.table)),
        dict(sorted(question for row in report.table for question in _questions(row.guard))),
    )


def _whole(value: Number) -> Number:
    return int(value) if value == int(value) else value


def _row(row: Row) -> str:
    """Return *row* as a line: where, when, and what then."""
    source = "/".join(row.sources)
    on = f" on {'/'.join(event.__name__ for event in row.events)}" if row.events else ""
    asked = f" ({row.guard.name})" if row.name else ""
    reason = [] if row.reason is None else [f"because {row.reason}"]
    return ", ".join((f"{source}{on}: {row.label}{asked} -> {row.target}", *reason, *map(_update, row.updates)))


def _update(update: Update) -> str:
    counter = f"counter {update.counter}" if update.own else update.counter
    return f"{counter} + {update.value}" if update.verb == "add" else f"{counter} = {update.value}"


def _questions(guard: Guard) -> Iterable[tuple[str, str]]:
    """Yield what each named guard within *guard* asks, by its name; of names within it, the names only."""
    if isinstance(guard, Named) and guard.guard.name != guard.name:
        yield guard.name, guard.guard.name
    for part in guard.parts():
        yield from _questions(part)


def _table(title: str, values: Mapping[str, object]) -> str:
    return "\n".join((f"[{title}]", *(f"{_key(name)} = {_value(value)}" for name, value in values.items())))


def _list(name: str, values: Sequence[str]) -> str:
    return "\n".join((f"{name} = [", *(f"    {_text(value)}," for value in values), "]")) if values else f"{name} = []"


def _value(value: object) -> str:
    match value:
        case None:
            return _text(_NONE)
        case bool(switch):
            return str(switch).lower()
        case int() | float():
            return repr(value)
        case _:
            return _text(str(value))


def _key(name: str) -> str:
    bare = name.isascii() and name.replace("_", "").replace("-", "").isalnum()
    return name if bare else _text(name)


def _text(value: str) -> str:
    return f'"{"".join(map(_character, value))}"'


def _character(each: str) -> str:
    if each in '"\\':
        return f"\\{each}"
    if "\ud800" <= each <= "\udfff":  # TOML has no way to write half a pair
        return "\ufffd"
    return f"\\u{ord(each):04x}" if ord(each) < 32 or 127 <= ord(each) < 160 else each


# Reading


def read_contract(text: str) -> Contract:
    """Return the contract that *text* is.

    Raises:
        ContractError: it is not TOML; a key is unknown or missing; or a value is not what its key takes.
    """
    try:
        given = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ContractError(f"this is not valid TOML: {error}") from None
    _known(given, ("verdict", "guards", "reasons", "bounds", "limits", "policy"), "")
    for name in ("verdict", "reasons", "bounds"):
        if name not in given:
            raise ContractError(f"{name} is missing: without it nothing is promised; write the file anew")
    policy = _mapping(given.get("policy", {}), "policy")
    _known(policy, ("rows", "questions"), "policy.")
    questions = _mapping(policy.get("questions", {}), "policy.questions")
    return Contract(
        Verdict(_one_of(given["verdict"], list(Verdict), "verdict")),
        tuple(StopReason(_one_of(each, list(StopReason), "reasons")) for each in _texts(given["reasons"], "reasons")),
        _bounds(_mapping(given["bounds"], "bounds")),
        _texts(given.get("guards", []), "guards"),
        _limits(_mapping(given.get("limits", {}), "limits")),
        _texts(policy.get("rows", []), "policy.rows"),
        {name: _texts([value], f"policy.questions.{name}")[0] for name, value in questions.items()},
    )


def _known(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in given:
        if name not in known:
            raise ContractError(f"{where}{name} is not a key of a contract; {_nearest(name, known)}")


def _nearest(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"the nearest is {near[0]}" if near else f"there are {', '.join(known)}"


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ContractError(f"{where} must be a table, [{where}], not {value!r}")
    return value


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ContractError(f"{where} must be text in quotes, and if there may be several, a list, not {value!r}")
    return tuple(value)


def _one_of(value: Any, known: Sequence[str], where: str) -> str:
    if value not in known:
        raise ContractError(f"{where}: {value!r} is none of {', '.join(known)}")
    return str(value)


def _bounds(given: Mapping[str, Any]) -> dict[str, Number | None]:
    _known({name: value for name, value in given.items() if not name.startswith(CALLS_OF)}, _BOUNDS, "bounds.")
    for name, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value != _NONE and not (number and 0 <= value < inf):
            raise ContractError(f"bounds.{name} must be a number >= 0 or {_text(_NONE)}, not {value!r}")
    return {name: None if value == _NONE else value for name, value in given.items()}


def _limits(given: Mapping[str, Any]) -> dict[str, object]:
    _known(given, _LIMITS, "limits.")
    limits: dict[str, Any] = {name: None if value == _NONE else value for name, value in given.items()}
    for name, value in limits.items():
        try:
            Limits(**{name: value})
        except ConfigError as error:
            raise ContractError(f"limits.{error}") from None
    return limits


# Comparing


def changes(contract: Contract, report: Report) -> list[Change]:
    """Return how *report* differs from *contract*: broken promises first, then what is better or merely different.

    Numbers are compared exactly: a bound is broken by more, not by as much.
    """
    now = _contract(report)
    differing = [*_limits_changed(contract, now), *_policy_changed(contract, now)]
    why = tuple(change.told for change in differing)
    promises = [*_verdict_changed(contract, now), *_guards_changed(contract, now)]
    # Where nothing is proved there are no bounds, and a search given up has not seen every reason
    if report.terminates:
        promises += [*_reasons_changed(contract, now), *_bounds_changed(contract, now)]
    broken = [Change(each.promise, each.told, True, why or (_UNCHANGED,)) for each in promises if each.broken]
    return [*broken, *(each for each in promises if not each.broken), *differing]


_UNCHANGED: Final = "though limits and rows are as they were; a newer version may search differently"
_STRENGTH: Final = {
    Verdict.PROVED: 3,
    Verdict.PROVED_WHATEVER: 3,  # the guards are compared by name
    Verdict.ASSUMED: 2,
    Verdict.UNDECIDED: 1,
    Verdict.REFUTED: 0,
}


def _verdict_changed(old: Contract, now: Contract) -> Iterable[Change]:
    if _STRENGTH[now.verdict] != _STRENGTH[old.verdict]:
        weaker = _STRENGTH[now.verdict] < _STRENGTH[old.verdict]
        lost = ", so no bound holds any more" if old.bounds and not now.bounds else ""
        yield Change(
            "verdict",
            f"that every run ends was {old.verdict} and is {'only ' if weaker else ''}{now.verdict}{lost}",
            weaker,
        )


def _guards_changed(old: Contract, now: Contract) -> Iterable[Change]:
    for name in sorted(set(now.guards) - set(old.guards)):
        yield Change("guards", f"the guard {name} can't be read and is new", True)
    for name in sorted(set(old.guards) - set(now.guards)):
        yield Change("guards", f"the guard {name}, which could not be read, is gone", False)


def _reasons_changed(old: Contract, now: Contract) -> Iterable[Change]:
    for reason in sorted(set(old.reasons) - set(now.reasons)):
        yield Change("reasons", f"no run can end for {reason} any more", True)
    for reason in sorted(set(now.reasons) - set(old.reasons)):
        yield Change("reasons", f"runs can now also end for {reason}", False)


def _bounds_changed(old: Contract, now: Contract) -> Iterable[Change]:
    for name in (*old.bounds, *(name for name in now.bounds if name not in old.bounds)):
        before, after = old.bounds.get(name), now.bounds.get(name)
        if before == after:
            continue
        if after is None:
            yield Change(name, f"{name} was at most {_shown(before)} and has no bound any more", True)
        elif before is None:
            yield Change(name, f"{name} had no bound and is at most {_shown(after)}", False)
        else:
            verb = "grew" if after > before else "fell"
            yield Change(name, f"{name} {verb} from {_shown(before)} to {_shown(after)}", after > before)


def _limits_changed(old: Contract, now: Contract) -> Iterable[Change]:
    for name, before in old.limits.items():
        if before != now.limits[name]:
            yield Change("limits", f"{name} was {_shown(before)}, is {_shown(now.limits[name])}", False)


def _policy_changed(old: Contract, now: Contract) -> Iterable[Change]:
    """Yield the rows, in their order, and then the questions that are new, gone, or elsewhere."""
    if old.rows:
        lines = list(unified_diff(old.rows, now.rows, n=0, lineterm=""))[2:]
        new = [line[1:] for line in lines if line.startswith("+")]
        gone = [line[1:] for line in lines if line.startswith("-")]
        for row in gone:
            yield Change("rows", f"the row {'moved' if row in new else 'is gone'}: {row}", False)
        for row in new:
            if row not in gone:
                yield Change("rows", f"the row is new: {row}", False)
    for name, before in old.questions.items():
        after = now.questions.get(name, before)
        if after != before:
            yield Change("questions", f"{name} asked {before}, asks {after}", False)


def _shown(value: object) -> str:
    return _NONE if value is None else "on" if value is True else "off" if value is False else f"{value}"
