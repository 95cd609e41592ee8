"""What all tests share: the order of their files, and a mutant of the shipped table where AGENT_FSM_MUTANT names one.

A file is run by one process, so the longest come first: else that process would go on when the others are done.

For mutants see `tests.mutants`. The table is replaced as its module is imported, so that whoever imports it later gets
the mutant, default arguments included. Where the variable is not set nothing is done.
"""

import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

import pytest

LONGEST = (
    *("test_termination", "test_attacks", "test_cancellation_sweep", "test_contract", "test_mcp_chaos"),
    *("test_local_tools", "test_policies", "test_generated_tables", "test_hard_deadlines"),
)


def pytest_xdist_auto_num_workers() -> int:
    """Return how many processes run tests: one more than there are cores, as many tests wait."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


MUTANT = "AGENT_FSM_MUTANT"


class _Mutating(Loader):
    def __init__(self, loader: Loader, mutant: str) -> None:
        self._loader, self._mutant = loader, mutant

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        from tests.mutants import mutants_of

        found = {mutant.name: mutant.table for mutant in mutants_of(vars(module)["TABLE"])}
        vars(module)["TABLE"] = found[self._mutant]


class _Finder(MetaPathFinder):
    def __init__(self, mutant: str) -> None:
        self._mutant = mutant

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "agent_fsm.table":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Mutating(spec.loader, self._mutant)
        return spec


if os.environ.get(MUTANT):
    if "agent_fsm.table" in sys.modules:
        raise RuntimeError(f"{MUTANT} is set, but agent_fsm.table was imported before its table could be replaced")
    sys.meta_path.insert(0, _Finder(os.environ[MUTANT]))
