"""Attempts at a run, each a gang of ranks followed to its end, and how often a failed one is repeated."""

import time
from collections import Counter
from dataclasses import dataclass, field, replace

from dist_lm.cluster.allocation import core_users
from dist_lm.cluster.failure import GangFailure
from dist_lm.cluster.gang import Gang, GangStatus
from dist_lm.cluster.heartbeat import Patience
from dist_lm.cluster.journal import Journal
from dist_lm.cluster.recruit import Crew
from dist_lm.config.cluster import ClusterConfig
from dist_lm.config.root import Config, save_config
from dist_lm.launcher.interrupt import Interrupt
from dist_lm.launcher.muster import Muster
from dist_lm.launcher.watch import RunWatch
from dist_lm.parallel.layout import resolve_layout
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.live_state import GangFacts
from dist_lm.training import checkpoint_files

POLL_S = 0.2
GROW_EVERY_S = 2.0
BLAMED_TWICE = 2


@dataclass(frozen=True)
class Restarts:
    """Failures in a row without a new checkpoint between them; a checkpoint wipes the slate."""

    limit: int
    step: int  # of the newest checkpoint at the last failure, or when the launch began
    failures: int = 0
    blamed: Counter[str] = field(default_factory=Counter)  # failures by the address of a node

    def after_failure(self, step: int, address: str | None) -> "Restarts":
        """One more failure.

        Args:
            step: of the newest checkpoint now.
            address: of the node at which it began; None: it cannot be told.
        """
        blamed = Counter([address] if address else [])
        if step != self.step:  # lower after a damaged one was passed over
            return replace(self, step=step, failures=1, blamed=blamed)
        return replace(self, failures=self.failures + 1, blamed=self.blamed + blamed)

    @property
    def left(self) -> int:
        """Restarts that are left; negative: one too many."""
        return self.limit - self.failures

    @property
    def suspects(self) -> frozenset[str]:
        """Addresses of nodes at which failures began again and again: others are taken where there are others."""
        return frozenset(address for address, count in self.blamed.items() if count >= BLAMED_TWICE)


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended; `grow_to`: it was stopped to go on with so many nodes."""

    status: GangStatus
    step: int  # of the checkpoint it began from
    grow_to: int | None = None


class Attempts:
    """Starts gangs on the same run, one at a time, and follows each to its end."""

    def __init__(
        self,
        run: RunDirectory,
        ranks_per_node: int,
        device: str,
        cluster_config: ClusterConfig,
        muster: Muster,
        interrupt: Interrupt,
        watch: RunWatch,
    ) -> None:
        """`watch` is kept informed while ranks run."""
        self.journal = Journal(run)
        self._run = run
        self.ranks_per_node = ranks_per_node
        self._device = device
        self._config = cluster_config
        self._muster = muster
        self._interrupt = interrupt
        self._watch = watch
        self._count = 0

    def run(self, config: Config, crew: Crew) -> Outcome:
        """One attempt: `config`, written for the ranks, on `crew`, which is released at its end."""
        self._count += 1
        self._run.live.unlink(missing_ok=True)  # of the attempt before
        start = checkpoint_files.newest_step(self._run.checkpoints)
        save_config(config, self._run.config)
        nodes = [
            {"host": host, "address": node.address} for host, node in zip(crew.hosts, crew.placement.nodes, strict=True)
        ]
        layout = resolve_layout(config.parallel, config.model, len(nodes) * self.ranks_per_node)
        self.journal.write(
            "started",
            attempt=self._count,
            nodes=nodes,
            ranks_per_node=self.ranks_per_node,
            device=self._device,
            layout=str(layout),
            step=start,
            slowest_link_mb_per_s=round(min(crew.link_rates) / 1e6) if crew.link_rates else None,
        )
        self._watch.attempt(GangFacts(tuple(crew.hosts), self.ranks_per_node, self._device, str(layout), self._count))
        patience = Patience(self._config.hang_steps, self._config.hang_min_s, self._config.hang_otherwise_s)
        try:
            gang = Gang.start(
                crew,
                self._run,
                ranks_per_node=self.ranks_per_node,
                device=self._device,
                patience=patience,
                core_users=self._core_users(config, len(nodes)),
                drives_actors=bool(config.pool and config.pool.actors),
            )
        except GangFailure as failure:
            return Outcome(GangStatus("failed", failure), start)
        with gang:
            return self._follow(gang, crew, start)

    def _core_users(self, config: Config, nodes: int) -> int:
        gpus = self.ranks_per_node if self._device == "cuda" else 0
        return core_users(config.pool, nodes, self.ranks_per_node, gpus) if config.pool else 0

    def _follow(self, gang: Gang, crew: Crew, start: int) -> Outcome:
        """Show what the ranks write until they are gone; pass a stop on once, and insist after a while."""
        asked_at: float | None = None
        grow_to: int | None = None
        grow_at = time.monotonic()
        while True:
            status = gang.poll()
            self._watch.look(gang.usages())
            if status.state != "running":
                return Outcome(status, start, None if status.failure else grow_to)
            pulses = gang.pulses()
            self.journal.live(pulses)
            self._watch.heard(pulses)
            now = time.monotonic()
            if grow_to is None and now >= grow_at:
                grow_at = now + GROW_EVERY_S
                grow_to = self._muster.room_to_grow(crew)
                if grow_to:
                    self.journal.write("growing", nodes=grow_to)
            if asked_at is None and (self._interrupt.requested or grow_to):
                gang.interrupt()
                asked_at = now
            if asked_at is not None and now - asked_at > self._config.stop_timeout_s:
                gang.stop()
            time.sleep(POLL_S)
