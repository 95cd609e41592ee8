"""What is proved of tables, held against brute force: thousands made by number, sound and with faults put in.

`python -m pytest -m slow tests/test_generated_tables.py -s` goes through 10,000 and prints what became of them.
"""

import copy
import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, reduce
from multiprocessing import Pool
from typing import Any

import pytest
from attrs import evolve, frozen

from agent_fsm.check import Report, Verdict, check, verify
from agent_fsm.errors import NoRowError, TableError
from agent_fsm.machine import start, step
from agent_fsm.protocol import DONE, Interrupted
from agent_fsm.table import Table
from tests.generated_tables import (
    COUNTED,
    FAULTS,
    TASK,
    Brute,
    Case,
    brute,
    case_of,
    tally,
    unreadable,
    visible,
    watched,
)

SOME = 161
MANY = 10_000
MOST_BOXES = 1_200
"""Fewer than by default: what falls without end is given up sooner."""
OPEN = (Verdict.ASSUMED, Verdict.PROVED_WHATEVER)
PROVED = (Verdict.PROVED, Verdict.PROVED_WHATEVER)


@frozen
class Judged:
    """What became of one table."""

    number: int
    fault: str
    readable: bool = True
    verdict: Verdict | None = None
    """None if the table was refused when it was built."""
    all_end: bool = False
    """Whether brute force went through all runs, and all end."""
    endless: bool = False
    """Whether brute force found a run that comes back to where it was."""
    loose: tuple[str, ...] = ()
    """Bounds that no witness comes to."""
    faults: tuple[str, ...] = ()
    """What the report says that is not so."""


def judged(number: int) -> Judged:
    """Return what became of the table with this number."""
    case = case_of(number)
    readable = not unreadable(case.rows)
    try:
        report = check(Table(case.rows), case.config, most_boxes=MOST_BOXES)
    except TableError:
        return Judged(number, case.fault, readable)
    known = brute(case.rows, case.config)
    loose = tuple(name for name in COUNTED if report.terminates and not report.bound(name).exact)
    faults = (*_too_low(report, known), *_wrong_witnesses(report), *_wrong_lasso(report, case))
    return Judged(
        number, case.fault, readable, report.verdict, known.most is not None, known.cycle is not None, loose, faults
    )


def _too_low(report: Report, known: Brute) -> list[str]:
    if not report.terminates:
        return []
    if known.cycle is not None:
        return ["proved, but a run goes round for ever"]
    return [
        f"{name} come to {most}, more than {bound.at_most}"
        for name, most in known.longest.items()
        if (bound := report.bound(name)).at_most is not None and most > bound.at_most
    ]


def _wrong_witnesses(report: Report) -> list[str]:
    faults = []
    for bound in report.bounds:
        if bound.name not in COUNTED or bound.reached is None:
            continue
        total, run = 0, start(TASK, report.config, report.table)
        for event in bound.witness:
            after = step(run, event)
            total, run = total + tally(run, after)[COUNTED.index(bound.name)], after
        if total != bound.reached:
            faults.append(f"the witness of {bound.name} comes to {total}, not {bound.reached}")
    return faults


def _wrong_lasso(report: Report, case: Case) -> list[str]:
    if report.verdict is not Verdict.REFUTED:
        return []
    if report.lasso is None:
        return ["refuted without a lasso"]
    watch = watched(case.rows, case.config)
    try:
        run = reduce(step, report.lasso.entry, start(TASK, case.config, report.table))
        seen = [visible(run, watch, clipped=True)]
        for _ in range(60):
            run = reduce(step, report.lasso.loop, run)
            seen.append(visible(run, watch, clipped=True))
    except NoRowError:
        return ["the lasso can't be gone round for ever"]
    # Numbers that only rise are clipped where no guard can tell them apart, so some turns may pass until they are there
    recurs = len(set(seen[20:])) == 1
    return [] if recurs and run.state is not DONE else ["guards see a difference each time the lasso is gone round"]


@cache
def some() -> tuple[Judged, ...]:
    return tuple(map(judged, range(SOME)))


def _ending(every: Sequence[Judged]) -> list[Judged]:
    """Those of which all runs end and every guard can be read."""
    return [each for each in every if each.all_end and each.readable]


def _tight(each: Judged) -> bool:
    return each.verdict is Verdict.PROVED and not each.loose


def test_a_number_stands_for_one_table() -> None:
    assert all(
        [row.label for row in case_of(number).rows] == [row.label for row in case_of(number).rows]
        for number in range(len(FAULTS))
    )


def test_nothing_is_claimed_of_a_table_that_brute_force_knows_better() -> None:
    assert [each for each in some() if each.faults] == []


def test_bounds_are_come_to_where_all_runs_end() -> None:
    ending = _ending(some())

    assert sum(map(_tight, ending)) >= 0.95 * len(ending)


def test_a_table_of_which_all_runs_end_is_not_refuted() -> None:
    assert [each for each in some() if each.all_end and each.verdict is Verdict.REFUTED] == []


def test_a_table_with_a_run_that_comes_back_is_never_called_proved() -> None:
    endless = [each for each in some() if each.endless]

    assert len(endless) > 20
    assert [each for each in endless if each.verdict in PROVED] == []


def test_nothing_is_assumed_of_guards_that_can_be_read() -> None:
    assert [each for each in some() if each.readable and each.verdict in OPEN] == []


# The comparison is to be trusted


def _case(fault: str, verdict: Verdict) -> tuple[Case, Report]:
    """The first table with this fault of which the report says so."""
    for number in range(400):
        case = case_of(number)
        if case.fault != fault:
            continue
        try:
            report = check(Table(case.rows), case.config, most_boxes=MOST_BOXES)
        except TableError:
            continue
        if report.verdict is verdict and (report.lasso is not None or report.bound("model_calls").at_most):
            return case, report
    raise AssertionError(f"no table with the fault {fault!r} is {verdict}")


def test_brute_force_finds_a_bound_that_is_too_low() -> None:
    case, report = _case("none", Verdict.PROVED)
    lower = [evolve(each, at_most=0) if each.name == "model_calls" else each for each in report.bounds]

    assert _too_low(report, brute(case.rows, case.config)) == []
    assert _too_low(evolve(report, bounds=tuple(lower)), brute(case.rows, case.config)) != []


def test_brute_force_finds_a_proof_of_a_table_that_goes_round_for_ever() -> None:
    case, report = _case("missing increment", Verdict.REFUTED)

    assert _too_low(evolve(report, verdict=Verdict.PROVED), brute(case.rows, case.config)) != []


def test_a_lasso_that_is_none_is_found() -> None:
    case, report = _case("counter reset", Verdict.REFUTED)
    assert report.lasso is not None
    cut = evolve(report.lasso, loop=(*report.lasso.loop, Interrupted(0.0, cancelled=True)))

    assert _wrong_lasso(report, case) == []
    assert _wrong_lasso(evolve(report, lasso=cut), case) != []


@pytest.mark.slow
def test_nothing_is_claimed_of_ten_thousand_tables_that_brute_force_knows_better() -> None:
    with Pool(2) as pool:
        every = pool.map(judged, range(MANY), chunksize=20)
    print(told(every))

    assert [each for each in every if each.faults] == []
    assert [each for each in every if each.all_end and each.verdict is Verdict.REFUTED] == []
    assert [each for each in every if each.readable and each.verdict in OPEN] == []
    assert sum(map(_tight, _ending(every))) >= 0.95 * len(_ending(every))


def told(every: Sequence[Judged]) -> str:
    """Return what became of tables, by the kind of fault."""
    heads = ("tables", "refused", "refuted", "assumed", "undecided", "proved", "endless", "false", "all end", "tight")
    lines = [f"\n{'fault':<36}" + "".join(f"{head:>10}" for head in heads)]
    for fault in [*sorted({each.fault for each in every}), "all"]:
        group = [each for each in every if fault in ("all", each.fault)]
        verdicts = Counter(each.verdict for each in group)
        ending = _ending(group)
        numbers = (
            len(group),
            verdicts[None],
            verdicts[Verdict.REFUTED],
            verdicts[Verdict.ASSUMED],
            verdicts[Verdict.UNDECIDED],
            sum(verdicts[verdict] for verdict in PROVED),
            sum(each.endless for each in group),
            sum(bool(each.faults) for each in group),
            len(ending),
            sum(map(_tight, ending)),
        )
        lines.append(f"{fault:<36}" + "".join(f"{number:>10,}" for number in numbers))
    lines += [f"{each.number} ({each.fault}): {'; '.join(each.faults)}" for each in every if each.faults][:60]
    slack = [each for each in _ending(every) if not _tight(each)]
    lines += [f"{each.number} ({each.fault}): {each.verdict}, {', '.join(each.loose)}" for each in slack][:60]
    return "\n".join(lines)


# Certificates


@cache
def certified() -> tuple[tuple[Report, dict[str, Any]], ...]:
    """Some tables that are proved, by certificates with something in them."""
    found = []
    for number in range(400):
        case = case_of(number)
        try:
            report = check(Table(case.rows), case.config, most_boxes=MOST_BOXES)
        except TableError:
            continue
        if report.certificate is not None and 10 < len(report.certificate["boxes"]) < 60:
            found.append((report, report.certificate))
        if len(found) == 8:
            break
    return tuple(found)


Tampering = Callable[[random.Random, dict[str, Any]], object]


def _rank_of_a_follower(chance: random.Random, it: dict[str, Any]) -> None:
    box, to = _step(chance, it)
    it["boxes"][box]["rank"] = it["boxes"][to]["rank"]


def _rank_turned_round(_: random.Random, it: dict[str, Any]) -> None:
    for box in it["boxes"]:
        box["rank"] = [-each if isinstance(each, int) else each for each in box["rank"]]


def _step_left_out(chance: random.Random, it: dict[str, Any]) -> None:
    box, to = _step(chance, it)
    it["steps"][box] = [each for each in it["steps"][box] if each[0] != to]


def _box_left_out(chance: random.Random, it: dict[str, Any]) -> None:
    gone = chance.randrange(1, len(it["boxes"]))
    del it["boxes"][gone], it["steps"][gone]
    for number, following in enumerate(it["steps"]):
        it["steps"][number] = [[to - (to > gone), changes] for to, changes in following if to != gone]


def _amount_changed(chance: random.Random, it: dict[str, Any]) -> None:
    changes = [
        changes
        for box, following in enumerate(it["steps"])
        for to, changes in following
        if changes and "reason" not in it["boxes"][to]
    ]
    one = chance.choice(changes)
    name = chance.choice(sorted(one))
    one[name] = [one[name][0], one[name][1] + 1]


def _step_redirected(chance: random.Random, it: dict[str, Any]) -> None:
    box, to = _step(chance, it)
    elsewhere = [at for at, each in enumerate(it["boxes"]) if each["state"] != it["boxes"][to]["state"]]
    there = chance.choice(elsewhere)
    it["steps"][box] = [[there if each == to else each, changes] for each, changes in it["steps"][box]]


def _another_start(chance: random.Random, it: dict[str, Any]) -> None:
    at = chance.randrange(1, len(it["boxes"]))
    it["boxes"][0], it["boxes"][at] = it["boxes"][at], it["boxes"][0]


def _fields_renamed(_: random.Random, it: dict[str, Any]) -> None:
    it["fields"] = [name.replace("ledger.", "counters.") for name in it["fields"]]


def _field_left_out(chance: random.Random, it: dict[str, Any]) -> None:
    at = chance.randrange(len(it["fields"]) - 1)
    name = it["fields"].pop(at)
    for box in it["boxes"]:
        if "fields" in box:
            del box["fields"][at]
        box["rank"] = [each for each in box["rank"] if each != name]
    for following in it["steps"]:
        for _, changes in following:
            changes.pop(name, None)


def _end_widened(chance: random.Random, it: dict[str, Any]) -> None:
    ends = [
        (end, at)
        for box in it["boxes"]
        for at, end in enumerate(box.get("fields", ()))
        if end[1] is not None and it["fields"][at] not in ("charged.tokens", "ledger.seconds")
    ]
    end, _ = chance.choice(ends)
    end[1] = None


def _state_changed(chance: random.Random, it: dict[str, Any]) -> None:
    box = chance.choice([each for each in it["boxes"] if each["state"] in ("Plan", "Repair", "Research")])
    box["state"] = "Summarize"


def _step(chance: random.Random, it: dict[str, Any]) -> tuple[int, int]:
    """A step to a box that is not the end."""
    steps = [
        (box, to)
        for box, following in enumerate(it["steps"])
        for to, _ in following
        if to != box and "reason" not in it["boxes"][to]
    ]
    return chance.choice(steps)


TAMPERINGS: tuple[Tampering, ...] = (
    _rank_of_a_follower,
    _rank_turned_round,
    _step_left_out,
    _box_left_out,
    _amount_changed,
    _step_redirected,
    _another_start,
    _fields_renamed,
    _field_left_out,
    _end_widened,
    _state_changed,
)


def _verdict(certificate: dict[str, Any], report: Report) -> bool:
    """Return whether the verifier accepts; what it can't read at all it does not."""
    try:
        return verify(certificate, report.table, report.config) == []
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return False


def test_every_certificate_is_accepted() -> None:
    assert len(certified()) == 8
    assert [verify(certificate, report.table, report.config) for report, certificate in certified()] == [[]] * 8


@pytest.mark.parametrize("tamper", TAMPERINGS, ids=lambda tamper: tamper.__name__.strip("_"))
def test_a_certificate_that_was_tampered_with_is_not_accepted(tamper: Tampering) -> None:
    accepted = []
    for seed, (report, certificate) in enumerate(certified()):
        forged = copy.deepcopy(certificate)
        tamper(random.Random(seed), forged)
        if forged != certificate and _verdict(forged, report):
            accepted.append(seed)

    assert accepted == []
