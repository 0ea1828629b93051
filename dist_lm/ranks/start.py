"""What every training stage begins and ends with on a rank: the other ranks, the mesh, the corpora, the result."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dist_lm.config.corpus import SPLITS
from dist_lm.config.root import Config
from dist_lm.data.manifest import read_manifest
from dist_lm.data.mapped import MappedCorpus
from dist_lm.model.size import parameter_count
from dist_lm.parallel.layout import Layout, check_batch, resolve_layout
from dist_lm.parallel.mesh import World, build_mesh, measure_all_reduce, process_group
from dist_lm.storage import durable
from dist_lm.storage.lock import OWN_JOB_S, locked
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tracking.metrics import MetricsWriter, read_metrics
from dist_lm.training import checkpoint_files
from dist_lm.training.heartbeat import Heartbeat, Phase, StopRequest
from dist_lm.training.state import TrainState

log = logging.getLogger(__name__)

COLLECTIVE_MARGIN_S = 300.0


@dataclass(frozen=True)
class RankStart:
    """A rank that has met the others."""

    world: World
    layout: Layout
    mesh: DeviceMesh
    tokenizer: Tokenizer


@contextmanager
def started(run: RunDirectory, config: Config, stop: StopRequest, heartbeat: Heartbeat) -> Iterator[RankStart]:
    """Join the ranks for the time of the block (collective)."""
    # those that wait for a rank that hangs must not give up before it is found
    patience = max(config.cluster.hang_otherwise_s, config.cluster.hang_min_s) + COLLECTIVE_MARGIN_S
    with process_group(config.device, patience) as world, ExitStack() as stack:
        layout = resolve_layout(config.parallel, config.model, world.size)
        check_batch(config, layout)
        mesh = build_mesh(layout, world.device)
        heartbeat.beat(Phase.LINKS, 0)
        links = measure_all_reduce(world)
        heartbeat.beat(Phase.LOADING, 0)
        if world.is_first:
            # ranks of an attempt that has just failed take a moment to end, and their node's locks on NFS longer
            stack.enter_context(
                locked(
                    run.rank_lock,
                    wait_s=OWN_JOB_S,
                    on_wait=lambda owner: log.warning("waiting for %s, which trains this run", owner),
                    stopped=lambda: stop.requested,
                )
            )
            durable.write_json(run.links, asdict(links))
        yield RankStart(world, layout, mesh, Tokenizer.load(run.work.tokenizer_model))


def check_corpora(run: RunDirectory, config: Config, tokenizer: Tokenizer, world: World) -> None:
    """Refuse shards that were written with another tokenizer (collective).

    The first rank opens the corpora before the others, so that an index that has to be rebuilt is rebuilt once.
    """
    for name in config.streams:
        directory = run.work.corpus(name)
        read_manifest(directory).require_tokenizer(tokenizer.sha256, directory)
        if world.is_first:
            for split in SPLITS:
                MappedCorpus.open(directory, split)
    dist.barrier()


def open_metrics(run: RunDirectory, world: World, state: TrainState) -> MetricsWriter | None:
    """The metrics file, on the first rank; what an attempt wrote after its last checkpoint is taken back."""
    if not world.is_first:
        return None
    writer = MetricsWriter(run.metrics)
    writer.truncate_after(state.step)
    return writer


def write_success(
    run: RunDirectory,
    config: Config,
    *,
    steps: int,
    tokens: int,
    seconds: float,
    metrics: Mapping[str, float | None],
    more: Mapping[str, Any],
) -> None:
    """Write `result.json`.

    Args:
        metrics: those of the last step.
        more: what the stage adds of its own.
    """
    latest = checkpoint_files.read_pointer(run.checkpoints, checkpoint_files.LATEST)
    durable.write_json(
        run.result,
        {
            "stage": config.stage.name,
            "run_id": config.run_id,
            "steps": steps,
            "tokens": tokens,
            "parameters": parameter_count(config.model),
            "ranks": int(os.environ["WORLD_SIZE"]),
            "seconds": seconds,
            "checkpoint": latest.name if latest else None,
            "metrics": metrics,
            "before": metrics_of_step(run, 0),
            **more,
        },
    )


def metrics_of_step(run: RunDirectory, step: int) -> dict[str, float | None]:
    """All metrics of one step; none where nothing was written then."""
    metrics = {}
    for line in read_metrics(run.metrics):
        if line["step"] == step:
            metrics |= {key: value for key, value in line.items() if key not in ("step", "time")}
    return metrics
