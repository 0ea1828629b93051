"""Runs the tasks of a build of corpora of texts: plain functions from files to a result on disk, on any node.

    survey   of each task of the plan: reads, cleans, screens and hashes its documents
    limits   the same of tasks of sources with `limit`, in turn: each must know which texts came before
    copies   of each range of keys: the documents whose text an earlier one has
    neighbours, windows, search   only with `cleaning.near_duplicates`: see below
    compare  of each task: what its train texts have of the held-out texts, which were chosen in between
    write    of each task: tokenizes what is kept, and writes a tar for each split

A build has a folder: `settings.json`, the tasks of the plan, and a result for each task of each pass
(`data.task_results`). A task depends on results of the passes before it alone, and in a pass of `IN_TURN` on earlier
tasks of it. So tasks of a pass run anywhere and in any order, and a task that was lost runs again.
"""

import hashlib
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from dist_lm.config.corpus import REPOSITORY, SPLITS, CleaningConfig, CorpusConfig
from dist_lm.data.benchmarks import Benchmarks
from dist_lm.data.build_decisions import (
    BENCHMARK,
    DUPLICATE,
    NEAR_DUPLICATE,
    OVERLAPPING,
    TRAIN,
    VAL,
    Rule,
    Screening,
    SourceLimit,
    Survey,
    candidates_of,
    compare,
    fates_of,
    same_documents,
    screenings,
    source_of,
    survey,
)
from dist_lm.data.build_plan import BuildTask
from dist_lm.data.containment import Evidence, HeldOutIndex
from dist_lm.data.ingest import cleaned
from dist_lm.data.inputs import Input, Inputs
from dist_lm.data.manifest import Recipe, Shard, shard_name
from dist_lm.data.near_duplicate_groups import band_records, neighbours
from dist_lm.data.near_duplicates import BANDS, band_hashes, common_bands, search, text_windows
from dist_lm.data.precedence import is_by_rule, order_of_precedence
from dist_lm.data.screening import IngestReport, RowErrors, note_dropped, source_name
from dist_lm.data.shard_writer import SplitWriter
from dist_lm.data.sorted_runs import (
    among_runs,
    equals_next,
    later_copies,
    read_part,
    records_of,
    with_equal_keys,
    write_run,
)
from dist_lm.data.sources.reader import Rejected
from dist_lm.data.task_results import is_finished, writing
from dist_lm.document import Document, TokenizedDocument
from dist_lm.errors import ArtefactError, UserError
from dist_lm.storage import durable
from dist_lm.tokenizer.tokenizer import Tokenizer

REVISION = 6  # one more with every change to the results of tasks: those of another revision are not used
RUN, COPIES, REPORT, REJECTED_ROWS = "keys.run", "copies.npy", "report.json", "rejected.jsonl"
ARRAYS, BAND_RUN, PAIRS = "arrays.npz", "bands.run", "pairs.npy"
TEXTS, ENDS, SEARCHES, WINDOWS_OF_TEXTS = "texts.npy", "ends.npy", "searches.bin", "windows.bin"
WINDOWS_ENDS, PRECEDENCES, UNITS = "windows_ends.npy", "precedences.npy", "units.npy"
SEARCHED = np.dtype([("number", "<u4"), ("search", "<u4")])
"""A text that has a neighbour: its number in its task, and the number of its search."""
WINDOWS = "windows_"  # begins the name of an array about windows of a number of words


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
            path, {"config": dict, "seed": int, "tokenizer": str, "classes": list, "limited": list}
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

    def write(
        self,
        config: CorpusConfig,
        seed: int,
        tokenizer_model: Path,
        tasks: list[BuildTask],
        listings: Mapping[tuple[str, int], Inputs],
    ) -> None:
        """Writes settings and plan. Files that are there already are those of the same build, and stay."""
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
            "limited": [number for number, task in enumerate(tasks) if source_of(config, task).limit],
        }
        durable.write_sealed(self.folder / "settings.json", settings)

    def _listing_path(self, corpus: str, source: int) -> Path:
        return self.folder / f"listing-{corpus}-{source}.json"


def class_of(config: CorpusConfig, task: BuildTask) -> tuple[str, bool]:
    """Returns the class in which copies of the documents of a task are sought, as of `Build.classes`."""
    is_held_out = source_of(config, task).held_out
    # A text that a user holds out is compared with those of its own corpus alone.
    if config.cleaning.across_corpora and not is_held_out:
        return "", False
    return task.corpus, is_held_out


@lru_cache(1)
def opened(folder: Path) -> Build:
    """Returns the build of a folder; a worker reads its settings once."""
    return Build(folder)


def run_task(folder: Path, pass_name: str, number: int) -> None:
    """Runs one task of a pass, unless its result is finished.

    Args:
        folder: of the build.

    Raises:
        ConfigError, ArtefactError: as the reader of the source; ChangedInputError: an input is not as it was.
        OSError: a file cannot be read or written.
    """
    build = opened(folder)
    result = build.result(pass_name, number)
    if is_finished(result):
        return
    with writing(result) as temporary:
        PASSES[pass_name](build, number, temporary)


# --- survey ---


def _survey(build: Build, number: int, result: Path) -> None:
    task = build.task(number)
    with _named(task):
        candidates = candidates_of(build.config, build.seed, task, build.listing(task))
        task_survey = survey(build.config, task, candidates, _limit(build, number, task))
    write_run(result / RUN, records_of([key.tobytes() for key in task_survey.keys], number))
    if build.config.cleaning.near_duplicates:
        write_run(result / BAND_RUN, band_records(task_survey.bands, number, np.unique(task_survey.units)))
        if build.by_repository:
            np.save(result / UNITS, task_survey.units)
    if len(task_survey.precedences):
        np.save(result / PRECEDENCES, task_survey.precedences)
    write_survey(result, task_survey)


def _limit(build: Build, number: int, task: BuildTask) -> SourceLimit | None:
    """Returns what the limit of a source leaves to a task, from the surveys of the tasks before it."""
    left = source_of(build.config, task).limit
    if not left:
        return None
    if number:
        before = build.task(number - 1)
        if (before.corpus, before.source) == (task.corpus, task.source):
            left = read_survey(build, number - 1).left
            assert left is not None, "all tasks of a source have its limit"

    class_number = build.classes.index(class_of(build.config, task))
    earlier_runs = [build.survey(earlier) / RUN for earlier in build.tasks_of_class(class_number) if earlier < number]

    def count_new(keys: Sequence[bytes]) -> int:
        return int((~among_runs(records_of(keys, number), earlier_runs)).sum())

    return SourceLimit(left, count_new)


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
    (result / "counts.json").write_text(json.dumps(counts), encoding="utf-8")
    (result / "val_texts.zst").write_bytes(_compressed(task_survey.val_texts))
    (result / "groups.zst").write_bytes(_compressed(task_survey.groups))


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
    counts = json.loads((result / "counts.json").read_text(encoding="utf-8"))
    rows = RowErrors(source_of(build.config, build.task(number)), build.config.max_bad_fraction)
    rows.add(counts["n_rows"], counts["n_bad"], [Rejected(**row) for row in counts["first"]])
    texts = _decompressed((result / "val_texts.zst").read_bytes()) if with_texts else {}
    val_texts = {int(document): text for document, text in texts.items()}
    groups = _decompressed((result / "groups.zst").read_bytes()) if with_groups else []
    with np.load(result / ARRAYS) as arrays:
        return Survey(
            arrays["keys"],
            arrays["positions"],
            arrays["n_bytes"],
            arrays["is_contaminated"],
            np.empty((0, 2)),  # see `_precedences`
            np.empty(0, np.int64),  # see `_units`
            np.empty((0, BANDS), np.uint64),  # they are in the sorted run
            val_texts,
            groups,
            rows,
            Counter(counts["dropped"]),
            counts["languages"],
            counts["left"],
        )


# --- copies ---


def _copies(build: Build, number: int, result: Path) -> None:
    class_number, part = divmod(number, parts_of(build))
    runs = [build.survey(task) / RUN for task in build.tasks_of_class(class_number)]
    records = read_part(runs, part, parts_of(build))
    if build.by_repository:
        records = _without_near_copies(build, with_equal_keys(records))
    if build.is_by_rule(class_number):
        records = with_equal_keys(records)
        precedences = _precedences(build, records["task"], records["number"])
        # Sorted by key first, so that equal ones stay neighbours.
        is_next_key = np.append(True, ~equals_next(records))[: len(records)]
        records = records[order_of_precedence(np.column_stack([np.cumsum(is_next_key), precedences]))]
    copies = later_copies(records)
    task_and_number = np.stack([copies["task"], copies["number"]], axis=1)
    save_places(result / COPIES, task_and_number[np.lexsort([task_and_number[:, 1], task_and_number[:, 0]])])


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
        _, documents = _places_of_task(build.result("copies", class_number * parts + part) / COPIES, number)
        copies[documents] = True
    return copies


def save_places(path: Path, places: np.ndarray) -> None:
    """Writes places of documents for `_places_of_task`.

    Args:
        places: (places, 2): task and number in it, rising.
    """
    # Tasks stand together, so that a binary search in the mapped file reads a few pages of it.
    np.save(path, np.ascontiguousarray(places.T, dtype=np.int64))


def _places_of_task(path: Path, task: int) -> tuple[int, np.ndarray]:
    """Returns the position of the first place of a task in a file, and the numbers of its documents, (places,) int64.

    All tasks ask all such files, so the cost must not grow with the places of other tasks.
    """
    tasks, numbers = np.load(path, mmap_mode="r")
    begin, end = np.searchsorted(tasks, np.array([task, task + 1]))
    return int(begin), np.array(numbers[begin:end])


def fates(build: Build, number: int, task_survey: Survey, rule: Rule) -> np.ndarray:
    """Returns what becomes of each document of a task, as `fates_of`: (D,) int8 of `TRAIN` to `CONTAINS_VAL`.

    Args:
        number: of the task.
        rule: with an empty one, no document is held out or dropped for what others contain.

    Raises:
        ArtefactError: a file is damaged.
        OSError: a file cannot be read or written.
    """
    task = build.task(number)
    copies = is_copy(build, number, len(task_survey.keys))
    near_copies = np.zeros(len(task_survey.keys), bool)
    for _, _, documents in _near_copies(build, number):
        near_copies[documents] = True
    near_copies = near_copies[_units(build, number, len(near_copies))]
    share = rule.shares.get(task.corpus, 0.0)
    return fates_of(task_survey, copies, near_copies, source_of(build.config, task).held_out, share, rule)


def _precedences(build: Build, tasks: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Returns what orders documents: (documents, 3) float64, the number of the corpus and their `precedence_of`.

    An earlier corpus never gives way to a later one, which may be built when the earlier one is finished.

    Args:
        tasks, numbers: (documents,) task of each document, and its number in the task.
    """
    precedences = np.full((len(tasks), 3), np.inf)
    corpora = [*build.config.corpora]
    for number in np.unique(tasks).tolist():
        task = build.task(number)
        of_task = np.flatnonzero(tasks == number)
        precedences[of_task, 0] = corpora.index(task.corpus)
        if source_of(build.config, task).has_precedence:
            of_survey = np.load(build.survey(number) / PRECEDENCES, mmap_mode="r")
            precedences[of_task, 1:] = of_survey[numbers[of_task]]
    return precedences


def _units(build: Build, number: int, n_documents: int) -> np.ndarray:
    """Returns for each document of a task the number of the first one of what is compared as a whole, (n_documents,)
    int64: its own, or that of its repository."""
    path = build.survey(number) / UNITS
    # Documents that a user holds out belong to no unit.
    units = np.load(path) if build.by_repository else np.empty(0, np.int64)
    return units if len(units) else np.arange(n_documents)


def _without_near_copies(build: Build, records: np.ndarray) -> np.ndarray:
    """Returns the records of documents that are no near-duplicates, in their order.

    Args:
        records: (records,) RECORD, of documents.
    """
    firsts = records["number"].astype(np.uint64)
    for task in np.unique(records["task"]).tolist():
        of_task = np.flatnonzero(records["task"] == task)
        numbers = records["number"][of_task]
        firsts[of_task] = _units(build, task, int(numbers.max()) + 1)[numbers]
    places = records["task"].astype(np.uint64) << np.uint64(32) | firsts

    is_near_copy = np.zeros(len(records), bool)
    for search_number in range(parts_of(build, "searches")):
        tasks, numbers = np.load(build.result("search", search_number) / COPIES).astype(np.uint64)
        dropped = tasks << np.uint64(32) | numbers  # rising
        is_near_copy |= np.isin(places, dropped)
    return records[~is_near_copy]


# --- near-duplicates ---
#
# Each range of hashes of bands gives pairs of texts with a band in common. The caller joins them to groups, and groups
# to searches. Then each task writes the windows of its texts that have such a neighbour, and each search compares the
# texts of its groups in the order of the plan, or of `data.precedence`.


def _neighbours(build: Build, number: int, result: Path) -> None:
    class_number, part = divmod(number, parts_of(build, "band_parts"))
    pairs = np.empty((0, 2, 2), np.uint32)
    # Texts that a user holds out are in no relation to others.
    if not build.classes[class_number][1]:
        runs = [build.survey(task) / BAND_RUN for task in build.tasks_of_class(class_number)]
        records = with_equal_keys(read_part(runs, part, parts_of(build, "band_parts")))
        pairs = neighbours(records if build.by_repository else _without_copies(build, records))
    np.save(result / PAIRS, pairs)


def _without_copies(build: Build, records: np.ndarray) -> np.ndarray:
    """Returns the records of texts that are no exact copies, in their order."""
    is_kept = np.ones(len(records), bool)
    for task in np.unique(records["task"]).tolist():
        of_task = np.flatnonzero(records["task"] == task)
        numbers = records["number"][of_task]
        is_kept[of_task] = ~is_copy(build, task, int(numbers.max()) + 1)[numbers]
    return records[is_kept]


def write_searches(build: Build, searches_of_tasks: Iterable[np.ndarray]) -> None:
    """Writes which search compares which texts.

    Args:
        searches_of_tasks: the texts of each task that have a neighbour, (texts,) SEARCHED, in their order.

    Raises:
        OSError: a file cannot be read or written.
    """
    result = build.result("searches", 0)
    if is_finished(result):
        return
    with writing(result) as temporary:
        ends = [0]
        with (temporary / SEARCHES).open("wb") as file:
            for texts in searches_of_tasks:
                file.write(texts.tobytes())
                ends.append(ends[-1] + len(texts))
        np.save(temporary / ENDS, np.array(ends))


def _windows(build: Build, number: int, result: Path) -> None:
    of_searches = build.result("searches", 0)
    begin, end = np.load(of_searches / ENDS, mmap_mode="r")[number : number + 2].tolist()
    texts = np.fromfile(of_searches / SEARCHES, SEARCHED, end - begin, offset=begin * SEARCHED.itemsize)

    ends = [0]
    sources: list[str] = []
    with (result / WINDOWS_OF_TEXTS).open("wb") as file:
        if len(texts):
            for document, windows in _windows_of_units(build, number, set(texts["number"].tolist())):
                file.write(windows.tobytes())
                ends.append(ends[-1] + len(windows))
                sources.append((build.by_repository and document.repository) or document.source)
    np.save(result / TEXTS, texts)
    np.save(result / WINDOWS_ENDS, np.array(ends))
    write_strings(result, sources)


def _windows_of_units(build: Build, number: int, sought: set[int]) -> Iterator[tuple[Document, np.ndarray]]:
    """Yields the windows of each sought unit of a task, with its first document: (W,) uint64, as of `text_windows`.

    Args:
        sought: numbers of the first documents.
    """
    task_survey = read_survey(build, number)
    documents = (record.document for _, record, _ in _read_again(build, number, task_survey) if record)
    firsts = _units(build, number, len(task_survey.keys)).tolist()
    for first, unit in itertools.groupby(zip(firsts, documents, strict=True), key=lambda pair: pair[0]):
        if first in sought:
            windows: list[np.ndarray] = []
            first_document = None
            for _, document in unit:
                first_document = first_document or document
                windows.append(text_windows(document.text))
            assert first_document, "a group has a document"
            yield first_document, np.unique(np.concatenate(windows))


def _search(build: Build, number: int, result: Path) -> None:
    text_places, spans, positions = [np.empty((0, 2), np.int64)], [np.empty((0, 2), np.int64)], [np.empty(0, np.int64)]
    for task in range(build.n_tasks):
        texts = np.load(build.result("windows", task) / TEXTS)
        chosen = np.flatnonzero(texts["search"] == number)
        if len(chosen):
            ends = np.load(build.result("windows", task) / WINDOWS_ENDS)
            text_places.append(np.stack([np.full(len(chosen), task), texts["number"][chosen]], axis=1))
            spans.append(np.stack([ends[chosen], ends[chosen + 1]], axis=1))
            positions.append(chosen)
    place_of, span_of, position_of = np.concatenate(text_places), np.concatenate(spans), np.concatenate(positions)
    if any(map(build.is_by_rule, range(len(build.classes)))):
        order = order_of_precedence(_precedences(build, *place_of.T))
        place_of, span_of, position_of = place_of[order], span_of[order], position_of[order]

    def windows_of(text: int) -> np.ndarray:
        begin, end = span_of[text].tolist()
        path = build.result("windows", int(place_of[text, 0])) / WINDOWS_OF_TEXTS
        return np.fromfile(path, np.uint64, end - begin, offset=begin * 8)

    # Groups of several classes may be in one search. Texts of different classes have no band in common.
    class_of_task = np.empty(build.n_tasks, np.uint64)
    for class_number in range(len(build.classes)):
        class_of_task[build.tasks_of_class(class_number)] = class_number

    # A group may have a million texts, so none of them is an object for long.
    n_texts = len(place_of)
    shared_bands = common_bands(
        band_hashes(windows_of(text)) + class_of_task[place_of[text, 0]] for text in range(n_texts)
    )
    in_order = ((text, partial(windows_of, text)) for text in range(n_texts))
    similar = search(shared_bands, in_order, build.config.cleaning.near_duplicates)
    pairs = np.array(array("q", itertools.chain.from_iterable(similar)), np.int64).reshape(-1, 2)
    # Found in the order of precedence, they are written in that of their places.
    pairs = pairs[np.lexsort(place_of[pairs[:, 0]].T[::-1])]
    save_places(result / COPIES, place_of[pairs[:, 0]])

    # The place of the resembled text stands beside that of the dropped one.
    def source_of_text(text: int) -> str:
        (source,) = _read_strings(build.result("windows", int(place_of[text, 0])), int(position_of[text]), 1)
        return source

    write_strings(result, map(source_of_text, pairs[:, 1].tolist()))


def write_strings(result: Path, strings: Iterable[str]) -> None:
    """Writes strings for `_read_strings`."""
    ends = array("Q", [0])
    with (result / "strings.txt").open("wb") as file:
        for string in strings:
            ends.append(ends[-1] + file.write(string.encode()))
    np.save(result / ENDS, np.array(ends))


def _read_strings(result: Path, begin: int, n_strings: int) -> list[str]:
    """Returns some neighbouring strings, and reads no other ones."""
    ends = np.load(result / ENDS, mmap_mode="r")[begin : begin + n_strings + 1].tolist()
    with (result / "strings.txt").open("rb") as file:
        file.seek(ends[0])
        return [file.read(end - start).decode() for start, end in itertools.pairwise(ends)]


def _near_copies(build: Build, number: int) -> Iterator[tuple[Path, int, np.ndarray]]:
    """Yields the documents of a task that are nearly earlier ones: (result of a search, position of the first in it,
    numbers of the documents)."""
    if not build.config.cleaning.near_duplicates:
        return
    for search_number in range(parts_of(build, "searches")):
        result = build.result("search", search_number)
        begin, documents = _places_of_task(result / COPIES, number)
        if len(documents):
            yield result, begin, documents


def resembled_sources(build: Build, number: int) -> dict[int, str]:
    """Returns the near-duplicates among the documents of a task: number of the document -> place of the earlier one
    that it resembles, as its reader names it. Empty if near-duplicates are not sought.

    Raises:
        ArtefactError: a file of the build is damaged. OSError: a result cannot be read.
    """
    sources: dict[int, str] = {}
    for result, begin, documents in _near_copies(build, number):
        sources |= dict(zip(documents.tolist(), _read_strings(result, begin, len(documents)), strict=True))
    if build.by_repository and sources:
        firsts = np.load(build.survey(number) / UNITS).tolist()
        sources = {document: sources[first] for document, first in enumerate(firsts) if first in sources}
    return sources


# --- compare ---


@dataclass(frozen=True)
class Val:
    """The held-out texts that tasks compare train with."""

    shares: dict[str, float]  # corpus -> share of the groups that is held out
    texts: dict[bytes, str]  # key -> text
    protected: set[bytes]  # keys of texts that train gives way to: of sources with `held_out`, and of earlier corpora
    n_own: int  # the texts behind these are of earlier corpora
    is_redacted: bool  # whether texts of earlier corpora have placeholders


def write_val(build: Build, val: Val) -> None:
    """Writes the held-out texts of all corpora for the tasks that compare.

    Raises:
        OSError: a file cannot be read or written.
    """
    result = build.result("val", 0)
    if is_finished(result):
        return
    with writing(result) as temporary:
        content = {
            "shares": val.shares,
            "texts": {key.hex(): text for key, text in val.texts.items()},
            "protected": sorted(key.hex() for key in val.protected),
            "n_own": val.n_own,
            "is_redacted": val.is_redacted,
        }
        (temporary / "val.zst").write_bytes(_compressed(content))


@lru_cache(1)
def read_val(build: Build) -> tuple[Val, HeldOutIndex]:
    """Returns the held-out texts and their index, whose texts are in the order of `Val.texts`.

    A process makes the index once, so what the index has found in train stays from one call to the next.
    """
    content = _decompressed((build.result("val", 0) / "val.zst").read_bytes())
    val = Val(
        content["shares"],
        {bytes.fromhex(key): text for key, text in content["texts"].items()},
        {bytes.fromhex(key) for key in content["protected"]},
        content["n_own"],
        content["is_redacted"],
    )
    return val, HeldOutIndex([*val.texts.values()], [key in val.protected for key in val.texts])


def _compare(build: Build, number: int, result: Path) -> None:
    val, index = read_val(build)
    index.take_evidence()  # of a task that failed
    task_survey = read_survey(build, number)
    task_fates = fates(build, number, task_survey, Rule(val.shares))
    documents = (record for _, record, _ in _read_again(build, number, task_survey) if record is not None)
    refused = compare(index, val.protected, val.is_redacted, task_fates, documents)
    evidence = index.take_evidence()
    arrays: dict[str, Any] = {f"{WINDOWS}{size}": in_train for size, in_train in evidence.in_train.items()}
    short = np.array(sorted(evidence.contained_short), np.int64)
    np.savez_compressed(result / ARRAYS, refused=refused, short=short, **arrays)


def merge_comparison(build: Build, number: int, index: HeldOutIndex) -> np.ndarray:
    """Adds what the train texts of a task have of val to `index`. Returns the keys of the refused train texts: sorted,
    (refused, KEY) uint8."""
    with np.load(build.result("compare", number) / ARRAYS) as arrays:
        windows = (name for name in arrays.files if name.startswith(WINDOWS))
        in_train = {int(name.removeprefix(WINDOWS)): arrays[name] for name in windows}
        index.merge(Evidence(in_train, frozenset(arrays["short"].tolist())))
        return arrays["refused"]


# --- write ---


def write_rule(build: Build, rule: Rule, first: np.ndarray) -> None:
    """Writes the complete rule and the places of tasks in the corpus.

    Args:
        first: (tasks, splits, 2) int64: number of the tar, and of its first document in the split.

    Raises:
        OSError: a file cannot be read or written.
    """
    result = build.result("rule", 0)
    if is_finished(result):
        return
    with writing(result) as temporary:
        (temporary / "shares.json").write_text(json.dumps(rule.shares))
        np.savez(temporary / ARRAYS, leaked=rule.leaked, refused=rule.refused, first=first)


@lru_cache(1)
def read_rule(build: Build) -> tuple[Rule, np.ndarray]:
    """Returns what `write_rule` has written: the rule, and `first`, (tasks, splits, 2) int64; cached."""
    result = build.result("rule", 0)
    with np.load(result / ARRAYS) as arrays:
        shares = json.loads((result / "shares.json").read_text())
        return Rule(shares, arrays["leaked"], arrays["refused"]), arrays["first"]


@dataclass
class _TarsOfTask:
    """The tars of one task, as `SplitWriter` needs them."""

    directory: Path
    recipe: Recipe
    numbers: dict[str, int]  # split -> number of the tar
    documents: dict[str, int]  # split -> number of its first document
    finished: dict[str, list[Shard]] = field(default_factory=lambda: {split: [] for split in SPLITS})

    def begin(self, split: str) -> str:
        assert not self.finished[split], "a task writes one tar a split"
        return shard_name(split, self.numbers[split])

    def finish(self, split: str, shard: Shard) -> None:
        self.finished[split].append(shard)


@dataclass(frozen=True)
class _Encoded:
    """A document of a task as it is written."""

    position: float  # of its group, as of `Survey`
    split: str
    document: TokenizedDocument
    content: bytes  # hash of its text


def _write(build: Build, number: int, result: Path) -> None:
    config, task = build.config, build.task(number)
    source = source_of(config, task)
    rule, first = read_rule(build)
    task_survey = read_survey(build, number)
    task_fates = enumerate(fates(build, number, task_survey, rule).tolist())
    resembled = resembled_sources(build, number)
    benchmarks = Benchmarks.read(config.cleaning.benchmarks) if task_survey.is_contaminated.any() else None
    tokenizer = Tokenizer.load(build.tokenizer_model)

    # Neither `shard_tokens` nor the settings that only a manifest compares change the bytes of a tar.
    recipe = Recipe("", tokenizer.vocab_size, "", config.documents_per_member, shard_tokens=0)
    places = {split: first[number, place].tolist() for place, split in enumerate(SPLITS)}
    tars = _TarsOfTask(
        result,
        recipe,
        {split: tar for split, (tar, _) in places.items()},
        {split: document for split, (_, document) in places.items()},
    )
    writers = {split: SplitWriter(split, tars) for split in SPLITS}
    report, report_of_val = IngestReport(), IngestReport()
    waiting: list[_Encoded] = []  # documents that are written when all of the task are known

    with ExitStack() as stack:
        rejected = stack.enter_context((result / REJECTED_ROWS).open("w", encoding="utf-8"))
        for writer in writers.values():
            stack.callback(writer.abandon_tar)  # of an error; finished ones stay
        for candidate, record, reason in _read_again(build, number, task_survey, rejected):
            if record is None:
                report.reject(candidate, source, reason)
                continue

            document_number, fate = next(task_fates)
            if fate in (TRAIN, VAL):
                split = SPLITS[fate]
                document = cleaned(config, record, split, report)
                position = float(task_survey.positions[document_number])
                encoded = _Encoded(position, split, tokenizer.encode_document(document), _content(document.text))
                if config.shuffle_in_tasks:
                    waiting.append(encoded)
                else:
                    writers[split].write(encoded.document, task.source, encoded.content)
            elif fate == BENCHMARK:
                contamination = benchmarks.first_in(record.document.text) if benchmarks else None
                assert contamination is not None, "the survey found it in the same text"
                reason = f"benchmark {contamination.benchmark}"
                report.reject(candidate, source, reason)
                note_dropped(rejected, record.document, reason, words=contamination.words)
            elif fate == NEAR_DUPLICATE:
                report.reject(candidate, source, "near_duplicate")
                note_dropped(rejected, record.document, "near_duplicate", resembles=resembled[document_number])
            elif fate == DUPLICATE:
                report.reject(candidate, source, "duplicate")
            elif fate == OVERLAPPING:
                report_of_val.reject(candidate, source, "overlapping")
            else:
                report.reject(candidate, source, "contains_val")

        # Positions are hashes of repositories, and of texts without one, so their order is a random one. The sort is
        # stable: a repository stays whole, its documents in the order of the source.
        for encoded in sorted(waiting, key=lambda encoded: encoded.position):
            writers[encoded.split].write(encoded.document, task.source, encoded.content)
        for writer in writers.values():
            writer.finish()

    shards = {split: [shard.to_json() for shard in tars.finished[split]] for split in SPLITS}
    content = {"report": asdict(report), "report_of_val": asdict(report_of_val), "shards": shards}
    (result / REPORT).write_text(json.dumps(content), encoding="utf-8")


@dataclass(frozen=True)
class Written:
    """What a task of the pass `write` made."""

    report: IngestReport
    report_of_val: IngestReport  # val documents that were dropped, which are judged behind all of train
    shards: dict[str, list[Shard]]


def read_written(build: Build, number: int) -> Written:
    """Returns what a task wrote."""
    content = json.loads((build.result("write", number) / REPORT).read_text(encoding="utf-8"))
    shards = {
        split: [Shard.parse(shard, shard["name"]) for shard in shards] for split, shards in content["shards"].items()
    }
    report, report_of_val = (IngestReport.from_json(content[key]) for key in ("report", "report_of_val"))
    return Written(report, report_of_val, shards)


def _read_again(build: Build, number: int, task_survey: Survey, rejected: Any = None) -> Iterator[Screening]:
    """Reads a task as the survey did.

    Raises:
        ChangedInputError: it has other documents.
    """
    task = build.task(number)
    source = source_of(build.config, task)
    with _named(task):
        candidates = candidates_of(build.config, build.seed, task, build.listing(task))
        _, screened_candidates = screenings(build.config, source, candidates, rejected)
        is_cut = task_survey.left == 0
        yield from same_documents(task_survey.keys, screened_candidates, source_name(source), is_cut=is_cut)


@contextmanager
def _named(task: BuildTask) -> Iterator[None]:
    """Adds the files of a task to an unexpected error."""
    try:
        yield
    except UserError:
        raise  # it names its file
    except Exception as error:
        names = [file.name for file in task.files] or ["generated text"]
        error.add_note(f"corpus {task.corpus}, a task of {len(names)} inputs: {names[0]} to {names[-1]}")
        raise


def _content(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _compressed(value: Any) -> bytes:
    return zstandard.ZstdCompressor().compress(json.dumps(value).encode())


def _decompressed(content: bytes) -> Any:
    return json.loads(zstandard.ZstdDecompressor().decompress(content))


PASSES = {
    "survey": _survey,
    "limits": _survey,
    "copies": _copies,
    "neighbours": _neighbours,
    "windows": _windows,
    "search": _search,
    "compare": _compare,
    "write": _write,
}
IN_TURN = ("limits",)  # passes whose tasks run one after the other, in their order
BY_INPUTS = (
    "survey",
    "limits",
    "windows",
    "compare",
    "write",
)  # passes whose tasks read the inputs of the task of that number


def sizes_of_pass(tasks: Sequence[BuildTask], pass_name: str, numbers: Sequence[int]) -> dict[int, float]:
    """Returns about how many bytes of inputs each task of a pass stands for; tasks that read results share them."""
    if pass_name in BY_INPUTS:
        # Texts that are generated have no size.
        return {number: max(tasks[number].n_bytes, 1) for number in numbers}
    return dict.fromkeys(numbers, sum(task.n_bytes for task in tasks) / max(1, len(numbers)))
