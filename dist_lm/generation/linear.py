"""Linear layers for decoding: fast for few rows, and a row gets the same bits in any batch.

On the CPU in fp32, weights are packed once for oneDNN, which halves the time of a product with few rows. With two or
more rows, oneDNN gives a row the same bits for any number of rows. For a single row oneDNN may choose a kernel that
adds in another order; then the inputs are split into parts for which it does not. The kernel of the product also adds
the residual and applies the activation. On other devices and dtypes a layer is `F.linear`.

Dimensions: M rows, D inputs, N outputs.
"""

from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.model.cross_entropy import wide_product

TYPICAL_ROWS = 32  # the packed layout is chosen for this many rows and works for any number
VECTOR = 32  # rows of hidden units are padded to a multiple, so that no kernel loop has a tail
PARTS = (1, 2, 4, 8)  # numbers of parts that are tried
GELUS = {"gelu": "none", "gelu_tanh": "tanh"}  # values of model.ffn -> torch's name of the approximation of GELU
_NO_ACTIVATION = ("none", [], "")


class Linear(Protocol):
    """A linear layer that also adds a second argument, mostly the residual stream."""

    def __call__(self, x_MD: torch.Tensor, added_MN: torch.Tensor | None = None) -> torch.Tensor:
        """Returns `x @ weight^T + bias + added_MN`, (M, N); a layer with an activation applies it to that, and callers
        give it nothing to add."""
        ...


def build_linear(weight_ND: torch.Tensor, bias_N: torch.Tensor | None, activation: str = "") -> Linear:
    """Returns a layer with its weight laid out for the weight's device; a CPU gets a packed copy in fp32, else the
    layer reads `weight_ND` itself.

    Args:
        activation: key of `GELUS`, applied to the output; empty: none.
    """
    if _packs(weight_ND):
        return _packed(weight_ND, bias_N, activation)

    def linear(x_MD: torch.Tensor, added_MN: torch.Tensor | None = None) -> torch.Tensor:
        y_MN = F.linear(x_MD, weight_ND, bias_N)
        if added_MN is not None:
            y_MN = added_MN + y_MN
        if activation:
            y_MN = F.gelu(y_MN, approximate=GELUS[activation])
        return y_MN

    return linear


def wide_linear(weight_ND: torch.Tensor) -> Linear:
    """Returns a layer with half-precision inputs and fp32 outputs, which reads `weight_ND` itself."""

    def linear(x_MD: torch.Tensor, added_MN: torch.Tensor | None = None) -> torch.Tensor:
        y_MN = wide_product(x_MD, weight_ND)
        return y_MN if added_MN is None else added_MN + y_MN

    return linear


def _packs(weight: torch.Tensor) -> bool:
    is_fp32_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return is_fp32_on_cpu and has_onednn


def _packed(weight_ND: torch.Tensor, bias_N: torch.Tensor | None, activation: str) -> Linear:
    """Returns a layer with a packed copy of the weights, for fp32 on a CPU with oneDNN: a row gets the same bits in any
    batch.

    If oneDNN rounds a single row otherwise than a batch, the D inputs are split into equal slices, whose products are
    added. The first call for a shape measures how many slices that takes, and the number is cached. If no number helps,
    the layer computes a single row as a batch of two.

    Args:
        weight_ND: fp32.
        bias_N: fp32; None: none.
        activation: key of `GELUS`; empty: none.
    """
    n_outputs, width = weight_ND.shape
    n_parts = _parts_that_round_alike(n_outputs, width, bias_N is not None, activation, torch.get_num_threads())
    if n_parts:
        return _Packed(weight_ND.chunk(n_parts, dim=1), bias_N, activation)

    # No number of parts rounds alike, so a single row is computed twice, as a batch of two.
    packed = _Packed([weight_ND], bias_N, activation)

    def at_least_two_rows(x_MD: torch.Tensor, added_MN: torch.Tensor | None = None) -> torch.Tensor:
        if len(x_MD) > 1:
            return packed(x_MD, added_MN)
        if added_MN is not None:
            added_MN = added_MN.expand(2, -1)
        return packed(x_MD.expand(2, -1), added_MN)[:1]

    return at_least_two_rows


class _Packed:
    """Adds, in order, the products of parts of the inputs with their parts of the weight."""

    def __init__(self, parts_ND: Sequence[torch.Tensor], bias_N: torch.Tensor | None, activation: str) -> None:
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self._first_weight, *self._further_weights = [reorder(part.contiguous(), TYPICAL_ROWS) for part in parts_ND]
        self._bias = None if bias_N is None else bias_N.contiguous()
        self._approximate = GELUS.get(activation)
        self._activation = _NO_ACTIVATION
        if self._approximate:
            self._activation = ("gelu", [], self._approximate)
        self._width = parts_ND[0].shape[1]

    def __call__(self, x_MD: torch.Tensor, added_MN: torch.Tensor | None = None) -> torch.Tensor:
        product = torch.ops.mkldnn._linear_pointwise
        if added_MN is None and not self._further_weights:
            return product(x_MD, self._first_weight, self._bias, *self._activation)

        # Most layers have one part, and even a split into one costs microseconds.
        first, further = x_MD, []
        if self._further_weights:
            first, *further = x_MD.split(self._width, dim=1)
        if added_MN is None:
            y_MN = product(first, self._first_weight, self._bias, *_NO_ACTIVATION)
        else:
            y_MN = product.binary(first, added_MN, self._first_weight, self._bias, "add")
        for part, weight in zip(further, self._further_weights, strict=True):
            y_MN = product.binary(part, y_MN, weight, None, "add")
        if self._approximate:
            y_MN = F.gelu(y_MN, approximate=self._approximate)
        return y_MN


@cache
def _parts_that_round_alike(n_outputs: int, width: int, biased: bool, activation: str, threads: int) -> int:
    """Returns the smallest number of parts with which a single row gets the same bits as in a batch; 0: none does.

    It is measured with random weights. The result depends on shapes and the number of threads and not on the weights,
    so it is cached.
    """
    # Random weights stand for all weights: which kernel oneDNN takes depends on shapes alone.
    generator = torch.Generator().manual_seed(1)
    weight_ND = torch.randn(n_outputs, width, generator=generator)
    bias_N = torch.randn(n_outputs, generator=generator) if biased else None
    for n_parts in PARTS:
        # A part that is no multiple of a vector would need a loop with a tail, which rounds differently.
        if width % (n_parts * VECTOR) and n_parts > 1:
            break
        if _rounds_alike(_Packed(weight_ND.chunk(n_parts, dim=1), bias_N, activation), n_outputs, width):
            return n_parts
    return 0


def _rounds_alike(linear: Linear, n_outputs: int, width: int) -> bool:
    """Returns whether a single row gets the same bits as in a batch."""
    generator = torch.Generator().manual_seed(0)
    x_MD, added_MN = (torch.randn(4, n, generator=generator) for n in (width, n_outputs))
    rounds_alike = torch.equal(linear(x_MD[:1]), linear(x_MD)[:1])
    return rounds_alike and torch.equal(linear(x_MD[:1], added_MN[:1]), linear(x_MD, added_MN)[:1])
