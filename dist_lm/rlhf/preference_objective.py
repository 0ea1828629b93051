"""Stage preference with a model: its objective, the passes before a step, and its figures on held-out rankings.

Dimensions: C completions of P prompts, S segments (a completion or a prompt), K completions of a prompt.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
import torch.distributed as dist

from dist_lm.data.batch import Batch
from dist_lm.data.rankings.completions import CompletionBatch, SplitReference
from dist_lm.data.rankings.shards import RankingCorpus
from dist_lm.data.rankings.stream import PlacedRanking, lesson, ranked_positions
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.messages import all_gather
from dist_lm.rlhf.preference import Completions, GlobalValues, PreferenceLoss, tokens_of_pairs
from dist_lm.rlhf.reward_model import agreement_figures, scored_rankings
from dist_lm.training.objective import LossSum, Objective, Prepare

PlacedBatches = Iterable[tuple[Batch, Sequence[PlacedRanking]]]


def segment_logprobs(model: Transformer, batch: CompletionBatch) -> torch.Tensor:
    """Returns the log-probability of each completion, then of each prompt, summed over its targets, nats, fp32, (S,).

    It is 0 for prompts without targets.
    """
    losses_BT = model.token_losses(batch)
    sums = losses_BT.new_zeros(len(batch.tokens_S) + 1)
    # Segment 0 gathers the tokens that no loss reads.
    return -sums.index_add(0, batch.segment_BT.flatten(), losses_BT.flatten())[1:]


def completions_of(model: Transformer, batch: CompletionBatch) -> Completions:
    """Returns the completions of a batch under the model."""
    assert batch.ranked is not None, "a batch with ranks or judgements"
    logprob_S = segment_logprobs(model, batch)
    n = len(batch.prompt_C)
    return _completions(batch, logprob_S[:n], logprob_S[n:])


def _completions(batch: CompletionBatch, logprob_C: torch.Tensor, prompt_logprob_P: torch.Tensor) -> Completions:
    """Returns the completions of a batch with these log-probabilities, nats."""
    assert batch.ranked is not None
    n = len(batch.prompt_C)
    return Completions(
        logprob_C=logprob_C,
        reference_C=batch.reference_C,
        tokens_C=batch.tokens_S[:n],
        prompt_C=batch.prompt_C,
        prompt_logprob_P=prompt_logprob_P,
        prompt_tokens_P=batch.tokens_S[n:],
        ranked=batch.ranked,
    )


# --- training ---


def preference_objective(loss: PreferenceLoss) -> Objective:
    """Returns the objective: summed losses of the choices of a `CompletionBatch`, their number as its count; its
    metrics are sums under `train/`.

    Batches of KTO and ORPO must have been through `preparation`.
    """

    def objective(model: Transformer, batch: Batch) -> LossSum:
        assert isinstance(batch, CompletionBatch)
        batch_values = GlobalValues(batch.reference_point, batch.tokens_per_pair)
        sums = loss(completions_of(model, batch), batch_values)
        return replace(
            sums,
            metrics={f"train/{name}": metric for name, metric in sums.metrics.items()},
            metric_counts={f"train/{name}": count for name, count in sums.metric_counts.items()},
        )

    return objective


def preparation(loss: PreferenceLoss) -> Prepare | None:
    """Returns the function that adds quantities of the global batch before the passes of a step; None: none needed."""
    if loss.settings.has_reference_point:
        return _with_reference_point
    if loss.settings.learns_text:
        return _with_tokens_per_pair
    return None


@torch.no_grad()
def _with_reference_point(model: Transformer, micro_batches: Sequence[Batch]) -> list[Batch]:
    """Returns the batches with KTO's reference point of the global batch (collective)."""
    batches = cast(Sequence[CompletionBatch], micro_batches)
    sums = torch.stack([kl_sums(model, batch) for batch in batches]).sum(0)
    # Ranks that share a batch count it once each; that leaves the ratio of the sums as it is.
    dist.all_reduce(sums)
    return [replace(batch, reference_point=reference_point(sums), mismatched=None) for batch in batches]


def _with_tokens_per_pair(model: Transformer, micro_batches: Sequence[Batch]) -> list[Batch]:
    """Returns the batches with the mean number of text tokens of a pair of the global batch (collective)."""
    batches = cast(Sequence[CompletionBatch], micro_batches)
    sums = torch.stack([_text_sums(batch) for batch in batches]).sum(0)
    dist.all_reduce(sums)
    # One divisor for the whole global batch: the loss does not depend on how it was split.
    return [replace(batch, tokens_per_pair=(sums[0] / sums[1]).float()) for batch in batches]


def _text_sums(batch: CompletionBatch) -> torch.Tensor:
    """Returns the number of tokens that pairs learn as text, and the number of pairs, (2,) fp64."""
    completions = _completions(batch, batch.tokens_S, batch.tokens_S)  # log-probabilities are not read
    pairs = torch.ones_like(completions.ranked.margin_N).sum()
    return torch.stack([tokens_of_pairs(completions), pairs]).double()


def kl_sums(model: Transformer, batch: CompletionBatch) -> torch.Tensor:
    """Returns the sum of the log-ratios of mismatched completions, and their number, (2,) fp64."""
    mismatched = batch.mismatched
    assert mismatched is not None, "a batch with mismatched completions"
    assert batch.mismatched_reference_P is not None
    ratio = segment_logprobs(model, mismatched).double().sum() - batch.mismatched_reference_P.double().sum()
    return torch.stack([ratio, torch.ones_like(mismatched.prompt_C).sum().double()])


def reference_point(sums: torch.Tensor) -> torch.Tensor:
    """Returns KTO's estimate of the KL divergence from the reference, at least 0, scalar fp32, from `kl_sums`."""
    return (sums[0] / sums[1].clamp(min=1)).clamp(min=0).float()


# --- held-out rankings ---


@dataclass(frozen=True)
class RankingLogprobs:
    """Log-probabilities of a held-out ranking under the model."""

    logprob_K: np.ndarray  # float32
    tokens_K: np.ndarray  # float32
    prompt_logprob: float
    prompt_tokens: float


@torch.no_grad()
def seen_rankings(
    model: Transformer,
    batches: PlacedBatches,
    device: torch.device,
    data_ranks: dist.ProcessGroup | None,
    alive: Callable[[], None] = lambda: None,
) -> tuple[dict[int, RankingLogprobs], torch.Tensor | None]:
    """Returns each held-out ranking by number, and KTO's reference point over all of them, None without mismatched
    completions (collective).

    Both are the same on every rank; the reference point is a scalar on the host.

    Args:
        data_ranks: the ranks that hold other rankings than this one.
        alive: called after every batch.

    Raises:
        MessageError: another rank has sent something else.
    """
    own_rankings: dict[int, RankingLogprobs] = {}
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    has_mismatches = False
    for batch_on_host, placed in batches:
        batch = batch_on_host.to(device)
        assert isinstance(batch, CompletionBatch)
        logprob_S = segment_logprobs(model, batch).cpu().numpy()
        tokens_S = batch.tokens_S.cpu().numpy()
        for prompt, ranking in enumerate(placed, len(batch.prompt_C)):  # segments of prompts follow the completions
            own_rankings[ranking.document] = RankingLogprobs(
                logprob_K=logprob_S[ranking.places],
                tokens_K=tokens_S[ranking.places],
                prompt_logprob=float(logprob_S[prompt]),
                prompt_tokens=float(tokens_S[prompt]),
            )
        if batch.mismatched:
            has_mismatches = True
            sums += kl_sums(model, batch)
        alive()

    gathered = all_gather(own_rankings, dict[int, RankingLogprobs], data_ranks)
    logprobs_of_ranking = dict(sorted((number, ranking) for part in gathered for number, ranking in part.items()))
    if not has_mismatches:
        return logprobs_of_ranking, None
    dist.all_reduce(sums, group=data_ranks)
    return logprobs_of_ranking, reference_point(sums).cpu()


def held_out_metrics(
    loss: PreferenceLoss,
    rankings: RankingCorpus,
    reference: SplitReference | None,
    logprobs_of_ranking: Mapping[int, RankingLogprobs],
    point: torch.Tensor | None,
    seed: int,
) -> dict[str, float]:
    """Returns `val/loss`, also by source, and `preference/...` over held-out rankings: means over choices.

    Accuracy and tau are over all pairs of the rankings, not only those that the loss compares, and by source and number
    of completions too. Log-probabilities are in nats. There must be at least one ranking.

    Args:
        reference: log-probabilities under the reference; None if the loss has none.
        point: KTO's reference point, see `seen_rankings`.
        seed: of the run; draws the pairs that the loss compares.
    """

    def completions(numbers: Sequence[int]) -> Completions:
        """Returns the completions of the rankings `numbers`, with the judgements for the loss, on the host."""
        chosen = [logprobs_of_ranking[number] for number in numbers]
        sizes = [len(ranking.logprob_K) for ranking in chosen]
        placed = [
            PlacedRanking(number, np.arange(end - size, end))
            for number, size, end in zip(numbers, sizes, np.cumsum(sizes).tolist(), strict=True)
        ]

        # Held-out rankings have no label noise: the loss is measured on what people said.
        lessons = [lesson(rankings.arrays(number), loss.settings.lesson, 0.0, seed, number) for number in numbers]
        reference_parts = [np.zeros(0)]
        if reference:
            reference_parts = [reference.logprob[rankings.completion_slice(number)] for number in numbers]

        return Completions(
            logprob_C=torch.from_numpy(np.concatenate([ranking.logprob_K for ranking in chosen])),
            reference_C=torch.from_numpy(np.concatenate(reference_parts).astype(np.float32)),
            tokens_C=torch.from_numpy(np.concatenate([ranking.tokens_K for ranking in chosen])),
            prompt_C=torch.repeat_interleave(torch.tensor(sizes)),
            prompt_logprob_P=torch.tensor([ranking.prompt_logprob for ranking in chosen]),
            prompt_tokens_P=torch.tensor([ranking.prompt_tokens for ranking in chosen]),
            ranked=ranked_positions(placed, lessons),
        )

    def means(part: Completions) -> dict[str, float]:
        tokens_per_pair = tokens_of_pairs(part) / max(len(part.ranked.margin_N), 1)
        sums = loss(part, GlobalValues(point, tokens_per_pair))
        named = {"loss": sums.total, **sums.metrics}
        counts = {name: float(sums.metric_counts.get(name, sums.count)) for name in named}
        return {name: float(total) / counts[name] for name, total in named.items() if counts[name]}

    every_completion = completions(list(logprobs_of_ranking))
    figures = means(every_completion)
    metrics = {"val/loss": figures.pop("loss")} | {f"preference/{name}": mean for name, mean in figures.items()}
    for source in sorted({rankings.source(number) for number in logprobs_of_ranking}):
        numbers = [number for number in logprobs_of_ranking if rankings.source(number) == source]
        metrics[f"val/loss_{source}"] = means(completions(numbers))["loss"]

    reward_C = loss.rewards(every_completion).numpy()
    ends = np.cumsum([len(ranking.logprob_K) for ranking in logprobs_of_ranking.values()])
    scores = dict(zip(logprobs_of_ranking, np.split(reward_C, ends[:-1]), strict=True))
    return metrics | agreement_figures(scored_rankings(rankings, scores), "preference", ("accuracy", "kendall_tau"))
