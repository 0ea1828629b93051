"""`python -m dist_lm.launch stage=S [group=choice] [key=value]`: compose, plan the stages, run them, show progress.

Exit codes: 0 everything asked for is there; 1 a stage failed; 2 something the user can mend (one line says what);
75 nodes are missing, 130, 143 or 138 stopped by Ctrl-C, TERM or USR1 after a checkpoint: the
same command continues.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Literal

from dist_lm.cluster.allocation import ranks_per_node_with_pool
from dist_lm.cluster.node_facts import local_gpus
from dist_lm.cluster.ray_cluster import Node
from dist_lm.config.root import Config
from dist_lm.errors import ArtefactError, ConfigError, UserError, require
from dist_lm.launcher.process import disk_trouble, run_program
from dist_lm.prepare.compose import (
    compose_config,
    default_stage,
    for_hydra,
    overrides_of,
    register_schema,
    target_stage,
)
from dist_lm.prepare.conf_folders import KEY, conf_directory, search_path, with_config_dir
from dist_lm.prepare.plan import (
    Plan,
    PlannedStage,
    check_stage_prefixes,
    plan_command,
    untraced,
    with_command_file,
)
from dist_lm.stages.registry import stage_named
from dist_lm.stages.stage import PHASE_COLUMNS, RunsIn
from dist_lm.storage.process import cores
from dist_lm.tracking.console import Console
from dist_lm.tracking.readable import readable_count, say

if TYPE_CHECKING:
    from dist_lm.cluster.ray_cluster import RayCluster
    from dist_lm.launcher.pipeline import Pipeline
    from dist_lm.launcher.process import Interrupt

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
SMALLEST_FILE_LIMIT = 1 << 30  # bytes; Ray maps shared memory as files, and checkpoints and shards are large
VIEWS = ("--cfg", "-c", "--info", "-i")  # flags with which Hydra shows the composed configuration
HELP = ("--help", "-h")
HYDRA_FLAGS = (*VIEWS, *HELP, "--hydra-help", "--version", "--shell-completion", "-sc")


def main() -> None:
    """Entry point of `python -m dist_lm.launch` and `dist-lm-launch`."""
    run_program(launch, lambda text: Console().error(text))


def launch() -> None:
    """Does what the command line asks for.

    Raises:
        SystemExit: with the exit code of the command, see the module; not after a view of the configuration.
        UserError: the command cannot run.
        OSError: a file cannot be read.
        RuntimeError: a step of the dry run failed.
    """
    console = Console()
    try:
        arguments = with_config_dir(sys.argv[1:])
        if any(argument.split("=")[0] in HYDRA_FLAGS for argument in arguments):
            show_configuration(arguments)
            return
        sys.exit(run_command(arguments, console))
    except KeyboardInterrupt:
        console.error("interrupted")
        sys.exit(128 + signal.SIGINT)


def show_configuration(arguments: list[str]) -> None:
    """Prints the help, or Hydra's own views of the configuration: --cfg job, --info, shell completion, for which it
    changes sys.argv.

    Raises:
        ConfigError: the configuration cannot be composed.
        ArtefactError: the snapshot of a model or tokenizer cannot be read.
        UserError: a package that is needed to read a model or tokenizer is not installed.
        SystemExit: Hydra refuses an argument, and has printed why.
        OSError: a file cannot be read.
    """
    if any(argument in HELP for argument in arguments):
        from dist_lm.prepare.usage import usage

        say(usage(arguments))
        return
    import hydra

    arguments = with_command_file(arguments)
    arguments_of_hydra, target = list(arguments), default_stage()
    if any(argument.split("=")[0] in VIEWS for argument in arguments):
        overrides = [argument for argument in arguments if not argument.startswith("-") and "=" in argument]
        if any(override.startswith("stage=") for override in overrides):
            target = target_stage(overrides)
        check_stage_prefixes(overrides, target)
        # Refuses in one line what Hydra does in many.
        config = compose_config(overrides_of(target, target, overrides))

        # Hydra composes again. It does not know what `compose_config` adds: names and what follows from a tokenizer.
        of_target = [text for text in overrides_of(target, target, overrides) if not text.startswith(f"{KEY}=")]
        folders = [text for text in overrides if text.startswith(f"{KEY}=")]
        arguments_of_hydra = [argument for argument in arguments if argument not in overrides] + ["--resolve"]
        arguments_of_hydra += [*search_path(overrides), *for_hydra(of_target, stage_named(target).schema, folders)]
        arguments_of_hydra += [f"model.name={config.model.name}", f"corpus.name={config.corpus.name}"]

    # Hydra only prints: the function that it could call does nothing.
    register_schema(stage_named(target).schema)
    sys.argv[1:] = arguments_of_hydra
    hydra.main(config_path=str(conf_directory()), config_name="config", version_base="1.3")(lambda config: None)()


def run_command(overrides: Sequence[str], console: Console) -> int:
    """Plans what `overrides` ask for, prints the plan, and carries it out: creates the work directory and runs the
    stages that are missing. Returns the exit code of the module. A dry run prints its estimates, writes nothing and
    returns 0.

    Raises:
        ConfigError: the command line is wrong, a layout does not fit, or work_dir cannot be written to.
        ArtefactError: existing files were made with other settings or are damaged, or the disk is full.
        ClusterError: the cluster cannot be joined. A shortage of nodes is exit code 75 instead.
        UserError: a package or a server that a stage needs is missing.
        RuntimeError: a step of the dry run failed.
        OSError: a file cannot be read.
    """
    plan = plan_command(overrides)
    config = plan.target.config
    check_layouts(plan, config.dry_run)
    # A plan is shown only if nothing in it is refused.
    no_profile = untraced(plan.target)
    show_plan(plan, console)
    if config.dry_run:
        warn_of_repetition(plan, console)
    if no_profile:
        console.warning(no_profile)
    if config.dry_run:
        describe_steps(plan, console)
        return 0
    check_writable(Path(config.work_dir))
    return carry_out(plan, console)


def check_layouts(plan: Plan, dry_run: bool) -> None:
    """Refuses a layout or a batch that does not fit the ranks, if their number is known before the cluster is joined.

    Checks missing stages with `cluster=local`; for a dry run all stages, finished ones included, on the planned
    hardware.

    Raises:
        ConfigError: names the key and what would fit.
    """
    from dist_lm.prepare.layout import with_layout

    # A dry run plans for the hardware of its configuration, and plays stages that are finished, too.
    stages, ranks_of = plan.missing, ranks_here
    if dry_run:
        stages, ranks_of = plan.stages, ranks_planned
    for stage in stages:
        if stage.stage.runs_in is RunsIn.RANKS and (dry_run or stage.config.cluster.name == "local"):
            with_layout(stage.config, ranks_of(stage.config), before=stage.continued)


def check_writable(work_dir: Path) -> None:
    """Creates the work directory, and refuses one that cannot be made or written to, before anything starts. A limit on
    the size of files that the cluster cannot start with is refused too.

    Raises:
        ConfigError: names work_dir and the reason.
    """
    # Ray would wait a minute for processes that such a limit ends, and then give another reason.
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and limit < SMALLEST_FILE_LIMIT:
        raise ConfigError(
            f"work_dir={work_dir}: files may have at most {limit:,} bytes here (ulimit -f), expected "
            f"{SMALLEST_FILE_LIMIT:,} or more: raise the limit"
        )

    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        # Other commands may try at the same time.
        with NamedTemporaryFile(dir=work_dir, prefix=".writable."):
            pass
    except OSError as error:
        raise ConfigError(f"work_dir={work_dir}: cannot be written to ({error.strerror}); choose another") from error


def show_plan(plan: Plan, console: Console) -> None:
    """Prints the model and its size, and for each stage what is there and what will be built."""
    from dist_lm.model.size import parameter_count

    config = plan.target.config
    count = parameter_count(config.model)
    console.table(
        f"stage={plan.target.name} model={config.model.name} "
        f"({count:,} parameters, {readable_count(count)}) work_dir={config.work_dir}",
        ("stage", "plan", ""),
        [(stage.name, stage.action.value, stage.detail) for stage in plan.stages],
    )
    for stage in plan.stages:
        if stage.phases:
            console.table(f"phases of stage={stage.name}", PHASE_COLUMNS, stage.phases)


def warn_of_repetition(plan: Plan, console: Console) -> None:
    """Warns of corpora that a stage of the plan reads many times, as far as they are there. A stage that starts warns
    of its own."""
    for planned in plan.missing:
        if warning := planned.stage.repetition(planned.config):
            console.warning(warning)


def describe_steps(plan: Plan, console: Console) -> None:
    """The dry run: plays a step of every training stage without values, in processes of its own, and prints memory,
    messages and time. Of a stage with iterations it prints only the estimated memory.

    Raises:
        ConfigError: layout or batch do not fit the ranks.
        RuntimeError: a step failed; the message has the error output of its process.
    """
    from dist_lm.dry_run.iterations import memory_rows
    from dist_lm.dry_run.play import play_ranks, rows, summary
    from dist_lm.parallel.layout import Layout
    from dist_lm.prepare.layout import on_nodes_of, with_layout

    for stage in plan.stages:
        if stage.stage.runs_in is not RunsIn.RANKS:
            continue
        ranks = ranks_planned(stage.config)
        # The updates of stage rlhf depend on what the model answers, so they are estimated and not played.
        if not stage.config.takes_sequences:
            config = with_layout(stage.config, ranks, before=stage.continued)
            layout = Layout.recorded(config.parallel)
            title = f"dry run: {stage.name} on {layout.world_size} ranks, estimated (its iterations are not played)"
            console.table(title, ("", "memory"), memory_rows(stage.config, layout))
            continue

        config = on_nodes_of(with_layout(stage.config, ranks, console, stage.continued), ranks)
        layout = Layout.recorded(config.parallel)
        with console.waiting(f"playing a step of {stage.name}"):
            reports = play_ranks(config, layout)
        console.summary(f"dry run: {stage.name}", summary(config, layout, reports))
        title = "what a rank holds, and sends in a step (messages; it receives as much):"
        columns = ("", *(f"rank {report.rank}" for report in reports))
        console.table(title, columns, rows(config, layout, reports))
    console.line("nothing was started (dry_run=true)")


def ranks_planned(config: Config) -> int:
    """GPUs or ranks per node of the hardware that a dry run plans for, not of this machine.

    Raises:
        ConfigError: device=cuda on a machine without a GPU, or ranks and actors do not fit the nodes.
    """
    if config.hardware.device != "cuda":
        return ranks_here(config)
    return config.cluster.ranks_of_node(config.hardware.devices_per_node)


def ranks_here(config: Config) -> int:
    """Returns the ranks per node if the nodes are like this machine.

    Raises:
        ConfigError: device=cuda on a machine without a GPU, or ranks and actors do not fit the nodes.
    """
    gpus = 0 if config.device == "cpu" else local_gpus()
    is_local = config.cluster.name == "local"
    require(gpus > 0 or config.device != "cuda" or not is_local, "device", config.device, "cpu or auto: no GPU here")
    if config.pool:
        nodes = [Node("", "", cores(), local_gpus())] * config.cluster.nodes
        return ranks_per_node_with_pool(config.pool, config.cluster, nodes, gpus)
    return config.cluster.ranks_of_node(gpus)


def carry_out(plan: Plan, console: Console, verb: Sequence[str] = ()) -> int:
    """Runs the missing stages of a plan in order and prints the outcome. Returns the exit code, see the module; 2 also
    if the target stage rejects its own result.

    The queue of the command is recorded in the work directory, and locked until the end. Failed ranks or actors,
    missing nodes and signals become exit codes; other errors are recorded and pass.

    Args:
        verb: words of the `dist-lm` verb that has made the plan; empty: a launch has, with the settings of sys.argv.

    Raises:
        ArtefactError: the same command is already running, files do not fit or are damaged, or the disk is full.
        ConfigError: a stage refuses its settings.
        ClusterError: the cluster cannot be joined, or an agent does not start.
        UserError: a package or a server that a stage needs is missing.
        OSError: the lock file cannot be opened.
    """
    from dist_lm.cluster.events import GangFailure, PoolFailure
    from dist_lm.cluster.ray_cluster import first_line
    from dist_lm.cluster.recruit import NoNodesError
    from dist_lm.launcher.muster import NodesLostError
    from dist_lm.launcher.outcome import print_outcome, print_samples
    from dist_lm.launcher.pipeline import Pipeline, queue_of
    from dist_lm.launcher.process import Stopped, stopped_by_signals

    job = os.environ.get("SLURM_JOB_ID")
    config = plan.target.config
    title = f"{plan.target.name}  run {config.run_id} in {config.work_dir}"

    def end(pipeline: Pipeline, state: Literal["done", "failed", "stopped"], error: str = "") -> None:
        pipeline.end(state, error)
        print_outcome(plan, pipeline.stages, state, sys.argv, console, verb)

    with queue_of(plan, sys.argv, job, console.stage) as pipeline:
        try:
            with stopped_by_signals(), console.pipeline(title, pipeline.rows()):
                stopped_by = run_missing(plan, console, pipeline, job)

        except GangFailure as failure:
            end(pipeline, "failed", str(failure))
            # The message of a user error says what to mend; a traceback would hide it.
            if failure.traceback and not failure.user_error:
                console.details(failure.traceback)
            console.error(str(failure))
            return 2 if failure.user_error else 1
        except PoolFailure as failure:
            end(pipeline, "failed", str(failure))
            console.error(str(failure))
            return 1
        except (NodesLostError, NoNodesError) as shortage:
            end(pipeline, "stopped", str(shortage))
            console.error(str(shortage))
            return TRY_AGAIN

        except (Stopped, KeyboardInterrupt) as stop:
            stopped_by = getattr(stop, "number", signal.SIGINT)
            console.error(f"stopped at once by {signal.Signals(stopped_by).name}; the same command continues")

        except BaseException as error:
            # A full disk is for the user to mend, wherever it was noticed.
            disk_message = disk_trouble(
                error, f"work_dir={plan.target.config.work_dir} (or temporary files, or standard output)"
            )
            if disk_message:
                pipeline.end("failed", disk_message)
                raise ArtefactError(disk_message) from error
            pipeline.end("failed", str(error) if isinstance(error, UserError) else first_line(error))
            raise

        if stopped_by:
            end(pipeline, "stopped", f"by {signal.Signals(stopped_by).name}")
            return 128 + stopped_by

        # A stage can end without an error and still have produced nothing, such as stage generate without an answer.
        rejection = plan.target.stage.rejection(config)
        state = "failed" if rejection else "done"
        pipeline.end(state, rejection)

    print_samples(plan, console)
    plan.target.stage.summarize(config, console)
    print_outcome(plan, pipeline.stages, state, sys.argv, console, verb)
    if rejection:
        console.error(rejection)
        return 2
    return 0


def run_missing(plan: Plan, console: Console, pipeline: "Pipeline", job: str | None) -> int:
    """Builds what the plan says is missing, in order. Returns the number of the signal that stopped it, or 0.

    It records the begin and end of each stage in `pipeline`. The cluster is joined before the first stage that needs
    it, and left at the end. Errors of the stages pass through, see `build_artefact`, `run_training_stage` and
    `run_pool_stage`.

    Raises:
        ClusterError: the cluster cannot be joined.
        Stopped, KeyboardInterrupt: a signal came before the cluster was joined, where the caller has set handlers.
        ConfigError: a layout, batch, device or hardware group does not fit the nodes.
    """
    from dist_lm.cluster.ray_cluster import connect
    from dist_lm.launcher.pipeline import build_artefact
    from dist_lm.launcher.process import left_at_once, watch_signals

    on_cluster = [stage for stage in plan.missing if stage.stage.runs_in in (RunsIn.RANKS, RunsIn.POOL)]
    n_before = next((n for n, stage in enumerate(plan.missing) if stage in on_cluster), len(plan.missing))

    # Stages before the first one on the cluster are built before it is joined, so that no node is reserved meanwhile.
    if n_before and on_cluster and on_cluster[0].config.cluster.name == "ray":
        check_on_cluster(on_cluster)
    for stage in plan.missing[:n_before]:
        pipeline.begin(stage.name)
        pipeline.done(stage.name, build_artefact(stage, console))
    if not on_cluster:
        return 0

    then = "stopping"
    if on_cluster[-1].stage.runs_in is RunsIn.RANKS:
        then = "writing a checkpoint, then stopping"
    with connect(on_cluster[0].config.cluster) as cluster, watch_signals(console, then) as interrupt:
        for stage in plan.missing[n_before:]:
            pipeline.begin(stage.name)
            is_done, detail = False, ""
            if stage in on_cluster and not interrupt.requested:
                run_stage = runner_of(stage.stage.runs_in)
                is_done = run_stage(stage, cluster, console, interrupt, job)
            elif not interrupt.requested:
                # A part that is left unfinished is built again by the next command.
                with left_at_once(interrupt, console):
                    detail = build_artefact(stage, console)
                    is_done = True
            if not is_done:
                start = stage.progress
                console.line(f"stopped in stage {stage.name}; the same command continues from {start}")
                return interrupt.number
            pipeline.done(stage.name, detail)
    return 0


def runner_of(place: RunsIn) -> "Callable[[PlannedStage, RayCluster, Console, Interrupt, str | None], bool]":
    """Returns the function that runs a stage on the cluster; it returns whether the stage is done."""
    if place is RunsIn.POOL:
        # It imports torch, which takes seconds that a stage of ranks need not wait.
        from dist_lm.launcher.pool_run import run_pool_stage

        return run_pool_stage

    from dist_lm.launcher.stage_run import run_training_stage

    return run_training_stage


def check_on_cluster(stages: Sequence[PlannedStage]) -> None:
    """Joins the cluster for a moment: refuses address, token or layout before hours are spent on the corpora.

    Raises:
        ClusterError: the Ray cluster cannot be joined.
        ConfigError: a layout, batch, device or hardware group does not fit the nodes that it has now.
    """
    from dist_lm.cluster.ray_cluster import connect
    from dist_lm.launcher.stage_run import fitted

    with connect(stages[0].config.cluster) as cluster:
        for stage in stages:
            if stage.stage.runs_in is RunsIn.RANKS:
                fitted(stage, cluster)


if __name__ == "__main__":
    main()
