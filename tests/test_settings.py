"""A configuration is made of options, environment and file, in this order; what is wrong is told with its place."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from attrs import fields

from agent_fsm import config
from agent_fsm.cli.settings import configure, settings
from agent_fsm.config import AgentConfig
from agent_fsm.errors import ConfigError

# For each type of field: a name; how the file, a variable and an option say it; what each of them means
PRECEDENCE = [
    ("max_iterations", "3", "4", "5", (3, 4, 5)),
    ("max_wallclock_seconds", "3", "4.5", "5e1", (3.0, 4.5, 50.0)),
    ("max_cost_usd", "0.25", "0.5", "none", (0.25, 0.5, None)),
    ("max_cost_usd", '"none"', "none", "0.5", (None, None, 0.5)),
    ("max_history_messages", '"None"', "7", "NONE", (None, 7, None)),
    ("enable_repair", "false", "yes", False, (False, True, False)),
    ("model", '"a"', "b", "c/d", ("a", "b", "c/d")),
    ("fallback_models", '["a", "b"]', "c, d", "e", (("a", "b"), ("c", "d"), ("e",))),
    ("fallback_models", '["a"]', "none", "none", (("a",), (), ())),
    ("response_cache", '"redis://a"', "redis://b:1/2", "none", ("redis://a", "redis://b:1/2", None)),
    ("completion_kwargs", "{ a = 1 }", '{"b": 2}', '{"c": [3]}', ({"a": 1}, {"b": 2}, {"c": [3]})),
]


def written(folder: Path, text: str) -> Path:
    file = folder / "agent.toml"
    file.write_text(text, encoding="utf-8")
    return file


def variable(name: str) -> str:
    return f"AGENT_FSM_{name.upper()}"


def test_every_type_of_field_is_among_those_whose_precedence_is_tested() -> None:
    kinds = {(each.kind, each.may_be_absent) for each in settings()}

    named = {name for name, *_ in PRECEDENCE}
    assert {(each.kind, each.may_be_absent) for each in settings() if each.name in named} == kinds


@pytest.mark.parametrize("said", PRECEDENCE, ids=lambda said: said[0])
def test_options_beat_the_environment_which_beats_the_file(tmp_path: Path, said: tuple[Any, ...]) -> None:
    name, in_file, in_environment, as_option, meant = said
    file = written(tmp_path, f"{name} = {in_file}\n")
    environ = {variable(name): in_environment}

    from_file = configure({name: None}, {}, file)
    from_environment = configure({name: None}, environ, file)
    from_options = configure({name: as_option}, environ, file)

    assert from_file == AgentConfig(**{name: meant[0]})
    assert from_environment == AgentConfig(**{name: meant[1]})
    assert from_options == AgentConfig(**{name: meant[2]})


def test_with_nothing_given_the_defaults_stand() -> None:
    assert configure({each.name: None for each in settings()}, {}) == AgentConfig()


@pytest.mark.parametrize(
    ("options", "environ", "content"),
    [({"model": "named"}, {}, ""), ({}, {"AGENT_FSM_MODEL": "named"}, ""), ({}, {}, "model = 'named'")],
)
def test_the_model_of_the_key_gives_way_to_one_that_is_named(
    tmp_path: Path, options: dict[str, Any], environ: dict[str, str], content: str
) -> None:
    file = written(tmp_path, content)
    key = {"OPENAI_API_KEY": "sk-none"}

    assert configure({}, key).model == "gpt-4o-mini"
    assert configure(options, environ | key, file).model == "named"


def test_an_empty_variable_is_one_that_is_not_set() -> None:
    environ = {variable(each.name): " " for each in settings()}

    assert configure({}, environ) == AgentConfig()


def test_variables_of_others_that_share_the_prefix_are_left_alone() -> None:
    assert configure({}, {"AGENT_FSM_PORT": "8080", "AGENT_FSM_API_TOKEN": "x"}) == AgentConfig()


WRONG_OPTIONS = [
    ({"max_iterations": "five"}, "--max-iterations: max_iterations must be a whole number >= 1, not 'five'"),
    ({"max_iterations": "0"}, "--max-iterations: max_iterations must be a whole number >= 1, not 0"),
    ({"max_iterations": "none"}, "--max-iterations: max_iterations must be a whole number >= 1, not 'none'"),
    ({"max_wallclock_seconds": "inf"}, "max_wallclock_seconds must be a finite number > 0, not inf"),
    ({"max_cost_usd": "-1"}, "--max-cost-usd: max_cost_usd must be a finite number > 0 or None, not -1.0"),
    ({"model": " "}, "--model: model must be a name, not ''"),
    ({"fallback_models": "a,,b"}, "fallback_models must be a sequence of model names, not ('a', '', 'b')"),
    ({"completion_kwargs": "[1]"}, "completion_kwargs must be a mapping of argument names to values, not [1]"),
    ({"completion_kwargs": "{'a'}"}, "completion_kwargs must be a mapping of argument names to values, not \"{'a'}\""),
]


@pytest.mark.parametrize(("options", "told"), WRONG_OPTIONS)
def test_a_bad_option_is_told_with_what_would_be_right(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        configure(options, {})

    assert told in str(raised.value)


WRONG_VARIABLES = [
    ({"AGENT_FSM_MAX_ITERATIONS": "5.5"}, "AGENT_FSM_MAX_ITERATIONS: max_iterations must be a whole number >= 1"),
    ({"AGENT_FSM_ENABLE_REPAIR": "maybe"}, "AGENT_FSM_ENABLE_REPAIR: enable_repair must be True or False, not 'maybe'"),
]


@pytest.mark.parametrize(("environ", "told"), WRONG_VARIABLES)
def test_a_bad_variable_is_told_with_its_name(environ: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        configure({}, environ)

    assert told in str(raised.value)


WRONG_FILES = [
    ("max_iterations = 'five'", "{file}: max_iterations must be a whole number >= 1, not 'five'"),
    ("max_iterations = true", "{file}: max_iterations must be a whole number >= 1, not True"),
    ("enable_repair = 1", "{file}: enable_repair must be True or False, not 1"),
    ("max_iters = 5", "{file}: max_iters is not a setting; the nearest is max_iterations"),
    ("max-iterations = 5", "{file}: max-iterations is not a setting; the nearest is max_iterations"),
    ("model = ", "{file} is not valid TOML: Invalid value"),
]


@pytest.mark.parametrize(("content", "told"), WRONG_FILES)
def test_a_bad_file_is_told_with_the_key(tmp_path: Path, content: str, told: str) -> None:
    file = written(tmp_path, content)

    with pytest.raises(ConfigError) as raised:
        configure({}, {}, file)

    assert told.format(file=file) in str(raised.value)


def test_a_bad_value_is_told_even_if_a_better_one_beats_it() -> None:
    with pytest.raises(ConfigError, match="AGENT_FSM_MAX_ITERATIONS"):
        configure({"max_iterations": "5"}, {"AGENT_FSM_MAX_ITERATIONS": "x"})


def test_settings_are_the_fields_with_the_words_that_stand_under_them() -> None:
    source = " ".join(inspect.getsource(config).split())

    assert [each.name for each in settings()] == [each.name for each in fields(AgentConfig)]
    assert all(each.doc and f'"""{each.doc}' in source for each in settings())
