"""Redaction: texts without secrets, those that somebody configured and those that look like keys.

A server that is given a token may send it back, in a result as in an error; a program may print its environment. What
comes from them goes through here before anybody sees it. This is against accidents: code that means to smuggle a secret
out can always write it in a way that nobody looks for. Against that, it must not have the secret (`tools/local.py`).
"""

import base64
import binascii
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Final
from urllib.parse import quote, quote_plus, urlsplit

from attrs import field, frozen

__all__ = [
    "LEAST_ENVIRONMENT_CHARS",
    "LEAST_SECRET_CHARS",
    "REDACTED",
    "Redactor",
    "environment_secrets",
    "redact",
    "redact_json",
    "redactor",
    "secret_values",
]

REDACTED = "***"

LEAST_SECRET_CHARS = 6
"""Shorter secrets are not looked for: they would be found in any text."""
LEAST_ENVIRONMENT_CHARS = 8
"""The same for what is found in the environment, which nobody has called a secret."""


def redact(text: str, secrets: Collection[str]) -> str:
    """Return *text* with `***` in place of each of *secrets*, however it is written: plain, quoted or as base64.

    Secrets that overlap leave nothing of either. Those with fewer than `LEAST_SECRET_CHARS` characters are left.
    """
    return _without(text, _spans_of(text, secrets))


def redact_json(value: Any, secrets: Collection[str]) -> Any:
    """Return the JSON value *value* with every string in it redacted, names of members too."""
    match value:
        case str():
            return redact(value, secrets)
        case Mapping():
            return {redact(str(name), secrets): redact_json(each, secrets) for name, each in value.items()}
        case list() | tuple():
            return [redact_json(each, secrets) for each in value]
    return value


def _spans_of(text: str, secrets: Iterable[str]) -> list[tuple[int, int]]:
    return [span for secret in secrets for form in _forms(secret) for span in _found(text, form)]


def _without(text: str, spans: list[tuple[int, int]]) -> str:
    """Return *text* with `***` in place of each of *spans*, once for those that overlap."""
    pieces: list[str] = []
    end = 0
    for start, stop in sorted(spans):
        if start >= end:
            pieces += text[end:start], REDACTED
        end = max(end, stop)
    return "".join((*pieces, text[end:])) if spans else text


# A run's own redaction


@frozen(eq=False)
class Redactor:
    """Returns texts without *secrets* and without what has the shape of a known key. Made by `redactor`.

    A text without any costs about a microsecond: one search for what no shape is without, and one for each form of a
    secret.
    """

    secrets: tuple[str, ...] = field(repr=False)
    _needles: tuple[str, ...] = field(repr=False)
    """One of these is in every text with a secret in it."""

    def __call__(self, text: str) -> str:
        """Return *text* with `***` in place of each secret."""
        if _HINT.search(text):
            return self._redacted(text)
        for needle in self._needles:
            if needle in text:
                return self._redacted(text)
        return text

    def _redacted(self, text: str) -> str:
        spans = _spans_of(text, self.secrets)
        for mark, pattern in _SHAPES:
            if mark in text:
                spans += [found.span(found.lastindex or 0) for found in pattern.finditer(text)]
        return _without(text, spans)

    def json(self, value: Any, *, names: bool = True) -> Any:
        """Return the JSON value *value* with every string in it redacted; without *names* those of members are left.

        In what is base64 anyway (`data` and `blob` of MCP's content) only *secrets* are looked for.
        """
        match value:
            case str():
                return self(value)
            case Mapping():
                return {
                    self.json(name) if names else name: redact(each, self.secrets)
                    if name in ("data", "blob") and isinstance(each, str)
                    else self.json(each, names=names)
                    for name, each in value.items()
                }
            case list() | tuple():
                return [self.json(each, names=names) for each in value]
        return value


@lru_cache(maxsize=16)
def redactor(secrets: tuple[str, ...]) -> Redactor:
    """Return what redacts *secrets* and known shapes; the same for the same secrets."""
    needles: dict[str, None] = {}
    for secret in secrets:
        forms = _forms(secret)
        needles |= dict.fromkeys(form for form in forms if not any(each in form for each in forms - {form}))
    return Redactor(secrets, tuple(needles))


# Shapes of keys, after what their issuers document and what secret scanners look for


def _free(prefix: str) -> str:
    """Return a pattern of *prefix*, of fixed width, where a word may begin: after an escape or a colour, too."""
    before = (
        *(r"\\[abefnrtv0]", r"\\u[0-9A-Fa-f]{4}", r"\\x[0-9A-Fa-f]{2}", r"%[0-9A-Fa-f]{2}"),
        *(r"\[K", r"\[m", r"[\[;]\dm", r"[\[;]\d\dm", r"[\[;]\d\d\dm"),
    )
    # the prefix comes first, so that the engine has something to look for
    return rf"{prefix}(?:(?<![A-Za-z0-9]{prefix})|{'|'.join(f'(?<={each}{prefix})' for each in before)})"


_BREAK: Final = r"(?:\\+[nrt]|[\s\"',]){0,8}"
_BASE64_LINES: Final = rf"(?:{_BREAK}[A-Za-z0-9+/=]{{40,}}+)++(?:{_BREAK}[A-Za-z0-9+/=]{{1,76}})?"
_PRIVATE_KEY: Final = (
    r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:[^-]*+(?:-(?!----)[^-]*+)*+(?<=[^-]{40})-----END [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
    rf"|{_BASE64_LINES})"  # its end was cut off
)
_AWS_SECRET: Final = r"[sS]ecret_?[aA]ccess_?[kK]ey|SECRET_ACCESS_KEY"

_SHAPES: Final = tuple(
    (mark, re.compile(pattern))
    for mark, pattern in (
        (
            "sk-",
            _free("sk-")
            + r"(?:(?:proj|svcacct|admin|None|ant|or-v1|lf)-[A-Za-z0-9_-]{20,}|[A-Za-z0-9]{20,}[A-Za-z0-9_-]*)",
        ),
        *((mark, _free(mark) + r"[A-Za-z0-9]{16,}") for mark in ("sk_live_", "sk_test_", "rk_live_", "rk_test_")),
        *((mark, _free(mark) + r"[A-Za-z0-9]{36,}") for mark in ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "npm_")),
        *((mark, _free(mark) + r"[A-Za-z0-9]{32,}") for mark in ("pplx-", "hf_", "xai-", "gsk_")),
        *((mark, _free(mark) + r"[A-Z0-9]{16}(?![A-Za-z0-9])") for mark in ("AKIA", "ASIA")),
        *((mark, _free(mark) + r"[A-Za-z0-9_-]{20,}(?:\.[a-z0-9]{2,9})*") for mark in ("glpat-", "gldt-", "glrt-")),
        ("tvly-", _free("tvly-") + r"(?:dev-|prod-)?[A-Za-z0-9]{24,}"),
        ("AIza", _free("AIza") + r"[A-Za-z0-9_-]{35,}"),
        ("GOCSPX-", _free("GOCSPX-") + r"[A-Za-z0-9_-]{28,}"),
        ("github_pat_", _free("github_pat_") + r"[A-Za-z0-9_]{40,}"),
        ("xox", _free("xox[abeoprs]-") + r"(?=[A-Za-z-]{0,15}[0-9])[A-Za-z0-9-]{16,}"),
        ("hooks.slack.com/services/", r"hooks\.slack\.com/services/(T[A-Z0-9]+/B[A-Z0-9]+/[A-Za-z0-9]{16,})"),
        ("dckr_pat_", _free("dckr_pat_") + r"[A-Za-z0-9_-]{27,}"),
        ("dop_v1_", _free("dop_v1_") + r"[a-f0-9]{64}"),
        ("pypi-AgE", _free("pypi-AgE") + r"[A-Za-z0-9_-]{50,}"),
        ("SG.", _free(r"SG\.") + r"[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{32,}"),
        ("eyJ", _free("eyJ") + r"(?<![_-]eyJ)[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*\.[A-Za-z0-9_-]{10,}(?:\.[\w-]+){0,2}"),
        ("PRIVATE KEY", _PRIVATE_KEY),
        *(
            (
                mark,
                rf"(?:{_AWS_SECRET})[\\\"']{{0,3}}\s{{0,9}}[:=]\s{{0,9}}[\\\"']{{0,3}}([A-Za-z0-9/+]{{40}})(?![\w/+])",
            )
            for mark in ("ecret_access_key", "ecretAccessKey", "SECRET_ACCESS_KEY")
        ),
        ("earer ", r"[Bb]earer {1,3}((?=[A-Za-z._~+/=-]{0,40}[0-9])[A-Za-z0-9._~+/=-]{16,}|[A-Za-z0-9._~+/=-]{40,})"),
        (
            "asic ",
            r"uthorization[\\\"']{0,3}\s{0,3}[:=]\s{0,3}[\\\"']{0,3}[Bb]asic {1,3}([A-Za-z0-9+/]{6,}={0,2})(?!\w)",
        ),
        ("://", r"://[^\s/@:\"'`\\<>{}]{0,100}:(?![$*{<%\[]|x{3})([^\s/@?#\"'`\\<>]{3,200})@(?=[\w\[])"),
    )
)
"""Of each shape what a text with it must have in it, and its pattern: a group in it is what is secret of it.

None takes more than linear time, whatever the text: what a pattern reads before it fails begins no other match.
"""

_HINT: Final = re.compile(
    # Each part begins with a character that is rare in texts: the others are passed over several times as fast
    r"-(?!-{5})(?=[A-Za-z0-9_-]{16})(?:(?<=sk-)|(?<=pplx-)|(?<=xai-)|(?<=tvly-)|(?<=xox[abeoprs]-)|(?<=GOCSPX-)|(?<=pypi-)"
    r"|(?<=glpat-)|(?<=gl[dr]t-))"
    r"|_(?=[A-Za-z0-9]{16})(?:(?<=gh[pousr]_)|(?<=hf_)|(?<=npm_)|(?<=gsk_)|(?<=[sr]k_(?:live|test)_)|(?<=dop_v1_))"
    r"|_(?:pat_|access_key|ACCESS_KEY)"
    r"|I(?:(?<=A[KS]I)A[A-Z0-9]{16}|(?<=AI)za)"
    r"|J(?<=eyJ)[A-Za-z0-9_-]{10}"
    r"|K(?:(?<=PRIVATE K)EY|(?<=[aA]ccessK)ey)"
    r"|G(?<=SG)\.[A-Za-z0-9_-]{16}"
    r"|B(?:earer|asic) |b(?:earer|asic) "
    r"|/services/T[A-Z0-9]+/B"
    r"|:(?=//[^\s/@]{0,300}@)"
)
"""Found in every text that has a shape in it, and in few others."""


# What is secret by its name


def secret_values(mapping: Mapping[str, str]) -> tuple[str, ...]:
    """Return what must not be shown of *mapping* (headers, an environment): the values of names that look secret.

    Of `Bearer xyz` both the whole and `xyz` are secret, of `Basic ...` also what it encodes, of a cookie each value,
    and of a URL, under any name, its password. The longest come first.
    """
    found = {part for name, value in mapping.items() for part in _secret_parts(name, value)}
    return _longest_first(part for part in found if part)


def environment_secrets(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return what must not be shown of the environment *environ*, the longest first.

    As `secret_values`, but for what is too short (`LEAST_ENVIRONMENT_CHARS`) or too ordinary to be looked for in any
    text: words like `true` and `postgres`, short numbers, paths, addresses without a password, the name of the user.
    """
    return _telling(tuple([(name, environ[name]) for name in environ if _tells(name)]))


@lru_cache(maxsize=16)
def _telling(named: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    ordinary = {value for name, value in named if name in _NOT_SECRET}
    return tuple(
        value
        for value in secret_values(dict(named))
        if len(value) >= LEAST_ENVIRONMENT_CHARS
        and value not in ordinary
        and value.lower() not in _WORDS
        and not _ORDINARY.fullmatch(value)
        and not _is_path(value)
    )


def _longest_first(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(values, key=lambda value: (-len(value), value)))


_ANYWHERE = {
    *("token", "secret", "password", "passwd", "passphrase", "authorization", "authentication", "cookie"),
    *("credential", "credentials", "apikey", "bearer"),
}
"""Words that make a name secret wherever they are in it."""
_LAST = {"key", "auth", "pwd", "pass", "pat", "signature", "jwt"}
"""Words that make it secret as the last one."""
_ABOUT = {
    *("domain", "enabled", "endpoint", "env", "expires", "expiry", "file", "header", "host", "id", "length", "level"),
    *("limit", "manager", "max", "min", "mode", "name", "path", "port", "prefix", "project", "provider", "region"),
    *("seconds", "size", "store", "timeout", "ttl", "type", "user", "username", "version"),
}
"""Words that as the last one make a variable something about a secret."""
_ADDRESS = {"url", "uri", "dsn", "proxy", "broker", "backend", "connection", "remote", "index"}
"""Words that as the last one make it an address, which may have a password in it."""

_NOT_SECRET = ("USER", "LOGNAME", "USERNAME", "HOSTNAME", "HOME")
_WORDS = {
    *("changeme", "database", "development", "disabled", "example", "guest", "localhost", "mariadb", "notasecret"),
    *("password", "placeholder", "postgres", "postgresql", "production", "rabbitmq", "required", "undefined"),
    *("username", "unlimited", "optional", "internal", "external", "keychain", "standard", "sqlserver"),
}
"""Values that say nothing to anybody, but are in many texts."""
_ORDINARY = re.compile(r"[0-9.,:_-]{1,11}|https?://[^\s?#@]*|\$\{?\w+\}?|(.)\1*")
_RANDOM = re.compile(r"(?=.*[a-z])(?=.*[A-Z])(?=.*[0-9]).{16,}")


def _is_path(value: str) -> bool:
    """Return whether *value* is the path of a file: some keys begin with a slash, too, but have no such parts."""
    if not re.match(r"(?:~|\.{1,2}|[A-Za-z]:)?[/\\]", value):
        return False
    parts = re.split(r"[/\\]", value)[1:]
    return len(value) < 500 and not any(_RANDOM.fullmatch(part) for part in parts) and (len(parts) > 1 or "." in value)


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower())


@lru_cache(maxsize=1_024)
def _looks_secret(name: str) -> bool:
    words = _words(name)
    return not _ANYWHERE.isdisjoint(words) or words[-1] in _LAST


@lru_cache(maxsize=1_024)
def _tells(name: str) -> bool:
    """Return whether the environment variable *name* may hold a secret, or tells what is none."""
    words = _words(name)
    about = words[-1] in _ABOUT or words == ["pwd"]
    return name in _NOT_SECRET or words[-1] in _ADDRESS or (_looks_secret(name) and not about)


def _secret_parts(name: str, value: str) -> Iterator[str]:
    password = _password(value)
    if password:
        yield password
    if not _looks_secret(name):
        return
    yield value.strip()
    scheme, _, rest = value.strip().partition(" ")
    if "cookie" in name.lower():
        yield from (pair.partition("=")[2].strip() for pair in value.split(";"))
    elif rest:
        yield rest.strip()
    if scheme.lower() == "basic":
        try:
            both = base64.b64decode(rest.strip(), validate=True).decode()
        except (binascii.Error, ValueError):
            return
        yield both
        yield both.partition(":")[2]


def _password(value: str) -> str | None:
    if "://" not in value:
        return None
    try:
        return urlsplit(value.strip()).password
    except ValueError:  # no URL after all
        return None


@lru_cache(maxsize=256)
def _forms(secret: str) -> frozenset[str]:
    """Return how *secret* may be written."""
    if len(secret) < LEAST_SECRET_CHARS:
        return frozenset()
    quoted = {quote(secret, safe=""), quote(secret), quote_plus(secret)}
    forms = {
        secret,
        *quoted,
        *(re.sub("%[0-9A-F]{2}", lambda found: found.group().lower(), each) for each in quoted),
        json.dumps(secret)[1:-1],
        json.dumps(json.dumps(secret)[1:-1])[1:-1],  # JSON in JSON, as an answer with what a program printed
        json.dumps(secret, ensure_ascii=False)[1:-1],
        repr(secret)[1:-1],
        *_base64_forms(secret.encode(errors="replace")),
    }
    return frozenset(form for form in forms if len(form) >= LEAST_SECRET_CHARS)


def _base64_forms(secret: bytes) -> Iterator[str]:
    """Yield what *secret* becomes, wherever it stands in what is encoded (`user:secret`)."""
    for lead in range(3):
        encoded = base64.b64encode(bytes(lead) + secret).rstrip(b"=").decode()
        first = -(-lead * 8 // 6)
        whole = (lead + len(secret)) * 8 // 6
        for form in (encoded[first:whole], encoded[first:]):  # it may go on, or end here
            yield form
            yield form.replace("+", "-").replace("/", "_")


def _found(text: str, form: str) -> Iterator[tuple[int, int]]:
    at = text.find(form)
    while at >= 0:
        yield at, at + len(form)
        at = text.find(form, at + 1)
