"""Processes: a child with a deadline and a bound on what it may write, of whose process group nothing is left.

Knows nothing of what the child runs or of what contains it. POSIX only: it needs process groups, and an event loop with
`add_reader`.

asyncio's own subprocesses were the alternative. They can be cancelled between the fork and the moment at which the
pid is known, and then kill only the child; they reap the child before we can kill its group, whose number may then
be another's; and on 3.11 each costs a thread.
"""

import asyncio
import codecs
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

from attrs import frozen

__all__ = ["Excerpt", "Outcome", "Program", "Stream", "run", "start", "watch"]

_GRACE_S = 0.1
"""Seconds that the pipes may stay open after the process has ended: its children may be about to write."""
_REAP_S = 0.15
"""Seconds to wait for a killed process to be gone; the memory of a large one takes the kernel a while."""
_POLL_S = 0.01
_READ_BYTES = 65_536


@frozen
class Program:
    """What is to be started, and how."""

    argv: Sequence[str]
    env: Mapping[str, str]
    """The whole of its environment."""
    cwd: Path | None = None
    """Where it starts; None: where we are."""
    pass_fds: Sequence[int] = ()
    """Descriptors of ours that it inherits, under the same numbers."""


@frozen
class Outcome:
    """What came of a process, or why there was none."""

    rc: int | None = None
    """Its exit code; below 0: the signal that ended it; None: nothing was run."""
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0
    error: str = ""
    """Why it failed, unless its exit code says so."""
    note: str = ""
    """What the model should know, though nothing failed by it."""


async def run(program: Program, *, timeout_s: float, keep_chars: int, max_bytes: int) -> Outcome:
    """Return what came of *program*; nothing of its process group is left.

    It has `timeout_s` seconds; result or CancelledError come at most 0.25 s later, whoever holds the pipes.

    Args:
        keep_chars: characters of stdout, and as many of stderr, that the outcome has: of more, head and tail.
        max_bytes: bytes of both together beyond which (`>`) the process group is killed.

    Raises:
        OSError: it can't be started.
    """
    loop = asyncio.get_running_loop()
    exited: asyncio.Future[None] = loop.create_future()
    stopped: asyncio.Future[str] = loop.create_future()
    started = time.monotonic()
    process = start(program)
    with ExitStack() as closing:
        try:
            closing.callback(watch(process, lambda: _settle(exited)))
            meter = _Meter(max_bytes, stopped)
            streams = [Stream(pipe, keep_chars, meter.count) for pipe in (process.stdout, process.stderr)]
            for stream in streams:
                closing.callback(stream.close)
            first: list[asyncio.Future[Any]] = [exited, stopped]
            await asyncio.wait(first, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if exited.done() and not stopped.done():
                await asyncio.wait([stream.ended for stream in streams], timeout=_GRACE_S)
            error = _why_failed(exited, stopped, timeout_s)
            held = not error and not all(stream.ended.done() for stream in streams)
        finally:
            await _kill(process, exited)
        stdout, stderr = (stream.text() for stream in streams)
    rc = process.returncode
    if not error and rc is not None and rc < 0:
        error = f"ended by signal {-rc} ({signal.strsignal(-rc)})"
    note = "it ended and left processes in the background; their output was not waited for" if held else ""
    return Outcome(rc, stdout, stderr, time.monotonic() - started, error, note)


def start(program: Program) -> "subprocess.Popen[bytes]":
    """Start *program* in a session of its own, with no stdin and a pipe each for stdout and stderr.

    Raises:
        OSError: it can't be started.
    """
    # Blocks for the few milliseconds until exec, as asyncio's own does: there is no moment at which a cancel could
    # come between the process and its pid.
    return subprocess.Popen(
        program.argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        env=program.env,
        cwd=program.cwd,
        pass_fds=program.pass_fds,
        start_new_session=True,
    )


def watch(process: "subprocess.Popen[bytes]", tell: Callable[[], None]) -> Callable[[], object]:
    """Call *tell* once, from the event loop, when the process has ended; return what stops the watch.

    The process is not reaped, so its number and its group's are still its own when *tell* is called. (Where there is
    neither pidfd nor waitid, as on macOS before Python 3.13, it is.)
    """
    loop = asyncio.get_running_loop()
    try:
        pidfd = os.pidfd_open(process.pid)
    except (AttributeError, OSError):  # not Linux, an old kernel, or no descriptor left
        return _poll(process, tell)

    def stop() -> None:
        nonlocal pidfd
        if pidfd >= 0:
            loop.remove_reader(pidfd)  # it stays readable and would spin the loop
            os.close(pidfd)
            pidfd = -1

    def ended() -> None:
        stop()
        tell()

    loop.add_reader(pidfd, ended)
    return stop


class Excerpt:
    """The head and the tail, of `keep_chars` characters together, of a text that comes piece by piece."""

    def __init__(self, keep_chars: int) -> None:
        self._head, self._tail = "", ""
        self._head_chars = keep_chars // 2
        self._tail_chars = keep_chars - self._head_chars
        self._chars = 0

    def add(self, text: str) -> None:
        """Take the next piece."""
        self._chars += len(text)
        room = self._head_chars - len(self._head)
        self._head += text[:room]
        self._tail = (self._tail + text[room:])[-self._tail_chars :]

    def text(self) -> str:
        """Return the whole, or its head and tail and how many characters are cut between them."""
        cut = self._chars - len(self._head) - len(self._tail)
        if not cut:
            return self._head + self._tail
        return f"{self._head}\n[... {cut:,} characters cut ...]\n{self._tail}"


class Stream:
    """One output pipe of a process: read as it comes, so that the writer never waits; head and tail are kept.

    Args:
        pipe: its end of ours; closed by `close`.
        keep_chars: characters that are kept.
        count: is told the bytes of each piece; False ends the reading.
    """

    def __init__(self, pipe: IO[bytes] | None, keep_chars: int, count: Callable[[int], bool]) -> None:
        assert pipe is not None  # PIPE was asked for
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        """Done once nothing more will come."""
        self._pipe = pipe
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._excerpt = Excerpt(keep_chars)
        self._count = count
        self._loop.add_reader(pipe, self._read)

    def _read(self) -> None:
        data = os.read(self._pipe.fileno(), _READ_BYTES)
        self._excerpt.add(self._decode(data, not data))
        if not data:
            self.close()
        elif not self._count(len(data)):
            self._loop.remove_reader(self._pipe)  # not closed: it would complain of a broken pipe before it is killed

    def text(self) -> str:
        """Return what was read, or its head and tail and how many characters are cut between them."""
        return self._excerpt.text()

    def close(self) -> None:
        """Stop reading; what still writes gets SIGPIPE."""
        if not self.ended.done():
            self._loop.remove_reader(self._pipe)
            self._pipe.close()
            self.ended.set_result(None)


class _Meter:
    """The bytes of both streams together."""

    def __init__(self, max_bytes: int, stopped: "asyncio.Future[str]") -> None:
        self._max_bytes = self._left = max_bytes
        self._stopped = stopped

    def count(self, read: int) -> bool:
        self._left -= read
        if self._left < 0 and not self._stopped.done():
            self._stopped.set_result(f"wrote more than {self._max_bytes:,} bytes to stdout and stderr")
        return self._left >= 0


def _settle(exited: "asyncio.Future[None]") -> None:
    if not exited.done():
        exited.set_result(None)


def _why_failed(exited: "asyncio.Future[None]", stopped: "asyncio.Future[str]", timeout_s: float) -> str:
    """Return why the process failed, unless that is for its exit code to say."""
    if stopped.done():
        return f"{stopped.result()}; the process group was killed"
    return "" if exited.done() else f"timed out after {timeout_s:g} s; the process group was killed"


async def _kill(process: "subprocess.Popen[bytes]", exited: "asyncio.Future[None]") -> None:
    """Kill the process group and reap its leader, also if cancelled meanwhile."""
    with ExitStack() as closing:
        # The first process of a PID namespace is such a child: it is gone only when all others of the namespace are.
        children = [] if exited.done() else [_gone(each, closing) for each in _children(process.pid)]
        # The leader, even ended, is not reaped yet (where it can't be helped: perhaps it is): the group's number is
        # still its own.
        with suppress(ProcessLookupError, PermissionError):  # macOS answers EPERM where only zombies are left
            os.killpg(process.pid, signal.SIGKILL)
        try:
            await asyncio.wait([exited, *children], timeout=_REAP_S)
            process.poll()
        except asyncio.CancelledError:  # the second one; the few milliseconds that are left are waited for in place
            with suppress(subprocess.TimeoutExpired):
                process.wait(_REAP_S)
            raise


def _children(pid: int) -> list[int]:
    """Return pidfds of the processes that *pid*'s first thread has started and that will not outlive its group; none
    where the system doesn't tell."""
    try:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    found = []
    for child in listed:
        with suppress(AttributeError, OSError):  # no pidfds, it has ended, or no descriptor left
            if os.getpgid(int(child)) == pid or _in_another_namespace(int(child)):
                found.append(os.pidfd_open(int(child)))
    return found


def _in_another_namespace(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/ns/pid").readlink() != Path("/proc/self/ns/pid").readlink()
    except PermissionError:  # it has shut itself in
        return True


def _gone(pidfd: int, closing: ExitStack) -> "asyncio.Future[None]":
    """Return a future that is done once that process has ended; *closing* ends the watch."""
    loop = asyncio.get_running_loop()
    gone: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        loop.remove_reader(pidfd)
        gone.set_result(None)

    closing.callback(os.close, pidfd)
    closing.callback(loop.remove_reader, pidfd)
    loop.add_reader(pidfd, tell)
    return gone


def _poll(process: "subprocess.Popen[bytes]", tell: Callable[[], None]) -> Callable[[], object]:
    """Do what `watch` does by asking every `_POLL_S` seconds."""
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle

    def look() -> None:
        nonlocal timer
        if _has_ended(process):
            tell()
        else:
            timer = loop.call_later(_POLL_S, look)

    timer = loop.call_later(_POLL_S, look)
    return lambda: timer.cancel()  # noqa: PLW0108 - the timer is another one each time


def _has_ended(process: "subprocess.Popen[bytes]") -> bool:
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except AttributeError:  # macOS before Python 3.13
        return process.poll() is not None
    except ChildProcessError:
        return True
