"""Stage `code`: next-token prediction on programs; reports which samples parse and run, by language."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dist_lm.config.root import TRUST_ME
from dist_lm.stages.text import TextStage
from dist_lm.stages.training.arguments import EvaluationArguments
from dist_lm.tracking.readable import percent

if TYPE_CHECKING:
    from dist_lm.stages.sampling import Sample

PARSES, RUNS = "code/parses_", "code/runs_"

log = logging.getLogger(__name__)


class Code(TextStage):
    name = "code"
    starts_from = "language"

    def after_training(self, arguments: EvaluationArguments) -> dict[str, float]:
        """Samples the model, runs the samples in the sandbox and writes them (collective). Returns shares, the same on
        every rank.

        `code/parses_LANGUAGE` and `code/runs_LANGUAGE` are the shares of samples that parse and that run, each judged
        together with its prompt. A sample without a verdict does not count. Empty without samples.

        Raises:
            RequestError: a prompt of stage.sampling does not fit the context.
            ArtefactError: the model's logits are not numbers.
            ConfigError: bf16 is asked for on a GPU without it.
            UserError: a prompt is not Unicode.
            MessageError: another rank has sent something else.
        """
        from dist_lm.parallel.messages import broadcast
        from dist_lm.sandbox.syntax import parses_continued
        from dist_lm.stages.sampling import sample_prompts, write_samples

        samples = sample_prompts(arguments)
        # There are none with stage.sampling.samples_per_prompt=0.
        if not samples:
            return {}

        # The first rank judges for all: programs of models run in one sandbox, not in one per rank.
        verdicts: list[dict[str, bool | None]] = [{}] * len(samples)
        if arguments.world.is_first:
            parsed = [
                parses_continued(sample.language, sample.prompt, sample.completion, sample.finished)
                for sample in samples
            ]
            passed = runs(samples, parsed, trust_me=arguments.config.sandbox == TRUST_ME)
            verdicts = [{"parses": parses, "runs": ran} for parses, ran in zip(parsed, passed, strict=True)]
        verdicts = broadcast(verdicts, list[dict[str, bool | None]])
        write_samples(arguments, [asdict(sample) | verdict for sample, verdict in zip(samples, verdicts, strict=True)])

        # A sample without a verdict (None) counts neither as right nor as wrong.
        verdicts_of: dict[str, list[bool]] = {}
        for sample, verdict in zip(samples, verdicts, strict=True):
            for prefix, is_right in ((PARSES, verdict["parses"]), (RUNS, verdict["runs"])):
                if is_right is not None:
                    verdicts_of.setdefault(f"{prefix}{sample.language}", []).append(is_right)
        return {name: sum(are_right) / len(are_right) for name, are_right in sorted(verdicts_of.items())}

    def own_entries(self, result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yields the shares of samples that parse, and of those that run, by language; nothing without such metrics."""
        for prefix, title in ((PARSES, "samples that parse"), (RUNS, "samples that run")):
            shares = [
                f"{name.removeprefix(prefix)} {percent(value)}"
                for name, value in sorted(result["metrics"].items())
                if name.startswith(prefix)
            ]
            if shares:
                yield title, ", ".join(shares)


def runs(samples: "Sequence[Sample]", parsed: Sequence[bool | None], trust_me: bool) -> list[bool | None]:
    """Returns whether each sample, its prompt included, parses and then ends without an error in the sandbox.

    None: not executed, because there is no parser for the language or no sandbox here (a warning), or because the
    sandbox failed.

    Args:
        parsed: whether each sample parses; None: no parser.
    """
    from dist_lm.sandbox.pool import SandboxPool
    from dist_lm.sandbox.program import Program
    from dist_lm.sandbox.sandbox import SandboxError
    from dist_lm.sandbox.syntax import whole_lines

    # Programs that do not parse are not run.
    passed = list(parsed)
    try:
        with SandboxPool(trust_me=trust_me) as pool:
            futures = {}
            for index, sample in enumerate(samples):
                if parsed[index]:
                    text = whole_lines(sample.prompt + sample.completion, sample.finished)
                    futures[index] = pool.submit(Program(sample.language, text))

            for index, future in futures.items():
                verdict = future.result()
                passed[index] = verdict.outcome == "passed" if verdict.judged else None
    except SandboxError as error:
        log.warning("samples are not executed: %s", error)
        return [None] * len(samples)
    return passed


STAGE = Code()
