"""Where reinforcement learning stands: with both models and their optimizers it is all that a checkpoint holds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dist_lm.rlhf.kl import KlController
from dist_lm.rlhf.reward_scale import RewardScale
from dist_lm.rlhf.rollouts import Rollouts


@dataclass(frozen=True)
class RlhfState:
    """Counters after the last finished iteration, and what was drawn ahead of the next ones. A value."""

    kl: KlController
    iteration: int = 0  # iterations done; also the version of the policy's weights
    prompt_position: int = 0  # prompts that these have used
    policy_updates: int = 0  # optimizer steps, those skipped for NaN/inf gradients with them
    value_updates: int = 0
    nonfinite_updates: int = 0  # consecutive ones skipped
    reward_scale: RewardScale | None = None  # None: not known before the first iteration
    best_reward: float | None = None  # largest rlhf/reward_mean of an iteration
    best_iteration: int = 0
    pending: Mapping[int, Rollouts] = field(default_factory=dict)  # by iteration: drawn, not trained on yet

    @property
    def version(self) -> int:
        """Of the policy's weights."""
        return self.iteration

    def to_dict(self) -> dict[str, Any]:
        """All but the pending rollouts, ready for JSON."""
        values = {name: value for name, value in vars(self).items() if name != "pending"}
        scale = asdict(self.reward_scale) if self.reward_scale else None
        return values | {"kl": asdict(self.kl), "reward_scale": scale}

    def arrays(self) -> dict[str, np.ndarray]:
        """The pending rollouts: `ITERATION.NAME` -> array."""
        return {
            f"{iteration}.{name}": value
            for iteration, rollouts in self.pending.items()
            for name, value in rollouts.arrays().items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> "RlhfState":
        """The way back from `to_dict` and `arrays`."""
        pending: dict[int, dict[str, np.ndarray]] = {}
        for key, value in arrays.items():
            iteration, _, name = key.partition(".")
            pending.setdefault(int(iteration), {})[name] = value
        scale = values["reward_scale"]
        return cls(
            **{
                **values,
                "kl": KlController(**values["kl"]),
                "reward_scale": RewardScale(**scale) if scale else None,
                "pending": {iteration: Rollouts(**parts) for iteration, parts in sorted(pending.items())},
            }
        )
