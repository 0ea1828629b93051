"""Sizes of an engine: the options that a caller sets, and what an engine takes where they are 0."""

from dataclasses import dataclass, replace

import psutil
import torch

from dist_lm.config.model import ModelConfig
from dist_lm.config.pool import CACHE_SHARE
from dist_lm.errors import ConfigError, require
from dist_lm.generation.paged_cache import ALIGNED, BLOCK, pages_for
from dist_lm.generation.shard import share_of
from dist_lm.model.size import kv_bytes_per_token

GPU_STEP_TOKENS, CPU_STEP_TOKENS, CPU_PIECE_TOKENS = 8192, 512, 256  # see `EngineOptions.for_device`


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of an engine."""

    cache_tokens: int = 16384  # tokens that the cache holds, summed over sequences; 0: as many as fit into free memory
    # tokens of a page; 0: 256 where the flash kernel runs (CUDA in half precision, multiples of 256 only), otherwise 64
    page_tokens: int = 0
    max_sequences: int = 64  # sequences that run at the same time
    piece_tokens: int = 0  # tokens of a prompt that are computed at once; 0: 256, on CUDA step_tokens
    # most prompt tokens per step; one piece is always computed, even if it is longer; 0: 512, on CUDA 8192
    step_tokens: int = 0
    prefix_cache: bool = False  # keep the pages of prompts, while there is space, for later ones that begin alike

    def __post_init__(self) -> None:
        for key in ("page_tokens", "piece_tokens", "step_tokens"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "a positive integer, or 0 to choose")
        require(self.max_sequences > 0, "max_sequences", self.max_sequences, "a positive integer")
        # A page must be a multiple of a vector register: otherwise rounding would depend on the number of pages.
        require(self.page_tokens % ALIGNED == 0, "page_tokens", self.page_tokens, f"a multiple of {ALIGNED}")
        has_page = self.cache_tokens == 0 or self.cache_tokens >= max(1, self.page_tokens)
        accepted = f"at least page_tokens={self.page_tokens}, or 0 to take what fits into free memory"
        require(has_page, "cache_tokens", self.cache_tokens, accepted)
        # A block must be computed alike by each request, and lie in one page.
        for key in ("page_tokens", "piece_tokens") if self.prefix_cache else ():
            require(getattr(self, key) % BLOCK == 0, key, getattr(self, key), f"a multiple of {BLOCK} for prefix_cache")

    def for_device(self, device: torch.device) -> "EngineOptions":
        """Returns a copy with the tokens of steps and pieces chosen, where they are 0.

        A GPU multiplies 512 rows hardly faster than 4,096, and prompts then wait for each other. On a CPU small pieces
        let running sequences go on.
        """
        on_gpu = device.type == "cuda"
        step_tokens = self.step_tokens or (GPU_STEP_TOKENS if on_gpu else CPU_STEP_TOKENS)
        piece_tokens = self.piece_tokens or CPU_PIECE_TOKENS
        if on_gpu and not self.piece_tokens:
            # Complete blocks, as the prefix cache needs them.
            piece_tokens = max(BLOCK, step_tokens // BLOCK * BLOCK)
        return replace(self, step_tokens=step_tokens, piece_tokens=piece_tokens)

    @property
    def n_pages(self) -> int:
        """Pages of the cache; 0: their number is chosen when a request comes."""
        assert self.page_tokens, "an engine chooses it"
        return self.cache_tokens // self.page_tokens

    def most_tokens(self, config: ModelConfig) -> int:
        """Returns the most tokens that the cache can hold."""
        return self.cache_tokens or self.max_sequences * config.max_seq_len


def pages_that_fit(
    config: ModelConfig, options: EngineOptions, dtype: torch.dtype, device: torch.device, tp: int = 1
) -> int:
    """Returns the number of pages that hold `max_sequences` full contexts, but at most as many as the share CACHE_SHARE
    of the memory that is free now on `device` holds.

    Args:
        tp: ranks of the model; each holds only its part of every page.

    Raises:
        ConfigError: that share of free memory does not hold one context (`model.max_seq_len` tokens).
    """
    # The rest of the free memory is for activations and logits, whose size depends on the requests.
    free = free_bytes(device)
    share = CACHE_SHARE[device.type]
    page_bytes = options.page_tokens * kv_bytes_per_token(config, share_of(config, tp).kv_heads, dtype.itemsize)
    n_fitting = int(share * free / page_bytes)
    n_context = pages_for(config.max_seq_len, options.page_tokens)
    if n_fitting < n_context:
        raise ConfigError(
            f"cache_tokens=0: {share:.0%} of {free / 2**30:.2f} GiB of free {device} memory hold "
            f"{n_fitting * options.page_tokens} tokens; expected at least model.max_seq_len={config.max_seq_len}: "
            "end what uses the memory, or set cache_tokens"
        )
    return min(n_fitting, options.max_sequences * n_context)


def free_bytes(device: torch.device) -> int:
    """Returns the bytes that this process could allocate, on the card or the host."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    # Torch keeps freed memory for reuse, so the driver does not count it as free.
    cached_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached_by_torch
