"""What a run shows while its ranks work: handed on from its files and its gang to the console and to wandb."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

from dist_lm.cluster.failure import GangFailure
from dist_lm.cluster.heartbeat import Pulse
from dist_lm.cluster.node_facts import NodeUsage
from dist_lm.config.root import Config
from dist_lm.launcher.wandb_copy import WandbCopy, start_wandb
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.console import Console
from dist_lm.tracking.live_state import GangFacts, RankPulse
from dist_lm.tracking.metrics import WarningFollower, follow
from dist_lm.tracking.progress import TrainingProgress
from dist_lm.training import checkpoint_files

RANKS_EVERY_S = 0.5
CHECKPOINT_EVERY_S = 2.0  # the file system may be a slow one


class RunWatch:
    """Looks at a run again and again, for those that watch it."""

    def __init__(
        self, run: RunDirectory, progress: TrainingProgress, wandb: WandbCopy | None, console: Console
    ) -> None:
        """See `watching`."""
        self._run = run
        self._progress = progress
        self._wandb = wandb
        self._console = console
        self._warnings = WarningFollower(run.warnings)
        self._metrics = follow(run.metrics)
        self._ranks_at = self._checkpoint_at = 0.0
        progress.saved(checkpoint_files.newest_step(run.checkpoints), just_now=False)

    def attempt(self, gang: GangFacts) -> None:
        """Another gang begins."""
        self._progress.attempt(gang)

    def restarts(self, failure: GangFailure) -> None:
        """A gang failed, and another one is about to be started."""
        if self._wandb:
            self._wandb.restarts(failure)

    def look(self, usages: Mapping[str, NodeUsage]) -> None:
        """Hand on what has been written since the last call.

        Args:
            usages: how busy the nodes are, by host.
        """
        for warning in self._warnings.poll():
            self._console.warning(warning)
        for line in self._metrics.poll():
            self._progress.update(line)
            if self._wandb:
                self._wandb.line(line)
        if self._wandb:
            self._wandb.look(usages)
        now = time.monotonic()
        if now - self._checkpoint_at >= CHECKPOINT_EVERY_S:
            self._checkpoint_at = now
            self._progress.saved(checkpoint_files.newest_step(self._run.checkpoints), just_now=True)

    def heard(self, pulses: Sequence[Pulse]) -> None:
        """What the ranks were last heard doing."""
        now = time.monotonic()
        if now - self._ranks_at >= RANKS_EVERY_S:
            self._ranks_at = now
            self._progress.heard(
                [RankPulse(pulse.rank, pulse.step, pulse.phase.words, pulse.age_s) for pulse in pulses]
            )


@contextmanager
def watching(config: Config, run: RunDirectory, console: Console) -> Iterator[RunWatch]:
    """Watch a run in the block; wandb has everything at its end, and how it ended."""
    with console.training(config.stage.name, config.stage.steps, since=time.time()) as progress:
        wandb = start_wandb(config, run, console, config.streams)
        with wandb or nullcontext():
            yield RunWatch(run, progress, wandb, console)
