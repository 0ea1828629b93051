"""Parsing without running: what is accepted, what is not, that nothing is executed, and within which limits."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dist_lm.sandbox import parsers, syntax
from dist_lm.sandbox.sql import split_statements
from dist_lm.sandbox.syntax import parses, parses_continued, python_error, whole_lines
from tests.patience import patient


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
    monkeypatch.setattr(parsers, "PATH", f"{tmp_path}:{parsers.PATH}")
    assert parsers.bash_error("echo hi") == ""
    assert "line 2: syntax error" in str(parsers.bash_error("if true; then"))


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


# --- limits ---


def nested_finally(depth: int) -> str:
    """Every level doubles the code of the levels below it."""
    opened = "".join(f"{' ' * i}try:\n{' ' * i} pass\n{' ' * i}finally:\n" for i in range(depth))
    return f"{opened}{' ' * depth}pass\n"


def process_of_parser() -> int:
    parser = syntax._parser_of(os.getpid())
    assert parser._process
    return parser._process.pid


LARGEST_PARSER = """
import json, resource, sys
from dist_lm.sandbox.syntax import parses
is_parsed = parses("python", sys.stdin.read())
print(json.dumps([is_parsed, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10]))
"""


@pytest.mark.heavy
def test_a_text_that_takes_a_minute_and_gigabytes_does_not_parse():
    text = nested_finally(25)
    assert len(text) < 1_500
    began = time.process_time(), time.monotonic()
    assert parses("python", text) is False
    assert time.process_time() - began[0] < 0.5, "it was compiled here"
    assert time.monotonic() - began[1] < patient(20)
    assert parses("python", "x = 1") is True


@pytest.mark.heavy
def test_no_parser_takes_more_memory_than_it_may():
    """Finds a parser without a limit of memory, in a process that has had no other children."""
    command = [sys.executable, "-c", LARGEST_PARSER]
    done = subprocess.run(command, input=nested_finally(25), capture_output=True, text=True, check=True)
    is_parsed, largest_bytes = json.loads(done.stdout)
    assert is_parsed is False
    assert 0 < largest_bytes < 2 * parsers.MEMORY_BYTES


def test_the_reason_names_the_limit():
    assert python_error(nested_finally(25)) in ("parsing it needs more than 0.51 s of CPU time", "MemoryError")


def test_sql_that_fills_memory_is_cut_off():
    rows = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"
    assert parses("sql", f"CREATE TABLE t AS {rows} SELECT zeroblob(900000) FROM c") is False
    assert parses("sql", "SELECT 1") is True


@pytest.mark.heavy
def test_a_parser_that_large_texts_have_grown_is_replaced():
    """What one text leaves behind must not decide over the next one."""
    assert parses("python", "x = 1")
    before = process_of_parser()
    assert parses("python", "x = 2")
    assert process_of_parser() == before
    assert parses("python", f"x = '{'a' * (40 << 20)}'")
    assert parses("python", "x = 1")
    assert process_of_parser() != before


def test_a_parser_that_was_killed_is_replaced():
    assert parses("python", "x = 1")
    os.kill(process_of_parser(), signal.SIGKILL)
    assert parses("python", "x = 1")


def test_a_text_that_ends_its_parser_twice_does_not_parse(monkeypatch):
    started: list[None] = []
    ended = [-signal.SIGSEGV] * 2

    class Ending:
        def __init__(self, *given: object, **named: object) -> None:
            started.append(None)
            self.answers = [{}]

        def send(self, *given: object) -> None:
            return

        def receive(self, *given: object) -> dict:
            if not self.answers:
                raise EOFError
            return self.answers.pop()

        def code(self) -> int:
            return ended.pop()

        def end(self) -> None:
            return

    monkeypatch.setattr(syntax, "JsonProcess", Ending)
    assert syntax._Parser().error("python_error", "x") == "parsing it ends the parser (exit code -11)"
    assert len(started) == syntax.TRIES


def test_a_machine_on_which_no_parser_starts_gives_no_verdict(monkeypatch, caplog):
    def fail(*given: object, **named: object) -> None:
        raise BlockingIOError("no process left")

    monkeypatch.setattr(syntax, "JsonProcess", fail)
    assert syntax._Parser().error("python_error", "x") is None
    assert "no parser starts: no process left" in caplog.text


def test_threads_share_a_parser():
    texts = ["x = 1" if number % 3 else "x = (" for number in range(60)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda text: parses("python", text), texts))
    assert found == [text == "x = 1" for text in texts]


def test_a_forked_process_has_a_parser_of_its_own():
    assert parses("python", "x = 1")
    child = os.fork()
    if child == 0:
        is_right = parses("python", "x = (") is False and parses("python", "x = 1") is True
        syntax._parser_of(os.getpid())._end()
        os._exit(0 if is_right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert parses("python", "x = 1")


def test_a_parser_has_no_secrets_and_no_rights(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    syntax._parser_of(os.getpid())._end()
    assert parses("python", "x = 1")
    process = Path(f"/proc/{process_of_parser()}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    assert int(status["CapEff"], 16) == 0
    assert status["NoNewPrivs"].strip() == "1"
    assert f"{parsers.MEMORY_BYTES}" in (process / "limits").read_text()
    assert b"hf_secret" not in (process / "environ").read_bytes()
