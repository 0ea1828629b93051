"""Stage `language`: next-token prediction on English; writes a checkpoint and a few samples."""

from dataclasses import asdict

from dist_lm.stages.text import TextStage
from dist_lm.stages.training.arguments import Closing


class Language(TextStage):
    name = "language"

    def after_training(self, closing: Closing) -> dict[str, float]:
        """Write samples."""
        from dist_lm.stages.sampling import sample_prompts, write_samples

        write_samples(closing, [asdict(sample) for sample in sample_prompts(closing)])
        return {}


STAGE = Language()
