"""From rollouts to experience: forward passes of all models over the rollouts, and the scores of the reward parts.

Each data-parallel rank runs the models on its own rollouts; one all-reduce then gives every rank all results.

Dimensions: B rollouts in all, T tokens of the longest completion, S rollouts of a batch, N their completion tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from dist_lm.config.rlhf import RATIO_OF
from dist_lm.data.batch import Batch
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.sharding import reshard
from dist_lm.rlhf.algorithm import Experience
from dist_lm.rlhf.models import Execution, as_reference
from dist_lm.rlhf.packed_rollouts import Dealing, RolloutBatch, completion_mask, whole_batches
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
    engine_logprob_BT: torch.Tensor  # nats, from the rollouts
    part_B: Mapping[str, torch.Tensor]  # score of each reward part, by name
    reward_scale: RewardScale | None


def collect(
    run: Execution,
    rollouts: Rollouts,
    rule_score_B: Mapping[str, torch.Tensor],
    batches: Sequence[RolloutBatch],
    reward_scale: RewardScale | None,
) -> Collected:
    """Run all models over the rollouts (collective).

    Args:
        rule_score_B: scores of the parts that are rules.
        batches: this rank's micro-batches of all rollouts. If the first update uses the same ones, both passes round
            alike and its ratio is exactly 1.
        reward_scale: None: measured on these rollouts, which the reference policy drew.
    """
    config = run.config
    mask_on_host = completion_mask(rollouts)
    engine_on_host = np.zeros(mask_on_host.shape, np.float32)
    engine_on_host[mask_on_host] = rollouts.logprobs_M
    mask_BT, engine_BT = (torch.from_numpy(one).to(run.device) for one in (mask_on_host, engine_on_host))
    found = _forward_passes(run, rollouts, batches, (len(rollouts), mask_BT.shape[1]))
    part_B = {name: score.to(run.device) for name, score in rule_score_B.items()}
    if "score" in found:
        raw_B = found["score"]
        if reward_scale is None and config.normalise_reward:
            reward_scale = RewardScale.of(raw_B)
        own = [name for name, part in config.rewards.items() if part.kind == REWARD_MODEL]
        part_B |= dict.fromkeys(own, reward_scale(raw_B) if reward_scale else raw_B)
    whole_B = torch.from_numpy(rollouts.whole).to(run.device)
    importance_BT = None
    if config.importance_cap:
        importance_BT = truncated_importance(
            found["logprob"], engine_BT, mask_BT, config.importance_cap, RATIO_OF.get(config.algorithm, "token")
        )
    experience = Experience(
        mask_BT=mask_BT.float(),
        score_B=total_score(part_B, config.rewards, whole_B, config.missing_eos_penalty or 0.0),
        prompt_B=torch.from_numpy(rollouts.position_B).to(run.device),
        logprob_BT=found["logprob"],
        reference_logprob_BT=found.get("reference"),
        value_BT=found.get("value"),
        importance_BT=importance_BT,
    )
    return Collected(experience, found["entropy"], engine_BT, part_B, reward_scale)


def _forward_passes(
    run: Execution, rollouts: Rollouts, batches: Sequence[RolloutBatch], shape: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """logprob, entropy, reference and value (B, T), score (B,); those whose model exists (collective)."""
    models, temperature = run.models, run.config.temperature

    def of_tokens() -> dict[str, torch.Tensor]:
        found = {}
        policy = models.policy.model
        found["logprob"], found["entropy"] = token_logprobs(policy, _each(batches, run.alive), shape, temperature)
        if models.reference:
            with as_reference(models):
                found["reference"], _ = token_logprobs(models.reference, _each(batches, run.alive), shape, temperature)
        return found

    def of_scores() -> dict[str, torch.Tensor]:
        found = {}
        if models.critic:
            found["value"] = token_values(models.critic.model, _each(batches, run.alive), shape)
        if models.reward:
            found["score"] = end_scores(models.reward, rollouts, run.dealing, run.device, run.alive)
        return found

    tokens, scores = run.beside(of_tokens, of_scores)
    found = tokens | scores
    return dict(zip(found, add_up(list(found.values()), run.counts), strict=True))


def _each(batches: Iterable[SomeBatch], alive: Callable[[], None]) -> Iterator[SomeBatch]:
    for batch in batches:
        alive()
        yield batch


@torch.no_grad()
def token_logprobs(
    model: Transformer, batches: Iterable[RolloutBatch], shape: tuple[int, int], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of the completion tokens in `batches`, fp32 (B, T) each; 0 for other rollouts."""
    device = model.embedding.weight.device
    logprob_BT, entropy_BT = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    for batch in batches:
        found = model.logprobs(batch, temperature, sets=batch.sets)
        for into, values in ((logprob_BT, found.logprob_BT), (entropy_BT, found.entropy_BT)):
            into.view(-1)[batch.drawn_N] = values.flatten()[batch.counted_N]
    reshard(model)
    return logprob_BT, entropy_BT


@torch.no_grad()
def token_values(model: Transformer, batches: Iterable[RolloutBatch], shape: tuple[int, int]) -> torch.Tensor:
    """The critic's value before each completion token in `batches`, fp32 (B, T); 0 for other rollouts."""
    value_BT = torch.zeros(shape, device=model.embedding.weight.device)
    for batch in batches:
        value_BT.view(-1)[batch.drawn_N] = model.scores(batch, batch.counted_N).flatten()[batch.counted_N]
    reshard(model)
    return value_BT


@torch.no_grad()
def end_scores(
    model: Transformer,
    rollouts: Rollouts,
    shares: Dealing,
    device: torch.device,
    alive: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Scores of this rank's rollouts at their last token, fp32 (B,); 0 for other rollouts.

    Args:
        device: the model's.
        alive: called before every batch.
    """
    score_B = torch.zeros(len(rollouts), device=device)
    for whole in _each(whole_batches(rollouts, shares), alive):
        batch = whole.to(device)
        score_B[batch.rollout_S] = model.scores(batch, batch.end_S).flatten()[batch.end_S]
    reshard(model)
    return score_B


def add_up(parts: Sequence[torch.Tensor], counts: bool) -> list[torch.Tensor]:
    """Sums of the parts over all ranks, bit-identical on every rank (collective, one all-reduce).

    Args:
        counts: whether this rank's parts are added; of the ranks that see the same rollouts, one counts.
    """
    flat = torch.cat([part.flatten() for part in parts])
    shared = flat if counts else torch.zeros_like(flat)
    dist.all_reduce(shared)
    return [values.view_as(part) for values, part in zip(shared.split([p.numel() for p in parts]), parts, strict=True)]
