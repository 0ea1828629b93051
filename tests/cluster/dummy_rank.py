"""A rank without torch: `python -m dummy_rank RUN_DIR BEHAVIOUR`. Files in RUN_DIR say how far it came."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil

from dist_lm.storage.process import die_with_parent
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.train import record_failure


def main() -> None:
    directory, behaviour, rank = Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])
    die_with_parent()
    print(f"rank {rank} says hello", flush=True)
    interrupted = []
    if behaviour == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGUSR1, lambda *_: interrupted.append(True))
    here = {"pid": os.getpid(), "environ": dict(os.environ), "torchrun": os.getppid()}
    temporary = directory / f".ready_{rank}"
    temporary.write_text(json.dumps(here))
    temporary.replace(directory / f"ready_{rank}")
    if behaviour == "succeed":
        return
    if behaviour == "raise" and rank == 1:
        wait_for_the_start_of(directory / "ready_0")  # torchrun ends the others with this rank, even before they begin
        fail(directory, rank, ValueError("loss went\nthrough the roof"))
    if behaviour == "miss a peer" and rank == 0:
        wait_for_the_end_of(directory / "ready_1")
        fail(directory, rank, RuntimeError("Connection closed by peer [127.0.0.3]:2345"))
    while not interrupted:
        signal.sigtimedwait([], 0.05)
    (directory / f"saved_{rank}").touch()


def fail(directory: Path, rank: int, error: Exception) -> None:
    try:
        raise error
    except type(error):
        record_failure(RunDirectory(directory), rank, error)
        os._exit(1)


def wait_for_the_start_of(peer: Path) -> None:
    while not peer.exists():
        time.sleep(0.05)


def wait_for_the_end_of(peer: Path) -> None:
    while not peer.exists() or psutil.pid_exists(json.loads(peer.read_text())["pid"]):
        time.sleep(0.05)


if __name__ == "__main__":
    main()
