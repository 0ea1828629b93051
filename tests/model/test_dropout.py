"""Keyed dropout: a pure function of place, with the statistics of independent coins.

Dimensions: B sequences, T tokens, D channels.
"""

import math
from dataclasses import replace

import pytest
import torch

from dist_lm.model.keyed_random import (
    EMBEDDING_SITE,
    DropoutKey,
    SiteDropout,
    apply_dropout,
    dropout_sites,
    hash_grid,
    hash_words,
    keep_mask,
    residual_site,
)

KEY = DropoutKey(rate=0.1, seed=3, step=17, sequence_B=torch.tensor([40, 41, 7, 1 << 40]))
TOKENS = torch.arange(64)
CHANNELS = 256


def mask(key: DropoutKey = KEY, site: int = 2, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return keep_mask(at(key, site), tokens)


def at(key: DropoutKey, site: int, channels: int = CHANNELS) -> SiteDropout:
    found = dropout_sites(key, n_layers=3, d_model=channels)[site]
    assert found is not None
    return found


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten().float(), b.flatten().float()]))[0, 1])


def test_ints_and_tensors_hash_alike() -> None:
    for words in [(0,), (1, -1), (5, 1 << 62, 3), (-(1 << 63), (1 << 63) - 1)]:
        as_int = hash_words(*words)
        as_tensor = hash_words(*(torch.tensor(w) for w in words))
        mixed = hash_words(words[0], *(torch.tensor(w) for w in words[1:]), torch.tensor(0))
        assert as_int == int(as_tensor) % (1 << 64)
        assert int(mixed) == int(hash_words(torch.tensor(words[0]), *words[1:], torch.tensor(0)))


def test_words_hash_by_place() -> None:
    assert len({hash_words(*w) for w in [(0,), (0, 0), (1, 0), (0, 1), (1, 1), (1,), (2,)]}) == 7


def test_grid_bits_are_uniform() -> None:
    """Chi-squared of 256 buckets over each byte of a million hashes; 5 standard deviations allowed."""
    bits = hash_grid(hash_words(1, torch.arange(1000)), hash_words(0, torch.arange(1000))).flatten()
    for shift in (0, 8, 16, 24):
        counts = torch.bincount(bits.long() >> shift & 255, minlength=256).double()
        expected = bits.numel() / 256
        chi_squared = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi_squared - 255) < 5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5, 0.9])
def test_share_kept(rate: float) -> None:
    kept = mask(replace(KEY, rate=rate))
    deviation = math.sqrt(rate * (1 - rate) / kept.numel())
    assert abs(float(kept.float().mean()) - (1 - rate)) < 5 * deviation
    # and in every row and every channel
    for dims, n in (((0, 1), 4 * 64), ((2,), 256)):
        worst = float((kept.float().mean(dims) - (1 - rate)).abs().max())
        assert worst < 6 * math.sqrt(rate * (1 - rate) / n)


def test_any_slice_has_the_same_bits() -> None:
    whole = mask()
    rows, tokens, channels = torch.tensor([2, 0]), torch.tensor([63, 5, 6]), torch.tensor([200, 1, 99])
    site = at(replace(KEY, sequence_B=KEY.sequence_B[rows]), 2)
    part = keep_mask(replace(site, channel_D=site.channel_D[channels]), tokens)
    assert torch.equal(part, whole[rows][:, tokens][:, :, channels])


def test_depends_on_every_part_of_the_key_and_nothing_correlates() -> None:
    key = replace(KEY, rate=0.5)
    base = mask(key)
    others = {
        "seed": mask(replace(key, seed=4)),
        "step": mask(replace(key, step=18)),
        "layer": mask(key, site=4),
        "branch": mask(key, site=3),
        "sequence": mask(replace(key, sequence_B=key.sequence_B + 1)),
        "token": mask(key, tokens=TOKENS + 1),
        "channel": base.roll(1, dims=2),
        "row": base.roll(1, dims=0),
    }
    bound = 5 / math.sqrt(base.numel())
    for name, other in others.items():
        assert abs(correlation(base, other)) < bound, name
    # three-way: the parity of neighbours predicts nothing
    parity = base ^ base.roll(1, dims=2) ^ base.roll(1, dims=1) ^ base.roll((1, 1), dims=(1, 2))
    assert abs(float(parity.float().mean()) - 0.5) < bound


def test_sites_are_distinct() -> None:
    sites = [EMBEDDING_SITE, *(residual_site(layer, branch) for layer in range(5) for branch in (0, 1))]
    assert len(set(sites)) == len(sites)


def test_values_and_gradient_are_scaled() -> None:
    x = torch.randn(4, 8, 16, requires_grad=True)
    site = at(KEY, EMBEDDING_SITE, channels=16)
    y = apply_dropout(x, site)
    kept = keep_mask(site, torch.arange(8))
    assert torch.allclose(y, torch.where(kept, x / 0.9, 0))
    y.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, kept / 0.9)


def test_nothing_to_drop_returns_the_input() -> None:
    x = torch.randn(4, 8, 16)
    for key in (None, replace(KEY, rate=0.0)):
        assert all(apply_dropout(x, site) is x for site in dropout_sites(key, n_layers=3, d_model=16))


def test_a_part_of_the_tokens_draws_its_part_of_the_mask() -> None:
    x = torch.ones(4, 8, 16)
    whole = apply_dropout(x, at(KEY, 1, channels=16))
    half = apply_dropout(x[:, 4:], dropout_sites(KEY, n_layers=3, d_model=16, first_index=4)[1])
    assert torch.equal(half, whole[:, 4:])


def test_bits_do_not_drift() -> None:
    """A resumed run must draw what an older version drew: the first bits, written down."""
    kept = keep_mask(at(replace(KEY, rate=0.5, sequence_B=torch.tensor([0])), 1, channels=24), torch.arange(2))
    drawn = ["".join("01"[int(bit)] for bit in row) for row in kept[0]]
    assert drawn == ["100001011111011111001100", "011010010000010011110101"]
