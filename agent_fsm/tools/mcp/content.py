"""Content: what an MCP server sends, as a result for the model and as tools to offer it.

Pure. What comes in is JSON that nobody has looked at; nothing of it is dropped silently, and nothing in it can raise.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import field, frozen

from agent_fsm.messages import encodable
from agent_fsm.protocol import ToolResult

__all__ = ["McpTool", "openai_tool", "read_result", "read_tool"]


# Results


def read_result(answer: Mapping[str, Any]) -> ToolResult:
    """Return what the result of a `tools/call` amounts to.

    Its text is the text of the blocks, then a line for each other block, then the structured content where no text
    says it already. The other blocks are its parts, as they came.
    """
    content = answer.get("content", [])
    structured = answer.get("structuredContent")
    blocks = list(content) if isinstance(content, list | tuple) else []
    try:
        lines = [text for text in map(_text, blocks) if text is not None]
        said = lines.copy()
        lines += [_described(block) for block in blocks if _text(block) is None]
        if structured is not None and not _says(said, structured):
            lines.append(_compact(structured))
    except RecursionError:
        return ToolResult("error: the call was carried out, but its result is nested too deeply to be read", ok=False)
    if not isinstance(content, list | tuple):
        lines.insert(0, f"error: the call was carried out, but its result has no list of content: {_compact(content)}")
    return ToolResult(
        encodable("\n".join(lines)),
        ok=answer.get("isError") is not True and isinstance(content, list | tuple),
        parts=tuple(block for block in blocks if isinstance(block, Mapping) and _text(block) is None),
        structured=structured,
    )


def _text(block: object) -> str | None:
    """Return the text of a text block; None for any other."""
    if isinstance(block, Mapping) and block.get("type") == "text" and isinstance(block.get("text"), str):
        return str(block["text"])
    return None


def _described(block: object) -> str:
    """Return the line, or for a text file the lines, that tell of a block that is no text."""
    if not isinstance(block, Mapping):
        return f"[unknown] {_compact(block)}"
    kind, data, mime = block.get("type"), block.get("data"), block.get("mimeType")
    if kind in ("image", "audio") and isinstance(data, str):
        return f"[{kind}{f' {mime}' if mime else ''}, {_decoded_bytes(data)} bytes]"
    if kind == "resource_link":
        return f"[resource_link {' '.join(str(each) for each in (block.get('name'), block.get('uri'), mime) if each)}]"
    resource = block.get("resource")
    if kind == "resource" and isinstance(resource, Mapping):
        return _embedded(resource)
    return f"[{kind if isinstance(kind, str) and kind else 'unknown'}] {_compact(block)}"


def _embedded(resource: Mapping[str, Any]) -> str:
    text, blob, mime = resource.get("text"), resource.get("blob"), resource.get("mimeType")
    head = [str(each) for each in (resource.get("uri"), mime) if each]
    if isinstance(text, str):
        return f"[resource {', '.join(head)}]\n{text}"
    if isinstance(blob, str):
        head.append(f"{_decoded_bytes(blob)} bytes")
    return f"[resource {', '.join(head)}]"


def _decoded_bytes(data: str) -> int:
    """Return how many bytes *data*, which is base64, stands for."""
    digits = data.rstrip("=\n\r ")
    return len(digits) * 3 // 4


def _says(texts: Sequence[str], structured: Any) -> bool:
    """Return whether one of *texts* is *structured*, or what is wrapped in it as `{"result": ...}`, already."""
    wanted = [structured]
    if isinstance(structured, Mapping) and structured.keys() == {"result"}:
        wanted.append(structured["result"])
        if structured["result"] in texts:
            return True
    forms = {_canonical(each) for each in wanted}
    return any(_canonical(value) in forms for text in texts for value in _parsed(text))


def _parsed(text: str) -> Iterator[Any]:
    try:
        yield json.loads(text)
    except (ValueError, RecursionError):
        return


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


# Tools


@frozen
class McpTool:
    """A tool as its server lists it."""

    name: str
    """What the server calls it."""
    description: str
    parameters: Mapping[str, Any]
    """The JSON schema of its arguments, as OpenAI takes it."""
    annotations: Mapping[str, Any] = field(factory=dict)
    """What the server says of its behaviour, as it came. Hints that nobody vouches for."""
    output_schema: Mapping[str, Any] | None = None

    @property
    def repeatable(self) -> bool:
        """True if, by its own word, calling it twice does no more than calling it once."""
        return any(self.annotations.get(hint) is True for hint in ("readOnlyHint", "idempotentHint"))


def read_tool(listed: object) -> McpTool | str:
    """Return the tool in an entry of a listing, or why it is none."""
    if not isinstance(listed, Mapping):
        return "an entry of the listing is no object"
    name, schema = listed.get("name"), listed.get("inputSchema")
    if not isinstance(name, str):
        return "a tool has no name"
    if not isinstance(schema, Mapping):
        return f"tool {name!r} has no schema"
    properties = schema.get("properties", {})
    if schema.get("type", "object") != "object" or not isinstance(properties, Mapping):
        return f"tool {name!r} has a schema that is not one of an object"
    described = next(
        (each for key in ("description", "title") if isinstance(each := listed.get(key), str) and each), ""
    )
    annotations, output = listed.get("annotations"), listed.get("outputSchema")
    return McpTool(
        name,
        encodable(described),
        {
            **{key: value for key, value in schema.items() if key != "$schema"},
            "type": "object",
            "properties": properties,
        },
        annotations if isinstance(annotations, Mapping) else {},
        output if isinstance(output, Mapping) else None,
    )


def openai_tool(name: str, tool: McpTool) -> dict[str, Any]:
    """Return *tool* as an OpenAI function tool called *name*."""
    function = {"name": name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}
