"""Rollouts made by hand."""

import numpy as np

from dist_lm.rlhf.rollouts import FINISHES, Rollouts


def rollouts_with(
    prompt_tokens: list[int],
    new_tokens: list[int],
    *,
    finishes: list[str] | None = None,
    positions: list[int] | None = None,
    vocabulary: int = 64,
    version: int = 0,
    seed: int = 0,
) -> Rollouts:
    """Random tokens of these lengths."""
    generator = np.random.default_rng(seed)
    n = len(prompt_tokens)
    return Rollouts(
        tokens_N=generator.integers(1, vocabulary, sum(prompt_tokens) + sum(new_tokens)),
        logprobs_M=-generator.random(sum(new_tokens), np.float32),
        prompt_tokens_B=np.array(prompt_tokens),
        new_tokens_B=np.array(new_tokens),
        finish_B=np.array([FINISHES.index(reason) for reason in finishes or ["eot"] * n]),  # type: ignore[arg-type]
        version_B=np.full(n, version),
        position_B=np.array(positions or range(n)),
        sample_B=np.zeros(n, np.int64),
    )
