"""The offline planner: what it understands, what it mends, and that it claims nothing that no tool result shows."""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from attrs import evolve, field, frozen
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agent_fsm import directives
from agent_fsm.offline import (
    FIRST_LINE,
    MENDERS,
    PHRASES,
    USED_MODEL,
    Call,
    OfflinePlanner,
    mend,
    read_task,
    reply_to,
    understood,
)
from agent_fsm.protocol import PLAN, REPAIR, RESEARCH, SUMMARIZE, Message, ModelRequest, Prices, State
from agent_fsm.reading import read_reply, sounds_unsure
from agent_fsm.transcript import cut

LOCAL = ("exec_python", "exec_shell")
SEED_TASK = "Run python: print('hello') then summarize the result."

# The loop, by hand


def request(messages: list[Message], *, tools: Sequence[str] = LOCAL, purpose: State = PLAN) -> ModelRequest:
    offered = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in tools]
    return ModelRequest(messages, offered, "auto" if tools else None, purpose, 60.0, "offline", 4_096)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def called(name: str, arguments: dict[str, Any], result: str) -> list[Message]:
    """Return the messages of a call that another model made."""
    call = {"id": "a1", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
    return [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a1", "content": result},
    ]


def local_result(rc: int | None, stdout: str = "", stderr: str = "", error: str = "") -> str:
    """What the local tools say, in their order."""
    said = {"ok": rc == 0 and not error, "rc": rc, "stdout": stdout, "stderr": stderr, "seconds": 0.01}
    return json.dumps(said | ({"error": error} if error else {}), separators=(",", ":"))


def run_really(name: str, text: str) -> str:
    """Run a call in a real process."""
    if name == "echo":
        return text
    argv = [sys.executable, "-c", text] if name == "exec_python" else ["/bin/sh", "-c", text]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False)
    return local_result(done.returncode, done.stdout, done.stderr)


@frozen
class Played:
    """What came of a task."""

    lines: list[str]
    """The answer, less its first line."""
    calls: list[tuple[str, str]]
    turns: int
    messages: list[Message] = field(repr=False)


def play(
    task: str | list[Message],
    *,
    tools: Sequence[str] = LOCAL,
    run: Callable[[str, str], str] = run_really,
    after_failure: State = REPAIR,
    trimmed: bool = False,
    turns: int = 30,
) -> Played:
    """Ask, run the calls and append, until there is an answer."""
    messages = [user(task)] if isinstance(task, str) else list(task)
    first = len(messages)
    purpose = PLAN
    calls: list[tuple[str, str]] = []
    for turn in range(1, turns + 1):
        sent = messages[:first] + messages[first:][-2:] if trimmed else messages
        message = reply_to(request(sent, tools=tools, purpose=purpose))["choices"][0]["message"]
        if not message.get("tool_calls"):
            first_line, *lines = message["content"].split("\n")
            assert first_line == FIRST_LINE
            return Played(lines, calls, turn, messages)
        [call] = message["tool_calls"]
        name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
        [text] = arguments.values()
        calls.append((name, text))
        result = run(name, text)
        messages += [message, {"role": "tool", "tool_call_id": call["id"], "content": result}]
        purpose = PLAN
        if result.startswith("{") and not json.loads(result)["ok"]:
            purpose = after_failure
            messages.append(user(f"{directives.DIRECTIVE_MARK} The last step failed."))
    raise AssertionError(f"no answer after {turns} turns")


# What it understands


def test_the_seeds_task_is_run_and_summarized() -> None:
    played = play(SEED_TASK)

    assert played.calls == [("exec_python", "print('hello')")]
    assert played.lines == [
        "Ran 1 of 1 step; all succeeded.",
        "1. exec_python `print('hello')`: succeeded with rc 0",
        "   stdout, 1 line:",
        "   | hello",
    ]


def test_without_summarize_the_answer_is_the_output() -> None:
    played = play("Run python: print('hello')")

    assert played.lines == ["hello"]


def test_the_seeds_curl_example_says_hi() -> None:
    played = play("Say hi with exec_python then finish.")

    assert (played.calls, played.lines) == ([("exec_python", "print('hi')")], ["hi"])


def test_where_only_echo_is_offered_hi_is_said_with_echo_and_the_answer_says_so() -> None:
    played = play("Say hi with exec_python then finish.", tools=["echo"])

    assert played.calls == [("echo", "hi")]
    assert played.lines == ["Step 1 used echo, because exec_python is not offered.", "hi"]


@pytest.mark.parametrize(
    ("task", "calls"),
    [
        ("run PYTHON: print('a then b')", ["print('a then b')"]),
        ("Run python: print('a then summarize') then summarize", ["print('a then summarize')"]),
        ("Run python: print('hello').", ["print('hello')"]),
        ("Run python: print(1) and summarize the result", ["print(1)"]),
        ("Run python: `print(1)`, then finish", ["print(1)"]),
        ("Run python:\n    x = 1\n    print(x)\n", ["x = 1\nprint(x)"]),
        ("Run python: for i in 1, 2:\n    print(i)\n\nthen summarize", ["for i in 1, 2:\n    print(i)"]),
        ("Run python: report = 5\nsummary = report\nprint(summary)", ["report = 5\nsummary = report\nprint(summary)"]),
        ("Run python: x = 1; print(x) then run shell: echo hi then summarize", ["x = 1; print(x)", "echo hi"]),
        ("Run python: print 'then summarize' then run shell: echo hi", ["print 'then summarize'", "echo hi"]),
        ("Run python: print('hello then summarize the result.", ["print('hello"]),
        ("Run python: print(1). Then what is 2 + 2?", ["print(1)", "print(2 + 2)"]),
        ("```python\nprint(1)\nprint(2)\n```", ["print(1)\nprint(2)"]),
        ("Please run this code:\n\n```py\nprint(1)\n```\nand then tell me what it printed.", ["print(1)"]),
        ("Run python:\n```\nprint(1)\n```", ["print(1)"]),
        ("```\nprint(1)\n```", ["print(1)"]),
        ("```bash\necho a\n\n# not this\n$ echo b\n```", ["echo a", "echo b"]),
        ("Run shell: echo 'a then summarize b' then summarize", ["echo 'a then summarize b'"]),
        ("Run shell: if true; then echo yes; fi", ["if true; then echo yes; fi"]),
        ("Run shell: ls . then summarize", ["ls ."]),
        ("Run shell:\necho a\necho b\nthen summarize", ["echo a", "echo b"]),
        ("run: `echo hi` then execute the command `echo ho`", ["echo hi", "echo ho"]),
        ("Say 'good day' using the shell tool", ["echo 'good day'"]),
        ("What is 17 * 23?", ["print(17 * 23)"]),
        ("calculate (3+4)/2", ["print((3+4)/2)"]),
        ("2**10", ["print(2**10)"]),
        ("what's -7 // 2 then compute: 7 % 4 =", ["print(-7 // 2)", "print(7 % 4)"]),
        ("1. Run python: print(1)\n2. Run: `ls`\n3. 2 + 2\n4. Summarize.", ["print(1)", "ls", "print(2 + 2)"]),
        ("- Echo: it's me\n- echo hello", ["it's me", "hello"]),
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
        ("What is 2?", "What is 2?"),
        ("What is __import__('os')?", "What is __import__('os')?"),
        ("Echo a\n" * 101, "Echo a"),
    ],
)
def test_a_task_not_wholly_understood_is_not_begun(task: str, stopped_at: str) -> None:
    played = play(task)

    assert played.calls == []
    assert played.lines[:2] == [
        "Nothing was run, because the task is not one that this planner understands.",
        f"It stopped reading at: {stopped_at}",
    ]
    assert "\n".join(played.lines[2:]) == understood()


@pytest.mark.parametrize("task", ["", " \n", "then.", "\U0001f600"])
def test_nothing_to_do_is_answered_with_what_is_understood(task: str) -> None:
    assert "\n".join(play(task).lines).endswith(understood())


def test_every_phrase_is_understood_as_its_example_says() -> None:
    for phrase in PHRASES:
        example = phrase.example.replace("```python ... ```", "```python\nprint(1)\n```")

        assert read_task(f"Echo: a\nthen {example}").unread == ""
        assert phrase.example in understood()


def test_a_task_in_parts_with_an_image_is_its_text() -> None:
    words = [{"type": "text", "text": text} for text in ("What is", "1+1")]
    parts = [words[0], {"type": "image_url", "image_url": {"url": "data:,"}}, words[1]]

    assert play([{"role": "user", "content": parts}]).lines == ["1+1 = 2"]


# Arithmetic


@pytest.mark.parametrize(
    ("expression", "value"),
    [("17 * 23", "391"), ("(3+4)/2", "3.5"), ("2**10", "1024"), ("-7 // 2", "-4"), ("10**3999 % 7", str(10**3999 % 7))],
)
def test_arithmetic_is_answered_from_the_tools_result(expression: str, value: str) -> None:
    assert play(f"What is {expression}?").lines == [f"{expression} = {value}"]


def test_arithmetic_is_not_computed_by_the_planner_itself() -> None:
    assert play("2+2", run=lambda name, text: local_result(0, "5\n")).lines == ["2+2 = 5"]


def test_a_division_by_zero_is_a_failure() -> None:
    played = play("What is 1/0?")

    assert played.lines[0] == "Ran 1 of 1 step; step 1 failed."
    assert "   | ZeroDivisionError: division by zero" in played.lines


def _joined(part: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.builds("({}{}{})".format, part, st.sampled_from(["+", "-", "*", "//", "%", "**"]), part)


@given(st.recursive(st.integers(0, 10**6).map(str), _joined, max_leaves=8))
def test_accepted_arithmetic_is_short_to_compute_and_to_print(expression: str) -> None:
    for step in read_task(expression).steps:
        try:
            value = eval(step.expression)
        except (ZeroDivisionError, OverflowError):
            continue

        assert len(str(value)) <= 4_002


# Several steps


def test_steps_are_done_one_call_a_turn_in_order() -> None:
    played = play("Run python: x = 1; print(x) then run shell: echo hi then summarize the result")

    assert played.calls == [("exec_python", "x = 1; print(x)"), ("exec_shell", "echo hi")]
    assert (played.turns, played.lines[0]) == (3, "Ran 2 of 2 steps; all succeeded.")


def test_equal_steps_are_each_done() -> None:
    assert play("Echo: a then echo: a then echo: a", tools=["echo"]).lines == ["a", "a", "a"]


def test_call_ids_are_legal_and_unique_over_the_conversation() -> None:
    played = play("\n".join(["Echo a"] * 20), tools=["echo"])
    done = {"role": "assistant", "content": "done"}

    again = play([*played.messages, done, user("\n".join(["Echo a"] * 20))], tools=["echo"])

    ids = [call["id"] for message in again.messages for call in message.get("tool_calls") or ()]
    assert len(set(ids)) == len(ids) == 40
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", each) for each in ids)


def test_only_the_callers_last_message_is_the_task() -> None:
    before = [user("What is 1+1?"), {"role": "assistant", "content": "1+1 = 2"}]
    directive = user(f"{directives.DIRECTIVE_MARK} What is 3+3?")

    played = play([{"role": "system", "content": "Be brief."}, *before, user("What is 2+2?"), directive])

    assert played.lines == ["2+2 = 4"]


def test_calls_made_by_another_model_count_by_what_they_did() -> None:
    made = called("exec_python", {"code": "print(1)", "timeout_s": 5}, local_result(0, "1\n"))

    played = play([user("Run python: print(1) then run shell: echo 2"), *made])

    assert (played.calls, played.lines) == ([("exec_shell", "echo 2")], ["1", "2"])


def test_a_trimmed_transcript_loses_results_but_not_the_place() -> None:
    played = play("Echo a\nEcho a\nEcho a\nsummarize the result", tools=["echo"], trimmed=True)

    assert len(played.calls) == 3
    assert played.lines[0] == "Ran 3 of 3 steps; none failed."
    assert played.lines[-1] == "No longer in the transcript: the results of step 1, 2."


# Tools that are not there


def test_a_missing_tool_is_named_and_nothing_is_begun() -> None:
    played = play("Run python: print(1) then run shell: echo hi", tools=["exec_python", "search"])

    assert played.calls == []
    assert played.lines[:4] == [
        "Ran 0 of 2 steps.",
        "1. exec_python `print(1)`: not run",
        "2. exec_shell `echo hi`: not run",
        "This needs a tool that is not offered: exec_shell (offered: exec_python, search).",
    ]


def test_tool_choice_none_means_no_tools() -> None:
    asked = evolve(request([user(SEED_TASK)]), tool_choice="none")

    assert "(offered: none)" in reply_to(asked)["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("tools", "call"), [(["echo"], ("echo", "it's")), (LOCAL, ("exec_shell", "echo 'it'\"'\"'s'"))]
)
def test_echo_is_said_with_echo_or_else_in_the_shell(tools: Sequence[str], call: tuple[str, str]) -> None:
    played = play("Echo: it's", tools=tools)

    assert (played.calls, played.lines[-1]) == ([call], "it's")


# Failures


def test_a_failure_that_can_not_be_mended_is_said_and_the_rest_is_not_run() -> None:
    played = play("Run python: raise SystemExit(3) then run shell: echo hi then summarize")

    assert played.lines == [
        "Ran 1 of 2 steps; step 1 failed.",
        "1. exec_python `raise SystemExit(3)`: failed with rc 3, no output",
        "2. exec_shell `echo hi`: not run",
        "Nothing in its repair table mends this.",
    ]


def answer_to(result: str, purpose: State) -> list[str]:
    """Return the answer, less its first line, once `f()` was run with *result*."""
    messages = [user("Run python: f() then summarize"), *called("exec_python", {"code": "f()"}, result)]
    return str(reply_to(request(messages, purpose=purpose))["choices"][0]["message"]["content"]).split("\n")[1:]


@pytest.mark.parametrize("purpose", [PLAN, REPAIR, RESEARCH])
@pytest.mark.parametrize(
    "result", [local_result(1, "fine\n", "boom\n"), local_result(None, error="boom"), '{"error": "boom"}']
)
def test_a_failed_result_is_never_told_as_a_success(result: str, purpose: State) -> None:
    lines = answer_to(result, purpose)

    assert lines[0] == "Ran 1 of 1 step; step 1 failed."
    assert "   | boom" in lines


@pytest.mark.parametrize("text", ["not run: only the first 8 calls are run", "interrupted", "Error: no such host"])
def test_a_call_that_came_to_nothing_is_a_failure(text: str) -> None:
    assert play("Echo a", tools=["echo"], run=lambda name, words: text).lines[0] == "Ran 1 of 1 step; step 1 failed."


def test_plain_text_is_a_failure_where_the_machine_asks_for_a_repair() -> None:
    played = play("Echo a", tools=["echo"])
    asked = request([*played.messages, user(f"{directives.DIRECTIVE_MARK} It failed.")], tools=["echo"], purpose=REPAIR)

    assert "step 1 failed" in reply_to(asked)["choices"][0]["message"]["content"]


def test_research_is_declined_with_what_is_there() -> None:
    played = play("Run python: math.pi", after_failure=RESEARCH)

    assert (len(played.calls), played.lines[-1]) == (1, "This planner does no research.")


def test_without_repair_a_failure_ends_the_task() -> None:
    played = play("Run python: print(math.pi)", after_failure=PLAN)

    assert (len(played.calls), played.lines[0]) == (1, "Ran 1 of 1 step; step 1 failed.")


def test_a_long_output_is_counted_and_quoted_in_part() -> None:
    played = play("Run python: for i in range(100): print(i)\nsummarize the output")

    assert played.lines[2] == "   stdout, 100 lines:"
    assert played.lines[3] == "   | 0" and played.lines[-1] == "   | 99"
    assert "   | ... 88 lines left out ..." in played.lines


@pytest.mark.parametrize(("rc", "ended"), [(0, "succeeded"), (1, "failed")])
def test_a_result_cut_in_the_middle_still_says_how_it_ended(rc: int, ended: str) -> None:
    result = cut(local_result(rc, "a\n" * 4_000, "b\n" * 4_000 + "at last\n"), 8_000)

    lines = answer_to(result, PLAN)

    assert lines[1] == f"1. exec_python `f()`: {ended} with rc {rc}"
    assert "   | a" in lines and "   | at last" in lines
    assert any(line.startswith("   stdout, at least ") for line in lines)


# Mending


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("print(math.floor(2.5))", "2"),
        ("import Math\nprint(Math.floor(2.5))", "2"),
        ("import maths\nprint(maths.floor(2.5))", "2"),
        ("print 'a', 2", "a 2"),
        ("for i in range(2):\n    print i; print 'x'", "0\nx\n1\nx"),
        ("x = 1\n    print(x)", "1"),
        ("if True:\n        x = 1\n\tprint(x)", "1"),
        ("print(“it’s”)", "it's"),
        ("print(1,\u00a02)", "1 2"),
        ("print((1, 2)", "(1, 2)"),
        ("print('hello", "hello"),
        ("print('hello)", "hello"),
        ('print("""a', "a"),
        ("print([1  # one (", "[1]"),
    ],
)
def test_a_mechanical_failure_is_mended_once_and_said(code: str, printed: str) -> None:
    played = play(f"Run python: {code}")

    assert [name for name, _ in played.calls] == ["exec_python"] * 2
    assert played.lines[0].startswith("Step 1 first failed (") and " and was mended: " in played.lines[0]
    assert "\n".join(played.lines[1:]) == printed


def test_a_shell_without_python_is_given_python3() -> None:
    found = mend(Call("exec_shell", "python -c 'x' && ./python a.python"), "sh: 1: python: not found")

    assert found == ("used python3 for python", Call("exec_shell", "python3 -c 'x' && ./python a.python"))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print(maht.pi)", "NameError: name 'maht' is not defined"),
        ("print(string)", "NameError: name 'string' is not defined"),
        ("import numpyy", "ModuleNotFoundError: No module named 'numpyy'"),
        ("1 + * 2", "SyntaxError: invalid syntax"),
        ("print 'a'; )", "SyntaxError: Missing parentheses in call to 'print'. Did you mean print(...)?"),
        ("print(1)", "SyntaxError: '(' was never closed"),
        ("f()", ""),
    ],
)
def test_what_does_not_fit_the_table_is_left_alone(code: str, said: str) -> None:
    assert mend(Call("exec_python", code), said) is None


def test_a_mended_step_that_fails_too_is_not_mended_again() -> None:
    played = play("Run python: print(math.pi, json.dumps(1)) then summarize")

    assert (len(played.calls), played.turns) == (2, 3)
    assert played.lines[0] == "Ran 1 of 1 step; step 1 failed."
    assert "NameError: name 'math' is not defined" in "\n".join(played.lines)
    assert "NameError: name 'json' is not defined" in "\n".join(played.lines)
    assert played.lines[-1] == "The mended version failed too."


def test_a_task_is_mended_once_and_goes_on() -> None:
    played = play("Run python: print(math.e) then run python: print(2) then run python: print(json.loads)")

    codes = [code for _, code in played.calls]
    assert codes == ["print(math.e)", "import math\nprint(math.e)", "print(2)", "print(json.loads)"]
    assert played.lines[0] == "Ran 3 of 3 steps; step 3 failed."
    assert played.lines[-1] == "It mends one failure in a task, and did."


def test_a_summary_tells_of_the_failure_and_of_the_mending() -> None:
    played = play("Run python: print(math.floor(2.5)) then summarize the result.")

    titles = [line for line in played.lines if line.startswith("1.")]
    assert titles == [
        "1. exec_python `print(math.floor(2.5))`: failed with rc 1",
        "1. exec_python `import math ...` (mended): succeeded with rc 0",
    ]
    assert played.lines[0] == "Ran 1 of 1 step; all succeeded."


@given(st.sampled_from(MENDERS), st.text(alphabet="()[]{}'\"#\\\n\t prinimath.;:“x", max_size=40))
def test_menders_never_raise(mender: Any, code: str) -> None:
    seen = re.match(r"(math)|", "math")
    assert seen is not None

    assert all(isinstance(each, str) for each in mender.mend(code, seen))


# Summaries


def test_a_request_for_a_summary_is_answered_from_its_record() -> None:
    record = "user: Run python: print(1)\n\nassistant: called exec_python with {}\n\ntool: " + local_result(0, "1\n")

    reply = reply_to(request([user(directives.summary(record))], tools=(), purpose=SUMMARIZE))

    first_line, second, *lines = reply["choices"][0]["message"]["content"].split("\n")
    assert (first_line, second) == (FIRST_LINE, "Copied from the record, not rephrased:")
    assert lines == [line for line in record.split("\n") if line]


def test_of_a_long_record_a_summary_keeps_the_ends() -> None:
    record = "\n".join(["user: the task", *(f"line {number}" for number in range(500)), "tool: the last result"])

    reply = reply_to(request([user(directives.summary(record))], tools=(), purpose=SUMMARIZE))

    content = reply["choices"][0]["message"]["content"]
    assert "user: the task" in content and "tool: the last result" in content
    assert "... 486 lines left out ..." in content


def test_a_summary_over_a_transcript_is_the_report() -> None:
    played = play(SEED_TASK)

    reply = reply_to(request(played.messages, tools=(), purpose=SUMMARIZE))

    assert reply["choices"][0]["message"]["content"].split("\n")[1:] == played.lines


# The client


def test_the_client_says_what_it_is_and_costs_nothing() -> None:
    planner = OfflinePlanner()

    reply = asyncio.run(planner.complete(request([user("2+2")])))

    assert reply == reply_to(request([user("2+2")]))
    assert (reply["model"], planner.used_model, planner.prices("offline")) == (USED_MODEL, USED_MODEL, Prices(0.0, 0.0))
    assert set(reply["usage"].values()) == {0}


def test_no_answer_of_its_own_sounds_unsure() -> None:
    answers = [play(task, tools=tools).lines for task in ("hello", SEED_TASK) for tools in ((), LOCAL)]

    assert not any(sounds_unsure("\n".join([FIRST_LINE, *lines])) for lines in answers)


# Properties

HEADS = [
    "Run python: ",
    "Run shell: ",
    "Run: ",
    "echo ",
    "Echo: ",
    "say ",
    " with exec_python",
    "what is ",
    "2+2",
    "finish",
]
LINKS = [
    "1. ",
    "- ",
    "then ",
    "and ",
    ", ",
    ". ",
    ";",
    "\n",
    "\t",
    "```",
    "```python\n",
    "`",
    directives.DIRECTIVE_MARK,
]
REST = ["print(1)", "print 1", "x = 1", "math.pi", "'", "(", "summarize the result", "run this: "]
WORDS = st.sampled_from([*HEADS, *LINKS, *REST])
TASKS = st.lists(WORDS, max_size=14).map("".join) | st.text(max_size=60)


@settings(deadline=None)
@given(TASKS, st.sets(st.sampled_from(["exec_python", "exec_shell", "echo", "search"])), st.data())
@example("Run python: print(math.pi)\nRun python: print(math.e)\nsummarize", {"exec_python"}, None)
def test_whatever_the_text_and_the_tools_do_it_ends_in_time(task: str, tools: set[str], data: Any) -> None:
    unnamed = local_result(1, "", "NameError: name 'math' is not defined")
    results = [unnamed, local_result(0, "1\n"), "", "{", "not run: no"]

    def run(name: str, text: str) -> str:
        assert name in tools
        return str(data.draw(st.sampled_from(results))) if data else unnamed

    played = play(task, tools=sorted(tools), run=run, turns=len(read_task(task).steps) + 2)

    assert played.calls == [] or not read_task(task).unread


@settings(deadline=None)
@given(TASKS, st.sampled_from([PLAN, REPAIR, RESEARCH, SUMMARIZE]))
def test_a_reply_follows_from_the_request_alone_and_changes_nothing(task: str, purpose: State) -> None:
    asked = request([user(task)], purpose=purpose)
    before = json.dumps(asked.messages)

    reply = reply_to(asked)

    assert reply == reply_to(asked)
    assert json.dumps(asked.messages) == before
    read = read_reply(reply, now=0.0, offered=LOCAL, max_calls=8)
    assert getattr(read, "calls", ()) or getattr(read, "text", "").startswith(FIRST_LINE)


@pytest.mark.parametrize(
    "text", [" ", ".", "then ", "1. ", "- ", "(", "`", "say ", "run ", "2+", "\n", "run python: x\n"]
)
def test_a_huge_text_is_read_in_no_time(text: str) -> None:
    # a deadline: it takes under 0.1 s; a quadratic search would take minutes
    subprocess.run(
        [sys.executable, "-c", f"from agent_fsm.offline import read_task; read_task({text!r} * 20_000)"],
        stdin=subprocess.DEVNULL,
        timeout=20,
        check=True,
    )


def test_importing_it_loads_nothing_heavy() -> None:
    heavy = {"litellm", "mcp", "httpx", "pydantic", "rich", "structlog"}
    code = f"import sys, agent_fsm.offline; print({heavy} & set(sys.modules))"

    loaded = subprocess.check_output([sys.executable, "-c", code], stdin=subprocess.DEVNULL, text=True)

    assert loaded == "set()\n"
