"""Research tools against loopback fakes of the two services, which refuse what the real ones would refuse."""

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from typing import Any

import pytest

from agent_fsm import AgentConfig, State, run_agent
from agent_fsm.errors import ConfigError
from agent_fsm.protocol import ToolResult
from agent_fsm.testing import ScriptedModel
from agent_fsm.tools.combined import CombinedInvoker
from agent_fsm.tools.local import EchoMCP
from agent_fsm.tools.research import ResearchPythonInvoker
from tests.tools_gateway import HANG, RESET, Drip, Endless, Request, Scripted, Short

SLACK_S = 1.5
"""What a busy machine may add to a deadline; what hangs hangs far longer."""
PPLX_KEY = "pplx-Zq7Yk2/secret+key"
C7_KEY = "ctx7sk-Wm4Np8/secret+key"
TASK = [{"role": "user", "content": "How high is the tower?"}]

COMPLETION = {
    "id": "1",
    "model": "sonar",
    "created": 1,
    "object": "chat.completion",
    "choices": [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "It is 330 m high.[1][2]"}}
    ],
    "citations": ["https://a.example/tower", "https://b.example/"],
    "search_results": [
        {"title": "B", "url": "https://b.example/", "date": None, "snippet": "..."},
        {"title": "The tower", "url": "https://a.example/tower", "date": "2026-03-01", "last_updated": "2026-04-01"},
    ],
    "usage": {"prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14},
}
LIBRARIES = {
    "results": [
        {"id": "/acme/old", "title": "Old", "state": "processing"},
        {"id": "/vercel/next.js", "title": "Next.js", "state": "finalized", "trustScore": 10},
        {"id": "/other/next", "title": "Next", "state": "finalized"},
    ],
    "searchFilterApplied": False,
}
DOCUMENTATION = {
    "codeSnippets": [
        {
            "codeTitle": "Check in middleware",
            "codeDescription": "Redirects those who have no token.",
            "codeLanguage": "typescript",
            "codeTokens": 9,
            "codeId": "https://docs.example/middleware#1",
            "pageTitle": "Middleware",
            "codeList": [{"language": "typescript", "code": "  if (!token) {\n    leave()\n  }\n"}],
        }
    ],
    "infoSnippets": [
        {"content": "It runs first.", "breadcrumb": "Routing > Middleware", "pageId": "https://docs.example/routing"},
        {"content": "It runs everywhere.", "breadcrumb": "", "pageId": "https://docs.example/middleware#1"},
        {"content": "Nobody knows whence.", "breadcrumb": "Lore"},
    ],
}


class Services(Scripted):
    """Perplexity and Context7 at one address."""

    def __init__(
        self, *, chat: Sequence[Any] = (COMPLETION,), search: Sequence[Any] = (LIBRARIES,), docs: Sequence[Any] = ()
    ) -> None:
        answers = {"POST /chat/completions": chat, "GET /api/v2/libs/search": search}
        super().__init__({**answers, "GET /api/v2/context": docs or (DOCUMENTATION,)})

    def __enter__(self) -> "Services":
        super().__enter__()
        return self

    @property
    def environ(self) -> dict[str, str]:
        return {
            "PPLX_API_KEY": PPLX_KEY,
            "PPLX_API_BASE": self.url,
            "C7_API_BASE": f"{self.url}/api",
            "C7_API_KEY": C7_KEY,
        }


def call(invoker: ResearchPythonInvoker, name: str, arguments: Any) -> ToolResult:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    wanted = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": text}}
    return asyncio.run(invoker.call_openai_tool(wanted))


def ask(services: Services, **options: Any) -> ToolResult:
    invoker = ResearchPythonInvoker(environ=services.environ, **options)
    return call(invoker, "research_perplexity", {"query": "How high is the tower?"})


def look_up(services: Services, library: str = "next.js", **options: Any) -> ToolResult:
    invoker = ResearchPythonInvoker(environ=services.environ, **options)
    return call(invoker, "research_context7_docs", {"library": library, "topic": "authentication"})


def offered(invoker: ResearchPythonInvoker) -> list[str]:
    return [tool["function"]["name"] for tool in asyncio.run(invoker.list_openai_tools())]


# Perplexity


def test_perplexity_is_asked_as_its_interface_wants_it() -> None:
    with Services() as services:
        ask(services)

    (request,) = services.asked("/chat/completions")
    assert request.body == {"model": "sonar", "messages": [{"role": "user", "content": "How high is the tower?"}]}
    assert request.headers["authorization"] == f"Bearer {PPLX_KEY}"
    assert request.headers["content-type"] == "application/json"


def test_the_answer_comes_with_its_sources_numbered_as_its_marks_count_them() -> None:
    with Services() as services:
        result = ask(services)

    assert result.text == (
        "It is 330 m high.[1][2]\n\nSources:\n"
        "[1] The tower (2026-03-01) - https://a.example/tower\n"
        "[2] B - https://b.example/"
    )
    assert result.ok
    assert result.structured["citations"][0] == {
        "number": 1,
        "url": "https://a.example/tower",
        "title": "The tower",
        "date": "2026-03-01",
    }


@pytest.mark.parametrize(
    ("citations", "results", "sources"),
    [
        (["https://a/", "https://a/"], [], "[1] https://a/\n[2] https://a/"),
        (None, [{"title": "A", "url": "https://a/"}], "[1] A - https://a/"),
        (["https://a/"], [{"title": "B", "url": "https://b/"}], "[1] https://a/\n[2] B - https://b/"),
        ([7, None], ["x", {"title": "no address"}], ""),
        ("https://a/", {"title": "A"}, ""),
        (None, None, ""),
    ],
)
def test_no_source_is_lost_or_moved(citations: Any, results: Any, sources: str) -> None:
    with Services(chat=[{**COMPLETION, "citations": citations, "search_results": results}]) as services:
        result = ask(services)

    assert result.text == "It is 330 m high.[1][2]" + (f"\n\nSources:\n{sources}" if sources else "")


def test_what_a_reasoning_model_thought_is_left_out() -> None:
    completion = {"choices": [{"message": {"content": "<think>Hm.\nWell.</think>\n\n330 m"}}]}

    with Services(chat=[completion]) as services:
        result = ask(services, pplx_model="sonar-reasoning-pro")

    assert (result.text, services.requests[0].body["model"]) == ("330 m", "sonar-reasoning-pro")


@pytest.mark.parametrize("path", ["", "/", "/chat/completions", "/chat/completions/"])
def test_the_base_of_perplexity_may_name_its_path(path: str) -> None:
    with Services() as services:
        assert ask(services, pplx_api_base=f"{services.url}{path}").ok


# Context7


def test_context7_is_asked_for_the_library_and_then_for_its_documentation() -> None:
    with Services() as services:
        look_up(services)

    search, context = services.requests
    assert (search.path, search.query) == (
        "/api/v2/libs/search",
        {"libraryName": "next.js", "query": "authentication"},
    )
    assert (context.path, context.query) == (
        "/api/v2/context",
        {"libraryId": "/vercel/next.js", "query": "authentication", "type": "json"},
    )
    assert [request.headers["authorization"] for request in services.requests] == [f"Bearer {C7_KEY}"] * 2


def test_documentation_comes_with_its_sources() -> None:
    with Services() as services:
        result = look_up(services)

    assert result.text == (
        "Documentation of /vercel/next.js:\n\n"
        "### Check in middleware [1]\nRedirects those who have no token.\n"
        "```typescript\n  if (!token) {\n    leave()\n  }\n```\n\n"
        "### Routing > Middleware [2]\nIt runs first.\n\n"
        "It runs everywhere. [1]\n\n"
        "### Lore\nNobody knows whence.\n\n"
        "Sources:\n[1] Middleware - https://docs.example/middleware#1\n"
        "[2] Routing > Middleware - https://docs.example/routing\n\n"
        "Libraries of a similar name: /other/next"
    )
    assert result.ok


def test_a_library_named_by_its_id_is_not_searched_for() -> None:
    with Services() as services:
        result = look_up(services, "/vercel/next.js/v15.1.8")

    assert (result.ok, len(services.requests)) == (True, 1)
    assert services.requests[0].query["libraryId"] == "/vercel/next.js/v15.1.8"


def test_without_a_topic_the_library_is_the_topic() -> None:
    with Services() as services:
        invoker = ResearchPythonInvoker(environ=services.environ)
        result = call(invoker, "research_context7_docs", {"library": "next.js", "topic": None})

    assert (result.ok, services.requests[1].query["query"]) == (True, "next.js")


def test_without_a_key_context7_is_asked_without_one() -> None:
    with Services() as services:
        result = look_up(services, c7_api_key="")

    assert result.ok
    assert all("authorization" not in request.headers for request in services.requests)


def test_libraries_may_be_listed_without_an_object_around_them() -> None:
    with Services(search=[LIBRARIES["results"]]) as services:
        assert look_up(services).ok


def test_documentation_that_comes_as_a_text_is_passed_on() -> None:
    text = "### Middleware\n\nSource: https://docs.example/middleware\n\nIt runs first."

    with Services(docs=[(200, {"Content-Type": "text/plain"}, text.encode())]) as services:
        result = look_up(services, "/vercel/next.js")

    assert result.text == f"Documentation of /vercel/next.js:\n\n{text}"


def test_a_library_that_has_moved_is_asked_for_by_its_new_name_once() -> None:
    moved: Any = (301, {}, {"error": "library_redirected", "message": "moved", "redirectUrl": "/new/name"})

    with Services(docs=[moved, DOCUMENTATION]) as services:
        result = look_up(services, "/old/name")

    assert result.ok
    assert [request.query["libraryId"] for request in services.requests] == ["/old/name", "/new/name"]
    assert "Documentation of /new/name" in result.text


@pytest.mark.parametrize("target", ["https://other.example/", "//other.example/", ""])
def test_a_redirect_to_elsewhere_is_not_followed(target: str) -> None:
    with Services(docs=[(301, {"Location": "https://other.example/"}, {"redirectUrl": target})]) as services:
        result = look_up(services, "/old/name")

    assert (result.ok, len(services.requests)) == (False, 1)
    assert "a redirect to https://other.example/" in result.text


@pytest.mark.parametrize("path", ["", "/", "/api", "/api/", "/api/v1", "/api/v2"])
def test_the_base_of_context7_may_be_the_host_or_a_version(path: str) -> None:
    with Services() as services:
        assert look_up(services, c7_api_base=f"{services.url}{path}").ok


# What goes wrong


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((401, {}, {"error": {"message": "Invalid API key", "code": 401}}), "Invalid API key; the key in PPLX_API_KEY"),
        (404, "404 Not Found (application/json): scripted error 404; PPLX_API_BASE may be wrong"),
        (b"<html>", "200 OK (application/json): <html>; an answer must be a chat completion with a text in it"),
        ({"choices": []}, "an answer must be a chat completion with a text in it"),
        ({"choices": [{"message": {"content": ""}}]}, "an answer must be a chat completion"),
        ({"error": {"message": "no credit"}}, "no credit; an answer must be a chat completion"),
        ([1], "an answer must be a chat completion"),
        ((307, {"Location": "https://other.example"}), "a redirect to https://other.example"),
        (Endless(), "the body has more than"),
        (Short(COMPLETION), "RemoteProtocolError"),
    ],
)
def test_what_is_no_answer_of_perplexity_says_what_came_back_and_is_not_asked_for_again(answer: Any, told: str) -> None:
    with Services(chat=[answer]) as services:
        result = ask(services)

    assert (result.ok, len(services.requests)) == (False, 1)
    assert result.text.startswith(f"error: Perplexity ({services.url}) answered ")
    assert told in result.text, result.text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"search": [{"results": []}]}, "Context7 knows no library 'next.js'"),
        ({"search": [b"<html>"]}, "Context7 knows no library 'next.js'"),
        ({"docs": [{"codeSnippets": [], "infoSnippets": []}]}, "there is no documentation of /vercel/next.js"),
        ({"docs": [(202, {}, {"error": "x", "message": "not finalized"})]}, "202 Accepted"),
        ({"docs": [(404, {}, {"error": "library_not_found", "message": "No such."})]}, "404 Not Found"),
        ({"search": [401]}, "the key in C7_API_KEY may be wrong"),
    ],
)
def test_what_is_no_documentation_says_so(options: dict[str, Any], told: str) -> None:
    with Services(**options) as services:
        result = look_up(services)

    assert not result.ok
    assert told in result.text, result.text


def test_a_library_that_is_still_being_read_is_not_said_to_have_no_documentation() -> None:
    with Services(docs=[(202, {}, {"error": "library_not_finalized", "message": "Try later."})]) as services:
        result = look_up(services, "/new/library")

    assert result.text == f"error: Context7 ({services.url}/api) answered 202 Accepted (application/json): Try later."


@pytest.mark.parametrize(
    "answer", [(429, {"Retry-After": "0"}), (500, {"Retry-After": "0"}), (503, {"Retry-After": "0.1"}), RESET]
)
def test_what_fails_in_passing_is_asked_again(answer: Any) -> None:
    with Services(chat=[answer, COMPLETION]) as services:
        result = ask(services)

    assert (result.ok, len(services.requests)) == (True, 2)


def test_asking_again_ends_after_four_times() -> None:
    with Services(chat=[(503, {"Retry-After": "0"})]) as services:
        result = ask(services)

    assert (result.ok, len(services.requests)) == (False, 4)
    assert "503 Service Unavailable" in result.text


@pytest.mark.parametrize("answer", [HANG, Drip(COMPLETION, pause_s=0.02), (503, {"Retry-After": "0.3"})])
def test_a_call_ends_at_its_deadline_however_often_it_was_asked(answer: Any) -> None:
    began = time.monotonic()

    with Services(chat=[answer]) as services:
        result = ask(services, timeout_s=0.4)

    assert not result.ok
    assert time.monotonic() - began < 0.4 + SLACK_S


def test_both_requests_for_documentation_share_one_deadline() -> None:
    began = time.monotonic()

    with Services(search=[(429, {"Retry-After": "1"}), LIBRARIES], docs=[HANG]) as services:
        result = look_up(services, timeout_s=2.0)

    assert (result.ok, len(services.requests)) == (False, 3)
    assert time.monotonic() - began < 2.9  # with a deadline each it would be 3 s or more


def test_a_wait_that_does_not_fit_is_said() -> None:
    with Services(search=[(429, {"Retry-After": "3600"})]) as services:
        result = look_up(services, c7_api_key="")

    assert len(services.requests) == 1
    assert "not sent again: it asked to wait 3,600.0 s" in result.text
    assert "with a key in C7_API_KEY the limit is higher" in result.text


def test_a_service_that_is_not_there_is_said() -> None:
    invoker = ResearchPythonInvoker(
        pplx_api_key=PPLX_KEY, pplx_api_base="http://127.0.0.1:1", timeout_s=0.6, environ={}
    )

    result = call(invoker, "research_perplexity", {"query": "x"})

    assert result.text.startswith("error: Perplexity (http://127.0.0.1:1) did not answer: ConnectError: ")


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("research_perplexity", {}, "query must be a text that is not empty, not None"),
        ("research_perplexity", {"query": "  "}, "query must be a text"),
        ("research_perplexity", {"query": 7}, "query must be a text that is not empty, not 7"),
        ("research_perplexity", {"question": "x"}, "unknown argument 'question'; research_perplexity takes query"),
        ("research_context7_docs", {"topic": "x"}, "library must be a text"),
        ("research_context7_docs", "[]", "the arguments must be a JSON object, not '[]'"),
        ("web_search", {"query": "x"}, "there are: research_perplexity, research_context7_docs"),
    ],
)
def test_arguments_that_do_not_fit_are_not_sent(name: str, arguments: Any, told: str) -> None:
    with Services() as services:
        result = call(ResearchPythonInvoker(environ=services.environ), name, arguments)

    assert (result.ok, services.requests) == (False, [])
    assert told in result.text


# Which tools there are


@pytest.mark.parametrize(
    ("environ", "usable"),
    [
        ({"PPLX_API_KEY": PPLX_KEY}, ["research_perplexity"]),
        ({"C7_API_BASE": "https://context7.com"}, ["research_context7_docs"]),
        ({"C7_API_KEY": C7_KEY}, ["research_context7_docs"]),
        ({"PPLX_API_KEY": PPLX_KEY, "C7_API_KEY": C7_KEY}, ["research_perplexity", "research_context7_docs"]),
        ({"PPLX_API_KEY": " ", "C7_API_KEY": C7_KEY}, ["research_context7_docs"]),
        ({"PPLX_API_KEY": PPLX_KEY, "C7_API_BASE": "context7.com"}, ["research_perplexity"]),
        ({"PPLX_API_KEY": PPLX_KEY, "C7_API_BASE": "http://u:p@h"}, ["research_perplexity"]),
    ],
)
def test_only_tools_that_can_be_used_are_offered(environ: dict[str, str], usable: list[str]) -> None:
    invoker = ResearchPythonInvoker(environ=environ)

    assert offered(invoker) == usable
    assert invoker.research_tools == set(usable)


def test_where_no_tool_can_be_used_all_are_listed_and_none_is_for_research() -> None:
    invoker = ResearchPythonInvoker(environ={})

    assert offered(invoker) == ["research_perplexity", "research_context7_docs"]
    assert invoker.research_tools == set()


@pytest.mark.parametrize(
    ("name", "arguments", "environ", "told"),
    [
        ("research_perplexity", {"query": "x"}, {}, "PPLX_API_KEY is not set"),
        ("research_perplexity", {"query": "x"}, {"PPLX_API_KEY": ""}, "PPLX_API_KEY is not set"),
        ("research_perplexity", {"query": "x"}, {"PPLX_API_KEY": "ké"}, "PPLX_API_KEY has a character"),
        ("research_context7_docs", {"library": "x"}, {}, "C7_API_BASE is not set"),
        ("research_context7_docs", {"library": "x"}, {"C7_API_BASE": "ftp://x"}, "C7_API_BASE must be a URL"),
        ("research_context7_docs", {"library": "/a/b"}, {"C7_API_KEY": "a\nb"}, "C7_API_KEY has a character"),
    ],
)
def test_a_missing_key_says_which_variable(name: str, arguments: Any, environ: dict[str, str], told: str) -> None:
    result = call(ResearchPythonInvoker(environ=environ), name, arguments)

    assert not result.ok
    assert result.text.startswith(
        f"error: {'Perplexity' if 'pplx' in told.lower() else 'Context7'} can't be asked: {told}"
    )


def test_what_is_given_counts_more_than_the_environment() -> None:
    with Services() as services:
        ask(services, pplx_api_key="pplx-given", pplx_model="sonar-pro")

    request = services.requests[0]
    assert (request.headers["authorization"], request.body["model"]) == ("Bearer pplx-given", "sonar-pro")


def test_the_environment_of_the_process_is_read_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    invoker = ResearchPythonInvoker()
    for variable in ("PPLX_API_KEY", "C7_API_BASE", "C7_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    before = invoker.research_tools

    monkeypatch.setenv("PPLX_API_KEY", PPLX_KEY)

    assert before == set()
    assert invoker.research_tools == {"research_perplexity"}


def test_numbers_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError):
        ResearchPythonInvoker(timeout_s=0)


# Whole runs


def test_a_run_that_is_unsure_enters_research_and_asks() -> None:
    def answer(request: Any) -> str:
        return f"It is 330 m high, see {request.messages[-1]['content'].splitlines()[-2].split()[-1]}"

    model = ScriptedModel(["I'm not sure.", [("research_perplexity", {"query": "How high is the tower?"})], answer])

    with Services() as services:
        tools = ResearchPythonInvoker(environ=services.environ)
        result = run_agent(TASK, tools, AgentConfig(), model_client=model)

    assert State.RESEARCH in result.path
    assert "research_perplexity" in model.requests[1].messages[-1]["content"]
    assert result.final_answer == "It is 330 m high, see https://a.example/tower"
    assert len(services.asked("/chat/completions")) == 1


@pytest.mark.parametrize(
    "tools", [ResearchPythonInvoker(environ={}), CombinedInvoker(EchoMCP(), ResearchPythonInvoker(environ={}))]
)
def test_a_run_without_a_usable_research_tool_never_enters_research(tools: Any) -> None:
    result = run_agent(TASK, tools, AgentConfig(), model_client=ScriptedModel(["I'm not sure, perhaps 300 m."]))

    assert State.RESEARCH not in result.path
    assert result.final_answer == "I'm not sure, perhaps 300 m."


def test_a_call_without_a_key_tells_the_model_which_variable_is_missing() -> None:
    model = ScriptedModel([[("research_perplexity", {"query": "x"})], "I can't look it up."])

    result = run_agent(TASK, ResearchPythonInvoker(environ={}), AgentConfig(), model_client=model)

    assert "PPLX_API_KEY is not set" in result.messages[2]["content"]


def test_the_requests_of_a_run_share_a_connection() -> None:
    wanted = [("research_context7_docs", {"library": "next.js"})]

    with Services() as services:
        tools = ResearchPythonInvoker(environ=services.environ)
        run_agent(TASK, tools, AgentConfig(), model_client=ScriptedModel([wanted, "Done."]))

    assert len(services.requests) == 2
    assert len({request.connection for request in services.requests}) == 1


def test_keys_are_in_no_log_result_event_or_error_even_if_a_service_tells_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    told = f"you sent {PPLX_KEY} and {C7_KEY}"
    echo = {"choices": [{"message": {"content": told}}], "search_results": [{"url": f"https://a/?k={PPLX_KEY}"}]}
    chat = [(200, {"X-Echo": PPLX_KEY}, echo), (401, {}, {"error": {"message": told}})]
    asking = [("research_perplexity", {"query": "x"}), ("research_context7_docs", {"library": "/a/b"})]
    model = ScriptedModel([asking, [("research_perplexity", {"query": "y"})], "Done."])

    with Services(chat=chat, docs=[(403, {"X-Echo": C7_KEY}, {"message": told})]) as services:
        tools = ResearchPythonInvoker(environ=services.environ)
        result = run_agent(TASK, tools, AgentConfig(enable_repair=False), model_client=model)

    sent: list[Request] = services.requests
    assert {request.headers["authorization"] for request in sent} == {f"Bearer {PPLX_KEY}", f"Bearer {C7_KEY}"}
    logged = "\n".join(f"{record.getMessage()} {record.__dict__}" for record in caplog.records)
    assert "receive_response_headers" in logged  # or nothing was logged
    for place in (logged, repr(result), repr(tools), repr(model.requests)):
        assert PPLX_KEY not in place
        assert C7_KEY not in place
    assert "you sent *** and ***" in repr(result)
