"""The tools of MCP servers, as a tool backend: one that is dead, hangs or lies never hides the tools of the others."""

import asyncio
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

from attrs import frozen

from agent_fsm.errors import ConfigError
from agent_fsm.messages import cut, decode_object
from agent_fsm.protocol import ToolResult
from agent_fsm.redaction import redact_json
from agent_fsm.tools.mcp.config import ServerSpec, read_servers, servers_of
from agent_fsm.tools.mcp.content import McpTool, openai_tool
from agent_fsm.tools.mcp.server import OnElicit, Server, ServerHealth
from agent_fsm.tools.names import tool_name

__all__ = ["MCPInvoker", "Servers"]

Servers: TypeAlias = Mapping[str, ServerSpec | Mapping[str, Any]] | Iterable[ServerSpec] | Path | str
"""Names to servers, as `ServerSpec` or as config files have them; servers; or the path of a config file."""

_CLOSE_S = 2.5
"""Longer than any server takes to close; one that does is killed."""
_GRACE_S = 0.02
_TOOLS_A_TURN = 100
"""How many are taken before others on the loop have a turn."""
_GENERATORS = 3
"""Generators within each other that the SDK leaves to the loop to close, which it does one a turn."""
_NAMES_CHARS = 500
_SERVERS_TOLD = 5


@frozen
class _Place:
    """Where a tool is."""

    server: Server
    tool: McpTool


class MCPInvoker:
    """Offers the tools of MCP servers, over stdio or HTTP, and calls them. Servers start when they are first needed.

    A run has servers of its own, which end with it. `async with MCPInvoker(...) as tools` keeps them instead: then all
    runs on that event loop share them until the block ends.

    Args:
        servers: names to servers, servers, or the path of a config file.
        on_elicit: answers what a server asks the user; without it every question is declined.

    Raises:
        ConfigError: *servers* can't be meant, or names one twice.
    """

    research_tools = None
    """They are judged by their names: the protocol has no word for it."""

    def __init__(self, servers: Servers, *, on_elicit: OnElicit | None = None) -> None:
        self._specs, self.warnings = _specs(servers)
        self._on_elicit = on_elicit
        self._servers: dict[str, Server] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._shared = self._closed = False
        self._places: dict[str, _Place] = {}
        self._given: dict[tuple[str, str], str] = {}
        self._taken: set[str] = set()
        self._seen = 0
        self.unavailable: tuple[str, ...] = ()
        """The servers that offered nothing when they were last asked, and why."""

    async def __aenter__(self) -> Self:
        self._begin()
        self._shared = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shared = False
        await self.aclose()

    def for_run(self) -> "MCPInvoker | _Lent":
        """Return what one run uses: servers of its own, or the ones that are kept on this loop."""
        if self._shared and self._loop is asyncio.get_running_loop():
            return _Lent(self)
        return MCPInvoker(self._specs, on_elicit=self._on_elicit)

    def health(self) -> dict[str, ServerHealth]:
        """Return how each server is."""
        state: Any = "closed" if self._closed else "starting"
        return {
            spec.name: self._servers[spec.name].health() if spec.name in self._servers else ServerHealth(state)
            for spec in self._specs
        }

    def tools_changed(self) -> bool:
        """Return whether the tools may be others than those last listed."""
        return self._changes() != self._seen

    def tools_of(self, server: str) -> dict[str, McpTool]:
        """Return the tools of *server* as last listed, by the names under which they are offered."""
        return {name: place.tool for name, place in self._places.items() if place.server.spec.name == server}

    def place_of(self, name: str) -> tuple[str, str] | None:
        """Return the server and its own name of the tool that is offered as *name*; None if none is."""
        place = self._places.get(name)
        return None if place is None else (place.server.spec.name, place.tool.name)

    async def list_openai_tools(self) -> list[dict[str, Any]]:
        """Return the tools of all servers that live, in the order in which the servers were given. All are asked at
        once, and each has its own `startup_timeout_s`.

        Raises:
            RuntimeError: none of them lives; says of each why.
        """
        self._begin()
        servers = list(self._servers.values())
        listed = await asyncio.gather(*(server.tools() for server in servers))
        self._seen = sum(server.listed_changes for server in servers)
        if servers and all(isinstance(each, str) for each in listed):
            raise RuntimeError("no MCP server can be reached: " + "; ".join(str(each) for each in listed))
        self.unavailable = tuple(f"MCP {each}" for each in listed if isinstance(each, str))
        places: dict[str, _Place] = {}
        offered: list[dict[str, Any]] = []
        for server, tools in zip(servers, listed, strict=True):
            secrets = server.spec.secrets
            for number, tool in enumerate(() if isinstance(tools, str) else tools):
                if number % _TOOLS_A_TURN == 0:
                    await asyncio.sleep(0)
                name = self._named(server.spec.name, tool.name)
                places[name] = _Place(server, tool)
                function = openai_tool(name, tool)
                offered.append(redact_json(function, secrets) if secrets else function)
        self._places = places
        return offered

    async def call_openai_tool(self, call: Mapping[str, Any], /) -> ToolResult:
        """Return what comes of *call*, at most 0.1 s after its server's `tool_timeout_s`."""
        function = call["function"]
        given = function["arguments"]
        arguments = given if isinstance(given, Mapping) else decode_object(str(given))
        if arguments is None:
            return _failed(f"error: the arguments must be a JSON object, not {cut(str(given), 200)!r}")
        return await self.invoke(function["name"], arguments)

    async def invoke(self, name: str, arguments: Mapping[str, Any], *, timeout_s: float | None = None) -> ToolResult:
        """Return what comes of calling the tool that is offered as *name*; *timeout_s* can only shorten its time."""
        try:
            self._begin()
            if not self._places:
                async with asyncio.timeout(timeout_s):
                    await self.list_openai_tools()
        except (RuntimeError, TimeoutError) as error:
            return _failed(f"error: the call was not sent: {error or 'the servers did not list their tools in time'}")
        place = self._places.get(name)
        if place is None:
            return _failed(f"error: there is no tool {name!r}; {self._there_is()}")
        limit = place.server.spec.tool_timeout_s
        return await place.server.call(
            place.tool.name, arguments, limit if timeout_s is None else min(limit, timeout_s)
        )

    async def aclose(self) -> None:
        """Close all servers at once; takes 2.5 s at most. When cancelled, what is left is killed at once."""
        servers, self._servers, self._closed = list(self._servers.values()), {}, True
        for server in servers:
            server.stop()
        try:
            await _ended(servers, _CLOSE_S)
        finally:
            for server in servers:
                server.stop(hurried=True)
            await _ended(servers, _GRACE_S)
        for _ in range(_GENERATORS):
            await asyncio.sleep(0)

    def _begin(self) -> None:
        loop = asyncio.get_running_loop()
        if self._closed or (self._loop is not None and self._loop is not loop and not self._loop.is_closed()):
            raise RuntimeError("the MCP servers are closed, or belong to another event loop")
        if self._loop is not loop:
            self._loop = loop
            self._servers = {spec.name: Server(spec, self._on_elicit) for spec in self._specs}
            self._places = {}

    def _changes(self) -> int:
        return sum(server.changes for server in self._servers.values())

    def _there_is(self) -> str:
        """Return which tools there are, and what is amiss with servers whose tools may be missed."""
        known = cut(", ".join(self._places), _NAMES_CHARS) or "none"
        amiss = [
            f"server {name!r} is {health.state}: {health.error or 'it has not answered yet'}"
            for name, health in self.health().items()
            if health.error or health.state != "ready"
        ]
        return "; ".join([f"there are: {known}", *(cut(each, _NAMES_CHARS) for each in amiss[:_SERVERS_TOLD])])

    def _named(self, server: str, tool: str) -> str:
        """Return the name of a tool, which it keeps: what another server lists later does not change it."""
        if (server, tool) not in self._given:
            self._given[server, tool] = tool_name(server, tool, self._taken)
            self._taken.add(self._given[server, tool])
        return self._given[server, tool]


class _Lent:
    """What a run uses of servers that it shares, and so does not close."""

    research_tools = None

    def __init__(self, lender: MCPInvoker) -> None:
        self._lender = lender
        self._seen = 0
        self.unavailable: tuple[str, ...] = ()

    def tools_changed(self) -> bool:
        """Return whether the tools may be others than those that this run has listed last."""
        return self._lender._changes() != self._seen

    async def list_openai_tools(self) -> list[dict[str, Any]]:
        """Return the tools of all servers that live."""
        listed = await self._lender.list_openai_tools()
        self._seen, self.unavailable = self._lender._seen, self._lender.unavailable
        return listed

    async def call_openai_tool(self, call: Mapping[str, Any], /) -> ToolResult:
        """Return what comes of *call*."""
        return await self._lender.call_openai_tool(call)


async def _ended(servers: list[Server], seconds: float) -> None:
    tasks = {task for server in servers for task in server.tasks}
    if tasks:
        await asyncio.wait(tasks, timeout=seconds)


def _failed(text: str) -> ToolResult:
    return ToolResult(text, ok=False)


def _specs(servers: Servers) -> tuple[tuple[ServerSpec, ...], tuple[str, ...]]:
    """Return the servers that are enabled, and what is to be said of how they were written down."""
    match servers:
        case str() | Path():
            file = read_servers(servers, os.environ)
            found, warnings = file.servers, file.warnings
        case Mapping():
            file = servers_of(servers, os.environ, "servers")
            found, warnings = file.servers, file.warnings
        case _:
            found, warnings = tuple(servers), ()
    for spec in found:
        if not isinstance(spec, ServerSpec):
            raise ConfigError(f"a server must be a ServerSpec, or a mapping under its name, not {type(spec).__name__}")
    names = [spec.name for spec in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two servers are called {twice!r}")
    return tuple(spec for spec in found if spec.enabled), tuple(warnings)
