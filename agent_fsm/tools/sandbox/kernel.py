"""System calls that the standard library doesn't have: namespaces, mounts, Landlock, seccomp, capabilities.

It runs inside, at each start: what it imports costs every call, so it imports little and imports nothing else of ours.
"""

import ctypes
import os
import stat

TYPE_CHECKING = False  # typing would take 5 ms of each start
if TYPE_CHECKING:
    from collections.abc import Iterable

NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    *(0x00020000, 0x02000000, 0x04000000, 0x08000000),
    *(0x10000000, 0x20000000, 0x40000000),
)
READ_ONLY, NO_SUID, NO_DEVICES, NO_EXEC = 1, 2, 4, 8
"""Attributes of mounts."""
_ID_MAP = 0x00100000
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}
_OPEN_TREE, _MOVE_MOUNT, _CLOSE_RANGE, _MOUNT_SETATTR = 428, 429, 436, 442
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE, _TREE_CLONE = -100, 0x1000, 0x8000, 1
_MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x4000, 0x40000, 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 4, 22, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(name: str, answer: int) -> int:
    if answer < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return answer


def _syscall(name: str, number: int, *arguments: object) -> int:
    # A bare int would be passed as 32 bits
    wide = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    return _checked(name, _libc.syscall(ctypes.c_long(number), *wide))


def _prctl(name: str, option: int, *arguments: int) -> int:
    padded = [ctypes.c_ulong(each) for each in (*arguments, 0, 0, 0, 0)[:4]]
    return _checked(name, _libc.prctl(option, *padded))


# Processes


def unshare(flags: int) -> None:
    """Give this process new namespaces."""
    _checked("unshare", _libc.unshare(flags))


def set_hostname(name: bytes) -> None:
    """Name the machine, in a namespace of its own."""
    _checked("sethostname", _libc.sethostname(name, ctypes.c_size_t(len(name))))


def die_with_parent(signal: int) -> None:
    """Have that signal sent to this process when the thread that started it ends."""
    _prctl("PR_SET_PDEATHSIG", _PR_SET_PDEATHSIG, signal)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose parent ends."""
    _prctl("PR_SET_CHILD_SUBREAPER", _PR_SET_CHILD_SUBREAPER, 1)


def set_dumpable(dumpable: bool) -> None:
    """Set whether processes of the same user may look into this one."""
    _prctl("PR_SET_DUMPABLE", _PR_SET_DUMPABLE, int(dumpable))


def close_above(lowest: int, highest: int = 0xFFFFFFFF) -> None:
    """Close the descriptors of that range."""
    _syscall("close_range", _CLOSE_RANGE, lowest, highest, 0)


def drop_capability_bounds() -> None:
    """Make that no program can bring capabilities back."""
    for capability in range(64):
        try:
            _prctl("PR_CAPBSET_DROP", _PR_CAPBSET_DROP, capability)
        except OSError:  # EINVAL past the last one; EPERM where there are none to drop
            return


def drop_capabilities() -> None:
    """Give up every capability."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _syscall("capset", _CAPSET[os.uname().machine], header, (ctypes.c_uint32 * 6)())


def gain_nothing() -> None:
    """Make that no program run from here on gives rights that this process doesn't have."""
    _prctl("PR_SET_NO_NEW_PRIVS", _PR_SET_NO_NEW_PRIVS, 1)


def filter_calls(program: bytes) -> None:
    """Put a seccomp filter over this process and all that it starts."""
    code = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    whole = Program(len(program) // 8, ctypes.addressof(code))
    _prctl("PR_SET_SECCOMP", _PR_SET_SECCOMP, 2, ctypes.addressof(whole))


# Mounts


def make_private() -> None:
    """Keep every mount made from here on from showing outside."""
    _checked("mount /", _libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None))


def mount(kind: str, target: str, options: str, attributes: int = 0) -> None:
    """Mount a new file system of that kind."""
    arguments = (kind.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(attributes), options.encode())
    _checked(f"mount {kind}", _libc.mount(*arguments))


def clone_tree(path: str, attributes: int) -> int:
    """Return the descriptor of a copy, mounted nowhere, of what is at *path*, with those attributes in all of it."""
    flags = _TREE_CLONE | os.O_CLOEXEC | _AT_RECURSIVE
    tree = _syscall(f"open_tree {path}", _OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags)
    set_attributes(tree, "", attributes, _AT_EMPTY_PATH | _AT_RECURSIVE)
    return tree


def lend(tree: int, users: int) -> None:
    """Show the files of a copy that `clone_tree` returned as owned by other users, as the namespace *users* maps them.

    Raises:
        OSError: the file system can't do that.
    """
    set_attributes(tree, "", _ID_MAP, _AT_EMPTY_PATH | _AT_RECURSIVE, users)


def set_attributes(folder: int, path: str, attributes: int, flags: int = 0, users: int = 0) -> None:
    """Add attributes to a mount."""
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, users)
    size = ctypes.sizeof(wanted)
    _syscall(f"mount_setattr {path}", _MOUNT_SETATTR, folder, os.fsencode(path), flags, wanted, size)


def move_mount(tree: int, target: str) -> None:
    """Mount at *target* what `clone_tree` returned, and close its descriptor."""
    _syscall(f"move_mount {target}", _MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(target), 4)
    os.close(tree)


def unmount(target: str) -> None:
    """Take a mount away, for what looks for it from here on."""
    _checked(f"umount {target}", _libc.umount2(os.fsencode(target), _MNT_DETACH))


def enter_root() -> None:
    """Make the current folder, which must be a mount, the root, and let go of the old one."""
    _syscall("pivot_root", _PIVOT_ROOT[os.uname().machine], b".", b".")
    unmount(".")
    os.chdir("/")


def freeze_root() -> None:
    """Make the root's own file system read-only."""
    set_attributes(_AT_FDCWD, "/", READ_ONLY)


# Landlock

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE, _IOCTL_DEV = 1, 2, 4, 8, 1 << 14, 1 << 15
_MAKE_CHAR, _MAKE_BLOCK = 1 << 6, 1 << 11
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_ALL = (1 << 16) - 1
_ACCESS = {
    "list": _READ_DIR,
    "read": _READ,
    "device": _READ_FILE | _WRITE_FILE | _TRUNCATE | _IOCTL_DEV,
    "write": _ALL & ~(_MAKE_CHAR | _MAKE_BLOCK | _IOCTL_DEV),
}


def landlock_version() -> int:
    """Return the version of Landlock's interface.

    Raises:
        OSError: there is no Landlock.
    """
    return _syscall("landlock_create_ruleset", _CREATE_RULESET, None, 0, 1)


def restrict(rules: "Iterable[tuple[str, str]]", *, network: bool) -> None:
    """Leave only what *rules* name: pairs of a path and "list", "read", "device" or "write". A path may be missing.

    *network*: whether TCP ports may be bound and connected to.
    """
    version = landlock_version()
    files = _ALL if version >= 5 else (1 << (13, 14, 15, 15)[version - 1]) - 1
    # version 4 knows TCP, 6 signals and abstract sockets
    handled = (ctypes.c_uint64 * 3)(files, 0 if network or version < 4 else 3, 0 if version < 6 else 3)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _syscall("landlock_create_ruleset", _CREATE_RULESET, handled, size, 0)
    for path, kind in rules:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # what isn't there or can't be reached needs no rule
            continue
        access = _ACCESS[kind] & files
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            access &= _OF_FILES
        rule = access.to_bytes(8, "little") + place.to_bytes(4, "little")  # a packed struct
        _syscall(f"landlock_add_rule {path}", _ADD_RULE, ruleset, 1, rule, 0)
        os.close(place)
    _syscall("landlock_restrict_self", _RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
