"""Draw diagrams/terminal.svg: what a terminal shows of a run that has to mend its code.

    python tests/examples/draw_terminal.py diagrams/terminal.svg

The run is a real one by the offline planner, shown by the view of `agent-fsm run`; only the seconds differ from one
drawing to the next.
"""

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from agent_fsm import AgentConfig, LocalMCPInvoker, run_agent
from agent_fsm.cli.view import heading, live_view

TASK = "Run python: print(math.sqrt(2)) then summarize the result."
COLUMNS = 98


def draw() -> str:
    """Return the picture as SVG. It names no font that it does not have, and loads nothing."""
    # no terminal, whatever the environment says: of the frames the last alone is written
    console = Console(file=io.StringIO(), record=True, width=COLUMNS, force_terminal=False, no_color=False)
    config = AgentConfig(model="offline")
    view = live_view(config, console)
    console.print(Text.assemble((f'$ agent-fsm run "{TASK}"\n', "bold"), heading(config)))
    with view.showing:
        result = run_agent([{"role": "user", "content": TASK}], LocalMCPInvoker(), config, on_event=view.on_event)
    console.line()  # a terminal begins a new one after the last frame
    view.report(result)
    svg = console.export_svg(title="agent-fsm", unique_id="terminal")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    return re.sub(r"font-family: [^;]*;", "font-family: ui-monospace, Menlo, Consolas, monospace;", svg)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw(), encoding="utf-8", newline="\n")
