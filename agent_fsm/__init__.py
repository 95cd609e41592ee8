"""An LLM agent loop as an explicit state machine.

Every run ends, within bounds known beforehand; its transcript is valid at every instant; it leaves nothing running;
what is checked is what runs; nothing is done twice.
"""

from typing import TYPE_CHECKING, Any

from agent_fsm.config import AgentConfig, Limits
from agent_fsm.driver import AgentRun, arun_agent, run_agent
from agent_fsm.errors import (
    AgentFsmError,
    ConfigError,
    MessagesError,
    NoRowError,
    RunningLoopError,
    TableError,
)
from agent_fsm.protocol import (
    AgentResult,
    ModelClient,
    ModelError,
    ModelRequest,
    Prices,
    State,
    StopReason,
    ToolInvoker,
    ToolResult,
    Usage,
)

# What policies are written with, but for `ledger` and `limits`: agent_fsm.ledger is a module. All of it is in
# agent_fsm.table.
from agent_fsm.table import TABLE, Row, Table, add, counter, observe, opaque, put, reset

if TYPE_CHECKING:
    from agent_fsm.tools.combined import CombinedInvoker
    from agent_fsm.tools.functions import FunctionTools
    from agent_fsm.tools.http import HttpToolsInvoker
    from agent_fsm.tools.local import EchoMCP, LocalMCPInvoker
    from agent_fsm.tools.mcp import MCPInvoker
    from agent_fsm.tools.research import ResearchPythonInvoker

__all__ = [
    "TABLE",
    "AgentConfig",
    "AgentFsmError",
    "AgentResult",
    "AgentRun",
    "CombinedInvoker",
    "ConfigError",
    "EchoMCP",
    "FunctionTools",
    "HttpToolsInvoker",
    "Limits",
    "LocalMCPInvoker",
    "MCPInvoker",
    "MessagesError",
    "ModelClient",
    "ModelError",
    "ModelRequest",
    "NoRowError",
    "Prices",
    "ResearchPythonInvoker",
    "Row",
    "RunningLoopError",
    "State",
    "StopReason",
    "Table",
    "TableError",
    "ToolInvoker",
    "ToolResult",
    "Usage",
    "add",
    "arun_agent",
    "counter",
    "observe",
    "opaque",
    "put",
    "reset",
    "run_agent",
]


# Where tools are that not everybody needs: they take longer to import than all the rest
_INVOKERS = {
    "CombinedInvoker": "combined",
    "EchoMCP": "local",
    "FunctionTools": "functions",
    "HttpToolsInvoker": "http",
    "LocalMCPInvoker": "local",
    "MCPInvoker": "mcp",
    "ResearchPythonInvoker": "research",
}


def __getattr__(name: str) -> Any:
    if name in _INVOKERS:
        from importlib import import_module

        return getattr(import_module(f"agent_fsm.tools.{_INVOKERS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
