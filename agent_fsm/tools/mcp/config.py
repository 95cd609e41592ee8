"""Servers: the MCP servers that a config file names, in any of the formats that are about.

Read are `mcpServers` (Claude Desktop and Code, Cursor, Copilot, Windsurf, Gemini), `servers` (VS Code's mcp.json, with
its comments and trailing commas), `mcp_servers` (Codex's config.toml) and `servers` in TOML. What a file says and this
package can't do is told as a warning, never passed over.
"""

import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias
from urllib.parse import urlsplit

from attrs import Attribute, evolve, field, frozen

from agent_fsm.errors import ConfigError
from agent_fsm.redaction import redact, secret_values

__all__ = ["ServerSpec", "ServersFile", "Transport", "read_servers", "servers_of"]

Transport: TypeAlias = Literal["stdio", "http", "sse"]

_MAX_FILE_BYTES = 1_000_000
_TABLES: Final = ("mcpServers", "mcp_servers", "servers")
"""What holds the servers in a file."""
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_MILLISECONDS_FROM = 1_000
"""A bare `timeout` from here on is in milliseconds, as Claude Code has it; below in seconds, as Cline has it."""


# What a server is


def _texts(instance: "ServerSpec", attribute: "Attribute[Any]", value: object) -> None:
    if value is None and attribute.name == "enabled_tools":
        return
    if not isinstance(value, tuple) or not all(isinstance(each, str) for each in value):
        raise ConfigError(f"server {instance.name!r}: {attribute.name} must be a list of strings")
    if any("\0" in each for each in value):
        raise ConfigError(f"server {instance.name!r}: {attribute.name} has a NUL character in it")


def _strings(instance: "ServerSpec", attribute: "Attribute[Any]", value: object) -> None:
    whole = isinstance(value, Mapping) and all(isinstance(each, str) for pair in value.items() for each in pair)
    if not isinstance(value, Mapping) or not whole:
        raise ConfigError(f"server {instance.name!r}: {attribute.name} must be a mapping of names to strings")
    for key, each in value.items():
        if "\0" in key + each or (attribute.name == "env" and (not key or "=" in key)):
            raise ConfigError(f"server {instance.name!r}: {attribute.name}: {key!r} can't be passed to a process")
        if attribute.name == "headers" and not (_HEADER_NAME.fullmatch(key) and each.isprintable() and each.isascii()):
            raise ConfigError(
                f"server {instance.name!r}: headers: {key!r} is no header: its name is a word, its value one line of "
                "ASCII"
            )


def _seconds(instance: "ServerSpec", attribute: "Attribute[Any]", value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"server {instance.name!r}: {attribute.name} must be a finite number > 0, not {value!r}")


def _named(instance: "ServerSpec", attribute: "Attribute[Any]", value: object) -> None:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ConfigError(f"the name of a server must be printable text, not {value!r}")


def _switch(instance: "ServerSpec", attribute: "Attribute[Any]", value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"server {instance.name!r}: {attribute.name} must be true or false, not {value!r}")


def _text(instance: "ServerSpec", attribute: "Attribute[Any]", value: object) -> None:
    if value is not None and (not isinstance(value, str) or not value.strip() or "\0" in value):
        raise ConfigError(f"server {instance.name!r}: {attribute.name} must be text, not {value!r}")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _copy(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


@frozen(kw_only=True, repr=False)
class ServerSpec:
    """One MCP server: a command to start (`transport` "stdio"), or a URL ("http", or "sse" for old servers).

    Raises:
        ConfigError: a field can't mean anything, or the fields don't go together; names the server and the field.
    """

    name: str = field(validator=_named)
    command: str | None = field(default=None, validator=_text)
    args: tuple[str, ...] = field(default=(), converter=_tuple, validator=_texts)
    env: Mapping[str, str] = field(factory=dict, converter=_copy, validator=_strings)
    """What the process gets beside the few harmless variables that every process gets."""
    cwd: str | None = field(default=None, validator=_text)
    url: str | None = field(default=None, validator=_text)
    headers: Mapping[str, str] = field(factory=dict, converter=_copy, validator=_strings)
    transport: Transport = field()
    startup_timeout_s: float = field(default=10.0, validator=_seconds)
    """Seconds from the start until the server has listed its tools."""
    tool_timeout_s: float = field(default=25.0, validator=_seconds)
    """Seconds that one call may take."""
    enabled_tools: tuple[str, ...] | None = field(default=None, converter=_tuple, validator=_texts)
    """The server's own names of the tools that are offered; None: all."""
    disabled_tools: tuple[str, ...] = field(default=(), converter=_tuple, validator=_texts)
    """Those that are not, whatever `enabled_tools` says."""
    enabled: bool = field(default=True, validator=_switch)
    variables: Mapping[str, str] = field(factory=dict, converter=_copy, validator=_strings)
    """The variables of our environment that were put into other fields."""

    @transport.default
    def _transport(self) -> Transport:
        return "stdio" if self.url is None else "http"

    def __attrs_post_init__(self) -> None:
        fault = _fault(self)
        if fault:
            raise ConfigError(f"server {self.name!r}: {fault}")

    def offers(self, tool: str) -> bool:
        """Return whether the server's *tool* may be used: first `enabled_tools` counts, then `disabled_tools`."""
        return (self.enabled_tools is None or tool in self.enabled_tools) and tool not in self.disabled_tools

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must not be shown: secrets of the environment, the headers, the URL, and what was put into others."""
        found = {
            *secret_values(self.env),
            *secret_values(self.headers),
            *secret_values(self.variables),
            *secret_values({"url": self.url or ""}),
        }
        return tuple(sorted(found, key=lambda each: (-len(each), each)))

    def __repr__(self) -> str:
        """Return what it is, without environment and headers, and without secrets elsewhere."""
        where = f"url={self.url!r}" if self.command is None else f"command={self.command!r}, args={self.args!r}"
        return redact(f"ServerSpec(name={self.name!r}, {where}, transport={self.transport!r})", self.secrets)


def _fault(spec: ServerSpec) -> str:
    """Return why the fields don't go together, or nothing."""
    if spec.transport not in ("stdio", "http", "sse"):
        return f"transport must be 'stdio', 'http' or 'sse', not {spec.transport!r}"
    if spec.command is None and spec.url is None:
        return "it has neither command nor url; a server is started by a command, or reached at a url"
    if spec.command is not None and spec.url is not None:
        return "it has both command and url; it can only be started, or reached"
    if spec.transport == "stdio":
        return "transport 'stdio' needs a command, not a url" if spec.command is None else ""
    if spec.url is None:
        return f"transport {spec.transport!r} needs a url, not a command"
    if not spec.enabled:  # variables in it may not be filled in
        return ""
    try:
        parts = urlsplit(spec.url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 0) >= 0
    except ValueError:
        whole = False
    return "" if whole else "url must be a whole http or https URL, like http://127.0.0.1:8080/mcp"


@frozen
class ServersFile:
    """What a file says."""

    servers: tuple[ServerSpec, ...]
    """Those that are not enabled too; in the order of the file."""
    warnings: tuple[str, ...] = ()
    """What was not understood, or can't be done, and of which server; each a sentence without its full stop."""


# Reading


def read_servers(path: Path | str, environ: Mapping[str, str]) -> ServersFile:
    """Return the servers in the file at *path*, with `${VAR}`, `${VAR:-default}` and `${env:VAR}` filled in from
    *environ*. `$${VAR}` stays as `${VAR}`.

    Raises:
        ConfigError: the file can't be read, or says what can't be meant, or a variable is not set; the message names
            file, server and field, and says what would be right.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror or error}") from None
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path}: has more than {_MAX_FILE_BYTES:,} bytes; that is no file of servers")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 (byte {error.start})") from None
    content = _parsed(path, text)
    folder = path.absolute().parent
    workspace = folder.parent if folder.name.startswith(".") else folder  # .vscode/mcp.json is about where .vscode is
    return _read(content, environ, str(path), workspace)


def servers_of(mapping: Mapping[str, Any], environ: Mapping[str, str], where: str) -> ServersFile:
    """Return the servers of *mapping*, names to entries as a file has them or to `ServerSpec`; or all of such a file.

    Raises:
        ConfigError: as `read_servers`; *where* stands for the file.
    """
    if _tables(mapping):
        return _read(mapping, environ, where, Path.cwd())
    return _entries(mapping, _Reading(environ, where, Path.cwd()))


def _parsed(path: Path, text: str) -> Mapping[str, Any]:
    toml = path.suffix == ".toml" or (path.suffix not in (".json", ".jsonc") and not text.lstrip().startswith("{"))
    try:
        content = tomllib.loads(text) if toml else _json(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is no {'TOML' if toml else 'JSON'}: {error}") from None
    if not isinstance(content, Mapping):
        raise ConfigError(f'{path}: must be a JSON object like {{"mcpServers": {{...}}}}')
    return content


def _json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        bare = _without_comments(text)
        if bare == text:
            raise
        try:
            return json.loads(bare, object_pairs_hook=_unique)
        except json.JSONDecodeError as again:
            raise again from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is there twice in one object")
        found[key] = value
    return found


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+"|//[^\n]*|/\*.*?\*/|,(?=(?:\s|//[^\n]*\n|/\*.*?\*/)*+[}\]])', re.DOTALL)


def _without_comments(text: str) -> str:
    """Return JSON without comments and trailing commas; lines and columns stay where they are."""

    def blank(found: re.Match[str]) -> str:
        token = found.group()
        return token if token.startswith('"') else re.sub(r"[^\n]", " ", token)

    return _TOKEN.sub(blank, text)


def _tables(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return what holds servers in *content*: not a server that happens to be called `servers`."""
    return {
        key: content[key]
        for key in _TABLES
        if isinstance(content.get(key), Mapping)
        and all(isinstance(each, Mapping | ServerSpec) for each in content[key].values())
        and not {"command", "url"} & set(content[key])
    }


def _read(content: Mapping[str, Any], environ: Mapping[str, str], where: str, workspace: Path) -> ServersFile:
    if isinstance(content.get("mcp"), Mapping) and not _tables(content):  # VS Code's settings.json
        content = content["mcp"]
    reading = _Reading(environ, where, workspace)
    found = [key for key in _TABLES if key in content]
    if not found:
        near = [each for name in content for each in get_close_matches(name, _TABLES, n=1)]
        also = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{where}: names no servers: it has none of {', '.join(_TABLES)}{also}")
    both: dict[str, Any] = {}
    for key in found:
        table = content[key]
        if not isinstance(table, Mapping):
            raise ConfigError(f"{where}: {key} must be a mapping of names to servers, not {_kind(table)}")
        for name, entry in table.items():
            if name in both:
                raise ConfigError(f"{where}: server {name!r} is there twice")
            both[name] = entry
    for key in content:
        near = [] if key in _TABLES else get_close_matches(key, _TABLES, n=1, cutoff=0.8)
        if near:
            reading.warnings.append(f"{where}: {key!r} is not read; did you mean {near[0]!r}?")
    if not both:
        reading.warnings.append(f"{where}: {found[0]} is empty: there are no servers")
    return _entries(both, reading)


def _entries(mapping: Mapping[str, Any], reading: "_Reading") -> ServersFile:
    specs = tuple(_server(name, entry, reading) for name, entry in mapping.items())
    return ServersFile(specs, tuple(reading.warnings))


@frozen
class _Reading:
    """What is needed to understand an entry, and what is to be told of it."""

    environ: Mapping[str, str]
    where: str
    workspace: Path
    warnings: list[str] = field(factory=list)


def _kind(value: object) -> str:
    """Return what kind of value it is; never the value, which may be secret."""
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", type(None): "null"}
    return names.get(type(value), "an object" if isinstance(value, Mapping) else type(value).__name__)


# One entry

_SILENT: Final = frozenset(("description", "$schema", "title", "comment", "_comment", "note"))
"""Keys that say nothing to a program."""
_UNSUPPORTED: Final = {
    "envFile": "write what is in the file into env, or set it in the environment and write ${VAR}",
    "oauth": "give a token in headers",
    "auth": "give a token in headers",
    "authProviderType": "give a token in headers",
    "scopes": "give a token in headers",
    "oauth_resource": "give a token in headers",
    "headersHelper": "give headers",
    "http_headers_helper": "give headers",
    "autoApprove": "calls are not asked about here",
    "alwaysAllow": "calls are not asked about here",
    "trust": "calls are not asked about here",
    "default_tools_approval_mode": "calls are not asked about here",
    "sandbox": "the command is not contained",
    "sandboxEnabled": "the command is not contained",
    "dev": "a server is not restarted when its files change",
    "required": "a server that fails never hides the others",
    "environment_id": "commands run here",
    "experimental_environment": "commands run here",
}
"""Keys that others know: why they do nothing here, or what does the same."""
_KINDS: Final[Mapping[str, Transport]] = {
    **dict.fromkeys(("stdio", "local"), "stdio"),
    **dict.fromkeys(("http", "streamable-http", "streamable_http", "streamablehttp", "remote"), "http"),
    "sse": "sse",
}


_PREDEFINED: Final[Mapping[str, Callable[[_Reading], str]]] = {
    "workspaceFolder": lambda reading: str(reading.workspace),
    "workspaceFolderBasename": lambda reading: reading.workspace.name,
    "userHome": lambda reading: reading.environ.get("HOME") or str(Path.home()),
    "pathSeparator": lambda reading: "/",
    "/": lambda reading: "/",
}
"""What VS Code and Cursor put into a file beside variables."""


class _Entry:
    """One server's entry while it is read: every key that was taken is known, the rest is told."""

    def __init__(self, name: str, entry: Mapping[str, Any], reading: _Reading) -> None:
        self._name = name
        self._entry = entry
        self._reading = reading
        self._known: set[str] = set()
        self.environ = reading.environ
        self.variables: dict[str, str] = {}
        self.enabled = not self.switch("disabled", False) and self.switch("enabled", True)

    def error(self, key: str, text: str) -> ConfigError:
        return ConfigError(f"{self._reading.where}: server {self._name!r}: {key} {text}")

    def warn(self, text: str) -> None:
        self._reading.warnings.append(f"{self._reading.where}: server {self._name!r}: {text}")

    def value(self, *keys: str) -> tuple[str, Any]:
        """Return which of *keys* is there and what it is; None if none is, or null."""
        self._known.update(keys)
        given = [key for key in keys if self._entry.get(key) is not None]
        if len(given) > 1:
            raise self.error(given[1], f"says the same as {given[0]}; leave one of them out")
        return (given[0], self._entry[given[0]]) if given else (keys[0], None)

    def switch(self, key: str, default: bool) -> bool:
        _, value = self.value(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {_kind(value)}")
        return default if value is None else value

    def text(self, *keys: str) -> str | None:
        key, value = self.value(*keys)
        if value is None:
            return None
        if not isinstance(value, str) or not value.strip():
            raise self.error(key, f"must be text, not {_kind(value) if not isinstance(value, str) else 'empty'}")
        return self.filled(key, value)

    def texts(self, *keys: str) -> tuple[str, ...] | None:
        key, value = self.value(*keys)
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            raise self.error(key, f'must be a list of strings like ["a", "b"], not {_kind(value)}')
        return tuple(self.filled(f"{key}[{number}]", self.scalar(key, each)) for number, each in enumerate(value))

    def strings(self, *keys: str) -> dict[str, str]:
        """Return a mapping; of its members those that are null are left out."""
        key, value = self.value(*keys)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.error(key, f'must be an object like {{"NAME": "value"}}, not {_kind(value)}')
        return {
            name: self.filled(f"{key}.{name}", self.scalar(f"{key}.{name}", each))
            for name, each in value.items()
            if each is not None
        }

    def seconds(self, key: str, *, per: float = 1.0) -> float | None:
        _, value = self.value(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            shown = repr(value) if isinstance(value, int | float) else _kind(value)
            raise self.error(key, f"must be a finite number > 0, not {shown}")
        return value / per

    def scalar(self, key: str, value: Any) -> str:
        """Return a number or a truth value as text: a file that says `"PORT": 80` means it."""
        if isinstance(value, str):
            return value
        if isinstance(value, int | float):
            return json.dumps(value)
        raise self.error(key, f"must be text, not {_kind(value)}")

    def filled(self, key: str, text: str) -> str:
        return _VARIABLE.sub(lambda found: self._put(key, found), text)

    def variable(self, key: str, name: str) -> str:
        """Return what the variable *name* of our environment holds."""
        if name not in self.environ:
            if not self.enabled:
                return ""
            why = f"needs the environment variable {name}, which is not set; set it, or disable the server"
            raise self.error(key, why)
        self.variables[name] = self.environ[name]
        return self.environ[name]

    def _put(self, key: str, found: re.Match[str]) -> str:
        whole, inner = found.group(), found["inner"]
        if found["escaped"]:
            return whole[1:]
        named = _NAME.fullmatch(inner)
        if named is None or inner in _PREDEFINED:
            return self._predefined(key, whole, inner)
        name, default = named["name"], named["default"]
        if default is not None and not self.environ.get(name):  # as in a shell, empty is as good as not set
            return default
        if name not in self.environ and not self.enabled:
            return whole
        return self.variable(key, name)

    def _predefined(self, key: str, whole: str, inner: str) -> str:
        if inner in _PREDEFINED:
            return _PREDEFINED[inner](self._reading)
        if not self.enabled:
            return whole
        if inner.startswith("input:"):
            raise self.error(key, f"asks for {whole}, and nobody can be asked here; write ${{env:NAME}} and set NAME")
        right = "write ${NAME} or ${NAME:-default}, and $${...} where no variable is meant"
        raise self.error(key, f"has {whole} in it, which is no variable: {right}")

    def tell_rest(self) -> None:
        """Warn of each key that nobody took."""
        for key in self._entry:
            if key in self._known or key in _SILENT:
                continue
            if key in _UNSUPPORTED:
                self.warn(f"{key} is not supported and does nothing: {_UNSUPPORTED[key]}")
                continue
            near = get_close_matches(key, sorted(self._known), n=1)
            also = f"; did you mean {near[0]!r}?" if near else ""
            self.warn(f"{key!r} is not known and does nothing{also}")


_VARIABLE = re.compile(r"(?P<escaped>\$)?\$\{(?P<inner>[^}]*)\}")
_NAME = re.compile(r"(?:env:)?(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^{]*))?")


def _server(name: str, entry: Any, reading: _Reading) -> ServerSpec:
    if isinstance(entry, ServerSpec):
        return evolve(entry, name=name)
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{reading.where}: server {name!r} must be an object with command or url, not {_kind(entry)}")
    read = _Entry(name, entry, reading)
    command, args = _command(read)
    url = read.text("url", "serverUrl", "httpUrl")
    fields: dict[str, Any] = {
        "name": name,
        "command": command,
        "args": args,
        "env": {**_passed_on(read), **read.strings("env", "environment")},
        "cwd": read.text("cwd"),
        "url": url,
        "headers": _headers(read),
        "transport": _transport(read, url),
        "enabled_tools": _enabled_tools(read),
        "disabled_tools": read.texts("disabled_tools", "disabledTools", "excludeTools") or (),
        "enabled": read.enabled,
        **_timeouts(read),
    }
    read.tell_rest()
    fields["variables"] = read.variables  # now that all are read
    try:
        return ServerSpec(**{key: value for key, value in fields.items() if value is not None})
    except ConfigError as error:
        raise ConfigError(f"{reading.where}: {error}") from None


def _command(read: _Entry) -> tuple[str | None, tuple[str, ...]]:
    _, given = read.value("command")
    words = read.texts("command") if isinstance(given, list | tuple) else None
    args = read.texts("args") or ()
    if words is not None:
        return (words[0] if words else None), (*words[1:], *args)
    command = read.text("command")
    if command is not None and not args and re.search(r"\s-|^(npx|uvx|node|python3?|docker)\s", command):
        read.warn(f"command {given!r} is taken for the name of a program; its arguments go to args")
    return command, args


def _transport(read: _Entry, url: str | None) -> Transport | None:
    key, given = read.value("type", "transport")
    if given is None:
        return "sse" if url is not None and url.partition("?")[0].rstrip("/").endswith("/sse") else None
    if not isinstance(given, str) or given.lower() not in _KINDS:
        shown = repr(given) if isinstance(given, str) else _kind(given)
        raise read.error(key, f"must be one of stdio, http and sse, not {shown}")
    return _KINDS[given.lower()]


def _headers(read: _Entry) -> dict[str, str]:
    headers = read.strings("headers", "http_headers")
    for header, variable in read.strings("env_http_headers").items():
        headers[header] = read.variable(f"env_http_headers.{header}", variable)
    bearer = read.text("bearer_token_env_var")
    if bearer is not None:
        headers["Authorization"] = f"Bearer {read.variable('bearer_token_env_var', bearer)}"
    key, literal = read.value("bearer_token")
    if literal is not None:
        raise read.error(key, "is not read: no token belongs into a file; name a variable in bearer_token_env_var")
    return headers if read.enabled else {name: value for name, value in headers.items() if value.isprintable()}


def _passed_on(read: _Entry) -> dict[str, str]:
    """Return the variables of our environment that Codex's `env_vars` passes on; those not set are left out."""
    key, given = read.value("env_vars")
    if given is None:
        return {}
    if not isinstance(given, list | tuple):
        raise read.error(key, f'must be a list of names like ["HOME", "LANG"], not {_kind(given)}')
    names = [each.get("name") if isinstance(each, Mapping) else each for each in given]
    return {name: read.variable(key, name) for name in names if isinstance(name, str) and name in read.environ}


def _enabled_tools(read: _Entry) -> tuple[str, ...] | None:
    _, tools = read.value("tools")
    if isinstance(tools, Mapping):  # Codex: what is to be asked about before a call
        read.warn("tools is not supported and does nothing: calls are not asked about here")
        return read.texts("enabled_tools", "enabledTools", "includeTools")
    names = read.texts("enabled_tools", "enabledTools", "includeTools", "tools")
    return None if names is not None and "*" in names else names


def _timeouts(read: _Entry) -> dict[str, float | None]:
    startup = read.seconds("startup_timeout_sec")
    legacy = read.seconds("startup_timeout_ms", per=1_000)
    tool = read.seconds("tool_timeout_sec")
    bare = read.seconds("timeout")
    if bare is not None and tool is None:
        tool = bare if bare < _MILLISECONDS_FROM else bare / 1_000
        read.warn(f"timeout {bare:g} is read as {tool:g} s for a call; say tool_timeout_sec")
    return {"startup_timeout_s": legacy if startup is None else startup, "tool_timeout_s": tool}
