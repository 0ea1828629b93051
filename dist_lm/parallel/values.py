"""Values of sharded tensors: the logical part of a shard, whole parameters in and out, sums and norms of gradients.

Tensor parallelism pads a dimension of n to `tp * ceil(n / tp)`. A shard is then the shard that `torch.chunk` of the
unpadded tensor would give, followed by zeros, so the first entries of a padded shard *are* the shard of the logical
tensor. Checkpoints hold logical tensors.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dist_lm.config.model import ModelConfig
from dist_lm.model.size import Shape, parameter_shapes
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.tensor_parallel import TensorParallelTransformer


def logical(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A tensor of logical `shape` that shares memory with `tensor` (a parameter or a moment).

    Scalars, plain tensors and DTensors without padding are returned unchanged. The shards of the result may be uneven,
    empty or not contiguous.
    """
    shape = torch.Size(shape)
    if tensor.dim() == 0 or tensor.shape == shape:
        return tensor
    assert isinstance(tensor, DTensor), f"shape {tuple(tensor.shape)}, expected {tuple(shape)}"
    own, _ = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
    return with_shard(shard_of(tensor)[tuple(slice(size) for size in own)], tensor, shape)


def with_shard(part: torch.Tensor, like: DTensor, shape: torch.Size) -> DTensor:
    """A tensor of `shape` on the mesh of `like` whose shard on this rank is `part` itself, outside autograd.

    `DTensor.from_local` would copy offloaded shards to the GPU of the mesh, so what is written would be lost.
    """
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    spec = DTensorSpec(like.device_mesh, like.placements, TensorMeta(shape, stride, part.dtype))
    return DTensor(part, spec, requires_grad=False)


def shard_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor, with padding, outside autograd."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(model: nn.Module, model_config: ModelConfig, value: Callable[[str, tuple[int, ...]], torch.Tensor]) -> None:
    """Set every parameter to the logical value `value(name, shape)`; padding becomes zero.

    All ranks compute the same values, one whole value at a time, so nothing is sent.
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
    """All parameters by name, whole and of logical shape, on every rank (collective). Adapters are merged.

    They may share memory with the parameters of the model.
    """
    full, shapes = {}, parameter_shapes(model_config)
    for name in parameter_shapes(model_config.plain):
        value = _with_change(model, model_config, name, shapes)
        full[name] = (value.full_tensor() if isinstance(value, DTensor) else value).detach().to(dtype)
    return full


def stream_weights(
    model: nn.Module, model_config: ModelConfig, dtype: torch.dtype, receives: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters, one at a time, whole, of logical shape and in `dtype`, in the order of `parameter_shapes`.
    Adapters are merged.

    Collective: every rank reads the stream to its end. The tensors belong to the receiver, and the stream keeps none.

    Args:
        receives: whether this rank gets the parameters; on other ranks the stream is empty.
    """
    shapes = parameter_shapes(model_config)
    for name in parameter_shapes(model_config.plain):
        if receives:
            yield name, _whole_copy(model, model_config, name, shapes, dtype)
        else:
            _whole_copy(model, model_config, name, shapes, dtype)


def _whole_copy(
    model: nn.Module, config: ModelConfig, name: str, shapes: Mapping[str, Shape], dtype: torch.dtype
) -> torch.Tensor:
    """A parameter as a tensor with memory of its own; it is sent in `dtype` (collective)."""
    with torch.inference_mode(mode=False), torch.no_grad():  # whatever the mode of the reader is
        cast = _with_change(model, config, name, shapes).detach().to(dtype)
        whole = cast.full_tensor() if isinstance(cast, DTensor) else cast
        held = shard_of(model.get_parameter(name))
        shared = whole.untyped_storage().data_ptr() == held.untyped_storage().data_ptr()
        return whole.clone() if shared else whole


def _with_change(model: nn.Module, config: ModelConfig, name: str, shapes: Mapping[str, Shape]) -> torch.Tensor:
    """A parameter of logical shape, with the change by its adapter (collective)."""
    value = logical(model.get_parameter(name), shapes[name])
    if config.lora is None:
        return value
    from dist_lm.parallel.adapters import merged

    return merged(model, name, value, shapes)


def unsharded_copy(model: Transformer, model_config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """A plain model with the same weights, for sampling, whole on every rank (collective). Adapters are merged."""
    with torch.device("meta"):
        copy = Transformer(model_config.plain)
    copy.load_state_dict(whole_weights(model, model_config, dtype), assign=True)
    return copy.eval()


@torch.no_grad()
def reduce_partial_gradients(model: nn.Module) -> None:
    """Sum over tp the gradients of replicated parameters to which each tp rank contributes a part (collective).

    Runs once per step, after the last micro-batch, in one message. FSDP has reduced these gradients before: both sums
    are linear, so their order does not matter.
    """
    if not isinstance(model, TensorParallelTransformer):
        return
    parameters = dict(model.named_parameters())
    gradients = [shard_of(gradient) for name in model.partial if (gradient := parameters[name].grad) is not None]
    assert len(gradients) == len(model.partial), "every parameter takes part in every step"
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=model.axis.group)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def squared_norms(parts: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """This rank's contribution to the squared L2 norm of each group of gradients: (len(parts),) float64.

    The contributions of all ranks add up to the norm. At least one group has a gradient.
    """
    counted = [[shard_of(gradient) for gradient in part if is_first_copy(gradient)] for part in parts]
    flat = [shard for part in counted for shard in part]
    if not flat:
        device = next(gradient.device for part in parts for gradient in part)
        return torch.zeros(len(parts), dtype=torch.float64, device=device)
    squares = torch.stack(torch._foreach_norm(flat)).double().square()
    return torch.stack([part.sum() for part in squares.split([len(part) for part in counted])])


def is_first_copy(tensor: torch.Tensor) -> bool:
    """Whether this rank is the first of the ranks that hold the same shard."""
    if not isinstance(tensor, DTensor):
        return True
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    return all(
        index == 0 for index, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate()
    )
