"""Document slices to tensors.

Dimensions: B sequences, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dist_lm.data.batch import Batch
from dist_lm.data.mapped import MappedCorpus
from dist_lm.data.order import DocumentSlice

WORTH_CHOOSING = 0.9  # share of targets that count, below which logits are computed for these alone
COUNTED_MULTIPLE = 64  # and some that do not: a kernel that is compiled for its shapes then sees few


@dataclass(frozen=True, slots=True)
class Row:
    """What one sequence is made of."""

    corpus: MappedCorpus
    slices: Sequence[DocumentSlice]  # its inputs and last target: at most `seq_len + 1` tokens in all


def assemble(
    rows: Sequence[Row],
    numbers: Sequence[int],
    *,
    seq_len: int,
    document_mask: bool,
    reset_positions: bool,
    pad_id: int = 0,
) -> Batch:
    """One `Batch` of `len(rows)` sequences.

    A row shorter than `seq_len + 1` tokens is filled with `pad_id`, in a document of its own, and what is filled counts
    for no loss. `numbers`: the global sequence numbers. A target counts by the loss mask of its corpus; the
    end-of-text that opens the next document counts in a corpus without one.
    """
    shape = (len(rows), seq_len + 1)
    tokens = np.full(shape, pad_id, np.int64)
    learned = np.zeros(shape, np.float32)
    document = np.zeros(shape, np.int64)
    position = np.tile(np.arange(seq_len + 1), (len(rows), 1))
    for b, row in enumerate(rows):
        corpus, begin = row.corpus, 0
        for d, (number, start, stop) in enumerate(row.slices):
            end = begin + stop - start
            tokens[b, begin:end] = corpus.tokens(number, start, stop)
            learned[b, begin:end] = corpus.mask(number, start, stop) if corpus.has_mask else 1
            if document_mask:
                document[b, begin:end] = d
            if reset_positions:
                position[b, begin:end] -= begin
            begin = end
        if document_mask:
            document[b, begin:] = len(row.slices)
    return Batch(
        tokens_BT=_tensor(tokens[:, :-1]),
        targets_BT=_tensor(tokens[:, 1:]),
        loss_mask_BT=_tensor(learned[:, 1:]),
        document_BT=_tensor(document[:, :-1]),
        position_BT=_tensor(position[:, :-1]),
        sequence_B=torch.tensor(numbers, dtype=torch.int64),
        counted_N=_counted(learned[:, 1:]),
    )


def _counted(learned: np.ndarray) -> torch.Tensor | None:
    """None where logits of all tokens cost little more than those that count."""
    others = np.flatnonzero(learned == 0)
    size = -(-(learned.size - len(others)) // COUNTED_MULTIPLE) * COUNTED_MULTIPLE
    if size >= WORTH_CHOOSING * learned.size:
        return None
    wanted = learned.flatten() != 0
    wanted[others[len(others) - (size - wanted.sum()) :]] = True
    return _tensor(np.flatnonzero(wanted))


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))
