"""Inputs of hidden tests of our own problems: pure functions of a key, unknown to an answer that learned other ones."""

import hashlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest

from dist_lm.config.evaluation import OWN_TESTS
from dist_lm.evaluation.problem_inputs import BASH, PYTHON
from dist_lm.evaluation.problems import Problem, own_infills, own_problems
from dist_lm.sandbox.hidden import Hidden, References
from dist_lm.sandbox.pool import SandboxPool
from dist_lm.sandbox.program import LANGUAGES, Limits, Program, Test, Verdict
from tests.patience import patient

LIMITS = Limits(cpu_s=10, wall_s=120)
KEYS = range(20)
SAME = "541be0243a9b"  # of `hash_of_inputs`
# Their tests look at files that the function made, which no table of what it prints makes.
MAKE_FILES = ("bash/make_folders", "bash/copy", "bash/rename", "bash/rename_all")


def with_inputs() -> list[Problem]:
    return [problem for language in LANGUAGES for problem in own_problems(language) if problem.hidden]


def draws(problem: Problem) -> Hidden:
    assert problem.hidden
    return problem.hidden


def hash_of_inputs() -> str:
    """Of all problems, the last first."""
    inputs = [(problem.id, draws(problem).cases(key)) for problem in with_inputs()[::-1] for key in (3, 2**63)]
    return hashlib.sha256(repr(sorted(inputs, key=str)).encode()).hexdigest()


def test_all_problems_but_one_have_inputs():
    assert len(with_inputs()) == 149
    assert {problem.id.partition("/")[2] for problem in own_problems("python")} == {*PYTHON}
    assert {problem.id.partition("/")[2] for problem in own_problems("bash")} == {*BASH, "hello"}
    assert all(problem.hidden for problem in own_infills())


@pytest.mark.heavy
def test_inputs_depend_on_the_key_alone():
    """Found: draws from a set, whose order differs between processes, or from a generator that others use too."""
    code = "from tests.evaluation.test_problem_inputs import hash_of_inputs; print(hash_of_inputs())"
    there = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env={"PYTHONHASHSEED": "5"}
    )
    assert there.stdout.strip() == hash_of_inputs()


def test_other_inputs_are_another_version():
    """If this fails because you changed a generator: raise `OWN_TESTS`, else results of both seem to be comparable."""
    assert (OWN_TESTS, hash_of_inputs()[:12]) == (2, SAME)


@pytest.mark.parametrize("problem", with_inputs(), ids=lambda problem: problem.id)
def test_keys_give_different_tests(problem: Problem):
    drawn = [frozenset(draws(problem).cases(key)) for key in KEYS]
    assert len({*drawn}) == len(drawn)
    assert {len(cases) for cases in drawn} == {draws(problem).count}


# --- in the sandbox ---

in_sandbox = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")


def completed(problem: Problem, tests: Sequence[Test]) -> Program:
    """The reference, with these tests."""
    return replace(problem, closing="", tests=tuple(tests)).completed(problem.solution)


def check_references(problems: Sequence[Problem], keys: Sequence[int]) -> None:
    """References pass their hidden tests, end without an error, and print nothing to stderr."""
    references = References()
    with SandboxPool(workers=2) as pool:
        asked = [
            (problem, key, references.submit(completed(problem, problem.tests[:1]), draws(problem), key, pool, LIMITS))
            for problem in problems
            for key in keys
        ]
        failed = [
            (problem.id, key, verdict.output)
            for problem, key, future in asked
            if (verdict := future.result(patient(600))).outcome != "passed"
        ]
    assert failed == []
    printed = [run.result() for _, run in references._runs.values()]
    assert [verdict.output for verdict in printed if verdict.output != verdict.stdout[-1][-2000:]] == []


@in_sandbox
def test_some_references_pass():
    check_references(with_inputs()[::12], KEYS[:1])


@in_sandbox
@pytest.mark.bars  # test_some_references_pass takes every twelfth
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("language", LANGUAGES)
def test_all_references_pass(language):
    check_references([problem for problem in own_problems(language) if problem.hidden], KEYS)


# A function of Bash that prints, in hexadecimal, what a function sees: arguments, files that they name, and input.
SEEN = """{
    printf '%s\\n' "$*"
    for name in "$@"; do
      if [ -f "$name" ]; then cat "$name"; fi
      if [ -d "$name" ]; then echo folder; (cd "$name" && wc -c *); fi
    done
    cat
  } 2> /dev/null | od -An -tx1 | tr -d ' \\n'"""


def outputs_of(pool: SandboxPool, problem: Problem, key: int, solution: str = "") -> tuple[str, ...]:
    """What the reference, or another program, gives for the inputs of a key."""
    hidden = draws(problem)
    if solution:
        hidden = replace(hidden, solution=solution)
    verdict = pool.submit(hidden.reference(hidden.cases(key)), LIMITS).result(patient(600))
    assert verdict.outcome == "passed", verdict
    return verdict.stdout


def table_of(pool: SandboxPool, problem: Problem, key: int) -> str:
    """An answer that gives what the reference gave for the inputs of a key, and nothing for others."""
    name, cases = problem.id.partition("/")[2], draws(problem).cases(key)
    outputs = [output.rstrip("\n") for output in outputs_of(pool, problem, key)]
    if problem.language == "python":
        values = [output.rpartition("\n")[2] for output in outputs]
        arguments = [case.shown.removeprefix(f"{name}(").removesuffix(")") for case in cases]
        pairs = [f"repr(({each},)): {value}" for each, value in zip(arguments, values, strict=True)]
        return f"def {name}(*given):\n    return {{{', '.join(pairs)}}}[repr(given)]\n"

    if problem.language == "bash":
        seen = outputs_of(pool, problem, key, f"{name}() {{\n  {SEEN}\n}}")
        branches = [f"  {each}) echo {shlex.quote(value)} ;;\n" for each, value in zip(seen, outputs, strict=True)]
        return f"{name}() {{\n  local seen; seen=$({SEEN})\n  case $seen in\n{''.join(branches)}  esac\n}}\n"

    # The ids of the first table tell which database it is.
    queries = ["SELECT NULL WHERE 0"]
    for case, output in zip(cases, outputs, strict=True):
        [(table, ids)] = [
            (table, ",".join(re.findall(r"\((\d+),", rows)))
            for table, rows in re.findall(r"INSERT INTO (\w+) VALUES (.*);", case.before)[:1]
        ]
        known = f"(SELECT group_concat(id) FROM {table}) = '{ids}'"
        queries += [f"SELECT '{row}' WHERE {known}" for row in output.split("\n")]
    return "\nUNION ALL ".join(queries) + ";"


def verdict_on(pool: SandboxPool, problem: Problem, source: str, key: int) -> Verdict:
    """The verdict on a program by the hidden tests of a key alone."""
    tests = draws(problem).tests(draws(problem).cases(key), outputs_of(pool, problem, key))
    return pool.submit(Program(problem.language, source, tests), LIMITS).result(patient(600))


def check_tables(problems: Sequence[Problem]) -> None:
    """An answer that learned the tests of key 1 passes these, and no more those of key 2."""
    with SandboxPool(workers=2) as pool:
        tables = {problem.id: table_of(pool, problem, 1) for problem in problems}
        learned = {one.id: verdict_on(pool, one, tables[one.id], 1) for one in problems if one.id not in MAKE_FILES}
        others = {one.id: verdict_on(pool, one, tables[one.id], 2) for one in problems}
    assert {name: verdict.output for name, verdict in learned.items() if verdict.outcome != "passed"} == {}
    assert {name: tables[name] for name, verdict in others.items() if verdict.outcome != "failed"} == {}


@in_sandbox
def test_some_tables_of_learned_tests_fail_others():
    check_tables(with_inputs()[5::15])


@in_sandbox
@pytest.mark.bars  # test_some_tables_of_learned_tests_fail_others takes some
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("language", LANGUAGES)
def test_all_tables_of_learned_tests_fail_others(language):
    check_tables([problem for problem in own_problems(language) if problem.hidden])
