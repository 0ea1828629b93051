"""The layout of a stage on its ranks, and the numbers of nodes on which it can run.

The layout is the configured one, or with parallel=auto the one with the fastest estimated step.
"""

from collections.abc import Sequence
from dataclasses import replace

from dist_lm.config.root import Config
from dist_lm.dry_run.choose import best, candidates, table
from dist_lm.errors import ConfigError, require
from dist_lm.parallel.layout import check_batch, resolve_layout
from dist_lm.tracking.console import Console


def on_nodes_of(config: Config, ranks_per_node: int) -> Config:
    """`config` with hardware.devices_per_node set to the number of ranks, for the estimates."""
    return replace(config, hardware=replace(config.hardware, devices_per_node=ranks_per_node))


def with_layout(config: Config, ranks_per_node: int, console: Console | None = None) -> Config:
    """`config` with parallel.auto replaced by the chosen layout. Checks that layout and batch fit.

    Args:
        console: shows the compared candidates.

    Raises:
        ConfigError: layout or batch do not fit the ranks, or no layout fits with parallel=auto.
    """
    world = config.cluster.nodes * ranks_per_node
    if config.parallel.auto:
        planned = on_nodes_of(config, ranks_per_node)
        found = candidates(planned, world)
        if console:
            console.table(
                f"parallel=auto for {world} ranks of hardware={config.hardware.name}, {len(found):,} candidates:",
                ("layout", "step", "memory", ""),
                table(planned, found),
            )
        config = replace(config, parallel=best(planned, found).parallel)
    check_batch(config, resolve_layout(config.parallel, config.model, world))
    return config


def check_hardware(config: Config) -> None:
    """Refuse parallel=auto if the hardware group describes another kind of device than `config.device`.

    Raises:
        ConfigError: names the key.
    """
    planned = config.hardware
    require(
        not config.parallel.auto or planned.device == config.device,
        "hardware",
        planned.name,
        f"what the ranks run on (device={config.device}): parallel=auto plans with it; give hardware=NAME",
    )


def sizes(config: Config, ranks_per_node: int) -> list[int]:
    """Numbers of nodes on which a run can continue, largest first: from cluster.nodes down to cluster.min_nodes.

    Raises:
        ConfigError: the layout does not fit cluster.nodes.
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
    """`config` for another number of nodes."""
    least = min(config.cluster.min_nodes, nodes)
    return replace(config, cluster=replace(config.cluster, nodes=nodes, min_nodes=least))


def largest(sizes: Sequence[int], nodes: int) -> int | None:
    """The largest of `sizes` that is at most `nodes`; `sizes` are descending."""
    return next((size for size in sizes if size <= nodes), None)
