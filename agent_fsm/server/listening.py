"""Listening: an application served until the process is told to end."""

import sys
from typing import TYPE_CHECKING, Final

import uvicorn

from agent_fsm.server.problems import check_binding

if TYPE_CHECKING:
    from socket import socket

    from fastapi import FastAPI

__all__ = ["listen"]

_GRACE_S: Final = 3
"""Seconds that requests under way may go on once the process is told to end."""


def listen(app: "FastAPI", what: str, *, host: str, port: int, token: str | None) -> None:
    """Serve *app* until SIGINT or SIGTERM; once it can be asked, print `serving WHAT at URL`. Port 0 is any free one.

    Raises:
        ConfigError: *host* is not loopback, and there is no token.
    """
    check_binding(host, token)

    class Told(uvicorn.Server):
        async def startup(self, sockets: "list[socket] | None" = None) -> None:
            await super().startup(sockets)
            for listening in (each for server in getattr(self, "servers", ()) for each in server.sockets):
                where, bound = listening.getsockname()[:2]
                shown = f"[{where}]" if ":" in where else where
                sys.stdout.write(f"serving {what} at http://{shown}:{bound}\n")
                sys.stdout.flush()

    config = uvicorn.Config(
        app, host, port, log_level="warning", timeout_graceful_shutdown=_GRACE_S, server_header=False
    )
    try:
        Told(config).run()
    except KeyboardInterrupt:  # how uvicorn ends on SIGINT, when all is closed
        return
