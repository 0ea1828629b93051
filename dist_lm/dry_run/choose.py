"""The choice of a layout by estimates of memory and time: `parallel=auto`, and open dp axes. No torch here."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from operator import attrgetter
from typing import TypeVar

from dist_lm.config.parallel import ParallelConfig
from dist_lm.config.root import Config
from dist_lm.dry_run.estimate import estimate_memory, estimate_work, gradients_add_up, offloads
from dist_lm.dry_run.work import step_seconds
from dist_lm.errors import ConfigError
from dist_lm.parallel.layout import AXES, Layout, check_batch, layouts_of
from dist_lm.tracking.readable import gib, span

USABLE = 0.85
"""Usable share of a device's memory; the rest is for the driver, fragmentation and errors of the estimate."""

NEAR = 1.03
"""Layouts are equally fast within this ratio, which is less than the error of the estimate."""

SHOWN = 6

Value = TypeVar("Value")


@dataclass(frozen=True)
class Candidate:
    """A layout with its estimates."""

    parallel: ParallelConfig
    layout: Layout
    memory: int  # peak, bytes
    seconds: float  # a step

    def fits(self, memory_gib: float) -> bool:
        return self.memory <= USABLE * memory_gib * 2**30

    def in_nodes(self, devices: int) -> bool:
        """Whether each rank gathers parameters from ranks of its own node only."""
        return devices % (self.layout.dp_shard * self.layout.tp) == 0


def candidates(config: Config, world_size: int) -> list[Candidate]:
    """Every possible layout, fastest first; equally fast ones in order of simplicity.

    Raises:
        ConfigError: no layout of this many ranks fits the model and the batch, or parameters are offloaded.
    """
    if offloads(config):
        raise ConfigError(
            "parallel.auto=true: expected parallel.cpu_offload=false, because the time of offloading is not estimated; "
            "or set parallel.dp_replicate, dp_shard and tp yourself"
        )
    config = _as_step(config)
    found, fixed = [], {axis: getattr(config.parallel, axis) for axis in AXES}
    for layout in layouts_of(config.model, world_size):
        if layout.tp > config.hardware.devices_per_node:
            continue  # tensor parallelism between nodes is slow
        if any(asked not in (-1, getattr(layout, axis)) for axis, asked in fixed.items()):
            continue
        for parallel in _variants(config, layout):
            tried = replace(config, parallel=parallel)
            try:
                check_batch(tried, layout)
            except ConfigError:
                continue
            seconds = step_seconds(estimate_work(tried, layout), layout, config.hardware)
            found.append(Candidate(parallel, layout, _peak(tried, layout), seconds))
    if not found:
        raise _nothing_to_try(config, world_size, {axis: asked for axis, asked in fixed.items() if asked != -1})
    return sorted(found, key=lambda candidate: float(f"{candidate.seconds:.3g}"))


def _as_step(config: Config) -> Config:
    """`config` whose stage describes a step: in stage rlhf, an update, which has other keys."""
    if config.takes_sequences:
        return config
    from dist_lm.dry_run.iterations import update_of
    from dist_lm.stages.rlhf.stage import rlhf_config

    return update_of(rlhf_config(config))


def _peak(config: Config, layout: Layout) -> int:
    """Bytes at the peak of the fullest rank: in a step, or in stage rlhf in an update, beside all models."""
    if config.takes_sequences:
        return estimate_memory(config, layout).peak
    from dist_lm.dry_run.iterations import rlhf_memory
    from dist_lm.stages.rlhf.stage import rlhf_config

    return rlhf_memory(rlhf_config(config), layout).training


def _nothing_to_try(config: Config, world_size: int, fixed: dict[str, int]) -> ConfigError:
    given = " ".join(["parallel.auto=true", *(f"parallel.{axis}={asked}" for axis, asked in fixed.items())])
    ways = [f"give a multiple of {world_size}", "or fewer ranks", *(["or leave the axes open (-1)"] if fixed else [])]
    batch_key = config.sequence_keys[0] if config.sequence_keys else "stage.global_batch"
    return ConfigError(
        f"{given}: no layout of {world_size} ranks divides {batch_key}={attrgetter(batch_key)(config)}: "
        f"{', '.join(ways)}"
    )


def inside_nodes(config: Config) -> ParallelConfig | None:
    """`config.parallel` with FSDP over the ranks of a node and replicas between nodes; None if a dp axis is given, if
    there is one node, or if the model does not fit that way.

    Args:
        config: with the ranks of a node as hardware.devices_per_node.
    """
    parallel, hardware, ranks = config.parallel, config.hardware, config.hardware.devices_per_node
    is_open = parallel.dp_replicate == parallel.dp_shard == -1 and parallel.tp > 0
    planned = config.device in ("auto", hardware.device)
    if not is_open or not planned or config.cluster.nodes == 1 or ranks % parallel.tp or ranks == parallel.tp:
        return None
    layout = Layout(config.cluster.nodes, ranks // parallel.tp, parallel.tp)
    if layout not in layouts_of(config.model, layout.world_size):
        return None
    memory = _peak(config, layout)
    return replace(parallel, dp_shard=layout.dp_shard) if memory <= USABLE * hardware.memory_gib * 2**30 else None


def gathers_once(config: Config, layout: Layout) -> bool:
    """Whether GPUs have the memory to keep all parameters gathered for a whole step, and `config` leaves that open."""
    parallel, hardware = config.parallel, config.hardware
    is_open = parallel.reshard_after_forward is None and layout.dp_shard > 1 and config.takes_sequences
    if not is_open or hardware.device != "cuda" or config.device not in ("auto", "cuda"):
        return False
    kept = replace(config, parallel=replace(parallel, reshard_after_forward=False))
    return estimate_memory(kept, layout).peak <= USABLE * hardware.memory_gib * 2**30


def best(config: Config, found: list[Candidate]) -> Candidate:
    """The fastest candidate that fits the memory; of equally fast ones, one whose shards stay inside a node.

    Raises:
        ConfigError: none fits.
    """
    hardware, memory_gib = config.hardware, config.hardware.memory_gib
    fitting = [candidate for candidate in found if candidate.fits(memory_gib)]
    if fitting:
        near = (one for one in fitting if one.seconds <= NEAR * fitting[0].seconds)
        return next((one for one in near if one.in_nodes(hardware.devices_per_node)), fitting[0])
    least = min(found, key=lambda candidate: candidate.memory)
    lower = "lower rlhf.micro_batch_tokens"
    if config.takes_sequences:
        micro_batch = config.stage.micro_batch
        lower = f"lower stage.micro_batch={micro_batch}" if micro_batch > 1 else "shorten stage.seq_len"
    raise ConfigError(
        f"parallel.auto=true: no layout fits {USABLE:.0%} of hardware.memory_gib={memory_gib:g}; the smallest needs "
        f"{gib(least.memory)} ({describe(least)}): {lower}, or use more ranks"
    )


def table(config: Config, found: list[Candidate]) -> list[tuple[str, str, str, str]]:
    """(layout, step, memory, verdict) of the chosen candidate and the fastest others, one for each mesh."""
    chosen, rows, seen = best(config, found), [], set()
    for candidate in found:
        if candidate is not chosen and (candidate.layout in seen or candidate.layout == chosen.layout):
            continue
        if candidate is not chosen and len(rows) >= SHOWN - 1:
            continue
        seen.add(candidate.layout)
        verdict = "too much memory" if not candidate.fits(config.hardware.memory_gib) else "slower"
        rows.append(
            (
                describe(candidate),
                span(candidate.seconds),
                gib(candidate.memory),
                "chosen" if candidate is chosen else verdict,
            )
        )
    return rows


def describe(candidate: Candidate) -> str:
    """The settings of a candidate, for people."""
    parallel = candidate.parallel
    extras = [
        *(["sp"] if parallel.sp else []),
        *(
            []
            if parallel.activation_checkpointing == "none"
            else [f"checkpointing {parallel.activation_checkpointing}"]
        ),
        *([] if parallel.reshard_after_forward else ["no reshard"]),
        *(["reduce every micro-batch"] if parallel.reduce_every_micro_batch else []),
    ]
    return ", ".join([str(candidate.layout), *extras])


def _variants(config: Config, layout: Layout) -> Iterator[ParallelConfig]:
    """All settings for a layout, simplest first; keys that `config.parallel` sets explicitly are kept."""
    given = config.parallel
    if given.sp and layout.tp == 1:
        return
    reduces = layout.dp > 1 and gradients_add_up(config, layout)
    for checkpointing, sp, reshard, reduce in product(
        _open(given.activation_checkpointing, "none", ("none", "selective", "full")),
        _open(given.sp, False, (False, True) if layout.tp > 1 else (False,)),
        _open(given.reshard_after_forward, None, (True, False) if layout.dp_shard > 1 else (True,)),
        _open(given.reduce_every_micro_batch, False, (False, True) if reduces else (False,)),
    ):
        yield replace(
            given,
            auto=False,
            dp_replicate=layout.dp_replicate,
            dp_shard=layout.dp_shard,
            tp=layout.tp,
            sp=sp,
            activation_checkpointing=checkpointing,
            reshard_after_forward=reshard,
            reduce_every_micro_batch=reduce,
        )


def _open(given: Value, default: Value, choices: tuple[Value, ...]) -> tuple[Value, ...]:
    """`choices` for a key at its default, else the configured value."""
    return choices if given == default else (given,)
