"""Our PPO on the toy of `bench rlhf`: the learner of stage rlhf, fed by whatever source of rollouts."""

from copy import copy
from dataclasses import replace

import numpy as np
import torch

from dist_lm.config.parallel import ParallelConfig
from dist_lm.config.rlhf import RewardPartConfig, RlhfConfig
from dist_lm.config.root import Config
from dist_lm.generation.engine import Engine, EngineOptions
from dist_lm.model.initialise import initial_value
from dist_lm.model.size import parameter_shapes
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.layout import resolve_layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.parallel.sharding import build_model
from dist_lm.rlhf.learner import IterationReport, Learner, RolloutSupply
from dist_lm.rlhf.models import (
    RlhfModels,
    frozen,
    own_threads,
    scalar_config,
    start_critic,
    trained_critic,
    trained_policy,
)
from dist_lm.rlhf.ppo import Ppo
from dist_lm.rlhf.rollouts import EngineRollouts, RolloutSource, ShuffledPrompts
from dist_lm.rlhf.state import KlController, RlhfState

PROMPTS, PROMPT = 64, 9  # of an iteration; tokens of each, with the one that begins a document
EPOCHS = 4
BALANCED_EPOCHS, BALANCE_STEP = 1, 16  # where drawing is to take half of the time: a pass, and lengths that are tried
ITERATIONS = 5  # in a row, timed together: what is drawn ahead goes over their borders
RATE = 1e-4
KL_COEFFICIENT = 0.05


def made_up_prompts(config: Config) -> torch.Tensor:
    """(prompts, tokens), the same at every call: what begins a document, then no special tokens."""
    shape = (config.stage.global_batch, PROMPT)
    token_BP = torch.randint(2, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(7))
    token_BP[:, 0] = 0
    return token_BP


class ToyPpo:
    """Some iterations at a time, each run from where the one before ended."""

    def __init__(
        self, config: Config, world: World, source: RolloutSource | None, staleness: int = 0, epochs: int = EPOCHS
    ) -> None:
        """`source`: None: an engine in this process."""
        self.drawing_s = self.iteration_s = 0.0  # of the last run
        self._config, self._rlhf = config, rlhf_config(config, staleness, epochs)
        shape, parallel = config.model, ParallelConfig(compute_dtype="fp32")
        self._world, self._parallel = world, parallel
        self._mesh = build_mesh(resolve_layout(parallel, shape, world.size), world.device)
        policy, reference = (build_model(shape, parallel, self._mesh, world.device, config.seed) for _ in range(2))
        critic, reward = (
            build_model(scalar_config(shape), parallel, self._mesh, world.device, config.seed + 1) for _ in range(2)
        )
        start_critic(critic, reward, "zero")
        self._models = RlhfModels(
            trained_policy(policy, self._rlhf), trained_critic(critic, self._rlhf), frozen(reference), frozen(reward)
        )
        prompts = made_up_prompts(config).tolist()
        own = source or EngineRollouts(_engine(config))
        self._supply = RolloutSupply(own, ShuffledPrompts(prompts, config.seed), lambda tokens: "")
        self._state = RlhfState(KlController(KL_COEFFICIENT))

    def run(self) -> float:
        """`ITERATIONS` more; the last one's reward."""
        end = self._state.iteration + ITERATIONS
        reports: list[IterationReport] = []
        learner = Learner(
            config=self._rlhf,
            seed=self._config.seed,
            iterations=end,
            world=self._world,
            mesh=self._mesh,
            parallel=self._parallel,
            models=self._models,
            algorithm=Ppo(self._rlhf),
            supply=self._supply,
            report=reports.append,
        )
        with own_threads(self._world) as beside:
            self._state = replace(learner, beside=beside).run(self._state)
        self.drawing_s = sum(report.metrics["timing/rollout_s"] for report in reports)
        self.iteration_s = sum(report.metrics["timing/iteration_s"] for report in reports)
        return reports[-1].metrics["rlhf/reward_mean"]

    @staticmethod
    def options(config: Config) -> EngineOptions:
        """Of an engine that has all prompts of an iteration under way at once."""
        batch, page = config.stage.global_batch, 32
        return EngineOptions(cache_tokens=batch * config.model.max_seq_len, page_tokens=page, max_sequences=batch)

    @staticmethod
    def weights(config: Config) -> dict[str, np.ndarray]:
        """Of a policy that has learned nothing."""
        shapes = parameter_shapes(config.model)
        return {name: initial_value(name, shape, config.model, config.seed).numpy() for name, shape in shapes.items()}


def rlhf_config(config: Config, staleness: int, epochs: int) -> RlhfConfig:
    """PPO as the peers do it: no minibatches, the reward model's score, completions of one length."""
    return RlhfConfig(
        prompts=config.stage.global_batch,
        max_new_tokens=config.stage.seq_len,
        ignore_eot=True,
        epochs=epochs,
        lr=RATE,
        value_lr=RATE,
        kl_coefficient=KL_COEFFICIENT,
        max_staleness=staleness,
        importance_cap=2.0 if staleness else 0.0,
        rewards={"reward": RewardPartConfig(kind="reward_model")},
        normalise_reward=False,
        missing_eos_penalty=0.0,
    )


def balanced_tokens(config: Config, world: World, source: RolloutSource) -> int:
    """New tokens of a completion with which drawing takes about as long as all else of an iteration of one pass.

    Drawing gains: prompts, which it computes at once, weigh less the longer completions are.
    """
    longest = config.model.max_seq_len - PROMPT
    best, least = config.stage.seq_len, float("inf")
    for new_tokens in range(config.stage.seq_len, longest, BALANCE_STEP):
        toy = ToyPpo(with_length(config, new_tokens), world, source, epochs=BALANCED_EPOCHS)
        toy.run()
        toy.run()
        imbalance = abs(toy.drawing_s / toy.iteration_s - 0.5)
        if imbalance < least:
            best, least = new_tokens, imbalance
        if toy.drawing_s >= 0.5 * toy.iteration_s:
            break
    return best


def with_length(config: Config, new_tokens: int) -> Config:
    """The same with completions of so many tokens."""
    own = copy(config)  # `replace` would hold it to a tokenizer
    own.stage = replace(config.stage, seq_len=new_tokens)
    return own


def _engine(config: Config) -> Engine:
    weights = {name: value for name, value in Transformer(config.model).state_dict().items()}
    return Engine(config.model, weights, eot_id=0, options=ToyPpo.options(config))
