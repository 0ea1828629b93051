"""Stage `tools`: next-token prediction on what the assistant writes in conversations, with a share of text."""

from dist_lm.stages.training_stage import Closing, TrainingStage
from dist_lm.training.loss import next_token


def close(closing: Closing) -> dict[str, float]:
    """Nothing is sampled yet."""
    return {}


STAGE = TrainingStage("tools", lambda config: next_token(config.stage.label_smoothing, config.stage.z_loss), close)
