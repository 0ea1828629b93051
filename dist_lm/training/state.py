"""Where a run stands. With model and optimizer it is all that a checkpoint holds: randomness is keyed, not stored."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainState:
    """Counters after the last finished step."""

    step: int = 0  # optimizer steps taken
    tokens: int = 0  # tokens trained on
    position: int = 0  # sequences consumed: the state of the stream
    nonfinite_steps: int = 0  # consecutive steps skipped for NaN/inf gradients
    skipped_steps: int = 0  # all steps skipped
    best_val_loss: float | None = None  # lowest of those checkpoints that were evaluated, on stage.eval_sequences
    best_step: int = 0
