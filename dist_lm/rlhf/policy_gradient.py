"""Arithmetic shared by policy-gradient algorithms: KL estimates, token rewards, advantages and clipped losses.

All functions are pure. Functions over (B, T) take left-aligned completions: `mask_BT` is 1 on the tokens of a
completion and 0 on the padding after it. Functions over N take the completion tokens of a micro-batch, without padding.

Dimensions: B completions, T tokens of the longest completion, N completion tokens of a micro-batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from dist_lm.rlhf.algorithm import DrawnTokens, Experience
from dist_lm.training.objective import LossSum

# --- estimates of KL(policy || reference) per token (Schulman 2020, 'Approximating KL divergence') ---


def k1(policy_BT: torch.Tensor, reference_BT: torch.Tensor) -> torch.Tensor:
    """Returns the log-ratio of the sampled tokens, nats, (B, T): unbiased, may be negative."""
    return policy_BT - reference_BT


def k2(policy_BT: torch.Tensor, reference_BT: torch.Tensor) -> torch.Tensor:
    """Returns half the squared log-ratio, nats, (B, T): biased, low variance, never negative."""
    return (policy_BT - reference_BT).square() / 2


def k3(policy_BT: torch.Tensor, reference_BT: torch.Tensor) -> torch.Tensor:
    """Returns r - 1 - log r for r = reference / policy, nats, (B, T): unbiased and never negative."""
    log_ratio_BT = reference_BT - policy_BT
    return log_ratio_BT.expm1() - log_ratio_BT


ESTIMATES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
"""rlhf.kl_estimate -> its function: (log-probabilities of the policy, of the reference) -> nats per token."""


def reference_kl(experience: Experience, estimate: str, largest_weight: float = math.inf) -> torch.Tensor:
    """Returns the estimated KL from the reference at each token, nats, (B, T); 0 on padding and without a reference.

    It is weighted where older weights drew the token. Without weights its mean would be no KL: the present policy
    gives a low probability to tokens that it has moved away from, and their log(policy / reference) is far below 0.

    Args:
        largest_weight: truncates the weights. Without it, k1 and k3 have the divergence as their mean, which is never
            negative. With it, their mean is smaller where the policy has made tokens much more probable.
    """
    if experience.reference_logprob_BT is None:
        return torch.zeros_like(experience.mask_BT)
    kl_BT = ESTIMATES[estimate](experience.logprob_BT, experience.reference_logprob_BT) * experience.mask_BT
    return kl_BT if experience.kl_weight_BT is None else kl_BT * experience.kl_weight_BT.clamp(max=largest_weight)


# --- rewards and advantages ---


def token_rewards(
    score_B: torch.Tensor, kl_BT: torch.Tensor, mask_BT: torch.Tensor, kl_coefficient: float
) -> torch.Tensor:
    """Returns token rewards, (B, T): the score at the last token of a completion, less the weighted KL of every token.

    Ouyang et al. 2022, eq. 2.
    """
    reward_BT = -kl_coefficient * kl_BT * mask_BT
    last_B1 = (mask_BT.sum(1, keepdim=True) - 1).long()
    return reward_BT.scatter_add(1, last_B1, score_B[:, None].to(reward_BT.dtype))


def generalised_advantages(
    reward_BT: torch.Tensor, value_BT: torch.Tensor, mask_BT: torch.Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (advantages, returns), (B, T) each, 0 on padding: GAE (Schulman et al. 2016, eq. 16).

    Args:
        reward_BT: reward of each token, 0 on padding.
        value_BT: the critic's value before each token; the value after the last token is 0.
        gamma: discount per token.
        lam: lambda of the estimator.
    """
    # The recursion runs backwards: A_t = residual_t + gamma lambda A_{t+1}. Padding resets it to 0.
    advantage_B = torch.zeros_like(reward_BT[:, 0])
    next_value_B = torch.zeros_like(advantage_B)
    backwards = []
    for t in reversed(range(reward_BT.shape[1])):
        mask_B = mask_BT[:, t]
        residual_B = reward_BT[:, t] + gamma * next_value_B - value_BT[:, t]
        advantage_B = (residual_B + gamma * lam * advantage_B) * mask_B
        next_value_B = value_BT[:, t] * mask_B
        backwards.append(advantage_B)

    advantage_BT = torch.stack(backwards[::-1], dim=1)
    return advantage_BT, (advantage_BT + value_BT) * mask_BT


def rewards_to_come(reward_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Returns the sum of the rewards from each token on, undiscounted, (B, T); 0 on padding."""
    return reward_BT.flip(1).cumsum(1).flip(1) * mask_BT


def mean_and_std(value_BT: torch.Tensor, mask_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and population standard deviation of the values where `mask_BT` is 1, scalars fp64."""
    count = mask_BT.double().sum().clamp(min=1)
    masked_BT = value_BT.double() * mask_BT
    mean = masked_BT.sum() / count
    variance = (masked_BT * value_BT.double()).sum() / count - mean.square()
    return mean, variance.clamp(min=0).sqrt()


def whiten(value_BT: torch.Tensor, mask_BT: torch.Tensor, *, shift: bool = True, eps: float = 1e-8) -> torch.Tensor:
    """Returns the values scaled to standard deviation 1 over all tokens of the batch, and shifted to mean 0 if `shift`;
    (B, T), 0 on padding."""
    mean, std = mean_and_std(value_BT, mask_BT)
    scaled_BT = (value_BT - mean) / (std + eps)
    if not shift:
        scaled_BT = scaled_BT + mean
    return (scaled_BT * mask_BT).to(value_BT.dtype)


def explained_variance(value_BT: torch.Tensor, return_BT: torch.Tensor, mask_BT: torch.Tensor) -> float:
    """Returns 1 - Var(return - value) / Var(return).

    It is 1 for a perfect critic, 0 for a constant one, and 0 if all returns are equal.
    """
    _, return_std = mean_and_std(return_BT, mask_BT)
    _, error_std = mean_and_std(return_BT - value_BT, mask_BT)
    return float(1 - (error_std / return_std).square()) if return_std > 0 else 0.0


# --- groups: the rollouts of a prompt ---


STD_EPS = 1e-4  # added to a group's standard deviation, as in TRL and verl


@dataclass(frozen=True)
class Groups:
    """Statistics of the group that each rollout belongs to, fp32 (B,) each."""

    size_B: torch.Tensor  # rollouts of the group
    mean_B: torch.Tensor  # mean score
    std_B: torch.Tensor  # with size - 1 in the denominator; exactly 0 where all scores are the same


def groups_of(score_B: torch.Tensor, prompt_B: torch.Tensor) -> Groups:
    """Returns statistics of the scores of the rollouts that share a prompt, computed in fp64 on the host.

    Args:
        score_B: fp32.
        prompt_B: int64; rollouts with the same number form a group.
    """
    _, group_B = prompt_B.cpu().unique(return_inverse=True)
    exact_B = score_B.cpu().double()

    def over_group(value_B: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(int(group_B.max()) + 1, dtype=torch.float64).index_add_(0, group_B, value_B)
        return sums[group_B]

    size_B = over_group(torch.ones_like(exact_B))
    mean_B = over_group(exact_B) / size_B
    std_B = (over_group((exact_B - mean_B).square()) / (size_B - 1).clamp(min=1)).sqrt()

    # If all scores are equal, the deviation must be exactly 0 and not the rounding of their mean, because advantages
    # are divided by it.
    some_B = torch.zeros_like(exact_B).index_copy_(0, group_B, exact_B)[group_B]  # score of some rollout of the group
    std_B = std_B * over_group((exact_B != some_B).double()).sign()

    device = score_B.device
    return Groups(size_B.float().to(device), mean_B.float().to(device), std_B.float().to(device))


def per_token(value_B: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Returns the value of a completion at each of its tokens, (B, T); 0 on padding."""
    return value_B[:, None] * mask_BT


def inverse_lengths(mask_BT: torch.Tensor) -> torch.Tensor:
    """Returns, at each token, 1 / number of tokens of its completion, (B, T); a sum weighted by it is a mean over
    it."""
    return per_token(1 / mask_BT.sum(1), mask_BT)


def group_columns(experience: Experience, advantage_B: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns `token_columns` for an advantage of whole completions, (B, T) each."""
    return token_columns(experience, per_token(advantage_B, experience.mask_BT))


def token_columns(experience: Experience, advantage_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the columns of `penalised_policy_loss`, without `token_weight`, (B, T) each."""
    columns = {"old_logprob": experience.logprob_BT, "advantage": advantage_BT}
    if experience.reference_logprob_BT is not None:
        columns["reference"] = experience.reference_logprob_BT
    if experience.importance_BT is not None:
        columns["importance"] = experience.importance_BT
    if experience.kl_weight_BT is not None:
        columns["kl_weight"] = experience.kl_weight_BT
    return columns


def over_completion(value_N: torch.Tensor, rollout_N: torch.Tensor, *, mean: bool) -> torch.Tensor:
    """Returns the sum or the mean of the values over the completion of each token, (N,).

    Args:
        rollout_N: int64; the rollout of each token. Tokens of a rollout stand together.
    """
    _, completion_N, length_S = rollout_N.unique_consecutive(return_inverse=True, return_counts=True)
    sum_S = value_N.new_zeros(len(length_S)).index_add(0, completion_N, value_N)
    if mean:
        sum_S = sum_S / length_S
    return sum_S[completion_N]


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
    """Returns the clipped surrogate of PPO (Schulman et al. 2017, eq. 7), negated, as a sum over tokens; count: tokens.

    Metrics, sums over tokens: `policy_loss`, `ratio_mean` (probability now / probability before the first update),
    `clip_frac` (tokens whose gradient the clip removed), `approx_kl` (k3 of the policy before the first update against
    the policy now).

    Args:
        logprob_N: nats, with gradient.
        old_logprob_N: nats, by the trainer's weights before the first update of the iteration.
        clip: the ratio is clipped to [1 - clip, 1 + clip].
        weight_N: weight of each token; see `truncated_importance`.
        clip_high: distance above 1; None: `clip`.
        ratio_N: probability ratio; None: the ratio of each token.
    """
    log_ratio_N = logprob_N - old_logprob_N
    token_ratio_N = log_ratio_N.exp()
    if ratio_N is None:
        ratio_N = token_ratio_N
    if clip_high is None:
        clip_high = clip

    # The minimum never rewards a move beyond the clip, but still penalises one that made things worse.
    unclipped_N = ratio_N * advantage_N
    clipped_N = ratio_N.clamp(1 - clip, 1 + clip_high) * advantage_N
    gain_N = torch.minimum(unclipped_N, clipped_N)
    if weight_N is not None:
        gain_N = gain_N * weight_N
    total = -gain_N.sum()

    metrics = {
        "policy_loss": total.detach(),
        "ratio_mean": ratio_N.sum().detach(),
        "clip_frac": (clipped_N < unclipped_N).sum().float(),
        "approx_kl": (token_ratio_N - 1 - log_ratio_N).sum().detach(),
    }
    return LossSum(total, torch.ones_like(logprob_N).sum(), metrics)


def penalised_policy_loss(
    tokens: DrawnTokens,
    clip: float,
    *,
    clip_high: float | None = None,
    entropy_coefficient: float = 0.0,
    ratio_N: torch.Tensor | None = None,
) -> LossSum:
    """Returns the clipped policy loss, plus the KL from the reference, minus the entropy bonus, as a sum over tokens;
    every term of a token is multiplied by its weight.

    The KL is k3 times the ratio, so that its gradient is that of the KL of the policy now (DeepSeek-AI 2025,
    DeepSeek-V3.2, eq. 7; without the ratio, as in Shao et al. 2024, eq. 4, the gradient is biased). At ratio 1 both
    have the same value.

    Count and metrics are those of `clipped_policy_loss`, but `policy_loss` has the KL in it.

    Columns: `old_logprob`, `advantage`; where they exist, `importance` (weight of the gain of each token),
    `token_weight` (weight of all terms of a token; 1 without it), `reference` (log-probability, for the KL) and
    `kl_weight` (importance of tokens that older weights drew, for the KL; 1 without it). The product of the ratio and
    `kl_weight` is clamped to `tokens.largest_kl_weight`.

    Args:
        clip: as in `clipped_policy_loss`, as are `clip_high` and `ratio_N`.
    """
    columns = tokens.columns
    token_weight_N = columns.get("token_weight", torch.ones_like(tokens.logprob_N))
    gain_weight_N = token_weight_N * columns.get("importance", 1)
    if ratio_N is None:
        ratio_N = (tokens.logprob_N - columns["old_logprob"]).exp()
    loss = clipped_policy_loss(
        tokens.logprob_N,
        columns["old_logprob"],
        columns["advantage"],
        clip,
        gain_weight_N,
        clip_high=clip_high,
        ratio_N=ratio_N,
    )

    total, metrics = loss.total, dict(loss.metrics)
    # KL and entropy are expectations under the policy now. A token is reweighted to it in two factors: `kl_weight` from
    # the weights that drew it to the policy at the start of the iteration, and the ratio from there to now.
    if tokens.kl_coefficient:
        kl_ratio_N = ratio_N
        if "kl_weight" in columns:
            # Of the token, also where `ratio_N` is of the completion: k3 is huge at tokens that the policy has left,
            # and only their own ratio is as small.
            token_ratio_N = (tokens.logprob_N - columns["old_logprob"]).exp()
            kl_ratio_N = (token_ratio_N * columns["kl_weight"]).clamp(max=tokens.largest_kl_weight)
        kl_N = k3(tokens.logprob_N, columns["reference"]) * kl_ratio_N
        total = total + tokens.kl_coefficient * (token_weight_N * kl_N).sum()
        metrics["policy_loss"] = total.detach()
    if entropy_coefficient:
        total = total - entropy_coefficient * (token_weight_N * tokens.entropy_N).sum()
    return replace(loss, total=total, metrics=metrics)


def clipped_value_loss(
    value_N: torch.Tensor, old_value_N: torch.Tensor, return_N: torch.Tensor, clip: float
) -> LossSum:
    """Returns half the squared error, as a sum over tokens; a move of more than `clip` from the old value lowers it no
    further.

    Metrics, sums over tokens: `value_loss`, `value_clip_frac` (tokens whose gradient the clip removed).

    Args:
        value_N: with gradient.
        old_value_N: by the critic before the first update of the iteration.
    """
    moved_N = value_N - old_value_N
    clipped_value_N = old_value_N + moved_N.clamp(-clip, clip)
    error_N = (value_N - return_N).square()
    clipped_error_N = (clipped_value_N - return_N).square()
    total = torch.maximum(error_N, clipped_error_N).sum() / 2

    # Within the clip both are equal up to rounding, so the comparison of the errors alone is not enough.
    cut_off_N = (clipped_error_N > error_N) & (moved_N.abs() > clip)
    metrics = {"value_loss": total.detach(), "value_clip_frac": cut_off_N.sum().float()}
    return LossSum(total, torch.ones_like(value_N).sum(), metrics)


def truncated_importance(
    trainer_BT: torch.Tensor, engine_BT: torch.Tensor, mask_BT: torch.Tensor, largest: float, ratio_of: str = "token"
) -> torch.Tensor:
    """Returns the ratio of trainer to engine probability of each token, at most `largest`, without gradient, (B, T).

    Corrects for rollouts of older weights and for rounding differences between engine and trainer (Espeholt et al.
    2018, section 4.1, truncated above only). On padding it is 1, or the ratio of the completion.

    Args:
        trainer_BT: log-probabilities by the trainer's weights, nats.
        engine_BT: log-probabilities by the engine that drew the tokens, nats.
        ratio_of: token | completion (the product over its tokens) | mean (the geometric mean over its tokens), as in
            the algorithm's loss. For the last two, each token gets the ratio of its completion.
    """
    log_ratio_BT = (trainer_BT - engine_BT).detach() * mask_BT
    if ratio_of != "token":
        completion_B1 = log_ratio_BT.sum(1, keepdim=True)
        if ratio_of == "mean":
            completion_B1 = completion_B1 / mask_BT.sum(1, keepdim=True)
        log_ratio_BT = completion_B1.expand_as(log_ratio_BT)
    return log_ratio_BT.exp().clamp(max=largest)
