"""A rank without torch: `python -m dummy_rank RUN_DIR BEHAVIOUR`. Files in RUN_DIR say how far it came."""

import json
import os
import signal
import sys
from pathlib import Path

from dist_lm.cluster.process import die_with_parent
from dist_lm.run_directory import RunDirectory
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
        try:
            raise ValueError("loss went\nthrough the roof")
        except ValueError as error:
            record_failure(RunDirectory(directory), rank, error)
            os._exit(1)
    while not interrupted:
        signal.sigtimedwait([], 0.05)
    (directory / f"saved_{rank}").touch()


if __name__ == "__main__":
    main()
