"""The options that stand for settings, and how many options are told in sections."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from agent_fsm.cli.settings import PREFIX, Setting, settings

__all__ = ["SectionedCommand", "config_option", "with_settings"]

_SECTIONS: Final[Mapping[str, Sequence[str]]] = {
    "Limits": (
        *("max_iterations", "max_wallclock_seconds", "max_cost_usd"),
        *("max_tokens_total", "max_reply_tokens", "max_model_retries", "max_tools_per_iter", "tool_concurrency"),
        *("tool_timeout_seconds", "max_consecutive_failures", "stagnation_window", "closing_summary"),
    ),
    "Repair and research": (
        *("enable_repair", "research_on_unsure", "research_after_failures"),
        *("max_failures_before_research", "max_research_hops"),
    ),
}
"""The sections of settings. An option that a command lists first stands only there; one that is in none of them stands
in the last, under Others."""


class SectionedCommand(click.Command):
    """A command whose many options are told in sections, those that most people want first."""

    def __init__(self, *args: Any, first: Sequence[str], **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self._first = first

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [each for each in self.get_params(ctx) if isinstance(each, click.Option)]
        records = {str(each.name): each.get_help_record(ctx) or ("", "") for each in options}
        ordered = {"Most used": self._first, **_SECTIONS}
        sections = {
            title: [records.pop(name) for name in listed if name in records] for title, listed in ordered.items()
        }
        for title, listed in {**sections, "Others": list(records.values())}.items():
            short = [(re.sub(r"--(\S+) / --no-\1", r"--[no-]\1", option), told) for option, told in listed]
            with formatter.section(title):
                formatter.write_dl(short, col_max=36)


def with_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return *command* with an option for each field of `AgentConfig`, under the field's name; None: not given."""
    for setting in reversed(settings()):
        command = _option(setting)(command)
    return command


_METAVARS: Final[Mapping[type, str]] = {str: "NAME", tuple: "NAMES", Mapping: "JSON"}


def _option(setting: Setting) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    told = f"{setting.doc} [{_default(setting)}]"
    if setting.kind is bool:
        return click.option(f"{setting.option}/--no-{setting.option[2:]}", setting.name, default=None, help=told)
    metavar = _METAVARS.get(setting.kind, "N") + ("|none" if setting.may_be_absent else "")
    return click.option(setting.option, setting.name, metavar=metavar, help=told)


def _default(setting: Setting) -> str:
    match setting.default:
        case default if setting.name == "model":
            return f"of the provider whose key is in the environment, else {default}"
        case bool(switch):
            return "on" if switch else "off"
        case float(number):
            return f"{number:g}"
        case default:
            return "none" if default in (None, (), {}) else str(default)


config_option = click.option(
    "--config",
    "config_file",
    metavar="FILE",
    envvar=f"{PREFIX}CONFIG",
    type=click.Path(path_type=Path),
    help=f"A TOML file with settings [what {PREFIX}CONFIG names, else none]",
)
