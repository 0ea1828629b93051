"""Recruits nodes for the next attempt at a run: the configured number, or fewer after a wait."""

import math
import time
from collections.abc import Collection, Sequence
from functools import cache

from dist_lm.cluster.inspection import Demands
from dist_lm.cluster.ray_cluster import ClusterError, RayCluster
from dist_lm.cluster.recruit import Crew, able_nodes, recruit
from dist_lm.config.root import Config
from dist_lm.launcher.process import Interrupt
from dist_lm.model.size import trained_count
from dist_lm.prepare.layout import largest
from dist_lm.stages.stage import run_of
from dist_lm.tracking.console import Console

BYTES_PER_PARAMETER = 12  # in a checkpoint: fp32 weights and two moments
AVERAGE_BYTES = 4  # in addition, with stage.ema_decay
GIB = 1 << 30
LONGEST_GROW_S = 3600.0


class NodesLostError(ClusterError):
    """A run that has begun lost nodes, and no replacement came in time. The same command can continue it later."""


def demands_of(config: Config, gpus_per_node: int) -> Demands:
    """Returns the requirements of this run for a node; the free space (bytes) includes one checkpoint of all trained
    models.

    Args:
        gpus_per_node: 0: the ranks run on CPUs.
    """
    bytes_per_parameter = BYTES_PER_PARAMETER
    if config.stage.ema_decay:
        bytes_per_parameter += AVERAGE_BYTES
    checkpoint_bytes = trained_count(config.trained_shape) * config.trained_models * bytes_per_parameter

    min_free_bytes = math.ceil(config.cluster.min_free_gib * GIB)
    return Demands(
        gpus=gpus_per_node,
        free_bytes=min_free_bytes + checkpoint_bytes,
        temporary_bytes=min_free_bytes,
        clock_skew_s=config.cluster.max_clock_skew_s,
        link_ratio=config.cluster.min_link_ratio,
        tried=gpus_per_node,
        burn_s=config.cluster.gpu_check_s,
    )


class Muster:
    """Recruits the nodes of one run, again for every attempt."""

    def __init__(
        self, cluster: RayCluster, config: Config, sizes: Sequence[int], interrupt: Interrupt, console: Console
    ) -> None:
        """`config`: with the device and the ranks per node; `sizes`: possible numbers of nodes, largest first."""
        # A rank on a GPU has one of its own.
        self.gpus_per_node = 0
        if config.device == "cuda":
            self.gpus_per_node = config.cluster.ranks_per_node

        self._cluster = cluster
        self._cluster_config = config.cluster
        self._sizes = sizes
        self._directory = run_of(config).path.resolve()
        self._demands = demands_of(config, self.gpus_per_node)
        self._interrupt = interrupt
        self._console = console
        self._note = cache(console.warning)  # repeats no warning
        self._under_way = False
        self._grow_after_s = config.cluster.grow_after_s
        # Ray ids of unfit nodes, and of nodes that an attempt lost (Ray lists a dead node for a while)
        self._lost: set[str] = set()
        self._first_seen: dict[str, float] = {}  # unused nodes: Ray id -> monotonic seconds

    def call(self, avoid: Collection[str], nodes: int | None = None) -> Crew | None:
        """Recruits the crew of the next attempt, which the caller releases; None if the run was interrupted during the
        wait.

        It waits cluster.start_timeout_s for enough nodes; from the second call on cluster.node_wait_s, or the longer of
        both if the run cannot shrink. Then it takes fewer if the run can shrink, with a warning. Nodes that were found
        unfit do not count in `room_to_grow` any more; if the crew has fewer than `nodes`, the wait before the next
        growth doubles.

        Args:
            avoid: addresses of nodes to use only if there are no others.
            nodes: number of nodes; None: as many as possible.

        Raises:
            NodesLostError: a run that has begun has too few nodes left.
            ClusterError: too few nodes are available or fit.
        """
        config = self._cluster_config
        most = nodes or self._sizes[0]

        timeout_s = config.start_timeout_s
        if self._under_way:
            # A run that can go on with fewer nodes waits only for replacements; one that cannot waits for both.
            can_shrink = most > self._sizes[-1]
            timeout_s = config.node_wait_s if can_shrink else max(timeout_s, config.node_wait_s)
        try:
            crew = self._recruit(most, timeout_s, avoid)
        except ClusterError as shortage:
            crew = self._fewer(most, avoid, shortage)
        if crew is None:
            return None

        self._under_way = True
        self._lost |= crew.left_out
        if nodes and len(crew.hosts) < nodes:
            # The nodes to grow to were taken or unfit: wait longer before the next try.
            self._grow_after_s = min(2 * max(self._grow_after_s, 1.0), LONGEST_GROW_S)
        return crew

    def lose(self, id_: str) -> None:
        """Excludes the lost node with this Ray id from growing. A node that comes back has another id."""
        self._lost.add(id_)

    def _fewer(self, most: int, avoid: Collection[str], shortage: ClusterError) -> Crew | None:
        """Recruits as many nodes as there are, fewer than `most`; None if the run was interrupted. Each try is preceded
        by a warning. See `call`.

        Args:
            shortage: why `most` nodes are not available.

        Raises:
            NodesLostError: no size fits, and the run has begun.
            ClusterError: no size fits: `shortage`, or why the last size that was tried failed.
        """
        smaller_sizes = [size for size in self._sizes if size < most]
        while size := largest(smaller_sizes, len(able_nodes(self._cluster, self.gpus_per_node))):
            self._console.warning(f"{shortage}; continuing with {size}")
            try:
                return self._recruit(size, self._cluster_config.start_timeout_s, avoid)
            except ClusterError as error:
                shortage = error
                smaller_sizes = [smaller for smaller in smaller_sizes if smaller < size]
        if self._under_way:
            raise NodesLostError(f"{shortage}; the same command continues when there are enough nodes") from shortage
        raise shortage

    def _recruit(self, nodes: int, timeout_s: float, avoid: Collection[str]) -> Crew | None:
        """Returns a crew of exactly `nodes` nodes, after waiting at most `timeout_s` seconds until they are free and
        then for their agents and inspection; None if the run was interrupted.

        Raises:
            ClusterError: too few nodes are available or fit.
        """
        return recruit(
            self._cluster,
            nodes,
            gpus_per_node=self.gpus_per_node,
            directory=self._directory,
            demands=self._demands,
            timeout_s=timeout_s,
            avoid=avoid,
            keep_going=lambda: not self._interrupt.requested,
            warn=self._console.warning,
            note=self._note,
        )

    def room_to_grow(self, crew: Crew) -> int | None:
        """Returns the number of nodes to which a shrunk run can grow now; None if it cannot grow.

        A node counts once calls have seen it available for cluster.grow_after_s. After a try that got fewer nodes, this
        time doubles.
        """
        crew_ids = {node.id for node in crew.placement.nodes}
        larger_sizes = [size for size in self._sizes if size > len(crew_ids)]
        if not larger_sizes:
            return None

        now = time.monotonic()
        able_ids = {node.id for node in able_nodes(self._cluster, self.gpus_per_node)}
        unused_ids = able_ids - crew_ids - self._lost
        # A node that was away in between is watched anew.
        self._first_seen = {node_id: self._first_seen.get(node_id, now) for node_id in unused_ids}

        n_ready = sum(now - first_seen >= self._grow_after_s for first_seen in self._first_seen.values())
        return largest(larger_sizes, len(crew_ids) + n_ready)
