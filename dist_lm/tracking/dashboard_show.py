"""Dashboards and offline wandb runs at the terminal: `dist-lm dashboard show`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_lm.errors import ArtefactError
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.console import Console
from dist_lm.tracking.dashboard import Board
from dist_lm.tracking.readable import counted


def print_boards(boards: Sequence[Board], console: Console) -> None:
    """Prints a table for each board to standard output, a row for each panel: section, panel, plotted metrics, unit,
    axis. A section's name stands once, metrics only where they differ from the panel's title."""
    for board in boards:
        # A section's name is printed once, and metrics only where they differ from the title.
        rows = []
        for section in board.sections:
            name = section.name
            for panel in section.panels:
                plots = panel.pattern or ", ".join(panel.names)
                if plots == panel.title:
                    plots = ""
                rows.append((name, panel.title, plots, panel.unit, "log" if panel.logarithmic else ""))
                name = ""

        title = f"{board.title} ({counted(len(board.panels), 'panel')})"
        console.table(title, ("section", "panel", "plots", "unit", "axis"), rows, below=("plots",), under="panel")


def newest_offline(run: RunDirectory) -> Path:
    """Returns the folder of the newest offline wandb run of a run directory: the one whose file changed last.

    Raises:
        ArtefactError: the run directory has none.
    """
    logs = [log for log in run.wandb.glob("offline-run-*/*.wandb") if log.is_file()]
    if not logs:
        raise ArtefactError(
            f"{run.path}: no offline wandb run in {run.wandb}: expected a run directory (work/runs/STAGE/RUN_ID) of a "
            "launch with tracking=wandb and no login, or tracking.mode=offline"
        )
    return max(logs, key=lambda log: (log.stat().st_mtime_ns, log.name)).parent


def leet_command(run: RunDirectory) -> list[str]:
    """Returns the command that opens the newest offline run in `wandb leet`, wandb's terminal program."""
    return [sys.executable, "-m", "wandb", "leet", "run", str(newest_offline(run))]


def open_in_leet(run: RunDirectory) -> None:
    """Replaces this process by `wandb leet`, which shows the newest offline wandb run of a run directory.

    The function does not return. In the new process, the environment variable WANDB_DIR is the run directory.

    Raises:
        ArtefactError: the run directory has no offline wandb run (see `newest_offline`), or standard input or output is
            no terminal.
    """
    command = leet_command(run)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ArtefactError(
            "--offline draws on a terminal, but input or output is not one: run it without a pipe, or write a file: "
            f"python -m dist_lm report {run.path}"
        )

    # Its log must not go to the current directory.
    os.environ["WANDB_DIR"] = str(run.path)
    # The program that takes over flushes none of our output.
    sys.stdout.flush()
    os.execv(command[0], command)  # noqa: S606 - no shell, and the program takes over the terminal
