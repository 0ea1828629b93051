"""A trained reward model from outside: scores of texts, and what makes them comparable.

Scores have no zero and no unit: only differences are learned. So stage reward measures their mean and standard
deviation on samples of the policy that it started from, and whoever uses them takes these off (Stiennon et al. 2020).

Dimensions: B sequences, T tokens.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from dist_lm.errors import ArtefactError
from dist_lm.model.transformer import Transformer
from dist_lm.storage.run_directory import RunDirectory

Scores = TypeVar("Scores", float, np.ndarray, torch.Tensor)
KEY = "normaliser"  # in result.json


@dataclass(frozen=True)
class Normaliser:
    """Mean and standard deviation of the scores of the reference policy's samples."""

    mean: float
    std: float

    def __call__(self, scores: Scores) -> Scores:
        """Scores with mean 0 and standard deviation 1 on those samples."""
        return (scores - self.mean) / self.std


def normaliser_of(scores: Sequence[float]) -> Normaliser:
    """What takes `scores` to mean 0 and standard deviation 1 (over all of them: no degree of freedom is taken off)."""
    values = np.asarray(scores, np.float64)
    return Normaliser(float(values.mean()), float(values.std()))


def read_normaliser(run: RunDirectory) -> Normaliser:
    """The normaliser of a finished run of stage reward.

    Raises:
        ArtefactError: the run is not finished, is of another stage, or its scores were all the same.
    """
    if not run.result.is_file():
        raise ArtefactError(f"{run.path} is not finished (no {run.result.name}): run stage=reward to its end")
    found = json.loads(run.result.read_text()).get(KEY)
    if found is None:
        raise ArtefactError(f"{run.result} has no {KEY}: expected a run of stage=reward")
    normaliser = Normaliser(float(found["mean"]), float(found["std"]))
    if not (math.isfinite(normaliser.mean) and math.isfinite(normaliser.std) and normaliser.std > 0):
        raise ArtefactError(
            f"{run.result}: {KEY} has mean={normaliser.mean} std={normaliser.std}: a reward model that gives every "
            "sample the same score teaches nothing; train it again (stage.lr, stage.steps) under another run_id"
        )
    return normaliser


@torch.no_grad()
def last_token_scores(model: Transformer, sequences: Sequence[Sequence[int]], batch: int = 16) -> np.ndarray:
    """The score of each sequence at its last real token, (len(sequences),) float32.

    Args:
        model: with a scalar head.
        sequences: tokens of a prompt with its completion; none is empty.
        batch: sequences taken through the model at a time; those of like length go together.
    """
    scores = np.zeros(len(sequences), np.float32)
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
    device = model.embedding.weight.device
    for begin in range(0, len(order), batch):
        chosen = order[begin : begin + batch]
        lengths = torch.tensor([len(sequences[number]) for number in chosen])
        tokens_BT = torch.zeros(len(chosen), int(lengths.max()), dtype=torch.int64)
        for b, number in enumerate(chosen):
            tokens_BT[b, : len(sequences[number])] = torch.tensor(sequences[number])
        # causal attention: what fills a row stands behind its last token and is not seen
        score_BT = model.scores(tokens_BT.to(device)).view(tokens_BT.shape).cpu()
        scores[chosen] = score_BT[torch.arange(len(chosen)), lengths - 1].numpy()
    return scores
