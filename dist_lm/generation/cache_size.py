"""Sizes of an engine: its options, and the pages of a cache that fit into free memory."""

from dataclasses import dataclass

import psutil
import torch

from dist_lm.config.model import ModelConfig
from dist_lm.config.rlhf import CACHE_SHARE
from dist_lm.errors import ConfigError, require
from dist_lm.generation.paged_cache import pages_for
from dist_lm.generation.plain_pages import ALIGNED
from dist_lm.generation.shard import share_of
from dist_lm.model.size import kv_bytes_per_token


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of an engine."""

    cache_tokens: int = 16384  # tokens of all sequences together that the cache holds; 0: what fits into free memory
    # tokens of a page; 0: 256 where the flash kernel runs (CUDA in half precision, multiples of 256 only), otherwise 64
    page_tokens: int = 0
    max_sequences: int = 64  # sequences that run at the same time
    piece_tokens: int = 256  # tokens of a prompt that are computed at once
    step_tokens: int = 512  # prompt tokens per step, at most, but always one piece

    def __post_init__(self) -> None:
        require(self.page_tokens >= 0, "page_tokens", self.page_tokens, "a positive integer, or 0 to choose")
        for key in ("max_sequences", "piece_tokens", "step_tokens"):
            require(getattr(self, key) > 0, key, getattr(self, key), "a positive integer")
        # pages of whole vectors: otherwise rounding would depend on the number of pages
        require(self.page_tokens % ALIGNED == 0, "page_tokens", self.page_tokens, f"a multiple of {ALIGNED}")
        require(
            self.cache_tokens == 0 or self.cache_tokens >= max(1, self.page_tokens),
            "cache_tokens",
            self.cache_tokens,
            f"at least page_tokens={self.page_tokens}, or 0 to take what fits into free memory",
        )

    @property
    def n_pages(self) -> int:
        """Pages of the cache; 0: chosen when a request comes."""
        assert self.page_tokens, "an engine chooses it"
        return self.cache_tokens // self.page_tokens

    def most_tokens(self, config: ModelConfig) -> int:
        """The most tokens that the cache can hold."""
        return self.cache_tokens or self.max_sequences * config.max_seq_len


def pages_that_fit(
    config: ModelConfig, options: EngineOptions, dtype: torch.dtype, device: torch.device, tp: int = 1
) -> int:
    """Pages for `max_sequences` whole contexts, or as many as free memory holds.

    Raises:
        ConfigError: free memory does not hold one context.
    """
    free, size = free_bytes(device), options.page_tokens
    share = CACHE_SHARE[device.type]
    page_bytes = size * kv_bytes_per_token(config, share_of(config, tp).kv_heads, dtype.itemsize)
    fit, least = int(share * free / page_bytes), pages_for(config.max_seq_len, size)
    if fit < least:
        raise ConfigError(
            f"cache_tokens=0: {share:.0%} of {free / 2**30:.2f} GiB of free {device} memory hold {fit * size} tokens; "
            f"expected at least model.max_seq_len={config.max_seq_len}: end what uses the memory, or set cache_tokens"
        )
    return min(fit, options.max_sequences * least)


def free_bytes(device: torch.device) -> int:
    """Memory that this process could allocate: of the card, or of the host."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # kept by torch for reuse
    return torch.cuda.mem_get_info(device)[0] + own
