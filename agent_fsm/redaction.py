"""Redaction: texts without the secrets that somebody configured.

A server that is given a token may send it back, in a result as in an error. What comes from such a server goes through
here before anybody sees it.
"""

import base64
import binascii
import json
import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, quote_plus, urlsplit

__all__ = ["LEAST_SECRET_CHARS", "REDACTED", "redact", "redact_json", "secret_values"]

REDACTED = "***"

LEAST_SECRET_CHARS = 6
"""Shorter secrets are not looked for: they would be found in any text."""


def redact(text: str, secrets: Collection[str]) -> str:
    """Return *text* with `***` in place of each of *secrets*, however it is written: plain, quoted or as base64.

    Secrets that overlap leave nothing of either. Those with fewer than `LEAST_SECRET_CHARS` characters are left.
    """
    spans = sorted(span for secret in secrets for form in _forms(secret) for span in _found(text, form))
    pieces: list[str] = []
    end = 0
    for start, stop in spans:
        if start >= end:
            pieces += text[end:start], REDACTED
        end = max(end, stop)
    return "".join((*pieces, text[end:])) if spans else text


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


def secret_values(mapping: Mapping[str, str]) -> tuple[str, ...]:
    """Return what must not be shown of *mapping* (headers, an environment): the values of names that look secret.

    Of `Bearer xyz` both the whole and `xyz` are secret, of `Basic ...` also what it encodes, of a cookie each value,
    and of a URL, under any name, its password. The longest come first.
    """
    found = {part for name, value in mapping.items() for part in _secret_parts(name, value)}
    return tuple(sorted((part for part in found if part), key=lambda part: (-len(part), part)))


_ANYWHERE = {
    *("token", "secret", "password", "passwd", "passphrase", "authorization", "authentication", "cookie"),
    *("credential", "credentials", "apikey", "bearer"),
}
"""Words that make a name secret wherever they are in it."""
_LAST = {"key", "auth", "pwd", "pass", "pat", "signature", "jwt"}
"""Words that make it secret as the last one."""


def _looks_secret(name: str) -> bool:
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()
    parts = re.split(r"[^a-z0-9]+", words)
    return not _ANYWHERE.isdisjoint(parts) or parts[-1] in _LAST


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
