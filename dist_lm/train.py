"""The program of one rank: `torchrun -m dist_lm.train RUN_DIR` (the launcher does the same through Ray).

It reads the resolved configuration in the run directory, continues from the newest intact checkpoint there, and writes
`result.json` at a true end. USR1 or TERM make all ranks agree on a step, write a checkpoint and leave with exit code 0
but without `result.json`.
"""

import errno
import faulthandler
import logging
import os
import signal
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path

from dist_lm.cluster.agent import STACKS_SIGNAL
from dist_lm.cluster.flight_recorder import collectives_served
from dist_lm.cluster.heartbeat import own_heartbeat
from dist_lm.cluster.node_facts import host_name
from dist_lm.errors import UserError
from dist_lm.stages.registry import load_config
from dist_lm.stages.training.stage import training_stage
from dist_lm.storage import durable
from dist_lm.storage.process import die_with_parent
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.metrics import write_warnings
from dist_lm.tracking.redact import redact_text
from dist_lm.training.heartbeat import StopRequest

log = logging.getLogger("dist_lm.train")


def main() -> None:
    """Run one rank; an exception is recorded in the run directory before it ends the process."""
    if len(sys.argv) != 2 or "RANK" not in os.environ:
        sys.exit("usage: torchrun --nproc-per-node N -m dist_lm.train RUN_DIR   (one that `dist_lm.launch` prepared)")
    run, rank = RunDirectory(Path(sys.argv[1]).resolve()), int(os.environ["RANK"])
    die_with_parent()
    terminal = write_to_log(run.rank_log(rank))
    if rank == 0:
        write_warnings(run.warnings, "dist_lm")
        tell(terminal, f"rank 0 writes to {run.rank_log(0)}")
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL)  # works in a collective that never returns, too
    stop = stop_on_signals()
    try:
        stage = training_stage(load_config(run.config).stage.name)
        several = int(os.environ["WORLD_SIZE"]) > 1  # a single rank waits for no other
        with collectives_served(os.environ) if several else nullcontext():
            stage.run_rank(run, stop, own_heartbeat(os.environ))
    except BaseException as error:
        try:
            log.error("%s", error if is_for_the_user(error, run) else traceback.format_exc())
            try:
                record_failure(run, rank, error)
            except OSError as unrecorded:  # a full disk, most likely the failure itself
                log.error("%s could not be written: %s", run.rank_failure(rank), unrecorded)
            tell(terminal, f"rank {rank}: {type(error).__name__}: {error} (log: {run.rank_log(rank)})")
        finally:
            # other ranks may wait in a collective for this one: leave at once, torchrun ends them
            sys.stderr.flush()
            os._exit(1)


def stop_on_signals() -> StopRequest:
    """A request that USR1 and TERM set; it is looked at between steps."""
    stop = StopRequest()

    def request(number: int, frame: object) -> None:
        log.info("received %s", signal.Signals(number).name)
        stop.requested = True

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, request)
    return stop


def is_for_the_user(error: BaseException, run: RunDirectory) -> bool:
    """Whether the message is all a person needs: no traceback helps against a work directory that is full or read-only.

    Another disk is the node's own, and another node may do.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        # a failed write, unlike a failed open, does not say where; what ranks write they write to the run
        return error.filename is None or Path(str(error.filename)).is_relative_to(run.work.path)
    return isinstance(error, UserError)


def write_to_log(path: Path) -> int:
    """Send this process's output to its own log, C++ libraries included; returns the old standard error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(2)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    return before


def tell(terminal: int, line: str) -> None:
    """Write a line to the old standard error; the log says so if nobody reads it any more."""
    try:
        os.write(terminal, f"{line}\n".encode())
    except OSError as error:
        log.warning("the terminal is gone (%s), it missed: %s", error, line)


def record_failure(run: RunDirectory, rank: int, error: BaseException) -> None:
    """Leave what happened where the launcher looks for it."""
    durable.write_json(
        run.rank_failure(rank),
        {
            "rank": rank,
            "node": host_name(),
            "time": time.time(),
            "type": type(error).__name__,
            "message": redact_text(str(error)),
            "traceback": redact_text(traceback.format_exc()),
            "user_error": is_for_the_user(error, run),
        },
    )


if __name__ == "__main__":
    main()
