"""Local tools: Python code and allowed programs, each in a process that lives no longer than its call.

No containment: what runs has the rights of the user who runs it. What is promised is a deadline, bounded memory, a
clean environment, and that no process of the call's process group is left when the result is there. A descendant
that leaves the group (`setsid`) delays nothing, but survives.

POSIX only: it needs process groups, and an event loop with `add_reader`.
"""

import json
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from attrs import Attribute, evolve, field, frozen

from agent_fsm.errors import ConfigError
from agent_fsm.protocol import ToolResult
from agent_fsm.tools.processes import Outcome, Program, run

__all__ = ["EchoMCP", "LocalMCPInvoker"]

_ENVIRONMENT = frozenset(("HOME", "LANG", "LANGUAGE", "LOGNAME", "PATH", "SYSTEMROOT", "TERM", "TMPDIR", "TZ", "USER"))
"""What children inherit of our environment, beside `LC_*`. Secrets have too many names for a list of what is denied."""
_SHOWN_CHARS = 100
"""Characters of the model's own words that a refusal repeats."""


class _RefusedError(Exception):
    """The call can't be run; says in words for the model why, and what would be right."""


# The invokers


def _positive(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{attribute.name} must be a finite number > 0, not {value!r}")


def _whole(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 2:
        raise ConfigError(f"{attribute.name} must be a whole number >= 2, not {value!r}")


def _programs(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    if not isinstance(value, tuple):
        raise ConfigError(f"{attribute.name} must be a sequence of program names, not {value!r}")
    for entry in value:
        if not isinstance(entry, str) or not (entry.startswith("/") or re.fullmatch(r"[^\s/]+", entry)):
            raise ConfigError(f"{attribute.name}: each must be one bare name or absolute path, not {entry!r}")


def _variables(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(text, str) for pair in value.items() for text in pair):
        raise ConfigError(f"{attribute.name} must be a mapping of names to strings, not {value!r}")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple | set | frozenset) else value


@frozen
class LocalMCPInvoker:
    """`exec_python` and `exec_shell` on this machine, with the rights of this process.

    The result's text is a JSON object: `ok`, `rc` (null if nothing was run), `stdout`, `stderr`, `seconds`, and `error`
    or `note` where there is one. What the model does wrong is a failed result; nothing but CancelledError is raised,
    and that only once the process group is killed.

    Raises:
        ConfigError: a field is out of range or of the wrong type.
    """

    shell_allow_prefixes: tuple[str, ...] = field(
        default=("echo", "python", "pip"), converter=_tuple, validator=_programs
    )
    """What `exec_shell` may start: bare names, looked up on PATH, or absolute paths. One must be equal to the command's
    first word: "echo" admits neither `echo_evil` nor `/tmp/echo`. `python` or `pip` among them allow everything."""
    # The two timeouts stay below AgentConfig.tool_timeout_seconds (30): a slow call still says what it printed.
    python_timeout_s: float = field(default=25.0, kw_only=True, validator=_positive)
    """Seconds that the code may take; a call may ask for less, not for more."""
    shell_timeout_s: float = field(default=25.0, kw_only=True, validator=_positive)
    """Seconds that a program may take; a call may ask for less, not for more."""
    output_chars: int = field(default=4_000, kw_only=True, validator=_whole)
    """Characters of stdout, and as many of stderr, that are kept; of more, the head and the tail, half each."""
    max_output_bytes: int = field(default=64 * 2**20, kw_only=True, validator=_whole)
    """Bytes of stdout and stderr together beyond which (`>`) the process group is killed."""
    env: Mapping[str, str] = field(factory=dict, kw_only=True, validator=_variables)
    """Variables for the children, beside the few harmless ones that they inherit."""

    async def list_openai_tools(self) -> list[dict[str, Any]]:
        """Return the tools; `exec_shell` is not among them if no program is allowed."""
        tools = [_python_tool(self.python_timeout_s)]
        if self.shell_allow_prefixes:
            tools.append(_shell_tool(self.shell_timeout_s, self.shell_allow_prefixes))
        return tools

    async def call_openai_tool(self, call: Any, /) -> ToolResult:
        """Run an OpenAI tool call, a dict or an object of that shape, and return what came of it."""
        try:
            name, arguments = _read_call(call)
            match name:
                case "exec_python":
                    outcome = await self._exec_python(arguments)
                case "exec_shell":
                    outcome = await self._exec_shell(arguments)
                case _:
                    raise _RefusedError(f"there is no tool {_shown(name)}; there are exec_python and exec_shell")
        except _RefusedError as refused:
            outcome = Outcome(error=str(refused))
        except OSError as error:  # no such program, no room for the script, ...
            outcome = Outcome(error=f"could not be started: {error}")
        return _result(outcome)

    async def _exec_python(self, arguments: Mapping[str, Any]) -> Outcome:
        code, timeout_s, note = _read_arguments(arguments, "code", self.python_timeout_s)
        with _script(code) as path:
            # -u: what was printed before a timeout is not lost in a buffer. Not -I: the script could not import modules
            # that it writes, and the folder is private and the environment clean without it.
            argv = [sys.executable, "-s", "-u", "-X", "utf8", str(path)]
            outcome = await self._run(argv, timeout_s, cwd=path.parent)
        # The folder differs from call to call; equal failures should stay equal.
        stderr = outcome.stderr.replace(str(path), path.name)
        return evolve(outcome, stderr=stderr, note=_joined(note, outcome.note))

    async def _exec_shell(self, arguments: Mapping[str, Any]) -> Outcome:
        command, timeout_s, note = _read_arguments(arguments, "cmd", self.shell_timeout_s)
        program, *rest = _split(command)
        argv = [*_find(program, self.shell_allow_prefixes, self._environment().get("PATH")), *rest]
        outcome = await self._run(argv, timeout_s)
        return evolve(outcome, note=_joined(note, outcome.note))

    async def _run(self, argv: list[str], timeout_s: float, *, cwd: Path | None = None) -> Outcome:
        program = Program(argv, self._environment(), cwd)
        return await run(program, timeout_s=timeout_s, keep_chars=self.output_chars, max_bytes=self.max_output_bytes)

    def _environment(self) -> dict[str, str]:
        inherited = {
            name: value for name, value in os.environ.items() if name in _ENVIRONMENT or name.startswith("LC_")
        }
        return {**inherited, **self.env}


@frozen
class EchoMCP:
    """One tool, `echo(text)`, that returns its text: for trying the loop without running anything."""

    async def list_openai_tools(self) -> list[dict[str, Any]]:
        """Return the one tool."""
        return [_tool("echo", "Returns the text it is given.", {"text": {"type": "string"}}, required="text")]

    async def call_openai_tool(self, call: Any, /) -> ToolResult:
        """Return the text of an OpenAI tool call to `echo`; a failed result for any other call."""
        try:
            name, arguments = _read_call(call)
            if name != "echo":
                raise _RefusedError(f"there is no tool {_shown(name)}; there is only echo")
            return ToolResult(text=_text(arguments, "text"))
        except _RefusedError as refused:
            return _result(Outcome(error=str(refused)))


def _result(outcome: Outcome) -> ToolResult:
    ok = outcome.rc == 0 and not outcome.error
    seconds = round(outcome.seconds, 3)
    said = {"ok": ok, "rc": outcome.rc, "stdout": outcome.stdout, "stderr": outcome.stderr, "seconds": seconds}
    said |= {key: text for key, text in (("error", outcome.error), ("note", outcome.note)) if text}
    text = json.dumps(said, ensure_ascii=False, separators=(",", ":"))
    return ToolResult(text=text, ok=ok, rc=outcome.rc, seconds=seconds)


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


# What the model is offered


def _tool(name: str, description: str, properties: dict[str, Any], *, required: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": [required], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _timeout_property(ceiling_s: float) -> dict[str, Any]:
    description = f"Seconds after which the run is killed; at most, and if left out, {ceiling_s:g}."
    return {"type": "number", "description": description}


def _python_tool(ceiling_s: float) -> dict[str, Any]:
    description = (
        "Runs a Python program in a fresh process and returns ok, rc, stdout and stderr. Print what you want to see. "
        "Nothing is kept from call to call: variables are lost, and so are the files of its working folder, which is "
        "empty at the start. There is no stdin, and what it leaves in the background is killed when it ends. "
        f"Limit: {ceiling_s:g} seconds."
    )
    code = {"type": "string", "description": "The whole source of the program."}
    properties = {"code": code, "timeout_s": _timeout_property(ceiling_s)}
    return _tool("exec_python", description, properties, required="code")


def _shell_tool(ceiling_s: float, allowed: tuple[str, ...]) -> dict[str, Any]:
    description = (
        f"Runs one program and returns ok, rc, stdout and stderr. Allowed programs: {', '.join(allowed)}. There is no "
        "shell: no pipes, redirections, `;`, `&&`, variables, substitutions or wildcards. Arguments with spaces or "
        "special characters are quoted as in a shell. There is no stdin, and what it leaves in the background is "
        f"killed when it ends. Limit: {ceiling_s:g} seconds."
    )
    command = {"type": "string", "description": "The program's name and its arguments, e.g. echo 'hello world'"}
    properties = {"cmd": command, "timeout_s": _timeout_property(ceiling_s)}
    return _tool("exec_shell", description, properties, required="cmd")


# What the model asked for


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def _member(thing: Any, name: str) -> Any:
    return thing.get(name) if isinstance(thing, Mapping) else getattr(thing, name, None)


def _read_call(call: Any) -> tuple[str, Mapping[str, Any]]:
    """Return the name and the arguments of a tool call."""
    function = _member(call, "function")
    name, arguments = _member(function, "name"), _member(function, "arguments")
    if not isinstance(name, str):
        raise _RefusedError(f"the call names no tool: {_shown(call)}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise _RefusedError(f"the arguments are not valid JSON: {error}") from None
    if not isinstance(arguments, Mapping):
        raise _RefusedError(f"the arguments must be a JSON object, not {_shown(arguments)}")
    return name, arguments


def _read_arguments(arguments: Mapping[str, Any], required: str, ceiling_s: float) -> tuple[str, float, str]:
    """Return the text of the required argument, the seconds to allow, and a note if they are fewer than asked for."""
    unknown = [name for name in arguments if name not in (required, "timeout_s")]
    if unknown:
        raise _RefusedError(f"unknown argument {_shown(unknown[0])}; the arguments are {required} and timeout_s")
    text = _text(arguments, required)
    if "\0" in text:
        raise _RefusedError(f"{required} must not contain NUL characters")
    asked = arguments.get("timeout_s")
    if asked is None:  # models write null for what they leave out
        return text, ceiling_s, ""
    if isinstance(asked, bool) or not isinstance(asked, int | float) or not 0 < asked < math.inf:
        raise _RefusedError(f"timeout_s must be a number of seconds > 0, not {_shown(asked)}")
    if asked > ceiling_s:
        return text, ceiling_s, f"timeout_s was lowered to {ceiling_s:g} s, the most that is allowed"
    return text, float(asked), ""


def _text(arguments: Mapping[str, Any], name: str) -> str:
    if name not in arguments:
        raise _RefusedError(f"the argument {name} is missing")
    value = arguments[name]
    if not isinstance(value, str):
        raise _RefusedError(f"{name} must be a string, not {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _RefusedError(f"{name} must be valid Unicode: {error.reason} at position {error.start}") from None
    return value


_QUOTED = re.compile(r"""\\.|'[^']*'|"(?:\\.|[^"\\])*\"""", re.DOTALL)
_OPERATOR = re.compile(r"\|\|?|&&?|;|>>?|<<?|\$\(|`|[\r\n]")


def _split(command: str) -> list[str]:
    """Return the words of a command line, of which there is at least one."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise _RefusedError(f"cmd can't be split into words: {error}") from None
    if not words:
        raise _RefusedError("cmd is empty")
    # shlex would pass `hello; ls` on as two harmless-looking words, and the model would believe that ls was run.
    operator = _OPERATOR.search(_QUOTED.sub("_", command.strip()))
    if operator:
        sign = operator.group()
        shown = f"`{sign}`" if sign.strip() else "a line break"
        raise _RefusedError(
            f"there is no shell, so {shown} means nothing here: run one program per call, "
            "and quote the character if it belongs to an argument"
        )
    return words


def _find(program: str, allowed: tuple[str, ...], search_path: str | None) -> list[str]:
    """Return what starts *program*: its path, or Python's own for a `python` or `pip` that is not on the path."""
    if program not in allowed:
        names = ", ".join(allowed) or "none"
        raise _RefusedError(f"{_shown(program)} is not allowed; allowed programs, by exactly these names: {names}")
    if program.startswith("/"):
        return [program]
    found = shutil.which(program, path=search_path)
    if found:
        return [found]
    match program:
        case "python":
            return [sys.executable]
        case "pip":
            return [sys.executable, "-m", "pip"]
    raise _RefusedError(f"{program} is allowed, but it is not installed")


@contextmanager
def _script(code: str) -> Iterator[Path]:
    """Give the path of a file with *code*, alone in a private folder that goes when the block ends.

    A file rather than `-c` or stdin: tracebacks show source lines, there is no limit of length, and `multiprocessing`,
    `inspect` and `__file__` work.
    """
    folder = TemporaryDirectory(prefix="agent-fsm-", ignore_cleanup_errors=True)
    try:
        path = Path(folder.name).resolve() / "script.py"
        path.write_bytes(code.encode())
        yield path
    finally:
        with suppress(RecursionError):  # before 3.13 removal is recursive; the script chose how deep to nest
            folder.cleanup()
