"""Building the parts of a training run on one rank, running them, and writing what they leave behind."""

import logging
import math
import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from dist_lm.config.root import Config
from dist_lm.errors import ArtefactError
from dist_lm.model.size import flops_per_token
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World, data_mesh
from dist_lm.parallel.sharding import build_model, compute_dtype, generation_dtype
from dist_lm.parallel.values import unsharded_copy
from dist_lm.ranks.start import check_corpora, metrics_of_step, open_metrics, started, write_success
from dist_lm.stages.registry import load_config
from dist_lm.stages.training import Closing, Opening, TrainingStage, training_stage
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.training import checkpoint
from dist_lm.training.heartbeat import Heartbeat, Phase, StopRequest
from dist_lm.training.optimizer import build_optimizer
from dist_lm.training.state import TrainState
from dist_lm.training.step_meter import matmul_flops
from dist_lm.training.trainer import Trainer

log = logging.getLogger(__name__)


def run_rank(run: RunDirectory, stop: StopRequest, heartbeat: Heartbeat) -> None:
    """Train from the newest checkpoint of the run, or from where its configuration says, to the end or to a stop."""
    began = time.time()
    config = load_config(run.config)
    stage = training_stage(config.stage.name)
    with started(run, config, stop, heartbeat) as start, ExitStack() as stack:
        world, mesh, tokenizer = start.world, start.mesh, start.tokenizer
        check_corpora(run, config, tokenizer, world)
        model = build_model(config.model, config.parallel, mesh, world.device, config.seed)
        optimizer = build_optimizer(model, config.stage, config.stage.muon)
        state = restore(run, config, world, model, optimizer)
        ranks = data_mesh(mesh)
        opening = Opening(
            config,
            run,
            world,
            tokenizer,
            data_ranks=ranks.get_group(),
            dp_rank=ranks.get_local_rank(),
            dp_size=ranks.size(),
            position=state.position,
        )
        data = stage.open_data(opening)
        stream = stack.enter_context(data.stream)
        flops = matmul_flops(world.device, compute_dtype(config.parallel, world.device), config.hardware)
        trainer = Trainer(
            config=config,
            world=world,
            counts_once=mesh.get_local_rank("tp") == 0,
            model=model,
            optimizer=optimizer,
            objective=stage.objective(config),
            stream=stream,
            evaluate=data.evaluate,
            checkpoints=run.checkpoints,
            metrics=open_metrics(run, world, state),
            stop=stop,
            heartbeat=heartbeat,
            flops_per_token=flops_per_token(config.model, config.stage.seq_len),
            peak_flops=world.size * flops,
            bytes_per_token=data.bytes_per_token,
        )
        log.info(
            "rank %d of %d on %s, %s, from step %d", world.rank, world.size, world.device, start.layout, state.step
        )
        whole_copy = partial(unsharded_copy, model, config.model, generation_dtype(config.parallel, world.device))
        closing = partial(Closing, config, run, world, tokenizer, whole_copy)
        metrics = trainer.metrics
        if config.stage.eval_at_start and state.step == 0:
            found = stage.before_training(closing(0, lambda: heartbeat.beat(Phase.EVALUATING, 0)))
            if metrics and found:
                metrics.write(0, found)
        state = trainer.run(state)
        heartbeat.beat(Phase.CLOSING, state.step)
        del optimizer, trainer  # their memory is free for the stage's last work
        if state.step == config.stage.steps:
            step = state.step
            found = stage.after_training(closing(step, lambda: heartbeat.beat(Phase.CLOSING, step)))
            if metrics:
                metrics.write(state.step, found)
                write_result(run, config, stage, state, stream.packing, time.time() - began)
        del closing, whole_copy, model


def restore(
    run: RunDirectory, config: Config, world: World, model: Transformer, optimizer: torch.optim.Optimizer
) -> TrainState:
    """Fill model and optimizer: from this run's newest intact checkpoint, else the weights of stage.init_from."""
    own = checkpoint.newest_intact(run.checkpoints, world)
    if own is not None:
        log.info("continuing from %s", own)
        return checkpoint.load(own, model, optimizer, config.model)
    if config.stage.init_from != "none":
        start = checkpoint.find_intact(Path(config.stage.init_from), world)
        checkpoint.load_weights(start, model, config.model)
        log.info("starting from the weights of %s", start)
    return TrainState()


def write_result(
    run: RunDirectory,
    config: Config,
    stage: TrainingStage,
    state: TrainState,
    packing: dict[str, float] | None,
    seconds: float,
) -> None:
    """Write the success marker.

    Args:
        packing: how training conversations or rankings fill their sequences; None: the data is not packed whole.

    Raises:
        ArtefactError: the metrics file lacks the last evaluation, or its loss is not finite.
    """
    metrics = metrics_of_step(run, state.step)
    loss = metrics.get("val/loss")
    if loss is None or not math.isfinite(loss):
        raise ArtefactError(f"{run.metrics}: val/loss of the last step {state.step} is {loss}, expected a number")
    more = {
        "skipped_steps": state.skipped_steps,
        "packing": packing,
        "state": asdict(state),
        **stage.result(config, run, metrics),
    }
    write_success(run, config, steps=state.step, tokens=state.tokens, seconds=seconds, metrics=metrics, more=more)
