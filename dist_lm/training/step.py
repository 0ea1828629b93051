"""One optimizer step over the micro-batches of a global batch: accumulate gradients, then update.

An objective returns a sum and a count. Gradients of the sums are added over micro-batches and ranks, then divided once
by the global count, so the step does not depend on how the global batch was split.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from dist_lm.data.batch import Batch
from dist_lm.model.size import group_of
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.sharding import set_reduction
from dist_lm.parallel.values import keep_trained_rows, reduce_partial_gradients, shard_of, squared_norms
from dist_lm.training.heartbeat import StopRequest
from dist_lm.training.objective import Objective
from dist_lm.training.optimizer import ShardedAdamW
from dist_lm.training.step_meter import Laps


@dataclass(frozen=True)
class Sums:
    """Sums over this rank's micro-batches; their gradients are in the model, reduced over ranks but not divided."""

    total_and_count: torch.Tensor  # (2,) float64: loss total, count
    metrics: dict[str, torch.Tensor]  # sums of `LossSum.metrics`
    metric_counts: dict[str, torch.Tensor]  # sums of `LossSum.metric_counts`


@dataclass(frozen=True)
class StepResult:
    """Outcome of a step, the same on every rank."""

    loss: float  # mean over the counted tokens of the global batch
    count: float  # counted tokens of the global batch
    grad_norm: float  # global L2 norm before clipping
    applied: bool  # False: gradients were not finite and the parameters did not change
    stop_requested: bool  # at least one rank was asked to stop
    metrics: dict[str, float]  # metrics of the objective, divided by their counts
    tokens: int  # tokens of all ranks, as they reported them
    grad_norms: Mapping[str, float]  # `grad_norm` by group of parameters; empty without laps


def accumulate_gradients(
    model: Transformer,
    objective: Objective,
    micro_batches: Sequence[Batch],
    reduce_every_micro_batch: bool = False,
    laps: Laps | None = None,
) -> Sums:
    """Runs the forward and backward pass of every micro-batch; the last one reduces gradients over ranks (collective).

    Gradients are added to those that the model has. Sums stay on the device: nothing waits for a GPU.

    Args:
        micro_batches: at least one, on the device of the model; as many on every rank.
        reduce_every_micro_batch: reduce in every micro-batch, which sends more and holds less.
        laps: gets `forward`, `backward` and `communication`, the all-reduces of this file. What FSDP sends during a
            pass counts as `forward` or `backward`.
    """
    if laps:
        laps.start()
    total_and_count = torch.zeros(2, dtype=torch.float64, device=micro_batches[0].tokens_BT.device)
    metrics: dict[str, torch.Tensor] = {}
    metric_counts: dict[str, torch.Tensor] = {}

    for index, micro_batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        # FSDP sums gradients over ranks with the last micro-batch only, unless memory is short. It does not average
        # them: `parallel.sharding` switches that off, and `update` divides by the global count.
        set_reduction(model, reduce=reduce_every_micro_batch or is_last, last=is_last)

        loss = objective(model, micro_batch)
        _lap(laps, "forward")
        loss.total.backward()

        # Sums stay on the device: reading them here would make a GPU wait in every micro-batch.
        total_and_count += torch.stack([loss.total.detach(), loss.count]).double()
        _add_to(metrics, loss.metrics)
        _add_to(metric_counts, loss.metric_counts)
        _lap(laps, "backward")

    # With tensor parallelism, each rank has only a part of the gradients of replicated parameters: add the parts up.
    reduce_partial_gradients(model)
    keep_trained_rows(model)
    _lap(laps, "communication")
    return Sums(total_and_count, metrics, metric_counts)


def _add_to(sums: dict[str, torch.Tensor], terms: Mapping[str, torch.Tensor]) -> None:
    for name, term in terms.items():
        sums[name] = sums.get(name, torch.zeros_like(term)) + term


def update(
    model: nn.Module,
    optimizer: ShardedAdamW,
    sums: Sums,
    *,
    grad_clip: float,
    adds_sums: bool,
    stop: StopRequest,
    tokens: int = 0,
    laps: Laps | None = None,
) -> StepResult:
    """Divides the accumulated gradients by the global count (at least 1), clips them, and steps the optimizer
    (collective).

    Gradients that are not finite leave parameters and moments unchanged. In any case the gradients are freed. The host
    waits for the device once, at the end; with parameters in host memory also before the optimizer.

    Args:
        sums: as returned by `accumulate_gradients`, on every rank with the same names of metrics.
        grad_clip: largest L2 norm of all gradients after division; 0: no clipping.
        adds_sums: whether the sums of this rank count in the all-reduce. Ranks of tp and cp see the same data, so they
            count on rank 0 of these axes alone.
        stop: read after the backward pass, so that a request made during this step ends the run after it, not after the
            next one (the first step may compile for minutes).
        tokens: tokens of this rank's micro-batches, for `StepResult.tokens`.
        laps: gets `communication` and `optimizer`; given on every rank or on none.
    """
    # Only a timed step reports the norm of each group; one norm over all gradients takes fewer kernels.
    if laps:
        groups = gradients_by_group(model)
    else:
        groups = {"": [parameter.grad for parameter in model.parameters() if parameter.grad is not None]}

    # Everything that ranks must agree on goes into one message. `torch.full` fills it on the device: a copy from the
    # host would wait for the GPU.
    device = sums.total_and_count.device
    stop_1 = torch.full((1,), float(stop.requested), dtype=torch.float64, device=device)
    tokens_1 = torch.full((1,), tokens, dtype=torch.float64, device=device)
    metric_names, count_names = sorted(sums.metrics), sorted(sums.metric_counts)
    metric_sums = [sums.metrics[name] for name in metric_names] + [sums.metric_counts[name] for name in count_names]
    batch_sums = torch.cat([tokens_1, sums.total_and_count, *(metric.double().reshape(1) for metric in metric_sums)])
    if not adds_sums:
        batch_sums = torch.zeros_like(batch_sums)
    # Each shard of a gradient counts on one rank, so the sums over ranks are the squared norms of whole gradients.
    message = torch.cat([stop_1, squared_norms(list(groups.values())).to(device), batch_sums])
    _lap(laps, "optimizer")
    dist.all_reduce(message)
    _lap(laps, "communication")

    # Clipping, and whether to step at all, are decided on the device: if the host read the norm, the device would have
    # nothing to do until the optimizer's kernels come.
    gradients = [shard_of(gradient) for group in groups.values() for gradient in group]
    squares_G = message[1 : 1 + len(groups)]
    count_1 = message[1 + len(groups) + 2]
    clipping = clipping_of(squares_G, count_1, grad_clip)
    torch._foreach_mul_(gradients, clipping.factor.to(gradients[0]))
    optimizer.step_unless(clipping.is_skipped)
    # Free the gradients even if the step was skipped: the next step must not add to them.
    optimizer.zero_grad(set_to_none=True)
    _lap(laps, "optimizer")

    # This is the only time that a step waits for the GPU.
    grad_norm, *sums_of_ranks = torch.cat([clipping.grad_norm.reshape(1), message]).tolist()
    numbers = iter(sums_of_ranks)
    n_stopping = next(numbers)
    group_squares = {name: next(numbers) for name in groups}
    all_tokens, total, count = next(numbers), next(numbers), next(numbers)
    metric_totals = {name: next(numbers) for name in metric_names}
    metric_counts = {name: next(numbers) for name in count_names}
    metrics = {name: metric_totals[name] / max(metric_counts.get(name, count), 1.0) for name in metric_names}

    divisor = max(count, 1.0)
    grad_norms = {}
    if laps:
        grad_norms = {name: math.sqrt(square) / divisor for name, square in group_squares.items()}
    return StepResult(
        loss=total / divisor,
        count=count,
        grad_norm=grad_norm,
        applied=math.isfinite(grad_norm),
        stop_requested=n_stopping > 0,
        metrics=metrics,
        tokens=int(all_tokens),
        grad_norms=grad_norms,
    )


@dataclass(frozen=True)
class Clipping:
    """The clipping of a step's gradients, or that the step is skipped, as tensors on the device."""

    grad_norm: torch.Tensor  # float64 scalar: global L2 norm before clipping
    factor: torch.Tensor  # float64 scalar: gradients of the sums times this are clipped gradients of the mean
    is_skipped: torch.Tensor  # bool scalar: the norm is not finite


def clipping_of(squares_G: torch.Tensor, count: torch.Tensor, grad_clip: float) -> Clipping:
    """Returns the clipping of gradients whose squared L2 norms by group, before division, are `squares_G` (float64).

    Args:
        count: float64 scalar; the gradients are divided by it, but at least by 1.
        grad_clip: largest L2 norm after division; 0: no clipping.
    """
    # One addition after the other: the order of a sum over a tensor depends on the device.
    square = functools.reduce(torch.add, squares_G.unbind())
    divisor = count.clamp(min=1.0)
    grad_norm = square.sqrt() / divisor

    clip = torch.ones_like(grad_norm)
    if grad_clip:
        clip = torch.where(grad_norm > grad_clip, torch.full_like(grad_norm, grad_clip) / grad_norm, clip)
    # Dividing and clipping are one pass over the gradients.
    return Clipping(grad_norm, clip / divisor, grad_norm.isfinite().logical_not())


def gradients_by_group(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Returns the gradients of this rank by group of parameters (`group_of`), those themselves and not copies; every
    rank has the same groups: each step uses all parameters."""
    groups: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            groups.setdefault(group_of(name), []).append(parameter.grad)
    return groups


def _lap(laps: Laps | None, name: str) -> None:
    if laps:
        laps.lap(name)
