"""Finds the models of a server, says what memory they take, and loads each with an engine of its own."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dist_lm.cluster.allocation import Site
from dist_lm.cluster.ray_cluster import RayCluster
from dist_lm.config.model import ModelConfig
from dist_lm.config.pool import MOST_PAGE_TOKENS
from dist_lm.errors import ConfigError, UserError, require
from dist_lm.generation.engine_options import free_bytes
from dist_lm.generation.grammar import Grammars
from dist_lm.generation.load import load_model, model_config_of, run_of, tokenizer_of
from dist_lm.generation.session import build_engine, cache_options
from dist_lm.generation.shard import check_tp, share_of
from dist_lm.model.size import kv_bytes_per_token, parameter_count, parameter_shapes
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import lacks_bf16
from dist_lm.rlhf.reward_model import read_reward_scale
from dist_lm.server.engine_thread import EngineThread
from dist_lm.server.scoring import RewardModel
from dist_lm.server.served import Served, ServeLimits
from dist_lm.server.serving import ServedModel
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tracking.readable import say
from dist_lm.training import checkpoint_files as files
from dist_lm.training.checkpoint_tensors import model_weights

STEP_PREFIX = "step_"


@dataclass(frozen=True)
class ModelOptions:
    """How each model is loaded."""

    device: torch.device
    tp: int
    cache_tokens: int  # for each model
    queue_s: float
    limits: ServeLimits


@dataclass(frozen=True)
class ModelFiles:
    """A model that is not loaded yet."""

    path: Path  # as the user has written it
    checkpoint: Path
    config: ModelConfig
    name: str  # its name in responses
    aliases: tuple[str, ...] = ()


def find_models(paths: Sequence[Path], names: Sequence[str], follow: bool = False) -> list[ModelFiles]:
    """Returns the models to load. Each is called by run and checkpoint, `sft/default/step_00000400`.

    Args:
        paths: runs, folders of checkpoints, or checkpoints.
        names: further names of a single model; of several models one name for each, in their order.
        follow: whether checkpoints will change: models are called by their run alone.

    Raises:
        ConfigError: there are several models, and names for some; or a checkpoint is to be followed.
        ArtefactError: a path holds no checkpoint of a model.
    """
    is_single = len(paths) == 1
    accepted = f"none, or one for each of the {len(paths)} models"
    require(is_single or len(names) in (0, len(paths)), "--name", " ".join(names), accepted)

    models: list[ModelFiles] = []
    for number, path in enumerate(paths):
        checkpoint = files.find_checkpoint(path)
        run = run_of(checkpoint)
        config = model_config_of(checkpoint)
        if follow:
            can_follow = checkpoint.resolve() != path.resolve() and config.head == "tokens"
            require(can_follow, "--follow", path, "runs of language models, or folders of their checkpoints")

        name = "/".join((*run.path.parts[-2:], checkpoint.name)) if run else str(checkpoint)
        if follow:
            name = name.removesuffix(f"/{checkpoint.name}")
        aliases = tuple(names) if is_single else tuple(names[number : number + 1])
        models.append(ModelFiles(path, checkpoint, config, name, aliases))
    return models


def check_memory(models: Sequence[ModelFiles], options: ModelOptions) -> str:
    """Returns a line that says what memory the models will take.

    Raises:
        ConfigError: it is more than what is free.
    """
    # The same choice as in `build_engine`.
    has_bf16 = options.device.type == "cuda" and not lacks_bf16(options.device)
    item_bytes = 2 if has_bf16 else 4
    weight_bytes = sum(parameter_count(model.config.plain) for model in models) * item_bytes
    with_cache = [model.config for model in models if model.config.head == "tokens"]
    cache_bytes = sum(_cache_bytes(config, options, item_bytes) for config in with_cache)
    needed = weight_bytes // options.tp + cache_bytes

    free = free_bytes(options.device)
    gib = 1 << 30
    line = (
        f"{len(models)} model{'s' * (len(models) != 1)}: weights {weight_bytes / options.tp / gib:.2f} GiB and cache "
        f"{cache_bytes / gib:.2f} GiB of {free / gib:.2f} GiB free on {options.device}"
    )
    if needed > free:
        raise ConfigError(f"{line}: serve fewer models, or lower --cache-tokens")
    return line


def _cache_bytes(config: ModelConfig, options: ModelOptions, item_bytes: int) -> int:
    tokens = max(options.cache_tokens, config.max_seq_len)
    return tokens * kv_bytes_per_token(config, share_of(config, options.tp).kv_heads, item_bytes)


def load_served(model: ModelFiles, tokenizer: Path | None, options: ModelOptions) -> ServedModel:
    """Returns a model with its engine, whose thread does not run yet.

    Args:
        tokenizer: file or folder of the tokenizer; None: that of the run.

    Raises:
        ArtefactError: checkpoint or tokenizer is missing or damaged, or they do not fit.
        ConfigError: the model cannot be cut into `tp` parts, or there are fewer devices.
    """
    loaded = load_model(model.checkpoint, tokenizer)
    n_devices = torch.cuda.device_count() if options.device.type == "cuda" else None
    check_tp(loaded.config, options.tp, n_devices, "--tp")

    grammars = Grammars(lambda: loaded.tokenizer, untrusted=True)
    answers = max(1, options.cache_tokens // loaded.config.max_seq_len)
    version = version_of(model.checkpoint)
    engine = build_engine(
        loaded, options.device, answers, options.cache_tokens, options.tp, grammars=grammars, version=version
    )
    return ServedModel(_served(model, loaded.tokenizer, options), EngineThread(engine, options.queue_s), grammars)


def load_over_pool(
    model: ModelFiles, tokenizer: Path | None, options: ModelOptions, cluster: RayCluster, actors: int
) -> ServedModel:
    """Returns a model that the actors of a pool compute; at least one is up. Each has a cache of
    `options.cache_tokens`.

    Args:
        tokenizer: as for `load_served`.
        cluster: has places for the actors; its nodes have what `options.device` says.
        actors: how many; -1: one for each `options.tp` GPUs of a node, or one per node without GPUs.

    Raises:
        ArtefactError: as `load_served`.
        ActorsLostError: no free place within cluster.start_timeout_s.
        UserError: the model cannot be cut into `tp` parts, no node has enough GPUs, or actors die while they start.
    """
    from dist_lm.cluster.events import PoolFailure
    from dist_lm.server.pool_thread import PoolThread
    from dist_lm.server.serving_pool import ServingPool, ServingSpec

    loaded = load_model(model.checkpoint, tokenizer)
    answers = max(1, options.cache_tokens // loaded.config.max_seq_len)
    # The actor chooses the size of its pages, up to the largest.
    engine_options = cache_options(loaded.config, answers, options.cache_tokens, MOST_PAGE_TOKENS)
    spec = ServingSpec(
        model=loaded.config,
        options=replace(engine_options, page_tokens=0),
        eot_id=loaded.tokenizer.eot_id,
        vocabulary=tuple(loaded.tokenizer.vocabulary()),
        dtype=torch.bfloat16 if options.device.type == "cuda" else torch.float32,
        device=options.device.type,
        tp=options.tp,
        tokenizer_file=loaded.tokenizer.file_content,
        queue_s=options.queue_s,
    )
    try:
        pool = ServingPool.start(
            cluster,
            spec,
            ((name, loaded.weights[name]) for name in parameter_shapes(loaded.config)),
            version=version_of(model.checkpoint),
            actors=actors,
            warn=say,
            site=Site(among_others=True),  # beside the pools of other models
        )
    except PoolFailure as failure:
        raise UserError(f"--actors={actors}: {failure}") from failure
    grammars = Grammars(lambda: loaded.tokenizer, untrusted=True)
    return ServedModel(_served(model, loaded.tokenizer, options), PoolThread(pool, spec), grammars)


def load_reward(model: ModelFiles, tokenizer: Path | None, options: ModelOptions) -> RewardModel:
    """Returns a reward model, with the scale of its scores if its run has measured one.

    Args:
        tokenizer: as for `load_served`.

    Raises:
        ArtefactError: checkpoint or tokenizer is missing or damaged, or they do not fit.
    """
    checkpoint = files.require_intact(model.checkpoint)
    run = run_of(checkpoint)
    loaded_tokenizer = tokenizer_of(checkpoint, tokenizer, run)
    files.check_tokenizer(checkpoint, files.read_state(checkpoint)[0], loaded_tokenizer.sha256)

    transformer = Transformer(model.config).to(options.device).eval()
    weights = {name: torch.from_numpy(array) for name, array in model_weights(checkpoint).items()}
    transformer.load_state_dict(weights)
    is_finished = run is not None and run.result.is_file()
    return RewardModel(
        _served(model, loaded_tokenizer, options),
        transformer,
        version_of(checkpoint),
        read_reward_scale(run) if run and is_finished else None,
    )


def _served(model: ModelFiles, tokenizer: Tokenizer, options: ModelOptions) -> Served:
    return Served(
        name=model.name,
        tokenizer=tokenizer,
        context=model.config.max_seq_len,
        aliases=model.aliases,
        created=int(time.time()),
        # Hidden states are whole on one device alone.
        embedding_width=model.config.d_model if options.tp == 1 else 0,
        limits=options.limits,
    )


def version_of(checkpoint: Path) -> int:
    """Returns the version of a checkpoint's weights: its step, 0 if its name tells none."""
    step = checkpoint.name.removeprefix(STEP_PREFIX)
    return int(step) if step.isdigit() else 0
