"""A planner that stands in for a language model, and says so: it follows a short list of phrases, word by word.

`PHRASES` in `tasks` is what it understands, `MENDERS` in `mending` which failures it mends, once a task.
"""

from agent_fsm.offline.planner import FIRST_LINE, USED_MODEL, OfflinePlanner, reply_to
from agent_fsm.offline.tasks import understood

__all__ = ["FIRST_LINE", "USED_MODEL", "OfflinePlanner", "reply_to", "understood"]
