"""The losses of PPO: values, and where their gradients go."""

import pytest
import torch

from dist_lm.rlhf.clipped_losses import policy_loss, truncated_importance, value_loss

MASK = torch.tensor([[1.0, 1.0, 1.0, 0.0]])


def test_before_the_first_update_the_ratio_is_1_and_the_gradient_is_that_of_the_policy_gradient():
    old = torch.tensor([[-1.0, -2.0, -0.5, -3.0]])
    new = old.clone().requires_grad_()
    advantage = torch.tensor([[1.0, -2.0, 0.5, 9.0]])
    loss = policy_loss(new, old, advantage, MASK, clip=0.2)
    assert (float(loss.ratio), float(loss.clipped), float(loss.approx_kl)) == (3.0, 0.0, 0.0)
    loss.total.backward()
    torch.testing.assert_close(new.grad, -advantage * MASK)


def test_a_move_beyond_the_clip_earns_nothing_but_is_still_paid_for():
    old = torch.zeros(1, 4)
    new = torch.tensor([[0.5, -0.5, 0.5, 0.0]], requires_grad=True)
    loss = policy_loss(new, old, torch.tensor([[1.0, 1.0, -1.0, 1.0]]), MASK, clip=0.2)
    loss.total.backward()
    assert new.grad is not None
    gained, lost, paid, absent = new.grad[0].tolist()
    assert gained == 0  # likelier than before by more than the clip, and it was good
    assert lost < 0  # less likely although it was good: brought back
    assert paid > 0  # likelier although it was bad: brought back
    assert absent == 0
    assert float(loss.clipped) == 1


def test_values_are_held_near_the_old_ones():
    old, target = torch.zeros(1, 4), torch.tensor([[1.0, 1.0, 1.0, 9.0]])
    value = torch.tensor([[0.1, 0.5, -0.5, 5.0]], requires_grad=True)
    loss = value_loss(value, old, target, MASK, clip=0.2)
    assert loss.total.item() == pytest.approx((0.9**2 + 0.8**2 + 1.5**2) / 2)
    loss.total.backward()
    assert value.grad is not None
    assert value.grad[0].tolist() == pytest.approx([-0.9, 0.0, -1.5, 0.0])
    assert float(loss.clipped) == 1


def test_importance_is_truncated_on_one_side_and_has_no_gradient():
    trainer = torch.tensor([0.0, -1.0, 2.0], requires_grad=True)
    weight = truncated_importance(trainer, torch.tensor([0.0, 0.0, 0.0]), largest=2.0)
    assert weight.tolist() == pytest.approx([1.0, 0.36788, 2.0], abs=1e-4)
    assert not weight.requires_grad


def test_values_within_the_clip_are_not_counted_as_clipped_for_rounding():
    generator = torch.Generator().manual_seed(0)
    old, target = torch.randn(2, 1000, generator=generator)
    value = old + 0.19 * torch.rand(1000, generator=generator)
    assert float(value_loss(value, old, target, torch.ones(1000), clip=0.2).clipped) == 0
