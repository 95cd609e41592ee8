"""The machine: `step` gives the run that follows an event, `next_effect` what a run wants.

The table becomes one `transitions.Machine`: source validity, guard order, choice and change of state are its. A run
goes through the machine's compiled form, one generated function for each state and event, because stock dispatch
takes some 20 us a transition; compiling refuses a machine with anything that it does not understand. This is the only
module that imports `transitions`.

No clock, no network, no process, no randomness: values in, values out.
"""

import linecache
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from attrs import define, fields, frozen
from transitions import Machine, Transition

from agent_fsm import directives
from agent_fsm.config import AgentConfig
from agent_fsm.errors import ConfigError, NoRowError, TableError
from agent_fsm.guards import ALWAYS, Guard
from agent_fsm.ledger import Ledger, clone, cloner
from agent_fsm.protocol import (
    CALL_TOOLS,
    DONE,
    OBSERVE,
    PLAN,
    REPAIR,
    RESEARCH,
    SUMMARIZE,
    AskModel,
    Effect,
    Ended,
    Event,
    Interrupted,
    ListTools,
    Message,
    ModelFailed,
    ModelReplied,
    ModelRequest,
    RunTools,
    Said,
    State,
    StopReason,
    ToolResult,
    ToolsFinished,
    ToolsListed,
    ToolsUnavailable,
)
from agent_fsm.reading import results_size
from agent_fsm.table import DECIDED, TABLE, Row, Table, Update
from agent_fsm.transcript import (
    FRAME_TOKENS,
    Transcript,
    assistant_message,
    begin,
    not_run_results,
    text_size,
    tool_message,
    user_message,
)

__all__ = [
    "OBSERVED",
    "RowTransition",
    "Rules",
    "Run",
    "build_machine",
    "compile_machine",
    "next_effect",
    "request",
    "rules_of",
    "start",
    "step",
    "trigger_of",
]

# The machine of a table

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


def build_machine(table: Table) -> Machine:
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


def _check(table: Table) -> None:
    blocks: dict[tuple[State, str], list[int]] = {}
    for number, row in enumerate(table):
        where = f"row {number} ({row.label})"
        if (row.reason is None) is (row.target is DONE):
            raise TableError(f"{where}: a row has a reason exactly if its target is Done")
        if row.target is DONE and not isinstance(row.reason, StopReason) and row.reason != DECIDED:
            raise TableError(f"{where}: {row.reason!r} is no reason; take a StopReason or DECIDED")
        if row.target is CALL_TOOLS and row.events != (ModelReplied,):
            raise TableError(f"{where}: only a ModelReplied leads to CallTools, as it brings the calls")
        _check_updates(where, row.updates)
        if DONE in row.sources or (row.target is OBSERVE and OBSERVE in row.sources):
            raise TableError(f"{where}: nothing leaves Done, and Observe does not lead to itself")
        if (OBSERVE in row.sources) is bool(row.events) or not row.sources:
            raise TableError(f"{where}: a row names its sources, and an event exactly if they are not Observe")
        for source in row.sources:
            for event in row.events or (None,):
                blocks.setdefault((source, trigger_of(event)), []).append(number)
    for (source, trigger), numbers in blocks.items():
        always = [number for number in numbers if table[number].guard is ALWAYS]
        if always != numbers[-1:]:
            raise TableError(
                f"the rows for {trigger} in {source} must end in one row that is always taken; always taken: {always}"
            )


_COUNTERS = frozenset(each.name for each in fields(Ledger)) - {"limits"}


def _check_updates(where: str, updates: Sequence[Update]) -> None:
    for update in updates:
        if update.verb not in ("add", "put") or update.counter not in _COUNTERS:
            known = ", ".join(sorted(_COUNTERS))
            raise TableError(f"{where}: can't {update.verb} to {update.counter!r}; add or put to one of {known}")


@frozen
class Rules:
    """A machine and its compiled form."""

    table: Table
    machine: Machine
    waiting: Mapping[State, Mapping[type[Event], Take]]
    observe: Take


_EVENTS: tuple[type[Event], ...] = (
    ToolsListed,
    ToolsUnavailable,
    ModelReplied,
    ModelFailed,
    ToolsFinished,
    Interrupted,
)


def compile_machine(machine: Machine, table: Table = ()) -> Rules:
    """Return the compiled form of *machine*, which does just what the machine does.

    Raises:
        TableError: the machine has something that is no row: callbacks, hooks of states, queueing, foreign conditions.
    """
    _refuse_strangers(machine)
    waiting: dict[State, dict[type[Event], Take]] = {}
    for event in _EVENTS:
        for source, block in _blocks(machine, event).items():
            waiting.setdefault(source, {})[event] = _compile(f"{source.value}_{event.__name__}", block)
    observe = _blocks(machine, None).get(OBSERVE)
    if observe is None:
        raise TableError("the table has no rows for Observe")
    return Rules(table, machine, waiting, _compile("Observe", observe))


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
    source, filename = "\n".join(lines) + "\n", f"<rows of {name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)  # for tracebacks
    exec(compile(source, filename, "exec"), bound)
    take: Take = bound["take"]
    return take


def _assignment(update: Update, bound: dict[str, Any]) -> str:
    key = f"value_{len(bound)}"
    bound[key] = update.value
    return f"ledger.{update.counter} {'+=' if update.verb == 'add' else '='} {key}"


_RULES: dict[int, Rules] = {}


def rules_of(table: Table = TABLE) -> Rules:
    """Return the machine of *table* and its compiled form, built once for each table.

    Raises:
        TableError: the table can't be run; the message names the row.
    """
    rules = _RULES.get(id(table))
    if rules is None or rules.table is not table:
        rules = _RULES[id(table)] = compile_machine(build_machine(table), table)
    return rules


# A run


REQUEST_TOKENS = 1_024
"""What a provider adds to a request: its own words about tools, the frame of the conversation."""
RECORD_TOKENS = 32_000
"""Ceiling of the record that a summary is written from; never over a quarter of the token budget."""


@define
class Run:
    """A run is a value: `step` gives the next one and leaves this one as it was."""

    rules: Rules
    ledger: Ledger
    transcript: Transcript
    record_tokens: int
    state: State = PLAN
    listed: bool = False
    """Whether the tool backend has said what it offers."""
    tools: tuple[Mapping[str, Any], ...] = ()
    names: tuple[str, ...] = ()
    """The tools' names."""
    research: tuple[str, ...] = ()
    """The names of those that look things up."""
    tools_size: int = 0
    pending: ModelReplied | None = None
    """The reply whose calls are being run; it enters the transcript together with their results."""
    answer: str | None = None
    """The best answer so far."""
    reason: StopReason | None = None
    """Why the run ended; set exactly if the state is Done."""
    detail: str = ""
    """What happened, and what to do about it, where the reason alone does not say."""
    taken: tuple[Row, ...] = ()
    """The rows that the last step took: one, or a waiting state's and one of Observe."""


_clone_run = cloner(Run)


def start(messages: Sequence[Mapping[str, Any]], config: AgentConfig, table: Table = TABLE) -> Run:
    """Return the run at its beginning.

    Raises:
        MessagesError: no provider accepts *messages*.
        ConfigError: there is a limit on cost but no price.
        TableError: *table* can't be run.
    """
    if config.max_cost_usd is not None and None in (config.prompt_usd_per_token, config.reply_usd_per_token):
        raise ConfigError("max_cost_usd is set, so prompt_usd_per_token and reply_usd_per_token must be, too")
    return Run(
        rules=rules_of(table),
        ledger=Ledger(config),
        transcript=begin(messages, config.max_history_messages),
        record_tokens=min(RECORD_TOKENS, config.max_tokens_total // 4),
    )


def next_effect(run: Run) -> Effect | None:
    """Return what *run* wants done; None if it is over."""
    if run.state is CALL_TOOLS:
        calls = () if run.pending is None else run.pending.calls
        return RunTools(tuple([call for call in calls if not call.not_run]))
    if run.state is DONE:
        return None
    if not run.listed:
        return ListTools()
    ledger = run.ledger
    return AskModel(run.state, ledger.attempts, ledger.retry_at if ledger.attempts else 0.0)


def step(run: Run, event: Event) -> Run:
    """Return the run that follows *run* when *event* happens.

    The event is recorded; the state's row is taken; if it leads to Observe, one row of Observe is taken too.
    `functools.reduce(step, events, run)` replays a run.

    Raises:
        NoRowError: the table has no row for the event in this state.
    """
    take = run.rules.waiting.get(run.state, {}).get(type(event))
    if take is None:
        raise NoRowError(f"no row for {type(event).__name__} in {run.state}")
    new = _clone_run(run)
    ledger = new.ledger = clone(run.ledger)
    ledger.seconds = max(ledger.seconds, event.now)
    _record(new, event)
    row = _taken(take, ledger, event, run.state)
    new.taken = (row,)
    if new.pending is not None and row.target is not CALL_TOOLS:
        _leave_calls(new, new.pending)
    if row.target is OBSERVE:
        _reckon(new)
        row = _taken(run.rules.observe, ledger, event, OBSERVE)
        new.taken = (*new.taken, row)
    new.state = row.target
    if row.target is DONE:
        new.reason = ledger.ending if row.reason is DECIDED else StopReason(row.reason)  # type: ignore[arg-type] # checked: rows to Done have one
    elif row.target is not CALL_TOOLS:
        _enter(new, event, nudged=ledger.nudges != run.ledger.nudges)
    return new


def _taken(take: Take, ledger: Ledger, event: Event, state: State) -> Row:
    row = take(ledger)
    if row is None:
        raise NoRowError(f"no row for {type(event).__name__} in {state}")
    return row


# Recording an event


def _record(run: Run, event: Event) -> None:
    match event:
        case ModelReplied():
            _record_reply(run, event)
        case ToolsFinished():
            _record_results(run, event)
        case ModelFailed():
            _record_failure(run, event)
        case Interrupted():
            _record_interruption(run, event)
        case ToolsListed():
            run.listed = True
            run.tools, run.research, run.tools_size = event.tools, event.research, event.size
            run.names = tuple(tool["function"]["name"] for tool in event.tools)
            run.ledger.research_tools = bool(event.research)
        case ToolsUnavailable():
            run.detail = f"{event.backend} could not say which tools it has: {event.error}"


def _record_reply(run: Run, reply: ModelReplied) -> None:
    ledger = run.ledger
    ledger.model_calls += 1
    ledger.attempts = 0
    ledger.ended = Ended.WELL
    _charge(ledger, reply)
    run.detail = ""
    if run.state is SUMMARIZE:
        ledger.said = Said.NOTHING
        _record_summary(run, reply)
        return
    ledger.said = said = reply.said
    if said is Said.CALLS:
        run.pending = reply
        return
    if reply.message is not None:
        _append(run, reply.message, not_run_results(reply.calls), reply.size)
    if said is Said.ANSWER or said is Said.UNSURE:
        run.answer = reply.text
    elif said is Said.REFUSED:
        run.detail = reply.detail
    else:
        ledger.ended = Ended.FAILED
        ledger.failures += 1


def _record_summary(run: Run, reply: ModelReplied) -> None:
    text = reply.text.strip()
    if run.ledger.ending is None:
        if text:
            run.transcript = run.transcript.summarized_as(text)
    elif text:
        run.answer = text
        run.transcript = run.transcript.plus((assistant_message(text),), text_size(text) + FRAME_TOKENS)


def _charge(ledger: Ledger, reply: ModelReplied) -> None:
    prompt, completion = reply.prompt_tokens, reply.completion_tokens
    if prompt is None or completion is None:
        ledger.tokens += ledger.request_tokens
        cost = ledger.request_cost_usd
    else:
        ledger.tokens += prompt + completion
        cost = _cost(ledger, prompt, completion)
    ledger.cost_usd += cost if reply.cost_usd is None else reply.cost_usd


def _cost(ledger: Ledger, prompt: int, reply: int) -> float:
    limits = ledger.limits
    if limits.prompt_usd_per_token is None or limits.reply_usd_per_token is None:
        return 0.0
    return prompt * limits.prompt_usd_per_token + reply * limits.reply_usd_per_token


def _charge_worst(ledger: Ledger) -> None:
    ledger.model_calls += 1
    ledger.tokens += ledger.request_tokens
    ledger.cost_usd += ledger.request_cost_usd


def _record_failure(run: Run, failure: ModelFailed) -> None:
    ledger = run.ledger
    _charge_worst(ledger)
    ledger.said = Said.NOTHING
    if run.state is SUMMARIZE:  # asked once: no failure, and never retried
        ledger.ended = Ended.WELL
        return
    run.detail = failure.error
    ledger.attempts += 1
    ledger.ended = Ended.RETRYABLE if failure.retryable else Ended.FATAL
    backoff = min(8.0, 0.5 * 2.0 ** (ledger.attempts - 1))
    ledger.retry_at = ledger.seconds + max(backoff, failure.retry_after or 0.0)


def _record_results(run: Run, event: ToolsFinished) -> None:
    ledger = run.ledger
    ledger.stale = event.stale if event.fresh else ledger.stale + event.stale
    ledger.repeats = event.repeats
    ledger.ended = Ended.FAILED if event.failed else Ended.WELL
    ledger.failures = ledger.failures + 1 if event.failed else 0
    _answer_calls(run, event.results, event.size)


def _record_interruption(run: Run, event: Interrupted) -> None:
    ledger = run.ledger
    ledger.said = Said.NOTHING
    ledger.ended = Ended.CANCELLED if event.cancelled else Ended.TIMED_OUT
    if run.pending is not None:
        _answer_calls(run, event.results, event.size)
    elif run.listed and event.started:  # the provider may have done, and charged for, all of it
        _charge_worst(ledger)


def _answer_calls(run: Run, results: tuple[ToolResult, ...], size: int) -> None:
    reply = run.pending
    if len(results) != (0 if reply is None else len(reply.calls)):
        raise ValueError(f"{len(results)} results arrived for the calls of {reply!r}; each call has exactly one")
    if reply is None or reply.message is None:
        return
    run.ledger.tool_calls += sum([result.ran for result in results])
    run.pending = None
    _append(run, reply.message, results, reply.size + size)


def _leave_calls(run: Run, reply: ModelReplied) -> None:
    """Answer calls that a policy does not let be run."""
    results = tuple(
        ToolResult(
            "not run: the policy of this run did not allow it", ok=False, call_id=call.id, name=call.name, ran=False
        )
        for call in reply.calls
    )
    _answer_calls(run, results, results_size(results))


def _append(run: Run, message: Message, results: tuple[ToolResult, ...], size: int) -> None:
    run.transcript = run.transcript.plus((message, *map(tool_message, results)), size)


# Entering a state


def _reckon(run: Run) -> None:
    """Write to the ledger what the next requests may cost at worst."""
    ledger, limits, transcript = run.ledger, run.ledger.limits, run.transcript
    reply = limits.max_reply_tokens
    prompt = transcript.request_size() + run.tools_size + REQUEST_TOKENS + directives.DIRECTIVE_TOKENS
    heading = transcript.system_size + REQUEST_TOKENS
    # A summary is written from a record, which is no longer than what it records; after another turn it may be
    # as long as a record can be, so that is what a working request must leave room for
    summary = heading + min(run.record_tokens, transcript.record_size())
    dearest = prompt if limits.summarize_every is None else max(prompt, summary)  # either may come next
    closing = heading + run.record_tokens if limits.closing_summary else 0
    replies = 2 * reply if limits.closing_summary else reply
    ledger.tokens_needed = ledger.tokens + dearest + closing + replies
    ledger.closing_tokens_needed = ledger.tokens + summary + reply
    ledger.request_tokens = prompt + reply
    if limits.prompt_usd_per_token is not None:
        ledger.cost_needed_usd = ledger.cost_usd + _cost(ledger, dearest + closing, replies)
        ledger.closing_cost_needed_usd = ledger.cost_usd + _cost(ledger, summary, reply)
        ledger.request_cost_usd = _cost(ledger, prompt, reply)


def _enter(run: Run, event: Event, *, nudged: bool) -> None:
    ledger = run.ledger
    ledger.asking = run.state
    if run.state is SUMMARIZE:
        ledger.attempts, ledger.retry_at = 0, 0.0  # of the request that is given up
        ledger.request_tokens = ledger.closing_tokens_needed - ledger.tokens
        ledger.request_cost_usd = max(0.0, ledger.closing_cost_needed_usd - ledger.cost_usd)
    elif ledger.ended is Ended.RETRYABLE:
        return  # the same request again
    elif run.state is PLAN:
        if run.transcript.ends_with_assistant():
            _say(run, directives.go_on())
    elif run.state is RESEARCH:
        _say(run, directives.research(run.research, unsure=ledger.said is Said.UNSURE))
    elif nudged:
        _say(run, directives.nudge())
    elif run.state is REPAIR:
        results = event.results if isinstance(event, ToolsFinished) else ()
        reply = event if isinstance(event, ModelReplied) else None
        _say(run, directives.mend(results, reply, research_tools=run.research))


def _say(run: Run, text: str) -> None:
    run.transcript = run.transcript.plus((user_message(text),), text_size(text) + FRAME_TOKENS)


# Asking the model


def request(run: Run, ask: AskModel, config: AgentConfig, *, timeout_seconds: float) -> ModelRequest:
    """Return the request that *ask* stands for; its size is at most what the ledger reckoned with."""
    models = (config.model, *config.fallback_models)
    summing_up = ask.purpose is SUMMARIZE
    return ModelRequest(
        messages=_summary_messages(run) if summing_up else run.transcript.request_messages(),
        tools=() if summing_up else run.tools,
        tool_choice="auto" if run.tools and not summing_up else None,
        purpose=ask.purpose,
        timeout_seconds=timeout_seconds,
        model=models[min(ask.attempt, len(models) - 1)],
        max_tokens=config.max_reply_tokens,
    )


def _summary_messages(run: Run) -> list[Message]:
    """A record as text, not the messages themselves: providers refuse tool messages in a request without tools."""
    record = run.transcript.record(run.record_tokens)
    ending = run.ledger.ending
    text = directives.summary(record) if ending is None else directives.closing(record, ending)
    return [*run.transcript.system, user_message(text)]
