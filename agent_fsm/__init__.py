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
    from agent_fsm.tools.local import EchoMCP, LocalMCPInvoker

__all__ = [
    "TABLE",
    "AgentConfig",
    "AgentFsmError",
    "AgentResult",
    "AgentRun",
    "ConfigError",
    "EchoMCP",
    "Limits",
    "LocalMCPInvoker",
    "MessagesError",
    "ModelClient",
    "ModelError",
    "ModelRequest",
    "NoRowError",
    "Prices",
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


def __getattr__(name: str) -> Any:
    # Tools that start processes need a quarter of what else this package takes to import, and not everybody needs them
    if name in ("EchoMCP", "LocalMCPInvoker"):
        from agent_fsm.tools import local

        return getattr(local, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
