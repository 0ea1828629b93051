"""Says what memory the models of a server take, and loads them: each with an engine of its own, or with one engine for
all that share a base."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dist_lm.cluster.allocation import Site
from dist_lm.cluster.ray_cluster import RayCluster
from dist_lm.config.model import ModelConfig
from dist_lm.config.pool import MOST_PAGE_TOKENS
from dist_lm.errors import ConfigError, UserError
from dist_lm.generation.engine_options import free_bytes
from dist_lm.generation.grammar import Grammars
from dist_lm.generation.load import run_of, tokenizer_of
from dist_lm.generation.session import build_engine, cache_options
from dist_lm.generation.shard import check_tp, share_of
from dist_lm.model.size import kv_bytes_per_token, parameter_count, parameter_shapes, trained_count
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import lacks_bf16
from dist_lm.rlhf.reward_model import read_reward_scale
from dist_lm.server.backend import Backend
from dist_lm.server.engine_thread import EngineThread
from dist_lm.server.model_files import ModelFiles, load_group
from dist_lm.server.scoring import RewardModel
from dist_lm.server.served import Served, ServeLimits
from dist_lm.server.serving import ServedModel
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tracking.readable import say
from dist_lm.training import checkpoint_files as files
from dist_lm.training.checkpoint_tensors import model_weights


@dataclass(frozen=True)
class ModelOptions:
    """How each model is loaded."""

    device: torch.device
    tp: int
    cache_tokens: int  # for each model
    queue_s: float
    limits: ServeLimits


def check_memory(groups: Sequence[Sequence[ModelFiles]], options: ModelOptions) -> str:
    """Returns a line that says what memory the models will take.

    Args:
        groups: of models that share a base, see `by_base`.

    Raises:
        ConfigError: it is more than what is free.
    """
    # The same choice as in `build_engine`.
    has_bf16 = options.device.type == "cuda" and not lacks_bf16(options.device)
    item_bytes = 2 if has_bf16 else 4
    models = [model for group in groups for model in group]
    weight_bytes = sum(map(_parameters_of, groups)) * item_bytes
    with_cache = [model.config for model in models if model.config.head == "tokens"]
    cache_bytes = sum(_cache_bytes(config, options, item_bytes) for config in with_cache)
    needed = weight_bytes // options.tp + cache_bytes

    free = free_bytes(options.device)
    gib = 1 << 30
    line = (
        f"{len(models)} model{'s' * (len(models) != 1)}{_sharing(groups)}: "
        f"weights {weight_bytes / options.tp / gib:.2f} GiB and cache "
        f"{cache_bytes / gib:.2f} GiB of {free / gib:.2f} GiB free on {options.device}"
    )
    if needed > free:
        raise ConfigError(f"{line}: serve fewer models, or lower --cache-tokens")
    return line


def _parameters_of(group: Sequence[ModelFiles]) -> int:
    """Returns the parameters that a group of models holds in memory."""
    n_base = parameter_count(group[0].config)
    if len(group) == 1:
        return n_base
    return n_base + sum(trained_count(model.adapted) for model in group if model.adapted)


def _sharing(groups: Sequence[Sequence[ModelFiles]]) -> str:
    """Returns words that say how many models share a base; empty if none does."""
    shared = [group for group in groups if len(group) > 1]
    if not shared:
        return ""
    bases = "one base" if len(shared) == 1 else f"{len(shared)} bases"
    return f", {sum(map(len, shared))} of them over {bases}"


def _cache_bytes(config: ModelConfig, options: ModelOptions, item_bytes: int) -> int:
    tokens = max(options.cache_tokens, config.max_seq_len)
    return tokens * kv_bytes_per_token(config, share_of(config, options.tp).kv_heads, item_bytes)


def load_served(group: Sequence[ModelFiles], tokenizer: Path | None, options: ModelOptions) -> list[ServedModel]:
    """Returns models with the engine that they share, whose thread does not run yet.

    Args:
        group: a model alone, or models over one base, see `by_base`.
        tokenizer: file or folder of the tokenizer; None: that of the run.

    Raises:
        ArtefactError: checkpoint or tokenizer is missing or damaged, or they do not fit.
        ConfigError: the model cannot be cut into `tp` parts, or there are fewer devices.
        RankLostError: with tp > 1, another process of the model has ended.
        RuntimeError: with tp > 1, this process is a rank already.
        UserError: the package `tokenizers` is needed and not installed.
    """
    loaded, adapters, tokenizers = load_group(group, tokenizer)
    n_devices = torch.cuda.device_count() if options.device.type == "cuda" else None
    check_tp(loaded.config, options.tp, n_devices, "--tp")

    grammars = _grammars(loaded.tokenizer)
    cache_tokens = options.cache_tokens * len(group)
    answers = max(1, cache_tokens // loaded.config.max_seq_len)
    engine = build_engine(
        loaded, options.device, answers, cache_tokens, options.tp, grammars=grammars, version=_base_version(group)
    )
    for adapter in adapters:
        engine.add_adapter(adapter)
    return _served_models(group, tokenizers, EngineThread(engine, options.queue_s), grammars, options)


def load_over_pool(
    group: Sequence[ModelFiles], tokenizer: Path | None, options: ModelOptions, cluster: RayCluster, actors: int
) -> list[ServedModel]:
    """Starts one pool of actors for all models of `group` and returns these models, in order.

    It returns when at least one actor is up; the others may follow. An actor computes all models, and its KV cache
    holds `options.cache_tokens` tokens for each of them. The thread that serves requests does not run yet.

    Args:
        group: as for `load_served`.
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

    loaded, adapters, tokenizers = load_group(group, tokenizer)
    cache_tokens = options.cache_tokens * len(group)
    answers = max(1, cache_tokens // loaded.config.max_seq_len)
    # The actor chooses the size of its pages, up to the largest.
    engine_options = cache_options(loaded.config, answers, cache_tokens, MOST_PAGE_TOKENS)
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
        adapters=tuple(adapters),
    )
    try:
        pool = ServingPool.start(
            cluster,
            spec,
            ((name, loaded.weights[name]) for name in parameter_shapes(loaded.config)),
            version=_base_version(group),
            actors=actors,
            warn=say,
            site=Site(among_others=True),  # beside the pools of other models
        )
    except PoolFailure as failure:
        raise UserError(f"--actors={actors}: {failure}") from failure
    return _served_models(group, tokenizers, PoolThread(pool, spec), _grammars(loaded.tokenizer), options)


def _base_version(group: Sequence[ModelFiles]) -> int:
    """Returns the version of the weights that a group shares; 0 if none of its models is the base."""
    if len(group) == 1:
        return group[0].version
    return next((model.version for model in group if not model.adapted), 0)


def _grammars(tokenizer: Tokenizer) -> Grammars:
    """Returns grammars that hold the tokenizer, and not the weights that were loaded with it."""
    return Grammars(lambda: tokenizer, untrusted=True)


def _served_models(
    group: Sequence[ModelFiles],
    tokenizers: Sequence[Tokenizer],
    thread: Backend,
    grammars: Grammars,
    options: ModelOptions,
) -> list[ServedModel]:
    """Returns the models of a group, whose requests all go to one backend."""
    models: list[ServedModel] = []
    for model, tokenizer in zip(group, tokenizers, strict=True):
        served = _served(model, tokenizer, options)
        if model.adapted and len(group) > 1:
            served.adapter = model.name
        models.append(ServedModel(served, thread, grammars))
    return models


def load_reward(model: ModelFiles, tokenizer: Path | None, options: ModelOptions) -> RewardModel:
    """Returns a reward model, with the scale of its scores if its run has measured one.

    Args:
        tokenizer: as for `load_served`.

    Raises:
        ArtefactError: checkpoint or tokenizer is missing or damaged, or they do not fit.
        OSError: a file cannot be read.
        UserError: the tokenizer needs the package `tokenizers`, which is not installed.
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
        model.version,
        read_reward_scale(run) if run and is_finished else None,
    )


def _served(model: ModelFiles, tokenizer: Tokenizer, options: ModelOptions) -> Served:
    """Returns the model as the server lists it, created now; `embedding_width` is 0, so that embeddings are refused, if
    it runs on several devices.
    """
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
