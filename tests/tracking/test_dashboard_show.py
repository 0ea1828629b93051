"""Boards and offline runs at the terminal."""

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dist_lm.errors import ArtefactError
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking import console
from dist_lm.tracking.console import Console
from dist_lm.tracking.dashboard import board_of, boards
from dist_lm.tracking.dashboard_show import leet_command, print_boards
from tests.patience import patient

OPEN = """
import sys
from pathlib import Path
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.dashboard_show import open_in_leet
open_in_leet(RunDirectory(Path(sys.argv[1])))
"""


def test_a_board_is_a_table_of_its_panels() -> None:
    output = io.StringIO()
    print_boards([board_of("code")], Console(output))
    text = output.getvalue()
    for words in ("dist_lm stage code", "Loss, trained and held out", "code/parses by language", "bits/byte", "log"):
        assert words in text


@pytest.mark.parametrize("width", [60, 75, 90, 91, 105, 120, 160])
def test_names_stay_whole_and_an_axis_is_no_unit(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "FILE_WIDTH", width)
    for board in boards():
        output = io.StringIO()
        print_boards([board], Console(output))
        _, head, *lines = output.getvalue().splitlines()
        assert all(len(line) <= width for line in lines)
        start, unit, axis = head.index("panel"), head.index("unit"), head.index("axis")
        end = head.index("plots") if "plots" in head else unit
        words = {""} | {word.strip(",") for line in lines for word in line.split()}
        for panel in board.panels:
            assert {*panel.names, panel.pattern, *panel.title.replace(",", "").split()} <= words
            rows = (line for line in lines if line[start:end].strip() and line[start] != " ")
            row = next(line for line in rows if f"{panel.title} ".startswith(f"{line[start:end].strip()} "))
            assert row[unit:axis].strip() == panel.unit
            assert row[axis:].strip() == ("log" if panel.logarithmic else "")


def test_the_newest_offline_run_is_opened(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    for age, name in enumerate(("offline-run-2-b", "offline-run-1-a", "offline-run-0-empty")):
        folder = run.wandb / name
        folder.mkdir(parents=True)
        if "empty" not in name:
            log = folder / f"run-{name[-1]}.wandb"
            log.touch()
            os.utime(log, (1000 - age, 1000 - age))
    assert leet_command(run)[1:] == ["-m", "wandb", "leet", "run", str(run.wandb / "offline-run-2-b")]


@pytest.mark.parametrize("terminal", ["", "stdin", "stdout"])
def test_without_a_terminal_on_both_sides_the_way_to_a_report_is_named(terminal: str, tmp_path: Path) -> None:
    """Finds a program that draws into a pipe, or waits for keys that nobody can press."""
    folder = tmp_path / "wandb" / "offline-run-1-a"
    folder.mkdir(parents=True)
    (folder / "run-a.wandb").touch()

    ends = pty.openpty()
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    if terminal:
        streams[terminal] = ends[1]
    # In a process of its own, which the program would replace.
    try:
        done = subprocess.run(
            [sys.executable, "-c", OPEN, str(tmp_path)],
            stdin=streams["stdin"],
            stdout=streams["stdout"],
            stderr=subprocess.PIPE,
            timeout=patient(60),
            check=False,
        )
    finally:
        for end in ends:
            os.close(end)
    assert re.search(rb"ArtefactError: .*terminal.*dist_lm report", done.stderr)


def test_a_run_without_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"no offline wandb run in .*expected a run directory"):
        leet_command(RunDirectory(tmp_path))
