"""Makes batches to measure losses on the middles of held-out texts, with and without the text behind them.

Held-out documents are cut into slices that fit a sequence with the marks, and every slice has one middle.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from dist_lm.data.batch import SequenceContent, assemble
from dist_lm.data.evaluation_batches import EvaluationBatch, evenly_spaced, micro_batches_of_rank
from dist_lm.data.infill import ADDED, LEAST, PSM, InfillMarks, middle_of, rearranged
from dist_lm.data.order import DocumentSlice, Shuffle, key
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.tokenizer.tokenizer import FirstToken


@dataclass(frozen=True, kw_only=True)
class HeldOutMiddles:
    """The middles of held-out slices as targets, one slice a sequence, in the batches of one rank.

    The slices and their middles are the same for every model. With `marks` the model reads the text before and behind
    the middle, in the form `form`; without, only the text before it, as a left-to-right model does.
    """

    corpus: TokenCorpus
    marks: InfillMarks | None
    seq_len: int
    micro_batch: int
    dp_rank: int
    dp_size: int
    limit: int  # slices, evenly spread; 0: all
    form: int = PSM
    pad_id: int = 0
    first_token: FirstToken | None = None
    has_mask = False

    @cached_property
    def _slices(self) -> np.ndarray:
        """Returns the slices to evaluate, over all ranks: (slices, 3) integers, document, begin and end of the slice in
        the document.

        At most `limit`, evenly spread. A rest of a document below `LEAST` tokens is left out.
        """
        size = self.seq_len - ADDED
        lengths = self.corpus.lengths
        n_slices = -(-lengths // size)  # (documents,)

        # The number of a slice in its document: that over all slices, less the number of the document's first slice.
        documents = np.repeat(np.arange(len(lengths)), n_slices)
        begins = size * (np.arange(len(documents)) - np.repeat(np.cumsum(n_slices) - n_slices, n_slices))
        ends = np.minimum(begins + size, lengths[documents])

        # A rest that training would not rearrange is not measured either.
        slices = np.stack([documents, begins, ends], 1)[ends - begins >= LEAST]
        return slices[evenly_spaced(len(slices), self.limit)]

    def tokens_of(self, slices: Sequence[DocumentSlice]) -> np.ndarray:
        """Returns the tokens of slices end to end, each as `tokens`: (n,).

        Raises:
            ArtefactError: a tar is damaged.
        """
        return np.concatenate([self.tokens(*part) for part in slices])

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Returns tokens [start, stop) of a text that ends with a middle: (stop - start,).

        Args:
            document: the number of a slice, as `assemble` sees every slice as a document.

        Raises:
            ArtefactError: a tar is damaged.
        """
        number, first, last = self._slices[document].tolist()
        begin, end = self._middle(document)
        tokens = self.corpus.tokens(number, first, last)
        # Without marks the text ends with its middle: the rest of the slice is not seen.
        if self.marks:
            return rearranged(tokens, begin, end, self.marks, self.form, first == 0)[start:stop]
        return tokens[:end][start:stop]

    def mask(self, document: int, start: int, stop: int) -> np.ndarray:
        """Returns ones, (stop - start,) uint8: the language of a target says whether it counts."""
        return np.ones(stop - start, np.uint8)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        for numbers in micro_batches_of_rank(
            np.arange(len(self._slices)), self.micro_batch, self.dp_rank, self.dp_size
        ):
            yield self._batch(numbers)

    def _batch(self, slice_numbers: list[int]) -> EvaluationBatch:
        """Returns the micro-batch of these slices, in host memory; the language, (B, T) int64, is -1 except for the
        targets of the middles.

        Args:
            slice_numbers: a negative one is an empty row, which fills the batch.

        Raises:
            ArtefactError: a tar is damaged.
        """
        language_BT = torch.full((len(slice_numbers), self.seq_len), -1, dtype=torch.int64)
        rows = []
        for b, slice_number in enumerate(slice_numbers):
            if slice_number < 0:
                rows.append(SequenceContent(self, []))
                continue

            document, first, last = self._slices[slice_number].tolist()
            begin, end = self._middle(slice_number)
            length = end
            if self.marks:
                length = last - first + ADDED
            rows.append(SequenceContent(self, [DocumentSlice(slice_number, 0, length)]))

            # The middle is at the end of the text; a target is one position before its token.
            middle_targets = slice(length - (end - begin) - 1, length - 1)
            language_BT[b, middle_targets] = int(self.corpus.language_codes[document])

        batch = assemble(
            rows,
            slice_numbers,
            seq_len=self.seq_len,
            document_mask=True,
            reset_positions=True,
            pad_id=self.pad_id,
            first_token=self.first_token,
        )
        return EvaluationBatch(batch, language_BT)

    def _middle(self, slice_number: int) -> tuple[int, int]:
        """Draws the middle of a slice, (begin, end) in its tokens.

        The first token of a slice always stands before it, because a left-to-right model cannot predict that token.
        """
        document, first, last = self._slices[slice_number].tolist()
        return middle_of(last - first, key(Shuffle.INFILL_HELD_OUT, document, first))
