"""For the tests of programs that use the agent: scripted models, tools and clocks, and the providers' rules.

    model = ScriptedModel([[("search", {"query": "tides"})], "High tide is at six."])
    tools = ScriptedTools({"search": lambda query: "06:00"})
    result = run_agent([{"role": "user", "content": "When is high tide?"}], tools, model_client=model)
    assert not any(request_faults(request.messages) for request in model.requests)

Hypothesis strategies for hostile models and tools are in `agent_fsm.testing.strategies`, the only module here that
needs Hypothesis.
"""

from agent_fsm.testing.scripted import HANG, Hang, ListClock, ScriptedModel, ScriptedTools, ScriptOverError
from agent_fsm.testing.transcripts import anthropic_faults, openai_faults, request_faults

__all__ = [
    "HANG",
    "Hang",
    "ListClock",
    "ScriptOverError",
    "ScriptedModel",
    "ScriptedTools",
    "anthropic_faults",
    "openai_faults",
    "request_faults",
]
