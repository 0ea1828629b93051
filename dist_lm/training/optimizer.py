"""The optimizer and its schedule: AdamW with decay on matrices only, Muon for the matrices inside blocks if asked.

    rate of a group = stage.lr x stage.rates.GROUP x (factor of the width) x (factor of Muon's scale)

The factor of the width keeps the change of every activation per step independent of `d_model`, so the best rate does
too. It is 1 without `model.base_width`; otherwise, with m = d_model / base_width:

| group | AdamW (Yang & Hu 2022, table 3) | Muon, `stage.muon.scale=unit` | Muon, `stage.muon.scale=adamw` |
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
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from dist_lm.config.model import ModelConfig
from dist_lm.config.phases import rate_factor
from dist_lm.config.stage import ADAMW, COSINE, LINEAR, MuonConfig, OptimizerConfig, TrainerGroup
from dist_lm.model.size import ADAPTERS, TOKEN_WEIGHTS, is_matrix, neuron_shape, parameter_shapes
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.values import shard_of
from dist_lm.training.muon import Arithmetic, Stepped, Variance, device_of_whole, orthogonal_steps
from dist_lm.training.muon_exchange import Owners, arithmetic_of_ranks, owners_of

MOMENTS = ("exp_avg", "exp_avg_sq")
VARIANCE = "neuron_sq"  # state of a matrix with `stage.muon.variance_beta`, unsharded and of logical shape
EMA = "ema"  # state of a parameter: its exponential average over the steps (`averages.py`)
RMS_OF_ADAMW = 0.2  # root mean square of the entries of AdamW's update (Liu et al. 2025, section 2.2)


def is_decayed(name: str) -> bool:
    """Returns whether weight decay applies to the parameter: not to norms, biases, embeddings and scalars."""
    return not any(part in name for part in ("norm", "bias", "embed", "value_mix"))


@dataclass(frozen=True)
class _Skip:
    """Whether a step changes nothing, as a bool scalar."""

    by_shards: torch.Tensor  # in the memory of parameters and moments
    by_wholes: torch.Tensor  # on the device of `device_of_whole`


class ShardedAdamW(torch.optim.AdamW):
    """AdamW, and Muon for groups with a `momentum`, on the shards of this rank.

    AdamW works element by element, so shards are enough. With DTensors, torch would decide on the sharding of every
    parameter, which takes seconds at the first step of a large model.
    """

    arithmetic: Arithmetic | None = None  # Muon's; None: the one for the devices of all ranks
    _owners: Owners | None = None  # owners of the matrices, from the first step of Muon on
    _skip: "_Skip | None" = None  # the decision of the present step

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Steps the parameters that have a gradient (collective with Muon)."""
        assert closure is None
        for group in self.param_groups:
            if "momentum" not in group:
                self._step_adamw(group)
        self._step_muon([group for group in self.param_groups if "momentum" in group])

    def step_unless(self, is_skipped: torch.Tensor) -> None:
        """Does the same as `step`; if `is_skipped`, parameters and state keep their values (collective with Muon).

        The host does not wait for a GPU to know: the step is computed in any case, and what it writes depends on the
        flag. Only parameters in host memory need a copy of it.

        Args:
            is_skipped: bool scalar, the same on all ranks, on the device that computes the steps of whole matrices.
        """
        shard = shard_of(self.param_groups[0]["params"][0])
        self._skip = _Skip(is_skipped.to(shard.device), is_skipped)
        try:
            self.step()
        finally:
            self._skip = None

    def _step_adamw(self, group: Mapping[str, Any]) -> None:
        """Steps the parameters of a group that have a gradient by AdamW, in place, with their moments and step
        counters, by one fused kernel over their shards."""
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]

        # torch's own fused kernel, on plain tensors instead of DTensors.
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
            found_inf=None if self._skip is None else self._skip.by_shards.float(),
        )

    def _step_muon(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Steps the matrices of these groups that have a gradient by Muon, in place, with momentum, step counters and
        variances (collective). The gradients stay."""
        skip = self._skip
        advance = 1 if skip is None else skip.by_shards.logical_not()
        stepped = []
        group_of = []
        for group in groups:
            remaining = self._remaining(group)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, gradient = self.state[parameter], shard_of(parameter.grad)
                state["step"] += advance

                # Momentum works element by element, on shards; a skipped step moves it towards itself.
                average = shard_of(state["exp_avg"])
                target = gradient if skip is None else torch.where(skip.by_shards, average, gradient)
                average.lerp_(target, 1 - group["momentum"])

                variance = None
                if VARIANCE in state:
                    variance = Variance(state[VARIANCE], group["variance_beta"], skip and skip.by_wholes)
                stepped.append(Stepped(parameter, gradient, average, group["momentum"], variance))
                group_of.append((group, remaining))
        if not stepped:
            return

        if self._owners is None:
            arithmetic = self.arithmetic or arithmetic_of_ranks(torch.device(device_of_whole(stepped[0].parameter)))
            self._owners = owners_of([moved.parameter for moved in stepped], arithmetic)
        steps = orthogonal_steps(stepped) if self._owners is None else self._owners.steps(stepped)
        for number, part, step in steps:
            group, remaining = group_of[number]
            if skip is not None:
                step = step.masked_fill_(skip.by_shards, 0)
            part.mul_(remaining).sub_(step, alpha=group["lr"])

    def _remaining(self, group: Mapping[str, Any]) -> float | torch.Tensor:
        """Returns the factor by which weight decay multiplies parameters of a group of Muon; 1 in a skipped step."""
        # Decay follows `stage.lr`, not the rate of the group, so scaling a rate does not change it.
        remaining = 1 - group["lr"] / group["lr_ratio"] * group["weight_decay"]
        if self._skip is None:
            return remaining
        shard = shard_of(group["params"][0])
        return torch.full((), remaining, dtype=shard.dtype, device=shard.device).masked_fill_(self._skip.by_shards, 1)

    @torch.no_grad()
    def gather_variances(self) -> None:
        """Gives every rank the state of NorMuon of all matrices, for a checkpoint (collective)."""
        if self._owners is None:
            return
        parameters = [parameter for group in self.param_groups if "momentum" in group for parameter in group["params"]]
        if any(VARIANCE in self.state[parameter] for parameter in parameters):
            self._owners.gather_variances([self.state[parameter][VARIANCE] for parameter in parameters])


def build_optimizer(
    model: Transformer,
    settings: OptimizerConfig,
    muon: MuonConfig | None = None,
    arithmetic: Arithmetic | None = None,
) -> ShardedAdamW:
    """Builds AdamW (Loshchilov & Hutter 2019), with Muon for some groups, for the parameters with `requires_grad`.

    Moments exist from the start, so that every checkpoint has the same keys.

    With stage.ema_decay the state of each parameter also holds its average, so the average is sharded, padded and saved
    as the moments are.

    Args:
        muon: settings for the matrices inside blocks; None or a rate of 0: AdamW for all parameters.
        arithmetic: of Muon; None: that of the devices of all ranks, which agree at the first step.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if muon is not None and not muon.is_on:
        muon = None
    muon_names = {name for name, _ in named if muon is not None and is_matrix(name)}
    optimizer = ShardedAdamW(
        _groups(model, named, settings, muon),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.adam_eps,
    )
    optimizer.arithmetic = arithmetic

    has_average = isinstance(settings, TrainerGroup) and settings.ema_decay > 0
    has_variance = muon is not None and muon.variance_beta > 0
    shapes = parameter_shapes(model.config)
    for name, parameter in named:
        keys = MOMENTS[:1] if name in muon_names else MOMENTS
        if has_average:
            keys = (*keys, EMA)
        # The fused kernel needs the step on the device of the parameter.
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        optimizer.state[parameter] = {"step": step} | {key: torch.zeros_like(parameter) for key in keys}

        if has_variance and name in muon_names:
            optimizer.state[parameter][VARIANCE] = torch.zeros(
                neuron_shape(name, shapes[name]), dtype=parameter.dtype, device=device_of_whole(parameter)
            )
    return optimizer


def _groups(
    model: Transformer,
    named: Sequence[tuple[str, nn.Parameter]],
    settings: OptimizerConfig,
    muon: MuonConfig | None,
) -> list[dict[str, Any]]:
    """Returns groups of parameters with one rate, one decay and one optimizer, as torch takes them, at the peak rates;
    those of Muon come last.

    Args:
        muon: None: AdamW for all parameters.
    """
    groups: dict[tuple[bool, bool, float], dict[str, Any]] = {}
    for name, parameter in sorted(named, key=lambda pair: not is_decayed(pair[0])):
        steps_with_muon = muon is not None and is_matrix(name)
        ratio = 1.0
        if isinstance(settings, TrainerGroup):
            ratio = rate_ratio(name, settings, muon, model.config)

        # Adapters train some rows of a head: decay would change all of them.
        decays = is_decayed(name) and not (model.config.lora is not None and name in TOKEN_WEIGHTS)
        key = (steps_with_muon, decays, ratio)
        if key not in groups:
            group: dict[str, Any] = {"params": [], "lr": settings.lr * ratio, "lr_ratio": ratio, "weight_decay": 0.0}
            if muon is not None and steps_with_muon:
                group |= {"momentum": muon.momentum, "variance_beta": muon.variance_beta}
                group["weight_decay"] = muon.weight_decay
                if muon.weight_decay is None:
                    group["weight_decay"] = settings.weight_decay
            elif decays:
                # AdamW multiplies the decay by the rate of the group; it must follow `stage.lr`.
                group["weight_decay"] = settings.weight_decay / ratio
            groups[key] = group
        groups[key]["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: "momentum" in group)


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields all tensors of the optimizer, as a checkpoint names them: (`PARAMETER.exp_avg`, tensor)."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # frozen under adapters
            continue
        assert parameter in optimizer.state, f"{name} is not the tensor that the optimizer was built with"
        for key, tensor in optimizer.state[parameter].items():
            yield f"{name}.{key}", tensor


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of `stage.lr` to `rate`, and the rates of all groups in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)


def set_momentum(optimizer: torch.optim.Optimizer, momentum: float) -> None:
    """Sets the momentum of Muon."""
    for group in optimizer.param_groups:
        if "momentum" in group:
            group["momentum"] = momentum


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int, min_ratio: float) -> float:
    """Returns the rate of a linear warm-up to `peak`, then a cosine to `min_ratio * peak` at the last step.

    Loshchilov & Hutter 2017, equation 5.

    Args:
        step: 0-based optimizer step; the rate of step 0 is above zero, and after the last step the rate stays.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - 1 - warmup_steps))
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def stage_rate(stage: TrainerGroup, step: int) -> float:
    """Returns the learning rate of a stage at a 0-based step: the rate of its schedule times the factor of its phase.

    Each group of parameters has a multiple of it (`rate_ratio`).
    """
    rate = scheduled_rate(stage, step)
    if stage.phases:
        rate *= rate_factor(stage.phases, stage.steps, step)
    return rate


def scheduled_rate(stage: TrainerGroup, step: int) -> float:
    """Returns the learning rate of a 0-based step by the schedule alone.

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

    # A long share of the steps may reach back into the warm-up; the decay begins after it.
    decay_steps = stage.decay_steps
    if stage.schedule == LINEAR:
        steps_after_warmup = max(1, stage.steps - stage.warmup_steps)
        decay_steps = min(steps_after_warmup, max(1, round(stage.decay_share * stage.steps)))

    decay_step = step + 1 - (stage.steps - decay_steps)  # 1 at the first step of the decay
    if decay_step <= 0 or not decay_steps:
        return stage.lr
    progress = min(1.0, decay_step / decay_steps)
    fall = math.sqrt(progress)
    if stage.schedule == LINEAR or stage.decay == LINEAR:
        fall = progress
    return stage.lr * (stage.min_lr_ratio + (1 - stage.min_lr_ratio) * (1 - fall))


def rate_group(name: str) -> str | None:
    """Returns the key of `stage.rates` for a parameter: head, embedding, matrices (inside blocks) or vectors (all
    others); None for an adapter, which has the rate `stage.lr`."""
    if ADAPTERS in name:
        return None
    if name.startswith(("lm_head.", "scalar_head.")):
        return "head"
    if name.startswith("embedding."):
        return "embedding"
    if is_matrix(name):
        return "matrices"
    return "vectors"


def rate_ratio(name: str, stage: TrainerGroup, muon: MuonConfig | None, model: ModelConfig) -> float:
    """Returns the learning rate of a parameter as a multiple of `stage.lr` (the table at the top of this file).

    Args:
        name: name of the parameter in the model.
        muon: settings of Muon, which steps the matrices; None: AdamW steps all parameters.
    """
    group = rate_group(name)
    if group is None:
        return 1.0
    ratio = getattr(stage.rates, group)

    if muon is None or group != "matrices":
        if group in ("head", "matrices"):
            ratio /= model.relative_width
        return ratio

    if muon.lr is not None:
        # `stage.muon.lr` is a rate of its own, which the schedule of `stage.lr` scales.
        ratio *= muon.lr / stage.lr
    width_power = 0.5 if "attention." in name else 0.0
    if muon.scale == ADAMW:
        # A matrix with singular values of 1 has entries of 1 / sqrt(larger side) (Liu et al. 2025, equation 4).
        ratio *= RMS_OF_ADAMW * math.sqrt(max(parameter_shapes(model)[name][-2:]))
        width_power += 0.5
    return ratio / model.relative_width**width_power


def muon_momentum(stage: TrainerGroup, step: int) -> float:
    """Returns the momentum of Muon at a 0-based step.

    It warms up linearly from `momentum_low`, and cools down linearly to it, which the last step reaches.
    """
    muon = stage.muon
    rise = fall = 1.0
    if step < muon.momentum_warmup_steps:
        rise = step / muon.momentum_warmup_steps
    steps_left = max(0, stage.steps - 1 - step)
    if steps_left < muon.momentum_cooldown_steps:
        fall = steps_left / muon.momentum_cooldown_steps
    return muon.momentum - (1 - min(rise, fall)) * (muon.momentum - muon.momentum_low)
