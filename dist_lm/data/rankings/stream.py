"""Rankings without end for training, and in a fixed order for evaluation.

Whole rankings are packed into sequences as conversations are (`data.packing`), so which share a row, and when it comes,
is a pure function of (seed, epoch, index), and the state of the stream is one integer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from dist_lm.data.batch import Batch
from dist_lm.data.epochs import Epochs
from dist_lm.data.evaluation_batches import spread
from dist_lm.data.packing import PackedEpoch, Packing
from dist_lm.data.rankings.assemble import PlacedRanking, assemble_rankings, ranked_places
from dist_lm.data.rankings.lessons import lesson
from dist_lm.data.rankings.mapped import MappedRankings
from dist_lm.data.stream import StepStream
from dist_lm.errors import ArtefactError


def packed_rankings(rankings: MappedRankings, seq_len: int) -> Packing:
    """The rows of a split: at most `seq_len` tokens, as no last one is only a target.

    Raises:
        ArtefactError: no ranking fits into a sequence.
    """
    lengths = rankings.corpus.lengths
    packing = Packing(lengths, seq_len - 1)
    if packing.n_rows == 0:
        raise ArtefactError(
            f"corpus {rankings.corpus.directory}: all {len(lengths):,} {rankings.corpus.split} rankings are longer "
            f"than stage.seq_len={seq_len}: raise it (the shortest takes {int(lengths.min())})"
        )
    return packing


def note_of_long_rankings(rankings: MappedRankings, seq_len: int) -> str:
    """A line about the rankings that no sequence holds; empty where there are none."""
    lengths = rankings.corpus.lengths
    left_out = int((lengths > seq_len).sum())
    if not left_out:
        return ""
    return (
        f"corpus {rankings.corpus.directory}: {left_out:,} of {len(lengths):,} {rankings.corpus.split} rankings "
        f"({left_out / len(lengths):.1%}) are longer than stage.seq_len={seq_len} with all their completions and are "
        f"left out; {int(lengths.max())} would take all"
    )


@dataclass(frozen=True)
class Lessons:
    """What is taken from every ranking; see `lessons.lesson`."""

    learn_from: str
    label_noise: float
    seed: int


class RankingStream(StepStream):
    """The steps of stage reward."""

    def __init__(
        self,
        rankings: MappedRankings,
        lessons: Lessons,
        *,
        seed: int,
        seq_len: int,
        pad_id: int,
        global_batch: int,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        position: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Arguments as of `StepStream`.

        Raises:
            ConfigError: the batch does not divide over the ranks.
            ArtefactError: no ranking fits into a sequence.
        """
        self._rankings, self._lessons = rankings, lessons
        self._seq_len = seq_len
        self._packing = packed_rankings(rankings, seq_len)
        packing = self._packing
        self._epochs = Epochs(packing.n_rows, lambda epoch: PackedEpoch(packing, seed, epoch))
        super().__init__(
            self.batch,
            global_batch=global_batch,
            micro_batch=micro_batch,
            dp_rank=dp_rank,
            dp_size=dp_size,
            pad_id=pad_id,
            position=position,
            pin_memory=pin_memory,
            packing=self._packing.report(),
        )

    def batch(self, numbers: list[int]) -> Batch:
        """The sequences of these global numbers."""
        rows = [self._documents(number) for number in numbers]
        batch, placed = assemble_rankings(self._rankings, rows, numbers, self._seq_len, self._pad_id)
        taken = self._lessons
        verdicts = [
            lesson(self._rankings.verdict(one.document), taken.learn_from, taken.label_noise, taken.seed, one.document)
            for one in placed
        ]
        return replace(batch, ranked=ranked_places(placed, verdicts))

    def _documents(self, number: int) -> list[int]:
        order, i = self._epochs.place(number)
        return [part.document for part in order.sequence(i)]


@dataclass(frozen=True)
class RankingBatches:
    """Held-out rankings for one rank; can be iterated again and again. All ranks have as many batches, because a
    forward is collective: one that runs out gets rows of padding."""

    rankings: MappedRankings
    packing: Packing
    sequences: np.ndarray  # numbers of the rows to evaluate, over all ranks
    seq_len: int
    micro_batch: int
    dp_rank: int
    dp_size: int
    pad_id: int

    @classmethod
    def of(
        cls,
        rankings: MappedRankings,
        *,
        seq_len: int,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        pad_id: int,
        limit_sequences: int = 0,
    ) -> "RankingBatches":
        """All rankings that fit into a sequence, or those of `limit_sequences` rows at even distances (0: all)."""
        packing = packed_rankings(rankings, seq_len)
        rows = spread(packing.n_rows, limit_sequences)
        return cls(rankings, packing, rows, seq_len, micro_batch, dp_rank, dp_size, pad_id)

    def __iter__(self) -> Iterator[tuple[Batch, list[PlacedRanking]]]:
        for step in range(-(-len(self.sequences) // (self.micro_batch * self.dp_size))):
            begin = (step * self.dp_size + self.dp_rank) * self.micro_batch
            numbers = self.sequences[begin : begin + self.micro_batch].tolist()
            padding = self.micro_batch - len(numbers)
            rows = [[part.document for part in self.packing.sequence(number)] for number in numbers]
            yield assemble_rankings(
                self.rankings, rows + [[]] * padding, numbers + [-1] * padding, self.seq_len, self.pad_id
            )
