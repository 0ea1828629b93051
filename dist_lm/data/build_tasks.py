"""Runs the tasks of a build of corpora of texts: plain functions from files to a result on disk, on any node.

    survey   of each task of the plan: reads, cleans, screens and hashes its documents
    limits   the same of tasks of sources with `limit`, in turn: each must know which texts came before
    copies   of each range of keys: the documents whose text an earlier one has
    neighbours, windows, search   only with `cleaning.near_duplicates` (`data.build_near_duplicates`)
    compare  of each task: what its train texts have of the held-out texts, which were chosen in between
             (`data.build_comparison`)
    write    of each task: tokenizes what is kept, and writes a tar for each split

A build has a folder: `settings.json`, the tasks of the plan, and a result for each task of each pass
(`data.task_results`). A task depends on results of the passes before it alone, and in a pass of `IN_TURN` on earlier
tasks of it. So tasks of a pass run anywhere and in any order, and a task that was lost runs again.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from dist_lm.config.corpus import SPLITS
from dist_lm.data.benchmarks import Benchmarks
from dist_lm.data.build_comparison import compare_train, fates
from dist_lm.data.build_decisions import (
    BENCHMARK,
    DUPLICATE,
    NEAR_DUPLICATE,
    OVERLAPPING,
    TRAIN,
    VAL,
    Rule,
    SourceLimit,
    candidates_of,
    is_among,
    source_of,
    survey,
)
from dist_lm.data.build_folder import (
    ARRAYS,
    BAND_RUN,
    COPIES,
    PRECEDENCES,
    RUN,
    UNITS,
    Build,
    class_of,
    named,
    opened,
    parts_of,
    precedences_of,
    read_again,
    read_survey,
    save_places,
    write_survey,
)
from dist_lm.data.build_near_duplicates import (
    neighbours_of_part,
    resembled_sources,
    search_texts,
    without_near_copies,
    write_windows,
)
from dist_lm.data.build_plan import BuildTask
from dist_lm.data.ingest import cleaned
from dist_lm.data.manifest import Recipe, Shard, shard_name
from dist_lm.data.near_duplicate_groups import band_records
from dist_lm.data.precedence import order_of_precedence
from dist_lm.data.screening import IngestReport, note_dropped
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
from dist_lm.data.task_results import is_finished, writing
from dist_lm.document import TokenizedDocument
from dist_lm.tokenizer.tokenizer import Tokenizer

REVISION = 7  # one more with every change to the results of tasks: those of another revision are not used
REPORT, REJECTED_ROWS = "report.json", "rejected.jsonl"


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
    with named(task):
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
    """Returns what the limit of a source leaves to a task, in documents, from the surveys of the tasks before it; None:
    the source has no limit.

    Raises:
        ArtefactError: a survey is damaged.
        OSError: a file cannot be read.
    """
    left = source_of(build.config, task).limit
    if not left:
        return None
    if number:
        before = build.task(number - 1)
        if (before.corpus, before.source) == (task.corpus, task.source):
            left = read_survey(build, number - 1).left
            assert left is not None, "all tasks of a source have its limit"

    class_number = build.classes.index(class_of(build.config, task))
    earlier_runs = [build.run_of_keys(earlier) for earlier in build.tasks_of_class(class_number) if earlier < number]

    def count_new(keys: Sequence[bytes]) -> int:
        return int((~among_runs(records_of(keys, number), earlier_runs)).sum())

    return SourceLimit(left, count_new)


# --- copies ---


def _copies(build: Build, number: int, result: Path) -> None:
    class_number, part = divmod(number, parts_of(build))
    runs = [build.run_of_keys(task) for task in build.tasks_of_class(class_number)]
    records = read_part(runs, part, parts_of(build))
    if build.by_repository:
        records = without_near_copies(build, with_equal_keys(records))
    if build.is_by_rule(class_number):
        records = with_equal_keys(records)
        precedences = precedences_of(build, records["task"], records["number"])
        # Sorted by key first, so that equal ones stay neighbours.
        is_next_key = np.append(True, ~equals_next(records))[: len(records)]
        records = records[order_of_precedence(np.column_stack([np.cumsum(is_next_key), precedences]))]
    copies = later_copies(records)
    task_and_number = np.stack([copies["task"], copies["number"]], axis=1)
    save_places(result / COPIES, task_and_number[np.lexsort([task_and_number[:, 1], task_and_number[:, 0]])])


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
        np.savez(
            temporary / ARRAYS,
            leaked=rule.leaked,
            refused=rule.refused,
            excluded=rule.excluded,
            causes=rule.causes,
            first=first,
        )


@lru_cache(1)
def read_rule(build: Build) -> tuple[Rule, np.ndarray]:
    """Returns what `write_rule` has written: the rule, and `first`, (tasks, splits, 2) int64; cached."""
    result = build.result("rule", 0)
    with np.load(result / ARRAYS) as arrays:
        shares = json.loads((result / "shares.json").read_text())
        keys = (arrays[name] for name in ("leaked", "refused", "excluded", "causes"))
        return Rule(shares, *keys), arrays["first"]


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

    position: float  # of its group, as in `Survey`
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
    # Documents for which the corpus that is extended excludes documents: key -> source.
    is_cause = is_among(task_survey.keys, rule.causes)
    causes: dict[str, str] = {}
    waiting: list[_Encoded] = []  # documents that are written when all of the task are known

    with ExitStack() as stack:
        rejected = stack.enter_context((result / REJECTED_ROWS).open("w", encoding="utf-8"))
        for writer in writers.values():
            stack.callback(writer.abandon_tar)  # of an error; finished ones stay
        for candidate, record, reason in read_again(build, number, task_survey, rejected):
            if record is None:
                report.reject(candidate, source, reason)
                continue

            document_number, fate = next(task_fates)
            if is_cause[document_number] and fate != DUPLICATE:
                causes[record.key.hex()] = record.document.source
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

        # As `order_in_tar`, which tells the places of documents later.
        for encoded in sorted(waiting, key=lambda encoded: encoded.position):
            writers[encoded.split].write(encoded.document, task.source, encoded.content)
        for writer in writers.values():
            writer.finish()

    shards = {split: [shard.to_json() for shard in tars.finished[split]] for split in SPLITS}
    content = {
        "report": asdict(report),
        "report_of_val": asdict(report_of_val),
        "shards": shards,
        "held_out_causes" if source.held_out else "causes": causes,
    }
    (result / REPORT).write_text(json.dumps(content), encoding="utf-8")


@dataclass(frozen=True)
class Written:
    """What a task of the pass `write` made."""

    report: IngestReport
    report_of_val: IngestReport  # val documents that were dropped, which are judged behind all of train
    shards: dict[str, list[Shard]]
    # key -> source, of documents for which the corpus that is extended excludes others: of copies, and of texts of
    # sources with `held_out`
    causes: dict[bytes, str]
    held_out_causes: dict[bytes, str]


def read_written(build: Build, number: int) -> Written:
    """Returns what a task wrote.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    content = json.loads((build.result("write", number) / REPORT).read_text(encoding="utf-8"))
    shards = {
        split: [Shard.parse(shard, shard["name"]) for shard in shards] for split, shards in content["shards"].items()
    }
    report, report_of_val = (IngestReport.from_json(content[key]) for key in ("report", "report_of_val"))
    causes, held_out_causes = (
        {bytes.fromhex(key): source for key, source in content.get(name, {}).items()}
        for name in ("causes", "held_out_causes")
    )
    return Written(report, report_of_val, shards, causes, held_out_causes)


def _content(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


PASSES = {
    "survey": _survey,
    "limits": _survey,
    "copies": _copies,
    "neighbours": neighbours_of_part,
    "windows": write_windows,
    "search": search_texts,
    "compare": compare_train,
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
