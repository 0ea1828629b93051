"""From rollouts to experience: forward passes of all models over the rollouts, and the scores of the reward parts.

Each data-parallel rank runs the models on its own rollouts; one all-reduce then gives every rank the numbers of all.

Dimensions: B rollouts of all ranks, T tokens of the longest completion, S rollouts of a batch, N completion tokens of a
batch.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from dist_lm.data.batch import Batch
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.sharding import reshard
from dist_lm.rlhf.algorithm import Experience
from dist_lm.rlhf.models import Execution, as_reference
from dist_lm.rlhf.packed_rollouts import Dealing, RolloutBatch, ScoringBatch, completion_mask, scoring_batches
from dist_lm.rlhf.policy_gradient import truncated_importance
from dist_lm.rlhf.reward_model import RewardScale
from dist_lm.rlhf.rewards import REWARD_MODEL, total_score
from dist_lm.rlhf.rollouts import Rollouts

SomeBatch = TypeVar("SomeBatch", bound=Batch)


@dataclass(frozen=True)
class Collected:
    """The experience of an iteration, and quantities that only the metrics use."""

    experience: Experience
    entropy_BT: torch.Tensor  # nats, of the policy before the first update
    engine_logprob_BT: torch.Tensor  # nats, by the engine that drew the rollouts
    part_B: Mapping[str, torch.Tensor]  # score of each reward part, by name
    reward_scale: RewardScale | None  # the one given to `collect`, or else the one measured there


def collect(
    execution: Execution,
    rollouts: Rollouts,
    rule_score_B: Mapping[str, torch.Tensor],
    batches: Sequence[RolloutBatch],
    reward_scale: RewardScale | None,
    version: int,
    ratio_of: str = "token",
) -> Collected:
    """Runs all models over the rollouts and returns the experience of the iteration, the same on every rank
    (collective).

    No weights change and no gradients are computed. Tensors are on the device of `execution`.

    Args:
        rule_score_B: scores of the parts that are rules.
        batches: this rank's share of all rollouts, as micro-batches. If the first update uses the same micro-batches,
            it rounds as the passes here do, and every ratio of that update is exactly 1.
        reward_scale: normalises scores of the reward model. Stage rlhf gives the scale that stage reward has measured,
            from the first iteration on. None: without rlhf.normalise_reward, scores stay as they are; with it, a caller
            apart from the stage has the scale measured on these rollouts, which must come from the reference policy.
        version: of the policy.
        ratio_of: see `Algorithm`.
    """
    config = execution.config
    # The engine's log-probabilities are concatenated in `rollouts`; here they become a left-aligned (B, T) array.
    mask_on_host = completion_mask(rollouts)
    engine_on_host = np.zeros(mask_on_host.shape, np.float32)
    engine_on_host[mask_on_host] = rollouts.logprobs_M
    mask_BT = torch.from_numpy(mask_on_host).to(execution.device)
    engine_BT = torch.from_numpy(engine_on_host).to(execution.device)

    outputs = _forward_passes(execution, rollouts, batches, (len(rollouts), mask_BT.shape[1]))

    # Scores of rules came with the rollouts; those of the reward model are normalised here.
    part_B = {name: score.to(execution.device) for name, score in rule_score_B.items()}
    if "score" in outputs:
        model_score_B = outputs["score"]
        if reward_scale is None and config.normalise_reward:
            reward_scale = RewardScale.of(model_score_B)
        if reward_scale:
            model_score_B = reward_scale(model_score_B)
        parts_of_model = [name for name, part in config.rewards.items() if part.kind == REWARD_MODEL]
        part_B |= dict.fromkeys(parts_of_model, model_score_B)
    ended_B = torch.from_numpy(rollouts.ended).to(execution.device)
    score_B = total_score(part_B, config.rewards, ended_B, config.missing_eos_penalty or 0.0)

    # The engine drew the tokens with older weights or other rounding, so its probabilities differ from the trainer's.
    importance_BT = None
    if config.importance_cap:
        importance_BT = truncated_importance(outputs["logprob"], engine_BT, mask_BT, config.importance_cap, ratio_of)

    # The KL is that of the policy, so tokens that older weights drew are weighted as if the policy had drawn them.
    kl_weight_BT = None
    is_stale_B = torch.from_numpy(rollouts.version_B < version).to(execution.device)
    if is_stale_B.any():
        # The KL is a sum over tokens, so each token has a weight of its own, whatever `ratio_of` is.
        weight_BT = truncated_importance(outputs["logprob"], engine_BT, mask_BT, largest=math.inf)
        # Fresh tokens keep weight 1: for them importance is rounding alone.
        kl_weight_BT = torch.where(is_stale_B[:, None], weight_BT, 1.0)

    experience = Experience(
        mask_BT=mask_BT.float(),
        score_B=score_B,
        prompt_B=torch.from_numpy(rollouts.position_B).to(execution.device),
        logprob_BT=outputs["logprob"],
        reference_logprob_BT=outputs.get("reference"),
        value_BT=outputs.get("value"),
        importance_BT=importance_BT,
        kl_weight_BT=kl_weight_BT,
    )
    return Collected(experience, outputs["entropy"], engine_BT, part_B, reward_scale)


def _forward_passes(
    execution: Execution, rollouts: Rollouts, batches: Sequence[RolloutBatch], shape: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """Runs each model over this rank's rollouts. Returns the outputs for the rollouts of all ranks (collective).

    Args:
        shape: (B, T).

    Returns:
        Tensors by name, the same on every rank. `logprob` and `entropy` of the policy: (B, T), nats. `reference`, the
        log-probabilities of the reference, if there is one: (B, T), nats. `value`, with a critic: (B, T). `score`, with
        a reward model: (B,), as the model gives it.
    """
    models, temperature = execution.models, execution.config.temperature
    n_models = sum(model is not None for model in (models.policy, models.reference, models.critic, models.reward))
    n_passes, n_done = max(1, n_models * len(batches)), 0

    def followed(batches: Iterable[SomeBatch]) -> Iterator[SomeBatch]:
        nonlocal n_done
        for batch in batches:
            execution.scoring(min(1.0, n_done / n_passes))
            n_done += 1
            yield batch

    def logprobs() -> dict[str, torch.Tensor]:
        """Returns this rank's columns of policy and reference."""
        columns = {}
        policy = models.policy.model
        columns["logprob"], columns["entropy"] = token_logprobs(policy, followed(batches), shape, temperature)
        if models.reference:
            with as_reference(models):
                columns["reference"], _ = token_logprobs(models.reference, followed(batches), shape, temperature)
        return columns

    def values_and_scores() -> dict[str, torch.Tensor]:
        columns = {}
        if models.critic:
            columns["value"] = token_values(models.critic.model, followed(batches), shape)
        if models.reward:
            columns["score"] = end_scores(models.reward, rollouts, execution.dealing, execution.device, followed)
        return columns

    # Policy and critic compute independently, so one CPU may run both at the same time.
    of_policy, of_critic = execution.run_both(logprobs, values_and_scores)
    columns = of_policy | of_critic
    # Each rank has filled in its own rollouts and left 0 elsewhere, so a sum gives every rank all of them.
    return dict(zip(columns, add_up(list(columns.values()), execution.adds_sums), strict=True))


def with_signs_of_life(batches: Iterable[SomeBatch], alive: Callable[[], None]) -> Iterator[SomeBatch]:
    """Yields the same batches, and calls `alive` before each."""
    for batch in batches:
        alive()
        yield batch


@torch.no_grad()
def token_logprobs(
    model: Transformer, batches: Iterable[RolloutBatch], shape: tuple[int, int], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns log-probability and entropy of the completion tokens in `batches`, nats, fp32 (B, T) each.

    Both are 0 for rollouts that are not in `batches`. Parameters are gathered for each batch, so every rank must have
    equally many (collective); afterwards all are sharded again.

    Args:
        shape: (B, T).
        temperature: divides the logits, as in the engine; with the sets of a batch, the distribution is that over the
            tokens that could be drawn.
    """
    device = model.embedding.weight.device
    logprob_BT = torch.zeros(shape, device=device)
    entropy_BT = torch.zeros(shape, device=device)
    for batch in batches:
        now = model.logprobs(batch, temperature, sets=batch.sets)
        logprob_BT.view(-1)[batch.column_N] = now.logprob_BT.flatten()[batch.logit_index_N]
        entropy_BT.view(-1)[batch.column_N] = now.entropy_BT.flatten()[batch.logit_index_N]
    reshard(model)
    return logprob_BT, entropy_BT


@torch.no_grad()
def token_values(model: Transformer, batches: Iterable[RolloutBatch], shape: tuple[int, int]) -> torch.Tensor:
    """Returns the critic's value before each completion token in `batches`, fp32 (B, T); 0 for other rollouts.

    Collective as `token_logprobs`; afterwards all parameters are sharded again.
    """
    value_BT = torch.zeros(shape, device=model.embedding.weight.device)
    for batch in batches:
        value_BT.view(-1)[batch.column_N] = model.scores(batch, batch.logit_index_N).flatten()[batch.logit_index_N]
    reshard(model)
    return value_BT


@torch.no_grad()
def end_scores(
    model: Transformer,
    rollouts: Rollouts,
    dealing: Dealing,
    device: torch.device,
    followed: Callable[[Iterable[ScoringBatch]], Iterable[ScoringBatch]] = iter,
) -> torch.Tensor:
    """Returns the scores of this rank's rollouts at their last token, fp32 (B,); 0 for other rollouts (collective).

    Scores are as the model gives them, not normalised. Afterwards all parameters are sharded again.

    Args:
        dealing: divides the rollouts among the ranks.
        device: device of the model.
        followed: yields the same batches, and tells that this rank is alive.
    """
    score_B = torch.zeros(len(rollouts), device=device)
    for batch_on_host in followed(scoring_batches(rollouts, dealing)):
        batch = batch_on_host.to(device)
        score_B[batch.rollout_S] = model.scores(batch, batch.end_S).flatten()[batch.end_S]
    reshard(model)
    return score_B


def add_up(parts: Sequence[torch.Tensor], adds_sums: bool) -> list[torch.Tensor]:
    """Returns the sums of the parts over all ranks, bit-identical on every rank (collective, one all-reduce).

    Args:
        adds_sums: whether this rank adds its parts; exactly one of the ranks that see the same rollouts does.
    """
    # One message for all parts: small ones cost their latency.
    flat = torch.cat([part.flatten() for part in parts])
    if not adds_sums:
        flat.zero_()
    dist.all_reduce(flat)
    sums = flat.split([part.numel() for part in parts])
    return [total.view_as(part) for total, part in zip(sums, parts, strict=True)]
