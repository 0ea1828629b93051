"""Linear layers for decoding: the same bits for a row whatever other rows there are, and fast for few rows.

On CPU in fp32 weights are laid out once for oneDNN, which halves the time of a matrix product with few rows; from two
rows on it gives a row the same bits whatever their number, and for most shapes from one row on. Elsewhere it is
`F.linear`.

Dimensions: M rows, D inputs, N outputs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

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

    def product(x_MD: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x_MD, packed, bias, "none", [], "")

    if _rounds_alike(product, weight_ND.shape[1]):
        return product
    return lambda x_MD: product(x_MD) if len(x_MD) > 1 else product(torch.cat([x_MD, x_MD]))[:1]


def _rounds_alike(product: Linear, width: int) -> bool:
    """Whether one row alone gets the bits that it gets beside others: not where another kernel takes it."""
    x_MD = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    return torch.equal(product(x_MD[:1]), product(x_MD)[:1])
