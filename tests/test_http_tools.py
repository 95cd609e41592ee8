"""Tools behind an HTTP gateway: what is sent, how often, and what becomes of whatever comes back."""

import asyncio
import json
import logging
import re
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from email.utils import formatdate
from typing import Any

import pytest

from agent_fsm import AgentConfig, StopReason, arun_agent, run_agent
from agent_fsm.errors import ConfigError
from agent_fsm.protocol import ToolResult, ToolsUnavailable
from agent_fsm.testing import ScriptedModel, openai_faults
from agent_fsm.tools.http import HttpToolsInvoker
from tests.tools_gateway import (
    HANG,
    RESET,
    Closing,
    Drip,
    Endless,
    Scripted,
    Short,
    ToolsGateway,
    tool,
)

SLACK_S = 1.5
"""What a busy machine may add to a deadline; what hangs hangs far longer."""
TOKEN = "sk-Zq7+gateway/token=="
TASK = [{"role": "user", "content": "Add one and two."}]


def wanted(name: str = "add", arguments: Any = '{"a": 1, "b": 2}') -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def call(invoker: HttpToolsInvoker, name: str = "add", arguments: Any = '{"a": 1, "b": 2}') -> ToolResult:
    return asyncio.run(invoker.call_openai_tool(wanted(name, arguments)))


def answered(answer: Any, **options: Any) -> ToolResult:
    """Return the result of a call that the gateway answers with *answer*."""
    with ToolsGateway([tool("add")], [answer]) as gateway:
        return call(HttpToolsInvoker(gateway.url, **options))


def in_run(invoker: HttpToolsInvoker, use: Callable[[HttpToolsInvoker], Awaitable[Any]]) -> Any:
    """Return what *use* makes of what a run is given."""

    async def within() -> Any:
        own = invoker.for_run()
        try:
            return await use(own)
        finally:
            await own.aclose()

    return asyncio.run(within())


# What is sent


def test_the_tools_are_those_of_the_gateway_without_their_annotations() -> None:
    listed = [tool("add", annotations={"readOnlyHint": True}), tool("look_up")]

    with ToolsGateway(listed) as gateway:
        tools = asyncio.run(HttpToolsInvoker(gateway.url).list_openai_tools())

    assert tools == [tool("add"), tool("look_up")]


def test_tools_may_also_be_listed_in_an_object() -> None:
    with ToolsGateway({"tools": [tool("add")]}) as gateway:
        tools = asyncio.run(HttpToolsInvoker(f"{gateway.url}/").list_openai_tools())

    assert tools == [tool("add")]


def test_a_call_is_posted_with_its_arguments_as_an_object_and_the_time_it_has() -> None:
    with ToolsGateway([tool("add")], [{"text": "3"}]) as gateway:
        result = call(HttpToolsInvoker(gateway.url, {"X-Team": "blue"}, timeout_s=9.0))

    (request,) = gateway.invoked
    assert result == ToolResult("3")
    assert request.body == {"name": "add", "arguments": {"a": 1, "b": 2}}
    assert (request.headers["content-type"], request.headers["x-team"]) == ("application/json", "blue")
    assert 0 < int(request.headers["x-deadline-ms"]) <= 9000


def test_a_path_in_the_base_url_is_kept() -> None:
    with Scripted({"POST /team/mcp/invoke": [{"text": "3"}]}) as server:
        result = call(HttpToolsInvoker(f"{server.url}/team/mcp/"))

    assert result.text == "3"


def test_user_and_password_of_the_base_url_are_sent_as_basic_authorization_only() -> None:
    with ToolsGateway() as gateway:
        invoker = HttpToolsInvoker(gateway.url.replace("//", "//ann:p%40ssword@"))
        call(invoker)

    assert gateway.invoked[0].headers["authorization"] == "Basic YW5uOnBAc3N3b3Jk"
    assert repr(invoker) == f"HttpToolsInvoker('{gateway.url}')"


@pytest.mark.parametrize("arguments", ["[1]", "{", "NaN", "", None, 3, '{"a": 1e999}'])
def test_what_is_no_json_object_is_not_sent(arguments: Any) -> None:
    with ToolsGateway() as gateway:
        result = call(HttpToolsInvoker(gateway.url), arguments=arguments)

    assert (result.ok, gateway.requests) == (False, [])
    assert result.text.startswith("error: the arguments must be a JSON object, not ")


@pytest.mark.parametrize("strange", [None, {}, {"function": {"name": ""}}, {"function": "add"}, "add"])
def test_what_is_no_call_is_not_sent(strange: Any) -> None:
    with ToolsGateway() as gateway:
        result = asyncio.run(HttpToolsInvoker(gateway.url).call_openai_tool(strange))

    assert (result.ok, gateway.requests) == (False, [])


# What comes back


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        ({"text": "3"}, ToolResult("3")),
        ({}, ToolResult("")),
        ({"text": None, "error": None, "data": None}, ToolResult("")),
        ({"text": "3", "error": "", "isError": False}, ToolResult("3")),
        ({"text": "Found 1.", "data": {"hits": ["é"]}}, ToolResult('Found 1.\n{"hits":["é"]}')),
        ({"data": [1, 2]}, ToolResult("[1,2]")),
        ({"error": "no such city"}, ToolResult("no such city", ok=False)),
        ({"error": {"code": "x", "message": "no such city"}}, ToolResult("no such city", ok=False)),
        ({"error": {"code": 7}}, ToolResult('{"code":7}', ok=False)),
        ({"error": "no", "text": "stderr: no"}, ToolResult("no\nstderr: no", ok=False)),
        ({"error": "no", "text": "no", "isError": True}, ToolResult("no", ok=False)),
        ({"text": "went wrong", "isError": True}, ToolResult("went wrong", ok=False)),
        ({"isError": True}, ToolResult("error: the tool failed and did not say why", ok=False)),
        (
            {"text": "[image image/png, 1 bytes]", "content": [{"type": "image", "data": "AA=="}]},
            ToolResult("[image image/png, 1 bytes]", parts=({"type": "image", "data": "AA=="},)),
        ),
        ({"text": '{"sum":3}', "structuredContent": {"sum": 3}}, ToolResult('{"sum":3}', structured={"sum": 3})),
        ((200, {"Content-Type": "text/plain"}, {"text": "3"}), ToolResult("3")),
        ((201, {"Content-Type": "application/json; charset=utf-8"}, {"text": "3"}), ToolResult("3")),
    ],
)
def test_what_the_gateway_answers_is_the_result(answer: Any, result: ToolResult) -> None:
    assert answered(answer) == result


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"<html>Hi</html>", ("no JSON", "200 OK (application/json): <html>Hi</html>")),
        ((200, {"Content-Type": "text/html; charset=utf-8"}, b"<p>\n\tHi</p>"), ("200 OK (text/html): <p> Hi</p>",)),
        (b"", ("with an empty body",)),
        (b"\xff\xfe\x00", ("no JSON",)),
        (b"[" * 100_000, ("nested too deep",)),
        (b'{"text": 1' + b"0" * 5_000 + b"}", ("no JSON",)),
        ([1, 2], ("it is no object", "[1, 2]")),
        ({"result": 3}, ("none of these members", '{"result": 3}')),
        ({"text": 3}, ("its text is no string",)),
        ({"content": "x"}, ("its content is no array",)),
        ({"content": ["x"]}, ("its content is no array",)),
    ],
)
def test_an_answer_that_is_none_says_what_came_back_and_what_would_be_right(answer: Any, told: tuple[str, ...]) -> None:
    result = answered(answer)

    assert not result.ok
    assert result.text.startswith("error: the call was run, but its result can't be read: ")
    assert "an answer to POST /invoke must be a JSON object with text, error or data" in result.text
    assert all(part in result.text for part in told), result.text


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (400, "400 Bad Request (application/json): scripted error 400"),
        (401, "the gateway wants other credentials than the headers that it is given"),
        ((404, {}, {"detail": "Not Found"}), "404 Not Found (application/json): Not Found"),
        ((500, {"Content-Type": "text/plain"}, b"Traceback\x1b[31m\n  oops"), "(text/plain): Traceback [31m oops"),
        ((502, {}, b""), "502 Bad Gateway (application/json), with an empty body"),
        ((599, {}, b"{}"), "599 (application/json): {}"),
        ((500, {}, b"x" * 5_000), f"{'x' * 300}..."),
        ((302, {"Location": "https://other.example/invoke"}), "302, a redirect to https://other.example/invoke"),
        (307, "307, a redirect to nowhere"),
        (Short({"text": "abcdef"}), '200 OK (application/json): {"text": [RemoteProtocolError: '),
        ((200, {"Content-Encoding": "gzip"}, b"zip"), "the body is compressed (gzip), which was not asked for"),
        ((200, {"Content-Length": "99999999"}, b""), "the body has 99,999,999 bytes; 2,097,152 are allowed"),
        (Endless(), "the body has more than the 2,097,152 bytes that are allowed"),
        (b"not HTTP", None),
    ],
)
def test_what_is_no_success_says_what_came_back_and_is_not_sent_again(answer: Any, told: str | None) -> None:
    with ToolsGateway([tool("add")], [answer]) as gateway:
        result = call(HttpToolsInvoker(gateway.url))

    assert (result.ok, len(gateway.invoked)) == (False, 1)
    assert told is None or told in result.text, result.text


@pytest.mark.parametrize(("size", "ok"), [(1_000, True), (1_001, False)])
def test_a_body_may_have_as_many_bytes_as_are_allowed_and_not_one_more(size: int, ok: bool) -> None:
    body = json.dumps({"text": "x" * (size - 12)}).encode()
    assert len(body) == size

    assert answered(body, max_body_bytes=1_000).ok is ok


@pytest.mark.parametrize("headers", [{}, {"X-API-Key": TOKEN}])
@pytest.mark.parametrize("depth", [300, 700, 960])
def test_an_answer_however_deep_is_a_result(depth: int, headers: dict[str, str]) -> None:
    deep = b"[" * depth + b"]" * depth

    result = answered(b'{"text": "3", "data": %s, "structuredContent": %s}' % (deep, deep), headers=headers)

    assert result.text.startswith("3\n[") if result.ok else "nested too deep" in result.text


def test_headers_that_are_ours_to_set_are_set_once() -> None:
    with ToolsGateway() as gateway:
        call(
            HttpToolsInvoker(gateway.url, {"content-type": "text/plain", "x-deadline-ms": "1", "accept-encoding": "br"})
        )

    headers = gateway.invoked[0].headers
    assert (headers["content-type"], headers["accept-encoding"]) == ("application/json", "identity")
    assert int(headers["x-deadline-ms"]) > 1


def test_a_redirect_is_not_followed_with_the_headers_meant_for_another() -> None:
    with ToolsGateway() as other, ToolsGateway([], [(307, {"Location": f"{other.url}/invoke"})]) as gateway:
        result = call(HttpToolsInvoker(gateway.url, {"Authorization": f"Bearer {TOKEN}"}))

    assert (result.ok, other.requests) == (False, [])
    assert f"a redirect to {other.url}/invoke; redirects are not followed" in result.text


@pytest.mark.parametrize("answer", [HANG, Drip({"text": "x" * 1_000}, pause_s=0.02)])
def test_an_answer_that_does_not_come_or_drips_ends_at_the_deadline(answer: Any) -> None:
    began = time.monotonic()

    result = answered(answer, timeout_s=0.4)

    assert 0.4 <= time.monotonic() - began < 0.4 + SLACK_S
    assert not result.ok
    assert "it was not done after 0.4 s" in result.text


def test_a_gateway_that_is_not_there_says_that_the_call_was_not_sent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    result = call(HttpToolsInvoker(f"http://127.0.0.1:{port}"))

    assert result.text == (
        f"error: the tools gateway at http://127.0.0.1:{port} did not answer the request:"
        " it was not sent (ConnectError: All connection attempts failed)"
    )


# A call is sent exactly once


@pytest.mark.parametrize("answer", [RESET, 408, 500, 502, (503, {"Retry-After": "0"}), 504, Short({"text": "3"})])
def test_a_call_is_sent_exactly_once_whatever_comes_back(answer: Any) -> None:
    with ToolsGateway([tool("add")], [answer, {"text": "3"}]) as gateway:
        result = call(HttpToolsInvoker(gateway.url))

    assert (result.ok, len(gateway.invoked)) == (False, 1)


def test_a_call_whose_connection_was_reset_says_that_its_outcome_is_unknown() -> None:
    result = answered(RESET)

    assert "it had been sent, and what it did is unknown" in result.text


def test_the_calls_of_a_run_share_a_connection() -> None:
    async def twice(invoker: HttpToolsInvoker) -> None:
        await invoker.list_openai_tools()
        await invoker.call_openai_tool(wanted())
        await invoker.call_openai_tool(wanted())

    with ToolsGateway([tool("add")]) as gateway:
        in_run(HttpToolsInvoker(gateway.url), twice)

    assert len({request.connection for request in gateway.requests}) == 1


@pytest.mark.parametrize("pause_s", [0.0, 0.2])
def test_a_call_over_a_kept_connection_that_the_gateway_closed_is_sent_exactly_once(pause_s: float) -> None:
    # Without a pause the client may not know yet that it is closed: then the call may be lost, but not doubled
    async def thrice(invoker: HttpToolsInvoker) -> list[ToolResult]:
        results = []
        for number in range(3):
            results.append(await invoker.call_openai_tool(wanted(arguments={"number": number})))
            await asyncio.sleep(pause_s)
        return results

    with ToolsGateway([tool("add")], [Closing({"text": "3"})]) as gateway:
        results = in_run(HttpToolsInvoker(gateway.url), thrice)

    numbers = [request.body["arguments"]["number"] for request in gateway.invoked]
    assert len(numbers) == len(set(numbers))
    assert [result.ok for result in results] == [number in numbers for number in range(3)]
    assert not pause_s or numbers == [0, 1, 2]


def test_calls_side_by_side_are_each_sent_once() -> None:
    async def at_once(invoker: HttpToolsInvoker) -> list[ToolResult]:
        calls = [invoker.call_openai_tool(wanted(arguments={"number": number})) for number in range(20)]
        return await asyncio.gather(*calls)

    with ToolsGateway([tool("add")]) as gateway:
        results = in_run(HttpToolsInvoker(gateway.url), at_once)

    assert all(result.ok for result in results)
    assert sorted(request.body["arguments"]["number"] for request in gateway.invoked) == list(range(20))


# What may be sent again


@pytest.mark.parametrize("retry_after", ["0.2", "0", None])
def test_a_call_that_was_put_off_is_sent_again_once_after_the_time_asked_for(retry_after: str | None) -> None:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    began = time.monotonic()

    with ToolsGateway([tool("add")], [(429, headers), {"text": "3"}]) as gateway:
        result = call(HttpToolsInvoker(gateway.url))

    assert (result, len(gateway.invoked)) == (ToolResult("3"), 2)
    assert time.monotonic() - began >= float(retry_after or 0.25)


def test_a_date_to_retry_after_is_waited_for() -> None:
    when = formatdate(time.time() + 1.3, usegmt=True)  # whole seconds: it is between 0.3 and 1.3 s ahead
    began = time.monotonic()

    with ToolsGateway([tool("add")], [(429, {"Retry-After": when}), {"text": "3"}]) as gateway:
        result = call(HttpToolsInvoker(gateway.url))

    assert (result.ok, len(gateway.invoked)) == (True, 2)
    assert 0.2 <= time.monotonic() - began < 1.3 + SLACK_S


def test_a_call_that_is_put_off_twice_is_not_sent_a_third_time() -> None:
    with ToolsGateway([tool("add")], [(429, {"Retry-After": "0"})]) as gateway:
        result = call(HttpToolsInvoker(gateway.url))

    assert (result.ok, len(gateway.invoked)) == (False, 2)
    assert "429 Too Many Requests" in result.text


@pytest.mark.parametrize("retry_after", ["3600", "date"])
def test_a_wait_that_does_not_fit_is_not_begun_and_said(retry_after: str) -> None:
    began = time.monotonic()

    headers = {"Retry-After": formatdate(time.time() + 3_600.9, usegmt=True) if retry_after == "date" else retry_after}

    with ToolsGateway([tool("add")], [(429, headers)]) as gateway:
        result = call(HttpToolsInvoker(gateway.url, timeout_s=2.0))

    assert (result.ok, len(gateway.invoked)) == (False, 1)
    assert re.search(r"not sent again: it asked to wait 3,(599|600)\.\d s, and [12]\.\d s are left", result.text)
    assert time.monotonic() - began < SLACK_S


def test_what_says_itself_that_retrying_is_no_use_is_not_sent_again() -> None:
    body = {"error": {"code": "quota", "message": "used up", "retryable": False}}

    with ToolsGateway([tool("add")], [(429, {"Retry-After": "0"}, body)]) as gateway:
        result = call(HttpToolsInvoker(gateway.url))

    assert (result.ok, len(gateway.invoked)) == (False, 1)


@pytest.mark.parametrize("answer", [RESET, *((status, {"Retry-After": "0"}) for status in (500, 502, 503, 504))])
def test_a_tool_named_idempotent_is_called_again_once(answer: Any) -> None:
    with ToolsGateway([tool("add")], [answer, {"text": "3"}]) as gateway:
        result = call(HttpToolsInvoker(gateway.url, idempotent=["add"]))

    assert (result, len(gateway.invoked)) == (ToolResult("3"), 2)


@pytest.mark.parametrize(
    ("annotations", "sent"),
    [
        ({"readOnlyHint": True}, 2),
        ({"idempotentHint": True}, 2),
        ({"readOnlyHint": False, "idempotentHint": "yes"}, 1),
        ({"destructiveHint": False}, 1),
        (None, 1),
    ],
)
def test_a_tool_is_called_again_if_the_gateway_marks_it(annotations: Mapping[str, Any] | None, sent: int) -> None:
    async def listed_and_called(invoker: HttpToolsInvoker) -> ToolResult:
        await invoker.list_openai_tools()
        return await invoker.call_openai_tool(wanted())

    with ToolsGateway([tool("add", annotations=annotations)], [(503, {"Retry-After": "0"}), {"text": "3"}]) as gateway:
        result = in_run(HttpToolsInvoker(gateway.url), listed_and_called)

    assert (result.ok, len(gateway.invoked)) == (sent == 2, sent)


@pytest.mark.parametrize("answer", [400, 401, 404, 422, 501, {"error": "no"}, b"<html>"])
def test_an_idempotent_tool_is_not_called_again_where_that_can_not_help(answer: Any) -> None:
    with ToolsGateway([tool("add")], [answer]) as gateway:
        result = call(HttpToolsInvoker(gateway.url, idempotent=["add"]))

    assert (result.ok, len(gateway.invoked)) == (False, 1)


# Listing


@pytest.mark.parametrize(
    ("listed", "told"),
    [
        (404, "404 Not Found"),
        (b"<html>", "it is no JSON"),
        ({"error": "starting"}, "starting"),
        ([{"name": "add", "inputSchema": {}}], "none of the 1 things that it lists is one"),
        (Endless(), "the body has more than"),
        (HANG, "it was not done after 0.5 s"),
    ],
)
def test_a_gateway_that_does_not_list_its_tools_is_an_error_that_says_what_it_did(listed: Any, told: str) -> None:
    with ToolsGateway(listed) as gateway, pytest.raises(RuntimeError, match=told):
        asyncio.run(HttpToolsInvoker(gateway.url, timeout_s=0.5).list_openai_tools())


def test_listing_is_tried_twice() -> None:
    with Scripted({"GET /tools": [(503, {"Retry-After": "0"}), [tool("add")]]}) as server:
        tools = asyncio.run(HttpToolsInvoker(server.url).list_openai_tools())

    assert tools == [tool("add")]


def test_a_gateway_without_tools_is_none_that_is_broken() -> None:
    with ToolsGateway([]) as gateway:
        assert asyncio.run(HttpToolsInvoker(gateway.url).list_openai_tools()) == []


# Lifetime


def test_nothing_is_left_open_by_a_call_outside_a_run() -> None:
    async def drained_meanwhile() -> bool:
        invoker = HttpToolsInvoker(gateway.url)
        await invoker.list_openai_tools()
        await invoker.call_openai_tool(wanted())
        return gateway.drained()

    with ToolsGateway([tool("add")]) as gateway:
        assert asyncio.run(drained_meanwhile())
        assert len(gateway.requests) == 2


def test_nothing_is_left_open_by_a_run() -> None:
    async def drained_after() -> bool:
        await arun_agent(TASK, HttpToolsInvoker(gateway.url), model_client=ScriptedModel([[("add", {})], "3"]))
        return gateway.drained()

    with ToolsGateway([tool("add")]) as gateway:
        assert asyncio.run(drained_after())
        assert len(gateway.requests) == 2


def test_what_waits_when_a_run_is_closed_gets_a_result() -> None:
    async def closed(invoker: HttpToolsInvoker) -> ToolResult:
        task = asyncio.ensure_future(invoker.call_openai_tool(wanted()))
        await asyncio.sleep(0.2)
        await invoker.aclose()
        return await asyncio.wait_for(task, SLACK_S)

    with ToolsGateway([tool("add")], [HANG]) as gateway:
        result = in_run(HttpToolsInvoker(gateway.url), closed)

    assert not result.ok
    assert "it had been sent, and what it did is unknown" in result.text


def test_a_run_that_is_closed_sends_nothing_more() -> None:
    with ToolsGateway([tool("add")]) as gateway:
        closed: list[HttpToolsInvoker] = []

        async def keep(invoker: HttpToolsInvoker) -> None:
            closed.append(invoker)

        in_run(HttpToolsInvoker(gateway.url), keep)
        result = call(closed[0])

    assert (result.ok, gateway.requests) == (False, [])


def test_a_call_that_is_cancelled_is_let_go_of_at_once() -> None:
    async def cancelled() -> bool:
        task = asyncio.ensure_future(HttpToolsInvoker(gateway.url).call_openai_tool(wanted()))
        await asyncio.sleep(0.2)
        task.cancel()
        await asyncio.wait({task}, timeout=SLACK_S)
        return task.cancelled()

    with ToolsGateway([tool("add")], [HANG]) as gateway:
        assert asyncio.run(cancelled())


def test_one_invoker_serves_runs_on_several_loops() -> None:
    with ToolsGateway([tool("add")]) as gateway:
        invoker = HttpToolsInvoker(gateway.url)
        results = [run_agent(TASK, invoker, model_client=ScriptedModel([[("add", {})], "3"])) for _ in range(2)]

    assert [result.final_answer for result in results] == ["3", "3"]
    assert len({request.connection for request in gateway.requests}) == 2


# Secrets


def test_a_token_is_in_no_log_result_event_or_error_even_if_the_gateway_tells_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    echo = {
        "text": f"you sent {TOKEN}",
        "data": {TOKEN: [TOKEN]},
        "content": [{"type": "text", "text": TOKEN}],
        "structuredContent": {"token": TOKEN},
    }
    answers = [(200, {"X-Echo": TOKEN, "Set-Cookie": f"t={TOKEN}"}, echo), (500, {"X-Echo": TOKEN}, {"error": TOKEN})]
    described = tool("add")
    described["function"]["description"] = TOKEN

    with ToolsGateway([described], answers) as gateway:
        invoker = HttpToolsInvoker(gateway.url, {"Authorization": f"Bearer {TOKEN}\n", "X-Team": "blue"})
        model = ScriptedModel([[("add", {})], [("add", {"again": 1})], "Done."])
        result = run_agent(TASK, invoker, AgentConfig(enable_repair=False), model_client=model)

    assert [request.headers["authorization"] for request in gateway.requests] == [f"Bearer {TOKEN}"] * 3
    logged = "\n".join(f"{record.getMessage()} {record.__dict__}" for record in caplog.records)
    assert "receive_response_headers" in logged  # or nothing was logged
    for place in (logged, repr(result), repr(invoker), repr(vars(invoker)), repr(model.requests)):
        assert TOKEN not in place
    assert "***" in repr(result)


@pytest.mark.parametrize(
    "answer", [(200, {}, TOKEN.encode()), (401, {}, {"error": f"unknown token {TOKEN}"}), (404, {})]
)
def test_a_token_is_in_no_error_of_listing(answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    with ToolsGateway(answer) as gateway, pytest.raises(RuntimeError) as caught:
        asyncio.run(HttpToolsInvoker(gateway.url, {"X-API-Key": TOKEN}).list_openai_tools())

    assert TOKEN not in f"{caught.value!r} {caught.value.__cause__!r} {caught.value.__context__!r} {caplog.text}"


@pytest.mark.parametrize("lead", [300 - len(TOKEN), 288, 296, 300])
def test_no_part_of_a_token_is_left_where_a_text_is_cut(lead: int) -> None:
    result = answered((500, {}, b"x" * lead + TOKEN.encode()), headers={"Authorization": f"Bearer {TOKEN}"})

    assert "sk-Z" not in result.text


def test_a_token_in_the_base_url_is_never_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="httpx")  # LiteLLM makes it quieter once it is imported

    with ToolsGateway() as gateway:
        result = call(HttpToolsInvoker(gateway.url.replace("//", "//ann:secret-word@")))

    assert result.ok
    assert "HTTP Request: POST" in caplog.text
    assert "secret-word" not in caplog.text


# Settings


@pytest.mark.parametrize(
    "url",
    ["", "127.0.0.1:8787", "ftp://x", "http://", "http://h/?key=1", "http://h/#x", "http://h:99999", "http://h/a b"],
)
def test_a_base_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="base_url must"):
        HttpToolsInvoker(url)


@pytest.mark.parametrize(
    "headers", [{"X-Key": "se\ncret"}, {"X-Key": "sécret"}, {"X Key": "secret"}, {"": "secret"}, {"X-Key": 7}]
)
def test_a_header_that_can_not_be_sent_is_refused_without_telling_its_value(headers: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        HttpToolsInvoker("http://127.0.0.1:1", headers)

    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"timeout_s": 0}, {"timeout_s": float("nan")}, {"max_body_bytes": True}, {"idempotent": "add"}]
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        HttpToolsInvoker("http://127.0.0.1:1", **options)


def test_a_proxy_of_the_environment_is_not_asked_for_loopback() -> None:
    code = (
        "import asyncio, sys; from agent_fsm.tools.http import HttpToolsInvoker;"
        "print(asyncio.run(HttpToolsInvoker(sys.argv[1]).list_openai_tools()))"
    )

    with ToolsGateway([]) as gateway:
        done = subprocess.run(
            [sys.executable, "-c", code, gateway.url],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env={"HTTP_PROXY": "http://127.0.0.1:1", "ALL_PROXY": "http://127.0.0.1:1"},
        )

    assert (done.stdout, done.stderr) == ("[]\n", "")


# Whole runs


def test_a_run_lists_calls_and_answers_over_the_gateway() -> None:
    answers = [{"text": "3", "data": {"sum": 3}}]

    async def whole() -> Any:
        model = ScriptedModel([[("add", {"a": 1, "b": 2})], lambda request: request.messages[-1]["content"]])
        return await arun_agent(TASK, HttpToolsInvoker(gateway.url), model_client=model)

    with ToolsGateway([tool("add")], answers) as gateway:
        result = asyncio.run(whole())

    assert (result.final_answer, result.stopped_reason) == ('3\n{"sum":3}', StopReason.SUCCESS)
    assert [request.path for request in gateway.requests] == ["/tools", "/invoke"]
    assert not openai_faults(result.messages)


def test_a_run_whose_gateway_is_not_there_ends_as_such() -> None:
    result = run_agent(TASK, HttpToolsInvoker("http://127.0.0.1:1"), model_client=ScriptedModel(["hello"]))

    assert result.stopped_reason is StopReason.TOOLS_UNAVAILABLE
    (event,) = (event for event in result.events if isinstance(event, ToolsUnavailable))
    assert "the tools gateway at http://127.0.0.1:1 did not answer" in event.error


def test_a_run_outlives_a_gateway_that_hangs() -> None:
    model = ScriptedModel([[("add", {})], "I could not add."])

    with ToolsGateway([tool("add")], [HANG]) as gateway:
        result = run_agent(TASK, HttpToolsInvoker(gateway.url, timeout_s=0.3), model_client=model)

    assert (result.final_answer, result.stopped_reason) == ("I could not add.", StopReason.SUCCESS)
    assert "what it did is unknown" in result.messages[2]["content"]
