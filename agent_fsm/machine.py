"""The machine: `step` gives the run that follows an event, `next_effect` what a run wants.

No clock, no network, no process, no randomness: values in, values out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import define

from agent_fsm import directives
from agent_fsm.config import AgentConfig
from agent_fsm.errors import ConfigError, NoRowError, TableError
from agent_fsm.ledger import Ledger, clone, cloner
from agent_fsm.messages import (
    FRAME_TOKENS,
    assistant_message,
    not_run_results,
    results_size,
    text_size,
    tool_message,
    user_message,
)
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
    ToolCall,
    ToolResult,
    ToolsFinished,
    ToolsListed,
    ToolsUnavailable,
)
from agent_fsm.rules import Rules, Take, rules_of
from agent_fsm.table import DECIDED, TABLE, Row
from agent_fsm.transcript import Transcript, begin

__all__ = ["Run", "next_effect", "request", "start", "step"]

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


def start(messages: Sequence[Mapping[str, Any]], config: AgentConfig, table: Sequence[Row] = TABLE) -> Run:
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
        ValueError: the event's results are not one for each call.
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
        new.reason = _reason(row, ledger)
    if run.ledger.ending is None and StopReason.BUDGET in (new.reason, ledger.ending):
        new.detail = _budget_detail(ledger)
    if row.target not in (DONE, CALL_TOOLS):
        _enter(new, event, nudged=ledger.nudges != run.ledger.nudges)
    return new


def _taken(take: Take, ledger: Ledger, event: Event, state: State) -> Row:
    row = take(ledger)
    if row is None:
        raise NoRowError(f"no row for {type(event).__name__} in {state}")
    return row


def _reason(row: Row, ledger: Ledger) -> StopReason:
    reason = ledger.ending if row.reason == DECIDED else row.reason
    if not isinstance(reason, StopReason):
        raise TableError(f"row {row.label!r} ends the run for the reason that was decided, but none was")
    return reason


def _budget_detail(ledger: Ledger) -> str:
    limits = ledger.limits
    if ledger.tokens_needed > limits.max_tokens_total:
        return (
            f"the next requests may take {ledger.tokens_needed - ledger.tokens:,} tokens, and of"
            f" max_tokens_total={limits.max_tokens_total:,} there are {limits.max_tokens_total - ledger.tokens:,} left;"
            " raise it, or lower max_reply_tokens or max_history_messages"
        )
    return (
        f"the next requests may cost {ledger.cost_needed_usd - ledger.cost_usd:.4f} US dollars, and of"
        f" max_cost_usd={limits.max_cost_usd} there are {(limits.max_cost_usd or 0.0) - ledger.cost_usd:.4f} left;"
        " raise it, or lower max_reply_tokens or max_history_messages"
    )


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
            _record_listing(run, event)
        case ToolsUnavailable():
            run.detail = f"{event.backend} could not say which tools it has: {event.error}"


def _record_listing(run: Run, listing: ToolsListed) -> None:
    run.listed = True
    run.tools, run.research, run.tools_size = listing.tools, listing.research, listing.size
    run.names = tuple(tool["function"]["name"] for tool in listing.tools)
    run.ledger.research_tools = bool(listing.research)


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
        results = not_run_results(reply.calls)
        _append(run, reply.message, results, reply.size + results_size(results))
    if said is Said.ANSWER or said is Said.UNSURE:
        run.answer, ledger.failures = reply.text, 0
    elif said is Said.REFUSED:
        run.detail = reply.detail
    else:
        ledger.ended = Ended.FAILED
        ledger.failures += 1


def _record_summary(run: Run, reply: ModelReplied) -> None:
    text = "" if reply.said is Said.REFUSED else reply.text.strip()
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
        if ledger.ending is not None:
            run.detail = f"{run.detail}; the closing summary failed: {failure.error}".removeprefix("; ")
        return
    run.detail = failure.error
    ledger.attempts += 1
    ledger.ended = Ended.RETRYABLE if failure.retryable else Ended.FATAL
    backoff = min(8.0, 0.5 * 2.0 ** min(ledger.attempts - 1, 4))
    ledger.retry_at = ledger.seconds + max(backoff, failure.retry_after or 0.0)
    if failure.retryable and ledger.retry_at >= ledger.limits.max_wallclock_seconds:
        run.detail += "; the next try would come after max_wallclock_seconds"


def _record_results(run: Run, event: ToolsFinished) -> None:
    ledger = run.ledger
    ledger.stale = event.stale if event.fresh else ledger.stale + event.stale
    ledger.repeats = event.repeats
    ledger.ended = Ended.FAILED if event.failed else Ended.WELL
    ledger.failures = ledger.failures + 1 if event.failed else 0
    _answer_calls(run, event.results, event.size)
    if event.listing is not None:
        _record_listing(run, event.listing)


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
    if run.rules.counted_tools:
        _count_by_tool(run, reply.calls, results)
    run.pending = None
    _append(run, reply.message, results, reply.size + size)


def _count_by_tool(run: Run, calls: tuple[ToolCall, ...], results: tuple[ToolResult, ...]) -> None:
    counts = dict(run.ledger.calls)
    for call, result in zip(calls, results, strict=True):
        name = result.name or call.name
        if result.ran and name in run.rules.counted_tools:
            counts[name] = counts.get(name, 0) + 1
    run.ledger.calls = counts


def _leave_calls(run: Run, reply: ModelReplied) -> None:
    """Answer calls that a policy does not let be run."""
    results = not_run_results(reply.calls, "the policy of this run did not allow it")
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
    tools, tool_choice = ((), None) if summing_up else _offer(run, ask.purpose)
    return ModelRequest(
        messages=_summary_messages(run) if summing_up else run.transcript.request_messages(),
        tools=tools,
        tool_choice=tool_choice,
        purpose=ask.purpose,
        timeout_seconds=timeout_seconds,
        model=models[min(ask.attempt, len(models) - 1)],
        max_tokens=config.max_reply_tokens,
    )


def _offer(run: Run, purpose: State) -> tuple[tuple[Mapping[str, Any], ...], str | Mapping[str, Any] | None]:
    """Return the tools that a working request offers, and which of them the model may choose."""
    if not run.tools:
        return (), None
    if purpose is not RESEARCH or not run.research:
        return run.tools, "auto"
    if len(run.research) == 1:
        return run.tools, {"type": "function", "function": {"name": run.research[0]}}
    # no provider but one can be told to choose among some of the tools, so these are all there are
    return tuple([tool for tool in run.tools if tool["function"]["name"] in run.research]), "required"


def _summary_messages(run: Run) -> list[Message]:
    """A record as text, not the messages themselves: providers refuse tool messages in a request without tools."""
    record = run.transcript.record(run.record_tokens)
    ending = run.ledger.ending
    text = directives.summary(record) if ending is None else directives.closing(record, ending)
    return [*run.transcript.system, user_message(text)]
