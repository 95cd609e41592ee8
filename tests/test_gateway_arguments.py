"""Arguments are checked by the schema of their tool, and no schema can make the check run, fetch or fail."""

import socket
import threading
from collections.abc import Mapping
from typing import Any

import pytest

from agent_fsm.server.arguments import faults_of, read_arguments

SCHEMA = {
    "type": "object",
    "properties": {
        "count": {"type": "integer", "minimum": 1, "exclusiveMaximum": 9},
        "kind": {"enum": ["a", "b"]},
        "deep": {"type": "object", "properties": {"list": {"type": "array", "items": {"type": ["string", "null"]}}}},
        "either": {"anyOf": [{"type": "string"}, {"type": "object", "required": ["x"]}]},
        "short": {"maxLength": 2},
        "one": {"const": 1},
    },
    "required": ["count"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("arguments", "faults"),
    [
        ({"count": 1, "kind": "a", "deep": {"list": ["x", None]}, "either": {"x": 1}, "short": "ab", "one": 1}, []),
        ({"count": 8}, []),
        ({}, ["arguments: 'count' is a required property"]),
        ({"count": "1"}, ["arguments.count: must be of type integer"]),
        ({"count": 0}, ["arguments.count: must be >= 1"]),
        ({"count": 9}, ["arguments.count: must be < 9"]),
        ({"count": 1, "kind": "c"}, ['arguments.kind: must be one of ["a", "b"]']),
        ({"count": 1, "deep": {"list": ["x", 2]}}, ["arguments.deep.list[1]: must be of type string or null"]),
        ({"count": 1, "either": {}}, ["arguments.either: 'x' is a required property"]),
        ({"count": 1, "short": "abc"}, ["arguments.short: must fit maxLength 2"]),
        ({"count": 1, "one": 2}, ["arguments.one: must be 1"]),
        ({"count": 1, "more": 2}, ["arguments: Additional properties are not allowed ('more' was unexpected)"]),
    ],
)
def test_what_does_not_fit_is_told_with_its_place_and_what_would_fit(
    arguments: dict[str, Any], faults: list[str]
) -> None:
    assert faults_of(arguments, SCHEMA) == faults


def test_no_more_than_five_faults_are_told_and_no_value() -> None:
    schema = {"properties": {f"key{number}": {"type": "null"} for number in range(9)}}

    faults = faults_of({f"key{number}": "secret-value" for number in range(9)}, schema)

    assert len(faults) == 5
    assert "secret-value" not in "".join(faults)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": 7},
        {"type": "no such type"},
        {"properties": {"text": {"minimum": "1"}}},
        {"properties": ["text"]},
        {"required": "text"},
        {"$ref": "#/nowhere"},
        {"$ref": "no such thing"},
        {"$ref": "#"},
        {"exclusiveMinimum": True, "minimum": 1},
        {"properties": {"text": {"pattern": "("}}},
        {"patternProperties": {"(": {}}, "additionalProperties": False},
        {"allOf": []},
        {"$schema": "http://nowhere.example/schema"},
    ],
)
def test_a_schema_that_cannot_be_used_forbids_nothing(schema: dict[str, Any]) -> None:
    assert faults_of({"text": "x"}, schema) == []


def test_a_schema_is_never_fetched() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        asked = threading.Event()
        listening.settimeout(1)

        def listen() -> None:
            try:
                listening.accept()[0].close()
            except TimeoutError:
                return
            asked.set()

        thread = threading.Thread(target=listen)
        thread.start()
        faults = faults_of({"text": 1}, {"$ref": f"http://127.0.0.1:{listening.getsockname()[1]}/schema.json"})
        thread.join()

    assert (faults, asked.is_set()) == ([], False)


@pytest.mark.parametrize(
    ("schema", "arguments"),
    [
        ({"properties": {"text": {"pattern": "^(a+)+$"}}}, {"text": "a" * 40 + "!"}),
        ({"patternProperties": {"^(a+)+$": {}}, "additionalProperties": False}, {"a" * 40 + "!": 1}),
        ({"properties": {"list": {"uniqueItems": True}}}, {"list": [[number] for number in range(20_000)]}),
        ({"patternProperties": {"^(a+)+$": {}}, "unevaluatedProperties": False}, {"a" * 40 + "!": 1}),
    ],
)
def test_a_schema_that_would_take_for_ever_is_not_asked(schema: dict[str, Any], arguments: dict[str, Any]) -> None:
    assert faults_of(arguments, schema) == []  # it would not come back


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {}),
        ("", {}),
        (" \n", {}),
        ({}, {}),
        ('{"a": 1}', {"a": 1}),
        ({"a": {"b": [1.5, None, "größe"]}}, {"a": {"b": [1.5, None, "größe"]}}),
    ],
)
def test_arguments_come_as_an_object_or_as_its_text(
    given: str | Mapping[str, Any] | None, expected: dict[str, Any]
) -> None:
    assert read_arguments(given) == expected


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("{", "arguments: the text is not valid JSON: Expecting property name"),
        ("[1]", "arguments: must be a JSON object"),
        ('"a"', "arguments: must be a JSON object"),
        ("[" * 100_000, "arguments: nested too deeply"),
        ('{"a": NaN}', "arguments: NaN and Infinity are no JSON"),
        ({"a": [float("inf")]}, "arguments: NaN and Infinity are no JSON"),
        ('{"a": "\\ud800"}', "arguments: a text has half a surrogate pair in it"),
        ({"\udfff": 1}, "arguments: a text has half a surrogate pair in it"),
    ],
)
def test_what_is_no_json_object_is_refused(given: Any, told: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_arguments(given)

    assert str(caught.value).startswith(told)
