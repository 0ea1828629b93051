"""The builds by tasks of a work directory that are not complete: how far they are, told from names of files alone."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dist_lm.errors import ArtefactError
from dist_lm.storage import durable
from dist_lm.tracking.readable import duration

STATE = "state.json"


@dataclass(frozen=True)
class UnfinishedBuild:
    """A build whose corpora are not complete."""

    folder: Path
    corpora: tuple[str, ...]  # empty: no pass has begun
    pass_name: str
    n_tasks: int
    n_results: int  # of the pass, whole or damaged
    latest: float  # when the pass began or got its last result, seconds since 1970

    def text(self) -> str:
        """Returns the build in words."""
        if not self.corpora:
            return f"{self.folder}: unfinished build, no pass has begun"
        latest = "the last" if self.n_results else "begun"
        return (
            f"{self.folder}: unfinished build of {', '.join(self.corpora)}, {self.n_results:,} of {self.n_tasks:,} "
            f"tasks of pass {self.pass_name}, {latest} {duration(max(0.0, time.time() - self.latest))} ago"
        )


def begin_pass(folder: Path, corpora: Sequence[str], pass_name: str, n_tasks: int) -> None:
    """Writes which pass of a build runs.

    Raises:
        OSError: it cannot be written.
    """
    durable.write_sealed(folder / STATE, {"corpora": list(corpora), "pass": pass_name, "tasks": n_tasks})


def unfinished_builds(work: Path) -> list[UnfinishedBuild]:
    """Returns the unfinished builds of a work directory, by name; those under way are among them."""
    builds = []
    for path in sorted((work / "builds").glob("*/")):
        # A build that completes its corpora removes its folder, maybe just now.
        with suppress(FileNotFoundError):
            builds.append(_unfinished_build(path))
    return builds


def _unfinished_build(folder: Path) -> UnfinishedBuild:
    try:
        content = durable.read_json(folder / STATE, {"corpora": list, "pass": str, "tasks": int})
    except ArtefactError:
        content = {}  # the next command writes it again
    if not content:
        return UnfinishedBuild(folder, (), "", 0, 0, folder.stat().st_mtime)

    results = folder / content["pass"]
    begun = (folder / STATE).stat().st_mtime
    if not results.is_dir():
        return UnfinishedBuild(folder, tuple(content["corpora"]), content["pass"], content["tasks"], 0, begun)

    # A result is renamed into the folder of its pass, which sets the time of the folder.
    n_results = sum(not path.name.startswith(".") for path in results.iterdir())
    latest = max(begun, results.stat().st_mtime)
    return UnfinishedBuild(folder, tuple(content["corpora"]), content["pass"], content["tasks"], n_results, latest)
