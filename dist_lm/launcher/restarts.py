"""How often a run that fails is started again, and on how many nodes: values only, no effects."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from dist_lm.config.root import Config
from dist_lm.errors import ConfigError
from dist_lm.launcher.layout_choice import with_layout

BLAMED_TWICE = 2


@dataclass(frozen=True)
class Restarts:
    """Failures in a row without a new checkpoint between them; a checkpoint wipes the slate."""

    limit: int
    step: int  # of the newest checkpoint at the last failure, or when the launch began
    failures: int = 0
    blamed: Counter[str] = field(default_factory=Counter)  # failures by the address of a node

    def after_failure(self, step: int, address: str | None) -> "Restarts":
        """One more failure.

        Args:
            step: of the newest checkpoint now.
            address: of the node at which it began; None: it cannot be told.
        """
        blamed = Counter([address] if address else [])
        if step != self.step:  # lower after a damaged one was passed over
            return replace(self, step=step, failures=1, blamed=blamed)
        return replace(self, failures=self.failures + 1, blamed=self.blamed + blamed)

    @property
    def left(self) -> int:
        """Restarts that are left; negative: one too many."""
        return self.limit - self.failures

    @property
    def suspects(self) -> frozenset[str]:
        """Addresses of nodes at which failures began again and again: others are taken where there are others."""
        return frozenset(address for address, count in self.blamed.items() if count >= BLAMED_TWICE)


def sizes(config: Config, ranks_per_node: int) -> list[int]:
    """Numbers of nodes on which a run can go on, largest first: those from cluster.min_nodes on that its layout fits.

    Raises:
        ConfigError: it does not even fit cluster.nodes.
    """
    least = config.cluster.nodes if config.cluster.min_nodes == -1 else config.cluster.min_nodes
    found = [config.cluster.nodes]
    with_layout(config, ranks_per_node)
    for nodes in range(config.cluster.nodes - 1, least - 1, -1):
        try:
            with_layout(on_nodes(config, nodes), ranks_per_node)
        except ConfigError:
            continue
        found.append(nodes)
    return found


def on_nodes(config: Config, nodes: int) -> Config:
    """`config` for so many nodes."""
    least = min(config.cluster.min_nodes, nodes)
    return replace(config, cluster=replace(config.cluster, nodes=nodes, min_nodes=least))


def largest(sizes: Sequence[int], nodes: int) -> int | None:
    """The largest of `sizes` that `nodes` nodes can make."""
    return next((size for size in sizes if size <= nodes), None)
