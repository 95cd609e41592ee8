"""`assert_policy` passes what keeps its promises, and shows what does not as simply as it can be shown."""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_fsm import TABLE, AgentConfig, StopReason, Table, TableError, add, counter, opaque, put, reset
from agent_fsm.check import Verdict
from agent_fsm.diagrams import dot, mermaid, rows_of
from agent_fsm.guards import ALWAYS
from agent_fsm.ledger import Ledger
from agent_fsm.machine import Run, start, step
from agent_fsm.protocol import (
    DONE,
    PLAN,
    REPAIR,
    SUMMARIZE,
    Event,
    Interrupted,
    ModelFailed,
    ModelReplied,
    Said,
    State,
    ToolsFinished,
    ToolsListed,
)
from agent_fsm.rules import rules_of
from agent_fsm.table import ledger, limits, observe
from agent_fsm.testing import PolicyError, assert_policy
from agent_fsm.testing.failing import table_code
from agent_fsm.testing.strategies import delays, edges_of, events, tables, timings

SMALL = AgentConfig(max_iterations=2, max_tools_per_iter=2, max_model_retries=1)
ONE = AgentConfig(max_iterations=1, max_tools_per_iter=2, max_model_retries=0, closing_summary=False)
UNCAPPED = TABLE.without("iterations at max, closing", "iterations at max")
TASK = ({"role": "user", "content": "x"},)


def failure(*arguments: Any, **named: Any) -> PolicyError:
    """The failure of a policy that must not pass."""
    with pytest.raises(PolicyError) as caught:
        assert_policy(*arguments, **named)
    return caught.value


def block(error: PolicyError, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)\n```", str(error), re.DOTALL)
    assert found is not None
    return found[1]


def ran(error: PolicyError) -> dict[str, Any]:
    """The names that the program in the message leaves behind; it must run as printed."""
    names: dict[str, Any] = {}
    exec(compile(block(error, "python"), "pasted", "exec"), names)
    return names


# What passes


def test_more_calls_of_one_tool_than_are_allowed_are_shown_by_the_shortest_run() -> None:
    table = TABLE.stopping(ledger.calls_of("exec_shell") >= 2, StopReason.BUDGET, closing=False)
    config = evolve(SMALL, max_tools_per_iter=1)

    report = assert_policy(table, config, at_most={"calls_of_exec_shell": 2}, examples=20)
    error = failure(table, config, at_most={"calls_of_exec_shell": 1})

    assert report.bound("calls_of_exec_shell").exact
    assert error.what == "a run comes to 2 calls_of_exec_shell, of which at most 1 are allowed"
    assert len(error.events) == 5  # the listing, and two calls with their results


def test_the_table_that_ships_passes_and_its_proof_is_returned() -> None:
    report = assert_policy(limits=SMALL, at_most={"model_calls": 5, "tool_calls": 4, "seconds": 120}, examples=50)

    assert report.verdict is Verdict.PROVED
    assert report.bound("model_calls").at_most == 5


def test_an_invariant_sees_every_step_of_the_worst_runs_and_of_the_random_ones() -> None:
    seen: Counter[tuple[State, type[Event]]] = Counter()

    def sees(before: Run, event: Event, after: Run) -> None:
        seen[before.state, type(event)] += 1
        assert after == step(before, event)

    assert_policy(limits=AgentConfig(max_iterations=3), invariants=[sees], examples=25)

    asking = {(state, event) for state in (PLAN, REPAIR) for event in (ModelReplied, ModelFailed)}
    others = {(PLAN, ToolsListed), (PLAN, Interrupted), (State.CALL_TOOLS, ToolsFinished), (SUMMARIZE, ModelReplied)}
    assert asking | others <= set(seen)
    assert seen[State.CALL_TOOLS, ToolsFinished] > 60


def test_without_random_runs_hypothesis_is_not_needed_and_with_them_the_error_says_so() -> None:
    code = """
import sys
sys.modules["hypothesis"] = None
from agent_fsm import AgentConfig
from agent_fsm.testing import assert_policy
config = AgentConfig(max_iterations=1)
assert_policy(limits=config, examples=0)
try:
    assert_policy(limits=config)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert "pip install hypothesis, or pass examples=0" in done.stdout


# What fails


def test_a_table_without_its_cap_fails_with_the_loop_it_can_take() -> None:
    error = failure(UNCAPPED, SMALL)
    names = ran(error)

    assert str(error).startswith("not every run ends")
    assert names["table"] == UNCAPPED
    assert names["runs"][-1].state is not DONE
    assert len(names["runs"]) == 1 + len(error.events) + 3 * len(error.loop)


def test_a_counter_that_is_set_back_fails() -> None:
    summary = TABLE.row("summary due")
    forgetful = TABLE.replaced(summary, evolve(summary, updates=(*summary.updates, reset("iterations"))))
    error = failure(forgetful, AgentConfig(max_iterations=3, summarize_every=1))

    assert error.loop
    assert ran(error)["table"] == forgetful
    assert '"turns", 0), add("summaries", 1), put("iterations", 0)' in block(error, "python").replace("'", '"')


def test_a_bound_that_is_exceeded_fails_with_the_fewest_events_that_exceed_it() -> None:
    error = failure(TABLE, SMALL, at_most={"tool_calls": 3})

    assert error.what == "a run comes to 4 tool_calls, of which at most 3 are allowed"
    assert [type(event) for event in error.events] == [
        ToolsListed,
        *(ModelReplied, ToolsFinished),
        *(ModelReplied, ToolsFinished),
    ]
    assert ran(error)["runs"][-1].ledger.tool_calls == 4


def test_a_bound_that_can_only_be_proved_higher_fails_and_says_so() -> None:
    error = failure(
        TABLE, evolve(SMALL, prompt_usd_per_token=1e-6, reply_usd_per_token=1e-6), at_most={"cost_usd": 0.01}
    )

    assert "at most 0.01 cost_usd are allowed, but only 0.5 can be proved" in error.what


def test_a_bound_nobody_knows_is_an_error_of_the_caller() -> None:
    with pytest.raises(ValueError, match=r"no bound on hopes; there are bounds on steps, iterations"):
        assert_policy(TABLE, SMALL, at_most={"hopes": 1}, examples=0)


def moody(ledger: Ledger) -> bool:
    return ledger.iterations >= 2


def test_an_opaque_guard_on_which_the_end_depends_fails() -> None:
    error = failure(UNCAPPED.stopping(opaque(moody), StopReason.BUDGET), SMALL)

    assert "assumed" in error.what
    assert "moody" in error.what
    assert "check" in ran(error)


def test_an_opaque_guard_on_which_no_end_depends_passes() -> None:
    report = assert_policy(TABLE.stopping(opaque(moody), StopReason.BUDGET), SMALL, examples=20)

    assert report.verdict is Verdict.PROVED_WHATEVER


def never_stale_after_a_long_wait(before: Run, event: Event, after: Run) -> bool:
    """Broken only by a payload that no worst run of the check has: nothing new, a while into the run."""
    return not (isinstance(event, ToolsFinished) and not event.fresh and event.now > 0)


@pytest.fixture(scope="module")
def rare() -> PolicyError:
    """The failure of an invariant that only a rare payload breaks."""
    return failure(TABLE, ONE, invariants=[never_stale_after_a_long_wait], examples=200)


def test_an_invariant_broken_by_a_rare_payload_fails_with_the_least_that_breaks_it(rare: PolicyError) -> None:
    error, names = rare, ran(rare)

    assert error.what == "the invariant never_stale_after_a_long_wait does not hold: False"
    assert [type(event) for event in error.events] == [ToolsListed, ModelReplied, ToolsFinished]
    assert names["events"] == list(error.events)
    assert names["never_stale_after_a_long_wait"] is never_stale_after_a_long_wait


def test_an_invariant_may_assert_and_may_be_of_no_module() -> None:
    def frugal(before: Run, event: Event, after: Run) -> None:
        assert after.ledger.model_calls < 3, "three calls are dear"

    error = failure(TABLE, SMALL, invariants=[frugal])

    assert "the invariant frugal does not hold: AssertionError: three calls are dear" in error.what
    assert [type(event) for event in error.events[:1]] == [ToolsListed]
    assert len(error.events) == 4  # the tools, and three requests that fail or say nothing
    assert "# frugal(before, events[-1], after)  # raises" in block(error, "python")
    assert ran(error)["after"].ledger.model_calls == 3


def test_the_message_is_the_same_every_time(rare: PolicyError) -> None:
    again = failure(TABLE, ONE, invariants=[never_stale_after_a_long_wait], examples=200)

    assert str(again) == str(rare)


def test_another_seed_finds_it_too() -> None:
    error = failure(TABLE, ONE, invariants=[never_stale_after_a_long_wait], examples=200, seed=7)

    assert len(error.events) == 3


def test_the_diagram_in_the_message_marks_the_path() -> None:
    error = failure(TABLE, SMALL, at_most={"tool_calls": 3})
    drawn = block(error, "mermaid") + "\n"
    taken = rows_of(error.events, TABLE, SMALL)

    assert drawn == mermaid(TABLE, path=taken)
    assert "<b>ToolsFinished #9664; steps 3, 5</b>" in drawn
    assert "style CallTools fill:#dcfce7,stroke:#15803d,color:#111827,stroke-width:4px" in drawn
    assert "style Research fill:#ffffff,stroke:#d1d5db,color:#9ca3af" in drawn


# The path in diagrams


def test_each_row_taken_is_marked_with_its_steps_and_no_other() -> None:
    happened: list[Event] = [ToolsListed(0.0), *(ModelReplied(0.0, Said.EMPTY),) * 2, Interrupted(1.0, cancelled=True)]
    path = rows_of(happened, TABLE, AgentConfig())
    text = dot(TABLE, path=path)

    assert [row.label for row in path if not row.events] == ["always", "failed", "failed", "cancelled"]
    assert set(re.findall(r"(?:\\l|\")(\d+ [^\"\\]*?) ◀ (steps? [\d, ]+)", text)) == {
        ("25 always", "step 1"),
        ("23 failed", "steps 2, 3"),
        ("1 cancelled [cancelled]", "step 4"),
    }


def test_arrows_are_marked_only_from_the_states_that_the_path_leaves() -> None:
    path = rows_of([ToolsListed(0.0), ModelReplied(0.0, Said.EMPTY)], TABLE, AgentConfig())
    text = dot(TABLE, path=path)

    marked = {tuple(pair) for pair in re.findall(r"(\w+) -> (\w+) \[.*penwidth=3", text)}
    assert {one for one, _ in marked if not one.startswith("card")} == {"Plan", "Observe"}


def test_a_row_taken_often_is_told_by_how_often() -> None:
    failed: list[Event] = [ToolsListed(0.0), *(ModelReplied(0.0, Said.EMPTY),) * 5]
    text = mermaid(TABLE, path=rows_of(failed, TABLE, AgentConfig(max_consecutive_failures=9)))

    assert "23 failed #9664; steps 2, 3, 4 .. 6 #40;5 times#41;</b>" in text


@pytest.mark.parametrize("path", [(observe(ALWAYS, PLAN),), (TABLE[-1],)], ids=["foreign row", "wrong state"])
def test_a_path_that_is_none_is_refused(path: Any) -> None:
    with pytest.raises(TableError, match="of the path"):
        mermaid(TABLE, path=path)


# Tables as code

POLICIES: list[Table] = [
    TABLE,
    UNCAPPED,
    TABLE.stopping(counter("own") >= 3, StopReason.BUDGET),
    TABLE.stopping(ledger.calls_of("run") > limits.max_iterations, StopReason.BUDGET, name="runs", closing=False),
    TABLE.guarded("failed", lambda old: (old & ~(ledger.failures > 1) | ledger.research_tools.is_(True)).named("x")),
    TABLE.before("failed", observe(ledger.said.is_(Said.EMPTY), PLAN, add(counter("own"), 2), put("hops", 1))),
    TABLE.stopping(opaque(moody), StopReason.BUDGET),
]


@pytest.mark.parametrize("table", POLICIES)
def test_a_table_is_written_as_code_that_makes_it(table: Table) -> None:
    assert written_again(table) == table


def written_again(table: Table) -> Any:
    written, needed = table_code(table)
    imports = "\n".join(f"from {module} import {name}" for name, module in needed.items())
    names: dict[str, Any] = {}
    exec(f"{imports}\ntable = {written}", names)
    return names["table"]


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(tables())
def test_drawn_policies_can_be_run_and_written_as_code(table: Table) -> None:
    assert rules_of(table).waiting
    assert written_again(table) == table


# The strategies


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_policy_can_be_told_any_drawn_event(data: st.DataObject) -> None:
    table = data.draw(tables())
    edges = edges_of(table, SMALL)
    run = start(TASK, SMALL, table)
    for _ in range(12):
        if run.state is DONE:
            break
        after = step(run, data.draw(events(run, SMALL, edges=edges)))
        assert after.ledger.seconds >= run.ledger.seconds
        run = after


def drawn(strategy: st.SearchStrategy[Any], find: Callable[[Any], bool]) -> bool:
    """Whether *strategy* draws anything like that."""
    found = False

    @settings(max_examples=400, deadline=None, derandomize=True, database=None)
    @given(strategy)
    def look(value: Any) -> None:
        nonlocal found
        found = found or find(value)

    look()
    return found


@pytest.mark.parametrize("find", [lambda s: s == 30.0, lambda s: 29 < s < 30, lambda s: 30 < s < 31, lambda s: s > 120])
def test_delays_are_at_before_and_past_what_stops_an_effect(find: Callable[[float], bool]) -> None:
    assert drawn(delays(AgentConfig()), find)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(timings(looks=8))
def test_times_never_fall(times: list[float]) -> None:
    assert len(times) == 8
    assert times == sorted(times)
