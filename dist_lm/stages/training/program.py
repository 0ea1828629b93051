"""The program of a rank: joins the other ranks, builds the parts of a training run, trains, and writes the result.

Read `run_rank` first. Stage `rlhf` has a program of its own (`dist_lm.stages.rlhf.program`), which uses the functions
here that begin a run (`joined`, `check_corpora`, `open_metrics`) and end it (`write_success`).
"""

import faulthandler
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dist_lm.config.corpus import SPLITS
from dist_lm.config.model import AdaptedModelConfig
from dist_lm.config.root import Config
from dist_lm.config.stage import LoraConfig
from dist_lm.data.manifest import read_manifest, record_content, require_content
from dist_lm.data.phases import require_same_past
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ArtefactError, require
from dist_lm.model.lora import without_adapters
from dist_lm.model.size import flops_per_token, parameter_count, trained_count
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.layout import Layout
from dist_lm.parallel.mesh import World, adds_sums, build_mesh, data_mesh, measure_all_reduce, process_group
from dist_lm.parallel.rendezvous import allow_connections
from dist_lm.parallel.sharding import build_model, compute_dtype, generation_dtype
from dist_lm.parallel.values import unsharded_copy
from dist_lm.stages.continuing import require_same_content
from dist_lm.stages.registry import load_config
from dist_lm.stages.training.arguments import DataArguments, EvaluationArguments
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tracking.metrics import MetricsWriter, read_metrics
from dist_lm.training import checkpoint, checkpoint_files
from dist_lm.training.heartbeat import Heartbeat, Phase, StopRequest
from dist_lm.training.optimizer import build_optimizer
from dist_lm.training.state import TrainState
from dist_lm.training.step_meter import matmul_flops
from dist_lm.training.step_profiler import StepProfiler
from dist_lm.training.trainer import Trainer

if TYPE_CHECKING:
    from dist_lm.stages.training.stage import TrainingStage

log = logging.getLogger(__name__)

COLLECTIVE_S, COLLECTIVE_MARGIN_S = 6 * 3600.0, 300.0  # timeout of collectives, seconds; see `joined`


@dataclass(frozen=True)
class RankStart:
    """The parts of a rank that has joined the others."""

    world: World
    layout: Layout
    mesh: DeviceMesh
    tokenizer: Tokenizer


@contextmanager
def joined(run: RunDirectory, config: Config, heartbeat: Heartbeat) -> Iterator[RankStart]:
    """Joins the other ranks for the block, measures the links between them and loads the tokenizer (collective). The
    first rank writes the speed of the links.

    Raises:
        ArtefactError: the tokenizer is missing or damaged.
        ConfigError: this rank should have a GPU and its node has too few, or may open too few files.
        UserError: the tokenizer needs the package `tokenizers`, which is not installed.
        StrangerError: another user has connected to a port of this rank.
    """
    # Heartbeats detect hangs, not this timeout. It is long because the other ranks of stage rlhf wait in one collective
    # while the first rank generates: a shorter one would end a healthy run.
    patience = max(config.cluster.hang_otherwise_s, config.cluster.hang_min_s, COLLECTIVE_S) + COLLECTIVE_MARGIN_S
    layout = Layout.recorded(config.parallel)
    allow_connections(layout)
    with process_group(config.device, patience) as world:
        assert layout.world_size == world.size, f"{layout} was not resolved for {world.size} ranks"
        mesh = build_mesh(layout, world.device)

        heartbeat.beat(Phase.LINKS, 0)
        links = measure_all_reduce(world)
        if world.is_first:
            durable.write_sealed(run.links, asdict(links))

        faulthandler.cancel_dump_traceback_later()
        heartbeat.beat(Phase.CORPORA, 0)
        yield RankStart(world, layout, mesh, Tokenizer.load(run.work.tokenizer_model))


def check_corpora(run: RunDirectory, config: Config, tokenizer: Tokenizer, world: World) -> None:
    """Refuses shards of another tokenizer, and to continue a run on other content than it began with (collective).

    For a new run the first rank records folders and content. It opens the corpora before the others, so that a missing
    index is rebuilt only once.

    Raises:
        ArtefactError: names the corpus and the way out.
        OSError: a file cannot be read, or the record or an index cannot be written.
    """
    for name in config.corpus_names:
        directory = config.corpus_in(run.work, name)
        # Ids of another tokenizer would be trained on without an error.
        read_manifest(directory).require_tokenizer(tokenizer.sha256, directory)
        if world.is_first:
            for split in SPLITS:
                TokenCorpus.open(directory, split)

    has_begun = checkpoint_files.read_pointer(run.checkpoints, checkpoint_files.LATEST) is not None
    folders = {name: config.corpus.folders.get(name, name) for name in config.corpus_names}
    if has_begun:
        require_content(run, config.corpus_names, folders)
    # The same content may lie in another folder now.
    if world.is_first and (not has_begun or folders != run.corpus_folders()):
        record_content(run, config.corpus_names, folders)
    dist.barrier()


def open_metrics(run: RunDirectory, world: World, state: TrainState) -> MetricsWriter | None:
    """Returns the metrics file on the first rank, without the lines that an attempt wrote after its last checkpoint.

    Raises:
        ArtefactError: the metrics file is damaged.
    """
    if not world.is_first:
        return None
    writer = MetricsWriter(run.metrics)
    # These steps are trained again and would be there twice.
    writer.truncate_after(state.step)
    return writer


def write_success(
    run: RunDirectory,
    config: Config,
    state: TrainState,
    seconds: float,
    metrics: Mapping[str, float | None],
    more: Mapping[str, Any],
) -> None:
    """Writes `result.json`, which marks the run as finished.

    Args:
        state: after the last step.
        seconds: duration of this attempt.
        metrics: metrics of the last step.
        more: additional fields of the stage.

    Raises:
        ArtefactError: the metrics file is damaged.
        FileNotFoundError: the run has no metrics.
    """
    latest = checkpoint_files.read_pointer(run.checkpoints, checkpoint_files.LATEST)
    result = {
        "stage": config.stage.name,
        "run_id": config.run_id,
        "steps": state.step,
        "tokens": state.tokens,
        "parameters": parameter_count(config.model),
        "trained_parameters": trained_count(config.trained_shape),
        "ranks": int(os.environ["WORLD_SIZE"]),
        "seconds": seconds,
        "checkpoint": latest.name if latest else None,
        "metrics": metrics,
        "before": metrics_of_step(run, 0),
        "state": asdict(state),
    }

    # The file comes last: the launcher takes a run with a result for finished.
    durable.write_sealed(run.result, {**result, **more})


def last_metrics(run: RunDirectory, step: int, required: str) -> dict[str, float | None]:
    """Returns the metrics of the last step.

    Raises:
        ArtefactError: the metrics file lacks `required` in that step, or it is not finite.
        FileNotFoundError: the run has no metrics.
    """
    metrics = metrics_of_step(run, step)
    figure = metrics.get(required)
    if figure is None or not math.isfinite(figure):
        raise ArtefactError(f"{run.metrics}: {required} of the last step {step} is {figure}, expected a number")
    return metrics


def metrics_of_step(run: RunDirectory, step: int) -> dict[str, float | None]:
    """Returns all metrics of one step, without `step` and `time`; empty if none were written.

    Raises:
        ArtefactError: the metrics file is damaged.
        FileNotFoundError: the run has no metrics.
    """
    metrics = {}
    for line in read_metrics(run.metrics):
        if line["step"] == step:
            metrics |= {key: value for key, value in line.items() if key not in ("step", "time")}
    return metrics


def run_rank(stage: "TrainingStage", run: RunDirectory, stop: StopRequest, heartbeat: Heartbeat) -> None:
    """Trains from the newest checkpoint of the run, or from stage.init_from, until the last step or a stop
    (collective).

    It writes checkpoints, metrics and samples; after the last step `result.json`, after a stop a checkpoint only.

    Raises:
        ArtefactError: checkpoint, tokenizer, corpus or the last evaluation is missing, damaged or does not fit.
        ConfigError: a setting does not fit the corpus, or steps that were taken had other phases; or the node has no
            GPU for this rank, or no sandbox for the programs of a task.
        NonFiniteGradientsError, CheckpointWriteError: see `Trainer.run`.
        UserError: a task of stage.eval_tasks cannot be asked, or the tokenizer lacks a mark that the stage needs.
        ClusterError, PoolFailure: Ray refuses the first rank, or actors of eval.pool find no place or keep dying.
        OSError: a file cannot be read.
        StrangerError: another user has connected to a port of this rank.
        MessageError: another rank has sent something else.
    """
    began = time.time()
    config = load_config(run.config)
    with joined(run, config, heartbeat) as start, ExitStack() as stack:
        world, mesh, tokenizer = start.world, start.mesh, start.tokenizer
        check_corpora(run, config, tokenizer, world)

        heartbeat.beat(Phase.LOADING, 0)
        # Model and optimizer, as the newest checkpoint or the start of the run has them.
        shape = config.trained_shape
        if shape.lora is not None:
            # A run keeps the base that it began with, even if stage.init_from names another one now.
            shape = checkpoint.with_base(shape, run.checkpoints, config.stage, world)
        model = build_model(shape, config.parallel, mesh, world.device, config.seed)
        model.trained_tokens = trained_tokens(config.stage.lora, tokenizer)
        optimizer = build_optimizer(model, config.stage, config.stage.muon)
        state = restore(run, config, start, model, optimizer)

        heartbeat.beat(Phase.PREPARING, state.step)
        # The stream continues at the position of the checkpoint.
        data_axis = data_mesh(mesh)
        data_arguments = DataArguments(
            config,
            run,
            world,
            tokenizer,
            data_ranks=data_axis.get_group(),
            dp_rank=data_axis.get_local_rank(),
            dp_size=data_axis.size(),
            position=state.position,
            initial=partial(initial_model, config, start, model, begun=state.step > 0),
            alive=lambda: heartbeat.beat(Phase.EVALUATING, state.step),
            scoring=lambda done: heartbeat.beat(Phase.SCORING, state.step, done),
        )
        data = stage.open_data(data_arguments)
        stream = stack.enter_context(data.stream)
        if state.phases or data.phases:
            require_same_past(run.path, state.phases, data.phases, state.step)
            state = replace(state, phases=list(data.phases))

        flops_per_rank = matmul_flops(world.device, compute_dtype(config.parallel, world.device), config.hardware)
        metrics = open_metrics(run, world, state)
        tasks = None
        if config.stage.eval_tasks:
            # Few runs need engines and Ray.
            from dist_lm.stages.training.eval_actors import tasks_of_steps

            tasks = stack.enter_context(
                tasks_of_steps(config, run, world, tokenizer, model, metrics, heartbeat, state.step)
            )
        trainer = Trainer(
            config=config,
            world=world,
            adds_sums=adds_sums(mesh),
            model=model,
            optimizer=optimizer,
            objective=stage.objective(config),
            stream=stream,
            evaluate=data.evaluate,
            checkpoints=run.checkpoints,
            metrics=metrics,
            stop=stop,
            heartbeat=heartbeat,
            flops_per_token=flops_per_token(shape, config.stage.seq_len),
            peak_flops=world.size * flops_per_rank,
            bytes_per_token=data.bytes_per_token,
            passes=data.passes,
            profiler=step_profiler(run, config, world),
            prepare=stage.prepare(config),
            tasks=tasks,
        )
        log.info(
            "rank %d of %d on %s, %s, from step %d", world.rank, world.size, world.device, start.layout, state.step
        )

        whole_copy = partial(unsharded_copy, model, shape, generation_dtype(config.parallel, world.device))
        evaluation_arguments = partial(EvaluationArguments, config, run, world, tokenizer, whole_copy)
        if config.stage.eval_at_start and state.step == 0:
            alive = partial(heartbeat.beat, Phase.EVALUATING, 0)
            alive()
            figures = stage.before_training(evaluation_arguments(0, alive))
            if metrics and figures:
                metrics.write(0, figures)

        state = trainer.run(state)

        heartbeat.beat(Phase.CLOSING, state.step)
        # Frees memory for `after_training`.
        del optimizer, trainer
        if state.step == config.stage.steps:
            if tasks:
                tasks.finish()
            alive = partial(heartbeat.beat, Phase.CLOSING, state.step)
            figures = stage.after_training(evaluation_arguments(state.step, alive))
            if metrics:
                metrics.write(state.step, figures)
                last = last_metrics(run, state.step, "val/loss")
                epochs = {corpus_pass.corpus: corpus_pass.epochs(state.position) for corpus_pass in data.passes}
                more = {"skipped_steps": state.skipped_steps, "packing": stream.packing, "epochs": epochs}
                more |= stage.result(config, run, last)
                write_success(run, config, state, time.time() - began, last, more)
        del evaluation_arguments, whole_copy, model


def step_profiler(run: RunDirectory, config: Config, world: World) -> StepProfiler | None:
    """Returns the profiler of this rank; None without profile.steps."""
    if not config.profile.steps:
        return None
    on_gpu = world.device.type == "cuda"
    return StepProfiler(config.profile.steps, on_gpu, run.trace(world.rank), run.memory_snapshot(world.rank))


def restore(
    run: RunDirectory, config: Config, start: RankStart, model: Transformer, optimizer: torch.optim.Optimizer
) -> TrainState:
    """Loads model and optimizer from the newest intact checkpoint of this run and returns its state (collective).

    Without one it loads stage.branch_from, else the weights of stage.init_from. The state of a new run is that of step
    0.

    Raises:
        ArtefactError: there is no checkpoint, or it belongs to another model, tokenizer or content.
        OSError: a file cannot be read.
    """
    tokenizer_sha256 = start.tokenizer.sha256
    resume_from = checkpoint.newest_intact(run.checkpoints, start.world)

    # A checkpoint of adapters lacks the weights of their base.
    if isinstance(model.config, AdaptedModelConfig):
        checkpoint.load_weights(Path(model.config.base), model, model.config)

    if resume_from is not None:
        log.info("continuing from %s", resume_from)
        state = checkpoint.load(resume_from, model, optimizer, model.config)
        checkpoint_files.check_tokenizer(resume_from, state, tokenizer_sha256)
        return replace(state, tokenizer=tokenizer_sha256)

    if config.stage.branch_from:
        branch_from = checkpoint.find_intact(Path(config.stage.branch_from), start.world)
        require_same_content(branch_from, run, config.corpus_names, config.corpus.folders)
        state = checkpoint.load(branch_from, model, optimizer, model.config)
        checkpoint_files.check_tokenizer(branch_from, state, tokenizer_sha256)
        log.info("continuing from %s as a branch", branch_from)
        # The best checkpoint of the other run is not one of this run.
        return replace(state, tokenizer=tokenizer_sha256, best_val_loss=None, best_step=0)

    if config.stage.init_from != "none":
        init_from = checkpoint.find_intact(Path(config.stage.init_from), start.world)
        checkpoint_files.check_tokenizer(init_from, checkpoint_files.read_state(init_from)[0], tokenizer_sha256)
        # With adapters, the weights of the base were loaded above.
        if model.config.lora is None:
            checkpoint.load_weights(init_from, model, model.config)
        log.info("starting from the weights of %s", init_from)
    return TrainState(tokenizer=tokenizer_sha256)


@contextmanager
def initial_model(config: Config, start: RankStart, model: Transformer, *, begun: bool) -> Iterator[Transformer]:
    """Yields the model with the weights that training started from (collective).

    With adapters it is the model without them, unless rows of the embedding have changed; before step 1 the model
    itself; else a second model, loaded from init_from, which lives inside the block.

    Args:
        begun: whether the run has taken a step.

    Raises:
        ArtefactError: the checkpoint of init_from is gone.
        ConfigError: bf16 is asked for on a GPU without it.
    """
    if model.config.lora is not None and not (begun and model.config.lora.tokens):
        with without_adapters(model):
            yield model
    elif not begun:
        yield model
    else:
        # The weights have changed since, so a second model takes those of the start. One with adapters is arranged by
        # what of it is trained.
        has_no_adapters = model.config.lora is None
        copy = build_model(
            model.config, config.parallel, start.mesh, start.world.device, config.seed, frozen=has_no_adapters
        )
        path = config.stage.init_from
        if isinstance(copy.config, AdaptedModelConfig):
            path = copy.config.base
        if path != "none":
            checkpoint.load_weights(checkpoint.find_intact(Path(path), start.world), copy, copy.config)
        yield copy


def trained_tokens(lora: LoraConfig, tokenizer: Tokenizer) -> torch.Tensor | None:
    """Returns the ids of stage.lora.tokens, (tokens,) int64 on the host; None without such tokens.

    Raises:
        ConfigError: the tokenizer has no special token of that name.
    """
    if not lora.tokens:
        return None
    for name in lora.tokens:
        accepted = f"special tokens of {tokenizer.name}, such as {', '.join(list(tokenizer.special_ids)[:8])}"
        require(name in tokenizer.special_ids, "stage.lora.tokens", name, accepted)
    return torch.tensor([tokenizer.special_ids[name] for name in lora.tokens])
