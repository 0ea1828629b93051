"""Held-out documents in an order that is always the same, with the language of every target.

Conversations are packed whole (`data.packing`). The documents of text are laid end to end in their own order, and that
row is closed into a ring: the target of the very last token is the end-of-text that opens the first document. So a
corpus of N tokens has N targets, each counted once: for every document its text and the end-of-text that closes it.

Dimensions: B sequences, T tokens.
"""

import gzip
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dist_lm.data.batch import Batch, Row, assemble
from dist_lm.data.mapped import MappedCorpus
from dist_lm.data.order import Concatenation, DocumentSlice
from dist_lm.data.packing import Packing
from dist_lm.data.sequences import packed


@dataclass(frozen=True, slots=True)
class EvaluationBatch:
    """A micro-batch and whom its losses belong to."""

    batch: Batch
    language_BT: torch.Tensor  # int64; index into `corpus.languages` of the target's document; -1: not counted


class Ring:
    """The documents of a corpus end to end, in their own order, and closed."""

    def __init__(self, corpus: MappedCorpus, seq_len: int) -> None:
        self._row = Concatenation(corpus.lengths, np.arange(corpus.n_documents))
        self._seq_len = seq_len
        self.n_rows = -(-corpus.n_tokens // seq_len)

    def sequence(self, row: int) -> list[DocumentSlice]:
        """The inputs of a sequence and its last target: fewer than `seq_len + 1` tokens at the corpus's end."""
        begin = row * self._seq_len
        end = begin + self._seq_len + 1
        slices = self._row.slices(begin, min(end, self._row.n_tokens))
        return [*slices, DocumentSlice(0, 0, 1)] if end > self._row.n_tokens else slices


@dataclass(frozen=True)
class EvaluationBatches:
    """The batches of one rank; can be iterated again and again. All ranks have as many, because a forward is
    collective.

    A rank that runs out of sequences gets rows of padding (`sequence_B` -1, nothing counted). Sequence
    numbers are places in the corpus.
    """

    corpus: MappedCorpus
    rows: Ring | Packing
    sequences: np.ndarray  # numbers of those to evaluate, over all ranks
    bytes_by_language: dict[str, float]  # UTF-8 bytes that their counted targets stand for, over all ranks
    seq_len: int
    micro_batch: int
    dp_rank: int
    dp_size: int
    document_mask: bool
    reset_positions: bool
    pad_id: int

    def __len__(self) -> int:
        return -(-len(self.sequences) // (self.micro_batch * self.dp_size))

    def __iter__(self) -> Iterator[EvaluationBatch]:
        for step in range(len(self)):
            begin = (step * self.dp_size + self.dp_rank) * self.micro_batch
            yield self._batch(self.sequences[begin : begin + self.micro_batch].tolist())

    def _batch(self, numbers: list[int]) -> EvaluationBatch:
        padding = self.micro_batch - len(numbers)
        rows = [self.rows.sequence(number) for number in numbers] + [[]] * padding
        batch = assemble(
            [Row(self.corpus, slices) for slices in rows],
            numbers + [-1] * padding,
            seq_len=self.seq_len,
            document_mask=self.document_mask,
            reset_positions=self.reset_positions,
            pad_id=self.pad_id,
        )
        language = np.full((len(rows), self.seq_len + 1), -1, np.int64)
        for b, slices in enumerate(rows):
            begin = 0
            for document, start, stop in slices:
                language[b, begin : begin + stop - start] = self.corpus.language_codes[document]
                begin += stop - start
        # A target is of the document of the token before it: within a document the same one, and the
        # end-of-text that opens the next document is what closes this one.
        language_BT = torch.from_numpy(language[:, :-1].copy())
        return EvaluationBatch(batch, language_BT.masked_fill(batch.loss_mask_BT == 0, -1))


def evaluation_batches(
    corpus: MappedCorpus,
    *,
    seq_len: int,
    micro_batch: int,
    dp_rank: int,
    dp_size: int,
    limit_sequences: int = 0,
    document_mask: bool = True,
    reset_positions: bool = True,
    pad_id: int = 0,
) -> EvaluationBatches:
    """Every token of the split as a target once, or `limit_sequences` evenly spread sequences (0: all).

    Of conversations it is every token that is learned, but for those longer than a sequence, which are left out.
    """
    assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
    rows = packed(corpus, seq_len) if corpus.has_mask else Ring(corpus, seq_len)
    sequences = spread(rows.n_rows, limit_sequences)
    if len(sequences) == rows.n_rows and not corpus.has_mask:
        counted = _by_language(corpus, corpus.lengths)
    else:
        counted = sum(
            (_counted_targets(corpus, rows.sequence(sequence)) for sequence in sequences.tolist()),
            np.zeros(len(corpus.languages)),
        )
    # Exact when every target counts, because the targets are then the tokens; else an estimate from the bytes
    # a token of that language has in this split.
    n_bytes = _by_language(corpus, corpus.n_bytes) * (counted / _by_language(corpus, corpus.lengths))
    return EvaluationBatches(
        corpus=corpus,
        rows=rows,
        sequences=sequences,
        bytes_by_language=dict(zip(corpus.languages, n_bytes.tolist(), strict=True)),
        seq_len=seq_len,
        micro_batch=micro_batch,
        dp_rank=dp_rank,
        dp_size=dp_size,
        document_mask=document_mask,
        reset_positions=reset_positions,
        pad_id=pad_id,
    )


def spread(n: int, limit: int) -> np.ndarray:
    """`limit` of the numbers 0 .. n-1 at even distances; all numbers if `limit` is 0 or at least n."""
    return np.arange(n) if limit == 0 or limit >= n else np.arange(limit) * n // limit


def gzip_bits_per_byte(documents: Iterable[tuple[str, bytes]]) -> dict[str, float]:
    """What `gzip -9` takes for each document, in bits per byte of text: the baseline of val/bits_per_byte.

    Keys: `all` and each language.

    Args:
        documents: (language, UTF-8 text) of each document.
    """
    sums: dict[str, tuple[int, int]] = {}
    for language, text in documents:
        compressed = len(gzip.compress(text, compresslevel=9, mtime=0))
        for key in ("all", language):
            bits, size = sums.get(key, (0, 0))
            sums[key] = (bits + 8 * compressed, size + len(text))
    return {key: bits / size for key, (bits, size) in sums.items() if size}


def _counted_targets(corpus: MappedCorpus, slices: list[DocumentSlice]) -> np.ndarray:
    """Targets of a sequence that count, by language: (languages,) float64."""
    codes = corpus.language_codes[[document for document, _, _ in slices]]
    language = np.repeat(codes, [stop - start for _, start, stop in slices])
    learned = np.concatenate([corpus.mask(*part) for part in slices])
    return np.bincount(language[:-1], learned[1:], len(corpus.languages))


def _by_language(corpus: MappedCorpus, values: np.ndarray) -> np.ndarray:
    """Sum `values` (documents,) by language: (languages,) float64."""
    return np.bincount(corpus.language_codes, values, len(corpus.languages))
