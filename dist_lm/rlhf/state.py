"""State of an RLHF run: counters, the KL coefficient, the reward scale, and rollouts drawn ahead.

With the policy, the critic if there is one, and their optimizers, it is the complete content of a checkpoint. The
learner replaces the state after every update and iteration.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from dist_lm.rlhf.config import RlhfConfig, not_null
from dist_lm.rlhf.reward_model import RewardScale
from dist_lm.rlhf.rollouts import Rollouts, ScoredRollouts

SCORE = "score."  # prefix of the names of scores
MARK = "mark."  # prefix of the names of marks
SKIPPED = "skipped."  # prefix of the names of parts that do not apply to all
# Name of `ScoredRollouts.replaced` in checkpoints. The metric rlhf/left_out is another thing: rollouts without a score.
REPLACED = "left_out"


@dataclass(frozen=True)
class KlController:
    """The weight of the KL from the reference, fixed or adaptive (Ziegler et al. 2019, section 2.2). Immutable.

    The algorithm of a run puts the KL into its rewards, or into its policy loss (`Prepared.kl_coefficient`).
    """

    coefficient: float
    target: float | None = None  # nats per sequence; None: the coefficient is fixed
    horizon: int = 10_000  # sequences within which the coefficient changes by at most about 20 %

    @classmethod
    def of(cls, config: RlhfConfig) -> "KlController":
        """Returns the controller at the start of a run."""
        return cls(not_null(config.kl_coefficient), config.kl_target, config.kl_horizon)

    def after(self, kl: float, sequences: int) -> "KlController":
        """Returns the controller after `sequences` rollouts with mean KL `kl` (nats per sequence)."""
        if self.target is None:
            return self
        # The clip keeps one iteration with an extreme KL from throwing the coefficient far off.
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return replace(self, coefficient=self.coefficient * (1 + error * sequences / self.horizon))


@dataclass(frozen=True)
class RlhfState:
    """Counters after the last finished iteration, and rollouts drawn and scored ahead for the next ones. Immutable."""

    kl: KlController
    iteration: int = 0  # finished iterations; also the version of the policy's weights
    prompt_position: int = 0  # prompts used so far
    policy_updates: int = 0  # optimizer steps, including those skipped for NaN/inf gradients
    value_updates: int = 0
    nonfinite_updates: int = 0  # consecutive skipped updates
    # Of the reward model's scores. Stage rlhf reads it from the finished run of stage reward and never changes it.
    # None: no reward model, or rlhf.normalise_reward=false; a learner apart from the stage then has to measure it
    # (`experience.collect`).
    reward_scale: RewardScale | None = None
    best_reward: float | None = None  # largest rlhf/reward_mean of an iteration
    best_iteration: int = 0
    pending: Mapping[int, ScoredRollouts] = field(default_factory=dict)  # keys: iterations not trained on yet

    @property
    def version(self) -> int:
        """Version of the policy's weights."""
        return self.iteration

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields except the pending rollouts, as JSON values."""
        values = {name: value for name, value in vars(self).items() if name != "pending"}
        scale = asdict(self.reward_scale) if self.reward_scale else None
        return values | {"kl": asdict(self.kl), "reward_scale": scale}

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the pending rollouts, for `from_dict`; empty if there are none.

        `ITERATION.NAME` -> field NAME of `Rollouts`, `ITERATION.left_out` -> int64 (1,), prompts that were replaced,
        `ITERATION.score.PART` -> scores, `ITERATION.mark.NAME` -> marks, `ITERATION.skipped.PART` -> where the part
        does not apply. Arrays are not copied.
        """
        arrays = {}
        for iteration, scored in self.pending.items():
            for name, array in vars(scored.rollouts).items():
                arrays[f"{iteration}.{name}"] = array
            arrays[f"{iteration}.{REPLACED}"] = np.array([scored.replaced])
            for part, score_B in scored.scores.items():
                arrays[f"{iteration}.{SCORE}{part}"] = score_B
            for name, mark_B in scored.marks.items():
                arrays[f"{iteration}.{MARK}{name}"] = mark_B
            for part, skipped_B in scored.skipped.items():
                arrays[f"{iteration}.{SKIPPED}{part}"] = skipped_B
        return arrays

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> "RlhfState":
        """Returns the state that `to_dict` and `arrays` describe.

        Of old releases: rollouts without a number left out get 0, and a best reward that is not finite becomes None.
        """
        arrays_of_iteration: dict[int, dict[str, np.ndarray]] = {}
        for key, array in arrays.items():
            iteration, _, name = key.partition(".")
            arrays_of_iteration.setdefault(int(iteration), {})[name] = array

        pending = {}
        for iteration, named in sorted(arrays_of_iteration.items()):
            scores, marks, skipped = (
                {name.removeprefix(prefix): array for name, array in named.items() if name.startswith(prefix)}
                for prefix in (SCORE, MARK, SKIPPED)
            )
            columns = {name: array for name, array in named.items() if not name.startswith((SCORE, MARK, SKIPPED))}
            # Checkpoints of old releases have no such array.
            replaced = columns.pop(REPLACED, np.zeros(1, np.int64))
            pending[iteration] = ScoredRollouts(Rollouts(**columns), scores, int(replaced[0]), marks, skipped)

        scale = values["reward_scale"]
        reward_scale = RewardScale(**scale) if scale else None
        # Older releases went on after an iteration whose reward was not finite.
        best_reward = values["best_reward"]
        if best_reward is not None and not math.isfinite(best_reward):
            values = {**values, "best_reward": None, "best_iteration": 0}
        restored = {"kl": KlController(**values["kl"]), "reward_scale": reward_scale, "pending": pending}
        return cls(**{**values, **restored})
