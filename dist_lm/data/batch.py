"""Defines a micro-batch of sequences, and assembles it from slices of documents.

Dimensions: B sequences, T tokens.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses
from torch._subclasses.fake_tensor import FakeTensor

from dist_lm.data.order import DocumentSlice
from dist_lm.tokenizer.tokenizer import FirstToken

# If the targets in the loss are a smaller share of all targets than this, only they get logits.
SELECT_BELOW = 0.9
LOGIT_MULTIPLE = 64  # the number of positions with logits is rounded up, so kernels are compiled for few shapes


@dataclass(frozen=True, slots=True)
class RankedPositions:
    """Indices of the completions' scores in the flattened tokens of a batch, with their ranks and judgements.

    Dimensions: P rankings, K completions of the largest ranking, N judgements between two completions.
    """

    index_PK: torch.Tensor  # int64; index of a completion's last token; 0 if the ranking has fewer completions
    rank_PK: torch.Tensor  # int64; the smallest is the best; equal ranks are ties
    exists_PK: torch.Tensor  # bool; whether the completion exists
    better_N: torch.Tensor  # int64; index of the better completion's last token
    worse_N: torch.Tensor  # int64; the same of the worse one
    margin_N: torch.Tensor  # float32

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "RankedPositions":
        """Returns a copy with `change` applied to every tensor."""
        return RankedPositions(*(change(getattr(self, f.name)) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class Batch:
    """B sequences of T tokens with their targets.

    In shards a document begins with end-of-text. So in text the target of a document's last token is the end-of-text of
    the next document. If the tokenizer opens documents with another token (`FirstToken`), the inputs hold that token,
    and the targets keep end-of-text. An epoch of text predicts every token once, except its first token and a rest at
    the end that fills no sequence.
    """

    tokens_BT: torch.Tensor  # int64
    targets_BT: torch.Tensor  # int64; the next token
    loss_mask_BT: torch.Tensor  # float32; 1 where the target counts
    document_BT: torch.Tensor  # int64; number of the slice in its sequence: 0, 1, ...; attention stays inside a slice
    position_BT: torch.Tensor  # int64; for RoPE; starts at 0 in each slice of a document
    sequence_B: torch.Tensor  # int64; global sequence number, the key of dropout
    # int64; indices in the flattened batch for which logits are computed: those of all targets in the loss, and some
    # more up to a multiple of `LOGIT_MULTIPLE`; None: all positions
    logit_index_N: torch.Tensor | None = None
    branch_BT: torch.Tensor | None = None  # int64; 0 in the trunk of a tree of tokens, 1, 2, ... in its branches
    ranked: RankedPositions | None = None  # only for rankings
    n_tokens: int = 0  # tokens of `tokens_BT` without padding, which may have the id of end-of-text
    boundary: torch.Tensor | None = None  # see `document_boundaries`; computed by `to` and `pin_memory`

    @classmethod
    def plain(cls, tokens_BT: torch.Tensor, targets_BT: torch.Tensor | None = None) -> Self:
        """Returns a batch with one document per sequence, in which all targets count, on the device of the tokens.

        Logits are computed for all positions, `sequence_B` is 0 .. B-1, and `n_tokens` stays 0.

        Args:
            tokens_BT: (B, T) int64.
            targets_BT: (B, T) int64; None: the next tokens; the last target is the first token.
        """
        if targets_BT is None:
            targets_BT = tokens_BT.roll(-1, 1)
        return cls(
            tokens_BT=tokens_BT,
            targets_BT=targets_BT,
            loss_mask_BT=torch.ones(tokens_BT.shape, device=tokens_BT.device),
            document_BT=torch.zeros_like(tokens_BT),
            position_BT=torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT),
            sequence_B=torch.arange(len(tokens_BT), device=tokens_BT.device),
        )

    def to(self, device: torch.device) -> Self:
        """Returns the batch on `device`, with its boundaries. A GPU copies it from pinned memory: nobody waits."""
        # A copy from pageable memory would block the host until it is done.
        needs_pinning = device.type == "cuda" and self.tokens_BT.device.type == "cpu" and not self.tokens_BT.is_pinned()
        host_batch = self.pin_memory() if needs_pinning else self._with_boundaries()
        return host_batch._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Returns the batch in page-locked host memory, with its boundaries."""
        return self._with_boundaries()._each(torch.Tensor.pin_memory)

    def _with_boundaries(self) -> Self:
        """Returns the batch with its boundaries, or itself if it has them, is on a GPU, or holds trees.

        On a GPU the host would wait to learn their number.
        """
        if self.boundary is not None or self.document_BT.device.type != "cpu":
            return self
        # The attention of trees does not use boundaries, and their number in a fake tensor is unknown.
        if self.branch_BT is not None or isinstance(self.document_BT, FakeTensor):
            return self
        return replace(self, boundary=document_boundaries(self.document_BT))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Returns a copy with `change` applied to every tensor, those of `ranked` included."""
        tensors = {
            f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), torch.Tensor)
        }
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in tensors.items()}
        return replace(self, **changed, ranked=self.ranked and self.ranked.each(change))


def document_boundaries(document_BT: torch.Tensor) -> torch.Tensor:
    """Computes the offsets in the B * T tokens where documents start, then B * T: int32 (documents + 1,).

    Every row starts a document.
    """
    starts_BT = torch.ones_like(document_BT, dtype=torch.bool)
    starts_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    offsets = starts_BT.flatten().nonzero().flatten()
    return F.pad(offsets, (0, 1), value=document_BT.numel()).to(torch.int32)


class Documents(Protocol):
    """What `assemble` reads the tokens of one row from.

    It is a corpus, read by document number (`token_corpus.TokenCorpus`), a rearranged view of one, or, in the default
    order, the slices of that row alone, whose places were looked up before (`token_corpus.LocatedSlices`).
    """

    @property
    def has_mask(self) -> bool:
        """Whether `mask` is needed; without it every token is learned."""
        ...

    def tokens_of(self, slices: Sequence[DocumentSlice]) -> np.ndarray:
        """Reads the tokens of some slices, at least one, end to end: (n,) of an integer type."""
        ...

    def mask(self, document: int, start: int, stop: int) -> np.ndarray:
        """Reads the loss mask of these tokens: (stop - start,) uint8, 1 where a token is learned."""
        ...


class SequenceContent(NamedTuple):
    """The content of one sequence, a row of a batch."""

    corpus: Documents
    slices: Sequence[DocumentSlice]  # inputs and last target: at most `seq_len + 1` tokens in total
    without: Collection[int] = ()  # documents whose loss does not count


def assemble(
    rows: Sequence[SequenceContent],
    numbers: Sequence[int],
    *,
    seq_len: int,
    document_mask: bool,
    reset_positions: bool,
    pad_id: int = 0,
    first_token: FirstToken | None = None,
) -> Batch:
    """Returns one `Batch` of `len(rows)` sequences in host memory.

    Rows shorter than `seq_len + 1` tokens are padded with `pad_id`. Padding does not count in the loss or in
    `n_tokens`, and with `document_mask` it is a document of its own. The loss mask of the corpus decides which targets
    count; without a mask all targets count, except those that a row leaves out (`SequenceContent.without`). A longer
    row is an error of the caller (numpy's ValueError).

    Args:
        rows: slices of documents, `seq_len + 1` tokens with the last target.
        numbers: global sequence numbers.
        seq_len: T, in tokens.
        document_mask: whether attention stays inside a slice. False: a row is one document, with its padding.
        reset_positions: whether positions start at 0 in each slice, also in one that continues a document.
        first_token: stands in the inputs in place of the end-of-text that opens a document; None: inputs keep that.

    Raises:
        ArtefactError: a tar that the corpus reads from is damaged.
        OSError: a tar cannot be read.
    """
    shape = len(rows), seq_len
    # Rows are written into one array; inputs and targets are copies of it, shifted by one token.
    tokens = np.empty((len(rows), seq_len + 1), np.int64)
    counts = np.ones(shape, np.float32)  # whether a target counts; padding never does
    document_starts: list[tuple[int, int]] = []  # (row, position)
    n_tokens = 0

    # Slices of all rows, the padding of a row as its last one: number in the row, first position, and inputs.
    numbers_in_row: list[int] = []
    begins: list[int] = []
    sizes: list[int] = []

    for b, row in enumerate(rows):
        begin = 0
        for number_in_row, (_, start, stop) in enumerate(row.slices):
            numbers_in_row.append(number_in_row)
            begins.append(begin)
            sizes.append(stop - start)
            # Only a slice from the beginning of its document has the end-of-text that opens it.
            if start == 0:
                document_starts.append((b, begin))
            begin += stop - start

        n_targets = max(begin - 1, 0)
        if row.slices:
            tokens[b, :begin] = row.corpus.tokens_of(row.slices)
            if row.corpus.has_mask or row.without:
                counts[b, :n_targets] = _counted_targets(row)

        if n_targets == seq_len:
            sizes[-1] -= 1  # the last target is no input
            n_tokens += seq_len
        else:
            numbers_in_row.append(len(row.slices))
            begins.append(0)
            sizes.append(seq_len - begin)
            tokens[b, begin:] = pad_id
            counts[b, n_targets:] = 0
            n_tokens += begin

    # One call for all rows: a call for each slice would cost more than the elements that it writes.
    repeats = np.array(sizes)
    document = np.repeat(np.array(numbers_in_row), repeats) if document_mask else np.zeros(counts.size, np.int64)
    if reset_positions:
        position = np.arange(seq_len) - np.repeat(np.array(begins), repeats).reshape(shape)
    else:
        position = np.tile(np.arange(seq_len), (len(rows), 1))

    # Targets keep the end-of-text that opens a document.
    inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    if first_token:
        for b, begin in document_starts:
            first_token.put(inputs[b, begin:])
    return Batch(
        tokens_BT=_tensor(inputs),
        targets_BT=_tensor(targets),
        loss_mask_BT=_tensor(counts),
        document_BT=_tensor(document.reshape(shape)),
        position_BT=_tensor(position),
        sequence_B=_tensor(np.array(numbers, np.int64)),
        logit_index_N=logit_indices(counts),
        n_tokens=n_tokens,
    )


def _counted_targets(row: SequenceContent) -> np.ndarray:
    """Returns whether each target of a row counts, from its second token on: (n - 1,) uint8."""
    # Without a mask every token counts.
    masks = [
        row.corpus.mask(*part) if row.corpus.has_mask else np.ones(part.stop - part.start, np.uint8)
        for part in row.slices
    ]
    counts = np.concatenate(masks)[1:]

    # Position i predicts token i + 1. A document that is left out removes the targets predicted *from* its tokens: the
    # token after its last one too, but not its own first token, which the document before predicts.
    begin = 0
    for document, start, stop in row.slices:
        end = begin + stop - start
        if document in row.without:
            first = begin if start == 0 else max(begin - 1, 0)
            counts[first:end] = 0
        begin = end
    return counts


def logit_indices(learned: np.ndarray) -> torch.Tensor | None:
    """Returns `Batch.logit_index_N`, the positions for which logits are computed; None (all) if that costs little more.

    They are (N,) int64 indices into B * T, rising; N is a multiple of `LOGIT_MULTIPLE`, filled up with positions that
    do not count. N is 0 if no target counts.

    Args:
        learned: (B, T); not 0 where the target counts.
    """
    has_logits = (learned != 0).ravel()
    n_counted = int(np.count_nonzero(has_logits))
    size = -(-n_counted // LOGIT_MULTIPLE) * LOGIT_MULTIPLE
    if size >= SELECT_BELOW * learned.size:
        return None

    # The last uncounted positions fill the number up to the multiple.
    uncounted = np.flatnonzero(~has_logits)
    has_logits[uncounted[len(uncounted) - (size - n_counted) :]] = True
    return _tensor(np.flatnonzero(has_logits))


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
