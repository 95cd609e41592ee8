"""What can be our fault or the caller's. The world's faults are events, never exceptions.

AgentFsmError
├── ConfigError (ValueError)         a setting that can't mean anything, or that a run can't keep
├── MessagesError (ValueError)       the caller's messages are ones that no provider accepts
├── TableError (ValueError)          a table of rows that can't be run
├── ContractError (ValueError)       a contract file that can't be read
├── NoRowError (LookupError)         an event that a state has no row for
└── RunningLoopError (RuntimeError)  `run_agent` called where an event loop already runs
"""

__all__ = [
    "AgentFsmError",
    "ConfigError",
    "ContractError",
    "MessagesError",
    "NoRowError",
    "RunningLoopError",
    "TableError",
]


class AgentFsmError(Exception):
    """Base of every exception this package raises on purpose."""


class ConfigError(AgentFsmError, ValueError):
    """Raised when a setting is out of range, or asks for what a run can't keep."""


class MessagesError(AgentFsmError, ValueError):
    """Raised when the caller's messages are not a valid transcript; names the message."""


class TableError(AgentFsmError, ValueError):
    """Raised when a table is built that can't be run; names the row."""


class ContractError(AgentFsmError, ValueError):
    """Raised when a contract can't be read; says what is wrong in it, where, and what would be right."""


class NoRowError(AgentFsmError, LookupError):
    """Raised when an event arrives in a state that has no row for it."""


class RunningLoopError(AgentFsmError, RuntimeError):
    """Raised when `run_agent` is called from inside a running event loop."""
