"""Names: what the model calls tools of many servers or backends; legal for every provider, reversible by a map."""

import hashlib
import re
from collections.abc import Container

from agent_fsm.messages import LEGAL_NAME

__all__ = ["tool_name"]

_ILLEGAL = re.compile(r"[^A-Za-z0-9_-]")
_KEPT_CHARS = 55
_DIGITS = 8


def tool_name(server: str, tool: str, taken: Container[str] = ()) -> str:
    """Return the name under which the model is offered *tool* of *server*: 1 to 64 of `[A-Za-z0-9_-]`, not *taken*.

    It is `server__tool` where that is legal, has at most 64 characters and is not taken. Else it is the first 55
    characters of that, what is illegal replaced by `_`, and 8 digits of a hash of both names.
    """
    whole = f"{server}__{tool}"
    legal = _ILLEGAL.sub("_", whole)
    name = legal
    tries = 0
    while name in taken or not LEGAL_NAME.match(name) or (tries == 0 and legal != whole):
        again = f"\0{tries}" if tries else ""  # only where somebody has named a tool after a hash
        digest = hashlib.sha256(f"{server}\0{tool}{again}".encode("utf-8", "surrogatepass")).hexdigest()
        name = f"{legal[:_KEPT_CHARS]}_{digest[:_DIGITS]}"
        tries += 1
    return name
