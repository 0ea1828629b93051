"""The ladder: solutions pass, solutions of other tasks do not, and no task is in two parts."""

import ast
import json
import re
import shutil

import pytest

from dist_lm.data.prompts import find_prompts, read_prompts
from dist_lm.demo.ladder import PYTHON, RUNGS, SIZES, Rung, TinyTask, part_of, tasks, write
from dist_lm.sandbox.hidden import References
from dist_lm.sandbox.pool import SandboxPool
from dist_lm.sandbox.program import Limits
from dist_lm.sandbox.task import task_of
from tests.patience import patient

LIMITS = Limits(cpu_s=5, wall_s=60)


def sibling(task: TinyTask) -> str:
    """The solution with its last number one higher: that of another task."""
    return re.sub(r"\d+(?=\D*$)", lambda number: str(int(number[0]) + 1), task.solution)


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
def test_solutions_pass_and_those_of_other_numbers_fail():
    made = list(tasks(7, "solved", len(RUNGS)))
    assert len(made) == len(RUNGS)
    with SandboxPool(workers=2) as pool:
        right, wrong = (
            pool.run([task_of(task.fields).program(answer(task)) for task in made], LIMITS)
            for answer in (lambda task: task.solution, sibling)
        )
    assert [(task.prompt, one.output) for task, one in zip(made, right, strict=True) if one.outcome != "passed"] == []
    assert [
        (task.prompt, sibling(task)) for task, one in zip(made, wrong, strict=True) if one.outcome != "failed"
    ] == []


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
def test_solutions_pass_their_drawn_tests():
    """Found: inputs for which the solution of a rung fails, or gives a value that it does not give again."""
    references = References()
    with SandboxPool(workers=2) as pool:
        verdicts = []
        for solved in tasks(7, "solved", len(RUNGS)):
            task = task_of(solved.fields)
            assert task.hidden
            verdicts.append(references.submit(task.program(solved.solution), task.hidden, 5, pool, LIMITS))
        results = [verdict.result(patient(120)) for verdict in verdicts]
    assert [verdict.output for verdict in results if verdict.outcome != "passed"] == []
    assert {verdict.total for verdict in results} == {5}


def test_no_task_draws_only_inputs_that_it_has_drawn_before():
    for task in tasks(7, "solved", len(RUNGS)):
        hidden = task_of(task.fields).hidden
        assert hidden
        assert not {*hidden.cases(1)} <= {*hidden.cases(0)}, task.prompt


@pytest.mark.parametrize("key", range(5))
def test_drawn_values_of_python_are_those_computed_beside_the_solution(key: int):
    """Found: a solution and a value of a rung that differ where the fixed tests have no input."""
    for index, task in enumerate(tasks(7, "solved", len(PYTHON))):
        hidden, rung = task_of(task.fields).hidden, PYTHON[index]
        assert hidden
        a, b = numbers_of(task, rung)
        for case in hidden.cases(key):
            argument = ast.literal_eval(case.shown.removeprefix("f(").removesuffix(")"))
            names: dict = {"x": argument}
            assert eval(rung.solution.format(a=a, b=b), names) == rung.value(argument, a, b), task.prompt


def numbers_of(task: TinyTask, rung: Rung) -> tuple[int, int]:
    """The numbers that a rung had for a task; any where it has only one."""
    for a in range(2, rung.most + 1):
        for b in range(2, rung.most + 1):
            if task.prompt.endswith(": " + rung.asks.format(a=a, b=b)):
                return a, b
    raise AssertionError(task.prompt)


def test_parts_share_no_task_and_climb_from_level_1_to_5():
    found = {part: list(tasks(3, part, 300)) for part in SIZES}
    assert found["train"] == list(tasks(3, "train", 300))
    assert found["train"] != list(tasks(4, "train", 300))
    prompts = {part: {task.prompt for task in made} for part, made in found.items()}
    assert sum(map(len, prompts.values())) == sum(map(len, found.values())) == len(set().union(*prompts.values()))
    for part, made in found.items():
        assert {part_of(task.prompt) for task in made} == {part}
        assert {task.level for task in made} == {1, 2, 3, 4, 5}
        assert {task.language for task in made} == {"python", "bash", "sql"}


def test_files_are_read_as_prompts_with_tests(tmp_path):
    write(tmp_path, sizes={"solved": 30, "train": 30, "held_out": 30})
    for part in ("train", "held_out"):
        read = list(read_prompts(find_prompts(str(tmp_path / f"{part}.jsonl"))))
        assert [one.text for one in read] == [task.prompt for task in tasks(0, part, 30)]
        assert all(len(task_of(one.extra).tests) == 2 for one in read)
    lines = [json.loads(line) for line in (tmp_path / "solved.jsonl").read_bytes().splitlines()]
    asked, answered = zip(*[[turn["content"] for turn in line["messages"]] for line in lines], strict=True)
    assert [*zip(asked, answered, strict=True)] == [(one.prompt, one.solution) for one in tasks(0, "solved", 30)]
