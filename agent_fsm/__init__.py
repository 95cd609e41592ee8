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

if TYPE_CHECKING:
    from agent_fsm.tools.local import EchoMCP, LocalMCPInvoker

__all__ = [
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
    "RunningLoopError",
    "State",
    "StopReason",
    "TableError",
    "ToolInvoker",
    "ToolResult",
    "Usage",
    "arun_agent",
    "run_agent",
]


def __getattr__(name: str) -> Any:
    # Tools that start processes need a quarter of what else this package takes to import, and not everybody needs them
    if name in ("EchoMCP", "LocalMCPInvoker"):
        from agent_fsm.tools import local

        return getattr(local, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
