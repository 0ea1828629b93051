"""How ranks and the actors of a pool share the nodes of a cluster. Values only.

Ray counts one CPU for the agent of a node's ranks and one for an actor; how many cores they compute with is another
matter, and settled by `core_users`.
"""

from collections.abc import Sequence

from dist_lm.cluster.pool_site import Site
from dist_lm.cluster.ranks import CPU_RANKS, ranks_per_node
from dist_lm.cluster.ray_cluster import Node
from dist_lm.config.cluster import ClusterConfig
from dist_lm.config.pool import AS_MANY, SHARED, RolloutPoolConfig
from dist_lm.errors import ConfigError

WITHOUT = "rlhf.pool.actors=0 generates in the process of the first rank"


def ranks_beside(pool: RolloutPoolConfig, config: ClusterConfig, nodes: Sequence[Node], gpus: int) -> int:
    """Ranks a node, with room left for the pool: cluster.ranks_per_node, or where that is -1 what the pool leaves.

    Args:
        nodes: of the whole cluster.
        gpus: of a node that ranks are to use; 0: they compute on CPUs.

    Raises:
        ConfigError: there is not so much room; the message names the keys.
    """
    if not pool.actors:
        return ranks_per_node(config, gpus)
    spare = max(0, len(nodes) - config.nodes)  # nodes that have no ranks
    actors = actors_in_all(pool, config.nodes, gpus)
    if sum(node.cpus for node in nodes) - config.nodes < actors:
        raise ConfigError(
            f"rlhf.pool.actors={actors}: the cluster's {len(nodes)} nodes have "
            f"{sum(node.cpus for node in nodes)} CPUs, of which the ranks' agents take {config.nodes} and each actor "
            f"one: ask for fewer; {WITHOUT}"
        )
    if pool.placement == SHARED:
        return ranks_per_node(config, gpus)
    if not gpus:
        cores = min((node.cpus for node in nodes), default=1)
        left = cores if spare else cores - actors_a_node(pool, config.nodes)
        return config.ranks_per_node if config.ranks_per_node != -1 else max(1, min(CPU_RANKS, left))
    if config.ranks_per_node != -1:
        ranks = config.ranks_per_node
    elif spare * (gpus // pool.tp) >= pool.actors:
        ranks = gpus
    else:
        ranks = gpus - actors_a_node(pool, config.nodes) * pool.tp
    engines = config.nodes * (max(0, gpus - ranks) // pool.tp) + spare * (gpus // pool.tp)
    if ranks < 1 or engines < pool.actors:
        raise ConfigError(
            f"rlhf.pool.actors={pool.actors}: {len(nodes)} nodes of {gpus} GPUs have no room for so many engines of "
            f"{pool.tp} GPUs beside the ranks (cluster.nodes={config.nodes}, "
            f"cluster.ranks_per_node={config.ranks_per_node}): ask for fewer of either, or take "
            f"rlhf.pool.placement=shared; {WITHOUT}"
        )
    return ranks


def actors_in_all(pool: RolloutPoolConfig, nodes: int, gpus: int) -> int:
    """rlhf.pool.actors, or where that is -1 one for each rlhf.pool.tp GPUs of the ranks' nodes, at least one a node.

    Args:
        nodes: with ranks.
        gpus: that ranks use of a node.
    """
    return nodes * max(1, gpus // pool.tp) if pool.actors == AS_MANY else pool.actors


def actors_a_node(pool: RolloutPoolConfig, nodes: int) -> int:
    """On the node that has most of them, if they lie on `nodes` nodes."""
    return -(-pool.actors // nodes)


def core_users(pool: RolloutPoolConfig, nodes: int, ranks: int, gpus: int) -> int:
    """Processes that the cores of a node are divided among; 0: ranks and actors take turns on all of them.

    Args:
        nodes: with ranks.
        ranks: of a node.
        gpus: that ranks use of a node: beside GPUs the cores are no matter.
    """
    if not pool.actors or pool.placement == SHARED or gpus:
        return 0
    return ranks + actors_a_node(pool, nodes)


def site_of(pool: RolloutPoolConfig, addresses: Sequence[str], ranks: int, device: str) -> Site:
    """Where the actors go.

    Args:
        addresses: of the nodes with ranks.
        ranks: of a node.
        device: cpu or cuda.
    """
    users = core_users(pool, len(addresses), ranks, gpus=ranks if device == "cuda" else 0)
    if pool.placement == SHARED:
        return Site(among_others=True, addresses=frozenset(addresses), shares_gpus=device == "cuda")
    return Site(among_others=True, core_users=users)
