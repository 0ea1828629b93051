"""Makes batches of rankings: without end for training, in a fixed order for evaluation.

Whole rankings are packed into sequences as conversations are (`data.packing`), so the content of a row and its position
are pure functions of (seed, epoch, index), and the state of the stream is one integer. The part of a ranking that is
learned (its ranks, or pairs drawn from them, with label noise) is keyed by ranking and seed: every epoch has the same.

Dimensions: B sequences, T tokens, P rankings, K completions of the largest, N judgements.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import combinations

import numpy as np
import torch

from dist_lm.chat.ranking import branch_ends, branch_positions
from dist_lm.data.batch import Batch, RankedPositions
from dist_lm.data.evaluation_batches import evenly_spaced, micro_batches_of_rank
from dist_lm.data.order import DocumentSlice, Shuffle, key, permutation, splitmix64
from dist_lm.data.packing import PackedEpoch, Packing
from dist_lm.data.rankings.shards import RankingCorpus
from dist_lm.data.sequences import Epochs, numbers_with, packed
from dist_lm.data.stream import StepStream
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.document import RankingArrays
from dist_lm.tokenizer.tokenizer import FirstToken

ALL, PAIRS, ONE_PAIR = "rankings", "pairs", "one_pair"


@dataclass(frozen=True, slots=True)
class PlacedRanking:
    """A ranking in a batch."""

    document: int  # number in its corpus
    # (K,) int64: index of each completion's score; of `assemble_rankings`, the index of its last token in the
    # flattened batch
    places: np.ndarray


Assemble = Callable[
    [RankingCorpus, Sequence[Sequence[DocumentSlice]], Sequence[int], int, int, FirstToken | None],
    tuple[Batch, list[PlacedRanking]],
]
"""Maps (rankings, rows, numbers, seq_len, pad_id, first_token) to a batch and rankings, like `assemble_rankings`."""


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
        first_token: FirstToken | None = None,
        global_batch: int,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        position: int = 0,
        pin_memory: bool = False,
        assemble: Assemble | None = None,
    ) -> None:
        """Opens the stream. Arguments that are not listed are those of `StepStream` and `assemble_rankings`.

        Args:
            learn_from, label_noise: as for `lesson`.
            assemble: makes the batches; None: `assemble_rankings`.

        Raises:
            ConfigError: the batch does not divide over the ranks.
            ArtefactError: no ranking fits into a sequence.
        """
        self._rankings, self._seed = rankings, seed
        self._learn_from, self._label_noise = learn_from, label_noise
        self._seq_len, self._pad_id, self._first_token = seq_len, pad_id, first_token
        self._assemble = assemble or assemble_rankings

        self._rows = RankingRows(rankings.corpus, seed, seq_len)
        self.n_sequences = self._rows.packing.n_rows  # an epoch
        super().__init__(
            partial(map, self.batch),
            global_batch=global_batch,
            micro_batch=micro_batch,
            dp_rank=dp_rank,
            dp_size=dp_size,
            position=position,
            pin_memory=pin_memory,
            packing=self._rows.packing.report(),
        )

    def batch(self, numbers: list[int]) -> Batch:
        """Returns the micro-batch of these global sequence numbers, with the lessons of its rankings, in host memory.

        Raises:
            ArtefactError: a tar is damaged.
        """
        rows = [self._rows.slices(number)[1] for number in numbers]
        batch, placed = self._assemble(self._rankings, rows, numbers, self._seq_len, self._pad_id, self._first_token)
        lessons = [
            lesson(
                self._rankings.arrays(ranking.document),
                self._learn_from,
                self._label_noise,
                self._seed,
                ranking.document,
            )
            for ranking in placed
        ]
        return replace(batch, ranked=ranked_positions(placed, lessons))


class RankingRows:
    """The rows of a training stream of rankings, numbered over all epochs."""

    def __init__(self, corpus: TokenCorpus, seed: int, seq_len: int) -> None:
        """Packs the rankings of a corpus.

        Args:
            seq_len: in tokens.

        Raises:
            ArtefactError: no ranking fits into a sequence.
        """
        # Rows depend on lengths alone, so all epochs share one packing.
        self.packing = packed(corpus, seq_len, kind=ALL)
        self.corpora = [corpus]
        self._epochs = Epochs(self.packing.n_rows, lambda epoch: PackedEpoch(self.packing, seed, epoch))

    def slices(self, number: int) -> tuple[TokenCorpus, list[DocumentSlice]]:
        """Returns the corpus, and the rankings of row `number`."""
        order, i = self._epochs.locate(number)
        return self.corpora[0], order.sequence(i)

    def numbers(self, corpus: TokenCorpus, parts: Sequence[DocumentSlice], end: int) -> dict[DocumentSlice, list[int]]:
        """Returns the rows below `end` that hold a token of each slice: rising numbers."""
        assert corpus is self.corpora[0]
        return numbers_with(self._epochs.order, self.packing.n_rows, parts, end)


@dataclass(frozen=True, kw_only=True)
class RankingBatches:
    """Held-out rankings that fit into a sequence, in the batches of one rank; can be iterated again and again."""

    rankings: RankingCorpus
    seq_len: int
    micro_batch: int
    dp_rank: int
    dp_size: int
    pad_id: int
    first_token: FirstToken | None = None
    limit_sequences: int = 0  # so many rows, at even distances; 0: all
    assemble: Assemble | None = None  # makes the batches; None: `assemble_rankings`

    @cached_property
    def packing(self) -> Packing:
        """Packs all rankings into rows.

        Raises:
            ArtefactError: no ranking fits into a sequence.
        """
        return packed(self.rankings.corpus, self.seq_len, kind=ALL)

    def __iter__(self) -> Iterator[tuple[Batch, list[PlacedRanking]]]:
        assemble = self.assemble or assemble_rankings
        chosen = evenly_spaced(self.packing.n_rows, self.limit_sequences)
        for numbers in micro_batches_of_rank(chosen, self.micro_batch, self.dp_rank, self.dp_size):
            rows = [self.packing.sequence(number) if number >= 0 else [] for number in numbers]
            yield assemble(self.rankings, rows, numbers, self.seq_len, self.pad_id, self.first_token)


def lesson(arrays: RankingArrays, learn_from: str, label_noise: float, seed: int, number: int) -> RankingArrays:
    """Returns the part of the judgement of a ranking that stage reward learns from. It is the same in every epoch.

    Args:
        learn_from: `rankings`: all of it. `pairs`: K - 1 pairs of K ranked completions, as many as a ranking
            has choices. `one_pair`: one of these pairs.
        label_noise: the probability of `noisy`, in [0, 1).
        number: of the ranking in its corpus.
    """
    # A label compares nothing: it has no pairs, and no neighbour to swap ranks with.
    if len(arrays.ranks) == 1:
        return arrays
    arrays = noisy(arrays, label_noise, key(Shuffle.LABEL_NOISE, seed, number))
    # Judgements are pairs already.
    if learn_from == ALL or not len(arrays.ranks):
        return arrays
    n_pairs = 1 if learn_from == ONE_PAIR else len(arrays.ranks) - 1
    return drawn_pairs(arrays, n_pairs, key(Shuffle.PAIRS, seed, number))


def noisy(arrays: RankingArrays, share: float, draw_key: int) -> RankingArrays:
    """Returns the ranking with some reversed judgements, as a judge who errs would give it.

    Each judgement is reversed, and each two neighbouring ranks are swapped, with probability `share`, from the best
    rank down. The new ranks count from 0 without gaps; `arrays` is not changed.

    Args:
        share: in [0, 1); 0: the same object is returned.
        draw_key: of 64 bits; equal keys give equal draws.
    """
    if not share:
        return arrays

    levels = np.unique(arrays.ranks)
    n_swaps = max(len(levels) - 1, 0)
    n_judgements = len(arrays.judgements)
    # One draw for each judgement, or for each pair of neighbouring ranks.
    is_wrong = splitmix64(draw_key, max(len(levels) - 1, n_judgements)) < np.uint64(int(share * (2**64 - 1)))
    judgements = np.where(is_wrong[:n_judgements, None], arrays.judgements[:, ::-1], arrays.judgements)

    swapped = levels.copy()
    for index in np.flatnonzero(is_wrong[:n_swaps]):
        swapped[[index, index + 1]] = swapped[[index + 1, index]]
    ranks = arrays.ranks
    if len(levels):
        # swapped[i] is the level that is now the i-th best, so argsort gives the new rank of each level
        ranks = np.argsort(swapped)[np.searchsorted(levels, arrays.ranks)]
    return replace(arrays, ranks=ranks.astype(np.uint8), judgements=judgements)


def drawn_pairs(arrays: RankingArrays, count: int, draw_key: int) -> RankingArrays:
    """Returns the ranking with `count` (at most all) of the pairs with different ranks, as judgements with margin 0, in
    place of the ranks. `arrays` is not changed.

    Args:
        arrays: of a ranking with ranks.
        draw_key: of 64 bits; equal keys give equal draws.
    """
    ranks = arrays.ranks.tolist()
    # (better, worse) of each two completions that are no tie.
    pairs = [
        sorted(pair, key=ranks.__getitem__)
        for pair in combinations(range(len(ranks)), 2)
        if ranks[pair[0]] != ranks[pair[1]]
    ]
    # Sorted, so that only the choice depends on the draw and not the order.
    chosen = np.array(pairs, np.uint8)[np.sort(permutation(len(pairs), draw_key)[:count])]
    return replace(arrays, ranks=np.zeros(0, np.uint8), judgements=chosen, margins=np.zeros(len(chosen), np.float32))


def assemble_rankings(
    rankings: RankingCorpus,
    rows: Sequence[Sequence[DocumentSlice]],
    numbers: Sequence[int],
    seq_len: int,
    pad_id: int,
    first_token: FirstToken | None = None,
) -> tuple[Batch, list[PlacedRanking]]:
    """Returns a `Batch` of `len(rows)` sequences for a reward model, which predicts no token, and its rankings.

    The batch is in host memory. The rankings have the indices of their completions' last tokens in B * T;
    `ranked_positions` adds ranks and judgements to these.

    Args:
        rows: whole documents of each sequence, at most `seq_len` tokens in all; the rest is filled with `pad_id`, in a
            document of its own.
        numbers: the global sequence numbers.
        first_token: of the tokenizer; None: documents begin with end-of-text.

    Raises:
        ArtefactError: a tar is damaged.
    """
    shape = (len(rows), seq_len)
    tokens = np.full(shape, pad_id, np.int64)
    document, branch, position = (np.zeros(shape, np.int64) for _ in range(3))
    placed: list[PlacedRanking] = []
    n_tokens = 0

    for b, row in enumerate(rows):
        begin = 0
        for d, (number, _, _) in enumerate(row):
            ranking_branch = rankings.arrays(number).branch
            end = begin + len(ranking_branch)
            tokens[b, begin:end] = rankings.tokens(number)
            if first_token:
                first_token.put(tokens[b, begin:end])

            document[b, begin:end] = d
            branch[b, begin:end] = ranking_branch
            position[b, begin:end] = branch_positions(ranking_branch)
            placed.append(PlacedRanking(number, b * seq_len + begin + branch_ends(ranking_branch)))
            begin = end

        # Padding is a document of its own, so no ranking attends to it.
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


def ranked_positions(placed: Sequence[PlacedRanking], lessons: Sequence[RankingArrays]) -> RankedPositions:
    """Returns ranks and judgements of a batch as tensors: (P, K) for the rankings with ranks, (N,) for all judgements.

    Indices are those of `PlacedRanking.places`, int64; margins are float32. Rankings with judgements are not among the
    P. P or N may be 0; K is 2 if P is 0. Completions that a smaller ranking lacks have index and rank 0, and
    `exists_PK` False.

    Args:
        lessons: one for each ranking of `placed`.
    """
    ranked = [
        (ranking.places, arrays.ranks)
        for ranking, arrays in zip(placed, lessons, strict=True)
        if len(arrays.ranks)  # the others have judgements
    ]
    shape = (len(ranked), max((len(ranks) for _, ranks in ranked), default=2))
    index, rank = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    exists = np.zeros(shape, bool)
    for p, (places, ranks) in enumerate(ranked):
        index[p, : len(ranks)] = places
        rank[p, : len(ranks)] = ranks
        exists[p, : len(ranks)] = True

    # The empty arrays are for a batch without a ranking, which leaves nothing to concatenate.
    pairs = [
        ranking.places[arrays.judgements.astype(np.int64)] for ranking, arrays in zip(placed, lessons, strict=True)
    ]
    pairs_N2 = np.concatenate([np.zeros((0, 2), np.int64), *pairs])
    margins = np.concatenate([np.zeros(0, np.float32), *(arrays.margins for arrays in lessons)])
    return RankedPositions(
        index_PK=torch.from_numpy(index),
        rank_PK=torch.from_numpy(rank),
        exists_PK=torch.from_numpy(exists),
        better_N=torch.from_numpy(pairs_N2[:, 0].copy()),
        worse_N=torch.from_numpy(pairs_N2[:, 1].copy()),
        margin_N=torch.from_numpy(margins),
    )
