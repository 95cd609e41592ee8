"""Mending: failures of Python code that can be put right without understanding the code."""

import re
import textwrap
from collections.abc import Callable, Iterable
from itertools import product

from attrs import frozen

from agent_fsm.offline.tasks import parses

__all__ = ["MENDERS", "mend"]


@frozen
class _Mender:
    """A failure that can be mended."""

    means: str
    """What is done; `{0}` is the first group of `sees`."""
    sees: re.Pattern[str]
    """Searched in what Python said on failing."""
    mended: Callable[[str, re.Match[str]], Iterable[str]]
    """Gives candidates for the mended code; the first is taken that parses and differs."""


def mend(code: str, said: str) -> tuple[str, str] | None:
    """Return what is done to *code* that failed and *said* why, and the mended code; None if nothing fits."""
    for mender in MENDERS:
        seen = mender.sees.search(said)
        for text in mender.mended(code, seen) if seen else ():
            if seen and text != code and parses(text):
                return mender.means.format(*seen.groups()), text
    return None


# Modules whose name is rarely that of a variable
_MODULES = (
    "asyncio|base64|bisect|collections|csv|datetime|decimal|fractions|functools|glob|hashlib|heapq|itertools|json|math|"
    "operator|os|pathlib|platform|pprint|random|re|shutil|statistics|string|subprocess|sys|tempfile|textwrap|time|uuid"
)
_STRAIGHT = str.maketrans("“”„‘’‚\u00a0", "\"\"\"''' ")


def _import_first(code: str, seen: re.Match[str]) -> Iterable[str]:
    # only a name with a dot after it: `import string` is no help to `print(string)`
    return [f"import {seen[1]}\n{code}"] if re.search(rf"\b{seen[1]}\s*\.", code) else []


def _call_print(code: str, seen: re.Match[str]) -> Iterable[str]:
    return [re.sub(r"(?m)(^|[:;])([ \t]*)print[ \t]+([^;\n]+)", r"\1\2print(\3)", code)]


def _indent_evenly(code: str, seen: re.Match[str]) -> Iterable[str]:
    first, _, rest = code.partition("\n")
    return [f"{first.strip()}\n{textwrap.dedent(rest)}"]


def _straighten(code: str, seen: re.Match[str]) -> Iterable[str]:
    return [code.translate(_STRAIGHT)]


def _close(code: str, seen: re.Match[str]) -> Iterable[str]:
    """Yield *code* with a quote added at its end, or before its last bracket, and then up to two brackets."""
    closers = ["".join(each) for count in range(3) for each in product(")]}", repeat=count)]
    for at, quote, closer in product((len(code) - 1, len(code)), ("", "'", '"', "'''", '"""'), closers):
        yield code[:at] + quote + code[at:] + closer


MENDERS: tuple[_Mender, ...] = (
    _Mender("added `import {0}`", re.compile(rf"NameError: name '({_MODULES})' is not defined"), _import_first),
    _Mender("wrote print as a function", re.compile("Missing parentheses in call to 'print'"), _call_print),
    _Mender("made the indentation even", re.compile("IndentationError: un"), _indent_evenly),
    _Mender("made quotes and spaces plain", re.compile("invalid (?:non-printable )?character"), _straighten),
    _Mender("closed what was open", re.compile("SyntaxError: .*(?:never closed|unexpected EOF|unterminated)"), _close),
)
"""Which failures are mended, in the order in which it is tried."""
