"""From logits to tokens: the distribution asked for, exactly, and a row that depends on nothing but itself.

Dimensions: B rows, V vocabulary.
"""

import math

import numpy as np
import pytest
import torch

from dist_lm.errors import ConfigError
from dist_lm.generation.request import SamplingParams
from dist_lm.generation.sampling import (
    Choice,
    adjusted,
    fp64_log_normaliser,
    group_rows,
    largest,
    log_normaliser,
    sample,
    uniform,
)
from dist_lm.model.token_sets import packed

CPU = torch.device("cpu")


def logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def draw(x: torch.Tensor, params: SamplingParams, u: torch.Tensor | None = None) -> Choice:
    rows = torch.arange(len(x))
    return sample(x, group_rows([params] * len(x), CPU), uniform(rows, rows) if u is None else u)


def plain_distribution(row: torch.Tensor, params: SamplingParams) -> dict[int, float]:
    """By the definitions, in Python."""
    scaled = row.double() / params.temperature
    order = row.sort(descending=True, stable=True).indices.tolist()
    if params.top_k:
        last = row[order[min(params.top_k, len(order)) - 1]]
        order = [i for i in order if row[i] >= last]
    weight = (scaled - scaled.max()).exp().tolist()
    p = {i: weight[i] for i in order}
    total, before, kept = sum(p.values()), 0.0, {}
    for i in order:
        if not kept or (before / total < params.top_p and p[i] >= params.min_p * p[order[0]]):
            kept[i] = p[i]
        before += p[i]
    whole = sum(kept.values())
    return {i: value / whole for i, value in sorted(kept.items())}


PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(top_k=5),
    SamplingParams(top_k=50, top_p=0.95),
    SamplingParams(top_p=0.8, temperature=1.3),
    SamplingParams(top_k=1000),
    SamplingParams(min_p=0.05),
    SamplingParams(top_k=40, top_p=0.9, min_p=0.02, temperature=0.7),
]


@pytest.mark.parametrize("vocab", [33, 2000, 8192])
@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_the_token_is_that_of_the_definition_with_its_probability(params, vocab):
    x = logits(2, vocab, seed=vocab)
    expected = [plain_distribution(row, params) for row in x]
    for u in (1e-6, 0.2, 0.5, 0.9, 1 - 1e-6):
        choice = draw(x, params, torch.full((2,), u, dtype=torch.float64))
        for p, token, logprob in zip(expected, choice.token_B.tolist(), choice.logprob_B.tolist(), strict=True):
            below = sum(value for i, value in p.items() if i < token)
            assert below - 1e-5 < u < below + p[token] + 1e-5
            assert logprob == pytest.approx(math.log(p[token]), abs=2e-5)


@pytest.mark.parametrize("vocab", [33, 2000, 8192])
def test_the_sets_are_those_of_the_definition_in_a_mixed_batch_too(vocab):
    params = [*PARAMS, SamplingParams(temperature=0), SamplingParams(top_p=0.999)]
    x = logits(len(params), vocab, seed=vocab)
    rows = torch.arange(len(x))
    groups, u = group_rows(params, CPU), uniform(rows, rows)
    choice = sample(x, groups, u, keep_sets=True)
    assert sample(x, groups, u).sets == []
    for row, one, token, found in zip(x, params, choice.token_B.tolist(), choice.sets, strict=True):
        if one.temperature == 0:
            expected = {token}
        elif one.top_k == 0 and one.top_p == 1 and one.min_p == 0:
            assert found == b""
            continue
        else:
            expected = plain_distribution(row, one).keys()
        assert found == packed(np.array(sorted(expected)), vocab)
        assert token in expected


@pytest.mark.parametrize("n_before", [3, 60, 1000, 3905, 7000])
def test_a_token_at_the_border_of_top_p_is_kept_by_its_exact_probability(n_before):
    """The border is 1e-10 away from a cumulative probability; fp32 sums err by 1e-6, each CPU in its own way."""
    vocab = 8192
    x = logits(1, vocab)
    p, order = x[0].double().softmax(-1).sort(descending=True, stable=True)
    border = float(p[:n_before].sum())
    for top_p, n_kept in ((border - 1e-10, n_before), (border + 1e-10, n_before + 1)):
        params = [SamplingParams(top_p=top_p)]
        choice = sample(x, group_rows(params, CPU), torch.full((1,), 0.5, dtype=torch.float64), keep_sets=True)
        assert choice.sets == [packed(order[:n_kept].sort().values.numpy(), vocab)]


@pytest.mark.parametrize(("rows", "vocab"), [(1, 33), (40, 8192), (5, 50_257)])
def test_rows_in_blocks_have_the_bits_of_all_rows_at_once(rows, vocab):
    x, temperature_B1 = logits(rows, vocab), torch.linspace(0.1, 2, rows, dtype=torch.float64)[:, None]
    assert torch.equal(fp64_log_normaliser(x, temperature_B1), log_normaliser(x / temperature_B1))


def test_the_log_probability_of_the_model_is_given_too():
    x = logits(8, 300)
    for params in (*PARAMS, SamplingParams(temperature=0)):
        choice = draw(x, params)
        expected = x.log_softmax(-1).gather(1, choice.token_B[:, None])[:, 0]
        assert torch.allclose(choice.raw_logprob_B, expected, atol=1e-6)


def test_temperature_zero_is_argmax_exactly():
    x = logits(64, 5000)
    x[0, 5] = x[0, 9] = 50.0
    x[1] = -torch.inf
    x[1, 3] = 0.0
    choice = draw(x, SamplingParams(temperature=0, top_k=2, top_p=0.1))
    assert torch.equal(choice.token_B, x.argmax(-1))
    assert torch.equal(choice.logprob_B, torch.zeros(64))


def test_a_temperature_close_to_zero_is_greedy():
    x = logits(8, 3000)
    for params in (SamplingParams(temperature=1e-300), SamplingParams(temperature=1e-40, top_k=5, top_p=0.9)):
        assert torch.equal(draw(x, params).token_B, x.argmax(-1))


@pytest.mark.heavy
def test_frequencies_follow_the_softmax():
    """Chi-squared over 40,000 draws, one seed each; 5 standard deviations allowed."""
    n, row = 40_000, torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0, 0.5])
    for params in (SamplingParams(), SamplingParams(temperature=2.0, top_k=3), SamplingParams(top_p=0.8)):
        p = plain_distribution(row, params)
        seeds = torch.arange(n)
        choice = sample(row.expand(n, -1), group_rows([params] * n, CPU), uniform(seeds, torch.full_like(seeds, 9)))
        counts = torch.bincount(choice.token_B, minlength=6)
        assert counts.sum() == sum(int(counts[i]) for i in p)
        statistic = sum((int(counts[i]) - n * value) ** 2 / (n * value) for i, value in p.items())
        assert statistic < len(p) - 1 + 5 * math.sqrt(2 * (len(p) - 1))


def test_a_row_gets_the_same_bits_whatever_it_is_batched_with():
    x = logits(len(PARAMS) * 3, 8192)
    u = uniform(torch.arange(len(x)) * 11 - 4, torch.arange(len(x)) + 100)
    params = [*PARAMS, SamplingParams(temperature=0), *PARAMS, *PARAMS][: len(x)]
    together = sample(x, group_rows(params, CPU), u)
    for b, own in enumerate(params):
        alone = sample(x[b : b + 1], group_rows([own], CPU), u[b : b + 1])
        assert alone.token_B == together.token_B[b]
        assert torch.equal(alone.logprob_B[0], together.logprob_B[b])
        assert torch.equal(alone.raw_logprob_B[0], together.raw_logprob_B[b])


def test_ties_with_the_last_of_the_top_k_stay():
    x = torch.zeros(1, 4096)
    x[0, 7] = 1.0
    found = {int(draw(x, SamplingParams(top_k=2), torch.tensor([u]).double()).token_B) for u in (0.0001, 0.5, 0.9999)}
    assert len(found) == 3  # all but the first tie: none of them is preferred


@pytest.mark.parametrize(
    ("vocab", "k"), [(v, k) for v in (10, 1024, 5000, 32_000, 50_257) for k in (1, 8, 64, 256) if k <= v]
)
def test_the_largest_are_found(vocab, k):
    x = logits(5, vocab).round(decimals=1)  # with ties
    value, place = largest(x, k)
    assert torch.equal(value, x.sort(dim=-1, descending=True).values[:, :k])
    assert torch.equal(x.gather(1, place), value)
    same = value[:, 1:] == value[:, :-1]
    assert (place[:, 1:] > place[:, :-1])[same].all()


def test_a_forbidden_token_is_never_drawn_and_a_biased_one_more_often():
    x = adjusted(torch.zeros(1, 8), [SamplingParams(logit_bias={3: -math.inf, 5: 2.0})], seen=[()], n_prompt=[0])
    assert x is not None
    assert x[0].tolist() == [0, 0, 0, -math.inf, 0, 2, 0, 0]
    assert all(int(draw(x, SamplingParams(), torch.tensor([u]).double()).token_B) != 3 for u in (0.1, 0.249, 0.3, 0.4))


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    x = torch.tensor([[2.0, -2.0, 2.0, -2.0]] * 2)
    changed = adjusted(x, [SamplingParams(), SamplingParams(repetition_penalty=2.0)], [[3], [0, 1, 0]], [1, 1])
    assert changed is not None
    assert changed.tolist() == [[2, -2, 2, -2], [1, -4, 2, -2]]
    assert adjusted(x, [SamplingParams()] * 2, seen=[[3], [0]], n_prompt=[1, 1]) is None


@pytest.mark.parametrize("bias", [{}, {2: 1.5, 4: -math.inf, 6: 0.25}])
def test_presence_and_frequency_penalties_count_tokens_of_the_answer(bias):
    """Finds tokens of the prompt that are counted, a repeated token that is counted once, and a bias that replaces a
    penalty of the same token."""
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=-0.75, repetition_penalty=1.25, logit_bias=bias)
    prompt, answer = [1, 2, 2, 3], [2, 4, 4, 5, 4, 2]
    logits = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    changed = adjusted(logits, [SamplingParams(), params], [prompt, prompt + answer], [4, 4])
    assert changed is not None
    assert torch.equal(changed[0], logits[0])

    for token in range(8):
        expected = float(logits[1, token])
        if token in prompt + answer:
            expected = expected / 1.25 if expected > 0 else expected * 1.25
        count = answer.count(token)
        expected -= 0.5 * (count > 0) + -0.75 * count
        expected += bias.get(token, 0.0)
        assert float(changed[1, token]) == pytest.approx(expected, abs=1e-6)


def test_uniform_numbers_are_uniform_and_depend_on_seed_and_position():
    n = 100_000
    seeds = torch.arange(n)
    for numbers in (uniform(seeds, torch.zeros_like(seeds)), uniform(torch.zeros_like(seeds), seeds)):
        assert numbers.min() > 0
        assert numbers.max() < 1
        counts = torch.histc(numbers.float(), 100, 0, 1)
        assert float(((counts - n / 100) ** 2 / (n / 100)).sum()) < 99 + 5 * math.sqrt(2 * 99)
        assert abs(float(torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1])) < 5 / math.sqrt(n)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"min_p": 2}, "min_p=2"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"presence_penalty": math.inf}, "presence_penalty=inf"),
        ({"frequency_penalty": math.nan}, "frequency_penalty=nan"),
        ({"stop": ("",)}, "stop="),
        ({"logit_bias": {3: math.inf}}, r"logit_bias\[3\]=inf"),
    ],
)
def test_refuses_values_out_of_range(values, named):
    with pytest.raises(ConfigError, match=named):
        SamplingParams(**values)
