"""What the machine says to the model: short user messages, each bounded in size and marked as the machine's."""

from collections.abc import Iterable

from agent_fsm.messages import cut, cut_bytes
from agent_fsm.protocol import ModelReplied, Said, StopReason, ToolResult

__all__ = ["DIRECTIVE_MARK", "DIRECTIVE_TOKENS", "closing", "go_on", "mend", "nudge", "research", "summary"]

DIRECTIVE_MARK = "[agent-fsm]"
"""How every directive begins."""
DIRECTIVE_TOKENS = 4_096
"""Ceiling of one directive, frame included."""

_TAIL_CHARS = 600


def _directive(text: str) -> str:
    # What a tool wrote as "\\ud800" has become half a surrogate pair, which no provider takes
    sendable = text.encode("utf-8", "replace").decode()
    return cut_bytes(f"{DIRECTIVE_MARK} {sendable}", DIRECTIVE_TOKENS - 96)


def mend(results: Iterable[ToolResult], reply: ModelReplied | None, *, research_tools: tuple[str, ...]) -> str:
    """Return what is said on entering Repair: what failed, with rc and tails of stdout and stderr, and to mend it."""
    failures = [each for each in results if not each.ok]
    if failures:
        seen = "\n".join(_observation(each) for each in failures)
        way = "Fix the cause and try again with a changed call; do not repeat a call that failed unchanged."
        if research_tools:
            way += f" If you don't know the cause, look it up with {_listed(research_tools)}."
        return _directive(f"The last step failed.\n{seen}\n{way}")
    if reply is not None and reply.said is Said.CUT_OFF:
        return _directive(
            "Your last reply was cut off at the reply limit, so none of its calls were run. Take one step at a time."
        )
    if reply is not None and reply.said is Said.EMPTY:
        why = f" ({reply.detail})" if reply.detail else ""
        return _directive(f"Your last reply was empty{why}. Call a tool or answer the task.")
    return _directive("Look at your last step again, mend what is wrong with it, and go on.")


def _observation(result: ToolResult) -> str:
    code = "" if result.rc is None else f": rc={result.rc}"
    return f"- {result.name}{code}\n{result.observation or '  ' + cut(result.text, _TAIL_CHARS)}"


def go_on() -> str:
    """Return what is said where a request would else end with the model's own words, which providers refuse."""
    return _directive("Your last reply was cut off. Go on.")


def nudge() -> str:
    """Return what is said when the model repeats itself: once in a run."""
    return _directive(
        "You have made the same call several times and got the same result each time. Another try will bring nothing"
        " new. Do something different, or answer the task with what you have."
    )


def research(tools: tuple[str, ...], *, unsure: bool) -> str:
    """Return what is said on entering Research."""
    why = "You don't seem sure of your answer." if unsure else "Several steps in a row have failed."
    return _directive(f"{why} Look it up with {_listed(tools)} before you go on, then continue with the task.")


def _listed(tools: tuple[str, ...]) -> str:
    return ", ".join(tools[:10]) or "the tools you have"


def summary(record: str) -> str:
    """Return the request for a periodic summary of *record*."""
    return (
        f"{DIRECTIVE_MARK} Summarize this record of your work for yourself: you will go on from the summary without the"
        " record. Keep the task, what was found out (numbers, names and paths to the letter), what failed and why, and"
        f" what is left to do.\n\n<record>\n{record}\n</record>"
    )


_WHY = {
    StopReason.BUDGET: "the budget is spent",
    StopReason.MAX_FAILURES: "too many steps in a row have failed",
    StopReason.STAGNATION: "the work goes round in circles",
    StopReason.MAX_ITERATIONS: "no further steps are allowed",
}


def closing(record: str, ending: StopReason) -> str:
    """Return the request for the best answer so far, because the run ends with *ending*."""
    return (
        f"{DIRECTIVE_MARK} The work ends here because {_WHY.get(ending, ending.value)}. From this record, give the best"
        " answer to the task that it supports: say what was found or done, and say plainly what was not. You have no"
        " tools now."
        f"\n\n<record>\n{record}\n</record>"
    )
