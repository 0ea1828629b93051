"""A head node that only the process which started it knows: `python -m dist_lm.cluster.ray_private_node IP`.

It chooses a free port and a token, says both in one line of JSON on standard output (`address`, `token_path`),
and ends, with every process and file of it, when its standard input is closed: also when the launch that holds the
other end is killed. Signals of a terminal or a scheduler are not for it, so a launch can still checkpoint.
"""

import json
import os
import secrets
import signal
import sys
import threading
import time

from dist_lm.cluster import node_directory
from dist_lm.cluster.ray_node import HEAD_PROCESSES, POLL_S, RayProcesses, head_arguments, report
from dist_lm.storage import process

GRACE_S = 0.3  # nobody uses Ray any more when it is told to end


def main() -> None:
    """Run until standard input ends; exit code 1 if Ray died before."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # not ignored: Ray would inherit that, and not end by TERM
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    address = sys.argv[1]
    node_directory.sweep()
    closed = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), closed.set()), name="stdin", daemon=True).start()
    with node_directory.node_directory(GRACE_S) as directory:
        token = directory / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
        port = process.free_port(address)
        arguments = head_arguments(address, port, [f"--num-cpus={process.cores()}"])
        with (directory / "ray_start.log").open("wb") as output:
            ray = RayProcesses(directory, HEAD_PROCESSES, arguments, output)
        print(json.dumps({"address": f"{address}:{port}", "token_path": str(token)}), flush=True)
        while not closed.is_set() and ray.death() is None:
            time.sleep(POLL_S)
        code = report(ray.death(), ray)
        closed.wait()  # the launch sees that Ray is gone by its calls; its files are there until it leaves
    sys.exit(code)


if __name__ == "__main__":
    main()
