"""The agent by URL: POST /agent/run runs the agent and answers with what came of it.

A run that reached Done is answered with 200, whatever ended it: `stopped_reason` says. A client that goes away ends its
run, and so does a server that is told to stop.
"""

import asyncio
import json
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType
from typing import Any, Final

from attrs import define, field
from fastapi import FastAPI, Request, Response, Security
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field

from agent_fsm.driver import AgentRun
from agent_fsm.errors import ConfigError, MessagesError
from agent_fsm.protocol import AgentResult, State, StopReason, ToolInvoker
from agent_fsm.redaction import redact, redact_json
from agent_fsm.server.listening import listen
from agent_fsm.server.problems import Problem, check_binding, documented, equip, until_disconnect
from agent_fsm.server.request import Asked, admitted, request_model
from agent_fsm.server.settings import ServerSettings, settings_from

__all__ = ["RunAnswer", "create_app", "serve"]

_log = logging.getLogger("uvicorn.error")  # where an operator looks

_REFUSALS: Final = (400, 401, 403, 408, 413, 422, 429, 500, 503)


# The answer


class UsageAnswer(BaseModel):
    """What a run has spent."""

    model_config = ConfigDict(from_attributes=True)

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    charged_tokens: int = Field(description="What the budget was charged.")
    cost_usd: float
    model_calls: int = Field(description="Requests sent, retries and summaries included.")
    tool_calls: int = Field(description="Calls that were started.")


class RunAnswer(BaseModel):
    """What a run has come to."""

    model_config = ConfigDict(from_attributes=True)

    final_answer: str | None = Field(description="After a cap the best answer so far; null if there is none.")
    stopped_reason: StopReason = Field(description="success means that the model answered, not that it is right.")
    detail: str = Field(description="What happened, where the reason alone does not say.")
    messages: list[dict[str, Any]] = Field(description="The whole conversation.")
    iterations: int = Field(description="Requests from Plan, Repair and Research.")
    usage: UsageAnswer
    path: list[State] = Field(description="The states that the run went through.")
    used_model: str = Field(description="Who answered last, as the provider calls it.")
    seconds: float


class Health(BaseModel):
    """The server answers."""

    ok: bool


def _rendered(result: AgentResult, secrets: tuple[str, ...]) -> bytes:
    answer = redact_json(RunAnswer.model_validate(result).model_dump(mode="python"), secrets)
    return json.dumps(answer, allow_nan=False).encode()  # a transcript holds nothing that is no JSON


# Runs


@define
class _Runs:
    """The runs that are under way in this process."""

    most: int
    running: set[AgentRun] = field(factory=set)
    closing: bool = False

    @contextmanager
    def admit(self, run: AgentRun) -> Iterator[None]:
        """Count *run* until the block is left.

        Raises:
            Problem: there is no room for it, or the server is about to stop.
        """
        if self.closing:
            raise Problem(503, "stopping", "the server is about to stop", retryable=True)
        if len(self.running) >= self.most:
            text = f"{self.most} runs are under way, the most that there may be; try again later"
            raise Problem(429, "too_many_runs", text, retryable=True, headers={"Retry-After": "1"})
        self.running.add(run)
        try:
            yield
        finally:
            self.running.discard(run)

    def stop(self) -> None:
        """End all runs, which are then answered as cancelled, and admit no more."""
        self.closing = True
        for run in tuple(self.running):
            run.cancel()


@contextmanager
def _on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call *stop* on this event loop when the process is told to end, before whoever listened for that until now.

    uvicorn waits for requests to end before it tells the app that it stops, so that the app has to listen itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(stop)
        then = before[signal.Signals(number)]
        if callable(then):
            then(number, frame)

    replaced = [number for number, handler in before.items() if callable(handler)]
    for number in replaced:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in replaced:
            if signal.getsignal(number) is handle:
                signal.signal(number, before[number])


# The app


def create_app(settings: ServerSettings | None = None) -> FastAPI:
    """Return the app; *settings* are those of the environment if None.

    Raises:
        ConfigError: the environment, or the file of MCP servers, can't mean anything.
    """
    settings = settings_from(os.environ) if settings is None else settings
    runs = _Runs(settings.max_concurrent_runs)
    mcp = _mcp(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        runs.closing = False  # an app may be started again
        with _on_signals(runs.stop):
            yield
        runs.stop()

    app = FastAPI(title="agent_fsm", docs_url=None, redoc_url=None, lifespan=lifespan)
    equip(app, token=settings.token, max_body_bytes=settings.max_body_bytes)
    _add_routes(app, settings, runs, mcp)
    return app


def _add_routes(app: FastAPI, settings: ServerSettings, runs: _Runs, mcp: ToolInvoker | None) -> None:
    body_model = request_model(settings)
    # only said in the OpenAPI document: who may ask is checked before a route is looked for
    bearer = [] if settings.token is None else [Security(HTTPBearer(auto_error=False))]

    @app.get("/healthz", responses=documented(503))
    async def healthz() -> Health:
        """Say whether the server answers and takes runs."""
        if runs.closing:
            raise Problem(503, "stopping", "the server is about to stop", retryable=True)
        return Health(ok=True)

    @app.post("/agent/run", response_model=RunAnswer, responses=documented(*_REFUSALS), dependencies=bearer)
    async def run_agent(request: Request, body: body_model) -> Response:  # type: ignore[valid-type] # made at run time
        """Run the agent on the messages until it is done, and answer with what it has come to."""
        asked = await admitted(body, settings, mcp)
        run = _run_of(asked)
        with runs.admit(run):
            result = await until_disconnect(request, _ended(run))
        if result is None:
            return Response(status_code=499)  # nobody reads it
        secrets = asked.secrets if settings.token is None else (*asked.secrets, settings.token)
        return Response(_rendered(result, secrets), media_type="application/json")


def _run_of(asked: Asked) -> AgentRun:
    try:
        return AgentRun(asked.messages, asked.tools, asked.config)
    except (ConfigError, MessagesError) as error:
        raise Problem(422, "invalid_request", redact(str(error), asked.secrets)) from None


async def _ended(run: AgentRun) -> AgentResult:
    return await run


def _mcp(settings: ServerSettings) -> ToolInvoker | None:
    if settings.mcp_config is None:
        return None
    from agent_fsm.tools.mcp import MCPInvoker

    invoker = MCPInvoker(settings.mcp_config)  # not entered: each run has servers of its own
    for warning in invoker.warnings:
        _log.warning("%s", warning)
    return invoker


def serve(*, host: str = "127.0.0.1", port: int = 8080, settings: ServerSettings | None = None) -> None:
    """Serve the agent until the process is told to end.

    Raises:
        ConfigError: *host* is not loopback, and there is no token; or the settings can't mean anything.
    """
    settings = settings_from(os.environ) if settings is None else settings
    check_binding(host, settings.token)
    listen(create_app(settings), "the agent", host=host, port=port, token=settings.token)
