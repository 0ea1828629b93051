"""Learning rate as a function of the step."""

import math

from dist_lm.config.stage import StageConfig


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int, min_ratio: float) -> float:
    """Linear warm-up to `peak`, then a cosine to `min_ratio * peak` at the last step (Loshchilov & Hutter 2017, eq. 5).

    Args:
        step: 0-based optimizer step; step 0 already has a rate above zero.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - 1 - warmup_steps))
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def stage_rate(stage: StageConfig, step: int) -> float:
    """The learning rate of a 0-based step of a stage, which other corpora may lead at rates of their own."""
    rate = learning_rate(
        step, peak=stage.lr, warmup_steps=stage.warmup_steps, steps=stage.steps, min_ratio=stage.min_lr_ratio
    )
    behind = 0
    for lead in stage.lead:
        behind += lead.steps
        if step < behind:
            return rate * lead.lr_ratio
    return rate
