"""The program of a rank in stage `rlhf`: builds the parts of the learner, runs it, reports and saves. An iteration
itself is `Learner._iteration` (`dist_lm/rlhf/learner.py`).

All ranks hold the models and their share of pretraining text. The first rank holds the prompts, the rules and the
source of rollouts (`controller.py`), or starts a child that does: a pool of actors on the gang's Ray cluster, or an
engine in this process.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch

from dist_lm.cluster.ray_cluster import own_access
from dist_lm.config.corpus import SPLITS
from dist_lm.data.batch import Batch
from dist_lm.data.sequences import note_of_left_out
from dist_lm.data.stream import SequenceStream, StepStream
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ArtefactError
from dist_lm.evaluation.in_loop import loop_tasks
from dist_lm.parallel.host_copies import HostCopies
from dist_lm.parallel.mesh import World, data_mesh
from dist_lm.rlhf.algorithms.registry import ALGORITHMS
from dist_lm.rlhf.learner import IterationReport, Learner, Pretraining
from dist_lm.rlhf.models import RlhfModels, optimizers_away, own_threads, sent_weights
from dist_lm.rlhf.rollouts import read_to_end
from dist_lm.rlhf.state import RlhfState
from dist_lm.stages.pool_start import pool_starter
from dist_lm.stages.registry import load_config
from dist_lm.stages.rlhf.config import PROCESS, RlhfRunConfig
from dist_lm.stages.rlhf.controller import open_controller, read_prompts
from dist_lm.stages.rlhf.evaluations import HeldOut, TasksOfIterations
from dist_lm.stages.rlhf.models import LoadedRun, load_run, saved_files, train_state
from dist_lm.stages.rlhf.record import remove_old_conversations
from dist_lm.stages.training.eval_tasks import Evaluated
from dist_lm.stages.training.program import (
    RankStart,
    check_corpora,
    joined,
    metrics_of_step,
    open_metrics,
    step_profiler,
    write_success,
)
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer, text_with_marks
from dist_lm.tracking.metrics import MetricsWriter
from dist_lm.training.checkpoint_saver import CheckpointSaver
from dist_lm.training.heartbeat import Heartbeat, Phase, StopRequest
from dist_lm.training.step_meter import Eta, peak_memory_gib
from dist_lm.training.step_profiler import StepProfiler
from dist_lm.training.trainer import is_due

log = logging.getLogger(__name__)

SEQ_LEN = "rlhf.pretrain_seq_len"


def run_rank(run: RunDirectory, stop: StopRequest, heartbeat: Heartbeat) -> None:
    """Trains from the newest checkpoint of the run, or from stage.init_from, until the last iteration or a stop
    (collective).

    It writes checkpoints, metrics and samples of rollouts; after the last iteration `result.json`.

    Raises:
        ArtefactError: a checkpoint, a corpus or the prompts are missing, damaged or have changed.
        ConfigError: the prompts, or the start of the critic, do not fit; or the node has no GPU for this rank or no
            sandbox.
        NonFiniteGradientsError, RewardError, RequestError: see `Learner.run`.
        CheckpointWriteError: a checkpoint could not be written.
        UserError: a task of stage.eval_tasks cannot be asked, or as `read_prompts` and `open_controller`.
        ClusterError, PoolFailure: Ray refuses the first rank, or actors find no place or keep dying.
        ControllerLostError: the controller's process ends again and again; on the first rank.
        OSError: a file cannot be read.
        StrangerError: another user has connected to a port of this rank.
    """
    began = time.time()
    config = load_config(run.config)
    assert isinstance(config, RlhfRunConfig)
    with joined(run, config, heartbeat) as start, ExitStack() as stack:
        world, tokenizer = start.world, start.tokenizer

        heartbeat.beat(Phase.LOADING, 0)
        # Models and state, from a checkpoint of this run or from stage.init_from.
        algorithm = ALGORITHMS[config.rlhf.algorithm](config.rlhf)
        loaded = load_run(run, config, start, algorithm)
        state = loaded.state
        # Metrics after the checkpoint belong to iterations that run again.
        metrics = open_metrics(run, world, train_state(state, loaded.tokens, tokenizer.sha256))
        profiler = step_profiler(run, config, world)
        reporter = Reporter(config, run, world, tokenizer, metrics, heartbeat, loaded.tokens, state.iteration, profiler)

        heartbeat.beat(Phase.PREPARING, state.iteration)
        # Prompts, rules and engines, on the first rank.
        check_corpora(run, config, tokenizer, world)
        run.require_files(config.noted_files)  # prompts must not change while the run goes on
        in_process = has_controller_process(config)
        prompts = read_prompts(config, run, tokenizer, judges=world.is_first and not in_process)
        pool = None
        if world.is_first and not in_process:
            pool = stack.enter_context(pool_starter(config, world.device))
        tasks = loop_tasks(config, run, tokenizer) if config.stage.eval_tasks else None
        controller = None
        # Reading the weights is collective, although only the first rank has a controller. An engine is built with
        # weights, so it gets these; no rollout is drawn by them, because `Learner.run` begins by sending them once
        # more, with their version.
        weights = sent_weights(loaded.models.policy.model, config.parallel, world)
        generating = partial(reporter.alive, Phase.GENERATING)
        if world.is_first and in_process:
            from dist_lm.stages.rlhf.controller_program import start_controller

            controller = stack.enter_context(
                start_controller(run, world.device, weights, generating, config.rlhf.drawing_staleness)
            )
        elif world.is_first:
            controller = open_controller(
                config, run, tokenizer, world.device, prompts, weights, generating, stack, pool, tasks
            )
        else:
            read_to_end(weights)

        evaluations = None
        if tasks:
            parts = Evaluated(config, run, world, tokenizer, loaded.models.policy.model, tasks, metrics, heartbeat)
            evaluations = TasksOfIterations(parts, config.rlhf.max_staleness)
        # Before the first iteration policy and reference are equal: this win rate shows how large the noise of later
        # ones is.
        evaluating = partial(reporter.alive, Phase.EVALUATING)
        drawing = while_engines_draw(config, loaded.models, world)
        held_out = HeldOut(config, start, loaded.models, controller, prompts.held_out, evaluating, drawing)
        if state.iteration == 0:
            comparison = held_out.compare(state.reward_scale)
            if metrics and comparison:
                metrics.write(0, comparison)

        text = stack.enter_context(pretraining_text(config, run, start, state.policy_updates))
        saver = CheckpointSaver(
            run.checkpoints,
            loaded.models.policy.model.config,
            world,
            keep=config.stage.keep_checkpoints,
            asynchronous=config.stage.checkpoint_async,
        )
        with saver, profiler or nullcontext():
            if profiler:
                profiler.reached(state.iteration)
            learner = Learner(
                config=config.rlhf,
                seed=config.seed,
                iterations=config.stage.steps,
                world=world,
                mesh=start.mesh,
                parallel=config.parallel,
                models=loaded.models,
                algorithm=algorithm,
                controller=controller,
                pretraining=text,
                constraints=prompts.constraints,
                save_every=config.stage.checkpoint_every,
                save=Saving(saver, loaded, reporter, world.is_first),
                report=reporter,
                tasks=evaluations,
                alive=partial(reporter.alive, Phase.STEP),
                scoring=partial(reporter.alive, Phase.SCORING),
                run_both=stack.enter_context(own_threads(world)),
                drawing=drawing,
                stop=stop,
            )
            log.info("rank %d of %d, %s, from iteration %d", world.rank, world.size, start.layout, state.iteration)
            state = learner.run(state)

        reporter.alive(Phase.CLOSING)
        if state.iteration == config.stage.steps:
            comparison = held_out.compare(state.reward_scale)
            if metrics:
                metrics.write(state.iteration, comparison)
                last = last_figures(run, state.iteration)
                counters = train_state(state, reporter.tokens, tokenizer.sha256)
                more = {"prompts": state.prompt_position, "first": metrics_of_step(run, 1)}
                write_success(run, config, counters, time.time() - began, last, more)


def while_engines_draw(
    config: RlhfRunConfig, models: RlhfModels, world: World
) -> Callable[[], AbstractContextManager[None]]:
    """Returns the context that a rank enters while engines draw: on a GPU on which it takes turns with an engine, the
    state of its optimizers waits on the host."""
    has_engine = world.is_first or config.pool.actors > 0
    if not (config.in_turns and has_engine and world.device.type == "cuda"):
        return nullcontext
    optimizers = [trained.optimizer for trained in (models.policy, models.critic) if trained]
    return partial(optimizers_away, optimizers, HostCopies())


def has_controller_process(config: RlhfRunConfig) -> bool:
    """Returns whether the controller gets a process of its own; without Ray it stays in the first rank (a warning)."""
    if config.rlhf.controller != PROCESS:
        return False
    if own_access(os.environ) is None:
        log.warning("rlhf.controller=process: this rank runs without Ray, so the controller stays in the first rank")
        return False
    return True


# --- pretraining text ---


@dataclass(frozen=True)
class PretrainingText:
    """This rank's share of a stream of text, update by update. Implements `Pretraining`.

    Each policy update reads the next `rlhf.pretrain_sequences` sequences, so the number of updates gives the position
    of the stream, and a checkpoint stores nothing else.
    """

    stream: StepStream
    sequences: int  # per update over all ranks
    device: torch.device

    def __call__(self, update: int) -> list[Batch]:
        """Returns the micro-batches of the next update, whose number must be `update`."""
        data = next(self.stream)
        assert data.position == (update + 1) * self.sequences, (data.position, update)
        return [batch.to(self.device) for batch in data.micro_batches]


@contextmanager
def pretraining_text(
    config: RlhfRunConfig, run: RunDirectory, start: RankStart, updates: int
) -> Iterator[Pretraining | None]:
    """Yields this rank's micro-batches of pretraining text by update; None if rlhf.pretrain_coefficient is 0.

    Args:
        updates: policy updates so far.

    Raises:
        ArtefactError: a corpus is missing or too small for a sequence.
        ConfigError: the batch of text does not divide over the ranks.
        OSError: a file cannot be read.
    """
    settings = config.rlhf
    if not settings.pretrain_coefficient:
        yield None
        return

    folders = {name: config.corpus_in(run.work, name) for name in settings.pretrain_corpus_names}
    corpora = {name: TokenCorpus.open(folder, SPLITS[0]) for name, folder in folders.items()}
    if start.world.is_first:
        for corpus in corpora.values():
            if note := note_of_left_out(corpus, settings.pretrain_seq_len, SEQ_LEN):
                log.warning("%s", note)

    ranks = data_mesh(start.mesh)
    with SequenceStream(
        corpora[settings.pretrain_corpus],
        seed=config.seed,
        seq_len=settings.pretrain_seq_len,
        global_batch=settings.pretrain_sequences,
        # A micro-batch of text takes about as much memory as one of rollouts.
        micro_batch=max(1, settings.micro_batch_tokens // settings.pretrain_seq_len),
        dp_rank=ranks.get_local_rank(),
        dp_size=ranks.size(),
        position=updates * settings.pretrain_sequences,
        pad_id=start.tokenizer.pad_id,
        first_token=start.tokenizer.first_token,
        mix={corpora[name]: share for name, share in sorted(settings.pretrain_mix.items())},
        pin_memory=start.world.device.type == "cuda",
        seq_len_key=SEQ_LEN,
    ) as stream:
        yield PretrainingText(stream, settings.pretrain_sequences, start.world.device)


# --- reports, checkpoints and the result ---


@dataclass
class Reporter:
    """Called after every iteration on every rank; writes metrics and samples on the first rank."""

    config: RlhfRunConfig
    run: RunDirectory
    world: World
    tokenizer: Tokenizer
    metrics: MetricsWriter | None  # on the first rank
    heartbeat: Heartbeat
    tokens: int  # generated and trained on so far
    iteration: int  # finished iterations
    profiler: StepProfiler | None
    _eta: Eta = field(init=False)
    _has_warned: bool = field(init=False, default=False)  # of a reward that a constraint earns

    def __post_init__(self) -> None:
        self._eta = Eta(self.config.stage.steps)

    def __call__(self, report: IterationReport) -> None:
        """Writes the line of metrics of an iteration and its samples, if they are due, and counts its tokens."""
        new_tokens = int(report.rollouts.new_tokens_B.sum())
        self.tokens += new_tokens
        self.iteration = report.iteration

        # This is the time of the iteration only: loading, comparisons, saves and tasks in between are not part of it.
        seconds = report.metrics["timing/iteration_s"]
        line = dict(report.metrics) | {
            "train/tokens": self.tokens,
            "perf/step_s": seconds,
            "perf/tokens_per_s": new_tokens / seconds,
            "perf/tokens_per_s_per_rank": new_tokens / seconds / self.world.size,
            "perf/samples_per_s": len(report.rollouts) / seconds,
            "perf/memory_gib": peak_memory_gib(self.world.device),
        }
        left_s = self._eta.after(report.iteration)
        if left_s is not None:
            line["perf/eta_s"] = left_s

        stage = self.config.stage
        has_table = report.iteration == stage.steps or is_due(report.iteration, stage.eval_every)
        is_logged = has_table or report.iteration == 1 or report.iteration % stage.log_every == 0
        if self.metrics and is_logged:
            self.metrics.write(report.iteration, line)
        if self.metrics and has_table and self.config.rlhf.table_rollouts:
            self._write_table(report)
        self._warn_of_free_reward(report)
        if self.profiler:
            self.alive(Phase.TRACING)
            self.profiler.reached(report.iteration)
        self.alive(Phase.DATA)

    def _warn_of_free_reward(self, report: IterationReport) -> None:
        """Logs, once and on the first rank, that a constraint may earn the reward by itself: scores are all the same
        in each group, or in the iteration."""
        if not self.config.rlhf.constraint or self._has_warned or not self.world.is_first:
            return

        has_equal_scores = len(report.score_B) > 1 and bool((report.score_B == report.score_B[0]).all())
        if has_equal_scores or report.metrics.get("rlhf/groups_without_signal") == 1:
            self._has_warned = True
            log.warning(
                "iteration %d: all rollouts of a prompt have the same score, so nothing is learned: either what "
                "rlhf.constraint=%s forces earns the reward by itself (score what it leaves open), or the policy gives "
                "one answer",
                *(report.iteration, self.config.rlhf.constraint),
            )

    def alive(self, phase: Phase, done: float = 0.0) -> None:
        """Writes a heartbeat, with the share of the phase that is done, in [0, 1]; 0: unknown."""
        self.heartbeat.beat(phase, self.iteration, done)

    def _write_table(self, report: IterationReport) -> None:
        """Writes `samples/step_N.jsonl`: rollouts at even distances from best to worst, with the score of each part
        (first rank).
        """
        n = len(report.score_B)
        rows = min(n, self.config.rlhf.table_rollouts)
        # Even distances show what the policy does when it fails, not only its best rollouts.
        order = report.score_B.argsort(descending=True, stable=True).tolist()
        chosen = {order[i * (n - 1) // max(1, rows - 1)] for i in range(rows)}

        # `Rollouts` are read in order; the table is sorted by reward at the end.
        lines = []
        for b, rollout in enumerate(report.rollouts):
            if b not in chosen:
                continue
            line = {
                "kind": "rollout",
                "prompt": text_with_marks(rollout.prompt.tolist(), self.tokenizer),
                "completion": text_with_marks(rollout.completion.tolist(), self.tokenizer),
                "reward": float(report.score_B[b]),
                "parts": parts_of(report, b),
                "tokens": len(rollout.completion),
                "finish": rollout.finish,
                "version": rollout.version,
            }
            lines.append((-line["reward"], b, json.dumps(line, ensure_ascii=False)))
        lines.sort(key=lambda line: line[:2])
        path = self.run.samples / f"step_{report.iteration:08d}.jsonl"
        durable.write_text(path, "".join(f"{text}\n" for _, _, text in lines))


def parts_of(report: IterationReport, rollout: int) -> dict[str, float | None]:
    """Returns the score of each part for one rollout; None where the part does not apply."""
    parts: dict[str, float | None] = {}
    for name, score_B in report.part_B.items():
        skipped_B = report.skipped_B.get(name)
        is_skipped = skipped_B is not None and bool(skipped_B[rollout])
        parts[name] = None if is_skipped else float(score_B[rollout])
    return parts


@dataclass(frozen=True)
class Saving:
    """Saves a checkpoint after an iteration (collective)."""

    saver: CheckpointSaver
    loaded: LoadedRun
    reporter: Reporter
    is_first: bool

    def __call__(self, state: RlhfState) -> None:
        """Saves `state` with the current models (collective), and notes how long training waited (checkpoint/stall_s).

        The first rank removes conversations that no checkpoint needs, unless rlhf.keep_conversations.

        Raises:
            CheckpointWriteError: a checkpoint could not be written.
            OSError: a file of conversations cannot be removed.
        """
        self.reporter.alive(Phase.SAVING)
        # A checkpoint may not be newer than the metrics: a resumed run writes only the later lines.
        if self.reporter.metrics:
            self.reporter.metrics.sync()

        began = time.perf_counter()
        policy = self.loaded.models.policy
        self.saver.save(
            policy.model,
            policy.optimizer,
            train_state(state, self.reporter.tokens, self.reporter.tokenizer.sha256),
            self.loaded.companions,
            saved_files(state, self.loaded) if self.is_first else {},
        )
        if self.reporter.metrics:
            self.reporter.metrics.write(state.iteration, {"checkpoint/stall_s": time.perf_counter() - began})
        if self.is_first:
            settings = self.reporter.config.rlhf
            if settings.environment and not settings.keep_conversations:
                remove_old_conversations(self.reporter.run)


def last_figures(run: RunDirectory, iteration: int) -> dict[str, float]:
    """Returns the metrics of the last iteration that are finite.

    Raises:
        ArtefactError: the metrics file lacks the iteration.
        FileNotFoundError: the run has no metrics.
    """
    metrics = metrics_of_step(run, iteration)
    if "rlhf/reward_mean" not in metrics:
        raise ArtefactError(f"{run.metrics}: expected rlhf/reward_mean of the last iteration, {iteration}")

    # Older releases went on after such an iteration; its weights are those before it.
    if void := sorted(name for name, figure in metrics.items() if figure is None):
        log.warning("iteration %d: %s: not finite, so the result has no such figures", iteration, ", ".join(void))
    return {name: figure for name, figure in metrics.items() if figure is not None}
