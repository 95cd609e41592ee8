"""What runs inside: it shuts itself in, starts the process, watches it, and reports.

At strict there are three processes: the outer one, which the caller started, waits and ends as the innermost did; the
first of the process namespace, confined like all that follow, watches; the second becomes the program. At basic the
outer one watches and the second is its child. The order of the calls is as it must be; see the comments before
changing it.

Nothing is imported that isn't needed: each millisecond here is one of every call.
"""

# pathlib would take 6 ms of each start
# ruff: noqa: PTH101, PTH102, PTH103, PTH106, PTH116, PTH120, PTH208, PTH211

import errno
import fcntl
import marshal
import os
import resource
import select
import stat
import time

from agent_fsm.tools.sandbox import kernel

TYPE_CHECKING = False  # typing would take 5 ms of each start
if TYPE_CHECKING:
    import signal as signals
    from typing import Any, NoReturn, TypedDict

    class View(TypedDict):
        """What is seen inside."""

        folder: str
        base: str
        env: dict[str, str]
        mounts: tuple[tuple[str, int], ...]
        lent: tuple[str, ...]
        links: tuple[tuple[str, str], ...]
        texts: dict[str, str]
        private: tuple[tuple[str, int], ...]
        rules: tuple[tuple[str, str], ...] | None
        watched: bool

    class Rights(TypedDict):
        """What may be done inside, and by whom."""

        namespaces: int
        uid: int | None
        early_uid: int | None
        inner_uid: int
        own_network: bool
        filter: bytes | None
        limits: tuple[tuple[int, int], ...]
        memory_bytes: int
        disk_bytes: int
        files: int

    class Config(View, Rights):
        """What the parent tells the helper; the descriptors are numbers."""

        level: str
        parent: int
        lifeline: int
        report: int
        keep_open: tuple[int, ...]
        close_others: bool
        argv: tuple[str, ...]
        script: bytes | None
        keep: tuple[str, ...]
        keep_files: int
        keep_bytes: int

else:
    import _signal as signals  # signal's enumerations would take 3 ms

_POLL_S = 0.05
_FAILED = 125
"""Exit code of the outer process when the sandbox could not be made or the program not be started."""
_HOST = b"sandbox"
_SOCKET_BYTES = 212_992
"""What the kernel lets a socket hold in each way, as it is set unless somebody changed it."""


def main(descriptor: int) -> "NoReturn":
    """Run what the configuration behind *descriptor* says, and end as it ended."""
    # Nothing of the interpreter's own: an exception may not pass into the code of another process after a fork.
    config: Config = marshal.loads(_read_all(descriptor))
    os.close(descriptor)
    if config["keep"]:
        # Now: later this package's folder can't be seen
        from agent_fsm.tools.sandbox import folders  # noqa: F401 - `_collect` uses it
    try:
        status = _run(config)
    except OSError as error:
        status = _failed(config, error)
    _end_like(status)


def _run(config: "Config") -> int:
    _shut_descriptors(config)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if config["level"] == "basic":
        return _run_basic(config)
    _own_pipes(config)
    if config["early_uid"] is not None:
        _change_user(config["early_uid"])
        kernel.set_dumpable(True)  # else its uid_map isn't its own
    kernel.die_with_parent(signals.SIGKILL)
    if os.getppid() != config["parent"]:
        os._exit(_FAILED)
    users = _lenders(config)
    processes = _open_processes()  # the machine's, which PID 1 takes away
    _unshare(config)
    outer_alive, alive = os.pipe()  # for the moments in which PID 1 has not yet asked for its parent-death signal
    masked, tell_masked = os.pipe()
    pid = os.fork()
    if not pid:
        for each in (processes, alive, masked):
            os.close(each)
        _guarded(config, lambda: _first(config, (outer_alive, tell_masked), users))
    for each in (outer_alive, tell_masked):
        os.close(each)
    if os.read(masked, 1) and _watch_from_outside(config, pid, processes):
        return int(signals.SIGKILL)
    ended = os.waitpid(pid, 0)[1]
    reported = decode(_read_all(config["report"]))
    if not reported:  # not its own doing: the machine was out of memory
        return _failed(config, OSError(errno.ECHILD, f"the sandbox ended before its program (wait status {ended})"))
    return int(reported[0])


def _guarded(config: "Config", work: "Any") -> "NoReturn":
    """Do a forked child's work and end it; its stack must not unwind into the parent's code."""
    try:
        work()
    except OSError as error:
        _failed(config, error)
    finally:
        os._exit(_FAILED)


def _shut_descriptors(config: "Config") -> None:
    for descriptor in config["keep_open"]:
        os.set_inheritable(descriptor, False)
    if config["close_others"]:
        lowest = 3
        for descriptor in sorted(config["keep_open"]):
            if descriptor > lowest:
                kernel.close_above(lowest, descriptor - 1)
            lowest = descriptor + 1
        kernel.close_above(lowest)


def _own_pipes(config: "Config") -> None:
    """Let the process open its output again by /dev/stdout, which asks whom the pipe belongs to."""
    uid = config["uid"] if config["early_uid"] is None else config["early_uid"]
    for descriptor in (1, 2):
        if uid is not None and stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            os.fchown(descriptor, uid, uid)


def _lenders(config: "Config") -> dict[str, int]:
    """Return a user namespace for each path that is lent; none where there are no user namespaces."""
    try:
        return {path: _lender(path, config["inner_uid"]) for path in config["lent"]}
    except OSError:
        return {}


def _lender(path: str, uid: int) -> int:
    """Return a user namespace in which what the owner of *path* owns is owned by that user.

    A namespace is there as long as a process is in it or a descriptor open; its maps are written from outside.
    """
    ready, made = os.pipe()
    wait, done = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(done)
            kernel.unshare(kernel.NEWUSER)
            os.close(made)
            os.read(wait, 1)
        finally:
            os._exit(0)
    os.close(made)
    os.close(wait)
    try:
        os.read(ready, 1)
        owner = os.stat(path)
        _write(f"/proc/{pid}/uid_map", b"%d %d 1" % (owner.st_uid, uid))
        _write(f"/proc/{pid}/gid_map", b"%d %d 1" % (owner.st_gid, uid))
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ready)
        os.close(done)
        os.waitpid(pid, 0)


def _lend(tree: int, users: int) -> None:
    try:
        kernel.lend(tree, users)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EPERM):  # file systems that can't show other owners
            raise
    os.close(users)


def _unshare(config: "Config") -> None:
    uid, gid = os.geteuid(), os.getegid()
    if not config["namespaces"]:
        return
    kernel.unshare(config["namespaces"])
    if config["namespaces"] & kernel.NEWUSER:
        inner = config["inner_uid"]
        _write("/proc/self/setgroups", b"deny")  # else gid_map is refused
        _write("/proc/self/uid_map", b"%d %d 1" % (inner, uid))
        _write("/proc/self/gid_map", b"%d %d 1" % (inner, gid))


def _write(path: str, text: bytes, flags: int = 0) -> None:
    # os.write: a file object would lose the error
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | flags, 0o644)
    try:
        os.write(descriptor, text)
    except OSError as error:
        raise OSError(error.errno, f"{path}: {error.strerror}") from None
    finally:
        os.close(descriptor)


# The first process of the namespace


def _watch_from_outside(config: "Config", pid: int, processes: int) -> bool:
    """Watch the memory where PID 1 can't; tell whether it was exceeded and all is killed."""
    waiting = select.poll()
    waiting.register(os.pidfd_open(pid), select.POLLIN)
    while not waiting.poll(_POLL_S * 1000):
        if _taken(config, _descendants(pid, processes), processes) > config["memory_bytes"]:
            os.kill(pid, signals.SIGKILL)
            os.waitpid(pid, 0)
            _report(config, signals.SIGKILL, ("memory", "", ""), {})
            return True
    return False


def _first(config: "Config", outer: tuple[int, int], users: dict[str, int]) -> None:
    outer_alive, tell_masked = outer
    signals.signal(signals.SIGINT, signals.SIG_IGN)
    if config["namespaces"] & kernel.NEWNET:
        _bound_tcp()
    if config["namespaces"] & kernel.NEWNS:
        _make_root(config, users)
        if not config["watched"]:
            os.write(tell_masked, b"1")
    os.close(tell_masked)
    if config["namespaces"] & kernel.NEWUTS:
        kernel.set_hostname(_HOST)
    if config["namespaces"] & kernel.NEWNET:
        _loopback_up()
    _be_first_to_go()
    _confine(config, (config["lifeline"], outer_alive))
    _supervise(config, (config["lifeline"], outer_alive))


def _be_first_to_go() -> None:
    """Have the kernel choose this process and its children when the machine's memory is used up."""
    try:
        _write("/proc/self/oom_score_adj", b"1000")
    except OSError:  # no /proc
        return


def _confine(config: "Config", alive: tuple[int, ...]) -> None:
    kernel.drop_capability_bounds()
    uid = config["uid"]
    if uid is not None:
        _change_user(uid)
    kernel.drop_capabilities()
    kernel.set_dumpable(False)
    kernel.die_with_parent(signals.SIGKILL)  # after setresuid, which clears it
    if any(_hung_up(each) for each in alive):
        os._exit(_FAILED)
    kernel.gain_nothing()
    if config["rules"] is not None:
        kernel.restrict(config["rules"], network=config["own_network"])
    if config["filter"] is not None:
        kernel.filter_calls(config["filter"])


def _change_user(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _hung_up(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])


def _loopback_up() -> None:
    import _socket

    with_name = b"lo".ljust(16, b"\0")
    control = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    fcntl.ioctl(control.fileno(), 0x8914, with_name + (0x1 | 0x40).to_bytes(2, "little") + b"\0" * 14)  # SIOCSIFFLAGS
    control.close()


def _bound_tcp() -> None:
    """Keep the buffers of this namespace's TCP at the size of others': they would grow to 37 MB a connection."""
    for name in ("tcp_rmem", "tcp_wmem"):
        try:
            _write(f"/proc/sys/net/ipv4/{name}", b"4096 65536 %d" % _SOCKET_BYTES)
        except (
            OSError
        ):  # /proc isn't there or read-only, as in containers: what then bounds them is the machine's tcp_mem
            return


def _make_root(config: "Config", users: dict[str, int]) -> None:
    """Put together the files that are seen inside, and let go of all others."""
    kernel.make_private()
    trees = [(target, kernel.clone_tree(target, attributes)) for target, attributes in config["mounts"]]
    for target, tree in trees:
        if target in users:
            _lend(tree, users[target])
    kernel.mount("tmpfs", "/tmp", "size=1m,mode=0755", kernel.NO_SUID | kernel.NO_DEVICES)
    os.chdir("/tmp")
    private = _private_folders(config)
    for target, tree in sorted([*private, *trees]):  # a folder before what is in it
        _make_place(target, tree)
        kernel.move_mount(tree, "." + target)
    config["watched"] = _mount_processes()
    kernel.enter_root()
    # Only now: a link met on the way, to an absolute path, would lead out of what is not yet the root
    for path, text in config["texts"].items():
        if not os.path.lexists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            _write(path, text.encode(), os.O_CREAT | os.O_EXCL)
    for path, target in config["links"]:
        if not os.path.lexists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.symlink(target, path)
    if config["script"] is not None:
        _write_script(config)
    kernel.freeze_root()


def _make_place(target: str, tree: int) -> None:
    if os.path.lexists("." + target):
        return
    if stat.S_ISDIR(os.fstat(tree).st_mode):
        os.makedirs("." + target)
    else:
        os.makedirs(os.path.dirname("." + target), exist_ok=True)
        _write("." + target, b"", os.O_CREAT)


def _private_folders(config: "Config") -> list[tuple[str, int]]:
    """Return the folders that may be written to: parts of one file system, so that its size bounds them all."""
    uid = config["inner_uid"]
    os.mkdir("scratch")
    inodes = config["files"] + 1 + len(config["private"])
    options = f"size={config['disk_bytes']},nr_inodes={inodes},mode=0755,uid={uid},gid={uid}"
    kernel.mount("tmpfs", "scratch", options, kernel.NO_SUID | kernel.NO_DEVICES)
    trees = []
    for number, (target, mode) in enumerate(config["private"]):
        place = f"scratch/{number}"
        os.mkdir(place)
        os.chmod(place, mode)
        os.chown(place, uid, uid)
        trees.append((target, kernel.clone_tree(place, 0)))
    kernel.unmount("scratch")
    os.rmdir("scratch")
    return trees


def _mount_processes() -> bool:
    os.makedirs("proc", exist_ok=True)
    try:
        kernel.mount("proc", "proc", "subset=pid", kernel.NO_SUID | kernel.NO_DEVICES | kernel.NO_EXEC)
    except OSError as error:
        if error.errno != errno.EPERM:  # where the machine's own /proc is masked, as in containers
            raise
        return False
    return True


def _write_script(config: "Config") -> None:
    path = f"{config['folder']}/script.py"
    _write(path, config["script"] or b"", os.O_CREAT | os.O_EXCL)
    os.chown(path, config["inner_uid"], config["inner_uid"])


# Watching


def _supervise(config: "Config", alive: tuple[int, ...]) -> None:
    """Run the program and report what came of it; nothing of it is left."""
    started, failed = os.pipe()
    pid = os.fork()
    if not pid:
        _become(config, failed)
    os.close(failed)
    status, killed_for = _watch(config, pid, alive)
    _kill_all()
    error = os.read(started, 4096)
    kept, note = _collect(config) if config["keep"] and config["level"] == "strict" else ({}, "")
    told = (killed_for, error.decode(errors="replace"), note)
    _report(config, _FAILED << 8 if error else status, told, kept)
    if config["level"] == "strict":
        os._exit(0)


def _watch(config: "Config", pid: int, alive: tuple[int, ...]) -> tuple[int, str]:
    """Return the program's wait status, and what it was killed for, if it was."""
    waiting = select.poll()
    for each in (*alive, os.pidfd_open(pid)):
        waiting.register(each, select.POLLIN)
    processes = _open_processes() if config["watched"] else -1
    looked_at = time.monotonic()
    while True:
        ready = waiting.poll(_POLL_S * 1000)
        if any(each in alive for each, _ in ready):
            _abandon(config)
        status = _reap(pid)
        if status is not None:
            return status, ""
        if config["watched"] and time.monotonic() - looked_at >= _POLL_S * 0.9:
            looked_at = time.monotonic()
            exceeded = _exceeded(config, processes)
            if exceeded:  # the caller kills it
                return signals.SIGKILL, exceeded


def _reap(pid: int) -> int | None:
    """Reap what has ended; return the status of that process if it was among them."""
    found = None
    try:
        while True:
            ended, status = os.waitpid(-1, os.WNOHANG)
            if not ended:
                return found
            if ended == pid:
                found = status
    except ChildProcessError:
        return found


def _abandon(config: "Config") -> "NoReturn":
    """End at once, with all that was started: whoever asked for it is gone."""
    if config["level"] == "basic":
        os.killpg(0, signals.SIGKILL)
    os._exit(_FAILED)


def _kill_all() -> None:
    if os.getpid() == 1:  # else -1 would be every process of the user, or of the machine
        _kill(-1)
    else:
        _kill_descendants()
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signals.SIGKILL)
    except (ProcessLookupError, PermissionError):  # it has ended; it runs a program of somebody else's
        return


def _kill_descendants() -> None:
    # Orphans are adopted by this process; who forks meanwhile is met in the next round
    processes = _open_processes()
    for _ in range(100):
        below = _descendants(os.getpid(), processes)
        for each in below:
            _kill(each)
        if not below:
            return
        _reap(0)


def _open_processes() -> int:
    return os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _descendants(top: int, processes: int) -> list[int]:
    """Return the processes below that one."""
    found: list[int] = []
    waiting = [top]
    while waiting:
        pid = waiting.pop()
        try:
            for thread in _threads(pid, processes):
                children = [int(each) for each in _read_file(f"{pid}/task/{thread}/children", processes).split()]
                waiting += children
                found += children
        except OSError:  # it has ended
            continue
    return found


def _threads(pid: int, processes: int) -> list[str]:
    folder = os.open(f"{pid}/task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=processes)
    try:
        return os.listdir(folder)
    finally:
        os.close(folder)


def _exceeded(config: "Config", processes: int) -> str:
    """Return which of the bounds that the kernel doesn't keep is exceeded."""
    if os.getpid() == 1:
        pids = [int(each) for each in os.listdir(processes) if each.isdigit() and each != "1"]
    else:
        pids = _descendants(os.getpid(), processes)
    if _taken(config, pids, processes) > config["memory_bytes"]:
        return "memory"
    if config["level"] == "basic" and _too_full(config["base"], config["disk_bytes"], config["files"]):
        return "disk"
    return ""


def _taken(config: "Config", pids: list[int], processes: int) -> int:
    """Return the bytes that those processes, and the sockets that they may have, take together."""
    sockets = _sockets(processes) if config["namespaces"] & kernel.NEWNET else 0
    return sum(_memory(each, processes) for each in pids) + sockets * _SOCKET_BYTES


def _memory(pid: int, processes: int) -> int:
    """Return the bytes that a process takes for itself: what it maps of files isn't its own."""
    try:
        lines = _read_file(f"{pid}/status", processes).splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith((b"RssAnon:", b"RssShmem:")))


def _sockets(processes: int) -> int:
    """Return the number of sockets in this network namespace, those of TCP twice: they have a buffer for each way.

    Their buffers are the kernel's memory, which no process is seen to take: 1.8 GB could be had by 50 processes.
    """
    try:
        words = _read_file("self/net/sockstat", processes).split()
    except OSError:
        return 0
    counts = [int(words[words.index(name) + 2]) for name in (b"sockets:", b"TCP:") if name in words]
    return sum(counts)


def _too_full(base: str, most_bytes: int, most_files: int) -> bool:
    taken, files = 0, 0
    waiting = [base]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    found = entry.stat(follow_symlinks=False)
                    taken, files = taken + found.st_blocks * 512, files + 1
                    if stat.S_ISDIR(found.st_mode):
                        waiting.append(entry.path)
                    if taken > most_bytes or files > most_files:
                        return True
        except OSError:  # gone, or not to be read
            continue
    return False


# The program


def _become(config: "Config", failed: int) -> "NoReturn":
    """Become the program; what keeps it from that is written to *failed*."""
    try:
        if config["level"] == "basic":
            parent = os.getppid()
            _confine(config, ())
            if os.getppid() != parent:
                os._exit(_FAILED)
        else:
            os.setsid()  # else a signal to its own group would reach the outer process
            kernel.die_with_parent(signals.SIGKILL)
        for number in range(1, signals.NSIG):
            if signals.getsignal(number) == signals.SIG_IGN or number == signals.SIGINT:
                signals.signal(number, signals.SIG_DFL)
        os.nice(10)
        os.chdir(config["folder"])
        for kind, most in config["limits"]:
            _limit(kind, most)
        os.execvpe(config["argv"][0], config["argv"], config["env"])
    except OSError as error:
        os.write(failed, _told(error).encode())
    finally:
        os._exit(_FAILED)


def _limit(kind: int, most: int) -> None:
    ceiling = resource.getrlimit(kind)[1]
    if ceiling != resource.RLIM_INFINITY:
        most = min(most, ceiling)
    hard = most + 1 if kind == resource.RLIMIT_CPU and most != ceiling else most  # a second to say SIGXCPU in
    resource.setrlimit(kind, (most, hard))


# Level basic


def _run_basic(config: "Config") -> int:
    # No parent-death signal: it would end this process before it can kill the group. The lifeline tells.
    kernel.adopt_orphans()
    signals.signal(signals.SIGINT, signals.SIG_IGN)
    _own_pipes(config)
    _supervise(config, (config["lifeline"],))
    return int(decode(_read_all(config["report"]))[0])


# Files that are kept


def _collect(config: "Config") -> tuple[dict[str, bytes], str]:
    """Return the files of the working folder that were asked for; see `folders.collect`."""
    from agent_fsm.tools.sandbox import folders

    return folders.collect(config["folder"], config["keep"], config["keep_files"], config["keep_bytes"])


# Reporting


def _told(error: OSError) -> str:
    name = errno.errorcode.get(error.errno or 0, "")
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror}{where}: {name}"


def _failed(config: "Config", error: OSError) -> int:
    _report(config, _FAILED << 8, ("", _told(error), ""), {})
    return _FAILED << 8


def _report(config: "Config", status: int, told: tuple[str, str, str], kept: dict[str, bytes]) -> None:
    """Write the report; *told* is what the program was killed for, the error, and a note."""
    fields = [b"%d" % status, *(text.encode() for text in told)]
    for name, data in kept.items():
        fields += [os.fsencode(name), data]
    os.ftruncate(config["report"], 0)
    os.pwrite(config["report"], b"".join(b"%d:%b" % (len(each), each) for each in fields), 0)


def decode(data: bytes) -> list[bytes]:
    """Return the fields of a report: numbers of bytes, each followed by a colon and as many bytes.

    Raises:
        ValueError: it is none.
    """
    fields: list[bytes] = []
    at = 0
    while at < len(data):
        colon = data.index(b":", at)
        end = colon + 1 + int(data[at:colon])
        fields.append(data[colon + 1 : end])
        at = end
    return fields


def _read_all(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def _read_file(path: str, folder: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        return os.read(descriptor, 65_536)
    finally:
        os.close(descriptor)


def _end_like(status: int) -> "NoReturn":
    """End with the exit code, or by the signal, of that wait status."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number not in (signals.SIGKILL, signals.SIGSTOP):
            signals.signal(number, signals.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else _FAILED)
