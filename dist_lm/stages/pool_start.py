"""A pool of generation actors beside the ranks: the first rank joins the gang's Ray cluster and starts it.

Stage `rlhf` gets its rollouts from such a pool, other stages the answers to tasks (`stage.eval_tasks`).
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from dist_lm.cluster.allocation import actors_in_all, site_of, without_pool
from dist_lm.cluster.pool import ActorsLostError, Pool
from dist_lm.cluster.pool_actor import EngineSpec
from dist_lm.cluster.ray_cluster import RayAccess, RayCluster, joined_by, own_access
from dist_lm.config.pool import RolloutPoolConfig
from dist_lm.config.root import Config
from dist_lm.generation.decoder import WeightStream
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dist_lm.cluster.pool_push import Sender

log = logging.getLogger(__name__)

EVERY_NODE = 1_000_000  # no limit on nodes: the number of actors limits the pool


@dataclass(frozen=True)
class PoolStarter:
    """Starts the actors of a pool on the Ray cluster that this rank has joined."""

    pool: RolloutPoolConfig
    device: str  # cpu | cuda
    access: RayAccess
    cluster: RayCluster

    def start(
        self,
        spec: EngineSpec,
        weights: WeightStream,
        version: int,
        keep_going: Callable[[], bool],
        sender: "Sender | None" = None,
    ) -> Pool:
        """Starts the actors and returns their pool, which the caller closes.

        It calls `keep_going` at least twice a second while it works; False ends the wait, and the pool may have no
        actor.

        Args:
            version: number of `weights`, which answers carry.

        Raises:
            ActorsLostError: no free resources for an actor; the message names the keys to change.
            PoolFailure: actors die while they start.
            UserError: the weights do not fit the model, or no node has enough GPUs for an engine.
        """
        pool, ranks = self.pool, int(os.environ["LOCAL_WORLD_SIZE"])
        # With GPUs, "as many as fit" is counted on the GPUs of the ranks.
        gpus_per_node = ranks if self.device == "cuda" else 0
        actors = actors_in_all(pool, len(self.access.nodes), gpus_per_node)

        try:
            started = Pool.start(
                self.cluster,
                spec,
                weights,
                version=version,
                actors=actors,
                keep_going=keep_going,
                warn=log.warning,
                site=site_of(pool, self.access.nodes, ranks, self.device),
                sender=sender,
            )
        except ActorsLostError as error:
            shared = f", or {pool.key}.placement=shared" if pool.may_share else ""
            raise ActorsLostError(
                f"{pool.key}.actors={actors}: {error}; leave resources for it (fewer cluster.ranks_per_node{shared}), "
                f"or do without: {without_pool(pool)}"
            ) from error

        log.info("%d actors: %s", len(started.members), ", ".join(map(str, started.members)))
        return started


@contextmanager
def pool_starter(config: Config, device: torch.device) -> Iterator[PoolStarter | None]:
    """Yields the Ray cluster of this rank; None if the pool has no actors, or (with a warning) if the rank runs without
    Ray.

    Without Ray means `torchrun -m dist_lm.train RUN_DIR`.

    Raises:
        ClusterError: Ray refuses this rank.
    """
    pool, access = config.pool, own_access(os.environ)
    if pool is None or not pool.actors:
        yield None
    # Only a launcher starts Ray; a rank of torchrun alone finds no cluster.
    elif access is None:
        log.warning("%s.actors=%d: this rank runs without Ray, so it %s", pool.key, pool.actors, pool.without)
        yield None
    else:
        # The pool limits itself by its number of actors, not by the nodes of the ranks.
        with joined_by(access, replace(config.cluster, nodes=EVERY_NODE)) as cluster:
            yield PoolStarter(pool, device.type, access, cluster)


def engine_options(pool: RolloutPoolConfig) -> EngineOptions:
    """Returns the size of an engine of a pool."""
    return EngineOptions(
        cache_tokens=pool.cache_tokens,
        page_tokens=pool.page_tokens,
        max_sequences=pool.max_sequences,
        step_tokens=pool.step_tokens,
    )


def engine_spec(
    config: Config, pool: RolloutPoolConfig, tokenizer: Tokenizer, dtype: torch.dtype, device: torch.device, texts: bool
) -> EngineSpec:
    """Returns the specification of an actor's engine.

    Args:
        texts: whether answers have texts, which stop texts need.
    """
    return EngineSpec(
        model=config.model,
        options=engine_options(pool),
        eot_id=tokenizer.eot_id,
        vocabulary=tuple(tokenizer.vocabulary()) if texts else None,
        dtype=dtype,
        device=device.type,
        tp=pool.tp,
    )
