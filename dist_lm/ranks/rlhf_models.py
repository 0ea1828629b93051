"""The models of a run of stage `rlhf`, loaded from its own or its initial checkpoints."""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from dist_lm.config.model import ModelConfig
from dist_lm.errors import ArtefactError
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.sharding import build_model
from dist_lm.ranks.program import RankStart
from dist_lm.rlhf.algorithm import Algorithm
from dist_lm.rlhf.models import RlhfModels, start_critic, trained
from dist_lm.rlhf.reward_model import read_reward_scale
from dist_lm.rlhf.state import KlController, RlhfState
from dist_lm.stages.rlhf import RlhfRunConfig, RlhfRunGroup, check_reward_model
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.training import checkpoint, checkpoint_files
from dist_lm.training.checkpoint import Companion
from dist_lm.training.state import TrainState

log = logging.getLogger(__name__)

VALUE = "value."  # prefix of the critic's tensors
STATE, PENDING = "rlhf.json", "pending.safetensors"  # files of this stage in a checkpoint


@dataclass(frozen=True)
class Begun:
    """Loaded models and the state of the run."""

    models: RlhfModels
    state: RlhfState
    tokens: int  # generated and trained on so far

    @property
    def companions(self) -> tuple[Companion, ...]:
        """Models that a checkpoint holds beside the policy."""
        critic = self.models.critic
        return (Companion(VALUE, critic.model, critic.optimizer, critic.model.config),) if critic else ()


def begin(run: RunDirectory, config: RlhfRunConfig, start: RankStart, algorithm: Algorithm) -> Begun:
    """Load the models from the newest intact checkpoint of the run, else from the initial checkpoints (collective).

    Raises:
        ArtefactError: a checkpoint is missing, damaged, or belongs to another model.
    """
    own = checkpoint.newest_intact(run.checkpoints, start.world)
    origin = None if config.stage.init_from == "none" else Path(config.stage.init_from)
    reference = _model(config.model, config, start).requires_grad_(False)
    policy = trained(_model(config.model, config, start), config.rlhf, config.rlhf.lr)
    if origin:
        origin = checkpoint.find_intact(origin, start.world)
        state = checkpoint.load(origin, reference, None, config.model)
        checkpoint_files.check_tokenizer(origin, state, start.tokenizer.sha256)
    reward = _reward_model(config, start)
    shape = replace(config.model, head="scalar")
    critic = None
    if algorithm.has_critic:
        critic = trained(_model(shape, config, start), config.rlhf, config.rlhf.value_lr)
    begun = Begun(RlhfModels(policy, critic, reference, reward), first_state(config.rlhf), 0)
    if own:
        log.info("continuing from %s", own)
        state = checkpoint.load(own, policy.model, policy.optimizer, config.model, begun.companions)
        return Begun(begun.models, read_state(own), state.tokens)
    if origin:
        checkpoint.load(origin, policy.model, None, config.model)
        log.info("starting from the weights of %s", origin)
    if critic:
        start_critic(critic.model, _trunk(reward, policy.model, shape), config.rlhf.value_head)
    return begun


def first_state(group: RlhfRunGroup) -> RlhfState:
    """The state before the first iteration, with the scale of scores that stage reward measured.

    Raises:
        ArtefactError: the reward model's run is not finished.
    """
    scale = None
    if group.asks_reward_model and group.normalise_reward:
        scale = read_reward_scale(RunDirectory(Path(group.reward_model)))
    return RlhfState(KlController(group.kl_coefficient, group.kl_target, group.kl_horizon), reward_scale=scale)


def saved_files(state: RlhfState) -> dict[str, bytes]:
    """Files of this stage in a checkpoint: name -> content."""
    return {STATE: json.dumps(state.to_dict(), indent=1).encode(), PENDING: save_arrays(dict(state.arrays()))}


def train_state(state: RlhfState, tokens: int, tokenizer_sha256: str) -> TrainState:
    """The counters of every checkpoint; here a step is an iteration and a position is a prompt."""
    return TrainState(state.iteration, tokens, state.prompt_position, tokenizer=tokenizer_sha256)


def read_state(directory: Path) -> RlhfState:
    """Read the files of `saved_files`.

    Raises:
        ArtefactError: a file is missing or has another content.
    """
    try:
        values: dict[str, Any] = json.loads(checkpoint_files.read_attached(directory, STATE))
        return RlhfState.from_dict(values, load_arrays(checkpoint_files.read_attached(directory, PENDING)))
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"checkpoint {directory}: {STATE} is not what stage rlhf writes ({error})") from error


def _model(shape: ModelConfig, config: RlhfRunConfig, start: RankStart) -> Transformer:
    return build_model(shape, config.parallel, start.mesh, start.world.device, config.seed)


def _reward_model(config: RlhfRunConfig, start: RankStart) -> Transformer | None:
    if not config.rlhf.asks_reward_model:
        return None
    found = checkpoint.find_intact(Path(config.rlhf.reward_model), start.world)
    shape = ModelConfig(**checkpoint_files.read_state(found)[1])
    check_reward_model(config, shape)
    model = _model(shape, config, start)
    checkpoint.load(found, model, None, shape)
    return model.requires_grad_(False)


def _trunk(reward: Transformer | None, policy: Transformer, shape: ModelConfig) -> Transformer:
    """Initial weights of the critic: the reward model if shapes match, else the policy."""
    parts = ("d_model", "n_layers", "n_heads", "kv_heads", "d_ff", "ffn", "norm", "bias", "vocab_size")
    alike = reward and all(getattr(reward.config, part) == getattr(shape, part) for part in parts)
    return reward if reward and alike else policy
