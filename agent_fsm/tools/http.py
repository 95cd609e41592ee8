"""Tools behind an HTTP gateway: `GET /tools` lists them, `POST /invoke` calls one."""

import base64
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final
from urllib.parse import unquote, urlsplit, urlunsplit

from attrs import evolve, field, frozen

from agent_fsm.errors import ConfigError
from agent_fsm.messages import decode_object
from agent_fsm.protocol import ToolResult
from agent_fsm.redaction import redact, redact_json, secret_values
from agent_fsm.tools.exchange import Fault, Reply, Request, Wired, base_of, may_pass, sent_until, shown

__all__ = ["HttpToolsInvoker"]

_PAUSES: Final = (0.25,)
"""Seconds before a request is sent again, where the gateway doesn't say how many: once, at most."""
_KNOWN: Final = ("text", "error", "data", "content", "structuredContent", "isError")
"""The members of an answer to a call."""
_SHAPE: Final = "an answer to POST /invoke must be a JSON object with text, error or data"
_TOOLS_SHAPE: Final = "GET /tools must answer with a JSON array of OpenAI function tools"
_MOVED: Final = "give the address itself as the base URL"
_HINTS: Final = {
    401: "the gateway wants other credentials than the headers that it is given",
    403: "the gateway wants other credentials than the headers that it is given",
    405: "the base URL may be wrong: the gateway must take GET /tools and POST /invoke",
    413: "send less",
}


class HttpToolsInvoker(Wired):
    """Offers the tools of a gateway, and has it call them.

    A call is sent once. It is sent a second time only if the gateway answered 429, which says that it was not run
    (after the seconds that Retry-After asks for, if they are left), or if its tool is marked idempotent or read-only
    and the failure was one that may pass. Whatever else comes back is a failed result that says what it was.

    Args:
        base_url: where the gateway is; `/tools` and `/invoke` are appended. A user and password in it are sent as
            basic authorization.
        headers: sent with every request. Those that look like credentials are in no log, result or error.
        timeout_s: seconds that a call may take in all, a second attempt included; the gateway is told in X-Deadline-Ms.
        idempotent: names of tools that may be run twice, besides those that the gateway marks as such.
        max_body_bytes: what an answer may have at most.

    Raises:
        ConfigError: one of these can't be.
    """

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str] | None = None,
        *,
        timeout_s: float = 25.0,  # below AgentConfig.tool_timeout_seconds: what came back can still be said
        idempotent: Collection[str] = (),
        max_body_bytes: int = 2 * 2**20,
    ) -> None:
        if isinstance(idempotent, str):
            raise ConfigError(f"idempotent must be a collection of names, not {idempotent!r}")
        super().__init__(timeout_s=timeout_s, max_body_bytes=max_body_bytes)
        self._gateway = _gateway_of(base_url, headers or {})
        self._idempotent = frozenset(idempotent)
        self._marked: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._gateway.base_url!r})"

    async def list_openai_tools(self) -> list[dict[str, Any]]:
        """Return the gateway's tools.

        Raises:
            RuntimeError: it did not list them; says what came back and what would be right.
        """
        request = Request("GET", f"{self._gateway.base_url}/tools", self._gateway.headers, tells_deadline=True)
        outcome = await self._outcome(request, may_repeat=True)
        listed = self._failure(outcome) or _tools_of(outcome, self._gateway.secrets)
        if isinstance(listed, str):
            raise RuntimeError(redact(listed, self._gateway.secrets))
        first = dict(reversed(listed))  # of tools with one name the first counts
        self._marked = frozenset(name for name, tool in first.items() if _may_repeat(tool))
        tools = [_without_annotations(tool) for _, tool in listed]
        try:
            return [redact_json(tool, self._gateway.secrets) for tool in tools] if self._gateway.secrets else tools
        except RecursionError:
            raise RuntimeError(f"{_TOOLS_SHAPE}; it is nested too deep") from None

    async def call_openai_tool(self, call: Any, /) -> ToolResult:
        """Have the gateway run an OpenAI tool call, and return what came of it."""
        function = call.get("function") if isinstance(call, Mapping) else None
        name, wrote = (
            (function.get("name"), function.get("arguments")) if isinstance(function, Mapping) else (None, None)
        )
        if not isinstance(name, str) or not name:
            return ToolResult("error: the call names no tool", ok=False)
        arguments = decode_object(wrote) if isinstance(wrote, str) else wrote
        if not isinstance(arguments, Mapping):
            return ToolResult(f"error: the arguments must be a JSON object, not {shown(repr(wrote), 100)}", ok=False)
        try:
            content = json.dumps({"name": name, "arguments": arguments}, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            return ToolResult(f"error: the arguments can't be sent as JSON: {shown(str(error))}", ok=False)
        request = Request(
            "POST", f"{self._gateway.base_url}/invoke", self._gateway.headers, content=content, tells_deadline=True
        )
        outcome = await self._outcome(request, may_repeat=name in self._idempotent | self._marked)
        failure = self._failure(outcome)
        try:
            return self._redacted(ToolResult(f"error: {failure}", ok=False) if failure else self._result_of(outcome))
        except RecursionError:
            return ToolResult("error: the call was run, but its result is nested too deep to be read", ok=False)

    async def _outcome(self, request: Request, *, may_repeat: bool) -> Reply | Fault:
        def again(outcome: Reply | Fault) -> bool:
            refused = isinstance(outcome, Reply) and outcome.status == 429
            return (may_repeat or refused) and may_pass(outcome)

        deadline, secrets = self._deadline(), self._gateway.secrets
        async with self._wires() as wire:
            return await sent_until(wire, request, deadline=deadline, pauses=_PAUSES, again=again, secrets=secrets)

    def _failure(self, outcome: Reply | Fault) -> str:
        """Return why *outcome* is no answer, in words for the model; empty if it is one."""
        where, secrets = f"the tools gateway at {self._gateway.base_url}", self._gateway.secrets
        if isinstance(outcome, Fault):
            fate = "it had been sent, and what it did is unknown" if outcome.sent else "it was not sent"
            told = f"{where} did not answer the request: {fate} ({outcome.why})"
        elif outcome.ok:
            return ""
        elif 300 <= outcome.status < 400:
            target = shown(outcome.headers.get("location", ""), secrets=secrets) or "nowhere"
            told = f"{where} answered {outcome.status}, a redirect to {target}; redirects are not followed: {_MOVED}"
        else:
            told = f"{where} answered {outcome.told(secrets)}"
            if outcome.status < 300:
                told += "; so the request was run, but its answer is not whole"
        hint = _HINTS.get(outcome.status, "") if isinstance(outcome, Reply) else ""
        return "; ".join(part for part in (told, outcome.note, hint) if part)

    def _result_of(self, outcome: Reply | Fault) -> ToolResult:
        assert isinstance(outcome, Reply)  # else it is a failure
        try:
            return _read_answer(outcome)
        except _NoAnswerError as error:
            came = outcome.told(self._gateway.secrets)
            told = f"the call was run, but its result can't be read: {error}; {_SHAPE}; it answered {came}"
            return ToolResult(f"error: {told}", ok=False)

    def _redacted(self, result: ToolResult) -> ToolResult:
        secrets = self._gateway.secrets
        if not secrets:
            return result
        return evolve(
            result,
            text=redact(result.text, secrets),
            parts=tuple(redact_json(part, secrets) for part in result.parts),
            structured=redact_json(result.structured, secrets),
        )


# Where the gateway is


@frozen
class _Gateway:
    base_url: str
    """Without user and password."""
    headers: Mapping[str, str] = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)


def _gateway_of(base_url: str, headers: Mapping[str, str]) -> _Gateway:
    parts = urlsplit(base_of(base_url, "base_url"))
    sent = {name: _header(name, value) for name, value in headers.items()}
    secrets = secret_values(sent)
    user, at, host = parts.netloc.rpartition("@")
    if at:  # in a URL httpx would log them
        user = user if ":" in user else f"{user}:"
        basic = base64.b64encode(unquote(user).encode()).decode()
        if "authorization" not in {name.lower() for name in sent}:
            sent["Authorization"] = f"Basic {basic}"
        secrets += secret_values({"Authorization": f"Basic {basic}", "base_url": base_url})
    return _Gateway(urlunsplit(parts._replace(netloc=host)), sent, tuple(dict.fromkeys(secrets)))


def _header(name: str, value: str) -> str:
    """Return the value as it is sent: tokens read from files end with a line break."""
    if not isinstance(name, str) or not isinstance(value, str) or not name:
        raise ConfigError(f"a header's name and value must be texts: {name!r}")
    value = value.strip()
    if not f"{name}{value}".isascii() or not f"{name}{value}".isprintable() or set(name) & set(" :"):
        raise ConfigError(f"the header {name!r} has a character that can't be sent")  # its value is not to be shown
    return value


# What came back


def _tools_of(outcome: Reply | Fault, secrets: Sequence[str]) -> str | list[tuple[str, Mapping[str, Any]]]:
    """Return the tools listed, by name, or why there are none."""
    assert isinstance(outcome, Reply)  # else it is a failure
    try:
        body = outcome.json()
    except ValueError as error:
        return f"{_TOOLS_SHAPE}; it is no JSON ({shown(str(error))}): {outcome.told(secrets)}"
    tools = body.get("tools") if isinstance(body, Mapping) else body
    if not isinstance(tools, list):
        return f"{_TOOLS_SHAPE}; it answered {outcome.told(secrets)}"
    named = [(_name_of(tool), tool) for tool in tools]
    listed = [(name, tool) for name, tool in named if name]
    if tools and not listed:
        return f"{_TOOLS_SHAPE}; none of the {len(tools)} things that it lists is one: {outcome.told(secrets)}"
    return listed


def _name_of(tool: Any) -> str:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else ""


def _may_repeat(tool: Mapping[str, Any]) -> bool:
    hints = [place.get("annotations") for place in (tool, tool["function"])]
    return any(
        hint.get(name) is True
        for hint in hints
        if isinstance(hint, Mapping)
        for name in ("idempotentHint", "readOnlyHint")
    )


def _without_annotations(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = {name: value for name, value in tool["function"].items() if name != "annotations"}
    return {name: value for name, value in tool.items() if name != "annotations"} | {"function": function}


class _NoAnswerError(Exception):
    """What came back is no answer to a call; says why."""


def _read_answer(reply: Reply) -> ToolResult:
    try:
        body = reply.json()
    except ValueError as error:
        raise _NoAnswerError(f"it is no JSON ({shown(str(error))})") from None
    if not isinstance(body, Mapping):
        raise _NoAnswerError("it is no object")
    if body and not any(name in body for name in _KNOWN):
        raise _NoAnswerError("it has none of these members")
    text, content = body.get("text"), body.get("content")
    if not isinstance(text, str | None):
        raise _NoAnswerError("its text is no string")
    if content is not None and not (isinstance(content, list) and all(isinstance(part, Mapping) for part in content)):
        raise _NoAnswerError("its content is no array of content blocks")
    why = _error_of(body.get("error"))
    failed = bool(why) or body.get("isError") is True
    said = [why, "" if text == why else text or "", "" if body.get("data") is None else _compact(body["data"])]
    whole = "\n".join(part for part in said if part)
    if failed and not whole.strip():
        whole = "error: the tool failed and did not say why"
    return ToolResult(whole, not failed, parts=tuple(content or ()), structured=body.get("structuredContent"))


def _error_of(error: Any) -> str:
    if not error:
        return ""
    if isinstance(error, Mapping) and isinstance(error.get("message"), str):
        error = error["message"]
    return error if isinstance(error, str) else _compact(error)


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
