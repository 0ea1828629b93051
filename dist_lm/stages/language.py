"""Stage `language`: next-token prediction on English; writes a checkpoint and a few samples."""

from dist_lm.stages.text import TextStage
from dist_lm.stages.training import Closing


class Language(TextStage):
    name = "language"

    def after_training(self, closing: Closing) -> dict[str, float]:
        """Write samples."""
        from dist_lm.stages.sampling import keep_samples, sample_prompts

        samples = sample_prompts(closing)
        keep_samples(closing, samples, [{} for _ in samples])
        return {}


STAGE = Language()
