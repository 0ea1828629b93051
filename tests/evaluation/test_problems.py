"""Problems: our references pass and their mutants fail, files of others are read in their published formats."""

import gzip
import json
import re
from concurrent.futures import Future
from dataclasses import replace

import pytest

from dist_lm.errors import ConfigError
from dist_lm.evaluation.problems import Problem, humaneval, mbpp, multipl_e, own_infills, own_problems
from dist_lm.sandbox.hidden import References
from dist_lm.sandbox.pool import SandboxPool
from dist_lm.sandbox.program import LANGUAGES, Limits, Verdict
from tests.evaluation.same_programs import SAME_PROGRAMS, TOLD_APART

LIMITS = Limits(cpu_s=10, wall_s=120)
SWAPS = (
    *(("+", "-"), ("-", "+"), ("<", ">="), (">", "<="), ("==", "!="), ("max", "min"), ("min", "max"), ("MAX", "MIN")),
    *(("SUM", "COUNT"), ("COUNT", "SUM"), (" DESC", ""), ("ORDER BY ", "ORDER BY -"), ("1", "2"), ("0", "1")),
    *(("2", "3"), ("[", "list(["), ("name", "id"), ("age", "id"), ("* ", "+ "), ("$1", "$2"), ("echo", "printf")),
    *(("AVG", "MIN"), ("MIN", "MAX"), ("sort", "cat"), ("-n", "-c"), ("'%Y'", "'%m'"), ("day", "id"), ("price", "id")),
)


def test_there_are_150_problems_from_easy_to_hard():
    for language in LANGUAGES:
        problems = own_problems(language)
        levels = [problem.level for problem in problems]
        assert len({problem.id for problem in problems}) == 50
        assert levels == sorted(levels)
        assert {*levels} == {1, 2, 3, 4, 5}
        assert levels.count(1) >= 12
        for problem in problems:
            assert problem.solution not in problem.prompt
            assert len(problem.tests) >= 2 or problem.id == "bash/hello"


def mutants(problem: Problem) -> list[str]:
    """The solution with one piece of it changed, or without a line of it, and one that does nothing."""
    found = []
    for old, new in SWAPS:
        for place in [match.start() for match in re.finditer(re.escape(old), problem.solution)][:2]:
            found.append(problem.solution[:place] + new + problem.solution[place + len(old) :])
    lines = problem.solution.splitlines(keepends=True)
    if len(lines) > 2:
        found += ["".join(lines[:n] + lines[n + 1 :]) for n in range(len(lines) - 1)]
    nothing = {"python": "    pass\n", "bash": "  :\n}\n", "sql": " 1;\n"}[problem.language]
    return [*dict.fromkeys(found), nothing]


def check(problems: list[Problem], most_mutants: int, key: int | None = None) -> set[tuple[str, str]]:
    """References must pass. Returns the mutants that pass: (problem, change as `change_of` names it).

    Args:
        key: of hidden tests, which then run too.
    """
    tried = [(problem, mutant) for problem in problems for mutant in mutants(problem)[-most_mutants:]]
    references = References()

    def submitted(pool: SandboxPool, problem: Problem, code: str) -> Future[Verdict]:
        program = replace(problem, closing="").completed(code)
        if key is None or problem.hidden is None:
            return pool.submit(program, LIMITS)
        return references.submit(program, problem.hidden, key, pool, LIMITS)

    with SandboxPool(workers=2) as pool:
        right = [submitted(pool, problem, problem.solution) for problem in problems]
        wrong = [submitted(pool, problem, mutant) for problem, mutant in tried]
        right, wrong = ([verdict.result() for verdict in verdicts] for verdicts in (right, wrong))
    assert [one.id for one, verdict in zip(problems, right, strict=True) if verdict.outcome != "passed"] == []
    passed = [one for one, verdict in zip(tried, wrong, strict=True) if verdict.outcome == "passed"]
    print(f"{len(tried) - len(passed)} of {len(tried)} mutants fail")
    return {(problem.id, change_of(problem.solution, mutant)) for problem, mutant in passed}


def change_of(solution: str, mutant: str) -> str:
    """The changed line, or `without LINE`."""
    before, after = solution.splitlines(), mutant.splitlines()
    if len(after) < len(before):
        return f"without {next(one for one, two in zip(before, [*after, ''], strict=False) if one != two).strip()}"
    return next(two for one, two in zip(before, after, strict=True) if one != two).strip()


@pytest.mark.parametrize("language", LANGUAGES)
def test_references_pass_and_programs_that_do_nothing_fail(language):
    assert check(own_problems(language)[:: 1 if language == "sql" else 2], most_mutants=1) == set()


@pytest.mark.bars
@pytest.mark.parametrize("language", LANGUAGES)
def test_mutants_of_references_fail(language):
    known = {(name, line) for name, line in SAME_PROGRAMS if name.startswith(f"{language}/")}
    assert check(own_problems(language), 100) == known
    # Hidden tests allow every right answer, so what does the same must pass still.
    assert check(own_problems(language), 100, key=11) == known - TOLD_APART


def test_lines_to_fill_in_make_the_reference():
    problems = own_infills()
    whole = {problem.id: problem.prompt + problem.solution for problem in own_problems("python")}
    assert len(problems) > 12
    for problem in problems:
        assert problem.completed(problem.solution).source == whole[problem.id.replace("infill/", "python/")]
        assert problem.solution
        assert "\n" not in problem.solution


def test_a_completion_is_cut_where_the_function_ends():
    bash, sql, python = own_problems("bash")[3], own_problems("sql")[0], own_problems("python")[0]
    assert bash.completed("  echo $(($1 + $2))").source.endswith("  echo $(($1 + $2))\n}\n")
    assert bash.completed("  echo", stopped=False).source.endswith("  echo")
    assert sql.completed(" name FROM items").source.endswith("SELECT name FROM items;\n")
    assert "\ndef " in python.stop


@pytest.mark.parametrize(
    ("answer", "source"),
    [
        ("Sure:\n```python\nimport os\ndef add(a, b): pass\n```\nDone", "import os\ndef add(a, b): pass\n"),
        ("def add(a, b): return a + b", "def add(a, b): return a + b"),
        ("``` python\ndef add(a, b): pass\n```\nDone.", "def add(a, b): pass\n"),
        ("```\n    return a + b\n```", 'def add(a, b):\n    """Return the sum of a and b."""\n    return a + b\n'),
        ("```python\ndef add(a, b):\n  return 1", "def add(a, b):\n  return 1"),
    ],
)
def test_the_program_of_a_chat_model_is_its_block_of_code(answer, source):
    assert own_problems("python")[0].answered(answer).source == source


LEFT_OUT = (  # of the given program, by answers of chat models
    ("bash", "echo 'Hello, world!'", "passed"),
    ("bash", "  echo 'Hello, world!'\n}", "passed"),
    ("bash", "function hello {\n  echo 'Hello, world!'\n}", "passed"),
    ("bash", "hello () { echo 'Hello, world!'; }", "passed"),
    ("bash", "echo Hello", "failed"),
    ("sql", "select name from items order by id", "passed"),
    ("sql", "name FROM items ORDER BY id;", "passed"),
    ("sql", "SELECT id FROM items;", "failed"),
)


def test_a_chat_model_may_leave_out_what_it_was_given():
    programs = [own_problems(language)[0].answered(f"```{language}\n{code}\n```") for language, code, _ in LEFT_OUT]
    with SandboxPool() as pool:
        verdicts = pool.run(programs, LIMITS)
    assert [verdict.outcome for verdict in verdicts] == [outcome for _, _, outcome in LEFT_OUT]


HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef inc(x: int) -> int:\n    """ Add one\n    """\n',
    "entry_point": "inc",
    "canonical_solution": "    return x + 1\n",
    "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(1) == 2\n",
}
MBPP = {
    "task_id": 11,
    "text": "Write a function to remove the first 'a'.",
    "code": "def cut(s):\r\n  return s.replace('a', '', 1)",
    "test_setup_code": "import math",
    "test_list": ["assert cut('aba') == 'ba'", "assert math.pi > cut.__code__.co_argcount"],
    "challenge_test_list": [],
}
SANITIZED = {"task_id": 12, "prompt": MBPP["text"], "code": MBPP["code"], "test_imports": ["import math"]}
SANITIZED |= {"test_list": MBPP["test_list"], "source_file": "x.ipynb"}
MULTIPL_E = {
    "name": "HumanEval_0_inc",
    "language": "sh",
    "prompt": "#!/bin/bash\n# Add one\n#\n# $1 is an integer\ninc() {\n",
    "tests": '}\n\ncandidate() {\n    inc "$@"\n}\n\nset -e\n'
    'run_test() {\n    [[ $(candidate "1") = "2" ]]\n}\n\nrun_test',
    "stop_tokens": ["\n}"],
}


@pytest.mark.parametrize(
    ("read", "content", "solution", "wrong"),
    [
        (humaneval, [HUMANEVAL], "    return x + 1\n", "    return x\n"),
        (mbpp, [MBPP], "def cut(s):\n  return s.replace('a', '', 1)", "def cut(s):\n  return s"),
        (mbpp, SANITIZED, "def cut(s):\n  return s.replace('a', '', 1)", "def cut(s):\n  return s"),
        (multipl_e, [MULTIPL_E], "    echo $(($1 + 1))", "    echo $1"),
    ],
    ids=["humaneval", "mbpp", "sanitized mbpp", "multipl_e"],
)
def test_published_formats_are_read_and_judged(read, content, solution, wrong, tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text(json.dumps([content]) if isinstance(content, dict) else json.dumps(content[0]) + "\n")
    packed = tmp_path / "file.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    (problem,) = read(path)
    assert read(packed) == [problem]
    with SandboxPool(workers=1) as pool:
        right, *others = pool.run(
            [problem.completed(solution), problem.completed(wrong), problem.completed("")], LIMITS
        )
    assert right.outcome == "passed", right.output
    assert [one.outcome for one in others] == ["failed", "failed"]


@pytest.mark.parametrize("content", ["{}", "[1]", "not JSON", "", json.dumps(MULTIPL_E | {"language": "rs"})])
def test_another_file_is_refused_by_the_name_of_its_key(content, tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"eval\.multipl_e={path}"):
        multipl_e(path)
    with pytest.raises(ConfigError, match=r"eval\.humaneval=.*cannot be read"):
        humaneval(tmp_path / "gone")


def without(record: dict, field: str) -> dict:
    return {name: value for name, value in record.items() if name != field}


@pytest.mark.parametrize(
    ("read", "line", "named"),
    [
        (humaneval, without(HUMANEVAL, "test"), "not the published format: no field 'test'"),
        (humaneval, HUMANEVAL | {"test": ""}, "defines no function `check`"),
        (
            humaneval,
            HUMANEVAL | {"test": "def chek(candidate):\n    assert candidate(1) == 2\n"},
            "no function `check`",
        ),
        (humaneval, HUMANEVAL | {"test": "def check(candidate:\n    pass"}, "is no Python, so no program passes it"),
        (humaneval, HUMANEVAL | {"entry_point": "dec"}, "entry_point is dec"),
        (humaneval, HUMANEVAL, "HumanEval/0 occurs twice"),
        (mbpp, MBPP | {"test_list": []}, "test_list is empty, so every program would pass"),
        (mbpp, MBPP | {"test_list": ["assert cut("]}, "is no Python"),
        (multipl_e, MULTIPL_E | {"tests": "}\n"}, "it has no tests, so every program would pass"),
        (multipl_e, MULTIPL_E | {"tests": "}\ncandidate() {"}, "is no Bash, so no program passes it"),
    ],
)
def test_a_problem_that_cannot_be_judged_is_refused_by_its_line(read, line, named, tmp_path):
    path = tmp_path / "f.jsonl"
    good = {humaneval: HUMANEVAL, mbpp: MBPP, multipl_e: MULTIPL_E}[read]
    path.write_text(json.dumps(good) + "\n\n" + json.dumps(line))
    with pytest.raises(ConfigError, match=rf"eval\.{read.__name__}={path} line 3: .*{named}"):
        read(path)


def test_a_cut_file_is_refused_by_its_line(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(HUMANEVAL) + "\n" + json.dumps(HUMANEVAL)[:50])
    with pytest.raises(ConfigError, match=r"f\.jsonl line 2: not the published format \(JSONDecodeError"):
        humaneval(path)
    packed = tmp_path / "f.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes())[:-12])
    with pytest.raises(ConfigError, match=r"f\.jsonl\.gz: not the published format"):
        humaneval(packed)


def test_a_line_may_hold_any_character(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(HUMANEVAL | {"prompt": HUMANEVAL["prompt"] + "# a\u2028b\n"}, ensure_ascii=False))
    (problem,) = humaneval(path)
    assert problem.prompt.endswith("# a\u2028b\n")
