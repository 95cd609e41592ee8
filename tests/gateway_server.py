"""An MCP server on stdio for tests of gateways: tools that answer, fail, wait, die or send more than text.

    python tests/gateway_server.py [--log FILE]

It speaks the handshake era and uses the standard library only. Calls run at the same time. In the file that `--log`
names there is a line for each call that began, that was cancelled and that was finished: `began KEY`, ...
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

__all__ = ["PNG", "TOOLS"]

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def _tool(name: str, required: dict[str, Any], optional: dict[str, Any] | None = None, **hints: bool) -> dict[str, Any]:
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }
    annotations = {"annotations": hints} if hints else {}
    return {"name": name, "description": f"The tool {name}.", "inputSchema": schema, **annotations}


_TEXT, _NUMBER = {"type": "string"}, {"type": "number"}

TOOLS = [
    _tool("echo", {"text": _TEXT}, readOnlyHint=True),
    _tool("add", {"a": _NUMBER, "b": _NUMBER}, idempotentHint=True),
    _tool("wait", {"seconds": _NUMBER, "key": _TEXT}),
    _tool("fail", {}),
    _tool("picture", {}),
    _tool("die", {}),
    _tool("secret", {}),
]


async def _call(name: str, given: dict[str, Any]) -> dict[str, Any]:
    match name:
        case "echo":
            return _said(given["text"])
        case "add":
            total = given["a"] + given["b"]
            return {**_said(json.dumps({"total": total})), "structuredContent": {"total": total}}
        case "wait":
            await asyncio.sleep(given["seconds"])
            return _said(f"waited for {given['key']}")
        case "fail":
            return {**_said("it did not work"), "isError": True}
        case "picture":
            return {"content": [*_said("a dot")["content"], {"type": "image", "data": PNG, "mimeType": "image/png"}]}
        case "secret":
            return _said(os.environ.get("SOME_TOKEN", "none"))
        case "die":
            os._exit(7)
    return {**_said(f"no tool {name}"), "isError": True}


def _said(text: str) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": text}]}


class _Server:
    def __init__(self, log: Path | None) -> None:
        self._log = log
        self._calls: dict[Any, asyncio.Task[None]] = {}

    def _note(self, what: str, key: str) -> None:
        if self._log is not None:
            with self._log.open("a") as file:
                file.write(f"{what} {key}\n")

    def take(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        match method:
            case "initialize":
                info = {"name": "gateway-test", "version": "1"}
                said = {"protocolVersion": "2025-11-25", "capabilities": {"tools": {}}, "serverInfo": info}
                self._answer(message, result=said)
            case "tools/list":
                self._answer(message, result={"tools": TOOLS})
            case "tools/call":
                self._calls[message["id"]] = asyncio.create_task(self._run(message))
            case "notifications/cancelled":
                call = self._calls.get(params.get("requestId"))
                if call is not None:
                    call.cancel()
            case "ping":
                self._answer(message, result={})
            case _ if "id" in message:
                self._answer(message, error={"code": -32601, "message": "Method not found"})

    async def _run(self, message: dict[str, Any]) -> None:
        name, given = message["params"]["name"], message["params"].get("arguments") or {}
        key = str(given.get("key", name))
        self._note("began", key)
        try:
            result = await _call(name, given)
        except asyncio.CancelledError:
            self._note("cancelled", key)
            return
        finally:
            del self._calls[message["id"]]
        self._note("finished", key)
        self._answer(message, result=result)

    def _answer(self, message: dict[str, Any], **outcome: Any) -> None:
        sys.stdout.write(json.dumps({"jsonrpc": "2.0", "id": message["id"], **outcome}) + "\n")
        sys.stdout.flush()


async def _main(log: Path | None) -> None:
    server = _Server(log)
    reader = asyncio.StreamReader(limit=10_000_000)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        server.take(json.loads(line))


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[2]) if sys.argv[1:2] == ["--log"] else None))
