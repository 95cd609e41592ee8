"""Containment of one process and all that it starts: namespaces, Landlock, seccomp, limits, a clean environment.

`probe` says which level holds on this machine; `launch` gives what `subprocess.Popen` needs to start a process at a
level. Everything of it ends when the outer process is killed, when the caller ends, and when the launch's context is
left. Linux on x86-64 and aarch64 (of which only x86-64 was tried); elsewhere only "off" holds.
"""

import marshal
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from agent_fsm.tools.sandbox.confinement import Confinement, Launch, Level, Probe, Report

if TYPE_CHECKING:
    from agent_fsm.tools.sandbox.helper import Config

__all__ = ["Confinement", "Launch", "Level", "Probe", "Report", "launch", "probe", "python_argv"]

_SCRIPT = "script.py"
_INHERITED = frozenset(("HOME", "LANG", "LANGUAGE", "LOGNAME", "PATH", "SYSTEMROOT", "TERM", "TMPDIR", "TZ", "USER"))
"""What is inherited at level off, beside `LC_*`. Secrets have too many names for a list of what is denied."""
_REMOVE_S = 0.05
"""Seconds that leaving the context may take for a folder: thousands of nested ones took a disk ten."""
_MODULE = "agent_fsm.tools.sandbox"
# The package itself is not imported, nor what it needs: only the helper's own few modules, from their .pyc
_START = f"""
import sys
for name in ("agent_fsm", "agent_fsm.tools", "{_MODULE}"):
    sys.modules[name] = module = type(sys)(name)
    module.__path__ = [sys.argv[1]]
from {_MODULE}.helper import main
main(int(sys.argv[2]))
"""


def python_argv(confinement: Confinement) -> list[str]:
    """Return the command that runs the script of a launch."""
    python = sys.executable if confinement.packages else getattr(sys, "_base_executable", "") or sys.executable
    # -u: what was printed before a kill is not lost in a buffer. Not -I: the script could not import modules that it
    # writes, and folder and environment are clean without it.
    return [python, "-s", *([] if confinement.packages else ["-S"]), "-u", "-X", "utf8", _SCRIPT]


@contextmanager
def launch(
    argv: Sequence[str],
    confinement: Confinement,
    *,
    script: bytes | None = None,
    keep: Sequence[str] = (),
    uid: int | None = None,
    without: frozenset[str] = frozenset(),
) -> Iterator[Launch]:
    """Give what is needed to start *argv* in a private working folder, which is gone afterwards.

    *script* is written there as script.py. *keep* are globs of files of that folder that the report brings. *uid* is
    whom the process runs as if we are root; a new number by default. *without* leaves layers out, for tests; see
    `plan.plan`. What goes wrong inside before the program runs is in the report, and the exit code is then 125.

    The process must be started from a thread that outlives it: the kernel tells no thread's end from the parent's.

    Raises:
        ValueError: a path of the confinement can't be shown, or the machine is none on which the level can hold.
        OSError: a path to show isn't there, or there is no room for the folder.
    """
    with ExitStack() as closing:
        if confinement.level == "off":
            yield _plain(argv, confinement, script, keep, _private_folder(closing, script, None))
            return
        if sys.platform != "linux":
            raise ValueError(f"level {confinement.level} needs Linux")
        from agent_fsm.tools.sandbox.plan import plan, user

        own_root = confinement.level == "strict" and not without & {"namespaces", "mounts"}
        who = user(uid)
        base = "" if own_root else _private_folder(closing, script, who.outer_uid)
        config = plan(confinement, base, who, without)
        config["argv"], config["keep"] = tuple(argv), tuple(keep)
        config["script"] = script if own_root else None
        yield _contained(config, closing)


def _private_folder(closing: ExitStack, script: bytes | None, owner: int | None) -> str:
    """Make the folder that holds the working and the temporary folder; it is removed when the context is left."""
    base = tempfile.mkdtemp(prefix="agent-fsm-")
    closing.callback(_remove, base)
    work = Path(base, "work")
    for folder in (work, Path(base, "tmp")):
        folder.mkdir(mode=0o700)
    if script is not None:
        (work / _SCRIPT).write_bytes(script)
    if owner is not None:
        for path in (work / _SCRIPT, work, Path(base, "tmp"), Path(base)):
            if path.exists():
                os.chown(path, owner, owner)
    return base


def _remove(base: str) -> None:
    """Remove the private folder; what takes longer than `_REMOVE_S` goes on in a thread that our exit waits for."""
    from agent_fsm.tools.sandbox import folders

    thread = threading.Thread(target=folders.remove, args=(base,), name="remove-sandbox-folder")
    try:
        thread.start()
    except RuntimeError:  # no thread to be had, or the interpreter is ending
        folders.remove(base)
    else:
        thread.join(_REMOVE_S)


def _plain(
    argv: Sequence[str], confinement: Confinement, script: bytes | None, keep: Sequence[str], base: str
) -> Launch:
    from agent_fsm.tools.sandbox import folders

    work = f"{base}/work"

    def report() -> Report:
        kept, note = folders.collect(work, keep, 64, min(16 * 2**20, confinement.disk_bytes)) if keep else ({}, "")
        return Report(kept=kept, note=note)

    names = {name: text for name, text in os.environ.items() if name in _INHERITED or name.startswith("LC_")}
    return Launch(tuple(argv), names | dict(confinement.env), work, (), work, report)


def _contained(config: "Config", closing: ExitStack) -> Launch:
    from agent_fsm.tools.sandbox import folders

    lifeline, held = os.pipe()
    closing.callback(os.close, lifeline)
    closing.callback(os.close, held)  # what still runs ends
    config_file, report_file = (_memory_file(closing, name) for name in ("config", "report"))
    config["lifeline"], config["report"] = lifeline, report_file
    config["keep_open"] = (lifeline, report_file)
    os.write(config_file, marshal.dumps({**config}))
    kept_here = config["level"] == "basic" and config["keep"]

    def report() -> Report:
        told = _read_report(report_file)
        if not kept_here:
            return told
        kept, note = folders.collect(config["folder"], config["keep"], config["keep_files"], config["keep_bytes"])
        return Report(told.killed_for, kept, told.error, note)

    # -X utf8 would do nothing: -I ignores the locale's variables, and there are none
    argv = (sys.executable, "-I", "-S", "-c", _START, str(Path(__file__).parent), str(config_file))
    return Launch(argv, {}, "/", (config_file, lifeline, report_file), config["folder"], report)


def _memory_file(closing: ExitStack, name: str) -> int:
    descriptor = os.memfd_create(name)
    closing.callback(os.close, descriptor)
    return descriptor


def _read_report(report_file: int) -> Report:
    from agent_fsm.tools.sandbox.helper import decode

    data = os.pread(report_file, os.fstat(report_file).st_size, 0)
    try:
        _, killed_for, error, note, *kept = decode(data)
    except ValueError:
        return Report(error="it was killed before it could report")
    pairs = zip(kept[::2], kept[1::2], strict=True)
    return Report(
        "memory" if killed_for == b"memory" else "disk" if killed_for == b"disk" else "",
        {name.decode(): content for name, content in pairs},
        error.decode(errors="replace"),
        note.decode(errors="replace"),
    )


# What holds here

_CHECK = b"""
import os, socket, sys
parent, port, level = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
seen = []
try:
    if len(open("/etc/passwd").readlines()) != 2:
        seen.append("the machine's /etc/passwd")
except OSError:
    pass
try:
    socket.create_connection(("127.0.0.1", port), 1).close()
    seen.append("the machine's network")
except OSError:
    pass
try:
    os.kill(parent, 0)
    if level == "basic" or os.getpid() != 2:
        seen.append("a process of the machine")
except OSError:
    pass
print("seen: " + ", ".join(seen))
"""
_PROBE_S = 10.0
"""Seconds after which a probe has failed; on an idle machine it takes 0.1."""


def probe(without: frozenset[str] = frozenset()) -> Probe:
    """Return the highest level that holds here, found by trying; cached per process.

    *without* are layers to treat as missing: namespaces, landlock, seccomp. Blocks, for about 0.1 s a level tried.
    """
    return _probed(frozenset(without))


@lru_cache(maxsize=16)
def _probed(without: frozenset[str]) -> Probe:
    if sys.platform != "linux":
        return Probe("off", f"containment needs Linux, and this is {sys.platform}")
    why: list[str] = []
    levels: tuple[Level, ...] = ("strict", "basic")
    for level in levels:
        fault, note = _missing(level, without), ""
        if not fault:
            fault, note = _fault(level, without)
        if not fault:
            if level == "strict" and _missing("basic", without):
                why.append("there is no second line of defence: Landlock is missing")
            return Probe(level, "; ".join((*why, note) if note else why))
        why.append(f"{level}: {fault}")
    return Probe("off", "; ".join(why))


def _missing(level: Level, without: frozenset[str]) -> str:
    """Return what *level* can't do without, if it is not there."""
    from agent_fsm.tools.sandbox import kernel

    if "seccomp" in without:
        return "seccomp is missing"
    if level == "strict":
        return "namespaces are missing" if "namespaces" in without else ""
    if "landlock" in without:
        return "Landlock is missing"
    try:
        kernel.landlock_version()
    except OSError as error:
        return f"Landlock is missing ({error.strerror})"
    return ""


def _fault(level: Level, without: frozenset[str]) -> tuple[str, str]:
    """Return what went wrong with a contained process that tries to get out, and what its report notes.

    The first is empty if the process ran and could not get out.
    """
    import socket

    confinement = Confinement(level, packages=False)
    # Where Landlock is missing, strict is tried without it
    left_out = without | ({"landlock"} if level == "strict" and _missing("basic", without) else set())
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            tell = [str(os.getpid()), str(server.getsockname()[1]), level]
            argv = [*python_argv(confinement), *tell]
            with launch(argv, confinement, script=_CHECK, without=frozenset(left_out)) as launched:
                done = subprocess.run(
                    launched.argv,
                    env=launched.env,
                    cwd=launched.cwd,
                    pass_fds=launched.pass_fds,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    check=False,
                    timeout=_PROBE_S,
                    start_new_session=True,
                )
                report = launched.report()
    except (OSError, ValueError, subprocess.TimeoutExpired) as failed:
        return str(failed), ""
    said = done.stdout.decode(errors="replace").strip()
    if said == "seen:":
        return "", report.note
    ended = f"exit code {done.returncode}: {done.stderr.decode(errors='replace').strip()[-300:]}"
    return report.error or said or ended, ""
