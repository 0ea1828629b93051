"""Opening, ordering and reading a corpus of text.

The first case is made up of lengths alone: 200 M documents in the index of a split, with tars that have a size and no
content. It measures what a node holds, how long one process and eight at once take to open it, and an epoch's order.

The other cases are a corpus on disk, in sequences of 2,048 and of 512 tokens. A stream reads it in the order of units
and in that of documents, against a crop at a random place of one mapped array that fills the same fields of a batch,
and against other libraries that fill fewer (`loader_peers`). Time is CPU time of the process. Facts count what the
ranks of an epoch ask the file system for.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import psutil
import torch

from dist_lm.bench import loader_peers
from dist_lm.bench.case import TOKENS_A_SECOND, Case, Comparison, GroupSize
from dist_lm.bench.rank import Trial
from dist_lm.config.root import Config
from dist_lm.data.batch import Batch, assemble
from dist_lm.data.index import DOCUMENT, MEMBER, ShardIndex
from dist_lm.data.manifest import Counts, Manifest, Recipe, Shard, Split, shard_name, write_manifest
from dist_lm.data.order import splitmix64
from dist_lm.data.sequences import DOCUMENTS, UNITS, WINDOWS, CorpusSequences
from dist_lm.data.shard_writer import CorpusWriter
from dist_lm.data.split_index import SplitIndex, split_index_path
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.data.unit_order import UnitEpoch
from dist_lm.document import TokenizedDocument
from dist_lm.parallel.mesh import World
from dist_lm.prepare.compose import compose_config

ORDER, SORT = "order of units", "sorting as many keys"
CROP = "random crop"
UNITS_STREAM = "stream, order of units"
STREAMS = {
    UNITS_STREAM: UNITS,
    "stream, order of windows": WINDOWS,
    "stream, order of documents": DOCUMENTS,
}
NODE, OPEN, OPEN_TOGETHER = "eight ranks of a node, a document B", "open s", "eight open at once s"
EPOCH, READ = "order of an epoch s", "read in an epoch by eight ranks, of the corpus x"
MANY, QUICK_MANY = 200_000_000, 2_000_000  # documents without content
MEAN_TOKENS = 1000  # mean length of a document
TAR_DOCUMENTS, MEMBER_DOCUMENTS = 100_000, 256
RANKS, EOT, VOCABULARY = 8, 1, 60_000
SEQ_LEN = 2048
READ_SEQ_LENS = (SEQ_LEN, 512)  # of the cases on disk
SEQUENCES, STEPS = loader_peers.BATCH, 32  # a step of the bench is `STEPS` batches of `SEQUENCES` sequences
READ_TOKENS, QUICK_READ_TOKENS = 32_000_000, 4_000_000


def cases(overrides: Sequence[str], quick: bool) -> list[Case]:
    """Returns the case without content, and those on disk; `quick`: less work, and the first of those on disk.

    Raises:
        ConfigError, ArtefactError, UserError: as `compose_config`.
    """

    # The amounts of work go to `build` in keys that mean as much.
    def config_of(steps: int, seq_len: int = SEQ_LEN) -> Config:
        settings = ["stage=language", "model=nano", "tracking=none", f"stage.steps={steps}"]
        settings += [f"stage.seq_len={seq_len}", f"model.max_seq_len={SEQ_LEN}"]
        return compose_config([*settings, *overrides])

    num_documents, tokens = (QUICK_MANY, QUICK_READ_TOKENS) if quick else (MANY, READ_TOKENS)
    facts = (NODE, OPEN, OPEN_TOGETHER, EPOCH)
    without_content = Case(
        name=f"{num_documents / 1e6:.0f} M documents",
        config=config_of(num_documents),
        variants=dict.fromkeys((ORDER, SORT), GroupSize(1)),
        comparisons=[
            Comparison(variant=ORDER, ceiling=SORT),
            *(Comparison(variant=ORDER, fact=fact) for fact in facts),
        ],
        rounds=3,
        amount=num_documents,
        unit="documents/s",
    )

    seq_lens = READ_SEQ_LENS[:1] if quick else READ_SEQ_LENS
    return [without_content, *(_on_disk(config_of(tokens, seq_len)) for seq_len in seq_lens)]


def _on_disk(config: Config) -> Case:
    """Returns the case of a corpus with stage.steps tokens, read in sequences of stage.seq_len."""
    seq_len = config.stage.seq_len
    reasons = {name: loader_peers.why_not(name) for name in loader_peers.PEERS}
    available = [name for name, reason in reasons.items() if reason is None]

    comparisons = [
        *(Comparison(variant=variant, peer=CROP) for variant in STREAMS),
        *(Comparison(variant=variant, fact=READ) for variant in STREAMS),
        *(Comparison(variant=name, peer=CROP) for name in available),
    ]
    for name, reason in reasons.items():
        if reason:
            comparisons.append(Comparison(variant=UNITS_STREAM, peer_name=f"{name}: {reason}"))
        else:
            comparisons.append(Comparison(variant=UNITS_STREAM, peer=name))

    # Threads of some libraries work while their iterator waits. In a process that others share, their CPU time would
    # count as that of whichever variant is timed.
    peer_groups = {name: GroupSize(1, label=name) for name in available}

    return Case(
        name=f"{config.stage.steps / 1e6:.0f} M tokens, {SEQUENCES}x{seq_len}",
        config=config,
        variants=dict.fromkeys((*STREAMS, CROP), GroupSize(1)) | peer_groups,
        comparisons=comparisons,
        # A step takes milliseconds, so more rounds are needed than of an order of 200 M documents.
        rounds=7,
        amount=STEPS * SEQUENCES * seq_len,
        unit=TOKENS_A_SECOND,
    )


def build(variant: str, config: Config, world: World) -> Trial:
    """Builds one variant in one process, with a corpus in a temporary folder.

    Raises:
        OSError: the folder has no space.
    """
    folder = tempfile.TemporaryDirectory(prefix="dlm-bench-")
    directory, amount = Path(folder.name), config.stage.steps
    if variant in (ORDER, SORT):
        trial = order_trial(variant, directory, amount)
    else:
        trial = reading_trial(variant, directory, amount, config.stage.seq_len)

    def step() -> float:
        # The closure keeps the temporary folder as long as this function lives.
        assert folder
        return trial.step()

    return replace(trial, step=step)


# --- documents without content ---


def order_trial(variant: str, directory: Path, n_documents: int) -> Trial:
    """Returns the trial of an epoch's order, or of sorting as many random numbers as it has units.

    Raises:
        ArtefactError, OSError: the corpus cannot be read.
    """
    write_without_content(directory, n_documents)
    if variant == SORT:
        n_units = len(TokenCorpus.open(directory, "train").units.documents)
        keys = splitmix64(0, n_units)

        def sort() -> float:
            np.argsort(keys)
            return 0.0

        return Trial(sort, dict, losses=list)

    units = TokenCorpus.open(directory, "train").units

    def order() -> float:
        UnitEpoch(units, 0, 0, SEQ_LEN)
        return 0.0

    return Trial(order, lambda: facts_of_opening(directory, n_documents), losses=list)


class _WithoutContent(SplitIndex):
    """The index of a split whose tars are made up."""

    def index_of(self, shard: Shard) -> ShardIndex:
        """Returns the index of a tar that nobody has written: members of documents, end to end."""
        random = np.random.default_rng(int(shard.name[-10:-4]))
        documents = np.zeros(shard.counts.documents, DOCUMENT)
        documents["length"] = random.geometric(1 / MEAN_TOKENS, len(documents))
        documents["n_bytes"] = 4 * documents["length"]
        documents["language"] = random.integers(0, 3, len(documents))

        firsts = np.arange(0, len(documents), MEMBER_DOCUMENTS)
        ends = np.append(0, np.cumsum(documents["length"], dtype=np.int64))
        members = np.zeros(len(firsts), MEMBER)
        members["documents"] = np.append(firsts[1:], len(documents)) - firsts
        members["begin"] = members["tokens"] = 2 * ends[firsts]
        members["end"] = 2 * ends[firsts + members["documents"]]
        members["mask"] = -1
        return ShardIndex(documents, members, ("bash", "python", "sql"), 2, 0)


def write_without_content(directory: Path, n_documents: int) -> None:
    """Writes a corpus whose tars are holes: its manifest and the index of its split.

    Raises:
        OSError: a file cannot be written.
    """
    shards = []
    for number in range(-(-n_documents // TAR_DOCUMENTS)):
        n = min(TAR_DOCUMENTS, n_documents - number * TAR_DOCUMENTS)
        name, size = shard_name("train", number), 2 * MEAN_TOKENS * n
        (directory / name).touch()
        os.truncate(directory / name, size)
        checksums = "0" * 8 * -(-n // MEMBER_DOCUMENTS)
        counts = Counts(n, MEAN_TOKENS * n, 4 * MEAN_TOKENS * n)
        shards.append(Shard(name, size, "0" * 64, "0" * 64, "0" * 64, checksums, counts))

    recipe = Recipe("0" * 64, VOCABULARY, "0" * 64, MEMBER_DOCUMENTS, MEAN_TOKENS * TAR_DOCUMENTS)
    write_manifest(directory, Manifest(recipe, {"train": Split(tuple(shards))}, {}))
    _WithoutContent(directory, "train", shards, VOCABULARY)


def facts_of_opening(directory: Path, n_documents: int) -> dict[str, float]:
    """Returns what a node of eight ranks holds and how long they take, each rank alone and all at once."""
    alone = opened_by(directory, 1)
    opened_together = opened_by(directory, RANKS)
    mapped = split_index_path(directory, "train").stat().st_size
    private = sum(n_bytes for _, _, n_bytes in opened_together)
    return {
        NODE: (mapped + private) / n_documents,
        OPEN: alone[0][0],
        OPEN_TOGETHER: max(seconds for seconds, _, _ in opened_together),
        EPOCH: alone[0][1],
    }


def opened_by(directory: Path, processes: int) -> list[tuple[float, float, int]]:
    """Opens a corpus, computes an epoch and finds a sequence in each of some processes at once.

    Returns:
        For each process: seconds to open it, seconds for the order of an epoch, and private bytes at the end.
    """
    fork = multiprocessing.get_context("fork")
    answers, ready = fork.SimpleQueue(), fork.Barrier(processes)
    children = [fork.Process(target=_open, args=(directory, ready, answers)) for _ in range(processes)]
    for child in children:
        child.start()
    measured = [answers.get() for _ in children]
    for child in children:
        child.join()
    return measured


def _open(directory: Path, ready: Barrier, answers: SimpleQueue) -> None:
    """Puts the answer of one process of `opened_by`."""
    private = psutil.Process().memory_full_info().uss
    ready.wait()
    began = time.perf_counter()
    corpus = TokenCorpus.open(directory, "train")
    opened = time.perf_counter()
    epoch = UnitEpoch(corpus.units, 0, 0, SEQ_LEN)
    epoch.sequence(epoch.n_sequences // 2)
    ordered = time.perf_counter()
    # Nobody ends before all have measured what they hold.
    ready.wait()
    private = psutil.Process().memory_full_info().uss - private
    ready.wait()
    answers.put((opened - began, ordered - opened, private))


# --- a corpus on disk ---


def reading_trial(variant: str, directory: Path, n_tokens: int, seq_len: int = SEQ_LEN) -> Trial:
    """Returns the trial of reading batches: a step reads `STEPS` of them, of `SEQUENCES` sequences each, timed by the
    CPU time of the process. Its fact is READ, for a stream.

    Args:
        variant: CROP, one of `STREAMS`, or one of `loader_peers.PEERS`.
        directory: gets the corpus.
        n_tokens: tokens of the corpus.

    Raises:
        ImportError: a package that a peer imports is not installed.
        OSError: the corpus cannot be written or read.
    """
    corpus = write_tokens(directory, n_tokens)
    # Every process of a run finds the checksums that the first epoch has left.
    corpus.check()
    if variant in loader_peers.PEERS:
        return Trial(peer_step(variant, corpus, directory, seq_len), clock=time.process_time, losses=list)

    batches_of: Callable[[list[list[int]]], Iterable[Batch]]
    if variant == CROP:
        batches_of = partial(map, RandomCrop(corpus, directory, seq_len).batch)
    else:
        batches_of = stream_of(corpus, STREAMS[variant], seq_len)
    number = 0

    def step() -> float:
        nonlocal number
        end = number + STEPS * SEQUENCES
        for _ in batches_of([[*range(first, first + SEQUENCES)] for first in range(number, end, SEQUENCES)]):
            pass
        number = end
        return 0.0

    def facts() -> dict[str, float]:
        return {READ: bytes_of_epoch(directory, STREAMS[variant], seq_len) / (2 * corpus.n_tokens)}

    return Trial(step, dict if variant == CROP else facts, clock=time.process_time, losses=list)


def peer_step(name: str, corpus: TokenCorpus, directory: Path, seq_len: int) -> Callable[[], float]:
    """Writes the tokens of a corpus in the format of a peer; returns the step that reads `STEPS` batches from there."""
    tokens = np.concatenate([tokens for _, tokens in corpus.members()])
    epoch = loader_peers.rows_of(name, directory / "peer", loader_peers.samples_of(tokens, seq_len))
    batches = loader_peers.batches_of(loader_peers.epochs(epoch))

    def step() -> float:
        for _ in islice(batches, STEPS):
            pass
        return 0.0

    return step


def stream_of(corpus: TokenCorpus, order: str, seq_len: int) -> Callable[[list[list[int]]], Iterable[Batch]]:
    """Returns the function from sequence numbers of a step to its batches, as a stream of training has it."""
    sequences = CorpusSequences(corpus, 0, seq_len, order=order)

    def batches_of(numbers: list[list[int]]) -> Iterable[Batch]:
        contents = iter(sequences.contents([number for batch in numbers for number in batch]))
        for batch in numbers:
            rows = list(islice(contents, len(batch)))
            yield assemble(rows, batch, seq_len=seq_len, document_mask=True, reset_positions=True)

    return batches_of


class RandomCrop:
    """All tokens of a corpus in one mapped array. A sequence begins at a random place."""

    def __init__(self, corpus: TokenCorpus, directory: Path, seq_len: int) -> None:
        path = directory / "tokens.bin"
        with path.open("wb") as file:
            for _, tokens in corpus.members():
                file.write(tokens.tobytes())
        self._tokens = np.memmap(path, np.uint16, "r")
        self._seq_len = seq_len
        self._random = np.random.default_rng(0)

    def batch(self, numbers: list[int]) -> Batch:
        """Returns the fields that `assemble` fills, of crops at random places."""
        seq_len = self._seq_len
        begins = self._random.integers(0, len(self._tokens) - seq_len - 1, len(numbers))
        tokens = np.stack([self._tokens[begin : begin + seq_len + 1] for begin in begins.tolist()]).astype(np.int64)

        # A crop has no index of documents: it finds them by their end-of-text.
        is_start = tokens == EOT
        is_start[:, 0] = True
        document = np.cumsum(is_start, 1) - 1
        offsets = np.arange(seq_len + 1)
        position = offsets - np.maximum.accumulate(np.where(is_start, offsets, 0), 1)

        return Batch(
            tokens_BT=torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
            targets_BT=torch.from_numpy(np.ascontiguousarray(tokens[:, 1:])),
            loss_mask_BT=torch.ones(len(numbers), seq_len),
            document_BT=torch.from_numpy(np.ascontiguousarray(document[:, :-1])),
            position_BT=torch.from_numpy(np.ascontiguousarray(position[:, :-1])),
            sequence_B=torch.tensor(numbers),
            n_tokens=len(numbers) * seq_len,
        )


def write_tokens(directory: Path, n_tokens: int) -> TokenCorpus:
    """Writes and opens a corpus of random tokens, with documents of `MEAN_TOKENS` on average.

    Raises:
        ArtefactError: the corpus is missing, unfinished or damaged.
        OSError: a tar cannot be read, or an index cannot be written.
    """
    random = np.random.default_rng(0)
    recipe = Recipe("0" * 64, VOCABULARY, "0" * 64, MEMBER_DOCUMENTS, n_tokens // 4)
    corpus_directory = directory / "corpus"
    with CorpusWriter(corpus_directory, recipe) as writer:
        for length in random.geometric(1 / MEAN_TOKENS, n_tokens // MEAN_TOKENS).tolist():
            tokens = random.integers(2, VOCABULARY, length).astype(np.uint16)
            tokens[0] = EOT
            writer.write("train", TokenizedDocument(tokens, 4 * length, "python", "made up", "MIT"))
        writer.finish({})
    return TokenCorpus.open(corpus_directory, "train")


def bytes_of_epoch(directory: Path, order: str, seq_len: int) -> int:
    """Returns the bytes that eight ranks ask the file system for in an epoch, each with a corpus of its own."""
    ranks = [
        CorpusSequences(TokenCorpus.open(directory / "corpus", "train"), 0, seq_len, order=order) for _ in range(RANKS)
    ]
    before = _bytes_asked_for()
    for rank, sequences in enumerate(ranks):
        numbers = [number for number in range(sequences.n_sequences) if number // SEQUENCES % RANKS == rank]
        for row in sequences.contents(numbers):
            row.corpus.tokens_of(row.slices)
    return _bytes_asked_for() - before


def _bytes_asked_for() -> int:
    """Returns the bytes that this process has read so far, those of the page cache included."""
    return psutil.Process().io_counters().read_chars
