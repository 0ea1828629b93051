"""Estimates of the divergence, and the controller."""

import pytest
import torch

from dist_lm.rlhf.kl import ESTIMATES, KlController


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


def test_an_adaptive_coefficient_goes_after_its_target_and_a_fixed_one_stays():
    assert KlController(0.1).after(kl=50.0, sequences=1000) == KlController(0.1)
    held = KlController(0.1, target=6.0, horizon=1000)
    assert held.after(6.0, 100).coefficient == pytest.approx(0.1)
    assert held.after(60.0, 100).coefficient == pytest.approx(0.1 * 1.02)  # the error is clipped to 0.2
    assert held.after(0.0, 100).coefficient == pytest.approx(0.1 * 0.98)
    assert held.after(6.6, 100).coefficient == pytest.approx(0.1 * 1.01)
