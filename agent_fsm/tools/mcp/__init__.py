"""MCP: tools of other programs, through the Model Context Protocol."""

from agent_fsm.tools.mcp.config import ServersFile, ServerSpec, read_servers, servers_of
from agent_fsm.tools.mcp.invoker import MCPInvoker
from agent_fsm.tools.mcp.server import ServerHealth

__all__ = ["MCPInvoker", "ServerHealth", "ServerSpec", "ServersFile", "read_servers", "servers_of"]
