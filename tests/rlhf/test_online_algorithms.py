"""Each on-line algorithm against its paper's equations, written as loops over completions and tokens."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dist_lm.rlhf.algorithm import DrawnTokens, Experience
from dist_lm.rlhf.algorithms.dapo import overlong_penalty
from dist_lm.rlhf.algorithms.registry import ALGORITHMS
from dist_lm.rlhf.config import RlhfConfig

NEAR = 1e-6
LENGTHS = (5, 2, 3, 1, 4, 4, 6, 3)
PROMPTS = (0, 0, 0, 1, 1, 1, 1, 2)  # groups of 3, 4 and 1
LONGEST = 7  # rlhf.max_new_tokens
BETA = 0.3

Tokens = list[torch.Tensor]  # a value at each token of each completion


def drawn_values(seed: int, spread: float = 1.0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return [spread * torch.randn(n, generator=generator, dtype=torch.float64) for n in LENGTHS]


OLD = [-one.abs() - 0.1 for one in drawn_values(0)]
REFERENCE = [old + move for old, move in zip(OLD, drawn_values(1, 0.3), strict=True)]
MOVED = [old + move for old, move in zip(OLD, drawn_values(2, 0.25), strict=True)]  # by more than most clips
WEIGHT = [one.abs() for one in drawn_values(3)]
SCORE = (1.0, -2.0, 0.5, 3.0, 3.5, -1.0, 0.25, 2.0)


def others(i: int) -> list[int]:
    return [j for j in range(len(PROMPTS)) if PROMPTS[j] == PROMPTS[i] and j != i]


def relative(score: list[float], i: int, scaled: bool) -> float:
    """The score less the mean of its group, divided by its standard deviation."""
    group = [score[j] for j in sorted([*others(i), i])]
    mean = sum(group) / len(group)
    if not scaled:
        return score[i] - mean
    std = math.sqrt(sum((one - mean) ** 2 for one in group) / max(1, len(group) - 1))
    return (score[i] - mean) / (std + 1e-4)


def surrogate(ratio: torch.Tensor, advantage: float, low: float, high: float) -> torch.Tensor:
    clipped = min(max(ratio, torch.tensor(1 - low)), torch.tensor(1 + high))
    return min(ratio * advantage, clipped * advantage)


def penalty(now: torch.Tensor, reference: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """The KL of a token whose gradient is unbiased."""
    return ratio * (torch.exp(reference - now) - (reference - now) - 1)


def group_relative(
    now: Tokens, config: RlhfConfig, *, scaled: bool, count: Callable[[int], float], mean: bool, level: str
) -> torch.Tensor:
    """GRPO and its kin: the sum over completions, divided by what they count."""
    score = list(SCORE)
    if config.algorithm == "dapo":
        buffer = config.overlong_tokens or 0
        score = [s + min(0, max(-1, (LONGEST - buffer - n) / buffer)) for s, n in zip(score, LENGTHS, strict=True)]
    low, high = config.clip or 0, config.clip_high or config.clip or 0
    total = torch.zeros((), dtype=torch.float64)
    for i, tokens in enumerate(now):
        log_ratio = tokens - OLD[i]
        for t in range(len(tokens)):
            ratio = (log_ratio.mean() if level == "sequence" else log_ratio[t]).exp()
            gain = WEIGHT[i][t] * surrogate(ratio, relative(score, i, scaled), low, high)
            term = gain - BETA * penalty(tokens[t], REFERENCE[i][t], ratio)
            total = total - term / (len(tokens) if mean else 1)
    return total / sum(count(i) for i in range(len(now)))


def rloo(now: Tokens, config: RlhfConfig) -> torch.Tensor:
    reward = [SCORE[i] - BETA * float((OLD[i] - REFERENCE[i]).sum()) for i in range(len(now))]
    total = torch.zeros((), dtype=torch.float64)
    for i, tokens in enumerate(now):
        baseline = sum(reward[j] for j in others(i)) / len(others(i)) if others(i) else reward[i]
        ratio = (tokens - OLD[i]).sum().exp()
        weight = WEIGHT[i].mean()
        total = total - weight * surrogate(ratio, reward[i] - baseline, config.clip or 0, config.clip or 0)
    return total / len(now)


def reinforce_pp(now: Tokens, config: RlhfConfig) -> torch.Tensor:
    returns = [
        [SCORE[i] - BETA * float((OLD[i] - REFERENCE[i])[t:].sum()) for t in range(len(tokens))]
        for i, tokens in enumerate(now)
    ]
    flat = [value for one in returns for value in one]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((value - mean) ** 2 for value in flat) / len(flat))
    total = torch.zeros((), dtype=torch.float64)
    for i, tokens in enumerate(now):
        for t in range(len(tokens)):
            ratio = (tokens[t] - OLD[i][t]).exp()
            advantage = (returns[i][t] - mean) / std
            total = total - WEIGHT[i][t] * surrogate(ratio, advantage, config.clip or 0, config.clip or 0)
    return total / len(flat)


def paper(now: Tokens, config: RlhfConfig) -> torch.Tensor:
    """The loss by the equations of the algorithm's paper."""
    name = config.algorithm
    if name == "rloo":
        return rloo(now, config)
    if name == "reinforce_pp":
        return reinforce_pp(now, config)
    counts = {"grpo": lambda i: 1, "gspo": lambda i: 1, "dr_grpo": lambda i: LONGEST, "dapo": lambda i: LENGTHS[i]}
    return group_relative(
        now,
        config,
        scaled=name != "dr_grpo",
        count=counts[name],
        mean=name in ("grpo", "gspo"),
        level="sequence" if name == "gspo" else "token",
    )


# --- the same by the algorithm ---


def padded(values: Tokens) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([one.float() for one in values], batch_first=True)


EXPERIENCE = Experience(
    mask_BT=padded([torch.ones(n) for n in LENGTHS]),
    score_B=torch.tensor(SCORE),
    prompt_B=torch.tensor(PROMPTS),
    logprob_BT=padded(OLD),
    reference_logprob_BT=padded(REFERENCE),
    value_BT=None,
    importance_BT=padded(WEIGHT),
)
ONLINE = [name for name in ALGORITHMS if name != "ppo"]
SETTINGS = {"dapo": {"overlong_tokens": 4}, "gspo": {"clip": 0.05, "clip_high": 0.08}}


def config_of(name: str) -> RlhfConfig:
    return RlhfConfig(algorithm=name, max_new_tokens=LONGEST, kl_coefficient=BETA, **SETTINGS.get(name, {}))


def loss_of(
    config: RlhfConfig,
    now: Tokens,
    experience: Experience = EXPERIENCE,
    parts: int = 1,
    kl_coefficient: float = BETA,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss, and the metrics a token, of completions cut into micro-batches."""
    algorithm = ALGORITHMS[config.algorithm](config)
    prepared = algorithm.prepare(experience, kl_coefficient)
    total, metrics, tokens = torch.zeros(()), {}, 0.0
    for part in torch.arange(len(now)).chunk(parts):
        rollout_N = torch.cat([torch.full((len(now[i]),), int(i)) for i in part])
        within_N = torch.cat([torch.arange(len(now[i])) for i in part])
        logprob_N = torch.cat([now[i] for i in part])
        columns = {name: column[rollout_N, within_N] for name, column in prepared.tokens.items()}
        drawn = DrawnTokens(logprob_N, torch.zeros_like(logprob_N), rollout_N, columns, prepared.kl_coefficient)
        loss = algorithm.policy_loss(drawn)
        total = total + loss.total
        tokens += float(loss.count)
        for name, value in loss.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + float(value)
    return total / prepared.divisor_B.sum(), {name: value / tokens for name, value in metrics.items()}


def with_gradient(loss: Callable[[Tokens], torch.Tensor], values: Tokens, dtype: torch.dtype) -> tuple[float, Tokens]:
    leaves = [one.to(dtype).clone().requires_grad_() for one in values]
    found = loss(leaves)
    found.backward()
    return float(found.detach()), [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


@pytest.mark.parametrize("moved", [False, True], ids=["first update", "later update"])
@pytest.mark.parametrize("name", ONLINE)
def test_loss_and_gradient_are_those_of_the_paper(name: str, moved: bool):
    config, now = config_of(name), MOVED if moved else OLD
    expected, gradients = with_gradient(lambda leaves: paper(leaves, config), now, torch.float64)
    found, own = with_gradient(lambda leaves: loss_of(config, leaves)[0], now, torch.float32)
    assert found == pytest.approx(expected, abs=NEAR)
    for one, other in zip(own, gradients, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=NEAR)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", ONLINE)
def test_micro_batches_change_neither_loss_nor_metrics_nor_gradient(name: str, parts: int):
    config = config_of(name)
    metrics = [loss_of(config, [one.float() for one in MOVED], parts=count)[1] for count in (1, parts)]
    whole, cut = (
        with_gradient(lambda leaves, count=count: loss_of(config, leaves, parts=count)[0], MOVED, torch.float32)
        for count in (1, parts)
    )
    assert cut[0] == pytest.approx(whole[0], abs=NEAR)
    assert metrics[1] == pytest.approx(metrics[0], abs=NEAR)
    for one, other in zip(cut[1], whole[1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=NEAR)


@pytest.mark.parametrize("name", ONLINE)
def test_a_clip_cuts_gradients_off_and_is_counted(name: str):
    assert 0 < loss_of(config_of(name), [one.float() for one in MOVED])[1]["clip_frac"] < 1
    at_start = loss_of(config_of(name), [one.float() for one in OLD])[1]
    assert (at_start["ratio_mean"], at_start["clip_frac"]) == pytest.approx((1, 0), abs=NEAR)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "gspo"])
def test_a_group_whose_scores_are_the_same_gives_no_gradient(name: str):
    config = replace(config_of(name), kl_coefficient=0.0)
    experience = replace(EXPERIENCE, score_B=torch.full((8,), 0.1), reference_logprob_BT=None)
    advantage_BT = ALGORITHMS[name](config).prepare(experience, 0.0).tokens["advantage"]
    assert advantage_BT.eq(0).all()


@pytest.mark.parametrize("name", ONLINE)
def test_columns_are_0_on_padding(name: str):
    prepared = ALGORITHMS[name](config_of(name)).prepare(EXPERIENCE, BETA)
    for key, column in prepared.tokens.items():
        assert column[EXPERIENCE.mask_BT == 0].eq(0).all(), key


@pytest.mark.parametrize("name", ONLINE)
def test_entropy_is_a_bonus_only_where_it_is_asked_for(name: str):
    for coefficient in (0.0, 0.5):
        algorithm = ALGORITHMS[name](replace(config_of(name), entropy_coefficient=coefficient))
        assert not algorithm.has_critic
        assert algorithm.uses_entropy == bool(coefficient)
        prepared = algorithm.prepare(EXPERIENCE, 0.0)
        columns = {key: column[0, :5] for key, column in prepared.tokens.items()}
        entropy = torch.ones(5, requires_grad=True)
        drawn = DrawnTokens(columns["old_logprob"], entropy, torch.zeros(5).long(), columns)
        loss = algorithm.policy_loss(drawn)
        if not coefficient:
            assert not loss.total.requires_grad
            continue
        loss.total.backward()
        assert entropy.grad is not None
        share = 1 / 5 if "token_weight" in prepared.tokens else 1
        assert entropy.grad.tolist() == pytest.approx([-0.5 * share] * 5)


def test_a_long_completion_loses_up_to_1():
    length = torch.tensor([1.0, 80.0, 90.0, 95.0, 100.0])
    assert overlong_penalty(length, 100, 20).tolist() == pytest.approx([0, 0, -0.5, -0.75, -1])
    assert overlong_penalty(length, 100, 0).eq(0).all()
    assert RlhfConfig(algorithm="dapo", max_new_tokens=100).overlong_tokens == 20
