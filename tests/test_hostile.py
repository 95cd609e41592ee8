"""Whole runs in worlds that mean harm, through the real driver: what is promised of every run holds in each of them."""

import asyncio
import functools
import statistics
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from attrs import evolve, field, frozen, mutable
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from agent_fsm.config import AgentConfig
from agent_fsm.driver import AgentRun
from agent_fsm.machine import Run, start, step
from agent_fsm.protocol import (
    SUMMARIZE,
    AgentResult,
    Message,
    ModelReplied,
    ModelRequest,
    State,
    StopReason,
)
from agent_fsm.testing import ListClock, ScriptedModel, ScriptedTools, anthropic_faults, openai_faults
from agent_fsm.testing.strategies import configs, outcomes, replies
from agent_fsm.testing.transcripts import request_faults

TOOLS = ("run", "read_file", "web_search")
EXAMPLES = 400
LONG_EXAMPLES = 5_000
IMAGE: Message = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 3_000}}
CONVERSATIONS: tuple[list[Message], ...] = (
    [{"role": "user", "content": "What is 2 + 2?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "See:"}, IMAGE]},
    ],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello! What can I do?"},
        {"role": "user", "content": "Read the file."},
    ],
    [
        {"role": "developer", "content": "Use tools."},
        {"role": "user", "content": "Read it."},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "read_file", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "nothing in it"},
    ],
)


@frozen
class World:
    """What a run is put into."""

    messages: list[Message]
    config: AgentConfig
    script: list[Any] = field(repr=False)
    """What the model does, request by request."""
    tools: dict[str, list[Any]] = field(repr=False)
    """What each tool makes of its calls, call by call."""
    research: tuple[str, ...]
    listing: Any
    times: list[float]
    """Seconds that pass from one event to the next."""
    cancel_after: int | None
    """The run is cancelled when so many events have happened ..."""
    cancel_at: int | None
    """... or while the model works on so many-th request."""


def _may_hang(hangs: bool) -> st.SearchStrategy[World]:
    return st.builds(
        World,
        messages=st.sampled_from(CONVERSATIONS),
        config=configs().map(lambda config: _hurried(config) if hangs else config),
        script=st.lists(replies(TOOLS, hangs=hangs), min_size=6, max_size=14),
        tools=st.fixed_dictionaries({name: st.lists(outcomes(hangs=hangs), min_size=1, max_size=5) for name in TOOLS}),
        research=st.sampled_from([("web_search",), ()]),
        listing=st.sampled_from([None] * 40 + [ValueError("down"), "junk", [None, {"function": {"name": "run"}}]]),
        times=st.lists(st.sampled_from([0.0] * 20 + [0.5, 1.0, 30.0]), min_size=8, max_size=8),
        cancel_after=st.sampled_from([None] * 30 + [1, 4, 7]),
        cancel_at=st.sampled_from([None] * 30 + [1, 3, 5]),
    )


def _hurried(config: AgentConfig) -> AgentConfig:
    """Real deadlines that a test can wait for."""
    return evolve(config, max_wallclock_seconds=0.06, tool_timeout_seconds=0.02)


DOWN = World(
    messages=CONVERSATIONS[0],
    config=AgentConfig(),
    script=["It is so."],
    tools={name: ["fine"] for name in TOOLS},
    research=(),
    listing=ValueError("down"),
    times=[0.0] * 8,
    cancel_after=None,
    cancel_at=None,
)
"""The rarest world: which ones Hypothesis draws depends on what else is imported, and it may draw none like this."""

worlds = st.integers(0, 9).flatmap(lambda ticket: _may_hang(ticket == 9))


class Watched(ScriptedModel):
    """A scripted model that notes what the ledger reckoned each request to cost at worst."""

    def __init__(self, world: World) -> None:
        super().__init__(world.script)
        self.cancel_at = world.cancel_at
        self.agent: AgentRun
        self.reckoned: list[int] = []

    async def complete(self, request: ModelRequest, /) -> Any:
        self.reckoned.append(self.agent.run.ledger.request_tokens)
        if len(self.reckoned) == self.cancel_at:
            self.agent.cancel()
            await asyncio.sleep(0)
        return await super().complete(request)


@mutable
class Played:
    """What came of a world."""

    world: World
    result: AgentResult
    run: Run
    model: Watched
    tools: ScriptedTools


@mutable
class Tally:
    """What all worlds together have shown."""

    depths: list[int] = field(factory=list)
    states: "Counter[State]" = field(factory=Counter)
    reasons: "Counter[StopReason]" = field(factory=Counter)
    events: "Counter[str]" = field(factory=Counter)


def play(world: World) -> Played:
    """Run *world* on a loop of its own, and see that nothing of it is left there."""

    async def main() -> Played:
        model = Watched(world)
        tools = ScriptedTools(world.tools, world.research, listing=world.listing)
        clock = ListClock([sum(world.times[: count + 1]) for count in range(len(world.times))])
        events = 0

        def on_event(*_: object) -> None:
            nonlocal events
            events += 1
            if events == world.cancel_after:
                agent.cancel()

        agent = AgentRun(world.messages, tools, world.config, model_client=model, on_event=on_event, clock=clock)
        model.agent = agent
        result = await agent
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return Played(world, result, agent.run, model, tools)

    return asyncio.run(main())


# What is promised of each


def ends_with_one_reason(played: Played) -> None:
    assert isinstance(played.result.stopped_reason, StopReason)
    assert played.run.state is State.DONE
    assert played.result.path[-1] is State.DONE
    assert played.result.path.count(State.DONE) == 1


def has_valid_transcripts(played: Played) -> None:
    for request in played.model.requests:
        assert request_faults(request.messages) == []
    assert openai_faults(played.result.messages) == []
    assert anthropic_faults(played.result.messages) == []


def is_what_its_events_make_of_it(played: Played) -> None:
    replayed = functools.reduce(step, played.result.events, start(played.world.messages, played.world.config))

    assert replayed == played.run


def keeps_its_bounds(played: Played) -> None:
    limits, usage, iterations = played.world.config, played.result.usage, played.result.iterations
    summaries = iterations // limits.summarize_every if limits.summarize_every else 0

    assert iterations <= limits.max_iterations
    assert usage.model_calls <= iterations * (1 + limits.max_model_retries) + summaries + limits.closing_summary
    assert len(played.model.requests) <= usage.model_calls
    assert usage.tool_calls <= iterations * limits.max_tools_per_iter
    assert len(played.tools.calls) == usage.tool_calls
    if is_honest(played):
        assert usage.charged_tokens <= limits.max_tokens_total


def is_honest(played: Played) -> bool:
    """Return whether no reply reported more tokens than its request could cost at worst."""
    run = start(played.world.messages, played.world.config)
    for event in played.result.events:
        if isinstance(event, ModelReplied) and None not in (reported := (event.prompt_tokens, event.completion_tokens)):
            honest = sum(tokens or 0 for tokens in reported) <= run.ledger.request_tokens
            if not honest:
                return False
        run = step(run, event)
    return True


def reckons_with_every_byte(played: Played) -> None:
    """No request holds more text than the worst case that it was charged to the budget with."""
    for request, reckoned in zip(played.model.requests, played.model.reckoned, strict=False):
        told = sum(len(text.encode()) for message in request.messages for text in _texts(message))
        assert told <= reckoned - played.world.config.max_reply_tokens


def _texts(value: Any) -> Iterator[str]:
    """Yield the strings that a model reads in a message; an image is counted by other rules than its length."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict) and value.get("type") != "image_url":
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


def asks_for_summaries_without_tools(played: Played) -> None:
    assert all(not request.tools for request in played.model.requests if request.purpose is SUMMARIZE)


PROMISES = (
    ends_with_one_reason,
    has_valid_transcripts,
    is_what_its_events_make_of_it,
    keeps_its_bounds,
    reckons_with_every_byte,
    asks_for_summaries_without_tools,
)


@pytest.fixture(scope="module")
def tally() -> Tally:
    """What the explorations of this module have seen."""
    return Tally()


def explore(tally: Tally, examples: int, *, same: bool) -> None:
    @settings(
        max_examples=examples, deadline=None, derandomize=same, database=None, suppress_health_check=list(HealthCheck)
    )
    @example(DOWN)
    @given(worlds)
    def every_promise_holds(world: World) -> None:
        played = play(world)
        tally.depths.append(played.result.iterations)
        tally.states.update(set(played.result.path))
        tally.reasons.update([played.result.stopped_reason or StopReason.SUCCESS])
        tally.events.update(type(event).__name__ for event in played.result.events)
        for promise in PROMISES:
            promise(played)

    every_promise_holds()


def test_every_promise_holds_in_every_hostile_world(tally: Tally) -> None:
    explore(tally, EXAMPLES, same=True)


@pytest.mark.slow
def test_every_promise_holds_in_many_more_hostile_worlds(tally: Tally, pytestconfig: pytest.Config) -> None:
    if "slow" not in pytestconfig.getoption("markexpr"):
        pytest.skip("takes minutes; run with -m slow")
    explore(tally, LONG_EXAMPLES, same=False)


def test_the_hostile_worlds_lead_deep_and_everywhere(tally: Tally, capsys: pytest.CaptureFixture[str]) -> None:
    if not tally.depths:
        pytest.skip("looks at what the explorations above have seen")
    with capsys.disabled():
        print(f"\n{len(tally.depths)} hostile runs; iterations: {dict(sorted(Counter(tally.depths).items()))}")
        for counts in (tally.states, tally.reasons, tally.events):
            print("  ", ", ".join(f"{name} {count}" for name, count in counts.most_common()))

    assert statistics.median(tally.depths) >= 3
    assert set(tally.states) == set(State)
    assert set(tally.reasons) == set(StopReason)
