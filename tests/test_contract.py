"""What a check proved is kept as a contract: a file that reads back, diffs small, and says what broke it, and why."""

import re
from collections.abc import Callable
from difflib import unified_diff
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_fsm.check import Bound, Report, Verdict, check
from agent_fsm.check.code import code, short
from agent_fsm.check.contract import Change, changes, contract_of, read_contract
from agent_fsm.check.explore import COUNTS
from agent_fsm.check.program import program
from agent_fsm.check.report import number_text
from agent_fsm.check.witness import Lasso
from agent_fsm.config import AgentConfig
from agent_fsm.errors import ContractError
from agent_fsm.guards import ledger, opaque
from agent_fsm.ledger import Ledger
from agent_fsm.protocol import Interrupted, ModelReplied, Said, StopReason, ToolCall, ToolsFinished, ToolsListed
from agent_fsm.table import TABLE, Table

KEPT = Path(__file__).parent / "data" / "contract.toml"
ENDLESS = TABLE.without("iterations at max, closing", "iterations at max")
STRICTER = TABLE.stopping((ledger.calls_of("exec_shell") >= 3).named("three shells"), StopReason.BUDGET)


def moody(ledger: Ledger) -> bool:
    return ledger.iterations >= 3


DEFAULTS = {"max_iterations": AgentConfig().max_iterations}


@cache
def report(table: Table = TABLE, **limits: Any) -> Report:
    return check(table, AgentConfig(**{"max_iterations": 2} | limits))


def broken(before: Report, after: Report) -> list[Change]:
    """What *after* breaks of the contract of *before*."""
    return [change for change in changes(read_contract(contract_of(before)), after) if change.broken]


def told(before: Report, after: Report) -> list[str]:
    """What else is different."""
    return [change.told for change in changes(read_contract(contract_of(before)), after) if not change.broken]


def with_bound(name: str, at_most: float | None) -> Report:
    """A report in which one bound is another."""
    bounds = [evolve(each, at_most=at_most) if each.name == name else each for each in report().bounds]
    return evolve(report(), bounds=tuple(bounds))


# Our own policy


def test_the_shipped_policy_keeps_its_contract() -> None:
    contract = read_contract(KEPT.read_text(encoding="utf-8"))

    assert [str(change) for change in changes(contract, report(**DEFAULTS))] == []


def test_the_contract_of_the_shipped_policy_is_the_one_that_is_written() -> None:
    assert contract_of(report(**DEFAULTS)) == KEPT.read_text(encoding="utf-8")


# The file


def test_another_limit_changes_its_own_line_and_those_of_the_bounds() -> None:
    before, after = (contract_of(report(max_model_retries=retries)) for retries in (1, 2))

    lines = [line for line in unified_diff(before.splitlines(), after.splitlines(), n=0) if re.match(r"[+-]\w", line)]

    assert lines == [
        *("-steps = 8", "+steps = 10", "-model_calls = 5", "+model_calls = 7"),
        *("-max_model_retries = 1", "+max_model_retries = 2"),
    ]


def test_another_row_is_another_line() -> None:
    before, after = contract_of(report()), contract_of(evolve(report(), table=STRICTER))

    lines = [line for line in unified_diff(before.splitlines(), after.splitlines(), n=0) if re.match(r"[+-] +", line)]

    assert lines == [
        '+    "Observe: three shells, closing (three shells and closing fits) -> Summarize, ending = budget",',
        '+    "Observe: three shells -> Done, because budget",',
    ]
    assert '"three shells" = "calls of exec_shell >= 3"' in after


def test_there_are_no_witnesses_in_it() -> None:
    text = contract_of(report())

    assert len(text) < 8_000
    assert "ToolCall(" not in text


def test_it_reads_back_as_what_was_written() -> None:
    contract = read_contract(contract_of(report()))

    assert contract.verdict is Verdict.PROVED
    assert contract.reasons == report().reasons
    assert contract.bounds == {bound.name: bound.at_most for bound in report().bounds}
    assert contract.limits["summarize_every"] is None
    assert contract.limits["closing_summary"] is True
    assert len(contract.rows) == len(TABLE)
    assert contract.questions["over budget"].startswith("tokens_needed > max_tokens_total or ")


@settings(max_examples=10, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "max_iterations": st.integers(1, 2),
            "max_wallclock_seconds": st.floats(0.001, 1e6),
            "max_tools_per_iter": st.integers(1, 3),
            "stagnation_window": st.integers(1, 3),
            "enable_repair": st.booleans(),
            "research_on_unsure": st.booleans(),
            "max_research_hops": st.integers(0, 2),
            "max_consecutive_failures": st.integers(1, 3),
            "summarize_every": st.none() | st.integers(1, 3),
            "closing_summary": st.booleans(),
            "max_model_retries": st.integers(0, 2),
            "max_tokens_total": st.integers(100_000, 10**9),
            "prompt_usd_per_token": st.none() | st.floats(0, 1e-3),
            "reply_usd_per_token": st.floats(0, 1e-3),
        }
    )
)
def test_under_any_limits_a_policy_keeps_its_own_contract(limits: dict[str, Any]) -> None:
    found = check(TABLE, AgentConfig(**limits))

    text = contract_of(found)

    assert changes(read_contract(text), found) == []
    assert contract_of(found) == text


@given(st.text(min_size=1), st.lists(st.text()))
def test_whatever_guards_are_called_they_read_back(name: str, names: list[str]) -> None:
    table = TABLE.guarded("stagnated", lambda old: old.named(name)).replaced("always", evolve(TABLE[-1], name=name))
    found = evolve(report(), table=table, guards=tuple(names), verdict=Verdict.PROVED_WHATEVER)

    assert changes(read_contract(contract_of(found)), found) == []


MALFORMED: list[tuple[Callable[[str], str], str]] = [
    (lambda text: text.replace('verdict = "proved"', "verdict = proved"), "this is not valid TOML: Invalid value (at "),
    (lambda text: text.replace("steps = 10", "steps = 10\nsteps = 11"), "this is not valid TOML: "),
    (lambda text: text.replace('"proved"', '"prooved"'), "verdict: 'prooved' is none of proved, "),
    (lambda text: text.replace("verdict =", "verdikt ="), "verdikt is not a key of a contract; the nearest is verdict"),
    (lambda text: text.replace('verdict = "proved"', ""), "verdict is missing: without it nothing is promised"),
    (lambda text: text.replace("[bounds]", "[bond]"), "bond is not a key of a contract; "),
    (lambda text: text.replace("steps =", "step ="), "bounds.step is not a key of a contract; the nearest is steps"),
    (lambda text: text.replace("steps = 10", "steps = true"), "bounds.steps must be a number >= 0 or"),
    (lambda text: text.replace("steps = 10", "steps = -1"), "bounds.steps must be a number >= 0 or"),
    (lambda text: text.replace("steps = 10", "steps = nan"), "bounds.steps must be a number >= 0 or"),
    (lambda text: text.replace("steps = 10", "steps = inf"), "bounds.steps must be a number >= 0 or"),
    (
        lambda text: text.replace("steps = 10", 'steps = "10"'),
        "bounds.steps must be a number >= 0 or \"none\", not '10'",
    ),
    (lambda text: text.replace('"budget"', '"bugdet"'), "reasons: 'bugdet' is none of success, "),
    (lambda text: text.replace("guards = []", "guards = 3"), "guards must be text in quotes, "),
    (lambda text: text.replace("guards = []", "guards = [3]"), "guards must be text in quotes, "),
    (lambda text: text.replace("guards = []", "limits = 3").replace("[limits]", "[other]"), "other is not a key"),
    (
        lambda text: text.replace("max_iterations = 2", "max_iterations = 0"),
        "limits.max_iterations must be a whole number >= 1, not 0",
    ),
    (lambda text: text.replace("max_iterations = 2", "iterations = 2"), "limits.iterations is not a key of a contract"),
    (lambda text: text.replace('answered = "', 'answered = 1 # "'), "policy.questions.answered must be text in quotes"),
    (lambda text: "bounds = 1\nreasons = []\nverdict = 'proved'\n", "bounds must be a table, [bounds], not 1"),
]


@pytest.mark.parametrize(("spoilt", "message"), MALFORMED)
def test_a_file_that_can_not_be_read_is_told_with_what_is_wrong(spoilt: Callable[[str], str], message: str) -> None:
    good = contract_of(report())
    assert spoilt(good) != good

    with pytest.raises(ContractError, match="^" + re.escape(message)):
        read_contract(spoilt(good))


def test_a_contract_may_promise_less() -> None:
    contract = read_contract('verdict = "proved"\nreasons = []\n[bounds]\nmodel_calls = 7\n')

    assert [change for change in changes(contract, report()) if change.broken] == []
    assert [change.promise for change in changes(contract, report(max_iterations=3)) if change.broken] == [
        "model_calls"
    ]


# What breaks it


@pytest.mark.parametrize("name", [*COUNTS, "seconds", "tokens"])
def test_a_bound_may_be_as_much_or_less_but_no_more(name: str) -> None:
    most = report().bound(name).at_most
    assert most is not None

    assert broken(report(), with_bound(name, most)) == []
    assert broken(report(), with_bound(name, most - 1)) == []
    assert f"{name} fell from {most:.0f} to {most - 1:.0f}" in told(report(), with_bound(name, most - 1))
    assert [each.promise for each in broken(report(), with_bound(name, most + 1))] == [name]


def test_seconds_are_compared_exactly() -> None:
    assert broken(with_bound("seconds", 0.1), with_bound("seconds", 0.1)) == []
    assert broken(with_bound("seconds", 0.3), with_bound("seconds", 0.1 + 0.2)) != []


def test_a_bound_that_grew_is_told_with_the_limit_that_changed() -> None:
    changed = broken(report(), report(summarize_every=1))

    assert [str(change) for change in changed if change.promise == "model_calls"] == [
        "model_calls grew from 7 to 8: summarize_every was none, is 1"
    ]


def test_a_bound_that_grew_is_told_with_the_row_that_changed() -> None:
    without = TABLE.guarded("retry", lambda old: old & (ledger.attempts < 1))

    changed = broken(report(without), report())

    assert {change.promise for change in changed} == {"steps", "model_calls"}
    assert any("(may retry and asking is Plan) -> Plan" in each for each in changed[0].why)


def test_what_a_guard_asks_is_told_where_its_name_stays() -> None:
    later = TABLE.guarded("summary due", (ledger.turns >= 4).named("summary due"))

    assert told(report(), report(later))[0] == "summary due asked turns >= summarize_every, asks turns >= 4"


def test_a_row_in_another_place_is_told_as_moved() -> None:
    moved = evolve(report(), table=TABLE.without("stagnated").before("always", TABLE.row("stagnated")))

    assert told(report(), moved) == [
        "the row moved: Observe: stagnated -> Repair, iterations + 1, turns + 1, nudges + 1"
    ]


def test_a_bound_that_vanished_breaks_it_and_one_that_came_does_not() -> None:
    without = evolve(report(), bounds=tuple(each for each in report().bounds if each.name != "tokens"))

    for after in (with_bound("tokens", None), without):
        assert [each.told for each in broken(report(), after)] == [
            "tokens was at most 500000 and has no bound any more"
        ]
        assert broken(after, report()) == []
    assert broken(with_bound("tokens", None), with_bound("tokens", None)) == []


def test_a_reason_that_vanished_breaks_it_and_one_that_came_does_not() -> None:
    fewer = evolve(report(), reasons=tuple(each for each in report().reasons if each is not StopReason.CANCELLED))

    assert [each.told for each in broken(report(), fewer)] == ["no run can end for cancelled any more"]
    assert broken(fewer, report()) == []
    assert told(fewer, report()) == ["runs can now also end for cancelled"]


STRENGTHS = [Verdict.REFUTED, Verdict.UNDECIDED, Verdict.ASSUMED, Verdict.PROVED]


@pytest.mark.parametrize("old", STRENGTHS)
@pytest.mark.parametrize("new", STRENGTHS)
def test_a_weaker_verdict_breaks_it_and_one_as_strong_does_not(old: Verdict, new: Verdict) -> None:
    before, after = evolve(report(), verdict=old), evolve(report(), verdict=new)

    assert bool(broken(before, after)) is (STRENGTHS.index(new) < STRENGTHS.index(old))


def test_a_policy_that_no_longer_ends_is_one_broken_promise() -> None:
    changed = broken(report(), report(ENDLESS))

    assert [each.told for each in changed] == [
        "that every run ends was proved and is only refuted, so no bound holds any more"
    ]
    assert changed[0].why == (
        "the row is gone: Observe: iterations at max, closing (iterations at max and closing fits)"
        " -> Summarize, ending = max_iterations",
        "the row is gone: Observe: iterations at max -> Done, because max_iterations",
    )


def test_a_guard_that_can_not_be_read_breaks_it_if_it_is_new() -> None:
    with_moody = report(TABLE.stopping(opaque(moody), StopReason.BUDGET))
    assert with_moody.guards == ("moody",)

    assert [each.told for each in broken(report(), with_moody)] == ["the guard moody can't be read and is new"]
    assert broken(with_moody, with_moody) == []
    assert broken(with_moody, report()) == []


def test_where_the_policy_is_as_it_was_that_is_said() -> None:
    (change,) = broken(with_bound("steps", 9), report())

    assert str(change).startswith("steps grew from 9 to 10: though limits and rows are as they were")


# The report


def test_a_report_says_the_verdict_first_and_fits_80_columns() -> None:
    for found in (report(), report(ENDLESS), report(TABLE.stopping(opaque(moody), StopReason.BUDGET))):
        lines = str(found).splitlines()

        assert lines[0].startswith("every run ends    ")
        assert max(map(len, lines)) <= 80


def test_a_bound_is_told_as_exact_or_with_the_run_that_is_known() -> None:
    bounds = (
        Bound("steps", 1_234, 1_234, note="a note"),
        Bound("tool_calls", 12.5, 11.25),
        Bound("seconds", 3, None, note="a note"),
        Bound("tokens", None, None, note="another"),
    )

    assert str(evolve(report(), bounds=bounds)).split("\n\n")[1].splitlines() == [
        "at worst a run comes to",
        "  steps           exactly   1,234  [1]",
        "  tool_calls      at most    12.5       a run of 11.25 is known",
        "  seconds         at most       3  [1]  no run of it is known",
        "  tokens          no bound   none  [2]",
        "  [1] a note",
        "  [2] another",
    ]


@pytest.mark.parametrize(
    ("value", "up", "down"),
    [
        (7, "7", "7"),
        (1e6, "1,000,000", "1,000,000"),
        (0.07, "0.07", "0.07"),
        (0.00001, "0.0001", "0"),
        (10.5, "10.5", "10.5"),
    ],
)
def test_what_is_at_most_so_much_is_rounded_up(value: float, up: str, down: str) -> None:
    assert (number_text(value), number_text(value, up=False)) == (up, down)


def test_the_steps_of_a_lasso_are_numbered_through() -> None:
    lasso = Lasso((ToolsListed(0.0),), (ModelReplied(0.0, Said.EMPTY), ToolsFinished(1.0, (), fresh=False, stale=2)))

    told = str(evolve(report(), bounds=(), lasso=lasso)).split("\n\n")[1]

    assert told.splitlines() == [
        "gets in by",
        "    1  ToolsListed",
        "goes round by",
        "    2  ModelReplied: said empty",
        "    3  ToolsFinished: succeeded, nothing new, 2 in a row at 1 s",
        "       and again from 2 on, for ever",
    ]


def test_why_every_run_ends_is_a_sentence() -> None:
    assert report(max_iterations=1).why == "no run goes round at all"
    assert report(**DEFAULTS).why == "every way round raises iterations, and no run can raise that for ever"


# Programs


@pytest.mark.parametrize("name", [*COUNTS, "seconds", "tokens"])
def test_the_program_of_a_bound_runs_and_comes_to_it(name: str) -> None:
    found = report(max_model_retries=1)
    names: dict[str, Any] = {}

    exec(program(found, name, ("agent_fsm", "TABLE")), names)  # it is what people are to paste

    assert tuple(names["events"]) == found.bound(name).witness
    assert names["config"] == found.config
    assert f">= {found.bound(name).at_most:.0f}\n" in program(found, name, ("agent_fsm", "TABLE"))


COUNTS_SHELLS = TABLE.stopping(ledger.calls_of("exec_shell") >= 2, StopReason.BUDGET, closing=False)


@pytest.mark.slow
def test_the_program_of_the_calls_of_one_tool_runs_and_comes_to_them() -> None:
    found = check(COUNTS_SHELLS, AgentConfig(max_iterations=3, max_tools_per_iter=1))

    text = program(found, "calls_of_exec_shell", ("tests.test_contract", "COUNTS_SHELLS"))
    exec(text, {})  # as above

    assert ">= 2\n" in text


def test_calls_of_one_tool_are_kept_by_a_contract_and_may_not_grow() -> None:
    kept = read_contract(contract_of(check(COUNTS_SHELLS, AgentConfig(max_iterations=3, max_tools_per_iter=1))))

    now = check(COUNTS_SHELLS, AgentConfig(max_iterations=3, max_tools_per_iter=2))

    assert kept.bounds["calls_of_exec_shell"] == 2
    assert [(each.told, each.broken) for each in changes(kept, now) if each.promise == "calls_of_exec_shell"] == [
        ("calls_of_exec_shell grew from 2 to 3", True)
    ]


def test_a_program_that_claims_too_much_fails() -> None:
    text = program(report(), "model_calls", ("agent_fsm", "TABLE"))

    with pytest.raises(AssertionError):
        exec(text.replace(">= 7", ">= 8"), {})  # as above


def test_the_program_of_a_lasso_goes_round_and_is_not_done() -> None:
    names: dict[str, Any] = {}

    exec(program(report(ENDLESS), "lasso", (__name__, "ENDLESS")), names)  # as above

    lasso = report(ENDLESS).lasso
    assert lasso is not None
    assert (tuple(names["entry"]), tuple(names["loop"])) == (lasso.entry, lasso.loop)


@pytest.mark.parametrize(
    "value",
    [
        (),
        (1,),
        [],
        {"a": [{}, None, True], 'it\'s "quoted"': "it's"},
        ToolCall("a", "b" * 200, "{}"),
        (Said.CALLS, StopReason.BUDGET, 0.1, "\n"),
        [["x" * 60, ("y" * 60,)]],
    ],
)
def test_a_value_is_what_its_expression_makes(value: object) -> None:
    known = {"Said": Said, "StopReason": StopReason, "ToolCall": ToolCall}

    assert eval(code(value), known) == value  # as above


def test_one_call_is_told_as_one() -> None:
    calls = (ToolCall("1", "a", "{}"), ToolCall("2", "b", "{}"))

    assert short(ModelReplied(0.0, Said.CALLS, calls=calls[:1])) == "ModelReplied: asks for 1 call"
    assert short(ModelReplied(0.0, Said.CALLS, calls=calls)) == "ModelReplied: asks for 2 calls"
    assert short(Interrupted(2.5, cancelled=True)) == "Interrupted: cancelled at 2.5 s"
