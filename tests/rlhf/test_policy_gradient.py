"""KL estimates, advantages and clipped losses: values, and where their gradients go."""

import math
from dataclasses import replace

import pytest
import torch

from dist_lm.rlhf.algorithm import DrawnTokens, Experience
from dist_lm.rlhf.policy_gradient import (
    ESTIMATES,
    clipped_policy_loss,
    clipped_value_loss,
    generalised_advantages,
    mean_and_std,
    penalised_policy_loss,
    reference_kl,
    token_columns,
    token_rewards,
    truncated_importance,
    whiten,
)

# --- estimates of the divergence, and the controller ---


def test_estimates_have_the_mean_they_claim_and_k2_and_k3_are_never_negative():
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 8).log_softmax(-1).unbind(0)
    true = float((policy.exp() * (policy - reference)).sum())
    for name in ("k1", "k3"):
        mean = float((policy.exp() * ESTIMATES[name](policy, reference)).sum())
        assert mean == pytest.approx(true, abs=1e-6), name
    near = (policy + 0.01 * torch.randn(8)).log_softmax(-1)
    small = float((policy.exp() * (policy - near)).sum())
    assert float((policy.exp() * ESTIMATES["k2"](policy, near)).sum()) == pytest.approx(small, rel=0.05)
    assert all(bool((ESTIMATES[name](policy, reference) >= 0).all()) for name in ("k2", "k3"))


def drawn_by_older_weights(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, Experience]:
    """Returns the log-probabilities of the older weights and of the reference, and the experience of a batch that has
    each of 8 tokens once, at one place."""
    torch.manual_seed(seed)
    older, policy, reference = (2 * torch.randn(3, 1, 8)).log_softmax(-1).unbind(0)
    ones = torch.ones(1, 8)
    importance = truncated_importance(policy, older, ones, largest=math.inf)
    experience = Experience(ones, ones[:, 0], torch.zeros(1), policy, reference, None, importance, importance)
    return older, reference, experience


@pytest.mark.parametrize("drawn_by", ["older weights", "the reference"])
def test_the_divergence_on_tokens_of_older_weights_is_that_of_the_policy(drawn_by):
    """Finds an estimate whose mean falls below 0, which rewards with a KL penalty would pay for."""
    for seed in range(50):
        older, reference, experience = drawn_by_older_weights(seed)
        if drawn_by == "the reference":  # as at the start of a run
            older = reference
            weight = truncated_importance(experience.logprob_BT, older, experience.mask_BT, largest=math.inf)
            experience = replace(experience, kl_weight_BT=weight)
        policy = experience.logprob_BT
        true = float((policy.exp() * (policy - reference)).sum())
        for name in ("k1", "k3"):
            mean = float((older.exp() * reference_kl(experience, name)).sum())
            assert mean == pytest.approx(true, abs=1e-4), name
        if drawn_by == "the reference":
            unweighted = reference_kl(replace(experience, kl_weight_BT=None), "k1")
            assert float((older.exp() * unweighted).sum()) < 0 < true


@pytest.mark.parametrize("cap", [0.5, 2.0, 5.0])
def test_a_truncated_penalty_pays_at_most_a_third_of_a_nat_per_token(cap):
    """Finds a truncation that rewards the policy without bound for moving away from the reference: with weights of at
    most c the mean is at least z log z, for the mean weight z, and so above -1/e. k3 never pays."""
    for seed in range(50):
        _, reference, experience = drawn_by_older_weights(seed)
        weight = truncated_importance(experience.logprob_BT, reference, experience.mask_BT, largest=math.inf)
        experience = replace(experience, kl_weight_BT=weight)
        mean = float((reference.exp() * reference_kl(experience, "k1", cap)).sum())
        z = float((reference.exp() * weight.clamp(max=cap)).sum())
        assert mean >= z * math.log(z) - 1e-5 > -0.37
        assert (reference_kl(experience, "k3", cap) >= 0).all()


@pytest.mark.parametrize("unit", ["token", "completion"])
def test_no_token_of_older_weights_has_more_than_the_cap_of_its_divergence(unit):
    """Finds a token that the policy has left and that fills the loss: its k3 is the inverse of its probability, and a
    ratio of the whole completion does not make it small."""
    cap = 2.0
    older = torch.tensor([-1.0, -4.0, -0.5, -2.0])
    before = torch.tensor([-0.2, -1.0, -16.0, -2.0])  # by the policy at the start of the iteration
    now = torch.tensor([-0.1, -0.5, -20.0, -9.0])
    columns = {
        "old_logprob": before,
        "advantage": torch.zeros(4),
        "reference": torch.tensor([-1.0, -4.0, -0.5, -2.0]),
        "kl_weight": (before - older).exp(),
    }
    for place in range(4):
        only = {name: column[place : place + 1] for name, column in columns.items()}
        tokens = DrawnTokens(
            now[place : place + 1],
            torch.zeros(1),
            torch.zeros(1, dtype=torch.int64),
            only,
            kl_coefficient=1.0,
            largest_kl_weight=cap,
        )
        ratio = torch.ones(1) if unit == "completion" else None
        loss = float(penalised_policy_loss(tokens, clip=0.2, ratio_N=ratio).total)
        divergence = float(ESTIMATES["k3"](now, columns["reference"])[place])
        weight = min(math.exp(float(now[place] - older[place])), cap)
        assert loss == pytest.approx(weight * divergence, rel=1e-4)
        # w k3 is at most reference / older, but for the cap.
        assert 0 <= loss < math.exp(float(columns["reference"][place] - older[place])) + cap * 4


def test_the_penalty_on_tokens_of_older_weights_has_the_gradient_of_the_divergence():
    """Finds a penalty that pulls the policy elsewhere than to the reference, after an update of the iteration, too."""
    older, reference, experience = drawn_by_older_weights()
    columns = {name: column.flatten() for name, column in token_columns(experience, torch.zeros(1, 8)).items()}
    scores_now = (experience.logprob_BT[0] + 0.3 * torch.randn(8)).requires_grad_()

    # The mean over tokens of the older weights, by the weight of each token.
    columns["token_weight"] = older[0].exp()
    now = scores_now.log_softmax(-1)
    tokens = DrawnTokens(now, torch.zeros(8), torch.zeros(8, dtype=torch.int64), columns, kl_coefficient=1.0)
    (gradient,) = torch.autograd.grad(penalised_policy_loss(tokens, clip=0.2).total, scores_now)

    now = scores_now.log_softmax(-1)
    (expected,) = torch.autograd.grad((now.exp() * (now - reference[0])).sum(), scores_now)
    assert torch.allclose(gradient, expected, atol=1e-6)


# --- advantages, and their whitening over parts of a batch ---


GAMMA, LAMBDA = 0.97, 0.9


def batch():
    torch.manual_seed(0)
    length = torch.tensor([7, 1, 4])
    mask = (torch.arange(7) < length[:, None]).float()
    return torch.randn(3, 7) * mask, torch.randn(3, 7), mask, length


def test_each_advantage_is_its_sum_of_discounted_surprises():
    reward, value, mask, length = batch()
    advantage, returns = generalised_advantages(reward, value, mask, GAMMA, LAMBDA)
    for row, n in enumerate(length.tolist()):
        own = [*value[row, :n].tolist(), 0.0]
        surprise = [float(reward[row, t]) + GAMMA * own[t + 1] - own[t] for t in range(n)]
        for t in range(n):
            expected = sum((GAMMA * LAMBDA) ** (k - t) * surprise[k] for k in range(t, n))
            assert float(advantage[row, t]) == pytest.approx(expected, abs=1e-5)
            assert float(returns[row, t]) == pytest.approx(expected + own[t], abs=1e-5)
    assert advantage[mask == 0].eq(0).all()
    assert returns[mask == 0].eq(0).all()


def test_with_lambda_1_returns_are_sums_of_rewards_whatever_the_values():
    reward, value, mask, _ = batch()
    _, returns = generalised_advantages(reward, value, mask, gamma=1.0, lam=1.0)
    expected = reward.flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, expected)


def test_what_stands_behind_the_end_changes_nothing():
    reward, value, mask, _ = batch()
    other = value.where(mask > 0, torch.tensor(1e6))
    changed = generalised_advantages(reward, other, mask, GAMMA, LAMBDA)
    expected = generalised_advantages(reward, value, mask, GAMMA, LAMBDA)
    torch.testing.assert_close(changed, expected)


def test_the_score_lies_at_the_last_token_and_the_kl_at_every_one():
    _, _, mask, length = batch()
    kl = torch.full((3, 7), 0.5)
    reward = token_rewards(torch.tensor([3.0, -1.0, 2.0]), kl, mask, kl_coefficient=0.2)
    for row, (n, score) in enumerate(zip(length.tolist(), (3.0, -1.0, 2.0), strict=True)):
        expected = [-0.1] * (n - 1) + [score - 0.1] + [0.0] * (7 - n)
        assert reward[row].tolist() == pytest.approx(expected)


def test_whitening_is_over_all_tokens_and_no_padding():
    _, value, mask, _ = batch()
    value = value * 5 + 3
    kept = whiten(value, mask)[mask > 0]
    assert float(kept.mean()) == pytest.approx(0, abs=1e-6)
    assert float(kept.std(unbiased=False)) == pytest.approx(1, abs=1e-5)
    assert whiten(value, mask)[mask == 0].eq(0).all()
    unshifted = whiten(value, mask, shift=False)[mask > 0]
    assert float(unshifted.mean()) == pytest.approx(float(value[mask > 0].mean()), rel=1e-5)
    constant = torch.ones(2, 3)
    assert whiten(constant, constant).abs().max() < 1e-3
    mean, std = mean_and_std(value, mask)
    assert (float(mean), float(std)) == pytest.approx(
        (float(value[mask > 0].mean()), float(value[mask > 0].std(unbiased=False)))
    )


# --- the losses of ppo: values, and where their gradients go ---


def test_before_the_first_update_the_ratio_is_1_and_the_gradient_is_that_of_the_policy_gradient():
    old = torch.tensor([-1.0, -2.0, -0.5])
    new = old.clone().requires_grad_()
    advantage = torch.tensor([1.0, -2.0, 0.5])
    loss = clipped_policy_loss(new, old, advantage, clip=0.2)
    assert [float(loss.metrics[name]) for name in ("ratio_mean", "clip_frac", "approx_kl")] == [3.0, 0.0, 0.0]
    loss.total.backward()
    torch.testing.assert_close(new.grad, -advantage)


def test_a_move_beyond_the_clip_earns_nothing_but_is_still_paid_for():
    old = torch.zeros(3)
    new = torch.tensor([0.5, -0.5, 0.5], requires_grad=True)
    loss = clipped_policy_loss(new, old, torch.tensor([1.0, 1.0, -1.0]), clip=0.2)
    loss.total.backward()
    assert new.grad is not None
    gained, lost, paid = new.grad.tolist()
    assert gained == 0  # likelier than before by more than the clip, and it was good
    assert lost < 0  # less likely although it was good: brought back
    assert paid > 0  # likelier although it was bad: brought back
    assert float(loss.metrics["clip_frac"]) == 1


def test_values_are_held_near_the_old_ones():
    old, target = torch.zeros(3), torch.ones(3)
    value = torch.tensor([0.1, 0.5, -0.5], requires_grad=True)
    loss = clipped_value_loss(value, old, target, clip=0.2)
    assert loss.total.item() == pytest.approx((0.9**2 + 0.8**2 + 1.5**2) / 2)
    loss.total.backward()
    assert value.grad is not None
    assert value.grad.tolist() == pytest.approx([-0.9, 0.0, -1.5])
    assert float(loss.metrics["value_clip_frac"]) == 1


def test_importance_is_truncated_on_one_side_and_has_no_gradient():
    trainer = torch.tensor([[0.0, -1.0, 2.0]], requires_grad=True)
    weight = truncated_importance(trainer, torch.zeros(1, 3), torch.ones(1, 3), largest=2.0)
    assert weight.flatten().tolist() == pytest.approx([1.0, 0.36788, 2.0], abs=1e-4)
    assert not weight.requires_grad


@pytest.mark.parametrize(("ratio_of", "power"), [("completion", 1), ("mean", 1 / 2)])
def test_importance_of_a_completion_is_that_of_all_its_tokens_and_no_padding(ratio_of: str, power: float):
    trainer = torch.tensor([[-0.5, 0.2, 7.0], [3.0, 4.0, 7.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    weight = truncated_importance(trainer, torch.zeros(2, 3), mask, 2.0, ratio_of)
    assert weight[0, :2].tolist() == pytest.approx([math.exp(-0.3 * power)] * 2)
    assert weight[1, :2].tolist() == [2, 2]


def test_values_within_the_clip_are_not_counted_as_clipped_for_rounding():
    generator = torch.Generator().manual_seed(0)
    old, target = torch.randn(2, 1000, generator=generator)
    value = old + 0.19 * torch.rand(1000, generator=generator)
    assert float(clipped_value_loss(value, old, target, clip=0.2).metrics["value_clip_frac"]) == 0
