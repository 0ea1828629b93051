"""Runs a training stage to its end, in attempts. An attempt is one gang of ranks.

After a failure the next attempt continues from the newest checkpoint.
"""

import statistics
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from dist_lm.cluster.allocation import core_users, ranks_per_node_with_pool
from dist_lm.cluster.events import NODE_LOST, GangFailure, Journal
from dist_lm.cluster.gang import Gang, GangStatus
from dist_lm.cluster.heartbeat import Patience
from dist_lm.cluster.ray_cluster import RayCluster
from dist_lm.cluster.recruit import Crew
from dist_lm.config.cluster import ClusterConfig
from dist_lm.config.root import Config, save_config
from dist_lm.errors import ArtefactError, require
from dist_lm.launcher.muster import Muster
from dist_lm.launcher.process import Interrupt
from dist_lm.launcher.watch import RunWatch, watching
from dist_lm.parallel.layout import Layout
from dist_lm.prepare.layout import check_hardware, on_nodes, sizes, with_layout
from dist_lm.prepare.plan import PlannedStage
from dist_lm.prepare.run import begin_attempt, launch_lock, rank_lock
from dist_lm.stages.stage import PHASE_COLUMNS, Action, run_of
from dist_lm.stages.training.stage import training_stage
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.console import Console
from dist_lm.tracking.live_state import GangFacts
from dist_lm.tracking.redact import redact_text
from dist_lm.training import checkpoint_files

POLL_S = 0.2
GROW_EVERY_S = 2.0
BLAMED_TWICE = 2


@dataclass(frozen=True)
class Restarts:
    """Counts failures in a row without a new checkpoint in between."""

    limit: int
    step: int  # newest checkpoint at the last failure, or at the start of the launch
    failures: int = 0
    blamed: Counter[str] = field(default_factory=Counter)  # node address -> failures that began there

    def after_failure(self, step: int, address: str | None) -> "Restarts":
        """Returns the counts after one more failure; they begin anew if there is another newest checkpoint than at the
        last one.

        Args:
            step: step of the newest checkpoint now.
            address: node where the failure began; None: unknown.
        """
        blamed = Counter([address] if address else [])
        # Lower if a damaged checkpoint was skipped.
        if step != self.step:
            return replace(self, step=step, failures=1, blamed=blamed)
        return replace(self, failures=self.failures + 1, blamed=self.blamed + blamed)

    @property
    def left(self) -> int:
        """Remaining restarts; negative: the limit is exceeded."""
        return self.limit - self.failures

    @property
    def suspects(self) -> frozenset[str]:
        """Addresses of nodes where failures recur. They are used only if there are no other nodes."""
        return frozenset(address for address, count in self.blamed.items() if count >= BLAMED_TWICE)


@dataclass(frozen=True)
class Outcome:
    """The end of an attempt."""

    status: GangStatus
    step: int  # checkpoint that the attempt began from
    grow_to: int | None = None  # number of nodes for the next attempt, if this one was stopped to grow


@dataclass
class Attempts:
    """Starts gangs on the same run, one at a time, and follows each to its end."""

    stage: PlannedStage
    config: Config  # as `fitted` returns it, without a layout: each attempt resolves one for its number of nodes
    ranks_per_node: int
    muster: Muster
    watch: RunWatch
    console: Console
    interrupt: Interrupt
    count: int = 0

    def __post_init__(self) -> None:
        self.run = run_of(self.config)
        self.journal = Journal(self.run)

    def until_done(self, config_of: dict[int, Config]) -> bool:
        """Makes attempts until one leaves a result (True) or a signal stops the run (False), and writes the journal.

        Args:
            config_of: number of nodes -> configuration with a resolved layout, where known; further ones are added.

        Raises:
            ConfigError: no layout fits the number of nodes that are left.
            ClusterError: too few nodes are available or fit.
            GangFailure: no restart helps, or none is left.
            ArtefactError: the ranks ended without a result or a new checkpoint, or a line of metrics is damaged.
        """
        restarts = Restarts(self.config.cluster.max_restarts, checkpoint_files.newest_step(self.run.checkpoints))
        nodes_wanted = None
        while crew := self.muster.call(restarts.suspects, nodes_wanted):
            # An attempt with as many nodes as an earlier one takes the same layout.
            nodes = len(crew.hosts)
            if nodes not in config_of:
                config_of[nodes] = with_layout(
                    on_nodes(self.config, nodes), self.ranks_per_node, self.console, self.stage.continued
                )
            outcome = self.attempt(config_of[nodes], crew)
            nodes_wanted = outcome.grow_to

            if self.run.result.exists():
                self.journal.write("finished", steps=self.config.stage.steps)
                return True
            failure = outcome.status.failure
            if failure:
                restarts = self._counted(failure, crew, restarts)
            if self.interrupt.requested:
                report_stop(outcome.status, self.config.cluster, self.console)
                break
            self._report_next(outcome, restarts)

        self.journal.write("stopped", signal=self.interrupt.number)
        return False

    def _counted(self, failure: GangFailure, crew: Crew, restarts: Restarts) -> Restarts:
        """Returns the counts after a failure, which is written to the journal. A lost node is left out from now on.

        Raises:
            GangFailure: no restart helps; or none is left, unless a stop was requested.
        """
        address = None
        if failure.node is not None:
            node = crew.placement.nodes[failure.node]
            address = node.address
            if failure.type == NODE_LOST:
                self.muster.lose(node.id)

        restarts = restarts.after_failure(checkpoint_files.newest_step(self.run.checkpoints), address)
        self.journal.write(
            "failed",
            error=redact_text(str(failure)),
            type=failure.type,
            rank=failure.rank,
            host=failure.host,
            restarts_left=max(0, restarts.left),
        )

        # If a stop was requested, no restart follows, so the failure is only reported.
        if failure.user_error or (restarts.left < 0 and not self.interrupt.requested):
            raise failure
        return restarts

    def _report_next(self, outcome: Outcome, restarts: Restarts) -> None:
        """Says on the console why another attempt follows, and alerts wandb after a failure.

        Raises:
            ArtefactError: there is no reason for another attempt: it would do the same again.
        """
        failure, checkpoint = outcome.status.failure, self.stage.progress
        if failure:
            self.watch.restarts(failure)
            self.console.warning(f"{failure}; continuing from {checkpoint}, restarts left: {restarts.left}")
        elif outcome.grow_to:
            report_stop(outcome.status, self.config.cluster, self.console)
            self.console.line(f"growing to {outcome.grow_to} nodes; continuing from {checkpoint}")
        elif checkpoint_files.newest_step(self.run.checkpoints) > outcome.step:
            self.console.warning(f"another process asked the ranks to stop; continuing from {checkpoint}")
        else:
            raise ArtefactError(
                f"{self.run.path}: every rank ended with exit code 0 but without {self.run.result.name}; see "
                f"{self.run.logs}"
            )

    def attempt(self, config: Config, crew: Crew) -> Outcome:
        """Writes the configuration, removes the heartbeats of the attempt before, starts a gang on `crew` and follows
        it to its end. Returns how it ended; failures of the gang, also at its start, are in the result.

        The crew is released at the end.

        Args:
            config: with a resolved layout for the nodes of `crew`.

        Raises:
            ArtefactError: a line of metrics is damaged.
        """
        self.count += 1
        # Heartbeats of the attempt before.
        self.run.live.unlink(missing_ok=True)
        start = checkpoint_files.newest_step(self.run.checkpoints)
        save_config(config, self.run.config)

        nodes = [
            {"host": host, "address": node.address} for host, node in zip(crew.hosts, crew.placement.nodes, strict=True)
        ]
        layout = Layout.recorded(config.parallel)
        self.journal.write(
            "started",
            attempt=self.count,
            nodes=nodes,
            ranks_per_node=self.ranks_per_node,
            device=config.device,
            layout=str(layout),
            step=start,
            slowest_link_mb_per_s=round(min(crew.link_rates) / 1e6) if crew.link_rates else None,
        )
        self.watch.attempt(GangFacts(tuple(crew.hosts), self.ranks_per_node, config.device, str(layout), self.count))

        cluster = config.cluster
        try:
            gang = Gang.start(
                crew,
                self.run,
                ranks_per_node=self.ranks_per_node,
                device=config.device,
                patience=Patience(cluster.hang_steps, cluster.hang_min_s, cluster.hang_otherwise_s),
                core_users=self._core_users(config, len(nodes)),
                drives_actors=bool(config.pool and config.pool.actors),
            )
        except GangFailure as failure:
            # Agents may fail before there is any rank; this attempt counts like the others.
            return Outcome(GangStatus("failed", failure), start)
        with gang:
            return self._follow(gang, crew, start)

    def _core_users(self, config: Config, nodes: int) -> int:
        """Processes among which the cores of a node are divided, if a pool of actors works beside the ranks."""
        if not config.pool:
            return 0
        return core_users(config.pool, nodes, self.ranks_per_node, self.muster.gpus_per_node)

    def _follow(self, gang: Gang, crew: Crew, start: int) -> Outcome:
        """Follows the gang until it ends, with journal, console and wandb. Returns how it ended.

        A requested stop is passed on once, and enforced after cluster.stop_timeout_s. Room for more nodes stops the
        gang too.

        Args:
            start: step of the checkpoint that the attempt began from.

        Raises:
            ArtefactError: a line of metrics is damaged.
        """
        stop_requested_at: float | None = None
        grow_to: int | None = None
        next_growth_check = time.monotonic()
        while True:
            status = gang.poll()
            self.watch.look(gang.usages())
            if status.state != "running":
                # After a failure the next attempt takes as many nodes as there are.
                if status.failure:
                    grow_to = None
                return Outcome(status, start, grow_to)

            pulses = gang.pulses()
            self.journal.live(pulses)
            self.watch.heard(pulses)

            now = time.monotonic()
            if grow_to is None and now >= next_growth_check:
                next_growth_check = now + GROW_EVERY_S
                grow_to = self.muster.room_to_grow(crew)
                if grow_to:
                    self.journal.write("growing", nodes=grow_to)

            # To grow, the ranks write a checkpoint and leave, as for a stop.
            if stop_requested_at is None and (self.interrupt.requested or grow_to):
                gang.interrupt()
                stop_requested_at = now
            if stop_requested_at is not None and now - stop_requested_at > self.config.cluster.stop_timeout_s:
                gang.stop()
            time.sleep(POLL_S)


def run_training_stage(
    stage: PlannedStage, cluster: RayCluster, console: Console, interrupt: Interrupt, job: str | None = None
) -> bool:
    """Runs a stage to its end despite failures of ranks and nodes. Returns False if `interrupt` stopped it.

    It writes the configuration and the journal of the run, and holds its lock. It warns of corpora that are read many
    times, and first waits for other ranks that train the run. A run that another command has finished since the plan
    is left as it is (True). Otherwise it removes `result.json`, which a finished run that goes on with more steps has.

    Args:
        job: batch job of this process.

    Raises:
        ConfigError: layout, batch, device or hardware group do not fit the cluster, a corpus cannot fill a phase,
            another command has begun the run with other settings, or tracking.mode=online without a login.
        ClusterError: too few nodes are available or fit.
        GangFailure: more than cluster.max_restarts failures in a row without a new checkpoint, or one that no restart
            mends.
        ArtefactError: another process works on the run; the ranks ended without a result, and nobody asked them to
            stop; what the run began with has changed since the plan; or a file of the run is damaged, such as a line of
            its metrics.
        OSError: a file of the run cannot be read or written.
        RuntimeError: ranks that did not stop in time remain even after SIGKILL.
    """
    # The corpora are there now, so the steps that follow from stage.epochs are known.
    training = training_stage(stage.name)
    stage = replace(stage, config=training.with_steps(stage.config))
    if warning := training.repetition(stage.config):
        console.warning(warning)
    # The plan of a command that also builds the corpora could not count their sequences.
    if not stage.phases and (phases := training.phase_rows(stage.config)):
        console.table(f"phases of stage={stage.name}", PHASE_COLUMNS, phases)
    config, ranks = fitted(stage, cluster)
    run = run_of(config)
    possible_nodes = sizes(config, ranks, stage.continued)
    first_config = with_layout(config, ranks, console, stage.continued)

    run.create()
    with ExitStack() as stack:
        stack.enter_context(launch_lock(run, job))
        await_other_ranks(run, console, interrupt)
        if interrupt.requested:
            return False

        # Another command may have run the stage since the plan.
        if stage.stage.look(stage.config, is_target=stage.is_target, rebuilt=()).action is Action.READY:
            return True
        begin_attempt(first_config, run)

        muster = Muster(cluster, config, possible_nodes, interrupt, console)
        watch = stack.enter_context(watching(first_config, run, console))
        attempts = Attempts(stage, config, ranks, muster, watch, console, interrupt)
        return attempts.until_done({possible_nodes[0]: first_config})


def fitted(stage: PlannedStage, cluster: RayCluster) -> tuple[Config, int]:
    """Returns (configuration with its device and ranks per node, ranks per node) for the nodes of a cluster.

    The layout is only checked, not filled in.

    Raises:
        ConfigError: layout, batch, device or hardware group do not fit.
    """
    device, ranks = device_and_ranks(stage.config, cluster)
    config = replace(stage.config, device=device, cluster=replace(stage.config.cluster, ranks_per_node=ranks))
    check_hardware(config)
    with_layout(config, ranks, before=stage.continued)
    return config, ranks


def await_other_ranks(run: RunDirectory, console: Console, interrupt: Interrupt) -> None:
    """Waits for other ranks that train this run: those of an earlier launch, or started with torchrun.

    It says so on the console, and returns early after an interrupt.

    Raises:
        ArtefactError: the ranks do not end within `storage.lock.OWN_JOB_S` seconds; the message names host and process.
        OSError: the lock file cannot be opened or written.
    """
    try:
        with rank_lock(run, console.line, stopped=lambda: interrupt.requested):
            pass
    except ArtefactError:
        if not interrupt.requested:
            raise


def report_stop(status: GangStatus, config: ClusterConfig, console: Console) -> None:
    """Warns if ranks that were asked to stop failed or had to be ended."""
    if status.failure:
        console.warning(f"while stopping: {status.failure}")
    if status.state == "stopped":
        console.warning(
            f"the ranks did not stop within cluster.stop_timeout_s={config.stop_timeout_s:g} s and were ended"
        )


def device_and_ranks(config: Config, cluster: RayCluster) -> tuple[str, int]:
    """Returns (cpu or cuda, ranks per node) from `device` and the GPUs of most nodes.

    Raises:
        ConfigError: device=cuda in a cluster without GPUs, or ranks and actors do not fit the nodes.
    """
    node_gpus = [node.gpus for node in cluster.nodes() if node.gpus and config.device != "cpu"]
    # Nodes with fewer GPUs are left out.
    gpus = statistics.mode(node_gpus or [0])
    require(gpus > 0 or config.device != "cuda", "device", config.device, "cpu or auto: the cluster has no GPU")
    device = "cuda" if gpus else "cpu"
    if config.pool:
        return device, ranks_per_node_with_pool(config.pool, config.cluster, cluster.nodes(), gpus)
    return device, config.cluster.ranks_of_node(gpus)
