"""The process that records a run in wandb: `python -m dist_lm.tracking.wandb_process`, started by `WandbRun`.

It writes wandb's own files without a network, so everything can be sent later, and starts an `Uploader` where there is
a login. Input: orders as JSON lines, first {directory, init, finish_s}, then the orders of `Recorder.carry_out`, last
{order: finish, outcome}. If the last one is missing, the launcher was killed and the run will continue.
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
RECORDED = "recorded.json"  # file in the run's wandb folder: keys of orders and their rows, see `Recorder`
ENDED = -1  # row number in RECORDED for the orders of an attempt that ended properly
TASKS, STEP_OF_TASKS = "eval/", "eval/step"
FLUSH_S = 1.0  # seconds; longest delay before a row is on disk
ROWS, CHARACTERS = 200, 4000  # most rows of a table of samples, longest text of a cell
NUMBERS = ("tokens", "logprobs", "raw_logprobs")  # columns with a number for each token; tables leave them out


def main() -> None:
    """Carries out the orders on standard input until its end, with lower priority. It changes WANDB_DIR and related
    variables, and waits for the process of an earlier attempt of the run.

    An error ends the recording with a warning, and the orders are still read to their end.
    """
    os.nice(NICE)
    say = _open_messages()

    orders = _orders(sys.stdin)
    first = next(orders, None)
    if first is None:
        return

    run = RunDirectory(Path(first["directory"]))
    # Unsent files and logs belong into the run, not into the home or current directory.
    os.environ |= {
        "WANDB_DIR": str(run.path),
        "WANDB_DATA_DIR": str(run.wandb),
        "WANDB_CACHE_DIR": str(run.wandb / "cache"),
    }

    try:
        # The process of an earlier attempt may still be sending.
        with locked(run.wandb / LOCK, what=str(run.wandb), wait_s=60.0 + first["finish_s"]):
            _record(run, first, orders, say)
    except Exception as error:
        # The run continues without wandb.
        say(
            "warning",
            f"wandb stopped ({type(error).__name__}: {error}); the run goes on, and metrics.jsonl has every metric",
        )
        # The launcher must never block on a full pipe, so orders are read to their end.
        for _ in orders:
            continue


def _record(
    run: RunDirectory, start: dict[str, Any], orders: Iterator[dict[str, Any]], say: Callable[[str, str], None]
) -> None:
    """Records a run in wandb's files and, online, sends them: carries out `orders` to the order `finish`, or their end,
    and waits at most `start["finish_s"]` seconds for the server. What was not sent or not taken is said as a warning.

    Raises:
        Exception: whatever wandb raises at its start, for an order `metrics`, or at its end.
    """
    init = start["init"]
    recorder = Recorder(run, init)
    online = init["mode"] == "online"
    uploader = None
    if online:
        uploader = Uploader(logs_of(run, init["id"]), wandb_environment(os.environ, online), say)

    # If no `finish` arrives, the launcher was killed.
    outcome = "stopped"
    for order in orders:
        if order["order"] == "finish":
            outcome = order["outcome"]
        else:
            try:
                recorder.carry_out(order)
            except Exception as error:
                if order["order"] == "metrics":
                    # Without metrics the copy is worth nothing; a lost table, link or alert is only reported.
                    raise
                say("warning", f"wandb did not take {order['order']} ({type(error).__name__}: {error})")

    recorder.finish(outcome)
    if uploader and not uploader.finish(start["finish_s"]):
        say("warning", f"wandb's server has not got everything yet; to send the rest: wandb sync {run.wandb}")


def _orders(lines: TextIO) -> Iterator[dict[str, Any]]:
    """Yields the orders; an incomplete last line, left by a killed launcher, is ignored."""
    for line in lines:
        if line.endswith("\n"):
            yield json.loads(line)


def _open_messages() -> Callable[[str, str], None]:
    """Returns a function (kind, text) that sends messages to the launcher by the present standard output, and does
    nothing once the launcher is gone. From now on standard output is standard error, a file, so that libraries may
    print."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(kind: str, text: str) -> None:
        try:
            pipe.write(json.dumps({"kind": kind, "text": text}) + "\n")
            pipe.flush()
        except BrokenPipeError:
            # The launcher is gone.
            return

    return say


def logs_of(run: RunDirectory, identity: str) -> list[Path]:
    """Returns wandb's files of a run, one for each attempt, oldest first."""
    logs = run.wandb.glob(f"offline-run-*-{identity}/run-{identity}.wandb")
    return sorted(logs, key=lambda path: path.parent.name)


def last_step(logs: Sequence[Path]) -> int:
    """Returns the last step in wandb's files, which a killed writer may have left incomplete; -1 if there is none. It
    runs `wandb leet inspect` on the newest file, and on older ones as long as there is no step.

    Args:
        logs: oldest first.

    Raises:
        RuntimeError: wandb cannot read a file.
    """
    for log in reversed(logs):
        # wandb's own reader: the format of the file is not documented.
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
        last = -1
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as reading:
            assert reading.stdout is not None
            for line in reading.stdout:
                if b'"type":"history"' in line:
                    last = max(last, int(json.loads(line)["history"]["step"].get("num", 0)))

        if reading.returncode:
            raise RuntimeError(f"{log}: `wandb leet inspect` ended with exit code {reading.returncode}")

        if last >= 0:
            return last
    return -1


class Recorder:
    """Records one attempt of a run.

    wandb writes the row of a step to its file when a later step is logged, after all orders before it. So a kill loses
    what came with the rows after the last row in the files, `_resumed_at`, and nothing else. `_step` is the row that is
    open now. `_rows`, stored in RECORDED, has the row of every order that must be carried out once; the next attempt
    repeats the orders whose row was lost. (An artifact may have been written before its row: wandb stores equal ones
    once.)

    Attributes:
        log: wandb's file of this attempt.
    """

    def __init__(self, run: RunDirectory, init: dict[str, Any]) -> None:
        """Starts an offline run of wandb in the run directory; steps that earlier attempts have recorded are skipped.

        Args:
            init: arguments of `wandb.init`, with `id`.

        Raises:
            RuntimeError: a log of an earlier attempt is of an unknown format.
        """
        # The import takes a second, so only the recorder pays for it.
        import wandb

        last_recorded = last_step(logs_of(run, init["id"]))
        self._step = last_recorded
        self._resumed_at = last_recorded

        self._rows_file = run.wandb / RECORDED
        self._rows = {key: row for key, row in rows_of(self._rows_file).items() if row <= self._resumed_at}
        # Before a row of this attempt gets the number of a lost one.
        self._save()

        # Unless told otherwise, wandb records machine, environment and command, without our redaction.
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
        options: dict[str, Any] = init | {"mode": "offline", "dir": str(run.path)}
        self._run = wandb.init(settings=settings, **options)
        self.log = Path(self._run.dir).parent / f"run-{init['id']}.wandb"

        # The summary of an attempt replaces the summary of the one before, so it starts with the known values.
        if self._resumed_at >= 0:
            last_values = last_metrics(run.metrics)
            self._run.summary.update({name: last_values[name] for name in last_values if name not in ("step", "time")})

    def carry_out(self, order: dict[str, Any]) -> None:
        """Carries out one order of `WandbRun`; an order that an earlier attempt carried out for good is skipped.

        Raises:
            Exception: whatever wandb raises, OSError for a file that cannot be read.
        """
        {
            "metrics": self._metrics,
            "at_newest_step": self._log_at_newest_step,
            "samples": self._samples,
            "link": self._link,
            "alert": self._alert,
        }[order["order"]](order)

    def finish(self, outcome: str) -> None:
        """Records the end: exit code 0 for `finished`, else 1; `stopped` is marked as preempted."""
        if outcome == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=int(outcome != "finished"))
        # A later attempt repeats none of these orders.

        self._rows = dict.fromkeys(self._rows, ENDED)
        self._save()

    def _metrics(self, order: dict[str, Any]) -> None:
        step = order["step"]
        if any(name.startswith(TASKS) for name in order["values"]):
            self._tasks(step, order["values"])
        # Earlier attempts have recorded the steps up to `_resumed_at`.
        elif step >= self._step and step > self._resumed_at:
            self._step = step
            self._run.log(order["values"], step=step)

    def _tasks(self, step: int, values: dict[str, float]) -> None:
        """Records scores of tasks, once for each step and set of names; they may arrive after later steps: wandb draws
        them over `eval/step`."""
        row = self._row(step)
        if self._is_new(f"tasks {step} {' '.join(sorted(values))}", row):
            self._step = row
            self._run.define_metric(f"{TASKS}*", step_metric=STEP_OF_TASKS)
            self._run.log(values | {STEP_OF_TASKS: step}, step=row)

    def _log_at_newest_step(self, order: dict[str, Any]) -> None:
        # Otherwise this attempt has no row yet.
        if self._step > self._resumed_at:
            self._run.log(order["values"], step=self._step)

    def _samples(self, order: dict[str, Any]) -> None:
        row = self._row(order["step"])
        if self._is_new(f"samples {order['key']}", row):
            self._step = row
            columns, rows = table_of(json_lines(Path(order["path"])))
            table = self._wandb.Table(columns=cast(Any, columns), data=cast(Any, rows), allow_mixed_types=True)
            self._run.log({order["name"]: table}, step=row)

    def _link(self, order: dict[str, Any]) -> None:
        """Records files as an artifact by reference, once for each `key`."""
        if not self._is_new(f"link {order['key']}", self._row()):
            return

        artifact = self._wandb.Artifact(order["name"], type=order["kind"], metadata=order["metadata"])
        for file in order["files"]:
            artifact.add_reference(Path(file).as_uri(), name=Path(file).name)

        self._run.log_artifact(artifact, aliases=["latest", *order["aliases"]])

    def _alert(self, order: dict[str, Any]) -> None:
        self._run.alert(order["title"], order["text"], level=order["level"])

    def _row(self, step: int = 0) -> int:
        """Returns the row of an order that may be late: the row of `step`, or the open row if it is later."""
        return max(self._step, step, self._resumed_at + 1)

    def _is_new(self, key: str, row: int) -> bool:
        """Returns whether an order must be carried out, and records it with its row."""
        if key in self._rows:
            return False

        self._rows[key] = row
        self._save()
        return True

    def _save(self) -> None:
        durable.write_json(self._rows_file, self._rows)


def rows_of(path: Path) -> dict[str, int]:
    """Returns the orders of earlier attempts and their rows.

    Runs of earlier versions have a list of the orders that survived instead. A damaged file has none: what its orders
    recorded is recorded again.
    """
    try:
        recorded = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        recorded = {}
    if isinstance(recorded, list):
        return {str(order): ENDED for order in recorded}
    if not isinstance(recorded, dict):
        return {}
    return {order: row for order, row in recorded.items() if isinstance(row, int)}


def table_of(samples: Iterable[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Returns (columns, rows) of a table with the first `ROWS` samples.

    The columns are the keys of these samples in order of appearance, except `NUMBERS`. A missing value is None, a long
    text is cut, lists and objects become JSON, and passwords of URLs are removed.
    """
    first_samples = [sample for _, sample in zip(range(ROWS), samples, strict=False)]
    columns = [key for key in dict.fromkeys(key for sample in first_samples for key in sample) if key not in NUMBERS]
    return columns, [[_cell(sample.get(column)) for column in columns] for sample in first_samples]


def _cell(field: Any) -> Any:
    if field is None or isinstance(field, bool | int | float):
        return field
    text = redact_text(field if isinstance(field, str) else json.dumps(field, ensure_ascii=False))
    if len(text) <= CHARACTERS:
        return text
    return f"{text[:CHARACTERS]} ... ({len(text)} characters)"


if __name__ == "__main__":
    main()
