"""`assert_policy`: one call that says whether a policy keeps its promises, for a test to make.

    def test_the_policy() -> None:
        assert_policy(POLICY, AgentConfig(max_iterations=5), at_most={"model_calls": 17, "tool_calls": 40})

What is proved and what is only tried stands at `assert_policy`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from attrs import evolve, field, frozen, mutable

from agent_fsm.check import Report, check
from agent_fsm.check.explore import CALLS_OF, COUNTS, TASK, amount_of, counted
from agent_fsm.check.program import measured
from agent_fsm.config import Limits
from agent_fsm.driver import run_agent
from agent_fsm.errors import NoRowError, TableError
from agent_fsm.machine import Run, next_effect, request, start, step
from agent_fsm.protocol import DONE, AskModel, Event, ModelReplied, ModelRequest, RunTools, ToolsFinished
from agent_fsm.table import TABLE, Table
from agent_fsm.testing.failing import Broken, PolicyError, importable
from agent_fsm.testing.scripted import ListClock, ScriptedModel, ScriptedTools
from agent_fsm.testing.transcripts import anthropic_faults, openai_faults, request_faults

__all__ = ["Invariant", "PolicyError", "assert_policy"]

Invariant: TypeAlias = Callable[[Run, Event, Run], bool | None]
"""Gets the run before a step, the event and the run after it. False means broken, and so does whatever it raises."""
_NOTHING: Final[Mapping[str, float]] = MappingProxyType({})
_RUN_EACH = 4
"""So many random payloads come to one whole run through the driver, which takes about as long as they do."""


def assert_policy(
    table: Table = TABLE,
    limits: Limits | None = None,
    *,
    at_most: Mapping[str, float] = _NOTHING,
    invariants: Sequence[Invariant] = (),
    examples: int = 100,
    seed: int | None = None,
) -> Report:
    """Return what is proved of *table* under *limits*; fail if anything is not as it should be.

    Proved, for every model and every tool: every run ends, and no run comes to more of anything in *at_most* than it
    says. `agent_fsm.check` explores the real `step` for it, once, and what it takes for granted stands in its report.

    Tried, and so not proved: *invariants*, valid transcripts in every request and at every instant, an event that a
    state has no row for, and the proved bounds over again. They are looked at in every step of the check's own worst
    runs, of *examples* runs with random payloads, and of a few that hostile models and tools play through the driver.
    What they find is shrunk to the simplest run found that breaks the same promise in the same way.

    Args:
        table: the rows, as a run is given them.
        limits: a run's limits or its whole configuration; None: the defaults.
        at_most: by name of a bound in the report (`model_calls`, `tool_calls`, `tokens`, ...) the most there may be.
        invariants: functions `(before, event, after)` that must not return False, nor raise, for any step of any run.
        examples: random runs; 0 tries none, and needs no Hypothesis.
        seed: of the random runs; None: the same runs each time, so that a test passes or fails for good.

    Raises:
        PolicyError: the policy fails. The message has the run as a program to paste, and as a Mermaid diagram with its
            path marked.
        TableError: the table can't be run.
        ValueError: there is no bound of a name in *at_most*.
    """
    __tracebackhide__ = True
    report = check(table, limits)
    judge = _Judge(report, tuple(invariants))
    broken = _unproved(report) or _exceeded(report, at_most)
    if broken is None:
        broken = judge.worst()
        if examples:
            broken = _tried(judge, broken, examples, seed)
    if broken is not None:
        raise PolicyError(broken, report)
    return report


def _tried(judge: "_Judge", known: Broken | None, examples: int, seed: int | None) -> Broken | None:
    """Return what random runs break: what is *known* to be broken, if they know no simpler run that breaks it."""
    try:
        import hypothesis  # noqa: F401 # to say what is missing before anything else does
    except ImportError as error:
        raise ImportError(
            "assert_policy draws random payloads with Hypothesis: pip install hypothesis, or pass examples=0"
        ) from error
    found = _payloads(judge, examples, seed)
    if known is not None:
        return found if found is not None and len(found.events) < len(known.events) else known
    return found or _whole_runs(judge, max(1, examples // _RUN_EACH), seed)


# What is proved


def _unproved(report: Report) -> Broken | None:
    if report.terminates:
        return None
    why = " ".join(report.why.split("\n"))
    if report.lasso is not None:
        shown = ('assert runs[-1].state != "Done"', "print(runs[-1].state, runs[-1].ledger)")
        return Broken("ends", f"not every run ends: {why}", report.lasso.entry, report.lasso.loop, shown)
    asked = ("print(check(table, config))",)
    what = f"it is not proved that every run ends ({report.verdict}): {why}"
    return Broken("ends", what, shown=asked, imports={"check": "agent_fsm.check"})


def _exceeded(report: Report, at_most: Mapping[str, float]) -> Broken | None:
    """Return what comes to more than *at_most* allows, or can't be proved not to."""
    known = {bound.name: bound for bound in report.bounds}
    if strange := sorted(set(at_most) - set(known)):
        raise ValueError(f"there is no bound on {', '.join(strange)}; there are bounds on {', '.join(known)}")
    for name, most in at_most.items():
        bound = known[name]
        if bound.at_most is not None and bound.at_most <= most:
            continue
        if bound.reached is not None and bound.reached > most:
            events = _cut_to(report, bound.witness, name, most)
            reached = _spent(report, events, name)
            what = f"a run comes to {reached:,g} {name}, of which at most {most:,g} are allowed"
        else:
            events = bound.witness
            proved = f"only {bound.at_most:,g} can be proved" if bound.at_most is not None else bound.note
            found = "" if bound.reached is None else f"; no run of more than {bound.reached:,g} is known"
            what = f"at most {most:,g} {name} are allowed, but {proved}{found}"
        return Broken(f"bound {name}", what, events, shown=_shown_count(name), imports=_COUNTING)
    return None


_COUNTING = {"counted": "agent_fsm.check.explore", "pairwise": "itertools"}


def _shown_count(name: str) -> tuple[str, ...]:
    return (f'print("{name}:", {measured(name)})',)


def _spent(report: Report, events: Sequence[Event], name: str) -> float:
    """Return what a run in which *events* happen comes to, of what the bound called *name* is about."""
    run, totals = start(TASK, report.config, report.table), [0] * len(COUNTS)
    for event in events:
        after = step(run, event)
        totals = [one + other for one, other in zip(totals, counted(run, after), strict=True)]
        run = after
    return totals[COUNTS.index(name)] if name in COUNTS else amount_of(run.ledger, name)


def _cut_to(report: Report, events: tuple[Event, ...], name: str, most: float) -> tuple[Event, ...]:
    """Return as few of *events* as still come to more than *most*."""

    def exceeds(some: tuple[Event, ...]) -> bool:
        return _is_run(report, some) and _spent(report, some, name) > most

    end = next(end for end in range(1, len(events) + 1) if _spent(report, events[:end], name) > most)
    return _fewest(events[:end], exceeds)


def _fewest(events: tuple[Event, ...], good: Callable[[tuple[Event, ...]], bool]) -> tuple[Event, ...]:
    """Return *events* without those that can be left out, by one, two or three next to one another."""
    place = 0
    while place < len(events):
        for size in (3, 2, 1):
            fewer = (*events[:place], *events[place + size :])
            if place + size <= len(events) and good(fewer):
                events, place = fewer, -1
                break
        place += 1
    return events


def _is_run(report: Report, events: Sequence[Event]) -> bool:
    """Return whether *events* may happen to a run one after another: each answers what the run wants just then."""
    run, deadline = start(TASK, report.config, report.table), report.config.max_wallclock_seconds
    for event in events:
        if run.state is DONE or not _answers(run, event):
            return False
        late = run.ledger.seconds >= deadline
        if late and isinstance(event, ModelReplied | ToolsFinished):
            return False
        try:
            run = step(run, event)
        except (NoRowError, TableError, ValueError):
            return False
    return True


def _answers(run: Run, event: Event) -> bool:
    """Return whether *event* is about what *run* wants done: its calls, if it is calls, and tools that there are."""
    if isinstance(next_effect(run), RunTools):
        results = getattr(event, "results", ())
        calls = run.pending.calls if run.pending is not None else ()
        return [result.call_id for result in results] == [call.id for call in calls]
    if isinstance(event, ModelReplied):
        return all(call.not_run or call.name in run.names for call in event.calls)
    return not getattr(event, "results", ())


# What is tried


@frozen
class _Judge:
    """Looks at each step of a run."""

    report: Report
    invariants: tuple[Invariant, ...]

    def begin(self) -> "_Watched":
        """Return a run at its start."""
        return _Watched(self, start(TASK, self.report.config, self.report.table))

    def of(self, events: Sequence[Event]) -> Broken | None:
        """Return the first promise that a run breaks in which *events* happen, and the run up to there."""
        watched = self.begin()
        for event in events:
            if broken := watched.after(event):
                return broken
        return None

    def worst(self) -> Broken | None:
        """Return what the runs that the check came up with break, the bounds apart, which are its own claims."""
        for bound in self.report.bounds:
            broken = self.of(bound.witness)
            if broken is not None:
                return self.shrunk(broken)
        return None

    def shrunk(self, broken: Broken) -> Broken:
        """Return as short a run that breaks the same promise."""

        def same(events: tuple[Event, ...]) -> bool:
            if not _is_run(self.report, events[:-1]):
                return False
            found = self.of(events)
            return found is not None and found.claim == broken.claim and len(found.events) == len(events)

        return self.of(_fewest(broken.events, same)) or broken


@mutable
class _Watched:
    """A run that is looked at."""

    judge: _Judge
    run: Run
    events: tuple[Event, ...] = ()
    totals: list[float] = field(factory=lambda: [0.0] * len(COUNTS))
    honest: bool = True
    """Whether no reply has reported more than its request could take at worst."""

    def after(self, event: Event) -> Broken | None:
        """Let *event* happen, and return what it breaks."""
        before = self.run
        self.events = (*self.events, event)
        self.honest = self.honest and _is_honest(before, event)
        try:
            self.run = step(before, event)
        except NoRowError as error:
            return Broken("row", f"{error}, and it may happen there", self.events)
        self.totals = [one + other for one, other in zip(self.totals, counted(before, self.run), strict=True)]
        broken = next(self._broken(before, event), None)
        return None if broken is None else evolve(broken, events=self.events)

    def _broken(self, before: Run, event: Event) -> Iterator[Broken]:
        yield from self._over()
        if self.run.transcript is not before.transcript or self.run.state is not before.state:
            yield from self._invalid()
        for number, invariant in enumerate(self.judge.invariants):
            yield from _doubted(number, invariant, before, event, self.run)

    def _over(self) -> Iterator[Broken]:
        counts = dict(zip(COUNTS, self.totals, strict=True))
        for bound in self.judge.report.bounds:
            if bound.name not in counts and bound.name != "tokens" and not bound.name.startswith(CALLS_OF):
                continue
            came = counts[bound.name] if bound.name in counts else amount_of(self.run.ledger, bound.name)
            if bound.at_most is None or came <= bound.at_most or (bound.name == "tokens" and not self.honest):
                continue
            what = f"a run comes to {came:,g} {bound.name}, of which at most {bound.at_most:,g} were proved"
            yield Broken(f"bound {bound.name}", what, shown=_shown_count(bound.name), imports=_COUNTING)

    def _invalid(self) -> Iterator[Broken]:
        run, config = self.run, self.judge.report.config
        messages = run.transcript.messages()
        if faults := [*openai_faults(messages), *anthropic_faults(messages)]:
            yield _invalid("the conversation", faults[0], "after.transcript.messages()", "openai_faults")
        ask = next_effect(run)
        if isinstance(ask, AskModel):
            asked = request(run, ask, config, timeout_seconds=1.0)
            if faults := request_faults(asked.messages):
                sent = "request(after, next_effect(after), config, timeout_seconds=1.0).messages"
                yield _invalid(f"the request from {run.state}", faults[0], sent, "request_faults")


_LAST = "before, after = runs[-2:]"


def _invalid(which: str, fault: str, messages: str, validator: str) -> Broken:
    shown = (_LAST, f"print({validator}({messages}))")
    imports = {validator: "agent_fsm.testing"}
    if "request(" in messages:
        imports |= {"request": "agent_fsm.machine", "next_effect": "agent_fsm.machine"}
    return Broken("transcript", f"{which} is one that a provider refuses: {fault}", shown=shown, imports=imports)


def _is_honest(run: Run, event: Event) -> bool:
    if not isinstance(event, ModelReplied) or event.prompt_tokens is None or event.completion_tokens is None:
        return True
    return event.prompt_tokens + event.completion_tokens <= run.ledger.request_tokens


def _doubted(number: int, invariant: Invariant, before: Run, event: Event, after: Run) -> Iterator[Broken]:
    name = getattr(invariant, "__name__", repr(invariant))
    try:
        if invariant(before, event, after) is not False:
            return
        came, asked = "False", f"assert {name}(before, events[-1], after) is False"
        kind = "False"
    except Exception as error:  # noqa: BLE001 # whatever it raises is its way to say that it does not hold
        said = str(error).partition("\n")[0]  # pytest tells more of an assertion below it
        came, asked = f"{type(error).__name__}: {said}".rstrip(": "), f"{name}(before, events[-1], after)  # raises"
        kind = type(error).__name__
    can = importable(invariant)
    shown = (_LAST, "print(before.state, after.state, after.ledger)", asked if can else f"# {asked}")
    imports = {name: invariant.__module__} if can else {}
    yield Broken(
        f"invariant {number} {kind}", f"the invariant {name} does not hold: {came}", shown=shown, imports=imports
    )


# Random runs


class _FoundError(Exception):
    """Carries what broke through Hypothesis, which tells failures apart by their class."""

    def __init__(self, broken: Broken) -> None:
        super().__init__(broken.what)
        self.broken = broken


def _searched(play: Callable[[Any], Broken | None], examples: int, seed: int | None) -> Broken | None:
    """Return what the simplest run breaks that *play* finds with what it draws."""
    import hypothesis

    classes: dict[str, type[_FoundError]] = {}

    def tried(data: Any) -> None:
        broken = play(data)
        if broken is not None:
            raise classes.setdefault(broken.claim, type("_FoundError", (_FoundError,), {}))(broken)

    phases = (hypothesis.Phase.generate, hypothesis.Phase.shrink)
    search = hypothesis.settings(
        max_examples=examples,
        derandomize=seed is None,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        phases=phases,
        suppress_health_check=list(hypothesis.HealthCheck),
        verbosity=hypothesis.Verbosity.quiet,
    )(hypothesis.given(hypothesis.strategies.data())(tried))
    if seed is not None:
        search = hypothesis.seed(seed)(search)
    try:
        search()
    except _FoundError as failed:
        return failed.broken
    return None


def _payloads(judge: _Judge, examples: int, seed: int | None) -> Broken | None:
    """Return what runs break to which anything happens that a driver may tell them."""
    from agent_fsm.testing.strategies import edges_of, events

    config = judge.report.config
    edges = edges_of(judge.report.table, config)

    def play(data: Any) -> Broken | None:
        watched = judge.begin()
        while watched.run.state is not DONE:  # the bound on steps ends it
            broken = watched.after(data.draw(events(watched.run, config, edges=edges)))
            if broken is not None:
                return broken
        return None

    broken = _searched(play, examples, seed)
    return None if broken is None else judge.shrunk(broken)


def _whole_runs(judge: _Judge, examples: int, seed: int | None) -> Broken | None:
    """Return what runs break that hostile models and tools play through the driver."""
    from hypothesis import strategies as st

    from agent_fsm.testing.strategies import edges_of, outcomes, replies, timings

    report = judge.report
    names = edges_of(report.table, report.config).tools
    scripts = st.lists(replies(names, hangs=False), min_size=3, max_size=10)
    given = st.fixed_dictionaries({name: st.lists(outcomes(hangs=False), min_size=1, max_size=3) for name in names})

    def play(data: Any) -> Broken | None:
        model = ScriptedModel(data.draw(scripts))
        tools = ScriptedTools(data.draw(given), data.draw(st.sampled_from([("search",), ()])))
        clock = ListClock(data.draw(timings(report.config)))
        result = run_agent(TASK, tools, report.config, model_client=model, table=report.table, clock=clock)
        return judge.of(result.events) or _refused(model.requests, result.events)

    return _searched(play, examples, seed)


def _refused(requests: Sequence[ModelRequest], events: tuple[Event, ...]) -> Broken | None:
    for asked in requests:
        if faults := request_faults(asked.messages):
            return Broken(
                "request", f"the request from {asked.purpose} is one that a provider refuses: {faults[0]}", events
            )
    return None
