"""The live view on a terminal: a real one of the kernel for what is written, pyte for what is to be seen."""

import io
import os
import pty
import struct
import sys
import termios
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path

import pyte
import pytest

from dist_lm.tracking.console import Console
from dist_lm.tracking.live_state import StageState
from dist_lm.tracking.live_terminal import Region
from tests.tracking.shown import WARNING


class Terminal:
    """A pseudo-terminal whose screen can be looked at."""

    def __init__(self, columns: int, rows: int) -> None:
        self._outer, self._inner = pty.openpty()
        os.set_blocking(self._outer, False)
        self.file = open(self._inner, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the test
        self.written = b""
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int) -> None:
        self.look()
        self.screen.resize(rows, columns)
        ioctl(self._inner, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def look(self) -> list[str]:
        """What is on the screen, without the empty rows below."""
        self.file.flush()
        while True:
            try:
                new = os.read(self._outer, 65536)
            except BlockingIOError:
                break
            self.written += new
            self._stream.feed(new)
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip().split("\n")

    def close(self) -> None:
        self.file.close()
        os.close(self._inner)
        os.close(self._outer)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    made = Terminal(80, 20)
    # rich asks the standard streams for the size
    monkeypatch.setattr("rich.console._STD_STREAMS", (made.file.fileno(),))
    yield made
    made.close()


STAGES: list[tuple[str, StageState, str]] = [
    ("shards", "done", "two corpora"),
    ("code", "waiting", "100 steps"),
    ("tools", "waiting", "50 steps"),
]


def train(progress, upto: int) -> None:
    for step in range(1, upto + 1):
        progress.update({"step": step, "time": 1000.0 + step, "train/loss": 5 - step / 50, "perf/tokens_per_s": 9e3})


def redraw(console: Console) -> None:
    assert console._view
    console._view.draw()


def test_everything_else_is_printed_above_the_view(terminal: Terminal) -> None:
    console = Console(terminal.file, terminal.file)
    console.line("before")
    with console.pipeline("code  run default in work", STAGES):
        console.stage("code", "running")
        with console.training("code", 100) as progress:
            train(progress, 50)
            console.warning(WARNING)
            console.table("layouts", ("a", "b"), [("1", "2")])
            redraw(console)
            seen = terminal.look()
            assert seen[0] == "before"
            assert seen[1].startswith("warning: checkpoint step_00000100")
            assert seen[3:6] == ["layouts", "a  b", "1  2"]
            assert seen[6].startswith("code  run default in work")
            assert "50/100  50 s left" in seen[8]
            assert terminal.screen.cursor.hidden
            assert any("0 s ago: checkpoint step" in line for line in seen[7:])
        console.stage("code", "done")
        redraw(console)
        assert any(line.startswith("✓ code") for line in terminal.look())
    console.line("after")
    seen = terminal.look()
    assert seen[-1] == "after"
    assert not any("run default" in line or "✓" in line for line in seen)
    assert not terminal.screen.cursor.hidden


def test_prints_of_others_stay_whole_lines_above_it(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal.file)
    console = Console(terminal.file, terminal.file)
    with console.pipeline("title", STAGES):
        sys.stderr.write("half a ")
        redraw(console)
        assert not any("half" in line for line in terminal.look())
        sys.stderr.write("line\nrest")
        redraw(console)
        assert terminal.look()[:2][0] == "half a line"
        assert terminal.look()[1].startswith("title")
    assert sys.stderr is terminal.file
    assert terminal.look() == ["half a line", "rest"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_whatever_ends_it_the_terminal_is_left_clean(terminal: Terminal, error: type[BaseException]) -> None:
    console = Console(terminal.file, terminal.file)

    def work() -> None:
        with console.pipeline("title", STAGES), console.training("code", 100) as progress:
            train(progress, 10)
            redraw(console)
            raise error

    with pytest.raises(error):
        work()
    assert terminal.look() == [""]
    assert not terminal.screen.cursor.hidden
    console.line("free")
    assert terminal.look() == ["free"]


@pytest.mark.parametrize("size", [(40, 10), (120, 30), (20, 3)])
def test_a_terminal_may_change_its_size(terminal: Terminal, size: tuple[int, int]) -> None:
    console = Console(terminal.file, terminal.file)
    with console.pipeline("title", STAGES), console.training("code", 100) as progress:
        console.stage("code", "running")
        train(progress, 50)
        redraw(console)
        terminal.resize(*size)
        redraw(console)
        seen = terminal.look()
        assert len([line for line in seen if "code" in line]) == 1, seen
        assert len(seen) <= size[1]
    assert not any("code" in line for line in terminal.look())


def test_a_frame_that_has_not_changed_is_not_written_again() -> None:
    file = io.StringIO()
    region = Region(file)
    region.draw(["a", "b"], [1, 1], 80)
    written = file.getvalue()
    region.draw(["a", "b"], [1, 1], 80)
    assert file.getvalue() == written
    region.draw(["a", "c"], [1, 1], 80)
    assert file.getvalue() != written


def test_a_terminal_that_folds_long_lines_anew_is_cleared_of_them() -> None:
    screen = pyte.Screen(40, 10)
    stream, file = pyte.Stream(screen), io.StringIO()
    region = Region(file)
    region.draw(["x" * 70], [70], 80)
    stream.feed("x" * 40 + "\r\n" + "x" * 30)  # what such a terminal of 40 columns makes of it
    file.truncate(0)
    region.draw(["y"], [1], 40)
    stream.feed(file.getvalue().lstrip("\0"))
    assert [line.rstrip() for line in screen.display if line.strip()] == ["y"]


@pytest.mark.parametrize(
    ("variables", "live", "coloured"),
    [({}, True, True), ({"NO_COLOR": "1"}, True, False), ({"TERM": "dumb"}, False, False)],
    ids=["colours", "no colour", "dumb"],
)
def test_no_color_and_dumb_terminals(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], live: bool, coloured: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    console = Console(terminal.file, terminal.file)
    with console.counting("reading", "documents", total=2) as count:
        count.advance(2)
        if live:
            redraw(console)
    assert terminal.look()[0].startswith("reading: 2 of 2 documents")
    assert (b"\x1b[?25l" in terminal.written) == live
    assert (b"\x1b[36m" in terminal.written) == coloured


def test_a_file_gets_plain_lines_even_where_colour_is_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with (tmp_path / "out").open("w") as file:
        console = Console(file, file)
        with console.pipeline("title", STAGES), console.counting("reading", "documents", total=2) as count:
            count.advance(2)
    text = (tmp_path / "out").read_text()
    assert "\x1b[?25l" not in text
    assert "reading: 2 of 2 documents" in text
    assert "title" not in text
