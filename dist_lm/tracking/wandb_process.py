"""The process that keeps the wandb copy of a run: `python -m dist_lm.tracking.wandb_process`, started by `WandbRun`.

Orders come in, a JSON object a line: first {directory, init, finish_s}, then what `Recorder.carry_out` knows, at last
{order: finish, outcome}. An input that ends without it is a launcher that was killed: the run will be continued. Out go
{kind: warning | line, text} for people. It ends by itself, in bounded time, whatever server or launcher do.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from dist_lm.storage.lock import locked
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.wandb_login import wandb_environment
from dist_lm.tracking.wandb_recorder import Recorder, logs_of
from dist_lm.tracking.wandb_upload import Uploader

NICE = 5  # ranks come first
LOCK = ".process.lock"


def main() -> None:
    """Carry out what standard input asks for."""
    os.nice(NICE)
    say = _voice()
    orders = _orders(sys.stdin)
    start = next(orders, None)
    if start is None:
        return
    run = RunDirectory(Path(start["directory"]))
    # what waits to be sent, and logs, belong to the run, not to a home directory or to where the launcher was started
    os.environ |= {
        "WANDB_DIR": str(run.path),
        "WANDB_DATA_DIR": str(run.wandb),
        "WANDB_CACHE_DIR": str(run.wandb / "cache"),
    }
    try:
        # the process of an earlier launch may still be sending
        with locked(run.wandb / LOCK, what=str(run.wandb), wait_s=60.0 + start["finish_s"]):
            _record(run, start, orders, say)
    except Exception as error:  # whatever it is, the run goes on without its copy
        say(
            "warning",
            f"wandb stopped ({type(error).__name__}: {error}); the run goes on, and metrics.jsonl has every metric",
        )
        for _ in orders:  # the launcher is not to wait for a full pipe
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
    """The orders; half a line that a killed launcher left is none."""
    for line in lines:
        if line.endswith("\n"):
            yield json.loads(line)


def _voice() -> Callable[[str, str], None]:
    """What goes to people; what libraries print goes to standard error, which is a file."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(kind: str, text: str) -> None:
        try:
            pipe.write(json.dumps({"kind": kind, "text": text}) + "\n")
            pipe.flush()
        except BrokenPipeError:  # the launcher is gone, with it whom we could tell
            return

    return say


if __name__ == "__main__":
    main()
