"""Hidden tests: drawn from a key alone, one run of the reference for all answers, and no secret of order or threads."""

import random
import shutil
from collections.abc import Callable
from concurrent.futures import CancelledError, Future

import pytest

from dist_lm.errors import UserError
from dist_lm.sandbox.hidden import Case, Hidden, References, ReferenceSolutionError
from dist_lm.sandbox.inputs import hidden_of
from dist_lm.sandbox.pool import SandboxPool
from dist_lm.sandbox.program import Limits, Program, Test, Verdict, infrastructure_error
from dist_lm.sandbox.task import task_of
from tests.patience import patient

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
LIMITS = Limits(cpu_s=10, wall_s=120)
SUM = {"solution": "def f(x): return sum(x)", "call": "f", "arguments": [{"list": {"int": [0, 99]}, "length": [1, 5]}]}
NAMES = {
    "solution": "SELECT name FROM items WHERE price > 4",
    "tables": {
        "items": {
            "rows": [3, 6],
            "columns": {"name": {"one_of": ["ink", "it's", None]}, "price": {"int": [1, 9], "with": [5]}},
        }
    },
}
SHOUT = {
    "solution": 'f() { echo "${1^^} $2!"; }',
    "call": "f",
    "arguments": [{"words": ["a b", "it's", "$HOME", "\\n"], "length": [1, 3]}, {"int": [-9, 9]}],
}
RIGHT = {
    "python": (SUM, "def f(x):\n    return sum(sorted(x))", "def f(x): return x[0]"),
    "bash": (SHOUT, 'f() { printf \'%s %s!\\n\' "${1^^}" "$2"; }', 'f() { echo "$1 $2!"; }'),
    "sql": (NAMES, "SELECT name FROM items WHERE 4 < price", "SELECT name FROM items WHERE price > 5"),
}


def test_tests_depend_on_the_key_alone():
    """Found: a generator that goes on from the last draw, so that tests depend on what was asked before."""
    hidden = hidden_of("python", SUM)
    alone = {key: hidden.cases(key) for key in (1, 2, 3)}
    assert [hidden.cases(key) for key in (3, 1, 2)] == [alone[3], alone[1], alone[2]]
    assert alone[1] != alone[2]
    assert all(len({*cases}) == 3 for cases in alone.values())


def test_a_task_with_few_inputs_has_few_tests():
    hidden = hidden_of("python", SUM | {"arguments": [{"one_of": [1, 2]}]})
    assert len(hidden.cases(0)) == 2


@pytest.mark.parametrize("key", range(20))
def test_values_that_always_occur_do(key: int):
    (case, *_) = hidden_of("sql", NAMES).cases(key)
    assert ", 5)" in case.before
    assert 3 <= case.before.count("), (") + 1 <= 6


@needs_bubblewrap
@pytest.mark.parametrize("language", RIGHT)
def test_an_answer_passes_if_it_gives_what_the_reference_gives(language: str):
    field, right, wrong = RIGHT[language]
    hidden, references = hidden_of(language, field), References()
    easy = {"sql": Test(before="CREATE TABLE items(name, price)")}.get(language, Test())
    with SandboxPool(workers=2) as pool:
        verdicts = [
            references.submit(Program(language, source, (easy,)), hidden, 7, pool, LIMITS).result(patient(60))
            for source in (field["solution"], right, wrong)
        ]
    assert [verdict.outcome for verdict in verdicts] == ["passed", "passed", "failed"], verdicts
    assert [verdict.total for verdict in verdicts] == [4, 4, 4]


class Pool:
    """Sandboxes whose programs end when the test says so."""

    def __init__(self) -> None:
        self.programs: list[tuple[Program, Future[Verdict]]] = []

    def submit(self, program: Program, limits: Limits | None = None) -> Future[Verdict]:
        self.programs.append((program, Future()))
        return self.programs[-1][1]

    def end(self, index: int, outcome: str = "passed", stdout: str = "3") -> None:
        program, verdict = self.programs[index]
        count = len(program.tests)
        passed = (outcome == "passed",) * count
        verdict.set_result(Verdict(outcome, passed, (stdout,) * count, "its output", 0.0, 0.0))  # pyright: ignore

    def __enter__(self):
        return self

    def __exit__(self, *_exception: object) -> None: ...


def asked(references: References, pool: Pool, key: int = 1, source: str = "def f(x): return 3") -> Future[Verdict]:
    return references.submit(Program("python", source), hidden_of("python", SUM), key, pool, LIMITS)


def test_the_reference_runs_once_for_all_answers_to_a_key():
    """Found: a run of the reference for each answer, or an answer that waits for nothing and has no hidden tests."""
    references, pool = References(), Pool()
    answers = [asked(references, pool, source=f"def f(x): return {n}") for n in range(3)]
    assert len(pool.programs) == 1  # the reference
    pool.end(0)
    assert len(pool.programs) == 4
    late = asked(references, pool, source="def f(x): return 4")
    other = asked(references, pool, key=2)
    assert len(pool.programs) == 6  # the late answer at once, and the reference of the other key
    tests = {program.tests for program, _ in pool.programs[1:5]}
    assert len(tests) == 1
    assert [test.code.partition(" == ")[2] for test in tests.pop()] == ["", "3", "3", "3"]
    for index in range(1, 5):
        pool.end(index)
    assert all(answer.result(0).outcome == "passed" for answer in (*answers, late))
    assert not other.done()


def test_no_program_of_an_answer_has_the_reference_or_the_expected_values():
    references, pool = References(), Pool()
    asked(references, pool)
    pool.end(0, stdout="77")
    program, _ = pool.programs[1]
    assert program.source == "def f(x): return 3"
    assert all("77" not in test.before + test.stdin for test in program.tests)


def test_a_sandbox_that_failed_on_the_reference_says_nothing_and_is_asked_again():
    references, pool = References(), Pool()
    first = asked(references, pool)
    pool.programs[0][1].set_result(infrastructure_error(pool.programs[0][0], "no core"))
    assert first.result(0).outcome == "infrastructure"
    assert "no core" in first.result(0).output
    again = asked(references, pool)
    assert len(pool.programs) == 2
    pool.end(1)
    pool.end(2)
    assert again.result(0).outcome == "passed"


@pytest.mark.parametrize(
    ("end", "error", "named"),
    [
        (lambda pool: pool.end(0, "failed"), ReferenceSolutionError, r"fails \(failed\) on .*f\(\[.*its output"),
        (lambda pool: pool.end(0, stdout="<object f>"), ReferenceSolutionError, "expected numbers, texts, None"),
        (lambda pool: pool.programs[0][1].set_exception(OSError("node lost")), OSError, "node lost"),
        (lambda pool: pool.programs[0][1].cancel(), CancelledError, None),
    ],
)
def test_an_error_of_the_reference_is_that_of_the_answer(
    end: Callable[[Pool], object], error: type[Exception], named: str | None
):
    """Found: an answer whose verdict never comes, because the error was raised in a thread that nobody reads."""
    references, pool = References(), Pool()
    answer = asked(references, pool)
    end(pool)
    with pytest.raises(error, match=named):
        answer.result(patient(1))


@needs_bubblewrap
def test_sandboxes_that_are_closed_leave_no_answer_waiting():
    references = References()
    with SandboxPool(workers=1) as pool:
        slow = Hidden("python", "def f():\n    while True: pass", lambda rng: Case(f"f({rng.random()})"))
        answers = [references.submit(Program("python", "x"), slow, key, pool, LIMITS) for key in range(3)]
        pool.submit(Program("python", "x")).cancel()
        for answer in answers[1:]:
            assert not answer.done()
    for answer in answers:
        with pytest.raises((CancelledError, ReferenceSolutionError)):
            answer.result(patient(60))


@pytest.mark.parametrize(
    ("language", "change", "named"),
    [
        ("python", {"solution": ""}, "expected solution"),
        ("python", {"call": "f(1)"}, r"call is 'f\(1\)'"),
        ("python", {"arguments": {"int": [1, 2]}}, "expected arguments, a list"),
        ("python", {"arguments": [{"int": [2, 1]}]}, r"int is \[2, 1\]; expected \[LOW, HIGH\]"),
        ("python", {"arguments": [{"int": [1, 2], "float": []}]}, "unknown float"),
        ("python", {"arguments": [{"int": [1, 2], "words": []}]}, "one of int, one_of, words and list"),
        ("python", {"arguments": [{"words": ["a"], "length": [0, 9**9]}]}, "expected at most 1000"),
        ("python", {"arguments": [{"one_of": []}]}, "expected a list of plain values"),
        ("python", {"arguments": [{"words": [1], "length": [1, 2]}]}, "expected texts"),
        ("python", {"arguments": [{"list": {"int": [1, 2], "with": [[]]}, "length": [1, 2]}]}, "with is"),
        ("python", {"tests": 0}, "tests is 0"),
        ("python", {"tables": {}}, "unknown tables"),
        ("bash", {"arguments": [{"list": {"int": [1, 2]}, "length": [1, 2]}]}, "no argument in Bash"),
        ("sql", {"tables": {}}, "expected tables"),
        ("sql", {"tables": {"t; DROP": {"rows": [1, 2], "columns": {"a": {"int": [1, 2]}}}}}, "expected rows and"),
        ("sql", {"tables": {"t": {"rows": [0, 2], "columns": {"a": {"int": [1, 2]}}}}}, r"t\.rows is \[0, 2\]"),
    ],
)
def test_a_wrong_description_is_refused_by_its_part(language: str, change: dict, named: str):
    field = {"python": SUM, "bash": SHOUT, "sql": NAMES}[language] | change
    with pytest.raises(UserError, match=f"`hidden`.*{named}"):
        task_of({"language": language, "tests": ["SELECT 1" if language == "sql" else "f"], "hidden": field})


def test_lines_without_the_field_have_no_hidden_tests():
    assert task_of({"language": "python", "tests": ["assert f"], "solution": 1, "inputs": 2}).hidden is None


def test_equal_fields_are_equal_tasks():
    line = {"language": "python", "tests": ["assert f"], "hidden": SUM}
    assert task_of(line) == task_of(dict(line))
    assert task_of(line) != task_of(line | {"hidden": SUM | {"tests": 4}})


def test_words_and_lists_have_the_lengths_asked_for():
    rng = random.Random(0)
    hidden = hidden_of("bash", SHOUT)
    shown = [hidden.draw(rng).shown for _ in range(50)]
    assert all(text.startswith("f ") for text in shown)
    assert len({*shown}) > 20
