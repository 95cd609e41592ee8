"""Which URLs a request may have us, or a library of ours, call: only hosts that the operator named.

A host that is named is still refused where its address is one that only a machine itself has business with: link-local
ones, and those at which clouds hand out credentials. Names are looked up again when they are called: whoever rules the
names of a host that is allowed can get around that.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Collection
from typing import Final, TypeAlias

from agent_fsm.server.problems import Problem

__all__ = ["check_host", "check_url"]

_Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

_URL: Final = re.compile(
    r"(https?)://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?(?:[/?][!-~]*)?", re.IGNORECASE
)
"""Narrower than the standards: what two parsers could read in two ways (users, backslashes, blanks) is not in it."""
_PORTS: Final = {"http": 80, "https": 443}
_METADATA: Final = frozenset(
    ipaddress.ip_address(each) for each in ("fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192")
)
_RESOLVING_S: Final = 5.0


async def check_url(field: str, url: object, allowed: Collection[str]) -> None:
    """Refuse *url*, which stands in *field* of a request, unless its host is among *allowed* and harmless.

    Raises:
        Problem: it is no URL, its host is not allowed, or its host's address never is.
    """
    host, port = check_host(field, url, allowed)
    for address in await _addresses(host, port):
        if _never_called(address):
            raise Problem(403, "host_not_allowed", f"{field}: {host} has an address that is never called: {address}")


def check_host(field: str, url: object, allowed: Collection[str]) -> tuple[str, int]:
    """Return host and port of *url* if they are among *allowed*; asks no network.

    Raises:
        Problem: it is no URL, or its host is not allowed.
    """
    found = _URL.fullmatch(url) if isinstance(url, str) else None
    if found is None:
        raise Problem(422, "invalid_request", f"{field} must be a URL such as http://HOST:PORT/PATH, without a user")
    scheme, host, port_text = found[1].lower(), found[2].lower().rstrip("."), found[3]
    port = int(port_text) if port_text else _PORTS[scheme]
    names = {each.strip().lower() for each in allowed}
    if not {host, f"{host}:{port}"} & names:
        which = f"those allowed are {', '.join(allowed)}" if allowed else "its operator has allowed none"
        raise Problem(403, "host_not_allowed", f"{field}: the host {host}:{port} is not allowed here; {which}")
    return host, port


async def _addresses(host: str, port: int) -> list[_Address]:
    """Return what *host* stands for; nothing if nobody knows, which whoever calls it will find out."""
    try:
        return [ipaddress.ip_address(host.strip("[]"))]
    except ValueError:  # a name
        loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_RESOLVING_S):
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, TimeoutError):
        return []
    return [ipaddress.ip_address(address[0]) for *_, address in found]


def _never_called(address: _Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return _never_called(address.ipv4_mapped)
    special = address.is_link_local or address.is_multicast or address.is_unspecified
    return special or address in _METADATA
