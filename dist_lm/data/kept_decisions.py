"""What a finished corpus keeps of its build by tasks, so that a later corpus can extend it (`corpus.extends`).

`decisions.zip` lies beside the tars, arrays uncompressed. It has `build.json`, and for each task of the corpus a folder
with its inputs (`task.json`), the files of its survey that later decisions need, and what became of each of its
documents (`fates.npy`). Tasks are numbered from 0 in the corpus, whatever their numbers in the build were. About 70
bytes a document, 520 with `cleaning.near_duplicates`. The manifest has the hash of the file; equal builds give equal
bytes.
"""

import io
import json
import secrets
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from dist_lm.data.build_folder import ARRAYS, BAND_RUN, COUNTS, FATES, PRECEDENCES, RUN, UNITS, Build
from dist_lm.data.build_plan import BuildTask
from dist_lm.data.inputs import Input
from dist_lm.data.manifest import decisions_path, read_manifest, require_decisions
from dist_lm.data.sorted_runs import RECORD
from dist_lm.errors import ArtefactError
from dist_lm.storage import durable

RUNS = (RUN, BAND_RUN)  # files whose records hold the number of their task
OTHER_FILES = (ARRAYS, COUNTS, PRECEDENCES, UNITS)
EPOCH = (1980, 1, 1, 0, 0, 0)  # time of all members, so that equal builds give equal bytes
RECORDS_AT_ONCE = 1 << 20


def keep_decisions(
    build: Build, numbers: Sequence[int], fates_of_task: Callable[[int], np.ndarray], share: float, directory: Path
) -> str:
    """Writes the decisions of a corpus beside its tars; returns the hash of the file.

    Args:
        numbers: of the tasks of the corpus in the build, in their order.
        fates_of_task: number of a task in the build -> what became of its documents, (D,) int8.
        share: of the groups that the corpus holds out.

    Raises:
        OSError: a result cannot be read, or the file cannot be written.
    """
    path = decisions_path(directory)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with zipfile.ZipFile(temporary, "w") as archive:
            _add(archive, "build.json", json.dumps({"share": share, "tasks": len(numbers)}).encode())
            for place, number in enumerate(numbers):
                _add_task(archive, build, place, number, fates_of_task(number))
        durable.fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    durable.fsync(directory)
    return durable.sha256_of(path)


def _add_task(archive: zipfile.ZipFile, build: Build, place: int, number: int, fates: np.ndarray) -> None:
    task, survey = build.task(number), build.survey(number)
    content = {"source": task.source, "files": [file.to_json() for file in task.files]}
    _add(archive, f"{place:06d}/task.json", json.dumps(content).encode())
    saved = io.BytesIO()
    np.save(saved, fates)
    _add(archive, f"{place:06d}/{FATES}", saved.getvalue())
    for name in OTHER_FILES:
        if (survey / name).exists():
            with (survey / name).open("rb") as file, archive.open(_member(f"{place:06d}/{name}"), "w") as member:
                shutil.copyfileobj(file, member)

    for name in RUNS:
        if not (survey / name).exists():
            continue
        with (
            (survey / name).open("rb") as file,
            archive.open(_member(f"{place:06d}/{name}"), "w", force_zip64=True) as member,
        ):
            while content := file.read(RECORDS_AT_ONCE * RECORD.itemsize):
                records = np.frombuffer(content, RECORD).copy()
                records["task"] = place
                member.write(records.tobytes())


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    # Names of files are most of the bytes where each file is a document.
    archive.writestr(_member(name), content, zipfile.ZIP_DEFLATED)


def _member(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name, EPOCH)


@dataclass(frozen=True)
class KeptDecisions:
    """The decisions of a finished corpus."""

    path: Path
    share: float  # of the groups that it holds out
    n_tasks: int

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Returns the decisions of the corpus in `directory`; reads the file whole to compare its hash.

        Raises:
            ArtefactError: the corpus has none, or the file is missing or damaged; names the way out.
        """
        require_decisions(directory)
        path = decisions_path(directory)
        state = decisions_state(directory, read_manifest(directory).decisions)
        if state != "ok":
            raise ArtefactError(f"{path}: {state}: restore it, or build all sources once without corpus.extends")
        content = _content_of_build(path)
        return cls(path, content["share"], content["tasks"])

    @staticmethod
    def share_of(directory: Path) -> float:
        """Returns the share of a corpus whose file was compared before."""
        return _content_of_build(decisions_path(directory))["share"]

    def tasks(self, corpus: str) -> list[BuildTask]:
        """Returns the tasks of the corpus, under the name that it has now.

        Raises:
            OSError: the file cannot be read.
        """
        tasks = []
        for number in range(self.n_tasks):
            content = json.loads(self._archive.read(f"{number:06d}/task.json"))
            files = tuple(Input(**file) for file in content["files"])
            tasks.append(BuildTask(corpus, content["source"], files))
        return tasks

    def unpack(self, number: int, folder: Path) -> None:
        """Writes the survey of a task and the fates of its documents into an empty folder.

        Raises:
            OSError: a file cannot be read or written.
        """
        for name in (FATES, *RUNS, *OTHER_FILES):
            member = f"{number:06d}/{name}"
            if member in self._names:
                with self._archive.open(member) as source, (folder / name).open("wb") as file:
                    shutil.copyfileobj(source, file)

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.path)

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self._archive.namelist())


def _content_of_build(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("build.json"))


def decisions_state(directory: Path, sha256: str) -> str:
    """Returns how the kept decisions of a corpus differ from its manifest, in words; `ok` if they do not. Reads the
    file whole.

    Args:
        sha256: of the manifest.

    Raises:
        OSError: the file cannot be read.
    """
    path = decisions_path(directory)
    if not path.is_file():
        return "missing"
    return "ok" if durable.sha256_of(path) == sha256 else "other contents than the manifest says (sha256)"
