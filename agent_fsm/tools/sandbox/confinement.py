"""What a contained process may use, and what came of it: the sandbox's values."""

from collections.abc import Callable, Mapping
from typing import Literal

from attrs import field, frozen

__all__ = ["Confinement", "Launch", "Level", "Probe", "Report"]

Level = Literal["strict", "basic", "off"]
"""strict: nothing outside is visible, reachable or left alive, and disk use is bounded by construction. basic: nothing
outside can be read, written, signalled or connected to; which files exist can be found out, and disk and total memory
are looked at from time to time. off: a clean environment, and no containment."""


@frozen
class Confinement:
    """The bounds of one contained process and of all that it starts."""

    level: Level
    network: bool = False
    """Whether the machine's network is there. Without it, strict has a loopback of its own, basic no sockets."""
    read_paths: tuple[str, ...] = ()
    """Files and folders shown read-only at the same path inside; absolute."""
    write_paths: tuple[str, ...] = ()
    """Files and folders that may be written to; absolute. As root, whose calls run as another user: at strict both are
    used as their owner would (if the file system can show other owners), at basic as anybody would."""
    env: Mapping[str, str] = field(factory=dict)
    """Variables beside the few that are always set (PATH, HOME, TMPDIR, ...), over which they win."""
    memory_bytes: int = 512 * 2**20
    """Address space of each process, and anonymous memory of all (`>` kills them; looked at every 50 ms)."""
    disk_bytes: int = 64 * 2**20
    """Bytes that all private folders may take together; also the most that one file may have."""
    files: int = 4096
    """Files and folders that the private folders may hold together."""
    processes: int = 64
    """Processes and threads at a time."""
    cpu_s: float = 60.0
    """CPU seconds of each process; rounded up to whole ones."""
    open_files: int = 256
    """Open files of each process."""
    packages: bool = True
    """Whether the packages that this interpreter has installed can be imported."""


@frozen
class Probe:
    """The level that holds on this machine."""

    level: Level
    why: str
    """What keeps it from the next higher level, or weakens this one; empty if nothing does."""


@frozen
class Report:
    """What the sandbox itself has to say of a process that has ended."""

    killed_for: Literal["memory", "disk", ""] = ""
    kept: Mapping[str, bytes] = field(factory=dict)
    """Files asked for, by their path in the working folder."""
    error: str = ""
    """Why the process could not be started or contained. If the outer process was killed: that it was."""
    note: str = ""
    """What else the caller may want to know, though nothing failed by it."""


@frozen
class Launch:
    """What `subprocess.Popen` needs to start the process, beside stdin, stdout, stderr and `start_new_session=True`."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    pass_fds: tuple[int, ...]
    folder: str
    """The private working folder, as the process sees it."""
    report: Callable[[], Report] = field(repr=False, eq=False)
    """Returns the report, once the process has ended and while the launch's context is open."""
