"""The rules of a run: a table made into one `transitions.Machine`, and that machine compiled.

Source validity, guard order, choice and change of state are the machine's. A run goes through its compiled form, one
generated function for each state and event, because stock dispatch takes some 20 us a transition; compiling refuses a
machine with anything that it does not understand. This is the only module that imports `transitions`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from attrs import fields, frozen
from transitions import Machine, Transition

from agent_fsm.errors import TableError
from agent_fsm.guards import ALWAYS, Compare, Guard, Is, Number, counter
from agent_fsm.ledger import Ledger
from agent_fsm.protocol import (
    CALL_TOOLS,
    DONE,
    OBSERVE,
    PLAN,
    Event,
    Interrupted,
    ModelFailed,
    ModelReplied,
    State,
    StopReason,
    ToolsFinished,
    ToolsListed,
    ToolsUnavailable,
)
from agent_fsm.table import DECIDED, TABLE, Row, Update

__all__ = ["OBSERVED", "RowTransition", "Rules", "build_machine", "compile_machine", "rules_of", "trigger_of"]

Take: TypeAlias = Callable[[Ledger], Row | None]
"""Returns the first row whose guard holds, having made the row's updates; None if there is none."""

OBSERVED = "Observed"
"""The trigger of the rows of Observe, where no event is waited for."""


class RowTransition(Transition):
    """A transition that knows the row it was made of."""

    def __init__(self, source: str, dest: str, *args: Any, row: Row, **kwargs: Any) -> None:
        super().__init__(source, dest, *args, **kwargs)
        self.row = row


class _TableMachine(Machine):
    transition_cls = RowTransition


def trigger_of(event: type[Event] | None) -> str:
    """Return the name under which the machine knows an event; None stands for the choice made in Observe."""
    return OBSERVED if event is None else event.__name__


def build_machine(table: Sequence[Row]) -> Machine:
    """Return the stock `transitions` machine of *table*.

    Raises:
        TableError: a row can't be taken, or a state and event have no row that is always taken last.
    """
    _check(table)
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


def _check(table: Sequence[Row]) -> None:
    blocks: dict[tuple[State, str], list[int]] = {}
    for number, row in enumerate(table):
        where = f"row {number} ({row.label})"
        if (row.reason is None) is (row.target is DONE):
            raise TableError(f"{where}: a row has a reason exactly if its target is Done")
        if DONE in row.sources or (row.target is OBSERVE and OBSERVE in row.sources):
            raise TableError(f"{where}: nothing leaves Done, and Observe does not lead to itself")
        if (OBSERVE in row.sources) is bool(row.events) or not row.sources:
            raise TableError(f"{where}: a row names its sources, and an event exactly if they are not Observe")
        if row.target is DONE and not isinstance(row.reason, StopReason) and row.reason != DECIDED:
            raise TableError(f"{where}: {row.reason!r} is no reason; take a StopReason or DECIDED")
        if row.events and row.target not in (OBSERVE, CALL_TOOLS, DONE):
            raise TableError(f"{where}: a waiting state leads to Observe, CallTools or Done, not straight to a request")
        if row.target is CALL_TOOLS and row.events != (ModelReplied,):
            raise TableError(f"{where}: only a ModelReplied leads to CallTools, as it brings the calls")
        _check_updates(where, row.updates)
        for source in row.sources:
            for event in row.events or (None,):
                blocks.setdefault((source, trigger_of(event)), []).append(number)
    for (source, trigger), numbers in blocks.items():
        always = [number for number in numbers if table[number].guard is ALWAYS]
        if always != numbers[-1:]:
            raise TableError(
                f"the rows for {trigger} in {source} must end in one row that is always taken; always taken: {always}"
            )


_COUNTERS = ("iterations", "attempts", "failures", "hops", "nudges", "stale", "repeats", "turns", "summaries")
"""The counters of the ledger that rows may write. All else in it is measured, but for `ending`."""
_FIELDS = frozenset(each.name for each in fields(Ledger))


def _check_updates(where: str, updates: Sequence[Update]) -> None:
    for update in updates:
        doing = f"{where}: can't {update.verb} {update.counter!r}"
        if update.verb not in ("add", "put"):
            raise TableError(f"{doing}; the verbs are add and put")
        if update.own:
            counter(update.counter)
        elif update.counter not in (*_COUNTERS, "ending"):
            why = "it is measured, not counted by rows" if update.counter in _FIELDS else "the ledger has no such field"
            raise TableError(
                f"{doing}: {why}; a row may write {', '.join(_COUNTERS)}, ending, and counters of its own:"
                ' counter("searches")'
            )
        _check_value(doing, update)


def _check_value(doing: str, update: Update) -> None:
    value = update.value
    if update.counter == "ending" and not update.own:
        if update.verb == "add" or not (value is None or isinstance(value, StopReason)):
            raise TableError(f"{doing} {value!r}; a row may put a StopReason or None")
    elif not isinstance(value, int) or isinstance(value, bool):
        raise TableError(f"{doing} {value!r}; it counts in whole numbers")
    elif update.verb == "add" and value == 0:
        raise TableError(f"{doing} 0, which changes nothing")
    elif update.verb == "put" and value < 0:
        raise TableError(f"{doing} {value}; a counter is put to 0 or more")


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
