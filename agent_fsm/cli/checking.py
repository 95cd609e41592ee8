"""`agent-fsm check`: what a policy permits at worst, and whether that is still what a contract promises."""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from attrs import frozen

from agent_fsm.cli.options import SectionedCommand, config_option, with_settings
from agent_fsm.cli.settings import PREFIX, configure
from agent_fsm.errors import ContractError
from agent_fsm.table import TABLE, Row, Table

if TYPE_CHECKING:
    from agent_fsm.check import Report
    from agent_fsm.check.contract import Change, Contract

__all__ = ["check"]

_FILE: Final = click.Path(path_type=Path, dir_okay=False)
_LASSO: Final = "lasso"


@click.command(
    cls=SectionedCommand,
    first=("config_file", "write", "against", "events", "as_json", "certificate"),
    epilog=f"""\b
Exit codes:
    0  it is proved that every run ends, and no promise of the contract
       is broken
    1  that is not proved, or a promise is broken; or what was asked for
       is not there, or could not be written
    2  the command was used wrongly, or the table, the configuration or
       the contract can't be read

The settings are those of `agent-fsm run`, and may stand in the same places: options beat the environment
({PREFIX}MAX_ITERATIONS=5), which beats the file.""",
)
@click.argument("target", required=False)
@config_option
@click.option("--write", metavar="FILE", type=_FILE, help="Write the contract: what is proved, as TOML to commit")
@click.option("--against", metavar="FILE", type=_FILE, help="Compare with a contract, and say what is broken, and why")
@click.option(
    "--events",
    metavar="BOUND",
    help=f"Print Python that replays a run which comes to that bound, such as model_calls; or a {_LASSO}",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object, and nothing else")
@click.option("--certificate", metavar="FILE", type=_FILE, help="Write the certificate that every run ends, as JSON")
@with_settings
@click.pass_context
def check(
    context: click.Context,
    /,
    *,
    target: str | None,
    config_file: Path | None,
    write: Path | None,
    against: Path | None,
    events: str | None,
    as_json: bool,
    certificate: Path | None,
    **options: Any,
) -> int:
    """Prove that every run ends, and print what it comes to at worst.

    TARGET is the policy: a table of your own as `module:TABLE`, looked for in this folder first; or a TOML file with
    settings for the table that comes with the package, which is also what is checked without TARGET.
    """
    if as_json and events is not None:
        raise click.UsageError("--events prints Python and --json prints JSON: take one of them")
    for option, file in (("--write", write), ("--certificate", certificate)):
        if file is not None and not file.parent.is_dir():
            raise click.UsageError(f"{option}: there is no folder {file.parent}")
    if target is not None and target.endswith(".toml"):
        given = context.get_parameter_source("config_file")
        if given is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError("TARGET and --config both name a file with settings: take one of them")
        config_file, target = Path(target), None
    config = configure(options, os.environ, config_file)
    contract = None if against is None else _read(against)
    with redirect_stdout(sys.stderr):  # a module may print, and standard output is ours
        found = _Found("agent_fsm", "TABLE", TABLE) if target is None else _found(target)
        report = _checked(found.table, config)
    changed: list[Change] = []
    if contract is not None:
        from agent_fsm.check.contract import changes

        changed = changes(contract, report)
    _print(report, found, changed, against, events=events, as_json=as_json)
    _write(report, write, certificate)
    return int(not report.terminates or any(change.broken for change in changed))


def _checked(table: Table, config: Any) -> "Report":
    from agent_fsm.check import check as checked

    return checked(table, config)


# What is checked


@frozen
class _Found:
    """A table, and where it was found."""

    module: str
    name: str
    table: Table


def _found(target: str) -> _Found:
    """Return the table that *target*, such as `policies:CAREFUL`, names."""
    module_name, _, name = target.partition(":")
    if not all(each.isidentifier() for each in (*module_name.split("."), name)):
        raise click.UsageError(f"TARGET is a file.toml or module:TABLE, such as policies:CAREFUL, not {target!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever a caller's module raises
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise click.UsageError(f"there is no module {error.name} in {Path.cwd()}, nor is one installed") from None
        raise click.UsageError(f"{module_name} can't be imported: {type(error).__name__}: {error}") from error
    tables = [each for each, value in vars(module).items() if _is_table(value) and not each.startswith("_")]
    there = f"its tables are {', '.join(tables)}" if tables else "it has no table at all"
    if not hasattr(module, name):
        raise click.UsageError(f"{module_name} has no {name}; {there}")
    value: Any = getattr(module, name)
    if not _is_table(value):
        raise click.UsageError(f"{module_name}:{name} is no table of rows but of type {type(value).__name__}; {there}")
    return _Found(module_name, name, Table(value))


def _is_table(value: Any) -> bool:
    rows = isinstance(value, list | tuple)
    return isinstance(value, Table) or (rows and bool(value) and all(isinstance(row, Row) for row in value))


def _read(file: Path) -> "Contract":
    from agent_fsm.check.contract import read_contract

    try:
        return read_contract(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ContractError(f"{file} can't be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ContractError(f"{file}: this is not valid TOML: {error}") from None
    except ContractError as error:
        raise ContractError(f"{file}: {error}") from None


# What is printed


def _print(
    report: "Report",
    found: _Found,
    changed: "Sequence[Change]",
    against: Path | None,
    *,
    events: str | None,
    as_json: bool,
) -> None:
    compared = [] if against is None else _compared(against, changed)
    if events is not None:
        _print_program(report, found, events)
        for line in compared:
            click.echo(line, err=True)
    elif as_json:
        click.echo(json.dumps(_as_json(report, None if against is None else changed), allow_nan=False))
    else:
        # click keeps colours from what is no terminal
        colour = False if os.environ.get("NO_COLOR") else None
        first, _, rest = str(report).partition("\n")
        click.secho(first, fg="green" if report.terminates else "red", bold=True, color=colour)
        click.echo("\n".join((rest, *([""] if compared else []), *compared)))


def _compared(against: Path, changed: "Sequence[Change]") -> list[str]:
    """Return which promises are broken, and why; then what else is different."""
    broken = [change for change in changed if change.broken]
    others = [change.told for change in changed if not change.broken]
    if not broken:
        kept = f"contract {against}: kept"
        return [kept, *(["  though", *(f"    {told}" for told in others)] if others else [])]
    why = broken[0].why
    return [
        f"contract {against}: broken",
        *(f"  {change.told}" for change in broken),
        "  because",
        *(f"    {told}" for told in why),
        *(["  besides", *(f"    {told}" for told in others if told not in why)] if set(others) - set(why) else []),
    ]


def _print_program(report: "Report", found: _Found, name: str) -> None:
    from agent_fsm.check.program import program

    if name == _LASSO:
        if report.lasso is None:
            raise click.ClickException(f"there is no lasso: that every run ends is {report.verdict}")
    else:
        known = [bound.name for bound in report.bounds]
        if not known:
            raise click.ClickException(f"there are no bounds: that every run ends is {report.verdict}")
        if name not in known:
            raise click.UsageError(f"--events: there is no bound {name}; there are {', '.join(known)}")
        if report.bound(name).reached is None:
            raise click.ClickException(f"no run is known that comes to the bound of {name}")
    click.echo(program(report, name, (found.module, found.name)))


def _as_json(report: "Report", changed: "Sequence[Change] | None") -> dict[str, Any]:
    from agent_fsm.check.code import short

    lasso = report.lasso
    told = {
        "verdict": report.verdict,
        "terminates": report.terminates,
        "why": report.why,
        "bounds": {
            bound.name: {
                "at_most": _whole(bound.at_most),
                "exact": bound.exact,
                "reached": bound.reached,
                "events": len(bound.witness),
                "note": bound.note,
            }
            for bound in report.bounds
        },
        "reasons": report.reasons,
        "guards": report.guards,
        "untaken": report.untaken,
        "lasso": lasso and {"entry": list(map(short, lasso.entry)), "loop": list(map(short, lasso.loop))},
        "boxes": report.boxes,
        "steps": report.steps,
    }
    if changed is not None:
        told["contract"] = [
            {"promise": each.promise, "told": each.told, "broken": each.broken, "why": each.why} for each in changed
        ]
    return told


def _whole(value: float | None) -> float | None:
    return int(value) if value is not None and value == int(value) else value


# What is written


def _write(report: "Report", contract: Path | None, certificate: Path | None) -> None:
    from agent_fsm.check.contract import contract_of

    if not report.terminates and (contract or certificate):
        files = " and ".join(str(file) for file in (contract, certificate) if file)
        raise click.ClickException(f"not written, as it is not proved that every run ends: {files}")
    if contract is not None:
        contract.write_text(contract_of(report), encoding="utf-8", newline="\n")
    if certificate is not None:
        certificate.write_text(json.dumps(report.certificate, allow_nan=False) + "\n", encoding="utf-8", newline="\n")
