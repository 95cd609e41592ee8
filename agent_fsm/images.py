"""Images: what a task names by path or URL, put into its messages for models that see.

Needs the extra `images` (Pillow, and urlextract for tasks with URLs), which is loaded when it is needed.
"""

import base64
import io
import os
import re
import stat
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

from attrs import define, frozen

from agent_fsm.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["LONG_EDGE_PIXELS", "MAX_IMAGE_CHARS", "MAX_TOTAL_CHARS", "with_images"]

LONG_EDGE_PIXELS: Final = 1_568
"""What a longer image is scaled to; Anthropic scales to it, OpenAI to about as much."""
MAX_IMAGE_CHARS: Final = 5_000_000
"""Characters of base64 that one image comes to at most; Anthropic takes no more."""
MAX_TOTAL_CHARS: Final = 20_000_000
"""Characters of base64 that all images come to at most; the providers take requests of 20 to 50 MB."""

_FORMATS: Final = ("PNG", "JPEG", "GIF", "WEBP")
_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".gif", ".webp")
_MAX_FILE_BYTES: Final = 50_000_000
_MAX_PIXELS: Final = 50_000_000
"""Of the file: what unpacks to more is not unpacked."""
_MAX_WORD_CHARS: Final = 2_000
"""Words longer than that are data; urlextract takes time in the square of a word's length."""


def with_images(
    messages: Sequence[Mapping[str, Any]], *, root: Path | str | None = None, max_images: int = 20
) -> list[dict[str, Any]]:
    """Return *messages* with the images that the user's texts name: first the text as it was, then a part for each.

    An image is a PNG, JPEG, GIF or WebP, and named by a path (quoted if it has spaces in it; `~` and file:// URLs are
    understood) or an http URL with such a suffix. Files are sent as they look: upright, scaled down to
    `LONG_EDGE_PIXELS`, the first picture of an animation, without metadata. URLs are passed on for the provider to
    fetch; nothing is fetched here. A name of no file is text. A file that can't be attached (no readable image, too
    large, one more than *max_images*) is told of in a last part, for the model to know.

    Whatever file a text names is read and goes to the provider: calling this is taking the texts' word for it. With
    *root*, paths begin there and nothing outside is read, links followed. It waits for disk and takes CPU (some 0.1 s
    an image), so a server calls it in a thread. A run reckons with 50,000 tokens for each image until the provider
    reports what it took: for more than nine, raise `max_tokens_total`.

    Raises:
        ConfigError: Pillow or urlextract is not installed, *max_images* is below 1, or *root* is no directory.
    """
    _needed("PIL")
    if isinstance(max_images, bool) or not isinstance(max_images, int) or max_images < 1:
        raise ConfigError(f"max_images must be a whole number >= 1, not {max_images!r}")
    if root is not None and not Path(root).is_dir():
        raise ConfigError(f"root must be a directory, not {str(root)!r}")
    attaching = _Attaching(None if root is None else Path(root).resolve(), max_images)
    return [attaching.told(message) for message in messages]


def _needed(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        text = f"images in messages need {package} ({error}): run pip install 'agent-fsm[images]'"
        raise ConfigError(text) from None


@define
class _Attaching:
    """What has been attached so far, and how much more may be."""

    root: Path | None
    images_left: int
    chars_left: int = MAX_TOTAL_CHARS

    def told(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return *message*, with its images if it is the user's and a text."""
        text = message.get("content")
        if message.get("role") != "user" or not isinstance(text, str):
            return dict(message)
        images, notes = [], []
        named = {mention.key: mention for mention in reversed(_mentions(text, self.root))}  # where it is named first
        for number, mention in enumerate(sorted(named.values(), key=lambda each: each.start)):
            if self.images_left == 0:
                notes.append(
                    f"[{len(named) - number} more of the images are not attached: there are as many as may be]"
                )
                break
            try:
                images.append({"type": "image_url", "image_url": {"url": self._url(mention)}})
            except _NotAttachedError as error:
                notes.append(f"[{mention.name} is not attached: {error}]")
        if not images and not notes:
            return dict(message)
        rest = [_text_part("\n".join(notes))] if notes else []
        return {**message, "content": [_text_part(text), *images, *rest]}

    def _url(self, mention: "_Mention") -> str:
        url = mention.key
        if mention.path is not None:
            kind, data = _encoded(_read(mention.path))
            url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
            if len(url) > self.chars_left:
                raise _NotAttachedError("the images before it are as large as may be together")
            self.chars_left -= len(url)
        self.images_left -= 1
        return url


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


class _NotAttachedError(Exception):
    """Raised with the reason why an image that is named can't be attached."""


# What a text names


@frozen
class _Mention:
    """An image that a text names."""

    start: int
    name: str
    """As the text has it."""
    key: str
    """Its URL, or the real path of its file."""
    path: Path | None = None


_OPENING: Final = {
    '"': '"',
    "'": "'",
    "`": "`",
    ")": "(",
    ">": "<",
    "\u201d": "\u201c",
    "\u2019": "\u2018",
    "\u00bb": "\u00ab",
}
"""What a name in quotes begins with, by what it ends with."""
_QUOTED_END: Final = re.compile(rf"\.(?:png|jpe?g|gif|webp)(?=[{re.escape(''.join(_OPENING))}])", re.IGNORECASE)
_MAX_QUOTED_CHARS: Final = 1_000
_WORD: Final = re.compile(r"(?:\\[ ]|[^\s])+")
_WORD_HAS: Final = re.compile(r"\.(?:png|jpe?g|gif|webp)", re.IGNORECASE)
_AROUND: Final = (
    "".join(_OPENING)
    + "".join(_OPENING.values())
    + "[]{},;:!?*|\u3001\u3002\uff0c\uff01\uff1f\uff1a\uff1b\uff09\uff08\u300c\u300d"
)
"""What may stand next to a name without being part of it, with the full stop at its end."""
_MAX_NAMES: Final = 1_000
"""Names that are looked up in one text; the rest of them is text."""


def _mentions(text: str, root: Path | None) -> list[_Mention]:
    """Return the images that *text* names, in order. A word of a name in quotes is no name of its own."""
    quoted = list(_files(_quoted(text), root))
    inside = {at for mention in quoted for at in range(mention.start, mention.start + len(mention.name))}
    words = [(at, word) for at, word in _words(text) if at not in inside]
    urls = [_Mention(at + word.find(url), url, url) for at, word in islice(words, _MAX_NAMES) for url in _urls(word)]
    files = _files(((at, name) for at, word in words for name in _unwrapped(word)), root)
    return sorted((*quoted, *urls, *files), key=lambda mention: mention.start)


def _files(names: Iterator[tuple[int, str]], root: Path | None) -> Iterator[_Mention]:
    """Yield those of *names*, each with its place, that are the names of files."""
    for at, name in islice(names, _MAX_NAMES):
        path = _existing(name, root)
        if path is not None:
            yield _Mention(at, name, str(path), path)


def _quoted(text: str) -> Iterator[tuple[int, str]]:
    """Yield the names with spaces that stand in quotes or brackets; without spaces they are words."""
    for match in _QUOTED_END.finditer(text):
        end = start = match.end()
        for _ in range(3):  # there may be quotes in a name, too
            start = text.rfind(_OPENING[text[end]], max(0, end - _MAX_QUOTED_CHARS), start)
            name = text[start + 1 : end]
            if start < 0 or "\n" in name:
                break
            if " " in name:
                yield start + 1, name


def _words(text: str) -> Iterator[tuple[int, str]]:
    for match in _WORD.finditer(text):
        word = match.group()
        if len(word) <= _MAX_WORD_CHARS and _WORD_HAS.search(word):
            yield match.start(), word


def _unwrapped(word: str) -> Iterator[str]:
    """Yield the names that *word* may have something around: nothing, punctuation, Markdown's `![shown](...)`."""
    name = word.replace("\\ ", " ")
    yield from dict.fromkeys(
        (name, *(each.lstrip(_AROUND).rstrip("." + _AROUND) for each in (name, name.rpartition("](")[2])))
    )


def _urls(word: str) -> Iterator[str]:
    if not re.search("https?://", word, re.IGNORECASE):
        return
    for found in _extractor().find_urls(word):
        url = found.rstrip(".,;:!?*'\"")
        parts = urlsplit(url)
        if parts.scheme.lower() in ("http", "https") and parts.path.lower().endswith(_SUFFIXES):
            yield url


@cache
def _extractor() -> Any:
    """Return what finds URLs. It asks no network; the list of top-level domains is the one in its package."""
    urlextract = _needed("urlextract")
    with tempfile.TemporaryDirectory() as folder:  # else it leaves a lock file in site-packages
        return urlextract.URLExtract(cache_dir=folder, extract_localhost=False)


def _existing(name: str, root: Path | None) -> Path | None:
    """Return the real path of the image file called *name*, or None if there is none, or none that may be read."""
    if not name.lower().endswith(_SUFFIXES):
        return None
    if name.lower().startswith("file://"):
        parts = urlsplit(name)
        if parts.netloc not in ("", "localhost"):
            return None
        name = unquote(parts.path)
    try:
        path = Path(root or "", Path(name).expanduser()).resolve()
        is_file = path.is_file()  # False for what can't be looked at
    except (OSError, RuntimeError, ValueError):  # too long, a home of nobody, a NUL
        return None
    return path if is_file and (root is None or path.is_relative_to(root)) else None


# What a file shows


def _read(path: Path) -> bytes:
    try:
        # Not to wait for ever, should it have become a pipe since it was looked at
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _NotAttachedError("it is no regular file")
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _NotAttachedError(f"it can't be read: {error.strerror or error}") from None
    if len(data) > _MAX_FILE_BYTES:
        raise _NotAttachedError(f"it has more than {_MAX_FILE_BYTES:,} bytes")
    return data


def _encoded(data: bytes) -> tuple[str, bytes]:
    """Return the image in *data* as providers take it: the kind, "png" or "jpeg", and the bytes.

    Raises:
        _NotAttachedError: it is no image, a broken one, or one too large to be unpacked.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
            drawn = opened.format in ("PNG", "GIF")
            opened.draft(None, (2 * LONG_EDGE_PIXELS, 2 * LONG_EDGE_PIXELS))  # a JPEG is unpacked smaller at once
            if opened.width * opened.height > _MAX_PIXELS:
                raise _NotAttachedError(f"it has {opened.width} x {opened.height} pixels, more than can be unpacked")
            image = _plain(ImageOps.exif_transpose(opened))
            image.thumbnail((LONG_EDGE_PIXELS, LONG_EDGE_PIXELS))
    except Image.DecompressionBombError:
        raise _NotAttachedError("it has more pixels than can be unpacked") from None
    except _BROKEN as error:
        raise _NotAttachedError(f"it is no image that can be read ({type(error).__name__})") from None
    return _fitting(image, drawn)


_BROKEN: Final = (OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, OverflowError, MemoryError,
                  AttributeError, Warning, struct.error, zlib.error)  # fmt: skip
"""What Pillow raises for files that are not what they say."""


def _plain(image: "Image.Image") -> "Image.Image":
    """Return *image* in a mode that PNG and JPEG writers take."""
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value / 256).convert("L")  # of 16 bits; else all is white
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _fitting(image: "Image.Image", drawn: bool) -> tuple[str, bytes]:
    """Return *image* in at most `MAX_IMAGE_CHARS`: as PNG if it is *drawn* or can be seen through, and it fits."""
    most = (MAX_IMAGE_CHARS - 100) * 3 // 4  # a hundred for what comes before the data
    if drawn or image.mode == "RGBA":
        data = _saved(image, format="PNG")
        if len(data) <= most:
            return "png", data
    opaque = _on_white(image) if image.mode == "RGBA" else image
    # Noise of 1,568 x 1,568 takes 2 MB at this quality, so it fits
    return "jpeg", _saved(opaque, format="JPEG", quality=85)


def _on_white(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    ground = Image.new("RGB", image.size, "white")
    ground.paste(image, mask=image.getchannel("A"))
    return ground


def _saved(image: "Image.Image", **options: Any) -> bytes:
    image.info.clear()  # comments and profiles, which would be written, too
    out = io.BytesIO()
    image.save(out, **options)
    return out.getvalue()
