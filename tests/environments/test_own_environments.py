"""The project's own environments: rewards for right and wrong work, and no way for a model to have no verdict."""

import asyncio
import itertools
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from dist_lm.chat.messages import Call
from dist_lm.environments.host import Host
from dist_lm.environments.protocol import Action, Limits, Step, Task
from dist_lm.environments.tools import tasks
from dist_lm.tools.data.examples import example
from tests.patience import patient

sandboxed = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
LIMITS = Limits(turns=8, seconds_a_step=patient(30.0), seconds=patient(600.0))

TASKS: Mapping[str, dict[str, Any]] = {
    "python": {"prompt": "2 + 2?", "answer": "4", "files": {"a.txt": "hey\n"}},
    "bash": {"prompt": "2 + 2?", "answer": ["4", "four"], "files": {"it's a.txt": "it's\n"}},
    "code_repair": {
        "prompt": "Write f(x).",
        "language": "python",
        "tests": ["assert f(1) == 2"],
        "hidden": {"solution": "def f(x): return x + 1", "call": "f", "arguments": [{"int": [2, 99]}]},
    },
    "sql": {
        "prompt": "Which a have a large b?",
        "database": "CREATE TABLE t (a, b); INSERT INTO t VALUES (1, 2), (3, 4), (5, 6);",
        "query": "SELECT a FROM t WHERE b > 2",
        "tables": {"t": {"rows": [4, 8], "columns": {"a": {"int": [1, 9]}, "b": {"int": [1, 9]}}}},
    },
    "tools": {"seed": 1, "number": 0},
}


def call(name: str, **arguments: Any) -> Action:
    return Action("", (Call(name, arguments),))


def play(name: str, actions: Sequence[Action], data: dict[str, Any] | None = None) -> list[Step]:
    """The steps of a conversation with these actions, `reset` first."""

    async def conversation() -> list[Step]:
        async with Host(name, LIMITS) as host:
            episode = host.episode(Task.of("0", data or TASKS[name]))
            steps = [await episode.reset()]
            for action in actions:
                if not steps[-1].done:
                    steps.append(await episode.step(action))
            await episode.close()
            return steps

    return asyncio.run(conversation())


def reward(steps: Sequence[Step]) -> float | None:
    assert steps[-1].done
    assert steps[-1].verdict
    return steps[-1].verdict.reward


def results(step: Step) -> tuple[Any, ...]:
    return step.observation.messages[0].results


@sandboxed
def test_a_python_session_keeps_variables_and_judges_the_last_line():
    """Finds a session that forgets, or a reward for an answer that is only somewhere in the text."""
    steps = play(
        "python", [call("python", code="x = open('a.txt').read()"), call("python", code="x"), Action("So\n4.")]
    )
    assert results(steps[2]) == ({"output": "'hey\\n'\n"},)
    assert reward(steps) == 1.0
    assert reward(play("python", [Action("4\nor 5")])) == 0.0
    assert reward(play("python", [Action("4", cut="tokens")])) == 0.0


@sandboxed
def test_a_bash_session_keeps_files_and_says_how_a_script_ended():
    """Finds files of a task that are not there, and a failed script that looks like one that succeeded."""
    steps = play("bash", [call("bash", code="cat *; exit 2"), call("bash", code="ls"), Action("four")])
    assert results(steps[1]) == ({"output": "it's\n", "exit_code": 2},)
    assert results(steps[2]) == ({"output": "it's a.txt\n"},)
    assert reward(steps) == 1.0


@sandboxed
def test_code_repair_feeds_back_fixed_tests_and_judges_by_the_hidden_ones():
    """Finds a hidden test in the feedback, and a reward for a program that knows the fixed tests by heart."""
    wrong, table, right = (f"```python\ndef f(x): return {value}\n```" for value in ("x", "2", "x + 1"))
    steps = play("code_repair", [Action(wrong), Action(right)])
    told = steps[1].observation.messages[0].content
    assert "0 of 1 tests pass" in told
    assert "assert f(1) == 2" in told
    assert "x + 1" not in told
    assert reward(steps) == 1.0
    assert reward(play("code_repair", [Action(table)])) == 0.25
    assert reward(play("code_repair", [Action(wrong)] * 4)) == 0.0


@sandboxed
def test_code_repair_shows_only_half_of_the_tests_that_decide():
    """Finds a policy that wins without solving: with all tests shown, a program that knows their answers passes."""
    task = {name: value for name, value in TASKS["code_repair"].items() if name != "hidden"}
    task |= {"tests": ["assert f(1) == 2", "assert f(2) == 3"]}
    steps = play("code_repair", [Action("def f(x): return 0"), Action("def f(x): return 2")], task)
    first, second = (step.observation.messages[0].content for step in steps[1:])
    assert "assert f(1) == 2" in first
    assert "One that is not shown does not" in second
    assert "f(2)" not in first + second


@sandboxed
def test_code_repair_judges_the_last_program_of_a_conversation_that_is_full():
    """Finds an empty program that is judged in place of the one before; an empty turn of the model's own is judged."""
    table = Action("def f(x): return x + (x < 2)")
    passes_some = {"tests": ["assert f(1) == 2", "assert f(2) == 3"]}
    task = {name: value for name, value in TASKS["code_repair"].items() if name != "hidden"} | passes_some
    assert reward(play("code_repair", [table, Action("", cut="tokens")], task)) == 0.5
    assert reward(play("code_repair", [table, Action("", cut="turns")], task)) == 0.0


@sandboxed
def test_sql_explores_a_database_that_no_query_changes_and_compares_rows():
    """Finds a database that a call changes for the next, rows compared in order, and a reward for a constant."""
    look = call("sql", query="SELECT * FROM t WHERE a < 4")
    change = call("sql", query="CREATE TABLE u AS SELECT * FROM t; SELECT count(*) FROM u")
    right = Action("```sql\nSELECT a FROM t WHERE b > 2 ORDER BY b DESC\n```")
    steps = play("sql", [look, change, call("sql", query="SELECT * FROM u"), right])
    assert results(steps[1]) == ({"rows": "1|2\n3|4\n"},)
    assert results(steps[2]) == ({"rows": "3\n"},)
    assert "no such table: u" in results(steps[3])[0]["error"]
    assert reward(steps) == 1.0
    assert reward(play("sql", [Action("SELECT 3 UNION ALL SELECT 5")])) == 0.0
    assert reward(play("sql", [Action("not sql")])) == 0.0


def test_generated_tools_give_the_results_of_their_conversation_and_its_calls_are_right():
    """Finds a tool that is not executed in the state in which its conversation was generated, and calls judged by
    another rule than those of stage tools."""

    async def conversations() -> None:
        async with Host("tools", Limits(turns=64)) as host:
            for number in range(40):
                messages = example(3, number).conversation.messages
                episode = host.episode(Task.of(str(number), {"seed": 3, "number": number}))
                step = await episode.reset()
                given = []
                for message in messages:
                    if message.role == "assistant":
                        step = await episode.step(Action(message.content, message.calls))
                        given += [results(step)] if message.calls else []
                assert reward([step]) == 1.0
                assert given == [message.results for message in messages if message.role == "tool"]

                silent = host.episode(episode.task)
                step = await silent.reset()
                while not step.done:
                    step = await silent.step(Action("I do not know."))
                expected = sum(not m.calls for p, m in itertools.pairwise(messages) if p.role == "user")
                assert reward([step]) == expected / sum(message.role == "user" for message in messages)

    asyncio.run(conversations())


def test_tasks_of_tools_are_split_by_their_tools():
    """Finds a held-out task whose tools are trained on."""
    names: list[set[str]] = []
    for is_held_out in (False, True):
        numbers = [task["number"] for task in tasks(0, 8, is_held_out)]
        tools = [example(0, number).conversation.tools for number in numbers]
        names.append({tool.name for offered in tools for tool in offered})
    assert not names[0] & names[1]


ODD = (
    Action(""),
    Action("x" * 30_000),
    call("nothing"),
    call("python"),
    call("python", code=1),
    call("python", code="print('x' * 10**6)"),
    call("python", code="print('\\x00\\ud800' * 10**4)"),
    call("python", code="1" * 100_000),
    call("bash", code="head -c 100000 /dev/zero"),
    call("bash", code="kill -9 $$"),
    call("sql", query="SELECT hex(zeroblob(100000))"),
    call("sql", query=";"),
    Action("", tuple(Call("python", {"code": "print('x' * 10**5)"}) for _ in range(40))),
    Action("", tuple(Call("nothing", {"y" * 500: 10**600}) for _ in range(400))),
    Action("```python\nimport os; os._exit(0)\n```"),
    Action("```sql\nSELECT 1", cut="tokens"),
    Action("<tool_call>", cut="no turn"),
)


@sandboxed
@pytest.mark.parametrize("name", [*TASKS])
def test_no_turn_of_a_model_leaves_its_conversation_without_a_verdict(name: str):
    """Finds an action by which a policy avoids a bad reward: one that the environment counts as its own failure."""

    async def conversations() -> None:
        async with Host(name, LIMITS) as host:

            async def play_to_end(action: Action) -> None:
                episode = host.episode(Task.of("0", TASKS[name]))
                step = await episode.reset()
                while not step.done:
                    step = await episode.step(action)
                assert step.verdict
                assert step.verdict.valid, (action, step.verdict)

            await asyncio.gather(*map(play_to_end, ODD))

    asyncio.run(conversations())


@sandboxed
@pytest.mark.heavy
def test_calls_that_sleep_leave_the_conversation_its_verdict():
    """Finds a policy that escapes a bad reward by calls that use all seconds of the conversation."""
    # What a machine under load takes besides is far less than a turn.
    limits = Limits(turns=4, seconds_a_step=patient(2.0), seconds=patient(5.0))
    sleeping = Action("", (Call("bash", {"code": "sleep 600"}),) * 2)

    async def conversation() -> list[Step]:
        async with Host("bash", limits) as host:
            episode = host.episode(Task.of("0", TASKS["bash"]))
            steps = [await episode.reset()]
            while not steps[-1].done:
                steps.append(await episode.step(sleeping))
            return steps

    steps = asyncio.run(conversation())
    assert reward(steps) == 0.0, steps[-1]
    assert results(steps[-2])[-1] == {"error": "not run: no time is left"}


@sandboxed
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("python", {"answer": ""}, "`answer` is empty"),
        ("python", {"answer": None}, "`answer`: expected"),
        ("bash", {"files": {"/none/a": "x"}}, "cannot be written"),
        ("bash", {"prompt": ""}, "prompt is empty"),
        ("code_repair", {"tests": []}, "tests"),
        ("code_repair", {"attempts": 0}, "`attempts` is 0"),
        ("sql", {"query": "SELECT nothing FROM t"}, "fails on its database"),
        ("sql", {"query": "SELECT a FROM t WHERE a < 0"}, "gives no rows"),
        ("sql", {"tables": {"t": 1}}, "`tables`"),
        ("tools", {"seed": "1"}, "`seed`: expected"),
    ],
)
def test_a_task_of_another_form_is_refused_by_name(name: str, change: dict[str, Any], message: str):
    """Finds a broken row that counts as a failure of the model."""
    [step] = play(name, [], TASKS[name] | change)
    assert step.verdict
    assert step.verdict.failure_reason == "refused"
    assert message in step.verdict.detail
