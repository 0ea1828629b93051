"""Loops on the toy of `bench rlhf`: our learner, and PPO by TRL and by a bare loop over transformers.

PPO trains a policy and a critic against a frozen reference and a frozen reward model, four models of the same shape.

Dimensions: B completions, P tokens of a prompt, T new tokens, V vocabulary.
"""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import torch

from dist_lm.bench.models import in_transformers, initial_model, neox_of, word_tokenizer
from dist_lm.config.cluster import ParallelConfig
from dist_lm.config.model import ModelConfig
from dist_lm.config.root import Config
from dist_lm.generation.engine import Engine
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.model.keyed_random import initial_value
from dist_lm.model.size import parameter_shapes
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.layout import resolve_layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.parallel.sharding import build_model
from dist_lm.rlhf.algorithms.registry import ALGORITHMS
from dist_lm.rlhf.config import RewardPartConfig, RlhfConfig, not_null
from dist_lm.rlhf.controller import Controller, RolloutSupply
from dist_lm.rlhf.learner import IterationReport, Learner
from dist_lm.rlhf.models import (
    RlhfModels,
    own_threads,
    start_critic,
    trained,
)
from dist_lm.rlhf.rewards import Judge
from dist_lm.rlhf.rollouts import EngineRollouts, RolloutSource, ShuffledPrompts
from dist_lm.rlhf.state import KlController, RlhfState

PROMPTS, PROMPT = 64, 9  # prompts of an iteration; tokens of each, with the end-of-text token at its start
EPOCHS = 4
ITERATIONS = 5  # timed together, because generation ahead crosses iterations
RATE = 1e-4
KL_COEFFICIENT = 0.05
GAMMA, LAM, CLIP = 1.0, 0.95, 0.2
PAD = 1  # id of the token that fills a row, as `in_transformers` has it


def made_up_prompts(config: Config) -> torch.Tensor:
    """Returns prompts, int64 (B, P), the same at every call: end-of-text, then ordinary tokens."""
    shape = (config.stage.global_batch, PROMPT)
    token_BP = torch.randint(2, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(7))
    token_BP[:, 0] = 0
    return token_BP


class ToyRun:
    """Runs our learner, `ITERATIONS` iterations a time; each run continues the previous one."""

    def __init__(self, config: Config, world: World, source: RolloutSource | None, rlhf: RlhfConfig) -> None:
        """Builds models and prompts. `source` draws the rollouts; None: an engine in this process does.

        Raises:
            ConfigError: the settings do not fit the ranks, or this machine has no sandbox that a reward needs.
        """
        self.drawing_s = self.iteration_s = 0.0  # seconds of the last run
        self._config, self._rlhf = config, rlhf
        shape, parallel = config.model, ParallelConfig(compute_dtype="fp32")
        self._world, self._parallel = world, parallel
        self._mesh = build_mesh(resolve_layout(parallel, shape, world.size), world.device)
        self._algorithm = ALGORITHMS[rlhf.algorithm](rlhf)
        coefficient = not_null(rlhf.kl_coefficient)

        self._models = RlhfModels(
            trained(self._model(shape), rlhf, rlhf.lr),
            # Without a KL penalty nothing is compared with the reference.
            reference=self._model(shape).requires_grad_(False) if coefficient else None,
        )
        if self._algorithm.has_critic:
            critic, reward = (self._model(replace(shape, head="scalar"), seed=1) for _ in range(2))
            start_critic(critic, reward, "zero")
            trained_critic = trained(critic, rlhf, not_null(rlhf.value_lr))
            self._models = replace(self._models, critic=trained_critic, reward=reward.requires_grad_(False))

        if source is None:
            weights = dict(Transformer(config.model).state_dict())
            source = EngineRollouts(Engine(config.model, weights, eot_id=0, options=self.options(config)))
        judge = Judge(rlhf.rewards, words_of, rlhf.max_failed_fraction)
        self._supply = RolloutSupply(source, ShuffledPrompts(made_up_prompts(config).tolist(), config.seed), judge)
        self._state = RlhfState(KlController(coefficient))

    def _model(self, shape: ModelConfig, seed: int = 0) -> Transformer:
        return build_model(shape, self._parallel, self._mesh, self._world.device, self._config.seed + seed)

    def run(self) -> float:
        """Runs `ITERATIONS` more iterations; returns the mean reward of the last one, and sets `drawing_s` and
        `iteration_s`.

        Raises:
            ConfigError: the settings do not fit the ranks. What source, judge and updates raise passes.
        """
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
            algorithm=self._algorithm,
            controller=Controller(self._supply, self._rlhf, self._config.seed, end),
            report=reports.append,
        )
        with own_threads(self._world) as run_both:
            self._state = replace(learner, run_both=run_both).run(self._state)

        self.drawing_s = sum(report.metrics["timing/rollout_s"] for report in reports)
        self.iteration_s = sum(report.metrics["timing/iteration_s"] for report in reports)
        return reports[-1].metrics["rlhf/reward_mean"]

    @staticmethod
    def options(config: Config) -> EngineOptions:
        """Returns sizes of an engine that holds all rollouts of an iteration at once."""
        batch, page = config.stage.global_batch, 32
        return EngineOptions(cache_tokens=batch * config.model.max_seq_len, page_tokens=page, max_sequences=batch)

    @staticmethod
    def weights(config: Config) -> dict[str, np.ndarray]:
        """Returns the initial weights of the policy."""
        shapes = parameter_shapes(config.model)
        return {name: initial_value(name, shape, config.model, config.seed).numpy() for name, shape in shapes.items()}


def ppo_config(config: Config, staleness: int = 0, epochs: int = EPOCHS) -> RlhfConfig:
    """Configures PPO as the peers run it: no minibatches, rewards of the reward model, completions of one length.

    Args:
        staleness: age, in iterations, of the weights that draw.
        epochs: passes of updates over the rollouts.

    Raises:
        ConfigError: settings that rlhf does not accept.
    """
    return RlhfConfig(
        prompts=config.stage.global_batch,
        max_new_tokens=config.stage.seq_len,
        ignore_eot=True,
        epochs=epochs,
        lr=RATE,
        value_lr=RATE,
        kl_coefficient=KL_COEFFICIENT,
        max_staleness=staleness,
        # Only rollouts of older weights need the correction.
        importance_cap=2.0 if staleness else 0.0,
        rewards={"reward": RewardPartConfig(kind="reward_model")},
        normalise_reward=False,
        missing_eos_penalty=0.0,
    )


def words_of(tokens: Sequence[int]) -> str:
    """Returns a word for each token, since the toy has no tokenizer."""
    return " ".join(f"t{token}" for token in tokens)


# --- peers ---


class Peer(ABC):
    """A PPO loop of another library."""

    packages: ClassVar[Sequence[str]]
    modules: ClassVar[Mapping[str, str]] = {}  # submodule that not every release has -> requirement with it

    @abstractmethod
    def __init__(self, config: Config, prompt_BP: torch.Tensor) -> None:
        """Builds the models and everything else that is not timed."""

    @abstractmethod
    def run(self) -> float:
        """Runs `ITERATIONS` iterations."""


def trl_settings(config: Config, folder: str) -> dict[str, Any]:
    """Returns the settings of all trainers of TRL: one batch an iteration, on the CPU, without reports or files,
    although `folder` is its output folder."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": config.stage.global_batch,
        "gradient_accumulation_steps": 1,
        "temperature": 1.0,
        "learning_rate": RATE,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }


class Trl(Peer):
    """Runs `PPOTrainer` of TRL."""

    packages: ClassVar[Sequence[str]] = ("trl", "accelerate", "transformers")
    modules: ClassVar[Mapping[str, str]] = {"trl.experimental.ppo": "trl<1.13"}

    def __init__(self, config: Config, prompt_BP: torch.Tensor) -> None:
        ppo = import_module("trl.experimental.ppo")
        datasets = import_module("datasets")
        batch = config.stage.global_batch

        self._folder = tempfile.TemporaryDirectory(prefix="dlm-bench-")
        arguments = ppo.PPOConfig(
            num_mini_batches=1,
            num_ppo_epochs=EPOCHS,
            total_episodes=ITERATIONS * batch,
            response_length=config.stage.seq_len,
            local_rollout_forward_batch_size=batch,
            num_sample_generations=0,
            kl_coef=KL_COEFFICIENT,
            **trl_settings(config, self._folder.name),
        )

        # The four models are loaded separately, since two of them are trained.
        prompts = datasets.Dataset.from_dict({"input_ids": prompt_BP.tolist()})
        self._trainer = ppo.PPOTrainer(
            args=arguments,
            processing_class=word_tokenizer(words_of(range(config.model.vocab_size)).split()),
            model=causal(config),
            ref_model=causal(config),
            reward_model=_with_scalar_head(config),
            value_model=_with_scalar_head(config),
            train_dataset=prompts,
            eval_dataset=prompts,
        )

    def run(self) -> float:
        self._trainer.train()
        return 0.0


class BareLoop(Peer):
    """Runs a minimal PPO loop over `generate` of transformers."""

    packages: ClassVar[Sequence[str]] = ("transformers",)

    def __init__(self, config: Config, prompt_BP: torch.Tensor) -> None:
        self._prompt_BP, self._new = prompt_BP, config.stage.seq_len
        self._policy, self._reference = (causal(config) for _ in range(2))
        self._critic, self._reward = (_with_scalar_head(config) for _ in range(2))

        # Our models have no dropout here.
        for model in (self._policy, self._reference, self._critic, self._reward):
            model.eval()
        parameters = [*self._policy.parameters(), *self._critic.parameters()]
        self._optimizer = torch.optim.AdamW(parameters, lr=RATE, eps=1e-5, fused=True)

    def run(self) -> float:
        return [self._iteration() for _ in range(ITERATIONS)][-1]

    def _iteration(self) -> float:
        """Draws completions for all prompts, makes EPOCHS passes of updates of policy and critic over them, and returns
        the mean over completions of their summed token rewards."""
        with torch.no_grad():
            token_BN = self._policy.generate(
                self._prompt_BP,
                attention_mask=torch.ones_like(self._prompt_BP),
                max_new_tokens=self._new,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=None,
                pad_token_id=PAD,
            )

            old_BT, reference_BT = (self._logprobs(model, token_BN) for model in (self._policy, self._reference))
            value_BT = self._values(self._critic, token_BN)
            # Every token pays for its distance from the reference; the reward of the answer comes with the last one.
            reward_BT = -KL_COEFFICIENT * (old_BT - reference_BT)
            reward_BT[:, -1] += self._scalars(self._reward, token_BN)[:, -1]

            advantage_BT = self._advantages(reward_BT, value_BT)
            return_BT = advantage_BT + value_BT
            advantage_BT = (advantage_BT - advantage_BT.mean()) / (advantage_BT.std() + 1e-8)

        # Several passes use the same rollouts, so clipping keeps the weights near those that drew them.
        for _ in range(EPOCHS):
            ratio_BT = (self._logprobs(self._policy, token_BN) - old_BT).exp()
            clipped_BT = ratio_BT.clamp(1 - CLIP, 1 + CLIP)
            policy_loss = -torch.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT).mean()

            new_value_BT = self._values(self._critic, token_BN)
            clipped_value_BT = value_BT + (new_value_BT - value_BT).clamp(-CLIP, CLIP)
            errors_BT = torch.maximum((new_value_BT - return_BT).square(), (clipped_value_BT - return_BT).square())

            (policy_loss + errors_BT.mean() / 2).backward()
            torch.nn.utils.clip_grad_norm_(self._policy.parameters(), 1.0)
            torch.nn.utils.clip_grad_norm_(self._critic.parameters(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

        return float(reward_BT.sum(1).mean())

    def _logprobs(self, model: Any, token_BN: torch.Tensor) -> torch.Tensor:
        logits_BTV = model(token_BN).logits[:, -self._new - 1 : -1]
        token_BT1 = token_BN[:, -self._new :, None]
        return logits_BTV.log_softmax(-1).gather(2, token_BT1)[..., 0]

    def _scalars(self, model: Any, token_BN: torch.Tensor) -> torch.Tensor:
        return model.score(model.gpt_neox(token_BN).last_hidden_state)[..., 0]

    def _values(self, model: Any, token_BN: torch.Tensor) -> torch.Tensor:
        return self._scalars(model, token_BN)[:, -self._new - 1 : -1]

    @staticmethod
    def _advantages(reward_BT: torch.Tensor, value_BT: torch.Tensor) -> torch.Tensor:
        """Returns generalised advantages (Schulman et al. 2016), fp32 (B, T), of rewards and values of each token."""
        # The value after the last token is 0, as the answer ends there.
        advantage_B = next_value_B = torch.zeros_like(reward_BT[:, 0])
        columns = []
        for t in reversed(range(reward_BT.shape[1])):
            advantage_B = reward_BT[:, t] + GAMMA * next_value_B - value_BT[:, t] + GAMMA * LAM * advantage_B
            next_value_B = value_BT[:, t]
            columns.append(advantage_B)
        return torch.stack(columns[::-1], dim=1)


def causal(config: Config) -> Any:
    """Loads our initial model in transformers.

    Raises:
        ConfigError: no architecture of transformers holds the model.
    """
    neox_of(config.model, "the loops of others")
    return in_transformers(initial_model(config))


def _with_scalar_head(config: Config) -> Any:
    """Loads our initial model in transformers, with a head of one random row in place of the head for tokens.

    Raises:
        ConfigError: no architecture of transformers holds the model.
    """
    return in_transformers(initial_model(config), "AutoModelForSequenceClassification", num_labels=1)
