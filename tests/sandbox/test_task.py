"""Tasks with tests, as lines of a file, and the code of an answer."""

import time

import pytest

from dist_lm.errors import UserError
from dist_lm.sandbox import task
from dist_lm.sandbox.program import Test
from dist_lm.sandbox.task import Task, code_of, task_of
from tests.patience import patient

DOCSTRING = 'def f():\n    """Doc.\n\n    ```python\n    f()\n    ```\n    """\n'


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1", "x = 1"),
        ("Here:\n```python\nx = 1\n```\nand\n```\ny\n```", "x = 1\n"),
        ("```\nx = 1\nprint(x)", "x = 1\nprint(x)"),
        ("`x`", "`x`"),
        ("```bash\necho '```'\n```", "echo '```'\n"),
        ("``` python\nx = 1\n```\nDone.", "x = 1\n"),
        ('```python\ndef f():\n    """\n    ```\n    """\n```\n', 'def f():\n    """\n    ```\n    """\n'),
        ("1. So:\n   ```python\n   if x:\n       y\n   ```\n2. Done", "if x:\n    y\n"),
        ("- So:\n\n    ```\n    x\n\n  y\n```\nDone", "x\n\ny\n"),
        ("````python\nx\n```\ny\n````\nDone", "x\n```\ny\n"),
        (DOCSTRING, DOCSTRING),
        ("```x``` is code:\n```\nx\n```", "x\n"),
    ],
)
def test_code_is_the_first_fenced_block_or_all(answer: str, code: str):
    assert code_of(answer) == code


def test_many_blocks_are_read_in_one_pass():
    """Each block that is text looked for the list around it from the beginning: 6,000 took 16 s of rank 0."""
    begin = time.process_time()
    assert code_of("    ```\n    ```\n" * 6_000)
    assert time.process_time() - begin < patient(1)


def test_fields_of_a_line_become_a_task():
    fields = {
        "language": "sql",
        "before": "create table t (a);",
        "tests": ["select 1", {"before": "select 2", "stdout": "1"}],
    }
    assert task_of(fields) == Task(
        "sql",
        (
            Test(before="create table t (a);\n", code="select 1"),
            Test(before="create table t (a);\nselect 2", stdout="1"),
        ),
    )


NO_PYTHON = {
    "return f(1) == 2": "'return' outside function",
    "await f()": "'await' outside function",
    "x = 1\nfrom __future__ import annotations": "beginning of the file",
    "break": "'break' outside loop",
    "nonlocal x": "nonlocal declaration",
}
NO_BASH = {"[ x = '\0' ]": "it has a NUL", "[ x = '\ud800' ]": "surrogates not allowed"}
NO_SQL = {
    "SELECT 1; SELECT 1": "expected one statement, found 2",
    "-- nothing": "expected one statement, found 0",
    "QUERY PLAN SELECT 1": "syntax error",
    "SELECT '\ud800'": "surrogates not allowed",
}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tests": ["x"]}, "language is None; expected python, bash, sql"),
        ({"language": "python"}, "expected `tests`"),
        ({"language": "python", "tests": []}, "expected `tests`"),
        ({"language": "python", "tests": [1]}, "test 1: expected code"),
        ({"language": "python", "tests": [{"code": "x", "input": "y"}]}, "unknown input"),
        ({"language": "python", "tests": [{"stdin": "y"}]}, "expected `code` or `stdout`"),
        ({"language": "python", "tests": ["x"], "before": 1}, "`before` is no text"),
        ({"language": "python", "tests": ["f()", "assert f( =="]}, "test 'assert f\\( ==' is no Python.*line 1"),
        ({"language": "python", "tests": ["f()"], "before": "import"}, "is no Python, so no program passes it"),
        (
            {"language": "bash", "tests": ['[ "$(f)" = 1 ]', "if f; then"]},
            "test 'if f; then' is no Bash.*line 2: syntax error",
        ),
        ({"language": "bash", "tests": [{"stdout": "1"}], "before": "f() {"}, "test 'f\\(\\) {.* is no Bash"),
        (
            {"language": "sql", "tests": ["SELECT count(*) FORM t"]},
            'is no SQL \\(SQLite\\), .*near "t": syntax error',
        ),
        (
            {"language": "sql", "tests": ["SELECT (1"]},
            "is no SQL .*so no program passes it: incomplete input",
        ),
        (
            {"language": "python", "tests": ["import math\n\ndef test_f():\n    assert f(1) == 2"]},
            "defines functions and calls none, so every program passes it",
        ),
        *(({"language": "python", "tests": [one]}, f"is no Python.*{why}") for one, why in NO_PYTHON.items()),
        *(({"language": "bash", "tests": [one]}, f"is no Bash.*{why}") for one, why in NO_BASH.items()),
        *(({"language": "sql", "tests": [one]}, f"is no SQL.*{why}") for one, why in NO_SQL.items()),
    ],
)
def test_a_wrong_line_names_its_field(fields: dict, named: str):
    with pytest.raises(UserError, match=named):
        task_of(fields)


def test_tests_of_sql_may_use_tables_of_the_program():
    code = ("SELECT count(*) = 2 FROM made", "EXPLAIN SELECT 1", "PRAGMA table_info(made)")
    assert len(task_of({"language": "sql", "tests": [*code], "before": "INSERT INTO made VALUES (1);"}).tests) == 3


@pytest.mark.parametrize(
    "code",
    [
        'SELECT count(*) FROM "incomplete input"',
        'SELECT "syntax error" FROM made -- it\'s theirs',
        "SELECT 1; -- the end",
        "SELECT 1;;",
    ],
)
def test_words_of_an_error_in_a_name_are_no_error(code: str):
    assert task_of({"language": "sql", "tests": [code]}).tests


def test_code_before_all_tests_is_read_once(monkeypatch):
    given = []
    monkeypatch.setitem(task.BEFORE_ERRORS, "bash", lambda text: given.append(text) or "")
    values = {"language": "bash", "before": "g() { true; }", "tests": [f"[ 1 = {i} ]" for i in range(3)]}
    assert task_of(values) == task_of(values, readable=True)
    assert given == ["g() { true; }\n"]
