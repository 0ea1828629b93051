"""Runs a stage on a pool of generation engines: answers the missing requests and writes metrics."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch

from dist_lm.cluster.pool import Pool
from dist_lm.cluster.pool_actor import EngineSpec
from dist_lm.cluster.ray_cluster import RayCluster
from dist_lm.cluster.sandboxes import sandboxes_of
from dist_lm.config.root import TRUST_ME, Config, save_config
from dist_lm.launcher.process import Interrupt, left_at_once
from dist_lm.launcher.stage_run import device_and_ranks
from dist_lm.launcher.watch import WandbCopy, start_wandb
from dist_lm.parallel.sharding import generation_dtype
from dist_lm.prepare.plan import PlannedStage
from dist_lm.prepare.run import launch_lock
from dist_lm.stages.stage import PoolStage, PoolWork, run_of
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.console import Console
from dist_lm.tracking.metrics import MetricsWriter
from dist_lm.training import checkpoint_files
from dist_lm.training.checkpoint_tensors import model_weights

LINE_S = 10.0  # interval between lines of metrics


@dataclass(frozen=True)
class Round:
    """Requests that wait for answers, and the engines that answer them."""

    work: PoolWork
    spec: EngineSpec
    engines: int  # number of engines that the configuration asks for
    weights: Mapping[str, np.ndarray]  # parameter name -> weights in host memory; empty if no answer is missing


def run_pool_stage(
    planned: PlannedStage, cluster: RayCluster, console: Console, interrupt: Interrupt, job: str | None = None
) -> bool:
    """Answers all requests and writes answers, metrics and `result.json`. Returns False if `interrupt` stopped the run.

    It holds the lock of the run and writes its `config.yaml`. Answers that are written already are kept: only the
    missing ones are computed, by engines that start for them.

    Args:
        job: the batch job of this process.

    Raises:
        ConfigError: there are no prompts, no sandbox here for programs of models, no GPU for device=cuda, or
            tracking.mode=online without a login.
        ArtefactError: prompts, checkpoint or tokenizer differ from those that the run began with, or another command
            works on the run.
        ActorsLostError: no node has free resources for an engine.
        PoolFailure: engines keep dying.
        UserError: the weights do not fit the model, no node has enough GPUs for an engine, or as `PoolStage.work`.
    """
    stage, config, run = cast(PoolStage, planned.stage), planned.config, run_of(planned.config)
    run.samples.mkdir(parents=True, exist_ok=True)
    with launch_lock(run, job):
        # The lock is held, so what is unfinished here was left by a command that was killed.
        durable.remove_unfinished(run.samples)
        save_config(config, run.config)
        rounds = stage.rounds(config)
        opened = _opened(stage, rounds, run, cluster, console, interrupt)
        if opened is None:
            return False

        results, tokens, actors, seconds = list[dict[str, Any]](), 0, 0, 0.0
        with watching_pool(config, run, opened.work, console) as watch:
            for number, round_config in enumerate(rounds):
                if number > 0:
                    opened = _opened(stage, [round_config], run, cluster, console, interrupt)
                if opened is None:
                    return False
                work = opened.work
                watch.follow(work)
                tokens_before = work.done[1]

                with closing(work):
                    if work.asks:
                        actors, round_seconds = _answer(stage.name, opened, cluster, console, interrupt, watch)
                        seconds += round_seconds
                    # Tasks that ask no engine, such as bits per byte, are computed here.
                    if not work.is_done:
                        work.finish(lambda: not interrupt.requested)
                if not work.is_done:
                    return False
                tokens += work.done[1] - tokens_before
                results.append(work.result())

            durable.write_sealed(
                run.result,
                {
                    "stage": stage.name,
                    "run_id": config.run_id,
                    **stage.joined(config, results),
                    "actors": actors,  # this value and the next two are those of the last command
                    "seconds": seconds,  # from the first request to the last answer
                    "tokens_per_s": per_second(tokens, seconds),
                },
            )
    return True


def _opened(
    stage: PoolStage,
    rounds: Sequence[Config],
    run: RunDirectory,
    cluster: RayCluster,
    console: Console,
    interrupt: Interrupt,
) -> Round | None:
    """Returns the first round, ready to be answered, with weights if answers are missing; None if a signal stopped it.

    The later rounds are read and closed again, so that what refuses one of them does so before engines work for hours.

    Raises:
        ConfigError: there are no prompts.
        ArtefactError: prompts, checkpoint or tokenizer are missing or have changed.
        UserError: as `PoolStage.work`.
    """
    opened: Round | None = None
    with left_at_once(interrupt, console):
        for later in rounds[1:]:
            _read(stage, later, run, cluster, console).work.close()
        first = _read(stage, rounds[0], run, cluster, console)

        # Without missing answers no engine starts, so reading gigabytes of weights would be in vain.
        if first.work.asks:
            checkpoint = stage.checkpoint(rounds[0])
            with console.waiting(f"reading {checkpoint}"):
                first = replace(first, weights=model_weights(checkpoint_files.require_intact(checkpoint)))
        opened = first
    return opened


def _read(stage: PoolStage, config: Config, run: RunDirectory, cluster: RayCluster, console: Console) -> Round:
    """Returns one round, without weights; the caller closes its work.

    Raises:
        ConfigError: there are no prompts, or the cluster lacks the device.
        ArtefactError: prompts, checkpoint or tokenizer are missing or have changed.
        UserError: as `PoolStage.work`.
    """
    tokenizer = stage.tokenizer(config)
    with console.waiting("reading prompts"):
        work = stage.work(config, run, tokenizer, partial(sandboxes_of, cluster, 0, config.sandbox == TRUST_ME))

    device, _ = device_and_ranks(config, cluster)
    options, tp, n_engines = stage.engine(config)
    spec = EngineSpec(
        model=config.model,
        options=options,
        eot_id=tokenizer.eot_id,
        vocabulary=tuple(tokenizer.vocabulary()),
        dtype=generation_dtype(config.parallel, torch.device(device)),
        device=device,
        tp=tp,
        tokenizer_file=tokenizer.file_content,
    )
    return Round(work, spec, n_engines, weights={})


def _answer(
    name: str, opened: Round, cluster: RayCluster, console: Console, interrupt: Interrupt, watch: "PoolWatch"
) -> tuple[int, float]:
    """Starts engines, answers the missing requests, and returns (engines at the end, seconds from the first request
    on).

    The engines end with the call. Each answer is passed to the work of the round, which writes it. A signal ends the
    loop early, or the wait for the engines; then its `is_done` is false.

    Raises:
        ActorsLostError: no node has free resources for an engine.
        PoolFailure: engines keep dying.
        UserError: the weights do not fit the model, or no node has enough GPUs for an engine.
        SandboxError: a task has programs, and they cannot be run.
    """
    # Engines start only once all prompts are read: a wrong file must not cost minutes of GPUs.
    work = opened.work
    with console.waiting("starting engines"):
        pool = Pool.start(
            cluster,
            opened.spec,
            opened.weights,
            actors=opened.engines,
            keep_going=lambda: not interrupt.requested,
            warn=console.warning,
        )

    began = time.monotonic()
    with pool, console.generating(name, work.count) as progress:
        # Answers of earlier commands are progress, too.
        progress.update(*work.done)
        watch.begin()

        for answer in pool.generate(work.requests()):
            work.take(answer)
            progress.update(*work.done)
            watch.look(len(pool.members))

        actors, seconds = len(pool.members), time.monotonic() - began
        watch.end(actors)
        return actors, seconds


def per_second(amount: int, seconds: float) -> float:
    """Returns the speed; 0 if no time has passed."""
    return amount / seconds if seconds > 0 else 0.0


@dataclass(frozen=True)
class Mark:
    """Progress at a point in time."""

    at: float  # s
    prompts: int
    tokens: int


class PoolWatch:
    """Writes metrics of a run while its engines work."""

    def __init__(self, writer: MetricsWriter, work: PoolWork, wandb: WandbCopy | None) -> None:
        """Removes the lines of metrics of prompts that will be answered again.

        Raises:
            ArtefactError: the metrics file is damaged.
        """
        self._writer, self.work, self._wandb = writer, work, wandb
        writer.truncate_after(work.done[0])
        self.begin()

    def follow(self, work: PoolWork) -> None:
        """Watches another part of the run."""
        self.work = work
        self.begin()

    def begin(self) -> None:
        """Starts the clock: the engines are running."""
        self._first = self._last = self._now()

    def look(self, engines: int) -> None:
        """After an answer, write a line of metrics if it is due. `engines`: number of those that run."""
        if time.monotonic() - self._last.at >= LINE_S:
            self._write(engines)

    def end(self, engines: int) -> None:
        """Writes the last line."""
        if self._now().prompts > self._last.prompts:
            self._write(engines)

    def _write(self, engines: int) -> None:
        """Writes a line of metrics (speeds since the last line, per second; time left in seconds) and copies it to
        wandb."""
        first, last, now = self._first, self._last, self._now()
        seconds = now.at - last.at
        line = self.work.metrics() | {
            "generate/engines": engines,
            "generate/tokens_per_s": per_second(now.tokens - last.tokens, seconds),
            "generate/prompts_per_s": per_second(now.prompts - last.prompts, seconds),
        }

        # The time left follows from the mean speed since the engines began, which varies less than the last one.
        answered = now.prompts - first.prompts
        if answered:
            line["generate/eta_s"] = (now.at - first.at) / answered * (self.work.count - now.prompts)

        self._last = now
        self._writer.write(now.prompts, line)
        if self._wandb:
            self._wandb.line({"step": now.prompts} | line, of_this_attempt=True)
            self._wandb.look({})

    def _now(self) -> Mark:
        return Mark(time.monotonic(), *self.work.done)


@contextmanager
def watching_pool(config: Config, run: RunDirectory, work: PoolWork, console: Console) -> Iterator[PoolWatch]:
    """Yields the watch of a run, which writes its metrics; lines about prompts that are answered again are removed
    first. At the end wandb gets the first answers and how the run ended.

    Raises:
        ConfigError: tracking.mode=online without a login.
        ArtefactError: the metrics file is damaged.
    """
    wandb = start_wandb(config, run, console)
    with wandb or nullcontext(), closing(MetricsWriter(run.metrics)) as writer:
        watch = PoolWatch(writer, work, wandb)
        try:
            yield watch
        finally:
            if wandb and watch.work.table.exists():
                wandb.table(watch.work.table, watch.work.done[0])
