"""Groups of rank processes of a benchmark. Each is started once, waits in a read while another is timed, and is ended.

Requests and answers are JSON lines on standard input and output of every rank (`dist_lm.bench.rank`).
"""

import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from dist_lm.bench.case import GroupSize
from dist_lm.cluster.torchrun import CPU_ALLOCATOR, OPENMP_SPIN
from dist_lm.errors import UserError
from dist_lm.parallel.rendezvous import VARIABLE
from dist_lm.tracking.redact import without_secrets

GRACE_S = 10.0  # for ranks to exit after their input has ended
SHOWN_LINES = 15  # last lines of the log of a failed rank that the error shows


class RankFailedError(UserError):
    """A rank of a benchmark exited early; the message has the end of its log."""


class RankGroup:
    """The rank processes of one size, in one process group."""

    def __init__(self, size: GroupSize, benchmark: str, device: str, logs: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dlm-store-")  # mode 0700, as `store_of_ranks` expects
        store = Path(self._folder.name) / "store"

        self.ranks: list[subprocess.Popen[bytes]] = []
        prefix = f"{size.ranks}x{size.threads}{size.label}"
        self.logs = [logs / f"{prefix}_rank_{rank}.log" for rank in range(size.ranks)]
        for rank, path in enumerate(self.logs):
            with path.open("wb") as log:
                self.ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "dist_lm.bench.rank", str(os.getpid()), benchmark, device],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        env=environment_of(size, rank, store, device),
                        # A Ctrl-C goes to the parent, which ends them.
                        start_new_session=True,
                    )
                )
        self._unread = [b""] * size.ranks

    def ask(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Sends a request to all ranks, waits without limit for their answers and returns these, in rank order.

        Raises:
            RankFailedError: a rank exited before it answered.
        """
        # All ranks get the request before the first answer is awaited, since they work on it together.
        line = json.dumps(request).encode() + b"\n"
        for rank, process in enumerate(self.ranks):
            assert process.stdin is not None
            try:
                process.stdin.write(line)
                process.stdin.flush()
            except BrokenPipeError:
                raise self._failure(rank) from None
        return [json.loads(answer) for answer in self._answers()]

    def end(self) -> None:
        """Closes the input of the ranks, so that they exit, and waits at most GRACE_S seconds for each. One that stays
        is not killed here."""
        for process in self.ranks:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.ranks:
            # A rank that stays is killed by `kill`.
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        self._folder.cleanup()

    def kill(self) -> None:
        """Ends the ranks at once, after a failure of one of them or Ctrl-C."""
        # A killed process stays in the table of processes until it is waited for.
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.wait()
        self._folder.cleanup()

    def _answers(self) -> list[bytes]:
        """Returns a line of every rank, in rank order. They are read as they arrive, so that the first rank to exit is
        the one reported.

        Raises:
            RankFailedError: a rank exited before its line was complete.
        """
        with selectors.DefaultSelector() as outputs:
            for rank, process in enumerate(self.ranks):
                assert process.stdout is not None
                outputs.register(process.stdout, selectors.EVENT_READ, rank)

            lines: dict[int, bytes] = {}
            while len(lines) < len(self.ranks):
                for key, _ in outputs.select():
                    rank = key.data
                    content = os.read(key.fd, 65536)
                    if not content:
                        raise self._failure(rank)

                    # A line may come in several parts, and a part may hold the beginning of the next line.
                    line, newline, remainder = (self._unread[rank] + content).partition(b"\n")
                    if newline:
                        lines[rank], self._unread[rank] = line, remainder
                        outputs.unregister(key.fileobj)
                    else:
                        self._unread[rank] = line

        return [lines[rank] for rank in range(len(self.ranks))]

    def _failure(self, rank: int) -> RankFailedError:
        code = self.ranks[rank].wait()
        last_lines = self.logs[rank].read_text(errors="replace").splitlines()[-SHOWN_LINES:]
        return RankFailedError("\n".join([f"rank {rank} of the benchmark ended (exit code {code}):", *last_lines]))


def environment_of(size: GroupSize, rank: int, store: Path, device: str) -> dict[str, str]:
    """Returns the environment of a rank: this one without secrets, with what torch.distributed needs on the loopback
    interface, and the number of threads.

    Args:
        store: file in which the ranks meet, see `dist_lm.parallel.rendezvous`.
    """
    ours = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size.ranks),
        VARIABLE: str(store),
        "OMP_NUM_THREADS": str(size.threads),
    }
    if sys.platform == "linux":
        ours["GLOO_SOCKET_IFNAME"] = "lo"
    if device == "cpu":
        ours |= CPU_ALLOCATOR
    return OPENMP_SPIN | without_secrets(os.environ) | ours


class RankGroups(dict[GroupSize, RankGroup]):
    """Holds groups by size, each started on first use."""

    def __init__(self, benchmark: str, device: str, logs: Path) -> None:
        super().__init__()
        self._start = lambda size: RankGroup(size, benchmark, device, logs)

    def __missing__(self, size: GroupSize) -> RankGroup:
        self[size] = self._start(size)
        return self[size]


@contextmanager
def rank_groups(benchmark: str, device: str, logs: Path) -> Iterator[RankGroups]:
    """Yields groups, each started on first use, whose processes have ended after the block: by themselves, or killed
    after an error.

    Args:
        benchmark: module, or module:object, that has `build`.
        logs: folder for the output of the ranks.
    """
    running = RankGroups(benchmark, device, logs)
    with ExitStack() as ending:
        ending.callback(lambda: [group.kill() for group in running.values()])
        yield running
        for group in running.values():
            group.end()
