"""The keys of a pool of generation engines (`rlhf.pool`): their number, where they run, and the size of their cache."""

from dataclasses import dataclass
from typing import ClassVar

from dist_lm.errors import require

DISJOINT, SHARED = "disjoint", "shared"  # values of `placement`
PUSH_AUTO, PUSH_RAY, PUSH_DIRECT = "auto", "ray", "direct"  # values of `push`
AS_MANY = -1  # value of `actors`: one engine for each `tp` GPUs of the ranks

# smallest and largest page whose size is chosen for `page_tokens=0`: on CPUs, on CUDA in half precision
FEWEST_PAGE_TOKENS, MOST_PAGE_TOKENS = 64, 256

CACHE_SHARE = {"cuda": 0.85, "cpu": 0.25}
"""Share of the free memory that an automatic cache takes. Engines on CPUs of one node share its memory."""


@dataclass
class EngineConfig:
    """Number and size of the engines that generate, each in a Ray actor of its own."""

    actors: int = -1  # engines; -1: one for each parallel.tp GPUs of a node, or one per node without GPUs
    cache_tokens: int = 16384  # KV cache of an engine, all sequences together
    page_tokens: int = 0  # size of a page of the cache; 0: 256 on CUDA in half precision, otherwise 64
    max_sequences: int = 64  # sequences that an engine runs at the same time
    step_tokens: int = 0  # most prompt tokens that an engine computes in a step; 0: 8192 on CUDA, otherwise 512

    def check_actors(self, group: str) -> None:
        """Refuses a number of actors out of bounds; returns nothing.

        Args:
            group: the group of the configuration that has this key.

        Raises:
            ConfigError: names `GROUP.actors`.
        """
        require(self.actors == -1 or self.actors > 0, f"{group}.actors", self.actors, "a positive integer, or -1")


@dataclass
class RolloutPoolConfig(EngineConfig):
    """Number, placement and size of the engines that generate rollouts."""

    key: ClassVar[str] = "rlhf.pool"  # name of this group in error messages
    without: ClassVar[str] = "generates in the process of the first rank"  # effect of KEY.actors=0, for messages
    may_share: ClassVar[bool] = True  # whether placement may be shared

    # engines, each in its own Ray actor; 0: one engine in the process of the first rank; -1, with placement shared: one
    # for each `tp` GPUs of the ranks, or one per node without GPUs
    actors: int = 1
    # disjoint: actors have their own GPUs, or without GPUs a share of the cores; shared: actors and ranks use the same
    # GPUs and cores in turns
    placement: str = DISJOINT
    tp: int = 1  # GPUs that share the model of an engine
    # KV cache of an engine in tokens, all sequences together; 0: as many as fit into free memory (CACHE_SHARE), and at
    # most max_sequences whole contexts
    cache_tokens: int = 0
    # path of new weights: ray: Ray's object store; direct: NCCL broadcast, or CUDA IPC where rank 0 and actor share a
    # GPU (without GPUs gloo, or shared memory inside a node), and Ray's store where that fails; auto: direct with GPUs
    push: str = PUSH_AUTO

    def __post_init__(self) -> None:
        one_per_gpu = self.actors == AS_MANY and self.placement == SHARED
        accepted = f"0 (the first rank generates), a positive integer, or -1 with {self.key}.placement=shared"
        require(self.actors >= 0 or one_per_gpu, f"{self.key}.actors", self.actors, accepted)

        placements = (DISJOINT, SHARED)
        require(self.placement in placements, f"{self.key}.placement", self.placement, " or ".join(placements))
        pushes = (PUSH_AUTO, PUSH_RAY, PUSH_DIRECT)
        require(self.push in pushes, f"{self.key}.push", self.push, ", ".join(pushes))

        for key in ("tp", "max_sequences"):
            require(getattr(self, key) > 0, f"{self.key}.{key}", getattr(self, key), "a positive integer")

        accepted = "a positive integer, or 0 to choose"
        require(self.step_tokens >= 0, f"{self.key}.step_tokens", self.step_tokens, accepted)
        pages = self.page_tokens
        require(pages >= 0, f"{self.key}.page_tokens", pages, "a positive integer, or 0 to choose")
        # A cache of less than one page could not hold a single token.
        cache, smallest = self.cache_tokens, pages or FEWEST_PAGE_TOKENS
        accepted = f"at least {self.key}.page_tokens={smallest}, or 0 to take what fits into free memory"
        require(cache == 0 or cache >= smallest, f"{self.key}.cache_tokens", cache, accepted)
