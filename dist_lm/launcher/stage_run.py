"""One training stage on a gang: prepared, started, followed, and stopped with a checkpoint when asked to."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from dist_lm.cluster.gang import Gang, GangStatus
from dist_lm.cluster.ranks import ranks_per_node
from dist_lm.cluster.ray_cluster import RayCluster
from dist_lm.config import Config, require
from dist_lm.config_file import save_config
from dist_lm.errors import ArtefactError
from dist_lm.launcher.interrupt import Interrupt
from dist_lm.launcher.layout_choice import check_hardware, with_layout
from dist_lm.launcher.plan import PlannedStage, run_of
from dist_lm.run_directory import RunDirectory
from dist_lm.run_lock import locked
from dist_lm.tracking.console import Console
from dist_lm.tracking.metrics import follow
from dist_lm.tracking.rank_warnings import WarningFollower
from dist_lm.tracking.wandb_run import WandbRun
from dist_lm.training import checkpoint_files

POLL_S = 0.2


def run_training_stage(stage: PlannedStage, cluster: RayCluster, console: Console, interrupt: Interrupt) -> bool:
    """Run a stage to its end. Returns False when it was stopped by `interrupt`.

    Raises:
        ConfigError: the layout does not fit the ranks that the cluster gives.
        GangFailure: a rank or a node failed.
        ArtefactError: the ranks left without a result although nobody asked them to stop.
    """
    device, ranks = device_and_ranks(stage.config, cluster)
    config, run = replace(stage.config, device=device), run_of(stage.config)
    check_hardware(config)
    config = with_layout(config, ranks, console)
    run.create()
    with ExitStack() as stack:
        stack.enter_context(locked(run.launch_lock))
        save_config(config, run.config)
        warnings = WarningFollower(run.warnings)
        progress = stack.enter_context(console.training(stage.info.name, config.stage.steps, since=time.time()))
        wandb = start_wandb(config, run, console)
        if wandb:
            stack.callback(wandb.finish)
        metrics = follow(run.metrics)
        gang = stack.enter_context(
            Gang.start(cluster, run, nodes=config.cluster.nodes, ranks_per_node=ranks, device=device)
        )

        def show() -> None:
            for warning in warnings.poll():
                console.warning(warning)
            for line in metrics.poll():
                progress.update(line)
                if wandb:
                    wandb.log(line["step"], line)

        status = follow_gang(gang, show, interrupt, config.cluster.stop_timeout_s)
    if status.failure:
        raise status.failure
    if run.result.exists():
        return True
    if status.state == "stopped":
        console.warning(
            f"the ranks did not stop within cluster.stop_timeout_s={config.cluster.stop_timeout_s:g} s and were ended"
        )
    if interrupt.requested:
        return False
    raise ArtefactError(f"{run.path}: every rank left with exit code 0 but without {run.result.name}; see {run.logs}")


def follow_gang(gang: Gang, show: Callable[[], None], interrupt: Interrupt, stop_timeout_s: float) -> GangStatus:
    """Show what the ranks write until they are gone; pass a stop on once, and insist after a while."""
    asked_at: float | None = None
    while True:
        status = gang.poll()
        show()
        if status.state != "running":
            return status
        if interrupt.requested and asked_at is None:
            gang.interrupt()
            asked_at = time.monotonic()
        if asked_at is not None and time.monotonic() - asked_at > stop_timeout_s:
            gang.stop()
        time.sleep(POLL_S)


def newest_checkpoint(config: Config) -> str:
    """What the next command continues from, for people."""
    run = run_of(config)
    latest = checkpoint_files.read_pointer(run.checkpoints, checkpoint_files.LATEST)
    return latest.name if latest else "the start of the stage, it has no checkpoint yet"


def device_and_ranks(config: Config, cluster: RayCluster) -> tuple[str, int]:
    """(cpu or cuda, ranks a node): by what `device` asks for and what every node of the cluster has."""
    gpus = 0 if config.device == "cpu" else min(node.gpus for node in cluster.nodes())
    require(
        gpus > 0 or config.device != "cuda", "device", config.device, "cpu or auto: a node of the cluster has no GPU"
    )
    return ("cuda" if config.device == "cuda" or gpus else "cpu"), ranks_per_node(config.cluster, gpus)


def start_wandb(config: Config, run: RunDirectory, console: Console) -> WandbRun | None:
    """The wandb copy of the run, unless tracking=none."""
    return WandbRun.start(
        asdict(config),
        run,
        config.tracking,
        job_type=config.stage.name,
        group=config.run_id,
        git_commit=git_commit(),
        command=sys.argv,
        environ=os.environ,
        console=console,
    )


def git_commit() -> str | None:
    """The commit of the checkout this package runs from, with `-dirty` where it was changed; None without git."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
