"""What a model makes of the middles of held-out documents, with and without what stands after them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from dist_lm.data.batch import Row, assemble
from dist_lm.data.evaluation_batches import EvaluationBatch, dealt, spread
from dist_lm.data.infill import ADDED, InfillMarks, eligible, middle_of, rearranged
from dist_lm.data.keys import Shuffle, key
from dist_lm.data.mapped import MappedCorpus
from dist_lm.data.order import DocumentSlice


@dataclass(frozen=True, kw_only=True)
class HeldOutMiddles:
    """The middles of held-out documents as targets, one document a sequence, in the batches of one rank.

    The documents and the middles are the same for every model. With `marks` the model reads what stands before and
    after the middle (PSM); without, only what stands before, as a left-to-right model does.
    """

    corpus: MappedCorpus
    marks: InfillMarks | None
    seq_len: int
    micro_batch: int
    dp_rank: int
    dp_size: int
    limit: int  # documents; 0: all
    pad_id: int = 0
    has_mask = False

    @cached_property
    def _documents(self) -> np.ndarray:
        places = eligible(self.corpus.lengths, self.seq_len)
        return places[spread(len(places), self.limit)]

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a document that ends with its middle."""
        begin, end = self._middle(document)
        whole = self.corpus.tokens(document, 0, self.corpus.lengths.item(document))
        return (rearranged(whole, begin, end, self.marks) if self.marks else whole[:end])[start:stop]

    def mask(self, document: int, start: int, stop: int) -> np.ndarray:
        """Ones: the language of a target says whether it counts."""
        return np.ones(stop - start, np.uint8)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        for numbers in dealt(self._documents, self.micro_batch, self.dp_rank, self.dp_size):
            yield self._batch(numbers)

    def _batch(self, documents: list[int]) -> EvaluationBatch:
        language_BT = torch.full((len(documents), self.seq_len), -1, dtype=torch.int64)
        rows = []
        for b, document in enumerate(documents):
            if document < 0:
                rows.append(Row(self, []))
                continue
            begin, end = self._middle(document)
            length = self.corpus.lengths.item(document) + ADDED if self.marks else end
            rows.append(Row(self, [DocumentSlice(document, 0, length)]))
            language_BT[b, length - (end - begin) - 1 : length - 1] = int(self.corpus.language_codes[document])
        batch = assemble(
            rows,
            documents,
            seq_len=self.seq_len,
            document_mask=True,
            reset_positions=True,
            pad_id=self.pad_id,
        )
        return EvaluationBatch(batch, language_BT)

    def _middle(self, document: int) -> tuple[int, int]:
        return middle_of(self.corpus.lengths.item(document), key(Shuffle.INFILL_HELD_OUT, document))
