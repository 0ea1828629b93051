"""One optimizer step over the micro-batches of a global batch: accumulate gradients, then update.

An objective returns a sum and a count. Gradients of the sums are added over micro-batches and ranks, then divided once
by the global count, so the result does not depend on how the batch was cut.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from dist_lm.data.batch import Batch
from dist_lm.model.size import group_of
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.sharding import accumulate
from dist_lm.parallel.values import reduce_partial_gradients, shard_of, squared_norms
from dist_lm.training.heartbeat import StopRequest
from dist_lm.training.objective import Objective
from dist_lm.training.step_meter import Laps


@dataclass(frozen=True)
class Sums:
    """Sums over this rank's micro-batches; their gradients are in the model, reduced over ranks but not divided."""

    total_count: torch.Tensor  # (2,) float64: loss total, count
    metrics: dict[str, torch.Tensor]  # of the objective
    counts: dict[str, torch.Tensor]  # of the metrics that have their own count


@dataclass(frozen=True)
class StepResult:
    """Outcome of a step, the same on every rank."""

    loss: float  # mean over the counted tokens of the global batch
    count: float  # counted tokens of the global batch
    grad_norm: float  # global L2 norm before clipping
    applied: bool  # False: gradients were not finite and the parameters did not change
    stop_requested: bool  # some rank was asked to stop
    metrics: dict[str, float]  # of the objective, divided by their counts
    tokens: int  # tokens of all ranks, as they reported them
    grad_norms: Mapping[str, float]  # `grad_norm` by group of parameters; empty without laps


def accumulate_gradients(
    model: Transformer,
    objective: Objective,
    micro_batches: Sequence[Batch],
    reduce_every_micro_batch: bool = False,
    laps: Laps | None = None,
) -> Sums:
    """Forward and backward pass of every micro-batch; the last one reduces gradients over ranks (collective).

    Args:
        reduce_every_micro_batch: reduce in every micro-batch, which sends more and holds less.
        laps: gets `forward`, `backward` and `communication` (only the waiting here: messages inside the passes count as
            the passes).
    """
    if laps:
        laps.start()
    sums = torch.zeros(2, dtype=torch.float64, device=micro_batches[0].tokens_BT.device)
    metrics: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}
    for index, batch in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        accumulate(model, reduce=reduce_every_micro_batch or last, last=last)
        loss = objective(model, batch)
        _lap(laps, "forward")
        loss.total.backward()
        sums += torch.stack([loss.total.detach(), loss.count]).double()
        for into, values in ((metrics, loss.metrics), (counts, loss.counts)):
            for name, value in values.items():
                into[name] = into.get(name, torch.zeros_like(value)) + value
        _lap(laps, "backward")
    reduce_partial_gradients(model)
    _lap(laps, "communication")
    return Sums(sums, metrics, counts)


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sums: Sums,
    *,
    grad_clip: float,
    counts: bool,
    stop: StopRequest,
    tokens: int = 0,
    laps: Laps | None = None,
) -> StepResult:
    """Divide the accumulated gradients, clip them, and step the optimizer (collective).

    Gradients that are not finite leave parameters and moments unchanged.

    Args:
        counts: whether this rank's sums count: True on one of the ranks that see the same data.
        stop: read here, after the backward pass, so that no step starts after a long one (the first may compile).
        tokens: tokens of this rank's micro-batches, for `StepResult.tokens`.
        laps: gets `communication` and `optimizer`; given on every rank or on none.
    """
    names, counted = sorted(sums.metrics), sorted(sums.counts)
    groups = gradients_by_group(model) if laps else {"": _gradients(model)}
    device = sums.total_count.device
    squares = squared_norms(list(groups.values())).to(device)
    said = torch.full((1,), tokens, dtype=torch.float64, device=device)  # a copy from the host would wait for the GPU
    reported = [*(sums.metrics[name] for name in names), *(sums.counts[name] for name in counted)]
    own = torch.cat([said, sums.total_count, *(value.double().reshape(1) for value in reported)])
    stops = torch.full((1,), float(stop.requested), dtype=torch.float64, device=device)
    # everything that ranks must agree on, in one message
    shared = torch.cat([stops, squares, own if counts else torch.zeros_like(own)])
    _lap(laps, "optimizer")
    dist.all_reduce(shared)
    _lap(laps, "communication")
    stopping, *values = shared.tolist()
    group_squares, (all_tokens, total, count, *metric_sums) = values[: len(groups)], values[len(groups) :]
    own_counts = dict(zip(counted, metric_sums[len(names) :], strict=True))
    norm = math.sqrt(sum(group_squares)) / max(count, 1.0)
    applied = math.isfinite(norm)
    if applied:
        clip = grad_clip / norm if grad_clip and norm > grad_clip else 1.0
        gradients = [shard_of(gradient) for part in groups.values() for gradient in part]
        torch._foreach_mul_(gradients, clip / max(count, 1.0))
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    _lap(laps, "optimizer")
    norms = {name: math.sqrt(square) / max(count, 1.0) for name, square in zip(groups, group_squares, strict=True)}
    return StepResult(
        loss=total / max(count, 1.0),
        count=count,
        grad_norm=norm,
        applied=applied,
        stop_requested=stopping > 0,
        metrics={name: metric_sums[i] / max(own_counts.get(name, count), 1.0) for i, name in enumerate(names)},
        tokens=int(all_tokens),
        grad_norms=norms if laps else {},
    )


def _gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def gradients_by_group(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Gradients by group of parameters; every rank has the same groups, as every step uses all parameters."""
    groups: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            groups.setdefault(group_of(name), []).append(parameter.grad)
    return groups


def _lap(laps: Laps | None, name: str) -> None:
    if laps:
        laps.lap(name)
