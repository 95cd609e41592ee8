"""Loop bugs of real agents, written down as policies or as runs, and what catches each.

A bug that is a mistake in a loop's rules is a table: it must be refused when built, or refuted by `check` with a run
that never ends, or its bounds must differ from what its author promised, or a row that was meant to stop it must never
be taken. A bug that is a loop's lack of a rule is a run under the shipped table: where the original went on, this one
must end. A false alarm is a run that must *not* be stopped. What is not caught is listed like the rest, with why.

Threads are named as in the theme tables of the field notes that the project was planned from, or as found since. Of
some the notes give the theme only; then the sentence tells the theme. A variant of a bug names the thread it varies.

`python tests/loop_bugs.py` prints the table.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from itertools import count
from typing import Any

from attrs import evolve, field, frozen

from agent_fsm import AgentConfig, AgentResult, AgentRun, ModelError, ModelRequest, StopReason, run_agent
from agent_fsm.check import Verdict, check
from agent_fsm.errors import ConfigError, TableError
from agent_fsm.guards import ALWAYS, Guard
from agent_fsm.protocol import (
    CALL_TOOLS,
    DONE,
    PLAN,
    REPAIR,
    RESEARCH,
    Ended,
)
from agent_fsm.table import (
    TABLE,
    Row,
    Table,
    add,
    answered,
    asked_for_tools,
    at_max_iterations,
    cancelled,
    counter,
    failed,
    fatal,
    ledger,
    limits,
    may_retry,
    observe,
    out_of_time,
    refused,
    repeating,
    reset,
    retryable,
    unsure,
)
from agent_fsm.testing import HANG, ListClock, ScriptedModel, ScriptedTools


class How(StrEnum):
    """What becomes of a bug."""

    REFUSED = "refused when built"
    REFUTED = "refuted: a run never ends"
    BOUND = "a bound differs from the promise"
    UNTAKEN = "the row is never taken"
    ENDED = "ended where the original went on"
    KEPT = "kept on where the original gave up"
    LEFT_ALONE = "no false alarm"
    NOT_CAUGHT = "not caught"


SMALL = AgentConfig(max_iterations=2, max_tools_per_iter=1, max_model_retries=1)


@frozen(kw_only=True)
class Bug:
    """A bug, and what it is modelled by: a table or a run."""

    name: str
    thread: str
    wrong: str
    """What went wrong."""
    how: How
    why_not: str = ""
    """Why it is not caught."""
    table: Callable[[], Table] | None = None
    config: AgentConfig = SMALL
    promised: Mapping[str, int] = field(factory=dict)
    """Bounds that the author of the loop had in mind; a bound that is exceeded, or not come to, breaks the promise."""
    meant: str = ""
    """The label of the row that was meant to stop it."""
    run: Callable[[], tuple[AgentResult, bool]] | None = None
    """Returns what a run came to, and whether it ended, or went on, as it should."""
    slow: bool = False


def how_caught(bug: Bug) -> tuple[How, str]:
    """Return what catches *bug*, and what was found."""
    if bug.run is not None:
        result, good = bug.run()
        kind = bug.how if bug.how in (How.KEPT, How.LEFT_ALONE) else How.ENDED
        found = f"{result.stopped_reason} after {result.usage.model_calls} requests, {result.usage.tool_calls} calls"
        return (kind if good else How.NOT_CAUGHT), found
    assert bug.table is not None  # one of the two models it
    try:
        table = bug.table()
        report = check(table, bug.config)
    except (TableError, ConfigError) as error:
        return How.REFUSED, str(error)
    if report.verdict is Verdict.REFUTED and report.lasso is not None:
        return How.REFUTED, f"a lasso of {len(report.lasso.entry)} and {len(report.lasso.loop)} events"
    for name, most in bug.promised.items():
        bound = report.bound(name)
        if bound.at_most != most:
            there = "no bound" if bound.at_most is None else f"at most {bound.at_most:,.0f}"
            return How.BOUND, f"{name}: {there}, promised {most:,}"
    if bug.meant and any(bug.meant in row for row in report.untaken):
        return How.UNTAKEN, bug.meant
    return How.NOT_CAUGHT, f"{report.verdict}"


# What tables are made of

_ASK = (add("iterations"), add("turns"))
NO_CAP = TABLE.without("iterations at max, closing", "iterations at max")
CAP = observe(at_max_iterations, DONE, reason=StopReason.MAX_ITERATIONS)
GO_ON = observe(ALWAYS, PLAN, *_ASK)


def _under(config: AgentConfig) -> Table:
    """Return the shipped table, if there can be such a configuration."""
    return TABLE


def from_scratch(*observing: Row) -> Table:
    """Return a plain loop that chooses by the rows *observing*, after a cancel, the deadline and fatal errors."""
    waiting = [row for row in TABLE if row.events]
    stops = [
        observe(cancelled, DONE, reason=StopReason.CANCELLED),
        observe(answered, DONE, reason=StopReason.SUCCESS),
        observe(out_of_time, DONE, reason=StopReason.MAX_WALLCLOCK),
        observe(fatal, DONE, reason=StopReason.MODEL_ERROR),
    ]
    return Table((*waiting, *stops, *observing))


def calls_capped(cap: Guard) -> Table:
    """Return a loop that goes on after turns of calls that succeed only, until *cap* ends it."""
    return from_scratch(
        observe(cap, DONE, reason=StopReason.MAX_ITERATIONS),
        observe(failed | retryable | unsure | refused, DONE, reason=StopReason.MAX_FAILURES),
        GO_ON,
    )


# What runs are made of

TASK = [{"role": "user", "content": "How much is 6 times 7?"}]
SAME = [("work", {"q": "6 * 7"})]


def _run(
    model: Iterable[Any],
    tools: Mapping[str, Any],
    *,
    research: Iterable[str] = (),
    clock: ListClock | None = None,
    table: Table = TABLE,
    usage: tuple[int, int] | None = (100, 20),
    **settings: Any,
) -> AgentResult:
    return run_agent(
        TASK,
        ScriptedTools(tools, tuple(research)),
        AgentConfig(**settings),
        model_client=ScriptedModel(list(model), usage=usage),
        clock=ListClock([0]) if clock is None else clock,
        table=table,
    )


def _ended(result: AgentResult, reason: StopReason, most_calls: int) -> tuple[AgentResult, bool]:
    return result, result.stopped_reason is reason and result.usage.model_calls <= most_calls


def identical_calls() -> tuple[AgentResult, bool]:
    result = _run([SAME], {"work": ["a result"]}, max_iterations=300)
    return _ended(result, StopReason.STAGNATION, 6)


def identical_failing_calls() -> tuple[AgentResult, bool]:
    result = _run([SAME], {"work": [RuntimeError("no such table")]}, max_iterations=300)
    return result, result.stopped_reason in (StopReason.STAGNATION, StopReason.MAX_FAILURES)


def a_circle_of_calls(length: int) -> Callable[[], tuple[AgentResult, bool]]:
    def run() -> tuple[AgentResult, bool]:
        circle = [[("work", {"q": number})] for number in range(length)]
        result = _run(circle * 300, {"work": lambda q: f"the result of {q}"}, max_iterations=300)
        return _ended(result, StopReason.STAGNATION, 6 * length)

    return run


def polling_for_ever() -> tuple[AgentResult, bool]:
    ticks = count()
    result = _run(
        [[("poll", {})]],
        {"poll": lambda: f"pending, {next(ticks)} s"},
        max_iterations=10_000,
        max_tokens_total=200_000,
        usage=(1_000, 100),
    )
    return _ended(result, StopReason.BUDGET, 200)


def polling_that_comes_to_an_end() -> tuple[AgentResult, bool]:
    ticks = count()
    polls: list[Any] = [[("poll", {})]] * 20
    result = _run([*polls, "It is done."], {"poll": lambda: f"pending, {next(ticks)} %"}, max_iterations=30)
    return result, result.stopped_reason is StopReason.SUCCESS


def the_same_call_with_other_results() -> tuple[AgentResult, bool]:
    states = iter(["red", "red", "green", "red", "red", "done"])
    polls: list[Any] = [[("poll", {})]] * 6
    result = _run([*polls, "It is done."], {"poll": lambda: next(states)}, max_iterations=10)
    return result, result.stopped_reason is StopReason.SUCCESS and result.usage.tool_calls == 6


def polling_that_is_told_the_same() -> tuple[AgentResult, bool]:
    states = iter(["pending"] * 9 + ["done"])
    polls: list[Any] = [[("poll", {})]] * 10
    result = _run([*polls, "It is done."], {"poll": lambda: next(states)}, max_iterations=20)
    return result, result.stopped_reason is StopReason.SUCCESS


def the_same_question_in_other_words() -> tuple[AgentResult, bool]:
    words = count()

    def search(q: str) -> str:
        return f"nothing for {q}"

    asking = lambda request: [("search", {"q": f"6 * 7, put another way ({next(words)})"})]  # noqa: E731 # an item of the script
    result = _run([asking], {"search": search}, max_iterations=20)
    return _ended(result, StopReason.STAGNATION, 19)


def unknown_tool() -> tuple[AgentResult, bool]:
    result = _run([[("no_such_tool", {})]], {"work": ["x"]}, max_iterations=300)
    return result, result.stopped_reason in (StopReason.STAGNATION, StopReason.MAX_FAILURES)


def malformed_arguments() -> tuple[AgentResult, bool]:
    result = _run([[("work", "[1, 2]")]], {"work": ["x"]}, max_iterations=300)
    return result, result.stopped_reason in (StopReason.STAGNATION, StopReason.MAX_FAILURES)


def empty_replies() -> tuple[AgentResult, bool]:
    return _ended(_run([""], {"work": ["x"]}, max_iterations=300), StopReason.MAX_FAILURES, 6)


def cap_with_work_lost() -> tuple[AgentResult, bool]:
    so_far = "So far: 6 * 7 was looked up."
    script = [*[[("work", {"q": number})] for number in range(3)], so_far]
    result = _run(script, {"work": lambda q: f"the result of {q}"}, max_iterations=3)
    kept = [message["content"] for message in result.messages if message["role"] == "tool"]
    good = result.stopped_reason is StopReason.MAX_ITERATIONS and result.final_answer == so_far
    return result, good and kept == ["the result of 0", "the result of 1", "the result of 2"]


def closing_summary_with_calls() -> tuple[AgentResult, bool]:
    result = _run([lambda request: [("work", {"q": len(request.messages)})]], {"work": lambda q: q}, max_iterations=2)
    good = result.usage.tool_calls == 2 and result.messages[-1]["role"] == "tool"
    return result, good and result.stopped_reason is StopReason.MAX_ITERATIONS and result.usage.model_calls == 3


def late_rate_limit() -> tuple[AgentResult, bool]:
    turns: list[Any] = [[("work", {"q": number})] for number in range(8)]
    busy = ModelError("429", retryable=True, retry_after=1.0)
    result = _run([*turns, busy, "42"], {"work": lambda q: f"the result of {q}"}, max_iterations=10)
    return result, result.stopped_reason is StopReason.SUCCESS and result.usage.tool_calls == 8


def fallback_after_tools() -> tuple[AgentResult, bool]:
    model = ScriptedModel([SAME, ModelError("down", retryable=True), "42"])
    config = AgentConfig(model="first", fallback_models=("second",))
    result = run_agent(TASK, ScriptedTools({"work": ["x"]}), config, model_client=model, clock=ListClock([0]))
    asked = [request.model for request in model.requests]
    return result, result.stopped_reason is StopReason.SUCCESS and asked == ["first", "first", "second"]


def hung_model() -> tuple[AgentResult, bool]:
    began = time.monotonic()
    config = AgentConfig(max_wallclock_seconds=0.2)
    result = run_agent(TASK, config=config, model_client=ScriptedModel([HANG]))
    return result, result.stopped_reason is StopReason.MAX_WALLCLOCK and time.monotonic() - began < 2.0


def hung_tool() -> tuple[AgentResult, bool]:
    config = AgentConfig(max_wallclock_seconds=5.0, tool_timeout_seconds=0.1)
    tools = ScriptedTools({"work": [HANG], "fine": ["fine"]})
    model = ScriptedModel([[("work", {}), ("fine", {})], "42"])
    result = run_agent(TASK, tools, config, model_client=model)
    kept = any(message["content"] == "fine" for message in result.messages)
    return result, result.stopped_reason is StopReason.SUCCESS and kept


def pages_without_end() -> tuple[AgentResult, bool]:
    async def listing() -> list[Any]:
        for _ in count():  # the cursor does not advance
            await asyncio.sleep(0.01)
        return []

    config = AgentConfig(max_wallclock_seconds=0.2)
    result = run_agent(TASK, ScriptedTools({}, listing=listing), config, model_client=ScriptedModel(["42"]))
    return result, result.stopped_reason is StopReason.MAX_WALLCLOCK


def cancel_in_a_tool() -> tuple[AgentResult, bool]:
    async def main() -> AgentResult:
        started = asyncio.Event()

        async def work(**_: Any) -> Any:
            started.set()
            return HANG

        tools = ScriptedTools({"work": work})
        run = AgentRun(TASK, tools, AgentConfig(), model_client=ScriptedModel([SAME]))
        waiting = asyncio.ensure_future(run)
        await started.wait()
        run.cancel()
        return await asyncio.wait_for(waiting, 2.0)

    result = asyncio.run(main())
    return result, result.stopped_reason is StopReason.CANCELLED


def deadline_with_work_lost(table: Table) -> Callable[[], tuple[AgentResult, bool]]:
    def reply(request: ModelRequest) -> Any:
        return [("work", {"q": len(request.messages)})] if request.tools else "So far: much."

    def run() -> tuple[AgentResult, bool]:
        times = ListClock([0, *range(0, 300, 14)])
        result = _run([reply], {"work": lambda q: f"the result of {q}"}, clock=times, table=table, max_iterations=50)
        return result, result.stopped_reason is StopReason.MAX_WALLCLOCK and result.final_answer is not None

    return run


# The corpus

_INNER = counter("inner")
_STRIKES = counter("strikes")
_AGAIN = counter("again")

BUGS = (
    # Identical calls and polling
    Bug(
        name="identical calls to the cap",
        thread="langgraph#6731",
        wrong="the same call with the same result, over and over until the cap",
        how=How.ENDED,
        run=identical_calls,
    ),
    Bug(
        name="identical failing calls",
        thread="pi#9637",
        wrong="220 identical calls in 25 minutes",
        how=How.ENDED,
        run=identical_failing_calls,
    ),
    Bug(
        name="a loop of period 2",
        thread="deer-flow#1055",
        wrong="two calls in turn, which a detector that compares with the last call only does not see",
        how=How.ENDED,
        run=a_circle_of_calls(2),
    ),
    Bug(
        name="a loop of period 3",
        thread="stella#359",
        wrong="three calls in turn were invisible to the loop detector",
        how=How.ENDED,
        run=a_circle_of_calls(3),
    ),
    Bug(
        name="polling whose result always changes",
        thread="openclaw#16808",
        wrong="1,535 polls for about $150: each result told another time, so nothing seemed to repeat",
        how=How.ENDED,
        run=polling_for_ever,
    ),
    Bug(
        name="the same question in other words",
        thread="variant of langgraph#6731",
        wrong="a model rewords its query each time, finds nothing, and goes on",
        how=How.NOT_CAUGHT,
        why_not="not as stagnation: arguments that differ are news to it; the run ends at max_iterations",
        run=the_same_question_in_other_words,
    ),
    # False alarms
    Bug(
        name="polling stopped by the detector",
        thread="stella#359",
        wrong="a job that was being waited for was taken for a loop and aborted",
        how=How.LEFT_ALONE,
        run=polling_that_comes_to_an_end,
    ),
    Bug(
        name="calls compared without their results",
        thread="fastclaw#80",
        wrong="the same call counted as repetition though its result was another",
        how=How.LEFT_ALONE,
        run=the_same_call_with_other_results,
    ),
    Bug(
        name="polling that is told the very same",
        thread="variant of stella#359",
        wrong="ten polls that all say 'pending' are aborted though the eleventh would say 'done'",
        how=How.NOT_CAUGHT,
        why_not="a false alarm of ours, too: nothing tells it from a loop; raise stagnation_window for such tools",
        run=polling_that_is_told_the_same,
    ),
    # Caps
    Bug(
        name="no cap at all",
        thread="strands harness-sdk#191",
        wrong="the loop runs until the model decides to stop",
        how=How.REFUTED,
        table=lambda: from_scratch(GO_ON),
    ),
    Bug(
        name="cap that is read nowhere",
        thread="langflow-e2e#481",
        wrong="max_iterations was a parameter that the loop never asked for",
        how=How.REFUTED,
        table=lambda: NO_CAP,
    ),
    Bug(
        name="recursion limit of 9,999",
        thread="langchain#36919",
        wrong="the default cap was 9,999: 'cost me 800 yuan in an afternoon'",
        how=How.BOUND,
        table=lambda: from_scratch(CAP, GO_ON),
        config=AgentConfig(max_iterations=9_999),
        promised={"model_calls": 25},
    ),
    Bug(
        name="recursion limit of 10,007",
        thread="langgraph#7313",
        wrong="the default cap was raised to 10,007, which caps nothing that anybody pays for",
        how=How.BOUND,
        table=lambda: TABLE,
        config=AgentConfig(max_iterations=10_007, max_model_retries=0),
        promised={"model_calls": 25},
        slow=True,
    ),
    Bug(
        name="nested loop that ignores the outer limit",
        thread="oracle/agent-spec#261",
        wrong="the inner agent had a limit of its own: 9,999 calls instead of 12",
        how=How.BOUND,
        table=lambda: from_scratch(observe(_INNER < 9_999, REPAIR, add(_INNER)), CAP, GO_ON),
        config=AgentConfig(max_iterations=12, max_tools_per_iter=1),
        promised={"model_calls": 12},
    ),
    Bug(
        name="one turn too many",
        thread="langgraph#5548",
        wrong="the cap was compared with > where >= was meant",
        how=How.BOUND,
        table=lambda: from_scratch(
            observe(ledger.iterations > limits.max_iterations, DONE, reason=StopReason.MAX_ITERATIONS), GO_ON
        ),
        promised={"iterations": 2},
    ),
    Bug(
        name="one turn too few",
        thread="variant of langgraph#5548",
        wrong="the other way round: the start of the run was counted as a turn",
        how=How.BOUND,
        table=lambda: Table((evolve(TABLE[0], updates=(add("iterations"),)), *from_scratch(CAP, GO_ON)[1:])),
        promised={"tool_turns": 2},
    ),
    Bug(
        name="cap asked only where calls were made",
        thread="autogen TimeoutTermination",
        wrong="a cap is asked when a message arrives; turns that bring none are not counted against it",
        how=How.REFUTED,
        table=lambda: from_scratch(evolve(CAP, guard=at_max_iterations & asked_for_tools), GO_ON),
    ),
    Bug(
        name="cap that resets on success",
        thread="GenericAgent#225",
        wrong="only failures in a row are counted, and any good turn between them resets the count",
        how=How.REFUTED,
        table=lambda: from_scratch(
            observe(ledger.failures >= limits.max_consecutive_failures, DONE, reason=StopReason.MAX_FAILURES),
            observe(~failed, PLAN, reset("failures"), *_ASK, name="all is well"),
            observe(ALWAYS, REPAIR, *_ASK),
        ),
    ),
    Bug(
        name="cap that resets on a summary",
        thread="oh-my-openagent#2736",
        wrong="what had been counted was cleared by each compaction, so that it was due again at once",
        how=How.REFUTED,
        table=lambda: TABLE.replaced(
            "summary due", evolve(TABLE.row("summary due"), updates=(reset("iterations"), reset("turns")))
        ),
        config=AgentConfig(max_iterations=3, max_tools_per_iter=1, summarize_every=1),
    ),
    Bug(
        name="cap that resets on a retry",
        thread="minimal-chat#177",
        wrong="the count was set to zero at the head of the function that each retry calls",
        how=How.BOUND,
        table=lambda: TABLE.replaced(
            "retry", *[evolve(row, updates=(reset("attempts"),)) for row in TABLE if row.label == "retry"]
        ),
        promised={"model_calls": 5},
    ),
    Bug(
        name="two caps that multiply",
        thread="kodeagent#95",
        wrong="both the loop and its client retried, each up to its own cap",
        how=How.BOUND,
        table=lambda: from_scratch(
            observe(may_retry, PLAN, name="the client's retry"),
            observe(retryable & (_AGAIN < 3), PLAN, add(_AGAIN), reset("attempts"), name="the loop's retry"),
            observe(retryable, DONE, reason=StopReason.MODEL_ERROR),
            CAP,
            GO_ON,
        ),
        config=AgentConfig(max_iterations=1, max_tools_per_iter=1),
        promised={"model_calls": 3},
    ),
    Bug(
        name="soft limit on tool calls",
        thread="agno#6984",
        wrong="at tool_call_limit the model is told so, and the loop goes on",
        how=How.REFUTED,
        table=lambda: from_scratch(
            observe(asked_for_tools & (ledger.tool_calls >= 2), REPAIR, name="limit reached"), CAP, GO_ON
        ),
    ),
    Bug(
        name="per-tool cap that counts the wrong tool",
        thread="variant of agno#6984",
        wrong="the cap names search, the tool that loops is another",
        how=How.REFUTED,
        table=lambda: calls_capped(ledger.calls_of("search") >= 3),
    ),
    # Retries
    Bug(
        name="retries that never count",
        thread="llama_index#20403",
        wrong="the count of attempts began anew with each of them: immediate retries without end",
        how=How.BOUND,
        table=lambda: TABLE.replaced(
            "retry", *[observe(retryable & ledger.asking.is_(at), at, name="retry") for at in (PLAN, REPAIR, RESEARCH)]
        ),
        promised={"model_calls": 5},
    ),
    Bug(
        name="retry outside its if",
        thread="the seed's gateway client",
        wrong="the retry on HTTP 429 stood behind the if, not in it: done whatever was answered",
        how=How.REFUTED,
        table=lambda: TABLE.replaced(
            "retry",
            *[observe((ledger.attempts <= 2) & ledger.asking.is_(at), at, name="retry") for at in (PLAN, REPAIR)],
        ),
    ),
    Bug(
        name="turn of calls done twice",
        thread="the seed's gateway client",
        wrong="so every tool call was sent twice",
        how=How.REFUSED,
        table=lambda: TABLE.before("failed", observe(asked_for_tools, CALL_TOOLS, name="send again")),
    ),
    Bug(
        name="fallback given up after any tool use",
        thread="pi-subagents#1936",
        wrong="once a tool had been called, a failed request was not tried again elsewhere",
        how=How.KEPT,
        run=fallback_after_tools,
    ),
    Bug(
        name="429 late in a run loses it",
        thread="smolagents#2165",
        wrong="a rate limit at step 8 of 10 threw the run away",
        how=How.KEPT,
        run=late_rate_limit,
    ),
    Bug(
        name="retried for ever while the provider is down",
        thread="anything-llm#3617",
        wrong="any crash of the provider, for good reasons or bad, was retried without end",
        how=How.REFUSED,
        table=lambda: TABLE.without("fatal model error").before(
            "retries exhausted", observe(ledger.ended.is_(Ended.FATAL), PLAN, name="try again")
        ),
    ),
    # Replies that get a loop nowhere
    Bug(
        name="empty replies asked for again",
        thread="GenericAgent#201",
        wrong="an empty reply is answered by the same request, as often as it comes",
        how=How.ENDED,
        run=empty_replies,
    ),
    Bug(
        name="unknown tool asked for again",
        thread="openai-agents#325",
        wrong="a tool that is not there is called time and again (or kills the run)",
        how=How.ENDED,
        run=unknown_tool,
    ),
    Bug(
        name="malformed arguments written again",
        thread="GenericAgent#746",
        wrong="arguments that are JSON but no object are sent back, and come again",
        how=How.ENDED,
        run=malformed_arguments,
    ),
    # What a cap leaves behind
    Bug(
        name="cap hit, work lost",
        thread="openai-agents#844",
        wrong="the cap raised an exception, and all that had been found was gone",
        how=How.KEPT,
        run=cap_with_work_lost,
    ),
    Bug(
        name="closing summary that asks for tools",
        thread="haystack#10001",
        wrong="the last message at the cap was a tool call; answering it begins anew",
        how=How.ENDED,
        run=closing_summary_with_calls,
    ),
    Bug(
        name="closing summary that is no end",
        thread="crush#2551",
        wrong="the summary was taken for a new task, which led to the next summary",
        how=How.REFUTED,
        table=lambda: TABLE.replaced(
            "iterations at max, closing", evolve(TABLE.row("iterations at max, closing"), updates=())
        ),
    ),
    Bug(
        name="summaries every 0 turns",
        thread="our own trial of this design",
        wrong="summarize_every=0 was due at once, after each summary again",
        how=How.REFUSED,
        table=lambda: _under(AgentConfig(summarize_every=0)),
    ),
    Bug(
        name="summary due again at once",
        thread="openhuman#4461",
        wrong="a summary did not bring the count below its threshold, so each request was another summary",
        how=How.REFUTED,
        table=lambda: TABLE.replaced("summary due", evolve(TABLE.row("summary due"), updates=(add("summaries"),))),
        config=AgentConfig(max_iterations=3, max_tools_per_iter=1, summarize_every=1),
    ),
    # Detectors
    Bug(
        name="threshold that can't be reached",
        thread="tolokaforge#1141",
        wrong="the detector wanted more strikes than could ever be counted",
        how=How.UNTAKEN,
        table=lambda: from_scratch(
            CAP,
            observe(repeating & (_STRIKES >= 3), DONE, reason=StopReason.STAGNATION, name="three strikes"),
            observe(repeating & (_STRIKES >= 2), REPAIR, reset(_STRIKES), *_ASK, name="two strikes"),
            observe(repeating, REPAIR, add(_STRIKES), *_ASK, name="strike"),
            GO_ON,
        ),
        config=AgentConfig(max_iterations=8, max_tools_per_iter=1, max_model_retries=1),
        meant="three strikes",
    ),
    Bug(
        name="repetitions that no run has time for",
        thread="variant of tolokaforge#1141",
        wrong="the detector waits for 99 repetitions, the cap comes after 8 turns",
        how=How.NOT_CAUGHT,
        why_not="the search lets the world say how often a result was seen, so it takes the row for one that is taken",
        table=lambda: from_scratch(
            CAP, observe(ledger.repeats >= 99, DONE, reason=StopReason.STAGNATION, name="99 times"), GO_ON
        ),
        config=AgentConfig(max_iterations=8, max_tools_per_iter=1),
        meant="99 times",
    ),
    # Hand-offs
    Bug(
        name="hand-offs back and forth",
        thread="multica#8753",
        wrong="two agents hand the task to each other, and neither counts it",
        how=How.REFUTED,
        table=lambda: from_scratch(
            observe(~asked_for_tools & ledger.asking.is_(RESEARCH), REPAIR, name="hand to repair"),
            observe(~asked_for_tools & ledger.asking.is_(REPAIR), RESEARCH, name="hand to research"),
            CAP,
            observe(failed, REPAIR, *_ASK),
            GO_ON,
        ),
    ),
    # Time, cancel, money
    Bug(
        name="deadline that is asked nowhere",
        thread="crewAI#1996",
        wrong="'max_execution_time is a fake parameter'",
        how=How.REFUSED,
        table=lambda: TABLE.without("out of time"),
    ),
    Bug(
        name="deadline asked only when a message arrives",
        thread="autogen TimeoutTermination",
        wrong="the clock was looked at only when a message came",
        how=How.REFUSED,
        table=lambda: TABLE.guarded("out of time", out_of_time & asked_for_tools),
    ),
    Bug(
        name="deadline asked only between steps",
        thread="crewAI#2379",
        wrong="max_execution_time=1, and one request took 37 seconds",
        how=How.ENDED,
        run=hung_model,
    ),
    Bug(
        name="tool that hangs the turn",
        thread="arcee nac#105",
        wrong="one call that never returned held up the whole batch, for ever",
        how=How.KEPT,
        run=hung_tool,
    ),
    Bug(
        name="cursor that does not advance",
        thread="codebase-memory-mcp#1247",
        wrong="the list of tools was paged through without end",
        how=How.ENDED,
        run=pages_without_end,
    ),
    Bug(
        name="cancel that is ignored",
        thread="openai-agents#1895",
        wrong="the loop has no way out but its own",
        how=How.REFUSED,
        table=lambda: TABLE.without("cancelled"),
    ),
    Bug(
        name="cancel that waits for the tool",
        thread="pydantic-ai#3960",
        wrong="a cancel did not reach the tools that were running",
        how=How.ENDED,
        run=cancel_in_a_tool,
    ),
    Bug(
        name="budget asked after the spending",
        thread="dam#3628",
        wrong="what was spent was compared, not what the next request may cost: the last one goes beyond",
        how=How.BOUND,
        table=lambda: TABLE.replaced(
            "over budget", observe(ledger.tokens > limits.max_tokens_total, DONE, reason=StopReason.BUDGET)
        ).without("over budget, closing"),
        promised={"tokens": 500_000},
    ),
    Bug(
        name="deadline that kills good work, mended",
        thread="trusty-tools#2207",
        wrong="at the deadline nothing was left of what had been found; a policy of one line keeps time to close",
        how=How.KEPT,
        run=deadline_with_work_lost(
            TABLE.stopping(ledger.seconds >= 60, StopReason.MAX_WALLCLOCK, name="time to close")
        ),
    ),
    Bug(
        name="deadline that kills good work",
        thread="Agenta#6084",
        wrong="the same under the shipped table",
        how=How.NOT_CAUGHT,
        why_not="the deadline is hard, and no request is sent after it: results are kept, an answer is not written",
        run=deadline_with_work_lost(TABLE),
    ),
)


def printed() -> str:
    """Return the table: each bug, where it is from, and what catches it."""
    lines = []
    caught = 0
    for bug in BUGS:
        how, found = how_caught(bug)
        caught += how is not How.NOT_CAUGHT
        lines.append(f"{bug.name:<44} {bug.thread:<30} {how}: {found if how is not How.NOT_CAUGHT else bug.why_not}")
    return "\n".join([*lines, "", f"{caught} of {len(BUGS)} caught"])


if __name__ == "__main__":
    print(printed())
