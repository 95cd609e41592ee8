"""Where a configuration comes from: options of the command, variables of the environment, a TOML file.

Every field of `AgentConfig` is a setting under its own name: `--max-iterations 5`, `AGENT_FSM_MAX_ITERATIONS=5`, and
`max_iterations = 5` in the file, at its top or in a table `[agent]`. Options beat the environment, which beats the
file. What is read here is only turned into values; the fields of `AgentConfig` say whether they are right.
"""

import ast
import inspect
import json
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, get_args, get_origin

from attrs import Attribute, fields, frozen

from agent_fsm.config import AgentConfig, Limits
from agent_fsm.errors import ConfigError

__all__ = ["CONFIG_VARIABLE", "PREFIX", "Setting", "configure", "settings"]

PREFIX: Final = "AGENT_FSM_"
CONFIG_VARIABLE: Final = "AGENT_FSM_CONFIG"
"""Names the file to read where no option does."""
_TABLE: Final = "agent"
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
    """What the field's docstring says, as one line."""
    attribute: "Attribute[Any]"

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
    """Return a setting for each field: the model and what else is the edge's first, then the limits."""
    docs = _field_docs(AgentConfig)
    defaults = AgentConfig()
    declared: tuple[Attribute[Any], ...] = fields(AgentConfig)
    limits = {each.name for each in fields(Limits)}
    return tuple(
        Setting(each.name, *_kind(each.type), getattr(defaults, each.name), docs.get(each.name, ""), each)
        for each in sorted(declared, key=lambda each: each.name in limits)
    )


def _kind(annotation: Any) -> tuple[type, bool]:
    """Return the plain type that *annotation* stands for, and whether None will do as well."""
    may_be_absent = isinstance(annotation, UnionType)
    if may_be_absent:
        annotation = next(each for each in get_args(annotation) if each is not NoneType)
    return get_origin(annotation) or annotation, may_be_absent


def _field_docs(cls: type) -> dict[str, str]:
    """Return the string literals under the fields of *cls* and its bases; none where there is no source to read."""
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
                    docs[name] = " ".join(text.split())
    return docs


# Reading


def configure(
    options: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None, *, default_model: str = ""
) -> AgentConfig:
    """Return the configuration that options, environment and file make together.

    Args:
        options: by field name, as text (a tuple of texts for lists) or a bool; None or () is an option not given.
        environ: a variable that is empty counts as one that is not set.
        file: the TOML file; None: the one that AGENT_FSM_CONFIG names, if any.
        default_model: the model where none of the three names one; empty: the configuration's own default.

    Raises:
        ConfigError: a bad value or an unknown key; says where it stood and what would be right.
    """
    values: dict[str, Any] = {"model": default_model} if default_model else {}
    for source in (_from_file(file, environ), _from_environment(environ), _from_options(options)):
        for setting, origin, value in source:
            values[setting.name] = _checked(setting, origin, value)
    return AgentConfig(**values)


def _from_options(options: Mapping[str, Any]) -> Iterator[tuple[Setting, str, Any]]:
    for setting in settings():
        given = options.get(setting.name)
        if given is None or given == ():
            continue
        if isinstance(given, tuple):
            given = ",".join(given)
        yield setting, setting.option, _read(setting, given) if isinstance(given, str) else given


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[Setting, str, Any]]:
    known = {setting.variable: setting for setting in settings()}
    for variable, text in environ.items():
        if variable in known and text.strip():
            yield known[variable], variable, _read(known[variable], text)
        elif variable.startswith(PREFIX) and variable not in known and variable != CONFIG_VARIABLE:
            # Others may use the prefix for what is theirs, so only what is all but a name of ours is an error.
            likely = _nearest(variable.removeprefix(PREFIX).lower(), cutoff=0.85)
            if likely:
                raise ConfigError(f"the variable {variable} is unknown; did you mean {PREFIX}{likely.upper()}?")


def _from_file(file: Path | None, environ: Mapping[str, str]) -> Iterator[tuple[Setting, str, Any]]:
    asked_by = "--config"
    if file is None:
        if not environ.get(CONFIG_VARIABLE, "").strip():
            return
        file, asked_by = Path(environ[CONFIG_VARIABLE]), CONFIG_VARIABLE
    content = _toml(file, asked_by)
    known = {setting.name: setting for setting in settings()}
    table = content.pop(_TABLE, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{file}: {_TABLE} must be a table, not {table!r}")
    twice = sorted(content.keys() & table.keys())
    if twice:
        raise ConfigError(f"{file}: {twice[0]} stands both at the top and in [{_TABLE}]; leave one of them out")
    for where, keys in ((f"{file}: ", content), (f"{file}: [{_TABLE}] ", table)):
        for key, value in keys.items():
            if key not in known:
                raise ConfigError(f"{where}{key} is unknown; did you mean {_nearest(key)}?")
            yield known[key], where + key, _from_toml(known[key], value)


def _toml(file: Path, asked_by: str) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{asked_by}: can't read {file}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{asked_by}: {file} is not valid TOML: {error}") from error


def _nearest(name: str, cutoff: float = 0.0) -> str:
    """Return the field's name that is most like *name*; empty if none is as like as *cutoff* (0 to 1)."""
    names = [setting.name for setting in settings()]
    return next(iter(get_close_matches(name.replace("-", "_").lower(), names, 1, cutoff)), "")


# Values


def _from_toml(setting: Setting, value: Any) -> Any:
    if setting.may_be_absent and isinstance(value, str) and value.strip().lower() == _ABSENT:
        return None  # TOML has no word for it
    if setting.kind is float and type(value) is int:
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def _read(setting: Setting, text: str) -> Any:
    """Return the value that *text* stands for; *text* itself, which no field takes, if it stands for none."""
    if text.strip().lower() == _ABSENT and (setting.may_be_absent or setting.kind is tuple):
        return () if setting.kind is tuple else None
    try:
        return _READERS.get(setting.kind, json.loads)(text)
    except (ValueError, RecursionError):
        return text


def _switch(text: str) -> bool:
    word = text.strip().lower()
    if word not in (*_ON, *_OFF):
        raise ValueError(word)
    return word in _ON


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


_ON: Final = ("true", "yes", "on", "1")
_OFF: Final = ("false", "no", "off", "0")
_READERS: Final[Mapping[type, Callable[[str], Any]]] = {
    int: int,
    float: _number,
    bool: _switch,
    str: str,
    tuple: _names,
}
"""The rest, mappings, are JSON."""


def _checked(setting: Setting, origin: str, value: Any) -> Any:
    """Return *value*.

    Raises:
        ConfigError: the field refuses it; in its words, with *origin* for the field's name.
    """
    attribute = setting.attribute
    try:
        if attribute.validator is not None:
            attribute.validator(None, attribute, value)
    except ConfigError as error:
        told = str(error)
        hint = "; write it as a JSON object" if setting.kind is Mapping and isinstance(value, str) else ""
        raise ConfigError(told.replace(setting.name, origin, 1) + hint) from None
    return value
