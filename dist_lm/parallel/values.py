"""Values of sharded tensors: their logical part, unsharded weights in and out, sums and norms of gradients.

Tensor parallelism pads a dimension of n to `tp * ceil(n / tp)`. A padded shard is the shard that `torch.chunk` of the
unpadded (logical) tensor would give, followed by zeros. Checkpoints hold logical tensors.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import (
    _compute_local_shape_and_global_offset,
    compute_local_shape_and_global_offset,
)

from dist_lm.config.model import AdaptedModelConfig, ModelConfig
from dist_lm.model.lora import Adapter, adapter_of, change
from dist_lm.model.quantised import QuantisedMatrix
from dist_lm.model.size import TOKEN_WEIGHTS, Shape, parameter_shapes
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.tensor_parallel import TensorParallelTransformer


def logical(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Returns a tensor of logical `shape` that shares memory with `tensor` (a parameter or a moment).

    Scalars and tensors that have this shape already are returned unchanged; only a DTensor may have padding. The shards
    of the returned tensor may be uneven, empty or not contiguous.
    """
    shape = torch.Size(shape)
    if tensor.dim() == 0 or tensor.shape == shape:
        return tensor
    assert isinstance(tensor, DTensor), f"shape {tuple(tensor.shape)}, expected {tuple(shape)}"
    shard_shape, _ = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
    return with_shard(shard_of(tensor)[tuple(slice(size) for size in shard_shape)], tensor, shape)


def with_shard(shard: torch.Tensor, like: DTensor, shape: torch.Size) -> DTensor:
    """Returns a tensor of `shape` on the mesh of `like` whose shard on this rank is `shard` itself, outside autograd.

    `DTensor.from_local` would copy offloaded shards to the GPU of the mesh, so a write to them would be lost.
    """
    # Built by hand, because the public constructors derive the shape from equal shards, copy, or check on all ranks.
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    spec = DTensorSpec(like.device_mesh, like.placements, TensorMeta(shape, stride, shard.dtype))
    return DTensor(shard, spec, requires_grad=False)


def shard_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this rank's shard of a tensor, with padding, outside autograd."""
    if isinstance(tensor, DTensor):
        return tensor._local_tensor
    return tensor


def shard_box(tensor: torch.Tensor) -> tuple[slice, ...]:
    """Returns the part of a logical tensor that this rank's shard holds, by dimension: all of a plain tensor."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    size, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))


def shard_of_rank(tensor: torch.Tensor, rank: int) -> tuple[Shape, Shape]:
    """Returns (indices of the first entry, shape) of the shard of a logical tensor that any rank of its mesh holds."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim(), tuple(tensor.shape)
    mesh = tensor.device_mesh
    size, offset = _compute_local_shape_and_global_offset(
        tensor.shape, mesh.shape, coordinate_of_rank(mesh, rank), tensor.placements
    )
    return tuple(offset), tuple(size)


def coordinate_of_rank(mesh: DeviceMesh, rank: int) -> list[int]:
    """Returns the place of a rank along each axis of a mesh that has it."""
    return (mesh.mesh == rank).nonzero()[0].tolist()


def fill(
    model: nn.Module,
    model_config: ModelConfig,
    value: Callable[[str, tuple[int, ...]], torch.Tensor],
    chooses: Callable[[str], bool] = lambda name: True,
    threads: int = 1,
) -> None:
    """Sets parameters in place to the logical value `value(name, shape)`, which is unsharded; padding becomes zero.

    All ranks compute the same values, so nothing is sent. Each thread holds one unsharded value at a time.

    Args:
        chooses: whether the parameter of a name is set.
        threads: number of values that are computed at the same time.
    """
    shapes = parameter_shapes(model_config)

    def set_values(name: str, parameter: torch.Tensor) -> None:
        # Whether gradients are recorded is a setting of each thread.
        with torch.no_grad():
            if parameter.shape != shapes[name]:
                shard_of(parameter).zero_()  # the padding, too

            # No name is given to the value, so it is freed before the next one is computed.
            target = logical(parameter, shapes[name])
            shard_of(target).copy_(value(name, shapes[name])[shard_box(target)])

    chosen = [(name, parameter) for name, parameter in model.named_parameters() if chooses(name)]
    with ThreadPoolExecutor(threads, "fill") as pool:
        # Reading the results raises what a thread has raised.
        for _ in pool.map(set_values, *zip(*chosen, strict=True)):
            pass


@torch.no_grad()
def whole_weights(model: nn.Module, model_config: ModelConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns all parameters by name, unsharded and of logical shape, on every rank (collective). Adapters are merged.

    They may share memory with the parameters of the model, and lie on their device.
    """
    shapes = parameter_shapes(model_config)
    weights = {}
    for name in parameter_shapes(model_config.plain):
        weight = merged_weight(model, model_config, name, shapes)
        weights[name] = _unshard(weight).detach().to(dtype)
    return weights


def stream_weights(
    model: nn.Module, model_config: ModelConfig, dtype: torch.dtype, receives: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields all parameters, one at a time, unsharded, of logical shape and in `dtype`, in the order of
    `parameter_shapes`. Adapters are merged.

    Collective: every rank must read the stream to its end, or the others wait. The tensors belong to the receiver, and
    the stream keeps none.

    Args:
        receives: whether this rank gets the parameters; on other ranks the stream is empty.
    """
    shapes = parameter_shapes(model_config)
    for name in parameter_shapes(model_config.plain):
        if receives:
            yield name, _unsharded_clone(model, model_config, name, shapes, dtype)
        else:
            _unsharded_clone(model, model_config, name, shapes, dtype)


def _unsharded_clone(
    model: nn.Module, config: ModelConfig, name: str, shapes: Mapping[str, Shape], dtype: torch.dtype
) -> torch.Tensor:
    """Returns a parameter, unsharded and of logical shape, in `dtype`, as a tensor with memory of its own (collective).
    The adapter is merged, and messages are of `dtype`."""
    # The receiver may read the stream in inference mode, but must get ordinary tensors.
    with torch.inference_mode(mode=False), torch.no_grad():
        unsharded = _unshard(merged_weight(model, config, name, shapes).detach().to(dtype))
        stored = _stored_weight(model, name)
        # A matrix in four bits was dequantised into a new tensor.
        if isinstance(stored, QuantisedMatrix):
            return unsharded
        shares_memory = unsharded.untyped_storage().data_ptr() == shard_of(stored).untyped_storage().data_ptr()
        if shares_memory:
            unsharded = unsharded.clone()
        return unsharded


def _unshard(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    return tensor


def unsharded_copy(model: Transformer, model_config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """Returns a plain model with the same weights, unsharded on every rank, for sampling (collective). Adapters are
    merged."""
    # `assign=True` puts the weights in place, so the copy never allocates parameters of its own.
    with torch.device("meta"):
        copy = Transformer(model_config.plain)
    copy.load_state_dict(whole_weights(model, model_config, dtype), assign=True)
    return copy.eval()


def merged_weight(model: nn.Module, config: ModelConfig, name: str, shapes: Mapping[str, Shape]) -> torch.Tensor:
    """Returns a parameter of logical shape plus the change by its LoRA adapter (collective), sharded as the parameter.

    A DTensor stays a DTensor. Without an adapter, or inside `without_adapters`, the result shares memory with the
    parameter (see `logical`); otherwise it is a copy. A matrix in four bits is dequantised to fp32.

    Args:
        name: name of the parameter.
        shapes: logical shapes of all parameters.
    """
    weight = _stored_weight(model, name)
    if isinstance(weight, QuantisedMatrix):
        weight = weight.dequantised(torch.float32)
    weight = logical(weight, shapes[name])
    prefix = adapter_of(name)
    if config.lora is None or f"{prefix}a" not in shapes:
        return weight
    adapter = model.get_submodule(prefix.removesuffix("."))
    assert isinstance(adapter, Adapter)
    if not adapter.is_on:
        return weight

    # Factors are small, so every rank gets them unsharded and computes the change of its shard alone.
    a, b = (_unshard(logical(getattr(adapter, factor), shapes[prefix + factor])) for factor in ("a", "b"))
    merged = shard_of(weight).clone()
    if isinstance(weight, DTensor):
        merged = with_shard(merged, weight, weight.shape)
    _add_change(merged, name, a, b, adapter.scale)
    return merged


def _stored_weight(model: nn.Module, name: str) -> torch.Tensor | QuantisedMatrix:
    """Returns the parameter `name`, sharded and padded, or the matrix in four bits that stands in its place."""
    module, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(module), attribute)


def _add_change(weight: torch.Tensor, name: str, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """Adds `scale * B A` to this rank's shard of a weight of logical shape, in place; `a` and `b` are unsharded."""
    shard = shard_of(weight)
    shard.add_(change(name, a.to(shard.device), b.to(shard.device), scale, shard_box(weight)))


@torch.no_grad()
def add_changes(
    model: nn.Module, config: AdaptedModelConfig, shapes: Mapping[str, Shape], factors: Mapping[str, torch.Tensor]
) -> None:
    """Adds the changes of an adapter to the weights of a model, whatever its layout, in place. Weights without factors
    stay. Nothing is sent.

    Args:
        config: configuration of the model with the adapter.
        shapes: logical shapes of the model's parameters.
        factors: unsharded factors by name.
    """
    for name, parameter in model.named_parameters():
        prefix = adapter_of(name)
        if f"{prefix}a" in factors:
            weight = logical(parameter.detach(), shapes[name])
            _add_change(weight, name, factors[f"{prefix}a"], factors[f"{prefix}b"], config.scale)


@torch.no_grad()
def keep_trained_rows(model: Transformer) -> None:
    """Sets the gradients of the embedding and the head to 0, in place, but for the rows of `model.trained_tokens`;
    without these it does nothing.

    Their optimizer decays nothing, so a row without a gradient keeps its bits.
    """
    if model.trained_tokens is None:
        return
    for name, parameter in model.named_parameters():
        if name not in TOKEN_WEIGHTS or parameter.grad is None:
            continue
        shard = shard_of(parameter.grad)
        first_row = shard_box(parameter.grad)[0].start or 0
        # Token ids are row numbers also under tensor parallelism: its padding stands behind the last token.
        row_N = model.trained_tokens.to(shard.device) - first_row
        is_frozen_V = torch.ones(len(shard), dtype=torch.bool, device=shard.device)
        is_frozen_V[row_N[(row_N >= 0) & (row_N < len(shard))]] = False
        shard.masked_fill_(is_frozen_V[:, None], 0)


@torch.no_grad()
def reduce_partial_gradients(model: nn.Module) -> None:
    """Sums over tp, in place, the gradients of replicated parameters to which each tp rank contributes a part
    (collective).

    Runs once per step, after the last micro-batch, in one message; without tensor parallelism it does nothing. FSDP has
    reduced these gradients before: both sums are linear, so their order does not matter.
    """
    if not isinstance(model, TensorParallelTransformer):
        return
    parameters = dict(model.named_parameters())
    names = model.partial_gradients
    gradients = [shard_of(gradient) for name in names if (gradient := parameters[name].grad) is not None]
    assert len(gradients) == len(names), "every parameter takes part in every step"
    if not gradients:
        return

    # Norms and biases are small: one message instead of many.
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=model.axis.group)
    sums = flat.split([gradient.numel() for gradient in gradients])
    for gradient, summed in zip(gradients, sums, strict=True):
        gradient.copy_(summed.view_as(gradient))


@torch.no_grad()
def squared_norms(groups: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """Returns this rank's contribution to the squared L2 norm of each group of gradients: (len(groups),) float64.

    Nothing is sent: the contributions of all ranks add up to the squared norm. The result is on the device of the
    gradients. At least one group must have a gradient.
    """
    # Ranks that hold copies of one shard must not count it twice.
    first_copies = [[shard_of(gradient) for gradient in group if is_first_copy(gradient)] for group in groups]
    shards = [shard for group in first_copies for shard in group]
    if not shards:
        device = next(gradient.device for group in groups for gradient in group)
        return torch.zeros(len(groups), dtype=torch.float64, device=device)

    squares = torch.stack(torch._foreach_norm(shards)).double().square()
    return torch.stack([group.sum() for group in squares.split([len(group) for group in first_copies])])


def is_first_copy(tensor: torch.Tensor) -> bool:
    """Returns whether this rank is the first of the ranks that hold the same shard."""
    if not isinstance(tensor, DTensor):
        return True
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    return all(
        index == 0 for index, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate()
    )
