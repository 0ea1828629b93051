"""The nodes for the next attempt at a run: as many as configured, or after a wait as many as there are."""

import math
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from dist_lm.cluster.inspection import Demands
from dist_lm.cluster.ray_cluster import ClusterError, RayCluster
from dist_lm.cluster.recruit import Crew, recruit
from dist_lm.config.root import Config
from dist_lm.launcher.layout_choice import largest
from dist_lm.launcher.process import Interrupt
from dist_lm.model.size import parameter_count
from dist_lm.tracking.console import Console

BYTES_PER_PARAMETER = 12  # of a checkpoint: fp32 weights and two moments
GIB = 1 << 30
LONGEST_GROW_S = 3600.0


class NodesLostError(ClusterError):
    """A run that was under way has too few nodes left, and none came in time; it can continue once they are there."""


def demands_of(config: Config, gpus_per_node: int) -> Demands:
    """What a node must have for this run."""
    least = math.ceil(config.cluster.min_free_gib * GIB)
    checkpoint = parameter_count(config.model) * config.trained_models * BYTES_PER_PARAMETER
    checkpoint = checkpoint if config.stage.checkpoint_every else 0
    return Demands(
        gpus=gpus_per_node,
        free_bytes=least + checkpoint,
        temporary_bytes=least,
        clock_skew_s=config.cluster.max_clock_skew_s,
        link_ratio=config.cluster.min_link_ratio,
    )


class Muster:
    """Calls nodes of a cluster together for one run, again for every attempt."""

    def __init__(
        self,
        cluster: RayCluster,
        config: Config,
        sizes: Sequence[int],
        *,
        gpus_per_node: int,
        directory: Path,
        interrupt: Interrupt,
        console: Console,
    ) -> None:
        """`sizes`: numbers of nodes that will do, largest first; `directory`: of the run."""
        self._cluster = cluster
        self._cluster_config = config.cluster
        self._sizes = sizes
        self._gpus_per_node = gpus_per_node
        self._directory = directory.resolve()
        self._demands = demands_of(config, gpus_per_node)
        self._interrupt = interrupt
        self._console = console
        self._under_way = False
        self._grow_after_s = config.cluster.grow_after_s
        # by Ray's id: nodes at which an attempt ended (Ray takes a while to notice), and unfit ones
        self._lost: set[str] = set()
        self._first_seen: dict[str, float] = {}  # nodes that are not in use, by Ray's id: monotonic seconds

    def call(self, avoid: Collection[str], nodes: int | None = None) -> Crew | None:
        """The crew of the next attempt; None if the run was interrupted while waiting for it.

        Args:
            avoid: addresses of nodes that are better not used.
            nodes: how many; None: as many as can be had.

        Raises:
            NodesLostError: too few nodes are left of a run that was under way.
            ClusterError: too few nodes, or too few that are fit.
        """
        config = self._cluster_config
        most = nodes or self._sizes[0]
        patience = config.start_timeout_s
        if self._under_way:
            patience = config.node_wait_s if most > self._sizes[-1] else max(patience, config.node_wait_s)
        try:
            crew = self._recruit(most, patience, avoid)
        except ClusterError as shortage:
            crew = self._fewer(most, avoid, shortage)
        self._under_way = self._under_way or crew is not None
        if crew:
            self._lost |= crew.left_out
            if nodes and len(crew.hosts) < nodes:  # others have them, or they are unfit: do not try that again soon
                self._grow_after_s = min(2 * max(self._grow_after_s, 1.0), LONGEST_GROW_S)
        return crew

    def lose(self, id_: str) -> None:
        """The node with this id of Ray's was lost: it is no room to grow; coming back it has another id."""
        self._lost.add(id_)

    def _fewer(self, most: int, avoid: Collection[str], shortage: ClusterError) -> Crew | None:
        smaller = [size for size in self._sizes if size < most]
        while size := largest(smaller, len(self._cluster.nodes())):
            self._console.warning(f"{shortage}; going on with {size}")
            try:
                return self._recruit(size, self._cluster_config.start_timeout_s, avoid)
            except ClusterError as error:
                shortage, smaller = error, [other for other in smaller if other < size]
        if self._under_way:
            raise NodesLostError(f"{shortage}; the same command continues when there are enough") from shortage
        raise shortage

    def _recruit(self, nodes: int, timeout_s: float, avoid: Collection[str]) -> Crew | None:
        return recruit(
            self._cluster,
            nodes,
            gpus_per_node=self._gpus_per_node,
            directory=self._directory,
            demands=self._demands,
            timeout_s=timeout_s,
            avoid=avoid,
            wanted=lambda: not self._interrupt.requested,
            warn=self._console.warning,
        )

    def room_to_grow(self, crew: Crew) -> int | None:
        """The larger number of nodes that a shrunk run could have now; None: it should go on as it is.

        A node counts when it has been there for cluster.grow_after_s.
        """
        own = {node.id for node in crew.placement.nodes}
        if len(own) >= self._sizes[0]:
            return None
        now = time.monotonic()
        others = [
            node.id
            for node in self._cluster.nodes()
            if node.id not in own | self._lost and node.gpus >= self._gpus_per_node
        ]
        self._first_seen = {id_: self._first_seen.get(id_, now) for id_ in others}
        ready = sum(now - since >= self._grow_after_s for since in self._first_seen.values())
        size = largest(self._sizes, len(own) + ready)
        return size if size and size > len(own) else None
