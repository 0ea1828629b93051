"""Metrics of the reward model and of reinforcement learning."""

from dist_lm.tracking.metric import Better, Metric

REWARD, RLHF = ("reward",), ("rlhf",)
CRITIC = "with an algorithm that has a critic"
REFERENCE = "with a reference (rlhf.kl_coefficient > 0)"
HELD_OUT_PROMPTS = "with held-out prompts"


def _agreement(figure: str, meaning: str, better: Better) -> tuple[Metric, ...]:
    """A figure over all held-out rankings, over those of one source, and over those of one size."""
    parts = (("", ""), ("_{source}", ", of one source"), ("_k{completions}", ", of one number of completions"))
    return tuple(
        Metric(f"reward/{figure}{suffix}", "", f"{meaning}{of}.", better, REWARD, "reward") for suffix, of in parts
    )


AGREEMENT = (
    *_agreement("accuracy", "Share of held-out pairs whose better one has the larger score", "higher"),
    *_agreement("kendall_tau", "Kendall's tau-b of scores and ranks, mean over held-out rankings", "higher"),
    *_agreement("top1", "Share of held-out rankings whose largest score is of one of the best", "higher"),
    *_agreement(
        "calibration_error", "How far the pairs' probabilities are from how often they are right (0 to 0.5)", "lower"
    ),
)
SCORES = (
    Metric("reward/score_mean", "", "Mean score of answers of the model it started from.", "", REWARD, "reward"),
    Metric("reward/score_std", "", "Standard deviation of these scores.", "", REWARD, "reward"),
    Metric("reward/scored", "samples", "How many answers these two are of.", "", REWARD, "reward"),
)
ITERATIONS = (
    Metric(
        "rlhf/reward_mean",
        "",
        "Mean score of rollouts, less the divergence from the reference times its coefficient.",
        "higher",
        RLHF,
        "rlhf",
    ),
    Metric("rlhf/score_mean", "", "Mean weighted sum of the parts of the reward.", "higher", RLHF, "rlhf"),
    Metric("rlhf/part_{part}", "", "Mean score under one part of the reward.", "higher", RLHF, "rlhf"),
    Metric(
        "rlhf/kl",
        "nats/rollout",
        "Divergence of the policy from the reference, estimated on its rollouts.",
        "",
        RLHF,
        "rlhf",
        only=REFERENCE,
    ),
    Metric(
        "rlhf/kl_coefficient",
        "",
        "What a nat of divergence costs, as a part of the score.",
        "",
        RLHF,
        "rlhf",
        only=REFERENCE,
    ),
    Metric("rlhf/entropy", "nats/token", "Entropy of what tokens are drawn from.", "", RLHF, "rlhf"),
    Metric("rlhf/new_tokens_mean", "tokens", "Mean length of a rollout.", "", RLHF, "rlhf"),
    Metric("rlhf/truncated_rate", "", "Share of rollouts cut off before their end.", "lower", RLHF, "rlhf"),
    Metric(
        "rlhf/win_rate",
        "",
        "How often the policy's answer to a held-out prompt scores more than the reference's; ties count half.",
        "higher",
        RLHF,
        "held-out",
        only=HELD_OUT_PROMPTS,
    ),
    Metric(
        "rlhf/held_out_score",
        "",
        "Mean score of the policy's answers to held-out prompts.",
        "higher",
        RLHF,
        "held-out",
        only=HELD_OUT_PROMPTS,
    ),
    Metric(
        "rlhf/held_out_score_reference",
        "",
        "Mean score of the reference's answers to held-out prompts.",
        "",
        RLHF,
        "held-out",
        only=HELD_OUT_PROMPTS,
    ),
    Metric(
        "rlhf/held_out",
        "prompts",
        "Held-out prompts that the win rate is of.",
        "",
        RLHF,
        "held-out",
        only=HELD_OUT_PROMPTS,
    ),
)
UPDATES = (
    Metric("rlhf/updates", "updates", "Updates of the policy in the iteration.", "", RLHF, "updates"),
    Metric("rlhf/policy_loss", "", "Loss of the policy a token, mean over updates.", "", RLHF, "updates"),
    Metric(
        "rlhf/policy_grad_norm",
        "",
        "L2 norm of the policy's gradients before clipping, mean over updates.",
        "",
        RLHF,
        "updates",
    ),
    Metric(
        "rlhf/ratio_mean",
        "",
        "Mean probability of drawn tokens as a multiple of that before the iteration's first update.",
        "",
        RLHF,
        "updates",
    ),
    Metric("rlhf/clip_frac", "", "Share of tokens whose gain was clipped.", "", RLHF, "updates"),
    Metric(
        "rlhf/approx_kl",
        "nats/token",
        "Divergence from the policy before the iteration's first update.",
        "",
        RLHF,
        "updates",
    ),
    Metric(
        "rlhf/pretrain_loss",
        "nats/token",
        "Loss on pretraining text, mean over updates.",
        "lower",
        RLHF,
        "updates",
        only="with pretraining text among the updates",
    ),
    Metric("rlhf/value_loss", "", "Loss of the critic a token.", "lower", RLHF, "updates", only=CRITIC),
    Metric(
        "rlhf/value_grad_norm",
        "",
        "L2 norm of the critic's gradients before clipping, mean over updates.",
        "",
        RLHF,
        "updates",
        only=CRITIC,
    ),
    Metric("rlhf/value_clip_frac", "", "Share of tokens whose value was clipped.", "", RLHF, "updates", only=CRITIC),
    Metric(
        "rlhf/value_explained_var",
        "",
        "Share of the variance of returns that the critic foresaw: 1 is all, 0 nothing.",
        "higher",
        RLHF,
        "updates",
        only=CRITIC,
    ),
    Metric("rlhf/value_mean", "", "Mean value that the critic expects.", "", RLHF, "updates", only=CRITIC),
    Metric("rlhf/return_mean", "", "Mean return of a token.", "", RLHF, "updates", only=CRITIC),
)
ROLLOUTS = (
    Metric(
        "rollout/tokens_per_s",
        "tokens/s",
        "Tokens drawn a second of drawing.",
        "higher",
        RLHF,
        "throughput",
        only="where the rollouts were drawn by this attempt",
    ),
    Metric(
        "rollout/staleness",
        "iterations",
        "How much older than the policy the weights were that drew the rollouts.",
        "lower",
        RLHF,
        "throughput",
    ),
    Metric(
        "rollout/logprob_gap",
        "nats",
        "Largest difference between a token's log-probability where it was drawn and in training.",
        "lower",
        RLHF,
        "rlhf",
    ),
)
CLOCK = tuple(
    Metric(f"timing/{name}_s", "s", f"Of an iteration, {meaning}.", "lower", RLHF, "time")
    for name, meaning in (
        ("rollout", "waiting for rollouts and their scores under rules"),
        ("forward", "asking reward model, reference, policy and critic about the rollouts"),
        ("update", "the updates"),
        ("push", "handing new weights to who draws"),
        ("iteration", "all of it, without the report"),
    )
)
REINFORCEMENT = (*AGREEMENT, *SCORES, *ITERATIONS, *UPDATES, *ROLLOUTS, *CLOCK)
