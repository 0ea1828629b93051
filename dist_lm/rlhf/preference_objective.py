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
from dist_lm.data.rankings.stream import PlacedRanking, lesson, ranked_places
from dist_lm.model.transformer import Transformer
from dist_lm.rlhf.preference import Completions, GlobalValues, PreferenceLoss, tokens_of_pairs
from dist_lm.rlhf.reward_model import agreement_figures, beside_verdicts
from dist_lm.training.objective import LossSum, Objective, Prepare

PlacedBatches = Iterable[tuple[Batch, Sequence[PlacedRanking]]]


def segment_logprobs(model: Transformer, batch: CompletionBatch) -> torch.Tensor:
    """Log-probability of each completion, then of each prompt, summed over its targets, fp32, (S,); 0 for prompts
    without targets."""
    losses_BT = model.token_losses(batch)
    sums = losses_BT.new_zeros(len(batch.tokens_S) + 1)
    return -sums.index_add(0, batch.segment_BT.flatten(), losses_BT.flatten())[1:]


def completions_of(model: Transformer, batch: CompletionBatch) -> Completions:
    """The completions of a batch under the model."""
    assert batch.ranked is not None, "a batch with verdicts"
    logprob_S, n = segment_logprobs(model, batch), len(batch.prompt_C)
    return _completions(batch, logprob_S[:n], logprob_S[n:])


def _completions(batch: CompletionBatch, logprob_C: torch.Tensor, prompt_logprob_P: torch.Tensor) -> Completions:
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
    """Summed losses of the choices of a batch; metrics under `train/`."""

    def objective(model: Transformer, batch: Batch) -> LossSum:
        assert isinstance(batch, CompletionBatch)
        found = loss(completions_of(model, batch), GlobalValues(batch.reference_point, batch.tokens_per_pair))
        return replace(found, metrics={f"train/{name}": value for name, value in found.metrics.items()})

    return objective


def preparation(loss: PreferenceLoss) -> Prepare | None:
    """What must be known of the global batch before the passes of a step; None: nothing."""
    if loss.settings.has_reference_point:
        return _with_reference_point
    return _with_tokens_per_pair if loss.settings.learns_text else None


@torch.no_grad()
def _with_reference_point(model: Transformer, micro_batches: Sequence[Batch]) -> list[Batch]:
    """The batches with KTO's reference point of the global batch (collective)."""
    batches = cast(Sequence[CompletionBatch], micro_batches)
    sums = torch.stack([kl_sums(model, batch) for batch in batches]).sum(0)
    dist.all_reduce(sums)  # ranks that share a batch count it once each: a ratio does not see that
    return [replace(batch, reference_point=reference_point(sums), mismatched=None) for batch in batches]


def _with_tokens_per_pair(model: Transformer, micro_batches: Sequence[Batch]) -> list[Batch]:
    """The batches with the mean number of tokens that a pair of the global batch learns as text (collective)."""
    batches = cast(Sequence[CompletionBatch], micro_batches)
    sums = torch.stack([_text_sums(batch) for batch in batches]).sum(0)
    dist.all_reduce(sums)
    return [replace(batch, tokens_per_pair=(sums[0] / sums[1]).float()) for batch in batches]


def _text_sums(batch: CompletionBatch) -> torch.Tensor:
    """Tokens that pairs learn as text, and pairs, (2,) fp64."""
    found = _completions(batch, batch.tokens_S, batch.tokens_S)
    pairs = torch.ones_like(found.ranked.margin_N).sum()
    return torch.stack([tokens_of_pairs(found), pairs]).double()


def kl_sums(model: Transformer, batch: CompletionBatch) -> torch.Tensor:
    """Log-ratios of mismatched completions, summed, and their number, (2,) fp64."""
    others = batch.mismatched
    assert others is not None, "a batch with mismatched completions"
    assert batch.mismatched_reference_P is not None
    ratio = segment_logprobs(model, others).double().sum() - batch.mismatched_reference_P.double().sum()
    return torch.stack([ratio, torch.ones_like(others.prompt_C).sum().double()])


def reference_point(sums: torch.Tensor) -> torch.Tensor:
    """KTO's estimate of the KL divergence from the reference, at least 0, scalar fp32: see `kl_sums`."""
    return (sums[0] / sums[1].clamp(min=1)).clamp(min=0).float()


# --- held-out rankings ---


@dataclass(frozen=True)
class SeenRanking:
    """A held-out ranking under the model."""

    logprob_K: np.ndarray  # float32
    tokens_K: np.ndarray  # float32
    prompt_logprob: float
    prompt_tokens: float


@torch.no_grad()
def seen_rankings(
    model: Transformer,
    batches: PlacedBatches,
    device: torch.device,
    group: dist.ProcessGroup | None,
    alive: Callable[[], None] = lambda: None,
) -> tuple[dict[int, SeenRanking], torch.Tensor | None]:
    """Each held-out ranking by number, and KTO's reference point over all of them, the same on every rank (collective).

    Args:
        group: the ranks that hold other rankings than this one.
        alive: called after every batch.
    """
    own: dict[int, SeenRanking] = {}
    sums = None
    for made, placed in batches:
        batch = made.to(device)
        assert isinstance(batch, CompletionBatch)
        n, logprob_S = len(batch.prompt_C), segment_logprobs(model, batch).cpu().numpy()
        tokens_S = batch.tokens_S.cpu().numpy()
        for number, one in enumerate(placed):
            of_prompt = float(logprob_S[n + number]), float(tokens_S[n + number])
            own[one.document] = SeenRanking(logprob_S[one.places], tokens_S[one.places], *of_prompt)
        if batch.mismatched:
            found = kl_sums(model, batch)
            sums = found if sums is None else sums + found
        alive()
    gathered: list[dict[int, SeenRanking]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(gathered, own, group=group)
    if sums is not None:
        dist.all_reduce(sums, group=group)
    everything = {number: one for part in gathered for number, one in part.items()}
    return dict(sorted(everything.items())), None if sums is None else reference_point(sums).cpu()


def held_out_metrics(
    loss: PreferenceLoss,
    rankings: RankingCorpus,
    reference: SplitReference | None,
    seen: Mapping[int, SeenRanking],
    point: torch.Tensor | None,
    seed: int,
) -> dict[str, float]:
    """`val/loss` and `preference/...` over held-out rankings; accuracy and tau over all their pairs, not only those
    that the loss compares, and by source and number of completions too.

    Args:
        seed: of the run; draws the pairs that the loss compares.
    """

    def completions(numbers: Sequence[int]) -> Completions:
        ones = [seen[number] for number in numbers]
        ends = np.cumsum([len(one.logprob_K) for one in ones])
        placed = [
            PlacedRanking(number, np.arange(end - len(one.logprob_K), end))
            for number, one, end in zip(numbers, ones, ends.tolist(), strict=True)
        ]
        way = loss.settings.lesson
        verdicts = [lesson(rankings.verdict(number), way, 0.0, seed, number) for number in numbers]
        own = [reference.logprob[rankings.places(number)] for number in numbers] if reference else [np.zeros(0)]
        return Completions(
            logprob_C=torch.from_numpy(np.concatenate([one.logprob_K for one in ones])),
            reference_C=torch.from_numpy(np.concatenate(own).astype(np.float32)),
            tokens_C=torch.from_numpy(np.concatenate([one.tokens_K for one in ones])),
            prompt_C=torch.repeat_interleave(torch.tensor([len(one.logprob_K) for one in ones])),
            prompt_logprob_P=torch.tensor([one.prompt_logprob for one in ones]),
            prompt_tokens_P=torch.tensor([one.prompt_tokens for one in ones]),
            ranked=ranked_places(placed, verdicts),
        )

    def means(found: Completions) -> dict[str, float]:
        per_pair = tokens_of_pairs(found) / max(len(found.ranked.margin_N), 1)
        done = loss(found, GlobalValues(point, per_pair))
        return {name: float(value) / float(done.count) for name, value in {"loss": done.total, **done.metrics}.items()}

    everything = completions(list(seen))
    reward_C, ends = loss.rewards(everything).numpy(), np.cumsum([len(one.logprob_K) for one in seen.values()])
    scores = dict(zip(seen, np.split(reward_C, ends[:-1]), strict=True))
    found = means(everything)
    metrics = {"val/loss": found.pop("loss")} | {f"preference/{name}": value for name, value in found.items()}
    for source in sorted({rankings.source(number) for number in seen}):
        part = [number for number in seen if rankings.source(number) == source]
        metrics[f"val/loss_{source}"] = means(completions(part))["loss"]
    return metrics | agreement_figures(beside_verdicts(rankings, scores), "preference", ("accuracy", "kendall_tau"))
