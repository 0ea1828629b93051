"""Rollouts by a pool of actors, as the learner asks for them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from dist_lm.cluster.pool import ActorsLostError, Pool
from dist_lm.cluster.pool_actor import EngineSpec
from dist_lm.cluster.pool_room import WITHOUT
from dist_lm.cluster.pool_site import Site
from dist_lm.cluster.ray_cluster import RayCluster
from dist_lm.generation.request import Answer, Refusal, Request, RequestError


class PoolRollouts:
    """A `RolloutSource` over a pool, which is its owner's to close. One call at a time, from whichever thread."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def load_weights(self, weights: Mapping[str, np.ndarray], version: int) -> None:
        """Go on with other weights, in all actors."""
        self.pool.load_weights(weights, version)

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """All answers, in the order of the requests, then of their index.

        Raises:
            RequestError: one of them cannot be answered.
            ActorsLostError: no actor is left, and there was no place for another within cluster.node_wait_s.
            PoolFailure: actors died again and again without an answer in between.
        """
        answers = []
        for result in self.pool.generate(requests, in_order=True, window=len(requests)):
            if isinstance(result, Refusal):
                raise RequestError(result.request, result.error)
            answers.append(result)
        return answers


@contextmanager
def pool_rollouts(
    cluster: RayCluster,
    spec: EngineSpec,
    weights: Mapping[str, np.ndarray],
    *,
    actors: int,
    site: Site,
    alive: Callable[[], None],
    warn: Callable[[str], None],
) -> Iterator[PoolRollouts]:
    """A pool for the time of the block.

    Args:
        alive: called at least twice a second while the pool works.
        warn: told of actors and nodes that are lost.

    Raises:
        ActorsLostError: there is no place for an actor; the message says what to do.
    """

    def wanted() -> bool:
        alive()
        return True

    try:
        pool = Pool.start(cluster, spec, weights, version=-1, actors=actors, wanted=wanted, warn=warn, site=site)
    except ActorsLostError as error:
        raise ActorsLostError(
            f"rlhf.pool.actors={actors}: {error}; give it room (cluster.ranks_per_node, rlhf.pool.placement=shared), "
            f"or do without: {WITHOUT}"
        ) from error
    with pool:
        yield PoolRollouts(pool)
