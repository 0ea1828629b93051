"""The passes of a build by tasks: bytes a second of a core for each, and what its one serial process costs a document.

The passes run on generated text with changed copies, in this process, and are timed in its CPU seconds. The serial part
is that between the passes. It is timed over made-up results of tasks of the size that a terabyte has, each of which
looks up as many other results: so its cost a document is the terabyte's.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dist_lm.config.corpus import CorpusConfig, SourceConfig
from dist_lm.config.root import Config
from dist_lm.data.build_by_tasks import (
    SEARCH_TEXTS,
    choose_rule,
    choose_searches,
    choose_val,
    plan_of,
    require_readable,
    run_passes,
)
from dist_lm.data.build_comparison import WINDOWS, read_val
from dist_lm.data.build_decisions import KEY, Survey
from dist_lm.data.build_folder import ARRAYS, COPIES, RUN, Build, save_places, write_parts, write_strings, write_survey
from dist_lm.data.build_near_duplicates import PAIRS
from dist_lm.data.build_plan import TASK_BYTES, BuildTask
from dist_lm.data.build_tasks import run_task
from dist_lm.data.earlier import EarlierCorpora
from dist_lm.data.near_duplicates import BANDS
from dist_lm.data.screening import RowErrors, SourceReader
from dist_lm.data.sorted_runs import n_parts, records_of, write_run
from dist_lm.data.task_results import writing

SURVEY, SEARCH = "read, hash and sign, a core MB/s", "search for copies, a core MB/s"
COMPARE, WRITE = "compare, a core MB/s", "write, a core MB/s"
SERIAL, TERABYTE = "serial, a document µs", "serial part of a terabyte h"
PASSES_OF = {
    SURVEY: ("survey",),
    SEARCH: ("copies", "neighbours", "windows", "search"),
    COMPARE: ("compare",),
    WRITE: ("write",),
}
COPIES_FILE = "copies.parquet"  # behind the others, which have names of digits
SIMILARITY = 0.8
COPIED, CHANGED_WORD = 4, 50  # each such document has a copy, in which each such word is another one

TERABYTE_DOCUMENTS, DOCUMENT_BYTES = 200_000_000, 5_000
TASK_DOCUMENTS = TASK_BYTES // DOCUMENT_BYTES
MADE_UP_TASKS = 20
COPY_SHARE, NEIGHBOUR_SHARE = 0.1, 0.2  # of made-up documents: exact copies; texts with a band of another one
PAIR_RESULTS = 16  # results of the pass `neighbours` that hold the made-up pairs


def write_copies(folder: Path, texts: Sequence[str]) -> int:
    """Writes a changed copy of each `COPIED`th text as a parquet file; returns the bytes of the copies."""
    import pyarrow
    from pyarrow import parquet

    copies = []
    for text in texts[::COPIED]:
        words = text.split(" ")
        words[CHANGED_WORD::CHANGED_WORD] = ["changed" for _ in words[CHANGED_WORD::CHANGED_WORD]]
        copies.append(" ".join(words))
    ids = [*range(len(texts), len(texts) + len(copies))]
    parquet.write_table(pyarrow.table({"id": ids, "text": copies}), folder / COPIES_FILE)
    return sum(len(copy.encode()) for copy in copies)


def run_build(config: Config, folder: Path, tokenizer_model: Path) -> dict[str, float]:
    """Runs all passes in this process.

    Args:
        folder: of the build; empty.

    Returns:
        CPU seconds of each pass.

    Raises:
        ArtefactError: a manifest is missing or damaged.
        OSError: a file cannot be read or written.
        ConfigError: a source is invalid.
    """
    seconds: dict[str, float] = {}

    def run_pass(folder: Path, pass_name: str, numbers: Sequence[int]) -> Iterator[int]:
        for number in numbers:
            began = time.process_time()
            run_task(folder, pass_name, number)
            seconds[pass_name] = seconds.get(pass_name, 0.0) + time.process_time() - began
            yield number

    reader = SourceReader(config.seed)
    names = [*config.corpus.corpora]
    tasks, listings = plan_of(config.corpus, names, reader.files)
    build = Build(folder)
    build.write(config.corpus, config.seed, tokenizer_model, tasks, listings)
    run_passes(folder, tasks, run_pass, names, names, EarlierCorpora(), reader)
    return seconds


def facts_of_passes(config: Config, folder: Path, tokenizer_model: Path, n_bytes: int) -> dict[str, float]:
    """Returns MB of text a CPU second for each pass.

    Args:
        n_bytes: text of the corpus.

    Raises:
        ArtefactError: a manifest is missing or damaged.
        OSError: a file cannot be read or written.
        ConfigError: a source is invalid.
    """
    cleaning = replace(config.corpus.cleaning, near_duplicates=SIMILARITY)
    config = replace(config, corpus=replace(config.corpus, cleaning=cleaning))
    seconds = run_build(config, folder, tokenizer_model)
    return {
        fact: n_bytes / 1e6 / sum(seconds.get(pass_name, 0.0) for pass_name in pass_names)
        for fact, pass_names in PASSES_OF.items()
    }


# --- the serial part ---


def facts_of_serial_part(
    folder: Path,
    n_tasks: int = MADE_UP_TASKS,
    task_documents: int = TASK_DOCUMENTS,
    n_documents: int = TERABYTE_DOCUMENTS,
) -> dict[str, float]:
    """Returns CPU microseconds a document of what one process does between the passes, and the hours that this makes
    for a corpus of `n_documents`.

    Args:
        folder: gets the made-up results.
        n_tasks, task_documents: number of tasks that have results, and of their documents.

    Raises:
        ArtefactError: a manifest is missing or damaged.
        OSError: a file cannot be written.
    """
    n_searches = int(n_documents * NEIGHBOUR_SHARE) // SEARCH_TEXTS
    build, tasks = write_made_up(folder, n_tasks, task_documents, n_parts(n_documents), n_searches)
    numbered = dict(enumerate(tasks))
    reader, earlier = SourceReader(0), EarlierCorpora()

    seconds_of_documents = cpu_seconds_of(lambda: require_readable(build, tasks, reader))
    seconds_of_documents += cpu_seconds_of(lambda: choose_searches(build, PAIR_RESULTS))
    # The join has counted the searches of these documents alone.
    write_parts(build, "searches", n_searches)
    groups: dict[str, Any] = {}
    least: dict[str, int] = {}

    def hold_out() -> None:
        facts = choose_val(build, numbered, earlier)
        groups.update(facts[0])
        least.update(facts[1])

    seconds_of_documents += cpu_seconds_of(hold_out)
    # `val_tokens` limits the held-out text of any corpus, so its index does not grow with the documents.
    seconds_of_val = cpu_seconds_of(lambda: read_val(build))
    for number in range(n_tasks):
        write_comparison(build, number)
    seconds_of_documents += cpu_seconds_of(lambda: choose_rule(build, numbered, ["text"], earlier, groups, least))

    per_document = seconds_of_documents / (n_tasks * task_documents)
    hours = (per_document * n_documents + seconds_of_val) / 3600
    return {SERIAL: per_document * 1e6, TERABYTE: hours}


def cpu_seconds_of(function: Callable[[], object]) -> float:
    """Calls a function and returns the CPU seconds of this process."""
    began = time.process_time()
    function()
    return time.process_time() - began


def write_made_up(
    folder: Path, n_tasks: int, task_documents: int, key_parts: int, n_searches: int
) -> tuple[Build, list[BuildTask]]:
    """Writes a build whose tasks have results of the passes before `compare`, with random keys and places. Returns it
    and its tasks.

    Args:
        key_parts, n_searches: number of results of the passes `copies` and `search`, in which each task looks up its
            documents.

    Raises:
        OSError: a file cannot be written.
    """
    random = np.random.default_rng(0)
    source = SourceConfig("parquet", "english", path="made-up")
    config = CorpusConfig("bench", {"text": [source]})
    config = replace(config, cleaning=replace(config.cleaning, near_duplicates=SIMILARITY))
    tasks = [BuildTask("text", 0, ()) for _ in range(n_tasks)]
    build = Build(folder)
    build.write(config, 0, folder / "none", tasks, {})

    letters = "".join(map(chr, random.integers(97, 123, DOCUMENT_BYTES)))
    for number in range(n_tasks):
        positions = random.random(task_documents)
        # Words differ from text to text, as the index of held-out texts expects.
        texts = {
            document: letters.replace("e", f" {number} {document} ")[:DOCUMENT_BYTES]
            for document in np.flatnonzero(positions < config.val_fraction).tolist()
        }
        rows = RowErrors(source, config.max_bad_fraction)
        rows.add(task_documents, 0, [])
        made_up = Survey(
            random.integers(0, 256, (task_documents, KEY), np.uint8),
            positions,
            np.full(task_documents, DOCUMENT_BYTES),
            np.zeros(task_documents, bool),
            np.empty((0, 2)),
            np.arange(task_documents),
            np.empty((0, BANDS), np.uint64),
            texts,
            [f"group {number} {document}" for document in range(task_documents)],
            rows,
            Counter(),
            {"english": "made up"},
        )
        with writing(build.result("survey", number)) as result:
            write_survey(result, made_up)
            write_run(result / RUN, records_of([key.tobytes() for key in made_up.keys], number))

    write_parts(build, "key_parts", key_parts)
    for part in range(key_parts):
        with writing(build.result("copies", part)) as result:
            save_places(result / COPIES, _places(random, n_tasks, task_documents, COPY_SHARE / key_parts))
    for search in range(n_searches):
        with writing(build.result("search", search)) as result:
            similar_texts = _places(random, n_tasks, task_documents, NEIGHBOUR_SHARE / 2 / n_searches)
            save_places(result / COPIES, similar_texts)
            write_strings(result, ["made up"] * len(similar_texts))

    # A text with a neighbour has most bands in common with it.
    similar_texts = _places(random, n_tasks, task_documents, NEIGHBOUR_SHARE)
    pairs = random.permutation(similar_texts)[: len(similar_texts) // 2 * 2].reshape(-1, 2, 2).astype(np.uint32)
    for number in range(PAIR_RESULTS):
        with writing(build.result("neighbours", number)) as result:
            np.save(result / PAIRS, pairs)
    return build, tasks


def write_comparison(build: Build, number: int) -> None:
    """Writes the made-up result of a task of the pass `compare`.

    Raises:
        OSError: a file cannot be written.
    """
    _, index = read_val(build)
    random = np.random.default_rng(number)
    windows: dict[str, Any] = {
        f"{WINDOWS}{size}": random.random(len(in_train)) < 0.01
        for size, in_train in index.take_evidence().in_train.items()
    }
    with writing(build.result("compare", number)) as result:
        refused, short = np.empty((0, KEY), np.uint8), np.empty(0, np.int64)
        np.savez_compressed(result / ARRAYS, refused=refused, short=short, **windows)


def _places(random: np.random.Generator, n_tasks: int, task_documents: int, share: float) -> np.ndarray:
    """Returns a share of all documents as (places, 2): task and number in it, rising."""
    documents = random.choice(n_tasks * task_documents, int(share * n_tasks * task_documents), replace=False)
    return np.stack(np.divmod(np.sort(documents), task_documents), axis=1)
