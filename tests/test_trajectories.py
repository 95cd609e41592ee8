"""Recorded runs of other agents, replayed: what real models sent and real tools gave goes through the machine.

The model says what it said, the tools give what they gave, in order; what the machine says in between goes unheard. A
conversation of several user messages is a run for each, which goes on from the messages of the one before.
"""

import gzip
import json
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from attrs import field, frozen, mutable

from agent_fsm import AgentConfig, AgentResult, ModelRequest, StopReason, run_agent
from agent_fsm.protocol import SUMMARIZE, Message
from agent_fsm.testing import ScriptedModel, ScriptedTools, anthropic_faults, openai_faults, request_faults

SAMPLE = Path(__file__).parent / "data" / "trajectories.jsonl.gz"
OVER = "[the recording ends here]"
"""What the model says when its recording is over and it has not answered."""
UNCAPPED: dict[str, Any] = {
    "max_iterations": 10_000,
    "max_wallclock_seconds": 600.0,
    "max_tools_per_iter": 1_000,
    "max_consecutive_failures": 10_000,
    "max_tokens_total": 10**12,
    "max_history_messages": None,
    "closing_summary": False,
    "tool_concurrency": 1,
}
"""Only stagnation, and the recording's own end, can end a run."""


@frozen
class Recording:
    """One recorded conversation."""

    source: str
    outcome: str
    messages: list[Message] = field(repr=False)


@mutable
class Replay:
    """What came of a recording."""

    results: list[AgentResult] = field(factory=list)
    faults: list[str] = field(factory=list)
    requests: int = 0
    said: int = 0
    """Recorded replies that the model got to say."""


def recordings(path: Path) -> Iterator[Recording]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield Recording(row["source"], row["outcome"], row["messages"])


def turns_of(messages: Sequence[Message]) -> Iterator[tuple[list[Message], list[Message]]]:
    """Yield what the caller says before each of its turns with the model, and what model and tools said to it."""
    said: list[Message] = []
    answered: list[Message] = []
    for message in messages:
        if message["role"] in ("system", "user") and answered:
            yield said, answered
            said, answered = [], []
        if message["role"] in ("system", "user"):
            said.append(message)
        elif message["role"] in ("assistant", "tool"):  # some recordings have roles of their own
            if not any(each["role"] == "user" for each in said) and not answered:
                said.append({"role": "user", "content": "(the conversation begins)"})
            answered.append(message)
    if answered:
        yield said, answered


def canonical(name: str, arguments: Any) -> str:
    return f"{name} {json.dumps(arguments, sort_keys=True)}"


class Recorded:
    """The model and the tools of one turn."""

    def __init__(self, answered: Sequence[Message], replay: Replay, settings: dict[str, Any]) -> None:
        self.replay = replay
        self.results: dict[str, deque[str]] = {}
        self.answered = answered
        self.replies = iter([at for at, message in enumerate(answered) if message["role"] == "assistant"])
        self.model = ScriptedModel([self.reply])
        calls = [call["function"]["name"] for message in answered for call in message.get("tool_calls") or ()]
        self.tools = ScriptedTools({name: self.tool(name) for name in calls})
        self.config = AgentConfig(**settings)

    def reply(self, request: ModelRequest) -> Any:
        """Return what the model said next, and have the tools ready to give what they gave."""
        if request.purpose is SUMMARIZE:
            return "What was said before."
        at = next(self.replies, None)
        if at is None:
            return OVER
        self.replay.said += 1
        calls = self.answered[at].get("tool_calls") or []
        for call, result in zip(calls, self.answered[at + 1 : at + 1 + len(calls)], strict=False):
            key = canonical(call["function"]["name"], parsed(call["function"]["arguments"]))
            self.results.setdefault(key, deque()).append(result.get("content") or "")
        return self.answered[at]

    def tool(self, name: str) -> Any:
        def recorded(**arguments: Any) -> str:
            results = self.results.get(canonical(name, arguments))
            return results.popleft() if results else "(no result was recorded)"

        return recorded

    def run(self, messages: Sequence[Message]) -> AgentResult:
        result = run_agent(messages, self.tools, self.config, model_client=self.model)
        self.replay.requests += len(self.model.requests)
        return result


def parsed(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return None


def replayed(recording: Recording, *, check: bool = True, **settings: Any) -> Replay:
    """Replay *recording* to its end, or to the turn in which the machine ends it before the recording does."""
    replay = Replay()
    messages: list[Message] = []
    for said, answered in turns_of(recording.messages):
        recorded = Recorded(answered, replay, UNCAPPED | settings)
        result = recorded.run([*messages, *said])
        replay.results.append(result)
        if check:
            for request in recorded.model.requests:
                replay.faults += request_faults(request.messages)
            replay.faults += openai_faults(result.messages) + anthropic_faults(result.messages)
        messages = result.messages
        if result.stopped_reason is not StopReason.SUCCESS:
            break
    return replay


def ending(replay: Replay) -> str:
    last = replay.results[-1]
    if last.stopped_reason is StopReason.SUCCESS:
        return "recording over" if last.final_answer == OVER else "success"
    return str(last.stopped_reason)


@pytest.fixture(scope="module")
def sample() -> list[Recording]:
    return list(recordings(SAMPLE))


def test_recorded_runs_stay_valid_at_every_request_and_end(
    sample: list[Recording], capsys: pytest.CaptureFixture[str]
) -> None:
    replays = [replayed(recording) for recording in sample]

    assert [replay.faults for replay in replays if replay.faults] == []
    assert all(replay.results[-1].stopped_reason is not None for replay in replays)
    with capsys.disabled():
        counts = Counter(map(ending, replays))
        print(f"\n{len(sample)} recorded runs, {sum(replay.requests for replay in replays)} requests:", dict(counts))


@pytest.mark.parametrize("keep", [1, 5])
def test_recorded_runs_stay_valid_when_requests_are_trimmed_and_summarized(sample: list[Recording], keep: int) -> None:
    replays = [replayed(recording, max_history_messages=keep, summarize_every=4) for recording in sample]

    assert [replay.faults for replay in replays if replay.faults] == []


def test_the_default_limits_end_every_recorded_run(sample: list[Recording]) -> None:
    unlimited = {name: getattr(AgentConfig(), name) for name in UNCAPPED} | {"tool_concurrency": 1}

    replays = [replayed(recording, **unlimited) for recording in sample]

    assert [replay.faults for replay in replays if replay.faults] == []
    assert all(replay.results[-1].stopped_reason is not None for replay in replays)


def test_no_recorded_success_of_the_sample_is_taken_for_stagnation(sample: list[Recording]) -> None:
    successes = [recording for recording in sample if recording.outcome == "success"]

    alarms = [each.source for each in successes if ending(replayed(each, check=False)) == StopReason.STAGNATION]

    assert successes
    assert alarms == []
