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

from dist_lm.model.counter_hash import hash_grid, hash_words, signed

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


@dataclass(frozen=True)
class SiteDropout:
    """Dropout at one site. What changes from step to step and from layer to layer is in tensors, so that one compiled
    block serves all of them."""

    rate: float
    state: torch.Tensor  # int64 scalar; the hash of (seed, step, site)
    channel_D: torch.Tensor  # int64; hashes of the channels
    sequence_B: torch.Tensor
    first_token: int


def dropout_sites(
    key: DropoutKey | None, n_layers: int, d_model: int, first_token: int = 0
) -> list[SiteDropout | None]:
    """Every site of a model by its number; None where nothing is dropped.

    Args:
        first_token: index, in its sequence, of the first token that dropout is applied to.
    """
    count = residual_site(n_layers, 0)
    if key is None or key.rate == 0:
        return [None] * count
    device = key.sequence_B.device
    state_S = torch.tensor([signed(hash_words(key.seed, key.step, site)) for site in range(count)], device=device)
    channel_D = hash_words(key.seed, torch.arange(d_model, device=device))
    return [SiteDropout(key.rate, state, channel_D, key.sequence_B, first_token) for state in state_S]


def apply_dropout(x_BTD: torch.Tensor, site: SiteDropout | None) -> torch.Tensor:
    """Dropped elements are 0, the others scaled by `1 / (1 - rate)`; without a site, `x` itself."""
    if site is None:
        return x_BTD
    token_T = torch.arange(site.first_token, site.first_token + x_BTD.shape[1], device=x_BTD.device)
    return x_BTD * keep_mask(site, token_T) * (1 / (1 - site.rate))


def keep_mask(site: SiteDropout, token_T: torch.Tensor) -> torch.Tensor:
    """Which elements are kept.

    Args:
        token_T: int64; indices of tokens in their sequence.

    Returns:
        bool (B, T, D), True with probability `1 - rate` (to 2^-32).
    """
    row_BT = hash_words(site.sequence_B[:, None], token_T[None, :], state=site.state)
    threshold = round(site.rate * (1 << 32)) - (1 << 31)
    return hash_grid(row_BT, site.channel_D) >= threshold
