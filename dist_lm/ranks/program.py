"""Building the parts of a training run on one rank, running them, and writing what they leave behind."""

import logging
import math
import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from dist_lm.config.file import load_config
from dist_lm.config.root import Config
from dist_lm.data.evaluation_batches import gzip_bits_per_byte
from dist_lm.data.mapped import MappedCorpus
from dist_lm.errors import ArtefactError
from dist_lm.model.size import flops_per_token
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World, data_mesh
from dist_lm.parallel.sharding import build_model, compute_dtype, generation_dtype
from dist_lm.parallel.values import unsharded_copy
from dist_lm.ranks.data import check_corpora, open_data
from dist_lm.ranks.result import metrics_of_step, write_success
from dist_lm.ranks.start import started
from dist_lm.stages.registry import training_stage
from dist_lm.stages.training_stage import Closing, Opening, TrainingStage
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tracking.metrics import MetricsWriter
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
    with started(run, config, stop, heartbeat) as start, ExitStack() as stack:
        world, layout, mesh, tokenizer = start.world, start.layout, start.mesh, start.tokenizer
        check_corpora(run, config, tokenizer, world)
        model = build_model(config.model, config.parallel, mesh, world.device, config.seed)
        optimizer = build_optimizer(model, config.stage, config.stage.muon)
        state = restore(run, config, world, model, optimizer)
        stage, ranks = training_stage(config.stage.name), data_mesh(mesh)
        data = (stage.data or open_data)(
            Opening(
                config,
                run,
                world,
                tokenizer,
                data_ranks=ranks.get_group(),
                dp_rank=ranks.get_local_rank(),
                dp_size=ranks.size(),
                position=state.position,
            )
        )
        stream = stack.enter_context(data.stream)
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
            peak_flops=world.size
            * matmul_flops(world.device, compute_dtype(config.parallel, world.device), config.hardware),
            bytes_per_token=data.bytes_per_token,
        )
        log.info("rank %d of %d on %s, %s, from step %d", world.rank, world.size, world.device, layout, state.step)
        copy = partial(unsharded_copy, model, config.model, generation_dtype(config.parallel, world.device))
        if stage.open and config.stage.eval_at_start and state.step == 0:
            found = stage.open(
                Closing(config, run, world, tokenizer, copy, 0, lambda: heartbeat.beat(Phase.EVALUATING, 0))
            )
            if trainer.metrics:
                trainer.metrics.write(0, found)
        state, metrics = trainer.run(state), trainer.metrics
        heartbeat.beat(Phase.CLOSING, state.step)
        del optimizer, trainer  # their memory is there for what the stage does at its end
        if state.step == config.stage.steps:
            step = state.step
            found = stage.close(
                Closing(config, run, world, tokenizer, copy, step, lambda: heartbeat.beat(Phase.CLOSING, step))
            )
            if metrics:
                metrics.write(state.step, found)
                write_result(run, config, stage, tokenizer, state, stream.packing, time.time() - began)
        del copy, model


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


def open_metrics(run: RunDirectory, world: World, state: TrainState) -> MetricsWriter | None:
    """The metrics file, on the first rank; what an attempt wrote after its last checkpoint is taken back."""
    if not world.is_first:
        return None
    writer = MetricsWriter(run.metrics)
    writer.truncate_after(state.step)
    return writer


def write_result(
    run: RunDirectory,
    config: Config,
    stage: TrainingStage,
    tokenizer: Tokenizer,
    state: TrainState,
    packing: dict[str, float] | None,
    seconds: float,
) -> None:
    """The success marker: what came out, beside what gzip makes of the same held-out documents.

    Args:
        packing: of the training conversations or rankings, if it was those.

    Raises:
        ArtefactError: the metrics file does not hold the last evaluation, or it is not finite.
    """
    metrics = metrics_of_step(run, state.step)
    loss = metrics.get("val/loss")
    if loss is None or not math.isfinite(loss):
        raise ArtefactError(f"{run.metrics}: val/loss of the last step {state.step} is {loss}, expected a number")
    corpus = MappedCorpus.open(run.work.corpus(config.stage.corpus), "val")
    texts = (
        (
            corpus.languages[corpus.language_codes[document]],
            tokenizer.decode(corpus.tokens(document, 1, int(corpus.lengths[document])).tolist()).encode(),
        )
        for document in range(0 if corpus.has_mask else corpus.n_documents)  # gzip has no mask to go by
    )
    more = {
        "skipped_steps": state.skipped_steps,
        "packing": packing,
        "gzip_bits_per_byte": gzip_bits_per_byte(texts),
        "state": asdict(state),
        **stage.result(metrics),
    }
    write_success(run, config, steps=state.step, tokens=state.tokens, seconds=seconds, metrics=metrics, more=more)
