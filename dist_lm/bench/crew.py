"""Processes that a benchmark asks for work: started once, idle in a read while another crew is timed, surely ended.

A request and its answers are JSON lines on standard input and output of every rank (`dist_lm.bench.rank`).
"""

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dist_lm.bench.case import CrewSize
from dist_lm.cluster.torchrun import CPU_ALLOCATOR, OPENMP_SPIN
from dist_lm.errors import UserError
from dist_lm.storage.process import free_port
from dist_lm.tracking.redact import without_secrets

LOOPBACK = "127.0.0.1"
GRACE_S = 10.0  # for ranks that were asked to leave
SHOWN_LINES = 15  # of the log of a rank that failed


class RankFailedError(UserError):
    """A rank of a benchmark ended before its work was done; the message has the end of its log."""


class Crew:
    """The ranks of one size, which have joined one process group."""

    def __init__(self, size: CrewSize, module: str, device: str, logs: Path) -> None:
        port = str(free_port(LOOPBACK))
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.logs = [logs / f"{size.ranks}x{size.threads}_rank_{rank}.log" for rank in range(size.ranks)]
        for rank, path in enumerate(self.logs):
            with path.open("wb") as log:
                self.ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "dist_lm.bench.rank", str(os.getpid()), module, device],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        env=_environment(size, rank, port, device),
                        start_new_session=True,  # a Ctrl-C in the terminal is for the one that ends them
                    )
                )
        self._unread = [b""] * size.ranks

    def ask(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The answer of every rank, in their order.

        Raises:
            RankFailedError: one of them ended instead.
        """
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
        """Let the ranks leave; kill those that do not."""
        for process in self.ranks:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.ranks:
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()

    def kill(self) -> None:
        """End the ranks at once: one of them waits for another in vain, or somebody pressed Ctrl-C."""
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.wait()

    def _answers(self) -> list[bytes]:
        """A line of every rank, read as they come: whoever ends first is the one to report."""
        with selectors.DefaultSelector() as ready:
            for rank, process in enumerate(self.ranks):
                assert process.stdout is not None
                ready.register(process.stdout, selectors.EVENT_READ, rank)
            lines: dict[int, bytes] = {}
            while len(lines) < len(self.ranks):
                for key, _ in ready.select():
                    rank = key.data
                    content = os.read(key.fd, 65536)
                    if not content:
                        raise self._failure(rank)
                    line, newline, rest = (self._unread[rank] + content).partition(b"\n")
                    if newline:
                        lines[rank], self._unread[rank] = line, rest
                        ready.unregister(key.fileobj)
                    else:
                        self._unread[rank] = line
        return [lines[rank] for rank in range(len(self.ranks))]

    def _failure(self, rank: int) -> RankFailedError:
        code = self.ranks[rank].wait()
        end = self.logs[rank].read_text(errors="replace").splitlines()[-SHOWN_LINES:]
        return RankFailedError("\n".join([f"rank {rank} of the benchmark ended (exit code {code}):", *end]))


def _environment(size: CrewSize, rank: int, port: str, device: str) -> dict[str, str]:
    ours = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size.ranks),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": str(size.threads),
    }
    if sys.platform == "linux":
        ours["GLOO_SOCKET_IFNAME"] = "lo"
    return OPENMP_SPIN | without_secrets(os.environ) | ours | (CPU_ALLOCATOR if device == "cpu" else {})


class Crews:
    """The crews of a benchmark by size, each started when it is first asked for."""

    def __init__(self, module: str, device: str, logs: Path) -> None:
        self._start = lambda size: Crew(size, module, device, logs)
        self._crews: dict[CrewSize, Crew] = {}

    def __getitem__(self, size: CrewSize) -> Crew:
        if size not in self._crews:
            self._crews[size] = self._start(size)
        return self._crews[size]

    def all(self) -> list[Crew]:
        return list(self._crews.values())


@contextmanager
def crews(module: str, device: str, logs: Path) -> Iterator[Crews]:
    """Crews that are gone after the block, however it ends."""
    running = Crews(module, device, logs)
    with ExitStack() as ending:
        ending.callback(lambda: [crew.kill() for crew in running.all()])
        yield running
        for crew in running.all():
            crew.end()
