"""Stage `code`: next-token prediction on programs; reports the share of samples that parse, by language."""

import torch.distributed as dist

from dist_lm.sandbox.syntax import parses_continued
from dist_lm.stages.sampling import Sample, keep_samples, sample_prompts
from dist_lm.stages.training_stage import Closing, TrainingStage
from dist_lm.training.objective import next_token


def close(closing: Closing) -> dict[str, float]:
    """`code/parses_LANGUAGE`: samples, prompt included, that their language's parser accepts."""
    samples = sample_prompts(closing)
    if not samples:  # stage.sampling.samples_per_prompt=0
        return {}
    verdicts = [{"parses": _parses(sample)} for sample in samples] if closing.world.is_first else [{}] * len(samples)
    dist.broadcast_object_list(verdicts)
    keep_samples(closing, samples, verdicts)
    metrics = {}
    for language in sorted({sample.language for sample in samples}):
        found = [
            verdict["parses"]
            for sample, verdict in zip(samples, verdicts, strict=True)
            if sample.language == language and verdict["parses"] is not None
        ]
        if found:
            metrics[f"code/parses_{language}"] = sum(found) / len(found)
    return metrics


def _parses(sample: Sample) -> bool | None:
    return parses_continued(sample.language, sample.prompt, sample.completion, sample.finished)


STAGE = TrainingStage("code", lambda config: next_token(config.stage.label_smoothing, config.stage.z_loss), close)
