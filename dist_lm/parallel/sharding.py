"""A model on a mesh: tensor parallelism, activation checkpointing, compiled blocks, FSDP2.

`build_model` has three steps: arrange the modules on the meta device, allocate the shards of this rank, set their
values (`values.fill`).

The order of the arrangement matters: tensor parallelism replaces modules, so it comes first. FSDP comes last, because
recomputation must happen inside its hooks, which gather parameters.

Activation checkpointing has three modes:

    none        stores all activations
    selective   stores outputs of matrix products, attention and collectives; computes norms, activations, RoPE and
                dropout again (Korthikanti et al. 2022, section 5)
    full        stores the input of each block

It is torch's own and not fairscale's `checkpoint_wrapper`: the gradients and the time are the same, recomputation stops
at the last tensor that is needed, and one mechanism does both modes (`bench checkpointing`).
"""

from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dist_lm.config.cluster import ParallelConfig
from dist_lm.config.model import ModelConfig
from dist_lm.errors import ConfigError
from dist_lm.model.keyed_random import initial_value
from dist_lm.model.size import is_trained
from dist_lm.model.transformer import Block, Transformer
from dist_lm.parallel.context_axis import ContextAxis
from dist_lm.parallel.gloo import exchange_messages
from dist_lm.parallel.layout import (
    PARAMETER_AXES,
    Layout,
    Placement,
    blocks_per_unit,
    has_units_outside,
    partial_gradients,
    placements,
    reshards,
)
from dist_lm.parallel.mesh import axes_of_parameters, has_context_axis, lacks_bf16
from dist_lm.parallel.tensor_axis import TensorAxis
from dist_lm.parallel.tensor_parallel import TensorParallelTransformer
from dist_lm.parallel.values import fill

FORWARD_METHODS = ("token_losses", "logprobs", "scores")
"""Methods that are called on a model instead of `forward`: FSDP gathers the parameters of the root around them. They
must not call each other, which would free and gather these parameters once more."""

MOST_THREADS = 8  # threads of a rank that draw initial values
RECOMPILATIONS = 48
"""Limit of compilations of the blocks of one model. They are the combinations of: values of the first layer or not,
gradients or not, selected tokens or not (also a single one), one row or several; each for the first shape, then for all
shapes."""

STORED_OPERATORS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    "_c10d_functional::all_to_all_single",
    "_c10d_functional::all_reduce",
    "_c10d_functional::all_gather_into_tensor",
    "_c10d_functional::reduce_scatter_tensor",
    "_c10d_functional::wait_tensor",
)


def compute_dtype(parallel: ParallelConfig, device: torch.device) -> torch.dtype:
    """Returns the dtype of the forward and backward pass, bf16 or fp32; master weights and reductions are always fp32.

    `auto` is bf16 on a GPU that has it, else fp32; `fastest` is also bf16 on a CPU that multiplies it.

    Raises:
        ConfigError: bf16 is asked for on a GPU without it.
    """
    setting = parallel.compute_dtype
    if setting == "bf16" and lacks_bf16(device):
        raise ConfigError(
            f"parallel.compute_dtype=bf16: {torch.cuda.get_device_name(device)} has no bf16 instructions; "
            "expected auto or fp32, or a GPU of compute capability 8.0 or later"
        )

    uses_bf16 = setting == "bf16"
    if setting == "fastest" and device.type == "cpu":
        uses_bf16 = multiplies_bf16()
    elif setting in ("auto", "fastest") and device.type == "cuda":
        uses_bf16 = not lacks_bf16(device)
    return torch.bfloat16 if uses_bf16 else torch.float32


def generation_dtype(parallel: ParallelConfig, device: torch.device) -> torch.dtype:
    """Returns the dtype of unsharded copies that generate.

    `fastest` means `auto` here, so fp32 on a CPU: its bf16 kernels are compiled for every new shape.

    Raises:
        ConfigError: bf16 is asked for on a GPU without it.
    """
    if parallel.compute_dtype == "fastest":
        parallel = replace(parallel, compute_dtype="auto")
    return compute_dtype(parallel, device)


def multiplies_bf16() -> bool:
    """Returns whether this CPU has bf16 instructions (AMX or AVX512-BF16); other CPUs are slower in bf16 than fp32."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def build_model(
    model_config: ModelConfig,
    parallel: ParallelConfig,
    mesh: DeviceMesh,
    device: torch.device,
    seed: int,
    *,
    frozen: bool = False,
) -> Transformer:
    """Returns an initialised model on `mesh`, every parameter with this rank's shard on `device` or, offloaded, on the
    host.

    The values do not depend on the layout. Gradients are summed over ranks, not averaged: the trainer divides by the
    global token count. The loss computes at most `parallel.loss_chunk_mib` MiB of logits at once.

    Args:
        frozen: the model is never trained. Its parameters are stored in the compute dtype, without fp32 masters: the
            forward pass has the same bits.

    Raises:
        ConfigError: bf16 is asked for on a GPU without it.
    """
    model = arrange_model(model_config, parallel, mesh, device, exchange=device.type == "cpu", frozen=frozen)
    materialise(model, parallel, device)
    # One core draws 90 million values a second: 8 B take it a minute and a half. More threads would need the memory of
    # more unsharded parameters.
    fill(
        model,
        model_config,
        lambda name, shape: initial_value(name, shape, model_config, seed),
        threads=min(torch.get_num_threads(), MOST_THREADS),
    )
    return model


def arrange_model(
    model_config: ModelConfig,
    parallel: ParallelConfig,
    mesh: DeviceMesh,
    device: torch.device,
    exchange: bool,
    *,
    frozen: bool = False,
) -> Transformer:
    """Returns the model on the meta device, every parameter with its placement on `mesh` but without values.

    Args:
        device: the device it will run on.
        exchange: whether FSDP sends its messages by exchange (`gloo`).
        frozen: as in `build_model`.

    Raises:
        ConfigError: bf16 is asked for on a GPU without it.
    """
    layout = layout_of(mesh)
    placement_of = placements(model_config, layout)

    # 1. Tensor parallelism
    with torch.device("meta"):
        if layout.tp > 1:
            model = _tensor_parallel(model_config, parallel, mesh, layout, placement_of)
        else:
            model = Transformer(model_config)
    model.chunk_bytes = parallel.loss_chunk_mib << 20
    if has_context_axis(mesh):
        axis = ContextAxis(mesh.get_group("cp"), mesh["cp"].size(), mesh.get_local_rank("cp"))
        model.token_axis = axis
        for block in model.blocks:
            cast(Block, block).attention.attend = axis.attend
    dtype = compute_dtype(parallel, device)
    if model_config.lora is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_trained(name, model_config))
            # Beside matrices in four bits, what is frozen needs no fp32 copy. Otherwise FSDP shards and casts it.
            if model_config.is_in_4bit and not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)

    if frozen:
        # FSDP would cast fp32 masters to these values before every use. New parameters, because `data` of a DTensor
        # is not its shard.
        for name, parameter in list(model.named_parameters()):
            module, _, attribute = name.rpartition(".")
            stored = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
            setattr(model.get_submodule(module), attribute, stored)

    # 2. Activation checkpointing and compilation
    compiled = parallel.compile == "always" or (parallel.compile == "auto" and device.type == "cuda")
    wrap_blocks(model, parallel.activation_checkpointing, compiled, whole_graph=device.type == "cuda")

    # 3. FSDP, also on one rank if it has to cast or offload
    if layout.dp > 1 or dtype != torch.float32 or parallel.cpu_offload:
        _fully_shard(model, parallel, mesh, dtype, placement_of, exchange)
    return model


def wrap_blocks(model: Transformer, mode: str, compiled: bool, whole_graph: bool) -> None:
    """Checkpoints and compiles the forward of every block; parameter names do not change.

    All blocks of a model share one compiled function, and no other model does: a learner of RLHF holds four models, and
    the compiler counts recompilations by function. The compiler must see a selective policy, so it compiles the
    checkpointed forward. Full checkpointing calls the compiled forward again.

    Args:
        mode: none | selective | full.
        compiled: whether the blocks are compiled, at their first call.
        whole_graph: whether torch raises, at a call, if the compiler must split a function, or compiles it
            RECOMPILATIONS times. Otherwise the parts that it leaves out run eagerly.
    """

    def compile_block(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return torch.compile(  # pyright: ignore[reportCallIssue]  torch's overloads lack two options
            forward, fullgraph=whole_graph, isolate_recompiles=True, recompile_limit=RECOMPILATIONS
        )

    # The forward of the class and not of an instance: then all blocks share one compiled function.
    (forward,) = {type(block).forward for block in model.blocks}
    if compiled and mode != "selective":
        forward = compile_block(forward)
    if mode != "none":
        forward = _checkpointed(forward, selective=mode == "selective")
    if compiled and mode == "selective":
        forward = compile_block(forward)
    for block in model.blocks:
        block.forward = MethodType(forward, block)


def _checkpointed(forward: Callable[..., torch.Tensor], selective: bool) -> Callable[..., torch.Tensor]:
    options = {"context_fn": _selective_contexts} if selective else {}

    def checkpointed(*args, **kwargs) -> torch.Tensor:  # not a partial: the compiler skips partials silently
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options, **kwargs)

    return checkpointed


def _selective_contexts():
    return create_selective_checkpoint_contexts(_policy)


def _policy(context, operator, *args, **kwargs) -> CheckpointPolicy:
    is_stored = isinstance(operator, torch._ops.OpOverload) and operator.name().partition(".")[0] in STORED_OPERATORS
    return CheckpointPolicy.MUST_SAVE if is_stored else CheckpointPolicy.PREFER_RECOMPUTE


def layout_of(mesh: DeviceMesh) -> Layout:
    """Returns the layout of the parameters on a mesh: its dp_shard counts the ranks of a cp group, too."""
    return Layout(*(axes_of_parameters(mesh, axis).size() for axis in PARAMETER_AXES))


def _tensor_parallel(
    config: ModelConfig, parallel: ParallelConfig, mesh: DeviceMesh, layout: Layout, placement_of: dict[str, Placement]
) -> Transformer:
    """Returns the tensor-parallel model, with DTensors of padded shape as parameters, without values; call it inside
    `torch.device("meta")`."""
    axis = TensorAxis(
        group=mesh.get_group("tp"),
        size=layout.tp,
        rank=mesh.get_local_rank("tp"),
        sp=parallel.sp,
        functional=parallel.activation_checkpointing == "selective",
    )
    model = TensorParallelTransformer(config, axis, partial_gradients(config, layout, parallel.sp))

    # The modules create plain parameters of logical shape; each becomes a DTensor of padded shape.
    for name, _ in list(model.named_parameters()):
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, nn.Parameter(_empty_on_tp(placement_of[name], mesh["tp"])))
    return model


def _empty_on_tp(placement: Placement, mesh: DeviceMesh) -> DTensor:
    """Returns a DTensor of the padded shape on the tp axis `mesh`, split or replicated, without values."""
    shard_shape = list(placement.padded)
    dtensor_placement = Replicate()
    if placement.tp_dim is not None:
        shard_shape[placement.tp_dim] //= mesh.size()
        dtensor_placement = Shard(placement.tp_dim)
    # All shards have one shape, so torch derives the padded shape of the tensor.
    return DTensor.from_local(torch.empty(shard_shape), mesh, [dtensor_placement], run_check=False)


def _fully_shard(
    model: Transformer,
    parallel: ParallelConfig,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    placement_of: dict[str, Placement],
    exchange: bool,
) -> None:
    """Applies FSDP2 to units of the model, in place: consecutive blocks, the embedding, the head, and the rest as root.

    Gradients are summed over ranks, not averaged. The methods FORWARD_METHODS gather parameters as `forward` does.

    Args:
        dtype: of the forward and backward pass; gradients are reduced in fp32.
        exchange: whether messages are sent by exchange (`gloo`).
    """
    layout, element_bytes = layout_of(mesh), dtype.itemsize
    axes = ("dp_replicate", "dp_shard") if layout.dp_replicate > 1 else ("dp_shard",)
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = OffloadPolicy()  # keeps everything on the device
    if parallel.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    # FSDP asks for the placement of a parameter, but does not say its name.
    fsdp_dims = {id(parameter): placement_of[name].fsdp_dim for name, parameter in model.named_parameters()}

    # A base in four bits is whole on every rank, embedding and norms included.
    unmanaged: set[nn.Parameter] = set()
    if model.config.is_in_4bit:
        unmanaged = {parameter for parameter in model.parameters() if not parameter.requires_grad}

    def shard(unit: nn.Module | list[nn.Module], reshard_after_forward: bool) -> None:
        """Makes `unit` one unit of FSDP: its parameters are gathered in one message."""
        fully_shard(
            unit,
            mesh=axes_of_parameters(mesh, *axes),
            mp_policy=precision,
            reshard_after_forward=reshard_after_forward,
            shard_placement_fn=lambda parameter: Shard(fsdp_dims[id(parameter)]),
            offload_policy=offload,
            ignored_params=unmanaged or None,
        )

    if has_units_outside(model.config, layout, element_bytes):
        assert model.lm_head is not None
        shard(model.embedding, False)
        # The head is never called as a module: the loss reads its weight. So FSDP gathers it together with the norm.
        shard([model.final_norm, model.lm_head], False)
    # Small blocks share a message: starting one takes longer than moving few bytes.
    n_blocks = blocks_per_unit(model.config, layout, element_bytes)
    for first in range(0, len(model.blocks), n_blocks):
        unit = list(model.blocks[first : first + n_blocks])
        shard(unit, reshards(parallel.reshard_after_forward, model.config, layout, element_bytes))
    shard(model, False)

    # Gradients are summed, not averaged: the trainer divides by the global token count.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no reduction with a factor but the sum
            if exchange:
                exchange_messages(module)

    for method in FORWARD_METHODS:
        register_fsdp_forward_method(model, method)


def materialise(model: nn.Module, parallel: ParallelConfig, device: torch.device) -> None:
    """Allocates the parameters of a model on the meta device: on `device`, or in host memory if they are offloaded."""
    model.to_empty(device="cpu" if parallel.cpu_offload else device)


def set_reduction(model: nn.Module, *, reduce: bool, last: bool) -> None:
    """Tells FSDP whether the next micro-batch of a step reduces gradients and frees gathered parameters; nothing is
    sent. A model without FSDP stays as it is.

    Units whose parameters are not freed between forward and backward pass keep them for all micro-batches of the step,
    so they are gathered once per step.

    Args:
        reduce: whether this micro-batch reduces gradients over ranks.
        last: whether it is the last one. It must free the units: the optimizer changes the shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(reduce, recurse=False)
            param_groups = module._get_fsdp_state()._fsdp_param_groups
            frees_unit = last or any(group._reshard_after_forward for group in param_groups)
            module.set_reshard_after_backward(frees_unit, recurse=False)


def reshard(model: nn.Module) -> None:
    """Frees the parameters that FSDP gathered in a forward pass without a backward pass.

    Otherwise `named_parameters` gives gathered tensors, not the shards that the optimizer and checkpoints use.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
