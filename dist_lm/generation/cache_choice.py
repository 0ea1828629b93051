"""Which cache fits a device."""

import torch

from dist_lm.generation.flash_pages import PAGE_TOKENS, FlashPages
from dist_lm.generation.paged_cache import HeadShape, PagedCache
from dist_lm.generation.plain_pages import PlainPages
from dist_lm.model.kernels import packs_documents


def build_cache(
    shape: HeadShape, n_pages: int, page_tokens: int, dtype: torch.dtype, device: torch.device
) -> PagedCache:
    """The cache for a device: for the flash kernel where that takes heads and pages, else for plain PyTorch."""
    half = dtype in (torch.bfloat16, torch.float16)
    flash = packs_documents(device.type, half, shape.d_head) and page_tokens % PAGE_TOKENS == 0
    return (FlashPages if flash else PlainPages)(shape, n_pages, page_tokens, dtype, device)
