"""The offline planner: what it understands, what it mends, and that it claims nothing that no tool result shows."""

import asyncio
import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_fsm import AgentConfig, AgentResult, EchoMCP, LocalMCPInvoker, StopReason, ToolResult, directives, run_agent
from agent_fsm.offline import FIRST_LINE, USED_MODEL, OfflinePlanner, reply_to, understood
from agent_fsm.offline.mending import mend
from agent_fsm.offline.tasks import MAX_STEPS, MAX_TASK_CHARS, PHRASES, read_task
from agent_fsm.protocol import PLAN, REPAIR, RESEARCH, SUMMARIZE, Message, ModelRequest, Prices, State, ToolInvoker
from agent_fsm.reading import read_reply, sounds_unsure
from agent_fsm.testing import HANG, ScriptedTools

LOCAL = LocalMCPInvoker()
BOOM = {"ok": False, "rc": 1, "stdout": "fine\n", "stderr": "boom\n"}
UNNAMED = {"ok": False, "rc": 1, "stderr": "NameError: name 'math' is not defined"}


def run(task: str, tools: ToolInvoker = LOCAL, **limits: Any) -> AgentResult:
    return run_agent([user(task)], tools, AgentConfig(model="offline", **limits))


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def told(result: AgentResult) -> list[str]:
    """Return the lines of the answer, less the first."""
    first_line, *lines = str(result.final_answer).split("\n")
    assert first_line == FIRST_LINE
    return lines


def called(result: AgentResult) -> list[str]:
    """Return the texts of the calls that were made."""
    calls = [call for message in result.messages for call in message.get("tool_calls", ())]
    return [text for call in calls for text in json.loads(call["function"]["arguments"]).values()]


def request(messages: list[Message], purpose: State = PLAN) -> ModelRequest:
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("exec_python", "echo")]
    return ModelRequest(messages, tools, "auto", purpose, 60.0, "offline", 4_096)


# What it understands


@pytest.mark.parametrize(
    ("task", "calls"),
    [
        ("Run python: print('a then summarize') then summarize", ["print('a then summarize')"]),
        ("Run python: `print(1)`, then finish", ["print(1)"]),
        ("Run python:\n    x = 1\n    print(x)\n", ["x = 1\nprint(x)"]),
        ("Run python: for i in 1, 2:\n    print(i)\n\nthen summarize", ["for i in 1, 2:\n    print(i)"]),
        ("Run python: x = 1 - 2**3\nsummary = x\nprint(summary)", ["x = 1 - 2**3\nsummary = x\nprint(summary)"]),
        ("Run python: x = 1; print(x) then run shell: echo a and summarize", ["x = 1; print(x)", "echo a"]),
        ("Run python: print 'then summarize' then run shell: echo hi", ["print 'then summarize'", "echo hi"]),
        ("Run python: print(1). Then what is 2 + 2?", ["print(1)", "print(2 + 2)"]),
        ("Please run this code:\n\n```py\nprint(1)\n```\nand then tell me what it printed.", ["print(1)"]),
        ("Run PYTHON:\n```\nprint(1)\nprint(2)\n```", ["print(1)\nprint(2)"]),
        ("```bash\necho a\n\n# not this\n$ echo b\n```", ["echo a", "echo b"]),
        ("Run shell: ls . 'a then run: `b`' then summarize", ["ls . 'a then run: `b`'"]),
        ("Run shell: if true; then echo yes; fi", ["if true; then echo yes; fi"]),
        ("Run shell:\necho a\necho b\nthen summarize", ["echo a", "echo b"]),
        ("run: `echo hi` then execute the command `echo ho`", ["echo hi", "echo ho"]),
        ("Say 'good day' using the shell tool", ["echo 'good day'"]),
        ("what's -7 // 2 then compute: 7 % 4 =", ["print(-7 // 2)", "print(7 % 4)"]),
        ("1. Run python: print(1)\n2. Run: `ls`\n3. 2 + 2\n4. Summarize.", ["print(1)", "ls", "print(2 + 2)"]),
        ("- Echo: it's me\n- echo hello", ["it's me", "hello"]),
        ('Call look_up {"a": "}then"} then call the tool x with {}', ['{"a": "}then"}', "{}"]),
    ],
)
def test_a_task_is_read_as_these_steps(task: str, calls: list[str]) -> None:
    read = read_task(task)

    assert ([step.ways[0].text for step in read.steps], read.unread) == (calls, "")


@pytest.mark.parametrize(
    ("task", "stopped_at"),
    [
        ("Summarize the French Revolution", "Summarize the French Revolution"),
        ("summarize", "summarize"),
        ("Run python: print(1) then dance", "dance"),
        ("Run shell: echo hi\nand be merry", "be merry"),
        ("What does this print?\n```python\nprint(1)\n```", "What does this print? ..."),
        ("```js\nalert(1)\n```", "```js ..."),
        ("what's 9**9**9", "what's 9**9**9"),
        ("Echo a\n" * (MAX_STEPS + 1), "Echo a"),
        ("a" * MAX_TASK_CHARS + "bc", "bc"),
        ("then finish.", ""),
    ],
)
def test_a_task_not_wholly_understood_is_not_begun(task: str, stopped_at: str) -> None:
    result = run(task)

    assert called(result) == []
    assert told(result)[0] == "Nothing was run, because the task is not one that this planner understands."
    where = f"It stopped reading at: {stopped_at}\n" if stopped_at else ""
    assert "\n".join(told(result)[1:]) == where + understood()


@pytest.mark.parametrize("phrase", PHRASES, ids=lambda phrase: phrase.example)
def test_a_phrase_is_understood_as_its_example_says(phrase: Any) -> None:
    written = phrase.example.replace("```python ... ```", "```python\nprint(1)\n```")

    assert read_task(f"Echo: a\nthen {written}").unread == ""
    assert phrase.example in understood()


def test_only_the_callers_last_message_is_the_task() -> None:
    parts = [{"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "text", "text": "Echo hi"}]
    before = [user("What is 1+1?"), {"role": "assistant", "content": "1+1 = 2"}]

    result = run_agent([*before, {"role": "user", "content": parts}], EchoMCP())

    assert told(result) == ["hi"]


# What it answers


def test_the_seeds_task_is_run_and_summarized() -> None:
    result = run("Run python: print('hello') then summarize the result.")

    assert told(result) == [
        "Ran 1 of 1 step.",
        "1. exec_python `print('hello')`: succeeded with rc 0",
        "   stdout:",
        "   | hello",
    ]
    assert (result.stopped_reason, result.iterations, result.used_model) == (StopReason.SUCCESS, 2, USED_MODEL)


def test_the_seeds_curl_example_says_hi_with_echo_and_says_why() -> None:
    result = run("Say hi with exec_python then finish.", EchoMCP())

    assert told(result)[1:] == ["1. echo `hi` (exec_python is not offered): answered", "   stdout:", "   | hi"]


@pytest.mark.parametrize(
    ("task", "lines"),
    [
        ("Run python: print('hello')", ["hello"]),
        ("Run python: pass", ["(no output)"]),
        ("What is 17 * 23?", ["17 * 23 = 391"]),
        ("(3+4)/2 then 2**10", ["(3+4)/2 = 3.5", "2**10 = 1024"]),
        ("Say hi with exec_python then run shell: echo ho", ["hi", "ho"]),
    ],
)
def test_without_summarize_the_answer_is_the_output(task: str, lines: list[str]) -> None:
    assert told(run(task)) == lines


def test_arithmetic_is_not_computed_by_the_planner_itself() -> None:
    assert told(run("2+2", ScriptedTools({"exec_python": ["5\n"]}))) == ["2+2 = 5"]


def test_steps_are_done_one_a_turn_even_equal_ones_and_a_nudge_is_not_taken_for_a_failure() -> None:
    result = run("Echo error: a\n" * 5, EchoMCP(), stagnation_window=4)

    assert told(result) == ["error: a"] * 5
    assert REPAIR in result.path
    assert len({call["id"] for message in result.messages for call in message.get("tool_calls", ())}) == 5


def test_a_trimmed_transcript_loses_results_but_not_the_place() -> None:
    result = run("Echo a\nEcho b", EchoMCP(), max_history_messages=3)

    assert called(result) == ["a", "b"]
    assert told(result)[:2] == ["Ran 2 of 2 steps.", "1. echo `a`: its result is no longer in the transcript"]


def test_a_missing_tool_is_named_and_nothing_is_begun() -> None:
    result = run("Run python: print(1) then run shell: echo hi", ScriptedTools({"exec_python": [], "look": []}))

    assert told(result) == [
        "Ran 0 of 2 steps.",
        "1. exec_python `print(1)`: not run",
        "2. exec_shell `echo hi`: not run",
        "This needs tools that are not offered: exec_shell (offered: exec_python, look).",
    ]


def test_a_request_for_a_summary_is_answered_from_its_record() -> None:
    asked = request([user(directives.summary("user: Echo a\n\ntool: a"))], SUMMARIZE)

    content = reply_to(asked)["choices"][0]["message"]["content"]
    assert content == f"{FIRST_LINE}\nCopied from the record, not rephrased:\nuser: Echo a\n\ntool: a"


# Failures


@pytest.mark.parametrize("enable_repair", [True, False])
@pytest.mark.parametrize(
    ("outcome", "shown"),
    [
        (BOOM, "   | boom"),
        ({"error": "boom"}, "   | boom"),
        (RuntimeError("boom"), "   | error: RuntimeError: boom"),
        ({**BOOM, "stdout": "a" * 200}, "characters cut"),
        (HANG, "   | interrupted: its time limit of 0.1 s was over"),
    ],
)
def test_a_failed_result_is_never_told_as_a_success(outcome: Any, shown: str, enable_repair: bool) -> None:
    tools = ScriptedTools({"exec_python": [outcome]})

    result = run("Run python: f()", tools, enable_repair=enable_repair, observation_chars=150, tool_timeout_seconds=0.1)

    assert told(result)[0] == "Ran 1 of 1 step; step 1 failed."
    assert shown in str(result.final_answer) and len(tools.calls) == 1


def test_what_the_machine_calls_a_failure_is_one() -> None:
    result = run("Echo a", ScriptedTools({"echo": [ToolResult("no such host", ok=False)]}))

    assert told(result)[0] == "Ran 1 of 1 step; step 1 failed."


def test_a_failure_that_can_not_be_mended_is_said_and_the_rest_is_not_run() -> None:
    result = run("Run python: raise SystemExit(3) then run shell: echo hi")

    assert told(result) == [
        "Ran 1 of 2 steps; step 1 failed.",
        "1. exec_python `raise SystemExit(3)`: failed with rc 3, no output",
        "2. exec_shell `echo hi`: not run",
        "Nothing in its repair table mends this.",
    ]
    assert REPAIR in result.path and result.stopped_reason is StopReason.SUCCESS


def test_research_is_declined_with_what_is_there() -> None:
    tools = ScriptedTools({"exec_python": [UNNAMED], "search": []}, research=["search"])

    result = run("Run python: math.pi", tools, max_failures_before_research=1)

    assert RESEARCH in result.path
    assert (told(result)[0], told(result)[-1]) == ("Ran 1 of 1 step; step 1 failed.", "This planner does no research.")


# Mending


@pytest.mark.parametrize(
    ("code", "done", "printed"),
    [
        ("print(math.floor(2.5))", "added `import math`", ["2"]),
        ("for i in 1, 2:\n    print i; print 'x', 1", "wrote print as a function", ["1", "x 1", "2", "x 1"]),
        ("x = 1\n    print(x)", "made the indentation even", ["1"]),
        ("print(“it’s”)", "made quotes and spaces plain", ["it's"]),
        ("print((1, 2)", "closed what was open", ["(1, 2)"]),
        ("print('hello", "closed what was open", ["hello"]),
        ("print('hello)", "closed what was open", ["hello"]),
        ('print("""a', "closed what was open", ["a"]),
    ],
)
def test_a_mechanical_failure_is_mended_in_repair_and_both_are_told(code: str, done: str, printed: list[str]) -> None:
    result = run(f"Run python: {code}")

    assert REPAIR in result.path and len(called(result)) == 2
    assert any(line.startswith("1. ") and line.endswith(": failed with rc 1") for line in told(result))
    assert any(line.endswith(f" (mended: {done}): succeeded with rc 0") for line in told(result))
    assert told(result)[-len(printed) :] == [f"   | {line}" for line in printed]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print(maht.pi)", "NameError: name 'maht' is not defined"),
        ("print 'a'; )", "SyntaxError: Missing parentheses in call to 'print'. Did you mean print(...)?"),
        ("f(;", "SyntaxError: '(' was never closed"),
    ],
)
def test_what_does_not_fit_the_table_is_left_alone(code: str, said: str) -> None:
    assert mend(code, said) is None


@pytest.mark.parametrize(
    ("task", "calls", "closing"),
    [
        ("print(math.pi, json.dumps(1)) then summarize", 2, "The mended version failed too."),
        ("print(math.e) then run python: print(json.loads)", 3, "It mends one failure in a task, and did."),
    ],
)
def test_a_task_is_mended_once(task: str, calls: int, closing: str) -> None:
    result = run(f"Run python: {task}")

    assert (len(called(result)), told(result)[-1]) == (calls, closing)


# Properties

HEADS = ["Run python: ", "Run shell: ", "Run: ", "echo ", "Echo: ", "say ", " with exec_python", "what is "]
LINKS = ["1. ", "- ", "then ", "and ", ", ", ". ", ";", "\n", "\t", "```", "```python\n", "`", "[agent-fsm]"]
REST = ["print(1)", "print 1", "x = 1", "math.pi", "'", "(", "2+2", "finish", "summarize it", "run this: "]
PIECES = st.sampled_from([*HEADS, *LINKS, *REST])
TASKS = (st.lists(PIECES, max_size=14).map("".join) | st.text(max_size=60)).filter(str.strip)
OUTCOMES = st.sampled_from([UNNAMED, {"ok": True, "rc": 0, "stdout": "1\n"}, "", "{", "not run: no", "[" * 2_000])


@settings(deadline=None)
@given(TASKS, st.sets(st.sampled_from(["exec_python", "exec_shell", "echo", "look"])), st.lists(OUTCOMES, min_size=1))
def test_whatever_the_text_and_the_tools_do_it_answers(task: str, names: set[str], outcomes: list[Any]) -> None:
    tools = ScriptedTools(dict.fromkeys(names, outcomes))
    enough = len(read_task(task).steps) + 2  # for one mended call and the answer

    result = run(task, tools, max_iterations=enough, stagnation_window=1_000)

    assert (result.stopped_reason, bool(told(result))) == (StopReason.SUCCESS, True)
    assert tools.calls == [] or not read_task(task).unread


@settings(deadline=None)
@given(TASKS, st.sampled_from([PLAN, REPAIR, RESEARCH, SUMMARIZE]))
def test_a_reply_follows_from_the_request_alone_and_changes_nothing(task: str, purpose: State) -> None:
    asked = request([user(task)], purpose)
    before = json.dumps(asked.messages)

    reply = reply_to(asked)

    assert reply == reply_to(asked) == asyncio.run(OfflinePlanner().complete(asked))
    assert json.dumps(asked.messages) == before
    read = read_reply(reply, now=0.0, offered=["exec_python", "echo"], max_calls=8)
    assert getattr(read, "calls", ()) or getattr(read, "text", "").startswith(FIRST_LINE)


@pytest.mark.parametrize("text", [" ", ".", "then ", "1. ", "(", "`", "say ", "run ", "2+", "\n", "run python: (\n"])
def test_the_longest_task_is_read_in_no_time(text: str) -> None:
    # a deadline: it takes under 1 s; a search that backtracks would take minutes
    code = f"from agent_fsm.offline.tasks import read_task; read_task(({text!r} * {MAX_TASK_CHARS})[:{MAX_TASK_CHARS}])"

    subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, timeout=20, check=True)


def test_it_costs_nothing_and_does_not_sound_unsure() -> None:
    reply = reply_to(request([user("hello")]))

    assert (set(reply["usage"].values()), OfflinePlanner().prices("offline")) == ({0}, Prices(0.0, 0.0))
    assert not sounds_unsure(reply["choices"][0]["message"]["content"])


def test_it_is_imported_when_it_is_used_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, agent_fsm; print('agent_fsm.offline' in sys.modules); import agent_fsm.offline;"
        "print({'litellm', 'mcp', 'httpx', 'pydantic', 'rich', 'structlog'} & set(sys.modules))"
    )

    loaded = subprocess.check_output([sys.executable, "-c", code], stdin=subprocess.DEVNULL, text=True)

    assert loaded == "False\nset()\n"
