"""The wandb copy of a run, seen from the launcher: a separate process does all the work, and no call waits for it.

metrics.jsonl has every metric, so a failure of wandb is reported once and never ends a run. Ranks do not use wandb. The
process (`wandb_process`) writes wandb's files into the run directory and sends them if there is a login.
"""

import json
import queue
import secrets
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dist_lm.config.root import TrackingConfig
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.alerts import Alert
from dist_lm.tracking.console import Console
from dist_lm.tracking.redact import redact, redact_command, redact_text
from dist_lm.tracking.wandb_login import wandb_environment, wandb_mode

IDENTITY = "identity.json"  # file in the run's wandb folder: {id}
DIRTY = "-dirty"  # ending of a commit whose files were changed
SAMPLES = "samples/generations"
SAMPLES_OF = {"tools": "samples/tool_calls", "rlhf": "samples/rollouts"}
"""Names of the table of samples in wandb by stage; `SAMPLES` for all other stages."""
Outcome = Literal["finished", "failed", "stopped"]
"""How an attempt ended; a stopped run will continue."""


class WandbRun:
    """The wandb run of a run directory; all attempts continue the same one."""

    def __init__(
        self, run: RunDirectory, console: Console, init: dict[str, Any], environ: Mapping[str, str], finish_s: float
    ) -> None:
        """Reads or creates the identity of the wandb run and starts the process; see `start`."""
        self._console = console
        self._directory = run.wandb
        self._job_type: str = init["job_type"]
        self._finish_s = finish_s

        run.wandb.mkdir(parents=True, exist_ok=True)
        self.id = _identity(run.wandb / IDENTITY)
        self._orders: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

        start = {"directory": str(run.path.resolve()), "init": init | {"id": self.id}, "finish_s": finish_s}
        with (run.wandb / "process.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dist_lm.tracking.wandb_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=wandb_environment(environ, init["mode"] == "online"),
                # Ctrl-C must reach the launcher only, which then calls `finish`.
                start_new_session=True,
            )

        self._orders.put(start)
        self._threads = [
            threading.Thread(target=work, name=f"wandb {work.__name__}", daemon=True)
            for work in (self._feed, self._listen)
        ]
        for thread in self._threads:
            thread.start()

    @classmethod
    def start(
        cls,
        config: Mapping[str, Any],
        run: RunDirectory,
        tracking: TrackingConfig,
        *,
        job_type: str,
        group: str,
        git_commit: str | None,
        command: list[str],
        environ: Mapping[str, str],
        console: Console,
    ) -> "WandbRun | None":
        """Starts or continues the wandb run of a run directory: starts the process, with a file of its identity and a
        log in the run's wandb folder; returns at once.

        Args:
            config: recorded without secrets.
            job_type: the stage.
            group: the run_id, shared by the stages of one pipeline.
            git_commit: commit of the code, ending with `-dirty` if files were changed; None: unknown.
            command: the command line, recorded without secrets.
            environ: holds the login and wandb's own settings.
            console: prints the failures of wandb.

        Returns:
            None with tracking=none, or WANDB_MODE=disabled.

        Raises:
            ConfigError: tracking.mode=online without a login.
        """
        if tracking.name == "none" or (mode := wandb_mode(tracking, environ)) == "disabled":
            return None

        git = {
            "git_commit": git_commit and git_commit.removesuffix(DIRTY),
            "git_dirty": git_commit and git_commit.endswith(DIRTY),
        }

        init = {
            "project": tracking.project,
            "entity": tracking.entity,
            "tags": list(tracking.tags),
            "name": f"{job_type}-{group}",
            "job_type": job_type,
            "group": group,
            "config": redact(config) | git | {"command": redact_command(command)},
            "mode": mode,
        }

        return cls(run, console, init, environ, tracking.finish_s)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records the metrics of a step; steps that were recorded before are skipped.

        `step`, `time` and values that are None (not finite) are not recorded.
        """
        finite = {name: value for name, value in metrics.items() if name not in ("step", "time") and value is not None}
        self._orders.put({"order": "metrics", "step": step, "values": finite})

    def log_at_newest_step(self, figures: Mapping[str, float]) -> None:
        """Records figures without a step, such as the load of nodes, at the newest step."""
        self._orders.put({"order": "at_newest_step", "values": dict(figures)})

    def samples(self, path: Path, step: int) -> None:
        """Records a file of JSON lines as a table."""
        name = SAMPLES_OF.get(self._job_type, SAMPLES)
        self._orders.put({"order": "samples", "key": path.name, "path": str(path), "step": step, "name": name})

    def link(
        self,
        key: str,
        name: str,
        kind: str,
        files: Sequence[Path],
        metadata: Mapping[str, Any],
        aliases: Sequence[str] = (),
    ) -> None:
        """Records files as an artifact by reference (path and hash), without waiting; they are never uploaded.

        Args:
            key: identifies the link; a key that was linked before, also by an earlier attempt, is skipped.
            name: name of the artifact.
            kind: wandb's type of the artifact: tokenizer, dataset, model.
            metadata: facts about the artifact, recorded without secrets.
        """
        order = {"order": "link", "key": key, "name": name, "kind": kind, "aliases": list(aliases)}
        self._orders.put(order | {"files": [str(file.resolve()) for file in files], "metadata": redact(metadata)})

    def alert(self, alert: Alert) -> None:
        """Sends an alert through wandb."""
        text = redact_text(alert.text)
        self._orders.put({"order": "alert", "title": alert.title, "text": text, "level": alert.level})

    def finish(self, outcome: Outcome, grace_s: float = 60.0) -> None:
        """Ends the recording and waits until the process has ended: it waits at most tracking.finish_s for a server
        that answers.

        A process that has not ended `grace_s` seconds later continues alone, with a warning. No more orders may follow.
        """
        # The process itself ends after `finish_s`; the grace covers a process that hangs.
        timeout_s = self._finish_s + grace_s

        self._orders.put({"order": "finish", "outcome": outcome})
        # Ends the thread that feeds the process.
        self._orders.put(None)

        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._console.warning(
                f"wandb is still busy after {timeout_s:.0f} s and is left behind; metrics.jsonl has every "
                f"metric; to send the rest: wandb sync {self._directory}"
            )
            return

        for thread in self._threads:
            thread.join(timeout_s)

    def _feed(self) -> None:
        """Writes the orders to the process until the order None, then closes its input. The process may be slow; if it
        is gone, further orders are dropped, with a warning if it failed."""
        assert self._process.stdin is not None
        try:
            with self._process.stdin as pipe:
                while (order := self._orders.get()) is not None:
                    pipe.write(json.dumps(order).encode() + b"\n")
                    pipe.flush()
        except BrokenPipeError:
            # Orders that nobody reads are dropped; the run continues.
            code = self._process.wait()

            # With code 0 the process has reported the reason itself.
            if code:
                self._console.warning(
                    f"wandb stopped (its process ended with exit code {code}, see {self._directory / 'process.log'}); "
                    "the run goes on, and metrics.jsonl has every metric"
                )

    def _listen(self) -> None:
        """Prints the messages of the process."""
        assert self._process.stdout is not None
        with self._process.stdout as pipe:
            for line in pipe:
                message = json.loads(line)
                show = self._console.warning if message["kind"] == "warning" else self._console.line
                show(message["text"])


def _identity(path: Path) -> str:
    # All attempts of a run must continue one wandb run, so the first one's id is kept.
    identity = durable.read_json(path).get("id") or secrets.token_hex(4)
    durable.write_json(path, {"id": identity})
    return identity
