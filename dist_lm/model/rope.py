"""Rotary position embedding (Su et al. 2021, equation 34), half-rotation form: pairs are (i, i + K/2).

Dimensions: B sequences, T tokens, H heads, K d_head.
"""

import torch

RopeTables = tuple[torch.Tensor, torch.Tensor]
"""(cos, sin), each (B or 1, T, 1, K); the first half of sin carries the minus of the rotation."""


def rope_tables(position_BT: torch.Tensor, d_head: int, base: float, dtype: torch.dtype) -> RopeTables:
    """Angles `position * base^(-2i/d_head)`, computed in fp32, as tables in `dtype`."""
    exponent = torch.arange(0, d_head, 2, dtype=torch.float32, device=position_BT.device) / d_head
    angle = position_BT[..., None, None].float() * (1.0 / base**exponent)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x_BTHK: torch.Tensor, tables: RopeTables) -> torch.Tensor:
    """`x * cos + cat(-x2, x1) * sin`, the minus being in the table."""
    cos, signed_sin = tables
    return torch.addcmul(x_BTHK * cos, x_BTHK.roll(x_BTHK.shape[-1] // 2, dims=-1), signed_sin)
