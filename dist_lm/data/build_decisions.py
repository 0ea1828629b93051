"""Decides on the documents of corpora of texts task by task, as `data.ingest` does in one reading after the other.

What tasks find is merged by sums, unions and the smallest place, so neither the number of workers nor the order in
which tasks end changes a decision:

1. `survey` reads a task: key, place, group and size of each document that passes the checks, and the texts that could
   be val.
2. Of equal keys, the first in the order of the plan stays; the others are copies.
3. `sizes_below` sums the bytes that each halving of `val_fraction` would hold out; `fitting_share` chooses the share.
4. `compare` compares train of a task with all held-out texts.
5. `kept_documents` applies the merged rule to a task.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from dist_lm.config.corpus import BYTES_PER_TOKEN, CorpusConfig, SourceConfig
from dist_lm.data.benchmarks import Benchmarks
from dist_lm.data.build_plan import BuildTask
from dist_lm.data.containment import Evidence, HeldOutIndex
from dist_lm.data.ingest import SplitRule, group_position, largest_share, split_of_group
from dist_lm.data.inputs import Inputs
from dist_lm.data.screening import Screened, check_candidate, screen
from dist_lm.data.sorted_runs import later_copies, merged, records_of
from dist_lm.data.sources.reader import Rejected, corpus_sources, reader_of, source_traits
from dist_lm.data.sources.snapshot import Snapshot

HALVINGS = 64  # of `val_fraction`: positions of groups have 64 bits
Run = Callable[[Callable[[BuildTask], object], Sequence[BuildTask]], Iterable]
"""Calls a function for each task, anywhere and in any order, and returns the results in the order of the tasks."""


@dataclass(frozen=True)
class Survey:
    """The documents of a task that pass the checks, duplicates included, in their order (D)."""

    keys: tuple[bytes, ...]
    positions: np.ndarray  # (D,) float64: hash of the group in [0, 1)
    n_bytes: np.ndarray  # (D,) int64, UTF-8
    is_contaminated: np.ndarray  # (D,) bool: the text has a part of a benchmark
    val_texts: Mapping[int, str]  # number of a document -> text, of those that `val_fraction` could hold out


@dataclass(frozen=True)
class Val:
    """The held-out texts of all corpora."""

    shares: Mapping[str, float]  # corpus -> share of the groups that is held out
    texts: Mapping[bytes, str]  # key -> text
    protected: frozenset[bytes]  # keys of texts of sources with `held_out`: train documents with one are dropped


def documents_of(
    config: CorpusConfig, seed: int, listings: Mapping[tuple[str, int], Inputs], task: BuildTask
) -> Iterator[Screened]:
    """Yields the documents of a task that pass the checks, duplicates included.

    Args:
        listings: (corpus, number of a source) -> its files; `files` must know all folders that are repositories.

    Raises:
        ChangedInputError: a file is not as it was listed.
        ConfigError, ArtefactError: as the reader.
    """
    source = source_of(config, task)
    read = reader_of(source)
    if source_traits(source).takes_files:
        files = Inputs((*task.files, *listings[task.corpus, task.source].left_out))
        candidates = read(source, seed, Snapshot(lambda: files))
    else:
        candidates = read(source, seed)

    for candidate in candidates:
        check_candidate(candidate, source)
        if isinstance(candidate, Rejected):
            continue
        record, reason = screen(candidate, source, config, ())
        if not reason:
            yield record


def survey(read: Callable[[BuildTask], Iterator[Screened]], config: CorpusConfig, task: BuildTask) -> Survey:
    """Reads a task for the first time.

    Args:
        read: gives the documents of a task.
    """
    benchmarks = Benchmarks.read(config.cleaning.benchmarks) if config.cleaning.benchmarks else None
    share = largest_share(config, task.corpus)
    keys, positions, sizes, contaminated = [], [], [], []
    val_texts: dict[int, str] = {}
    for number, record in enumerate(read(task)):
        text = record.document.text
        keys.append(record.key)
        positions.append(group_position(record.group))
        sizes.append(record.n_bytes)
        contaminated.append(benchmarks is not None and benchmarks.first_in(text) is not None)
        if record.source_config.held_out or split_of_group(record.group, share) == "val":
            val_texts[number] = text
    return Survey(
        tuple(keys), np.array(positions, float), np.array(sizes, np.int64), np.array(contaminated, bool), val_texts
    )


def dropped_documents(config: CorpusConfig, tasks: Sequence[BuildTask], surveys: Sequence[Survey]) -> list[np.ndarray]:
    """Returns which documents of each task are copies of earlier ones or contaminated: (D,) bool each.

    Copies are sought in each corpus, and of documents of sources with `held_out` only among these.
    """
    dropped = [task_survey.is_contaminated.copy() for task_survey in surveys]
    classes: dict[tuple[str, bool], list[int]] = {}
    for number, task in enumerate(tasks):
        classes.setdefault((task.corpus, source_of(config, task).held_out), []).append(number)
    for numbers in classes.values():
        for copy in later_copies(merged([records_of(surveys[number].keys, number) for number in numbers])):
            dropped[copy["task"]][copy["number"]] = True
    return dropped


def sizes_below(task: Survey, dropped: np.ndarray, val_fraction: float) -> np.ndarray:
    """Returns the bytes of a task that each halving of `val_fraction` holds out: (HALVINGS,) int64."""
    sizes = np.where(dropped, 0, task.n_bytes)
    return np.array([sizes[task.positions < val_fraction / 2**halving].sum() for halving in range(HALVINGS)], np.int64)


def fitting_share(n_bytes: np.ndarray, val_fraction: float, max_bytes: int) -> float:
    """Returns the largest halving of `val_fraction` whose held-out text has at most `max_bytes`; 0 if none has.

    Args:
        n_bytes: (HALVINGS,) sums of `sizes_below` over all tasks of a corpus.
    """
    fits = np.flatnonzero(n_bytes <= max_bytes)
    return val_fraction / 2 ** int(fits[0]) if len(fits) else 0.0


def choose_val(
    config: CorpusConfig, tasks: Sequence[BuildTask], surveys: Sequence[Survey], dropped: Sequence[np.ndarray]
) -> Val:
    """Returns the held-out texts, as `TextSplits` chooses them."""
    max_bytes = config.val_tokens * BYTES_PER_TOKEN
    totals: dict[str, np.ndarray] = {}
    for task, task_survey, task_dropped in zip(tasks, surveys, dropped, strict=True):
        below = sizes_below(task_survey, task_dropped, largest_share(config, task.corpus))
        totals[task.corpus] = totals.get(task.corpus, 0) + below
    shares = {name: fitting_share(total, largest_share(config, name), max_bytes) for name, total in totals.items()}

    texts: dict[bytes, str] = {}
    protected: set[bytes] = set()
    for task, task_survey, task_dropped in zip(tasks, surveys, dropped, strict=True):
        held_out = source_of(config, task).held_out
        for number, text in task_survey.val_texts.items():
            is_val = held_out or task_survey.positions[number] < shares[task.corpus]
            if is_val and not task_dropped[number]:
                texts.setdefault(task_survey.keys[number], text)
                if held_out:
                    protected.add(task_survey.keys[number])
    return Val(shares, texts, frozenset(protected))


def compare(
    read: Callable[[BuildTask], Iterator[Screened]], val: Val, dropped: Mapping[BuildTask, np.ndarray], task: BuildTask
) -> tuple[Evidence, set[bytes]]:
    """Reads a task for the second time. Returns what its train texts have of val, and the keys of those refused."""
    index = index_of(val)
    rule = SplitRule(val.shares)
    refused = set()
    for record, is_dropped in zip(read(task), dropped[task], strict=True):
        if is_dropped or record.key in val.protected or rule.split_of(task.corpus, record) == "val":
            continue
        if index.compare([record.document.text.encode()])[0]:
            refused.add(record.key)
    return index.evidence(), refused


def index_of(val: Val) -> HeldOutIndex:
    return HeldOutIndex([*val.texts.values()], [key in val.protected for key in val.texts])


def kept_documents(
    records: Iterable[Screened], corpus: str, rule: SplitRule, dropped: np.ndarray
) -> Iterator[tuple[str, Screened]]:
    """Yields `(split, document)` of the documents of a task that stay."""
    for record, is_dropped in zip(records, dropped, strict=True):
        split = rule.split_of(corpus, record)
        if not is_dropped and not rule.drop_reason(split, record):
            yield split, record


def decide(
    config: CorpusConfig,
    tasks: Sequence[BuildTask],
    read: Callable[[BuildTask], Iterator[Screened]],
    run: Run = map,
) -> tuple[SplitRule, list[np.ndarray]]:
    """Returns the rule for all texts, and which documents of each task are copies or contaminated.

    Raises:
        ConfigError, ArtefactError: as `documents_of`.
    """
    surveys = list(run(partial(survey, read, config), tasks))
    dropped = dropped_documents(config, tasks, surveys)
    val = choose_val(config, tasks, surveys, dropped)
    del surveys

    index = index_of(val)
    refused = set(val.protected)
    for evidence, refused_in_task in run(partial(compare, read, val, dict(zip(tasks, dropped, strict=True))), tasks):
        index.merge(evidence)
        refused |= refused_in_task
    keys = list(val.texts)
    leaked = frozenset(keys[number] for number in index.contained())
    return SplitRule(val.shares, leaked, frozenset(refused)), dropped


def source_of(config: CorpusConfig, task: BuildTask) -> SourceConfig:
    return corpus_sources(config, task.corpus)[task.source]
