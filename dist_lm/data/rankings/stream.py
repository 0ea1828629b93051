"""Batches of rankings: without end for training, in a fixed order for evaluation.

Whole rankings are packed into sequences as conversations are (`data.packing`), so a row and its
place are a pure function of (seed, epoch, index), and the state of the stream is one integer. What is learned from a
verdict (its ranks, or pairs drawn from them, with label noise) is keyed by ranking and seed, not by epoch.

Dimensions: B sequences, T tokens, P rankings, K completions of the largest, N judgements.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np
import torch

from dist_lm.chat.ranking import branch_ends, branch_positions
from dist_lm.data.batch import Batch, RankedPlaces
from dist_lm.data.evaluation_batches import dealt, spread
from dist_lm.data.keys import Shuffle, key, permutation, splitmix64
from dist_lm.data.order import DocumentSlice
from dist_lm.data.packing import PackedEpoch, Packing
from dist_lm.data.rankings.shards import RankingCorpus
from dist_lm.data.sequences import Epochs, packed
from dist_lm.data.stream import StepStream
from dist_lm.document import Verdict
from dist_lm.tokenizer.tokenizer import Opening

ALL, PAIRS, ONE_PAIR = "rankings", "pairs", "one_pair"


@dataclass(frozen=True, slots=True)
class PlacedRanking:
    """A ranking in a batch."""

    document: int  # number in its corpus
    places: np.ndarray  # (K,) int64: of the completions' values; `assemble_rankings`: places of their last tokens


Assemble = Callable[
    [RankingCorpus, Sequence[Sequence[DocumentSlice]], Sequence[int], int, int, Opening | None],
    tuple[Batch, list[PlacedRanking]],
]
"""(rankings, rows, numbers, seq_len, pad_id, opening) -> a batch and the rankings in it: see `assemble_rankings`."""


class RankingStream(StepStream):
    """The steps of a stage that learns from rankings."""

    def __init__(
        self,
        rankings: RankingCorpus,
        learn_from: str,
        label_noise: float,
        *,
        seed: int,
        seq_len: int,
        pad_id: int,
        opening: Opening | None = None,
        global_batch: int,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        position: int = 0,
        pin_memory: bool = False,
        assemble: Assemble | None = None,
    ) -> None:
        """Arguments as of `StepStream`; `learn_from`, `label_noise`: see `lesson`.

        Args:
            assemble: makes the batches; None: `assemble_rankings`.

        Raises:
            ConfigError: the batch does not divide over the ranks.
            ArtefactError: no ranking fits into a sequence.
        """
        self._rankings, self._seed = rankings, seed
        self._learn_from, self._label_noise = learn_from, label_noise
        self._seq_len, self._pad_id, self._opening = seq_len, pad_id, opening
        self._assemble = assemble or assemble_rankings
        packing = packed(rankings.corpus, seq_len, kind=ALL)
        self._epochs = Epochs(packing.n_rows, lambda epoch: PackedEpoch(packing, seed, epoch))
        super().__init__(
            self.batch,
            global_batch=global_batch,
            micro_batch=micro_batch,
            dp_rank=dp_rank,
            dp_size=dp_size,
            position=position,
            pin_memory=pin_memory,
            packing=packing.report(),
        )

    def batch(self, numbers: list[int]) -> Batch:
        """The sequences of these global numbers."""
        orders = [self._epochs.place(number) for number in numbers]
        rows = [order.sequence(i) for order, i in orders]
        batch, placed = self._assemble(self._rankings, rows, numbers, self._seq_len, self._pad_id, self._opening)
        verdicts = [
            lesson(self._rankings.verdict(one.document), self._learn_from, self._label_noise, self._seed, one.document)
            for one in placed
        ]
        return replace(batch, ranked=ranked_places(placed, verdicts))


@dataclass(frozen=True, kw_only=True)
class RankingBatches:
    """Held-out rankings that fit into a sequence, in the batches of one rank; can be iterated again and again."""

    rankings: RankingCorpus
    seq_len: int
    micro_batch: int
    dp_rank: int
    dp_size: int
    pad_id: int
    opening: Opening | None = None
    limit_sequences: int = 0  # rows at even distances; 0: all
    assemble: Assemble | None = None  # makes the batches; None: `assemble_rankings`

    @cached_property
    def packing(self) -> Packing:
        """The rows of all rankings."""
        return packed(self.rankings.corpus, self.seq_len, kind=ALL)

    def __iter__(self) -> Iterator[tuple[Batch, list[PlacedRanking]]]:
        chosen = spread(self.packing.n_rows, self.limit_sequences)
        for numbers in dealt(chosen, self.micro_batch, self.dp_rank, self.dp_size):
            rows = [self.packing.sequence(number) if number >= 0 else [] for number in numbers]
            made = self.assemble or assemble_rankings
            yield made(self.rankings, rows, numbers, self.seq_len, self.pad_id, self.opening)


def lesson(verdict: Verdict, learn_from: str, label_noise: float, seed: int, number: int) -> Verdict:
    """The part of a verdict that stage reward learns from.

    Args:
        learn_from: `rankings`: the whole verdict. `pairs`: K - 1 pairs of K ranked completions, as many as a ranking
            has choices. `one_pair`: one of these pairs.
        label_noise: see `noisy`.
        number: of the ranking in its corpus.
    """
    verdict = noisy(verdict, label_noise, key(Shuffle.LABEL_NOISE, seed, number))
    if learn_from == ALL or not len(verdict.ranks):
        return verdict
    count = 1 if learn_from == ONE_PAIR else len(verdict.ranks) - 1
    return drawn_pairs(verdict, count, key(Shuffle.PAIRS, seed, number))


def noisy(verdict: Verdict, share: float, word: int) -> Verdict:
    """A verdict that errs: each judgement is turned round, and each two neighbouring ranks change places, with
    probability `share`, from the best down."""
    if not share:
        return verdict
    levels = np.unique(verdict.ranks)
    wrong = splitmix64(word, max(len(levels) - 1, len(verdict.judgements))) < np.uint64(int(share * (2**64 - 1)))
    judgements = np.where(wrong[: len(verdict.judgements), None], verdict.judgements[:, ::-1], verdict.judgements)
    swapped = levels.copy()
    for place in np.flatnonzero(wrong[: max(len(levels) - 1, 0)]):
        swapped[[place, place + 1]] = swapped[[place + 1, place]]
    # swapped[i] is the level that now stands at place i
    ranks = np.argsort(swapped)[np.searchsorted(levels, verdict.ranks)] if len(levels) else verdict.ranks
    return replace(verdict, ranks=ranks.astype(np.uint8), judgements=judgements)


def drawn_pairs(verdict: Verdict, count: int, word: int) -> Verdict:
    """`count` (at most all) of the pairs with different ranks, as judgements without a margin."""
    ranks = verdict.ranks.tolist()
    pairs = [
        (one, other) if ranks[one] < ranks[other] else (other, one)
        for one, other in combinations(range(len(ranks)), 2)
        if ranks[one] != ranks[other]
    ]
    chosen = np.array(pairs, np.uint8)[np.sort(permutation(len(pairs), word)[:count])]
    return replace(verdict, ranks=np.zeros(0, np.uint8), judgements=chosen, margins=np.zeros(len(chosen), np.float32))


def assemble_rankings(
    rankings: RankingCorpus,
    rows: Sequence[Sequence[DocumentSlice]],
    numbers: Sequence[int],
    seq_len: int,
    pad_id: int,
    opening: Opening | None = None,
) -> tuple[Batch, list[PlacedRanking]]:
    """One `Batch` of `len(rows)` sequences, and the places of its completions; `ranked_places` adds verdicts.

    Args:
        rows: whole documents of each sequence, at most `seq_len` tokens in all; the rest is filled with `pad_id`, in a
            document of its own.
        numbers: the global sequence numbers.
        opening: of the tokenizer; None: documents begin with end-of-text.
    """
    shape = (len(rows), seq_len)
    tokens = np.full(shape, pad_id, np.int64)
    document = np.zeros(shape, np.int64)
    branch = np.zeros(shape, np.int64)
    position = np.zeros(shape, np.int64)
    placed, n_tokens = [], 0
    for b, row in enumerate(rows):
        begin = 0
        for d, (number, _, _) in enumerate(row):
            own = rankings.verdict(number).branch
            end = begin + len(own)
            tokens[b, begin:end] = rankings.tokens(number)
            if opening:
                opening.put(tokens[b, begin:end])
            document[b, begin:end] = d
            branch[b, begin:end] = own
            position[b, begin:end] = branch_positions(own)
            placed.append(PlacedRanking(number, b * seq_len + begin + branch_ends(own)))
            begin = end
        n_tokens += begin
        document[b, begin:] = len(row)
        position[b, begin:] = np.arange(seq_len - begin)
    tokens_BT = torch.from_numpy(tokens)
    batch = Batch(
        tokens_BT=tokens_BT,
        targets_BT=torch.zeros_like(tokens_BT),  # nothing is predicted
        loss_mask_BT=torch.zeros(shape),
        document_BT=torch.from_numpy(document),
        position_BT=torch.from_numpy(position),
        sequence_B=torch.tensor(numbers, dtype=torch.int64),
        branch_BT=torch.from_numpy(branch),
        n_tokens=n_tokens,
    )
    return batch, placed


def ranked_places(placed: Sequence[PlacedRanking], verdicts: Sequence[Verdict]) -> RankedPlaces:
    """The verdicts of a batch as tensors. `verdicts`: one a ranking."""
    ranked = [(one.places, verdict.ranks) for one, verdict in zip(placed, verdicts, strict=True) if len(verdict.ranks)]
    shape = (len(ranked), max((len(ranks) for _, ranks in ranked), default=2))
    place, rank, there = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, bool)
    for p, (places, ranks) in enumerate(ranked):
        place[p, : len(ranks)], rank[p, : len(ranks)], there[p, : len(ranks)] = places, ranks, True
    pairs = [one.places[verdict.judgements.astype(np.int64)] for one, verdict in zip(placed, verdicts, strict=True)]
    pairs_N2 = np.concatenate([np.zeros((0, 2), np.int64), *pairs])
    margins = np.concatenate([np.zeros(0, np.float32), *(verdict.margins for verdict in verdicts)])
    return RankedPlaces(
        place_PK=torch.from_numpy(place),
        rank_PK=torch.from_numpy(rank),
        there_PK=torch.from_numpy(there),
        better_N=torch.from_numpy(pairs_N2[:, 0].copy()),
        worse_N=torch.from_numpy(pairs_N2[:, 1].copy()),
        margin_N=torch.from_numpy(margins),
    )
