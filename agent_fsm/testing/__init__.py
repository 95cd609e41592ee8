"""For the tests of programs that use the agent: scripted models, tools and clocks, and the providers' rules.

    model = ScriptedModel([[("search", {"query": "tides"})], "High tide is at six."])
    tools = ScriptedTools({"search": lambda query: "06:00"})
    result = run_agent([{"role": "user", "content": "When is high tide?"}], tools, model_client=model)
    assert not any(request_faults(request.messages) for request in model.requests)

`assert_policy(table, limits)` says in one call whether a policy keeps its promises. Hypothesis strategies for hostile
models, tools, timings and policies are in `agent_fsm.testing.strategies`; only they, and the random runs of
`assert_policy`, need Hypothesis.
"""

from agent_fsm.testing.policies import Invariant, PolicyError, assert_policy
from agent_fsm.testing.scripted import HANG, Hang, ListClock, ScriptedModel, ScriptedTools, ScriptOverError
from agent_fsm.testing.transcripts import anthropic_faults, openai_faults, request_faults

__all__ = [
    "HANG",
    "Hang",
    "Invariant",
    "ListClock",
    "PolicyError",
    "ScriptOverError",
    "ScriptedModel",
    "ScriptedTools",
    "anthropic_faults",
    "assert_policy",
    "openai_faults",
    "request_faults",
]
