"""What the variable-length kernels of FlashAttention refuse, since fake kernels check nothing.

In our words. FlashAttention-2, which torch uses by default: torch's `mha_varlen_fwd` (`flash_api.cpp`),
`_flash_attention_forward` (`attention.cu`) and the documentation of `varlen_attn`; the bounds of `max_q` and `max_k`
are ours. FlashAttention-3, which torch 2.13 uses only after `torch.nn.attention.activate_flash_attention_impl("FA3")`
and with its package installed: `mha_fwd` in `hopper/flash_api.cpp` of Dao-AILab/flash-attention, and
`torch/nn/attention/_fa3.py`, which also demands compute capability 9.0.
"""

import torch
from torch.nn.attention.varlen import varlen_attn

HALVES = (torch.bfloat16, torch.float16)


class RefusedError(Exception):
    """The kernel would refuse the call."""


def checked_varlen_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    kernel: str = "FA2",
    **options,
) -> torch.Tensor:
    """`varlen_attn` behind the kernel's checks. `kernel`: FA2 | FA3."""
    paged, fa2 = block_table is not None, kernel == "FA2"
    if cu_q is None or (cu_k is None and (fa2 or not paged)):
        raise RefusedError("query and key offsets: both must be set")
    n_rows, d_head = cu_q.numel() - 1, q.shape[-1]
    heads, key_heads = q.shape[1], k.shape[-2]
    _demand(q.dtype in HALVES, f"queries are {q.dtype}: only bf16 and fp16")
    _demand(k.dtype == v.dtype == q.dtype, "keys and values must have the dtype of the queries")
    _demand(q.dim() == 3, "queries must be (N, H, K)")
    _demand(k.shape == v.shape, "keys and values must have one shape")
    _demand(k.shape[-1] == d_head, "queries and keys must have one head dimension")
    _demand(d_head % 8 == 0 and d_head <= 256, f"head dimension {d_head}: only multiples of 8 up to 256")
    _demand(heads % key_heads == 0, "key heads must divide query heads")
    for name, tensor in (("queries", q), ("keys", k), ("values", v)):
        _demand(tensor.device.type == "cuda", f"{name} must be on CUDA")
        _demand(tensor.stride(-1) == 1, f"{name} must be contiguous in the last dimension")
    _demand(n_rows > 0, "no sequences")
    _integers("query offsets", cu_q, n_rows + 1)
    if cu_k is not None:
        _integers("key offsets", cu_k, n_rows + 1)
    if seqused_k is not None:
        _integers("used keys", seqused_k, n_rows)
    if paged:
        _demand(k.dim() == 4, "paged keys must be (pages, page size, G, K)")
        _demand(not fa2 or k.shape[1] % 256 == 0, f"pages of {k.shape[1]} tokens: only multiples of 256")
        _demand(fa2 or cu_k is None, "FlashAttention-3: key offsets are refused beside a table of pages")
        _demand(block_table.dtype == torch.int32, "the table of pages must be int32")
        _demand(block_table.device.type == "cuda", "the table of pages must be on CUDA")
        _demand(block_table.stride(-1) == 1, "the table of pages must be contiguous in the last dimension")
        _demand(block_table.dim() == 2 and len(block_table) == n_rows, "the table must have a row for each sequence")
        _demand(seqused_k is not None, "a table of pages needs the number of used keys")
        _demand(max_k <= block_table.shape[1] * k.shape[1], "max_k exceeds the pages of a row")
    else:
        _demand(k.dim() == 3, "keys must be (N, G, K)")
    _demand(0 < max_q <= len(q), "max_q exceeds the queries")
    output = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, seqused_k=seqused_k, block_table=block_table, **options)
    assert isinstance(output, torch.Tensor)
    return output


def _integers(name: str, tensor: torch.Tensor, count: int) -> None:
    _demand(tensor.dtype == torch.int32, f"{name} must be int32")
    _demand(tensor.device.type == "cuda", f"{name} must be on CUDA")
    _demand(tensor.is_contiguous(), f"{name} must be contiguous")
    _demand(tuple(tensor.shape) == (count,), f"{name} must have shape ({count},)")


def _demand(holds: bool, message: str) -> None:
    if not holds:
        raise RefusedError(message)
