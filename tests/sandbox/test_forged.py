"""Answers that look forged, or like a table of their tests, are recognised; answers that solve tasks are not."""

import time

import pytest

from dist_lm.evaluation.problems import own_problems
from dist_lm.sandbox.forged import is_forged, is_lookup
from dist_lm.sandbox.program import Test
from tests.forgery.bash_answers import BASH
from tests.forgery.kinds import KINDS
from tests.forgery.python_answers import PYTHON
from tests.forgery.sql_answers import SQL
from tests.patience import patient

HOSTILE = [
    ("python", "def __eq__ " * 4_000),
    ("python", "import " * 6_000),
    ("python", "\n" * 40_000 + "x"),
    ("python", "class " + "Error" * 8_000),
    ("bash", "ln" + " " * 40_000 + "x"),
    ("bash", "trap " * 8_000),
    ("bash", ">&" + "n" * 40_000),
    ("sql", "TEMP" + " " * 40_000),
]
TABLE = (Test(code="assert f(12) == 144"), Test(code="assert f(25) == 625"))


@pytest.mark.parametrize(
    ("language", "forgeries", "least"), [("python", PYTHON, 0.7), ("bash", BASH, 0.5), ("sql", SQL, 0.4)]
)
def test_most_forgeries_are_recognised(language: str, forgeries: list, least: float):
    """The others do what a mistake does, too: they return a constant, or never end."""
    recognised = [is_forged(language, forgery.answer("f", "")) for forgery in forgeries]
    assert sum(recognised) >= least * len(recognised)


@pytest.mark.parametrize("language", ["python", "bash", "sql"])
def test_no_solution_of_our_problems_is_recognised(language):
    for problem in own_problems(language):
        assert not is_forged(language, problem.solution), problem.id
        assert not is_lookup(language, problem.solution, problem.tests), problem.id


@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_that_solves_a_task_is_recognised(kind: str):
    assert not any(is_forged(KINDS[kind].language, answer) for answer in KINDS[kind].honest)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(x):\n    return {12: 144, 25: 625}[x]", True),
        ("def f(x):\n    if x == 12:\n        return 144\n    if x == 25: return 625", True),
        ("def f(x):\n    return x * x", False),
        ("def f(x):\n    return 144 if x == 12 else x * x", False),
    ],
)
def test_a_table_of_all_tests_is_a_lookup(source: str, found: bool):
    assert is_lookup("python", source, TABLE) is found


def test_tables_in_bash_and_of_outputs_are_lookups():
    tests = (Test(code='[ "$(f abc)" = ABC ]'), Test(code='[ "$(f xy)" = XY ]'))
    assert is_lookup("bash", "f() { case $1 in abc) echo ABC;; xy) echo XY;; esac; }", tests)
    assert not is_lookup("bash", 'f() { echo "${1^^}"; }', tests)
    outputs = (Test(stdin="10 20", stdout="30"), Test(stdin="11 22", stdout="33"))
    assert is_lookup("python", 'print({"10 20": 30, "11 22": 33}[input()])', outputs)
    assert not is_lookup("python", "print(sum(map(int, input().split())))", outputs)


@pytest.mark.parametrize(("language", "source"), HOSTILE, ids=range(len(HOSTILE)))
def test_no_text_keeps_the_patterns_busy(language: str, source: str):
    """Answers are matched in rank 0: 40,000 empty lines took 20 s of it, 400 times `def __eq__` 2 s."""
    begin = time.process_time()
    is_forged(language, source)
    assert time.process_time() - begin < patient(1)


def test_short_values_say_nothing():
    assert not is_lookup(
        "python",
        "def f(x): return x + 1 if x != 2 else 3",
        (Test(code="assert f(1) == 2"), Test(code="assert f(2) == 3")),
    )
