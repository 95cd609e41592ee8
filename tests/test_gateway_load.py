"""The gateway under requests that a machine made up, and under many calls whose clients go away."""

import asyncio
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.gateways import children_of, is_running, running_gateway, text_of_config

SERVER = str(Path(__file__).with_name("gateway_server.py"))
TOKEN = "gateway-token-27182818"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
NAMES = [f"one__{tool}" for tool in ("echo", "add", "fail", "picture")]
ARGUMENTS = {
    "anyOf": [
        {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
        {"enum": ['{"a": 1, "b": 2}', "{}", ""]},
        {"type": "null"},
    ]
}
POSITIVE, NEGATIVE = "positive", "negative"
FUZZED = [
    ("GET /health", POSITIVE, 1, {200}),
    ("GET /tools", POSITIVE, 5, {200}),
    ("POST /invoke", POSITIVE, 15, {404}),
    ("POST /invoke of a tool", POSITIVE, 15, {200, 422}),
    ("POST /invoke", NEGATIVE, 15, {422}),
    ("POST /invoke of a tool", NEGATIVE, 15, {422}),
]
"""What, with requests that are right or wrong, how often, and statuses that must come."""
END_S = 10.0
"""Slack for the last calls to end on the server, on a machine that is busy."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[str]:
    config = tmp_path_factory.mktemp("gateway") / "config.toml"
    tools = ["echo", "add", "fail", "picture"]
    server = {"command": sys.executable, "args": [SERVER], "enabled_tools": tools}
    config.write_text(text_of_config({"one": server}))
    cache = pytestconfig.cache
    assert cache is not None
    with running_gateway("python", config, cache, {"GATEWAY_TOKEN": TOKEN}) as (address, _):
        yield address


def document_of(url: str, *, known: bool) -> dict[str, Any]:
    """The gateway's own; if *known*, one in which calls name tools that there are, and some fit."""
    document: dict[str, Any] = httpx.get(f"{url}/openapi.json", headers=HEADERS, timeout=30).json()
    route = document["paths"]["/invoke"]["post"]
    for parameter in route["parameters"]:  # the deadline
        parameter["schema"]["minimum"] = 10_000
    if known:
        properties = {"name": {"enum": NAMES}, "arguments": ARGUMENTS}
        route["requestBody"]["content"]["application/json"]["schema"]["properties"] = properties
    return document


def fuzz(url: str, operation: str, mode: str, examples: int) -> Counter[int]:
    """Send *examples* requests; return how often each status came."""
    import schemathesis  # here: no other test should wait for it
    from schemathesis import GenerationMode
    from schemathesis.checks import CHECKS, load_all_checks

    load_all_checks()
    names = ("status_code_conformance", "content_type_conformance", "response_schema_conformance")
    checks = [check for check in CHECKS.get_all() if check.__name__ in names]
    assert len(checks) == len(names)
    schema: Any = schemathesis.openapi.from_dict(document_of(url, known=operation.endswith("of a tool")))
    schema.config.update(base_url=url)
    method, path = operation.split(" ")[:2]
    found = schema[path][method]
    statuses: Counter[int] = Counter()

    def send(case: Any) -> None:
        answer = case.call(headers=HEADERS, timeout=30)
        statuses[answer.status_code] += 1
        assert answer.status_code != 500
        case.validate_response(answer, checks=checks)

    limits = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    limits(given(case=found.as_strategy(generation_mode=GenerationMode(mode)))(send))()
    return statuses


@pytest.mark.parametrize(("operation", "mode", "examples", "expected"), FUZZED)
def test_requests_that_a_machine_makes_up_are_answered_as_documented(
    url: str, operation: str, mode: str, examples: int, expected: set[int]
) -> None:
    statuses = fuzz(url, operation, mode, examples)

    assert expected <= statuses.keys()


@pytest.mark.slow
@pytest.mark.parametrize(("operation", "mode", "examples", "expected"), FUZZED)
def test_many_requests_that_a_machine_makes_up_are_answered_as_documented(
    url: str, operation: str, mode: str, examples: int, expected: set[int]
) -> None:
    statuses = fuzz(url, operation, mode, 20 * examples)

    assert expected <= statuses.keys()


async def storm(url: str, log: Path, calls: int, seed: int) -> tuple[dict[str, str], set[str]]:
    """Make *calls* at once. A quarter goes away at a random moment, and a quarter once the server is at work on it.

    Return what the others were told, and who went.
    """
    chance = random.Random(seed)  # to be had again
    waits = {f"{seed}-{number}": round(chance.uniform(0.1, 1.5), 3) for number in range(calls)}
    early = {key: chance.uniform(0.0, 1.5) for key in chance.sample(sorted(waits), calls // 4)}
    sure = set(chance.sample(sorted(waits.keys() - early.keys()), calls // 4))
    waits.update(dict.fromkeys(sure, 600.0))
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=HEADERS, timeout=60, limits=limits) as client:

        async def call(key: str) -> str:
            body = {"name": "one__wait", "arguments": {"seconds": waits[key], "key": key}}
            answer = await client.post("/invoke", json=body)
            return f"{answer.status_code} {answer.json().get('text')}"

        tasks = {key: asyncio.create_task(call(key)) for key in waits}
        for key, after_s in early.items():
            asyncio.get_running_loop().call_later(after_s, tasks[key].cancel)
        while left := {key for key in sure if not tasks[key].done()}:
            await asyncio.sleep(0.05)
            for key in left & logged(log, seed)["began"]:
                tasks[key].cancel()
        outcomes = await asyncio.gather(*tasks.values(), return_exceptions=True)
    told = dict(zip(tasks, outcomes, strict=True))
    gone = {key for key, outcome in told.items() if isinstance(outcome, asyncio.CancelledError)}
    assert sure <= gone <= sure | early.keys()
    return {key: str(outcome) for key, outcome in told.items() if key not in gone}, gone


def weather(tmp_path: Path, cache: pytest.Cache | None, calls: int, seeds: range) -> None:
    """Have one storm after another, and look afterwards for what is lost or left."""
    assert cache is not None
    log, config = tmp_path / "log", tmp_path / "config.toml"
    log.touch()
    config.write_text(text_of_config({"one": {"command": sys.executable, "args": [SERVER, "--log", str(log)]}}))
    with running_gateway("python", config, cache, {"GATEWAY_TOKEN": TOKEN}) as (url, process):
        assert httpx.get(f"{url}/tools", headers=HEADERS, timeout=30).status_code == 200
        children = children_of(process.pid)
        for seed in seeds:
            told, gone = asyncio.run(storm(url, log, calls, seed))

            assert told == {key: f"200 waited for {key}" for key in told}
            ended = asyncio.run(ends(log, seed))
            assert told.keys() <= ended["finished"]
            assert len(ended["cancelled"]) >= calls // 4
            assert not ended["finished"] & ended["cancelled"]
            assert ended["began"] == ended["finished"] | ended["cancelled"]
            assert ended["began"] <= told.keys() | gone
        assert children_of(process.pid) == children
    assert not any(map(is_running, children))


def logged(log: Path, seed: int) -> dict[str, set[str]]:
    """The calls of the storm that began, were finished and were cancelled."""
    said: dict[str, set[str]] = {"began": set(), "finished": set(), "cancelled": set()}
    for what, _, key in (line.partition(" ") for line in log.read_text().splitlines()):
        if key.startswith(f"{seed}-"):
            said[what].add(key)
    return said


async def ends(log: Path, seed: int) -> dict[str, set[str]]:
    """What the server did in the storm, once all that it began has ended."""
    async with asyncio.timeout(END_S):
        while True:
            said = logged(log, seed)
            if said["began"] == said["finished"] | said["cancelled"]:
                return said
            await asyncio.sleep(0.05)


def test_of_200_calls_at_once_none_is_lost_and_those_whose_clients_go_are_cancelled(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    weather(tmp_path, pytestconfig.cache, 200, range(1))


@pytest.mark.slow
def test_storm_after_storm_loses_and_leaves_nothing(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    weather(tmp_path, pytestconfig.cache, 250, range(20))
