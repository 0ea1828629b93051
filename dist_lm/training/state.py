"""The state of a training run, and how a step changes it.

A checkpoint holds it beside model and optimizer. Randomness is keyed by seed and step, so no random state is stored.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_lm.training.step import StepResult

WINDOW = 128  # steps of the loss trend
SEEN_ENOUGH = 32  # steps before the first loss that can be a spike
DEVIATIONS = 6.0  # standard deviations above the mean that make a loss a spike


@dataclass(frozen=True)
class LossTrend:
    """Mean and variance of recent losses: of the first `WINDOW` losses, then exponential with factor 1 - 1/WINDOW.

    Its three numbers are in the checkpoint, so a resumed run finds the same spikes.
    """

    seen: int = 0  # finite losses so far
    mean: float = 0.0
    variance: float = 0.0

    def is_spike(self, loss: float) -> bool:
        """Returns whether a loss lies more than `DEVIATIONS` standard deviations above the mean.

        Never before `SEEN_ENOUGH` losses, and never for a loss that is not finite: its step counts as skipped.
        """
        # The first losses fall steeply, so their variance says nothing about spikes.
        if self.seen < SEEN_ENOUGH or not math.isfinite(loss):
            return False
        return loss > self.mean + DEVIATIONS * math.sqrt(self.variance)

    def after(self, loss: float) -> "LossTrend":
        """Returns the trend after a loss (West 1979, incremental mean and variance); non-finite ones are ignored."""
        if not math.isfinite(loss):
            return self
        weight = 1 / min(self.seen + 1, WINDOW)
        deviation = loss - self.mean
        variance = (1 - weight) * (self.variance + weight * deviation * deviation)
        return LossTrend(self.seen + 1, self.mean + weight * deviation, variance)


@dataclass(frozen=True)
class TrainState:
    """Counters after the last finished step."""

    step: int = 0  # optimizer steps taken
    tokens: int = 0  # targets in the loss so far; tokens whose loss mask is 0 do not count
    position: int = 0  # sequences consumed: the state of the stream
    nonfinite_steps: int = 0  # consecutive steps skipped for NaN/inf gradients
    skipped_steps: int = 0  # all steps skipped
    loss_spikes: int = 0  # all steps whose loss was a spike
    loss_trend: LossTrend = field(default_factory=LossTrend)
    best_val_loss: float | None = None  # lowest of the evaluated checkpoints, on stage.eval_sequences sequences
    best_step: int = 0
    tokenizer: str = ""  # SHA-256 of the tokenizer that the model was trained with
    # stage.phases in numbers, of which those that have begun stay: {"until": last step, "sequences": {corpus: number}}
    phases: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainState":
        """Inverts `dataclasses.asdict`; fields that are missing in `values` get their defaults.

        Raises:
            TypeError: `values` has an unknown field.
        """
        fields: dict[str, Any] = dict(values)
        fields["loss_trend"] = LossTrend(**values.get("loss_trend", {}))
        return cls(**fields)


def advance(state: TrainState, result: "StepResult", position: int) -> TrainState:
    """Returns the state after a step; a skipped step also counts as a step and consumes its data. Best loss and
    tokenizer stay.

    Args:
        position: sequences of the stream consumed so far, this step included.
    """
    return replace(
        state,
        step=state.step + 1,
        tokens=state.tokens + int(result.count),
        position=position,
        nonfinite_steps=0 if result.applied else state.nonfinite_steps + 1,
        skipped_steps=state.skipped_steps + (not result.applied),
        loss_spikes=state.loss_spikes + state.loss_trend.is_spike(result.loss),
        loss_trend=state.loss_trend.after(result.loss),
    )
