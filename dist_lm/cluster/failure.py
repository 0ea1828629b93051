"""Why a gang failed: the first rank that went wrong by itself, told apart from those that only lost it."""

import json
import re
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_lm.cluster.agent import RankExit
from dist_lm.storage.run_directory import RunDirectory

# what a healthy rank sees when another one is gone, in the words of gloo, NCCL and the TCP store
_ECHO = re.compile(
    r"connection (was )?(closed|reset|refused)|closed by peer|broken pipe|connectFullMesh|failed to connect"
    r"|socket (timeout|closed)|remote process exited|NCCL (communicator|error)|DistNetworkError"
    r"|recvValue failed|timed out waiting|watchdog",
    re.IGNORECASE,
)

NODE_LOST = "node lost"
SILENT = "it does not answer"  # why a node counts as lost, where nothing better is known


@dataclass(eq=False)
class GangFailure(RuntimeError):  # noqa: N818 - the noun of the architecture
    """A gang ended without success; `str` of it is one line."""

    node: int | None  # None: it cannot be told which
    rank: int | None  # None: the node itself
    type: str  # of the exception, or `killed`, `exit`, `hung`, `node lost`
    message: str
    log: Path  # where to read on
    traceback: str = ""
    user_error: bool = False  # the message is all a person needs
    host: str = ""  # name of the node
    gpu: int | None = None  # of the rank, on its node

    def __str__(self) -> str:
        node = f"node {self.node}" if self.node is not None else "all nodes"
        node += f" ({self.host})" if self.host else ""
        gpu = f" (GPU {self.gpu})" if self.gpu is not None else ""
        who = f"rank {self.rank}{gpu} on {node}" if self.rank is not None else node
        return f"{who}: {self.type}: {' '.join(self.message.split())} (log: {self.log})"


class PoolFailure(RuntimeError):  # noqa: N818 - as GangFailure
    """Actors of a pool died again and again without an answer in between; `str` of it is one line."""


@dataclass(frozen=True)
class Crowd:
    """The ranks of a gang, by number: which node each is on, and which GPU it has."""

    hosts: Sequence[str]
    ranks_per_node: int
    device: str = "cpu"

    @property
    def size(self) -> int:
        return len(self.hosts) * self.ranks_per_node

    def failure_of(
        self, rank: int, kind: str, message: str, log: Path, traceback: str = "", user_error: bool = False
    ) -> GangFailure:
        """The failure of one rank."""
        node, local = divmod(rank, self.ranks_per_node)
        gpu = local if self.device == "cuda" else None
        return GangFailure(node, rank, kind, message, log, traceback, user_error, self.hosts[node], gpu)


@dataclass(frozen=True)
class RankFailure:
    """The record that a rank leaves of the exception that ended it; time in seconds since 1970."""

    rank: int
    time: float
    type: str
    message: str
    traceback: str
    user_error: bool

    @property
    def is_echo(self) -> bool:
        """Whether it looks like the loss of another rank."""
        return not self.user_error and bool(_ECHO.search(f"{self.type}: {self.message}"))


def read_failures(run: RunDirectory, world_size: int) -> list[RankFailure]:
    """The records of failed ranks in a run directory."""
    failures = []
    for rank in range(world_size):
        path = run.rank_failure(rank)
        if path.exists():
            record = json.loads(path.read_text())
            record = {name: record[name] for name in RankFailure.__dataclass_fields__}
            failures.append(RankFailure(**record))
    return failures


def clear_failures(run: RunDirectory) -> None:
    """Take away the records of an earlier attempt, which may have had more ranks."""
    for record in run.rank_failures():
        record.unlink(missing_ok=True)


def root_cause(failures: Iterable[RankFailure], exits: Sequence[RankExit]) -> RankFailure | RankExit | None:
    """The earliest failure that has its cause in itself.

    An exception that is no echo of another rank's end comes first; then a rank killed by a signal that left
    no record (SIGTERM is torchrun's own); then one that left with an exit code; then the earliest echo.
    """
    by_time = sorted(failures, key=lambda failure: failure.time)
    recorded = {failure.rank for failure in by_time}
    silent = sorted((rank for rank in exits if rank.rank not in recorded), key=lambda rank: rank.time)
    killed = [rank for rank in silent if rank.exit_code < 0 and rank.exit_code != -signal.SIGTERM]
    left = [rank for rank in silent if rank.exit_code > 0]
    candidates = [*(failure for failure in by_time if not failure.is_echo), *killed, *left, *by_time, *silent]
    return candidates[0] if candidates else None


def may_be_echo(cause: RankFailure | RankExit) -> bool:
    """Whether it is what a rank does that has lost another one; NCCL's watchdog aborts it without a word."""
    return cause.is_echo if isinstance(cause, RankFailure) else cause.exit_code == -signal.SIGABRT


def describe_exit(exit_code: int) -> tuple[str, str]:
    """(type, message) of a process that left nothing but an exit code."""
    if exit_code >= 0:
        return "exit", f"left with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    hint = "; out of memory is the usual reason" if name == "SIGKILL" else ""
    return "killed", f"killed by {name}{hint}"


def explain(
    run: RunDirectory,
    crowd: Crowd,
    exits: Sequence[RankExit],
    lost: Mapping[int, str],
    exit_codes: Sequence[int | None],
) -> GangFailure:
    """The failure of a gang, from all that is known when it is over.

    Args:
        exits: ranks that ended badly, as torchrun saw them.
        lost: nodes that are gone, and why.
        exit_codes: of torchrun, by node; None while it runs.
    """
    cause = root_cause(read_failures(run, crowd.size), exits)
    if lost and (cause is None or may_be_echo(cause)):
        # one that only fell silent may have died of the loss of another
        node = min(lost, key=lambda node: (lost[node] == SILENT, node))
        reason = lost[node]
        return GangFailure(node, None, NODE_LOST, reason, run.node_log(node), host=crowd.hosts[node])
    if isinstance(cause, RankFailure):
        log = run.rank_log(cause.rank)
        return crowd.failure_of(cause.rank, cause.type, cause.message, log, cause.traceback, cause.user_error)
    if cause is not None:
        log = run.rank_log(cause.rank)
        log = log if log.exists() else run.node_log(cause.rank // crowd.ranks_per_node)
        return crowd.failure_of(cause.rank, *describe_exit(cause.exit_code), log)
    node, code = next((node, code) for node, code in enumerate(exit_codes) if code)
    kind, message = describe_exit(code or 0)
    log = run.node_log(node)
    return GangFailure(node, None, kind, f"torchrun {message}", log, traceback=_tail(log), host=crowd.hosts[node])


def _tail(path: Path, lines: int = 20) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""
