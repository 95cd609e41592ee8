"""An MCP server on stdio without the SDK, which starts in some 30 ms: its tools do what the client has to cope with.

    python tests/mcp_servers/plain.py [--era legacy|modern] [--log FILE]

Each call that arrives is a line in FILE, and so is each call that is cancelled.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

ERA = sys.argv[sys.argv.index("--era") + 1] if "--era" in sys.argv else "modern"
LOG = sys.argv[sys.argv.index("--log") + 1] if "--log" in sys.argv else os.devnull

Message = dict[str, Any]
lock = threading.Lock()
answered: dict[Any, threading.Event] = {}
answers: dict[Any, Message] = {}
grown: list[str] = []
listens: list[Any] = []
calls: set[Any] = set()


def send(message: Message) -> None:
    with lock:
        sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
        sys.stdout.flush()


def note(line: str) -> None:
    with Path(LOG).open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def noted(line: str) -> int:
    return Path(LOG).read_text(encoding="utf-8").splitlines().count(line)


def tool(name: str, **annotations: bool) -> Message:
    schema = {"$schema": "x", "type": "object", "properties": {"text": {"type": "string"}}}
    return {"name": name, "description": f"The tool {name}.", "inputSchema": schema, "annotations": annotations}


TOOLS = [
    *(tool(name) for name in ("echo", "content", "structured", "secret", "environment", "sleep", "progress", "ask")),
    *(tool("die"), tool("die_read", readOnlyHint=True), tool("die_once"), tool("die_once_read", readOnlyHint=True)),
    *(tool("die_once_same", idempotentHint=True), tool("grow"), tool("half", readOnlyHint=False)),
]
BLOCKS = [
    {"type": "text", "text": "one"},
    {"type": "image", "data": "AAECAw==", "mimeType": "image/png"},
    {"type": "text", "text": "two"},
    {"type": "audio", "data": "AAEC", "mimeType": "audio/wav"},
    {"type": "resource_link", "uri": "file:///a.txt", "name": "a.txt", "mimeType": "text/plain"},
    {"type": "resource", "resource": {"uri": "file:///b.txt", "mimeType": "text/plain", "text": "inside"}},
    {"type": "resource", "resource": {"uri": "file:///c.bin", "mimeType": "application/x", "blob": "AAECAwQ="}},
]
QUESTION = {
    "mode": "form",
    "message": "Which colour?",
    "requestedSchema": {"type": "object", "properties": {"colour": {"type": "string"}}},
}


def text(words: str, **more: Any) -> Message:
    return {"resultType": "complete", "content": [{"type": "text", "text": words}], **more}


def ask(request: Message) -> Message:
    params = request["params"]
    if ERA == "modern":
        given = (params.get("inputResponses") or {}).get("q")
        if given is None:
            asked = {"q": {"method": "elicitation/create", "params": QUESTION}}
            return {"resultType": "input_required", "inputRequests": asked, "requestState": "s7"}
        return text(json.dumps({"answer": given, "state": params.get("requestState")}))
    question = f"question-{request['id']}"
    answered[question] = threading.Event()
    send({"id": question, "method": "elicitation/create", "params": QUESTION})
    answered[question].wait()
    return text(json.dumps({"answer": answers[question].get("result", answers[question].get("error"))}))


def die_once(name: str) -> Message:
    if noted(name) == 1:
        os._exit(7)
    return text(f"{name} lives")


def call(request: Message) -> Message | None:
    name, arguments = request["params"]["name"], request["params"].get("arguments") or {}
    note(name)
    calls.add(request["id"])
    match name:
        case "echo":
            return text(arguments.get("text", ""))
        case "content":
            return {"content": BLOCKS, "structuredContent": {"n": 7}}
        case "structured":
            return text('{"n": 7}', structuredContent={"n": 7})
        case "secret":
            secret = os.environ["API_TOKEN"]
            sys.stderr.write(secret)
            link = {"type": "resource_link", "uri": f"http://x/{secret}", "name": "x"}
            said = text(f"it is {secret}", structuredContent={"token": secret})
            return {**said, "content": [*said["content"], link], "isError": arguments.get("text") == "fail"}
        case "environment":
            return text(json.dumps(dict(os.environ)))
        case "sleep":
            time.sleep(float(arguments["text"]))
            return text("slept")
        case "progress":
            while True:
                send({"method": "notifications/progress", "params": {"progressToken": request["id"], "progress": 1}})
                time.sleep(0.02)
        case "ask":
            return ask(request)
        case "die" | "die_read":
            sys.stderr.write("out of memory\n")
            sys.stderr.flush()
            os._exit(7)
        case "grow":
            grown.append(f"new_{len(grown)}")
            meta = {"_meta": {"io.modelcontextprotocol/subscriptionId": listens[-1]}} if listens else {}
            send({"method": "notifications/tools/list_changed", "params": meta})
            return text("grown")
        case "half":
            sys.stdout.write("no JSON at all\n")
            return text("fine")
    return die_once(name) if name in {each["name"] for each in TOOLS} else text(f"{name} is new")


def answer(request: Message) -> Message | None:
    listed = {"ttlMs": 0, "cacheScope": "private", "resultType": "complete"}
    capabilities = {"tools": {"listChanged": True}}
    info = {"name": "plain", "version": "1"}
    match request["method"], ERA:
        case "initialize", "legacy":
            return {"protocolVersion": "2025-11-25", "capabilities": capabilities, "serverInfo": info}
        case "server/discover", "modern":
            return {**listed, "supportedVersions": ["2026-07-28"], "capabilities": capabilities, "serverInfo": info}
        case "tools/list", _:
            return {**listed, "tools": [*TOOLS, *(tool(name) for name in grown)]}
        case "tools/call", _:
            return call(request)
    return None


def respond(request: Message) -> None:
    if request["method"] == "subscriptions/listen" and ERA == "modern":
        listens.append(request["id"])
        meta = {"io.modelcontextprotocol/subscriptionId": request["id"]}
        params = {"notifications": {"toolsListChanged": True}, "_meta": meta}
        send({"method": "notifications/subscriptions/acknowledged", "params": params})
        return
    result = answer(request)
    if result is None:
        send({"id": request["id"], "error": {"code": -32601, "message": f"no method {request['method']}"}})
    else:
        send({"id": request["id"], "result": result})


def main() -> None:
    """Answer each line in a thread of its own."""
    for line in sys.stdin:
        message = json.loads(line)
        if "method" not in message:
            answers[message["id"]] = message
            answered[message["id"]].set()
        elif "id" in message:
            threading.Thread(target=respond, args=(message,), daemon=True).start()
        elif message["method"] == "notifications/cancelled" and message["params"]["requestId"] in calls:
            note("cancelled")
    os._exit(0)


if __name__ == "__main__":
    main()
