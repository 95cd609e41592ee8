"""An MCP server made with the SDK, on stdio or streamable HTTP.

    python tests/mcp_servers/sdk.py                 speaks stdio
    python tests/mcp_servers/sdk.py --http          listens on 127.0.0.1, prints the port, ends with its stdin

Each call that arrives, is finished or is cancelled is a line in the file that LOG names in the environment.
"""

import os
import sys
import threading
from pathlib import Path
from typing import Any

import anyio
import uvicorn
from mcp.server.mcpserver import Context, Image, MCPServer
from mcp_types import ToolAnnotations

server = MCPServer("sdk", log_level="ERROR")


def note(line: str) -> None:
    with Path(os.environ.get("LOG", os.devnull)).open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def add(a: int, b: int) -> int:
    """Add two numbers."""
    note("add")
    return a + b


@server.tool()
def picture() -> Image:
    """Draw a picture."""
    return Image(data=b"\x89PNG", format="png")


@server.tool()
async def wait(seconds: float) -> str:
    """Wait for a while."""
    note("wait")
    try:
        await anyio.sleep(seconds)
    except anyio.get_cancelled_exc_class():
        note("cancelled")
        raise
    return "waited"


@server.tool()
def fail() -> str:
    """Fail."""
    raise ValueError("no such thing")


@server.tool()
async def grow(context: Context[Any]) -> str:
    """Offer one tool more."""
    server.add_tool(lambda: "new", name="new", description="A new one.")
    await context.notify_tools_changed()
    return "grown"


@server.tool()
def headers(context: Context[Any]) -> str:
    """Say which headers the request had."""
    return "\n".join(f"{name}: {value}" for name, value in sorted((context.headers or {}).items()))


def _serve() -> None:
    import socket

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    print(listener.getsockname()[1], flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    app = server.streamable_http_app()
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listener])


if __name__ == "__main__":
    if "--http" in sys.argv:
        _serve()
    else:
        server.run("stdio")
