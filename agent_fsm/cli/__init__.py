"""The command `agent-fsm`. Click and rich are imported in this package only."""

from agent_fsm.cli.commands import main

__all__ = ["main"]
