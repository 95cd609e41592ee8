"""The names of LiteLLM's mini-agent over ours, so that its users change one import line.

from agent_fsm.mini_agent import AgentConfig, LocalMCPInvoker, run_mcp_mini_agent
"""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from agent_fsm.config import AgentConfig
from agent_fsm.driver import RunOptions, arun_agent, run_agent
from agent_fsm.protocol import AgentResult, ToolInvoker
from agent_fsm.tools.http import HttpToolsInvoker
from agent_fsm.tools.local import EchoMCP, LocalMCPInvoker
from agent_fsm.tools.research import ResearchPythonInvoker

__all__ = [
    "AgentConfig",
    "EchoMCP",
    "HttpToolsInvoker",
    "LocalMCPInvoker",
    "ResearchPythonInvoker",
    "arun_mcp_mini_agent",
    "run_mcp_mini_agent",
]


async def arun_mcp_mini_agent(
    messages: Sequence[Mapping[str, Any]], mcp: ToolInvoker, cfg: AgentConfig, **options: Unpack[RunOptions]
) -> AgentResult:
    """Run the agent with the tools of *mcp*; *options* are those of `AgentRun`."""
    return await arun_agent(messages, mcp, cfg, **options)


def run_mcp_mini_agent(
    messages: Sequence[Mapping[str, Any]], mcp: ToolInvoker, cfg: AgentConfig, **options: Unpack[RunOptions]
) -> AgentResult:
    """Run the agent from plain code; *options* are those of `AgentRun`."""
    return run_agent(messages, mcp, cfg, **options)
