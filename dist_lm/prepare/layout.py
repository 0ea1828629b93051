"""The one place that resolves the layout of a run, for the launcher, runs without it, and the dry run.

`config.yaml` of a run records the resolved layout: concrete parallel.dp_replicate, dp_shard and tp, and auto=false. The
ranks, the journal and the dry run read it with `Layout.recorded`.

A run that continues keeps its layout, unless the number of ranks has changed or the command asks for another. A new run
takes the configured layout, or with parallel=auto the one with the fastest estimated step. If dp_replicate and dp_shard
are both open (-1), FSDP shards inside a node and replicates between nodes if that fits the memory.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from dist_lm.config.cluster import ParallelConfig
from dist_lm.config.root import Config
from dist_lm.dry_run.choose import best, candidates, gathers_once, inside_nodes, table
from dist_lm.errors import ConfigError, require
from dist_lm.parallel.layout import AXES, check_batch, resolve_layout, resolved, started_layout
from dist_lm.prepare.plan import ContinuedRun
from dist_lm.tracking.console import Console

AUTO_CHOOSES = ("activation_checkpointing", "reshard_after_forward", "reduce_every_micro_batch")


def with_layout(
    config: Config, ranks_per_node: int, console: Console | None = None, before: ContinuedRun | None = None
) -> Config:
    """Returns `config` with the resolved layout of its run: no axis is -1, and auto is false.

    `reshard_after_forward` becomes false if the GPUs have room for all gathered parameters. parallel=auto also chooses
    the keys of `AUTO_CHOOSES`. `config` is not changed, and nothing is written.

    Args:
        ranks_per_node: the same on each of cluster.nodes nodes.
        console: shows a recorded layout, or the candidates of parallel=auto.
        before: the recorded run, if the command continues one.

    Raises:
        ConfigError: layout or batch do not fit the ranks, or no layout fits with parallel=auto.
    """
    world_size = config.cluster.nodes * ranks_per_node
    planned = on_nodes_of(config, ranks_per_node)
    parallel = config.parallel

    if before and (recorded := recorded_parallel(before, config, ranks_per_node)):
        parallel = recorded
        if console:
            layout = resolve_layout(parallel, config.trained_shape, world_size)
            console.line(f"{layout}: as this run recorded it; to change it, set parallel.dp_replicate, dp_shard and tp")
    elif parallel.auto:
        layouts = candidates(planned, world_size)
        if console:
            console.table(
                f"parallel=auto for {world_size} ranks of hardware={config.hardware.name}, "
                f"{len(layouts):,} candidates:",
                ("layout", "step", "memory", ""),
                table(planned, layouts),
            )
        parallel = best(planned, layouts).parallel
    elif config.cluster.nodes > 1:
        parallel = inside_nodes(planned) or parallel

    layout = resolve_layout(parallel, config.trained_shape, world_size)
    config = replace(config, parallel=resolved(parallel, layout))
    check_batch(config, layout)

    # GPUs with room for all gathered parameters need not gather them twice a step.
    if config.hardware.device == "cuda" and gathers_once(config, layout):
        return replace(config, parallel=replace(config.parallel, reshard_after_forward=False))
    return config


def recorded_parallel(before: ContinuedRun, config: Config, ranks_per_node: int) -> ParallelConfig | None:
    """Returns `config.parallel` with the layout that the run recorded; no axis is -1, and auto is false.

    It is None for another number of ranks, or if the command asks for another layout. `sp`, and with parallel=auto the
    keys in `AUTO_CHOOSES`, are those recorded, unless the command sets them. All other keys are those of `config`.

    Args:
        before: the recorded run.
        ranks_per_node: the same on each of cluster.nodes nodes.

    Raises:
        ConfigError: the recorded layout does not fit the ranks.
    """
    cluster = before.recorded.cluster
    # Configurations that were composed for no particular nodes have ranks_per_node=-1.
    recorded_ranks = cluster.ranks_per_node
    if recorded_ranks == -1:
        recorded_ranks = ranks_per_node
    world_size = config.cluster.nodes * ranks_per_node
    if cluster.nodes * recorded_ranks != world_size:
        return None

    recorded, new = before.recorded.parallel, config.parallel
    # Runs of older versions recorded -1.
    layout = resolve_layout(recorded, config.trained_shape, world_size)
    if any(getattr(new, axis) not in (-1, getattr(layout, axis)) for axis in before.asked.intersection(AXES)):
        return None

    kept_keys = {"sp"} - before.asked
    if new.auto:
        # The choices of auto belong to the layout.
        kept_keys |= set(AUTO_CHOOSES) - before.asked
    return resolved(new, layout, **{key: getattr(recorded, key) for key in kept_keys})


def for_ranks(config: Config, nodes: int, ranks_per_node: int) -> Config:
    """Returns the recorded configuration of a run for ranks that torchrun has started.

    If the run was started with another number of ranks, tp stays and the other axes are resolved again. A layout that
    no ranks were started with yet is only filled in. `cluster` gets the numbers of nodes and ranks.

    Raises:
        ConfigError: layout or batch do not fit the ranks.
    """
    parallel, cluster = config.parallel, config.cluster
    layout = started_layout(config)
    if layout and layout.world_size != nodes * ranks_per_node:
        # Tensor parallelism was chosen for the size of the layers, which stays; the other axes only share the batch.
        parallel = replace(parallel, dp_replicate=-1, dp_shard=-1)
    cluster = replace(cluster, nodes=nodes, ranks_per_node=ranks_per_node, min_nodes=min(cluster.min_nodes, nodes))
    return with_layout(replace(config, parallel=parallel, cluster=cluster), ranks_per_node)


def check_hardware(config: Config) -> None:
    """Refuses parallel=auto if the hardware group describes another kind of device than `config.device`.

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


def on_nodes_of(config: Config, ranks_per_node: int) -> Config:
    """`config` with hardware.devices_per_node set to the number of ranks, for the estimates."""
    return replace(config, hardware=replace(config.hardware, devices_per_node=ranks_per_node))


# --- runs that shrink and grow ---


def sizes(config: Config, ranks_per_node: int, before: ContinuedRun | None = None) -> list[int]:
    """Returns the numbers of nodes on which a run can continue, largest first: from cluster.nodes down to
    cluster.min_nodes.

    cluster.min_nodes=-1 stands for cluster.nodes alone. Smaller numbers that no layout or batch fits are left out;
    cluster.nodes is always the first.

    Raises:
        ConfigError: layout or batch do not fit cluster.nodes.
    """
    fewest = config.cluster.nodes if config.cluster.min_nodes == -1 else config.cluster.min_nodes
    with_layout(config, ranks_per_node, before=before)
    fitting = [config.cluster.nodes]
    for nodes in range(config.cluster.nodes - 1, fewest - 1, -1):
        with suppress(ConfigError):
            with_layout(on_nodes(config, nodes), ranks_per_node, before=before)
            fitting.append(nodes)
    return fitting


def on_nodes(config: Config, nodes: int) -> Config:
    """`config` for another number of nodes."""
    min_nodes = min(config.cluster.min_nodes, nodes)
    return replace(config, cluster=replace(config.cluster, nodes=nodes, min_nodes=min_nodes))


def largest(sizes: Sequence[int], nodes: int) -> int | None:
    """Returns the largest of `sizes` that is at most `nodes`; `sizes` are descending."""
    return next((size for size in sizes if size <= nodes), None)
