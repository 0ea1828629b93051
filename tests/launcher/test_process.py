"""Closed and full standard streams: one line and exit code 2 from every command."""

import errno
import os
import subprocess
import sys

import pytest

from dist_lm.launcher.process import disk_trouble
from tests.patience import patient
from tests.tracking.test_output import harmful

PROGRAM = """
import sys
from dist_lm.launcher.process import run_program
def program():
    {body}
run_program(program, lambda text: print(f"error: {{text}}", file=sys.stderr))
"""


def run(body: str, redirection: str) -> tuple[int, str, str]:
    """(exit code, output, errors) of a small program whose streams a shell has set up."""
    return shell([sys.executable, "-c", PROGRAM.format(body=body)], redirection)


def shell(words: list[str], redirection: str) -> tuple[int, str, str]:
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *words],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        timeout=patient(100),
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


FULL = "error: standard output: No space left on device: make room, and give the same command again\n"
DELETED = "error: the working directory was deleted: change to one that exists (cd), and try again\n"
CLOSED = "error: standard output is closed: leave it open, or send it to /dev/null\n"


@pytest.mark.parametrize(
    ("body", "redirection", "expected"),
    [
        ("print(repr(sys.stdin.read()))", "<&-", (0, "''\n", "")),
        ("print(1)", ">&-", (2, "", CLOSED)),
        ("print(1)", "> /dev/full", (2, "", FULL)),
        ("print(1, flush=True)", "> /dev/full", (2, "", FULL)),
        ("print(1); sys.exit(7)", "> /dev/full", (2, "", FULL)),
        ("print(1); sys.exit(7)", "", (7, "1\n", "")),
        ("print(2, file=sys.stderr); print(1)", "2>&-", (0, "1\n", "")),
        ("open('/nowhere/file')", "", None),
    ],
)
def test_a_program_ends_in_good_order(body, redirection, expected):
    code, out, err = run(body, redirection)
    if expected is None:  # a defect of ours keeps its traceback
        assert (code, out) == (1, "")
        assert "FileNotFoundError" in err
    else:
        assert (code, out, err) == expected


@pytest.mark.parametrize("printing", ["print(1)", "print(1, flush=True)", "print('1' * 100_000)"])
def test_a_reader_that_has_seen_enough_ends_it_without_a_word(printing):
    gone = "import os; reader, writer = os.pipe(); os.close(reader)"
    assert run(f"{gone}; os.dup2(writer, 1); {printing}", "") == (1, "", "")
    code, out, err = run(f"{gone}; print(1); os.write(writer, b'1')", "")
    assert (code, out) == (1, "1\n")
    assert "BrokenPipeError" in err  # another pipe than that: a defect of ours


def test_without_a_buffer_it_is_one_line_too():
    code, out, err = shell([sys.executable, "-u", "-c", PROGRAM.format(body="print(1)")], "> /dev/full")
    assert (code, out) == (2, "")
    assert err == FULL.replace("standard output", "standard output or a file")


@pytest.mark.parametrize("module", ["dist_lm", "dist_lm.launch"])
@pytest.mark.parametrize(("redirection", "said"), [("> /dev/full", FULL), (">&-", CLOSED)])
def test_verbs_and_launcher_alike(module, redirection, said):
    assert shell([sys.executable, "-m", module, "--help"], redirection) == (2, "", said)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "make room"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EROFS, "choose a place that can be written to"),
        (errno.EACCES, "allow it, or choose another place"),
    ],
)
def test_the_way_out_is_that_of_the_trouble(number, words):
    said = disk_trouble(OSError(number, "what it is", "work/x"))
    assert said is not None
    assert said.startswith("work/x: what it is: ")
    assert words in said
    assert ("make room" in said) == (words == "make room")
    assert disk_trouble(OSError(errno.ECONNREFUSED, "no", "work/x")) is None
    assert disk_trouble(PermissionError(errno.EACCES, "no")) is None


@pytest.mark.parametrize(
    "body",
    [
        "raise ValueError(ATTACK)",
        "raise OSError(ATTACK)",
        "import warnings; warnings.warn(ATTACK)",
        "import logging; logging.getLogger('x').warning(ATTACK)",
    ],
)
def test_what_python_prints_by_itself_steers_no_terminal(body):
    """Finds a traceback, a warning or a log line that hands a terminal the sequences of a file that it quotes."""
    _, out, err = run(body.replace("ATTACK", repr("\x1b]52;c;cm0=\x07\u202e\x9b2J")), "")
    assert "]52;c;cm0=" in err
    assert not harmful(out + err)


def test_a_deleted_working_directory_is_refused(tmp_path, monkeypatch):
    """Finds a command that ends in the traceback of `os.getcwd`."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    code, out, err = run("print(1)", "")
    assert (code, out) == (2, "")
    assert err.endswith(DELETED)  # the shell may have a line of its own before
    assert "Traceback" not in err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_text_that_the_terminal_lacks_is_printed_as_escapes(monkeypatch, encoding):
    """Finds a path or name outside the terminal's encoding that ends a command in a traceback."""
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    code, out, err = run("print('\\u6f22 ' + chr(0xDC80)); print('\\u6f22', file=sys.stderr)", "")
    assert code == 0, err
    assert out == ("漢 \\udc80\n" if encoding == "utf-8" else "\\u6f22 \\udc80\n")
    assert err == ("漢\n" if encoding == "utf-8" else "\\u6f22\n")
