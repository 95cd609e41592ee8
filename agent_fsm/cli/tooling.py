"""Where the command's tools come from: this machine, an HTTP gateway, MCP servers."""

import asyncio
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from agent_fsm.cli.settings import PREFIX, names
from agent_fsm.protocol import ToolInvoker
from agent_fsm.tools.combined import CombinedInvoker
from agent_fsm.tools.local import EchoMCP, LocalMCPInvoker

__all__ = ["TOOL_OPTIONS", "chosen_tools", "tool_options", "tools"]

TOKEN_VARIABLE: Final = f"{PREFIX}TOOLS_TOKEN"
_LOCAL: Final = LocalMCPInvoker()
_LEVELS: Final = ("strict", "basic", "off")


_OPTIONS: Final = (
    click.option(
        "--tools",
        "kind",
        type=click.Choice(["local", "echo", "research", "none"]),
        default=None,
        help="What the model may call; local: exec_python and exec_shell, contained as --sandbox says "
        "[local, but none with --mcp-config or --tools-url]",
    ),
    click.option(
        "--mcp-config",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Call the tools of the MCP servers in FILE: mcpServers or servers in JSON, mcp_servers in TOML",
    ),
    click.option(
        "--tools-url",
        metavar="URL",
        help=f"Call the tools of the HTTP gateway there, with what {TOKEN_VARIABLE} holds as its bearer token",
    ),
    click.option(
        "--shell-allow",
        metavar="NAMES",
        default=",".join(_LOCAL.shell_allow_prefixes),
        help="Programs that exec_shell may start; python or pip among them allow everything that the sandbox lets "
        f"happen [{','.join(_LOCAL.shell_allow_prefixes)}]",
    ),
    click.option(
        "--sandbox",
        type=click.Choice(_LEVELS),
        default=_LOCAL.sandbox,
        help=f"The most containment of local tools; where less holds, results say so [{_LOCAL.sandbox}]",
    ),
    click.option(
        "--require-sandbox", type=click.Choice(_LEVELS), default=None, help="Run no local tools below this [off]"
    ),
    click.option(
        "--read",
        "read_paths",
        metavar="PATH",
        multiple=True,
        type=click.Path(path_type=Path),
        help="What local tools may read, too; may be given more than once",
    ),
    click.option(
        "--write",
        "write_paths",
        metavar="PATH",
        multiple=True,
        type=click.Path(path_type=Path),
        help="What they may write to, too",
    ),
    click.option("--network", is_flag=True, help="Let local tools use the network"),
)
TOOL_OPTIONS: Final = (
    *("kind", "mcp_config", "tools_url", "shell_allow", "sandbox", "require_sandbox"),
    *("read_paths", "write_paths", "network"),
)
"""The names of the arguments that `tool_options` makes."""


def tool_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return *command* with the options that choose tools; they arrive as the arguments of `chosen_tools`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def chosen_tools(
    *, kind: str | None, mcp_config: Path | None, tools_url: str | None, shell_allow: str, **local: Any
) -> ToolInvoker | None:
    """Return the tools that the options name, together if they name several.

    Raises:
        ConfigError: the file of servers, or the URL, is no good; says where.
    """
    backends: dict[str, ToolInvoker] = {}
    match kind or ("local" if tools_url is None and mcp_config is None else "none"):
        case "local":
            local |= {name: [str(path.absolute()) for path in local[name]] for name in ("read_paths", "write_paths")}
            backends["local"] = LocalMCPInvoker(names(shell_allow), **local)
        case "echo":
            backends["echo"] = EchoMCP()
        case "research":
            from agent_fsm.tools.research import ResearchPythonInvoker

            backends["research"] = ResearchPythonInvoker()
    if tools_url is not None:
        backends["gateway"] = _gateway(tools_url)
    if mcp_config is not None:
        backends["mcp"] = _servers(mcp_config)
    match list(backends.values()):
        case []:
            return None
        case [only]:
            return only
    return CombinedInvoker(backends)


def _gateway(url: str) -> ToolInvoker:
    from agent_fsm.tools.http import HttpToolsInvoker

    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    return HttpToolsInvoker(url, {"Authorization": f"Bearer {token}"} if token else None)


def _servers(path: Path) -> ToolInvoker:
    """Return the servers that *path* names; what it says in vain is told on standard error."""
    from agent_fsm.tools.mcp import MCPInvoker, read_servers

    file = read_servers(path, os.environ)
    for warning in file.warnings:
        click.echo(f"Warning: {warning}", err=True)
    return MCPInvoker(file.servers)


@click.command()
@tool_options
@click.option("--json", "as_json", is_flag=True, help="Print them as a JSON list of OpenAI function tools.")
def tools(as_json: bool, **options: Any) -> None:
    """Print the tools that the model would be offered."""
    try:
        offered, missing = asyncio.run(_listed(chosen_tools(**options)))
    except RuntimeError as error:  # no backend answered: it says of each why
        raise click.ClickException(str(error)) from None
    for each in missing:
        click.echo(f"not there: {each}", err=True)
    click.echo(json.dumps(offered, indent=2) if as_json else "\n\n".join(_texts(offered)))


async def _listed(invoker: ToolInvoker | None) -> tuple[list[dict[str, Any]], Sequence[str]]:
    """Return the tools of *invoker*, and what of it could not be had."""
    if invoker is None:
        return [], ()
    for_run = getattr(invoker, "for_run", None)
    view = invoker if for_run is None else for_run()
    try:
        return await view.list_openai_tools(), getattr(view, "unavailable", ())
    finally:
        if for_run is not None and hasattr(view, "aclose"):
            await view.aclose()


def _texts(offered: list[dict[str, Any]]) -> Iterator[str]:
    return (_text(each["function"]) for each in offered)


def _text(function: Mapping[str, Any]) -> str:
    schema = function.get("parameters", {})
    lines = [function["name"], click.wrap_text(function.get("description", ""), 100, "  ", "  ")]
    for name, parameter in schema.get("properties", {}).items():
        must = ", required" if name in schema.get("required", ()) else ""
        told = f"{name} ({_kind(parameter)}{must}): {parameter.get('description', '')}".removesuffix(": ")
        lines.append(click.wrap_text(told, 100, "    ", "      "))
    return "\n".join(lines)


def _kind(parameter: Mapping[str, Any]) -> str:
    kinds = [parameter, *parameter.get("anyOf", ())]
    return " or ".join(str(each["type"]) for each in kinds if "type" in each) or "any"
