"""AdamW, with decay on matrices only, or Muon for the matrices inside blocks; their state by parameter name."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.adamw import adamw

from dist_lm.parallel.padding import shard_of
from dist_lm.training.muon import orthogonal_steps
from dist_lm.training.parameter_groups import is_matrix

MOMENTS = ("exp_avg", "exp_avg_sq")


def is_decayed(name: str) -> bool:
    """Whether weight decay applies to the parameter: not to norms, gains, biases and embeddings."""
    return not any(part in name for part in ("norm", "gain", "bias", "embed"))


class AdamWSettings(Protocol):
    """The part of a stage's configuration that its optimizer is made by."""

    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def beta1(self) -> float: ...
    @property
    def beta2(self) -> float: ...
    @property
    def adam_eps(self) -> float: ...


class MuonSettings(Protocol):
    """How the matrices inside blocks are stepped."""

    @property
    def lr(self) -> float: ...
    @property
    def momentum(self) -> float: ...


class ShardedAdamW(torch.optim.AdamW):
    """AdamW, or Muon for a group with a `momentum`, that steps on this rank's shards.

    It works element by element, so they are all there is to see; DTensors would cost a decision about the sharding of
    every parameter: seconds at the first step of a large model.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step on the parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            if "momentum" in group:
                self._step_matrices(group)
                continue
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            states = [self.state[parameter] for parameter in parameters]
            beta1, beta2 = group["betas"]
            adamw(
                [shard_of(parameter) for parameter in parameters],
                [shard_of(parameter.grad) for parameter in parameters],
                [shard_of(state["exp_avg"]) for state in states],
                [shard_of(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _step_matrices(self, group: Mapping[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        directions = []
        for parameter in parameters:
            state, gradient = self.state[parameter], shard_of(parameter.grad)
            state["step"] += 1
            average = shard_of(state["exp_avg"]).lerp_(gradient, 1 - group["momentum"])
            directions.append(gradient.lerp(average, group["momentum"]))  # Nesterov's look ahead
        decay = group["lr"] / group["lr_ratio"] * group["weight_decay"]  # as much as AdamW's
        for parameter, step in orthogonal_steps(parameters, directions):
            shard_of(parameter).mul_(1 - decay).sub_(step, alpha=group["lr"])


def build_optimizer(model: nn.Module, settings: AdamWSettings, muon: MuonSettings | None = None) -> ShardedAdamW:
    """AdamW (Loshchilov & Hutter 2019) whose moments exist from the start.

    They are created here and not at the first step, so that a checkpoint always has the same keys.

    Args:
        muon: how matrices inside blocks are stepped; None, or a rate of 0: as all others.
    """
    orthogonal = muon is not None and muon.lr > 0
    named = list(model.named_parameters())
    matrices = [p for n, p in named if orthogonal and is_matrix(n)]
    others = [(n, p) for n, p in named if not (orthogonal and is_matrix(n))]
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in others if is_decayed(n)], "weight_decay": settings.weight_decay},
        {"params": [p for n, p in others if not is_decayed(n)], "weight_decay": 0.0},
    ]
    if muon is not None and matrices:
        ratio = muon.lr / settings.lr
        groups.append(
            {"params": matrices, "weight_decay": settings.weight_decay, "momentum": muon.momentum, "lr_ratio": ratio}
        )
    optimizer = ShardedAdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.adam_eps,
    )
    for _, parameter in named:
        # a fused step counts on the parameter's own device
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        moments = MOMENTS[:1] if any(parameter is matrix for matrix in matrices) else MOMENTS
        optimizer.state[parameter] = {"step": step} | {key: torch.zeros_like(parameter) for key in moments}
    return optimizer


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the optimizer as (`PARAMETER.exp_avg`, tensor): what a checkpoint holds of it."""
    for name, parameter in model.named_parameters():
        assert parameter in optimizer.state, f"{name} is not the tensor that the optimizer was built with"
        for key, value in optimizer.state[parameter].items():
            yield f"{name}.{key}", value


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` for the next step, and for Muon what is in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)
