"""Stage `language`: next-token prediction on English; writes a checkpoint and a few samples."""

from dataclasses import asdict

from dist_lm.stages.text import TextStage
from dist_lm.stages.training.arguments import EvaluationArguments


class Language(TextStage):
    name = "language"

    def after_training(self, arguments: EvaluationArguments) -> dict[str, float]:
        """Writes samples of the model (collective); returns no figures.

        Raises:
            RequestError: a prompt of stage.sampling does not fit the context.
            ArtefactError: the model's logits are not numbers.
            ConfigError: bf16 is asked for on a GPU without it.
            UserError: a prompt is not Unicode.
        """
        from dist_lm.stages.sampling import sample_prompts, write_samples

        write_samples(arguments, [asdict(sample) for sample in sample_prompts(arguments)])
        return {}


STAGE = Language()
