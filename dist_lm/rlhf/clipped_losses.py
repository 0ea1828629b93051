"""The losses of PPO, as pure functions: sums over tokens, with what to divide them by left to the caller.

Schulman et al. (2017), 'Proximal policy optimization algorithms'.

Dimensions: B completions, T tokens.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PolicyLoss:
    """Sums over the tokens of completions."""

    total: torch.Tensor  # scalar, with gradient
    ratio: torch.Tensor  # probability now / when it was drawn
    clipped: torch.Tensor  # tokens whose gradient the clip has cut off
    approx_kl: torch.Tensor  # k3 of the policy that drew against the one now


def policy_loss(
    logprob_BT: torch.Tensor,
    old_logprob_BT: torch.Tensor,
    advantage_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    clip: float,
    weight_BT: torch.Tensor | None = None,
) -> PolicyLoss:
    """Equation 7: the smaller one of the plain and the clipped gain, its sign turned.

    Args:
        old_logprob_BT: by the trainer's weights before the first update of this batch.
        weight_BT: of each token; see `truncated_importance`.
    """
    log_ratio_BT = (logprob_BT - old_logprob_BT) * mask_BT
    ratio_BT = log_ratio_BT.exp()
    plain_BT = ratio_BT * advantage_BT
    held_BT = ratio_BT.clamp(1 - clip, 1 + clip) * advantage_BT
    gain_BT = torch.minimum(plain_BT, held_BT)
    gain_BT = gain_BT if weight_BT is None else gain_BT * weight_BT
    return PolicyLoss(
        total=-(gain_BT * mask_BT).sum(),
        ratio=(ratio_BT * mask_BT).sum().detach(),
        clipped=((held_BT < plain_BT) * mask_BT).sum().detach(),
        approx_kl=((ratio_BT - 1 - log_ratio_BT) * mask_BT).sum().detach(),
    )


@dataclass(frozen=True)
class ValueLoss:
    total: torch.Tensor
    clipped: torch.Tensor


def value_loss(
    value_BT: torch.Tensor, old_value_BT: torch.Tensor, return_BT: torch.Tensor, mask_BT: torch.Tensor, clip: float
) -> ValueLoss:
    """Half the squared error; moving further than `clip` from the old value gains nothing."""
    moved_BT = value_BT - old_value_BT
    held_BT = old_value_BT + moved_BT.clamp(-clip, clip)
    plain_BT, clipped_BT = (value_BT - return_BT).square(), (held_BT - return_BT).square()
    total = (torch.maximum(plain_BT, clipped_BT) * mask_BT).sum() / 2
    # within the clip both are equal up to rounding
    cut_off_BT = (clipped_BT > plain_BT) & (moved_BT.abs() > clip)
    return ValueLoss(total, (cut_off_BT * mask_BT).sum().detach())


def truncated_importance(trainer_BT: torch.Tensor, engine_BT: torch.Tensor, largest: float) -> torch.Tensor:
    """How much likelier a token was under the trainer's weights than under those that drew it, at most `largest`.

    For rollouts of an older version, and for what engine and trainer round differently (Espeholt et al. 2018, section
    4.1, truncated at one side). Without gradient.
    """
    return (trainer_BT - engine_BT).detach().exp().clamp(max=largest)
