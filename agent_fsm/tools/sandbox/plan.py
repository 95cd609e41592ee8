"""What a contained process sees and may do, worked out beforehand in the parent: the helper only carries it out."""

import os
import platform
import resource
import secrets
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from attrs import frozen

from agent_fsm.tools.sandbox import filters, kernel
from agent_fsm.tools.sandbox.confinement import Confinement

if TYPE_CHECKING:
    from agent_fsm.tools.sandbox.helper import Config, Rights, View

__all__ = ["User", "interpreter", "plan", "user"]

_SYSTEM = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/etc/alternatives"),
    *("/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types", "/etc/protocols", "/etc/services", "/etc/ssl/certs"),
    *("/etc/ssl/openssl.cnf", "/etc/pki/tls/certs", "/etc/ca-certificates"),
)
"""Programs, libraries, and settings that say nothing about this machine."""
_NAMES = ("/etc/resolv.conf", "/etc/hosts")
"""Shown beside them where the network is."""
_DEVICES = ("/dev/full", "/dev/null", "/dev/random", "/dev/urandom", "/dev/zero")
_DEVICE_LINKS = (
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
)
_NEVER = ("/", "/dev", "/proc", "/sys")
"""Not to be shown as they are: the first would show everything, the others have their own."""
_INNER_UID = 1000
_FIRST_UID, _UIDS = 0x70000000, 0x0FFF0000
_CAP_SETUID, _CAP_SYS_ADMIN = 7, 21
_UNIX, _INET, _INET6, _NETLINK = 1, 2, 10, 16
_NAMESPACES = {
    "mounts": kernel.NEWNS,
    "processes": kernel.NEWPID,
    "network": kernel.NEWNET,
    "ipc": kernel.NEWIPC,
    "names": kernel.NEWUTS | kernel.NEWCGROUP,
}
_KEPT_FILES, _KEPT_BYTES = 64, 16 * 2**20

_Kind = Literal["read", "write", "device", "list"]
_ATTRIBUTES = {
    "read": kernel.READ_ONLY | kernel.NO_SUID | kernel.NO_DEVICES,
    "write": kernel.NO_SUID | kernel.NO_DEVICES,
    "device": kernel.READ_ONLY | kernel.NO_SUID | kernel.NO_EXEC,
}


@frozen
class User:
    """Whom the process runs as."""

    uid: int | None
    """To change to once the sandbox is made; None to stay who we are."""
    early_uid: int | None
    """To change to before it is made, as nothing but a change of user is allowed."""
    inner_uid: int
    own_namespace: bool
    """Whether a user namespace is needed to make the others."""

    @property
    def outer_uid(self) -> int | None:
        """Whom the machine sees; None if that is who we are."""
        return self.uid if self.early_uid is None else self.early_uid


def interpreter(packages: bool) -> str:
    """Return the path of the Python that runs scripts."""
    return sys.executable if packages else str(getattr(sys, "_base_executable", "") or sys.executable)


def user(uid: int | None = None) -> User:
    """Return whom a call of ours runs as: as root somebody of its own each time, so that its limits are its own."""
    if os.geteuid() != 0:
        return User(None, None, _INNER_UID, own_namespace=True)
    chosen = _spare_uid() if uid is None else uid
    if chosen is None:
        return User(None, None, _INNER_UID, own_namespace=True)
    if _capable(_CAP_SYS_ADMIN):
        return User(chosen, None, chosen, own_namespace=False)
    early = chosen if _capable(_CAP_SETUID) else None
    return User(None, early, _INNER_UID, own_namespace=True)


def _spare_uid() -> int | None:
    """Return a user that has nothing, or None if there is no such user in our own user namespace."""
    lines = Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines()
    ranges = [(int(start), int(length)) for start, _, length in map(str.split, lines)]
    if any(start <= _FIRST_UID and start + length >= _FIRST_UID + _UIDS for start, length in ranges):
        return _FIRST_UID + secrets.randbelow(_UIDS)
    start, length = max(ranges, key=lambda each: each[1])
    return start + length // 2 + secrets.randbelow(length // 2) if length > 4096 else None


def _capable(capability: int) -> bool:
    status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    mask = next((line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), "0")
    return bool(int(mask, 16) >> capability & 1)


# What is seen


def _interpreter_paths(packages: bool) -> list[str]:
    places = [sys.base_prefix, sys.base_exec_prefix, str(Path(os.__file__).parent)]
    places += [sys.prefix, sys.exec_prefix] if packages else []
    # realpath: what isn't a virtual environment's may be anywhere
    places.append(str(Path(os.path.realpath(interpreter(packages))).parent))
    return [each for each in dict.fromkeys(places) if each not in _NEVER]


@cache
def _system(packages: bool, network: bool) -> tuple[tuple[str, str], ...]:
    """Return what everybody sees: pairs of a path and the real path behind it."""
    places = [*_SYSTEM, *(_NAMES if network else ()), *_interpreter_paths(packages)]
    return tuple((each, os.path.realpath(each)) for each in places if Path(each).exists())


def _seen(confinement: Confinement) -> tuple[dict[str, _Kind], list[tuple[str, str]]]:
    """Return the kind of access to each real path, and the links that lead to them.

    Raises:
        ValueError: a path can't be shown.
        FileNotFoundError: a path isn't there.
    """
    pairs = [*_system(confinement.packages, confinement.network)]
    kinds: dict[str, _Kind] = {}
    for kind, paths in (("read", confinement.read_paths), ("write", confinement.write_paths)):
        for path in paths:
            real = _checked(path)
            pairs.append((path, real))
            kinds[real] = "write" if kind == "write" else "read"
    for _, real in pairs:
        kinds.setdefault(real, "read")
    links = [(path, real) for path, real in pairs if path != real]
    return {real: kind for real, kind in kinds.items() if not _covered(real, kind, kinds)}, links


def _checked(path: str) -> str:
    if not path.startswith("/") or os.path.normpath(path) != path:
        raise ValueError(f"a path to show must be absolute and plain, not {path!r}")
    real = os.path.realpath(path, strict=True)
    if real in _NEVER or real.startswith(("/proc/", "/dev/", "/sys/")):
        raise ValueError(f"{path} can't be shown inside")
    return real


def _covered(path: str, kind: _Kind, kinds: Mapping[str, _Kind]) -> bool:
    """Tell whether the nearest folder above that is shown is shown in the same way."""
    above = next((str(each) for each in Path(path).parents if str(each) in kinds), None)
    return above is not None and kinds[above] == kind


def _texts(inner_uid: int) -> dict[str, str]:
    return {
        "/etc/passwd": f"sandbox:x:{inner_uid}:{inner_uid}::/tmp:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
        "/etc/group": f"sandbox:x:{inner_uid}:\nnogroup:x:65534:\n",
        "/etc/hosts": "127.0.0.1 localhost sandbox\n::1 localhost sandbox\n",
        "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    }


def _working_folder(shown: Iterable[str]) -> str:
    """Return a path at which nothing is shown and below which nothing is."""
    taken = [*shown]
    number = 0
    while True:
        folder = f"/work{number or ''}"
        if not any(each == folder or each.startswith(f"{folder}/") for each in taken):
            return folder
        number += 1


def _rules(seen: Mapping[str, _Kind], private: Iterable[str], *, own_root: bool) -> tuple[tuple[str, str], ...]:
    devices = [each for each in _DEVICES if Path(each).exists()]
    rules = [*seen.items(), *((each, "device") for each in devices), *((each, "write") for each in private)]
    return tuple(rules + ([("/", "list"), ("/etc", "read"), ("/proc", "read")] if own_root else []))


# What may be done


def _environment(confinement: Confinement, folder: str, temporary: str) -> dict[str, str]:
    """Return all the variables that the process has."""
    prefixes = (sys.prefix, sys.base_prefix) if confinement.packages else (sys.base_prefix,)
    own = [f"{each}/bin" for each in dict.fromkeys(prefixes)]
    fixed = {
        "PATH": ":".join(dict.fromkeys((*own, "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"))),
        "HOME": folder,
        "LANG": "C.UTF-8",
        "LOGNAME": "sandbox",
        "USER": "sandbox",
        "TMPDIR": temporary,
        # Each thread's arena and each worker's buffers are address space, of which there is little
        "MALLOC_ARENA_MAX": "2",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    return fixed | dict(confinement.env)


def _filter(confinement: Confinement, *, contained: bool, own_network: bool, nobody: bool) -> bytes | None:
    """Return the seccomp filter.

    *contained*: whether a process namespace keeps the processes together. *nobody*: whether they run as a user that
    owns nothing outside.
    """
    try:
        scoped = kernel.landlock_version() >= 6
    except OSError:
        scoped = False
    if own_network:
        families: tuple[int, ...] = (_UNIX, _INET, _INET6, _NETLINK)
    elif confinement.network:  # sockets in the file system, and without scopes abstract ones, would lead outside
        families = (_UNIX, _INET, _INET6, _NETLINK) if contained and scoped else (_INET, _INET6)
    else:
        families = ()
    return filters.program(
        platform.machine(),
        families=families,
        groups=contained,
        signals=contained or scoped or nobody,
        modes=contained or nobody,
    )


def _limits(confinement: Confinement, own: int) -> tuple[tuple[int, int], ...]:
    """Return the resource limits; *own* are the processes that count and are not the program's."""
    return (
        (resource.RLIMIT_AS, confinement.memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, max(1, int(-(-confinement.cpu_s // 1)))),
        (resource.RLIMIT_FSIZE, confinement.disk_bytes),
        (resource.RLIMIT_MEMLOCK, 65_536),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_NOFILE, confinement.open_files),
        (resource.RLIMIT_NPROC, confinement.processes + own),
        (resource.RLIMIT_SIGPENDING, 1024),
    )


def _own_processes() -> int:
    """Return the processes and threads of this user, all of which count where the user is not changed."""
    count = 0
    for entry in os.scandir("/proc"):
        try:
            if entry.name.isdigit() and entry.stat().st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{entry.name}/task"))  # noqa: PTH208 - a list of names is what is counted
        except OSError:  # ended meanwhile
            continue
    return count


def plan(confinement: Confinement, base: str, who: User, without: frozenset[str]) -> "Config":
    """Return what the helper is to do, but for the program itself and the descriptors.

    *base* is the private folder on disk, if there is to be one. *without* are layers to leave out, for tests:
    namespaces (all, or mounts, processes, network, ipc, names), landlock, seccomp, descriptors.

    Raises:
        ValueError: a path can't be shown, or the machine's architecture is not known.
        OSError: a path to show isn't there.
    """
    if platform.machine() not in filters.ARCHITECTURES:
        raise ValueError(f"no filter is known for {platform.machine()}")
    strict = confinement.level == "strict" and "namespaces" not in without
    spaces = {name: flags for name, flags in _NAMESPACES.items() if strict and name not in without}
    if confinement.network:
        spaces.pop("network", None)
    return {
        **_view(confinement, base, who, own_root="mounts" in spaces, landlock="landlock" not in without),
        **_rights(confinement, who, spaces, without),
        "level": confinement.level,
        "parent": os.getpid(),
        "lifeline": -1,
        "report": -1,
        "keep_open": (),
        "close_others": "descriptors" not in without,
        "argv": (),
        "script": None,
        "keep": (),
        "keep_files": _KEPT_FILES,
        "keep_bytes": min(_KEPT_BYTES, confinement.disk_bytes),
    }


def _view(confinement: Confinement, base: str, who: User, *, own_root: bool, landlock: bool) -> "View":
    seen, links = _seen(confinement)
    folder = _working_folder([*seen, *(path for path, _ in links)]) if own_root else f"{base}/work"
    private = [(each, mode) for each, mode in (("/tmp", 0o1777), ("/dev/shm", 0o1777), (folder, 0o700)) if own_root]
    mounts = [(path, _ATTRIBUTES[kind]) for path, kind in seen.items()]
    mounts += [(each, _ATTRIBUTES["device"]) for each in _DEVICES if Path(each).exists()]
    shown = [os.path.realpath(each) for each in (*confinement.read_paths, *confinement.write_paths)]
    writable = [target for target, _ in private] or [base]
    return {
        "folder": folder,
        "base": base,
        "env": _environment(confinement, folder, "/tmp" if own_root else f"{base}/tmp"),
        "mounts": tuple(mounts),
        "lent": tuple(shown) if own_root and who.uid is not None else (),
        "links": (*links, *_DEVICE_LINKS),
        "texts": _texts(who.inner_uid),
        # The machine's own /tmp, if it was asked for, is what is to be seen
        "private": tuple((target, mode) for target, mode in private if target not in seen),
        "rules": _rules(seen, writable, own_root=own_root) if landlock else None,
        "watched": own_root or confinement.level == "basic",
    }


def _rights(confinement: Confinement, who: User, spaces: Mapping[str, int], without: frozenset[str]) -> "Rights":
    changed = who.uid if spaces else who.outer_uid
    own = (2 if who.own_namespace else 1) if spaces else 0 if changed is not None else _own_processes() + 1
    program = _filter(
        confinement,
        contained=confinement.level == "strict",
        nobody=who.outer_uid is not None,
        own_network="network" in spaces or ("network" in without and confinement.level == "strict"),
    )
    return {
        "namespaces": sum(spaces.values()) | (kernel.NEWUSER if spaces and who.own_namespace else 0),
        "uid": changed,
        "early_uid": who.early_uid if spaces else None,
        "inner_uid": who.inner_uid,
        "own_network": "network" in spaces or confinement.network,
        "filter": None if "seccomp" in without else program,
        "limits": _limits(confinement, own),
        "memory_bytes": confinement.memory_bytes,
        "disk_bytes": confinement.disk_bytes,
        "files": confinement.files,
    }
