"""What a check found, as a program that replays it and asserts what is claimed."""

from collections.abc import Mapping, Sequence

from agent_fsm.check.code import WIDTH, classes, code, pasted
from agent_fsm.check.explore import CALLS_OF, COUNTS, TASK
from agent_fsm.check.report import Report
from agent_fsm.config import AgentConfig
from agent_fsm.protocol import Event

__all__ = ["measured", "program"]


def program(report: Report, name: str, table: tuple[str, str]) -> str:
    """Return Python that replays the witness of a bound, or the lasso, and asserts what is claimed of it.

    Args:
        report: what was found.
        name: of a bound with a witness; or `lasso`, if there is one.
        table: the module and the name that the report's table is imported by.
    """
    lasso = report.lasso
    if name == "lasso" and lasso is not None:
        claim = "A run that never ends: however often the loop is gone round, it is not done"
        lists = {"entry": lasso.entry, "loop": lasso.loop}
        replay, claimed = "(*entry, *loop * 3)", ("runs[-1].state", "!=", '"Done"')
    else:
        bound = report.bound(name)
        most = "no bound" if bound.at_most is None else f"of at most {bound.at_most:.17g}"
        claim = f"{name}: a run that comes to {bound.reached:.17g}, {most}"
        lists, replay, claimed = {"events": bound.witness}, "events", (measured(name), ">=", f"{bound.reached:.17g}")
    return _program(claim, lists, (replay, *claimed), report.config, table)


def measured(name: str) -> str:
    """Return an expression for what `runs`, a list of the runs after each event, come to of the bound called *name*."""
    if name in COUNTS:
        return f"sum(counted(*each).{name} for each in pairwise(runs))"
    if name.startswith(CALLS_OF):
        return f"runs[-1].ledger.calls.get({code(name.removeprefix(CALLS_OF))}, 0)"
    return f"runs[-1].ledger.{name}"


def _program(
    claim: str,
    lists: Mapping[str, Sequence[Event]],
    asserted: tuple[str, str, str, str],
    config: AgentConfig,
    table: tuple[str, str],
) -> str:
    replay, reached, sign, value = asserted
    counts = "pairwise" in reached
    imports: dict[str, set[str]] = {"agent_fsm.machine": {"start", "step"}}
    if counts:
        imports["agent_fsm.check.explore"] = {"counted"}
    for cls in classes((config, *lists.values())):
        imports.setdefault(cls.__module__, set()).add(cls.__name__)
    imports.setdefault(table[0], set()).add(table[1])
    blocks = (
        f'"""{claim}."""',
        f"from itertools import accumulate{', pairwise' if counts else ''}",
        "\n".join(map(_import, sorted(imports), (sorted(imports[module]) for module in sorted(imports)))),
        f"config = {code(config, 0, 9)}",
        *(pasted(events, called) for called, events in lists.items()),
        f"first = start({code(list(TASK))}, config, {table[1]})\n"
        f"runs = list(accumulate({replay}, step, initial=first))\n"
        f"assert {reached} {sign} {value}\n"
        "print(runs[-1].state, runs[-1].reason or runs[-1].taken[-1].label)",
    )
    return "\n\n".join(blocks)


def _import(module: str, names: Sequence[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) < WIDTH:
        return line
    return f"from {module} import (\n    {f',{chr(10)}    '.join(names)},\n)"
