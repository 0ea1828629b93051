"""Keys of a pool of generation actors that works beside the ranks of a stage."""

from dataclasses import dataclass

from dist_lm.errors import require

DISJOINT, SHARED = "disjoint", "shared"
AS_MANY = -1


@dataclass
class RolloutPoolConfig:
    """Where rollouts are drawn, and how large the engines are."""

    # engines, each in a Ray actor of its own; 0: one engine in the process of the first rank; -1, where placement is
    # shared: one for each `tp` GPUs of the ranks, or one a node without GPUs
    actors: int = 1
    # disjoint: actors have GPUs of their own, or without GPUs a share of the cores; shared: GPUs and cores are those of
    # the ranks, in turns
    placement: str = DISJOINT
    tp: int = 1  # GPUs that share the model of an engine
    cache_tokens: int = 16384  # of all sequences of an engine together
    page_tokens: int = 64
    max_sequences: int = 64  # that an engine runs at a time

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
