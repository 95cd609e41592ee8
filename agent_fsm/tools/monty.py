"""Monty: snippets of Python in an interpreter that knows no files, no network and no processes (extra `monty`).

A worker process interprets one snippet at a time. It is ended with a snippet that doesn't end by itself, and waits for
the next one otherwise, so that a snippet takes less than a millisecond. The worker is nothing of the snippet's: it has
no environment, keeps no state from one to the next, and ends with this process.
"""

import asyncio
import math
import os
import signal
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from agent_fsm.tools.processes import Excerpt, Outcome

if TYPE_CHECKING:
    from pydantic_monty import AsyncMonty

__all__ = ["is_installed", "run_snippet"]

_NAME = "<python-input-0>"
"""What Monty calls a snippet in tracebacks."""
_BACKSTOP_S = 1.0
"""Seconds after which Monty ends a snippet that we should have ended: our event loop may be blocked."""
_END_S = 0.1
_POOLS: "dict[int, AsyncMonty]" = {}
"""The pool of each process: a fork has none of the threads that serve its parent's."""


def is_installed() -> bool:
    """Return whether there is an interpreter to use."""
    return find_spec("pydantic_monty") is not None


async def run_snippet(code: str, *, timeout_s: float, memory_bytes: int, keep_chars: int, max_bytes: int) -> Outcome:
    """Return what came of *code*; nothing of it runs any more.

    It has `timeout_s` seconds, waiting for a free worker included; result or CancelledError come at most 0.25 s later.

    Args:
        memory_bytes: bytes that its values may take.
        keep_chars: characters of stdout, and as many of stderr, that the outcome has: of more, head and tail.
        max_bytes: bytes of both together beyond which (`>`) it is ended.

    Raises:
        ImportError: Monty is not installed.
        OSError: its worker can't be started.
    """
    started = time.monotonic()
    output = _Output(keep_chars, max_bytes)
    limits = {"max_feed_duration_secs": timeout_s + _BACKSTOP_S, "max_memory": memory_bytes}
    feeding = asyncio.ensure_future(_feed(code, limits, output))
    try:
        waited: list[asyncio.Future[Any]] = [feeding, output.flooded]
        await asyncio.wait(waited, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        ended = feeding.done() and not output.flooded.done()
    finally:
        feeding.cancel()  # which kills the worker
        await asyncio.wait([feeding], timeout=_END_S)
    rc, error = (-signal.SIGKILL, "") if not ended else feeding.result()
    if output.flooded.done():
        error = f"wrote more than {max_bytes:,} bytes to stdout and stderr; it was ended"
    elif not ended:
        error = f"timed out after {timeout_s:g} s; it was ended"
    return Outcome(rc, output.stdout.text(), output.stderr.text(), time.monotonic() - started, error)


async def _feed(code: str, limits: Any, output: "_Output") -> tuple[int, str]:
    """Return the exit code that a process would have had, and what else ended it."""
    from pydantic_monty import MontyCrashedError, MontyError, MontyRuntimeError, MontySyntaxError

    pool = await _pool()
    try:
        async with pool.checkout(limits=limits) as session:
            await session.feed_run(code, print_callback=output.take)
    except (MontyRuntimeError, MontySyntaxError) as error:
        output.stderr.add(error.display().replace(_NAME, "script.py") + "\n")
        over = isinstance(error.exception(), MemoryError) and "memory limit exceeded" in str(error)
        return 1, f"used more than {limits['max_memory']:,} bytes of memory; it was ended" if over else ""
    except MontyCrashedError as error:
        return 1, f"the interpreter crashed: {error}"
    except MontyError as error:
        return 1, f"the interpreter failed: {error}"
    return 0, ""


async def _pool() -> "AsyncMonty":
    from pydantic_monty import AsyncMonty

    pid = os.getpid()
    if pid not in _POOLS:
        workers = max(4, os.cpu_count() or 1)
        pool = AsyncMonty(min_processes=0, max_processes=workers, feed_duration_limit_grace=_BACKSTOP_S)
        await pool.__aenter__()
        _POOLS.setdefault(pid, pool)  # of two at once one stays unused, which without workers is nothing
    return _POOLS[pid]


class _Output:
    """What a snippet prints; Monty's thread brings it."""

    def __init__(self, keep_chars: int, max_bytes: int) -> None:
        self.stdout, self.stderr = Excerpt(keep_chars), Excerpt(keep_chars)
        self._loop = asyncio.get_running_loop()
        self.flooded: asyncio.Future[None] = self._loop.create_future()
        self._left: float = max_bytes

    def take(self, stream: Literal["stdout", "stderr"], text: str) -> None:
        if self._left < 0:
            return
        self._left -= len(text.encode())
        (self.stdout if stream == "stdout" else self.stderr).add(text)
        if self._left < 0:
            self._left = -math.inf
            self._loop.call_soon_threadsafe(self._flood)  # to raise from here would be ignored

    def _flood(self) -> None:
        if not self.flooded.done():
            self.flooded.set_result(None)
