"""Batches held-out documents in an order that is always the same, with the language of every target.

Conversations are packed whole (`data.packing`). The documents of text are laid end to end in their own order, and that
row is closed into a ring: the target of the very last token is the end-of-text that opens the first document. So a
corpus of N tokens has N targets, each counted once: for every document its text and the end-of-text that closes it.

Dimensions: B sequences, T tokens.
"""

import gzip
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from dist_lm.data.batch import Batch, SequenceContent, assemble
from dist_lm.data.order import Concatenation, DocumentSlice
from dist_lm.data.packing import DROP, Packing
from dist_lm.data.sequences import packed
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.tokenizer.tokenizer import FirstToken


@dataclass(frozen=True, slots=True)
class EvaluationBatch:
    """A micro-batch, and the language that each of its losses belongs to."""

    batch: Batch
    language_BT: torch.Tensor  # int64; index into `corpus.languages` of the target's document; -1: not counted

    def to(self, device: torch.device) -> "EvaluationBatch":
        """Copies the batch to `device`, as `Batch.to`."""
        # Pinned as the batch is, so that the copy does not block the host.
        language_BT = self.language_BT
        if device.type == "cuda":
            language_BT = language_BT.pin_memory()
        return EvaluationBatch(self.batch.to(device), language_BT.to(device, non_blocking=True))


class Ring:
    """The documents of a corpus end to end, in their own order, closed into a ring."""

    def __init__(self, corpus: TokenCorpus, seq_len: int) -> None:
        self._row = Concatenation(corpus.lengths, np.arange(corpus.n_documents))
        self._seq_len = seq_len
        self.n_rows = -(-corpus.n_tokens // seq_len)

    def sequence(self, row: int) -> list[DocumentSlice]:
        """Returns the inputs of sequence `row` and its last target: `seq_len + 1` tokens, at the corpus's end fewer.

        The very last target is the end-of-text of document 0.
        """
        begin = row * self._seq_len
        end = begin + self._seq_len + 1
        slices = self._row.slices(begin, min(end, self._row.n_tokens))
        if end > self._row.n_tokens:
            slices.append(DocumentSlice(0, 0, 1))  # the end-of-text that closes the ring
        return slices


@dataclass(frozen=True, kw_only=True)
class EvaluationBatches:
    """The batches of one rank. All ranks together predict every token of a split once; each iteration gives the same.

    Of conversations, every learned token is a target once; `too_long` decides about those longer than a sequence.
    A sequence has the same number and content in every evaluation.
    """

    corpus: TokenCorpus
    seq_len: int
    micro_batch: int
    dp_rank: int
    dp_size: int
    limit_sequences: int = 0  # evenly spread over the corpus; 0: all
    document_mask: bool = True
    reset_positions: bool = True
    pad_id: int = 0
    first_token: FirstToken | None = None
    too_long: str = DROP  # one of `packing.TOO_LONG`

    @cached_property
    def _rows(self) -> Ring | Packing:
        if self.corpus.has_mask:
            return packed(self.corpus, self.seq_len, too_long=self.too_long)
        return Ring(self.corpus, self.seq_len)

    @cached_property
    def _sequences(self) -> np.ndarray:
        """The numbers of the sequences to evaluate, over all ranks."""
        return evenly_spaced(self._rows.n_rows, self.limit_sequences)

    @cached_property
    def bytes_by_language(self) -> dict[str, float]:
        """Returns the UTF-8 bytes that the counted targets stand for, by language over all ranks.

        Exact when every target counts, because the targets are then the tokens; else an estimate from the bytes a token
        of that language has in this split, for which the masks of all sequences are read.

        Raises:
            ArtefactError: a tar is damaged.
        """
        corpus = self.corpus
        if len(self._sequences) == self._rows.n_rows and not corpus.has_mask:
            n_targets = _by_language(corpus, corpus.lengths)
        else:
            # The masks of the chosen sequences say which of their targets count.
            n_targets = np.zeros(len(corpus.languages))
            for number in self._sequences.tolist():
                n_targets += _learned_targets(corpus, self._rows.sequence(number))

        n_bytes = _by_language(corpus, corpus.n_bytes) * (n_targets / _by_language(corpus, corpus.lengths))
        return dict(zip(corpus.languages, n_bytes.tolist(), strict=True))

    def __iter__(self) -> Iterator[EvaluationBatch]:
        for numbers in micro_batches_of_rank(self._sequences, self.micro_batch, self.dp_rank, self.dp_size):
            yield self._batch(numbers)

    def _batch(self, numbers: list[int]) -> EvaluationBatch:
        """Returns the micro-batch of these sequences, in host memory, with the language code of every target.

        Codes are (B, T) int64, of the document that the target belongs to; -1 where the target does not count.

        Args:
            numbers: global sequence numbers; a negative one is an empty row, which fills the batch.

        Raises:
            ArtefactError: a tar is damaged.
        """
        rows = [self._rows.sequence(number) if number >= 0 else [] for number in numbers]
        batch = assemble(
            [SequenceContent(self.corpus, slices) for slices in rows],
            numbers,
            seq_len=self.seq_len,
            document_mask=self.document_mask,
            reset_positions=self.reset_positions,
            pad_id=self.pad_id,
            first_token=self.first_token,
        )

        language = np.full((len(rows), self.seq_len + 1), -1, np.int64)
        for b, slices in enumerate(rows):
            begin = 0
            for document, start, stop in slices:
                end = begin + stop - start
                language[b, begin:end] = self.corpus.language_codes[document]
                begin = end

        # A target is of the document of the token before it: within a document the same one, and the
        # end-of-text that opens the next document is what closes this one.
        language_BT = torch.from_numpy(language[:, :-1].copy())
        return EvaluationBatch(batch, language_BT.masked_fill(batch.loss_mask_BT == 0, -1))


def micro_batches_of_rank(sequences: np.ndarray, micro_batch: int, dp_rank: int, dp_size: int) -> Iterator[list[int]]:
    """Yields the micro-batches of a rank as lists of `micro_batch` sequence numbers, as many on every rank.

    A rank that runs out gets rows of padding (-1), because a forward is collective and all ranks need as many.

    Args:
        sequences: (n,) numbers, those of all ranks.
    """
    for begin in range(0, len(sequences), micro_batch * dp_size):
        rank_begin = begin + dp_rank * micro_batch
        numbers = sequences[rank_begin : rank_begin + micro_batch].tolist()
        yield numbers + [-1] * (micro_batch - len(numbers))


def evenly_spaced(n: int, limit: int) -> np.ndarray:
    """Returns `limit` of the numbers 0 .. n-1 at even distances, rising, (limit,) int64; all numbers if `limit` is 0 or
    at least n."""
    if limit == 0 or limit >= n:
        return np.arange(n)
    return np.arange(limit) * n // limit


def gzip_bits_per_byte(documents: Iterable[tuple[str, bytes]]) -> dict[str, float]:
    """Measures `gzip -9` of each document in bits per byte of text: the baseline of val/bits_per_byte.

    Args:
        documents: (language, UTF-8 text) of each document.

    Returns:
        The ratio of compressed bits to bytes of text, under `all` and each language; without text no entry.
    """
    # Documents are compressed one by one, because a model does not see the others either.
    sums: dict[str, tuple[int, int]] = {}
    for language, text in documents:
        compressed = len(gzip.compress(text, compresslevel=9, mtime=0))
        for key in ("all", language):
            bits, size = sums.get(key, (0, 0))
            sums[key] = (bits + 8 * compressed, size + len(text))
    return {key: bits / size for key, (bits, size) in sums.items() if size}


def _learned_targets(corpus: TokenCorpus, slices: list[DocumentSlice]) -> np.ndarray:
    """Counts the targets of a sequence that are learned, by language: (languages,) float64."""
    codes = corpus.language_codes[[document for document, _, _ in slices]]
    language = np.repeat(codes, [stop - start for _, start, stop in slices])
    learned = np.concatenate([corpus.mask(*part) for part in slices])
    return np.bincount(language[:-1], learned[1:], len(corpus.languages))


def _by_language(corpus: TokenCorpus, amounts: np.ndarray) -> np.ndarray:
    """Sums `amounts` (documents,) by language: (languages,) float64."""
    return np.bincount(corpus.language_codes, amounts, len(corpus.languages))
