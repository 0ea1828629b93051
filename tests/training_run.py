"""What tests that start runs have in common."""

from pathlib import Path

from dist_lm.run_directory import RunDirectory, WorkDirectory
from dist_lm.tracking.metrics import read_metrics

TIMED = ("time", "perf/", "checkpoint/")


def numbers(run: RunDirectory) -> dict[int, dict[str, float]]:
    """Everything in the metrics file that is not a time, by step."""
    steps: dict[int, dict[str, float]] = {}
    for line in read_metrics(run.metrics):
        kept = {key: value for key, value in line.items() if not key.startswith(TIMED) and key != "step"}
        steps.setdefault(line["step"], {}).update(kept)
    return steps


def linked(work: WorkDirectory, directory: Path) -> WorkDirectory:
    """A work directory with the tokenizer and the corpora of another, and no runs."""
    for name in ("tokenizer", "corpora"):
        (directory / name).symlink_to(work.path / name)
    return WorkDirectory(directory)
