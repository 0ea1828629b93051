"""Frozen matrices in four bits: NF4 with double quantisation (Dettmers et al. 2023, arXiv 2305.14314, section 3).

64 entries in a row of a matrix share a scale, their largest magnitude, and each entry is one of 16 multiples of it. The
scales less their mean are 8-bit floats, of which 256 share a scale in turn. That is 4.13 bits for each entry.

A product brings the matrix back to the dtype of its input, forward and backward, and keeps only the four bits between.
The kernels are those of bitsandbytes. A matrix is always quantised on the CPU, so its bits depend on its values alone.
"""

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses
from torch import nn

from dist_lm.config.stage import NEEDS_BITSANDBYTES
from dist_lm.errors import UserError
from dist_lm.model.size import SCALE_VALUES, SCALES_PER_SCALE, WEIGHTS_PER_SCALE, is_matrix


class QuantisedMatrix(nn.Module):
    """A matrix of a frozen base in four bits; it has buffers, and no parameter.

    It stands under the name that the parameter has in a model without quantisation, such as
    `blocks.0.attention.query`. New ones have no values, see `quantise`.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        """
        Raises:
            UserError: bitsandbytes is not installed.
        """
        super().__init__()
        load_kernels()
        self.shape = torch.Size(shape)
        n_scales = -(-self.shape.numel() // WEIGHTS_PER_SCALE)

        def buffer(name: str, size: int, dtype: torch.dtype) -> None:
            # Not in a state dict: the values follow from those of the base.
            self.register_buffer(name, torch.empty(size, dtype=dtype), persistent=False)

        self.codes: torch.Tensor
        self.scales: torch.Tensor
        self.outer_scales: torch.Tensor
        self.mean_scale: torch.Tensor
        self.scale_values: torch.Tensor
        buffer("codes", -(-self.shape.numel() // 2), torch.uint8)  # two entries of the matrix each
        buffer("scales", n_scales, torch.uint8)
        buffer("outer_scales", -(-n_scales // SCALES_PER_SCALE), torch.float32)
        buffer("mean_scale", 1, torch.float32)
        buffer("scale_values", SCALE_VALUES, torch.float32)

    @torch.no_grad()
    def quantise(self, weight: torch.Tensor) -> None:
        """Takes the values of `weight`, fp32 on the CPU, of the shape of this matrix."""
        from bitsandbytes import functional  # pyright: ignore[reportMissingImports]  an extra

        assert weight.shape == self.shape
        assert weight.device.type == "cpu"
        codes, state = functional.quantize_4bit(weight.contiguous(), blocksize=WEIGHTS_PER_SCALE, quant_type="nf4")

        # Not torch's mean, whose rounding depends on the number of threads.
        mean = state.absmax.numpy().mean(dtype="float64")
        mean_scale = torch.tensor([mean], dtype=torch.float32)
        scales, outer = functional.quantize_blockwise(state.absmax - mean_scale, blocksize=SCALES_PER_SCALE)
        self.codes.copy_(codes.flatten())
        self.scales.copy_(scales)
        assert outer.absmax is not None
        self.outer_scales.copy_(outer.absmax)
        self.mean_scale.copy_(mean_scale)
        assert outer.code is not None
        self.scale_values.copy_(outer.code)

    @torch.no_grad()
    def copy(self, source: "QuantisedMatrix") -> None:
        """Takes the bits of another matrix of the same shape."""
        for name, buffer in self.named_buffers():
            buffer.copy_(source.get_buffer(name))

    @property
    def nbytes(self) -> int:
        """Bytes that the matrix takes."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the matrix that products compute with, as a new tensor.

        Args:
            dtype: fp32, bf16 or fp16.
        """
        return _dequantised(self._stored(), self.shape, dtype)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None, input_first: bool = False) -> torch.Tensor:
        """Returns W x + bias for a matrix (*output, input), or with `input_first` for one that is stored as
        (*input, output); all dimensions but the last count as one. Only x gets a gradient."""
        return _FrozenProduct.apply(x, bias, self.shape, input_first, *self._stored())  # pyright: ignore

    def _stored(self) -> tuple[torch.Tensor, ...]:
        return self.codes, self.scales, self.outer_scales, self.mean_scale, self.scale_values


class QuantisedLinear(nn.Module):
    """Stands for nn.Linear in a frozen base in four bits; the bias keeps its dtype."""

    def __init__(self, n_inputs: int, n_outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = QuantisedMatrix((n_outputs, n_inputs))
        self.bias = nn.Parameter(torch.empty(n_outputs)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.product(x, self.bias)


class _FrozenProduct(torch.autograd.Function):
    """F.linear with a matrix that is dequantised for the forward pass, and once more for the backward pass."""

    @staticmethod
    def forward(ctx, x, bias, shape, input_first, *stored):
        ctx.save_for_backward(*stored)
        ctx.shape, ctx.input_first = shape, input_first

        weight = _dequantised(stored, shape, x.dtype).flatten(0, -2)
        return F.linear(x, weight.t() if input_first else weight, bias)

    @staticmethod
    def backward(ctx, *gradients):
        (gradient,) = gradients
        stored = ctx.saved_tensors  # once: activation checkpointing gives them a single time
        weight = _dequantised(stored, ctx.shape, gradient.dtype).flatten(0, -2)
        of_input = F.linear(gradient, weight if ctx.input_first else weight.t())
        return (of_input, None, None, None, *(None for _ in stored))


def _dequantised(stored: tuple[torch.Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Returns a matrix of `shape`; `stored` are the buffers of `QuantisedMatrix`, in their order."""
    codes, scales, outer_scales, mean_scale, scale_values = stored
    # The operators behind bitsandbytes.functional, which the compiler and fake tensors know.
    kernels = torch.ops.bitsandbytes
    wide_scales = kernels.dequantize_blockwise(scales, outer_scales, scale_values, SCALES_PER_SCALE, torch.float32)
    wide_scales = wide_scales + mean_scale

    # Threads share out the rows. Rows of other lengths count as one: the kernel takes even lengths alone.
    width = shape[-1]
    if width % WEIGHTS_PER_SCALE:
        width = 2 * codes.numel()
    rows = [2 * codes.numel() // width, width]
    weight = kernels.dequantize_4bit(codes, wide_scales, WEIGHTS_PER_SCALE, "nf4", rows, dtype)
    return weight.flatten()[: shape.numel()].view(shape)


def round_trip(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Returns a parameter of a model (fp32, on the CPU) as a base in four bits has it: matrices of blocks rounded to
    NF4, others unchanged.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if not is_matrix(name):
        return weight
    matrix = QuantisedMatrix(weight.shape)
    matrix.quantise(weight)
    return matrix.dequantised(torch.float32)


def quantised_matrices(model: nn.Module) -> dict[str, QuantisedMatrix]:
    """Returns the matrices of a model that are in four bits, by the names of their parameters in other models."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantisedMatrix)}


def load_kernels() -> None:
    """Imports bitsandbytes, which registers its operators.

    Raises:
        UserError: it is not installed.
    """
    # It warns of a kernel for other products, which it would fetch from a model hub.
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportMissingImports]  an extra
    except ImportError as error:
        raise UserError(NEEDS_BITSANDBYTES) from error
    finally:
        log.setLevel(level)
