"""`check`: explore, rank, sum up, and replay what is claimed to be a run."""

from collections.abc import Callable, Sequence
from functools import cache

from attrs import asdict, evolve

from agent_fsm.check.certificate import certificate_of
from agent_fsm.check.explore import CALLS_OF, COUNTS, TASK, Edge, Graph, TooManyError, amount_of, boxes_of, explore
from agent_fsm.check.ranking import Part, most_of, ranked, residue
from agent_fsm.check.reads import Field
from agent_fsm.check.report import Bound, Report, Verdict
from agent_fsm.check.witness import Replayed, find_lasso, replayed
from agent_fsm.config import AgentConfig, Limits
from agent_fsm.machine import Run, start, step
from agent_fsm.protocol import (
    DONE,
    Event,
    Interrupted,
    ModelFailed,
    ModelReplied,
    Said,
    ToolsListed,
)
from agent_fsm.rules import rules_of
from agent_fsm.table import TABLE, Row

__all__ = ["check"]

MOST_BOXES = 20_000
FINER_BOXES = 4_000
"""Boxes up to which finer ones are tried, for bounds that no run was found to come to."""


def check(table: Sequence[Row] = TABLE, limits: Limits | None = None, *, most_boxes: int = MOST_BOXES) -> Report:
    """Return whether every run of *table* ends under *limits*, and what it comes to at most.

    The real `step` is explored, against everything that the world may answer to each effect. Guards that compare a
    number with a limit or a constant are read exactly; any other is taken to answer anything.

    Args:
        table: the rows, as a run is given them.
        limits: a run's limits or its whole configuration; None: the defaults.
        most_boxes: configurations beyond which the search gives up, undecided.

    Raises:
        TableError: the table can't be run; the message names the row.
        ConfigError: there is a limit on cost but no price; or the table counts the calls of too many tools.
    """
    config = _config(limits)
    rules_of(table)
    boxes = boxes_of(table, config)
    best: Report | None = None
    while True:
        try:
            graph = explore(table, config, boxes, most=most_boxes)
        except TooManyError as error:
            return best or Report(table, config, Verdict.UNDECIDED, f"{error}: too many to search")
        report, finer = _judged(table, config, graph)
        best = report if best is None else _better(best, report)
        if finer is None or not _affordable(graph, finer, most_boxes if not report.terminates else FINER_BOXES):
            return best
        boxes = boxes.finer(finer)


def _config(limits: Limits | None) -> AgentConfig:
    if limits is None:
        return AgentConfig()
    if isinstance(limits, AgentConfig):
        return limits
    return AgentConfig(**asdict(limits, recurse=False))


def _better(old: Report, new: Report) -> Report:
    """Return *new* with the bounds that *old* knew better."""
    if not (old.terminates and new.terminates):
        return new
    bounds = tuple(
        evolve(
            (one if (one.reached or 0) > (other.reached or 0) else other),
            at_most=None if one.at_most is None or other.at_most is None else min(one.at_most, other.at_most),
        )
        for one, other in zip(old.bounds, new.bounds, strict=True)
    )
    # The coarsest boxes make the shortest certificate
    return evolve(
        new,
        bounds=bounds,
        why=old.why,
        certifying=old._certifying,
        boxes=old.boxes + new.boxes,
        steps=old.steps + new.steps,
    )


def _affordable(graph: Graph, at: Field, most: int) -> bool:
    cuts = graph.boxes.cuts[graph.boxes.fields.index(at)]
    if not cuts:
        return False
    return len(graph.keys) * (cuts[-1] + 1) / (len(cuts) + 1) <= most and len(cuts) < cuts[-1]


def _judged(table: Sequence[Row], config: AgentConfig, graph: Graph) -> tuple[Report, Field | None]:
    """Return what *graph* shows, and the field of which finer ranges would show more."""
    report = Report(table, config, Verdict.UNDECIDED, "", boxes=len(graph.keys), steps=graph.steps)
    report = evolve(
        report,
        reasons=tuple(sorted({key[1] for key in graph.keys if key[0] is DONE})),
        untaken=tuple(f"{place} ({row.label})" for place, row in enumerate(table) if place not in graph.rows),
        guards=tuple(sorted({oracle.name for oracle in graph.oracles if not oracle.measure})),
    )
    if graph.missing:
        return evolve(report, verdict=Verdict.REFUTED, why="\n".join(sorted(graph.missing))), None
    parts = ranked(graph)
    stuck = list(residue(parts))
    if stuck:
        return _stuck(table, config, graph, stuck, report)
    finer: Field | None = None
    bounds = []
    for name in (*COUNTS, *(f"{CALLS_OF}{tool}" for tool in graph.boxes.reads.counted_tools())):
        bound, parted = _counted(table, config, graph, parts, name)
        finer = finer or parted
        bounds.append(bound)
    report = evolve(
        report,
        verdict=Verdict.PROVED_WHATEVER if report.guards else Verdict.PROVED,
        why=_ranking_told(graph, parts),
        bounds=(*bounds, *_amounts(table, config, graph, bounds)),
        certifying=cache(lambda: certificate_of(graph, parts)),
    )
    return report, finer


def _stuck(
    table: Sequence[Row], config: AgentConfig, graph: Graph, stuck: list[Part], report: Report
) -> tuple[Report, Field | None]:
    lasso, parted, guards = find_lasso(table, config, graph, stuck)
    if lasso is not None:
        why = "a run can go round for ever: no guard sees a difference from one time to the next"
        return evolve(report, verdict=Verdict.REFUTED, why=why, lasso=lasso), None
    if guards:
        why = f"a run goes round for ever unless {' or '.join(guards)} ends it, which can't be read"
        return evolve(report, verdict=Verdict.ASSUMED, why=why, guards=guards), parted
    why = "no counter was found that ends every way round, and no run that goes round for ever"
    return evolve(report, why=why), parted


def _ranking_told(graph: Graph, parts: list[Part]) -> str:
    names = [at[1] for at in graph.boxes.fields]

    def rising(some: list[Part]) -> set[tuple[str, ...]]:
        found: set[tuple[str, ...]] = set()
        for part in some:
            inner = rising(part.choices[0] if part.choices else part.inner)
            found |= {(names[part.counter], *each) for each in inner or {()}} if part.counter is not None else inner
        return found

    ways = sorted(rising(parts), key=lambda way: (len(way), way))
    longest = [way for way in ways if not any(way != other and _within(way, other) for other in ways)]
    if not longest:
        return "no run goes round at all"
    told = " or ".join(" or, leaving it as it is, ".join(way) for way in longest)
    return f"every way round raises {told}, and no run can raise that for ever"


def _within(way: tuple[str, ...], other: tuple[str, ...]) -> bool:
    rest = iter(other)
    return all(name in rest for name in way)


# Bounds


def _counted(
    table: Sequence[Row], config: AgentConfig, graph: Graph, parts: list[Part], name: str
) -> tuple[Bound, Field | None]:
    weight, reached_by = _measured(graph, name)
    most, way = most_of(graph, parts, weight)
    known = replayed(table, config, graph, way)
    reached = reached_by(known)
    return Bound(name, most, reached, known.events), None if reached == most else known.parted


def _measured(graph: Graph, name: str) -> tuple[Callable[[Edge], float], Callable[[Replayed], float]]:
    """Return what a step adds to the count called *name*, and what a run that was replayed came to."""
    if name in COUNTS:
        place = COUNTS.index(name)
        return lambda edge: edge.counts[place], lambda known: known.counts[place]
    tool = name.removeprefix(CALLS_OF)
    if ("calls", tool) not in graph.boxes.fields:  # no guard turns at any number of them
        return lambda edge: edge.counts.tool_calls, lambda known: amount_of(known.run.ledger, name)
    number = graph.boxes.fields.index(("calls", tool))
    return lambda edge: edge.ops[number][1], lambda known: amount_of(known.run.ledger, name)


def _amounts(table: Sequence[Row], config: AgentConfig, graph: Graph, counts: list[Bound]) -> list[Bound]:
    """Return the bounds of seconds, tokens and dollars."""
    tokens = _budget(table, config, graph, "tokens", config.max_tokens_total)
    bounds = [_seconds(table, config), tokens]
    if config.max_cost_usd is not None:
        bounds.append(_budget(table, config, graph, "cost_usd", config.max_cost_usd))
    elif config.prompt_usd_per_token is not None and config.reply_usd_per_token is not None:
        calls = next(bound.at_most for bound in counts if bound.name == "model_calls")
        bounds.append(_priced(config, tokens, calls or 0))
    return bounds


def _seconds(table: Sequence[Row], config: AgentConfig) -> Bound:
    """Every effect is stopped when the time of the run is up, so that their deadlines add up to it."""
    deadline = config.max_wallclock_seconds
    run = step(start(TASK, config, table), event := Interrupted(deadline, cancelled=False))
    return Bound("seconds", deadline, run.ledger.seconds, (event,), "if the driver stops each effect in time")


_HONEST = "if no provider bills more than the bytes sent and max_reply_tokens"


def _budget(table: Sequence[Row], config: AgentConfig, graph: Graph, name: str, most: float) -> Bound:
    unbudgeted = graph.unbudgeted.get(name)
    if unbudgeted is not None:
        asked = (
            "tokens_needed > limits.max_tokens_total" if name == "tokens" else "cost_needed_usd > limits.max_cost_usd"
        )
        return Bound(name, None, None, note=f"the row {_told(unbudgeted, table)} may ask the model though {asked}")
    run, events = _spendthrift(table, config, name)
    return Bound(name, most, min(most, getattr(run.ledger, name)), events, _HONEST)


def _told(row: Row, table: Sequence[Row]) -> str:
    place = next(
        (
            place
            for place, each in enumerate(table)
            if each.name == row.name
            and each.updates == row.updates
            and each.target is row.target
            and each.guard.name == row.guard.name
        ),
        None,
    )
    return f"{row.label!r}" if place is None else f"{place} ({row.label})"


def _spendthrift(table: Sequence[Row], config: AgentConfig, name: str) -> tuple[Run, tuple[Event, ...]]:
    """Return a run whose first request needs just all that is left beside the closing one, and what happens to it."""
    first = start(TASK, config, table)
    ledger = step(first, ToolsListed(0.0)).ledger
    left: float = config.max_tokens_total - ledger.tokens_needed
    if name == "cost_usd" and config.prompt_usd_per_token:
        left = min(left, ((config.max_cost_usd or 0.0) - ledger.cost_needed_usd) // config.prompt_usd_per_token)
    message = {"role": "assistant", "content": "It is"}
    events: tuple[Event, ...] = (
        ToolsListed(0.0, size=max(0, int(left))),
        # As long as the record of the closing request can be, so that this one costs its worst, too
        ModelReplied(0.0, Said.CUT_OFF, "It is", message=message, size=first.record_tokens),
        ModelFailed(0.0, retryable=False, error="error"),
    )
    run, taken = first, []
    for event in events:
        if run.state is DONE or type(event) not in run.rules.waiting.get(run.state, {}):
            break
        run = step(run, event)
        taken.append(event)
    return run, tuple(taken)


def _priced(config: AgentConfig, tokens: Bound, model_calls: float) -> Bound:
    """Return the most dollars for so many tokens, of which replies may be so many as there are requests to reply to."""
    prompt, reply = config.prompt_usd_per_token or 0.0, config.reply_usd_per_token or 0.0
    if tokens.at_most is None:
        return Bound("cost_usd", None, None, note="there is no bound on tokens")
    replied = min(tokens.at_most, model_calls * config.max_reply_tokens) if reply > prompt else 0
    return Bound("cost_usd", replied * reply + (tokens.at_most - replied) * prompt, None, note=_HONEST)
