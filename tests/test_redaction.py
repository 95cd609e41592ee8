"""Redaction: a secret is found however it is written, and nothing else is."""

import base64
import json
import random
import string
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_fsm import redaction
from agent_fsm.redaction import (
    LEAST_SECRET_CHARS,
    environment_secrets,
    redact,
    redact_json,
    redactor,
    secret_values,
)

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


# A run's own: what looks like a key, and what the environment holds

ALNUM = string.ascii_letters + string.digits
URL_SAFE = f"{ALNUM}_-"


def after(prefix: str, chars: int, alphabet: str = ALNUM) -> st.SearchStrategy[str]:
    """Random characters after *prefix*: with Hypothesis' own, what is before a key would be like what is in it."""
    return st.integers(0, 2**32).map(lambda seed: prefix + "".join(random.Random(seed).choices(alphabet, k=chars)))


SHAPES: dict[str, st.SearchStrategy[str]] = {
    "OpenAI": st.builds("{}T3BlbkFJ{}".format, after("sk-", 20), after("", 20)),
    "OpenAI, of a project": st.builds("{}T3BlbkFJ{}".format, after("sk-proj-", 74, URL_SAFE), after("", 74, URL_SAFE)),
    "Anthropic": after("sk-ant-api03-", 93, URL_SAFE).map("{}AA".format),
    "OpenRouter": after("sk-or-v1-", 64, "0123456789abcdef"),
    "DeepSeek": after("sk-", 32, "0123456789abcdef"),
    "Perplexity": after("pplx-", 48),
    "xAI": after("xai-", 80),
    "Groq": after("gsk_", 52),
    "Tavily": after("tvly-dev-", 32),
    "HuggingFace": after("hf_", 34, string.ascii_letters),
    "AWS": st.sampled_from(["AKIA", "ASIA"]).flatmap(
        lambda prefix: after(prefix, 16, f"{string.ascii_uppercase}234567")
    ),
    "Google": after("AIza", 35, URL_SAFE),
    "Google, of a client": after("GOCSPX-", 28, URL_SAFE),
    "GitHub": st.sampled_from("pousr").flatmap(lambda kind: after(f"gh{kind}_", 36)),
    "GitHub, fine-grained": st.builds("{}_{}".format, after("github_pat_", 22), after("", 59)),
    "GitLab": after("glpat-", 20, f"{ALNUM}_"),
    "Slack": after("xoxb-123456789012-1234567890123-", 24),
    "Slack, a webhook": after("hooks.slack.com/services/T0123ABCD/B0123ABCD/", 24),
    "Stripe": st.sampled_from(["sk_live_", "rk_live_", "sk_test_"]).flatmap(lambda prefix: after(prefix, 24)),
    "npm": after("npm_", 36),
    "PyPI": after("pypi-AgEIcHlwaS5vcmc", 150, URL_SAFE),
    "Docker": after("dckr_pat_", 27, URL_SAFE),
    "DigitalOcean": after("dop_v1_", 64, "0123456789abcdef"),
    "SendGrid": st.builds("{}.{}".format, after("SG.", 22, URL_SAFE), after("", 43, URL_SAFE)),
    "JWT": st.builds(
        "{}.{}.{}".format, after("eyJ", 33, URL_SAFE), after("eyJ", 60, URL_SAFE), after("", 43, URL_SAFE)
    ),
}
BEFORE = ["", "KEY=", '"', "'", " ", "(", "\n", "\t", "é", "https://a.example/?key=", "a/b:"]
COLOURS = ["\x1b[31m", "\x1b[0;31m", "\x1b[38;5;208m", "\x1b[01;31m\x1b[K"]
AFTER = ["", '"', "'", " ", ")", ".\n", "\n", "&a=1", "\x1b[0m", ", ", "é"]
WRITTEN: dict[str, Any] = {
    "as it is": str,
    "as JSON": json.dumps,
    "as JSON in JSON": lambda text: json.dumps(json.dumps(text)),
    "as Python": repr,
}


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=10)  # of each shape
@given(st.data())
def test_a_known_key_is_found_wherever_it_stands_and_however_it_is_written(shape: str, data: st.DataObject) -> None:
    key = data.draw(SHAPES[shape])
    text = data.draw(st.text(max_size=20)) + data.draw(st.sampled_from([*BEFORE[1:], *COLOURS])) + key
    text += data.draw(st.sampled_from(AFTER))
    written = data.draw(st.sampled_from([*WRITTEN.values()]))(text)

    redacted = redactor(())(written)

    assert "***" in redacted
    assert key[-14:] not in redacted
    assert len(redacted) >= len(written) - len(key)


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=10)  # of each shape
@given(st.data())
def test_a_known_key_is_found_in_a_url_and_alone(shape: str, data: st.DataObject) -> None:
    key = data.draw(SHAPES[shape])

    assert key not in redactor(())(f"https://a.example/?a={quote(data.draw(st.sampled_from(BEFORE)))}{key}&b=1")
    assert redactor(())(key).endswith("***")


LINES = [f"{ALNUM[:60]}1234"] * 12
PEM = "\n".join(["-----BEGIN RSA PRIVATE KEY-----", *LINES, f"{ALNUM[:30]}==", "-----END RSA PRIVATE KEY-----"])


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (PEM, "***"),
        (PEM.replace("RSA ", "OPENSSH "), "***"),
        (json.dumps(PEM), '"***"'),
        (json.dumps(json.dumps(PEM)), r'"\"***\""'),
        (PEM[:400], "***"),
        (json.dumps(PEM[:400]), '"***"'),
        ("\n".join(f"{n:4}  {line}" for n, line in enumerate(PEM.split("\n"))), "   0  ***"),
        ("Authorization: Bearer 0f9d.abc_DEF-12345678", "Authorization: Bearer ***"),
        ('{"authorization": "Bearer abcdefgh12345678"}', '{"authorization": "Bearer ***"}'),
        ("curl -H 'Authorization: Basic dXNlcjpwYXNz' a.b", "curl -H 'Authorization: Basic ***' a.b"),
        ("postgres://ann:sesame@db:5432/x", "postgres://ann:***@db:5432/x"),
        ("redis://:se:same@[::1]:6379", "redis://:***@[::1]:6379"),
        (f"aws_secret_access_key = {ALNUM[:38]}/+", "aws_secret_access_key = ***"),
        (json.dumps({"SecretAccessKey": ALNUM[:40]}), '{"SecretAccessKey": "***"}'),
        (f"AWS_SECRET_ACCESS_KEY={ALNUM[:40]}\nA=1", "AWS_SECRET_ACCESS_KEY=***\nA=1"),
    ],
)
def test_of_these_only_the_secret_is_replaced(text: str, left: str) -> None:
    assert redactor(())(text) == left


HONEST = [
    "da39a3ee5e6b4b0d3255bfef95601890afd80709 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "123e4567-e89b-12d3-a456-426614174000 sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "commit 5f3a9c1\nAuthor: Ann <ann@a.example>\n\n    Let task-runner and risk-assessment-for-all-departments pass",
    "<div class='sk-text-repr-fallback sk-toggleable__content-arrow'> sk-learn-contrib-lightning-is-a-package",
    "https://a.example:8080/@ann git@a.example:x/y.git http://[::1]:80/a@b ssh://git@a.example:22/x mailto:a@b.example",
    "postgres://${USER}:${PASSWORD}@db redis://:{password}@h https://<user>:<password>@h f'{scheme}://{user}:{pw}@{host}'",
    "Authorization: Bearer $TOKEN, Bearer {token}, 'Bearer YOUR_ACCESS_TOKEN', bearer authentication scheme, basic au",
    "if '-----BEGIN PRIVATE KEY-----' in text:\n    raise ValueError('-----END PRIVATE KEY-----')",
    "hf_hub_download npm_config_cache ghp_ sk_live_ sk_test_case_of_the_thing AKIA ASIA AIza eyJ xoxb- PRIVATE KEY",
    "def test_a_key_that_is_missing(api_key: str, token='...') -> None: os.environ['OPENAI_API_KEY']",
    "data:application/json;base64,eyJ2ZXJzaW9uIjozLCJzb3VyY2VzIjpbImEuanMiXX0=",
    "|-------------------|----------------|\n=====================\n_____________________",
    "MSG.aaaaaaaaaaaaaaaaaaaaaaaa.bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
]


@pytest.mark.parametrize("text", [*HONEST, *map(json.dumps, HONEST)])
def test_an_honest_text_is_the_same_object(text: str) -> None:
    assert redactor(("canary-secret-1",))(text) is text


@given(st.binary(max_size=2_000), st.uuids(), st.text())
def test_encoded_bytes_ids_and_any_text_are_unchanged(data: bytes, identifier: Any, text: str) -> None:
    said = f"{data.hex()} {base64.b64encode(data).decode()} {identifier} {text}"

    assert redactor(())(said) == said


def test_a_megabyte_of_base64_is_unchanged() -> None:
    image = base64.b64encode(random.Random(5).randbytes(800_000)).decode()

    assert redactor(())(image) is image


def test_our_own_sources_are_unchanged() -> None:
    sources = [path.read_text(encoding="utf-8") for path in Path(redaction.__file__).parent.rglob("*.py")]

    assert [text for text in sources if redactor(())(text) is not text and "password@" not in text] == []


HOSTILE = [
    *(
        "eyJ",
        "-eyJ",
        "eyJaaaaaaaaaaaaa.",
        "xoxb-",
        "-xoxb",
        "://a:",
        "://aaa@",
        "Bearer a",
        "sk-ant-",
        "glpat-aa.aa",
        "-",
    ),
    *(
        "-----BEGIN PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\n-",
        "aws_secret_access_key ",
        "_ghp_a",
        "AKIA1",
        "A\n",
    ),
]


@pytest.mark.parametrize("unit", HOSTILE)
def test_no_text_takes_long(unit: str) -> None:
    text = "-----BEGIN PRIVATE KEY-----://a:eyJaaaaaaaaaaaa" + unit * (200_000 // len(unit))
    began = time.perf_counter()

    redactor(("canary-secret-1",))(text)

    assert time.perf_counter() - began < 5  # some 50 ms; in quadratic time, it is minutes


@given(
    st.text(min_size=8).filter(str.strip),
    st.text(),
    st.text(),
    st.sampled_from([*WRITTEN.values(), lambda text: base64.b64encode(text.encode("utf-8", "replace")).decode()]),
)
def test_a_secret_of_the_environment_is_found_however_a_text_with_it_is_written(
    secret: str, before: str, behind: str, written: Any
) -> None:
    redacted = redactor((secret,))(written(f"{before} {secret} {behind}"))

    assert "***" in redacted


def test_json_is_redacted_names_too_and_what_is_base64_only_of_known_secrets() -> None:
    shape = f"AKIA{'A' * 16}"
    blob = base64.b64encode(b"x canary-secret-1 y").decode()
    value = {shape: [f"a {shape}", 1, None], "data": shape, "blob": blob, "more": {"a": ("canary-secret-1",)}}

    redacted = redactor(("canary-secret-1",)).json(value)

    assert (redacted.pop("blob") != blob, blob[8:16] in blob) == (True, True)
    assert redacted == {"***": ["a ***", 1, None], "data": shape, "more": {"a": ["***"]}}


def test_what_is_redacted_is_left_as_it_is_the_next_time() -> None:
    text = redactor(("canary-secret-1",))(
        f"canary-secret-1 {PEM} Bearer abcdefgh12345678 a://b:sesame@c sk-ant-{ALNUM}"
    )

    assert redactor(("canary-secret-1",))(text) == text


def test_a_redactor_does_not_show_what_it_looks_for() -> None:
    assert "canary" not in repr(redactor(("canary-secret-1",)))


ENVIRONMENT = {
    **{"USER": "build-agent", "HOME": "/srv/build-agent", "PATH": "/usr/bin:/bin", "PWD": "/srv/my project (2)"},
    **{"API_KEY": "short", "CI_TOKEN": "true", "DB_PASSWORD": "postgres", "SOME_SECRET": "/run/secrets/some.txt"},
    **{"ADMIN_PASSWORD": "build-agent", "MAX_TOKEN": "100000", "TOKEN_URL": "https://a.example/oauth/token/of/it"},
    **{
        "SSH_KEY": "~/.ssh/id_ed25519",
        "MY_TOKEN": "${OTHER}",
        "COOKIE_DOMAIN": "www.a.example",
        "KEYBOARD": "qwertzuio",
    },
    **{"PASSWORD_FILE": "some-password-file", "FILL_KEY": "xxxxxxxxxxxx", "SECRET_PROJECT": "the-project-1"},
}
"""What must not be looked for in every text."""


def test_what_is_too_short_or_too_ordinary_in_an_environment_is_no_secret() -> None:
    assert environment_secrets(ENVIRONMENT) == ()


@pytest.mark.parametrize(
    ("variable", "secret"),
    [
        ({"OPENAI_API_KEY": "canary-1"}, "canary-1"),
        ({"GITHUB_TOKEN": "canary-1"}, "canary-1"),
        ({"CLIENT_SECRET": "canary-1"}, "canary-1"),
        ({"DB_PASSWORD": "canary-1"}, "canary-1"),
        ({"DB_PWD": "canary-1"}, "canary-1"),
        ({"GITHUB_TOKEN_READ_ONLY": "canary-1"}, "canary-1"),
        ({"SECRET_KEY_BASE": "canary-1"}, "canary-1"),
        ({"DATABASE_URL": "postgres://ann:canary-1@db/x"}, "canary-1"),
        ({"HTTPS_PROXY": "http://ann:canary-1@proxy:3128"}, "canary-1"),
        (
            {"AWS_SECRET_ACCESS_KEY": "/wJalrXUtnFEMI/K7MDENGbPxRfiCYzEXAMPLEKEY"},
            "/wJalrXUtnFEMI/K7MDENGbPxRfiCYzEXAMPLEKEY",
        ),
        ({"OTHER_TOKEN": "12345678901234"}, "12345678901234"),
    ],
)
def test_what_a_variable_like_these_holds_is_secret(variable: dict[str, str], secret: str) -> None:
    assert secret in environment_secrets(ENVIRONMENT | variable)
