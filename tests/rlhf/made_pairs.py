"""Batches of judged rankings and a reference, for tests of the losses of stage preference."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from dist_lm.config.preference import PreferenceConfig
from dist_lm.data.order import DocumentSlice
from dist_lm.data.rankings.completions import CompletionBatch, SplitReference, Trees
from dist_lm.data.rankings.shards import RankingCorpus
from dist_lm.data.rankings.stream import lesson, ranked_positions
from dist_lm.model.transformer import Transformer
from dist_lm.rlhf.preference_objective import segment_logprobs

WIDTH = 64


def batch_of(
    rankings: RankingCorpus,
    numbers: Sequence[int],
    settings: PreferenceConfig,
    reference: SplitReference | None = None,
    width: int = WIDTH,
) -> CompletionBatch:
    """The rankings in a row each."""
    trees = Trees(reference, settings.learns_text, settings.has_reference_point)
    rows = [[DocumentSlice(number, 0, 0)] for number in numbers]
    batch, placed = trees(rankings, rows, numbers, width, 0)
    lessons = [lesson(rankings.arrays(number), settings.lesson, 0.0, 0, number) for number in numbers]
    return replace(batch, ranked=ranked_positions(placed, lessons))


@torch.no_grad()
def reference_under(model: Transformer, rankings: RankingCorpus) -> SplitReference:
    """Log-probabilities of all completions, one pass each."""
    everything = range(rankings.corpus.n_documents)
    logprobs, others = [], []
    for number in everything:
        batch = batch_of(rankings, [number], PreferenceConfig(algorithm="kto"))
        logprobs.append(segment_logprobs(model, batch)[: len(batch.prompt_C)].numpy())
        assert batch.mismatched is not None
        others.append(float(segment_logprobs(model, batch.mismatched).sum()))
    return SplitReference(np.concatenate(logprobs), np.array(others, np.float32))
