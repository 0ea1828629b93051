"""Rollouts and the scores of rules, from the rank that has them to all: plain tensors, nothing is pickled.

Dimensions: B rollouts, R rules.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist

from dist_lm.rlhf.rewards import Decode, Rule, judge
from dist_lm.rlhf.rollouts import Rollouts

_FIRST = 0  # the rank that has them


def share_judged(
    rollouts: Rollouts | None, rules: Mapping[str, Rule], decode: Decode | None
) -> tuple[Rollouts, dict[str, torch.Tensor]]:
    """The first rank's rollouts on every rank, and their scores under each rule, fp32 (B,) (collective).

    Args:
        rollouts, decode: None on all other ranks.
    """
    scores = None
    if rollouts is not None and decode is not None:
        judged = judge(rollouts, rules, decode)
        scores = np.array([judged[name] for name in rules], np.float64).reshape(len(rules), len(rollouts))
    rollouts, scores = share_rollouts(rollouts, scores, len(rules))
    return rollouts, dict(zip(rules, torch.from_numpy(scores).float(), strict=True))


def share_rollouts(rollouts: Rollouts | None, score_RB: np.ndarray | None, n_rules: int) -> tuple[Rollouts, np.ndarray]:
    """What the first rank gives, on every rank (collective): rollouts, and fp64 scores (R, B) of the rules.

    Args:
        rollouts, score_RB: None on all other ranks.
    """
    parts = list(rollouts.arrays().values()) if rollouts is not None else []
    sizes = torch.tensor([len(part) for part in parts] or [0] * len(Rollouts.__dataclass_fields__))
    dist.broadcast(sizes, _FIRST)
    names = list(Rollouts.__dataclass_fields__)
    size = dict(zip(names, sizes.tolist(), strict=True))
    whole_numbers = [name for name in names if name != "logprobs_M"]
    integers = torch.zeros(sum(size[name] for name in whole_numbers), dtype=torch.int64)
    reals = torch.zeros(size["logprobs_M"] + n_rules * size["sample_B"], dtype=torch.float64)
    if rollouts is not None and score_RB is not None:
        own = rollouts.arrays()
        integers.copy_(torch.from_numpy(np.concatenate([own[name] for name in whole_numbers])))
        reals.copy_(torch.from_numpy(np.concatenate([own["logprobs_M"].astype(np.float64), score_RB.reshape(-1)])))
    dist.broadcast(integers, _FIRST)
    dist.broadcast(reals, _FIRST)
    ends = np.cumsum([size[name] for name in whole_numbers])[:-1]
    arrays = dict(zip(whole_numbers, np.split(integers.numpy(), ends), strict=True))
    logprobs, scores = np.split(reals.numpy(), [size["logprobs_M"]])
    return Rollouts(**arrays, logprobs_M=logprobs.astype(np.float32)), scores.reshape(n_rules, size["sample_B"])
