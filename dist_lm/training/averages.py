"""The exponential average of the weights over the steps of a run (EMA), and the model with it.

The average is a state of the optimizer, so it has the shards and the padding of the parameters.
"""

from collections.abc import Callable, Mapping

import torch

from dist_lm.parallel.values import shard_of
from dist_lm.training.optimizer import EMA

MEASURED = {"val/loss": "val/ema_loss", "val/bits_per_byte": "val/ema_bits_per_byte"}
"""Maps a metric of the weights to the name that the averaged weights report it under; other metrics are dropped."""


@torch.no_grad()
def follow(optimizer: torch.optim.Optimizer, decay: float, step: int) -> None:
    """Adds the weights after step `step`, counted from 1, to the average.

    The average of t steps is `(1 - decay) / (1 - decay^t) sum_i decay^(t - i) weights_i`: the weights before the first
    step have no part in it (the correction of Adam, Kingma & Ba 2015, section 3).
    """
    # One fused kernel over all shards; a loop would launch one per parameter.
    averages = [shard_of(state[EMA]) for state in optimizer.state.values()]
    weights = [shard_of(parameter) for parameter in optimizer.state]
    torch._foreach_lerp_(averages, weights, (1 - decay) / (1 - decay**step))


@torch.no_grad()
def exchange(optimizer: torch.optim.Optimizer) -> None:
    """Exchanges the weights and their averages, one parameter at a time."""
    for parameter, state in optimizer.state.items():
        weights, average = shard_of(parameter), shard_of(state[EMA])
        # A copy of one parameter at a time is the only extra memory.
        previous_weights = weights.clone()
        weights.copy_(average)
        average.copy_(previous_weights)


def measured(optimizer: torch.optim.Optimizer, evaluate: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """Returns the held-out metrics of the averaged weights under the names in `MEASURED` (collective).

    Other metrics are dropped. Afterwards the model and the average have their previous bits, also if `evaluate` raises;
    its error passes.

    Args:
        evaluate: measures the model as it is, and leaves no parameter gathered.
    """
    exchange(optimizer)
    try:
        metrics = evaluate()
    finally:
        # The weights come back after an error too: a caller that goes on would train the average.
        exchange(optimizer)
    return {average: metrics[name] for name, average in MEASURED.items() if name in metrics}
