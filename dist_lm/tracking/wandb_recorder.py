"""Writes a run in wandb's own files, without a network: what is there can always be sent later."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from dist_lm.storage import durable
from dist_lm.storage.durable import json_lines
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.metrics import last_metrics
from dist_lm.tracking.sample_table import table_of

KEPT = "recorded.json"  # in the run's wandb folder: keys of what is recorded once, whatever the number of attempts
FLUSH_S = 1.0  # so old may be what is on disk


def logs_of(run: RunDirectory, identity: str) -> list[Path]:
    """wandb's files of a run, one an attempt, oldest first."""
    found = run.wandb.glob(f"offline-run-*-{identity}/run-{identity}.wandb")
    return sorted(found, key=lambda path: path.parent.name)


def last_step(logs: Sequence[Path]) -> int:
    """The last step that wandb's files hold, whatever became of who wrote them; -1 without one."""
    for log in reversed(logs):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
        steps = [-1]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as reading:
            assert reading.stdout is not None
            for line in reading.stdout:
                if b'"type":"history"' in line:
                    steps = [max(steps[0], int(json.loads(line)["history"]["step"].get("num", 0)))]
        if reading.returncode:
            raise RuntimeError(f"{log}: `wandb leet inspect` ended with exit code {reading.returncode}")
        if steps[0] >= 0:
            return steps[0]
    return -1


class Recorder:
    """One attempt's part of a wandb run.

    Attributes:
        log: wandb's file of it.
    """

    def __init__(self, run: RunDirectory, init: dict[str, Any]) -> None:
        """Begin it: steps that earlier parts hold are skipped."""
        import wandb  # a second of start-up

        self._kept_file = run.wandb / KEPT
        self._kept: list[str] = json.loads(self._kept_file.read_text()) if self._kept_file.exists() else []
        self._unsaved_since: float | None = None
        self._step = self._resumed_at = last_step(logs_of(run, init["id"]))
        # of machine, environment and command wandb would record more than our redacted copy
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
            x_transaction_log_flush_interval=FLUSH_S,
        )
        self._wandb = wandb
        given: dict[str, Any] = init | {"mode": "offline", "dir": str(run.path)}
        self._run = wandb.init(settings=settings, **given)
        self.log = Path(self._run.dir).parent / f"run-{init['id']}.wandb"
        if self._resumed_at >= 0:  # a part's summary takes the place of the one before
            earlier = last_metrics(run.metrics)
            self._run.summary.update({name: earlier[name] for name in earlier if name not in ("step", "time")})

    def carry_out(self, order: dict[str, Any]) -> None:
        """Record what an order of `WandbRun` asks for."""
        {
            "metrics": self._metrics,
            "beside": self._beside,
            "samples": self._samples,
            "link": self._link,
            "alert": self._alert,
        }[order["order"]](order)
        if self._unsaved_since is not None and time.monotonic() - self._unsaved_since > 2 * FLUSH_S:
            self._save()

    def finish(self, outcome: str) -> None:
        """Write the end: exit code 0 for `finished`, 1 otherwise, and that it goes on for `stopped`."""
        if outcome == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=int(outcome != "finished"))
        self._save()

    def _metrics(self, order: dict[str, Any]) -> None:
        step = order["step"]
        if step >= self._step and step > self._resumed_at:
            self._step = step
            self._run.log(order["values"], step=step)

    def _beside(self, order: dict[str, Any]) -> None:
        if self._step > self._resumed_at:  # else there is no row yet that they could be put to
            self._run.log(order["values"], step=self._step)

    def _samples(self, order: dict[str, Any]) -> None:
        if self._is_new(f"samples {order['key']}"):
            columns, rows = table_of(json_lines(Path(order["path"])))
            table = self._wandb.Table(columns=cast(Any, columns), data=cast(Any, rows), allow_mixed_types=True)
            self._step = max(self._step, order["step"], self._resumed_at + 1)
            self._run.log({order["name"]: table}, step=self._step)

    def _link(self, order: dict[str, Any]) -> None:
        if not self._is_new(f"link {order['key']}"):
            return
        artifact = self._wandb.Artifact(order["name"], type=order["kind"], metadata=order["metadata"])
        for file in order["files"]:
            artifact.add_reference(Path(file).as_uri(), name=Path(file).name)
        self._run.log_artifact(artifact, aliases=["latest", *order["aliases"]])

    def _alert(self, order: dict[str, Any]) -> None:
        self._run.alert(order["title"], order["text"], level=order["level"])

    def _is_new(self, key: str) -> bool:
        if key in self._kept:
            return False
        self._kept.append(key)
        self._unsaved_since = self._unsaved_since or time.monotonic()
        return True

    def _save(self) -> None:
        """Only what has reached the disk by now may be passed over by the next attempt."""
        self._unsaved_since = None
        durable.write_json(self._kept_file, self._kept)
