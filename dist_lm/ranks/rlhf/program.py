"""Building the parts of a run of stage `rlhf` on one rank, running them, and writing what they leave behind.

The first rank has the prompts and the source of rollouts; all ranks have the models.
"""

import logging
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial

import numpy as np
import torch

from dist_lm.config.file import load_config
from dist_lm.config.rlhf_run import RlhfRunConfig
from dist_lm.errors import ArtefactError
from dist_lm.parallel.values import whole_weights
from dist_lm.ranks.data import check_corpora
from dist_lm.ranks.program import open_metrics
from dist_lm.ranks.result import metrics_of_step, write_success
from dist_lm.ranks.rlhf.held_out import HeldOut
from dist_lm.ranks.rlhf.models import Begun, begin, train_state
from dist_lm.ranks.rlhf.pretraining import pretraining_text
from dist_lm.ranks.rlhf.report import Reporter
from dist_lm.ranks.rlhf.saving import Saving
from dist_lm.ranks.rlhf.source import rollout_source
from dist_lm.ranks.start import RankStart, started
from dist_lm.rlhf.learner import Learner, RolloutSupply
from dist_lm.rlhf.models import own_threads
from dist_lm.rlhf.ppo import Ppo
from dist_lm.rlhf.rollouts import ShuffledPrompts
from dist_lm.rlhf.state import RlhfState
from dist_lm.stages.rlhf import read_all
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.symbols import END
from dist_lm.training.checkpoint_saver import CheckpointSaver
from dist_lm.training.heartbeat import Heartbeat, Phase, StopRequest

log = logging.getLogger(__name__)

ALGORITHMS = {"ppo": Ppo}


def run_rank(run: RunDirectory, stop: StopRequest, heartbeat: Heartbeat) -> None:
    """From the newest checkpoint of the run, or from where its configuration says, to the end or to a stop."""
    began = time.time()
    config = load_config(run.config)
    assert isinstance(config, RlhfRunConfig)
    with started(run, config, stop, heartbeat) as start, ExitStack() as stack:
        algorithm = ALGORITHMS[config.rlhf.algorithm](config.rlhf)
        begun = begin(run, config, start, algorithm)
        state, world = begun.state, start.world
        metrics = open_metrics(run, world, train_state(begun.state, begun.tokens))
        reporter = Reporter(config, run, world, start.tokenizer, metrics, heartbeat, begun.tokens, state.iteration)
        check_corpora(run, config, start.tokenizer, world)
        train, held_out_prompts = read_all(config, run, start.tokenizer)
        supply = _supply(config, start, begun, train, reporter, stack)
        looks = partial(reporter.alive, Phase.EVALUATING)
        held_out = HeldOut(config, start, begun.models, supply, held_out_prompts, looks)
        if state.iteration == 0:
            found = held_out.compare(state.reward_scale)
            if metrics and found:
                metrics.write(0, found)
        text = stack.enter_context(pretraining_text(config, run, start, state.policy_updates))
        with _saver(run, config, start) as saver:
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
                write_result(run, config, state, reporter.tokens, time.time() - began)


def _supply(
    config: RlhfRunConfig,
    start: RankStart,
    begun: Begun,
    prompts: Sequence[Sequence[int]],
    reporter: Reporter,
    stack: ExitStack,
) -> RolloutSupply | None:
    """What the first rank has: prompts, and who draws their completions (collective)."""
    model = begun.models.policy.model
    weights = whole_weights(model, model.config, torch.float32)
    if not start.world.is_first:
        return None
    copies = {name: np.array(value.cpu().numpy()) for name, value in weights.items()}
    draws = partial(reporter.alive, Phase.GENERATING)
    source = stack.enter_context(rollout_source(config, start.tokenizer, copies, start.world.device, draws))
    return RolloutSupply(
        source,
        ShuffledPrompts(prompts, config.seed),
        start.tokenizer.decode,
        stop_tokens=(start.tokenizer.special_ids[END],),
    )


def _saver(run: RunDirectory, config: RlhfRunConfig, start: RankStart) -> CheckpointSaver:
    stage = config.stage
    return CheckpointSaver(
        run.checkpoints,
        config.model,
        start.world,
        keep=stage.keep_checkpoints,
        beside_training=stage.checkpoint_async,
    )


def write_result(run: RunDirectory, config: RlhfRunConfig, state: RlhfState, tokens: int, seconds: float) -> None:
    """The success marker.

    Raises:
        ArtefactError: the metrics file does not hold the last iteration, or its reward is not finite.
    """
    metrics = metrics_of_step(run, state.iteration)
    reward = metrics.get("rlhf/reward_mean")
    if reward is None or not math.isfinite(reward):
        raise ArtefactError(f"{run.metrics}: rlhf/reward_mean of the last iteration is {reward}, expected a number")
    more = {
        "prompts": state.prompt_position,
        "first": metrics_of_step(run, 1),
        "state": asdict(train_state(state, tokens)),
    }
    write_success(run, config, steps=state.iteration, tokens=tokens, seconds=seconds, metrics=metrics, more=more)
