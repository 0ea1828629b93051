"""What a test of Bash or SQL has of the program: calls, state, files, variables; tables that may change."""

import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest

from dist_lm.sandbox import confine
from dist_lm.sandbox.inside import PRELOADED
from dist_lm.sandbox.program import Limits, Program, Test
from dist_lm.sandbox.sandbox import Sandbox, fences
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
    "number": ("f() { echo ' 6'; }", "(( $(f) == 6 )) && [[ $(f) -eq 6 && -n $(f) ]] && [ $(f) = 6 ]"),
    "texts_beside_numbers": (
        "f() { case $1 in size) echo 2;; list) echo a b;; esac; echo 'new list' > log; }",
        '[ "$(f list)" = "a b" ] && [[ $(f size) -eq 2 ]] && f size && [ $(f size) = 2 ]',
    ),
    "variable_as_number": ("f() { RESULT=$(($1 * 2)); }", "f 4; [[ $RESULT -eq 8 ]] && [ $RESULT = 8 ]"),
    "counted_lines": ("f() { printf 'a b\\nc\\n'; }", "[[ $(f | wc -l) -eq 2 ]]"),
}
FAILS = {
    "variable_as_code": ("f() { RESULT='1 -eq 1 -o 1'; }", "f 4; [ $RESULT -eq 8 ]"),
    "variable_of_the_script_as_code": ("answer='1, 1'", "(( $answer == 42 ))"),
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


def test_files_of_a_test_do_not_stay_for_the_next_program(sandbox: Sandbox):
    """A judge that goes on could not remove what is in a folder without rights, and left all other files, too."""
    for _ in range(len(PRELOADED)):  # from then on a judge is kept for the next program
        sandbox.run(Program("bash", "f() { :; }", (Test(code="f"),)), LIMITS)
    leaves = Program(
        "bash", "f() { mkdir d; : > d/x; : > want; chmod 500 d; }", (Test(code="cd /tmp; f; [ -e want ]"),)
    )
    closes = Program("bash", "f() { :; }", (Test(code="f; chmod 500 /tmp"),))
    for program in (leaves, closes, leaves):
        assert sandbox.run(program, LIMITS).outcome == "passed"
        looks = sandbox.run(
            Program("bash", "f() { :; }", (Test(code='f; [ -z "$(ls -A /tmp)" ] && : > /tmp/x'),)), LIMITS
        )
        assert looks.outcome == "passed", looks.output


RUN = """#!/bin/bash
while read -r command; do
  $command && exit 1
done <<END
renice -n 19 -p 1
chrt -i -p 0 1
taskset -p 1 1
ionice -c 3 -p 1
ls /proc/1/fd/0
END
: 3<> /proc/$PPID/mem && exit 1
kill -INT 1
sleep 0.1
"""


@pytest.mark.skipif(not confine.has_seccomp(), reason="the user is the same")
@pytest.mark.parametrize("landlock", [True, False])
def test_files_that_a_test_runs_do_not_reach_its_judge(landlock: bool):
    """A judge with the lowest priority gave the programs after it timeouts; one that is interrupted judges no more; in
    the memory of the shell, the text of the test could be changed."""
    source = f"make_run() {{ cat > $1 <<'EOF'\n{RUN}EOF\nchmod +x $1; }}"
    tests = (Test(code="cd /tmp; make_run run; ./run"), Test(code="cd /tmp; make_run run; ./run && kill -0 1"))
    available = fences() if landlock else replace(fences(), landlock=0)
    with Sandbox(_fences=available) as sandbox:
        verdict = sandbox.run(Program("bash", source, tests), LIMITS)
    assert verdict.results == (True, True), verdict.output


def test_a_standard_command_may_be_the_program_s_if_the_test_names_it(sandbox: Sandbox):
    tests = (Test(code='[ "$(tac x)" = mine ]', entry="tac"), Test(code='[ "$(tac x)" = mine ]'))
    assert sandbox.run(Program("bash", "tac() { echo mine; }", tests), LIMITS).results == (True, False)


ORDERS = (
    "CREATE TABLE orders (id INTEGER, n INTEGER); INSERT INTO orders VALUES (1, 5), (2, 6); "
    "CREATE VIEW v AS SELECT n FROM orders; CREATE TABLE other (id);"
)
SAME = "SELECT count(*) = (SELECT count(*) FROM orders) FROM other"
MADE = "CREATE TABLE sums AS SELECT sum(n) AS total FROM orders; DELETE FROM orders"
SUM = "SELECT (SELECT sum(n) FROM orders) = 22"
NEW = "SELECT total = 11 FROM sums"
SQL = [
    ("UPDATE orders SET n = 2 * n", Test(code=SUM), True, ""),
    ("CREATE TABLE sums AS SELECT sum(n) AS total FROM orders", Test(code=NEW), True, ""),
    ("CREATE VIEW sums AS SELECT sum(n) AS total FROM orders", Test(code=NEW), True, ""),
    (MADE, Test(code=NEW), False, "the program changed orders, and the test does not name it in `writes`"),
    (MADE, Test(code=NEW, writes="orders"), True, ""),
    ("DELETE FROM orders", Test(code="SELECT count(*) = (SELECT count(*) FROM other) FROM orders"), False, "orders"),
    ("INSERT INTO other VALUES (1), (2)", Test(code=SAME, writes="other"), True, ""),
    ("INSERT INTO other VALUES (1), (2)", Test(code=SAME), False, "the test does not name it in `writes`"),
    ("DROP VIEW v; CREATE VIEW v AS SELECT 22 AS n", Test(code="SELECT sum(n) = 22 FROM v"), False, "changed v"),
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
