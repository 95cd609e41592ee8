"""The nouns of a run: its states, what happened (events), what is wanted (effects), what comes out.

Nothing here acts, waits or reads text. Every event carries `now`, the seconds of the run at which it happened, and the
size that it adds to the transcript, as an upper bound in tokens (no tokenizer makes more tokens of a text than it has
UTF-8 bytes). What is made anew in every turn is slotted but not frozen, as attrs takes twice as long to make a frozen
instance; nobody writes to it all the same.
"""

from collections.abc import Awaitable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final, Protocol, TypeAlias

from attrs import define, frozen

__all__ = [
    "ABANDONED",
    "CALL_TOOLS",
    "DONE",
    "OBSERVE",
    "PLAN",
    "REPAIR",
    "RESEARCH",
    "SUMMARIZE",
    "AgentResult",
    "AskModel",
    "Effect",
    "Ended",
    "Event",
    "Interrupted",
    "ListTools",
    "Message",
    "ModelClient",
    "ModelError",
    "ModelFailed",
    "ModelReplied",
    "ModelRequest",
    "Prices",
    "RunTools",
    "Said",
    "State",
    "StopReason",
    "ToolCall",
    "ToolInvoker",
    "ToolResult",
    "ToolsFinished",
    "ToolsListed",
    "ToolsUnavailable",
    "Usage",
]

Message: TypeAlias = dict[str, Any]
"""A chat message as providers take it, in OpenAI's form."""


class State(StrEnum):
    """Where a run can be. A run never waits in Observe: it is where the next state is chosen."""

    PLAN = "Plan"
    CALL_TOOLS = "CallTools"
    OBSERVE = "Observe"
    REPAIR = "Repair"
    RESEARCH = "Research"
    SUMMARIZE = "Summarize"
    DONE = "Done"


PLAN, CALL_TOOLS, OBSERVE, REPAIR, RESEARCH, SUMMARIZE, DONE = State


class Said(StrEnum):
    """What the last reply to a working request amounts to: exactly one of these."""

    NOTHING = "nothing"
    """The last event was no reply to a working request, nor the results of its calls."""
    CALLS = "calls"
    ANSWER = "answer"
    UNSURE = "unsure"
    """An answer that hedges in the first person."""
    EMPTY = "empty"
    CUT_OFF = "cut_off"
    REFUSED = "refused"


class Ended(StrEnum):
    """How the last effect ended."""

    WELL = "well"
    FAILED = "failed"
    """A call failed and none succeeded in its place; or the reply was empty or cut off."""
    RETRYABLE = "retryable"
    """The request failed in a way that asking again may mend."""
    FATAL = "fatal"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"


class StopReason(StrEnum):
    """Why a run ended. `success` means that the model answered, not that it is right."""

    SUCCESS = "success"
    MAX_ITERATIONS = "max_iterations"
    MAX_WALLCLOCK = "max_wallclock"
    STAGNATION = "stagnation"
    MAX_FAILURES = "max_failures"
    BUDGET = "budget"
    REFUSED = "refused"
    TOOLS_UNAVAILABLE = "tools_unavailable"
    CANCELLED = "cancelled"
    MODEL_ERROR = "model_error"


@define
class ToolCall:
    """A call that the model asked for, in the form in which it enters the transcript."""

    id: str
    """Unique within its turn; 1 to 64 of `[A-Za-z0-9_-]`."""
    name: str
    """1 to 64 of `[A-Za-z0-9_-]`."""
    arguments: str
    """A JSON object; `{}` if the model wrote anything else."""
    not_run: str = ""
    """Why this call must not be run, in words for the model; empty if it is to be run."""
    over_cap: bool = False
    """True if it is not run only because the turn has too many calls, which is no failure."""
    wrote: str = ""
    """What the model really wrote as name or arguments, where that could not be kept."""
    provider_fields: Mapping[str, Any] | None = None
    """What the provider wants back with the call, such as the signature of a thought."""

    def as_openai(self) -> dict[str, Any]:
        """Return the call as it stands in a provider's assistant message."""
        call = {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}
        return call if self.provider_fields is None else {**call, "provider_specific_fields": self.provider_fields}


@define
class ToolResult:
    """What came of one call. Every call has exactly one, run or not."""

    text: str
    """What the model is told."""
    ok: bool = True
    rc: int | None = None
    """The exit code, where a process was run."""
    seconds: float = 0.0
    call_id: str = ""
    """Set by the driver; an invoker may leave it out."""
    name: str = ""
    """Set by the driver; an invoker may leave it out."""
    ran: bool = True
    """False for calls that were never started."""
    observation: str = ""
    """What a directive tells of a failure: error and the tails of stdout and stderr, where the tool gave them."""
    parts: tuple[Mapping[str, Any], ...] = ()
    """What came back beside text (images, audio, links, files), as content blocks in MCP's JSON form. The model is told
    of them in `text`; they themselves are for whoever reads the events."""
    structured: Any = None
    """Structured content, where the tool gave any: a JSON value."""


# What happened


@define
class ToolsListed:
    """The tool backend answered what it offers."""

    now: float
    tools: tuple[Mapping[str, Any], ...] = ()
    """OpenAI function tools, as the model is to be offered them."""
    research: tuple[str, ...] = ()
    """The names of those that look things up."""
    size: int = 0
    unavailable: tuple[str, ...] = ()
    """What the backend would offer more of, but could not be had: of each its name and why."""


@define
class ToolsUnavailable:
    """The tool backend could not be asked what it offers."""

    now: float
    backend: str
    error: str


@define
class ModelReplied:
    """The model answered a request; whatever it sent, this is what it amounts to."""

    now: float
    said: Said
    text: str = ""
    """The prose of the reply; may be empty."""
    calls: tuple[ToolCall, ...] = ()
    message: Message | None = None
    """The assistant message that enters the transcript; None where nothing may."""
    size: int = 0
    prompt_tokens: int | None = None
    """As reported; None if it was not, which counts as the worst case."""
    completion_tokens: int | None = None
    cost_usd: float | None = None
    """As the client reckons it; None leaves it to the configured prices."""
    model: str = ""
    """Who answered."""
    detail: str = ""
    """What was odd about the reply: the refusal, why it counts as empty, ..."""


@define
class ModelFailed:
    """A request got no reply."""

    now: float
    retryable: bool
    error: str
    """What happened and, where it is known, what to do about it."""
    retry_after: float | None = None
    """Seconds that the provider asked to be left alone for."""


@define
class ToolsFinished:
    """Every call of the turn has its result, in the order asked."""

    now: float
    results: tuple[ToolResult, ...]
    failed: bool = False
    """True if a call failed and none of the same tool succeeded after it."""
    fresh: bool = True
    """True if any (call, result) pair of this turn was not seen since the caller's last message."""
    stale: int = 0
    """Results at the end of this turn, in a row, that were not fresh."""
    repeats: int = 1
    """How often the last pair of this turn has been seen by now, this one included."""
    size: int = 0
    listing: ToolsListed | None = None
    """What the tool backend offers from now on, if that has changed."""


@define
class Interrupted:
    """An effect was stopped, or not started, because of a cancel or because the time was up."""

    now: float
    cancelled: bool
    """True for a cancel, False for the deadline."""
    results: tuple[ToolResult, ...] = ()
    """The results of all calls of the turn, in the order asked; those that had not finished say that they were
    interrupted."""
    size: int = 0
    started: bool = True
    """False if the effect had not been started, so that nothing was sent."""


Event: TypeAlias = ToolsListed | ToolsUnavailable | ModelReplied | ModelFailed | ToolsFinished | Interrupted


# What is wanted


@define
class ListTools:
    """Ask the tool backend what it offers."""


@define
class AskModel:
    """Send one request to the model."""

    purpose: State
    """Plan, Repair, Research or Summarize."""
    attempt: int = 0
    """0 for the first try of this request; attempt n may use fallback model n."""
    not_before: float = 0.0
    """Seconds of the run before which the request must not be sent."""


@define
class RunTools:
    """Run the calls of the turn that may be run, and answer all of them."""

    calls: tuple[ToolCall, ...]


Effect: TypeAlias = ListTools | AskModel | RunTools


# What comes out


@frozen
class Usage:
    """What a run has spent."""

    prompt_tokens: int = 0
    """As reported by the provider."""
    completion_tokens: int = 0
    """As reported by the provider."""
    charged_tokens: int = 0
    """What the budget was charged: as reported, or the worst case where nothing was reported."""
    cost_usd: float = 0.0
    """US dollars; requests of unknown price count as 0 unless `max_cost_usd` is set."""
    model_calls: int = 0
    """Requests sent, retries and summaries included."""
    tool_calls: int = 0
    """Calls that were started."""

    @property
    def total_tokens(self) -> int:
        """Prompt and completion tokens, as reported."""
        return self.prompt_tokens + self.completion_tokens


@frozen
class AgentResult:
    """What a run has come to: at its end, or at the instant at which it was asked."""

    final_answer: str | None
    """The answer; after a cap the best one so far; None if there is none."""
    stopped_reason: StopReason | None
    """Why the run ended; None while it has not."""
    detail: str
    """What happened, and what to do about it, where the reason alone does not say."""
    messages: list[Message]
    """The whole conversation, valid for providers at every instant."""
    iterations: int
    """Requests from Plan, Repair and Research."""
    usage: Usage
    events: tuple[Event, ...]
    """All that happened; `functools.reduce(step, events, start(...))` gives the run again."""
    path: tuple[State, ...]
    """The states the run went through, Plan first."""
    used_model: str
    """Who answered last, as the provider calls it."""
    seconds: float
    """Seconds of the run at its last event."""


# What the edge is asked for


@define
class ModelRequest:
    """What a model client is given."""

    messages: list[Message]
    """Provider-ready; the last is from the user or a tool."""
    tools: Sequence[Mapping[str, Any]]
    """OpenAI function tools; empty when a summary is asked for."""
    tool_choice: str | Mapping[str, Any] | None
    purpose: State
    """The state that asks."""
    timeout_seconds: float
    """Seconds left to the run; the driver stops the request when they are over."""
    model: str
    """The configured model, or the fallback model of this attempt."""
    max_tokens: int
    """The reply ceiling, in tokens."""


@frozen
class Prices:
    """What a model costs, in US dollars per token."""

    prompt_usd_per_token: float
    reply_usd_per_token: float


class ModelError(Exception):
    """Raised by a model client to say what became of a request, and whether asking again may help."""

    def __init__(self, error: str, *, retryable: bool, retry_after: float | None = None) -> None:
        super().__init__(error)
        self.retryable = retryable
        self.retry_after = retry_after


class ModelClient(Protocol):
    """Anything that answers a request.

    The reply is an OpenAI assistant message, a chat.completion dict, or an object of either shape. What `complete`
    raises becomes a `ModelFailed` event: a `ModelError` says itself whether to retry; Python's errors of programming
    (TypeError, AttributeError, ...) are fatal; anything else is retried. A client may have `prices(model)`, which
    returns `Prices` or None and is asked when `max_cost_usd` is set.
    """

    def complete(self, request: ModelRequest, /) -> Awaitable[Any]: ...


ABANDONED: Final = "abandoned: what this call has begun goes on"
"""The note of a CancelledError that leaves something behind."""


class ToolInvoker(Protocol):
    """Anything that lists OpenAI function tools and calls one.

    What `call_openai_tool` raises is a failed result; a dict, or a string that is a JSON object, with `ok`, `rc`,
    `stdout`, `stderr`, `error`, `text`, `result` or `answer` is read as such; any other string is the text of a
    success.

    An invoker may also have

    - `research_tools`, a collection of the names of its tools that look things up; without it they are judged by name;
    - `unavailable`, a sequence of texts: which parts of it could not be asked when it was last listed, and why;
    - `tools_changed() -> bool`, asked after each turn: True makes the driver list the tools again before the next
      request;
    - `for_run() -> ToolInvoker`, called as a run begins: what the run uses in its place. Its `async aclose()`, if it
      has one, is awaited when the run is over: for 2 s if the run has that time left, else for 50 ms; then it is
      cancelled, and must let go of what it holds at once. So what a run opens ends with it, and one invoker can serve
      many runs.

    A call that is cancelled, and can't stop what it has begun, may note `ABANDONED` on its CancelledError (`add_note`):
    the model is then told that it may go on.
    """

    def list_openai_tools(self) -> Awaitable[list[dict[str, Any]]]: ...

    def call_openai_tool(self, call: dict[str, Any], /) -> Awaitable[str | dict[str, Any] | ToolResult]: ...
