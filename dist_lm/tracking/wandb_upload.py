"""Sends wandb's files to its server while they grow.

wandb's own `wandb beta sync --live` sends the files, so sending may begin late, wait for an absent server or be killed
at any moment: unsent rows are still in the files.
"""

import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from dist_lm.storage.process import die_with_parent
from dist_lm.tracking.wandb_login import base_url

RETRY_S = (5.0, 60.0)  # first and longest wait after an attempt that sent nothing
PROBE_S = 1.0  # time limit of a question whether the server answers

# The client retries an absent server, at short intervals, for as long as the run lasts.
PATIENT = {
    f"WANDB_X_{part}_{name}": value
    for part in ("FILE_STREAM", "FILE_TRANSFER", "GRAPHQL")
    for name, value in (("RETRY_MAX", "100000"), ("RETRY_WAIT_MIN_SECONDS", "1"), ("RETRY_WAIT_MAX_SECONDS", "5"))
} | {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "5", "WANDB_ERROR_REPORTING": "false"}


def marker_of(log: Path) -> Path:
    """Returns the file that wandb writes beside a file that it has sent."""
    return log.with_name(f"{log.name}.synced")


class Uploader:
    """A thread that sends the files of earlier attempts, then the growing one."""

    def __init__(
        self,
        logs: Sequence[Path],
        environ: Mapping[str, str],
        say: Callable[[str, str], None],
        retry_s: float = RETRY_S[0],
    ) -> None:
        """Starts the thread.

        Args:
            logs: wandb's files of the run, oldest first; the last one is being written.
            environ: environment of the client, with a login.
            say: called with (`warning` or `line`, text) for people.
            retry_s: wait before the second attempt, in seconds.
        """
        # Only the last file still grows; the others are sent once.
        *earlier, self._growing = logs
        self._earlier = [log for log in earlier if not marker_of(log).exists()]

        self._environ = dict(environ) | PATIENT
        self._say = say
        self._retry_s = retry_s
        self._over = threading.Event()
        self._sync: subprocess.Popen[str] | None = None

        self._thread = threading.Thread(target=self._work, name="wandb upload", daemon=True)
        self._thread.start()

    def finish(self, patience_s: float) -> bool:
        """Waits until all files are sent, at most `patience_s` seconds, and gives up earlier if the server misses two
        questions. Then the client is killed and the thread ends. Returns whether all files have been sent."""
        deadline = time.monotonic() + patience_s
        num_missed = 0
        while self._thread.is_alive() and time.monotonic() < deadline and num_missed < 2:
            # One missed answer may be chance; a server that misses two is absent.
            self._thread.join(PROBE_S)
            if self._thread.is_alive():
                num_missed += not answers(self._environ)

        self._over.set()
        if self._sync is not None:
            end_tree(self._sync)
        self._thread.join()
        return not self.left()

    def left(self) -> list[Path]:
        """Returns the files that have not been sent completely."""
        return [log for log in (*self._earlier, self._growing) if not marker_of(log).exists()]

    def _work(self) -> None:
        if self._earlier and not self._try_until_sent(self._earlier, live=False):
            return
        self._try_until_sent([self._growing], live=True)

    def _try_until_sent(self, logs: list[Path], live: bool) -> bool:
        """Runs the client until it has sent `logs`, with longer waits in between; returns whether it has.

        It gives up, False, when `finish` is called, or when the server took rows and then refused, which is said as a
        warning.

        Args:
            live: whether the last file still grows.
        """
        wait_s = self._retry_s

        while not self._over.is_set():
            accepted = self._send(logs, live)
            if all(marker_of(log).exists() for log in logs):
                return True

            # The server has accepted rows and then refused: another attempt would send them again.
            if accepted:
                if not self._over.is_set():
                    self._say(
                        "warning",
                        f"wandb's server refuses {logs[-1]}; to try again later: wandb sync {logs[-1].parent.parent}",
                    )
                return False

            # Waits double, so that an absent server is not asked all the time.
            self._over.wait(wait_s)
            wait_s = min(2 * wait_s, RETRY_S[1])
        return False

    def _send(self, logs: list[Path], live: bool) -> bool:
        """Runs wandb's sync of `logs` once and waits for its end. Returns whether the server accepted any row, which
        may be so even after an error.

        The address of the run is said as a line. After an error the markers of `logs` are removed, so they count as
        unsent.

        Args:
            live: whether the run still writes its logs.
        """
        command = [
            sys.executable,
            "-m",
            "dist_lm.tracking.wandb_upload",
            str(os.getpid()),
            "beta",
            "sync",
            "--yes",
            *(["--live"] if live else []),
            *map(str, logs),
        ]

        accepted = failed = False
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=self._environ,
        ) as self._sync:
            assert self._sync.stdout is not None
            # `finish` ran before the process existed.
            if self._over.is_set():
                end_tree(self._sync)

            for line in self._sync.stdout:
                if "View run" in line and not accepted:
                    accepted = True
                    self._say("line", f"wandb: {line.rpartition(' at ')[2].strip()}")
                failed = failed or "ERROR" in line

        if failed or self._sync.returncode:
            # wandb marks a file as sent even if it gave up half way.
            for log in logs:
                marker_of(log).unlink(missing_ok=True)

        return accepted


def answers(environ: Mapping[str, str]) -> bool:
    """Returns whether wandb's server answers within `PROBE_S` seconds; a refusal (below 500) is an answer."""
    request = urllib.request.Request(base_url(environ), method="GET")  # noqa: S310 - the user's own address
    try:
        with urllib.request.urlopen(request, timeout=PROBE_S):  # noqa: S310
            return True
    except urllib.error.HTTPError as error:
        # A refusal is an answer; an error of the server is none.
        return error.code < 500
    except OSError:
        return False


def end_tree(process: subprocess.Popen[str]) -> None:
    """Kills a process and its children."""
    # It has just ended.
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        for member in (root, *root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                member.kill()


def main(parent: str, *arguments: str) -> None:
    """Runs wandb's own command line; the kernel kills it with its parent process.

    Raises:
        OSError: the kernel refuses to end this process with its parent.
    """
    die_with_parent(int(parent))

    from wandb.cli.cli import cli

    cli(list(arguments), prog_name="wandb")


if __name__ == "__main__":
    main(*sys.argv[1:])
