"""The agent by URL as the environment configures it: `uvicorn agent_fsm.agent_proxy:app --host 127.0.0.1 --port 8080`.

What it may be told by the environment is in `agent_fsm.server.settings`. Needs the extra `server`.
"""

from agent_fsm.server.agent import create_app

__all__ = ["app"]

app = create_app()  # at import, as uvicorn looks for an app and calls nothing
