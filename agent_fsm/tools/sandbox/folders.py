"""Private folders on disk, whose content nobody vouches for: reading what is asked for, and removing all of it."""

# pathlib would take 6 ms of each start of the helper, which reads kept files too
# ruff: noqa: PTH106, PTH118, PTH123

import os
import stat
from fnmatch import fnmatchcase

TYPE_CHECKING = False  # see above
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["collect", "remove"]

_DEEPEST = 16
"""Folders below the working folder that are looked into."""
_LOOKED_AT = 20_000
"""Files and folders that are looked at; at level off there may be any number."""
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
    looked_at = 0
    while waiting and looked_at < _LOOKED_AT:
        inside = waiting.pop()
        try:
            with os.scandir(os.path.join(folder, inside)) as entries:
                found = sorted((entry.name, entry.stat(follow_symlinks=False)) for entry in entries)
        except OSError:
            continue
        looked_at += len(found)
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


_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove(folder: str) -> None:
    """Remove a folder and all that is in it, however deep and whatever its modes; what resists is left.

    No link is followed, nothing is recursive, and two descriptors are enough.
    """
    try:
        place = os.open(folder, _FOLDER)
    except OSError:
        return
    try:
        place = _empty(place)
    finally:
        os.close(place)
    try:
        os.rmdir(folder)
    except OSError:  # something in it resisted
        return


def _empty(place: int) -> int:
    """Remove what is in the folder behind *place*; return the descriptor of where it ended, *place* being closed."""
    above: list[tuple[list[str], tuple[int, int]]] = []
    names = _clear(place)
    while True:
        if names:
            inner = _enter(place, names[-1])
            if inner is None:
                names.pop()
                continue
            above.append((names, _identity(place)))
            os.close(place)
            place, names = inner, _clear(inner)
        elif above:
            names, expected = above.pop()
            outer = os.open("..", _FOLDER, dir_fd=place)
            os.close(place)
            place = outer
            if _identity(place) != expected:  # something that still lives has moved it: where to is not ours to empty
                return place
            _try(os.rmdir, names.pop(), place)
        else:
            return place


def _identity(place: int) -> tuple[int, int]:
    found = os.fstat(place)
    return found.st_dev, found.st_ino


def _clear(place: int) -> list[str]:
    """Remove all but the folders in a folder, and return their names."""
    try:
        with os.scandir(place) as entries:
            kinds = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    except OSError:
        return []
    for name, is_folder in kinds:
        if not is_folder:
            _try(os.unlink, name, place)
    return [name for name, is_folder in kinds if is_folder]


def _try(action: "Callable[..., None]", name: str, place: int) -> None:
    try:
        action(name, dir_fd=place)
    except OSError:  # what resists is left
        return


def _enter(place: int, name: str) -> int | None:
    try:
        os.chmod(name, 0o700, dir_fd=place)  # it could neither be listed nor left otherwise
        return os.open(name, _FOLDER, dir_fd=place)
    except OSError:
        return None
