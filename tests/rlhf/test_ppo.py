"""What PPO makes of rewards and of each token's quantities."""

from dataclasses import replace

import pytest
import torch

from dist_lm.rlhf.algorithm import DrawnTokens, Experience
from dist_lm.rlhf.algorithms.ppo import Ppo
from dist_lm.rlhf.config import RlhfConfig
from dist_lm.rlhf.policy_gradient import ESTIMATES, explained_variance, mean_and_std

PLAIN = RlhfConfig(whiten_advantages=False, lam=1.0)
MASK = (torch.arange(5) < torch.tensor([5, 2, 3])[:, None]).float()


def experience(**changes) -> Experience:
    generator = torch.Generator().manual_seed(0)

    def drawn() -> torch.Tensor:
        return torch.randn(3, 5, generator=generator) * MASK

    values = {
        "mask_BT": MASK,
        "score_B": torch.tensor([1.0, -2.0, 0.5]),
        "prompt_B": torch.arange(3),
        "logprob_BT": drawn(),
        "reference_logprob_BT": drawn(),
        "value_BT": drawn(),
        "importance_BT": None,
    }
    return Experience(**(values | changes))


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_the_return_is_the_score_less_the_kl_of_all_tokens_to_come(name):
    own = experience()
    assert own.reference_logprob_BT is not None
    kl = ESTIMATES[name](own.logprob_BT, own.reference_logprob_BT) * MASK
    columns = Ppo(replace(PLAIN, kl_estimate=name)).prepare(own, kl_coefficient=0.3).tokens
    to_come = kl.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(columns["return"], (own.score_B[:, None] - 0.3 * to_come) * MASK)
    torch.testing.assert_close(columns["advantage"], columns["return"] - columns["old_value"])
    without = Ppo(PLAIN).prepare(experience(reference_logprob_BT=None), 0.0).tokens["return"]
    torch.testing.assert_close(without, own.score_B[:, None] * MASK)


def test_advantages_are_whitened_over_all_tokens_and_no_padding():
    found = Ppo(replace(PLAIN, whiten_advantages=True)).prepare(experience(), 0.3).tokens["advantage"]
    kept = found[MASK > 0]
    assert float(kept.mean()) == pytest.approx(0, abs=1e-6)
    assert float(kept.std(unbiased=False)) == pytest.approx(1, abs=1e-5)
    assert found[MASK == 0].eq(0).all()
    plain = Ppo(PLAIN).prepare(experience(), 0.3).tokens["advantage"][MASK > 0]  # one mean and one spread for all
    torch.testing.assert_close(kept, (plain - plain.mean()) / plain.std(unbiased=False), rtol=1e-4, atol=1e-5)


def test_a_value_is_held_by_the_clip_of_the_configuration():
    columns = {"old_value": torch.zeros(1), "return": torch.ones(1)}
    for clip in (0.2, 0.5):
        loss = Ppo(replace(PLAIN, value_clip=clip)).value_loss(torch.tensor([0.9]), columns)
        assert float(loss.total) == pytest.approx((1 - clip) ** 2 / 2)


def test_whitened_rewards_have_standard_deviation_1_and_keep_their_mean():
    whitened = Ppo(replace(PLAIN, whiten_rewards=True, gamma=0.0)).prepare(experience(), 0.3).tokens["return"]
    plain = Ppo(replace(PLAIN, gamma=0.0)).prepare(experience(), 0.3).tokens["return"]
    mean, std = mean_and_std(whitened, MASK)
    assert float(std) == pytest.approx(1, abs=1e-5)
    assert float(mean) == pytest.approx(float(mean_and_std(plain, MASK)[0]), abs=1e-5)


def test_importance_weighs_tokens():
    weight = torch.rand(3, 5, generator=torch.Generator().manual_seed(1))
    logprob = torch.zeros(4, requires_grad=True)
    algorithm = Ppo(PLAIN)
    columns = algorithm.prepare(experience(importance_BT=weight), 0.0).tokens
    own = {name: column[0, :4] for name, column in columns.items()} | {"old_logprob": torch.zeros(4)}
    algorithm.policy_loss(DrawnTokens(logprob, torch.zeros(4), torch.zeros(4).long(), own)).total.backward()
    torch.testing.assert_close(logprob.grad, -(own["advantage"] * weight[0, :4]))


def test_entropy_is_a_bonus_only_where_it_is_asked_for():
    columns = {"old_logprob": torch.zeros(4), "advantage": torch.ones(4)}
    for coefficient in (0.0, 0.01):
        entropy = torch.ones(4, requires_grad=True)
        algorithm = Ppo(replace(PLAIN, entropy_coefficient=coefficient))
        drawn = DrawnTokens(torch.zeros(4, requires_grad=True), entropy, torch.zeros(4).long(), columns)
        algorithm.policy_loss(drawn).total.backward()
        assert algorithm.uses_entropy == bool(coefficient)
        assert entropy.grad is None if not coefficient else entropy.grad.tolist() == pytest.approx([-0.01] * 4)


def test_losses_count_tokens():
    columns = {"old_logprob": torch.zeros(4), "advantage": torch.ones(4), "return": torch.ones(4)}
    columns["old_value"] = torch.zeros(4)
    drawn = DrawnTokens(torch.zeros(4), torch.zeros(4), torch.zeros(4).long(), columns)
    policy, value = Ppo(PLAIN).policy_loss(drawn), Ppo(PLAIN).value_loss(torch.zeros(4), columns)
    assert float(policy.count) == float(value.count) == 4
    assert (float(policy.total), float(value.total)) == (-4, 2)
    assert {name: float(x) for name, x in policy.metrics.items()} == {
        "policy_loss": -4, "ratio_mean": 4, "clip_frac": 0, "approx_kl": 0,
    }  # fmt: skip


def test_explained_variance_is_1_for_a_critic_that_knows_and_0_for_one_that_says_nothing():
    returns = torch.randn(3, 5) * MASK
    assert explained_variance(returns, returns, MASK) == pytest.approx(1)
    assert explained_variance(torch.zeros(3, 5), returns, MASK) == pytest.approx(0, abs=1e-6)
    assert explained_variance(torch.zeros(3, 5), torch.zeros(3, 5), MASK) == 0


def test_defaults_are_those_that_were_found_to_work():
    config = RlhfConfig()
    assert (config.gamma, config.lam, config.clip, config.value_clip) == (1.0, 0.95, 0.2, 0.2)
    assert (config.adam_eps, config.kl_estimate, config.value_head) == (1e-5, "k1", "zero")
    assert (config.whiten_advantages, config.normalise_reward) == (True, True)
    assert config.missing_eos_penalty > 0
