"""Follows a run's files and gang and passes them to the console and to wandb.

Only the launcher uses wandb, and it never waits for it (`tracking/wandb_run.py`).
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from dist_lm.cluster.events import GangFailure
from dist_lm.cluster.heartbeat import Pulse, Standstill, doing
from dist_lm.cluster.node_facts import NodeUsage, usage_metrics
from dist_lm.config.root import Config
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking import alerts
from dist_lm.tracking.console import Console
from dist_lm.tracking.live_state import GangFacts, RankPulse
from dist_lm.tracking.metrics import LineFollower, MetricsFollower, last_metrics
from dist_lm.tracking.progress import TrainingProgress
from dist_lm.tracking.wandb_run import Outcome, WandbRun
from dist_lm.training import checkpoint_files

RANKS_EVERY_S = 0.5
CHECKPOINT_EVERY_S = 2.0  # the file system may be slow
USAGE_EVERY_S = 15.0
FILES_EVERY_S = 5.0


class WandbCopy:
    """The wandb copy of one run over all its attempts. A context manager that reports how the run ended."""

    def __init__(self, config: Config, run: RunDirectory, wandb: WandbRun, corpora: Sequence[str]) -> None:
        """See `start_wandb`."""
        self._config = config
        self._corpora = corpora
        self._run = run
        self._wandb = wandb
        self._name = f"{config.stage.name}/{config.run_id}"
        self._watch = alerts.AlertWatch(self._name, time.monotonic())
        self._usage_at = self._files_at = time.monotonic()
        self._seen: set[str] = set()  # samples and checkpoints that wandb has

    def __enter__(self) -> Self:
        self._link_inputs()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._look_at_files()
        self._wandb.finish(self._outcome(error))

    def attempt(self) -> None:
        """Another gang starts."""
        self._watch.attempt(time.monotonic())

    def line(self, line: Mapping[str, Any], of_this_attempt: bool) -> None:
        """Logs a line of metrics; those of earlier attempts, which are read again, give no alerts."""
        if of_this_attempt:
            for alert in self._watch.line(line, time.monotonic()):
                self._wandb.alert(alert)
        self._wandb.log(line["step"], line)

    def look(self, usages: Mapping[str, NodeUsage]) -> None:
        """Logs other news: alerts, loads of nodes (every 15 s), samples and checkpoints (every 5 s). Called repeatedly.

        Args:
            usages: host -> load of the node.
        """
        now = time.monotonic()
        for alert in self._watch.tick(now):
            self._wandb.alert(alert)
        # Loads of nodes have no step of their own, so they are logged at the newest one.
        if usages and now >= self._usage_at:
            self._usage_at = now + USAGE_EVERY_S
            self._wandb.log_at_newest_step(usage_metrics(usages))
        if now >= self._files_at:
            self._files_at = now + FILES_EVERY_S
            self._look_at_files()

    def restarts(self, failure: GangFailure) -> None:
        """A gang failed, and the run will restart."""
        self._wandb.alert(alerts.failed(self._name, str(failure), again=True))

    def table(self, path: Path, step: int) -> None:
        """Logs a file of samples as a table, once."""
        if self._is_new(path.name):
            self._wandb.samples(path, step)

    def _link_inputs(self) -> None:
        """Logs the tokenizer and the manifests of the corpora that the stage reads; missing files are passed over.

        Raises:
            ArtefactError: a manifest holds no JSON object.
        """
        config, work = self._config, self._run.work
        tokenizer = [path for path in (work.tokenizer_model, work.tokenizer_report) if path.exists()]
        if tokenizer:
            vocabulary = {"vocab_size": config.tokenizer.vocab_size}
            self._wandb.link("tokenizer", "tokenizer", "tokenizer", tokenizer, vocabulary)
        for name in self._corpora:
            manifest = config.corpus_in(work, name) / "manifest.json"
            if manifest.exists():
                fields = durable.read_json(manifest)
                metadata = {key: fields.get(key) for key in ("tokenizer_sha256", "corpus_fingerprint")}
                self._wandb.link(f"corpus {name}", f"corpus-{name}", "dataset", [manifest], metadata)

    def _look_at_files(self) -> None:
        """Logs new files of samples, and a link to each checkpoint that LATEST or BEST newly points to."""
        for path in sorted(self._run.samples.glob("step_*.jsonl")):
            self.table(path, int(path.stem.removeprefix("step_")))

        # wandb gets the path and the checksums of a checkpoint, not its gigabytes.
        for pointer in (checkpoint_files.LATEST, checkpoint_files.BEST):
            checkpoint = checkpoint_files.read_pointer(self._run.checkpoints, pointer)
            if not checkpoint or not (checkpoint / checkpoint_files.MANIFEST).exists():
                continue

            key = f"{pointer} {checkpoint.name}"
            if self._is_new(key):
                self._wandb.link(
                    key,
                    f"checkpoint-{self._config.stage.name}-{self._config.run_id}",
                    "model",
                    [checkpoint / checkpoint_files.MANIFEST],
                    {"path": str(checkpoint.resolve()), "step": checkpoint_files.step_of(checkpoint)},
                    [pointer.lower()],
                )

    def _is_new(self, key: str) -> bool:
        if key in self._seen:
            return False
        self._seen.add(key)
        return True

    def _outcome(self, error: BaseException | None) -> Outcome:
        """Returns how the run ended, and alerts wandb of a finished or failed one.

        The run is `finished` if its result is there, whatever the error; `stopped` without an error or after Ctrl-C;
        else `failed`.

        Args:
            error: the exception that ended the launcher's block; None: it was left without one.

        Raises:
            ArtefactError: the metrics of a finished run are damaged.
        """
        # An error after the result, such as a full disk of the launcher, leaves a finished run.
        if self._run.result.exists():
            self._wandb.alert(alerts.finished(self._name, last_metrics(self._run.metrics)))
            return "finished"
        if error is None or isinstance(error, KeyboardInterrupt):
            return "stopped"
        self._wandb.alert(alerts.failed(self._name, " ".join(str(error).split()), again=False))
        return "failed"


def start_wandb(config: Config, run: RunDirectory, console: Console, corpora: Sequence[str] = ()) -> WandbCopy | None:
    """Starts a wandb process and returns the copy of the run; None with tracking=none, or if wandb cannot be started.

    Args:
        corpora: corpora that the stage reads.

    Raises:
        ConfigError: tracking.mode=online without a login.
    """
    if config.tracking.name != "wandb":
        return None
    wandb = WandbRun.start(
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
    return WandbCopy(config, run, wandb, corpora) if wandb else None


class RunWatch:
    """Polls a run and updates the console and wandb."""

    def __init__(
        self, run: RunDirectory, progress: TrainingProgress, wandb: WandbCopy | None, console: Console
    ) -> None:
        """See `watching`."""
        self._run = run
        self._progress = progress
        self._wandb = wandb
        self._console = console
        self._warnings = LineFollower(run.warnings, from_end=True)
        self._metrics = MetricsFollower(run.metrics)
        self._ranks_at = self._checkpoint_at = 0.0
        self._standstill = Standstill(time.monotonic())
        progress.saved(checkpoint_files.newest_step(run.checkpoints), just_now=False)

    def attempt(self, gang: GangFacts) -> None:
        """Another gang starts."""
        self._progress.state.start(gang, time.time())
        self._standstill = Standstill(time.monotonic())
        if self._wandb:
            self._wandb.attempt()

    def restarts(self, failure: GangFailure) -> None:
        """A gang failed, and the run will restart."""
        if self._wandb:
            self._wandb.restarts(failure)

    def look(self, usages: Mapping[str, NodeUsage]) -> None:
        """Passes on every warning and line of metrics that was written since the last call, and the newest checkpoint.
        Says every minute what the ranks do while they complete no step.

        Args:
            usages: host -> load of the node.

        Raises:
            ArtefactError: a complete line of metrics is damaged.
        """
        for warning in self._warnings.poll():
            self._console.warning(warning.decode(errors="replace"))
        # A new attempt writes the steps after its checkpoint again.
        for line in self._metrics.poll():
            of_this_attempt = self._progress.update(line)
            if of_this_attempt:
                self._standstill.moved(time.monotonic())
            if self._wandb:
                self._wandb.line(line, of_this_attempt)
        if self._wandb:
            self._wandb.look(usages)

        now = time.monotonic()
        if words := self._standstill.line(now):
            self._console.line(f"{words}; logs: {self._run.logs}")
        if now - self._checkpoint_at >= CHECKPOINT_EVERY_S:
            self._checkpoint_at = now
            self._progress.saved(checkpoint_files.newest_step(self._run.checkpoints), just_now=True)

    def heard(self, pulses: Sequence[Pulse]) -> None:
        """Shows the last heartbeats of the ranks."""
        now = time.monotonic()
        self._standstill.heard(pulses, now)
        if now - self._ranks_at >= RANKS_EVERY_S:
            self._ranks_at = now
            words = doing(pulses)
            self._progress.heard(
                [RankPulse(pulse.rank, pulse.step, words[pulse.phase], pulse.age_s) for pulse in pulses]
            )


@contextmanager
def watching(config: Config, run: RunDirectory, console: Console) -> Iterator[RunWatch]:
    """Yields the watch of a run. The console shows progress inside the block; at the end wandb gets how the run ended,
    too.

    Raises:
        ConfigError: tracking.mode=online without a login.
    """
    # Lines of earlier attempts have earlier times.
    with console.training(config.stage.name, config.stage.steps, since=time.time()) as progress:
        wandb = start_wandb(config, run, console, config.corpus_names)
        with wandb or nullcontext():
            yield RunWatch(run, progress, wandb, console)


def git_commit() -> str | None:
    """Returns the git commit of this checkout, with `-dirty` after uncommitted changes; None without git or a
    repository, or after ten seconds.
    """
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None
