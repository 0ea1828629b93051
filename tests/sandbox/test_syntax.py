"""Parsing without running: what is accepted, what is not, and that nothing is executed."""

import pytest

from dist_lm.sandbox import syntax
from dist_lm.sandbox.syntax import bash_error, parses, parses_continued, split_statements, whole_lines


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("python", "def f(x):\n    return x + 1\n"),
        ("python", ""),
        ("bash", '#!/bin/bash\nfor f in *; do echo "$f"; done\n'),
        ("bash", "cat <<EOF\nhello\nEOF\n"),
        ("sql", "CREATE TABLE t (a INTEGER);\n-- all of them\nSELECT a, count(*) FROM t GROUP BY a;"),
        ("sql", "SELECT 1"),
        ("sql", "CREATE TABLE t (a TEXT); INSERT INTO t VALUES ('x;y');"),
        ("sql", "create  table t (a); ALTER TABLE t ADD COLUMN b TEXT; SELECT b FROM t"),
        ("sql", "CREATE TEMP TABLE t (a); SELECT a FROM t"),
        ("sql", "EXPLAIN SELECT 1"),
        ("bash", "shopt -s extglob\ncase a in @(a|b)) true;; esac"),
        ("bash", "echo 'grün 漢字'\nif !(false); then echo x; fi"),
    ],
)
def test_what_is_whole_parses(language, text):
    assert parses(language, text) is True


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("python", "def f(:\n"),
        ("python", "x = '\0'"),
        ("python", "(" * 100_000),
        ("python", "return 1"),
        ("python", "'\ud800'"),
        ("bash", "echo '\ud800'"),
        ("bash", "echo '\0'"),
        ("sql", "SELECT '\ud800'"),
        ("bash", "if true; then\n"),
        ("bash", "cat <<EOF\nnever ends\n"),
        ("bash", "echo $(("),
        ("sql", "SELECT a FROM missing_table"),
        ("sql", "SELEC 1"),
        ("sql", "CREATE TABLE t (a INTEGER); SELECT b FROM t"),
        ("sql", "SELECT 'open"),
        ("sql", "QUERY PLAN SELECT 1"),
        ("sql", "CREATE TABLE t (a); DROP TABLE t; SELECT a FROM t"),
    ],
)
def test_what_is_broken_does_not(language, text):
    assert parses(language, text) is False


def test_what_bash_says_of_the_locale_is_no_error(monkeypatch, tmp_path):
    bash = tmp_path / "bash"
    bash.write_text(
        '#!/bin/sh\necho "bash: warning: setlocale: LC_ALL: cannot change locale" >&2\nexec /bin/bash "$@"\n'
    )
    bash.chmod(0o755)
    monkeypatch.setattr(syntax, "PATH", f"{tmp_path}:{syntax.PATH}")
    assert bash_error("echo hi") == ""
    assert "line 2: syntax error" in str(bash_error("if true; then"))


def test_a_language_without_a_parser_has_no_verdict():
    assert parses("english", "Once upon a time") is None


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("python", "open({path!r}, 'w').close()"),
        ("bash", "touch {path}"),
        ("bash", "echo $(touch {path})"),
        ("sql", "ATTACH DATABASE '{path}' AS other; CREATE TABLE other.t (a INTEGER);"),
        ("sql", "VACUUM INTO '{path}'"),
    ],
)
def test_nothing_is_executed(tmp_path, language, text):
    target = tmp_path / "made"
    parses(language, text.format(path=str(target)))
    assert not target.exists()


def test_sql_that_never_ends_is_cut_off():
    endless = "CREATE TABLE t AS WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x FROM c;"
    assert parses("sql", endless) is False


def test_statements_are_split_outside_of_strings_and_triggers():
    text = "SELECT ';'; CREATE TRIGGER r AFTER INSERT ON t BEGIN SELECT 1; SELECT 2; END; SELECT 3"
    assert [s.split()[0] for s in split_statements(text)] == ["SELECT", "CREATE", "SELECT"]


def test_a_completion_cut_off_in_its_first_line_does_not_parse():
    assert parses_continued("python", "a = 1\n", "b = (", finished=False) is False
    assert parses_continued("python", "a = 1\n", "b = 2\nc = (", finished=False)
    assert parses_continued("python", "a = ", "1", finished=True)
    assert parses_continued("english", "a", "b", finished=False) is None


def test_half_a_line_is_not_judged():
    assert whole_lines("a = 1\nb = (", finished=False) == "a = 1\n"
    assert whole_lines("a = 1\nb = (", finished=True) == "a = 1\nb = ("
