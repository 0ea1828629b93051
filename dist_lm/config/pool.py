"""Keys of a pool of generation actors beside the ranks of a stage."""

from dataclasses import dataclass

from dist_lm.errors import require

DISJOINT, SHARED = "disjoint", "shared"
AS_MANY = -1


@dataclass
class RolloutPoolConfig:
    """Number, placement and size of the engines that generate rollouts."""

    # engines, each in its own Ray actor; 0: one engine in the process of the first rank; -1, with placement shared: one
    # for each `tp` GPUs of the ranks, or one per node without GPUs
    actors: int = 1
    # disjoint: actors have their own GPUs, or without GPUs a share of the cores; shared: actors and ranks use the same
    # GPUs and cores in turns
    placement: str = DISJOINT
    tp: int = 1  # GPUs that share the model of an engine
    cache_tokens: int = 16384  # KV cache of an engine, all sequences together
    page_tokens: int = 64
    max_sequences: int = 64  # at a time in an engine

    def __post_init__(self) -> None:
        accepted = "0 (the first rank generates), a positive integer, or -1 with rlhf.pool.placement=shared"
        may_be_all = self.actors == AS_MANY and self.placement == SHARED
        require(self.actors >= 0 or may_be_all, "rlhf.pool.actors", self.actors, accepted)
        require(self.placement in (DISJOINT, SHARED), "rlhf.pool.placement", self.placement, f"{DISJOINT} or {SHARED}")
        for key in ("tp", "cache_tokens", "page_tokens", "max_sequences"):
            require(getattr(self, key) > 0, f"rlhf.pool.{key}", getattr(self, key), "a positive integer")
        require(
            self.cache_tokens >= self.page_tokens,
            "rlhf.pool.cache_tokens",
            self.cache_tokens,
            f"at least rlhf.pool.page_tokens={self.page_tokens}",
        )
