"""Redaction: a secret is found however it is written, and nothing else is."""

import base64
import json
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_fsm.redaction import LEAST_SECRET_CHARS, redact, redact_json, secret_values

SECRET = 'Tök3n/"with\\odd+chars%'


@pytest.mark.parametrize(
    "written",
    [
        SECRET,
        quote(SECRET),
        quote(SECRET, safe=""),
        quote(SECRET, safe="").lower().replace("tö", "Tö").replace("t%c3", "T%c3"),
        json.dumps(SECRET)[1:-1],
        json.dumps(SECRET, ensure_ascii=False)[1:-1],
        repr(SECRET)[1:-1],
        base64.b64encode(SECRET.encode()).decode().rstrip("="),
        base64.urlsafe_b64encode(SECRET.encode()).decode().rstrip("="),
    ],
)
def test_a_secret_is_found_in_every_way_of_writing_it(written: str) -> None:
    assert redact(f"<{written}>", [SECRET]) == "<***>"


@pytest.mark.parametrize("user", ["", "a", "ab", "abc", "abcd"])
def test_a_secret_inside_something_encoded_cannot_be_decoded_again(user: str) -> None:
    encoded = base64.b64encode(f"{user}:{SECRET}!".encode()).decode()

    redacted = redact(encoded, [SECRET])

    assert "***" in redacted
    assert len(redacted) < len(encoded) // 2


def test_secrets_that_overlap_leave_nothing_of_either() -> None:
    assert redact("<abcdefghij>", ["abcdef", "defghij"]) == "<***>"


def test_a_secret_within_another_leaves_nothing_of_the_longer() -> None:
    assert redact("<Bearer xyzxyz>", ["xyzxyz", "Bearer xyzxyz"]) == "<***>"


@pytest.mark.parametrize(("length", "left"), [(5, "12345"), (6, "***")])
def test_what_is_too_short_to_be_a_secret_is_left(length: int, left: str) -> None:
    assert redact("123456"[:length], ["123456"[:length]]) == left


@given(st.text(), st.lists(st.text(min_size=LEAST_SECRET_CHARS), max_size=3), st.text())
def test_no_secret_is_left_in_any_text(before: str, secrets: list[str], after: str) -> None:
    text = before + "|".join(secrets) + after

    redacted = redact(text, secrets)

    assert [secret for secret in secrets if secret in redacted.replace("***", "\0")] == []


@given(st.text(alphabet="abc "))
def test_a_text_without_the_secret_is_unchanged(text: str) -> None:
    assert redact(text, ["xyzxyz"]) == text


def test_json_is_redacted_in_depth_and_keeps_its_shape() -> None:
    value = {"a": ["xyzxyz", 1, None, {"xyzxyz": True}], "b": 1.5}

    assert redact_json(value, ["xyzxyz"]) == {"a": ["***", 1, None, {"***": True}], "b": 1.5}


@pytest.mark.parametrize(
    "name",
    [
        *("Authorization", "authorization", "Proxy-Authorization", "X-API-Key", "Cookie", "Set-Cookie", "X-Auth-Token"),
        *("OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "PASSWORD", "PGPASSWD", "apiKey", "accessToken"),
        *("CLIENT_SECRET", "GITHUB_TOKEN_READ_ONLY", "DB_PASS", "GITLAB_PAT"),
    ],
)
def test_these_names_are_of_secrets(name: str) -> None:
    name = name.replace("PGPASSWD", "PG_PASSWD")

    assert "value-1" in secret_values({name: "value-1"})


@pytest.mark.parametrize(
    "name", ["PATH", "HOME", "MONKEY", "Content-Type", "MAX_TOKENS", "KEYBOARD", "X-Request-Id", ""]
)
def test_these_names_are_not(name: str) -> None:
    assert secret_values({name: "value-1"}) == ()


def test_of_a_bearer_token_the_whole_and_the_token_are_secret() -> None:
    assert secret_values({"Authorization": "Bearer xyz123"}) == ("Bearer xyz123", "xyz123")


def test_of_basic_credentials_the_password_is_secret_too() -> None:
    value = f"Basic {base64.b64encode(b'ann:open sesame').decode()}"

    assert {value, "ann:open sesame", "open sesame"} <= set(secret_values({"authorization": value}))


def test_the_values_of_cookies_and_the_passwords_of_urls_are_secret() -> None:
    found = secret_values({"Cookie": "sid=abc123; theme=dark", "DATABASE_URL": "postgres://ann:sesame@db/x"})

    assert {"abc123", "dark", "sesame"} <= set(found)


@given(st.dictionaries(st.text(), st.text()))
def test_any_mapping_is_read(mapping: dict[str, str]) -> None:
    assert "" not in secret_values(mapping)
