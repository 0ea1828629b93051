"""Linear layers for decoding: the same bits for a row whatever other rows there are, and fast for few rows.

On CPU in fp32 weights are laid out once for oneDNN, which halves the time of a matrix product with few rows; from two
rows on it gives a row the same bits whatever their number. Elsewhere it is `F.linear`.

Dimensions: M rows, D inputs, N outputs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

FEWEST_ROWS = 2  # with one row, libraries take another way, which rounds differently
TYPICAL_ROWS = 32  # that the layout is made for; it works for any
VECTOR = 32  # numbers: rows of hidden units are padded to a multiple, so that the tail of a loop falls into none

Linear = Callable[[torch.Tensor], torch.Tensor]
"""(M, D) -> (M, N)."""


def build_linear(weight_ND: torch.Tensor, bias_N: torch.Tensor | None) -> Linear:
    """`x @ weight^T + bias`, with the weight laid out for the device it is on."""
    if _packs(weight_ND):
        return _packed(weight_ND, bias_N)
    return lambda x_MD: F.linear(x_MD, weight_ND, bias_N)


def _packs(weight: torch.Tensor) -> bool:
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32
    return fits and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def _packed(weight_ND: torch.Tensor, bias_N: torch.Tensor | None) -> Linear:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_ND.contiguous(), TYPICAL_ROWS)
    bias = None if bias_N is None else bias_N.contiguous()
    product = torch.ops.mkldnn._linear_pointwise
    return lambda x_MD: product(x_MD, packed, bias, "none", [], "")
