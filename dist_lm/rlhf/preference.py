"""Losses that learn from judged completions without rollouts: DPO, IPO, KTO, ORPO, SimPO, DPO from whole rankings.

A log-ratio is the log-probability of a completion under the policy minus that under the reference, summed over its
tokens. The reference is the model that training starts from.

| algorithm | an implicit reward | source |
| --- | --- | --- |
| DPO | beta * log-ratio | Rafailov et al. 2023, arXiv 2305.18290 |
| IPO | beta * mean log-ratio of a token | Azar et al. 2023, arXiv 2310.12036 |
| KTO | beta * log-ratio | Ethayarajh et al. 2024, arXiv 2402.01306 |
| ORPO | beta * mean log-probability of a token | Hong et al. 2024, arXiv 2403.07691 |
| SimPO | beta * mean log-probability of a token | Meng et al. 2024, arXiv 2405.14734 |

Dimensions: C completions of P prompts, N pairs of a better and a worse completion, K completions of the largest prompt.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.config.preference import DPO, IPO, KTO, ORPO, PreferenceConfig
from dist_lm.data.batch import RankedPositions
from dist_lm.rlhf.rankings import choices, ranking_losses, remaining, right_choices
from dist_lm.training.objective import LossSum

NEAREST_TO_ONE = -1e-7  # largest log-probability whose odds are finite in fp32

# --- equations: all tensors fp32, in nats ---


def dpo_losses(better_N: torch.Tensor, worse_N: torch.Tensor, beta: float) -> torch.Tensor:
    """Returns the losses of DPO, equation 7, (N,). The arguments are log-ratios."""
    return -F.logsigmoid(beta * (better_N - worse_N))


def plackett_luce_losses(
    ratio_PK: torch.Tensor, rank_PK: torch.Tensor, exists_PK: torch.Tensor, beta: float
) -> torch.Tensor:
    """Returns the losses of DPO from rankings, equation 20 (appendix A.3), one for each choice, (P, K).

    For two completions this is DPO. The arguments are log-ratios, and those of `ranking_losses`, which divides ties by
    Efron's rule.
    """
    return ranking_losses(beta * ratio_PK, rank_PK, exists_PK)


def ipo_losses(better_N: torch.Tensor, worse_N: torch.Tensor, beta: float) -> torch.Tensor:
    """Returns the losses of IPO, equation 17 with beta for tau, (N,). The arguments are mean log-ratios of a token.

    The paper does not name the mean. Its authors confirmed it to TRL: sums would make the loss grow with length.
    """
    return (better_N - worse_N - 1 / (2 * beta)).square()


def kto_losses(
    better_N: torch.Tensor,
    worse_N: torch.Tensor,
    point: torch.Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """Returns the losses of KTO, equation 8 without its constant, mean over the two completions of a pair, (N,).

    Args:
        better_N, worse_N: log-ratios.
        point: scalar; the reference point z0, the KL divergence from the reference, at least 0.
    """
    wanted_N = torch.ones_like(better_N, dtype=torch.bool)
    weights = (desirable_weight, undesirable_weight)
    of_better_N = kto_label_losses(better_N, wanted_N, point, beta, *weights)
    of_worse_N = kto_label_losses(worse_N, ~wanted_N, point, beta, *weights)
    return (of_better_N + of_worse_N) / 2


def kto_label_losses(
    ratio_L: torch.Tensor,
    wanted_L: torch.Tensor,
    point: torch.Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """Returns the losses of KTO of completions with labels, equation 8 without its constant, (L,).

    Args:
        ratio_L: log-ratios.
        wanted_L: bool.
        point: as in `kto_losses`.
    """
    lead_L = beta * (ratio_L - point)
    weight_L = torch.full_like(ratio_L, undesirable_weight).masked_fill(wanted_L, desirable_weight)
    return weight_L * (1 - torch.where(wanted_L, lead_L, -lead_L).sigmoid())


def orpo_losses(better_N: torch.Tensor, worse_N: torch.Tensor, beta: float) -> torch.Tensor:
    """Returns the part of ORPO that compares odds, equations 4 and 7 with beta for lambda, (N,).

    The arguments are mean log-probabilities of a token.
    """
    return -beta * F.logsigmoid(log_odds(better_N) - log_odds(worse_N))


def log_odds(logprob_N: torch.Tensor) -> torch.Tensor:
    """Returns log(p / (1 - p)) for log-probabilities, (N,)."""
    logprob_N = logprob_N.clamp(max=NEAREST_TO_ONE)
    return logprob_N - (-torch.expm1(logprob_N)).log()


def simpo_losses(better_N: torch.Tensor, worse_N: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """Returns the losses of SimPO, equation 6, (N,). The arguments are mean log-probabilities of a token."""
    return -F.logsigmoid(beta * (better_N - worse_N) - gamma)


# --- from completions to a sum ---


@dataclass(frozen=True)
class Completions:
    """Log-probabilities of the completions of a batch, with the judgements on them."""

    logprob_C: torch.Tensor  # nats, sum over the tokens; with gradient
    reference_C: torch.Tensor  # the same under the reference; (0,) if the loss has none
    tokens_C: torch.Tensor  # float32; number of tokens
    prompt_C: torch.Tensor  # int64; number of the prompt, from 0
    prompt_logprob_P: (
        torch.Tensor
    )  # nats, sum over the prompt without its first token; (0,) unless the loss learns text
    prompt_tokens_P: torch.Tensor  # float32; number of these tokens
    ranked: RankedPositions  # places are numbers of completions


@dataclass(frozen=True)
class GlobalValues:
    """Quantities of the whole global batch that a loss reads."""

    reference_point: torch.Tensor | None = None  # scalar; KTO's z0
    tokens_per_pair: torch.Tensor | None = None  # scalar; tokens of prompt and better completion, mean over all pairs


@dataclass(frozen=True)
class PreferenceLoss:
    """The loss of one algorithm with its settings."""

    settings: PreferenceConfig

    def rewards(self, completions: Completions) -> torch.Tensor:
        """Returns the implicit rewards that the loss compares, (C,)."""
        ratio_C = self._log_ratios(completions)
        # The other losses compare means of a token, so that longer completions do not win by their length.
        if self.settings.algorithm not in (DPO, KTO):
            ratio_C = ratio_C / completions.tokens_C
        return self.settings.strength * ratio_C

    def __call__(self, completions: Completions, batch_values: GlobalValues) -> LossSum:
        """Returns the summed losses of all choices, and their number.

        A ranking has K - 1 choices (Plackett and Luce), a pair has 1, a completion with a label half a one. Metrics are
        sums over choices. The chosen completion is the better one; the rejected one stands for the mean of the
        completions that a choice leaves.
        """
        ranked, settings = completions.ranked, self.settings
        count = choices(ranked.exists_PK).sum() + len(ranked.margin_N)
        total = self._pair_losses(completions, batch_values).sum()
        if settings.algorithm == KTO:
            return self._with_labels(completions, batch_values, total)
        if len(ranked.index_PK):
            assert settings.algorithm == DPO, "only DPO learns from whole rankings"
            ratio_PK = self._log_ratios(completions)[ranked.index_PK]
            total = total + plackett_luce_losses(ratio_PK, ranked.rank_PK, ranked.exists_PK, settings.strength).sum()
        return LossSum(total=total, count=count.float(), metrics=self._metrics(completions, batch_values, count))

    def _with_labels(
        self, completions: Completions, batch_values: GlobalValues, total_of_pairs: torch.Tensor
    ) -> LossSum:
        """Returns the sums of KTO: pairs, and completions with a label. The loss of a pair is a mean over two
        completions, so a label counts as half a pair, and the loss is a mean over completions.

        A label is right if the log-ratio is above the reference point just when the completion is wanted.
        """
        ranked, settings, point = completions.ranked, self.settings, batch_values.reference_point
        assert point is not None
        place_L, wanted_L = ranked.index_PK[:, 0], ranked.rank_PK[:, 0] == 0
        ratio_L = self._log_ratios(completions)[place_L]
        weights = (_or(settings.desirable_weight, 1.0), _or(settings.undesirable_weight, 1.0))
        losses_L = kto_label_losses(ratio_L, wanted_L, point, settings.strength, *weights)

        pairs, n_wanted, n_labels = len(ranked.margin_N), wanted_L.sum(), len(place_L)
        count = ranked.margin_N.new_tensor(pairs + n_labels / 2)
        metrics = self._metrics(completions, batch_values, count)
        with torch.no_grad():
            reward_L = self.rewards(completions)[place_L]
            logprob_L = completions.logprob_C[place_L]
            sign_L = torch.where(wanted_L, 1.0, -1.0)
            metrics["accuracy"] = metrics["accuracy"] + (sign_L * (ratio_L - point) > 0).sum()
            metrics["margin"] = metrics["margin"] + (sign_L * reward_L).sum()
            for name, is_part_L in (("chosen", wanted_L), ("rejected", ~wanted_L)):
                metrics[f"{name}_reward"] = metrics[f"{name}_reward"] + (reward_L * is_part_L).sum()
                metrics[f"{name}_logprob"] = metrics[f"{name}_logprob"] + (logprob_L * is_part_L).sum()

        n_chosen, n_rejected = (pairs + n_wanted).float(), (pairs + n_labels - n_wanted).float()
        return LossSum(
            total=total_of_pairs + losses_L.sum() / 2,
            count=count,
            metrics=metrics,
            metric_counts={
                "accuracy": ranked.margin_N.new_tensor(float(pairs + n_labels)),
                "chosen_reward": n_chosen,
                "chosen_logprob": n_chosen,
                "rejected_reward": n_rejected,
                "rejected_logprob": n_rejected,
            },
        )

    def _log_ratios(self, completions: Completions) -> torch.Tensor:
        """Returns log-ratios, (C,); log-probabilities if the loss reads no reference."""
        if not self.settings.has_reference:
            return completions.logprob_C
        return completions.logprob_C - completions.reference_C

    def _pair_losses(self, completions: Completions, batch_values: GlobalValues) -> torch.Tensor:
        """Returns the losses of the pairs, (N,) fp32; that of ORPO includes the loss of prompt and better completion as
        text. They are nats, except those of IPO and KTO, which have no unit."""
        settings, beta = self.settings, self.settings.strength
        better, worse = completions.ranked.better_N, completions.ranked.worse_N
        ratio_C = self._log_ratios(completions)
        mean_C = ratio_C / completions.tokens_C

        if settings.algorithm == DPO:
            return dpo_losses(ratio_C[better], ratio_C[worse], beta)
        if settings.algorithm == IPO:
            return ipo_losses(mean_C[better], mean_C[worse], beta)
        if settings.algorithm == KTO:
            assert batch_values.reference_point is not None
            weights = (_or(settings.desirable_weight, 1.0), _or(settings.undesirable_weight, 1.0))
            return kto_losses(ratio_C[better], ratio_C[worse], batch_values.reference_point, beta, *weights)
        if settings.algorithm == ORPO:
            assert batch_values.tokens_per_pair is not None
            text_N = completions.prompt_logprob_P[completions.prompt_C[better]] + completions.logprob_C[better]
            return orpo_losses(mean_C[better], mean_C[worse], beta) - text_N / batch_values.tokens_per_pair
        return simpo_losses(mean_C[better], mean_C[worse], beta, _or(settings.gamma, 1.0))

    @torch.no_grad()
    def _metrics(
        self, completions: Completions, batch_values: GlobalValues, count: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Returns the metrics as sums over choices, scalars without gradient, by name; `kl`, in nats, only with a
        reference point.

        `accuracy` counts right choices; `margin` is chosen minus rejected reward.
        """
        ranked, reward_C = completions.ranked, self.rewards(completions).detach()
        chosen, rejected = _chosen_and_rejected(reward_C, ranked)
        chosen_logprob, rejected_logprob = _chosen_and_rejected(completions.logprob_C.detach(), ranked)

        right = (reward_C[ranked.better_N] > reward_C[ranked.worse_N]).sum()
        right = right + right_choices(reward_C[ranked.index_PK], ranked.rank_PK, ranked.exists_PK)
        metrics = {
            "accuracy": right.float(),
            "margin": chosen - rejected,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "chosen_logprob": chosen_logprob,
            "rejected_logprob": rejected_logprob,
        }
        if batch_values.reference_point is not None:
            metrics["kl"] = batch_values.reference_point * count
        return metrics


def tokens_of_pairs(completions: Completions) -> torch.Tensor:
    """Returns the predicted tokens of prompt and better completion, summed over the pairs, scalar."""
    better = completions.ranked.better_N
    return (completions.prompt_tokens_P[completions.prompt_C[better]] + completions.tokens_C[better]).sum()


def _chosen_and_rejected(value_C: torch.Tensor, ranked: RankedPositions) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns two scalars: the values of the chosen completions summed over all choices, and the means of those that
    remain after each, summed too.

    A ranking of K completions has K - 1 choices: of each but the last, before the worse ones and tied ones at later
    places. Each pair of `better_N` and `worse_N` is one more choice.

    Args:
        value_C: by the indices in `ranked`.
    """
    value_PK = value_C[ranked.index_PK]
    remaining_PKK = remaining(ranked.rank_PK, ranked.exists_PK).to(value_C.dtype)
    n_remaining_PK = remaining_PKK.sum(-1)

    # The last completion of a ranking leaves none, so it is no choice.
    chosen = (value_PK * (n_remaining_PK > 0)).sum() + value_C[ranked.better_N].sum()
    mean_PK = (remaining_PKK @ value_PK[:, :, None])[:, :, 0] / n_remaining_PK.clamp(min=1)
    return chosen, mean_PK.sum() + value_C[ranked.worse_N].sum()


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
