"""The sandbox below the tools: what each layer alone keeps out, what honest programs can do, and what is left after."""

import ctypes
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from textwrap import dedent
from typing import Any
from uuid import uuid4

import attrs
import pytest
from attrs import frozen

from agent_fsm.tools.sandbox import Confinement, Level, Report, launch, probe, python_argv
from tests.honest_scripts import SCRIPTS

pytestmark = pytest.mark.skipif(probe().level != "strict", reason=f"strict doesn't hold here: {probe().why}")

BASIC_PYTHON = shutil.which("python3", path="/usr/bin") if os.geteuid() == 0 else sys.executable
"""A Python that another user can start: at basic nothing shows what lies under root's home."""
needs_landlock = pytest.mark.skipif("Landlock" in probe().why, reason="there is no Landlock here")
needs_basic = pytest.mark.skipif(not BASIC_PYTHON or "Landlock" in probe().why, reason="basic doesn't hold here")
TIMEOUT_S = 30.0
SLACK_S = 5.0
"""Seconds in which the kernel ends killed processes, on a machine that others use too."""
NEWUSER = 0x10000000


@frozen
class Done:
    """What came of a contained program."""

    rc: int
    stdout: str
    stderr: str
    report: Report


def start(launched: Any, descriptors: Sequence[int] = ()) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        launched.argv,
        env=launched.env,
        cwd=launched.cwd,
        pass_fds=(*launched.pass_fds, *descriptors),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: "subprocess.Popen[str]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(TIMEOUT_S)
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def run(
    code: str = "",
    level: Level = "strict",
    *,
    argv: Sequence[str] = (),
    keep: Sequence[str] = (),
    without: Sequence[str] = (),
    descriptors: Sequence[int] = (),
    **bounds: Any,
) -> Done:
    confinement = Confinement(level, packages=False, **bounds)
    command = argv or python_argv(confinement)
    if level == "basic" and not argv:
        command = [str(BASIC_PYTHON), *command[1:]]
    script = dedent(code).encode()
    with launch(command, confinement, script=script, keep=keep, without=frozenset(without)) as launched:
        process = start(launched, descriptors)
        try:
            stdout, stderr = process.communicate(timeout=TIMEOUT_S)
        finally:
            end(process)
        return Done(process.returncode, stdout, stderr, launched.report())


def running(marker: str) -> list[int]:
    """The processes whose command line has *marker* in it."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and marker.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def descriptors_open() -> list[str]:
    # the one that lists them is gone, and its number free, by the time it is looked at
    return sorted(path.name for path in Path("/proc/self/fd").iterdir() if path.is_symlink())


def soon_gone(marker: str, slack_s: float = SLACK_S) -> bool:
    deadline = time.monotonic() + slack_s
    while time.monotonic() < deadline:
        if not running(marker):
            return True
        time.sleep(0.02)
    return False


def soon_removed(folder: Path) -> bool:
    deadline = time.monotonic() + SLACK_S
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not folder.exists()


@pytest.fixture
def outside() -> Iterator[Path]:
    """A folder with a file that any user of this machine can read and write."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        folder.chmod(0o777)
        (folder / "file").write_text("outside")
        (folder / "file").chmod(0o666)
        yield folder


# Honest programs


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_honest_script_works_at_strict(name: str) -> None:
    done = run(SCRIPTS[name])

    assert (done.rc, done.stdout[-3:], done.report) == (0, "ok\n", Report()), done


def test_there_are_at_least_50_honest_scripts() -> None:
    assert len(SCRIPTS) >= 50


@pytest.mark.parametrize("level", ["strict", pytest.param("basic", marks=needs_basic), "off"])
def test_exit_codes_and_signals_are_the_programs_own(level: Level) -> None:
    ends = [run(f"import os, signal; {each}", level).rc for each in ("os._exit(7)", "os.kill(os.getpid(), 15)", "1/0")]

    assert ends == [7, -15, 1]


@pytest.mark.parametrize("level", ["strict", pytest.param("basic", marks=needs_basic), "off"])
def test_the_environment_has_what_is_given_and_no_key(level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sk-secret")

    done = run("import os; print(os.environ.get('SOME_API_KEY'), os.environ['GIVEN'])", level, env={"GIVEN": "x"})

    assert done.stdout == "None x\n"


def test_a_program_can_be_any_on_the_machine() -> None:
    assert run(argv=["/bin/sh", "-c", "echo $0 $1", "a", "b"]).stdout == "a b\n"


@pytest.mark.parametrize("level", ["strict", pytest.param("basic", marks=needs_basic)])
def test_a_program_that_is_not_there_is_an_error_with_its_name(level: Level) -> None:
    done = run(level=level, argv=["/usr/bin/no-such-program"])

    assert done.rc == 125
    assert done.report.error == "No such file or directory (/usr/bin/no-such-program): ENOENT"


# What each layer keeps out

CALLS = {
    "unshare": f"libc.unshare({NEWUSER})",
    "clone": f"libc.syscall({56 if platform.machine() == 'x86_64' else 220}, {NEWUSER} | 17, 0, 0, 0, 0) or exit()",
    "memfd_create": "libc.memfd_create(b'x', 0)",
    "keyctl": f"libc.syscall({250 if platform.machine() == 'x86_64' else 219}, 0, -3, 1)",
    "pidfd_getfd": "libc.syscall(438, os.pidfd_open(os.getpid()), 0, 0)",
    "prlimit_of_others": "libc.prlimit(os.fork() or time.sleep(9) or 1, 7, 0, ctypes.create_string_buffer(16))",
}
"""Calls that work where no filter denies them, each in a process of its own."""


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_only_seccomp_denies_it(call: str) -> None:
    code = f"import ctypes, os, time; libc = ctypes.CDLL(None); print('got', {call})"

    kept, let = run(code), run(code, without=["seccomp"])

    assert kept.stdout == "got -1\n", kept
    assert let.stdout.startswith("got ") and "-1" not in let.stdout, let


def test_without_the_mount_namespace_outside_files_are_found_and_nothing_else_keeps_them_out(outside: Path) -> None:
    code = ["/bin/sh", "-c", f"test -e {outside}/file"]

    found = [run(argv=code, without=without).rc for without in ([], ["mounts"])]

    assert found == [1, 0]


@needs_landlock
def test_landlock_is_the_second_line_where_mounts_fail(outside: Path) -> None:
    code = ["/bin/sh", "-c", f"cat {outside}/file; echo x >> {outside}/file"]

    second = run(argv=code, without=["mounts"])
    untouched = (outside / "file").read_text()
    none = run(argv=code, without=["mounts", "landlock"])

    assert (second.stdout, untouched) == ("", "outside")
    assert (none.stdout, (outside / "file").read_text()) == ("outside", "outsidex\n")


def test_only_the_network_namespace_keeps_datagrams_in() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(0.2)
        code = f"""
            import socket
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'out', {server.getsockname()})
            """
        run(code)
        with pytest.raises(TimeoutError):
            server.recv(10)
        run(code, without=["network"])

        assert server.recv(10) == b"out"


@needs_landlock
def test_landlock_is_the_second_line_where_the_network_namespace_fails() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"import socket; socket.create_connection({server.getsockname()}, 5)"

        ends = [run(code, without=without).rc for without in ([], ["network"], ["network", "landlock"])]

        assert ends == [1, 1, 0]


DAEMON = """
    import os, subprocess, sys
    if not os.fork():
        os.setsid()
        if not os.fork():
            os.execlp('sleep', 'sleep', '{seconds}')
        os._exit(0)
    os.wait(); print('started', flush=True)
    os.execlp('sleep', 'sleep', '{seconds}')
    """


def left_after_a_kill(marker: str, without: Sequence[str] = ()) -> bool:
    """Whether a daemon outlives the kill of the outer process, and of it alone."""
    confinement = Confinement("strict", packages=False)
    script = dedent(DAEMON.format(seconds=marker)).encode()
    with launch(python_argv(confinement), confinement, script=script, without=frozenset(without)) as launched:
        process = start(launched)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            process.kill()
            process.wait(TIMEOUT_S)
            return not soon_gone(marker, 1.0 if without else SLACK_S)
        finally:
            for pid in running(marker):
                os.kill(pid, signal.SIGKILL)
            end(process)


def test_only_the_process_namespace_ends_daemons() -> None:
    # seconds that no other process sleeps for
    markers = [f"12345.{uuid4().int % 10**12}" for _ in range(2)]

    assert [left_after_a_kill(markers[0]), left_after_a_kill(markers[1], ["processes"])] == [False, True]


def test_ipc_namespace_and_seccomp_each_keep_shared_memory_out() -> None:
    libc = ctypes.CDLL(None)
    key = uuid4().int % 2**30 + 1
    made = libc.shmget(key, 4096, 0o1666)
    try:
        code = f"import ctypes; print(ctypes.CDLL(None).shmget({key}, 4096, 0) >= 0)"
        found = [run(code, without=each).stdout for each in ([], ["ipc"], ["seccomp"], ["ipc", "seccomp"])]
    finally:
        libc.shmctl(made, 0, None)

    assert found == ["False\n", "False\n", "False\n", "True\n"]


def test_only_closing_them_keeps_inherited_descriptors_out() -> None:
    read, write = os.pipe()
    os.write(write, b"secret")
    try:
        code = f"import os; print(os.read({read}, 6))"
        kept = run(code, descriptors=[read])
        let = run(code, descriptors=[read], without=["descriptors"])
    finally:
        os.close(read)
        os.close(write)

    assert (kept.stdout, let.stdout) == ("", "b'secret'\n")


def test_nothing_of_the_machine_is_visible() -> None:
    code = """
        import os, pathlib
        print(sorted(os.listdir('/')), sorted(each for each in os.listdir('/proc') if each.isdigit()))
        print(pathlib.Path('/etc/passwd').read_text().split(':')[0], os.path.exists('/home'), os.path.exists('/var'))
        try: open('/usr/x', 'w')
        except OSError as error: print(error.strerror)
        """

    done = run(code)

    shown, *rest = done.stdout.splitlines()
    assert "'home'" not in shown
    assert shown.endswith("['1', '2']")
    assert rest[0] == "sandbox False False"
    assert rest[1] in ("Read-only file system", "Permission denied")


def test_the_supervisor_cannot_be_looked_into_or_stopped() -> None:
    code = """
        import os, signal
        for path in ('environ', 'mem', 'fd', 'maps'):
            try: os.listdir('/proc/1/fd') if path == 'fd' else open(f'/proc/1/{path}', 'rb').read(1)
            except PermissionError: print('denied')
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL): os.kill(1, number)
        print('alive')
        """

    done = run(code)

    assert (done.rc, done.stdout.split()) == (0, ["denied"] * 4 + ["alive"]), done


# Opt-ins


def test_paths_are_shown_as_asked_for(outside: Path) -> None:
    (outside / "link").symlink_to("file")
    code = f"""
        print(open('{outside}/link').read())
        try: open('{outside}/new', 'w').write('x')
        except OSError as error: print('denied')
        """

    read = run(code, read_paths=(str(outside),))
    written = run(code, write_paths=(str(outside),))

    assert read.stdout == "outside\ndenied\n"
    assert written.stdout == "outside\n"
    assert (outside / "new").read_text() == "x"


def test_what_is_shown_is_used_as_its_owner_would(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "own").write_text("mine")
    (tmp_path / "own").chmod(0o600)
    code = f"print(open('{tmp_path}/own').read()); open('{tmp_path}/new', 'w').write('x')"

    read = run(code, read_paths=(str(tmp_path),))
    written = run(code, write_paths=(str(tmp_path),))

    assert (read.stdout, read.rc) == ("mine\n", 1)
    assert (written.stdout, written.rc) == ("mine\n", 0), written
    assert (tmp_path / "new").stat().st_uid == os.getuid()


@pytest.mark.parametrize("path", ["relative", "/", "/proc", "/proc/1", "/tmp/../etc"])
def test_a_path_that_would_show_too_much_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="show"):
        run(read_paths=(path,))


def test_the_network_is_there_when_asked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"import socket; socket.create_connection({server.getsockname()}, 5); print('connected')"

        assert run(code, network=True).stdout == "connected\n"


@pytest.mark.skipif(not attrs.__file__.startswith(sys.prefix), reason="attrs is not this interpreter's own package")
def test_installed_packages_can_be_left_out() -> None:
    code = b"import importlib.util; print(importlib.util.find_spec('attrs') is not None)"
    found = []
    for packages in (True, False):
        confinement = Confinement("strict", packages=packages)
        with launch(python_argv(confinement), confinement, script=code) as launched:
            process = start(launched)
            try:
                found.append(process.communicate(timeout=TIMEOUT_S)[0])
            finally:
                end(process)

    assert found == ["True\n", "False\n"]


# Bounds


def test_disk_use_is_bounded_over_all_private_folders() -> None:
    code = """
        import errno, itertools
        written = 0
        try:
            for number in itertools.count():
                folder = ('/work', '/tmp', '/dev/shm')[number % 3]
                with open(f'{folder}/{number}', 'wb') as file: file.write(b'x' * 2**20)
                written += 1
        except OSError as error: print(written < 8, error.errno == errno.ENOSPC)
        """

    assert run(code, disk_bytes=8 * 2**20).stdout == "True True\n"


def test_the_number_of_files_is_bounded() -> None:
    code = """
        try:
            for number in range(1000): open(str(number), 'w').close()
        except OSError as error: print(error.strerror, number <= 50)
        """

    assert run(code, files=50).stdout == "No space left on device True\n"


def test_the_number_of_processes_is_bounded() -> None:
    code = """
        import os, time
        try:
            for number in range(100):
                if not os.fork(): time.sleep(30)
        except BlockingIOError: print(number)
        """

    assert int(run(code, processes=10).stdout) in (8, 9)


def test_one_process_gets_a_memory_error() -> None:
    code = """
        try: bytearray(2**30)
        except MemoryError: print('refused')
        """

    assert run(code).stdout == "refused\n"


FAMILY = """
    import os, time
    for _ in range(6):
        if not os.fork():
            data = bytearray(40 * 2**20); data[::4096] = b'x' * len(data[::4096]); time.sleep(30)
    time.sleep(30)
    """


@pytest.mark.parametrize("level", ["strict", pytest.param("basic", marks=needs_basic)])
def test_the_memory_of_all_processes_together_is_bounded(level: Level) -> None:
    done = run(FAMILY, level, memory_bytes=128 * 2**20)

    assert (done.rc, done.report.killed_for) == (-9, "memory")


def test_memory_that_is_shared_is_counted() -> None:
    code = """
        import mmap, os, time
        for _ in range(4):
            if not os.fork():
                data = mmap.mmap(-1, 40 * 2**20); data.write(b'x' * len(data)); time.sleep(30)
        time.sleep(30)
        """

    assert run(code, memory_bytes=128 * 2**20).report.killed_for == "memory"


def test_what_sockets_hold_is_counted() -> None:
    code = """
        import socket, time
        held = [socket.socketpair() for _ in range(100)]
        for pair in held:
            pair[0].setblocking(False)
            try:
                while True: pair[0].send(bytes(65536))
            except BlockingIOError: pass
        time.sleep(30)
        """

    assert run(code, memory_bytes=40 * 2**20).report.killed_for == "memory"


def test_cpu_time_is_bounded() -> None:
    assert run("while True: pass", cpu_s=1).rc == -signal.SIGXCPU


@needs_basic
def test_at_basic_too_much_on_disk_is_found_and_ends_it() -> None:
    code = """
        import time
        for number in range(20): open(str(number), 'wb').write(b'x' * 2**20)
        time.sleep(30)
        """

    done = run(code, "basic", disk_bytes=8 * 2**20)

    assert (done.rc, done.report.killed_for) == (-9, "disk")


# Level basic


@needs_basic
def test_basic_keeps_files_sockets_signals_and_groups_in(outside: Path) -> None:
    code = f"""
        import os, socket, subprocess, tempfile
        def tried(action):
            try: action()
            except OSError: return 'denied'
            return 'done'
        print(tried(lambda: open('{outside}/file').read()), tried(lambda: open('{outside}/file', 'a')))
        print(tried(lambda: socket.socket()), tried(lambda: socket.socket(socket.AF_UNIX)), tried(os.setsid))
        print(tried(lambda: socket.socketpair(type=socket.SOCK_DGRAM)), tried(lambda: os.kill({os.getpid()}, 0)))
        print(tried(socket.socketpair), tried(tempfile.TemporaryFile), tried(lambda: subprocess.run(['true'])))
        """

    done = run(code, "basic")

    assert done.stdout.split() == ["denied"] * 7 + ["done"] * 3, done


@needs_basic
@pytest.mark.skipif(os.geteuid() == 0, reason="as root the process's user owns nothing outside")
def test_basic_changes_no_modes_outside_and_copies_work(outside: Path) -> None:
    code = f"""
        import os, shutil
        os.chmod('{outside}/file', 0); os.utime('{outside}/file', (0, 0)); open('a', 'w'); shutil.copy2('a', 'b')
        """
    before = (outside / "file").stat()

    done = run(code, "basic")

    assert (done.rc, (outside / "file").stat()) == (0, before)


@needs_basic
def test_basic_leaves_no_process() -> None:
    marker = f"12345.{uuid4().int % 10**12}"

    done = run(f"import subprocess; subprocess.Popen(['sleep', '{marker}']); print('x')", "basic")

    assert (done.rc, done.stdout) == (0, "x\n")
    assert soon_gone(marker)


# Levels


def test_the_level_reached_says_what_keeps_it_from_the_next() -> None:
    basic = probe(frozenset({"namespaces"}))

    assert probe().level == "strict"
    assert basic.why.startswith("strict: namespaces are missing")
    assert basic.level == "basic" or "basic: Permission denied" in basic.why  # as root with Python under root's home
    assert probe(frozenset({"landlock"})).level == "strict"
    assert probe(frozenset({"landlock"})).why
    assert probe(frozenset({"seccomp"})).level == "off"
    assert probe(frozenset({"namespaces", "landlock"})).level == "off"


@pytest.mark.skipif(not shutil.which("unshare"), reason="nothing to use user namespaces up with")
def test_where_user_namespaces_are_used_up_basic_is_what_holds() -> None:
    code = "from agent_fsm.tools.sandbox import probe; print(probe())"
    command = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" -c "$1"'

    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", command, sys.executable, code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        cwd=Path(__file__).parent.parent,
        text=True,
        timeout=TIMEOUT_S,
    )

    if done.stderr.startswith("unshare:"):
        pytest.skip(done.stderr)
    assert "strict: unshare: No space left on device: ENOSPC" in done.stdout, done
    assert "level='basic'" in done.stdout


# Files that are kept


@pytest.mark.parametrize("level", ["strict", pytest.param("basic", marks=needs_basic), "off"])
def test_files_asked_for_are_kept_and_links_are_not_followed(level: Level) -> None:
    code = """
        import os
        os.makedirs('a/b')
        for path in ('one.txt', 'two.csv', 'a/three.txt', 'a/b/four.txt'): open(path, 'w').write(path)
        os.symlink('/etc/passwd', 'linked.txt'); os.symlink('/etc', 'a/c'); os.mkfifo('pipe.txt')
        """

    some = run(code, level, keep=["*.txt", "a/*.txt"])
    every = run(code, level, keep=["**/*"])

    assert some.report == Report(kept={"one.txt": b"one.txt", "a/three.txt": b"a/three.txt"})
    assert sorted(every.report.kept) == ["a/b/four.txt", "a/three.txt", "one.txt", "two.csv"]


def test_files_that_are_too_large_to_keep_are_named() -> None:
    done = run("open('big', 'wb').write(b'x' * 3_000_000); open('small', 'w')", keep=["*"], disk_bytes=2**22)

    assert (sorted(done.report.kept), done.report.note) == (["big", "small"], "")
    done = run("for n in range(70): open(f'{n:02}', 'w')", keep=["*"])
    assert len(done.report.kept) == 64
    assert done.report.note.startswith("6 of the files to keep were left out")


# Nothing is left


def test_all_ends_when_the_caller_is_killed() -> None:
    marker = f"12345.{uuid4().int % 10**12}"
    caller = f"""
        import subprocess, sys
        from agent_fsm.tools.sandbox import Confinement, launch, python_argv
        confinement = Confinement("strict", packages=False)
        script = {dedent(DAEMON.format(seconds=marker)).encode()!r}
        with launch(python_argv(confinement), confinement, script=script) as l:
            subprocess.run(l.argv, env=l.env, cwd=l.cwd, pass_fds=l.pass_fds, start_new_session=True)
        """
    process = subprocess.Popen(
        [sys.executable, "-c", dedent(caller)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        there = running(marker)
        process.kill()
        process.wait(TIMEOUT_S)

        assert there
        assert soon_gone(marker)
    finally:
        process.kill()
        for pid in running(marker):
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=TIMEOUT_S)


def test_all_ends_when_the_context_is_left() -> None:
    marker = f"12345.{uuid4().int % 10**12}"
    confinement = Confinement("strict", packages=False)
    with launch(["/bin/sh", "-c", f"echo started; sleep {marker}"], confinement) as launched:
        process = start(launched)
        assert process.stdout is not None
        process.stdout.readline()
    try:
        process.wait(SLACK_S)

        assert soon_gone(marker)
    finally:
        end(process)


@pytest.mark.parametrize("level", ["strict", pytest.param("basic", marks=needs_basic), "off"])
def test_no_descriptor_folder_or_mount_is_left(level: Level) -> None:
    deep = """
        import os
        print(os.getcwd())
        for _ in range(300): os.mkdir('d' * 100); os.chdir('d' * 100)
        open('file', 'w'); os.chmod('.', 0o500); os.chmod('..', 0)
        """
    run("", level)  # what is opened once and stays open
    mounts = Path("/proc/self/mounts").read_text()
    descriptors = descriptors_open()

    with pytest.raises(RuntimeError), launch(["true"], Confinement(level), script=b"") as launched:
        unused = launched.folder
        raise RuntimeError
    used = run(deep, level)

    assert used.rc == 0, used
    assert level == "strict" or soon_removed(Path(unused).parent)
    assert level == "strict" or soon_removed(Path(used.stdout.strip()).parent)
    assert descriptors_open() == descriptors
    assert Path("/proc/self/mounts").read_text() == mounts


def at_once(count: int) -> list[tuple[int, str]]:
    def one(number: int) -> tuple[int, str]:
        done = run(f"print({number})")
        return done.rc, done.stdout + done.report.error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_ten_at_once_all_work() -> None:
    assert at_once(10) == [(0, f"{number}\n") for number in range(10)]


@pytest.mark.slow
def test_fifty_at_once_all_work() -> None:
    assert at_once(50) == [(0, f"{number}\n") for number in range(50)]
