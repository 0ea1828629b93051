"""Learning rate as a function of the step."""

import math


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int, min_ratio: float) -> float:
    """Linear warm-up to `peak`, then a cosine to `min_ratio * peak` at the last step (Loshchilov & Hutter 2017, eq. 5).

    Args:
        step: 0-based optimizer step; step 0 already has a rate above zero.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - 1 - warmup_steps))
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
