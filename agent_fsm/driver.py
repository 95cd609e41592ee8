"""The driver: perform what the machine wants, tell it what happened, until it wants nothing more.

One task a run does the work (the hand), effect after effect, and one lazily re-armed timer watches over whatever it
waits for. When time is up or the run is cancelled, the hand is interrupted; code that ignores that for `GRACE_SECONDS`
is abandoned with its task, and a new hand goes on from the run as it stands. What an abandoned task returns later comes
to nothing.
"""

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Generator, Mapping, Sequence
from enum import Enum
from typing import Any, TypeAlias

from attrs import define, frozen

from agent_fsm.config import AgentConfig
from agent_fsm.errors import ConfigError, RunningLoopError
from agent_fsm.machine import Run, next_effect, request, start, step
from agent_fsm.protocol import (
    PLAN,
    AgentResult,
    AskModel,
    Effect,
    Event,
    Interrupted,
    ListTools,
    ModelClient,
    ModelError,
    ModelFailed,
    ModelReplied,
    Prices,
    RunTools,
    State,
    ToolCall,
    ToolInvoker,
    ToolResult,
    ToolsListed,
    ToolsUnavailable,
    Usage,
)
from agent_fsm.reading import finished, interrupted, read_outcome, read_reply, read_tools
from agent_fsm.stagnation import Pair
from agent_fsm.table import TABLE, Table
from agent_fsm.transcript import cut, not_run_results

__all__ = ["GRACE_SECONDS", "AgentRun", "OnEvent", "arun_agent", "close_loop", "run_agent"]

GRACE_SECONDS = 0.1
"""How long interrupted code may take to clean up before it is abandoned."""

Clock: TypeAlias = Callable[[], float]
"""Returns seconds from any fixed point. If it has an async method `sleep(seconds)`, retries wait by that."""
OnEvent: TypeAlias = Callable[[Event, Run], None]
"""Called after each step with the event and the run that followed; must not block."""


class _Stop(Enum):
    """Why the hand was interrupted."""

    CANCEL = "cancel"
    DEADLINE = "deadline"
    TOOL_TIMEOUT = "tool timeout"


@frozen
class _Raised:
    """What user-supplied code raised instead of returning."""

    error: Exception


class _AbandonedError(Exception):
    """Raised in a hand that was given up, once it gets control back."""


@define
class _Turn:
    """The calls of a turn and what has come of them; each call fills its own slot as it finishes."""

    calls: tuple[ToolCall, ...]
    slots: list[ToolResult | None]
    started: set[int]

    def results(self, why: str) -> tuple[ToolResult, ...]:
        """Return one result a call; *why* says why those without one have none."""
        return tuple([slot or self.without_result(number, why) for number, slot in enumerate(self.slots)])

    def without_result(self, number: int, why: str) -> ToolResult:
        """Return the result of a call that has not finished."""
        call = self.calls[number]
        if number in self.started:
            text = f"interrupted: {why} before this call finished; what it did until then is unknown"
        else:
            text = f"not run: {why} before this call was started"
        return ToolResult(text, ok=False, call_id=call.id, name=call.name, ran=number in self.started)


class AgentRun:
    """A run of the agent: `await run` gives its result, `run.cancel()` ends it, `run.result` is the result so far.

    Cancelling a task that awaits the run ends the run and raises CancelledError there; `run.result` then says
    `cancelled` and has lost nothing.

    Args:
        messages: OpenAI chat messages; the last is from the user or a tool.
        tools: what lists and calls the tools; None: the model has none.
        config: limits and behaviour.
        model_client: what answers requests; None: the offline planner for the model `offline`, else LiteLLM.
        on_event: called after each step.
        clock: where the seconds of the run come from; None: the event loop's own clock.
        table: the rows that say where the run may go.
        log: log one structlog line a step.

    Raises:
        MessagesError: no provider accepts *messages*.
        ConfigError: *config* asks for what can't be kept, such as a cost limit for a model of unknown price.
        TableError: *table* can't be run.
    """

    def __init__(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: ToolInvoker | None = None,
        config: AgentConfig | None = None,
        *,
        model_client: ModelClient | None = None,
        on_event: OnEvent | None = None,
        clock: Clock | None = None,
        table: Table = TABLE,
        log: bool = False,
    ) -> None:
        config = AgentConfig() if config is None else config
        self._owns_client = model_client is None
        self._client: ModelClient = _default_client(config) if model_client is None else model_client
        self._config = _priced(config, self._client)
        self._tools = tools
        self._on_event = _both(on_event, _logger() if log else None)
        self._clock = clock
        self._run = start(messages, self._config, table)
        self._events: list[Event] = []
        self._path: list[State] = [PLAN]
        self._seen: dict[Pair, int] = {}
        self._cancelled = False
        self._stop: _Stop | None = None
        self._hand: asyncio.Task[None] | None = None
        self._serial = 0  # of the hand; that of an abandoned one is past
        self._awaiting = False
        self._turn: _Turn | None = None
        self._deadline = math.inf  # of what the hand waits for, in the loop's time
        self._due = _Stop.DEADLINE
        self._timer: asyncio.TimerHandle | None = None
        self._began = 0.0
        self._over = asyncio.Event()
        self._error: BaseException | None = None

    def __await__(self) -> Generator[Any, None, AgentResult]:
        return self._wait().__await__()

    @property
    def run(self) -> Run:
        """The run as it stands."""
        return self._run

    @property
    def result(self) -> AgentResult:
        """The result so far, valid at every instant."""
        run = self._run
        replies = [event for event in self._events if isinstance(event, ModelReplied)]
        ledger = run.ledger
        return AgentResult(
            final_answer=run.answer,
            stopped_reason=run.reason,
            detail=run.detail,
            messages=run.transcript.messages(),
            iterations=ledger.iterations,
            usage=Usage(
                prompt_tokens=sum(reply.prompt_tokens or 0 for reply in replies),
                completion_tokens=sum(reply.completion_tokens or 0 for reply in replies),
                charged_tokens=ledger.tokens,
                cost_usd=ledger.cost_usd,
                model_calls=ledger.model_calls,
                tool_calls=ledger.tool_calls,
            ),
            events=tuple(self._events),
            path=tuple(self._path),
            used_model=next((reply.model for reply in reversed(replies) if reply.model), self._config.model),
            seconds=ledger.seconds,
        )

    def cancel(self) -> bool:
        """End the run as `cancelled`; return False if it is over already. May be called from the loop's thread only."""
        if self._over.is_set() or self._run.reason is not None:
            return False
        if not self._cancelled:
            self._cancelled = True
            if self._hand is not None and self._hand.done():
                self._new_hand()  # the last one was killed, as by KeyboardInterrupt
            elif self._awaiting and self._stop is None:
                self._interrupt(_Stop.CANCEL)
        return True

    async def _wait(self) -> AgentResult:
        if self._hand is None:
            self._loop = asyncio.get_running_loop()
            if self._clock is None:
                self._clock = self._loop.time
            self._sleep = getattr(self._clock, "sleep", asyncio.sleep)
            self._began = self._clock()
            self._new_hand()
        try:
            await self._over.wait()
        except asyncio.CancelledError:
            self.cancel()
            await self._settled()
            raise
        if self._error is not None:
            raise self._error
        return self.result

    async def _settled(self) -> None:
        while not self._over.is_set():  # not for long: who does not stop within the grace is abandoned
            try:
                await self._over.wait()
            except asyncio.CancelledError:
                continue

    # The hand

    def _new_hand(self, event: Event | None = None) -> None:
        self._serial += 1
        self._stop = None
        self._awaiting = False
        self._hand = self._loop.create_task(self._work(self._serial, event))
        self._hand.add_done_callback(self._put_down)

    def _put_down(self, hand: "asyncio.Task[None]") -> None:
        if hand is not self._hand:
            if not hand.cancelled():
                hand.exception()  # nobody wants it any more; looked at, so that asyncio does not log it
            return
        if hand.cancelled():
            self._error = asyncio.CancelledError()
        elif hand.exception() is not None:
            self._error = hand.exception()
        if self._timer is not None:
            self._timer.cancel()
        self._over.set()

    async def _work(self, serial: int, event: Event | None) -> None:
        try:
            while True:
                if event is not None:
                    self._take(event)
                effect = next_effect(self._run)
                if effect is None:
                    break
                event = await self._perform(effect)
        except _AbandonedError:
            return
        finally:
            if self._owns_client and serial == self._serial:
                await self._close_client()

    async def _close_client(self) -> None:
        close = getattr(self._client, "aclose", None)
        if close is not None:
            closing = asyncio.ensure_future(close())
            await asyncio.wait({closing}, timeout=GRACE_SECONDS)
            closing.cancel()

    def _take(self, event: Event) -> None:
        self._events.append(event)
        self._run = run = step(self._run, event)
        for row in run.taken:
            self._path.append(row.target)
        if self._on_event is not None:
            self._on_event(event, run)

    def _now(self) -> float:
        return self._clock() - self._began  # type: ignore[misc] # set before the hand is

    async def _perform(self, effect: Effect) -> Event:
        ledger = self._run.ledger
        left = ledger.limits.max_wallclock_seconds - ledger.seconds
        self._turn = self._new_turn() if isinstance(effect, RunTools) else None
        if self._cancelled or left <= 0:  # with no time left no effect starts
            return self._interrupted()
        match effect:
            case AskModel():
                return await self._ask(effect, left)
            case RunTools():
                return await self._run_tools(left)
            case ListTools():
                return await self._list_tools(left)

    # Waiting for something, and being interrupted

    async def _within(self, seconds: float, due: _Stop, awaited: Awaitable[Any]) -> Any:
        """Return what *awaited* gives, or the `_Stop` that interrupted it; *due* is that of the deadline."""
        self._due = due
        self._deadline = deadline = self._loop.time() + seconds
        if self._timer is None or self._timer.when() > deadline:
            self._arm(deadline)
        self._awaiting = True
        hand = self._hand
        try:
            outcome = await awaited
        except asyncio.CancelledError:
            outcome = self._why_cancelled(hand)
        if hand is not self._hand:
            raise _AbandonedError
        self._awaiting = False
        self._deadline = math.inf
        return outcome

    def _why_cancelled(self, hand: "asyncio.Task[None] | None") -> "_Stop | _Raised":
        stop = self._stop if hand is self._hand else None
        if hand is not None and hand.cancelling():
            if stop is None:  # somebody cancelled the hand itself, as a loop that closes does
                self._cancelled = True
                stop = _Stop.CANCEL
            while hand.uncancel():
                pass
        return _Raised(RuntimeError("it was cancelled, but not by the run")) if stop is None else stop

    def _arm(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(deadline, self._watch)

    def _watch(self) -> None:
        self._timer = None
        if self._deadline > self._loop.time() + 0.001:  # put off since the timer was set, perhaps for ever
            if self._deadline < math.inf:
                self._arm(self._deadline)
        elif self._awaiting and self._stop is None:
            self._interrupt(self._due)

    def _interrupt(self, stop: _Stop) -> None:
        self._stop = stop
        assert self._hand is not None  # it is waiting
        self._hand.cancel()
        self._loop.call_later(GRACE_SECONDS, self._abandon, self._hand, len(self._events))

    def _abandon(self, hand: "asyncio.Task[None]", events: int) -> None:
        if hand is self._hand and not hand.done() and self._awaiting and events == len(self._events):
            self._new_hand(self._interrupted())

    def _interrupted(self) -> Event:
        """Return the event that the effect in hand was interrupted, and be ready for the next."""
        stop, self._stop = self._stop, None
        turn, now = self._turn, self._now()
        if turn is not None and stop is _Stop.TOOL_TIMEOUT:
            return finished(turn.calls, turn.results(_timed_out(self._config)), self._seen, now=now)
        cancelled = self._cancelled
        if turn is None:
            return Interrupted(now, cancelled)
        why = "the run was cancelled" if cancelled else "the time of the run was up"
        return interrupted(turn.results(why), now=now, cancelled=cancelled)

    # The effects

    async def _list_tools(self, left: float) -> Event:
        tools = self._tools
        if tools is None:
            return ToolsListed(self._now())
        outcome = await self._within(left, _Stop.DEADLINE, _outcome(tools.list_openai_tools))
        if isinstance(outcome, _Stop):
            return self._interrupted()
        backend = type(tools).__name__
        if isinstance(outcome, _Raised):
            return ToolsUnavailable(self._now(), backend, _told(outcome.error))
        research = getattr(tools, "research_tools", None)
        return read_tools(outcome, now=self._now(), backend=backend, research=research)

    async def _ask(self, ask: AskModel, left: float) -> Event:
        run = self._run
        wait = ask.not_before - run.ledger.seconds
        if wait > 0:
            if isinstance(await self._within(left, _Stop.DEADLINE, self._sleep(wait)), _Stop):
                return self._interrupted()
            left = max(0.0, left - wait)
        asked = request(run, ask, self._config, timeout_seconds=left)
        outcome = await self._within(left, _Stop.DEADLINE, _outcome(self._client.complete, asked))
        if isinstance(outcome, _Stop):
            return self._interrupted()
        if isinstance(outcome, _Raised):
            return _model_failed(self._now(), outcome.error)
        return read_reply(
            outcome,
            now=self._now(),
            offered=run.names,
            max_calls=run.ledger.limits.max_tools_per_iter,
            turn=run.ledger.iterations,
        )

    def _new_turn(self) -> _Turn:
        reply = self._run.pending
        calls = () if reply is None else reply.calls
        return _Turn(calls, [next(iter(not_run_results([call]))) if call.not_run else None for call in calls], set())

    async def _run_tools(self, left: float) -> Event:
        turn = self._turn
        assert turn is not None  # set for this effect
        todo = [number for number, slot in enumerate(turn.slots) if slot is None]
        limit = self._config.tool_timeout_seconds
        if len(todo) == 1:  # a task of its own would cost more than all else in this turn
            due = _Stop.TOOL_TIMEOUT if limit < left else _Stop.DEADLINE
            stop = await self._within(min(limit, left), due, self._call(turn, todo[0]))
        else:
            stop = await self._within(left, _Stop.DEADLINE, self._call_all(turn, todo)) if todo else None
        if isinstance(stop, _Stop):
            return self._interrupted()
        results = turn.results("it was cancelled, but not by the run,")
        return finished(turn.calls, results, self._seen, now=self._now())

    async def _call(self, turn: _Turn, number: int) -> None:
        turn.started.add(number)
        call, began = turn.calls[number], self._loop.time()
        outcome = await _outcome(self._tools.call_openai_tool, call.as_openai())  # type: ignore[union-attr] # without tools no call is run
        seconds = self._loop.time() - began
        chars = self._config.observation_chars
        if isinstance(outcome, _Raised):
            outcome = ToolResult(f"error: {_told(outcome.error)}", ok=False)
        if turn.slots[number] is None:  # else it was given up, and what comes now comes too late
            turn.slots[number] = read_outcome(call, outcome, seconds=seconds, chars=chars)

    async def _call_all(self, turn: _Turn, todo: Sequence[int]) -> None:
        """Run the calls, `tool_concurrency` at a time, each under its own time limit."""
        waiting, running = deque(todo), dict[asyncio.Task[None], tuple[int, float]]()
        try:
            while waiting or running:
                while waiting and len(running) < self._config.tool_concurrency:
                    number = waiting.popleft()
                    task = self._loop.create_task(self._call(turn, number))
                    running[task] = (number, self._loop.time() + self._config.tool_timeout_seconds)
                left = min(deadline for _, deadline in running.values()) - self._loop.time()
                done, _ = await asyncio.wait(running, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED)
                late = {task for task, (_, deadline) in running.items() if deadline <= self._loop.time()} - done
                await _end(late)
                for task in done | late:
                    number, _ = running.pop(task)
                    if turn.slots[number] is None:
                        why = _timed_out(self._config) if task in late else "it was cancelled, but not by the run,"
                        turn.slots[number] = turn.without_result(number, why)
        finally:
            await _end(running)


def _timed_out(config: AgentConfig) -> str:
    return f"its time limit of {config.tool_timeout_seconds:g} s was over"


async def _outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what user-supplied code gives, or a `_Raised` with what it raised; it may be async or not."""
    try:
        given = function(*arguments)
        return await given if hasattr(given, "__await__") else given
    except Exception as error:  # noqa: BLE001 # the one place around user-supplied code: it may raise anything
        return _Raised(error)


async def _end(tasks: "Collection[asyncio.Task[None]]") -> None:
    """Cancel *tasks* and wait a moment for them; who ignores that is left behind."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=GRACE_SECONDS / 2)


_OUR_BUGS = (TypeError, AttributeError, NameError, LookupError, AssertionError, NotImplementedError)


def _model_failed(now: float, error: Exception) -> ModelFailed:
    if isinstance(error, ModelError):
        after = error.retry_after
        known = after is not None and math.isfinite(after) and after > 0
        return ModelFailed(now, error.retryable, str(error), after if known else None)
    return ModelFailed(now, not isinstance(error, _OUR_BUGS), _told(error))


def _told(error: Exception) -> str:
    return cut(f"{type(error).__name__}: {error}", 2_000)


def _default_client(config: AgentConfig) -> ModelClient:
    if config.model == "offline":
        from agent_fsm.offline import OfflinePlanner

        return OfflinePlanner()
    from agent_fsm.llm import LiteLLMClient

    return LiteLLMClient(config)


def _priced(config: AgentConfig, client: ModelClient) -> AgentConfig:
    """Return *config* with the prices that its cost budget needs.

    Raises:
        ConfigError: there is a cost budget and a model whose price nobody knows.
    """
    if config.max_cost_usd is None or None not in (config.prompt_usd_per_token, config.reply_usd_per_token):
        return config
    look_up = getattr(client, "prices", None)
    found: list[Prices] = []
    for model in (config.model, *config.fallback_models):
        prices = None if look_up is None else look_up(model)
        if prices is None:
            raise ConfigError(
                f"max_cost_usd is set, but the price of {model!r} is unknown:"
                " give prompt_usd_per_token and reply_usd_per_token, or leave max_cost_usd out"
            )
        found.append(prices)
    return config.priced(
        Prices(max(each.prompt_usd_per_token for each in found), max(each.reply_usd_per_token for each in found))
    )


def _both(first: OnEvent | None, second: OnEvent | None) -> OnEvent | None:
    if first is None or second is None:
        return first or second

    def on_event(event: Event, run: Run) -> None:
        first(event, run)
        second(event, run)

    return on_event


def _logger() -> OnEvent:
    import structlog

    log = structlog.get_logger("agent_fsm")

    def on_event(event: Event, run: Run) -> None:
        source = run.taken[0].sources[0] if len(run.taken[0].sources) == 1 else run.ledger.asking
        ledger = run.ledger
        log.info(
            "stepped",
            source=str(source),
            on=type(event).__name__,
            row=run.taken[-1].label,
            target=str(run.state),
            reason=None if run.reason is None else str(run.reason),
            iterations=ledger.iterations,
            seconds=round(ledger.seconds, 3),
        )

    return on_event


# The doors


async def arun_agent(
    messages: Sequence[Mapping[str, Any]],
    tools: ToolInvoker | None = None,
    config: AgentConfig | None = None,
    **options: Any,
) -> AgentResult:
    """Run the agent and return its result; takes what `AgentRun` takes."""
    return await AgentRun(messages, tools, config, **options)


def run_agent(
    messages: Sequence[Mapping[str, Any]],
    tools: ToolInvoker | None = None,
    config: AgentConfig | None = None,
    **options: Any,
) -> AgentResult:
    """Run the agent from plain code and return its result; takes what `AgentRun` takes.

    Ctrl-C cancels the run, cleans up and raises KeyboardInterrupt.

    Raises:
        RunningLoopError: an event loop already runs here, as in a notebook; `await arun_agent(...)` there.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        raise RunningLoopError(
            "run_agent can't be called where an event loop already runs (a notebook, an async function);"
            " write `await arun_agent(...)` with the same arguments"
        )
    run = AgentRun(messages, tools, config, **options)
    loop = asyncio.new_event_loop()
    try:
        task = loop.create_task(run._wait())
        try:
            return loop.run_until_complete(task)
        except KeyboardInterrupt:
            run.cancel()
            loop.run_until_complete(run._settled())
            raise
    finally:
        close_loop(loop)


def close_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Close *loop*, which ran a run: what is left of its tasks is cancelled, and not waited for beyond the grace.

    `asyncio.run` would wait for ever for a task that ignores cancellation.
    """
    loop.run_until_complete(_end(asyncio.all_tasks(loop)))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
