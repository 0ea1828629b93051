"""Builds corpora of texts by tasks: their documents, splits and order are those of a build in one process.

The caller of the passes holds the survey of one task at a time, all held-out texts, and the keys that are dropped for
them. Between the passes it sums arrays; what it does grows with the documents by about a microsecond each.

A corpus differs from that of `data.ingest` in its tars alone: each task writes one for each split, so `shard_tokens`
does not count.
"""

import hashlib
import itertools
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dist_lm.config.corpus import BYTES_PER_TOKEN, SPLITS, CorpusConfig
from dist_lm.data.build_comparison import (
    Val,
    fates,
    merge_comparison,
    read_new_val,
    read_val,
    write_val,
)
from dist_lm.data.build_decisions import (
    EXCLUDED,
    OVERLAPPING,
    TRAIN,
    VAL,
    Rule,
    fitting_share,
    left_beside,
    sizes_below,
    sorted_keys,
    source_of,
)
from dist_lm.data.build_folder import RUN, Build, is_copy, old_fates, read_survey, write_parts
from dist_lm.data.build_near_duplicates import PAIRS, SEARCHED, write_searches
from dist_lm.data.build_plan import TASK_BYTES, BuildTask, plan_source
from dist_lm.data.build_tasks import (
    REJECTED_ROWS,
    read_rule,
    read_written,
    write_rule,
)
from dist_lm.data.earlier import EarlierCorpora, has_placeholder
from dist_lm.data.extension import Extension, causes_of_exclusions, exclude, unpack
from dist_lm.data.ingest import (
    Groups,
    NothingHeldOutError,
    largest_share,
    no_train,
    too_much_held_out,
    why_nothing_is_held_out,
)
from dist_lm.data.inputs import Inputs
from dist_lm.data.journal import REJECTED, Journal
from dist_lm.data.kept_decisions import KeptDecisions, keep_decisions
from dist_lm.data.manifest import ListInputs, Recipe, Shard, index_path, read_manifest
from dist_lm.data.near_duplicate_groups import AT_ONCE, TextGroups
from dist_lm.data.near_duplicates import BANDS
from dist_lm.data.screening import (
    LANGUAGES,
    IngestReport,
    RowErrors,
    SourceReader,
    no_document,
    text_key,
    too_many_languages,
)
from dist_lm.data.shard_writer import complete, origins_path
from dist_lm.data.sorted_runs import n_parts, n_records
from dist_lm.data.sources.files import by_repository
from dist_lm.data.sources.reader import corpus_sources, source_traits
from dist_lm.data.task_workers import RunPass
from dist_lm.storage import durable

SEARCH_TEXTS = 100_000  # texts that one task compares for near-duplicates, unless one group has more


def plan_of(
    config: CorpusConfig,
    corpora: Sequence[str],
    list_inputs: ListInputs,
    task_bytes: int = TASK_BYTES,
    old_tasks: Sequence[BuildTask] = (),
    n_old_sources: int = 0,
) -> tuple[list[BuildTask], dict[tuple[str, int], Inputs]]:
    """Returns the tasks of corpora, in the order in which a build in one process reads their files, and by (corpus,
    number of a source) what each task must know of the whole source.

    Args:
        old_tasks: of the finished corpus that is extended, which come first.
        n_old_sources: the number of its sources, which have these tasks.

    Raises:
        ConfigError, ArtefactError: as `list_inputs`.
    """
    tasks = [*old_tasks]
    listings = {}
    for corpus in corpora:
        for number, source in enumerate(corpus_sources(config, corpus)):
            listing = list_inputs(source)
            listings[corpus, number] = left_beside(source, listing)
            if number < n_old_sources:
                continue

            files = [(file, "") for file in listing.taken]
            if source.reader == "files":
                files = by_repository(listing, source.path or [])
            # A reader that does not say which files it opens reads them all.
            if not source_traits(source).takes_files:
                files = []
            tasks += plan_source(corpus, number, files, task_bytes)
    return tasks, listings


def run_passes(
    folder: Path,
    tasks: Sequence[BuildTask],
    run_pass: RunPass,
    built_corpora: Sequence[str],
    together: Sequence[str],
    earlier: EarlierCorpora,
    reader: SourceReader,
    extension: Extension | None = None,
) -> None:
    """Runs all passes of the build of a folder, but for those tasks whose results are there.

    Args:
        folder: `Build.write` has written settings and plan.
        built_corpora: corpora whose tars are written.
        together: corpora whose train and val are compared with each other, `built_corpora` among them. Texts of the
            others in the plan are only what later ones may be copies of (`cleaning.across_corpora`).
        earlier: finished corpora that stay as they are, compared in both directions.
        reader: told which documents each source has given.
        extension: the finished corpus whose tasks are the first ones of the plan. They are neither surveyed nor written
            again.

    Raises:
        ConfigError, ArtefactError: as `ingest.split_documents`.
        UserError: workers die again and again.
        OSError: a file cannot be read or written.
    """
    build = Build(folder)
    all_numbers, new_numbers = range(len(tasks)), range(build.n_old, len(tasks))
    if extension:
        unpack(build, extension)
    deque(run_pass(folder, "survey", [number for number in new_numbers if number not in build.limited]), maxlen=0)
    if limited := sorted(build.limited.intersection(new_numbers)):
        deque(run_pass(folder, "limits", limited), maxlen=0)
    n_documents = sum(n_records(build.survey(number) / RUN) for number in all_numbers)
    write_parts(build, "key_parts", n_parts(n_documents))

    def find_copies() -> None:
        deque(run_pass(folder, "copies", range(n_parts(n_documents) * len(build.classes))), maxlen=0)
        require_readable(build, tasks, reader)

    def find_near_duplicates() -> None:
        band_parts = n_parts(n_documents * BANDS)
        write_parts(build, "band_parts", band_parts)
        deque(run_pass(folder, "neighbours", range(band_parts * len(build.classes))), maxlen=0)
        n_searches = choose_searches(build, band_parts * len(build.classes))
        deque(run_pass(folder, "windows", all_numbers), maxlen=0)
        deque(run_pass(folder, "search", range(n_searches)), maxlen=0)

    if build.by_repository:
        find_near_duplicates()
    find_copies()
    if build.config.cleaning.near_duplicates and not build.by_repository:
        find_near_duplicates()

    compared_tasks = {number: tasks[number] for number in new_numbers if tasks[number].corpus in together}
    groups, least_val_bytes = choose_val(build, compared_tasks, earlier, extension)
    deque(run_pass(folder, "compare", [*range(build.n_old), *compared_tasks]), maxlen=0)
    choose_rule(build, compared_tasks, built_corpora, earlier, groups, least_val_bytes)
    deque(
        run_pass(folder, "write", [number for number in new_numbers if tasks[number].corpus in built_corpora]), maxlen=0
    )


def require_readable(build: Build, tasks: Sequence[BuildTask], reader: SourceReader) -> None:
    """Refuses a source of which too little can be read; returns nothing. It reads the surveys of all tasks.

    Args:
        reader: told which documents each source has given, as `screening.screened` tells it.

    Raises:
        ArtefactError: too many rows of a source are broken, it gives no document, or other ones than before
            (ChangedInputError).
        ConfigError: a corpus has too many languages.
        OSError: a file cannot be read.
    """
    languages: dict[str, set[str]] = {}
    # What is extended was judged when it was built.
    for number in range(build.n_old):
        languages.setdefault(tasks[number].corpus, set()).update(read_survey(build, number).languages)
    for (corpus, source_number), numbers in _numbers_by_source(tasks).items():
        if numbers[0] < build.n_old:
            continue

        source = source_of(build.config, tasks[numbers[0]])
        rows = RowErrors(source, build.config.max_bad_fraction)
        dropped: Counter[str] = Counter()
        documents = hashlib.blake2b(digest_size=16)
        n_documents = 0
        for number in numbers:
            task_survey = read_survey(build, number, with_groups=True)
            rows.add(task_survey.rows.n_rows, task_survey.rows.n_bad, task_survey.rows.first)
            dropped += task_survey.dropped

            copies = is_copy(build, number, len(task_survey.keys))
            if copies.any():
                dropped["duplicate"] += int(copies.sum())
            for document in np.flatnonzero(~copies).tolist():
                documents.update(task_survey.keys[document].tobytes())
                documents.update(task_survey.groups[document].encode())
                n_documents += 1
            for language, location in task_survey.languages.items():
                languages.setdefault(corpus, set()).add(language)
                if len(languages[corpus]) > LANGUAGES:
                    raise too_many_languages(build.config, corpus, location)

        # Broken rows are the better explanation for a source without documents, so they are checked first.
        rows.check()
        if not n_documents:
            raise no_document(build.config, corpus, source, dropped)
        reader.require_same(corpus, source_number, source, documents.digest())


def choose_searches(build: Build, n_results: int) -> int:
    """Joins the pairs of texts with a band in common to groups, and groups to searches of about `SEARCH_TEXTS` texts;
    writes both. Returns the number of searches.

    Memory: nine bytes a text.

    Args:
        n_results: of the pass `neighbours`.

    Raises:
        OSError: a file cannot be read or written.
    """
    # Texts are numbered in the order of the plan, so a smaller number is an earlier text.
    ends = np.cumsum([0, *(n_records(build.survey(number) / RUN) for number in range(build.n_tasks))])
    n_texts = int(ends[-1])
    text_groups = TextGroups(n_texts)
    has_neighbour = np.zeros(n_texts, bool)
    for number in range(n_results):
        # Results of a band that very many texts share are large.
        pairs = np.load(build.result("neighbours", number) / PAIRS, mmap_mode="r")
        for begin in range(0, len(pairs), AT_ONCE):
            task_and_number = np.array(pairs[begin : begin + AT_ONCE])
            numbers = ends[task_and_number[:, :, 0]] + task_and_number[:, :, 1]
            text_groups.join(numbers)
            has_neighbour[numbers.ravel()] = True
    groups = text_groups.groups()

    # Groups are filled into searches by their first texts.
    sizes = np.zeros(n_texts, np.uint32)
    for begin in range(0, n_texts, AT_ONCE):
        part = slice(begin, begin + AT_ONCE)
        np.add.at(sizes, groups[part][has_neighbour[part]], 1)
    n_before = 0
    search_of_group = sizes  # in the same memory
    for begin in range(0, n_texts, AT_ONCE):
        ends_of_part = n_before + np.cumsum(sizes[begin : begin + AT_ONCE], dtype=np.int64)
        first_of_part = ends_of_part - sizes[begin : begin + AT_ONCE]
        n_before = int(ends_of_part[-1])
        search_of_group[begin : begin + AT_ONCE] = first_of_part // SEARCH_TEXTS

    def searches_of_tasks() -> Iterator[np.ndarray]:
        for begin, end in itertools.pairwise(ends.tolist()):
            numbers = np.flatnonzero(has_neighbour[begin:end])
            texts = np.empty(len(numbers), SEARCHED)
            texts["number"], texts["search"] = numbers, search_of_group[groups[begin:end][numbers]]
            yield texts

    write_searches(build, searches_of_tasks())
    n_searches = -(-n_before // SEARCH_TEXTS)
    write_parts(build, "searches", n_searches)
    return n_searches


def choose_val(
    build: Build, tasks: Mapping[int, BuildTask], earlier: EarlierCorpora, extension: Extension | None = None
) -> tuple[dict[str, Groups], dict[str, int]]:
    """Chooses and writes the held-out texts, as `ingest.TextSplits` does.

    Args:
        tasks: number -> task, of the corpora that are compared.
        earlier: finished corpora, whose val no train text may contain.
        extension: the corpus that is extended, whose val stays, and beside which the new one must fit.

    Returns:
        Of each corpus, facts about its groups, and the bytes of the least part that could be held out; 0 if even
        `val_fraction` holds out no text.

    Raises:
        ConfigError: the sources with `held_out` of a corpus exceed `val_tokens`.
        ArtefactError, UserError: an earlier corpus cannot be read, see `EarlierCorpora.documents`.
        OSError: a file cannot be read.
    """
    config = build.config
    max_bytes = config.val_tokens * BYTES_PER_TOKEN
    first_share = {corpus: largest_share(config, corpus) for corpus in {task.corpus for task in tasks.values()}}
    if extension:
        max_bytes = max(0, max_bytes - extension.n_val_bytes)
        first_share = {corpus: min(share, extension.decisions.share) for corpus, share in first_share.items()}
    bytes_below: dict[str, np.ndarray] = {}
    held_out_bytes: Counter[str] = Counter()
    groups: dict[str, Groups] = {}
    for number, task in tasks.items():
        task_survey = read_survey(build, number)
        is_dropped = fates(build, number, task_survey, Rule({})) > VAL
        below = sizes_below(task_survey, is_dropped, first_share[task.corpus])
        bytes_below[task.corpus] = bytes_below.get(task.corpus, 0) + below
        if source_of(config, task).held_out:
            held_out_bytes[task.corpus] += int(task_survey.n_bytes[~is_dropped].sum())
            if held_out_bytes[task.corpus] > max_bytes:
                raise too_much_held_out(config, task.corpus)
        _add_positions(groups.setdefault(task.corpus, Groups()), task_survey.positions[~is_dropped])

    shares = {corpus: fitting_share(below, first_share[corpus], max_bytes) for corpus, below in bytes_below.items()}
    texts: dict[bytes, str] = {}
    protected: set[bytes] = set()
    for number, task in tasks.items():
        task_survey = read_survey(build, number, with_texts=True)
        task_fates = fates(build, number, task_survey, Rule(shares))
        for document, text in task_survey.val_texts.items():
            if task_fates[document] == VAL:
                key = task_survey.keys[document].tobytes()
                texts.setdefault(key, text)
                if source_of(config, task).held_out:
                    protected.add(key)
    n_own, is_redacted = len(texts), False
    excluding, unseen = set(protected), {}
    for corpora in (extension.itself, earlier) if extension else (earlier,):
        for document in corpora.documents("val"):
            key = text_key(document.text.encode())
            texts.setdefault(key, document.text)
            protected.add(key)
            is_redacted = is_redacted or has_placeholder(document.text)
    for folder, corpora in (extension.unseen if extension else {}).items():
        unseen |= {text_key(document.text.encode()): folder for document in corpora.documents("val")}
    excluding |= unseen.keys()
    write_val(build, Val(shares, texts, protected, n_own, is_redacted, excluding, unseen))
    least = {corpus: int(below[below > 0][-1]) if below.any() else 0 for corpus, below in bytes_below.items()}
    return groups, least


def choose_rule(
    build: Build,
    tasks: Mapping[int, BuildTask],
    built_corpora: Sequence[str],
    earlier: EarlierCorpora,
    groups: Mapping[str, Groups],
    least_val_bytes: Mapping[str, int],
) -> None:
    """Merges the comparisons into the complete rule, and numbers tars and documents; writes both.

    Args:
        tasks: as in `choose_val`.
        built_corpora, earlier: as in `run_passes`.
        groups, least_val_bytes: as in `choose_val`, for errors.

    Raises:
        NothingHeldOutError: one of these corpora has no val.
        ArtefactError: it has no train, or an earlier corpus is damaged.
        UserError: a process that reads earlier corpora died.
        OSError: a file cannot be read or written.
    """
    val, index = read_val(build)
    index.take_evidence()
    refused = set(val.protected)
    for number in tasks:
        refused.update(key.tobytes() for key in merge_comparison(build, number, index))
    keys = list(val.texts)
    leaked = {keys[number] for number in index.contained()}
    excluded: set[bytes] = set()
    if build.n_old:
        new_val = read_new_val(build)
        new_val.index.take_evidence()
        for number in range(build.n_old):
            excluded.update(key.tobytes() for key in merge_comparison(build, number, new_val.index))
        leaked |= {new_val.keys[number] for number in new_val.index.contained()}
    # Train of earlier corpora is read last, because nothing is compared if no val text is left.
    rest = [key for key in keys[: val.n_own] if key not in leaked]
    leaked |= {rest[number] for number in earlier.contained([val.texts[key] for key in rest])}
    rule = Rule(val.shares, sorted_keys(leaked), sorted_keys(refused), sorted_keys(excluded))
    if build.n_old:
        rule = replace(rule, causes=causes_of_exclusions(build, rule))

    n_tars = {corpus: [0] * len(SPLITS) for corpus in built_corpora}
    n_documents = {corpus: [0] * len(SPLITS) for corpus in built_corpora}
    if build.n_old:
        (corpus,), base = built_corpora, read_manifest(build.base)
        n_tars[corpus] = [len(base.splits[split].shards) for split in SPLITS]
        n_documents[corpus] = [base.splits[split].counts.documents for split in SPLITS]
    n_overlapping: Counter[str] = Counter()
    first = np.zeros((build.n_tasks, len(SPLITS), 2), np.int64)
    for number, task in tasks.items():
        if task.corpus not in built_corpora:
            continue
        counts = np.bincount(fates(build, number, read_survey(build, number), rule), minlength=OVERLAPPING + 1)
        n_overlapping[task.corpus] += int(counts[OVERLAPPING])
        for split, n_kept in enumerate(counts[[TRAIN, VAL]].tolist()):
            first[number, split] = n_tars[task.corpus][split], n_documents[task.corpus][split]
            n_tars[task.corpus][split] += bool(n_kept)
            n_documents[task.corpus][split] += n_kept

    for corpus in built_corpora:
        n_train, n_val = n_documents[corpus]
        if not n_val:
            n_chosen = n_overlapping[corpus]
            least = 0 if n_chosen else least_val_bytes[corpus]
            cause = why_nothing_is_held_out(build.config, corpus, groups[corpus], n_chosen, least)
            share = groups[corpus].smallest if groups[corpus].several and not n_chosen and not least else None
            raise NothingHeldOutError(
                f"corpus {corpus}: none of its {n_train} documents is held out: {cause}", share, groups[corpus].n_read
            )
        if not n_train:
            raise no_train(corpus, n_val)
    write_rule(build, rule, first)


def publish(
    build: Build, tasks: Sequence[BuildTask], corpus: str, directory: Path, recipe: Recipe, **facts: Any
) -> None:
    """Completes a corpus from the tars of its tasks. The tars stay with the tasks too, so it can be repeated.

    Args:
        facts: `licences`, `inputs`, `settings` and `documents` of the manifest.

    Raises:
        ArtefactError: the folder holds files that are not ours, or its manifest or journal is damaged.
        OSError: a file cannot be read or written.
    """
    journal = Journal.start(directory, recipe)
    report, report_of_val = IngestReport(), IngestReport()
    causes: dict[bytes, str] = {}
    held_out_causes: dict[bytes, str] = {}
    numbers = [number for number, task in enumerate(tasks) if task.corpus == corpus]
    if build.n_old:
        base = read_manifest(build.base)
        report.add(IngestReport.from_json(base.ingest))
        for split in SPLITS:
            _link_tars(build.base, directory, journal, split, base.splits[split].shards)

    with (directory / REJECTED).open("wb") as rejected:
        if build.n_old and (build.base / REJECTED).is_file():
            rejected.write((build.base / REJECTED).read_bytes())
        for number in numbers[build.n_old :]:
            written = read_written(build, number)
            report.add(written.report)
            report_of_val.add(written.report_of_val)
            causes = written.causes | causes
            held_out_causes = written.held_out_causes | held_out_causes
            result = build.result("write", number)
            rejected.write((result / REJECTED_ROWS).read_bytes())
            for split, shards in written.shards.items():
                _link_tars(result, directory, journal, split, shards)

        excluded: dict[str, Any] = {}
        rule, _ = read_rule(build)
        if build.n_old:
            excluded = exclude(build, rule, causes, held_out_causes, directory, rejected)
    report.add(report_of_val)

    share = KeptDecisions.share_of(build.base) if build.n_old else rule.shares[corpus]
    decisions = keep_decisions(build, numbers, partial(_kept_fates, build, rule), share, directory)
    complete(journal, asdict(report), decisions=decisions, excluded=excluded, **facts)


def _kept_fates(build: Build, rule: Rule, number: int) -> np.ndarray:
    """Returns what became of the documents of a task, for a later build: (D,) int8."""
    task_fates = fates(build, number, read_survey(build, number), rule)
    if number < build.n_old:
        task_fates[(old_fates(build, number) == TRAIN) & (task_fates != TRAIN)] = EXCLUDED
    return task_fates


def _link_tars(folder: Path, directory: Path, journal: Journal, split: str, shards: Sequence[Shard]) -> None:
    """Gives finished tars of a folder to a corpus, with origins and indices, but for those that it has."""
    for shard in shards:
        if shard in journal.finished[split]:
            continue
        name = journal.begin(split)
        assert name == shard.name, (name, shard.name)
        for path in (origins_path(folder / name), index_path(folder / name), folder / name):
            # An index is a cache, which is made again.
            if path.exists() or path != index_path(folder / name):
                _link(path, directory / path.name)
        durable.fsync(directory)
        journal.finish(split, shard)


def _numbers_by_source(tasks: Sequence[BuildTask]) -> dict[tuple[str, int], list[int]]:
    """Returns the numbers of the tasks of each source, by (corpus, number of the source)."""
    numbers: dict[tuple[str, int], list[int]] = {}
    for number, task in enumerate(tasks):
        numbers.setdefault((task.corpus, task.source), []).append(number)
    return numbers


def _add_positions(groups: Groups, positions: np.ndarray) -> None:
    """Counts documents by the hashes of their groups, as `Groups.add` does."""
    if not len(positions):
        return
    first = groups.first or repr(float(positions[0]))
    groups.several = groups.several or bool((positions != float(first)).any())
    groups.first = first
    groups.smallest = min(groups.smallest, float(positions.min()))
    groups.n_read += len(positions)


def _link(path: Path, to: Path) -> None:
    """Gives a file a second name; copies it where the file system has no links."""
    to.unlink(missing_ok=True)
    try:
        os.link(path, to)
    except OSError:
        shutil.copy2(path, to)
        durable.fsync(to)
