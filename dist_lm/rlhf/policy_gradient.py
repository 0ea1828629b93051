"""Arithmetic shared by policy-gradient algorithms: KL estimates, token rewards, advantages and clipped losses.

All functions are pure. Functions over (B, T) take left-aligned completions: `mask_BT` is 1 on the tokens of a
completion and 0 on the padding after it. Functions over N take the completion tokens of a micro-batch, without padding.

Dimensions: B completions, T tokens of the longest completion, N completion tokens of a micro-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from dist_lm.rlhf.algorithm import DrawnTokens, Experience
from dist_lm.training.objective import LossSum

# --- estimates of KL(policy || reference) per token (Schulman 2020, 'Approximating KL divergence') ---


def k1(policy_BT: torch.Tensor, reference_BT: torch.Tensor) -> torch.Tensor:
    """Log-ratio of the sampled tokens: unbiased, may be negative."""
    return policy_BT - reference_BT


def k2(policy_BT: torch.Tensor, reference_BT: torch.Tensor) -> torch.Tensor:
    """Half the squared log-ratio: biased, low variance, never negative."""
    return (policy_BT - reference_BT).square() / 2


def k3(policy_BT: torch.Tensor, reference_BT: torch.Tensor) -> torch.Tensor:
    """Unbiased and never negative."""
    log_ratio_BT = reference_BT - policy_BT
    return log_ratio_BT.expm1() - log_ratio_BT


ESTIMATES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
"""By the names that rlhf.kl_estimate accepts: (log-probabilities of the policy, of the reference) -> nats per token."""


def reference_kl(experience: Experience, estimate: str) -> torch.Tensor:
    """(B, T): nats of each token from the reference; 0 on padding and without a reference."""
    if experience.reference_logprob_BT is None:
        return torch.zeros_like(experience.mask_BT)
    kl_BT = ESTIMATES[estimate](experience.logprob_BT, experience.reference_logprob_BT)
    return kl_BT * experience.mask_BT


# --- rewards and advantages ---


def token_rewards(
    score_B: torch.Tensor, kl_BT: torch.Tensor, mask_BT: torch.Tensor, kl_coefficient: float
) -> torch.Tensor:
    """Score at the last token of each completion, minus the weighted KL of every token (Ouyang et al. 2022, eq. 2)."""
    reward_BT = -kl_coefficient * kl_BT * mask_BT
    last_B1 = (mask_BT.sum(1, keepdim=True) - 1).long()
    return reward_BT.scatter_add(1, last_B1, score_B[:, None].to(reward_BT.dtype))


def generalised_advantages(
    reward_BT: torch.Tensor, value_BT: torch.Tensor, mask_BT: torch.Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages, returns), (B, T) each, 0 on padding: GAE (Schulman et al. 2016, eq. 16).

    Args:
        value_BT: the critic's value before each token; the value after the last token is 0.
    """
    advantage = torch.zeros_like(reward_BT[:, 0])
    next_value = torch.zeros_like(advantage)
    backwards = []
    for t in reversed(range(reward_BT.shape[1])):
        there = mask_BT[:, t]
        residual = reward_BT[:, t] + gamma * next_value - value_BT[:, t]
        advantage = (residual + gamma * lam * advantage) * there
        next_value = value_BT[:, t] * there
        backwards.append(advantage)
    advantage_BT = torch.stack(backwards[::-1], dim=1)
    return advantage_BT, (advantage_BT + value_BT) * mask_BT


def rewards_to_come(reward_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """The sum of the rewards from each token on, undiscounted; 0 on padding."""
    return reward_BT.flip(1).cumsum(1).flip(1) * mask_BT


def mean_and_std(value_BT: torch.Tensor, mask_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and population standard deviation of the values where `mask_BT` is 1, in fp64."""
    count = mask_BT.double().sum().clamp(min=1)
    kept_BT = value_BT.double() * mask_BT
    mean = kept_BT.sum() / count
    variance = (kept_BT * value_BT.double()).sum() / count - mean.square()
    return mean, variance.clamp(min=0).sqrt()


def whiten(value_BT: torch.Tensor, mask_BT: torch.Tensor, *, shift: bool = True, eps: float = 1e-8) -> torch.Tensor:
    """Scale values to standard deviation 1 over all tokens of the batch, and to mean 0 if `shift`; 0 on padding."""
    mean, std = mean_and_std(value_BT, mask_BT)
    scaled_BT = (value_BT - mean) / (std + eps)
    scaled_BT = scaled_BT if shift else scaled_BT + mean
    return (scaled_BT * mask_BT).to(value_BT.dtype)


def explained_variance(value_BT: torch.Tensor, return_BT: torch.Tensor, mask_BT: torch.Tensor) -> float:
    """1 - Var(return - value) / Var(return): 1 for a perfect critic, 0 for a constant one or for constant returns."""
    _, of_return = mean_and_std(return_BT, mask_BT)
    _, of_error = mean_and_std(return_BT - value_BT, mask_BT)
    return float(1 - (of_error / of_return).square()) if of_return > 0 else 0.0


# --- groups: the rollouts of a prompt ---


STD_EPS = 1e-4  # added to a group's standard deviation, as in TRL and verl


@dataclass(frozen=True)
class Groups:
    """What each rollout's group scored, fp32 (B,) each."""

    size_B: torch.Tensor
    mean_B: torch.Tensor
    std_B: torch.Tensor  # with size - 1 in the denominator; exactly 0 where all scores are the same


def groups_of(score_B: torch.Tensor, prompt_B: torch.Tensor) -> Groups:
    """Statistics of the scores of the rollouts that share a prompt, computed in fp64 on the host."""
    _, group_B = prompt_B.cpu().unique(return_inverse=True)
    exact_B = score_B.cpu().double()

    def over_group(value_B: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(int(group_B.max()) + 1, dtype=torch.float64).index_add_(0, group_B, value_B)
        return sums[group_B]

    size_B = over_group(torch.ones_like(exact_B))
    mean_B = over_group(exact_B) / size_B
    std_B = (over_group((exact_B - mean_B).square()) / (size_B - 1).clamp(min=1)).sqrt()
    first_B = torch.zeros_like(exact_B).index_copy_(0, group_B, exact_B)[group_B]  # of some rollout of the group
    std_B = std_B * over_group((exact_B != first_B).double()).sign()
    return Groups(*(value_B.float().to(score_B.device) for value_B in (size_B, mean_B, std_B)))


def per_token(value_B: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """(B, T): the value of a completion at each of its tokens, 0 on padding."""
    return value_B[:, None] * mask_BT


def completion_shares(mask_BT: torch.Tensor) -> torch.Tensor:
    """(B, T): 1 / tokens of the completion at each of its tokens, so that sums over them are means."""
    return per_token(1 / mask_BT.sum(1), mask_BT)


def group_columns(experience: Experience, advantage_B: torch.Tensor) -> dict[str, torch.Tensor]:
    """`token_columns` for an advantage of whole completions."""
    return token_columns(experience, per_token(advantage_B, experience.mask_BT))


def token_columns(experience: Experience, advantage_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """The columns of `penalised_policy_loss`, without `share`."""
    columns = {"old_logprob": experience.logprob_BT, "advantage": advantage_BT}
    if experience.reference_logprob_BT is not None:
        columns["reference"] = experience.reference_logprob_BT
    if experience.importance_BT is not None:
        columns["importance"] = experience.importance_BT
    return columns


def over_completion(value_N: torch.Tensor, rollout_N: torch.Tensor, *, mean: bool) -> torch.Tensor:
    """(N,): the sum or mean over the tokens of its completion, at each token."""
    _, place_N, length_S = rollout_N.unique_consecutive(return_inverse=True, return_counts=True)
    sum_S = torch.zeros(len(length_S), dtype=value_N.dtype, device=value_N.device).index_add(0, place_N, value_N)
    return (sum_S / length_S if mean else sum_S)[place_N]


# --- losses: sums over tokens ---


def clipped_policy_loss(
    logprob_N: torch.Tensor,
    old_logprob_N: torch.Tensor,
    advantage_N: torch.Tensor,
    clip: float,
    weight_N: torch.Tensor | None = None,
    *,
    clip_high: float | None = None,
    ratio_N: torch.Tensor | None = None,
) -> LossSum:
    """The clipped surrogate of PPO (Schulman et al. 2017, eq. 7), negated.

    Metrics: `policy_loss`, `ratio_mean` (probability now / probability before the first update), `clip_frac` (tokens
    whose gradient the clip removed), `approx_kl` (k3 of the policy before the first update against the policy now).

    Args:
        old_logprob_N: by the trainer's weights before the first update of the iteration.
        weight_N: weight of each token; see `truncated_importance`.
        clip_high: distance above 1; None: `clip`.
        ratio_N: None: of each token.
    """
    log_ratio_N = logprob_N - old_logprob_N
    token_ratio_N = log_ratio_N.exp()
    ratio_N = token_ratio_N if ratio_N is None else ratio_N
    plain_N = ratio_N * advantage_N
    clipped_N = ratio_N.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high)) * advantage_N
    gain_N = torch.minimum(plain_N, clipped_N)
    gain_N = gain_N if weight_N is None else gain_N * weight_N
    total = -gain_N.sum()
    metrics = {
        "policy_loss": total.detach(),
        "ratio_mean": ratio_N.sum().detach(),
        "clip_frac": (clipped_N < plain_N).sum().float(),
        "approx_kl": (token_ratio_N - 1 - log_ratio_N).sum().detach(),
    }
    return LossSum(total, torch.ones_like(logprob_N).sum(), metrics)


def penalised_policy_loss(
    drawn: DrawnTokens,
    clip: float,
    *,
    clip_high: float | None = None,
    entropy_coefficient: float = 0.0,
    ratio_N: torch.Tensor | None = None,
) -> LossSum:
    """`clipped_policy_loss`, plus the KL from the reference and minus the entropy bonus, each token times its share.

    The KL is k3 times the ratio, so that its gradient is that of the KL of the policy now (DeepSeek-AI 2025,
    DeepSeek-V3.2, eq. 7; without the ratio, as in Shao et al. 2024, eq. 4, the gradient is biased). At ratio 1 both
    have the same value.

    Columns: `old_logprob`, `advantage`; where they exist, `importance` (weight of the gain of each token), `share`
    (weight of all terms of a token; 1 without it) and `reference` (log-probability, for the KL).
    """
    columns = drawn.columns
    share_N = columns.get("share", torch.ones_like(drawn.logprob_N))
    weight_N = share_N * columns["importance"] if "importance" in columns else share_N
    if ratio_N is None:
        ratio_N = (drawn.logprob_N - columns["old_logprob"]).exp()
    loss = clipped_policy_loss(
        drawn.logprob_N,
        columns["old_logprob"],
        columns["advantage"],
        clip,
        weight_N,
        clip_high=clip_high,
        ratio_N=ratio_N,
    )
    total, metrics = loss.total, dict(loss.metrics)
    if drawn.kl_coefficient:
        kl_N = k3(drawn.logprob_N, columns["reference"]) * ratio_N
        total = total + drawn.kl_coefficient * (share_N * kl_N).sum()
        metrics["policy_loss"] = total.detach()
    if entropy_coefficient:
        total = total - entropy_coefficient * (share_N * drawn.entropy_N).sum()
    return replace(loss, total=total, metrics=metrics)


def clipped_value_loss(
    value_N: torch.Tensor, old_value_N: torch.Tensor, return_N: torch.Tensor, clip: float
) -> LossSum:
    """Half the squared error, where a move of more than `clip` from the old value lowers the loss no further.

    Metrics: `value_loss`, `value_clip_frac` (tokens whose gradient the clip removed).
    """
    moved_N = value_N - old_value_N
    clipped_value_N = old_value_N + moved_N.clamp(-clip, clip)
    plain_N, clipped_N = (value_N - return_N).square(), (clipped_value_N - return_N).square()
    total = torch.maximum(plain_N, clipped_N).sum() / 2
    # within the clip both are equal up to rounding, so the comparison of the losses alone is not enough
    cut_off_N = (clipped_N > plain_N) & (moved_N.abs() > clip)
    metrics = {"value_loss": total.detach(), "value_clip_frac": cut_off_N.sum().float()}
    return LossSum(total, torch.ones_like(value_N).sum(), metrics)


def truncated_importance(
    trainer_BT: torch.Tensor, engine_BT: torch.Tensor, mask_BT: torch.Tensor, largest: float, ratio_of: str = "token"
) -> torch.Tensor:
    """The ratio of trainer to engine probability of each token, at most `largest`, without gradient.

    Corrects for rollouts of older weights and for rounding differences between engine and trainer (Espeholt et al.
    2018, section 4.1, truncated above only).

    Args:
        ratio_of: token | completion (the product over its tokens) | mean (the geometric mean over its tokens): that of
            the algorithm's own ratio. Each token gets the ratio of its completion.
    """
    log_ratio_BT = (trainer_BT - engine_BT).detach() * mask_BT
    if ratio_of != "token":
        sum_B1 = log_ratio_BT.sum(1, keepdim=True)
        sum_B1 = sum_B1 / mask_BT.sum(1, keepdim=True) if ratio_of == "mean" else sum_B1
        log_ratio_BT = sum_B1.expand_as(log_ratio_BT)
    return log_ratio_BT.exp().clamp(max=largest)
