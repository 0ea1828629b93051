"""Divides the inputs of a corpus of texts into tasks of about equal size: a pure plan, the same for any cluster.

The order of tasks, and of files inside a task, is the order in which the default build reads them. So the place of a
document, (number of its task, number in the task), orders documents as the default build does, and 'the first of equal
texts' means the same in both.

A file is the smallest piece. Files of one repository stay in one task, because they stay neighbours in the corpus.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from dist_lm.data.inputs import Input

TASK_BYTES = 256 << 20  # stored bytes of a task's inputs


@dataclass(frozen=True, slots=True)
class BuildTask:
    """Inputs that one worker reads, in their order."""

    corpus: str
    source: int  # position of the source in its corpus
    files: tuple[Input, ...]  # empty: the whole source, whose files are not listed (generated text)

    @property
    def n_bytes(self) -> int:
        """Stored bytes of the files whose size is known."""
        return sum(max(file.size, 0) for file in self.files)

    def fingerprint(self) -> str:
        """Returns a hexadecimal hash of the task; a result on disk belongs to the task with this hash."""
        content = [self.corpus, self.source, [file.to_json() for file in self.files]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def plan_source(
    corpus: str, source: int, files: Iterable[tuple[Input, str]], task_bytes: int = TASK_BYTES
) -> list[BuildTask]:
    """Returns the tasks of one source, which hold every file once, in order.

    A task ends before the file or repository that would make it larger than `task_bytes`; one larger than that is a
    task of its own, and so is a file whose size is unknown.

    Args:
        source: position of the source in its corpus.
        files: those that the source reads, each with the name of its repository ("": none), as
            `sources.files.by_repository` pairs them. Without files, the whole source is one task.
    """
    tasks: list[BuildTask] = []
    pending: list[Input] = []
    n_pending_bytes = 0

    def end_task() -> None:
        nonlocal n_pending_bytes
        if pending:
            tasks.append(BuildTask(corpus, source, tuple(pending)))
        pending.clear()
        n_pending_bytes = 0

    for unit in _units(files):
        size = sum(file.size if file.size >= 0 else task_bytes for file in unit)
        if n_pending_bytes + size > task_bytes:
            end_task()
        pending.extend(unit)
        n_pending_bytes += size
    end_task()
    return tasks or [BuildTask(corpus, source, ())]


def plan_fingerprint(tasks: Sequence[BuildTask]) -> str:
    """Returns a hexadecimal hash of a plan; equal ones are hashes of the same tasks in the same order."""
    return hashlib.sha256("".join(task.fingerprint() for task in tasks).encode()).hexdigest()


def _units(files: Iterable[tuple[Input, str]]) -> Iterable[list[Input]]:
    """Yields what no task divides: the neighbouring files of a repository, or one file outside of repositories."""
    for repository, paired in groupby(files, key=lambda pair: pair[1]):
        unit = [file for file, _ in paired]
        if repository:
            yield unit
        else:
            yield from ([file] for file in unit)
