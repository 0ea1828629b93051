"""One optimizer step over the micro-batches of a global batch.

Every objective returns a sum and a count. Gradients of the sums are added over micro-batches and ranks, then divided
once by the global count: the result does not depend on how the batch was cut.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from dist_lm.data.batch import Batch
from dist_lm.parallel.gradients import reduce_partial_gradients, squared_norms
from dist_lm.parallel.padding import shard_of
from dist_lm.training.laps import Laps
from dist_lm.training.objective import LossModel, Objective
from dist_lm.training.parameter_groups import group_of
from dist_lm.training.stop import StopRequest


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on every rank."""

    loss: float  # mean over the counted tokens of the global batch
    count: float  # counted tokens of the global batch
    grad_norm: float  # global L2 norm before clipping
    applied: bool  # False: gradients were not finite and the parameters are as before
    stop_requested: bool  # some rank was asked to stop
    metrics: dict[str, float]  # the objective's own, divided by the count
    tokens: int  # what the ranks said of their micro-batches, added up
    grad_norms: Mapping[str, float]  # as `grad_norm`, by group of parameters; empty where nothing is timed


def accumulate_gradients(
    model: nn.Module,
    bound: LossModel,
    objective: Objective,
    micro_batches: Sequence[Batch],
    reduce_every_micro_batch: bool = False,
    laps: Laps | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Forward and backward of every micro-batch; gradients are reduced over ranks in the last one.

    Args:
        bound: `model` as the objective sees it.
        reduce_every_micro_batch: reduce in all of them: more is sent, and less is held.

    Returns:
        this rank's sums: ((2,) float64 with loss total and count, the objective's metrics).
    """
    sums = torch.zeros(2, dtype=torch.float64, device=micro_batches[0].tokens_BT.device)
    metrics: dict[str, torch.Tensor] = {}
    for index, batch in enumerate(micro_batches):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(reduce_every_micro_batch or index == len(micro_batches) - 1)
        loss = objective(bound, batch)
        _lap(laps, "forward")
        loss.total.backward()
        sums += torch.stack([loss.total.detach(), loss.count]).double()
        for name, value in loss.metrics.items():
            metrics[name] = metrics.get(name, torch.zeros_like(value)) + value
        _lap(laps, "backward")
    reduce_partial_gradients(model)
    _lap(laps, "communication")
    return sums, metrics


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    bound: LossModel,
    objective: Objective,
    micro_batches: Sequence[Batch],
    *,
    grad_clip: float,
    counts: bool,
    stop: StopRequest,
    reduce_every_micro_batch: bool = False,
    tokens: int = 0,
    laps: Laps | None = None,
) -> StepResult:
    """Accumulate, reduce, clip, step (collective). Non-finite gradients leave parameters and moments untouched.

    Args:
        counts: whether this rank's sums are added up: on one of the ranks that see the same data.
        stop: looked at after the backward, so that a long step (the first may compile) is not followed by another.
        tokens: of this rank's micro-batches, for the record.
        laps: told of `forward`, `backward`, `communication` (what is waited for here; those in the passes are theirs)
            and `optimizer`. Given on every rank or on none.
    """
    if laps:
        laps.start()
    sums, own_metrics = accumulate_gradients(
        model, bound, objective, micro_batches, reduce_every_micro_batch, laps=laps
    )
    names = sorted(own_metrics)
    groups = gradients_by_group(model) if laps else {"": _gradients(model)}
    squares = squared_norms(list(groups.values())).to(sums.device)
    said = torch.tensor([tokens], dtype=torch.float64, device=sums.device)
    own = torch.cat([said, sums, *(own_metrics[name].double().reshape(1) for name in names)])
    stops = torch.tensor([float(stop.requested)], dtype=torch.float64, device=sums.device)
    # all that ranks have to agree on, in one message
    shared = torch.cat([stops, squares, own if counts else torch.zeros_like(own)])
    _lap(laps, "optimizer")
    dist.all_reduce(shared)
    _lap(laps, "communication")
    stopping, *values = shared.tolist()
    group_squares, (all_tokens, total, count, *metric_sums) = values[: len(groups)], values[len(groups) :]
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
        metrics={name: value / max(count, 1.0) for name, value in zip(names, metric_sums, strict=True)},
        tokens=int(all_tokens),
        grad_norms=norms if laps else {},
    )


def _gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def gradients_by_group(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """The gradients that there are, by group of parameters: the same groups on every rank, as all parameters take part
    in every step."""
    groups: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            groups.setdefault(group_of(name), []).append(parameter.grad)
    return groups


def _lap(laps: Laps | None, name: str) -> None:
    if laps:
        laps.lap(name)
