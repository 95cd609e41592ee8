"""Hostile calls of `exec_python`: made at a level, watched from outside, and told as a table.

    python -m tests.attacks --table                 what each level stops, as Markdown
    python -m tests.attacks --level basic --only tcp
    python -m tests.attacks --calls 500             how late results are, in what a deadline allows

The calls are made by a worker, a process of its own: it has a secret in the environment that it was started with, is
the parent of all that its calls leave behind (PR_SET_CHILD_SUBREAPER), so that they can be counted, and may die.
"""

import argparse
import asyncio
import base64
import ctypes
import hashlib
import json
import os
import resource
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from attrs import asdict, evolve, frozen

from agent_fsm.protocol import ToolResult
from agent_fsm.tools.local import LocalMCPInvoker
from agent_fsm.tools.sandbox import Level
from tests.attack_snippets import ATTACKS, PRELUDE, Attack

LEVELS: tuple[Level, ...] = ("strict", "basic", "off")
SLACK_S = 0.25
"""How much later than its deadline a call's result may come."""
GONE_S = 0.5
"""How long processes that were killed may take to be gone, where all are busy with others."""
REMOVED_S = 15
"""How long files that a call left may take to be gone, where the level lets it make very many folders."""
SECRET = "CANARY_API_KEY"
ROOT = Path(__file__).parent.parent
NOBODY = 65534

# What a call may take of the machine, seen from outside, before that counts as having got through. The limits are
# lower (64 processes, 512 MiB, 64 MiB); the memory's is kept by looking, which lets some more pass.
MOST_PROCESSES = 70
MOST_MEMORY = 900 * 2**20
MOST_MEMORY_OF_MACHINE = 1100 * 2**20
"""Of all memory, what processes have mapped or not; higher, since others use the machine too."""
MOST_DISK = 140 * 2**20
MOST_RESULT_CHARS = 2_000_000


@frozen
class Setting:
    """How calls are made."""

    level: Level
    packages: bool = True
    """Whether installed packages can be imported; a call takes 50 ms longer for it."""
    user: int | None = None
    """Whose the calls are; None: ours."""


@frozen
class Run:
    """What came of one hostile call."""

    name: str
    level: str
    """What its result says."""
    breaches: tuple[str, ...]
    """How it got through; nothing if it was stopped."""
    survivors: int
    """Processes of it that were there `GONE_S` after its result."""
    over_s: float
    """Seconds between its deadline and its result; negative if it ended sooner."""
    tried: bool
    """Whether the program ran at all: what never began was not stopped."""
    said: str
    """The beginning of its result."""


# The outside of a call


class Stage:
    """What is around a call for it to attack, and what is seen of it afterwards. Must be closed."""

    def __init__(self, attack: Attack, canary: str) -> None:
        self._closing = ExitStack()
        self._canary = canary
        self.tag = f"tag-{secrets.token_hex(8)}"
        self.folder = Path(tempfile.mkdtemp(prefix="stage-", dir="/tmp"))
        self._closing.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.folder.chmod(0o755)
        self._make_files()
        self._listeners = self._listen()
        self._terminal, terminal = os.openpty()
        for fd in (self._terminal, terminal):
            self._closing.callback(os.close, fd)
        os.set_blocking(self._terminal, False)
        os.fchmod(terminal, 0o666)
        self._fd = os.open(self._secret, os.O_RDWR)
        os.set_inheritable(self._fd, True)
        self._closing.callback(os.close, self._fd)
        self._segment = self._share_memory()
        self._victim = subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL, env={SECRET: canary, "PATH": "/bin"})
        self._closing.callback(self._end_victim)
        self._attack = attack
        self.names = self._names(os.ttyname(terminal))

    def _make_files(self) -> None:
        self._secret = self.folder / "secret.txt"
        self._secret.write_text(self._canary)
        self._secret.chmod(0o666)
        self._open = self.folder / "open"
        self._open.mkdir()
        self._open.chmod(0o777)
        (self._open / "there").touch()
        (self._open / "there").chmod(0o666)
        self.shown = self.folder / "shown"
        self.shown.mkdir()
        self.shown.chmod(0o777)
        (self.shown / "link").symlink_to(self._secret)
        shutil.copy("/usr/bin/id", self.shown / "id")
        (self.shown / "id").chmod(0o4755)
        self._shm = Path("/dev/shm", f"{self.tag}-shm")
        self._shm.write_text(self._canary)
        self._shm.chmod(0o666)
        self._closing.callback(self._clear)

    def _listen(self) -> dict[str, socket.socket]:
        unix = socket.AF_UNIX
        wanted: dict[str, tuple[int, int, Any]] = {
            "TCP": (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            "TCP6": (socket.AF_INET6, socket.SOCK_STREAM, ("::1", 0)),
            "UDP": (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            "STREAM": (unix, socket.SOCK_STREAM, str(self.folder / "stream")),
            "DATAGRAM": (unix, socket.SOCK_DGRAM, str(self.folder / "datagram")),
            "ABSTRACT": (unix, socket.SOCK_STREAM, f"\0{self.tag}"),
            "FREE": (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
        }
        made = {}
        for name, (family, kind, address) in wanted.items():
            made[name] = listener = socket.socket(family, kind)
            self._closing.callback(listener.close)
            listener.setblocking(False)
            listener.bind(address)
            if kind == socket.SOCK_STREAM:
                listener.listen()
            if family == unix and not address.startswith("\0"):
                Path(address).chmod(0o777)
        return made

    def _share_memory(self) -> int:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.shmat.restype = ctypes.c_void_p
        number = int(libc.shmget(0, 4096, 0o1666))
        self._closing.callback(libc.shmctl, number, 0, None)
        self._shared = libc.shmat(number, None, 0)
        ctypes.memmove(self._shared, self._canary.encode(), len(self._canary))
        self._closing.callback(libc.shmdt, ctypes.c_void_p(self._shared))
        return number

    def _names(self, terminal: str) -> dict[str, Any]:
        ports = {name: self._listeners[name].getsockname()[1] for name in ("TCP", "TCP6", "UDP", "FREE")}
        self._listeners.pop("FREE").close()
        self.free = ports["FREE"]
        return {
            **ports,
            "TAG": self.tag,
            "FOLDER": str(self.folder),
            "OPEN": str(self._open),
            "SHOWN": str(self.shown),
            "SECRET": str(self._secret),
            "REPOSITORY": str(ROOT),
            "STREAM": str(self.folder / "stream"),
            "DATAGRAM": str(self.folder / "datagram"),
            "ABSTRACT": self.tag,
            "TTY": terminal,
            "FD": self._fd,
            "SHM": self._segment,
            "VICTIM": self._victim.pid,
            "WORKER": os.getpid(),
            "SECOND": "left by the first call",
        }

    def breaches(self) -> list[str]:
        """Return what the call did that can be seen here."""
        found = [f"something came to {name}" for name, listener in self._listeners.items() if _received(listener)]
        with suppress(BlockingIOError):
            found += ["something came to the terminal"] if os.read(self._terminal, 4096) else []
        state = _state(self._victim.pid)
        if self._victim.poll() is not None or state in ("T", "t"):
            found.append(f"a process outside is in state {state or 'dead'}")
        elif os.getpriority(os.PRIO_PROCESS, self._victim.pid) != os.getpriority(os.PRIO_PROCESS, 0):
            found.append("a process outside has another priority")
        elif resource.prlimit(self._victim.pid, resource.RLIMIT_NOFILE) != resource.getrlimit(resource.RLIMIT_NOFILE):
            found.append("a process outside has other limits")
        if ctypes.string_at(self._shared, len(self._canary)).decode(errors="replace") != self._canary:
            found.append("shared memory was written")
        return found + self._changed_files()

    def _changed_files(self) -> list[str]:
        expected = {self._secret: len(self._canary), self._shm: len(self._canary), self._open / "there": 0}
        found = [f"{path.name} was changed" for path, size in expected.items() if not _is_untouched(path, size)]
        if sorted(path.name for path in self.shown.iterdir()) != ["id", "link"]:
            found.append("shown was written")
        return found + [f"{path.name} was made" for path in self._open.iterdir() if path.name != "there"]

    def _clear(self) -> None:
        for folder in ("/dev/shm", "/tmp", "/var/tmp", tempfile.gettempdir()):
            for path in Path(folder).glob(f"{self.tag}-*"):
                path.unlink(missing_ok=True)

    def _end_victim(self) -> None:
        self._victim.kill()
        self._victim.wait()

    def close(self) -> None:
        """Leave nothing of it."""
        self._closing.close()


def _is_untouched(path: Path, size: int) -> bool:
    with suppress(OSError):
        seen = path.stat()
        return (seen.st_size, seen.st_mode & 0o111) == (size, 0)
    return False


def _received(listener: socket.socket) -> bool:
    with suppress(BlockingIOError):
        if listener.type == socket.SOCK_DGRAM:
            return bool(listener.recv(100))
        listener.accept()[0].close()
        return True
    return False


# Processes


def _state(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def descendants() -> list[int]:
    """Return the live processes below this one, which also has those that were orphaned below it."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                parents[int(entry.name)] = (int(parent), state)
    found = [os.getpid()]
    for pid in found:  # grows as it goes
        found += [child for child, (parent, _) in parents.items() if parent == pid]
    return [pid for pid in found[1:] if parents[pid][1] not in "ZX"]


def _of_call(tag: str) -> list[int]:
    """Return the descendants that have the tag of a call in their environment."""
    marked = []
    for pid in descendants():
        with suppress(OSError):
            if tag.encode() in Path(f"/proc/{pid}/environ").read_bytes():
                marked.append(pid)
    return marked


def _end(which: Callable[[], list[int]]) -> int:
    """Kill processes until there are none; return how many were not about to go without that."""
    for _ in range(round(GONE_S / 0.02)):
        if not which():
            return 0
        time.sleep(0.02)
    first = len(which())
    for _ in range(200):
        pids = which()
        if not pids:
            break
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first: they may fork faster than they are killed
            for pid in pids:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
        time.sleep(0.01)
    return first


class _Watch:
    """The most that the processes below take, looked at while only one call is made."""

    def __init__(self, *, unseen: bool) -> None:
        self._unseen = unseen
        self._known = set(descendants())
        self._shared = _meminfo()
        self._disk = _disk(Path(tempfile.gettempdir()))
        self.processes, self.memory, self.machine, self.disk = 0, 0, 0, 0

    def look(self) -> None:
        mine = [pid for pid in descendants() if pid not in self._known]
        self.processes = max(self.processes, len(mine))
        of_files, of_kernel, of_machine = (now - then for now, then in zip(_meminfo(), self._shared, strict=True))
        self.memory = max(self.memory, sum(map(_resident, mine)), of_files + of_kernel)
        self.machine = max(self.machine, of_machine)
        self.disk = max(self.disk, _disk(Path(tempfile.gettempdir())) - self._disk)

    async def keep_looking(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(0.05)

    def breaches(self) -> list[str]:
        found = {
            f"{self.processes} processes": self.processes > MOST_PROCESSES,
            f"{self.memory >> 20} MiB of memory": self.memory > MOST_MEMORY,
            f"{self.machine >> 20} MiB of the machine's memory": self._unseen and self.machine > MOST_MEMORY_OF_MACHINE,
            f"{self.disk >> 20} MiB of disk": self.disk > MOST_DISK,
        }
        return [what for what, much in found.items() if much]


def _meminfo() -> tuple[int, int, int]:
    """Return the bytes of memory in memory files, in the kernel, and of all that is in use."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    amounts = {name: int(amount) * 1024 for name, amount, *_ in lines}
    return amounts["Shmem:"], amounts["SUnreclaim:"], amounts["MemTotal:"] - amounts["MemAvailable:"]


def _resident(pid: int) -> int:
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
    return 0


def _disk(folder: Path) -> int:
    def size(path: str) -> int:
        with suppress(OSError):
            return os.lstat(path).st_blocks * 512
        return 0

    return sum(size(os.path.join(place, name)) for place, _, names in os.walk(folder) for name in names)  # noqa: PTH118 - of many, and quickly


# One call


def _program(code: str, stage: Stage, level: str) -> str:
    names = {**stage.names, "LEVEL": level}
    assigned = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    # It takes long to import, and few need it.
    return assigned + ("import subprocess\n" if "subprocess" in code else "") + PRELUDE + code


def _invoker(setting: Setting, attack: Attack, stage: Stage) -> LocalMCPInvoker:
    return LocalMCPInvoker(
        sandbox=setting.level,
        packages=setting.packages,
        env={"ATTACK_TAG": stage.tag},
        output_chars=100_000,
        keep_files=attack.keep,
        read_paths=(str(stage.shown),) if attack.shows else (),
    )


def _leaks(result: ToolResult, canary: str) -> list[str]:
    texts = [result.text, *_strings(json.loads(json.dumps(result.parts, default=repr)))]
    for text in texts[1:]:
        with suppress(ValueError):
            texts.append(base64.b64decode(text, validate=True).decode("latin-1"))
    passwd = Path("/etc/passwd").read_bytes()
    looked_for = {
        "the secret came out": canary,
        "the secret came out in hexadecimal": canary.encode().hex(),
        "/etc/passwd was read": hashlib.sha256(passwd).hexdigest(),
        "/etc/passwd came out": passwd.decode(),
    }
    return [what for what, text in looked_for.items() if any(text in each for each in texts)]


def _strings(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case Mapping():
            yield from _strings(list(value.values()))
        case Sequence():
            for each in value:
                yield from _strings(each)


async def _reach(port: int) -> None:
    """Return once a connection to the port is made."""
    while True:
        with suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(0.05)


async def make_call(attack: Attack, setting: Setting, canary: str, signals: Counter[int]) -> Run:
    """Make one hostile call, end what it left, and return what came of it."""
    stage = Stage(attack, canary)
    aside = [asyncio.ensure_future(_reach(stage.free))] if "FREE" in attack.code else []
    watch = _Watch(unseen=attack.unseen) if attack.alone else None
    if watch:
        aside.append(asyncio.ensure_future(watch.keep_looking()))
    try:
        said: dict[str, Any] = {}
        over_s, survivors, breaches = -attack.timeout_s, 0, []
        signals.clear()
        for code in filter(None, (attack.code, attack.then)):
            call = {"code": _program(code, stage, setting.level), "timeout_s": attack.timeout_s}
            started = time.monotonic()
            result = await _result(_invoker(setting, attack, stage), json.dumps(call))
            over_s = max(over_s, time.monotonic() - started - attack.timeout_s)
            survivors += _end(lambda: _of_call(stage.tag))
            said = json.loads(result.text)
            breaches += _leaks(result, canary) + _words(said) + stage.breaches()
        if "FREE" in attack.code and aside[0].done():
            breaches.append("it was reached")
        breaches += watch.breaches() if watch else []
        breaches += ["it signalled its parent"] if attack.alone and signals else []
        breaches += [f"{survivors} survivors"] if survivors else []
    finally:
        for task in aside:
            task.cancel()
        stage.close()
    tried = "TRIED" in said["stdout"]
    level = said.get("sandbox", "off")
    shown = json.dumps(said)[:600]
    return Run(attack.name, level, tuple(dict.fromkeys(breaches)), survivors, round(over_s, 4), tried, shown)


async def _result(invoker: LocalMCPInvoker, arguments: str) -> ToolResult:
    try:
        return await invoker.call_openai_tool({"function": {"name": "exec_python", "arguments": arguments}})
    except (OSError, RuntimeError) as error:  # RecursionError is one; a call may raise nothing
        return ToolResult(text=json.dumps({"stdout": f"TRIED\nESCAPED the call raised {error!r}", "stderr": ""}))


def _words(said: Mapping[str, Any]) -> list[str]:
    """Return what the program says of having got through."""
    lines = said["stdout"].splitlines()
    found = [line.removeprefix("ESCAPED ") for line in lines if line.startswith("ESCAPED ")]
    if said["stdout"] == "forged":
        found.append("the result is forged")
    if len(said["stdout"]) + len(said["stderr"]) > MOST_RESULT_CHARS:
        found.append("the result is not bounded")
    return found


# The worker


async def _make_calls(attacks: Sequence[Attack], setting: Setting) -> None:
    canary, signals = os.environ[SECRET], Counter[int]()
    asyncio.get_running_loop().add_signal_handler(signal.SIGURG, lambda: signals.update([signal.SIGURG]))
    # The level is probed once in a process, before anything is measured.
    await _result(LocalMCPInvoker(sandbox=setting.level), json.dumps({"code": "pass"}))
    for attack in attacks:
        run = await make_call(attack, setting, canary, signals)
        if not run.tried and not run.breaches:  # the machine was too busy for it to begin in time
            first, patient = run, evolve(attack, timeout_s=4 * attack.timeout_s)
            run = await make_call(patient, setting, canary, signals)
            run = evolve(run, over_s=max(first.over_s, run.over_s))
        print(json.dumps(asdict(run)), flush=True)


def _work(setting: Setting, names: Sequence[str]) -> None:
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    by_name = {attack.name: attack for attack in ATTACKS}
    try:
        asyncio.run(_make_calls([by_name[name] for name in names], setting))
        # Very many folders in each other, which only basic and off have, are removed after the result.
        patient_until = time.monotonic() + REMOVED_S
        while (left := [str(path) for path in Path(tempfile.gettempdir()).iterdir()]) and setting.level != "strict":
            if time.monotonic() > patient_until:
                break
            time.sleep(0.1)
        print(json.dumps({"processes": _end(descendants), "files": left}), flush=True)
    finally:
        _end(descendants)


@frozen
class Outcome:
    """What came of many hostile calls."""

    runs: tuple[Run, ...]
    processes: int
    """Processes that were left at the end, whoever's they were."""
    files: tuple[str, ...]
    """Files that were left in the folder for temporary ones."""


def attacks_at(level: str, *, root: bool, only: str = "") -> list[Attack]:
    """Return the attacks that can be made at a level, by root or not."""
    return [
        attack
        for attack in ATTACKS
        if only in attack.name and (level == "strict" or not attack.strict_only) and (root or not attack.root_only)
    ]


@contextmanager
def _worker(setting: Setting, names: Sequence[str]) -> Iterator["subprocess.Popen[str]"]:
    site, user = sysconfig.get_paths()["purelib"], setting.user
    asked = ["--worker", "--level", setting.level, *([] if setting.packages else ["--no-packages"]), "--names", *names]
    folder = tempfile.mkdtemp(prefix="attacks-")
    with ExitStack() as closing:
        # Some attacks leave more folders in folders than shutil.rmtree can follow.
        closing.callback(subprocess.run, ["rm", "-rf", folder], check=False)
        # Root's Python is under its home, where nobody else may go.
        python = sys.executable if user is None else "/usr/bin/python3"
        if user is not None:
            os.chown(folder, user, user)
        Path(folder).chmod(0o711)  # calls of root's have a uid of their own, and their folder at basic is in here
        # Nothing of our own environment: what gets through is printed.
        environment = {
            "HOME": folder,
            "PATH": os.environ.get("PATH", os.defpath),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": f"{ROOT}:{site}",
            "TMPDIR": folder,
            SECRET: f"canary-{secrets.token_hex(16)}",
        }
        worker = subprocess.Popen(
            [python, "-m", "tests.attacks", *asked],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
            start_new_session=True,
        )
        try:
            yield worker
        finally:
            worker.kill()
            worker.wait()


def run_attacks(setting: Setting, attacks: Sequence[Attack], *, workers: int = 4) -> Outcome:
    """Make hostile calls, and return what came of them.

    Each worker makes one call after the other; a call that must be alone waits until only it is left.

    Raises:
        RuntimeError: a worker ended before it was done.
    """
    together = [attack.name for attack in attacks if not attack.alone]
    shares = [together[first::workers] for first in range(workers) if together[first::workers]]
    alone = [attack.name for attack in attacks if attack.alone]
    with ThreadPoolExecutor(workers) as pool:
        outcomes = list(pool.map(lambda names: _run_worker(setting, names), shares))
    outcomes += [_run_worker(setting, alone)] if alone else []
    return Outcome(
        runs=tuple(run for outcome in outcomes for run in outcome.runs),
        processes=sum(outcome.processes for outcome in outcomes),
        files=tuple(name for outcome in outcomes for name in outcome.files),
    )


def _run_worker(setting: Setting, names: Sequence[str]) -> Outcome:
    with _worker(setting, names) as worker:
        assert worker.stdout is not None
        *lines, last = [json.loads(line) for line in worker.stdout] or [{}]
    if "processes" not in last:
        made = len(lines) + bool(last)
        raise RuntimeError(f"a worker ended after {made} calls; the next was {names[made]!r}")
    runs = tuple(Run(**{**line, "breaches": tuple(line["breaches"])}) for line in lines)
    return Outcome(runs, last["processes"], tuple(last["files"]))


# What is told


def distribution(runs: Sequence[Run]) -> str:
    """Return how far results came behind their deadlines, of the calls that reached them."""
    late = sorted(1000 * run.over_s for run in runs if run.over_s > 0)
    if not late:
        return f"{len(runs)} calls, none reached its deadline"
    p99 = late[min(len(late) - 1, int(0.99 * len(late)))]
    return (
        f"{len(runs)} calls, {len(late)} of them ended by the deadline; results after it, in ms: "
        f"min {late[0]:.0f}, median {statistics.median(late):.0f}, p99 {p99:.0f}, max {late[-1]:.0f}"
    )


def table(outcomes: Mapping[str, Outcome]) -> str:
    """Return a row for each attack: what came of it at each level."""
    by_level = {level: {run.name: run for run in outcome.runs} for level, outcome in outcomes.items()}
    lines = [f"| a call that ... | {' | '.join(by_level)} |", f"|---|{'---|' * len(by_level)}"]
    for attack in ATTACKS:
        cells = [_cell(runs.get(attack.name)) for runs in by_level.values()]
        lines.append(f"| {attack.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(run: Run | None) -> str:
    if run is None:
        return "not run"
    if not run.tried:
        return "did not start"
    what = "; ".join(run.breaches)[:60].replace("|", " ").replace("\n", " ")
    return f"**through**: {what}" if run.breaches else "stopped"


def summary(outcomes: Mapping[str, Outcome]) -> str:
    """Return a row for each aim: at each level, how many attacks got through, of how many."""
    aims = dict.fromkeys(attack.aim for attack in ATTACKS)
    lines = [f"| got through | {' | '.join(outcomes)} |", f"|---|{'---|' * len(outcomes)}"]
    for aim in aims:
        names = {attack.name for attack in ATTACKS if attack.aim == aim}
        cells = []
        for outcome in outcomes.values():
            runs = [run for run in outcome.runs if run.name in names]
            cells.append(f"{sum(bool(run.breaches) for run in runs)} of {len(runs)}")
        lines.append(f"| {aim} | {' | '.join(cells)} |")
    for level, outcome in outcomes.items():
        if level != "off":
            through = [run.name for run in outcome.runs if run.breaches]
            lines.append(f"\nAt `{level}` gets through a call that: {', '.join(through) or 'nothing'}.")
    return "\n".join(lines)


def main() -> None:
    """Make the calls that the command line asks for, and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", choices=LEVELS, help="only this one")
    parser.add_argument("--only", default="", help="attacks with this in their names")
    parser.add_argument("--calls", type=int, default=0, help="go round until so many calls are made")
    parser.add_argument("--workers", type=int, default=4, help="calls at a time")
    parser.add_argument("--nobody", action="store_true", help="as an ordinary user, if started as root")
    parser.add_argument("--table", action="store_true", help="print the tables")
    parser.add_argument("--no-packages", action="store_true", help="start Python without what is installed")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--names", nargs="*", default=[], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        _work(Setting(asked.level, not asked.no_packages), asked.names)
        return
    root = os.getuid() == 0
    outcomes = {}
    for level in (asked.level,) if asked.level else LEVELS if asked.table else LEVELS[:1]:
        # At basic, root's calls can't be made where its Python is under its home.
        user = NOBODY if root and (asked.nobody or level == "basic") else None
        attacks = attacks_at(level, root=root and user is None, only=asked.only)
        rounds = attacks * -(-(asked.calls or 1) // len(attacks))
        outcomes[level] = outcome = run_attacks(
            Setting(level, not asked.no_packages, user), rounds[: asked.calls or None], workers=asked.workers
        )
        reached = dict(Counter(run.level for run in outcome.runs))
        print(f"{level} (reached: {reached}): {distribution(outcome.runs)}")
        print(f"left: {outcome.processes} processes, files {outcome.files}")
        if not asked.table:
            for run in sorted(outcome.runs, key=lambda run: -run.over_s):
                if run.breaches or not run.tried or run.over_s > SLACK_S or asked.only:
                    print(f"  {run.name}: {run.over_s * 1000:+.0f} ms, {run.breaches}, {run.said}")
    if asked.table:
        print(f"\n{summary(outcomes)}\n\n{table(outcomes)}")


if __name__ == "__main__":
    main()
