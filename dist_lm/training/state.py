"""Where a run stands. With model and optimizer it is all that a checkpoint holds: randomness is keyed, not stored."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dist_lm.training.loss_trend import LossTrend


@dataclass(frozen=True)
class TrainState:
    """Counters after the last finished step."""

    step: int = 0  # optimizer steps taken
    tokens: int = 0  # tokens trained on
    position: int = 0  # sequences consumed: the state of the stream
    nonfinite_steps: int = 0  # consecutive steps skipped for NaN/inf gradients
    skipped_steps: int = 0  # all steps skipped
    loss_spikes: int = 0  # all steps whose loss stood out
    loss_trend: LossTrend = field(default_factory=LossTrend)
    best_val_loss: float | None = None  # lowest of those checkpoints that were evaluated, on stage.eval_sequences
    best_step: int = 0

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainState":
        """What `dataclasses.asdict` made of a state; what an older one lacks begins anew.

        Raises:
            TypeError: a name that no state has.
        """
        known: dict[str, Any] = dict(values)
        known["loss_trend"] = LossTrend(**values.get("loss_trend", {}))
        return cls(**known)
