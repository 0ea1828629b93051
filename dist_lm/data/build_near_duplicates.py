"""The passes of a build by tasks that find near-duplicates (`cleaning.near_duplicates`).

Each range of hashes of bands gives pairs of texts with a band in common. The caller joins them to groups, and groups to
searches. Then each task writes the windows of its texts that have such a neighbour, and each search compares the texts
of its groups in the order of the plan, or of `data.precedence`.
"""

import itertools
from array import array
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from dist_lm.data.build_folder import (
    BAND_RUN,
    COPIES,
    ENDS,
    UNITS,
    Build,
    is_copy,
    is_present,
    parts_of,
    places_of_task,
    precedences_of,
    read_again,
    read_strings,
    read_survey,
    save_places,
    units_of,
    write_strings,
)
from dist_lm.data.near_duplicate_groups import neighbours
from dist_lm.data.near_duplicates import band_hashes, common_bands, search, text_windows
from dist_lm.data.precedence import order_of_precedence
from dist_lm.data.sorted_runs import equals_next, read_part, with_equal_keys
from dist_lm.data.task_results import is_finished, writing
from dist_lm.document import Document

PAIRS, TEXTS, SEARCHES = "pairs.npy", "texts.npy", "searches.bin"
WINDOWS_OF_TEXTS, WINDOWS_ENDS = "windows.bin", "windows_ends.npy"
SEARCHED = np.dtype([("number", "<u4"), ("search", "<u4")])
"""A text that has a neighbour: its number in its task, and the number of its search."""


def neighbours_of_part(build: Build, number: int, result: Path) -> None:
    """Writes pairs of texts of a range of hashes to the folder `result`; the pairs connect all texts with a band in
    common.

    Args:
        number: number of the class of sources and of the range in it; texts of a class that is held out have no pairs.

    Raises:
        OSError: a file cannot be read or written.
    """
    class_number, part = divmod(number, parts_of(build, "band_parts"))
    pairs = np.empty((0, 2, 2), np.uint32)
    # Texts that a user holds out are in no relation to others.
    if not build.classes[class_number][1]:
        runs = [build.survey(task) / BAND_RUN for task in build.tasks_of_class(class_number)]
        records = with_equal_keys(read_part(runs, part, parts_of(build, "band_parts")))
        if build.n_old:
            records = records[is_present(build, records, of_units=True)]
        if not build.by_repository:
            records = _without_copies(build, records)
        pairs = neighbours(_beside_new_ones(build, records))
    np.save(result / PAIRS, pairs)


def _without_copies(build: Build, records: np.ndarray) -> np.ndarray:
    """Returns the records of texts that are no exact copies, in their order."""
    is_kept = np.ones(len(records), bool)
    for task in np.unique(records["task"]).tolist():
        of_task = np.flatnonzero(records["task"] == task)
        numbers = records["number"][of_task]
        is_kept[of_task] = ~is_copy(build, task, int(numbers.max()) + 1)[numbers]
    return records[is_kept]


def _beside_new_ones(build: Build, records: np.ndarray) -> np.ndarray:
    """Returns the records that share their band with a text of a new task, in their order; sorted by band."""
    if not build.n_old or not len(records):
        return records
    bands = np.cumsum(np.append(False, ~equals_next(records)))
    has_new_text = np.zeros(int(bands[-1]) + 1, bool)
    has_new_text[bands[records["task"] >= build.n_old]] = True
    return records[has_new_text[bands]]


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


def write_windows(build: Build, number: int, result: Path) -> None:
    """Writes the windows of the texts of a task that have a neighbour to the folder `result`; reads the inputs only if
    there are some.

    Raises:
        ChangedInputError: the inputs hold other documents than at the survey.
        OSError: a file cannot be read or written.
    """
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
    """Yields, for each sought unit of a task in its order, the unit's first document and the windows of all its
    documents: (W,) uint64, rising, each once, as in `text_windows`.

    Args:
        sought: numbers of the first documents.

    Raises:
        ChangedInputError: the inputs hold other documents than at the survey.
    """
    task_survey = read_survey(build, number)
    documents = (record.document for _, record, _ in read_again(build, number, task_survey) if record)
    firsts = units_of(build, number, len(task_survey.keys)).tolist()
    for first, unit in itertools.groupby(zip(firsts, documents, strict=True), key=lambda pair: pair[0]):
        if first in sought:
            windows: list[np.ndarray] = []
            first_document = None
            for _, document in unit:
                first_document = first_document or document
                windows.append(text_windows(document.text))
            assert first_document, "a group has a document"
            yield first_document, np.unique(np.concatenate(windows))


def search_texts(build: Build, number: int, result: Path) -> None:
    """Compares the texts of the groups of one search, and writes to `result` which ones are dropped, in the order of
    tasks, each with the source of the text that it resembles.

    Args:
        number: number of the search.

    Raises:
        OSError: a file cannot be read or written.
    """
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
        order = order_of_precedence(precedences_of(build, *place_of.T, of_units=True))
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
    is_old = (place_of[:, 0] < build.n_old).tolist()
    similar = search(shared_bands, in_order, build.config.cleaning.near_duplicates, is_old)
    pairs = np.array(array("q", itertools.chain.from_iterable(similar)), np.int64).reshape(-1, 2)
    # Found in the order of precedence, they are written in that of their places.
    pairs = pairs[np.lexsort(place_of[pairs[:, 0]].T[::-1])]
    save_places(result / COPIES, place_of[pairs[:, 0]])

    # The place of the resembled text stands beside that of the dropped one.
    def source_of_text(text: int) -> str:
        (source,) = read_strings(build.result("windows", int(place_of[text, 0])), int(position_of[text]), 1)
        return source

    write_strings(result, map(source_of_text, pairs[:, 1].tolist()))


def _near_copies(build: Build, number: int) -> Iterator[tuple[Path, int, np.ndarray]]:
    """Yields the documents of a task that are nearly earlier ones: (result of a search, position of the first in it,
    numbers of the documents); nothing without a search, and no search without such documents.
    """
    if not build.config.cleaning.near_duplicates:
        return
    for search_number in range(parts_of(build, "searches")):
        result = build.result("search", search_number)
        begin, documents = places_of_task(result / COPIES, number)
        if len(documents):
            yield result, begin, documents


def is_near_copy(build: Build, number: int, n_documents: int) -> np.ndarray:
    """Returns which documents of a task are nearly earlier ones, with all of their units: (n_documents,) bool.

    Raises:
        ArtefactError: a file of the build is damaged. OSError: a result cannot be read.
    """
    near_copies = np.zeros(n_documents, bool)
    for _, _, documents in _near_copies(build, number):
        near_copies[documents] = True
    return near_copies[units_of(build, number, n_documents)]


def resembled_sources(build: Build, number: int) -> dict[int, str]:
    """Returns the near-duplicates among the documents of a task: number of the document -> place of the earlier one
    that it resembles, as its reader names it. Empty if near-duplicates are not sought.

    Raises:
        ArtefactError: a file of the build is damaged. OSError: a result cannot be read.
    """
    sources: dict[int, str] = {}
    for result, begin, documents in _near_copies(build, number):
        sources |= dict(zip(documents.tolist(), read_strings(result, begin, len(documents)), strict=True))
    if build.by_repository and sources:
        firsts = np.load(build.survey(number) / UNITS).tolist()
        sources = {document: sources[first] for document, first in enumerate(firsts) if first in sources}
    return sources


def without_near_copies(build: Build, records: np.ndarray) -> np.ndarray:
    """Returns the records of documents that are no near-duplicates, in their order. With a search by repository, all
    documents of a dropped unit are left out.

    Args:
        records: (records,) RECORD, of documents.

    Raises:
        OSError: a result of a search cannot be read.
    """
    firsts = records["number"].astype(np.uint64)
    for task in np.unique(records["task"]).tolist():
        of_task = np.flatnonzero(records["task"] == task)
        numbers = records["number"][of_task]
        firsts[of_task] = units_of(build, task, int(numbers.max()) + 1)[numbers]
    places = records["task"].astype(np.uint64) << np.uint64(32) | firsts

    is_near_copy = np.zeros(len(records), bool)
    for search_number in range(parts_of(build, "searches")):
        tasks, numbers = np.load(build.result("search", search_number) / COPIES).astype(np.uint64)
        dropped = tasks << np.uint64(32) | numbers  # rising
        is_near_copy |= np.isin(places, dropped)
    return records[~is_near_copy]
