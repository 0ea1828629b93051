"""Stage `language`: next-token prediction on text; leaves a checkpoint and a few samples."""

from dist_lm.stages.sampling import keep_samples, sample_prompts
from dist_lm.stages.training_stage import Closing, TrainingStage
from dist_lm.training.objective import next_token


def close(closing: Closing) -> dict[str, float]:
    """Keep samples; they are for reading, no figure is made of them."""
    samples = sample_prompts(closing)
    keep_samples(closing, samples, [{} for _ in samples])
    return {}


STAGE = TrainingStage("language", lambda config: next_token(config.stage.label_smoothing, config.stage.z_loss), close)
