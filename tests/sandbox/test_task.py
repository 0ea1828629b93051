"""Tasks with tests, as lines of a file, and the code of an answer."""

import pytest

from dist_lm.errors import UserError
from dist_lm.sandbox.program import Test
from dist_lm.sandbox.task import Task, code_of, task_of


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1", "x = 1"),
        ("Here:\n```python\nx = 1\n```\nand\n```\ny\n```", "x = 1\n"),
        ("```\nx = 1\nprint(x)", "x = 1\nprint(x)"),
        ("`x`", "`x`"),
        ("```bash\necho '```'\n```", "echo '```'\n"),
    ],
)
def test_code_is_the_first_fenced_block_or_all(answer: str, code: str):
    assert code_of(answer) == code


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
    ],
)
def test_a_wrong_line_names_its_field(fields: dict, named: str):
    with pytest.raises(UserError, match=named):
        task_of(fields)


def test_tests_of_sql_may_use_tables_of_the_program():
    code = ("SELECT count(*) = 2 FROM made", "EXPLAIN SELECT 1", "PRAGMA table_info(made)")
    assert len(task_of({"language": "sql", "tests": [*code], "before": "INSERT INTO made VALUES (1);"}).tests) == 3
