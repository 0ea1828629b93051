"""Rankings to tensors: as many whole ones to a sequence as fit.

Dimensions: B sequences, T tokens, P rankings, K completions of the largest, N judgements.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dist_lm.chat.ranking_tokens import branch_ends, branch_positions
from dist_lm.data.batch import Batch, RankedPlaces
from dist_lm.data.rankings.mapped import MappedRankings
from dist_lm.document import Verdict


@dataclass(frozen=True, slots=True)
class PlacedRanking:
    """A ranking in a batch."""

    document: int  # number in its corpus
    places: np.ndarray  # (K,) int64: of the completions' last tokens, in the flattened batch


def assemble_rankings(
    rankings: MappedRankings, rows: Sequence[Sequence[int]], numbers: Sequence[int], seq_len: int, pad_id: int
) -> tuple[Batch, list[PlacedRanking]]:
    """One `Batch` of `len(rows)` sequences, and what lies where in it; who judges how is left open.

    Args:
        rows: the documents of each sequence, at most `seq_len` tokens in all; the rest is filled with `pad_id`, in a
            document of its own.
        numbers: the global sequence numbers.
    """
    shape = (len(rows), seq_len)
    tokens = np.full(shape, pad_id, np.int64)
    document = np.zeros(shape, np.int64)
    branch = np.zeros(shape, np.int64)
    position = np.zeros(shape, np.int64)
    placed = []
    for b, row in enumerate(rows):
        begin = 0
        for d, number in enumerate(row):
            own = rankings.verdict(number).branch
            end = begin + len(own)
            tokens[b, begin:end] = rankings.tokens(number)
            document[b, begin:end] = d
            branch[b, begin:end] = own
            position[b, begin:end] = branch_positions(own)
            placed.append(PlacedRanking(number, b * seq_len + begin + branch_ends(own)))
            begin = end
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
    )
    return batch, placed


def ranked_places(placed: Sequence[PlacedRanking], verdicts: Sequence[Verdict]) -> RankedPlaces:
    """What is to be learned of rankings in a batch. `verdicts`: one a ranking."""
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
