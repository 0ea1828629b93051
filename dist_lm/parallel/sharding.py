"""FSDP2 over the data-parallel axes, and parameters filled shard by shard.

The model is built on the meta device; a parameter's full value exists only while its shard is cut from it.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dist_lm.config import ModelConfig, ParallelConfig
from dist_lm.model.initialise import initial_value
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.layout import shard_dim


def compute_dtype(parallel: ParallelConfig, device: torch.device) -> torch.dtype:
    """The dtype of the forward and backward pass; master weights and reductions stay fp32."""
    if parallel.compute_dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[parallel.compute_dtype]


def build_model(
    model_config: ModelConfig, parallel: ParallelConfig, mesh: DeviceMesh, device: torch.device, seed: int
) -> Transformer:
    """An initialised model, sharded over the dp axes of `mesh`.

    Gradients are summed over ranks, not averaged: the trainer divides by the global token count.
    """
    with torch.device("meta"):
        model = Transformer(model_config)
    dtype = compute_dtype(parallel, device)
    if mesh["dp_replicate"].size() * mesh["dp_shard"].size() > 1 or dtype != torch.float32:
        _shard(model, parallel, mesh, dtype)
    model.to_empty(device=device)
    fill(model, lambda name, shape: initial_value(name, shape, model_config, seed))
    return model


def _shard(model: Transformer, parallel: ParallelConfig, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    axes = ("dp_replicate", "dp_shard") if mesh["dp_replicate"].size() > 1 else "dp_shard"
    blocks = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    root = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32, cast_forward_inputs=False
    )
    ranks = mesh["dp_shard"].size()

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(shard_dim(tuple(parameter.shape), ranks))

    for block in model.blocks:
        fully_shard(
            block,
            mesh=mesh[axes],
            mp_policy=blocks,
            reshard_after_forward=parallel.reshard_after_forward,
            shard_placement_fn=placement,
        )
    fully_shard(model, mesh=mesh[axes], mp_policy=root, reshard_after_forward=False, shard_placement_fn=placement)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction with a factor


@torch.no_grad()
def fill(model: nn.Module, value: Callable[[str, tuple[int, ...]], torch.Tensor]) -> None:
    """Give every parameter the logical value `value(name, shape)`; a sharded one takes its part of it."""
    for name, parameter in model.named_parameters():
        full = value(name, tuple(parameter.shape)).to(parameter.device)
        if isinstance(parameter, DTensor):
            # src_data_rank=None: every rank has the same full value, so nothing is sent
            parameter.copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None))
        else:
            parameter.copy_(full)


@torch.no_grad()
def unsharded_copy(model: Transformer, model_config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """A plain model with the same weights, for sampling: every rank gets all of it (collective)."""
    with torch.device("meta"):
        copy = Transformer(model_config)
    full = {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().to(dtype)
        for name, parameter in model.named_parameters()
    }
    copy.load_state_dict(full, assign=True)
    return copy.eval()
