"""The launcher's side of `bench tracking`: `python -m dist_lm.bench.tracking_follower PARENT DIRECTORY VARIANT`.

It follows DIRECTORY/metrics.jsonl, gives every line to wandb as a launcher does, and answers the words `cost` and
`finish` on standard input.
"""

import json
import os
import random
import selectors
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil

from dist_lm.config.root import TrackingConfig
from dist_lm.storage.process import die_with_parent
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.console import Console
from dist_lm.tracking.metrics import MetricsFollower
from dist_lm.tracking.wandb_run import WandbRun

NOBODY, OFFLINE, TROUBLE = "not followed", "wandb offline", "wandb, server in trouble"
POLL_S = 0.1  # between two looks at the metrics file
STALL_S = 5.0  # for which the server in trouble keeps a request
ERRORS = (500, 502, 503)


@contextmanager
def troubled_server() -> Iterator[str]:
    """Runs a server on the loopback interface that stalls, fails or closes the connection at every request, inside the
    block; yields its address (`http://127.0.0.1:PORT`)."""
    rng = random.Random(0)  # noqa: S311 - not used for security

    class Trouble(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            """Stalls for STALL_S seconds, answers an error of the server, or closes the connection, by chance."""
            match rng.choice(("stall", "error", "vanish")):
                case "stall":
                    time.sleep(STALL_S)
                    self.close_connection = True
                case "error":
                    self.send_error(rng.choice(ERRORS))
                case _:
                    self.close_connection = True

        do_GET = do_PUT = do_POST

        def log_message(self, format: str, *arguments: object) -> None:
            """No output."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Trouble)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


def cpu_s() -> float:
    """Returns the CPU seconds of this process and its living descendants."""
    this_process = psutil.Process()
    total = 0.0
    for process in (this_process, *this_process.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            # It has ended meanwhile.
            continue
        total += times.user + times.system
    return total


def main() -> None:
    """Follows the metrics until standard input ends or says `finish`; arguments are those of the command line. It dies
    with its parent.

    Raises:
        OSError: the kernel refuses to tie this process to its parent.
    """
    die_with_parent(int(sys.argv[1]))
    run, variant = RunDirectory(Path(sys.argv[2])), sys.argv[3]

    with troubled_server() if variant == TROUBLE else nullcontext("") as address:
        # A proxy of this machine would answer in place of the server in trouble.
        login = {}
        if address:
            login = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": address, "NO_PROXY": "127.0.0.1"}

        wandb = WandbRun.start(
            {},
            run,
            TrackingConfig(name="wandb", mode="online" if address else "offline"),
            job_type="bench",
            group="bench",
            git_commit=None,
            command=[],
            environ=os.environ | login,
            console=Console(output=sys.stderr, live=False),
        )
        assert wandb is not None
        serve(wandb, run)


def serve(wandb: WandbRun, run: RunDirectory) -> None:
    """Gives lines of the run's metrics to wandb, and answers words on standard input with a JSON line on standard
    output: `cost` with lines and CPU seconds so far, `finish` with the wait for wandb in seconds. It returns after
    `finish`, or when the input ends, which is not answered."""
    follower = MetricsFollower(run.metrics)
    num_lines = 0
    with selectors.DefaultSelector() as requests:
        requests.register(sys.stdin, selectors.EVENT_READ)
        while True:
            for line in follower.poll():
                wandb.log(line["step"], line)
                num_lines += 1
            if not requests.select(POLL_S):
                continue

            word = sys.stdin.readline().strip()
            if word == "cost":
                print(json.dumps({"lines": num_lines, "cpu_s": cpu_s()}), flush=True)
                continue

            # `finish`, or the end of the input: the parent is gone and waits for no answer.
            began = time.monotonic()
            wandb.finish("finished")
            if word:
                print(json.dumps({"wait_s": time.monotonic() - began}), flush=True)
            return


if __name__ == "__main__":
    main()
