"""The optimizer and its schedule: AdamW with decay on matrices only, Muon for the matrices inside blocks if asked.

    rate of a group = stage.lr x stage.rates.GROUP x (factor of the width) x (factor of Muon's scale)

The factor of the width keeps the change of every activation per step independent of `d_model`, so the best rate does
too. It is 1 without `model.base_width`; otherwise, with m = d_model / base_width:

| group | AdamW (Yang & Hu 2022, table 3) | Muon, scale unit | Muon, scale adamw |
| --- | --- | --- | --- |
| embedding, vectors | 1 | | |
| head | 1 / m | | |
| matrices of the feed-forward network | 1 / m | 1 | m^-1/2 |
| matrices of attention | 1 / m | m^-1/2 | 1 / m |

Muon's factors follow from the spectral condition (Yang, Simon & Bernstein 2023, condition 1): the spectral norm of an
update must be about sqrt(outputs / inputs). The matrices of attention are those of single heads, whose width is the
same at every d_model, so this norm falls with the root of d_model.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from dist_lm.config.model import ModelConfig
from dist_lm.config.optimizer import OptimizerConfig
from dist_lm.config.rlhf import RlhfConfig
from dist_lm.config.stage import ADAMW, COSINE, LINEAR, MuonConfig, TrainerGroup
from dist_lm.model.size import ADAPTERS, is_matrix, neuron_shape, parameter_shapes
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.values import shard_of
from dist_lm.training.muon import Variance, device_of_whole, orthogonal_steps

MOMENTS = ("exp_avg", "exp_avg_sq")
VARIANCE = "neuron_sq"  # state of a matrix with `stage.muon.variance_beta`, whole and of logical shape on every rank
RMS_OF_ADAMW = 0.2  # of the entries of an update of AdamW (Liu et al. 2025, section 2.2)
EMA = "ema"  # state of a parameter: its exponential average over the steps (`averages.py`)


def is_decayed(name: str) -> bool:
    """Whether weight decay applies to the parameter: not to norms, biases, embeddings and scalars."""
    return not any(part in name for part in ("norm", "bias", "embed", "value_mix"))


class ShardedAdamW(torch.optim.AdamW):
    """AdamW, and Muon for groups with a `momentum`, on the shards of this rank.

    AdamW works element by element, so shards are enough. With DTensors, torch would decide on the sharding of every
    parameter, which takes seconds at the first step of a large model.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Step the parameters that have a gradient."""
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
            directions.append(gradient.lerp(average, group["momentum"]))  # Nesterov
        decay = group["lr"] / group["lr_ratio"] * group["weight_decay"]  # the decay of `stage.lr`
        variances = [
            Variance(state[VARIANCE], group["variance_beta"]) if VARIANCE in state else None
            for state in (self.state[parameter] for parameter in parameters)
        ]
        for parameter, step in orthogonal_steps(parameters, directions, variances):
            shard_of(parameter).mul_(1 - decay).sub_(step, alpha=group["lr"])


def build_optimizer(
    model: Transformer, settings: OptimizerConfig | RlhfConfig, muon: MuonConfig | None = None
) -> ShardedAdamW:
    """AdamW (Loshchilov & Hutter 2019) for the parameters that have gradients.

    Moments exist from the start, so that every checkpoint has the same keys.

    With stage.ema_decay the state of each parameter also holds its average, so the average is sharded, padded and saved
    as the moments are.

    Args:
        muon: for the matrices inside blocks; None or a rate of 0: AdamW for all parameters.
    """
    orthogonal = muon is not None and muon.is_on
    averaged = isinstance(settings, TrainerGroup) and settings.ema_decay > 0
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = {name for name, _ in named if orthogonal and is_matrix(name)}
    optimizer = ShardedAdamW(
        _groups(model, named, settings, muon if matrices else None),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.adam_eps,
    )
    normalised = muon is not None and muon.variance_beta > 0
    shapes = parameter_shapes(model.config) if normalised else {}
    for name, parameter in named:
        # the fused kernel needs the step on the device of the parameter
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        moments = MOMENTS[:1] if name in matrices else MOMENTS
        kept = (*moments, EMA) if averaged else moments
        optimizer.state[parameter] = {"step": step} | {key: torch.zeros_like(parameter) for key in kept}
        if normalised and name in matrices:
            optimizer.state[parameter][VARIANCE] = torch.zeros(
                neuron_shape(name, shapes[name]), dtype=parameter.dtype, device=device_of_whole(parameter)
            )
    return optimizer


def _groups(
    model: Transformer,
    named: Sequence[tuple[str, nn.Parameter]],
    settings: OptimizerConfig | RlhfConfig,
    muon: MuonConfig | None,
) -> list[dict[str, Any]]:
    """Groups of parameters with one rate, one decay and one optimizer."""
    groups: dict[tuple[bool, bool, float], dict[str, Any]] = {}
    for name, parameter in sorted(named, key=lambda one: not is_decayed(one[0])):
        steps_matrix = muon is not None and is_matrix(name)
        ratio = 1.0
        if isinstance(settings, TrainerGroup):
            ratio = rate_ratio(name, settings, muon if steps_matrix else None, model.config)
        key = (steps_matrix, is_decayed(name), ratio)
        if key not in groups:
            group: dict[str, Any] = {"params": [], "lr": settings.lr * ratio, "lr_ratio": ratio}
            decay = settings.weight_decay if is_decayed(name) else 0.0
            if muon is not None and steps_matrix:
                decay = decay if muon.weight_decay is None else muon.weight_decay
                group |= {"momentum": muon.momentum, "variance_beta": muon.variance_beta, "weight_decay": decay}
            else:
                group["weight_decay"] = decay / ratio  # of AdamW: the decay of `stage.lr` at any rate
            groups[key] = group
        groups[key]["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: "momentum" in group)


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of the optimizer, as a checkpoint names them: (`PARAMETER.exp_avg`, tensor)."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # frozen under adapters
            continue
        assert parameter in optimizer.state, f"{name} is not the tensor that the optimizer was built with"
        for key, value in optimizer.state[parameter].items():
            yield f"{name}.{key}", value


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of `stage.lr` to `rate`, and the rates of all groups in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)


def set_momentum(optimizer: torch.optim.Optimizer, momentum: float) -> None:
    """Set the momentum of Muon."""
    for group in optimizer.param_groups:
        if "momentum" in group:
            group["momentum"] = momentum


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int, min_ratio: float) -> float:
    """Linear warm-up to `peak`, then a cosine to `min_ratio * peak` at the last step (Loshchilov & Hutter 2017, eq. 5).

    Args:
        step: 0-based optimizer step; the rate of step 0 is above zero.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - 1 - warmup_steps))
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def stage_rate(stage: TrainerGroup, step: int) -> float:
    """The learning rate of a 0-based step of a stage.

    Schedule `wsd`: linear warm-up, constant (Hu et al. 2024, eq. 1), then a decay over the last `decay_steps`, linear
    or 1-sqrt (Haegele et al. 2024, eq. 1). Schedule `linear` is the same with a linear decay over the last
    `decay_share` of the steps, which begins after the warm-up at the earliest. The last step has the final rate.
    """
    if stage.schedule == COSINE:
        return learning_rate(
            step, peak=stage.lr, warmup_steps=stage.warmup_steps, steps=stage.steps, min_ratio=stage.min_lr_ratio
        )
    if step < stage.warmup_steps:
        return stage.lr * (step + 1) / stage.warmup_steps
    is_linear = stage.schedule == LINEAR
    longest = max(1, stage.steps - stage.warmup_steps)
    decay_steps = min(longest, max(1, round(stage.decay_share * stage.steps))) if is_linear else stage.decay_steps
    decayed = step + 1 - (stage.steps - decay_steps)  # steps of the decay, this one included
    if decayed <= 0 or not decay_steps:
        return stage.lr
    progress = min(1.0, decayed / decay_steps)
    fall = progress if is_linear or stage.decay == LINEAR else math.sqrt(progress)
    return stage.lr * (stage.min_lr_ratio + (1 - stage.min_lr_ratio) * (1 - fall))


def rate_group(name: str) -> str | None:
    """The key of `stage.rates` that a parameter belongs to; None: an adapter, which has the rate `stage.lr`."""
    if ADAPTERS in name:
        return None
    if name.startswith(("lm_head.", "scalar_head.")):
        return "head"
    if name.startswith("embedding."):
        return "embedding"
    return "matrices" if is_matrix(name) else "vectors"


def rate_ratio(name: str, stage: TrainerGroup, muon: MuonConfig | None, model: ModelConfig) -> float:
    """Learning rate of a parameter as a multiple of `stage.lr`.

    Args:
        muon: of a matrix that Muon steps; None: AdamW steps it.
    """
    group = rate_group(name)
    if group is None:
        return 1.0
    ratio = getattr(stage.rates, group)
    if muon is None:
        return ratio / model.relative_width if group in ("head", "matrices") else ratio
    if muon.lr is not None:
        ratio *= muon.lr / stage.lr
    width_power = 0.5 if "attention." in name else 0.0
    if muon.scale == ADAMW:
        # singular values of 1 are entries of 1 / sqrt(larger side) (Liu et al. 2025, equation 4)
        ratio *= RMS_OF_ADAMW * math.sqrt(max(parameter_shapes(model)[name][-2:]))
        width_power += 0.5
    return ratio / model.relative_width**width_power


def muon_momentum(stage: TrainerGroup, step: int) -> float:
    """The momentum of Muon at a 0-based step: a linear warm-up from `momentum_low`, and a linear cool-down to it, which
    the last step reaches."""
    muon = stage.muon
    rise = step / muon.momentum_warmup_steps if step < muon.momentum_warmup_steps else 1.0
    left, cooldown = max(0, stage.steps - 1 - step), muon.momentum_cooldown_steps
    fall = left / cooldown if left < cooldown else 1.0
    return muon.momentum - (1 - min(rise, fall)) * (muon.momentum - muon.momentum_low)
