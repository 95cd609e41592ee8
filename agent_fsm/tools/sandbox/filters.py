"""Seccomp filters: which system calls a contained process can't make, as a BPF program.

What is denied is what reaches round the other layers (new user namespaces, memory that no limit counts, other
processes' memory, families of sockets that no namespace holds) and what only attacks ask for. Numbers that came after
this table was made are answered ENOSYS. The numbers for aarch64 are taken from the kernel's headers; nothing has been
run there.
"""

import errno
import struct
from collections.abc import Iterable
from functools import lru_cache

__all__ = ["ARCHITECTURES", "program"]

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""The kernel's audit number and the column of the tables below, by machine."""
_LAST_KNOWN = 450
_FCHMODAT2 = 452
_X32 = 0x40000000

_ABSENT = {  # ENOSYS: programs fall back to something else
    "add_key": (248, 217),
    "bpf": (321, 280),
    "clone3": (435, 435),  # its flags are behind a pointer; C libraries fall back to clone
    "io_uring_enter": (426, 426),  # makes system calls that no filter sees
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "kexec_file_load": (320, 294),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),  # memory outside RLIMIT_AS and the tmpfs
    "memfd_secret": (447, 447),
    "msgctl": (71, 187),
    "msgget": (68, 186),
    "msgrcv": (70, 188),
    "msgsnd": (69, 189),
    "perf_event_open": (298, 241),
    "request_key": (249, 218),
    "semctl": (66, 191),
    "semget": (64, 190),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "shmdt": (67, 197),
    "shmget": (29, 194),
    "userfaultfd": (323, 282),
}
_DENIED = {  # EPERM
    "acct": (163, 89),
    "adjtimex": (159, 171),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "ioperm": (173, None),
    "iopl": (172, None),
    "kcmp": (312, 272),
    "kexec_load": (246, 104),
    "lookup_dcookie": (212, 18),
    "migrate_pages": (256, 238),
    "modify_ldt": (154, None),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "move_pages": (279, 239),
    "name_to_handle_at": (303, 264),
    "nfsservctl": (180, 42),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_madvise": (440, 440),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "reboot": (169, 142),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "settimeofday": (164, 170),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "uselib": (134, None),
    "vhangup": (153, 58),
}
_LEAVES_GROUP = {"setsid": (112, 157), "setpgid": (109, 154)}
"""Denied where a process group is all that holds the processes together."""
_MODES = {
    "chmod": (90, None),
    "chown": (92, None),
    "fchmodat": (268, 53),
    "fchownat": (260, 54),
    "futimesat": (261, None),
    "lchown": (94, None),
    "utime": (132, None),
    "utimensat": (280, 88),
    "utimes": (235, None),
}
"""Done by path, to all that the user owns: Landlock knows them not. Pretended, since much that copies files fails
without; what is done to an open file is not affected."""
_ATTRIBUTES = {
    "fremovexattr": (199, 16),
    "fsetxattr": (190, 7),
    "lremovexattr": (198, 15),
    "lsetxattr": (189, 6),
    "removexattr": (197, 14),
    "setxattr": (188, 5),
}
"""Denied for the same reason."""
_SIGNALS = {
    "kill": (62, 129),
    "pidfd_send_signal": (424, 424),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "tgkill": (234, 131),
    "tkill": (200, 130),
}
"""Denied where neither a namespace nor Landlock keeps signals in; also honest ones then fail."""
_ONLY_ITSELF = {
    "prlimit64": (302, 261),  # else the supervisor, which has the same uid, could be starved of descriptors
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
}
"""May have 0, the caller, as their first argument, and nothing else."""
_FCNTL, _IOCTL, _CLONE, _SETPRIORITY, _IOPRIO_SET = (72, 25), (16, 29), (56, 220), (141, 140), (251, 30)
_SOCKET, _SOCKETPAIR, _SETSOCKOPT = (41, 198), (53, 199), (54, 208)
_NEW_NAMESPACE = 0x7E020000
_F_SETPIPE_SZ, _TIOCSTI, _TIOCLINUX = 1031, 0x5412, 0x541C
_SOL_SOCKET, _SO_SNDBUF, _SO_RCVBUF = 1, 7, 8
_AF_UNIX, _AF_NETLINK, _SOCK_STREAM, _NETLINK_ROUTE = 1, 16, 1, 0

_Instruction = tuple[int, int, int, int]
_LOAD, _AND, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16


@lru_cache(maxsize=32)
def program(machine: str, *, families: tuple[int, ...], groups: bool, signals: bool, modes: bool = True) -> bytes:
    """Return the filter, for `prctl(PR_SET_SECCOMP)`.

    *families* are the numbers of the socket families that may be used; if there is none that could name a socket
    outside, a pair of connected stream sockets is still to be had. *groups*: whether processes may leave their group.
    *signals*: whether they may send signals. *modes*: whether they may change modes, owners and times by path.

    Raises:
        KeyError: the machine is not in ARCHITECTURES.
    """
    audit, column = ARCHITECTURES[machine]
    code = [_load(_ARCHITECTURE_AT), (_EQUAL, 1, 0, audit), _give(_KILL), _load(_NUMBER_AT)]
    if machine == "x86_64":
        code += [(_AT_LEAST, 0, 1, _X32), _fail(errno.ENOSYS)]
    if modes:
        code.append((_EQUAL, 2, 0, _FCHMODAT2))
    code += [(_AT_LEAST, 0, 1, _LAST_KNOWN + 1), _fail(errno.ENOSYS)]
    denied = (
        _DENIED | ({} if groups else _LEAVES_GROUP) | ({} if signals else _SIGNALS) | ({} if modes else _ATTRIBUTES)
    )
    pretended = {} if modes else _MODES
    for numbers, number_of_error in ((_ABSENT, errno.ENOSYS), (denied, errno.EPERM), (pretended, 0)):
        for pair in numbers.values():
            code += _when(pair[column], [_fail(number_of_error)])
    for pair in _ONLY_ITSELF.values():
        code += _when(pair[column], _all_of(((0, 0),), errno.EPERM))
    code += _when(_SETPRIORITY[column], _all_of(((0, 0), (1, 0)), errno.EPERM))
    code += _when(_IOPRIO_SET[column], _all_of(((0, 1), (1, 0)), errno.EPERM))
    code += _when(_CLONE[column], [_argument(0), (_ANY_BIT, 0, 1, _NEW_NAMESPACE), _fail(errno.EPERM), _give(_ALLOW)])
    code += _when(_FCNTL[column], _none_of(1, (_F_SETPIPE_SZ,), errno.EPERM))
    code += _when(_IOCTL[column], _none_of(1, (_TIOCSTI, _TIOCLINUX), errno.EPERM))
    code += _when(_SETSOCKOPT[column], _buffers_stay())
    code += _when(_SOCKET[column], _only_routes() + _one_of(0, families, errno.EAFNOSUPPORT))
    if _AF_UNIX not in families:  # datagrams of a pair could be sent to any socket in the file system
        stream = [_argument(1), (_AND, 0, 0, 0xF), (_EQUAL, 1, 0, _SOCK_STREAM), _fail(errno.EPERM), _give(_ALLOW)]
        code += _when(_SOCKETPAIR[column], stream)
    code.append(_give(_ALLOW))
    return b"".join(struct.pack("=HBBI", *each) for each in code)


def _load(offset: int) -> _Instruction:
    return (_LOAD, 0, 0, offset)


def _argument(index: int) -> _Instruction:
    return _load(_ARGUMENTS_AT + 8 * index)  # the low half: both machines are little-endian


def _give(verdict: int) -> _Instruction:
    return (_RETURN, 0, 0, verdict)


def _fail(number: int) -> _Instruction:
    return _give(_ERRNO | number)


def _when(number: int | None, block: list[_Instruction]) -> list[_Instruction]:
    """Return the code that runs *block*, which must end in a verdict, for the system call of that number."""
    return [] if number is None else [(_EQUAL, 0, len(block), number), *block]


def _one_of(index: int, values: Iterable[int], error: int) -> list[_Instruction]:
    allowed = [each for value in values for each in ((_EQUAL, 0, 1, value), _give(_ALLOW))]
    return [_argument(index), *allowed, _fail(error)]


def _only_routes() -> list[_Instruction]:
    """Return the code that refuses netlink sockets but those that libraries look up interfaces with."""
    wrong = [_argument(2), (_EQUAL, 1, 0, _NETLINK_ROUTE), _fail(errno.EPROTONOSUPPORT)]
    return [_argument(0), (_EQUAL, 0, len(wrong), _AF_NETLINK), *wrong]


def _none_of(index: int, values: Iterable[int], error: int) -> list[_Instruction]:
    denied = [each for value in values for each in ((_EQUAL, 0, 1, value), _fail(error))]
    return [_argument(index), *denied, _give(_ALLOW)]


def _all_of(wanted: Iterable[tuple[int, int]], error: int) -> list[_Instruction]:
    """Return the code that allows a call whose arguments have these values: pairs of index and value."""
    checks = [each for index, value in wanted for each in (_argument(index), (_EQUAL, 1, 0, value), _fail(error))]
    return [*checks, _give(_ALLOW)]


def _buffers_stay() -> list[_Instruction]:
    """Return the code that does nothing, and says 0, for another size of socket buffers: they took 988 MB once."""
    return [
        _argument(1),
        (_EQUAL, 1, 0, _SOL_SOCKET),
        _give(_ALLOW),
        _argument(2),
        (_EQUAL, 1, 0, _SO_SNDBUF),
        (_EQUAL, 0, 1, _SO_RCVBUF),
        _fail(0),
        _give(_ALLOW),
    ]
