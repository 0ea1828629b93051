"""A run without the launcher: rank 0 of `torchrun -m dist_lm.train stage=S ...` prepares the run here.

It composes, plans, compares settings and resolves the layout exactly as the launcher does, and takes the same locks. It
does not build earlier stages, start failed ranks again, or use Ray. docs/cluster.md lists the files that only the
launcher writes.
"""

import shlex
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace

from dist_lm.cluster.allocation import without_pool
from dist_lm.cluster.events import clear_failures
from dist_lm.cluster.node_facts import local_gpus
from dist_lm.config.root import Config
from dist_lm.errors import ConfigError, require
from dist_lm.prepare.compose import overrides_of
from dist_lm.prepare.conf_folders import with_config_dir
from dist_lm.prepare.layout import check_hardware, on_nodes, with_layout
from dist_lm.prepare.plan import Plan, PlannedStage, may_need, plan_command, untraced
from dist_lm.prepare.run import Ranks, begin_attempt, launch_lock, rank_lock
from dist_lm.stages.stage import Action, RunsIn, run_of
from dist_lm.stages.training.stage import training_stage
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.console import Console
from dist_lm.training.heartbeat import StopRequest


def prepare_stage(
    arguments: Sequence[str], ranks: Ranks, console: Console, stop: StopRequest, locks: ExitStack
) -> RunDirectory | None:
    """Plans the stage of a command line and writes `config.yaml` of its run; `result.json`, failures and heartbeats of
    earlier attempts go.

    Waits for the locks of the run. A finished run is reported on the console and left as it is.

    Args:
        arguments: `key=value` and `group=choice`, as for `dist_lm.launch`.
        stop: a request while waiting for the lock of the ranks ends the wait with ArtefactError.
        locks: receives the locks of the run, which rank 0 holds until it ends.

    Returns:
        The run; None if it is finished already.

    Raises:
        ConfigError: the command cannot run; names the key, or the command that makes what is missing.
        ArtefactError: another process works on the run, or files belong to something else or cannot be read.
        UserError: a package that is needed to read a model or tokenizer is not installed.
        OSError: a file cannot be written.
    """
    overrides = with_config_dir(arguments)
    plan = plan_command(overrides)
    planned = plan.target
    require_trainable(planned, overrides)
    if planned.action is Action.READY:
        console.line(f"stage={planned.name}: {planned.detail}; nothing is left to train")
        return None
    require_earlier(plan, overrides, ranks)
    if no_profile := untraced(planned):
        console.warning(no_profile)
    if warning := training_stage(planned.name).repetition(planned.config):
        console.warning(warning)

    given_keys = {override.partition("=")[0] for override in overrides}
    config = with_layout(on_these_ranks(planned.config, ranks, given_keys), ranks.per_node, console, planned.continued)

    run = run_of(config)
    try:
        run.create()
    except OSError as error:
        raise ConfigError(
            f"work_dir={config.work_dir}: cannot be written to ({error.strerror}); choose another"
        ) from error
    # No launcher may start ranks on the run, and no other rank 0 may train it.
    locks.enter_context(launch_lock(run))
    locks.enter_context(rank_lock(run, console.line, stopped=lambda: stop.requested))

    # Another command may have finished the run, or changed it, before the locks were taken.
    if planned.stage.look(planned.config, is_target=True, rebuilt=()).action is Action.READY:
        console.line(f"stage={planned.name}: another command has finished it")
        return None
    begin_attempt(config, run)
    clear_failures(run)
    # Heartbeats that a launcher wrote belong to an earlier attempt.
    run.live.unlink(missing_ok=True)
    console.line(f"stage={planned.name}: {planned.detail}; {ranks.world_size} ranks, {run.path}")
    return run


def require_trainable(planned: PlannedStage, overrides: Sequence[str]) -> None:
    """Refuses stages and keys that only the launcher can serve; else it does nothing.

    Raises:
        ConfigError: the stage does not train, a dry run, or actors; names the key and the command of the launcher.
    """
    launcher = f"`{shlex.join(['python', '-m', 'dist_lm.launch', *overrides])}`"
    config = planned.config
    if planned.stage.runs_in is not RunsIn.RANKS:
        raise ConfigError(f"stage={planned.name}: expected a stage that trains on ranks; or give {launcher}")
    if config.dry_run:
        raise ConfigError(f"dry_run=true: expected false: only the launcher plays steps; give {launcher}")
    if config.pool and config.pool.actors:
        raise ConfigError(
            f"{config.pool.key}.actors={config.pool.actors}: expected 0, as actors need Ray, which only the launcher "
            f"starts: {without_pool(config.pool)}; or give {launcher}"
        )


def require_earlier(plan: Plan, overrides: Sequence[str], ranks: Ranks) -> None:
    """Refuses to train while the output of an earlier stage is missing; else it does nothing.

    Raises:
        ConfigError: gives the commands that build the missing stages.
    """
    missing = [planned for planned in plan.stages[:-1] if planned.action is not Action.READY]
    if not missing:
        return

    # The launcher builds what its stage needs on the way, so the last one of these stages is enough.
    built_on_the_way = {
        need for planned in missing if planned.stage.runs_in is RunsIn.LAUNCHER for need in may_need(planned.name)
    }
    commands = []
    for planned in missing:
        if planned.name in built_on_the_way:
            continue
        program = ["python", "-m", "dist_lm.launch"]
        if planned.stage.runs_in is RunsIn.RANKS:
            program = ["torchrun", "--nproc-per-node", str(ranks.per_node), "-m", "dist_lm.train"]
        commands.append(shlex.join([*program, *overrides_of(planned.name, plan.target.name, overrides)]))
    names = ", ".join(planned.name for planned in missing)
    raise ConfigError(f"stage={plan.target.name} needs {names} first: run `{'`, then `'.join(commands)}`")


def on_these_ranks(config: Config, ranks: Ranks, given_keys: Collection[str]) -> Config:
    """Returns `config` with the device of this machine, and the nodes and ranks that torchrun has started.

    `device` is cuda if this machine has a GPU and the configuration does not say cpu, else cpu; it is never auto.

    Args:
        given_keys: keys that the command sets; only these must agree with torchrun.

    Raises:
        ConfigError: a key asks for another device or number of ranks, there are more ranks than GPUs, or parallel=auto
            plans for another kind of device.
    """
    for key, requested, started, option in (
        ("cluster.nodes", config.cluster.nodes, ranks.nodes, "--nnodes"),
        ("cluster.ranks_per_node", config.cluster.ranks_per_node, ranks.per_node, "--nproc-per-node"),
    ):
        require(
            key not in given_keys or requested == started, key, requested, f"{started}, as torchrun was told ({option})"
        )

    gpus = 0 if config.device == "cpu" else local_gpus()
    require(gpus > 0 or config.device != "cuda", "device", config.device, "cpu or auto: no GPU here")
    accepted = f"at most {gpus}, one for each GPU of this node; or device=cpu"
    require(not gpus or ranks.per_node <= gpus, "--nproc-per-node", ranks.per_node, accepted)

    cluster = replace(on_nodes(config, ranks.nodes).cluster, ranks_per_node=ranks.per_node)
    config = replace(config, device="cuda" if gpus else "cpu", cluster=cluster)
    check_hardware(config)
    return config
