"""Stage `generate` to its end: the parts that are missing, on a pool of engines."""

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from dist_lm.cluster.pool import Pool
from dist_lm.cluster.pool_actor import EngineSpec
from dist_lm.cluster.ray_cluster import RayCluster
from dist_lm.config.file import save_config
from dist_lm.config.generate import GenerateRunConfig
from dist_lm.launcher.generation_watch import GenerationWatch, watching_generation
from dist_lm.launcher.interrupt import Interrupt, left_at_once
from dist_lm.launcher.pipeline import LOOK_S
from dist_lm.launcher.plan import PlannedStage, run_of
from dist_lm.launcher.stage_run import device_and_ranks
from dist_lm.parallel.sharding import generation_dtype
from dist_lm.stages.generate import options_of, tokenizer_of, tp_of
from dist_lm.stages.generated_parts import Samples
from dist_lm.storage import durable
from dist_lm.storage.lock import locked
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.console import Console
from dist_lm.training import checkpoint_files
from dist_lm.training.checkpoint_tensors import model_weights

Weights = Mapping[str, np.ndarray]
"""By the names of the model's parameters, in host memory."""


def run_generation(
    stage: PlannedStage, cluster: RayCluster, console: Console, interrupt: Interrupt, job: str | None = None
) -> bool:
    """Answer all prompts. Returns False when it was stopped by `interrupt`; the parts that are whole are kept.

    Args:
        job: of the batch system, that this process belongs to.

    Raises:
        ConfigError: there are no prompts.
        ArtefactError: prompts, checkpoint or tokenizer are not what they should be.
        ActorsLostError: the cluster has no place for an engine.
        PoolFailure: the engines die.
    """
    config, run = stage.config, run_of(stage.config)
    assert isinstance(config, GenerateRunConfig)
    run.samples.mkdir(parents=True, exist_ok=True)
    with locked(run.launch_lock, job=job, wait_s=LOOK_S):
        save_config(config, run.config)
        found: tuple[Samples, EngineSpec, Weights] | None = None
        with left_at_once(interrupt, console):
            found = _read(config, run, cluster, console)
        if found is None:
            return False
        samples, spec, weights = found
        before, actors, seconds = samples.tally.tokens, 0, 0.0
        with watching_generation(config, run, samples, console) as watch:
            if not samples.is_done:
                actors, seconds = _generate(config, samples, spec, weights, cluster, console, interrupt, watch)
            if not samples.is_done:
                return False
            tally = samples.tally
            durable.write_json(
                run.result,
                {
                    "stage": config.stage.name,
                    "run_id": config.run_id,
                    "checkpoint": config.stage.checkpoint,
                    "prompts": tally.prompts,
                    "answers": tally.answers,
                    "refused": tally.refused,
                    "first_refusal": tally.refusal,
                    "tokens": tally.tokens,
                    "parts": samples.parts,
                    "actors": actors,  # of the last command, as the next two
                    "seconds": seconds,  # from the first request handed out to the last answer
                    "tokens_per_s": (tally.tokens - before) / seconds if seconds else 0.0,
                },
            )
    return True


def _read(
    config: GenerateRunConfig, run: RunDirectory, cluster: RayCluster, console: Console
) -> tuple[Samples, EngineSpec, Weights]:
    """What there is to do, with which engines and weights; without weights where nothing is left to do."""
    checkpoint = Path(config.stage.checkpoint)
    tokenizer = tokenizer_of(config, checkpoint)
    with console.waiting(f"reading {config.stage.prompts}"):
        samples = Samples(config, run, tokenizer)
    device, _ = device_and_ranks(config, cluster)
    spec = EngineSpec(
        model=config.model,
        options=options_of(config.stage),
        eot_id=tokenizer.eot_id,
        vocabulary=tuple(tokenizer.vocabulary()),
        dtype=generation_dtype(config.parallel, torch.device(device)),
        device=device,
        tp=tp_of(config),
    )
    if samples.is_done:
        return samples, spec, {}
    with console.waiting(f"reading {checkpoint}"):
        return samples, spec, model_weights(checkpoint_files.require_intact(checkpoint))


def _generate(
    config: GenerateRunConfig,
    samples: Samples,
    spec: EngineSpec,
    weights: Weights,
    cluster: RayCluster,
    console: Console,
    interrupt: Interrupt,
    watch: GenerationWatch,
) -> tuple[int, float]:
    """Have a pool do what is missing: (how many actors it had in the end, seconds without the start of engines)."""
    with console.waiting("starting engines"):
        pool = Pool.start(
            cluster,
            spec,
            weights,
            actors=config.stage.actors,
            wanted=lambda: not interrupt.requested,
            warn=console.warning,
        )
    began = time.monotonic()
    with pool, console.generating("generate", samples.count) as progress:
        progress.update(samples.tally.prompts, samples.tally.tokens)
        watch.begin()
        for result in pool.generate(samples.requests()):
            samples.take(result)
            progress.update(samples.tally.prompts, samples.tally.tokens)
            watch.look(lambda: len(pool.members))
        actors, seconds = len(pool.members), time.monotonic() - began
        watch.end(actors)
        return actors, seconds
