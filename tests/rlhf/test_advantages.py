"""Advantages, and their whitening over parts of a batch."""

import pytest
import torch

from dist_lm.rlhf.advantages import Moments, generalised_advantages, token_rewards, whiten

GAMMA, LAMBDA = 0.97, 0.9


def batch():
    torch.manual_seed(0)
    length = torch.tensor([7, 1, 4])
    mask = (torch.arange(7) < length[:, None]).float()
    return torch.randn(3, 7) * mask, torch.randn(3, 7), mask, length


def test_each_advantage_is_its_sum_of_discounted_surprises():
    reward, value, mask, length = batch()
    found = generalised_advantages(reward, value, mask, GAMMA, LAMBDA)
    for row, n in enumerate(length.tolist()):
        own = [*value[row, :n].tolist(), 0.0]
        surprise = [float(reward[row, t]) + GAMMA * own[t + 1] - own[t] for t in range(n)]
        for t in range(n):
            expected = sum((GAMMA * LAMBDA) ** (k - t) * surprise[k] for k in range(t, n))
            assert float(found.advantage_BT[row, t]) == pytest.approx(expected, abs=1e-5)
            assert float(found.return_BT[row, t]) == pytest.approx(expected + own[t], abs=1e-5)
    assert found.advantage_BT[mask == 0].eq(0).all()
    assert found.return_BT[mask == 0].eq(0).all()


def test_with_lambda_1_returns_are_sums_of_rewards_whatever_the_values():
    reward, value, mask, _ = batch()
    found = generalised_advantages(reward, value, mask, gamma=1.0, lam=1.0)
    expected = reward.flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(found.return_BT, expected)


def test_what_stands_behind_the_end_changes_nothing():
    reward, value, mask, _ = batch()
    other = value.where(mask > 0, torch.tensor(1e6))
    changed = generalised_advantages(reward, other, mask, GAMMA, LAMBDA)
    expected = generalised_advantages(reward, value, mask, GAMMA, LAMBDA)
    torch.testing.assert_close(changed.advantage_BT, expected.advantage_BT)
    torch.testing.assert_close(changed.return_BT, expected.return_BT)


def test_the_score_lies_at_the_last_token_and_the_kl_at_every_one():
    _, _, mask, length = batch()
    kl = torch.full((3, 7), 0.5)
    reward = token_rewards(torch.tensor([3.0, -1.0, 2.0]), kl, mask, kl_coefficient=0.2)
    for row, (n, score) in enumerate(zip(length.tolist(), (3.0, -1.0, 2.0), strict=True)):
        expected = [-0.1] * (n - 1) + [score - 0.1] + [0.0] * (7 - n)
        assert reward[row].tolist() == pytest.approx(expected)


def test_whitening_is_over_the_whole_batch_in_whatever_parts_it_lies():
    _, value, mask, _ = batch()
    value = value * 5 + 3
    whole = Moments.of(value, mask)
    parts = Moments.of(value[:2], mask[:2]) + Moments.of(value[2:], mask[2:])
    torch.testing.assert_close((parts.mean, parts.std), (whole.mean, whole.std))
    kept = whiten(value, mask, parts)[mask > 0]
    assert float(kept.mean()) == pytest.approx(0, abs=1e-6)
    assert float(kept.std(unbiased=False)) == pytest.approx(1, abs=1e-5)
    assert whiten(value, mask, parts)[mask == 0].eq(0).all()
    unshifted = whiten(value, mask, parts, shift=False)[mask > 0]
    assert float(unshifted.mean()) == pytest.approx(float(whole.mean), rel=1e-5)
    constant = torch.ones(2, 3)
    assert whiten(constant, constant, Moments.of(constant, constant)).abs().max() < 1e-3
