"""Tool invokers: each lists OpenAI function tools and calls one."""
