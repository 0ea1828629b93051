"""Adapters on a mesh: the part of a tensor-parallel rank, and weights with the changes added.

Tensor parallelism cuts the factor that has the dimension which the weight is cut along: B of queries, keys, values,
gate and up, A of the outputs. The other factor is the same on all ranks, and each rank computes a part of its gradient.
"""

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dist_lm.config.model import AdaptedModelConfig
from dist_lm.model.lora import Adapter, adapter_of, change
from dist_lm.model.size import Shape
from dist_lm.parallel.layout import Slice
from dist_lm.parallel.tensor_axis import local
from dist_lm.parallel.values import logical, shard_of, with_shard


class SharedAdapter(Adapter):
    """An adapter whose weight is shared by several ranks.

    Args:
        cut: the factor with the dimension of the weight that tensor parallelism cuts: a | b.
        own: entries along this dimension of the held factor that the rank computes with.
    """

    def __init__(self, whole: Adapter, cut: str, own: slice) -> None:
        super().__init__(tuple(whole.a.shape), tuple(whole.b.shape), whole.scale)
        self.cut = cut
        self.own = own

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = local(self.a), local(self.b)
        return (a[:, self.own], b) if self.cut == "a" else (a, b[:, self.own])


def share_heads(adapters: nn.ModuleDict, heads: Slice, keys: slice) -> None:
    """Cut the adapters of attention.

    Args:
        heads: query heads of this rank.
        keys: key/value heads of this rank, in the factor that it holds.
    """
    own = {"query": slice(None), "key": keys, "value": keys, "output": slice(heads.real)}
    for name, adapter in list(adapters.items()):
        assert isinstance(adapter, Adapter)
        adapters[name] = SharedAdapter(adapter, "a" if name == "output" else "b", own[name])


def share_units(adapters: nn.ModuleDict, units: Slice) -> None:
    """Cut the adapters of the feed-forward network; `units` are the hidden units of this rank."""
    for name, adapter in list(adapters.items()):
        assert isinstance(adapter, Adapter)
        adapters[name] = SharedAdapter(adapter, "a" if name == "down" else "b", slice(units.real))


def merged(model: nn.Module, weight: str, value: torch.Tensor, shapes: Mapping[str, Shape]) -> torch.Tensor:
    """`value`, a parameter of logical shape, with the change by its adapter (collective). `value` itself if it has no
    adapter, or inside `without_adapters`.

    Args:
        weight: name of the parameter.
        shapes: logical shapes of all parameters.
    """
    prefix = adapter_of(weight)
    if f"{prefix}a" not in shapes:
        return value
    adapter = model.get_submodule(prefix.removesuffix("."))
    assert isinstance(adapter, Adapter)
    if not adapter.is_on:
        return value
    factors = [logical(getattr(adapter, name), shapes[prefix + name]) for name in ("a", "b")]
    a, b = (factor.full_tensor() if isinstance(factor, DTensor) else factor for factor in factors)
    part = shard_of(value).clone()
    changed = with_shard(part, value, value.shape) if isinstance(value, DTensor) else part
    add_change(changed, weight, a, b, adapter.scale)
    return changed


def add_change(value: torch.Tensor, weight: str, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """Add `scale * B A` to this rank's shard of a weight of logical shape, in place.

    Args:
        weight: its name.
        a, b: whole factors.
    """
    box = None
    if isinstance(value, DTensor):
        own, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
        box = [slice(start, start + size) for start, size in zip(offset, own, strict=True)]
    part = shard_of(value)
    part.add_(change(weight, a.to(part.device), b.to(part.device), scale, box))


@torch.no_grad()
def add_changes(
    model: nn.Module, config: AdaptedModelConfig, shapes: Mapping[str, Shape], factors: Mapping[str, torch.Tensor]
) -> None:
    """Add the changes of an adapter to the weights of a model, whatever its layout, in place.

    Args:
        config: of the adapter.
        shapes: logical shapes of the model's parameters.
        factors: whole factors by name.
    """
    for name, parameter in model.named_parameters():
        prefix = adapter_of(name)
        if f"{prefix}a" in factors:
            value = logical(parameter.detach(), shapes[name])
            add_change(value, name, factors[f"{prefix}a"], factors[f"{prefix}b"], config.scale)
