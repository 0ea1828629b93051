"""Values of parameters: from whole tensors into the shards of a mesh, and back into a plain model."""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dist_lm.config.model import ModelConfig
from dist_lm.model.size import parameter_shapes
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.padding import logical, shard_of


@torch.no_grad()
def fill(model: nn.Module, model_config: ModelConfig, value: Callable[[str, tuple[int, ...]], torch.Tensor]) -> None:
    """Give every parameter the logical value `value(name, shape)`; a shard takes its part of it, and zeros after it.

    One whole value exists at a time, and nothing is sent: all ranks compute the same.
    """
    shapes = parameter_shapes(model_config)
    for name, parameter in model.named_parameters():
        shape = shapes[name]
        if parameter.shape != shape:
            parameter.zero_()
        target, whole = logical(parameter, shape), value(name, shape)
        if isinstance(target, DTensor):
            own, offset = compute_local_shape_and_global_offset(shape, target.device_mesh, target.placements)
            whole = whole[tuple(slice(start, start + size) for start, size in zip(offset, own, strict=True))]
        shard_of(target).copy_(whole)
        del whole  # before the next one is computed


@torch.no_grad()
def whole_weights(model: nn.Module, model_config: ModelConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every parameter by name, whole and of logical shape, on every rank (collective).

    They may share memory with the model's.
    """
    full = {}
    for name, shape in parameter_shapes(model_config).items():
        value = logical(model.get_parameter(name), shape)
        full[name] = (value.full_tensor() if isinstance(value, DTensor) else value).detach().to(dtype)
    return full


def unsharded_copy(model: Transformer, model_config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """A plain model with the same weights, for sampling: every rank gets all of it (collective)."""
    with torch.device("meta"):
        copy = Transformer(model_config)
    copy.load_state_dict(whole_weights(model, model_config, dtype), assign=True)
    return copy.eval()
