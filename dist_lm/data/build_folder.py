"""The folder of a build of a corpus of texts by tasks (`data.build_tasks`), and what its tasks and its caller read
from it: settings, plan, surveys, and places of documents in results.
"""

import itertools
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from dist_lm.config.corpus import REPOSITORY, CleaningConfig, CorpusConfig
from dist_lm.data.build_decisions import (
    TRAIN,
    VAL,
    Screening,
    Survey,
    candidates_of,
    same_documents,
    screenings,
    source_of,
)
from dist_lm.data.build_plan import BuildTask
from dist_lm.data.inputs import Input, Inputs
from dist_lm.data.near_duplicates import BANDS
from dist_lm.data.precedence import is_by_rule
from dist_lm.data.screening import RowErrors, source_name
from dist_lm.data.sources.reader import Rejected
from dist_lm.errors import ArtefactError, UserError
from dist_lm.storage import durable

RUN, COPIES, ARRAYS, BAND_RUN = "keys.run", "copies.npy", "arrays.npz", "bands.run"
PRECEDENCES, UNITS, ENDS = "precedences.npy", "units.npy", "ends.npy"
COUNTS, FATES, PRESENT_RUN = "counts.json", "fates.npy", "present.run"


@dataclass(frozen=True)
class Build:
    """The folder of a build, and what is read from it."""

    folder: Path

    @cached_property
    def _settings(self) -> dict[str, Any]:
        path = self.folder / "settings.json"
        if not path.exists():
            raise ArtefactError(f"{path} is missing: work_dir must be on a file system that all nodes share")
        return durable.read_json(
            path,
            {
                "config": dict,
                "seed": int,
                "tokenizer": str,
                "classes": list,
                "limited": list,
                "n_old": int,
                "base": str,
            },
        )

    @cached_property
    def config(self) -> CorpusConfig:
        config = self._settings["config"]
        return CorpusConfig(**{**config, "cleaning": CleaningConfig(**config["cleaning"])})

    @property
    def seed(self) -> int:
        return self._settings["seed"]

    @property
    def tokenizer_model(self) -> Path:
        return Path(self._settings["tokenizer"])

    @property
    def n_old(self) -> int:
        """The number of tasks of a finished corpus that this one extends: the first ones of the plan. 0: it extends
        none."""
        return self._settings["n_old"]

    @property
    def base(self) -> Path:
        """The folder of that corpus."""
        return Path(self._settings["base"])

    @property
    def classes(self) -> list[tuple[str, bool]]:
        """(corpus, whether its sources have `held_out`): copies are sought in each of these. The corpus is "" if they
        are sought across all."""
        return [(corpus, is_held_out) for corpus, is_held_out, _ in self._settings["classes"]]

    @property
    def n_tasks(self) -> int:
        """The number of tasks of the plan."""
        return sum(len(numbers) for _, _, numbers in self._settings["classes"])

    def tasks_of_class(self, number: int) -> list[int]:
        """Returns the numbers of the tasks of a class of `classes`, in their order."""
        return self._settings["classes"][number][2]

    def is_by_rule(self, number: int) -> bool:
        """Returns whether columns of a source choose among equal and nearly equal texts of a class of `classes`."""
        corpus = self.classes[number][0]
        return any(is_by_rule(self.config, name) for name in ([corpus] if corpus else self.config.corpora))

    @property
    def by_repository(self) -> bool:
        """Whether repositories are compared as a whole. Then near-duplicates are sought before copies, because a file
        may have its only copy in a repository that leaves."""
        return self.config.cleaning.near_duplicates_by == REPOSITORY

    def task(self, number: int) -> BuildTask:
        """Returns a task of the plan, by its number from 0.

        Raises:
            ArtefactError: its file is damaged.
        """
        task = durable.read_json(self.folder / "tasks" / f"{number:06d}.json")
        return BuildTask(task["corpus"], task["source"], tuple(Input(**file) for file in task["files"]))

    def listing(self, task: BuildTask) -> Inputs:
        """Returns what `left_beside` kept of the source of a task."""
        listings = durable.read_json(self._listing_path(task.corpus, task.source))
        return Inputs.from_json(listings["files"])

    @cached_property
    def limited(self) -> frozenset[int]:
        """The tasks of sources with `limit`."""
        return frozenset(self._settings["limited"])

    def result(self, pass_name: str, number: int) -> Path:
        return self.folder / pass_name / f"{number:06d}"

    def survey(self, number: int) -> Path:
        """Returns the result that has the survey of a task."""
        return self.result("limits" if number in self.limited else "survey", number)

    def run_of_keys(self, number: int) -> Path:
        """Returns the sorted run of the keys of a task. Of the corpus that is extended it has those documents that
        `is_present` accepts."""
        return self.survey(number) / (PRESENT_RUN if number < self.n_old else RUN)

    def write(
        self,
        config: CorpusConfig,
        seed: int,
        tokenizer_model: Path,
        tasks: list[BuildTask],
        listings: Mapping[tuple[str, int], Inputs],
        base: Path | None = None,
        n_old: int = 0,
    ) -> None:
        """Writes settings and plan. Files that are there already are those of the same build, and stay.

        Args:
            base: folder of the finished corpus that is extended, whose tasks are the first `n_old`.
        """
        (self.folder / "tasks").mkdir(parents=True, exist_ok=True)
        classes: dict[tuple[str, bool], list[int]] = {}
        for number, task in enumerate(tasks):
            classes.setdefault(class_of(config, task), []).append(number)
            content = {"corpus": task.corpus, "source": task.source, "files": [file.to_json() for file in task.files]}
            durable.write_sealed(self.folder / "tasks" / f"{number:06d}.json", content)
        for (corpus, number), listing in listings.items():
            durable.write_sealed(self._listing_path(corpus, number), {"files": listing.to_json()})
        settings = {
            "config": asdict(config),
            "seed": seed,
            "tokenizer": str(tokenizer_model.resolve()),
            "classes": [[*key, numbers] for key, numbers in classes.items()],
            "n_old": n_old,
            "base": str(base.resolve()) if base else "",
            "limited": [number for number, task in enumerate(tasks) if source_of(config, task).limit],
        }
        durable.write_sealed(self.folder / "settings.json", settings)

    def _listing_path(self, corpus: str, source: int) -> Path:
        return self.folder / f"listing-{corpus}-{source}.json"


def class_of(config: CorpusConfig, task: BuildTask) -> tuple[str, bool]:
    """Returns the class in which copies of the documents of a task are sought, as in `Build.classes`."""
    is_held_out = source_of(config, task).held_out
    # A text that a user holds out is compared with those of its own corpus alone.
    if config.cleaning.across_corpora and not is_held_out:
        return "", False
    return task.corpus, is_held_out


@lru_cache(1)
def opened(folder: Path) -> Build:
    """Returns the build of a folder; a worker reads its settings once."""
    return Build(folder)


def write_survey(result: Path, task_survey: Survey) -> None:
    """Writes the survey of a task into its result, for `read_survey`."""
    np.savez(
        result / ARRAYS,
        keys=task_survey.keys,
        positions=task_survey.positions,
        n_bytes=task_survey.n_bytes,
        is_contaminated=task_survey.is_contaminated,
    )
    rows = task_survey.rows
    counts = {
        "n_rows": rows.n_rows,
        "n_bad": rows.n_bad,
        "first": [asdict(row) for row in rows.first],
        "dropped": task_survey.dropped,
        "languages": task_survey.languages,
        "left": task_survey.left,
    }
    (result / COUNTS).write_text(json.dumps(counts), encoding="utf-8")
    (result / "val_texts.zst").write_bytes(compressed(task_survey.val_texts))
    (result / "groups.zst").write_bytes(compressed(task_survey.groups))


def read_survey(build: Build, number: int, *, with_texts: bool = False, with_groups: bool = False) -> Survey:
    """Returns the survey of a task. Its `precedences`, `units` and `bands` are empty: they are in files of
    their own.

    Args:
        with_texts: read the texts that could be val, too; otherwise `val_texts` is empty.
        with_groups: read the names of the groups, too; otherwise `groups` is empty.

    Raises:
        ArtefactError: the settings of the build are missing, or settings or plan are damaged.
        OSError: the survey cannot be read.
    """
    result = build.survey(number)
    counts = json.loads((result / COUNTS).read_text(encoding="utf-8"))
    rows = RowErrors(source_of(build.config, build.task(number)), build.config.max_bad_fraction)
    rows.add(counts["n_rows"], counts["n_bad"], [Rejected(**row) for row in counts["first"]])

    # Texts and groups are most of the bytes, and few callers need them.
    texts = decompressed((result / "val_texts.zst").read_bytes()) if with_texts else {}
    val_texts = {int(document): text for document, text in texts.items()}
    groups = decompressed((result / "groups.zst").read_bytes()) if with_groups else []

    with np.load(result / ARRAYS) as arrays:
        return Survey(
            arrays["keys"],
            arrays["positions"],
            arrays["n_bytes"],
            arrays["is_contaminated"],
            np.empty((0, 2)),  # see `precedences_of`
            np.empty(0, np.int64),  # see `units_of`
            np.empty((0, BANDS), np.uint64),  # they are in the sorted run
            val_texts,
            groups,
            rows,
            Counter(counts["dropped"]),
            counts["languages"],
            counts["left"],
        )


def write_parts(build: Build, name: str, parts: int) -> None:
    """Writes a number of tasks that became known between two passes.

    Args:
        name: of the number: key_parts, band_parts or searches.
    """
    durable.write_sealed(build.folder / f"{name}.json", {"parts": parts})


def parts_of(build: Build, name: str = "key_parts") -> int:
    """Returns the number that `write_parts` has written under this name.

    Raises:
        ArtefactError: its file is damaged.
        KeyError: it was not written yet.
    """
    return durable.read_json(build.folder / f"{name}.json", {"parts": int})["parts"]


def is_copy(build: Build, number: int, n_documents: int) -> np.ndarray:
    """Returns which documents of a task have the text of another document, which stays: (n_documents,) bool.

    Args:
        n_documents: those of the survey.

    Raises:
        ArtefactError: a file of the build is damaged. OSError: a result cannot be read.
    """
    parts = parts_of(build)
    task = build.task(number)
    class_number = build.classes.index(class_of(build.config, task))
    copies = np.zeros(n_documents, bool)
    for part in range(parts):
        _, documents = places_of_task(build.result("copies", class_number * parts + part) / COPIES, number)
        copies[documents] = True
    return copies


def save_places(path: Path, places: np.ndarray) -> None:
    """Writes places of documents for `places_of_task`.

    Args:
        places: (places, 2): task and number in it, rising.
    """
    # Tasks stand together, so that a binary search in the mapped file reads a few pages of it.
    np.save(path, np.ascontiguousarray(places.T, dtype=np.int64))


def places_of_task(path: Path, task: int) -> tuple[int, np.ndarray]:
    """Returns the position of the first place of a task in a file, and the numbers of its documents, (places,) int64.

    All tasks ask all such files, so the cost must not grow with the places of other tasks.
    """
    tasks, numbers = np.load(path, mmap_mode="r")
    begin, end = np.searchsorted(tasks, np.array([task, task + 1]))
    return int(begin), np.array(numbers[begin:end])


def precedences_of(build: Build, tasks: np.ndarray, numbers: np.ndarray, *, of_units: bool = False) -> np.ndarray:
    """Returns what orders documents: (documents, 4) float64, whether they are no val of the corpus that is extended,
    the number of the corpus and their `precedence_of`.

    An earlier corpus never gives way to a later one, which may be built when the earlier one is finished. Val of the
    corpus that is extended gives way to nothing.

    Args:
        tasks, numbers: (documents,) task of each document, and its number in the task.
        of_units: they stand for their units.
    """
    precedences = np.full((len(tasks), 4), np.inf)
    precedences[:, 0] = ~_has_old_fate(build, tasks, numbers, (VAL,), of_units=of_units)
    corpora = [*build.config.corpora]
    for number in np.unique(tasks).tolist():
        task = build.task(number)
        of_task = np.flatnonzero(tasks == number)
        precedences[of_task, 1] = corpora.index(task.corpus)
        if source_of(build.config, task).has_precedence:
            of_survey = np.load(build.survey(number) / PRECEDENCES, mmap_mode="r")
            precedences[of_task, 2:] = of_survey[numbers[of_task]]
    return precedences


def units_of(build: Build, number: int, n_documents: int) -> np.ndarray:
    """Returns for each document of a task the number of the first one of what is compared as a whole, (n_documents,)
    int64: its own, or that of its repository."""
    path = build.survey(number) / UNITS
    # Documents that a user holds out belong to no unit.
    units = np.load(path) if build.by_repository else np.empty(0, np.int64)
    return units if len(units) else np.arange(n_documents)


def old_fates(build: Build, number: int) -> np.ndarray:
    """Returns what became of the documents of a task of the corpus that is extended, (D,) int8, mapped."""
    return np.load(build.survey(number) / FATES, mmap_mode="r")


def write_first_documents(build: Build, first: Sequence[int]) -> None:
    """Writes the number of the first train document of each task of the corpus that is extended."""
    durable.write_sealed(build.folder / "first_documents.json", {"first": list(first)})


def first_documents(build: Build) -> list[int]:
    """Returns what `write_first_documents` has written.

    Raises:
        ArtefactError: the file is damaged.
    """
    return durable.read_json(build.folder / "first_documents.json", {"first": list})["first"]


def is_present(build: Build, records: np.ndarray, *, of_units: bool = False) -> np.ndarray:
    """Returns which documents take part in decisions, (records,) bool.

    These are the documents of new tasks. Of the corpus that is extended, these are the documents in its tars, without
    the excluded ones.

    Args:
        records: (records,) RECORD, of documents.
        of_units: they stand for their units, of which one document must be there.
    """
    tasks, numbers = records["task"], records["number"]
    return (tasks >= build.n_old) | _has_old_fate(build, tasks, numbers, (TRAIN, VAL), of_units=of_units)


def _has_old_fate(
    build: Build, tasks: np.ndarray, numbers: np.ndarray, fates: Sequence[int], *, of_units: bool
) -> np.ndarray:
    """Returns which documents belong to the corpus that is extended and had one of these fates there, (documents,)
    bool; False for documents of new tasks.

    Args:
        tasks, numbers: (documents,) task of each document, and its number in the task.
        of_units: a document stands for its unit, of which one document must have such a fate.
    """
    has_fate = np.zeros(len(tasks), bool)
    for task in np.unique(tasks[tasks < build.n_old]).tolist():
        of_task = np.isin(old_fates(build, task), fates)
        if of_units:
            units = units_of(build, task, len(of_task))
            is_of_unit = np.zeros(len(of_task), bool)
            is_of_unit[units[of_task]] = True
            of_task = is_of_unit
        chosen = np.flatnonzero(tasks == task)
        has_fate[chosen] = of_task[numbers[chosen]]
    return has_fate


def write_strings(result: Path, strings: Iterable[str]) -> None:
    """Writes strings for `read_strings`."""
    ends = array("Q", [0])
    with (result / "strings.txt").open("wb") as file:
        for string in strings:
            ends.append(ends[-1] + file.write(string.encode()))
    np.save(result / ENDS, np.array(ends))


def read_strings(result: Path, begin: int, n_strings: int) -> list[str]:
    """Returns some neighbouring strings, and reads no other ones."""
    ends = np.load(result / ENDS, mmap_mode="r")[begin : begin + n_strings + 1].tolist()
    with (result / "strings.txt").open("rb") as file:
        file.seek(ends[0])
        return [file.read(end - start).decode() for start, end in itertools.pairwise(ends)]


def read_again(build: Build, number: int, task_survey: Survey, rejected: Any = None) -> Iterator[Screening]:
    """Yields the screening of each document of a task, read and screened as the survey did, in its order.

    Args:
        task_survey: what the survey of this task has recorded.
        rejected: file that gets a line for each row that cannot be read; None: no file.

    Raises:
        ChangedInputError: the files hold other documents than at the survey.
    """
    task = build.task(number)
    source = source_of(build.config, task)
    with named(task):
        candidates = candidates_of(build.config, build.seed, task, build.listing(task))
        _, screened_candidates = screenings(build.config, source, candidates, rejected)
        is_cut = task_survey.left == 0
        yield from same_documents(task_survey.keys, screened_candidates, source_name(source), is_cut=is_cut)


@contextmanager
def named(task: BuildTask) -> Iterator[None]:
    """Adds the files of a task to an unexpected error."""
    try:
        yield
    except UserError:
        raise  # it names its file
    except Exception as error:
        names = [file.name for file in task.files] or ["generated text"]
        error.add_note(f"corpus {task.corpus}, a task of {len(names)} inputs: {names[0]} to {names[-1]}")
        raise


def compressed(value: Any) -> bytes:
    return zstandard.ZstdCompressor().compress(json.dumps(value).encode())


def decompressed(content: bytes) -> Any:
    return json.loads(zstandard.ZstdDecompressor().decompress(content))
