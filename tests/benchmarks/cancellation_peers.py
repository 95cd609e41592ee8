"""Runs of other agent libraries, cancelled after every tick of the event loop, beside ours.

    python tests/benchmarks/cancellation_peers.py

Each makes the same run: two turns of two calls side by side, then an answer; the tools take one tick and three, the
model one. Its task is cancelled, what the library has saved is looked at, and the conversation goes on from there with
one more prompt. What is printed is at how many ticks the saved messages were no valid transcript, the follow-up failed
or sent one that is not, a tool's result was lost though it had returned, or tasks were left. A library that is not
installed is skipped: they are no dependencies, and want an environment of their own:

    pip install pydantic-ai-slim langgraph openai-agents attrs structlog transitions

Saved is what each offers for it: pydantic-ai's `capture_run_messages`, langgraph's state under a checkpointer,
openai-agents' session. Results in another order than their calls are no fault here, and neither is it that no reason is
told: ours tells one, and that is checked in `tests/test_cancellation_sweep.py`.
"""

import asyncio
import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from agent_fsm.testing import request_faults
from tests.cancellation_sweep import KINDS, PROMPT, Subject, Variant, Way, sweep
from tests.cancelled_runs import after, our_run

TURNS, CALLS = 2, 2
DONE = "All is well."
TASK = "Do it."


class Peer:
    """What the runs of all peers have in common."""

    def __init__(self) -> None:
        self.returned: list[str] = []
        self.asked = 0
        self.requests: list[list[dict[str, Any]]] = []

    async def tool(self, number: int, turn: int) -> str:
        """Do what the tool of the run does."""
        text = await after(1 + 2 * number)(f"turn {turn} call {number} is done")
        self.returned.append(text)
        return text

    async def reply(self, messages: list[dict[str, Any]], *, follow_up: bool) -> list[tuple[str, dict[str, int]]]:
        """Return the calls that the model makes, each with its id; none if it answers."""
        await asyncio.sleep(0)
        self.requests.append(messages)
        turn, self.asked = self.asked, self.asked + 1
        if follow_up or turn >= TURNS:
            return []
        return [(f"call_{turn}_{number}", {"number": number, "turn": turn}) for number in range(CALLS)]

    def cancel(self, task: "asyncio.Task[Any]", way: Way) -> None:
        """Cancel the task."""
        task.cancel()

    def faults(self, task: "asyncio.Task[Any]") -> Iterator[str]:
        """Give nothing: no reason is asked for."""
        return iter(())

    def released(self) -> Iterator[str]:
        """Give nothing: nothing is opened."""
        return iter(())

    def follow_up_faults(self) -> Iterator[str]:
        """Give what is wrong with the requests of the follow-up."""
        return (fault for messages in self.requests for fault in request_faults(messages))


def openai_messages(said: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return *said* with the calls of one turn in one message, and their results in the order of the calls."""
    messages: list[dict[str, Any]] = []
    for each in map(dict, said):
        if each["role"] == "assistant" and messages and messages[-1]["role"] == "assistant":
            calls = [*messages[-1].get("tool_calls", ()), *each.get("tool_calls", ())]
            messages[-1] |= {"content": messages[-1]["content"] or each["content"]}
            messages[-1] |= {"tool_calls": calls} if calls else {}
        else:
            messages.append(each)
    order = {
        call["id"]: (at, number)
        for at, each in enumerate(messages)
        for number, call in enumerate(each.get("tool_calls", ()))
    }
    place = 0
    for start in range(len(messages)):
        if messages[start]["role"] == "tool" and start >= place:
            place = start
            while place < len(messages) and messages[place]["role"] == "tool":
                place += 1
            messages[start:place] = sorted(messages[start:place], key=lambda each: order.get(each["tool_call_id"], ()))
    return messages


def _call(call_id: str, name: str, arguments: Any) -> dict[str, Any]:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": text}}


def _calls(*calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


def _result(call_id: str, text: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": str(text)}


# pydantic-ai


class PydanticAI(Peer):
    """A run of pydantic-ai; saved are the messages of `capture_run_messages`."""

    def __init__(self) -> None:
        super().__init__()
        self._messages: list[Any] = []

    def _agent(self, *, follow_up: bool) -> Any:
        ai: Any = importlib.import_module("pydantic_ai")
        parts: Any = importlib.import_module("pydantic_ai.messages")
        models: Any = importlib.import_module("pydantic_ai.models.function")

        async def model(messages: Any, info: Any) -> Any:
            calls = await self.reply(self._read(messages), follow_up=follow_up)
            made = [parts.ToolCallPart("work", arguments, tool_call_id=call_id) for call_id, arguments in calls]
            return parts.ModelResponse(parts=made or [parts.TextPart(DONE)])

        agent = ai.Agent(models.FunctionModel(model))

        async def work(number: int, turn: int) -> str:
            return await self.tool(number, turn)

        agent.tool_plain(work)
        return agent

    async def work(self) -> object:
        """Run it."""
        ai: Any = importlib.import_module("pydantic_ai")
        with ai.capture_run_messages() as self._messages:
            return await self._agent(follow_up=False).run(TASK)

    @staticmethod
    def _read(messages: Any) -> list[dict[str, Any]]:
        said: list[dict[str, Any]] = []
        for part in (part for message in messages for part in message.parts):
            match part.part_kind:
                case "user-prompt":
                    said.append({"role": "user", "content": part.content})
                case "text":
                    said.append({"role": "assistant", "content": part.content})
                case "tool-call":
                    said.append(_calls(_call(part.tool_call_id, part.tool_name, part.args)))
                case "tool-return" | "retry-prompt":
                    said.append(_result(part.tool_call_id, part.content))
        return openai_messages(said)

    async def saved(self) -> list[dict[str, Any]]:
        """Return what was captured."""
        return self._read(self._messages)

    async def follow_up(self) -> Iterator[str]:
        """Go on with it as the history."""
        self.requests.clear()
        await self._agent(follow_up=True).run(PROMPT["content"], message_history=list(self._messages))
        return self.follow_up_faults()


# langgraph


def _langgraph_model(peer: Peer, *, follow_up: bool) -> Any:
    models: Any = importlib.import_module("langchain_core.language_models")
    messages: Any = importlib.import_module("langchain_core.messages")
    outputs: Any = importlib.import_module("langchain_core.outputs")

    class Model(models.BaseChatModel):  # type: ignore[misc] # of a library that is not there where this is checked
        @property
        def _llm_type(self) -> str:
            return "scripted"

        def bind_tools(self, tools: Any, **more: Any) -> Any:
            return self

        def _generate(self, *arguments: Any, **more: Any) -> Any:
            raise NotImplementedError

        async def _agenerate(self, asked: Any, stop: Any = None, run_manager: Any = None, **more: Any) -> Any:
            calls = await peer.reply(LangGraph.read(asked), follow_up=follow_up)
            made = [{"name": "work", "args": arguments, "id": call_id} for call_id, arguments in calls]
            message = messages.AIMessage(content="" if made else DONE, tool_calls=made)
            return outputs.ChatResult(generations=[outputs.ChatGeneration(message=message)])

    return Model()


class LangGraph(Peer):
    """A run of langgraph's agent; saved is the state of its thread, kept by a checkpointer in memory."""

    def __init__(self) -> None:
        super().__init__()
        self._saver = importlib.import_module("langgraph.checkpoint.memory").InMemorySaver()
        self._config = {"configurable": {"thread_id": "1"}}

    def _graph(self, *, follow_up: bool) -> Any:
        agents: Any = importlib.import_module("langgraph.prebuilt")

        async def work(number: int, turn: int) -> str:
            """Do some of the work."""
            return await self.tool(number, turn)

        model = _langgraph_model(self, follow_up=follow_up)
        return agents.create_react_agent(model, [work], checkpointer=self._saver)

    async def work(self) -> object:
        """Run it."""
        graph = self._graph(follow_up=False)
        return await graph.ainvoke({"messages": [("user", TASK)]}, self._config)

    @staticmethod
    def read(messages: Any) -> list[dict[str, Any]]:
        """Return langchain's messages as OpenAI's."""
        said: list[dict[str, Any]] = []
        for message in messages:
            match message.type:
                case "human":
                    said.append({"role": "user", "content": message.content})
                case "tool":
                    said.append(_result(message.tool_call_id, message.content))
                case "ai" if message.tool_calls:
                    calls = [_call(call["id"], call["name"], call["args"]) for call in message.tool_calls]
                    said.append(_calls(*calls))
                case "ai":
                    said.append({"role": "assistant", "content": message.content})
        return openai_messages(said)

    async def saved(self) -> list[dict[str, Any]]:
        """Return the state of the thread."""
        state = await self._graph(follow_up=True).aget_state(self._config)
        return self.read(state.values.get("messages", ()))

    async def follow_up(self) -> Iterator[str]:
        """Go on in the same thread."""
        self.requests.clear()
        await self._graph(follow_up=True).ainvoke({"messages": [("user", PROMPT["content"])]}, self._config)
        return self.follow_up_faults()


# openai-agents


class _Session:
    """A session in memory, without the threads of the library's own."""

    session_id = "1"
    session_settings = None

    def __init__(self) -> None:
        self.items: list[Any] = []

    async def get_items(self, limit: int | None = None, **more: Any) -> list[Any]:
        return list(self.items if limit is None else self.items[-limit:])

    async def add_items(self, items: Sequence[Any], **more: Any) -> None:
        self.items += items

    async def pop_item(self, **more: Any) -> Any:
        return self.items.pop() if self.items else None

    async def clear_session(self, **more: Any) -> None:
        self.items.clear()


class OpenAIAgents(Peer):
    """A run of openai-agents; saved is what is in its session."""

    def __init__(self) -> None:
        super().__init__()
        self._session = _Session()

    async def _respond(self, asked: Any, *, follow_up: bool) -> Any:
        agents: Any = importlib.import_module("agents")
        types: Any = importlib.import_module("openai.types.responses")
        items = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        calls = await self.reply(self._read(items), follow_up=follow_up)
        output = [
            types.ResponseFunctionToolCall(
                type="function_call", call_id=call_id, name="work", arguments=json.dumps(arguments)
            )
            for call_id, arguments in calls
        ]
        text = types.ResponseOutputText(type="output_text", text=DONE, annotations=[])
        message = types.ResponseOutputMessage(
            id="message", type="message", role="assistant", status="completed", content=[text]
        )
        return agents.ModelResponse(output=output or [message], usage=agents.Usage(), response_id=None)

    def _agent(self, *, follow_up: bool) -> Any:
        agents: Any = importlib.import_module("agents")
        agents.set_tracing_disabled(True)
        peer = self

        class Model(agents.Model):  # type: ignore[misc] # of a library that is not there where this is checked
            async def get_response(self, **asked: Any) -> Any:
                return await peer._respond(asked["input"], follow_up=follow_up)

            def stream_response(self, *arguments: Any, **named: Any) -> Any:
                raise NotImplementedError

        async def work(number: int, turn: int) -> str:
            return await self.tool(number, turn)

        return agents.Agent(name="worker", model=Model(), tools=[agents.function_tool(work)])

    async def _run(self, prompt: str, *, follow_up: bool) -> object:
        agents: Any = importlib.import_module("agents")
        return await agents.Runner.run(self._agent(follow_up=follow_up), prompt, session=self._session)

    async def work(self) -> object:
        """Run it."""
        return await self._run(TASK, follow_up=False)

    @staticmethod
    def _read(items: Any) -> list[dict[str, Any]]:
        said: list[dict[str, Any]] = []
        for item in items:
            match item.get("type"):
                case "function_call":
                    said.append(_calls(_call(item["call_id"], item["name"], item["arguments"])))
                case "function_call_output":
                    said.append(_result(item["call_id"], item["output"]))
                case _:
                    content = item["content"]
                    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
                    said.append({"role": item["role"], "content": text})
        return openai_messages(said)

    async def saved(self) -> list[dict[str, Any]]:
        """Return what is in the session."""
        return self._read(self._session.items)

    async def follow_up(self) -> Iterator[str]:
        """Go on in the same session."""
        self.requests.clear()
        await self._run(PROMPT["content"], follow_up=True)
        return self.follow_up_faults()


PEERS: dict[str, Callable[[], Subject]] = {
    "pydantic-ai-slim": PydanticAI,
    "langgraph": LangGraph,
    "openai-agents": OpenAIAgents,
}


def main() -> None:
    """Print the table."""
    print(f"{'library':18} {'version':10} {'ticks':>5}  {'  '.join(kind for kind in KINDS if kind != 'reason')}")
    ours: Callable[[], Subject] = functools.partial(
        our_run, *(after(1 + 2 * number) for number in range(CALLS)), turns=TURNS
    )
    for name, make in [("agent-fsm", ours), *PEERS.items()]:
        try:
            told = version(name)
        except PackageNotFoundError:
            told = "this one" if name == "agent-fsm" else ""
        if not told:
            print(f"{name:18} not installed")
            continue
        found = sweep(Variant(name, make, unit="tick", virtual=name == "agent-fsm"))
        counts = "  ".join(f"{found.count(kind):{len(kind)}}" for kind in KINDS if kind != "reason")
        print(f"{name:18} {told:10} {found.cancelled:5}  {counts}", flush=True)
        for fault in found.faults()[:: max(1, len(found.faults()) // 4)] if "--why" in sys.argv else ():
            print(f"    {fault[:300]}")


if __name__ == "__main__":
    main()
