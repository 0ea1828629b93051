"""Dropout as a pure function of where an element is, not of when it was drawn.

Whether an element is kept depends on (seed, step, sequence number, site, token index, channel) alone, so
any rank can compute any slice: the numbers do not depend on the layout, and a resumed run draws what it
would have drawn.

It is applied to the embeddings and to the two residual branches of each block. Dropout on attention
probabilities is left out on purpose: fused attention kernels draw it from a generator of their own, in an
order that depends on the layout, and models of this family are trained without it.

Dimensions: B sequences, T tokens, D channels.
"""

from dataclasses import dataclass

import torch

from dist_lm.model.counter_hash import hash_grid, hash_words

EMBEDDING_SITE = 0


def residual_site(layer: int, branch: int) -> int:
    """The site of a residual branch: branch 0 is attention, 1 the feed-forward network."""
    return 1 + 2 * layer + branch


@dataclass(frozen=True)
class DropoutKey:
    """What the randomness of one forward hangs on."""

    rate: float  # probability that an element is dropped, in [0, 1)
    seed: int
    step: int  # optimizer step
    sequence_B: torch.Tensor  # int64; global sequence numbers


def keep_mask(key: DropoutKey, site: int, token_T: torch.Tensor, channel_D: torch.Tensor | range) -> torch.Tensor:
    """Which elements are kept.

    Args:
        site: `EMBEDDING_SITE` or `residual_site(...)`.
        token_T: int64; indices of tokens in their sequence.
        channel_D: int64; indices of channels (any subset, in any order).

    Returns:
        bool (B, T, D), True with probability `1 - rate` (to 2^-32).
    """
    row_BT = hash_words(key.seed, key.step, site, key.sequence_B[:, None], token_T[None, :])
    if isinstance(channel_D, range):
        channel_D = torch.arange(channel_D.start, channel_D.stop, channel_D.step, device=row_BT.device)
    bits_BTD = hash_grid(row_BT, hash_words(key.seed, channel_D))
    threshold = round(key.rate * (1 << 32)) - (1 << 31)
    return bits_BTD >= threshold


def apply_dropout(x_BTD: torch.Tensor, key: DropoutKey | None, site: int) -> torch.Tensor:
    """Dropped elements are 0, the others scaled by `1 / (1 - rate)`; without key or rate, `x` itself."""
    if key is None or key.rate == 0:
        return x_BTD
    token_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
    keep_BTD = keep_mask(key, site, token_T, range(x_BTD.shape[2]))
    return x_BTD * keep_BTD * (1 / (1 - key.rate))
