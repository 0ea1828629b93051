"""What a run of stage `generate` shows while its engines work: lines of metrics, for its file and for wandb."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass

from dist_lm.config.generate import GenerateRunConfig
from dist_lm.launcher.wandb_copy import WandbCopy, start_wandb
from dist_lm.stages.generated_parts import Samples, Tally
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.console import Console
from dist_lm.tracking.metrics import MetricsWriter

LINE_S = 10.0


@dataclass(frozen=True)
class Mark:
    """What was done at a time."""

    at: float  # s
    prompts: int
    tokens: int


def metrics_between(first: Mark, last: Mark, now: Mark, tally: Tally, prompts: int, engines: int) -> dict[str, float]:
    """A line of metrics.

    Args:
        first: when the engines began.
        last: when the line before was written.
        prompts: there are in all.
        engines: that are up.
    """
    took, done = now.at - last.at, now.prompts - first.prompts
    line: dict[str, float] = {
        "generate/prompts": tally.prompts,
        "generate/answers": tally.answers,
        "generate/refused": tally.refused,
        "generate/tokens": tally.tokens,
        "generate/engines": engines,
        "generate/tokens_per_s": (now.tokens - last.tokens) / took if took > 0 else 0.0,
        "generate/prompts_per_s": (now.prompts - last.prompts) / took if took > 0 else 0.0,
    }
    if tally.answers:
        line["generate/new_tokens_mean"] = tally.tokens / tally.answers
    if done:
        line["generate/eta_s"] = (now.at - first.at) / done * (prompts - now.prompts)
    return line


class GenerationWatch:
    """Looks at what has been done, for those that watch the run."""

    def __init__(
        self,
        writer: MetricsWriter,
        samples: Samples,
        wandb: WandbCopy | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """See `watching_generation`; lines of prompts that have to be asked for again are taken back."""
        self._writer, self._samples, self._wandb, self._clock = writer, samples, wandb, clock
        self._engines = 0
        writer.truncate_after(samples.tally.prompts)
        self.begin()

    def begin(self) -> None:
        """The engines are up, and time counts from here."""
        self._first = self._last = self._now()

    def look(self, engines: Callable[[], int]) -> None:
        """After a result: write a line where one is due.

        Args:
            engines: how many are up.
        """
        if self._clock() - self._last.at >= LINE_S:
            self._engines = engines()
            self._write()

    def end(self, engines: int) -> None:
        """No more results will come: the last line."""
        self._engines = engines
        if self._now().prompts > self._last.prompts:
            self._write()

    def _write(self) -> None:
        now, tally = self._now(), self._samples.tally
        line = metrics_between(self._first, self._last, now, tally, self._samples.count, self._engines)
        self._last = now
        self._writer.write(tally.prompts, line)
        if self._wandb:
            self._wandb.line({"step": tally.prompts} | line)
            self._wandb.look({})

    def _now(self) -> Mark:
        return Mark(self._clock(), self._samples.tally.prompts, self._samples.tally.tokens)


@contextmanager
def watching_generation(
    config: GenerateRunConfig, run: RunDirectory, samples: Samples, console: Console
) -> Iterator[GenerationWatch]:
    """Watch a run in the block; wandb has everything at its end: metrics, the first answers, and how it ended."""
    wandb = start_wandb(config, run, console)
    with wandb or nullcontext(), closing(MetricsWriter(run.metrics)) as writer:
        try:
            yield GenerationWatch(writer, samples, wandb)
        finally:
            if wandb and run.samples_part(0).exists():
                wandb.table(run.samples_part(0), samples.tally.prompts)
