"""Which part of a cluster a pool may use, beside others that use it too. Values only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dist_lm.cluster.ray_cluster import Node


@dataclass(frozen=True)
class Reserved:
    """What others hold of a node."""

    cpus: int = 0
    gpus: int = 0


@dataclass(frozen=True)
class Site:
    """The default: the whole cluster, where others are waited for until they leave."""

    among_others: bool = False  # only what nobody has reserved: others stay as long as the pool does
    addresses: frozenset[str] = frozenset()  # only nodes with these; none: all
    shares_gpus: bool = False  # actors compute on GPUs that others have reserved, in turns with them
    core_users: int = 0  # processes that share the cores of a node; 0: the pool's actors alone

    def nodes(self, alive: Sequence[Node], reserved: Mapping[str, Reserved]) -> list[Node]:
        """What the pool may count on of each node.

        Args:
            reserved: by others, by the id of the node.
        """
        found = [node for node in alive if not self.addresses or node.address in self.addresses]
        if not self.among_others:
            return found
        return [_less(node, reserved.get(node.id, Reserved()), self.shares_gpus) for node in found]

    def cores(self, node: Node, cores_of_pool: int) -> int:
        """CPU cores that an actor on `node` computes with.

        Args:
            node: all of it.
            cores_of_pool: that an actor would have if the pool were alone.
        """
        return max(1, node.cpus // self.core_users) if self.core_users else cores_of_pool

    def devices(self, node: Node, gpus: int, ordinal: int) -> tuple[int, ...]:
        """GPUs of `node` for the actor that is its `ordinal`-th, where Ray does not give it any: from the last ones on.

        Args:
            gpus: that an actor computes with.
        """
        if not self.shares_gpus or not gpus:
            return ()
        groups = max(1, node.gpus // gpus)
        first = (groups - 1 - ordinal % groups) * gpus
        return tuple(range(first, first + gpus))


def _less(node: Node, others: Reserved, keeps_gpus: bool) -> Node:
    gpus = node.gpus if keeps_gpus else max(0, node.gpus - others.gpus)
    return replace(node, cpus=max(0, node.cpus - others.cpus), gpus=gpus)
