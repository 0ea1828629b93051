"""Keys of generation that several groups share: how tokens are drawn, and the engines that draw them."""

from dataclasses import dataclass

from dist_lm.errors import require


@dataclass
class SamplingConfig:
    """How the tokens of a completion are drawn."""

    max_new_tokens: int = 128  # longest completion
    temperature: float = 1.0  # divides the logits; 0: greedy
    top_k: int = 0  # draw only from the k likeliest tokens; 0: off
    top_p: float = 1.0  # draw only from the smallest set of tokens with this probability; 1: off

    def check_sampling(self, group: str) -> None:
        """Refuses values out of bounds; `group` is the group of the configuration that has these keys."""
        require(self.max_new_tokens > 0, f"{group}.max_new_tokens", self.max_new_tokens, "a positive integer")
        require(self.temperature >= 0, f"{group}.temperature", self.temperature, ">= 0 (0 is greedy)")
        require(self.top_k >= 0, f"{group}.top_k", self.top_k, ">= 0 (0 is off)")
        require(0 < self.top_p <= 1, f"{group}.top_p", self.top_p, "in (0, 1]")


@dataclass
class EngineConfig:
    """Number and size of the engines that generate, each in a Ray actor of its own."""

    actors: int = -1  # engines; -1: one for each parallel.tp GPUs of a node, or one per node without GPUs
    cache_tokens: int = 16384  # KV cache of an engine, all sequences together
    page_tokens: int = 0  # size of a page of the cache; 0: 256 on CUDA in half precision, otherwise 64
    max_sequences: int = 64  # sequences that an engine runs at the same time

    def check_actors(self, group: str) -> None:
        """Refuses a number of actors out of bounds; `group` is the group of the configuration that has this key."""
        require(self.actors == -1 or self.actors > 0, f"{group}.actors", self.actors, "a positive integer, or -1")
