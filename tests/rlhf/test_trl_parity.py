"""Losses and gradients of `GRPOTrainer._compute_loss` and `RLOOTrainer._compute_loss` of TRL, on the same tokens."""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_lm.rlhf.algorithms.registry import ALGORITHMS
from dist_lm.rlhf.config import RlhfConfig
from dist_lm.rlhf.policy_gradient import groups_of
from tests.rlhf.test_online_algorithms import EXPERIENCE as UNEVEN
from tests.rlhf.test_online_algorithms import LONGEST, MOVED, OLD, REFERENCE, Tokens, loss_of, padded, with_gradient

pytestmark = pytest.mark.heavy  # the import of TRL takes seconds

NEAR = 1e-6
GROUP = 4
SCORE_B = torch.tensor([1.0, -2.0, 0.5, 3.0, 3.5, -1.0, 0.25, 2.0])
EXPERIENCE = replace(UNEVEN, score_B=SCORE_B, prompt_B=torch.arange(8) // GROUP, importance_BT=None)
CASES = {
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
}
OWN = {"dapo": {"overlong_tokens": 0}, "gspo": {"clip": 0.05, "clip_high": 0.08}}


class Accelerator:
    """Of one process."""

    num_processes = 1

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def reduce(self, value: torch.Tensor, reduction: str) -> torch.Tensor:
        return value


def trl_loss(trainer_class: Any, logprob_BT: torch.Tensor, inputs: dict[str, torch.Tensor], **values: Any):
    """`_compute_loss` of a trainer whose model gives these log-probabilities."""
    mask_BT = EXPERIENCE.mask_BT
    trainer = SimpleNamespace(
        accelerator=Accelerator(),
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=True, steps_per_generation=1),
        importance_sampling_level="token",
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=LONGEST,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprob_BT, torch.zeros_like(logprob_BT), None),
    )
    vars(trainer).update(values)
    own = {
        "prompt_ids": torch.zeros(8, 1, dtype=torch.long),
        "prompt_mask": torch.ones(8, 1, dtype=torch.long),
        "completion_ids": torch.zeros(mask_BT.shape, dtype=torch.long),
        "completion_mask": mask_BT,
        "num_items_in_batch": mask_BT.sum(),
    }
    return trainer_class._compute_loss(trainer, None, own | inputs)


def compare(name: str, theirs: Any, kl_coefficient: float, moved: bool) -> None:
    config = RlhfConfig(
        algorithm=name, max_new_tokens=LONGEST, kl_coefficient=kl_coefficient, samples=GROUP, **OWN.get(name, {})
    )
    now: Tokens = MOVED if moved else OLD
    experience = EXPERIENCE

    def own(leaves: Tokens) -> torch.Tensor:
        return loss_of(config, leaves, experience, kl_coefficient=kl_coefficient)[0]

    found, gradients = with_gradient(own, now, torch.float32)
    expected, their_gradients = with_gradient(lambda leaves: theirs(config, padded_leaves(leaves)), now, torch.float32)
    assert found == pytest.approx(float(expected), abs=NEAR)
    for one, other in zip(gradients, their_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=NEAR)


def padded_leaves(leaves: Tokens) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(leaves, batch_first=True)


def advantages(score_B: torch.Tensor) -> torch.Tensor:
    """Those of `GRPOTrainer._generate_and_score_completions` with scale_rewards=group."""
    trl_utils = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed")
    std_B = trl_utils.nanstd(score_B.view(-1, GROUP), dim=1).repeat_interleave(GROUP)
    mean_B = score_B.view(-1, GROUP).mean(1).repeat_interleave(GROUP)
    return (score_B - mean_B) / (std_B + 1e-4)


@pytest.mark.parametrize("moved", [False, True], ids=["first update", "later update"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("name", CASES)
def test_group_losses_are_those_of_trl(name: str, beta: float, moved: bool):
    trl = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed")
    advantage_B = advantages(SCORE_B)
    if name == "dr_grpo":
        advantage_B = SCORE_B - SCORE_B.view(-1, GROUP).mean(1).repeat_interleave(GROUP)

    def theirs(config: RlhfConfig, logprob_BT: torch.Tensor) -> torch.Tensor:
        inputs = {
            "advantages": advantage_B,
            "old_per_token_logps": padded(OLD),
            "ref_per_token_logps": padded(REFERENCE),
        }
        high = config.clip_high or config.clip
        return trl_loss(
            trl.GRPOTrainer, logprob_BT, inputs, beta=beta, epsilon_low=config.clip, epsilon_high=high, **CASES[name]
        )

    compare(name, theirs, beta, moved)


@pytest.mark.parametrize("moved", [False, True], ids=["first update", "later update"])
def test_rloo_is_that_of_trl(moved: bool):
    trl = pytest.importorskip("trl.trainer.rloo_trainer", reason="TRL is not installed")
    beta = 0.3
    kl_BT = (padded(OLD) - padded(REFERENCE)) * EXPERIENCE.mask_BT
    reward_B = SCORE_B - beta * kl_BT.sum(1)
    grouped = reward_B.view(-1, GROUP)
    baseline_B = ((grouped.sum(1, keepdim=True) - grouped) / (GROUP - 1)).flatten()

    def theirs(config: RlhfConfig, logprob_BT: torch.Tensor) -> torch.Tensor:
        inputs = {
            "advantages": reward_B - baseline_B,
            "old_logps": (padded(OLD) * EXPERIENCE.mask_BT).sum(1),
        }
        return trl_loss(trl.RLOOTrainer, logprob_BT, inputs, epsilon_low=config.clip, epsilon_high=config.clip)

    compare("rloo", theirs, beta, moved)


def test_groups_are_scaled_as_in_trl():
    groups = groups_of(SCORE_B, EXPERIENCE.prompt_B)
    torch.testing.assert_close((SCORE_B - groups.mean_B) / (groups.std_B + 1e-4), advantages(SCORE_B))
    assert set(CASES) < set(ALGORITHMS)
