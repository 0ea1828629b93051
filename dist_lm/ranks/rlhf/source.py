"""Who draws rollouts for the first rank: a pool of actors on the gang's Ray cluster, or an engine in this process."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from dist_lm.cluster.allocation import WITHOUT_POOL, Site, actors_in_all, site_of
from dist_lm.cluster.pool import ActorsLostError, Pool, PoolRollouts
from dist_lm.cluster.pool_actor import EngineSpec
from dist_lm.cluster.ray_cluster import RayAccess, RayCluster, joined_by, own_access
from dist_lm.config.rlhf_run import RlhfRunConfig
from dist_lm.generation.engine import Engine, EngineOptions
from dist_lm.parallel.sharding import compute_dtype
from dist_lm.rlhf.rollouts import EngineRollouts, RolloutSource
from dist_lm.tokenizer.tokenizer import Tokenizer

log = logging.getLogger(__name__)

EVERY_NODE = 1_000_000  # of the cluster, for a pool that is limited by its number of actors


@contextmanager
def rollout_source(
    config: RlhfRunConfig,
    tokenizer: Tokenizer,
    weights: Mapping[str, np.ndarray],
    device: torch.device,
    alive: Callable[[], None],
) -> Iterator[RolloutSource]:
    """For the time of the block. Without Ray (`torchrun -m dist_lm.train RUN_DIR`) it is an engine here.

    Args:
        weights: of the policy, whatever version.
        alive: called now and then while it draws.

    Raises:
        ClusterError: Ray does not let this rank in, or has no place for an actor.
    """
    access = own_access(os.environ)
    if access and config.pool.actors:
        with _pool(config, tokenizer, weights, device, access, alive) as source:
            yield source
        return
    if config.pool.actors:
        log.warning("rlhf.pool.actors=%d: there is no Ray here; this process generates", config.pool.actors)
    yield _engine(config, tokenizer, weights, device)


@contextmanager
def _pool(
    config: RlhfRunConfig,
    tokenizer: Tokenizer,
    weights: Mapping[str, np.ndarray],
    device: torch.device,
    access: RayAccess,
    alive: Callable[[], None],
) -> Iterator[RolloutSource]:
    pool, ranks = config.pool, int(os.environ["LOCAL_WORLD_SIZE"])
    spec = EngineSpec(
        model=config.model,
        options=_options(config),
        eot_id=tokenizer.eot_id,
        dtype=compute_dtype(config.parallel, device),
        device=device.type,
        tp=pool.tp,
    )
    actors = actors_in_all(pool, len(access.nodes), ranks if device.type == "cuda" else 0)
    with (
        joined_by(access, replace(config.cluster, nodes=EVERY_NODE)) as cluster,
        _started(cluster, spec, weights, actors, site_of(pool, access.nodes, ranks, device.type), alive) as started,
    ):
        log.info("%d rollout actors: %s", len(started.members), ", ".join(map(str, started.members)))
        yield PoolRollouts(started)


def _started(
    cluster: RayCluster,
    spec: EngineSpec,
    weights: Mapping[str, np.ndarray],
    actors: int,
    site: Site,
    alive: Callable[[], None],
) -> Pool:
    """A pool beside the ranks; it calls `alive` at least twice a second while it works.

    Raises:
        ActorsLostError: no place for an actor; the message names the keys to change.
    """

    def wanted() -> bool:
        alive()
        return True

    try:
        return Pool.start(cluster, spec, weights, version=-1, actors=actors, wanted=wanted, warn=log.warning, site=site)
    except ActorsLostError as error:
        raise ActorsLostError(
            f"rlhf.pool.actors={actors}: {error}; leave resources for it (fewer cluster.ranks_per_node, or "
            f"rlhf.pool.placement=shared), or do without: {WITHOUT_POOL}"
        ) from error


def _engine(
    config: RlhfRunConfig, tokenizer: Tokenizer, weights: Mapping[str, np.ndarray], device: torch.device
) -> EngineRollouts:
    tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
    dtype = compute_dtype(config.parallel, device)
    options = _options(config)
    engine = Engine(config.model, tensors, eot_id=tokenizer.eot_id, options=options, dtype=dtype, device=device)
    return EngineRollouts(engine)


def _options(config: RlhfRunConfig) -> EngineOptions:
    pool = config.pool
    return EngineOptions(cache_tokens=pool.cache_tokens, page_tokens=pool.page_tokens, max_sequences=pool.max_sequences)
