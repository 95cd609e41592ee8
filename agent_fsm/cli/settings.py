"""Where a configuration comes from: options of the command, variables of the environment, a TOML file.

Every field of `AgentConfig` is a setting under its own name: `--max-iterations 5`, `AGENT_FSM_MAX_ITERATIONS=5`, and
`max_iterations = 5` in the file. Options beat the environment, which beats the file. Text is only turned into values
here; the fields of `AgentConfig` say whether they are right.
"""

import ast
import inspect
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, get_args, get_origin

from attrs import Attribute, fields, frozen

from agent_fsm.config import AgentConfig
from agent_fsm.errors import ConfigError
from agent_fsm.llm import default_model

__all__ = ["PREFIX", "Setting", "configure", "names", "settings"]

PREFIX: Final = "AGENT_FSM_"
_ABSENT: Final = "none"
"""How None, and an empty list, is written as text."""


@frozen
class Setting:
    """A field of `AgentConfig`, as the command knows it."""

    name: str
    kind: type
    """int, float, bool, str, tuple (of names) or Mapping."""
    may_be_absent: bool
    default: Any
    doc: str
    """The first clause of the field's docstring."""

    @property
    def option(self) -> str:
        """The option's name, such as `--max-iterations`."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def variable(self) -> str:
        """The variable's name, such as `AGENT_FSM_MAX_ITERATIONS`."""
        return PREFIX + self.name.upper()


@cache
def settings() -> tuple[Setting, ...]:
    """Return a setting for each field, in the order in which they are declared."""
    docs, defaults = _field_docs(AgentConfig), AgentConfig()
    declared: tuple[Attribute[Any], ...] = fields(AgentConfig)
    return tuple(
        Setting(each.name, *_kind(each.type), getattr(defaults, each.name), docs.get(each.name, ""))
        for each in declared
    )


def _kind(annotation: Any) -> tuple[type, bool]:
    """Return the plain type that *annotation* stands for, and whether None will do as well."""
    may_be_absent = isinstance(annotation, UnionType)
    if may_be_absent:
        annotation = next(each for each in get_args(annotation) if each is not NoneType)
    return get_origin(annotation) or annotation, may_be_absent


def _field_docs(cls: type) -> dict[str, str]:
    """Return the first clause of what stands under each field of *cls*; nothing where there is no source to read."""
    docs: dict[str, str] = {}
    for each in reversed(cls.__mro__[:-1]):
        try:
            body = ast.parse(inspect.getsource(each)).body[0]
        except OSError:  # installed without its source
            continue
        assert isinstance(body, ast.ClassDef)  # the source of a class
        for declared, below in zip(body.body, body.body[1:], strict=False):
            match declared, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[name] = re.split(r"[.;:](?:\s|$)| \(`", " ".join(text.split()))[0]
    return docs


# Reading


def configure(options: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None) -> AgentConfig:
    """Return the configuration that options, environment and file make together.

    Where none of them names a model, it is one of the provider whose key is in the environment, or the offline planner.

    Args:
        options: by field name, as text or a bool; None is an option not given.
        environ: a variable that is empty counts as one that is not set.
        file: in TOML.

    Raises:
        ConfigError: a bad value, even one that another beats, or an unknown key of the file; says where it stands.
    """
    values: dict[str, Any] = {"model": default_model(environ)}
    for setting, where, given in _given(options, environ, file):
        value = _read(setting, given)
        try:
            AgentConfig(**{setting.name: value})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        values[setting.name] = value
    return AgentConfig(**values)


def _given(
    options: Mapping[str, Any], environ: Mapping[str, str], file: Path | None
) -> Iterator[tuple[Setting, str, Any]]:
    """Yield what is set, where, and to what; of the values of one setting the last is the one that counts."""
    known = {setting.name: setting for setting in settings()}
    for key, value in ({} if file is None else _toml(file)).items():
        if key not in known:
            nearest = get_close_matches(key, known, n=1, cutoff=0)[0]
            raise ConfigError(f"{file}: {key} is not a setting; the nearest is {nearest}")
        yield known[key], str(file), value
    for setting in known.values():
        if environ.get(setting.variable, "").strip():
            yield setting, setting.variable, environ[setting.variable]
        if options.get(setting.name) is not None:
            yield setting, setting.option, options[setting.name]


def _toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} can't be read: {error.strerror or error}") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigError(f"{file} is not valid TOML: {error}") from None


# Values


def names(text: str) -> tuple[str, ...]:
    """Return the names that stand in *text* with commas between them; `none` is none at all."""
    return () if text.strip().lower() == _ABSENT else tuple(name.strip() for name in text.split(","))


def _read(setting: Setting, given: Any) -> Any:
    """Return what *given* stands for if it is text; if it stands for nothing, it itself, for the field to refuse."""
    if not isinstance(given, str):
        return given
    text = given.strip()
    if setting.may_be_absent and text.lower() == _ABSENT:
        return None
    try:
        return _READERS[setting.kind](text)
    except (ValueError, RecursionError):
        return given


def _switch(text: str) -> bool | str:
    return _SWITCHES.get(text.lower(), text)


_SWITCHES: Final = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
_READERS: Final[Mapping[type, Callable[[str], Any]]] = {
    int: int,
    float: float,
    bool: _switch,
    str: str,
    tuple: names,
    Mapping: json.loads,
}
