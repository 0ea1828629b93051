"""The exponential average of the weights over the steps of a run (EMA), and the model with it.

The average is a state of the optimizer, so it has the shards and the padding of the parameters.
"""

from collections.abc import Callable, Mapping

import torch

from dist_lm.parallel.values import shard_of
from dist_lm.training.optimizer import EMA

MEASURED = {"val/loss": "val/ema_loss", "val/bits_per_byte": "val/ema_bits_per_byte"}
"""Metric of the weights -> the same of their average. No other figure is kept."""


@torch.no_grad()
def follow(optimizer: torch.optim.Optimizer, decay: float, step: int) -> None:
    """Take the weights after step `step`, from 1, into the average.

    The average of t steps is `(1 - decay) / (1 - decay^t) sum_i decay^(t - i) weights_i`: the weights before the first
    step have no part in it (the correction of Adam, Kingma & Ba 2015, section 3).
    """
    states = [(shard_of(state[EMA]), shard_of(parameter)) for parameter, state in optimizer.state.items()]
    averages, weights = map(list, zip(*states, strict=True))
    torch._foreach_lerp_(averages, weights, (1 - decay) / (1 - decay**step))


@torch.no_grad()
def exchange(optimizer: torch.optim.Optimizer) -> None:
    """Exchange the weights and their averages, one parameter at a time."""
    for parameter, state in optimizer.state.items():
        weights, average = shard_of(parameter), shard_of(state[EMA])
        own = weights.clone()
        weights.copy_(average)
        average.copy_(own)


def measured(optimizer: torch.optim.Optimizer, evaluate: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """Held-out metrics of the averaged weights; the model has its own bits again afterwards (collective).

    Args:
        evaluate: measures the model as it is, and keeps none of its parameters gathered.
    """
    exchange(optimizer)
    found = evaluate()
    exchange(optimizer)
    return {average: found[name] for name, average in MEASURED.items() if name in found}
