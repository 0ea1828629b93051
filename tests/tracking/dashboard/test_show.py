"""Boards and offline runs at the terminal."""

import io
import os
from pathlib import Path

import pytest

from dist_lm.errors import ArtefactError
from dist_lm.run_directory import RunDirectory
from dist_lm.tracking.console import Console
from dist_lm.tracking.dashboard.layout import board_of
from dist_lm.tracking.dashboard.show import leet_command, open_in_leet, print_boards


def test_a_board_is_a_table_of_its_panels() -> None:
    output = io.StringIO()
    print_boards([board_of("code")], Console(output))
    text = output.getvalue()
    for words in ("dist_lm stage code", "Loss, trained and held out", "code/parses by language", "bits/byte", "log"):
        assert words in text


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


def test_without_a_terminal_the_way_to_a_report_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "wandb" / "offline-run-1-a"
    folder.mkdir(parents=True)
    (folder / "run-a.wandb").touch()
    monkeypatch.setattr("sys.stdout", io.StringIO())
    with pytest.raises(ArtefactError, match=r"terminal.*dist_lm report"):
        open_in_leet(RunDirectory(tmp_path))


def test_a_run_without_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"no offline wandb run in .*expected a run directory"):
        leet_command(RunDirectory(tmp_path))
