"""The models of a run of stage `rlhf`, loaded from its own or its initial checkpoints.

Their types, and how a rank runs them, are in `dist_lm/rlhf/models.py`.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from dist_lm.config.model import AdaptedModelConfig, ModelConfig
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.sharding import build_model
from dist_lm.rlhf.algorithm import Algorithm
from dist_lm.rlhf.config import not_null
from dist_lm.rlhf.models import RlhfModels, start_critic, trained
from dist_lm.rlhf.reward_model import read_reward_scale
from dist_lm.rlhf.state import KlController, RlhfState
from dist_lm.stages.rlhf.config import RlhfRunConfig, RlhfRunGroup, check_reward_model
from dist_lm.stages.training.program import RankStart
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.training import checkpoint, checkpoint_files
from dist_lm.training.checkpoint import Companion
from dist_lm.training.state import TrainState

log = logging.getLogger(__name__)

START, REWARD_MODEL = "stage.init_from", "rlhf.reward_model"
VALUE = "value."  # prefix of the critic's tensors
# files of this stage in a checkpoint
STATE, PENDING, CRITIC, FROZEN = "rlhf.json", "pending.safetensors", "critic.json", "frozen.json"

# keys that do not affect the hidden states, and keys that `d_head` and `kv_heads` replace in the comparison
NOT_IN_TRUNK = {
    *("name", "head", "max_seq_len", "tie_embeddings", "logit_cap", "init_std", "residual_init"),
    *("base_width", "head_width", "n_kv_heads", "export_as", "logit_divisor", "head_dtype"),
}

Bases = Mapping[str, Mapping[str, str]]
"""Records of the checkpoints of the frozen models, by the key that names each; see `base_record`."""


@dataclass(frozen=True)
class LoadedRun:
    """The models and the state of a run, as loaded from checkpoints."""

    models: RlhfModels
    state: RlhfState
    tokens: int  # generated and trained on so far
    frozen: Bases
    critic_base: Mapping[str, str] | None = None  # see `base_record`; None: no critic, or one without adapters

    @property
    def companions(self) -> tuple[Companion, ...]:
        """Models that a checkpoint holds beside the policy."""
        critic = self.models.critic
        if critic is None:
            return ()
        return (Companion(VALUE, critic.model, critic.optimizer, critic.model.config),)


def load_run(run: RunDirectory, config: RlhfRunConfig, start: RankStart, algorithm: Algorithm) -> LoadedRun:
    """Returns the models and the state of a run: from its newest intact checkpoint, else from the initial checkpoints
    (collective).

    Raises:
        ArtefactError: a checkpoint is missing, damaged, belongs to another model or tokenizer, or is not the one that
            the run began with; or the reward model's run is not finished.
        ConfigError: the critic shall have the head of a reward model that computes otherwise.
        OSError: a file cannot be read.
    """
    resume_from = checkpoint.newest_intact(run.checkpoints, start.world)
    init_from = Path(config.stage.init_from) if config.stage.init_from != "none" else None
    shape = config.trained_shape
    if isinstance(shape, AdaptedModelConfig):
        shape = checkpoint.with_base(shape, run.checkpoints, config.stage, start.world)
        init_from = Path(shape.base)

    # Policy and reference. A policy of adapters is its own reference: its base has the reference's weights.
    policy = trained(_model(shape, config, start), config.rlhf, config.rlhf.lr)
    reference = policy.model
    if not shape.lora:
        reference = _model(shape, config, start, frozen=True)
    if init_from:
        # The reference has the weights of the start, also when the policy continues from a later checkpoint.
        init_from = checkpoint.find_intact(init_from, start.world)
        checkpoint_files.check_tokenizer(init_from, checkpoint_files.read_state(init_from)[0], start.tokenizer.sha256)
        checkpoint.load_weights(init_from, reference, shape)
        if not (shape.lora or resume_from):
            checkpoint.load_weights(init_from, policy.model, shape)

    reward = reward_checkpoint = None
    if config.rlhf.asks_reward_model:
        reward_checkpoint = checkpoint.find_intact(Path(config.rlhf.reward_model), start.world)
        reward = _reward_model(reward_checkpoint, config, start)
    bases = ((START, init_from), (REWARD_MODEL, reward_checkpoint))
    frozen = {key: base_record(path) for key, path in bases if path}

    # Only algorithms with a baseline of their own train a critic; the others must not hold one.
    critic = critic_base = None
    if algorithm.has_critic:
        scalar_shape = replace(shape, head="scalar")
        critic = trained(_model(scalar_shape, config, start), config.rlhf, not_null(config.rlhf.value_lr))
        trunk = trunk_of_critic(reward, policy.model, scalar_shape, not_null(config.rlhf.value_head))
        if isinstance(shape, AdaptedModelConfig):
            critic_base = frozen[REWARD_MODEL if trunk is reward else START]
        # A checkpoint of adapters does not hold the trunk.
        if shape.lora or not resume_from:
            if trunk is reward:
                # The critic is trained, so it starts from fp32 weights, which a frozen model may not have.
                assert reward_checkpoint is not None
                trunk = _reward_model(reward_checkpoint, config, start, frozen=False)
            start_critic(critic.model, trunk, not_null(config.rlhf.value_head))

    loaded = LoadedRun(RlhfModels(policy, critic, reference, reward), first_state(config.rlhf), 0, frozen, critic_base)
    if resume_from:
        log.info("continuing from %s", resume_from)
        if critic_base:
            check_critic(resume_from, critic_base)
        check_frozen(resume_from, frozen)
        state = checkpoint.load(resume_from, policy.model, policy.optimizer, shape, loaded.companions)
        return replace(loaded, state=read_state(resume_from), tokens=state.tokens)

    if init_from:
        log.info("starting from the weights of %s", init_from)
    return loaded


def base_record(directory: Path) -> dict[str, str]:
    """Returns the record of a checkpoint that a frozen model, or the base of a critic with adapters, was loaded from.

    It has the path (`base`) and the hexadecimal SHA-256 of the manifest (`base_sha256`).

    Raises:
        ArtefactError: the checkpoint has no manifest.
    """
    return {"base": str(directory), "base_sha256": checkpoint_files.fingerprint(directory)}


def check_frozen(resume_from: Path, frozen: Bases) -> None:
    """Refuses a reference and a reward model other than those that the run began with; returns nothing. They may have
    moved, and a checkpoint of an old release, which names none, passes.

    Raises:
        ArtefactError: names the checkpoint, the key and both models.
    """
    saved = frozen_models(resume_from)
    if saved is None:
        return

    none = {"base": "none", "base_sha256": ""}
    for key in (START, REWARD_MODEL):
        was, now = (records.get(key, none) for records in (saved, frozen))
        if was["base_sha256"] != now["base_sha256"]:
            raise ArtefactError(
                f"checkpoint {resume_from}: {key} was {was['base']} (manifest {was['base_sha256'][:12]}), found "
                f"{now['base']} ({now['base_sha256'][:12]}): name that checkpoint (RUN@STEP), or choose another run_id"
            )


def frozen_models(directory: Path) -> Bases | None:
    """Returns the records of the frozen models of the run that wrote a checkpoint; None: an old release, which recorded
    none.

    Raises:
        ArtefactError: they cannot be read.
    """
    if not (directory / checkpoint_files.STAGE / FROZEN).exists():
        return None
    try:
        records = json.loads(checkpoint_files.read_attached(directory, FROZEN))
        return {key: {"base": str(r["base"]), "base_sha256": str(r["base_sha256"])} for key, r in records.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(f"checkpoint {directory}: {FROZEN} is not what stage rlhf writes ({error})") from error


def check_critic(resume_from: Path, base: Mapping[str, str]) -> None:
    """Refuses to continue from a checkpoint whose adapters of a critic belong to another base; returns nothing.

    Args:
        resume_from: a checkpoint with adapters of a critic.
        base: `base` and `base_sha256` of the critic that this run starts with.

    Raises:
        ArtefactError: the bases differ, and the message names the checkpoint and both; or the checkpoint has no record
            of the base, or a damaged one.
    """
    try:
        record = json.loads(checkpoint_files.read_attached(resume_from, CRITIC))
        saved = {"base": str(record["base"]), "base_sha256": str(record["base_sha256"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"checkpoint {resume_from}: {CRITIC} is not what stage rlhf writes ({error})") from error

    # Added to other weights, the adapters would be another critic.
    if saved["base_sha256"] != base["base_sha256"]:
        raise ArtefactError(
            f"checkpoint {resume_from}: the critic's adapters belong to {saved['base']} (manifest "
            f"{saved['base_sha256'][:12]}), found {base['base']} ({base['base_sha256'][:12]}): put that checkpoint "
            "back, or name it by rlhf.reward_model"
        )


def first_state(settings: RlhfRunGroup) -> RlhfState:
    """Returns the state before the first iteration, with the scale of scores that stage reward measured.

    Raises:
        ArtefactError: the reward model's run is not finished.
        OSError: a file cannot be read.
    """
    scale = None
    # Stage reward has measured the scale on samples of the reference policy. It is fixed for the whole run; measured
    # anew in each iteration, it would move with the policy.
    if settings.asks_reward_model and settings.normalise_reward:
        scale = read_reward_scale(RunDirectory(Path(settings.reward_model)))
    return RlhfState(KlController.of(settings), reward_scale=scale)


def saved_files(state: RlhfState, loaded: LoadedRun) -> dict[str, bytes]:
    """Returns the files of this stage in a checkpoint: name -> content."""
    # The frozen models are not in the checkpoint; their hashes refuse others when the run continues.
    records: dict[str, Any] = {STATE: state.to_dict(), FROZEN: loaded.frozen}
    if loaded.critic_base:
        records[CRITIC] = loaded.critic_base
    files = {name: json.dumps(record, indent=1).encode() for name, record in records.items()}
    return files | {PENDING: save_arrays(dict(state.arrays()))}


def train_state(state: RlhfState, tokens: int, tokenizer_sha256: str) -> TrainState:
    """Returns the counters of every checkpoint; here a step is an iteration and a position is a prompt."""
    return TrainState(state.iteration, tokens, state.prompt_position, tokenizer=tokenizer_sha256)


def read_state(directory: Path) -> RlhfState:
    """Returns the state in the files of `saved_files`.

    Raises:
        ArtefactError: a file is missing or has another content.
    """
    try:
        values: dict[str, Any] = json.loads(checkpoint_files.read_attached(directory, STATE))
        return RlhfState.from_dict(values, load_arrays(checkpoint_files.read_attached(directory, PENDING)))
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"checkpoint {directory}: {STATE} is not what stage rlhf writes ({error})") from error


def _model(shape: ModelConfig, config: RlhfRunConfig, start: RankStart, *, frozen: bool = False) -> Transformer:
    return build_model(shape, config.parallel, start.mesh, start.world.device, config.seed, frozen=frozen)


def _reward_model(path: Path, config: RlhfRunConfig, start: RankStart, *, frozen: bool = True) -> Transformer:
    # A reward model may have another shape than the policy.
    shape = ModelConfig(**checkpoint_files.read_state(path)[1])
    check_reward_model(config, shape)
    model = _model(shape, config, start, frozen=frozen)
    checkpoint.load_weights(path, model, shape)
    return model


def trunk_of_critic(
    reward: Transformer | None, policy: Transformer, shape: ModelConfig, value_head: str
) -> Transformer:
    """Returns the model whose weights the critic starts from: the reward model if it computes as `shape` does, else the
    policy.

    To compute alike, the options that affect hidden states must be equal.

    Raises:
        ConfigError: the critic shall have the head of a reward model that computes otherwise.
    """
    if reward is None:
        return policy

    # A trunk fits only a model that computes the same hidden states with the same parameters.
    compared = sorted({key.name for key in fields(ModelConfig)} - NOT_IN_TRUNK | {"d_head", "kv_heads"})
    pairs = ((key, getattr(reward.config, key), getattr(shape, key)) for key in compared)
    unlike = [
        f"{key}={of_reward} (policy: {of_policy})" for key, of_reward, of_policy in pairs if of_reward != of_policy
    ]
    if unlike and value_head == "reward_model":
        raise ConfigError(f"rlhf.value_head=reward_model: expected zero, as the reward model has {', '.join(unlike)}")
    return policy if unlike else reward
