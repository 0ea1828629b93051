"""Next-token cross-entropy and log-probabilities, in chunks of logits that fit into memory.

Dimensions: N tokens, D d_model, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

FP32_BYTES = 4
DROPPED = -1e30
"""Logit of a token outside the set drawn from. Finite: a rank may hold none of the set, and -inf would become nan."""

Losses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits (N, V), targets (N, ...) int64) -> fp32 (N, ...); each row depends on its own logits alone."""


class Logprobs(NamedTuple):
    """Sampled tokens and their distributions, in nats, fp32."""

    logprob_BT: torch.Tensor  # of the targets
    entropy_BT: torch.Tensor  # of the distribution drawn from


def token_losses(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> torch.Tensor:
    """Cross-entropy of every token in nats, fp32, (N,).

    Args:
        label_smoothing: the target distribution is `(1 - a) * one_hot + a / V` (Szegedy et al. 2016, section 7).
        z_loss: adds `z_loss * log(Z)^2`, Z the sum of the exponentials (Chowdhery et al. 2022, section 5).
    """
    logits_NV = logits_NV.float()
    losses_N = F.cross_entropy(logits_NV, targets_N, reduction="none", label_smoothing=label_smoothing)
    return losses_N + z_loss * logits_NV.logsumexp(-1).square() if z_loss else losses_N


def logprobs_and_entropy(
    logits_NV: torch.Tensor,
    targets_N: torch.Tensor,
    temperature: float,
    entropy_gradient: bool,
    kept_NV: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probability of each target, and entropy, of the distribution sampled at `temperature`; nats, fp32, (N, 2).

    Args:
        entropy_gradient: whether the entropy has a gradient; the log-probability always has one.
        kept_NV: bool; the tokens over which the distribution is renormalised. None: all.
    """
    x_NV = tempered(logits_NV, temperature, kept_NV)
    log_z_N = x_NV.logsumexp(-1)
    logprob_N = x_NV.gather(-1, targets_N[:, None])[:, 0] - log_z_N
    held_NV, held_log_z_N = (x_NV, log_z_N) if entropy_gradient else (x_NV.detach(), log_z_N.detach())
    entropy_N = held_log_z_N - (held_NV.softmax(-1) * held_NV).sum(-1)
    return torch.stack([logprob_N, entropy_N], dim=-1)


def tempered(logits_NV: torch.Tensor, temperature: float, kept_NV: torch.Tensor | None) -> torch.Tensor:
    """fp32 logits over the temperature; DROPPED for tokens outside `kept_NV` (None: all are inside)."""
    x_NV = logits_NV.float() / temperature
    return x_NV if kept_NV is None else x_NV.masked_fill(~kept_NV, DROPPED)


def losses_in_chunks(
    x_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, losses: Losses, chunk_bytes: int
) -> torch.Tensor:
    """`losses(x @ weight^T, targets)` with at most `chunk_bytes` of fp32 logits at once (0: no limit).

    With more than one chunk, the backward pass computes the logits of each chunk again and adds up the gradients of the
    weight in fp32.
    """
    step = max(1, chunk_bytes // (FP32_BYTES * weight_VD.shape[0])) if chunk_bytes else len(x_ND)
    if len(x_ND) <= step:
        return losses(F.linear(x_ND, weight_VD), targets_N)
    result = _LossesInChunks.apply(x_ND, weight_VD, targets_N, losses, step)
    assert isinstance(result, torch.Tensor)
    return result


class _LossesInChunks(torch.autograd.Function):
    """`checkpoint` around each chunk would not do: autograd adds up the gradients of a bf16 weight in bf16."""

    @staticmethod
    def forward(
        ctx, x_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, losses: Losses, step: int
    ) -> torch.Tensor:
        ctx.save_for_backward(x_ND, weight_VD, targets_N)
        ctx.losses, ctx.step = losses, step
        parts = zip(x_ND.split(step), targets_N.split(step), strict=True)
        return torch.cat([losses(F.linear(x, weight_VD), targets) for x, targets in parts])

    @staticmethod
    def backward(ctx, gradient_N: torch.Tensor):
        x_ND, weight_VD, targets_N = ctx.saved_tensors
        of_x, of_weight = torch.empty_like(x_ND), None
        parts = (value.split(ctx.step) for value in (x_ND, targets_N, gradient_N, of_x))
        for x, targets, gradient, into in zip(*parts, strict=True):
            with torch.enable_grad():
                inputs = (x.detach().requires_grad_(), weight_VD.detach().requires_grad_())
                outputs = ctx.losses(F.linear(*inputs), targets)
            of_part, of_weight_part = torch.autograd.grad(outputs, inputs, gradient)
            into.copy_(of_part)
            of_weight = of_weight_part.float() if of_weight is None else of_weight.add_(of_weight_part)
        assert of_weight is not None
        return of_x, of_weight.to(weight_VD.dtype), None, None, None
