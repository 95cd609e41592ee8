"""Kept files: what a call has left in its working folder, as content blocks in MCP's JSON form."""

import base64
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

__all__ = ["described", "resource"]


def described(kept: Mapping[str, bytes]) -> dict[str, int]:
    """Return what the model is told of the files: their bytes by their path in the working folder."""
    return {path: len(data) for path, data in kept.items()}


def resource(path: str, data: bytes) -> dict[str, Any]:
    """Return the resource block of a file; its text if it is UTF-8 without NUL, base64 otherwise."""
    import mimetypes  # reads the system's own tables

    found = {"uri": f"sandbox:/{quote(path)}", "mimeType": mimetypes.guess_type(path)[0]}
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = "\0"
    content = {"blob": base64.b64encode(data).decode()} if "\0" in text else {"text": text}
    return {"type": "resource", "resource": {key: value for key, value in found.items() if value} | content}
