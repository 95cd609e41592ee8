"""Files of servers: every format that is about is read, and what is wrong in one is told where it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from agent_fsm.errors import ConfigError
from agent_fsm.tools.mcp.config import ServersFile, ServerSpec, read_servers, servers_of

TOKEN = "tok-3141592653"
ENVIRON = {"API_TOKEN": TOKEN, "HOME": "/home/me", "EMPTY": "", "ROOT": "/srv"}


def read(tmp_path: Path, text: str, *, name: str = "mcp.json", environ: Mapping[str, str] = ENVIRON) -> ServersFile:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return read_servers(path, environ)


def one(entry: Mapping[str, Any], environ: Mapping[str, str] = ENVIRON) -> ServerSpec:
    (spec,) = servers_of({"one": entry}, environ, "here").servers
    return spec


def test_the_file_of_claude_and_cursor_is_read(tmp_path: Path) -> None:
    text = """{"mcpServers": {
        "files": {"command": "npx", "args": ["-y", "server", "${ROOT}"], "env": {"TOKEN": "${API_TOKEN}", "PORT": 80}},
        "docs": {"type": "http", "url": "https://docs.example/mcp",
                 "headers": {"Authorization": "Bearer ${API_TOKEN}"}},
        "old": {"url": "http://127.0.0.1:1/sse", "disabled": true}
    }}"""

    found = read(tmp_path, text)

    assert found == ServersFile(
        (
            ServerSpec(
                name="files",
                command="npx",
                args=("-y", "server", "/srv"),
                env={"TOKEN": TOKEN, "PORT": "80"},
                variables={"ROOT": "/srv", "API_TOKEN": TOKEN},
            ),
            ServerSpec(
                name="docs",
                url="https://docs.example/mcp",
                headers={"Authorization": f"Bearer {TOKEN}"},
                variables={"API_TOKEN": TOKEN},
            ),
            ServerSpec(name="old", url="http://127.0.0.1:1/sse", transport="sse", enabled=False),
        )
    )


def test_the_file_of_vs_code_is_read_with_its_comments_and_variables(tmp_path: Path) -> None:
    text = """{
        // a comment with "quotes" and a, ]
        "inputs": [],
        "servers": {
            "one": {
                "type": "stdio",
                "command": "python", /* another
                one */ "args": ["${workspaceFolder}/a.py", "http://x//y", "/* no comment */", "${env:ROOT}", "a,]",],
                "env": {"NOTHING": null},
            }, // the last
        },
    }"""

    found = read(tmp_path, text, name=".vscode/mcp.json")

    args = (f"{tmp_path}/a.py", "http://x//y", "/* no comment */", "/srv", "a,]")
    assert found == ServersFile(
        (ServerSpec(name="one", command="python", args=args, variables={"ROOT": "/srv"}),)
    )  # fmt: skip


def test_the_file_of_codex_is_read(tmp_path: Path) -> None:
    text = """
        model = "some"
        [mcp_servers.docs]
        command = "npx"
        args = ["-y", "docs"]
        env = { A = "b" }
        env_vars = ["ROOT", "NOT_SET"]
        cwd = "/tmp"
        startup_timeout_ms = 20000
        tool_timeout_sec = 4.5
        enabled_tools = ["search", "open"]
        disabled_tools = ["open"]
        [mcp_servers.remote]
        url = "https://example.com/mcp"
        bearer_token_env_var = "API_TOKEN"
        http_headers = { X-One = "1" }
        env_http_headers = { X-Two = "ROOT" }
        enabled = false
    """

    found = read(tmp_path, text, name="config.toml")

    docs = ServerSpec(
        name="docs",
        command="npx",
        args=("-y", "docs"),
        env={"A": "b", "ROOT": "/srv"},
        cwd="/tmp",
        startup_timeout_s=20.0,
        tool_timeout_s=4.5,
        enabled_tools=("search", "open"),
        disabled_tools=("open",),
        variables={"ROOT": "/srv"},
    )
    remote = ServerSpec(
        name="remote",
        url="https://example.com/mcp",
        headers={"X-One": "1", "X-Two": "/srv", "Authorization": f"Bearer {TOKEN}"},
        enabled=False,
        variables={"ROOT": "/srv", "API_TOKEN": TOKEN},
    )
    assert found == ServersFile((docs, remote))


def test_servers_in_toml_and_a_file_without_a_known_ending_are_read(tmp_path: Path) -> None:
    toml = read(tmp_path, '[servers.x]\ncommand = "npx"\nargs = ["--key", "${API_TOKEN}"]', name="config.toml")
    bare = read(tmp_path, '\ufeff{"mcpServers": {"x": {"command": "npx"}}}', name="servers")

    assert toml.servers[0].args == ("--key", TOKEN)
    assert bare.servers == (ServerSpec(name="x", command="npx"),)


def test_a_whole_file_and_finished_servers_are_taken_as_a_mapping() -> None:
    ready = ServerSpec(name="whatever", command="x")

    found = servers_of({"mcpServers": {"one": {"command": "x"}}}, {}, "here")
    named = servers_of({"servers": {"command": "x"}, "two": ready}, {}, "here")

    assert found.servers == (ServerSpec(name="one", command="x"),)
    assert named.servers == (ServerSpec(name="servers", command="x"), ServerSpec(name="two", command="x"))


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("a${ROOT}b${env:ROOT}", "a/srvb/srv"),
        ("${NOT_SET:-there}", "there"),
        ("${NOT_SET:-}", ""),
        ("${EMPTY:-there}", "there"),
        ("${EMPTY}", ""),
        ("${ROOT:-there}", "/srv"),
        ("$${ROOT} $ROOT ${ROOT", "${ROOT} $ROOT ${ROOT"),
        ("${userHome}${/}${pathSeparator}", "/home/me//"),
    ],
)
def test_variables_are_filled_in(text: str, filled: str) -> None:
    spec = one({"command": "x", "args": [text]})

    assert spec.args == (filled,)


@pytest.mark.parametrize(
    ("field", "entry"),
    [
        ("command", {"command": "${GONE}"}),
        ("args[1]", {"command": "x", "args": ["a", "b${GONE}"]}),
        ("env.A", {"command": "x", "env": {"A": "${env:GONE}"}}),
        ("cwd", {"command": "x", "cwd": "${GONE}/a"}),
        ("url", {"url": "http://${GONE}/"}),
        ("headers.A", {"url": "http://x/", "headers": {"A": "${GONE}"}}),
        ("bearer_token_env_var", {"url": "http://x/", "bearer_token_env_var": "GONE"}),
        ("env_http_headers.A", {"url": "http://x/", "env_http_headers": {"A": "GONE"}}),
    ],
)
def test_a_variable_that_is_not_set_is_an_error_that_names_it(field: str, entry: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        one(entry)

    assert str(caught.value) == (
        f"here: server 'one': {field} needs the environment variable GONE, which is not set; set it, or disable the "
        "server"
    )


def test_a_server_that_is_not_enabled_needs_no_variables() -> None:
    spec = one({"url": "${GONE}/mcp", "headers": {"A": "${input:a}"}, "bearer_token_env_var": "GONE", "enabled": False})

    assert (spec.enabled, spec.url) == (False, "${GONE}/mcp")


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({}, "server 'one': it has neither command nor url; a server is started by a command, or reached at a url"),
        ("npx", "server 'one' must be an object with command or url, not text"),
        ({"command": "x", "url": "http://x/"}, "server 'one': it has both command and url"),
        ({"command": "x", "type": "http"}, "server 'one': transport 'http' needs a url, not a command"),
        ({"url": "http://x/", "type": "stdio"}, "server 'one': transport 'stdio' needs a command, not a url"),
        ({"command": "x", "type": "carrier"}, "server 'one': type must be one of stdio, http and sse, not 'carrier'"),
        ({"url": "ftp://x/"}, "server 'one': url must be a whole http or https URL"),
        ({"url": "http://[x/"}, "server 'one': url must be a whole http or https URL"),
        ({"command": 3}, "server 'one': command must be text, not a number"),
        ({"command": " "}, "server 'one': command must be text, not empty"),
        ({"command": []}, "server 'one': it has neither command nor url"),
        ({"command": "x", "args": "-y"}, 'server \'one\': args must be a list of strings like ["a", "b"], not text'),
        ({"command": "x", "args": [["a"]]}, "server 'one': args must be text, not a list"),
        ({"command": "x", "args": ["\0"]}, "server 'one': args has a NUL character in it"),
        ({"command": "x", "env": ["A=b"]}, "server 'one': env must be an object like"),
        ({"command": "x", "env": {"A=": "b"}}, "server 'one': env: 'A=' can't be passed to a process"),
        ({"url": "http://x/", "headers": {"A": "b\nC: d"}}, "server 'one': headers: 'A' is no header"),
        ({"url": "http://x/", "headers": {"A b": "c"}}, "server 'one': headers: 'A b' is no header"),
        ({"url": "http://x/", "bearer_token": "x"}, "server 'one': bearer_token is not read: no token belongs"),
        ({"command": "x", "tool_timeout_sec": 0}, "server 'one': tool_timeout_sec must be a finite number > 0, not 0"),
        ({"command": "x", "startup_timeout_sec": "9"}, "startup_timeout_sec must be a finite number > 0, not text"),
        ({"command": "x", "enabled": "yes"}, "server 'one': enabled must be true or false, not text"),
        ({"command": "x", "env_vars": "A"}, "server 'one': env_vars must be a list of names"),
        ({"command": "x", "args": ["${input:key}"]}, "args[0] asks for ${input:key}, and nobody can be asked here"),
        ({"command": "x", "args": ["${a b}"]}, "args[0] has ${a b} in it, which is no variable: write ${NAME}"),
        ({"command": "x", "args": ["${A:-${B}}"]}, "args[0] has ${A:-${B} in it, which is no variable"),
        ({"url": "http://x/", "serverUrl": "http://y/"}, "server 'one': serverUrl says the same as url"),
    ],
)
def test_what_cannot_be_meant_is_an_error_that_says_what_would_be_right(entry: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        servers_of({"one": entry}, ENVIRON, "here")

    assert str(caught.value).startswith("here: ")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is no JSON: Expecting property name"),
        ('{"mcpServers": {"a": {}, "a": {}}}', "is no JSON: 'a' is there twice in one object"),
        ('{"servers": {"a": {"command": "x"}}, "mcpServers": {"a": {"command": "x"}}}', "server 'a' is there twice"),
        ("[]", "must be a JSON object like"),
        ("[" * 100_000, "is no JSON"),
        ('{"mcpServer": {}}', "none of mcpServers, mcp_servers, servers; did you mean 'mcpServers'?"),
        ('{"other": {}}', "names no servers: it has none of mcpServers, mcp_servers, servers"),
        ('{"mcpServers": []}', "mcpServers must be a mapping of names to servers, not a list"),
        (" " * 1_000_001, "has more than 1,000,000 bytes"),
    ],
)
def test_a_file_that_cannot_be_understood_is_an_error_that_names_it(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)

    assert str(caught.value).startswith(str(tmp_path / "mcp.json"))
    assert told in str(caught.value)


def test_a_file_that_is_not_there_or_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")

    with pytest.raises(ConfigError, match=r"gone.toml: can't be read: No such file"):
        read_servers(tmp_path / "gone.toml", {})
    with pytest.raises(ConfigError, match=r"bytes.toml: is not UTF-8"):
        read_servers(tmp_path / "bytes.toml", {})
    with pytest.raises(ConfigError, match=r"bad.toml: is no TOML: .*line 2"):
        read(tmp_path, "\n[a\n", name="bad.toml")


def test_what_is_not_understood_is_told(tmp_path: Path) -> None:
    text = """{"mcpServer": {}, "mcpServers": {"a": {
        "command": "npx -y thing", "arg": ["x"], "envFile": ".env", "description": "a thing", "tools": {"x": {}},
        "nonsense": 1, "timeout": 60000
    }, "b": {"command": "x", "timeout": 60}}}"""

    found = read(tmp_path, text)

    where = f"{tmp_path}/mcp.json"
    assert found.warnings == (
        f"{where}: 'mcpServer' is not read; did you mean 'mcpServers'?",
        f"{where}: server 'a': command 'npx -y thing' is taken for the name of a program; its arguments go to args",
        f"{where}: server 'a': tools is not supported and does nothing: calls are not asked about here",
        f"{where}: server 'a': timeout 60000 is read as 60 s for a call; say tool_timeout_sec",
        f"{where}: server 'a': 'arg' is not known and does nothing; did you mean 'args'?",
        f"{where}: server 'a': envFile is not supported and does nothing: write what is in the file into env, or set "
        "it in the environment and write ${VAR}",
        f"{where}: server 'a': 'nonsense' is not known and does nothing",
        f"{where}: server 'b': timeout 60 is read as 60 s for a call; say tool_timeout_sec",
    )


def test_a_file_with_no_servers_says_so(tmp_path: Path) -> None:
    found = read(tmp_path, '{"mcpServers": {}}')

    assert found == ServersFile((), (f"{tmp_path}/mcp.json: mcpServers is empty: there are no servers",))


def test_no_secret_is_shown_wherever_it_was_put() -> None:
    spec = one(
        {
            "command": "x",
            "args": ["--key", "${API_TOKEN}"],
            "env": {"SOME_SECRET": "s-27182818", "PLAIN": "plain-value"},
        }
    )
    remote = one({"url": "https://me:pass-16180@x.example/?key=${API_TOKEN}", "headers": {"X-Api-Key": "k-5772156649"}})

    assert repr(spec) == "ServerSpec(name='one', command='x', args=('--key', '***'), transport='stdio')"
    assert repr(remote) == "ServerSpec(name='one', url='https://me:***@x.example/?key=***', transport='http')"
    assert set(spec.secrets) == {TOKEN, "s-27182818"}
    assert set(remote.secrets) == {TOKEN, "k-5772156649", "pass-16180"}


def test_an_error_never_shows_a_value() -> None:
    with pytest.raises(ConfigError) as caught:
        one({"url": "http://x/", "headers": {"Authorization": "Bearer ${API_TOKEN}\n"}})

    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("enabled", "disabled", "offered"),
    [(None, (), True), (("a",), (), True), (("b",), (), False), (None, ("a",), False), (("a",), ("a",), False)],
)
def test_a_tool_is_offered_if_it_is_allowed_and_not_denied(
    enabled: tuple[str, ...] | None, disabled: tuple[str, ...], offered: bool
) -> None:
    spec = ServerSpec(name="one", command="x", enabled_tools=enabled, disabled_tools=disabled)

    assert spec.offers("a") is offered


def test_tools_of_copilot_and_gemini_are_allowlists() -> None:
    every = one({"command": "x", "tools": ["*"]})
    some = one({"command": "x", "includeTools": ["a"], "excludeTools": ["b"]})

    assert (every.enabled_tools, every.disabled_tools) == (None, ())
    assert (some.enabled_tools, some.disabled_tools) == (("a",), ("b",))


@pytest.mark.parametrize("name", ["", " ", "a\nb", 3])
def test_a_server_has_a_printable_name(name: Any) -> None:
    with pytest.raises(ConfigError, match="the name of a server must be printable text"):
        servers_of({name: {"command": "x"}}, {}, "here")
