"""What the ranks of a run write, handed on while they run: to the console, and to wandb with all that belongs there.

Only the launcher talks to wandb, and only hands things over (`tracking/wandb_run.py`).
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Self

from dist_lm.cluster.failure import GangFailure
from dist_lm.cluster.node_usage import NodeUsage, usage_metrics
from dist_lm.config import Config
from dist_lm.launcher.git import git_commit
from dist_lm.run_directory import RunDirectory
from dist_lm.tracking import alerts
from dist_lm.tracking.console import Console
from dist_lm.tracking.metrics import follow, last_metrics
from dist_lm.tracking.rank_warnings import WarningFollower
from dist_lm.tracking.wandb_run import Outcome, WandbRun
from dist_lm.training import checkpoint_files

USAGE_EVERY_S = 15.0
FILES_EVERY_S = 5.0


class Showing:
    """Shows one run from its first attempt to its last; a context manager that says to wandb how it ended."""

    def __init__(self, config: Config, run: RunDirectory, console: Console) -> None:
        self._config = config
        self._run = run
        self._console = console
        self._warnings = WarningFollower(run.warnings)
        self._metrics = follow(run.metrics)
        self._name = f"{config.stage.name}/{config.run_id}"
        self._watch = alerts.AlertWatch(self._name, time.monotonic())
        self._stack = ExitStack()
        self._wandb: WandbRun | None = None
        self._usage_at = self._files_at = time.monotonic()
        self._seen: set[str] = set()  # samples and checkpoints that were handed on

    def __enter__(self) -> Self:
        stage = self._config.stage
        training = self._console.training(stage.name, stage.steps, since=time.time())
        self._progress = self._stack.enter_context(training)
        self._wandb = _start_wandb(self._config, self._run, self._console)
        if self._wandb:
            _link_inputs(self._wandb, self._config, self._run)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with self._stack:
            if self._wandb:
                self._look_at_files(self._wandb)
                self._wandb.finish(self._outcome(self._wandb, error))

    def __call__(self, usages: Mapping[str, NodeUsage]) -> None:
        """Hand on what is new.

        Args:
            usages: how busy the nodes are, by host.
        """
        now = time.monotonic()
        for warning in self._warnings.poll():
            self._console.warning(warning)
        found = []
        for line in self._metrics.poll():
            self._progress.update(line)
            found += self._watch.line(line, now)
            if self._wandb:
                self._wandb.log(line["step"], line)
        if self._wandb is None:
            return
        for alert in (*found, *self._watch.tick(now)):
            self._wandb.alert(alert)
        if usages and now >= self._usage_at:
            self._usage_at = now + USAGE_EVERY_S
            self._wandb.beside(usage_metrics(usages))
        if now >= self._files_at:
            self._files_at = now + FILES_EVERY_S
            self._look_at_files(self._wandb)

    def restarts(self, failure: GangFailure) -> None:
        """A gang failed, and another one is about to be started."""
        if self._wandb:
            self._wandb.alert(alerts.failed(self._name, str(failure), again=True))

    def _look_at_files(self, wandb: WandbRun) -> None:
        for path in sorted(self._run.samples.glob("step_*.jsonl")):
            if self._is_new(path.name):
                wandb.samples(path, int(path.stem.removeprefix("step_")))
        for pointer in (checkpoint_files.LATEST, checkpoint_files.BEST):
            checkpoint = checkpoint_files.read_pointer(self._run.checkpoints, pointer)
            key = f"{pointer} {checkpoint.name if checkpoint else ''}"
            if checkpoint and (checkpoint / checkpoint_files.MANIFEST).exists() and self._is_new(key):
                wandb.link(
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

    def _outcome(self, wandb: WandbRun, error: BaseException | None) -> Outcome:
        if self._run.result.exists():
            wandb.alert(alerts.finished(self._name, last_metrics(self._run.metrics)))
            return "finished"
        if error is None or isinstance(error, KeyboardInterrupt):
            return "stopped"
        wandb.alert(alerts.failed(self._name, " ".join(str(error).split()), again=False))
        return "failed"


def _start_wandb(config: Config, run: RunDirectory, console: Console) -> WandbRun | None:
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


def _link_inputs(wandb: WandbRun, config: Config, run: RunDirectory) -> None:
    """The tokenizer and the manifests of the corpora that the stage reads."""
    work = run.work
    tokenizer = [path for path in (work.tokenizer_model, work.tokenizer_report) if path.exists()]
    if tokenizer:
        wandb.link("tokenizer", "tokenizer", "tokenizer", tokenizer, {"vocab_size": config.tokenizer.vocab_size})
    for name in (config.stage.corpus, *sorted(config.stage.mix or {})):
        manifest = work.corpus_manifest(name)
        if manifest.exists():
            known = json.loads(manifest.read_text())
            metadata = {key: known.get(key) for key in ("tokenizer_sha256", "corpus_fingerprint")}
            wandb.link(f"corpus {name}", f"corpus-{name}", "dataset", [manifest], metadata)
