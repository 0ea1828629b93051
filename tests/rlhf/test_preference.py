"""The losses of stage preference have the values of their equations, worked out here without tensors."""

import math
from dataclasses import replace

import pytest
import torch

from dist_lm.config.preference import BETAS, PreferenceConfig
from dist_lm.data.batch import RankedPositions
from dist_lm.errors import ConfigError
from dist_lm.rlhf.preference import (
    Completions,
    GlobalValues,
    PreferenceLoss,
    dpo_losses,
    ipo_losses,
    kto_label_losses,
    kto_losses,
    log_odds,
    orpo_losses,
    plackett_luce_losses,
    simpo_losses,
    tokens_of_pairs,
)
from dist_lm.rlhf.preference_objective import reference_point

BETTER, WORSE = [1.5, -0.5], [0.25, 0.75]
NONE = torch.zeros(0, dtype=torch.int64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dpo() -> None:
    found = dpo_losses(torch.tensor(BETTER), torch.tensor(WORSE), 0.4)
    assert found.tolist() == pytest.approx([-math.log(sigmoid(0.5)), -math.log(sigmoid(-0.5))])


def test_ipo() -> None:
    found = ipo_losses(torch.tensor(BETTER), torch.tensor(WORSE), 0.5)
    assert found.tolist() == pytest.approx([(1.25 - 1) ** 2, (-1.25 - 1) ** 2])


def test_kto() -> None:
    found = kto_losses(torch.tensor(BETTER), torch.tensor(WORSE), torch.tensor(0.5), 0.4, 1.5, 0.75)
    first = 1.5 * (1 - sigmoid(0.4 * (1.5 - 0.5))) + 0.75 * (1 - sigmoid(0.4 * (0.5 - 0.25)))
    second = 1.5 * (1 - sigmoid(0.4 * (-0.5 - 0.5))) + 0.75 * (1 - sigmoid(0.4 * (0.5 - 0.75)))
    assert found.tolist() == pytest.approx([first / 2, second / 2])


def test_kto_of_labels_is_half_of_that_of_pairs_in_any_precision() -> None:
    """Finds weights of another dtype than the log-ratios: 0.7 in fp32 is off by 1e-8."""
    better, worse, point = (torch.tensor(values, dtype=torch.float64) for values in (BETTER, WORSE, 0.5))
    pairs = kto_losses(better, worse, point, 0.4, 1.3, 0.7)
    expected = 1.3 * (1 - (0.4 * (better - point)).sigmoid()) + 0.7 * (1 - (0.4 * (point - worse)).sigmoid())
    assert torch.allclose(pairs, expected / 2, rtol=0, atol=1e-15)

    wanted = torch.tensor([True, False])
    labels = kto_label_losses(torch.stack([better[0], worse[0]]), wanted, point, 0.4, 1.3, 0.7)
    assert labels.dtype == torch.float64
    assert torch.allclose(labels.sum() / 2, pairs[0], rtol=0, atol=1e-15)


def test_orpo() -> None:
    better, worse = 0.3, 0.2  # mean probabilities of a token
    found = orpo_losses(torch.tensor([better]).log(), torch.tensor([worse]).log(), 0.1)
    ratio = (better / (1 - better)) / (worse / (1 - worse))
    assert found.tolist() == pytest.approx([-0.1 * math.log(sigmoid(math.log(ratio)))])


@pytest.mark.parametrize("logprob", [0.0, -1e-9, -1e-4, -0.7, -50.0])
def test_odds_are_finite_however_sure_the_model_is(logprob: float) -> None:
    value = torch.tensor([logprob], requires_grad=True)
    odds = log_odds(value)
    odds.backward()
    assert value.grad is not None
    assert odds.isfinite().all()
    assert value.grad.isfinite().all()
    if logprob <= -1e-4:
        assert float(odds.detach()) == pytest.approx(logprob - math.log(-math.expm1(logprob)), rel=1e-5)


def test_simpo() -> None:
    found = simpo_losses(torch.tensor(BETTER), torch.tensor(WORSE), 2.0, 0.75)
    assert found.tolist() == pytest.approx([-math.log(sigmoid(2.5 - 0.75)), -math.log(sigmoid(-2.5 - 0.75))])


def test_plackett_luce_from_three_completions() -> None:
    ratio, rank, beta = [[0.5, 2.0, -1.0]], [[1, 0, 2]], 0.3
    found = plackett_luce_losses(torch.tensor(ratio), torch.tensor(rank), torch.ones(1, 3, dtype=torch.bool), beta)
    e = [math.exp(beta * value) for value in ratio[0]]
    assert found.tolist()[0] == pytest.approx([-math.log(e[0] / (e[0] + e[2])), -math.log(e[1] / sum(e)), 0])


def test_plackett_luce_of_two_completions_is_dpo() -> None:
    draw = torch.Generator().manual_seed(0)
    ratio_PK = torch.randn(20, 2, generator=draw)
    rank_PK = torch.stack([torch.randperm(2, generator=draw) for _ in range(20)])
    found = plackett_luce_losses(ratio_PK, rank_PK, torch.ones(20, 2, dtype=torch.bool), 0.7)
    better, worse = (ratio_PK.gather(1, (rank_PK == rank).long().argmax(1, True))[:, 0] for rank in (0, 1))
    torch.testing.assert_close(found.sum(1), dpo_losses(better, worse, 0.7), rtol=1e-6, atol=1e-6)


# --- two prompts, five completions ---

FOUND = Completions(
    logprob_C=torch.tensor([-3.0, -4.0, -2.0, -6.0, -5.0]),
    reference_C=torch.tensor([-4.0, -3.0, -2.5, -5.0, -5.5]),
    tokens_C=torch.tensor([2.0, 4.0, 1.0, 3.0, 2.0]),
    prompt_C=torch.tensor([0, 0, 1, 1, 1]),
    prompt_logprob_P=torch.tensor([-7.0, -1.0]),
    prompt_tokens_P=torch.tensor([3.0, 1.0]),
    ranked=RankedPositions(
        torch.zeros(0, 2, dtype=torch.int64),
        torch.zeros(0, 2, dtype=torch.int64),
        torch.zeros(0, 2, dtype=torch.bool),
        torch.tensor([0, 3]),
        torch.tensor([1, 2]),
        torch.zeros(2),
    ),
)
RATIO = [1.0, -1.0, 0.5, -1.0, 0.5]
PAIRS = [(0, 1), (3, 2)]


def loss_of(algorithm: str, found: Completions = FOUND, of_all: GlobalValues = GlobalValues(), **keys: float):  # noqa: B008
    return PreferenceLoss(PreferenceConfig(algorithm=algorithm, **keys))(found, of_all)


def test_dpo_ipo_and_simpo_take_sums_or_means_with_or_without_the_reference() -> None:
    tokens, logprob = FOUND.tokens_C.tolist(), FOUND.logprob_C.tolist()
    expected = [-math.log(sigmoid(0.1 * (RATIO[b] - RATIO[w]))) for b, w in PAIRS]
    assert float(loss_of("dpo").total) == pytest.approx(sum(expected))
    expected = [(RATIO[b] / tokens[b] - RATIO[w] / tokens[w] - 1 / (2 * 0.4)) ** 2 for b, w in PAIRS]
    assert float(loss_of("ipo", beta=0.4).total) == pytest.approx(sum(expected))
    alone = replace(FOUND, reference_C=torch.zeros(0))
    expected = [-math.log(sigmoid(2 * (logprob[b] / tokens[b] - logprob[w] / tokens[w]) - 1)) for b, w in PAIRS]
    assert float(loss_of("simpo", alone).total) == pytest.approx(sum(expected))
    assert float(loss_of("dpo").count) == 2


def test_kto_takes_the_reference_point_of_the_global_batch() -> None:
    expected = 0.0
    for better, worse in PAIRS:
        expected += (1 - sigmoid(0.1 * (RATIO[better] - 0.75))) / 2 + (1 - sigmoid(0.1 * (0.75 - RATIO[worse]))) / 2
    found = loss_of("kto", of_all=GlobalValues(reference_point=torch.tensor(0.75)))
    assert float(found.total) == pytest.approx(expected)
    assert float(found.metrics["kl"] / found.count) == pytest.approx(0.75)


def test_orpo_adds_the_mean_over_the_tokens_of_prompts_and_better_completions() -> None:
    assert float(tokens_of_pairs(FOUND)) == 3 + 2 + 1 + 3
    found = loss_of("orpo", replace(FOUND, reference_C=NONE), GlobalValues(tokens_per_pair=torch.tensor(9 / 2)))
    text = (7 + 3 + 1 + 6) / 9
    odds = [logprob / tokens for logprob, tokens in zip(FOUND.logprob_C.tolist(), FOUND.tokens_C.tolist(), strict=True)]
    log = [value - math.log(1 - math.exp(value)) for value in odds]
    ratio = [-0.1 * math.log(sigmoid(log[better] - log[worse])) for better, worse in PAIRS]
    assert float(found.total / found.count) == pytest.approx(text + sum(ratio) / 2)


def test_metrics_are_means_over_choices() -> None:
    found = loss_of("dpo")
    means = {name: float(value / found.count) for name, value in found.metrics.items()}
    assert means == pytest.approx(
        {
            "accuracy": 0.5,
            "margin": 0.1 * (2.0 - 1.5) / 2,
            "chosen_reward": 0.1 * (1.0 - 1.0) / 2,
            "rejected_reward": 0.1 * (-1.0 + 0.5) / 2,
            "chosen_logprob": (-3.0 - 6.0) / 2,
            "rejected_logprob": (-4.0 - 2.0) / 2,
        }
    )


def test_of_a_whole_ranking_the_rejected_one_is_the_mean_of_those_that_a_choice_leaves() -> None:
    ranked = RankedPositions(
        torch.tensor([[0, 1, 0], [2, 3, 4]]),
        torch.tensor([[1, 0, 0], [0, 1, 1]]),
        torch.tensor([[True, True, False], [True, True, True]]),
        NONE,
        NONE,
        torch.zeros(0),
    )
    found = loss_of("dpo", replace(FOUND, ranked=ranked))
    assert float(found.count) == 3
    # choices: 1 over 0; 2 over 3 and 4; of the tied ones 3 stands before 4
    assert float(found.metrics["chosen_reward"]) == pytest.approx(0.1 * (-1.0 + 0.5 - 1.0))
    assert float(found.metrics["rejected_reward"]) == pytest.approx(0.1 * (1.0 + (-1.0 + 0.5) / 2 + 0.5))
    assert float(found.metrics["accuracy"]) == 1  # an equal reward is not right; a tie has no wrong order


def test_dpo_from_a_whole_ranking_takes_log_ratios() -> None:
    ranked = RankedPositions(
        torch.tensor([[2, 3, 4]]), torch.tensor([[1, 2, 0]]), torch.ones(1, 3, dtype=torch.bool), NONE, NONE,
        torch.zeros(0),
    )  # fmt: skip
    found = loss_of("dpo", replace(FOUND, ranked=ranked), beta=0.8)
    e = {place: math.exp(0.8 * RATIO[place]) for place in (2, 3, 4)}
    expected = -math.log(e[4] / sum(e.values())) - math.log(e[2] / (e[2] + e[3]))
    assert float(found.total) == pytest.approx(expected)
    assert float(found.count) == 2


def test_the_reference_point_is_a_mean_and_at_least_0() -> None:
    assert float(reference_point(torch.tensor([6.0, 4.0]))) == 1.5
    assert float(reference_point(torch.tensor([-6.0, 4.0]))) == 0


def test_implicit_rewards() -> None:
    tokens = FOUND.tokens_C.tolist()
    assert PreferenceLoss(PreferenceConfig()).rewards(FOUND).tolist() == pytest.approx([0.1 * r for r in RATIO])
    ipo = PreferenceLoss(PreferenceConfig(algorithm="ipo")).rewards(FOUND).tolist()
    assert ipo == pytest.approx([0.1 * r / n for r, n in zip(RATIO, tokens, strict=True)])
    simpo = PreferenceLoss(PreferenceConfig(algorithm="simpo")).rewards(replace(FOUND, reference_C=NONE)).tolist()
    assert simpo == pytest.approx([2 * r / n for r, n in zip(FOUND.logprob_C.tolist(), tokens, strict=True)])


# --- settings ---


def test_defaults() -> None:
    assert PreferenceConfig().lesson == "rankings"
    assert {PreferenceConfig(algorithm=name).lesson for name in BETAS if name != "dpo"} == {"pairs"}
    assert PreferenceConfig(algorithm="simpo").strength == 2


@pytest.mark.parametrize(
    ("key", "value", "algorithm"),
    [
        ("algorithm", "ppo", "dpo"),
        ("learn_from", "rankings", "ipo"),
        ("learn_from", "all", "dpo"),
        ("beta", 0.0, "dpo"),
        ("gamma", 1.0, "dpo"),
        ("gamma", -1.0, "simpo"),
        ("desirable_weight", 1.0, "dpo"),
        ("undesirable_weight", -0.5, "kto"),
        ("label_noise", 0.5, "dpo"),
    ],
)
def test_what_an_algorithm_does_not_read_is_refused(key: str, value: object, algorithm: str) -> None:
    with pytest.raises(ConfigError, match=f"stage.preference.{key}={value}"):
        PreferenceConfig(**{"algorithm": algorithm, key: value})
