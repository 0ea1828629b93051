"""What a test of Bash or SQL has of the program: calls, state, files, variables; tables that may change."""

import shutil
from collections.abc import Iterator

import pytest

from dist_lm.sandbox.program import Limits, Program, Test
from dist_lm.sandbox.sandbox import Sandbox
from tests.patience import patient

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
LIMITS = Limits(cpu_s=2.0, wall_s=patient(30))


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


HOLDS = {
    "input": ("up() { tr a-z A-Z; }", '[ "$(printf "a\\nb" | up)" = $\'A\\nB\' ] && [ "$(echo q | up | up)" = Q ]'),
    "status": ("f() { echo err >&2; return 7; }", 'e=$(f 2>&1); [ "$?$e" = 7err ]'),
    "bytes": ("f() { printf 'a\\0\\377b'; }", "f | cmp - <(printf 'a\\0\\377b')"),
    "arguments": (
        "f() { printf '<%s>' \"$@\"; }",
        "[ \"$(f 'a  b' '' $'c\\nd' '*' \"'\")\" = \"<a  b><><c\"$'\\n'\"d><*><'>\" ]",
    ),
    "state": (
        "n=0; next() { n=$((n + 1)); }; show() { echo $n; }",
        'next; next; [ "$(next; show)" = 2 ] && [ "$(show)" = 2 ]',
    ),
    "variable": ("f() { REPLY=$(($1 * 2)); }", 'f 4; [ "$REPLY" = 8 ]'),
    "variable_of_the_script": ("answer=42", '[ "$answer" -eq 42 ]'),
    "folder": ('go() { cd "$1"; }', 'mkdir -p /tmp/x; go /tmp/x; [ "$PWD" = /tmp/x ]'),
    "exit_in_a_subshell": ("f() { exit 3; }", "(f); [ $? = 3 ]"),
    "function_of_the_test": (
        "double() { echo $(($1 * 2)); }",
        'candidate() { double "$@"; }\nset -eu\n[[ $(candidate 4) = 8 ]]',
    ),
    "late_output": ("f() { tee >(tr a-z A-Z); }", '[ "$(echo a | f | sort | tr -d "\\n")" = Aa ]'),
    "file_of_the_script": ("echo 5 > /tmp/made", '[ "$(cat /tmp/made)" = 5 ]'),
    "executable": (
        'f() { printf \'#!/bin/sh\\necho 6\' > "$1"; chmod +x "$1"; }',
        'cd /tmp; f run; [ "$(./run)" = 6 ]',
    ),
    "name_of_a_command": ('rename() { mv "$1" "$2"; }', "cd /tmp; echo > a; rename a b; [ -e b ] && [ ! -e a ]"),
}
FAILS = {
    "variable_of_the_test": ("f() { REPLY=1; want=1; }", 'want=8; f 4; [ "$REPLY" = "$want" ]'),
    "exit": ("f() { exit 0; }", "f; true"),
    "standard_command": ("cmp() { return 0; }", "cd /tmp; echo a > x; echo b > y; cmp -s x y"),
    "link": ('f() { ln -s in "$1"; }', "cd /tmp; echo 1 > in; f out; [ -e out ]"),
    "options": ("shopt -s nocasematch; f() { echo ABC; }", "[[ $(f) == abc ]]"),
    "end_of_the_script": ("f() { echo 3; }\nexit 0", '[ "$(f)" = 3 ]'),
}


@pytest.mark.parametrize("name", [*HOLDS, *FAILS])
def test_what_a_test_of_bash_has_of_the_program(sandbox: Sandbox, name: str):
    source, code = (HOLDS | FAILS)[name]
    verdict = sandbox.run(Program("bash", source, (Test(code=code),)), LIMITS)
    assert verdict.outcome == ("passed" if name in HOLDS else "failed"), verdict.output


def test_a_standard_command_may_be_the_program_s_if_the_test_names_it(sandbox: Sandbox):
    tests = (Test(code='[ "$(tac x)" = mine ]', entry="tac"), Test(code='[ "$(tac x)" = mine ]'))
    assert sandbox.run(Program("bash", "tac() { echo mine; }", tests), LIMITS).results == (True, False)


ORDERS = (
    "CREATE TABLE orders (id INTEGER, n INTEGER); INSERT INTO orders VALUES (1, 5), (2, 6); "
    "CREATE VIEW v AS SELECT n FROM orders;"
)
MADE = "CREATE TABLE sums AS SELECT sum(n) AS total FROM orders; DELETE FROM orders"
SUM = "SELECT (SELECT sum(n) FROM orders) = 22"
NEW = "SELECT total = 11 FROM sums"
SQL = [
    ("UPDATE orders SET n = 2 * n", Test(code=SUM), True, ""),
    ("CREATE TABLE sums AS SELECT sum(n) AS total FROM orders", Test(code=NEW), True, ""),
    ("CREATE VIEW sums AS SELECT sum(n) AS total FROM orders", Test(code=NEW), True, ""),
    (MADE, Test(code=NEW), False, "the program changed orders, and the test does not name it in `writes`"),
    (MADE, Test(code=NEW, writes="orders"), True, ""),
    (
        "CREATE VIEW sums AS SELECT 11 AS total FROM orders; DELETE FROM orders WHERE id = 2",
        Test(code="SELECT count(*) = 1 FROM sums"),
        False,
        "changed orders",
    ),
    ("DROP VIEW v; CREATE VIEW v AS SELECT 11 AS n", Test(code="SELECT count(*) = 2 FROM orders"), False, "changed v"),
    ("CREATE TEMP TABLE sums AS SELECT 11 AS total", Test(code=NEW), False, "temporary tables, views and triggers"),
    ("ATTACH ':memory:' AS o", Test(code="SELECT 1"), False, "other databases are refused"),
    ("PRAGMA writable_schema = ON", Test(code="SELECT 1"), False, "PRAGMA writable_schema is refused"),
    ("PRAGMA foreign_keys = ON; UPDATE orders SET n = n * 2", Test(code=SUM), True, ""),
    ("ALTER TABLE orders ADD COLUMN m; UPDATE orders SET m = 1", Test(code="SELECT sum(m) = 2 FROM orders"), True, ""),
    ("SELECT n FROM v ORDER BY n", Test(stdout="5\n6"), True, ""),
    ("UPDATE orders SET n = 1; SELECT n FROM orders", Test(stdout="1\n1"), False, "orders is changed"),
    ("UPDATE orders SET n = 1; SELECT n FROM orders", Test(stdout="1\n1", writes="orders"), True, ""),
    ("ALTER TABLE orders RENAME TO old; SELECT 1", Test(stdout="1"), False, "orders is altered"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "test", "passes", "says"), SQL)
def test_which_tables_a_program_of_sql_may_change(sandbox: Sandbox, source: str, test: Test, passes: bool, says: str):
    test = Test(**{**vars(test), "before": ORDERS})
    verdict = sandbox.run(Program("sql", source, (test,)), LIMITS)
    assert verdict.outcome == ("passed" if passes else "failed"), verdict.output
    assert says in verdict.output
