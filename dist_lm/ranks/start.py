"""What every training stage begins with on a rank: the other ranks, the mesh, the lock of the run, the tokenizer."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

from torch.distributed.device_mesh import DeviceMesh

from dist_lm.config.root import Config
from dist_lm.parallel.layout import Layout, check_batch, resolve_layout
from dist_lm.parallel.mesh import World, build_mesh, measure_all_reduce, process_group
from dist_lm.storage import durable
from dist_lm.storage.lock import OWN_JOB_S, locked
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training.heartbeat import Heartbeat, Phase, StopRequest

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
