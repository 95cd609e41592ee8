"""A server's process: lines out of it, lines into it, and nothing of it left when it is closed.

The SDK's own transport was the alternative. It joins and splits its whole buffer anew for each chunk, which takes 18 s
for a line of 20 MB, has no bound on a line, and needs up to 4 s to close.
"""

import asyncio
import os
import signal
import subprocess
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from agent_fsm.tools.processes import watch

__all__ = ["MAX_LINE_BYTES", "Child", "child_environment"]

MAX_LINE_BYTES = 8 * 1024 * 1024
"""A longer line is dropped, but for its head."""
HEAD_BYTES = 4_096
"""How much of a dropped line is kept, to find out which request it answers."""
_MAX_DROPPED_BYTES = 8 * MAX_LINE_BYTES
"""A line that goes on for longer has no end: the server is given up."""
_MAX_WAITING_LINES = 256
_MAX_WAITING_BYTES = MAX_LINE_BYTES
"""With more than this unread, the server has to wait."""
_MAX_UNWRITTEN_BYTES = 64 * 1024 * 1024
_TAIL_BYTES = 4_096
_READ_BYTES = 65_536
_FLOOD_BYTES, _FLOOD_S = 16 * 1024 * 1024, 0.05
"""More than so many bytes of stderr in so many seconds, and it is left alone for as long."""
_STDIN_GRACE_S = 1.0
_TERM_GRACE_S = 0.5
_REAP_S = 0.25
_MAX_ROUNDS = 10

_INHERITED = (
    *("PATH", "HOME", "LANG", "LANGUAGE", "USER", "LOGNAME", "SHELL", "TERM", "TMPDIR", "TEMP", "TMP", "TZ"),
    *("SYSTEMROOT", "PATHEXT", "COMSPEC", "APPDATA", "LOCALAPPDATA", "USERPROFILE"),
)
_MARK = "AGENT_FSM_MCP_SERVER"
"""A variable with a value of its own for each server, by which what leaves the process group is found again."""


def child_environment(environ: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    """Return what a server's process gets: a few harmless variables of *environ*, and *more*."""
    kept = {name: value for name, value in environ.items() if name in _INHERITED or name.startswith("LC_")}
    return {**kept, **more}


class Child:
    """A process whose stdin and stdout are lines. All of its methods are for the event loop's thread.

    Args:
        argv: what to start.
        env: the whole of its environment.
        cwd: where it starts; None: where we are.
        wanted: is asked of each line as it arrives, whether it is to be kept; must be quick.

    Raises:
        OSError: it can't be started.
    """

    def __init__(
        self, argv: Sequence[str], env: Mapping[str, str], cwd: str | None, *, wanted: Callable[[bytes], bool]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._mark = f"{_MARK}={uuid.uuid4().hex}"
        # Blocks for the few milliseconds until exec: there is no moment at which a cancel could come between the
        # process and its pid.
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env={**env, _MARK: self._mark.partition("=")[2]},
            cwd=None if cwd is None else Path(cwd).expanduser(),
            start_new_session=True,
        )
        self.exited: asyncio.Future[None] = self._loop.create_future()
        self.ended = False
        """True once nothing more will come."""
        self.why_ended = ""
        """Why not, unless that is because the process has ended."""
        self._unwatch = watch(self._process, self._on_exit)
        self._lines = _Lines(_pipe(self._process.stdout), wanted, self._on_end)
        self._stderr = _Tail(_pipe(self._process.stderr))
        self._stdin = _Writer(_pipe(self._process.stdin))
        self._gone = False

    async def next_line(self) -> bytes | None:
        """Return the next line, of which only `HEAD_BYTES` are left if it had more than `MAX_LINE_BYTES`; None once
        there are no more."""
        return await self._lines.next()

    async def write(self, line: bytes) -> None:
        """Send *line*; returns when the server has taken most of what it was sent. A cancel takes nothing back.

        Raises:
            OSError: it takes nothing any more.
        """
        await self._stdin.write(line)

    def stop_waiting(self) -> None:
        """From now on `write` returns at once, though the server may take nothing."""
        self._stdin.stop_waiting()

    @property
    def stderr(self) -> str:
        """The last that it wrote to stderr."""
        return self._stderr.text()

    @property
    def returncode(self) -> int | None:
        """How it ended; None if it has not. Below 0: by that signal."""
        return self._process.returncode

    async def aclose(self) -> None:
        """End the process as the protocol has it: the end of its stdin, then SIGTERM, then SIGKILL. Its group and what
        has left that are killed too. Takes 1.75 s at most; when cancelled, all is killed at once."""
        if self._gone:
            return
        try:
            self._stdin.close()
            self._lines.drain()
            if not await self._exits(_STDIN_GRACE_S):
                self._signal(signal.SIGTERM)
                await self._exits(_TERM_GRACE_S)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill the process, its group and what has left that, and let go of everything. Waits for a few milliseconds,
        in place."""
        if self._gone:
            return
        self._gone = True
        self._unwatch()
        self._signal(signal.SIGKILL)  # also if it has ended: it is not reaped, so the group's number is still its own
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_REAP_S)
        _kill_marked(self._mark)
        self._stdin.close()
        self._lines.close()
        self._stderr.close()
        if not self.exited.done():
            self.exited.set_result(None)

    async def _exits(self, seconds: float) -> bool:
        await asyncio.wait({self.exited}, timeout=seconds)
        return self.exited.done()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):  # macOS answers EPERM where only zombies are left
                os.killpg(self._process.pid, number)

    def _on_exit(self) -> None:
        self._signal(signal.SIGKILL)  # its children may hold the pipes
        self._process.poll()
        if not self.exited.done():
            self.exited.set_result(None)
        self._lines.finish()

    def _on_end(self, why: str) -> None:
        self.ended, self.why_ended = True, why
        self._stdin.close()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None  # PIPE was asked for
    os.set_blocking(pipe.fileno(), False)
    return pipe


def _kill_marked(mark: str) -> None:
    """Kill every process that has *mark* in its environment, as what a server has started has, in whatever session."""
    wanted = mark.encode()
    nothing, rounds = 0, 0
    # One that forks and ends while we look is in neither list: so until nothing was found twice
    while nothing < 2 and rounds < _MAX_ROUNDS:
        found = [pid for pid in _pids() if wanted in _environment_of(pid)]
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        nothing = 0 if found else nothing + 1
        rounds += 1


def _pids() -> list[int]:
    try:
        names = os.listdir("/proc")  # noqa: PTH208 - pathlib takes three times as long
        return [int(name) for name in names if name.isdigit() and int(name) != os.getpid()]
    except OSError:  # not Linux: there the process group has to do
        return []


def _environment_of(pid: int) -> list[bytes]:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:  # noqa: PTH123 - the same
            return file.read().split(b"\0")
    except OSError:  # it has ended, or is another user's
        return []


class _Lines:
    """The lines of stdout: read as they come, a bounded number of them waiting."""

    def __init__(self, pipe: IO[bytes], wanted: Callable[[bytes], bool], on_end: Callable[[str], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._pipe = pipe
        self._wanted = wanted
        self._on_end = on_end
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._pieces: list[bytes] = []
        self._length = 0
        self._ended = self._closed = self._reading = self._draining = False
        self._waiter: asyncio.Future[None] | None = None
        self._read_on()

    async def next(self) -> bytes | None:
        while not self._waiting:
            if self._ended:
                return None
            self._waiter = self._loop.create_future()
            await self._waiter
        line = self._waiting.popleft()
        self._waiting_bytes -= len(line)
        self._read_on()
        return line

    def _read_on(self) -> None:
        room = len(self._waiting) < _MAX_WAITING_LINES and self._waiting_bytes < _MAX_WAITING_BYTES
        if (room or self._draining) and not (self._reading or self._ended or self._closed):
            self._reading = True
            self._loop.add_reader(self._pipe, self._read)

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._pipe)

    def _read(self) -> bool:
        """Take what there is; return whether there was anything."""
        try:
            data = os.read(self._pipe.fileno(), _READ_BYTES)
        except BlockingIOError:
            return False
        except OSError as error:
            self._end(f"its stdout can't be read: {error}")
            return False
        if not data:
            self._end("")
            return False
        if self._draining:
            return True
        *whole, rest = data.split(b"\n")
        for piece in whole:
            self._add(piece)
            self._take()
        self._add(rest)
        if self._length > _MAX_DROPPED_BYTES:
            self._end(f"it wrote a line of more than {_MAX_DROPPED_BYTES:,} bytes")
        if len(self._waiting) >= _MAX_WAITING_LINES or self._waiting_bytes >= _MAX_WAITING_BYTES:
            self._stop_reading()
        return True

    def _add(self, piece: bytes) -> None:
        """Go on with the line; of one that is too long only the head stays."""
        before, self._length = self._length, self._length + len(piece)
        if self._length <= MAX_LINE_BYTES:
            self._pieces.append(piece)
        elif before <= MAX_LINE_BYTES:
            self._pieces = [b"".join((*self._pieces, piece))[:HEAD_BYTES]]

    def _take(self) -> None:
        line = b"".join(self._pieces)
        long, self._pieces, self._length = self._length > MAX_LINE_BYTES, [], 0
        if long:
            line = line + b"\0"  # which no JSON has in it: so a head is told from a line
        if line and self._wanted(line):
            self._waiting.append(line)
            self._waiting_bytes += len(line)
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def finish(self) -> None:
        """Take what is left in the pipe, and end: the process has."""
        left = 64  # more than a pipe holds; a daemon that holds it may write for ever
        while left and not (self._ended or self._closed) and self._read():
            left -= 1
        self._end("")

    def drain(self) -> None:
        """Read on, but for nothing: so that a server which writes can end."""
        self._draining = True
        self._read_on()

    def _end(self, why: str) -> None:
        if not self._ended:
            self._ended = True
            self._stop_reading()
            self._on_end(why)
            self._wake()

    def close(self) -> None:
        self._end("")
        if not self._closed:
            self._closed = True
            self._pipe.close()


class _Tail:
    """The end of stderr: read as it comes, so that the server never waits."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._loop = asyncio.get_running_loop()
        self._pipe = pipe
        self._tail = b""
        self._since = 0.0
        self._bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._loop.add_reader(pipe, self._read)

    def _read(self) -> bool:
        try:
            data = os.read(self._pipe.fileno(), _READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._pipe)
            return False
        self._tail = (self._tail + data)[-_TAIL_BYTES:]
        now = time.monotonic()
        if now > self._since + _FLOOD_S:
            self._since, self._bytes = now, 0
        self._bytes += len(data)
        if self._bytes > _FLOOD_BYTES:  # else one server that writes for ever would take all our time
            self._loop.remove_reader(self._pipe)
            self._timer = self._loop.call_later(_FLOOD_S, self._loop.add_reader, self._pipe, self._read)
        return True

    def text(self) -> str:
        """Return the last of what it wrote, what is still in the pipe included."""
        left = 16  # of a flood there is always more
        while not self._closed and left and self._read():
            left -= 1
        return self._tail.decode("utf-8", "replace").strip()

    def close(self) -> None:
        if not self._closed:
            self.text()
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()
            self._loop.remove_reader(self._pipe)
            self._pipe.close()


class _Writer:
    """The way into stdin: what was begun to be written is written whole, whoever is cancelled meanwhile."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._loop = asyncio.get_running_loop()
        self._pipe = pipe
        self._unwritten: deque[memoryview] = deque()
        self._bytes = 0
        self._closed = False
        self._waits = True
        self._waiters: list[asyncio.Future[None]] = []

    async def write(self, line: bytes) -> None:
        if self._closed:
            raise BrokenPipeError("its stdin is closed")
        if self._bytes + len(line) > _MAX_UNWRITTEN_BYTES:
            raise BrokenPipeError(f"it has left {self._bytes:,} bytes unread")
        idle = not self._unwritten
        self._unwritten.append(memoryview(line))
        self._bytes += len(line)
        if idle:
            self._flush()
            if self._unwritten:
                self._loop.add_writer(self._pipe, self._flush_on)
        while self._bytes > _READ_BYTES and self._waits and not self._closed:
            waiter = self._loop.create_future()
            self._waiters.append(waiter)
            await waiter
        if self._closed:
            raise BrokenPipeError("its stdin is closed")

    def _flush(self) -> None:
        try:
            while self._unwritten:
                sent = os.write(self._pipe.fileno(), self._unwritten[0])
                self._bytes -= sent
                rest = self._unwritten[0][sent:]
                if rest:
                    self._unwritten[0] = rest
                else:
                    self._unwritten.popleft()
        except BlockingIOError:
            return
        except OSError:
            self.close()

    def _flush_on(self) -> None:
        self._flush()
        if not self._unwritten and not self._closed:
            self._loop.remove_writer(self._pipe)
        if self._bytes <= _READ_BYTES:
            self._wake()

    def stop_waiting(self) -> None:
        self._waits = False
        self._wake()

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_writer(self._pipe)
            self._unwritten.clear()
            self._pipe.close()
            self._wake()
