"""Runs cancelled at every point at which they can be, and what that leaves of their transcript, results and tasks.

    python tests/cancellation_sweep.py [--long]      prints a table: variant, points, faults

A point is a number of callbacks that the event loop has run since the run began: after each the run is cancelled once,
in a run of its own, until one ends before its point comes. That is finer than loop ticks, of which each runs several
callbacks. Where time is virtual it passes only when nothing else is to be done, so that each variant is the same every
time, timers that race a result included; where servers and processes are asked it is real, and the points are those
that come up, or milliseconds.

What is swept is a `Subject`, so that other agents can be swept too: see `tests/benchmarks/cancellation_peers.py`.
"""

import asyncio
import functools
import itertools
import json
import selectors
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from attrs import field, frozen

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from agent_fsm.testing import anthropic_faults, openai_faults

Way: TypeAlias = Literal["task", "run"]
"""How to cancel: the task that awaits the run, or the run by its own method where it has one."""
Kind: TypeAlias = Literal["transcript", "follow-up", "lost", "left", "reason"]
KINDS: tuple[Kind, ...] = ("transcript", "follow-up", "lost", "left", "reason")
PROMPT = {"role": "user", "content": "Go on."}
LATER_S = 1.0
"""Seconds after which even what ignores its cancellation has ended."""
_MANY_STEPS = 100_000


# The loop


class HungError(Exception):
    """Raised where a loop in virtual time has nothing to wait for, or never comes to an end."""


class _Instant(selectors.DefaultSelector):
    """Lets time pass at once instead of waiting."""

    now = 0.0
    endless = False

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise HungError("nothing will ever happen again")
        if self.endless:
            self.endless = False
            raise HungError("it goes on and on")
        self.now += max(0.0, timeout)
        return super().select(0)


class SteppedLoop(asyncio.SelectorEventLoop):
    """Counts the callbacks that it has run, and does what is due after one of them."""

    def __init__(self, *, virtual: bool) -> None:
        self._instant = _Instant() if virtual else None
        super().__init__(self._instant)
        self.steps = 0
        self.due: dict[int, Callable[[], None]] = {}
        """By the number of the callback after which it is done."""

    def time(self) -> float:
        return super().time() if self._instant is None else self._instant.now

    def call_soon(self, callback: Callable[..., object], *args: Any, **named: Any) -> Any:  # type: ignore[override] # TypeVarTuple
        return super().call_soon(self._counted, callback, args, **named)

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, **named: Any) -> Any:  # type: ignore[override] # TypeVarTuple
        return super().call_at(when, self._counted, callback, args, **named)

    def _counted(self, callback: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        try:
            callback(*arguments)
        finally:
            self.steps += 1
            if self._instant is not None:
                self._instant.endless = self.steps > _MANY_STEPS
            do = self.due.pop(self.steps, None)
            if do is not None:
                do()


# What is swept


class Subject(Protocol):
    """A run of an agent, from its start to what is saved of it."""

    returned: list[str]
    """What the tools that returned have returned, each with a text of its own."""

    async def work(self) -> object:
        """Do the run, in the task that may be cancelled."""

    def cancel(self, task: "asyncio.Task[Any]", way: Way) -> None:
        """Cancel it."""

    def faults(self, task: "asyncio.Task[Any]") -> Iterator[str]:
        """Give what is wrong with how the task and the run have ended, whose task is done."""

    async def saved(self) -> list[dict[str, Any]]:
        """Return the messages that are saved, as OpenAI's."""

    async def follow_up(self) -> Iterator[str]:
        """Go on with what was saved and one more prompt; give what is wrong with it. What it raises is wrong too."""

    def released(self) -> Iterator[str]:
        """Give what is left of processes, files and the like."""


@frozen
class Variant:
    """A run, and how and when it is cancelled."""

    name: str
    subject: Callable[[], Subject]
    ways: tuple[Way, ...] = ("task",)
    """How it is cancelled, one after the other."""
    between: tuple[int, ...] = (0,)
    """Steps between one cancel and the next; each is tried at every point."""
    virtual: bool = True
    stride: int = 1
    """Every how many points one is tried."""
    unit: Literal["callback", "tick", "ms"] = "callback"
    deaf: bool = False
    """Whether some of it ignores cancellation, and so is left behind for a while."""
    settling_s: float = 0.0
    """Real seconds that it may take until the tasks and processes that were started are gone: on a busy machine a
    process that is killed takes longer to end than a run has."""


@frozen
class Fault:
    """Something that is not as it must be."""

    kind: Kind
    what: str


@frozen
class Outcome:
    """What came of a run that was cancelled at one point."""

    point: tuple[int, ...]
    reached: bool
    """False if the run was over before."""
    cancelled: bool
    faults: tuple[Fault, ...]


@frozen
class Sweep:
    """What came of a variant at all of its points."""

    variant: Variant
    outcomes: tuple[Outcome, ...]
    seconds: float = field(default=0.0, eq=False)

    @property
    def cancelled(self) -> int:
        """At how many points the cancel came before the run was over."""
        return sum(outcome.cancelled for outcome in self.outcomes)

    def count(self, kind: Kind) -> int:
        """Return at how many points there was a fault of this kind."""
        return sum(any(fault.kind == kind for fault in outcome.faults) for outcome in self.outcomes)

    def faults(self) -> list[str]:
        """Return what is wrong, in words, each with its point."""
        return [
            f"{self.variant.name} at {outcome.point}: {fault.kind}: {fault.what}"
            for outcome in self.outcomes
            for fault in outcome.faults
        ]


def sweep(variant: Variant) -> Sweep:
    """Return what comes of *variant* when it is cancelled at each of its points."""
    began = time.monotonic()
    outcomes: list[Outcome] = []
    for point in itertools.count(0, variant.stride):
        tried = [attempt(variant, (point, between)) for between in variant.between]
        outcomes += tried
        if not tried[0].reached:
            break
    return Sweep(variant, tuple(outcomes), time.monotonic() - began)


def attempt(variant: Variant, point: tuple[int, int]) -> Outcome:
    """Return what comes of one run of *variant*."""
    loop = SteppedLoop(virtual=variant.virtual)
    try:
        return loop.run_until_complete(_attempt(loop, variant, point))
    finally:
        loop.steps = 0
        for task in asyncio.all_tasks(loop):
            task.cancel()
            loop.run_until_complete(asyncio.wait({task}))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def _attempt(loop: SteppedLoop, variant: Variant, point: tuple[int, int]) -> Outcome:
    complaints: list[Any] = []
    loop.set_exception_handler(lambda loop, context: complaints.append(context))
    subject = variant.subject()
    task = loop.create_task(subject.work())
    reached: list[bool] = []

    def cut(way: Way) -> None:
        reached.append(not task.done())
        subject.cancel(task, way)

    cuts = [(point[0] + number * point[1], functools.partial(cut, way)) for number, way in enumerate(variant.ways)]
    waiting = None
    if variant.unit == "callback":
        _at_steps(loop, cuts)
    else:
        waiting = loop.create_task(_at(variant.unit, cuts))
    await asyncio.wait({task})
    until = loop.time() + variant.settling_s
    while _tasks_left(waiting) and loop.time() < until:  # noqa: ASYNC110 - it is to wait no longer than it must
        await asyncio.sleep(0.005)
    faults = [Fault("left", each) for each in _tasks_left(waiting)] if not variant.deaf else []
    if waiting is not None:
        waiting.cancel()
    loop.due.clear()
    faults += [Fault("reason", each) for each in subject.faults(task)]
    returned = list(subject.returned)
    faults += [fault async for fault in _saved_faults(subject, returned)]
    until = loop.time() + variant.settling_s
    while (left := list(subject.released())) and loop.time() < until:  # noqa: ASYNC110 - a process has no event
        await asyncio.sleep(0.005)
    faults += [Fault("left", each) for each in left]
    if variant.virtual:
        await asyncio.sleep(LATER_S)
        faults += [Fault("left", f"later: {each}") for each in _tasks_left(waiting)]
    faults += [Fault("left", f"the loop was told of {each}") for each in complaints]
    return Outcome(point, reached[:1] == [True], task.cancelled() or reached[:1] == [True], tuple(faults))


def _at_steps(loop: SteppedLoop, cuts: Iterable[tuple[int, Callable[[], None]]]) -> None:
    for steps, do in cuts:
        before = loop.due.get(loop.steps + 1 + steps)
        loop.due[loop.steps + 1 + steps] = do if before is None else functools.partial(_both, before, do)


def _both(first: Callable[[], None], second: Callable[[], None]) -> None:
    first()
    second()


async def _at(unit: str, cuts: Iterable[tuple[int, Callable[[], None]]]) -> None:
    """Do the *cuts*, each at so many ticks of the loop or milliseconds."""
    passed = 0
    for at, do in cuts:
        if unit == "ms":
            await asyncio.sleep((at - passed) / 1_000)
        else:
            for _ in range(at - passed):
                await asyncio.sleep(0)
        passed = at
        do()


def _tasks_left(*known: "asyncio.Task[Any] | None") -> list[str]:
    own = {asyncio.current_task(), *known}
    return [f"the task {task.get_coro()!r}" for task in asyncio.all_tasks() - own]


async def _saved_faults(subject: Subject, returned: Sequence[str]) -> Any:
    messages = json.loads(json.dumps(await subject.saved()))
    for each in (*openai_faults([*messages, PROMPT]), *anthropic_faults([*messages, PROMPT])):
        yield Fault("transcript", each)
    told = [str(message.get("content")) for message in messages if message.get("role") == "tool"]
    for text in returned:
        if not any(text in each for each in told):
            yield Fault("lost", f"{text!r} was returned, and is told nowhere")
    try:
        for each in await subject.follow_up():
            yield Fault("follow-up", each)
    except Exception as error:  # noqa: BLE001 - what another agent raises there is what is to be found out
        yield Fault("follow-up", f"{type(error).__name__}: {str(error)[:200]}")


# The table


def print_table(sweeps: Iterable[Sweep]) -> int:
    """Print what came of each sweep; return the number of faults."""
    print(f"{'variant':62} {'points':>6} {'open':>6}  {'  '.join(KINDS)}      s", flush=True)
    done: list[Sweep] = []
    for each in sweeps:
        done.append(each)
        counts = "  ".join(f"{each.count(kind):{len(kind)}}" for kind in KINDS)
        print(
            f"{each.variant.name:62} {len(each.outcomes):6} {each.cancelled:6}  {counts}  {each.seconds:5.1f}",
            flush=True,
        )
        for fault in each.faults()[:3]:
            print(f"    {fault}", flush=True)
    points, faults = sum(len(each.outcomes) for each in done), sum(len(each.faults()) for each in done)
    before = sum(each.cancelled for each in done)
    print(f"{len(done)} variants, {points} points, {before} before the run was over, {faults} faults")
    return faults


def main() -> int:
    """Print the table of our own runs; return the exit code."""
    from tests.cancelled_runs import deterministic, real

    long = "--long" in sys.argv
    with real(long=long) as others:
        return 1 if print_table(map(sweep, itertools.chain(deterministic(long=long), others))) else 0


if __name__ == "__main__":
    sys.exit(main())
