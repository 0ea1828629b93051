"""The layout of a stage on its ranks, and the numbers of nodes on which it can run.

The layout is the one that the run recorded, if it goes on with as many ranks and the command asks for no other. A new
run takes the configured layout, or with parallel=auto the one with the fastest estimated step. Where dp_replicate and
dp_shard are open, FSDP shards inside a node and replicates between nodes if that fits the memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dist_lm.config.parallel import ParallelConfig
from dist_lm.config.root import Config
from dist_lm.dry_run.choose import best, candidates, gathers_once, inside_nodes, table
from dist_lm.errors import ConfigError, require
from dist_lm.parallel.layout import AXES, check_batch, resolve_layout
from dist_lm.prepare.plan import Plan, PlannedStage
from dist_lm.stages.registry import load_config
from dist_lm.stages.stage import Action, Place, run_of
from dist_lm.tracking.console import Console

AUTO_CHOOSES = ("activation_checkpointing", "reshard_after_forward", "reduce_every_micro_batch")


@dataclass(frozen=True)
class Begun:
    """A run that goes on."""

    recorded: Config  # that its ranks read last
    asked: frozenset[str]  # keys of `parallel` that the command sets

    def parallel_of(self, config: Config, ranks_per_node: int) -> ParallelConfig | None:
        """`config.parallel` with the recorded layout; None for another number of ranks, or if the command asks for
        another layout."""
        before, now = self.recorded.cluster, config.cluster.nodes * ranks_per_node
        earlier = before.nodes * (ranks_per_node if before.ranks_per_node == -1 else before.ranks_per_node)
        if earlier != now:
            return None
        old, new = self.recorded.parallel, config.parallel
        layout = resolve_layout(old, config.model, now)
        if any(getattr(new, axis) not in (-1, getattr(layout, axis)) for axis in self.asked.intersection(AXES)):
            return None
        kept = {*AXES, *({"sp"} - self.asked), *(set(AUTO_CHOOSES) - self.asked if new.auto else ())}
        return replace(new, auto=False, **{key: getattr(old, key) for key in kept})


def with_begun_runs(plan: Plan, overrides: Sequence[str]) -> Plan:
    """`plan` with the layouts that the training runs which `overrides` continue have recorded."""
    keys = [override.split("=")[0] for override in overrides]
    asked = {key.removeprefix("parallel.") for key in keys if key.startswith("parallel.")}
    asked |= set(AXES) if "parallel" in keys else set()

    def filled(stage: PlannedStage) -> PlannedStage:
        if stage.stage.place is not Place.RANKS or stage.action is not Action.RESUME:
            return stage
        return replace(stage, begun=Begun(load_config(run_of(stage.config).config), frozenset(asked)))

    return Plan(tuple(map(filled, plan.stages)))


def on_nodes_of(config: Config, ranks_per_node: int) -> Config:
    """`config` with hardware.devices_per_node set to the number of ranks, for the estimates."""
    return replace(config, hardware=replace(config.hardware, devices_per_node=ranks_per_node))


def with_layout(
    config: Config, ranks_per_node: int, console: Console | None = None, before: Begun | None = None
) -> Config:
    """`config` with the layout of its run: the recorded one, or what is open chosen. Checks that layout and batch fit.

    Args:
        console: shows a recorded layout, or the candidates of parallel=auto.
        before: the run, if it goes on.

    Raises:
        ConfigError: layout or batch do not fit the ranks, or no layout fits with parallel=auto.
    """
    world = config.cluster.nodes * ranks_per_node
    planned = on_nodes_of(config, ranks_per_node)
    kept = before.parallel_of(config, ranks_per_node) if before else None
    if kept:
        config = replace(config, parallel=kept)
        if console:
            layout = resolve_layout(kept, config.model, world)
            console.line(f"{layout}: as this run recorded it; to change it, set parallel.dp_replicate, dp_shard and tp")
    elif config.parallel.auto:
        found = candidates(planned, world)
        if console:
            console.table(
                f"parallel=auto for {world} ranks of hardware={config.hardware.name}, {len(found):,} candidates:",
                ("layout", "step", "memory", ""),
                table(planned, found),
            )
        config = replace(config, parallel=best(planned, found).parallel)
    elif sharded := inside_nodes(planned):
        config = replace(config, parallel=sharded)
    layout = resolve_layout(config.parallel, config.model, world)
    check_batch(config, layout)
    if gathers_once(config, layout):
        return replace(config, parallel=replace(config.parallel, reshard_after_forward=False))
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


def sizes(config: Config, ranks_per_node: int, before: Begun | None = None) -> list[int]:
    """Numbers of nodes on which a run can continue, largest first: from cluster.nodes down to cluster.min_nodes.

    Raises:
        ConfigError: the layout does not fit cluster.nodes.
    """
    least = config.cluster.nodes if config.cluster.min_nodes == -1 else config.cluster.min_nodes
    found = [config.cluster.nodes]
    with_layout(config, ranks_per_node, before=before)
    for nodes in range(config.cluster.nodes - 1, least - 1, -1):
        try:
            with_layout(on_nodes(config, nodes), ranks_per_node, before=before)
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
