"""Keys of AdamW that all training shares: `stage.KEY` where steps train on sequences, `rlhf.KEY` in stage rlhf."""

import math
from dataclasses import dataclass

from dist_lm.errors import require


@dataclass
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019), its learning rate and the clipping of gradients."""

    lr: float = 1e-4  # peak learning rate
    min_lr_ratio: float = 0.1  # final learning rate / peak
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip: float = 1.0  # largest global gradient norm; 0: off

    def check_optimizer(self, group: str) -> None:
        """Refuses values out of bounds; `group` is the group of the configuration that has these keys."""
        for key in ("lr", "adam_eps"):
            require(0 < getattr(self, key) < math.inf, f"{group}.{key}", getattr(self, key), "a positive number")
        require(0 <= self.min_lr_ratio <= 1, f"{group}.min_lr_ratio", self.min_lr_ratio, "in [0, 1]")
        require(0 <= self.weight_decay < math.inf, f"{group}.weight_decay", self.weight_decay, ">= 0")
        for key in ("beta1", "beta2"):
            require(0 <= getattr(self, key) < 1, f"{group}.{key}", getattr(self, key), "in [0, 1)")
        require(0 <= self.grad_clip < math.inf, f"{group}.grad_clip", self.grad_clip, ">= 0 (0 is off)")
