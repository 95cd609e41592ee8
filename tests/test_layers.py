"""DESIGN.md, section 6: a module imports only from the rows above it, and the core touches nothing outside."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "agent_fsm"
LAYERS = (
    {"errors", "config", "protocol", "ledger"},
    {"suspicion", "guards", "messages", "transcript", "directives", "reading", "stagnation", "redaction"},
    {"table", "shape", "rules", "machine"},
    {"diagrams", "check", "replay"},
    {"driver", "llm", "offline", "journal", "durable", "tools", "images", "response_cache"},
    {"__init__", "__main__", "cli", "mini_agent", "testing", "server", "agent_proxy"},
)
CORE = 3
"""The layers below this one are pure."""
OUTSIDE = {
    *("asyncio", "datetime", "importlib", "io", "logging", "multiprocessing", "os", "pathlib", "random"),
    *("secrets", "signal", "socket", "subprocess", "threading", "time", "uuid"),
}
THIRD_PARTY = {"rules": {"attrs", "transitions"}}
"""What a module of the core may import besides the standard library; attrs where it is not listed."""
RELATIVE = "<relative>"
HEAVY = (
    "litellm",
    "mcp",
    "httpx",
    "fastapi",
    "pydantic",
    "rich",
    "structlog",
    "hypothesis",
    "click",
    "anyio",
    "redis",
    "PIL",
)


def sources() -> dict[str, str]:
    """The package's modules by name: `config`, `tools.local`."""
    paths = {
        path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")
    }
    return {name.removesuffix(".__init__"): path.read_text(encoding="utf-8") for name, path in paths.items()}


def layer_of(module: str) -> int | None:
    found = [number for number, names in enumerate(LAYERS) if module.partition(".")[0] in names]
    return found[0] if found else None


def imported(source: str) -> Iterator[str]:
    """Every module that *source* imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (each.name for each in names)
            case ast.ImportFrom(module=str(module), level=0, names=names):
                # A name of the package is one of its modules or something that its __init__ exports
                yield from (f"{module}.{each.name}" for each in names) if module == "agent_fsm" else (module,)
            case ast.ImportFrom():
                yield f"agent_fsm.{RELATIVE}"


def own_imports(source: str) -> set[str]:
    names = [name.partition(".")[2] for name in imported(source) if name.partition(".")[0] == "agent_fsm"]
    return {name if layer_of(name) is not None or name == RELATIVE else "__init__" for name in names}


def faults(modules: Mapping[str, str]) -> list[str]:
    """What *modules*, sources by name, import or call that their layer may not."""
    found: list[str] = []
    for module, source in modules.items():
        layer = layer_of(module)
        if layer is None:
            found.append(f"{module} is in no layer")
            continue
        for name in own_imports(source):
            above = layer_of(name)
            if above is None or above > layer:
                found.append(f"{module} imports {name}")
        if layer < CORE:
            found += impurities(module, source)
    return sorted(found + cycles(modules))


def impurities(module: str, source: str) -> Iterator[str]:
    allowed = THIRD_PARTY.get(module, {"attrs"}) | {"agent_fsm"}
    for name in {each.partition(".")[0] for each in imported(source)}:
        if name in OUTSIDE or (name not in sys.stdlib_module_names and name not in allowed):
            yield f"{module} imports {name}"
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id="open" | "print" | "__import__" | "input" as name)):
                yield f"{module} calls {name}()"


def cycles(modules: Mapping[str, str]) -> list[str]:
    core = {module: own_imports(source) for module, source in modules.items() if (layer_of(module) or 0) < CORE}
    try:
        tuple(TopologicalSorter(core).static_order())
    except CycleError as error:
        return [f"cycle: {' <- '.join(error.args[1])}"]
    return []


def test_modules_import_only_what_their_layer_may() -> None:
    assert faults(sources()) == []


@pytest.mark.parametrize(
    ("modules", "fault"),
    [
        ({"config": "from agent_fsm.guards import Guard"}, "config imports guards"),
        ({"table": "from agent_fsm import driver"}, "table imports driver"),
        ({"ledger": "def late():\n    import agent_fsm.tools.local"}, "ledger imports tools.local"),
        ({"table": "from agent_fsm import AgentConfig"}, "table imports __init__"),
        ({"table": "import agent_fsm"}, "table imports __init__"),
        ({"guards": "from . import table"}, "guards imports <relative>"),
        ({"config": "import agent_fsm.novel", "novel": ""}, "novel is in no layer"),
        ({"errors": "import httpx"}, "errors imports httpx"),
        ({"table": "import transitions"}, "table imports transitions"),
        ({"machine": "def late():\n    from time import monotonic"}, "machine imports time"),
        ({"machine": "import os.path"}, "machine imports os"),
        ({"reading": "print('x')"}, "reading calls print()"),
        ({"reading": "open('x')"}, "reading calls open()"),
        ({"config": "import agent_fsm.ledger", "ledger": "import agent_fsm.config"}, "cycle: "),
    ],
)
def test_the_layer_check_can_fail(modules: dict[str, str], fault: str) -> None:
    assert any(each.startswith(fault) for each in faults(modules))


def test_the_layer_check_lets_pass_what_is_allowed() -> None:
    modules = {
        "rules": "import transitions, attrs\nfrom agent_fsm.table import TABLE",
        "table": "from agent_fsm.protocol import PLAN",
        "driver": "import asyncio, time\nfrom agent_fsm import machine",
        "mini_agent": "from agent_fsm import AgentConfig",
    }

    assert faults(modules) == []


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import agent_fsm, sys; print([name for name in {HEAVY} if name in sys.modules])"

    done = subprocess.run(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=60
    )

    assert done.stdout.strip() == "[]"


def long_functions(source: str, most: int = 60) -> list[str]:
    functions = (
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return [each.name for each in functions if (each.end_lineno or 0) - each.lineno >= most]


def test_no_function_is_longer_than_60_lines() -> None:
    assert {module: names for module, source in sources().items() if (names := long_functions(source))} == {}


@pytest.mark.parametrize(("lines", "found"), [(60, []), (61, ["f"])])
def test_a_function_of_61_lines_is_found_and_one_of_60_is_not(lines: int, found: list[str]) -> None:
    assert long_functions("def f():\n" + "    pass\n" * (lines - 1)) == found


def test_what_the_package_exports_is_there_and_once() -> None:
    package = import_module("agent_fsm")
    names = package.__all__

    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(package, name)] == []
