"""What a block keeps of its forward pass for its backward pass, and what it computes again.

    none        everything is kept
    selective   outputs of matrix products, of attention and of collectives are kept; norms, activations, rope and
                dropout are computed again (Korthikanti et al. 2022, section 5)
    full        only the input of the block is kept

torch's own, not fairscale's `checkpoint_wrapper`: the same gradients in the same time, it stops recomputing at the last
tensor that is needed, and one mechanism does both (figures in docs/decisions.md; `bench checkpointing`).
"""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dist_lm.model.transformer import Transformer

KEPT = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    "_c10d_functional::all_reduce",
    "_c10d_functional::all_gather_into_tensor",
    "_c10d_functional::reduce_scatter_tensor",
    "_c10d_functional::wait_tensor",
)


def wrap_blocks(model: Transformer, mode: str, compiled: bool) -> None:
    """Checkpoint, and compile, the forward of every block; parameter names stay as they are.

    The compiler has to see a selective policy, so it compiles the checkpointed forward; a full one is recomputed from
    outside, by calling the compiled forward again.
    """
    for block in model.blocks:
        forward = block.forward
        if compiled and mode != "selective":
            forward = torch.compile(forward)
        if mode != "none":
            forward = _checkpointed(forward, selective=mode == "selective")
        if compiled and mode == "selective":
            forward = torch.compile(forward)
        block.forward = forward


def _checkpointed(forward: Callable[..., torch.Tensor], selective: bool) -> Callable[..., torch.Tensor]:
    options = {"context_fn": _selective_contexts} if selective else {}

    def checkpointed(*args, **kwargs) -> torch.Tensor:  # not a partial, which the compiler skips without a word
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options, **kwargs)

    return checkpointed


def _selective_contexts():
    return create_selective_checkpoint_contexts(_policy)


def _policy(context, operator, *args, **kwargs) -> CheckpointPolicy:
    kept = isinstance(operator, torch._ops.OpOverload) and operator.name().partition(".")[0] in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
