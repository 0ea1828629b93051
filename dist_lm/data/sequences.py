"""Training sequences by number: those of one corpus over all epochs, and how several corpora are mixed into one stream.

Both are pure functions of the number, so the state of a stream is one integer, and how a step is cut into ranks and
micro-batches changes nothing.
"""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np

from dist_lm.data.batch import Row
from dist_lm.data.infill import ADDED, Infill, InfillEpoch, most_pieces
from dist_lm.data.keys import Shuffle, key, permutation
from dist_lm.data.order import EpochOrder, sequences_an_epoch
from dist_lm.data.packing import PackedEpoch, Packing
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ArtefactError

SEQ_LEN = "stage.seq_len"
KEPT = 2  # orders of epochs: sequences are asked for in rising numbers
BLOCK = 100  # sequences; shares are whole per cent

Order = TypeVar("Order")


class Epochs(Generic[Order]):
    """The orders of the epochs that are being read. Every epoch has `n_sequences`, numbered over all epochs."""

    def __init__(self, n_sequences: int, order: Callable[[int], Order]) -> None:
        """`order`: gives the order of an epoch."""
        self._n_sequences, self._order = n_sequences, order
        self._kept: dict[int, Order] = {}

    def place(self, number: int) -> tuple[Order, int]:
        """The order that holds sequence `number`, and the number inside the epoch."""
        epoch, i = divmod(number, self._n_sequences)
        if epoch not in self._kept:
            self._kept[epoch] = self._order(epoch)
            while len(self._kept) > KEPT:
                del self._kept[next(iter(self._kept))]
        return self._kept[epoch], i


class CorpusSequences:
    """The sequences of one corpus, numbered 0, 1, 2, ... over all epochs.

    Text is cut from one row of tokens, and no token is lost. Conversations (a corpus with a loss mask) stay whole.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        seed: int,
        seq_len: int,
        seq_len_key: str = SEQ_LEN,
        infill: Infill | None = None,
    ) -> None:
        """Open the sequences of a corpus.

        Args:
            seq_len_key: the configuration key that `seq_len` comes from, for errors.
            infill: rearranges pieces of documents of text; every epoch has as many sequences.

        Raises:
            ArtefactError: the corpus does not fill a sequence.
        """
        self.corpus = corpus
        self._seed, self._infill = seed, infill
        self._most = 0  # pieces of a sequence that may be rearranged
        if infill:
            assert not corpus.has_mask, "conversations are not rearranged"
            self._most = most_pieces(corpus.lengths, infill.rate, seq_len)
        self._text_len = seq_len - ADDED * self._most  # tokens of text in a sequence
        self.packing = packed(corpus, seq_len, seq_len_key) if corpus.has_mask else None
        self.n_sequences = (  # an epoch
            self.packing.n_rows if self.packing else sequences_an_epoch(corpus.n_tokens, self._text_len)
        )
        if self.n_sequences == 0:
            raise ArtefactError(
                f"corpus {corpus.directory} has {corpus.n_tokens} {corpus.split} tokens, but one sequence of "
                f"{seq_len_key}={seq_len} takes {seq_len + 1}: shorten {seq_len_key} or add text"
            )
        self._epochs = Epochs(self.n_sequences, self._order)

    def row(self, number: int) -> Row:
        """Sequence `number`: `seq_len + 1` tokens, of conversations and with `infill` perhaps fewer."""
        order, i = self._epochs.place(number)
        return order.row(i) if isinstance(order, InfillEpoch) else Row(self.corpus, order.sequence(i))

    def _order(self, epoch: int) -> EpochOrder | PackedEpoch | InfillEpoch:
        if self.packing:
            return PackedEpoch(self.packing, self._seed, epoch)
        corpus = self.corpus
        order = EpochOrder(corpus.lengths, self._seed, epoch, self._text_len, corpus.continues)
        if self._infill and self._most:
            return InfillEpoch(corpus, order, self._infill, self._most, self._seed, epoch)
        return order


class Mix:
    """Sequences of several corpora in one stream. Corpus 0 is the stage's own and takes what the others leave.

    Every block of 100 sequences holds each corpus by its exact share, in an order of its own.
    """

    def __init__(self, shares: Sequence[float], seed: int) -> None:
        """`shares`: those of corpora 1, 2, ...; whole per cent, with a sum below 1."""
        others = [round(share * BLOCK) for share in shares]
        self._counts = np.array([BLOCK - sum(others), *others])
        assert self._counts.min() > 0, shares
        self._seed = seed
        self._block = -1
        self._corpora = self._places = np.empty(0, np.int64)

    def place(self, number: int) -> tuple[int, int]:
        """(corpus, number within it) of global sequence `number`; a corpus is read in its order, without a gap."""
        block, i = divmod(number, BLOCK)
        if block != self._block:
            self._shuffle(block)
        corpus = int(self._corpora[i])
        return corpus, block * int(self._counts[corpus]) + int(self._places[i])

    def _shuffle(self, block: int) -> None:
        """The corpus of each sequence of a block, and how many of that corpus come before it there."""
        corpora = np.repeat(np.arange(len(self._counts)), self._counts)
        self._corpora = corpora[permutation(BLOCK, key(Shuffle.MIX, self._seed, block))]
        same = self._corpora[:, None] == self._corpora[None, :]
        self._places = np.tril(same, -1).sum(1)
        self._block = block


def packed(corpus: TokenCorpus, seq_len: int, seq_len_key: str = SEQ_LEN, kind: str = "conversations") -> Packing:
    """The rows of a corpus whose documents stay whole.

    Args:
        kind: conversations | rankings.

    Raises:
        ArtefactError: no document fits into a sequence.
    """
    targets = _only_targets(kind)
    packing = Packing(corpus.lengths, seq_len + targets - 1)
    if packing.n_rows == 0:
        raise ArtefactError(
            f"corpus {corpus.directory}: all {corpus.n_documents:,} {corpus.split} {kind} are longer than "
            f"{seq_len_key}={seq_len}: raise it (the shortest takes {int(corpus.lengths.min()) - targets})"
        )
    return packing


def note_of_left_out(corpus: TokenCorpus, seq_len: int, seq_len_key: str = SEQ_LEN, kind: str = "conversations") -> str:
    """A line about the documents that no sequence holds; empty where there are none. `kind`: see `packed`."""
    targets = _only_targets(kind)
    left_out = int((corpus.lengths > seq_len + targets).sum()) if corpus.has_mask else 0
    if not left_out:
        return ""
    return (
        f"corpus {corpus.directory}: {left_out:,} of {corpus.n_documents:,} {corpus.split} {kind} "
        f"({left_out / corpus.n_documents:.1%}) are longer than {seq_len_key}={seq_len} and are left out; "
        f"{int(corpus.lengths.max()) - targets} would take all"
    )


def _only_targets(kind: str) -> int:
    """Tokens of a row that are only targets: the last one; of rankings nothing is predicted."""
    return 0 if kind == "rankings" else 1
