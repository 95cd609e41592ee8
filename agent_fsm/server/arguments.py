"""Arguments: whether those of a call fit the schema of its tool, told so that a model can mend them.

The schema is what some server says. Nothing in it can make a check fetch anything, or take much longer than reading
the arguments did: `pattern` and what else compares by regular expression, or each element with each, is left to the
server to check.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any, Final

__all__ = ["faults_of", "read_arguments"]

Check = Callable[[Any], Iterator[Any]]

_SHOWN_FAULTS = 5
_SHOWN_CHARS = 200
_LEFT_OUT: Final = ("pattern", "patternProperties", "uniqueItems", "unevaluatedProperties", "unevaluatedItems")
_PLAIN: Final = {"minimum": ">=", "maximum": "<=", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}


def read_arguments(given: str | Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the arguments, which may come as JSON text; nothing, or an empty text, means none.

    Raises:
        ValueError: they are no JSON object, or hold what JSON has not; says so.
    """
    value: Any = given
    if isinstance(given, str):
        try:
            value = json.loads(given.strip() or "{}")
        except ValueError as error:
            raise ValueError(f"arguments: the text is not valid JSON: {error}") from None
        except RecursionError:
            raise ValueError("arguments: nested too deeply") from None
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError("arguments: must be a JSON object")
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ValueError("arguments: a text has half a surrogate pair in it") from None
    except RecursionError:
        raise ValueError("arguments: nested too deeply") from None
    except ValueError:
        raise ValueError("arguments: NaN and Infinity are no JSON") from None
    return value


def faults_of(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> list[str]:
    """Return what of *arguments* does not fit *schema*, each with its path; nothing if the schema can't be used."""
    try:
        text = json.dumps(schema, sort_keys=True)
        return [_told(error) for error in islice(_checker(text)(arguments), _SHOWN_FAULTS)]
    except _unusable():  # then only the server can judge
        return []


def _unusable() -> tuple[type[Exception], ...]:
    from jsonschema.exceptions import SchemaError, UndefinedTypeCheck, UnknownType
    from referencing.exceptions import Unresolvable

    wrong_use = (TypeError, ValueError, KeyError, AttributeError, RecursionError)  # what broken schemas come to
    return (SchemaError, UnknownType, UndefinedTypeCheck, Unresolvable, *wrong_use)


@lru_cache(maxsize=512)
def _checker(schema: str) -> Check:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend
    from referencing import Registry

    own: Any = Draft202012Validator.VALIDATORS["additionalProperties"]

    def additional(validator: Any, value: Any, instance: Any, within: Mapping[str, Any]) -> Iterator[Any]:
        if "patternProperties" not in within:  # what it allows can't be told without regular expressions
            yield from own(validator, value, instance, within)

    passed = dict.fromkeys(_LEFT_OUT, _nothing)
    kind = extend(Draft202012Validator, {**passed, "additionalProperties": additional})
    document = json.loads(schema)
    kind.check_schema(document)
    # A registry of its own, which has nothing in it and gets nothing: the default one would fetch what $ref names
    check: Check = kind(document, registry=Registry()).iter_errors
    return check


def _nothing(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
    yield from ()


def _told(error: Any) -> str:
    from jsonschema.exceptions import best_match

    deepest = best_match([error]) or error
    path = "arguments" + "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in deepest.absolute_path)
    return f"{path[:_SHOWN_CHARS]}: {_wanted(deepest)}"


def _wanted(error: Any) -> str:
    """Return what would be right, without the value that is not."""
    keyword, wanted = error.validator, error.validator_value
    shown = json.dumps(wanted, ensure_ascii=False)
    shown = shown if len(shown) <= _SHOWN_CHARS else f"{shown[:_SHOWN_CHARS]}..."
    match keyword:
        case "type":
            return f"must be of type {' or '.join(wanted) if isinstance(wanted, list) else wanted}"
        case "required" | "additionalProperties" | "dependentRequired":
            return str(error.message)[:_SHOWN_CHARS]  # it tells of names only
        case "enum":
            return f"must be one of {shown}"
        case "const":
            return f"must be {shown}"
    return f"must be {_PLAIN[keyword]} {shown}" if keyword in _PLAIN else f"must fit {keyword} {shown}"
