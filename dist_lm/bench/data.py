"""From parquet files to the shards of a corpus, against the encoder alone on the same text: bytes a CPU second.

The build reads the files, chooses val and compares it with train, tokenizes and writes tars. A step is one build of a
fresh corpus, or the encoding of the same text in as many processes, as cores that share a processor slow each other
down. Both variants are timed in CPU seconds of this process and its children, which a busy machine changes little; the
facts give bytes a wall second and process, and the largest private memory of any process.
"""

import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil

from dist_lm.bench import build_passes
from dist_lm.bench.case import Case, Comparison, GroupSize
from dist_lm.bench.rank import MIB, Trial
from dist_lm.config.corpus import CleaningConfig, CorpusConfig, SourceConfig
from dist_lm.config.root import Config
from dist_lm.data.in_turn import read_in_turn
from dist_lm.data.ingest import TextSplits
from dist_lm.document import Document
from dist_lm.parallel.mesh import World
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.shards.builds import build_corpus
from dist_lm.storage.process import cores
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tokenizer.train import sample_by_language, train_tokenizer
from dist_lm.tracking.console import Console

BUILD, CLEANED, BY_TASKS, ENCODER = "shards", "shards, cleaned", "shards by tasks", "encoder alone"
MEMORY, WALL = "memory of a process MiB", "wall, a process MB/s"
CORPUS = "words"
MEGABYTES, QUICK_MEGABYTES = 24, 4  # text of a build
TOKENIZER_BYTES = 2_000_000  # text that the tokenizer is trained on
FILE_BYTES, ROW_GROUP = 256_000_000, 2000  # bytes of text in a parquet file; rows in a row group
WORDS, DOCUMENT_WORDS, LINE_WORDS = 30_000, 800, 10  # words of the vocabulary, of a document, of a line
SAMPLE_EVERY_S = 0.2  # between two measurements of memory


def cases(overrides: Sequence[str], quick: bool) -> list[Case]:
    """Returns a case with one process that encodes, and one with a process for each core if there are several.

    `tokenizer.workers` in the overrides, or `quick`, leaves one case. Without `quick`, the passes of a build by tasks
    in one process follow.

    Raises:
        ConfigError, ArtefactError, UserError: as `compose_config`.
    """
    size = QUICK_MEGABYTES if quick else MEGABYTES
    # One case is enough where the user chose the number of processes, or where there is one core.
    sets_workers = any(override.startswith("tokenizer.workers=") for override in overrides)
    worker_counts = (1,) if quick or sets_workers or cores() == 1 else (1, cores())

    planned = []
    for workers in worker_counts:
        settings = [f"tokenizer.workers={workers}", f"tokenizer.train_bytes={size * 10**6}"]
        config = compose_config(["stage=shards", "model=nano", "tracking=none", *settings, *overrides])
        planned.append(
            Case(
                name=f"{size} MB, processes: {config.tokenizer.workers or cores()}",
                config=config,
                variants=dict.fromkeys((BUILD, CLEANED, ENCODER), GroupSize(1)),
                comparisons=[
                    *(Comparison(variant=variant, peer=ENCODER) for variant in (BUILD, CLEANED)),
                    Comparison(variant=BUILD, peer=ENCODER, fact=WALL),
                    Comparison(variant=BUILD, fact=MEMORY),
                ],
                rounds=3,
                amount=size,
                unit="MB/s",
            )
        )
    if not quick:
        planned.append(case_by_tasks(planned[0].config))
    return planned


def case_by_tasks(config: Config) -> Case:
    """Returns the case of a build by tasks in one process: a table row for each pass, and for its serial part."""
    facts = (*build_passes.PASSES_OF, build_passes.SERIAL, build_passes.TERABYTE)
    return Case(
        name=f"{MEGABYTES} MB",
        config=replace(config, tokenizer=replace(config.tokenizer, workers=1)),
        variants=dict.fromkeys((BY_TASKS, ENCODER), GroupSize(1)),
        comparisons=[
            Comparison(variant=BY_TASKS, peer=ENCODER),
            *(Comparison(variant=BY_TASKS, fact=fact) for fact in facts),
        ],
        rounds=3,
        amount=MEGABYTES,
        unit="MB/s",
    )


def build(variant: str, config: Config, world: World) -> Trial:
    """Builds one variant, in one process with the processes that it starts: writes its text and trains a tokenizer in a
    temporary folder. A step is timed in CPU seconds.

    Raises:
        ConfigError, ArtefactError, UserError: the text for the measurement cannot be read.
        OSError: the folder cannot be written.
        RuntimeError: SentencePiece refuses the text.
    """
    folder = tempfile.TemporaryDirectory(prefix="dlm-bench-")
    cleaning = CleaningConfig() if variant == CLEANED else no_cleaning()
    work = Work(Path(folder.name), config, cleaning)
    if variant == BY_TASKS:
        return trial_by_tasks(folder, work)
    documents = work.documents(work.n_bytes) if variant == ENCODER else []
    processes = config.tokenizer.workers or cores()

    def step() -> float:
        # The closure keeps the temporary folder as long as this function lives.
        assert folder
        if variant == ENCODER:
            work.encode(documents, processes)
        else:
            work.build()
        return 0.0

    return Trial(step, lambda: facts_of_step(step, work.n_bytes, processes), clock=cpu_seconds, losses=list)


def trial_by_tasks(folder: tempfile.TemporaryDirectory, work: "Work") -> Trial:
    """Returns the trial of a build by tasks. Its facts are about text with copies; speed is that without, as of the
    other variants."""

    def step() -> float:
        path = Path(folder.name)
        shutil.rmtree(path / "build", ignore_errors=True)
        build_passes.run_build(work.config, path / "build", work.directory.tokenizer_model)
        return 0.0

    def facts() -> dict[str, float]:
        path = Path(folder.name)
        texts = [document.text for document in work.documents(work.n_bytes)]
        n_bytes = work.n_bytes + build_passes.write_copies(path / "input", texts)
        of_passes = build_passes.facts_of_passes(work.config, path / "copies", work.directory.tokenizer_model, n_bytes)
        (path / "input" / build_passes.COPIES_FILE).unlink()
        return of_passes | build_passes.facts_of_serial_part(path / "made-up")

    return Trial(step, facts, clock=cpu_seconds, losses=list)


def no_cleaning() -> CleaningConfig:
    """Returns the cleaning with every step switched off."""
    return CleaningConfig(encoding=False, secrets=False, emails=False)


class Work:
    """Generated parquet files of `config.tokenizer.train_bytes` of text, their tokenizer, and the build of a corpus."""

    def __init__(self, folder: Path, config: Config, cleaning: CleaningConfig) -> None:
        self.n_bytes = write_parquet(folder / "input", config.tokenizer.train_bytes)
        source = SourceConfig("parquet", "english", path=str(folder / "input"))
        corpus = CorpusConfig("bench", {CORPUS: [source]}, cleaning=cleaning)
        self.config = replace(config, work_dir=str(folder / "work"), corpus=corpus)

        self.directory = WorkDirectory(folder / "work")
        self.directory.tokenizer.mkdir(parents=True)
        # The tokenizer is trained beforehand, since only the build is timed.
        sample = sample_by_language(self.documents(TOKENIZER_BYTES), TOKENIZER_BYTES)
        train_tokenizer((document.text for document in sample), self.directory.tokenizer_model, config.tokenizer)
        self._tokenizer = Tokenizer.load(self.directory.tokenizer_model)

    def documents(self, n_bytes: int) -> list[Document]:
        """Reads the first train documents of the files, `n_bytes` of text.

        Raises:
            ConfigError, ArtefactError: as `read_in_turn`.
        """
        return [*read_in_turn(self.config.corpus, 0, n_bytes)]

    def build(self) -> None:
        """Builds the corpus anew; its text is never kept in memory, however small it is.

        Raises:
            ConfigError, ArtefactError, UserError, OSError: as `build_corpus`.
        """
        shutil.rmtree(self.directory.corpus(CORPUS), ignore_errors=True)
        text_splits = TextSplits(self.config.corpus, self.config.seed)
        text_splits.reader.room = -1
        build_corpus(self.config, CORPUS, text_splits, Console())

    def encode(self, documents: Sequence[Document], processes: int) -> None:
        """Encodes the documents and drops the ids, a share in each of `processes` processes, this one among them, and
        sends nothing: a build cannot be faster. Waits for all.

        Raises:
            UserError: a text of this process' share is not valid Unicode; in another process it is an AssertionError.
        """
        # Forked children share the documents of this process, so none are sent.
        fork = multiprocessing.get_context("fork")
        children = [fork.Process(target=self._encode, args=(documents[n::processes],)) for n in range(1, processes)]
        for child in children:
            child.start()

        self._encode(documents[::processes])
        for child in children:
            child.join()
            assert child.exitcode == 0, "a process that encodes failed"

    def _encode(self, documents: Sequence[Document]) -> None:
        for document in documents:
            self._tokenizer.encode_document(document)


def write_parquet(folder: Path, n_bytes: int) -> int:
    """Writes parquet files of words by Zipf's law, the same at every call, into the new folder `folder`; returns the
    bytes of text, `n_bytes` or a little more."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = ["".join(letters[np.minimum(random.geometric(0.12, n) - 1, 25)]) for n in random.integers(2, 11, WORDS)]
    vocabulary = np.array(words, object)
    cumulative_weights = np.cumsum(1 / np.arange(10, WORDS + 10))

    total = file_bytes = 0
    writer, schema = None, pyarrow.schema([("id", pyarrow.int64()), ("text", pyarrow.string())])
    while total < n_bytes:
        if writer is None:
            writer = parquet.ParquetWriter(folder / f"{total:013d}.parquet", schema)

        # Words are drawn by inverting the cumulative weights; a row group is drawn at once, since calls cost more.
        draws = random.random((ROW_GROUP, DOCUMENT_WORDS)) * cumulative_weights[-1]
        lines = vocabulary[np.searchsorted(cumulative_weights, draws)].reshape(ROW_GROUP, -1, LINE_WORDS)
        texts = ["\n".join(" ".join(line) for line in rows) + "\n" for rows in lines]

        # The last row group is cut where `n_bytes` are full. The words are ASCII, so their lengths are bytes.
        drawn_bytes = sum(map(len, texts))
        texts = texts[: max(1, -(-(n_bytes - total) * len(texts) // drawn_bytes))]
        total += sum(map(len, texts))
        file_bytes += drawn_bytes
        writer.write_table(pyarrow.table({"id": [*range(len(texts))], "text": texts}, schema))

        # Files of real data sets are about as large.
        if file_bytes >= FILE_BYTES:
            writer.close()
            writer, file_bytes = None, 0
    if writer:
        writer.close()
    return total


def facts_of_step(step: Callable[[], object], n_bytes: int, processes: int) -> dict[str, float]:
    """Runs one step and returns two facts about it, by name; an error of the step passes.

    WALL is its speed: MB (1e6 bytes) of text for each wall second and process. MEMORY is the largest private memory
    that a process had at a sample during it, in MiB.

    Args:
        n_bytes: text of the step.
        processes: number by which the speed is divided.
    """
    # Memory is sampled in a thread, since a process may be largest in the middle of the step.
    peak_bytes, ended = [0], threading.Event()

    def sample_memory() -> None:
        while not ended.wait(SAMPLE_EVERY_S):
            peak_bytes[0] = max(peak_bytes[0], private_bytes())

    sampler = threading.Thread(target=sample_memory, daemon=True)
    sampler.start()
    began = time.perf_counter()
    step()
    seconds = time.perf_counter() - began
    ended.set()
    sampler.join()

    return {WALL: n_bytes / seconds / processes / 1e6, MEMORY: max(peak_bytes[0], private_bytes()) / MIB}


def private_bytes() -> int:
    """Returns the present private memory, in bytes, of the largest process: this one or one below it."""
    sizes = []
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            sizes.append(process.memory_full_info().uss)
        except psutil.Error:
            # The process has ended.
            continue
    return max(sizes)


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])
