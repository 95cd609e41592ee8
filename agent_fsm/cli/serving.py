"""The commands that listen: the agent by URL, and MCP servers as a gateway."""

import os
from pathlib import Path
from typing import Any, Final

import click

from agent_fsm.cli.settings import PREFIX

__all__ = ["gateway", "serve"]

GATEWAY_TOKEN: Final = f"{PREFIX}GATEWAY_TOKEN"

_host = click.option(
    "--host", default="127.0.0.1", show_default=True, help="Where to listen; beyond loopback, a token must be set."
)


@click.command()
@click.option(
    "--config",
    "path",
    metavar="FILE",
    required=True,
    type=click.Path(path_type=Path),
    help="The servers: mcpServers or servers in JSON, mcp_servers or servers in TOML.",
)
@_host
@click.option("--port", default=8787, show_default=True, type=click.IntRange(0, 65_535), help="0: any free port.")
def gateway(path: Path, host: str, port: int) -> None:
    """Serve the tools of MCP servers over HTTP, until Ctrl-C or SIGTERM.

    GET /tools, POST /invoke, GET /health, and MCP itself under /mcp. If AGENT_FSM_GATEWAY_TOKEN is set, every request
    must bring it as its bearer token.
    """
    serve_gateway = _needs_server("gateway")
    serve_gateway(path, host=host, port=port, token=os.environ.get(GATEWAY_TOKEN, "").strip() or None)


@click.command()
@_host
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65_535), help="0: any free port.")
def serve(host: str, port: int) -> None:
    """Serve the agent as POST /agent/run, until Ctrl-C or SIGTERM.

    What a request may ask for is set by variables AGENT_FSM_...; agent_fsm.server.settings tells them.
    """
    _needs_server("agent")(host=host, port=port)


def _needs_server(module: str) -> Any:
    """Return the `serve` of a server module.

    Raises:
        click.ClickException: the extra `server` is not installed.
    """
    from importlib import import_module

    try:
        return import_module(f"agent_fsm.server.{module}").serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("fastapi", "starlette", "uvicorn", "jsonschema"):
            raise
        raise click.ClickException(f"{error.name} is not installed: pip install 'agent-fsm[server]'") from None
