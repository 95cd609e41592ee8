"""MCP: tools of other programs, through the Model Context Protocol."""
