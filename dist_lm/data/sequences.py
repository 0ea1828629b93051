"""The training sequences of one corpus, numbered 0, 1, 2, ... over all epochs."""

from dist_lm.data.epochs import Epochs
from dist_lm.data.mapped import MappedCorpus
from dist_lm.data.order import DocumentSlice, EpochOrder, sequences_an_epoch
from dist_lm.data.packing import PackedEpoch, Packing
from dist_lm.errors import ArtefactError

SEQ_LEN = "stage.seq_len"


class CorpusSequences:
    """Text is cut from one row of tokens, of which none is lost; conversations, the documents of a corpus with a loss
    mask, are packed and never cut.
    """

    def __init__(self, corpus: MappedCorpus, seed: int, seq_len: int, seq_len_key: str = SEQ_LEN) -> None:
        """`seq_len_key`: the key that `seq_len` is from.

        Raises `ArtefactError` for a corpus that fills no sequence.
        """
        self.corpus = corpus
        self._seed, self._seq_len = seed, seq_len
        self.packing = packed(corpus, seq_len, seq_len_key) if corpus.has_mask else None
        self.n_sequences = (  # an epoch
            self.packing.n_rows if self.packing else sequences_an_epoch(corpus.n_tokens, seq_len)
        )
        if self.n_sequences == 0:
            raise ArtefactError(
                f"corpus {corpus.directory} has {corpus.n_tokens} {corpus.split} tokens, but one sequence of "
                f"{seq_len_key}={seq_len} takes {seq_len + 1}: shorten {seq_len_key} or add text"
            )
        self._epochs = Epochs(self.n_sequences, self._order)

    def slices(self, number: int) -> list[DocumentSlice]:
        """The document slices of sequence `number`: `seq_len + 1` tokens, of conversations perhaps fewer."""
        order, i = self._epochs.place(number)
        return order.sequence(i)

    def _order(self, epoch: int) -> EpochOrder | PackedEpoch:
        if self.packing:
            return PackedEpoch(self.packing, self._seed, epoch)
        return EpochOrder(self.corpus.lengths, self._seed, epoch, self._seq_len)


def packed(corpus: MappedCorpus, seq_len: int, seq_len_key: str = SEQ_LEN) -> Packing:
    """The rows of a corpus of conversations.

    Raises:
        ArtefactError: none of them fits into a sequence.
    """
    packing = Packing(corpus.lengths, seq_len)
    if packing.n_rows == 0:
        raise ArtefactError(
            f"corpus {corpus.directory}: all {corpus.n_documents:,} {corpus.split} conversations are longer than "
            f"{seq_len_key}={seq_len}: raise it (the shortest takes {int(corpus.lengths.min()) - 1})"
        )
    return packing


def note_of_left_out(corpus: MappedCorpus, seq_len: int, seq_len_key: str = SEQ_LEN) -> str:
    """A line about the conversations that no sequence holds; empty where there are none."""
    left_out = int((corpus.lengths > seq_len + 1).sum()) if corpus.has_mask else 0
    if not left_out:
        return ""
    return (
        f"corpus {corpus.directory}: {left_out:,} of {corpus.n_documents:,} {corpus.split} conversations "
        f"({left_out / corpus.n_documents:.1%}) are longer than {seq_len_key}={seq_len} and are left out; "
        f"{int(corpus.lengths.max()) - 1} would take all"
    )
