"""Allocation of the nodes of a cluster to ranks and to generation actors. Pure functions.

Ray counts one CPU for the agent of a node's ranks and one for each actor. The cores that ranks and actors compute with
are a separate matter: `core_users` divides them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dist_lm.cluster.ray_cluster import Node
from dist_lm.config.cluster import CPU_RANKS, ClusterConfig
from dist_lm.config.pool import AS_MANY, SHARED, RolloutPoolConfig
from dist_lm.errors import ConfigError


def ranks_per_node_with_pool(pool: RolloutPoolConfig, config: ClusterConfig, nodes: Sequence[Node], gpus: int) -> int:
    """Returns the ranks per node of a run with a pool of actors.

    Without actors it is `ClusterConfig.ranks_of_node`. Else it is cluster.ranks_per_node, or if that is -1 as many
    ranks as the pool leaves resources for, without GPUs at most `CPU_RANKS`. Actors that work in turns with the ranks
    (placement=shared) leave all to them. With GPUs, actors take spare nodes first, if these hold all of them.

    Args:
        nodes: the whole cluster.
        gpus: GPUs per node for ranks; 0: the ranks compute on CPUs.

    Raises:
        ConfigError: ranks and actors together do not fit; names the keys.
    """
    if not pool.actors:
        return config.ranks_of_node(gpus)

    n_spare = max(0, len(nodes) - config.nodes)  # nodes without ranks
    actors = actors_in_all(pool, config.nodes, gpus)
    # Ray counts one CPU for each agent and each actor, whatever they compute with.
    cpus = sum(node.cpus for node in nodes)
    if cpus - config.nodes < actors:
        raise ConfigError(
            f"{pool.key}.actors={actors}: the cluster's {len(nodes)} nodes have {cpus} CPUs; the agents of the ranks "
            f"take {config.nodes} and each actor one: use fewer actors; {without_pool(pool)}"
        )
    if pool.placement == SHARED:
        return config.ranks_of_node(gpus)

    # Without GPUs, actors on nodes of their own leave all cores to the ranks.
    if not gpus:
        if config.ranks_per_node != -1:
            return config.ranks_per_node
        cores = min((node.cpus for node in nodes), default=1)
        if not n_spare:
            cores -= _actors_per_node(pool, config.nodes)
        return max(1, min(CPU_RANKS, cores))

    # With GPUs, actors take spare nodes if these hold all of them, else GPUs of the nodes with ranks.
    if config.ranks_per_node != -1:
        ranks = config.ranks_per_node
    elif n_spare * (gpus // pool.tp) >= pool.actors:
        ranks = gpus
    else:
        ranks = gpus - _actors_per_node(pool, config.nodes) * pool.tp
    engines = config.nodes * (max(0, gpus - ranks) // pool.tp) + n_spare * (gpus // pool.tp)
    if ranks < 1 or engines < pool.actors:
        remedies = "use fewer actors or ranks"
        if pool.may_share:
            remedies += f", or {pool.key}.placement=shared"
        raise ConfigError(
            f"{pool.key}.actors={pool.actors}: {len(nodes)} nodes of {gpus} GPUs cannot hold so many engines of "
            f"{pool.tp} GPUs beside the ranks (cluster.nodes={config.nodes}, "
            f"cluster.ranks_per_node={config.ranks_per_node}): {remedies}; {without_pool(pool)}"
        )
    return ranks


def without_pool(pool: RolloutPoolConfig) -> str:
    """Returns the way out that needs no actors."""
    return f"{pool.key}.actors=0 {pool.without}"


def actors_in_all(pool: RolloutPoolConfig, nodes: int, gpus: int) -> int:
    """rlhf.pool.actors; -1 means one actor for each rlhf.pool.tp GPUs of the ranks' nodes, and at least one per node.

    Args:
        nodes: number of nodes with ranks.
        gpus: number of GPUs that the ranks of a node use.
    """
    if pool.actors == AS_MANY:
        return nodes * max(1, gpus // pool.tp)
    return pool.actors


def core_users(pool: RolloutPoolConfig, nodes: int, ranks: int, gpus: int) -> int:
    """Returns the number of processes among which the cores of a node are divided: its ranks and its actors.

    It is 0 if the cores need not be divided between ranks and actors: there are no actors, they work in turns with the
    ranks, or the ranks use GPUs.

    Args:
        nodes: number of nodes with ranks.
        ranks: number of ranks per node.
        gpus: number of GPUs that the ranks of a node use.
    """
    if not pool.actors or pool.placement == SHARED or gpus:
        return 0
    return ranks + _actors_per_node(pool, nodes)


def _actors_per_node(pool: RolloutPoolConfig, nodes: int) -> int:
    """Returns the most actors of one node, if they are spread over `nodes` nodes."""
    return -(-pool.actors // nodes)


@dataclass(frozen=True)
class Reserved:
    """Resources of a node that others have reserved."""

    cpus: int = 0
    gpus: int = 0


@dataclass(frozen=True)
class Site:
    """The part of a cluster that a pool may use; by default all of it, once others have left."""

    among_others: bool = False  # use only free resources, because the others stay as long as the pool does
    addresses: frozenset[str] = frozenset()  # use only these nodes; empty: all
    shares_gpus: bool = False  # use GPUs that others have reserved, in turns with them
    core_users: int = 0  # processes that share the cores of a node; 0: the pool's actors alone

    def nodes(self, alive: Sequence[Node], reserved: Mapping[str, Reserved]) -> list[Node]:
        """Returns the usable nodes, each with its usable resources: all of them, or with `among_others` those that are
        not reserved.

        Args:
            reserved: node id -> resources that others have reserved.
        """
        allowed = [node for node in alive if not self.addresses or node.address in self.addresses]
        if not self.among_others:
            return allowed
        return [self._rest(node, reserved.get(node.id, Reserved())) for node in allowed]

    def cores(self, node: Node, cores_of_pool: int) -> int:
        """Returns the CPU cores of an actor on `node`: an equal share, at least 1, of its cores among `core_users`.

        Without `core_users` it returns `cores_of_pool`.

        Args:
            node: with all its resources.
            cores_of_pool: cores of an actor if the pool were alone.
        """
        if not self.core_users:
            return cores_of_pool
        return max(1, node.cpus // self.core_users)

    def devices(self, node: Node, gpus: int, ordinal: int) -> tuple[int, ...]:
        """Returns the indices of the GPUs of the `ordinal`-th actor of `node`; empty if Ray assigns them or `gpus`
        is 0.

        Actors get groups of `gpus` from the last GPU backwards. Once each group has an actor, the next actors share
        groups with the first ones.

        Args:
            gpus: number of GPUs per actor.
        """
        if not self.shares_gpus or not gpus:
            return ()
        groups = max(1, node.gpus // gpus)
        first = (groups - 1 - ordinal % groups) * gpus
        return tuple(range(first, first + gpus))

    def _rest(self, node: Node, reserved: Reserved) -> Node:
        """`node` with the resources that are not reserved."""
        reserved_gpus = 0 if self.shares_gpus else reserved.gpus
        return replace(node, cpus=max(0, node.cpus - reserved.cpus), gpus=max(0, node.gpus - reserved_gpus))


def site_of(pool: RolloutPoolConfig, addresses: Sequence[str], ranks: int, device: str) -> Site:
    """Returns the site of a pool that works beside ranks.

    Args:
        addresses: addresses of the nodes with ranks.
        ranks: number of ranks per node.
        device: cpu or cuda.
    """
    # Ranks and actors that work in turns each get all cores.
    users = core_users(pool, len(addresses), ranks, gpus=ranks if device == "cuda" else 0)
    if pool.placement == SHARED:
        return Site(among_others=True, addresses=frozenset(addresses), shares_gpus=device == "cuda")
    return Site(among_others=True, core_users=users)


def missing_places(
    nodes: Sequence[Node], actors_on: Mapping[str, int], pool_size: int, most_nodes: int, gpus: int
) -> list[Node]:
    """Returns a node for every actor that is missing: each time the one with the fewest actors that can hold another.

    A node occurs once per new actor. Fewer are returned if no node can hold more. Nodes that have actors are filled
    first; others are used up to `most_nodes`.

    Args:
        nodes: alive.
        actors_on: node id -> actors.
        pool_size: actors of the pool, or `AS_MANY`: as many as the chosen nodes hold.
        most_nodes: most nodes that the pool may use.
        gpus: number of GPUs per actor, all on one node; 0: an actor takes a CPU.
    """
    # Nodes that have actors already come first, so that a pool does not spread over more nodes than it may use.
    used = [node for node in nodes if actors_on.get(node.id)]
    able = [node for node in nodes if not actors_on.get(node.id) and _capacity(node, pool_size, gpus)]
    chosen = [*used, *able[: max(0, most_nodes - len(used))]]
    actors_of = Counter({node.id: actors_on.get(node.id, 0) for node in chosen})
    total = pool_size
    if pool_size == AS_MANY:
        total = sum(_capacity(node, pool_size, gpus) for node in chosen)

    nodes_of_new_actors = []
    # The node with the fewest actors comes first, so that they are spread evenly.
    while sum(actors_of.values()) < total:
        free = [node for node in chosen if actors_of[node.id] < _capacity(node, pool_size, gpus)]
        if not free:
            break
        node = min(free, key=lambda node: actors_of[node.id])
        actors_of[node.id] += 1
        nodes_of_new_actors.append(node)
    return nodes_of_new_actors


def cores_of(node: Node, pool_size: int, most_nodes: int, gpus: int) -> int:
    """CPU cores of an actor on `node` if the pool is alone there; for the arguments see `missing_places`."""
    actors = _capacity(node, pool_size, gpus)
    if pool_size != AS_MANY:
        # Actors are spread over all the nodes that the pool may use.
        actors = min(actors, -(-pool_size // most_nodes))
    return max(1, node.cpus // max(1, actors))


def _capacity(node: Node, pool_size: int, gpus: int) -> int:
    """Returns how many actors a node can hold. Without GPUs, `AS_MANY` means one, which then uses all cores."""
    if gpus:
        return node.gpus // gpus
    if pool_size == AS_MANY:
        return min(1, node.cpus)
    return node.cpus
