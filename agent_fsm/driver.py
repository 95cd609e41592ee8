"""The driver: perform what the machine wants, tell it what happened, until it wants nothing more.

One task a run does the work (the hand), effect after effect, and one lazily re-armed timer watches over whatever it
waits for. When time is up or the run is cancelled, the hand is interrupted; code that ignores that for `GRACE_SECONDS`
is abandoned with its task, and a new hand goes on from the run as it stands. What an abandoned task returns later comes
to nothing.
"""

import asyncio
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum
from typing import Any, TypeAlias, TypedDict, Unpack

from attrs import define, frozen

from agent_fsm.config import AgentConfig
from agent_fsm.errors import ConfigError, RunningLoopError
from agent_fsm.machine import Run, next_effect, request, start, step
from agent_fsm.messages import cut, not_run_results
from agent_fsm.protocol import (
    ABANDONED,
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
from agent_fsm.reading import finished, interrupted, read_field, read_outcome, read_reply, read_tools
from agent_fsm.redaction import Redactor, environment_secrets, redactor
from agent_fsm.stagnation import Pair
from agent_fsm.table import TABLE, Row

__all__ = ["GRACE_SECONDS", "AgentRun", "OnEvent", "RunOptions", "arun_agent", "close_loop", "open_loop", "run_agent"]

GRACE_SECONDS = 0.1
"""How long interrupted code may take to clean up before it is abandoned."""
_CLOSING_S = 2.0
"""Seconds that tools may take to close after a run that has them left; after one that has not, it is half the grace."""

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
    started: dict[int, float]
    """When each call was started, in the loop's time."""
    abandoned: set[int]
    """Those that were started and would not end, and so may go on."""

    def start(self, number: int, time: float) -> dict[str, Any]:
        """Note that a call is started, and return it in the form in which an invoker takes it."""
        self.started[number] = time
        return self.calls[number].as_openai()

    def abandon(self, numbers: Iterable[int]) -> None:
        """Note that these calls go on, if they have not finished."""
        self.abandoned.update(number for number in numbers if self.slots[number] is None)

    def results(self, why: str, time: float) -> tuple[ToolResult, ...]:
        """Return one result a call; *why* says why those without one have none at this *time*."""
        return tuple([slot or self.without_result(number, why, time) for number, slot in enumerate(self.slots)])

    def without_result(self, number: int, why: str, time: float) -> ToolResult:
        """Return the result of a call that has not finished."""
        call, began = self.calls[number], self.started.get(number)
        if began is not None:
            what = "what it did until then"
            if number in self.abandoned:
                what = "it was abandoned and may go on, and what it does"
            text = f"interrupted: {why} before this call finished; {what} is unknown"
        else:
            text = f"not run: {why} before this call was started"
        seconds = 0.0 if began is None else time - began
        return ToolResult(text, ok=False, seconds=seconds, call_id=call.id, name=call.name, ran=began is not None)


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
        table: Sequence[Row] = TABLE,
        log: bool = False,
    ) -> None:
        config = AgentConfig() if config is None else config
        self._owns_client = model_client is None
        self._client: ModelClient = _default_client(config) if model_client is None else model_client
        self._config = _priced(config, self._client)
        self._tools = tools
        self._backend = type(tools).__name__
        self._call_tool: Callable[[dict[str, Any]], Any] = _no_tool
        self._tools_changed: Callable[[], bool] | None = None
        self._close_tools: Callable[[], Coroutine[Any, Any, object]] | None = None
        self._redact: Redactor | None = None
        self._on_event = _both(on_event, _logger() if log else None)
        self._clock = clock
        self._run = start(messages, self._config, table)
        self._events: list[Event] = []
        self._path: list[State] = [PLAN]
        self._seen: dict[Pair, int] = {}
        self._cancelled = False
        self._stop: _Stop | None = None
        self._hand: asyncio.Task[None] | None = None
        self._awaiting = False
        self._turn: _Turn | None = None
        self._deadline = math.inf  # of what the hand waits for, in the loop's time
        self._due = _Stop.DEADLINE
        self._timer: asyncio.TimerHandle | None = None
        self._began = 0.0
        self._waiters: list[asyncio.Future[None]] = []
        self._ended = False
        self._closing: set[asyncio.Task[Any]] = set()
        self._error: BaseException | None = None

    def __await__(self) -> Generator[Any, None, AgentResult]:
        if self._hand is None:
            self._begin()
        try:
            while not self._ended:
                yield from self._waiter()
        except asyncio.CancelledError:
            self.cancel()
            yield from self._settled().__await__()
            raise
        if self._error is not None:
            raise self._error
        return self.result

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
        if self._closing:
            self._loop.call_later(GRACE_SECONDS, _cancel, self._closing)
        if self._ended or self._run.reason is not None:
            return False
        if not self._cancelled:
            self._cancelled = True
            if self._hand is not None and _killed(self._hand):
                self._new_hand(cut_short=self._awaiting)
            elif self._awaiting and self._stop is None:
                self._interrupt(_Stop.CANCEL)
        return True

    def _begin(self) -> None:
        self._loop = asyncio.get_running_loop()
        if self._clock is None:
            self._clock = self._loop.time
        self._sleep = getattr(self._clock, "sleep", asyncio.sleep)
        self._redact = _redactor(self._config)
        if self._tools is not None:
            for_run = getattr(self._tools, "for_run", None)
            self._tools = tools = self._tools if for_run is None else for_run()
            self._call_tool = tools.call_openai_tool
            self._tools_changed = getattr(tools, "tools_changed", None)
            self._close_tools = getattr(tools, "aclose", None) if for_run is not None else None
        self._began = self._clock()
        self._new_hand()

    def _waiter(self) -> "asyncio.Future[None]":
        """Return a future that is done when the run has ended, or when whoever awaits it is cancelled."""
        waiter = self._loop.create_future()
        self._waiters.append(waiter)
        return waiter

    async def _settled(self) -> None:
        # Not for long: who does not stop within the grace is abandoned
        while self._hand is not None and not self._ended:
            try:
                await self._waiter()
            except asyncio.CancelledError:
                continue

    # The hand

    def _new_hand(self, *, cut_short: bool = False) -> None:
        """Go on with a new task, which finds the effect of the last one cut short or none."""
        self._awaiting = False
        self._hand = self._loop.create_task(self._work(cut_short))
        self._hand.add_done_callback(self._put_down)

    def _put_down(self, hand: "asyncio.Task[None]") -> None:
        if hand is not self._hand:
            _look_at(hand)
            return
        if not hand.cancelled():
            self._error = hand.exception()
        elif self._run.reason is None:  # somebody cancelled the hand itself, as a loop that closes does
            self._cancelled = True
            self._new_hand()
            return
        if self._timer is not None:
            self._timer.cancel()
        self._ended = True
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _work(self, cut_short: bool) -> None:
        self._hand = asyncio.current_task()  # an eager task starts before `_new_hand` has it
        event = self._interrupted() if cut_short else None
        self._stop = None
        try:
            while True:
                if event is not None:
                    self._take(event)
                effect = next_effect(self._run)
                if effect is None:
                    break
                ledger = self._run.ledger
                left = ledger.limits.max_wallclock_seconds - ledger.seconds
                self._turn = self._new_turn() if isinstance(effect, RunTools) else None
                if self._cancelled or left <= 0:  # with no time left no effect starts
                    event = self._interrupted(started=False)
                else:
                    event = await self._performed(effect, left)
        except _AbandonedError:
            return
        finally:
            if asyncio.current_task() is self._hand:
                await self._close()

    async def _close(self) -> None:
        """Close what the run opened: politely if it has time left, else within the grace."""
        closes = [self._close_tools, getattr(self._client, "aclose", None) if self._owns_client else None]
        closing = self._closing = {self._loop.create_task(close()) for close in closes if close is not None}
        if closing:
            ledger = self._run.ledger
            left = ledger.limits.max_wallclock_seconds - (self._clock() - self._began)  # type: ignore[misc] # set by now
            hurried = self._cancelled or left < GRACE_SECONDS
            # Half the grace, and as much to end in: code that was abandoned may have had all of it already
            await _bounded(closing, GRACE_SECONDS / 2 if hurried else min(left, _CLOSING_S))

    def _take(self, event: Event) -> None:
        self._run = run = step(self._run, event)
        self._events.append(event)
        for row in run.taken:
            self._path.append(row.target)
        if self._on_event is not None:
            self._on_event(event, run)

    def _now(self) -> float:
        return self._clock() - self._began  # type: ignore[misc] # set before the hand is

    def _performed(self, effect: Effect, left: float) -> Coroutine[Any, Any, Event]:
        match effect:
            case AskModel():
                return self._ask(effect, left)
            case RunTools():
                return self._run_tools(left)
            case ListTools():
                return self._list_tools(left)

    # Waiting for something, and being interrupted

    async def _within(self, seconds: float, due: _Stop, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what the function gives, a `_Raised`, or the `_Stop` that interrupted it; *due* is the deadline's.

        The function may be async or not. Few coroutines are between the loop and it, as each costs every run a little.
        """
        self._due = due
        self._deadline = deadline = self._loop.time() + seconds
        if self._timer is None or self._timer.when() > deadline:
            self._arm(deadline)
        self._awaiting = True
        hand = self._hand
        try:
            outcome = function(*arguments)
            if hasattr(outcome, "__await__"):
                outcome = await outcome
        except asyncio.CancelledError as error:
            outcome = self._why_cancelled(hand) if hand is self._hand else None
            if self._turn is not None and hand is self._hand and _goes_on(error):
                self._turn.abandon(self._turn.started)
        except Exception as error:  # noqa: BLE001 # user-supplied code may raise anything
            outcome = _Raised(error)
        if hand is not self._hand:
            raise _AbandonedError
        self._awaiting = False
        self._deadline = math.inf
        if hand is not None and hand.cancelling():
            await self._take_in(hand)
        return outcome

    async def _take_in(self, hand: "asyncio.Task[None]") -> None:
        """Meet a cancel of *hand* that what it awaited swallowed or never met; a TaskGroup of its own may leave one."""
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self._cancelled = self._cancelled or self._stop is None  # somebody cancelled the hand itself
        while hand.uncancel():
            pass

    def _why_cancelled(self, hand: "asyncio.Task[None] | None") -> "_Stop | _Raised":
        stop = self._stop
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
            if self._turn is not None:
                self._turn.abandon(self._turn.started)
            self._new_hand(cut_short=True)

    def _interrupted(self, *, started: bool = True) -> Event:
        """Return the event that the effect in hand was interrupted, or not *started*, and be ready for the next."""
        stop, self._stop = self._stop, None
        turn, now = self._turn, self._now()
        if turn is not None and stop is _Stop.TOOL_TIMEOUT and not self._cancelled:
            return finished(turn.calls, turn.results(_timed_out(self._config), self._loop.time()), self._seen, now=now)
        cancelled = self._cancelled
        if turn is None:
            return Interrupted(now, cancelled, started=started)
        why = "the run was cancelled" if cancelled else "the time of the run was up"
        results = turn.results(why, self._loop.time())
        return interrupted(results, now=now, cancelled=cancelled, started=started)

    # The effects

    async def _list_tools(self, left: float) -> Event:
        tools = self._tools
        if tools is None:
            return ToolsListed(self._now())
        outcome = await self._within(left, _Stop.DEADLINE, tools.list_openai_tools)
        if isinstance(outcome, _Stop) or self._stop is not None:
            return self._interrupted()
        if isinstance(outcome, _Raised):
            return ToolsUnavailable(self._now(), self._backend, _told(outcome.error, self._redact))
        return self._listed(outcome)

    def _listed(self, outcome: object) -> ToolsListed | ToolsUnavailable:
        research = read_field(self._tools, "research_tools")
        missing = read_field(self._tools, "unavailable")
        return read_tools(
            outcome,
            now=self._now(),
            backend=self._backend,
            research=research,
            unavailable=missing,
            redact=self._redact,
        )

    async def _listed_anew(self, left: float) -> ToolsListed | None:
        """Return what the tool backend offers now if that has changed and it says so in time; None: go on as before."""
        limit = min(left, self._config.tool_timeout_seconds)
        outcome = await self._within(limit, _Stop.TOOL_TIMEOUT, self._ask_anew)
        self._stop = None  # the calls of the turn are done: the time of the run and a cancel come up at its next effect
        listed = None if outcome is None or isinstance(outcome, _Stop | _Raised) else self._listed(outcome)
        return listed if isinstance(listed, ToolsListed) else None

    async def _ask_anew(self) -> list[dict[str, Any]] | None:
        assert self._tools is not None and self._tools_changed is not None  # it is they who have changed
        return await self._tools.list_openai_tools() if self._tools_changed() else None

    async def _ask(self, ask: AskModel, left: float) -> Event:
        run = self._run
        wait = ask.not_before - run.ledger.seconds
        if wait > 0:
            began = self._loop.time()
            slept = await self._within(left, _Stop.DEADLINE, self._sleep, wait)
            left -= max(wait, self._loop.time() - began)
            if isinstance(slept, _Stop) or self._stop is not None or left <= 0:
                return self._interrupted(started=False)
        asked = request(run, ask, self._config, timeout_seconds=left)
        outcome = await self._within(left, _Stop.DEADLINE, self._client.complete, asked)
        # An answer counts even if it comes after the time was up; an error that the stop brought about does not
        if isinstance(outcome, _Stop) or self._cancelled or (self._stop and isinstance(outcome, _Raised)):
            return self._interrupted()
        self._stop = None
        if isinstance(outcome, _Raised):
            return _model_failed(self._now(), outcome.error, self._redact)
        return read_reply(
            outcome,
            now=self._now(),
            offered=run.names,
            max_calls=run.ledger.limits.max_tools_per_iter,
            turn=run.ledger.iterations,
            redact=self._redact,
        )

    def _new_turn(self) -> _Turn:
        reply = self._run.pending
        calls = () if reply is None else reply.calls
        return _Turn(
            calls, [next(iter(not_run_results([call]))) if call.not_run else None for call in calls], {}, set()
        )

    async def _run_tools(self, left: float) -> Event:
        turn = self._turn
        assert turn is not None  # set for this effect
        began = self._loop.time()
        todo = [number for number, slot in enumerate(turn.slots) if slot is None]
        if len(todo) == 1:
            stop = await self._run_one(turn, todo[0], left)
        else:
            stop = await self._within(left, _Stop.DEADLINE, self._call_all, turn, todo)
        if isinstance(stop, _Stop) or self._stop is not None:
            return self._interrupted()
        if isinstance(stop, _Raised):
            raise stop.error  # no tool's: they have their results
        listing = None
        if self._tools_changed is not None and not self._cancelled:
            listing = await self._listed_anew(max(0.0, left - (self._loop.time() - began)))
        results = turn.results(_FOREIGN_CANCEL, self._loop.time())
        return finished(turn.calls, results, self._seen, now=self._now(), listing=listing)

    async def _run_one(self, turn: _Turn, number: int, left: float) -> "_Stop | None":
        """Run the only call of a turn without a task of its own, which would cost more than all else in the turn."""
        limit = self._config.tool_timeout_seconds
        due = _Stop.TOOL_TIMEOUT if limit < left else _Stop.DEADLINE
        call = turn.start(number, self._loop.time())
        outcome = await self._within(min(limit, left), due, self._call_tool, call)
        if isinstance(outcome, _Stop):
            return outcome
        self._store(turn, number, outcome)
        return None

    async def _call_all(self, turn: _Turn, todo: Sequence[int]) -> None:
        """Run the calls, `tool_concurrency` at a time, each under its own time limit."""
        waiting, running = deque(todo), dict[asyncio.Task[Any], int]()
        limit, clock = self._config.tool_timeout_seconds, self._loop.time
        try:
            while waiting or running:
                while waiting and len(running) < self._config.tool_concurrency:
                    number = waiting.popleft()
                    call = turn.start(number, clock())
                    running[self._loop.create_task(self._call_one(turn, number, call))] = number
                left = limit + min(turn.started[number] for number in running.values()) - clock()
                done, _ = await asyncio.wait(running, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED)
                late = {task for task, number in running.items() if clock() >= turn.started[number] + limit} - done
                await _end(late)
                turn.abandon(running[task] for task in late if not task.done())
                for task in late:
                    task.add_done_callback(_look_at)
                for task in done | late:
                    number = running.pop(task)
                    if task.done() and not task.cancelled():
                        task.result()  # its outcome is in its slot; but KeyboardInterrupt and our own bugs go on
                    if turn.slots[number] is None:
                        why = _timed_out(self._config) if task in late else _FOREIGN_CANCEL
                        turn.slots[number] = turn.without_result(number, why, clock())
        finally:
            await _end(running, 0.8 * GRACE_SECONDS)  # the hand has all of it, and is to go on itself
            turn.abandon(number for task, number in running.items() if not task.done())
            for task in running:
                task.add_done_callback(_look_at)

    async def _call_one(self, turn: _Turn, number: int, call: dict[str, Any]) -> None:
        try:
            outcome = await _outcome(self._call_tool, call)
        except asyncio.CancelledError as error:
            if _goes_on(error):
                turn.abandon([number])
            raise
        if turn.slots[number] is None:  # else its time was over before
            self._store(turn, number, outcome)

    def _store(self, turn: _Turn, number: int, outcome: object) -> None:
        if isinstance(outcome, _Raised):
            outcome = ToolResult(f"error: {_told(outcome.error, self._redact)}", ok=False)
        seconds = self._loop.time() - turn.started[number]
        chars, redact = self._config.observation_chars, self._redact
        turn.slots[number] = read_outcome(turn.calls[number], outcome, seconds=seconds, chars=chars, redact=redact)


_FOREIGN_CANCEL = "it was cancelled, but not by the run,"


def _no_tool(call: dict[str, Any]) -> Any:
    raise LookupError("there are no tools")  # and none is called: no call of an unknown tool is run


def _timed_out(config: AgentConfig) -> str:
    return f"its time limit of {config.tool_timeout_seconds:g} s was over"


def _killed(hand: "asyncio.Task[None]") -> bool:
    """Return whether *hand* was ended from outside, as by KeyboardInterrupt."""
    return hand.done() and (hand.cancelled() or not isinstance(hand.exception(), Exception | None))


def _goes_on(error: BaseException) -> bool:
    """Return whether a tool says of its cancelled call that it goes on, as one in a thread does."""
    return ABANDONED in getattr(error, "__notes__", ())


def _look_at(task: "asyncio.Task[Any]") -> None:
    if not task.cancelled():
        task.exception()  # nobody wants it any more; looked at, so that asyncio does not log it


async def _outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what the function gives, or a `_Raised`; it may be async or not."""
    try:
        given = function(*arguments)
        return await given if hasattr(given, "__await__") else given
    except Exception as error:  # noqa: BLE001 # the same for calls side by side, which `_within` does not see
        return _Raised(error)


async def _end(tasks: "Collection[asyncio.Task[Any]]", seconds: float = GRACE_SECONDS / 2) -> None:
    """Cancel *tasks* and wait *seconds* for them; who ignores that is left behind."""
    _cancel(tasks)
    if tasks:
        await asyncio.wait(tasks, timeout=seconds)


def _cancel(tasks: "Collection[asyncio.Task[Any]]") -> None:
    for task in tasks:
        task.cancel()


async def _bounded(closing: "Collection[asyncio.Task[Any]]", seconds: float) -> None:
    """Wait for what closes something, but no longer than *seconds* and a moment in which to end when cancelled."""
    for task in closing:
        task.add_done_callback(_look_at)
    try:
        await asyncio.wait(closing, timeout=seconds)
    finally:
        await _end([task for task in closing if not task.done()])


_OUR_BUGS = (TypeError, AttributeError, NameError, LookupError, AssertionError, NotImplementedError)


def _redactor(config: AgentConfig) -> Redactor | None:
    """Return what redacts the secrets that the environment and *config* have now, and known shapes of keys."""
    if not config.redact_secrets:
        return None
    secrets = environment_secrets(os.environ)
    if config.completion_kwargs:
        given = config.completion_kwargs
        headers = given.get("extra_headers")
        named = {**given, **headers} if isinstance(headers, Mapping) else given
        secrets += environment_secrets({name: value for name, value in named.items() if isinstance(value, str)})
    return redactor(secrets)


def _model_failed(now: float, error: Exception, redact: Redactor | None) -> ModelFailed:
    if isinstance(error, ModelError):
        after = read_field(error, "retry_after")
        known = isinstance(after, int | float) and 0 < after <= sys.float_info.max  # false of NaN, too
        words = _words(error) if redact is None else redact(_words(error))
        return ModelFailed(now, read_field(error, "retryable") is True, words, after if known else None)
    return ModelFailed(now, not isinstance(error, _OUR_BUGS), _told(error, redact))


def _told(error: Exception, redact: Redactor | None) -> str:
    words = _words(error) if redact is None else redact(_words(error))
    return cut(f"{type(error).__name__}: {words}", 2_000)


def _words(error: Exception) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 # a foreign exception may be unable to say what it is
        return "(it can't be put into words)"


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
    source = PLAN

    def on_event(event: Event, run: Run) -> None:
        nonlocal source
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
        source = run.state

    return on_event


# The doors


class RunOptions(TypedDict, total=False):
    """What a run takes by keyword; `AgentRun` says what each is."""

    model_client: ModelClient | None
    on_event: OnEvent | None
    clock: Clock | None
    table: Sequence[Row]
    log: bool


async def arun_agent(
    messages: Sequence[Mapping[str, Any]],
    tools: ToolInvoker | None = None,
    config: AgentConfig | None = None,
    **options: Unpack[RunOptions],
) -> AgentResult:
    """Run the agent and return its result; takes what `AgentRun` takes."""
    return await AgentRun(messages, tools, config, **options)


async def _result_of(run: AgentRun) -> AgentResult:
    return await run


def run_agent(
    messages: Sequence[Mapping[str, Any]],
    tools: ToolInvoker | None = None,
    config: AgentConfig | None = None,
    **options: Unpack[RunOptions],
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
    loop = open_loop()
    try:
        task = loop.create_task(_result_of(run))
        try:
            return loop.run_until_complete(task)
        except KeyboardInterrupt:
            run.cancel()
            loop.run_until_complete(run._settled())
            raise
    finally:
        close_loop(loop)


class _DaemonThreads(ThreadPoolExecutor):
    """Does each work in a daemon thread of its own.

    The threads of any other executor are joined when the interpreter ends, however long they hang.
    """

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> "Future[Any]":
        future: Future[Any] = Future()

        def do() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work(*arguments, **named))
                except BaseException as error:  # noqa: BLE001 - what awaits it is told, whatever it is
                    future.set_exception(error)

        threading.Thread(target=do, name="agent_fsm worker", daemon=True).start()
        return future


def open_loop() -> asyncio.AbstractEventLoop:
    """Return a new event loop for a run. What is done in its threads, as by `asyncio.to_thread`, delays no exit."""
    loop = asyncio.new_event_loop()
    loop.set_default_executor(_DaemonThreads())
    return loop


def close_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Close *loop*, which ran a run: what is left of its tasks is cancelled, and not waited for beyond the grace.

    `asyncio.run` would wait for ever for a task that ignores cancellation.
    """
    loop.run_until_complete(_end(asyncio.all_tasks(loop)))
    loop.run_until_complete(_bounded({loop.create_task(loop.shutdown_asyncgens())}, GRACE_SECONDS))
    loop.close()
