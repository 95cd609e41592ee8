"""Research tools: Perplexity answers a question from the web, Context7 looks a library's documentation up.

Both are asked over their public HTTP interfaces: Perplexity's `POST /chat/completions`, Context7's
`GET /v2/libs/search` and `GET /v2/context`. Asking changes nothing, so what fails in passing is asked again.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from attrs import asdict, field, frozen

from agent_fsm.errors import ConfigError
from agent_fsm.messages import decode_object
from agent_fsm.protocol import ToolResult
from agent_fsm.redaction import redact, redact_json
from agent_fsm.tools.exchange import Fault, Reply, Request, Wire, Wired, base_of, may_pass, sent_until, shown

__all__ = ["ResearchPythonInvoker"]

_PERPLEXITY: Final = "research_perplexity"
_CONTEXT7: Final = "research_context7_docs"
_PPLX_BASE: Final = "https://api.perplexity.ai"
_PPLX_MODEL: Final = "sonar"
_C7_BASE: Final = "https://context7.com/api"
_PAUSES: Final = (0.5, 1.0, 2.0)
"""Seconds before a request is sent again, where the service doesn't say how many."""
_OTHERS: Final = 4
"""Libraries of a similar name that an answer mentions."""


class ResearchPythonInvoker(Wired):
    """Offers `research_perplexity` if there is a Perplexity key, `research_context7_docs` if there is an address of
    Context7 or a key for it.

    A tool that can't be used is not offered where the other can. Where neither can, both are listed, so that a call
    says which variable is missing, but neither is among the `research_tools`: Research is never entered for them.

    What is not given here is read from the environment whenever it is needed: PPLX_API_KEY, PPLX_API_BASE, PPLX_MODEL
    (`sonar` if not set), C7_API_BASE, C7_API_KEY. Keys are in no log, result or error.

    Args:
        timeout_s: seconds that a call may take in all, further attempts included.
        max_body_bytes: what an answer may have at most.
        environ: what to read in place of the environment.

    Raises:
        ConfigError: a number that can't be.
    """

    def __init__(
        self,
        *,
        pplx_api_key: str | None = None,
        pplx_api_base: str | None = None,
        pplx_model: str | None = None,
        c7_api_base: str | None = None,
        c7_api_key: str | None = None,
        timeout_s: float = 25.0,  # below AgentConfig.tool_timeout_seconds: what came back can still be said
        max_body_bytes: int = 2 * 2**20,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(timeout_s=timeout_s, max_body_bytes=max_body_bytes)
        self._environ = environ
        self._given = {
            "PPLX_API_KEY": pplx_api_key,
            "PPLX_API_BASE": pplx_api_base,
            "PPLX_MODEL": pplx_model,
            "C7_API_BASE": c7_api_base,
            "C7_API_KEY": c7_api_key,
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}(research_tools={sorted(self.research_tools)})"

    @property
    def research_tools(self) -> frozenset[str]:
        """The names of the tools that can be used."""
        return frozenset(name for name, service in self._services().items() if not service.missing)

    async def list_openai_tools(self) -> list[dict[str, Any]]:
        """Return the tools that can be used; all of them if none can."""
        usable = self.research_tools
        return [tool for tool in _tools() if not usable or tool["function"]["name"] in usable]

    async def call_openai_tool(self, call: Any, /) -> ToolResult:
        """Run an OpenAI tool call, and return the answer with its sources."""
        services = self._services()
        try:
            name, arguments = _read_call(call)
            async with self._wires() as wire:
                asking = _Asking(wire, self._deadline(), services[name])
                match name:
                    case "research_perplexity":
                        result = await _perplexity(asking, arguments, self._setting("PPLX_MODEL") or _PPLX_MODEL)
                    case _:
                        result = await _context7(asking, arguments)
        except _FailedError as failed:
            result = ToolResult(f"error: {failed}", ok=False)
        secrets = [service.key for service in services.values() if service.key]
        return ToolResult(redact(result.text, secrets), result.ok, structured=redact_json(result.structured, secrets))

    def _setting(self, variable: str) -> str:
        environ = os.environ if self._environ is None else self._environ
        given = self._given[variable]
        return (environ.get(variable, "") if given is None else given).strip()

    def _services(self) -> "dict[str, _Service]":
        key, base = self._setting("C7_API_KEY"), self._setting("C7_API_BASE")
        return {
            _PERPLEXITY: _service("Perplexity", "PPLX", self._setting("PPLX_API_KEY"), self._setting("PPLX_API_BASE")),
            _CONTEXT7: _service("Context7", "C7", key, base),
        }


class _FailedError(Exception):
    """There is no answer; says in words for the model why, and what would be right."""


@frozen
class _Service:
    """Whom to ask."""

    name: str
    prefix: str
    """What its variables begin with."""
    base_url: str
    key: str = field(repr=False)
    missing: str
    """Why it can't be used; empty if it can."""

    def headers(self) -> dict[str, str]:
        return {"Accept": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})


def _service(name: str, prefix: str, key: str, base: str) -> _Service:
    variable = f"{prefix}_API_BASE"
    missing, base_url = "", ""
    try:
        base_url = _pplx_base(base) if prefix == "PPLX" else _c7_base(base)
        if "@" in urlsplit(base_url).netloc:
            missing = f"{variable} must hold no user and password"
    except ConfigError as error:
        missing = str(error)
    if not key and prefix == "PPLX":
        missing = "PPLX_API_KEY is not set; it holds the key for Perplexity's API"
    elif not key and not base:
        missing = f"C7_API_BASE is not set; it holds the address of Context7's API, such as {_C7_BASE}"
    elif not (key.isascii() and key.isprintable()):
        missing = f"{prefix}_API_KEY has a character that can't be sent"
    return _Service(name, prefix, base_url, key, missing)


def _pplx_base(base: str) -> str:
    return base_of(base or _PPLX_BASE, "PPLX_API_BASE").removesuffix("/chat/completions")


def _c7_base(base: str) -> str:
    """Return what `/v2/...` is appended to, be *base* the host, the API's root or one version of it."""
    base = re.sub(r"/v\d+$", "", base_of(base or _C7_BASE, "C7_API_BASE"))
    return base if urlsplit(base).path else f"{base}/api"


@frozen
class _Asking:
    """How to ask one service within one call."""

    wire: Wire
    deadline: float
    service: _Service

    async def get(self, path: str, params: Mapping[str, str]) -> Reply | Fault:
        return await self._sent(Request("GET", f"{self.service.base_url}{path}", self.service.headers(), params))

    async def post(self, path: str, body: Mapping[str, Any]) -> Reply | Fault:
        content = json.dumps(body).encode()
        url = f"{self.service.base_url}{path}"
        return await self._sent(Request("POST", url, self.service.headers(), content=content))

    async def _sent(self, request: Request) -> Reply | Fault:
        if self.service.missing:
            raise _FailedError(f"{self.service.name} can't be asked: {self.service.missing}")
        return await sent_until(
            self.wire, request, deadline=self.deadline, pauses=_PAUSES, again=may_pass, secrets=[self.service.key]
        )

    def answer(self, outcome: Reply | Fault) -> Reply:
        """Return *outcome* if it is an answer.

        Raises:
            _FailedError: it is none.
        """
        if isinstance(outcome, Reply) and outcome.ok and outcome.status != 202:
            return outcome
        raise self.failure(outcome)

    def failure(self, outcome: Reply | Fault, why: str = "") -> _FailedError:
        """Return what to raise: it says what came back, and *why* that is no answer."""
        service = f"{self.service.name} ({self.service.base_url})"
        if isinstance(outcome, Fault):
            told, hint = f"{service} did not answer: {outcome.why}", ""
        else:
            secrets = [self.service.key]
            location = shown(outcome.headers.get("location", ""), secrets=secrets)
            target = f", a redirect to {location or 'nowhere'}"
            told = f"{service} answered {outcome.told(secrets)}{target if 300 <= outcome.status < 400 else ''}"
            hint = self._hint(outcome.status)
        return _FailedError("; ".join(part for part in (told, why, outcome.note, hint) if part))

    def _hint(self, status: int) -> str:
        prefix = self.service.prefix
        match status:
            case 401 | 403:
                return f"the key in {prefix}_API_KEY may be wrong" if self.service.key else f"it wants {prefix}_API_KEY"
            case 429 if not self.service.key:
                return f"with a key in {prefix}_API_KEY the limit is higher"
            case 404 | 405 if prefix == "PPLX":
                return "PPLX_API_BASE may be wrong"
        return ""


# Perplexity


async def _perplexity(asking: _Asking, arguments: Mapping[str, Any], model: str) -> ToolResult:
    query = _text(arguments, "query")
    body = {"model": model, "messages": [{"role": "user", "content": query}]}
    reply = asking.answer(await asking.post("/chat/completions", body))
    whole = _object(reply)
    answer = re.sub(r"\A\s*<think>.*?</think>\s*", "", _content(whole), flags=re.DOTALL).strip()
    if not answer:
        raise asking.failure(reply, "an answer must be a chat completion with a text in it")
    sources = _cited(whole)
    structured = {"answer": answer, "citations": sources.told()}
    return ToolResult(f"{answer}{sources}", structured=structured)


def _cited(completion: Mapping[str, Any]) -> "_Sources":
    """Return the sources, numbered as the marks in the answer count them: [1] is the first of `citations`, which has
    only addresses; `search_results` has titles and dates."""
    results = [each for each in _list(completion, "search_results") if _string(each, "url")]
    known = {
        each["url"].strip(): _Source(*(_string(each, name) for name in ("url", "title", "date"))) for each in results
    }
    urls = [each for each in _list(completion, "citations") if isinstance(each, str)]
    urls = urls or [_string(each, "url") for each in results]
    urls += [url for url in known if url not in urls]
    return _Sources([known.get(url, _Source(url)) for url in urls])


def _content(completion: Mapping[str, Any]) -> str:
    choice = next(iter(_list(completion, "choices")), None)
    message = choice.get("message") if isinstance(choice, Mapping) else None
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, list):
        return "".join(_raw(part, "text") for part in content)
    return content if isinstance(content, str) else ""


# Context7


async def _context7(asking: _Asking, arguments: Mapping[str, Any]) -> ToolResult:
    library = _text(arguments, "library")
    topic = _text(arguments, "topic") if arguments.get("topic") is not None else library
    others: list[str] = []
    if not library.startswith("/"):
        library, *others = await _libraries(asking, library, topic)
    outcome = await _documentation(asking, library, topic)
    moved = _string(_object(outcome), "redirectUrl") if isinstance(outcome, Reply) and outcome.status == 301 else ""
    if re.match(r"/[^/]", moved):  # a library's new name, to be asked for at the same address
        library = moved
        outcome = await _documentation(asking, library, topic)
    return _documented(asking, asking.answer(outcome), library, others)


async def _documentation(asking: _Asking, library: str, topic: str) -> Reply | Fault:
    return await asking.get("/v2/context", {"libraryId": library, "query": topic, "type": "json"})


async def _libraries(asking: _Asking, name: str, topic: str) -> list[str]:
    """Return the libraries that *name* may mean, the likeliest first; at least one."""
    reply = asking.answer(await asking.get("/v2/libs/search", {"libraryName": name, "query": topic}))
    body = _json(reply)
    results = body if isinstance(body, list) else _list(body, "results")
    found = [each for each in results if _string(each, "id").startswith("/")]
    ready = [each for each in found if _string(each, "state") in ("", "finalized")]
    if not found:
        raise _FailedError(f"Context7 knows no library {shown(name, 100)!r}; try another name, or its id (/owner/name)")
    return [_string(each, "id") for each in ready or found]


def _documented(asking: _Asking, reply: Reply, library: str, others: Sequence[str]) -> ToolResult:
    body = _json(reply)
    sources = _Sources()
    if isinstance(body, Mapping):
        pieces = [_code(each, sources) for each in _list(body, "codeSnippets")]
        pieces += [_prose(each, sources) for each in _list(body, "infoSnippets")]
        text = "\n\n".join(piece for piece in pieces if piece)
    else:  # a text, which names its sources itself
        text = "" if body is not None else reply.body.decode("utf-8", "replace").strip()
    if not text:
        raise asking.failure(
            reply, f"there is no documentation of {library} on that topic: try another, or another library"
        )
    also = f"\n\nLibraries of a similar name: {', '.join(others[:_OTHERS])}" if others else ""
    whole = f"Documentation of {library}:\n\n{text}{sources}{also}"
    return ToolResult(whole, structured={"library": library, "citations": sources.told()})


def _code(snippet: Any, sources: "_Sources") -> str:
    # A block's own line break is not doubled; its indentation stays
    code = [
        f"```{_string(each, 'language')}\n{_raw(each, 'code').rstrip()}\n```" for each in _list(snippet, "codeList")
    ]
    title = _string(snippet, "codeTitle")
    if not code and not title:
        return ""
    mark = sources.mark(_string(snippet, "codeId"), _string(snippet, "pageTitle") or title)
    return "\n".join(part for part in (f"### {title}{mark}", _string(snippet, "codeDescription"), *code) if part)


def _prose(snippet: Any, sources: "_Sources") -> str:
    content, title = _string(snippet, "content"), _string(snippet, "breadcrumb")
    if not content:
        return ""
    mark = sources.mark(_string(snippet, "pageId"), title)
    return f"### {title}{mark}\n{content}" if title else f"{content}{mark}"


# Sources


@frozen
class _Source:
    url: str
    title: str = ""
    date: str = ""


@frozen
class _Sources:
    """Where an answer is from, in the order in which its marks count."""

    found: list[_Source] = field(factory=list)

    def mark(self, url: str, title: str) -> str:
        """Return the mark of a source, such as ` [1]`, noting it if it is new; empty if there is no address."""
        if not url:
            return ""
        urls = [source.url for source in self.found]
        if url not in urls:
            self.found.append(_Source(url, title))
            urls.append(url)
        return f" [{urls.index(url) + 1}]"

    def told(self) -> list[dict[str, Any]]:
        """Return the sources as JSON values."""
        return [{"number": number, **asdict(source)} for number, source in enumerate(self.found, 1)]

    def __str__(self) -> str:
        lines = []
        for number, source in enumerate(self.found, 1):
            title = f"{shown(source.title, 200)} ({source.date})" if source.date else shown(source.title, 200)
            lines.append(f"[{number}] {title} - {source.url}" if title else f"[{number}] {source.url}")
        return "\n\nSources:\n" + "\n".join(lines) if lines else ""


# What came back


def _json(reply: Reply) -> Any:
    """Return the body as a JSON value; None if it is none."""
    try:
        return reply.json()
    except ValueError:
        return None


def _object(reply: Reply) -> Mapping[str, Any]:
    body = _json(reply)
    return body if isinstance(body, Mapping) else {}


def _list(thing: Any, name: str) -> list[Any]:
    value = thing.get(name) if isinstance(thing, Mapping) else None
    return value if isinstance(value, list) else []


def _string(thing: Any, name: str) -> str:
    return _raw(thing, name).strip()


def _raw(thing: Any, name: str) -> str:
    value = thing.get(name) if isinstance(thing, Mapping) else None
    return value if isinstance(value, str) else ""


# What the model is offered, and what it asked for


def _tools() -> list[dict[str, Any]]:
    query = {"type": "string", "description": "The question, in a sentence, with all that it needs to be understood."}
    library = {
        "type": "string",
        "description": "The library's name, e.g. next.js, or its Context7 id if it is known, e.g. /vercel/next.js",
    }
    topic = {"type": "string", "description": "What to find out about it, in a sentence."}
    return [
        _tool(
            _PERPLEXITY,
            "Asks Perplexity, which searches the web and answers with its sources.",
            {"query": query},
            ["query"],
        ),
        _tool(
            _CONTEXT7,
            "Looks up the current documentation of a programming library: code and text, with their sources.",
            {"library": library, "topic": topic},
            ["library"],
        ),
    ]


def _tool(name: str, description: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _read_call(call: Any) -> tuple[str, Mapping[str, Any]]:
    function = call.get("function") if isinstance(call, Mapping) else None
    name, wrote = (function.get("name"), function.get("arguments")) if isinstance(function, Mapping) else (None, None)
    known = {tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in _tools()}
    if not isinstance(name, str) or name not in known:
        raise _FailedError(f"there is no tool {shown(str(name), 100)!r}; there are: {', '.join(known)}")
    arguments = decode_object(wrote) if isinstance(wrote, str) else wrote
    if not isinstance(arguments, Mapping):
        raise _FailedError(f"the arguments must be a JSON object, not {shown(repr(wrote), 100)}")
    unknown = [argument for argument in arguments if argument not in known[name]]
    if unknown:
        taken = " and ".join(known[name])
        raise _FailedError(f"unknown argument {shown(str(unknown[0]), 100)!r}; {name} takes {taken}")
    return name, arguments


def _text(arguments: Mapping[str, Any], name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str) or not value.strip():
        raise _FailedError(f"{name} must be a text that is not empty, not {shown(repr(value), 100)}")
    return value.strip()
