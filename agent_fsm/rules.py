"""The rules of a run: a table made into one `transitions.Machine`, and that machine compiled.

Source validity, guard order, choice and change of state are the machine's. A run goes through its compiled form, one
generated function for each state and event, because stock dispatch takes some 20 us a transition; compiling refuses a
machine with anything that it does not understand. This is the only module that imports `transitions`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from attrs import frozen
from transitions import Machine, Transition

from agent_fsm.errors import TableError
from agent_fsm.guards import ALWAYS, Compare, Guard, Is, Number, Opaque
from agent_fsm.ledger import Ledger
from agent_fsm.protocol import (
    OBSERVE,
    PLAN,
    Event,
    Interrupted,
    ModelFailed,
    ModelReplied,
    State,
    ToolsFinished,
    ToolsListed,
    ToolsUnavailable,
)
from agent_fsm.shape import OBSERVED, check_table, trigger_of
from agent_fsm.table import TABLE, Row, Update

__all__ = ["OBSERVED", "RowTransition", "Rules", "build_machine", "compile_machine", "rules_of", "trigger_of"]

Take: TypeAlias = Callable[[Ledger], Row | None]
"""Returns the first row whose guard holds, having made the row's updates; None if there is none."""


class RowTransition(Transition):
    """A transition that knows the row it was made of."""

    def __init__(self, source: str, dest: str, *args: Any, row: Row, **kwargs: Any) -> None:
        super().__init__(source, dest, *args, **kwargs)
        self.row = row


class _TableMachine(Machine):
    transition_cls = RowTransition


def build_machine(table: Sequence[Row]) -> Machine:
    """Return the stock `transitions` machine of *table*.

    Raises:
        TableError: the table can't be run, or has a row that can't mean what it says; the message names the row.
    """
    check_table(table)
    # auto_transitions=False, else every state grows an unguarded to_X(); model=None, else methods are injected
    machine = _TableMachine(
        model=None, states=[state.value for state in State], initial=PLAN.value, auto_transitions=False
    )
    for row in table:
        for event in row.events or (None,):
            machine.add_transition(
                trigger_of(event),
                [source.value for source in row.sources],
                row.target.value,
                conditions=None if row.guard is ALWAYS else [row.guard],
                row=row,
            )
    return machine


@frozen
class Rules:
    """A machine and its compiled form."""

    machine: Machine
    waiting: Mapping[State, Mapping[type[Event], Take]]
    observe: Take
    counted_tools: frozenset[str] = frozenset()
    """The tools whose calls a guard reads."""


_EVENTS: tuple[type[Event], ...] = (
    ToolsListed,
    ToolsUnavailable,
    ModelReplied,
    ModelFailed,
    ToolsFinished,
    Interrupted,
)


def compile_machine(machine: Machine) -> Rules:
    """Return the compiled form of *machine*, which does just what the machine does.

    Raises:
        TableError: the machine has something that is no row: callbacks, hooks of states, queueing, foreign conditions.
    """
    _refuse_strangers(machine)
    waiting: dict[State, dict[type[Event], Take]] = {}
    for event in _EVENTS:
        for source, block in _blocks(machine, event).items():
            waiting.setdefault(source, {})[event] = _compile(f"{event.__name__} in {source}", block)
    observe = _blocks(machine, None).get(OBSERVE)
    if observe is None:
        raise TableError("the table has no rows for Observe")
    return Rules(machine, waiting, _compile("Observe", observe), _counted_tools(machine))


def _counted_tools(machine: Machine) -> frozenset[str]:
    transitions = [
        each for event in machine.events.values() for block in event.transitions.values() for each in _rows(block)
    ]
    return frozenset(
        number.attribute
        for transition in transitions
        for condition in transition.conditions
        if isinstance(condition.func, Guard)
        for number in _numbers(condition.func)
        if number.owner == "calls"
    )


def _numbers(guard: Guard) -> Iterator[Number]:
    """Yield the numbers that *guard* reads."""
    for leaf in guard.leaves():
        match leaf:
            case Compare(left, _, right):
                yield left
                if isinstance(right, Number):
                    yield right
            case Is(left):
                yield left
            case Opaque(tools=tools):
                yield from (Number("calls", tool, absent=False) for tool in tools)


def _refuse_strangers(machine: Machine) -> None:
    hooks = ("prepare_event", "before_state_change", "after_state_change", "finalize_event", "on_exception", "on_final")
    strange = [name for name in hooks if getattr(machine, name)]
    strange += [name for name in ("send_event", "has_queue") if getattr(machine, name)]
    strange += [f"model {model!r}" for model in machine.models]
    strange += [f"hook of {state.name}" for state in machine.states.values() if state.on_enter or state.on_exit]
    strange += [
        f"trigger {name}" for name in machine.events if name not in {trigger_of(each) for each in (*_EVENTS, None)}
    ]
    for event in machine.events.values():
        for transitions in event.transitions.values():
            strange += [repr(each) for each in transitions if not _understood(each)]
    if strange:
        raise TableError(f"the machine has what no table gives it: {', '.join(strange)}")


def _understood(transition: Transition) -> bool:
    return (
        isinstance(transition, RowTransition)
        and transition.dest == transition.row.target.value
        and not (transition.prepare or transition.before or transition.after)
        and all(each.target is True and isinstance(each.func, Guard) for each in transition.conditions)
    )


def _blocks(machine: Machine, event: type[Event] | None) -> dict[State, list[RowTransition]]:
    known = machine.events.get(trigger_of(event))
    if known is None:
        return {}
    return {State(source): _rows(block) for source, block in known.transitions.items() if block}


def _rows(block: Sequence[Transition]) -> list[RowTransition]:
    return [each for each in block if isinstance(each, RowTransition)]


def _compile(name: str, block: Sequence[RowTransition]) -> Take:
    bound: dict[str, Any] = {}
    lines = ["def take(ledger):", "    limits = ledger.limits"]
    for number, transition in enumerate(block):
        guards = [each.func for each in transition.conditions if isinstance(each.func, Guard)]
        conditions = " and ".join(guard.code(bound) for guard in guards) or "True"
        bound[f"row_{number}"] = transition.row
        lines.append(f"    if {conditions}:")
        lines += [f"        {_assignment(update, bound)}" for update in transition.row.updates]
        lines.append(f"        return row_{number}")
    lines.append("    return None")
    exec(compile("\n".join(lines), f"<rows for {name}>", "exec"), bound)
    take: Take = bound["take"]
    return take


def _assignment(update: Update, bound: dict[str, Any]) -> str:
    key = f"value_{len(bound)}"
    bound[key] = update.value
    if update.own:
        name = repr(update.counter)
        before = f"ledger.counters.get({name}, 0) + " if update.verb == "add" else ""
        return f"ledger.counters = {{**ledger.counters, {name}: {before}{key}}}"
    return f"ledger.{update.counter} {'+=' if update.verb == 'add' else '='} {key}"


_RULES: dict[int, tuple[Sequence[Row], tuple[Row, ...], Rules]] = {}
# by identity, as to hash a table would cost every run; with the rows it had then, as a list may have got others


def rules_of(table: Sequence[Row] = TABLE) -> Rules:
    """Return the machine of *table* and its compiled form, built once as long as few tables are in use.

    Raises:
        TableError: the table can't be run; the message names the row.
    """
    known = _RULES.get(id(table))
    if known is None or known[0] is not table or not (isinstance(table, tuple) or known[1] == tuple(table)):
        if len(_RULES) >= 64:  # tables made anew for each run must not pile up
            _RULES.clear()
        known = _RULES[id(table)] = (table, tuple(table), compile_machine(build_machine(table)))
    return known[2]
