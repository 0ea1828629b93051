"""The program of a rank in stage `rlhf`: builds the learner, runs it, reports and saves.

All ranks hold the models. The first rank holds the prompts and the source of rollouts.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial

from dist_lm.chat.template import stop_tokens
from dist_lm.cluster.sandboxes import sandboxes_of
from dist_lm.config.rlhf import RlhfConfig
from dist_lm.config.root import TRUST_ME
from dist_lm.errors import ArtefactError
from dist_lm.parallel.mesh import World
from dist_lm.rlhf.algorithm import Algorithm
from dist_lm.rlhf.dapo import Dapo
from dist_lm.rlhf.dr_grpo import DrGrpo
from dist_lm.rlhf.grpo import Grpo
from dist_lm.rlhf.gspo import Gspo
from dist_lm.rlhf.learner import IterationReport, Learner, RolloutSupply
from dist_lm.rlhf.models import own_threads, sent_weights
from dist_lm.rlhf.ppo import Ppo
from dist_lm.rlhf.reinforce_pp import ReinforcePp
from dist_lm.rlhf.rewards import Judge, Tasks
from dist_lm.rlhf.rloo import Rloo
from dist_lm.rlhf.rollouts import ShuffledPrompts, read_to_end
from dist_lm.rlhf.state import RlhfState
from dist_lm.stages.pool_beside import PoolBeside, joined
from dist_lm.stages.registry import load_config
from dist_lm.stages.rlhf.held_out import HeldOut
from dist_lm.stages.rlhf.models import Begun, begin, saved_files, train_state
from dist_lm.stages.rlhf.prompts import read_all, request_reader, tasks_of
from dist_lm.stages.rlhf.stage import RlhfRunConfig
from dist_lm.stages.rlhf.supply import pretraining_text, rollout_source
from dist_lm.stages.training.program import (
    RankStart,
    check_corpora,
    metrics_of_step,
    open_metrics,
    started,
    step_profiler,
    write_success,
)
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer, shown
from dist_lm.tracking.metrics import MetricsWriter
from dist_lm.training.checkpoint_saver import CheckpointSaver
from dist_lm.training.heartbeat import Heartbeat, Phase, StopRequest
from dist_lm.training.state import TrainState
from dist_lm.training.step_meter import Eta
from dist_lm.training.step_profiler import StepProfiler
from dist_lm.training.trainer import is_due, peak_memory_gib

log = logging.getLogger(__name__)

ALGORITHMS: dict[str, Callable[[RlhfConfig], Algorithm]] = {
    "ppo": Ppo,
    "grpo": Grpo,
    "dr_grpo": DrGrpo,
    "rloo": Rloo,
    "reinforce_pp": ReinforcePp,
    "dapo": Dapo,
    "gspo": Gspo,
}


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

    def __post_init__(self) -> None:
        self._eta = Eta(self.config.stage.steps)

    def __call__(self, report: IterationReport) -> None:
        """Report an iteration."""
        new = int(report.rollouts.new_tokens_B.sum())
        self.tokens += new
        self.iteration = report.iteration
        took = report.metrics["timing/iteration_s"]  # without loading, comparisons, saves and tasks in between
        line = dict(report.metrics) | {
            "train/tokens": self.tokens,
            "perf/step_s": took,
            "perf/tokens_per_s": new / took,
            "perf/tokens_per_s_per_rank": new / took / self.world.size,
            "perf/samples_per_s": len(report.rollouts) / took,
            "perf/memory_gib": peak_memory_gib(self.world.device),
        }
        left_s = self._eta.after(report.iteration)
        if left_s is not None:
            line["perf/eta_s"] = left_s
        last = report.iteration == self.config.stage.steps
        shown = last or is_due(report.iteration, self.config.stage.eval_every)
        if self.metrics and (shown or report.iteration == 1 or report.iteration % self.config.stage.log_every == 0):
            self.metrics.write(report.iteration, line)
        if self.metrics and shown and self.config.rlhf.table_rollouts:
            self._write_table(report)
        if self.profiler:
            self.alive(Phase.TRACING)
            self.profiler.reached(report.iteration)
        self.alive(Phase.DATA)

    def alive(self, phase: Phase) -> None:
        """Write a heartbeat."""
        self.heartbeat.beat(phase, self.iteration)

    def _write_table(self, report: IterationReport) -> None:
        """Write `samples/step_N.jsonl`: rollouts at even distances from best to worst, with the score of each part."""
        n = len(report.score_B)
        wanted = min(n, self.config.rlhf.table_rollouts)
        order = report.score_B.argsort(descending=True, stable=True).tolist()
        chosen = {order[i * (n - 1) // max(1, wanted - 1)] for i in range(wanted)}
        lines = []
        for place, rollout in enumerate(report.rollouts):
            if place in chosen:
                line = {
                    "kind": "rollout",
                    "prompt": shown(rollout.prompt.tolist(), self.tokenizer),
                    "completion": shown(rollout.completion.tolist(), self.tokenizer),
                    "reward": float(report.score_B[place]),
                    "parts": {name: float(score_B[place]) for name, score_B in report.part_B.items()},
                    "tokens": len(rollout.completion),
                    "finish": rollout.finish,
                    "version": rollout.version,
                }
                lines.append((line["reward"], place, json.dumps(line, ensure_ascii=False)))
        lines.sort(key=lambda line: (-line[0], line[1]))
        path = self.run.samples / f"step_{report.iteration:08d}.jsonl"
        durable.write_text(path, "".join(f"{text}\n" for _, _, text in lines))


@dataclass(frozen=True)
class Saving:
    """Saves a checkpoint after an iteration (collective)."""

    saver: CheckpointSaver
    begun: Begun
    reporter: Reporter
    is_first: bool

    def __call__(self, state: RlhfState) -> None:
        """Save `state` with the current models."""
        self.reporter.alive(Phase.SAVING)
        if self.reporter.metrics:
            self.reporter.metrics.sync()
        began = time.perf_counter()
        policy = self.begun.models.policy
        self.saver.save(
            policy.model,
            policy.optimizer,
            train_state(state, self.reporter.tokens, self.reporter.tokenizer.sha256),
            self.begun.companions,
            saved_files(state, self.begun) if self.is_first else {},
        )
        if self.reporter.metrics:
            self.reporter.metrics.write(state.iteration, {"checkpoint/stall_s": time.perf_counter() - began})


def run_rank(run: RunDirectory, stop: StopRequest, heartbeat: Heartbeat) -> None:
    """Train from the newest checkpoint of the run, or from stage.init_from, until the last iteration or a stop."""
    began = time.time()
    config = load_config(run.config)
    assert isinstance(config, RlhfRunConfig)
    with started(run, config, heartbeat) as start, ExitStack() as stack:
        algorithm = ALGORITHMS[config.rlhf.algorithm](config.rlhf)
        begun = begin(run, config, start, algorithm)
        state, world = begun.state, start.world
        metrics = open_metrics(run, world, train_state(begun.state, begun.tokens, start.tokenizer.sha256))
        profiler = step_profiler(run, config, world)
        reporter = Reporter(
            config, run, world, start.tokenizer, metrics, heartbeat, begun.tokens, state.iteration, profiler
        )
        check_corpora(run, config, start.tokenizer, world)
        run.require_files(config.noted_files)
        train, held_out_prompts = read_all(config, run, start.tokenizer)
        beside = stack.enter_context(joined(config, world.device)) if world.is_first else None
        supply = _supply(config, start, begun, train, reporter, stack, beside)
        tasks = None
        if config.stage.eval_tasks:
            from dist_lm.stages.rlhf.tasks import tasks_of_iterations

            source, policy = supply.source if supply else None, begun.models.policy.model
            cluster = beside.cluster if beside else None
            tasks = tasks_of_iterations(config, run, start, policy, source, metrics, heartbeat, cluster)
        looks = partial(reporter.alive, Phase.EVALUATING)
        held_out = HeldOut(config, start, begun.models, supply, held_out_prompts, looks)
        if state.iteration == 0:
            found = held_out.compare(state.reward_scale)
            if metrics and found:
                metrics.write(0, found)
        text = stack.enter_context(pretraining_text(config, run, start, state.policy_updates))
        with _saver(run, config, start, begun) as saver, profiler or nullcontext():
            if profiler:
                profiler.reached(state.iteration)
            learner = Learner(
                config=config.rlhf,
                seed=config.seed,
                iterations=config.stage.steps,
                world=world,
                mesh=start.mesh,
                parallel=config.parallel,
                models=begun.models,
                algorithm=algorithm,
                supply=supply,
                pretraining=text,
                save_every=config.stage.checkpoint_every,
                save=Saving(saver, begun, reporter, world.is_first),
                report=reporter,
                tasks=tasks,
                alive=partial(reporter.alive, Phase.STEP),
                beside=stack.enter_context(own_threads(world)),
                stop=stop,
            )
            log.info("rank %d of %d, %s, from iteration %d", world.rank, world.size, start.layout, state.iteration)
            state = learner.run(state)
        reporter.alive(Phase.CLOSING)
        if state.iteration == config.stage.steps:
            found = held_out.compare(state.reward_scale)
            if metrics:
                metrics.write(state.iteration, found)
                counters = train_state(state, reporter.tokens, start.tokenizer.sha256)
                write_result(run, config, state, counters, time.time() - began)


def _supply(
    config: RlhfRunConfig,
    start: RankStart,
    begun: Begun,
    prompts: Sequence[Sequence[int]],
    reporter: Reporter,
    stack: ExitStack,
    beside: PoolBeside | None,
) -> RolloutSupply | None:
    """Prompts and source of rollouts on the first rank; None on other ranks (collective)."""
    weights = sent_weights(begun.models.policy.model, config.parallel, start.world)
    if not start.world.is_first:
        read_to_end(weights)
        return None
    group, draws = config.rlhf, partial(reporter.alive, Phase.GENERATING)
    on_nodes = partial(sandboxes_of, beside.cluster if beside else None)
    tasks = Tasks(tasks_of(group, start.tokenizer), config.sandbox == TRUST_ME, on_nodes)
    request_of = request_reader(start.tokenizer)
    judge = Judge(group.rewards, start.tokenizer.decode, group.max_failed_fraction, draws, tasks, request_of)
    stack.enter_context(judge)
    source = stack.enter_context(rollout_source(config, start.tokenizer, weights, start.world.device, draws, beside))
    return RolloutSupply(
        source,
        ShuffledPrompts(prompts, config.seed),
        judge,
        stop_tokens=stop_tokens(start.tokenizer),
    )


def _saver(run: RunDirectory, config: RlhfRunConfig, start: RankStart, begun: Begun) -> CheckpointSaver:
    stage = config.stage
    return CheckpointSaver(
        run.checkpoints,
        begun.models.policy.model.config,
        start.world,
        keep=stage.keep_checkpoints,
        beside_training=stage.checkpoint_async,
    )


def write_result(
    run: RunDirectory, config: RlhfRunConfig, state: RlhfState, counters: TrainState, seconds: float
) -> None:
    """Write the success marker.

    Raises:
        ArtefactError: the metrics file lacks the last iteration, or its reward is not finite.
    """
    metrics = metrics_of_step(run, state.iteration)
    reward = metrics.get("rlhf/reward_mean")
    if reward is None or not math.isfinite(reward):
        raise ArtefactError(f"{run.metrics}: rlhf/reward_mean of the last iteration is {reward}, expected a number")
    more = {
        "prompts": state.prompt_position,
        "first": metrics_of_step(run, 1),
        "state": asdict(counters),
    }
    write_success(run, config, steps=counters.step, tokens=counters.tokens, seconds=seconds, metrics=metrics, more=more)
