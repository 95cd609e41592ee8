"""The doors by HTTP: the agent by URL (`agent`), MCP servers by URL (`gateway`). Both need FastAPI, the extra `server`.

Nothing is imported here, so that whoever needs one does not load the other.
"""
