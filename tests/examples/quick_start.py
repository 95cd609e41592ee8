from agent_fsm.mini_agent import (
    AgentConfig, LocalMCPInvoker, run_mcp_mini_agent
)

cfg = AgentConfig(
    model="gpt-4o-mini",
    max_iterations=5,
    enable_repair=True,
    research_on_unsure=True,
    max_failures_before_research=2,
)

messages = [{"role": "user", "content": "Run python: print('hello') then summarize the result."}]
result = run_mcp_mini_agent(messages, mcp=LocalMCPInvoker(), cfg=cfg)
print(result.final_answer, result.stopped_reason)
