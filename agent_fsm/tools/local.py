"""Local tools: Python code and allowed programs, each contained in a process that lives no longer than its call.

What contains them is `agent_fsm.tools.sandbox`, or bubblewrap. POSIX only: they need process groups, and an event loop
with `add_reader`. Containment needs Linux; elsewhere what is promised is level "off": a deadline, bounded output, a
clean environment, and that no process of the call's process group is left when the result is there.
"""

import asyncio
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from attrs import Attribute, evolve, field, frozen

from agent_fsm.errors import ConfigError
from agent_fsm.protocol import ToolResult
from agent_fsm.tools import bwrap, monty
from agent_fsm.tools.asked import RefusedError, check_program, read_arguments, read_call, read_text, shown, split
from agent_fsm.tools.kept import described, resource
from agent_fsm.tools.processes import Outcome, Program, run
from agent_fsm.tools.sandbox import Confinement, Level, Probe, Report, launch, python_argv
from agent_fsm.tools.sandbox import probe as probe_here

__all__ = ["EchoMCP", "LocalMCPInvoker"]

_ENVIRONMENT = ("LANG", "LANGUAGE", "TERM", "TZ")
"""What contained processes inherit of our environment, beside `LC_*`. The sandbox has its own PATH, HOME and so on."""
_RANKS: Mapping[str, int] = {"off": 0, "basic": 1, "bwrap": 1, "monty": 1, "strict": 2}
"""What is said to have contained a call, and how much `require_sandbox` takes that for."""
_HINTS = (
    (re.compile(r"\bMemoryError\b|[Cc]annot allocate memory"), "a process has {memory} of memory here"),
    (re.compile(r"No space left on device|File too large|Disk quota"), "files may take {disk} here"),
    (re.compile(r"can't start new thread|Resource temporarily unavailable"), "there may be {processes} processes"),
    (re.compile(r"Network is unreachable|[Nn]ame resolution|Name or service not known"), "there is no network here"),
)
"""What a failed program says when it has met a bound, and what the model is told then."""

# The fields


def _positive(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{attribute.name} must be a finite number > 0, not {value!r}")


def _whole(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 2:
        raise ConfigError(f"{attribute.name} must be a whole number >= 2, not {value!r}")


def _flag(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{attribute.name} must be True or False, not {value!r}")


def _one_of(*values: object) -> Callable[[object, "Attribute[Any]", object], None]:
    def check(instance: object, attribute: "Attribute[Any]", value: object) -> None:
        if value not in values:
            raise ConfigError(f"{attribute.name} must be one of {', '.join(map(repr, values))}, not {value!r}")

    return check


def _programs(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    if not isinstance(value, tuple):
        raise ConfigError(f"{attribute.name} must be a sequence of program names, not {value!r}")
    for entry in value:
        if not isinstance(entry, str) or not (entry.startswith("/") or re.fullmatch(r"[^\s/]+", entry)):
            raise ConfigError(f"{attribute.name}: each must be one bare name or absolute path, not {entry!r}")


def _paths(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    if not isinstance(value, tuple):
        raise ConfigError(f"{attribute.name} must be a sequence of absolute paths, not {value!r}")
    for entry in value:
        if not isinstance(entry, str) or not entry.startswith("/") or os.path.normpath(entry) != entry:
            raise ConfigError(f"{attribute.name}: each must be absolute, without `..`, not {entry!r}")


def _globs(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    if not isinstance(value, tuple) or not all(isinstance(each, str) and each for each in value):
        raise ConfigError(f"{attribute.name} must be a sequence of patterns of file names, not {value!r}")


def _variables(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(text, str) for pair in value.items() for text in pair):
        raise ConfigError(f"{attribute.name} must be a mapping of names to strings, not {value!r}")


def _names(variables: Mapping[str, str]) -> str:
    return f"{{{', '.join(f'{name}=***' for name in variables)}}}"  # what is in them may be secret


def _patterns(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{attribute.name} must be a mapping of programs to patterns, not {value!r}")
    for program, patterns in value.items():
        if not isinstance(patterns, list | tuple) or not all(isinstance(each, str) for each in patterns):
            raise ConfigError(f"{attribute.name}: {program!r} must have a sequence of patterns, not {patterns!r}")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{attribute.name}: {pattern!r} is no regular expression: {error}") from None


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple | set | frozenset) else value


def _path_tuple(value: Any) -> Any:
    return tuple(map(os.fspath, value)) if isinstance(value, list | tuple | set | frozenset) else value


# The invokers


@frozen
class LocalMCPInvoker:
    """`exec_python` and `exec_shell` on this machine, contained.

    The result's text is a JSON object: `ok`, `rc` (null if nothing was run), `stdout`, `stderr`, `seconds`, `sandbox`
    (what contained the call: "strict", "basic", "off", "bwrap" or "monty"), and `error`, `note` or `files` where there
    are any. What the model does wrong is a failed result; nothing but CancelledError is raised. Either comes within
    0.25 s of the deadline, and once what the call has started is killed; the first call in a process, where no tools
    were listed before, waits for a probe of the sandbox besides.

    Raises:
        ConfigError: a field is out of range or of the wrong type, or two of them contradict each other.
    """

    shell_allow_prefixes: tuple[str, ...] = field(
        default=("echo", "python", "pip"), converter=_tuple, validator=_programs
    )
    """What `exec_shell` may start: bare names, looked up on PATH, or absolute paths. One must be equal to the command's
    first word: "echo" admits neither `echo_evil` nor `/tmp/echo`. `python` or `pip` among them allow everything that
    the sandbox lets happen; contained, they are always this interpreter's own."""
    # The two timeouts stay below AgentConfig.tool_timeout_seconds (30): a slow call still says what it printed.
    python_timeout_s: float = field(default=25.0, kw_only=True, validator=_positive)
    """Seconds that the code may take; a call may ask for less, not for more."""
    shell_timeout_s: float = field(default=25.0, kw_only=True, validator=_positive)
    """Seconds that a program may take; a call may ask for less, not for more."""
    output_chars: int = field(default=4_000, kw_only=True, validator=_whole)
    """Characters of stdout, and as many of stderr, that are kept; of more, the head and the tail, half each."""
    max_output_bytes: int = field(default=64 * 2**20, kw_only=True, validator=_whole)
    """Bytes of stdout and stderr together beyond which (`>`) the process group is killed."""
    env: Mapping[str, str] = field(factory=dict, kw_only=True, validator=_variables, repr=_names)
    """Variables for the children, beside the few harmless ones that they have."""
    shell_arguments: Mapping[str, Sequence[str]] = field(factory=dict, kw_only=True, validator=_patterns)
    """What some programs may be given, by their name as in `shell_allow_prefixes`: regular expressions, one of which
    each argument must match as a whole. `{"git": ["status", "log", "-n", r"\\d+"]}`; `[]`: no arguments. A program that
    is not named may be given any."""
    sandbox: Level = field(default="strict", kw_only=True, validator=_one_of(*get_args(Level)))
    """The most containment that is used; where less holds, that is used, and said."""
    require_sandbox: Level | None = field(default=None, kw_only=True, validator=_one_of(None, *get_args(Level)))
    """Below this nothing is run: calls fail, and listing the tools raises RuntimeError. "bwrap" and "monty" count as
    "basic"."""
    network: bool = field(default=False, kw_only=True, validator=_flag)
    """Whether what is contained may use the machine's network."""
    read_paths: tuple[str, ...] = field(default=(), kw_only=True, converter=_path_tuple, validator=_paths)
    """Absolute paths of files and folders that may be read too. If one isn't there, calls fail."""
    write_paths: tuple[str, ...] = field(default=(), kw_only=True, converter=_path_tuple, validator=_paths)
    """Absolute paths of files and folders that may be written to too, as far as their owner and mode let a user do who
    is nobody in particular: as root each call runs as another user."""
    memory_bytes: int = field(default=512 * 2**20, kw_only=True, validator=_whole)
    """Bytes of memory that a call may take: each process, and all together."""
    disk_bytes: int = field(default=64 * 2**20, kw_only=True, validator=_whole)
    """Bytes that the files of a call may take together."""
    processes: int = field(default=64, kw_only=True, validator=_whole)
    """Processes and threads that a call may have at a time."""
    packages: bool = field(default=True, kw_only=True, validator=_flag)
    """Whether the packages that this interpreter has can be imported."""
    keep_files: tuple[str, ...] = field(default=(), kw_only=True, converter=_tuple, validator=_globs)
    """Files of the working folder that are the result's `parts`, as MCP's resource blocks: patterns in which `*` stops
    at slashes and `**` does not. At most 64 files of 16 MiB together."""
    engine: Literal["own", "bwrap"] = field(default="own", kw_only=True, validator=_one_of("own", "bwrap"))
    """What contains processes; bubblewrap needs the extra `bwrap`, or itself on PATH."""
    python: Literal["process", "monty"] = field(default="process", kw_only=True, validator=_one_of("process", "monty"))
    """What runs `exec_python`. Monty, the extra `monty`, takes a millisecond and knows part of the language and of the
    standard library; it has no files, and of the bounds above only time, memory and output are its."""
    probe: Callable[[], Probe] = field(default=probe_here, kw_only=True, repr=False, eq=False)
    """Finds what holds on this machine; asked once per process, in a thread. Another one is for tests."""

    def __attrs_post_init__(self) -> None:
        """Check the fields against each other."""
        used = [self.sandbox, *(each for each in (self.engine, self.python) if each in _RANKS)]
        for each in used:
            if self.require_sandbox is not None and _RANKS[each] < _RANKS[self.require_sandbox]:
                raise ConfigError(f"require_sandbox={self.require_sandbox!r} is above what {each!r} counts as")
        if self.engine == "bwrap" and self.keep_files:
            raise ConfigError("keep_files can't be had of engine='bwrap'")
        if self.engine == "bwrap" and self.sandbox == "off":
            raise ConfigError("engine='bwrap' is containment, and sandbox='off' is none")
        unknown = [name for name in self.shell_arguments if name not in self.shell_allow_prefixes]
        if unknown:
            raise ConfigError(f"shell_arguments: {unknown[0]!r} is not among the programs of shell_allow_prefixes")

    async def list_openai_tools(self) -> list[dict[str, Any]]:
        """Return the tools; `exec_shell` is not among them if no program is allowed.

        Raises:
            RuntimeError: no call could be run: the sandbox is below what is required, or what is to run is missing.
        """
        level, refusal = await self._reached()
        if refusal:
            raise RuntimeError(refusal)
        bounds = _bounds(self, level)
        tools = [_monty_tool(self.python_timeout_s)]
        if self.python != "monty":
            tools = [_python_tool(self.python_timeout_s, bounds, bool(self.keep_files))]
        if self.shell_allow_prefixes:
            tools.append(_shell_tool(self, bounds))
        return tools

    async def call_openai_tool(self, call: Any, /) -> ToolResult:
        """Run an OpenAI tool call, a dict or an object of that shape, and return what came of it."""
        level, refusal = await self._reached()
        report = Report()
        try:
            name, arguments = read_call(call)
            if name not in ("exec_python", "exec_shell"):
                raise RefusedError(f"there is no tool {shown(name)}; there are exec_python and exec_shell")
            if refusal:
                raise RefusedError(refusal)
            if name == "exec_shell":
                outcome, report = await self._exec_shell(arguments, level)
            elif self.python == "monty":
                level = "monty"
                outcome = await self._interpret(arguments)
            else:
                outcome, report = await self._exec_python(arguments, level)
        except RefusedError as refused:
            outcome = Outcome(error=str(refused))
        except OSError as error:  # no such program, no room for the script, ...
            outcome = Outcome(error=f"could not be started: {error}")
        return _result(outcome, level, report.kept)

    async def _reached(self) -> tuple[str, str]:
        """Return what contains processes here, and why nothing may be run, if it may not."""
        if self.python == "monty" and not monty.is_installed():
            return self.sandbox, "python='monty' needs Monty, which is not installed: install agent-fsm[monty]"
        if self.engine == "bwrap":
            fault = await _found(bwrap.fault)
            return ("off", f"bubblewrap contains nothing here: {fault}") if fault else ("bwrap", "")
        if self.sandbox == "off":
            return "off", ""
        holds = await _found(self.probe)
        level = min(self.sandbox, holds.level, key=lambda each: _RANKS[each])
        if self.require_sandbox is None or _RANKS[level] >= _RANKS[self.require_sandbox]:
            return level, ""
        return level, (
            f"the sandbox reaches only level {level!r} here, and {self.require_sandbox!r} is required, so nothing is "
            f"run ({holds.why}). What would help: Linux with user namespaces, Landlock and seccomp that this process "
            f"may use, or require_sandbox={level!r}"
        )

    async def _exec_python(self, arguments: Mapping[str, Any], level: str) -> tuple[Outcome, Report]:
        code, timeout_s, note = read_arguments(arguments, "code", self.python_timeout_s)
        confinement = self._confinement(level, timeout_s)
        outcome, report = await self._run(python_argv(confinement), confinement, timeout_s, code.encode())
        return evolve(outcome, note=_joined(note, outcome.note)), report

    async def _exec_shell(self, arguments: Mapping[str, Any], level: str) -> tuple[Outcome, Report]:
        command, timeout_s, note = read_arguments(arguments, "cmd", self.shell_timeout_s)
        program, *rest = words = split(command)
        check_program(words, self.shell_allow_prefixes, self.shell_arguments)
        confinement = self._confinement(level, timeout_s)
        found = _program(program, confinement, self.env.get("PATH", os.environ.get("PATH")))
        if len(found) == 1 and level != "off":  # it may be in a folder that isn't seen
            confinement = evolve(confinement, read_paths=(*confinement.read_paths, *_file_of(found[0])))
        outcome, report = await self._run([*found, *rest], confinement, timeout_s)
        return evolve(outcome, note=_joined(note, outcome.note)), report

    async def _interpret(self, arguments: Mapping[str, Any]) -> Outcome:
        code, timeout_s, note = read_arguments(arguments, "code", self.python_timeout_s)
        outcome = await monty.run_snippet(
            code,
            timeout_s=timeout_s,
            memory_bytes=self.memory_bytes,
            keep_chars=self.output_chars,
            max_bytes=self.max_output_bytes,
        )
        return evolve(outcome, note=_joined(note, outcome.note))

    async def _run(
        self, argv: list[str], confinement: Confinement, timeout_s: float, script: bytes | None = None
    ) -> tuple[Outcome, Report]:
        with self._contained(argv, confinement, script) as (program, folder, report):
            outcome = await run(
                program, timeout_s=timeout_s, keep_chars=self.output_chars, max_bytes=self.max_output_bytes
            )
            reported = report()
        # The folder differs from call to call at some levels; equal failures should stay equal.
        stderr = outcome.stderr.replace(f"{folder}/", "") if script is not None else outcome.stderr
        return _with_report(evolve(outcome, stderr=stderr), reported, confinement), reported

    @contextmanager
    def _contained(
        self, argv: list[str], confinement: Confinement, script: bytes | None
    ) -> Iterator[tuple[Program, str, Callable[[], Report]]]:
        """Give what is to be started, the working folder as it sees it, and what reports once it has ended."""
        with ExitStack() as closing:
            try:
                if self.engine == "bwrap":
                    program = closing.enter_context(bwrap.contained(argv, confinement, script))
                    found: tuple[Program, str, Callable[[], Report]] = program, bwrap.FOLDER, Report
                else:
                    launched = closing.enter_context(launch(argv, confinement, script=script, keep=self.keep_files))
                    program = Program(launched.argv, launched.env, Path(launched.cwd), launched.pass_fds)
                    found = program, launched.folder, launched.report
            except ValueError as error:
                raise RefusedError(f"it can't be contained: {error}") from None
            yield found

    def _confinement(self, level: str, timeout_s: float) -> Confinement:
        inherited = {name: text for name, text in os.environ.items() if name in _ENVIRONMENT or name.startswith("LC_")}
        return Confinement(
            "off" if level == "off" else "basic" if level == "basic" else "strict",
            network=self.network,
            read_paths=self.read_paths,
            write_paths=self.write_paths,
            env={**inherited, **self.env},
            memory_bytes=self.memory_bytes,
            disk_bytes=self.disk_bytes,
            processes=self.processes,
            cpu_s=max(60.0, timeout_s * (os.cpu_count() or 1)),  # the deadline is what ends a call
            packages=self.packages,
        )


@frozen
class EchoMCP:
    """One tool, `echo(text)`, that returns its text: for trying the loop without running anything."""

    async def list_openai_tools(self) -> list[dict[str, Any]]:
        """Return the one tool."""
        return [_tool("echo", "Returns the text it is given.", {"text": {"type": "string"}}, required="text")]

    async def call_openai_tool(self, call: Any, /) -> ToolResult:
        """Return the text of an OpenAI tool call to `echo`; a failed result for any other call."""
        try:
            name, arguments = read_call(call)
            if name != "echo":
                raise RefusedError(f"there is no tool {shown(name)}; there is only echo")
            return ToolResult(text=read_text(arguments, "text"))
        except RefusedError as refused:
            return _result(Outcome(error=str(refused)))


# What holds

_FOUND: dict[Callable[[], Any], Any] = {}
"""What each probe has found; a machine's abilities don't change."""


async def _found(probe: Callable[[], Any]) -> Any:
    if probe not in _FOUND:
        _FOUND[probe] = await asyncio.to_thread(probe)
    return _FOUND[probe]


# What is started


def _program(name: str, confinement: Confinement, search_path: str | None) -> list[str]:
    """Return what starts that program: its path, or Python's own for a `python` or `pip`."""
    own = {"python": [], "pip": ["-m", "pip"]}.get(name)
    if own is not None and confinement.level != "off":  # what is on our PATH may be a wrapper that isn't seen inside
        return [*python_argv(confinement)[:-1], *own]
    if name.startswith("/"):
        return [name]
    found = shutil.which(name, path=search_path)
    if found:
        return [found]
    if own is not None:
        return [sys.executable, *own]
    raise RefusedError(f"{name} is allowed, but it is not installed")


def _file_of(path: str) -> list[str]:
    return [os.path.abspath(path)] if Path(path).exists() else []  # noqa: PTH100 - resolve() would follow links


# What came of it


def _with_report(outcome: Outcome, report: Report, confinement: Confinement) -> Outcome:
    """Return *outcome* with what the sandbox has to say of it."""
    bounds = {
        "memory": _size(confinement.memory_bytes),
        "disk": _size(confinement.disk_bytes),
        "processes": str(confinement.processes),
    }
    note = _joined(outcome.note, report.note)
    if report.killed_for:
        what = f"{bounds['memory']} of memory" if report.killed_for == "memory" else f"{bounds['disk']} for its files"
        return evolve(outcome, error=f"took more than {what}, so it was killed", note=note)
    killed_by_us = outcome.rc is not None and outcome.rc < 0 and outcome.error
    if report.error and not killed_by_us:
        return evolve(outcome, rc=None, error=f"could not be started: {report.error}", note=note)
    if outcome.rc and confinement.level != "off":
        hints = [hint.format(**bounds) for pattern, hint in _HINTS if pattern.search(outcome.stderr)]
        return evolve(outcome, note=_joined(note, *hints))
    return evolve(outcome, note=note)


def _result(outcome: Outcome, level: str = "", kept: Mapping[str, bytes] | None = None) -> ToolResult:
    ok = outcome.rc == 0 and not outcome.error
    seconds = round(outcome.seconds, 3)
    said = {"ok": ok, "rc": outcome.rc, "stdout": outcome.stdout, "stderr": outcome.stderr, "seconds": seconds}
    more = {"sandbox": level, "error": outcome.error, "note": outcome.note, "files": described(kept or {})}
    text = json.dumps(
        said | {key: value for key, value in more.items() if value}, ensure_ascii=False, separators=(",", ":")
    )
    parts = tuple(resource(path, data) for path, data in (kept or {}).items())
    return ToolResult(text=text, ok=ok, rc=outcome.rc, seconds=seconds, parts=parts)


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _size(count: int) -> str:
    return f"{count / 2**20:g} MiB" if count >= 2**20 else f"{count:,} bytes"


# What the model is offered


def _tool(name: str, description: str, properties: dict[str, Any], *, required: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": [required], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _timeout_property(ceiling_s: float) -> dict[str, Any]:
    description = f"Seconds after which the run is killed; at most, and if left out, {ceiling_s:g}."
    return {"type": "number", "description": description}


def _bounds(tools: LocalMCPInvoker, level: str) -> str:
    """Return what the model is told of the sandbox."""
    if level == "off":
        return ""
    lacks = ["none of this machine's files"] if not (tools.read_paths or tools.write_paths) else []
    lacks += [] if tools.network else ["no network"]
    shown_paths = [*(f"{each} (read-only)" for each in tools.read_paths), *tools.write_paths]
    has = f", but {', '.join(shown_paths)}" if shown_paths else ""
    inside = f"It runs in a sandbox: {', '.join(lacks) or 'other files are not there'}{has}. "
    return f"{inside}{_size(tools.memory_bytes)} of memory, {_size(tools.disk_bytes)} of files. "


def _python_tool(ceiling_s: float, bounds: str, keeps: bool) -> dict[str, Any]:
    description = (
        "Runs a Python program in a fresh process and returns ok, rc, stdout and stderr. Print what you want to see. "
        "Nothing is kept from call to call: variables are lost, and so are the files of its working folder, which is "
        f"empty at the start. {'The user gets some of these files. ' if keeps else ''}{bounds}"
        "There is no stdin, and what it leaves in the background is killed when it ends. "
        f"Limit: {ceiling_s:g} seconds."
    )
    code = {"type": "string", "description": "The whole source of the program."}
    properties = {"code": code, "timeout_s": _timeout_property(ceiling_s)}
    return _tool("exec_python", description, properties, required="code")


def _monty_tool(ceiling_s: float) -> dict[str, Any]:
    description = (
        "Runs a short Python program in a restricted interpreter and returns ok, rc, stdout and stderr. Print what you "
        "want to see. There are no files, no network, no other processes, no installed packages and no `yield`; json, "
        "re, math, datetime, itertools, random and dataclasses can be imported. Nothing is kept from call to call. "
        f"Limit: {ceiling_s:g} seconds."
    )
    code = {"type": "string", "description": "The whole source of the program."}
    properties = {"code": code, "timeout_s": _timeout_property(ceiling_s)}
    return _tool("exec_python", description, properties, required="code")


def _shell_tool(tools: LocalMCPInvoker, bounds: str) -> dict[str, Any]:
    allowed = [
        f"{name} (arguments: {' | '.join(tools.shell_arguments[name]) or 'none'})"
        if name in tools.shell_arguments
        else name
        for name in tools.shell_allow_prefixes
    ]
    description = (
        f"Runs one program and returns ok, rc, stdout and stderr. Allowed programs: {', '.join(allowed)}. There is no "
        "shell: no pipes, redirections, `;`, `&&`, variables, substitutions or wildcards. Arguments with spaces or "
        f"special characters are quoted as in a shell. {bounds}There is no stdin, and what it leaves in the background "
        f"is killed when it ends. Limit: {tools.shell_timeout_s:g} seconds."
    )
    command = {"type": "string", "description": "The program's name and its arguments, e.g. echo 'hello world'"}
    properties = {"cmd": command, "timeout_s": _timeout_property(tools.shell_timeout_s)}
    return _tool("exec_shell", description, properties, required="cmd")
