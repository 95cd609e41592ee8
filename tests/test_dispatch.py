"""The machine is the definition: what runs is its compiled form, and the two take the same row, always."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
from attrs import evolve, fields
from hypothesis import given, settings
from hypothesis import strategies as st
from transitions import Machine, MachineError, Transition
from transitions.core import State as MachineState

from agent_fsm import table
from agent_fsm.config import AgentConfig, Limits
from agent_fsm.errors import NoRowError, TableError
from agent_fsm.guards import ALWAYS, ledger
from agent_fsm.ledger import Ledger, clone
from agent_fsm.machine import Run, start, step
from agent_fsm.protocol import (
    CALL_TOOLS,
    DONE,
    OBSERVE,
    PLAN,
    REPAIR,
    Ended,
    Event,
    Interrupted,
    ModelFailed,
    ModelReplied,
    Said,
    State,
    StopReason,
    ToolsFinished,
    ToolsListed,
    ToolsUnavailable,
)
from agent_fsm.rules import (
    OBSERVED,
    RowTransition,
    Rules,
    build_machine,
    compile_machine,
    rules_of,
    trigger_of,
)
from agent_fsm.table import TABLE, Row, Update, add, observe, put

EVENTS: tuple[type[Event], ...] = (
    ToolsListed,
    ToolsUnavailable,
    ModelReplied,
    ModelFailed,
    ToolsFinished,
    Interrupted,
)

few = st.integers(0, 9)
amounts = st.sampled_from([0, 1, 499_999, 500_000, 500_001])
dollars = st.sampled_from([0.0, 0.5, 1.0, 1.5])
times = st.sampled_from([0.0, 119.9, 120.0, 120.1])
VALUES: Mapping[str, st.SearchStrategy[Any]] = {
    "seconds": times,
    "retry_at": times,
    "said": st.sampled_from(Said),
    "ended": st.sampled_from(Ended),
    "asking": st.sampled_from(State),
    "ending": st.none() | st.sampled_from(StopReason),
    "research_tools": st.booleans(),
    "counters": st.dictionaries(st.sampled_from(["searches", "dear"]), few),
    "calls": st.dictionaries(st.sampled_from(["exec_shell", "look"]), few),
    **dict.fromkeys(("tokens", "request_tokens", "tokens_needed", "closing_tokens_needed"), amounts),
    **dict.fromkeys(("cost_usd", "request_cost_usd", "cost_needed_usd", "closing_cost_needed_usd"), dollars),
}
"""What the fields of a ledger can hold, near the limits; those not named here count from 0 to 9."""

all_limits = st.builds(
    Limits,
    max_iterations=st.integers(1, 8),
    stagnation_window=st.integers(1, 4),
    enable_repair=st.booleans(),
    research_on_unsure=st.booleans(),
    max_research_hops=st.integers(0, 3),
    research_after_failures=st.booleans(),
    max_failures_before_research=st.integers(1, 4),
    max_consecutive_failures=st.integers(1, 6),
    summarize_every=st.none() | st.integers(1, 9),
    closing_summary=st.booleans(),
    max_model_retries=st.integers(0, 3),
    max_cost_usd=st.none() | st.just(1.0),
)
ledgers = st.builds(
    Ledger, all_limits, **{each.name: VALUES.get(each.name, few) for each in fields(Ledger) if each.name != "limits"}
)


# Stock dispatch


class Model:
    """What stock dispatch moves."""

    state: str
    trigger: Callable[..., bool]


def stock_machine() -> tuple[Machine, Model, list[Row]]:
    """Return the stock machine of the table, a model in it, and a list to which each row taken is added."""
    machine, model, taken = build_machine(TABLE), Model(), list[Row]()
    for event in machine.events.values():
        for block in event.transitions.values():
            for transition in block:
                assert isinstance(transition, RowTransition)
                transition.add_callback("after", partial(lambda row, _: taken.append(row), transition.row))
    machine.add_model(model, initial=PLAN.value)
    return machine, model, taken


MACHINE, MODEL, TAKEN = stock_machine()


def stock(state: State, event: type[Event] | None, held: Ledger) -> tuple[State, Row] | None:
    """Return where stock dispatch goes and by which row; None if it refuses."""
    TAKEN.clear()
    MACHINE.set_state(state.value, MODEL)
    try:
        assert MODEL.trigger(trigger_of(event), held) is True
    except MachineError:
        return None
    (row,) = TAKEN
    return State(MODEL.state), row


def compiled(state: State, event: type[Event] | None, held: Ledger) -> tuple[State, Row] | None:
    """Return where the compiled form goes and by which row, having made the row's updates; None if it refuses."""
    rules = rules_of(TABLE)
    take = rules.observe if event is None else rules.waiting.get(state, {}).get(event)
    row = None if take is None else take(held)
    return None if row is None else (row.target, row)


def updated(held: Ledger, updates: tuple[Update, ...]) -> Ledger:
    """Return *held* with *updates* made by hand."""
    new = clone(held)
    for update in updates:
        old = new.counters.get(update.counter, 0) if update.own else getattr(new, update.counter)
        value: Any = update.value
        if update.verb == "add":
            value += old
        if update.own:
            new.counters = {**new.counters, update.counter: value}
        else:
            setattr(new, update.counter, value)
    return new


@settings(max_examples=300)
@given(ledgers)
def test_stock_and_compiled_dispatch_take_the_same_row_of_observe_and_make_its_updates(held: Ledger) -> None:
    expected = stock(OBSERVE, None, held)
    before = clone(held)

    assert compiled(OBSERVE, None, held) == expected
    assert expected is not None
    assert expected[1] is next(row for row in TABLE if OBSERVE in row.sources and row.guard(before))
    assert held == updated(before, expected[1].updates)


@given(ledgers, st.sampled_from([state for state in State if state is not OBSERVE]), st.sampled_from(EVENTS))
def test_stock_and_compiled_dispatch_take_the_same_row_wherever_a_run_waits(
    held: Ledger, state: State, event: type[Event]
) -> None:
    expected = stock(state, event, held)
    before = clone(held)

    assert compiled(state, event, held) == expected
    assert held == (before if expected is None else updated(before, expected[1].updates))


def test_every_state_and_event_is_the_same_block_of_rows_in_both() -> None:
    rules = rules_of(TABLE)
    blocks = {(source, name) for name, event in rules.machine.events.items() for source in event.transitions}
    compiled_blocks = {(source.value, event.__name__) for source, takes in rules.waiting.items() for event in takes}

    assert blocks == {*compiled_blocks, (OBSERVE.value, OBSERVED)}


# Runs go by the machine

LISTED = ToolsListed(0.0)
ANSWER = ModelReplied(1.0, Said.ANSWER, "42", prompt_tokens=0, completion_tokens=0)


def answered_by(machine: Machine) -> Run:
    return step(step(run_by(machine), LISTED), ANSWER)


def run_by(machine: Machine) -> Run:
    run = start([{"role": "user", "content": "x"}], AgentConfig())
    return evolve(run, rules=compile_machine(machine))


def test_a_run_without_the_rows_of_its_machine_gets_nowhere() -> None:
    machine = build_machine(TABLE)
    for source in list(machine.events["ToolsListed"].transitions):
        machine.remove_transition("ToolsListed", source)

    with pytest.raises(NoRowError, match="no row for ToolsListed in Plan"):
        step(run_by(machine), LISTED)


def test_a_run_without_a_machine_for_observe_can_not_be() -> None:
    machine = build_machine(TABLE)
    del machine.events[OBSERVED]

    with pytest.raises(TableError, match="no rows for Observe"):
        compile_machine(machine)


def test_a_transition_taken_out_of_the_machine_changes_where_a_run_goes() -> None:
    machine = build_machine(TABLE)
    block = machine.events[OBSERVED].transitions[OBSERVE.value]
    block[:] = [each for each in block if not (isinstance(each, RowTransition) and each.row.label == "answered")]

    whole = answered_by(build_machine(TABLE))
    without = answered_by(machine)

    assert (whole.state, without.state) == (DONE, PLAN)


def test_a_condition_changed_in_the_machine_changes_where_a_run_goes() -> None:
    machine = build_machine(TABLE)
    answered = next(
        each
        for each in machine.events[OBSERVED].transitions[OBSERVE.value]
        if isinstance(each, RowTransition) and each.row.label == "answered"
    )
    answered.conditions[0].func = ~ALWAYS

    assert answered_by(machine).state is PLAN


def test_the_order_of_the_machine_is_the_order_of_a_run() -> None:
    machine = build_machine(TABLE)
    machine.events[OBSERVED].transitions[OBSERVE.value].reverse()

    assert answered_by(machine).state is PLAN


def test_a_machine_is_built_once_for_each_table() -> None:
    copy = (*TABLE,)

    assert rules_of(TABLE) is rules_of(TABLE)
    assert rules_of(copy).machine is not rules_of(TABLE).machine


# What compiling refuses


def nothing(*_: object) -> None:
    pass


def transition_of(machine: Machine) -> Transition:
    return machine.events["ToolsListed"].transitions[PLAN.value][0]


def with_option(name: str, value: object) -> Callable[[Machine], object]:
    return lambda machine: setattr(machine, name, value)


def with_callback(when: str) -> Callable[[Machine], object]:
    return lambda machine: transition_of(machine).add_callback(when, nothing)


def with_hook(when: str) -> Callable[[Machine], object]:
    return lambda machine: machine.get_state(PLAN.value).add_callback(when, nothing)


def with_transition(trigger: str = "ToolsListed", **more: Any) -> Callable[[Machine], object]:
    return lambda machine: machine.add_transition(trigger, PLAN.value, DONE.value, row=TABLE[1], **more)


def with_stock_transition(machine: Machine) -> None:
    machine.events["ToolsListed"].add_transition(Transition(PLAN.value, DONE.value))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(with_callback("before"), id="before"),
        pytest.param(with_callback("after"), id="after"),
        pytest.param(with_callback("prepare"), id="prepare"),
        pytest.param(with_hook("enter"), id="on_enter"),
        pytest.param(with_hook("exit"), id="on_exit"),
        pytest.param(with_option("send_event", True), id="send_event"),
        pytest.param(with_option("_queued", True), id="queued"),
        pytest.param(with_option("prepare_event", [nothing]), id="prepare_event"),
        pytest.param(with_option("before_state_change", [nothing]), id="before_state_change"),
        pytest.param(with_option("after_state_change", [nothing]), id="after_state_change"),
        pytest.param(with_option("finalize_event", [nothing]), id="finalize_event"),
        pytest.param(with_option("on_exception", [nothing]), id="on_exception"),
        pytest.param(with_option("on_final", [nothing]), id="on_final"),
        pytest.param(lambda machine: machine.add_model(Model(), initial=PLAN.value), id="model"),
        pytest.param(
            lambda machine: machine.add_transition("hurry", PLAN.value, DONE.value, row=TABLE[1]), id="trigger"
        ),
        pytest.param(with_transition(conditions=["is_lucky"]), id="string condition"),
        pytest.param(with_transition(conditions=[lambda _: True]), id="function"),
        pytest.param(with_transition(unless=[ALWAYS]), id="unless"),
        pytest.param(with_stock_transition, id="transition without a row"),
        pytest.param(lambda machine: setattr(transition_of(machine), "dest", REPAIR.value), id="other target"),
    ],
)
def test_compiling_refuses_what_no_table_gives_a_machine(change: Callable[[Machine], object]) -> None:
    machine = build_machine(TABLE)
    change(machine)

    with pytest.raises(TableError, match="what no table gives it"):
        compile_machine(machine)


def test_a_machine_built_from_the_table_is_not_refused() -> None:
    assert isinstance(compile_machine(build_machine(TABLE)), Rules)


# Malformed tables

MAYBE = ledger.failures >= 1
GOOD = (
    Row((PLAN,), (ToolsListed, ToolsUnavailable, ModelReplied, ModelFailed, Interrupted), ALWAYS, OBSERVE),
    observe(table.cancelled, DONE, reason=StopReason.CANCELLED),
    observe(table.out_of_time, DONE, reason=StopReason.MAX_WALLCLOCK),
    observe(table.fatal, DONE, reason=StopReason.MODEL_ERROR),
    observe(ALWAYS, PLAN),
)
"""The least table that is whole."""


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((Row((PLAN,), (ModelReplied,), ALWAYS, DONE),), r"row 5 \(always\).*has a reason exactly if"),
        ((Row((PLAN,), (ModelReplied,), ALWAYS, REPAIR, (), StopReason.SUCCESS),), r"row 5 .*reason exactly if"),
        ((Row((DONE,), (ModelReplied,), ALWAYS, PLAN),), r"row 5 .*nothing leaves Done"),
        ((Row((OBSERVE,), (), MAYBE, OBSERVE),), r"row 5 \(failures >= 1\).*Observe does not lead to itself"),
        ((Row((OBSERVE,), (ModelReplied,), MAYBE, PLAN),), r"row 5 .*an event exactly if"),
        ((Row((PLAN,), (), MAYBE, OBSERVE),), r"row 5 .*an event exactly if"),
        ((Row((), (ModelReplied,), ALWAYS, OBSERVE),), r"row 5 .*names its sources"),
        ((Row((PLAN, OBSERVE), (ModelReplied,), ALWAYS, REPAIR),), r"row 5 .*an event exactly if"),
        ((Row((REPAIR,), (ModelReplied,), MAYBE, OBSERVE),), r"row 5 .*ModelReplied in Repair must end .*taken: \[\]"),
        ((Row((PLAN,), (ToolsListed,), MAYBE, OBSERVE),), r"row 0 .*ToolsListed in Plan must end .*taken: \[0\]"),
        ((Row((PLAN,), (ModelReplied,), ALWAYS, REPAIR),), r"row 5 .*not straight to a request"),
        ((Row((CALL_TOOLS,), (ToolsFinished,), ALWAYS, CALL_TOOLS),), r"row 5 .*only a ModelReplied"),
        ((Row((OBSERVE,), (), ALWAYS, REPAIR, (add("ending"),)),), r"row 5 .*can't add 'ending'"),
        ((Row((OBSERVE,), (), ALWAYS, REPAIR),), r"row 4 .*Observed in Observe must end .*taken: \[4, 5\]"),
    ],
)
def test_a_table_that_can_not_be_run_is_refused_and_the_row_named(rows: Sequence[Row], message: str) -> None:
    build_machine(GOOD)

    with pytest.raises(TableError, match=message):
        build_machine((*GOOD, *rows))


@pytest.mark.parametrize(
    "row",
    [
        Row((PLAN,), (ModelReplied,), ALWAYS, REPAIR, (add("no_such_counter"),)),
        Row((PLAN,), (ModelReplied,), ALWAYS, REPAIR, (Update("raise", "failures", 1),)),
        Row((PLAN,), (ModelReplied,), ALWAYS, REPAIR, (put("limits", Limits()),)),
        Row((PLAN,), (ModelReplied,), ALWAYS, DONE, (), "bored"),
    ],
    ids=["unknown counter", "unknown verb", "no counter", "unknown reason"],
)
def test_a_row_that_can_not_be_taken_is_refused_when_the_table_is_built(row: Row) -> None:
    with pytest.raises(TableError, match="row 5"):
        build_machine((*GOOD, row))


def test_the_states_of_the_machine_are_those_of_a_run() -> None:
    machine = build_machine(TABLE)
    states = [each for each in machine.states.values() if isinstance(each, MachineState)]

    assert [each.name for each in states] == [state.value for state in State]
    assert not any(name.startswith("to_") for name in machine.events)
