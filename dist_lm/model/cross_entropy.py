"""Next-token cross-entropy and log-probabilities, in chunks of logits that fit into memory.

Dimensions: N tokens, D d_model, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.config.model import WIDE_LOGITS

FP32_BYTES = 4
DROPPED = -1e30
"""Logit of a token outside the set drawn from. Finite: with tensor parallelism a rank may hold none of the set, and
-inf would become nan."""

LossFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits (N, V), targets (N, ...) int64) -> losses or other numbers of each row, fp32 (N, ...), for example (N, 2) of
log-probability and entropy; each row depends on its own logits alone."""


Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x (N, D), weight (V, D)) -> logits (N, V)."""

WEIGHT_SLICE_BYTES = 8 << 20  # fp32 copy of a part of the head's weight, on devices without products into fp32


class Logprobs(NamedTuple):
    """Log-probabilities of targets and entropies of their distributions, in nats, fp32."""

    logprob_BT: torch.Tensor  # log-probability of each target
    entropy_BT: torch.Tensor  # entropy of the distribution that the target was drawn from


def product_of(head_dtype: str) -> Product:
    """Returns the product with the head's weight that `model.head_dtype` names."""
    return wide_product if head_dtype == WIDE_LOGITS else F.linear


def wide_product(x_ND: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """Returns x @ weight^T, (..., V), in fp32 also for half-precision inputs; wider dtypes stay.

    Products of half-precision numbers are exact in fp32, so only their sum is rounded. Gradients are those of a product
    in the dtype of the inputs. There is no fp32 copy of the weight: memory grows with the logits alone.
    """
    if x_ND.dtype not in (torch.bfloat16, torch.float16):
        return F.linear(x_ND, weight_VD)
    logits_NV = _WideProduct.apply(x_ND.flatten(0, -2), weight_VD)
    assert isinstance(logits_NV, torch.Tensor)
    return logits_NV.unflatten(0, x_ND.shape[:-1])


class _WideProduct(torch.autograd.Function):
    """`wide_product` of half-precision tensors (N, D) and (V, D)."""

    @staticmethod
    def forward(ctx, x_ND: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_ND, weight_VD)
        if x_ND.is_cuda:
            return torch.mm(x_ND, weight_VD.t(), out_dtype=torch.float32)

        logits_NV = x_ND.new_empty(len(x_ND), len(weight_VD), dtype=torch.float32)
        slice_rows = max(1, WEIGHT_SLICE_BYTES // (FP32_BYTES * weight_VD.shape[1]))
        wide_x_ND = x_ND.float()
        for logits_Nv, weight_vD in zip(logits_NV.split(slice_rows, dim=1), weight_VD.split(slice_rows), strict=True):
            logits_Nv.copy_(wide_x_ND @ weight_vD.float().t())
        return logits_NV

    @staticmethod
    def backward(ctx, grad_NV: torch.Tensor):
        """Returns the gradients of x and of the weight, in their dtypes; None for one that is not needed."""
        x_ND, weight_VD = ctx.saved_tensors
        grad_NV = grad_NV.to(x_ND.dtype)

        grad_x_ND = grad_NV @ weight_VD if ctx.needs_input_grad[0] else None
        grad_weight_VD = grad_NV.t() @ x_ND if ctx.needs_input_grad[1] else None
        return grad_x_ND, grad_weight_VD


def token_losses(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> torch.Tensor:
    """Returns the cross-entropy of every token in nats, fp32, (N,).

    Args:
        logits_NV: any float dtype; computed in fp32.
        targets_N: int64.
        label_smoothing: a: the target distribution is `(1 - a) * one_hot + a / V` (Szegedy et al. 2016, section 7).
        z_loss: adds `z_loss * log(Z)^2`, Z the sum of the exponentials (Chowdhery et al. 2022, section 5).
    """
    logits_NV = logits_NV.float()
    losses_N = F.cross_entropy(logits_NV, targets_N, reduction="none", label_smoothing=label_smoothing)
    if z_loss:
        losses_N = losses_N + z_loss * logits_NV.logsumexp(-1).square()
    return losses_N


def logprobs_and_entropy(
    logits_NV: torch.Tensor,
    targets_N: torch.Tensor,
    temperature: float,
    entropy_gradient: bool,
    allowed_NV: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns log-probability of the target and entropy, (N, 2) fp32 in nats, of the distribution at `temperature`.

    Args:
        targets_N: int64, each inside `allowed_NV`.
        temperature: above 0.
        entropy_gradient: whether the entropy has a gradient; the log-probability always has one.
        allowed_NV: bool; the tokens over which the distribution is renormalised. None: all.
    """
    x_NV = tempered(logits_NV, temperature, allowed_NV)
    log_z_N = x_NV.logsumexp(-1)
    logprob_N = x_NV.gather(-1, targets_N[:, None])[:, 0] - log_z_N

    if not entropy_gradient:
        x_NV, log_z_N = x_NV.detach(), log_z_N.detach()
    entropy_N = log_z_N - (x_NV.softmax(-1) * x_NV).sum(-1)
    return torch.stack([logprob_N, entropy_N], dim=-1)


def tempered(logits_NV: torch.Tensor, temperature: float, allowed_NV: torch.Tensor | None) -> torch.Tensor:
    """Returns fp32 logits over the temperature; DROPPED for tokens outside `allowed_NV` (None: all are inside)."""
    x_NV = logits_NV.float() / temperature
    if allowed_NV is not None:
        x_NV = x_NV.masked_fill(~allowed_NV, DROPPED)
    return x_NV


def losses_in_chunks(
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    loss_fn: LossFn,
    chunk_bytes: int,
    product: Product = F.linear,
) -> torch.Tensor:
    """Returns `loss_fn(product(x, weight), targets)`, with a row for each row of x and with at most `chunk_bytes` of
    fp32 logits at once (0: no limit). `loss_fn` gets the logits in the dtype of the product; it need not be a loss:
    `Transformer.logprobs` takes log-probabilities and entropies.

    With more than one chunk, the backward pass computes the logits of each chunk again and adds up the gradients of the
    weight in fp32. A chunk has at least one row, even if that is larger.
    """
    if not chunk_bytes:
        return loss_fn(product(x_ND, weight_VD), targets_N)

    chunk_rows = max(1, chunk_bytes // (FP32_BYTES * weight_VD.shape[0]))
    if len(x_ND) <= chunk_rows:
        return loss_fn(product(x_ND, weight_VD), targets_N)
    losses_N = _LossesInChunks.apply(x_ND, weight_VD, targets_N, loss_fn, product, chunk_rows)
    assert isinstance(losses_N, torch.Tensor)
    return losses_N


class _LossesInChunks(torch.autograd.Function):
    """Adds up the gradients of the weight in fp32; autograd (`checkpoint` around each chunk) would add bf16 in bf16."""

    @staticmethod
    def forward(
        ctx,
        x_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        loss_fn: LossFn,
        product: Product,
        chunk_rows: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_ND, weight_VD, targets_N)
        ctx.loss_fn, ctx.product, ctx.chunk_rows = loss_fn, product, chunk_rows
        chunks = zip(x_ND.split(chunk_rows), targets_N.split(chunk_rows), strict=True)
        return torch.cat([loss_fn(product(x_nD, weight_VD), targets_n) for x_nD, targets_n in chunks])

    @staticmethod
    def backward(ctx, grad_N: torch.Tensor):
        """Returns the gradients of x and of the weight, in their dtypes, from new logits of each chunk."""
        x_ND, weight_VD, targets_N = ctx.saved_tensors
        grad_x_ND, grad_weight_VD = torch.empty_like(x_ND), None

        chunks = (tensor.split(ctx.chunk_rows) for tensor in (x_ND, targets_N, grad_N, grad_x_ND))
        for x_nD, targets_n, grad_n, grad_x_nD in zip(*chunks, strict=True):
            with torch.enable_grad():
                inputs = (x_nD.detach().requires_grad_(), weight_VD.detach().requires_grad_())
                losses_n = ctx.loss_fn(ctx.product(*inputs), targets_n)
            chunk_grad_x_nD, chunk_grad_weight_VD = torch.autograd.grad(losses_n, inputs, grad_n)

            # `grad_x_nD` is a view of `grad_x_ND`. The weight's gradient is the sum over chunks, in fp32.
            grad_x_nD.copy_(chunk_grad_x_nD)
            if grad_weight_VD is None:
                grad_weight_VD = chunk_grad_weight_VD.float()
            else:
                grad_weight_VD.add_(chunk_grad_weight_VD)

        assert grad_weight_VD is not None
        return grad_x_ND, grad_weight_VD.to(weight_VD.dtype), None, None, None, None
