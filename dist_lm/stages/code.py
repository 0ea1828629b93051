"""Stage `code`: next-token prediction on programs; reports the share of samples that parse, by language."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from dist_lm.stages.text import TextStage
from dist_lm.stages.training import Closing
from dist_lm.tracking.readable import percent

PARSES = "code/parses_"


class Code(TextStage):
    name = "code"
    starts_from = "language"

    def after_training(self, closing: Closing) -> dict[str, float]:
        """`code/parses_LANGUAGE`: share of samples, prompt included, that parse."""
        import torch.distributed as dist

        from dist_lm.sandbox.syntax import parses_continued
        from dist_lm.stages.sampling import sample_prompts, write_samples

        samples = sample_prompts(closing)
        if not samples:  # stage.sampling.samples_per_prompt=0
            return {}
        verdicts: list[dict[str, Any]] = [{}] * len(samples)
        if closing.world.is_first:
            verdicts = [
                {"parses": parses_continued(one.language, one.prompt, one.completion, one.finished)} for one in samples
            ]
        dist.broadcast_object_list(verdicts)
        write_samples(closing, [asdict(one) | verdict for one, verdict in zip(samples, verdicts, strict=True)])
        by_language: dict[str, list[bool]] = {}
        for sample, verdict in zip(samples, verdicts, strict=True):
            if verdict["parses"] is not None:
                by_language.setdefault(sample.language, []).append(verdict["parses"])
        return {f"{PARSES}{name}": sum(found) / len(found) for name, found in sorted(by_language.items())}

    def own_entries(self, result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        parsed = [
            f"{name.removeprefix(PARSES)} {percent(value)}"
            for name, value in sorted(result["metrics"].items())
            if name.startswith(PARSES)
        ]
        if parsed:
            yield "samples that parse", ", ".join(parsed)


STAGE = Code()
