"""One training stage to its end: gangs, one after the other if need be, each from the last checkpoint."""

import statistics
from contextlib import ExitStack
from dataclasses import replace

from dist_lm.cluster.allocation import ranks_beside, ranks_per_node
from dist_lm.cluster.failure import NODE_LOST, GangFailure
from dist_lm.cluster.gang import GangStatus
from dist_lm.cluster.ray_cluster import RayCluster
from dist_lm.config.cluster import ClusterConfig
from dist_lm.config.root import Config, save_config
from dist_lm.errors import ArtefactError, require
from dist_lm.launcher.attempts import Attempts, Restarts
from dist_lm.launcher.interrupt import Interrupt
from dist_lm.launcher.layout_choice import check_hardware, on_nodes, sizes, with_layout
from dist_lm.launcher.muster import Muster
from dist_lm.launcher.pipeline import LOOK_S
from dist_lm.launcher.plan import PlannedStage
from dist_lm.launcher.watch import RunWatch, watching
from dist_lm.stages.stage import run_of
from dist_lm.storage.lock import OWN_JOB_S, locked
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.console import Console
from dist_lm.tracking.redact import redact_text
from dist_lm.training import checkpoint_files


def run_training_stage(
    stage: PlannedStage, cluster: RayCluster, console: Console, interrupt: Interrupt, job: str | None = None
) -> bool:
    """Run a stage to its end, over failures of ranks and nodes. Returns False when it was stopped by `interrupt`.

    Args:
        job: of the batch system, that this process belongs to.

    Raises:
        ConfigError: the layout does not fit the ranks that the cluster gives.
        ClusterError: there are not enough nodes that are fit.
        GangFailure: a rank or a node failed, and failed again without a new checkpoint, cluster.max_restarts times.
        ArtefactError: the ranks left without a result although nobody asked them to stop.
    """
    config, ranks = fitted(stage.config, cluster)
    device, run = config.device, run_of(config)
    possible = sizes(config, ranks)
    first = with_layout(config, ranks, console)
    run.create()
    with ExitStack() as stack:
        stack.enter_context(locked(run.launch_lock, job=job, wait_s=LOOK_S))
        await_other_ranks(run, console, interrupt)
        if interrupt.requested:
            return False
        save_config(first, run.config)
        muster = Muster(
            cluster,
            config,
            possible,
            gpus_per_node=ranks if device == "cuda" else 0,
            directory=run.path,
            interrupt=interrupt,
            console=console,
        )
        watch = stack.enter_context(watching(first, run, console))
        attempts = Attempts(run, ranks, device, config.cluster, muster, interrupt, watch)
        return run_attempts(stage, attempts, muster, {possible[0]: first}, config, run, console, interrupt, watch)


def fitted(config: Config, cluster: RayCluster) -> tuple[Config, int]:
    """(the configuration with its device, ranks a node) for the nodes that a cluster has.

    Raises:
        ConfigError: the layout, the batch or the hardware's table do not fit.
    """
    device, ranks = device_and_ranks(config, cluster)
    config = replace(config, device=device)
    check_hardware(config)
    with_layout(config, ranks)
    return config, ranks


def await_other_ranks(run: RunDirectory, console: Console, interrupt: Interrupt) -> None:
    """Wait for ranks that train this run already: of an earlier launch, about to end, or started by hand.

    Raises:
        ArtefactError: they do not end; the message names host and process.
    """

    def tell(owner: str) -> None:
        console.line(f"waiting for the ranks of {owner}, which train {run.path}")

    try:
        with locked(run.rank_lock, wait_s=OWN_JOB_S, on_wait=tell, stopped=lambda: interrupt.requested):
            pass
    except ArtefactError:
        if not interrupt.requested:
            raise


def run_attempts(
    stage: PlannedStage,
    attempts: Attempts,
    muster: Muster,
    config_of: dict[int, Config],
    config: Config,
    run: RunDirectory,
    console: Console,
    interrupt: Interrupt,
    watch: RunWatch,
) -> bool:
    """Attempt after attempt until one leaves a result; see `run_training_stage`.

    Args:
        config_of: with its layout, by the number of nodes, where it is known.
    """
    restarts = Restarts(config.cluster.max_restarts, checkpoint_files.newest_step(run.checkpoints))
    journal, target = attempts.journal, None
    while crew := muster.call(restarts.suspects, target):
        nodes = len(crew.hosts)
        if nodes not in config_of:
            config_of[nodes] = with_layout(on_nodes(config, nodes), attempts.ranks_per_node, console)
        outcome = attempts.run(config_of[nodes], crew)
        target, failure = outcome.grow_to, outcome.status.failure
        if run.result.exists():
            journal.write("finished", steps=config.stage.steps)
            return True
        if failure:
            place = crew.placement.nodes[failure.node] if failure.node is not None else None
            restarts = restarts.after_failure(
                checkpoint_files.newest_step(run.checkpoints), place.address if place else None
            )
            if place and failure.type == NODE_LOST:
                muster.lose(place.id)
            journal.write("failed", **record_of(failure, restarts))
            if failure.user_error or (restarts.left < 0 and not interrupt.requested):
                raise failure
        if interrupt.requested:
            report_stop(outcome.status, config.cluster, console)
            break
        if failure:
            watch.restarts(failure)
            console.warning(f"{failure}; going on from {stage.progress}, restarts left: {restarts.left}")
        elif checkpoint_files.newest_step(run.checkpoints) > outcome.step:
            console.warning(f"the ranks were asked to stop by others; going on from {stage.progress}")
        elif target is None:
            raise ArtefactError(
                f"{run.path}: every rank left with exit code 0 but without {run.result.name}; see {run.logs}"
            )
    journal.write("stopped", signal=interrupt.number)
    return False


def record_of(failure: GangFailure, restarts: Restarts) -> dict[str, object]:
    """A failure as the journal keeps it."""
    return {
        "error": redact_text(str(failure)),
        "type": failure.type,
        "rank": failure.rank,
        "host": failure.host,
        "restarts_left": max(0, restarts.left),
    }


def report_stop(status: GangStatus, config: ClusterConfig, console: Console) -> None:
    """Say how ranks that were asked to stop did not do so in good order."""
    if status.failure:
        console.warning(f"while stopping: {status.failure}")
    if status.state == "stopped":
        console.warning(
            f"the ranks did not stop within cluster.stop_timeout_s={config.stop_timeout_s:g} s and were ended"
        )


def device_and_ranks(config: Config, cluster: RayCluster) -> tuple[str, int]:
    """(cpu or cuda, ranks a node): by what `device` asks for and what most nodes of the cluster have."""
    found = [node.gpus for node in cluster.nodes() if node.gpus and config.device != "cpu"]
    gpus = statistics.mode(found) if found else 0  # a node that has fewer is left out
    require(gpus > 0 or config.device != "cuda", "device", config.device, "cpu or auto: the cluster has no GPU")
    device = "cuda" if config.device == "cuda" or gpus else "cpu"
    if config.pool:
        return device, ranks_beside(config.pool, config.cluster, cluster.nodes(), gpus)
    return device, ranks_per_node(config.cluster, gpus)
