"""Private folders on disk, whose content nobody vouches for: reading what is asked for, and removing all of it."""

# pathlib would take 6 ms of each start of the helper, which reads kept files too
# ruff: noqa: PTH101, PTH104, PTH106, PTH108, PTH118, PTH123

import os
import stat
from fnmatch import fnmatchcase

TYPE_CHECKING = False  # see above
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["collect", "remove"]

_DEEPEST = 16
"""Folders below the working folder that are looked into."""
SCRIPT = "script.py"


def collect(folder: str, patterns: "Sequence[str]", most_files: int, most_bytes: int) -> tuple[dict[str, bytes], str]:
    """Return the files that match a pattern by their path in *folder*, and which were left out, in words.

    No link is followed and no mount entered. `*` and `?` stop at slashes; `**` is any number of folders. The script
    itself is never among them.
    """
    kept: dict[str, bytes] = {}
    left_out: list[str] = []
    wanted = [pattern.split("/") for pattern in patterns]
    for path, size in _files(folder):
        if path == SCRIPT or not any(_matches(path.split("/"), each) for each in wanted):
            continue
        room = most_bytes - sum(map(len, kept.values()))
        data = _read(folder, path, room) if len(kept) < most_files and size <= room else None
        if data is None:
            left_out.append(path)
        else:
            kept[path] = data
    if not left_out:
        return kept, ""
    shown = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
    limits = f"at most {most_files} files and {most_bytes:,} bytes are kept"
    return kept, f"{len(left_out)} of the files to keep were left out ({limits}, and they must be readable): {shown}"


def _matches(names: "Sequence[str]", pattern: "Sequence[str]") -> bool:
    if not pattern:
        return not names
    if pattern[0] == "**":
        return any(_matches(names[start:], pattern[1:]) for start in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _files(folder: str) -> "Iterator[tuple[str, int]]":
    """Every plain file in *folder* with its size, in order; what can't be listed or named in UTF-8 is passed over."""
    device = os.lstat(folder).st_dev
    waiting = [""]
    while waiting:
        inside = waiting.pop()
        try:
            with os.scandir(os.path.join(folder, inside)) as entries:
                found = sorted((entry.name, entry.stat(follow_symlinks=False)) for entry in entries)
        except OSError:
            continue
        for name, details in found:
            path = os.path.join(inside, name)
            if details.st_dev != device or not _nameable(path):
                continue
            if stat.S_ISREG(details.st_mode):
                yield path, details.st_size
            elif stat.S_ISDIR(details.st_mode) and path.count("/") < _DEEPEST:
                waiting.append(path)


def _nameable(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read(folder: str, path: str, most: int) -> bytes | None:
    """Return what is in a file, unless that is more than *most* bytes; no link is followed on the way."""
    *folders, name = path.split("/")
    try:
        place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for each in folders:
                inner = os.open(each, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place)
                os.close(place)
                place = inner
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            opened = os.open(name, flags, dir_fd=place)
        finally:
            os.close(place)
        with open(opened, "rb") as file:
            data = file.read(most + 1) if stat.S_ISREG(os.fstat(opened).st_mode) else None
    except OSError:
        return None
    return data if data is not None and len(data) <= most else None


def remove(folder: str) -> None:
    """Remove a folder and all that is in it, however deep and whatever its modes; what resists is left.

    No link is followed. Folders are moved up before they are emptied, so that neither the depth nor the length of a
    path matters.
    """
    for number, path in enumerate(_until_gone(folder)):
        try:
            os.chmod(path, 0o700)
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        os.chmod(entry.path, 0o700, follow_symlinks=True)
                        os.rename(entry.path, os.path.join(folder, f".{number}.{entry.inode()}"))
                    else:
                        os.unlink(entry.path)
            os.rmdir(path)
        except OSError:
            continue


def _until_gone(folder: str) -> "Iterator[str]":
    """The folders directly in *folder*, as long as there are any that were not yet given, and at last itself."""
    given: set[str] = set()
    while True:
        try:
            with os.scandir(folder) as entries:
                found = [each.path for each in entries if each.is_dir(follow_symlinks=False)]
        except OSError:
            break
        fresh = [each for each in found if each not in given]
        if not fresh:
            break
        given.update(fresh)
        yield from fresh
    yield folder
