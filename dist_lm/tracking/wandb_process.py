"""The process that records a run in wandb: `python -m dist_lm.tracking.wandb_process`, started by `WandbRun`.

It writes wandb's own files without a network, so everything can be sent later, and starts an `Uploader` where there is
a login. Input: orders as JSON lines, first {directory, init, finish_s}, then those of `Recorder.carry_out`, last
{order: finish, outcome}; an input without the last one means that the launcher was killed and the run will continue.
Output: {kind: warning | line, text} for people. The process ends in bounded time, whatever server and launcher do.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

from dist_lm.storage import durable
from dist_lm.storage.durable import json_lines
from dist_lm.storage.lock import locked
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.metrics import last_metrics
from dist_lm.tracking.redact import redact_text
from dist_lm.tracking.wandb_login import wandb_environment
from dist_lm.tracking.wandb_upload import Uploader

NICE = 5  # ranks have priority
LOCK = ".process.lock"
RECORDED = "recorded.json"  # in the run's wandb folder: keys of orders and their rows, see `Recorder`
ENDED = -1  # row of the orders of an attempt that ended in order
TASKS, STEP_OF_TASKS = "eval/", "eval/step"
FLUSH_S = 1.0  # longest delay before a row is on disk
ROWS, CHARACTERS = 200, 4000  # of a table of samples, and of its cells
NUMBERS = ("tokens", "logprobs", "raw_logprobs")  # columns with a number for each token, left out


def main() -> None:
    """Carry out the orders on standard input."""
    os.nice(NICE)
    say = _voice()
    orders = _orders(sys.stdin)
    start = next(orders, None)
    if start is None:
        return
    run = RunDirectory(Path(start["directory"]))
    # unsent files and logs belong into the run, not into the home or current directory
    os.environ |= {
        "WANDB_DIR": str(run.path),
        "WANDB_DATA_DIR": str(run.wandb),
        "WANDB_CACHE_DIR": str(run.wandb / "cache"),
    }
    try:
        # the process of an earlier attempt may still be sending
        with locked(run.wandb / LOCK, what=str(run.wandb), wait_s=60.0 + start["finish_s"]):
            _record(run, start, orders, say)
    except Exception as error:  # the run goes on without wandb
        say(
            "warning",
            f"wandb stopped ({type(error).__name__}: {error}); the run goes on, and metrics.jsonl has every metric",
        )
        for _ in orders:  # the launcher must never block on a full pipe
            continue


def _record(
    run: RunDirectory, start: dict[str, Any], orders: Iterator[dict[str, Any]], say: Callable[[str, str], None]
) -> None:
    init = start["init"]
    recorder = Recorder(run, init)
    online = init["mode"] == "online"
    uploader = Uploader(logs_of(run, init["id"]), wandb_environment(os.environ, online), say) if online else None
    outcome = "stopped"
    for order in orders:
        if order["order"] == "finish":
            outcome = order["outcome"]
        else:
            try:
                recorder.carry_out(order)
            except Exception as error:
                if order["order"] == "metrics":
                    raise
                say("warning", f"wandb did not take {order['order']} ({type(error).__name__}: {error})")
    recorder.finish(outcome)
    if uploader and not uploader.finish(start["finish_s"]):
        say("warning", f"wandb's server has not got everything yet; to send the rest: wandb sync {run.wandb}")


def _orders(lines: TextIO) -> Iterator[dict[str, Any]]:
    """The orders; an incomplete last line of a killed launcher is ignored."""
    for line in lines:
        if line.endswith("\n"):
            yield json.loads(line)


def _voice() -> Callable[[str, str], None]:
    """A function that sends messages to the launcher; prints of libraries go to standard error, which is a file."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(kind: str, text: str) -> None:
        try:
            pipe.write(json.dumps({"kind": kind, "text": text}) + "\n")
            pipe.flush()
        except BrokenPipeError:  # the launcher is gone
            return

    return say


def logs_of(run: RunDirectory, identity: str) -> list[Path]:
    """wandb's files of a run, one an attempt, oldest first."""
    found = run.wandb.glob(f"offline-run-*-{identity}/run-{identity}.wandb")
    return sorted(found, key=lambda path: path.parent.name)


def last_step(logs: Sequence[Path]) -> int:
    """The last step in wandb's files, read from the files because a writer may have been killed; -1 without one."""
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
    """Records one attempt of a run.

    wandb writes the row of a step to its file when a later step is logged, after all that was ordered before. So a kill
    loses what came with the rows after the last one in the files, `_resumed_at`, and nothing else. `_step` is the row
    that is open now. `_rows`, kept in RECORDED, has the row of every order that must come once; the next attempt
    repeats those orders whose row was lost. (An artifact may have been written before its row: wandb keeps equal ones
    once.)

    Attributes:
        log: wandb's file of this attempt.
    """

    def __init__(self, run: RunDirectory, init: dict[str, Any]) -> None:
        """Begin; steps that earlier attempts have recorded are skipped."""
        import wandb  # takes a second

        self._step = self._resumed_at = last_step(logs_of(run, init["id"]))
        self._rows_file = run.wandb / RECORDED
        self._rows = {key: row for key, row in rows_of(self._rows_file).items() if row <= self._resumed_at}
        self._save()  # before a row of this attempt takes the number of a lost one
        # by default wandb records machine, environment and command without our redaction
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
        if self._resumed_at >= 0:  # the summary of an attempt replaces that of the one before
            earlier = last_metrics(run.metrics)
            self._run.summary.update({name: earlier[name] for name in earlier if name not in ("step", "time")})

    def carry_out(self, order: dict[str, Any]) -> None:
        """Carry out one order of `WandbRun`."""
        {
            "metrics": self._metrics,
            "beside": self._beside,
            "samples": self._samples,
            "link": self._link,
            "alert": self._alert,
        }[order["order"]](order)

    def finish(self, outcome: str) -> None:
        """Record the end: exit code 0 for `finished`, else 1; `stopped` is marked as preempted."""
        if outcome == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=int(outcome != "finished"))
        self._rows = dict.fromkeys(self._rows, ENDED)
        self._save()

    def _metrics(self, order: dict[str, Any]) -> None:
        step = order["step"]
        if any(name.startswith(TASKS) for name in order["values"]):
            self._tasks(step, order["values"])
        elif step >= self._step and step > self._resumed_at:
            self._step = step
            self._run.log(order["values"], step=step)

    def _tasks(self, step: int, values: dict[str, float]) -> None:
        """Record figures of tasks, which may arrive after later steps: wandb draws them over `eval/step`."""
        row = self._row(step)
        if self._is_new(f"tasks {step} {' '.join(sorted(values))}", row):
            self._step = row
            self._run.define_metric(f"{TASKS}*", step_metric=STEP_OF_TASKS)
            self._run.log(values | {STEP_OF_TASKS: step}, step=row)

    def _beside(self, order: dict[str, Any]) -> None:
        if self._step > self._resumed_at:  # else no row exists yet
            self._run.log(order["values"], step=self._step)

    def _samples(self, order: dict[str, Any]) -> None:
        row = self._row(order["step"])
        if self._is_new(f"samples {order['key']}", row):
            self._step = row
            columns, rows = table_of(json_lines(Path(order["path"])))
            table = self._wandb.Table(columns=cast(Any, columns), data=cast(Any, rows), allow_mixed_types=True)
            self._run.log({order["name"]: table}, step=row)

    def _link(self, order: dict[str, Any]) -> None:
        if not self._is_new(f"link {order['key']}", self._row()):
            return
        artifact = self._wandb.Artifact(order["name"], type=order["kind"], metadata=order["metadata"])
        for file in order["files"]:
            artifact.add_reference(Path(file).as_uri(), name=Path(file).name)
        self._run.log_artifact(artifact, aliases=["latest", *order["aliases"]])

    def _alert(self, order: dict[str, Any]) -> None:
        self._run.alert(order["title"], order["text"], level=order["level"])

    def _row(self, step: int = 0) -> int:
        """The row of an order that may be late: that of `step`, or the open one if it is a later one."""
        return max(self._step, step, self._resumed_at + 1)

    def _is_new(self, key: str, row: int) -> bool:
        """Whether an order must be carried out; it is noted with its row."""
        if key in self._rows:
            return False
        self._rows[key] = row
        self._save()
        return True

    def _save(self) -> None:
        durable.write_json(self._rows_file, self._rows)


def rows_of(path: Path) -> dict[str, int]:
    """The orders of earlier attempts and their rows; runs of earlier versions have a list of what has survived."""
    known = json.loads(path.read_text()) if path.exists() else {}
    return dict.fromkeys(known, ENDED) if isinstance(known, list) else known


def table_of(samples: Iterable[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """(columns, rows) of the first `ROWS` samples.

    The columns are the keys of all samples in order of appearance, except `NUMBERS`. A missing value is None, a long
    text is cut, and lists and objects become JSON.
    """
    kept = [sample for _, sample in zip(range(ROWS), samples, strict=False)]
    columns = [key for key in dict.fromkeys(key for sample in kept for key in sample) if key not in NUMBERS]
    return columns, [[_cell(sample.get(column)) for column in columns] for sample in kept]


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    text = redact_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} ... ({len(text)} characters)"


if __name__ == "__main__":
    main()
