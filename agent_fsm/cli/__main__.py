"""`python -m agent_fsm.cli` is `agent-fsm`."""

import sys

from agent_fsm.cli import main

if __name__ == "__main__":
    sys.exit(main())
