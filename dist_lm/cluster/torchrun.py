"""torchrun as an agent starts it: `python -m dist_lm.cluster.torchrun PARENT REPORT_FD ARGUMENTS...`.

It is torchrun's own program with two things around it: it dies with the process PARENT, and when ranks fail
it writes which ones to the file descriptor REPORT_FD as JSON, a list of `{rank, exit_code, time}` (a negative
exit code is the number of a signal; time in seconds since 1970).
"""

import json
import os
import sys
import tempfile

from dist_lm.storage.process import die_with_parent


def main() -> None:
    """Run torchrun to its end; exit code 1 if a rank failed."""
    parent, report = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent)

    # a second and more of torch that only this process pays for
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        # torchrun would leave a folder of its own behind
        with tempfile.TemporaryDirectory(prefix="dlm-torchrun-") as logs:
            torchrun(["--log-dir", logs, *sys.argv[3:]])
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        failures = [
            {"rank": rank, "exit_code": failure.exitcode, "time": float(failure.timestamp)}
            for rank, failure in error.failures.items()
        ]
        os.write(report, json.dumps(failures).encode())
        sys.exit(1)


if __name__ == "__main__":
    main()
