"""Sampling filters and keyed randomness.

Dimensions: B rows, V vocabulary.
"""

import math

import pytest
import torch

from dist_lm.errors import ConfigError
from dist_lm.generation.sampling import SamplingParams, choose, gumbel_noise, keep_top_k, keep_top_p


def logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def kept(filtered: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in filtered]


def draw(x: torch.Tensor, params: SamplingParams, seed: int = 7, position: int = 0) -> torch.Tensor:
    rows = torch.arange(len(x))
    return choose(x, params, seed + rows, torch.full_like(rows, position))[0]


def test_top_k_keeps_the_k_largest() -> None:
    x = logits(50, 33)
    for k in (1, 2, 32, 33, 99):
        expected = [sorted(row.topk(min(k, 33)).indices.tolist()) for row in x]
        assert kept(keep_top_k(x, k)) == expected
    assert torch.equal(keep_top_k(x, 0), x)


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    x = logits(50, 33)
    probabilities = x.softmax(-1)
    for p in (1e-9, 0.1, 0.5, 0.9, 0.999):
        for row, indices in zip(probabilities, kept(keep_top_p(x, p)), strict=True):
            total = float(row[indices].sum())
            assert total >= p - 1e-6
            assert len(indices) == 1 or total - float(row[indices].min()) < p + 1e-6
            assert float(row[indices].min()) >= float(row.sort(descending=True).values[len(indices) - 1])
    assert torch.equal(keep_top_p(x, 1.0), x)


def test_top_p_by_hand() -> None:
    x = torch.tensor([[0.2, 0.5, 0.3], [0.98, 0.01, 0.01]]).log()
    assert kept(keep_top_p(x, 0.5)) == [[1], [0]]
    assert kept(keep_top_p(x, 0.7)) == [[1, 2], [0]]
    assert kept(keep_top_p(x, 0.985)) == [[0, 1, 2], [0, 1]]


def test_temperature_zero_is_argmax_exactly() -> None:
    x = logits(64, 100)
    x[0, 5] = x[0, 9] = 50.0
    x[1] = -torch.inf
    x[1, 3] = 0.0
    greedy = SamplingParams(temperature=0, top_k=2, top_p=0.1)
    assert torch.equal(draw(x, greedy), x.argmax(-1))


def test_frequencies_follow_the_softmax() -> None:
    """Chi-squared over 40,000 draws, one seed each; 5 standard deviations allowed."""
    n = 40_000
    row = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0, 0.5])
    for params, filtered in (
        (SamplingParams(), row),
        (SamplingParams(temperature=0.5), row / 0.5),
        (SamplingParams(temperature=2.0, top_k=3), keep_top_k(row[None] / 2, 3)[0]),
        (SamplingParams(top_p=0.8), keep_top_p(row[None], 0.8)[0]),
    ):
        expected = n * filtered.softmax(-1)
        counts = torch.bincount(draw(row.expand(n, -1), params), minlength=6)
        possible = expected > 0
        assert counts[~possible].sum() == 0
        statistic = float(((counts - expected) ** 2 / expected)[possible].sum())
        freedom = int(possible.sum()) - 1
        assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_a_row_does_not_depend_on_the_batch() -> None:
    x, params = logits(8, 500), SamplingParams(top_k=40, top_p=0.9)
    seeds, positions = torch.arange(8) * 11 - 4, torch.arange(8) + 100
    tokens, logprobs = choose(x, params, seeds, positions)
    for b in (5, 0):
        alone, logprob = choose(x[b : b + 1], params, seeds[b : b + 1], positions[b : b + 1])
        assert alone == tokens[b]
        assert torch.allclose(logprob, logprobs[b])


def test_noise_is_gumbel_and_independent() -> None:
    seeds = torch.arange(300)
    noise = gumbel_noise(seeds, torch.zeros_like(seeds), 400)
    n = noise.numel()
    # mean is Euler's constant, variance pi^2 / 6
    assert abs(float(noise.mean()) - 0.5772157) < 5 * math.sqrt(math.pi**2 / 6 / n)
    assert abs(float(noise.var()) / (math.pi**2 / 6) - 1) < 0.03
    bound = 5 / math.sqrt(n)
    for other in (
        gumbel_noise(seeds, torch.ones_like(seeds), 400),
        gumbel_noise(seeds + 1, torch.zeros_like(seeds), 400),
        noise.roll(1, dims=1),
    ):
        assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1])) < bound


def test_log_probability_is_that_of_the_tempered_logits() -> None:
    x = logits(8, 20)
    for temperature, divisor in ((0.5, 0.5), (1.0, 1.0), (0, 1.0)):
        params = SamplingParams(temperature=temperature, top_k=5)
        rows = torch.arange(8)
        tokens, logprobs = choose(x, params, rows, rows)
        assert torch.allclose(logprobs, (x / divisor).log_softmax(-1)[rows, tokens])


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0}, "top_p=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_refuses_values_out_of_range(values: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        SamplingParams(**values)
