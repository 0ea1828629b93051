"""What one request asks for: how tokens are chosen, how many, and what ends it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from dist_lm.errors import require


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, and how many.

    In this order: repetition penalty, logit bias, temperature, top-k, top-p, min-p. Of the last three a token must
    pass all.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0  # 0: greedy, the largest logit whatever the filters
    top_k: int = 0  # only the k most likely tokens (and those that tie with the last); 0: off
    top_p: float = 1.0  # only the fewest tokens that hold this much probability (Holtzman et al. 2020); 1: off
    min_p: float = 0.0  # only tokens with this share of the likeliest one's probability (Nguyen et al. 2024); 0: off
    repetition_penalty: float = 1.0  # > 1: tokens seen in prompt or answer are less likely (Keskar et al. 2019); 1: off
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added to its logit; -inf forbids it
    stop: tuple[str, ...] = ()  # texts that end the answer, which does not contain them
    stop_tokens: tuple[int, ...] = ()  # beside end-of-text
    ignore_eot: bool = False  # end-of-text is a token like others

    def __post_init__(self) -> None:
        for key, holds, accepted in (
            ("max_new_tokens", self.max_new_tokens > 0, "a positive integer"),
            ("temperature", 0 <= self.temperature < math.inf, "a number >= 0 (0 is greedy)"),
            ("top_k", self.top_k >= 0, ">= 0 (0 is off)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1] (0 is off)"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a number > 0 (1 is off)"),
        ):
            require(holds, key, getattr(self, key), accepted)
        require(all(self.stop), "stop", list(self.stop), "texts that are not empty")
        for token, bias in self.logit_bias.items():
            require(not math.isnan(bias) and bias < math.inf, f"logit_bias[{token}]", bias, "a number, or -inf")

    @property
    def adjusts_logits(self) -> bool:
        """Whether logits are changed token by token before they are tempered."""
        return self.repetition_penalty != 1 or bool(self.logit_bias)
