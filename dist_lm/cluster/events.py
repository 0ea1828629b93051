"""Events of a gang: failures as values, and the journal that records what happened.

events.jsonl: `time` (seconds since 1970), `event`, and the fields of the event:
  started    attempt, nodes [{host, address}], ranks_per_node, device, layout, step (of the checkpoint it continues),
             slowest_link_mb_per_s (measured between two nodes before the start; null: not measured)
  failed     error (one line), type, rank, host, restarts_left
  growing    nodes (of the next attempt)
  stopped    signal
  finished   steps
"""

import json
import logging
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_lm.cluster.agent import RankExit
from dist_lm.cluster.heartbeat import Pulse
from dist_lm.errors import ArtefactError
from dist_lm.storage import durable
from dist_lm.storage.process import signal_name
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.training.heartbeat import PHASE_WORDS

log = logging.getLogger(__name__)

# messages of gloo, NCCL and the TCP store on a healthy rank whose peer is gone
_ECHO = re.compile(
    r"connection (was )?(closed|reset|refused)|closed by peer|broken pipe|connectFullMesh|failed to connect"
    r"|socket (timeout|closed)|remote process exited|NCCL (communicator|error)|DistNetworkError"
    r"|recvValue failed|timed out waiting|watchdog",
    re.IGNORECASE,
)

NODE_LOST = "node lost"
SILENT = "it does not answer"  # why a node counts as lost if nothing better is known
LOG_TAIL = 20  # lines
LIVE_EVERY_S = 2.0


@dataclass(eq=False)
class GangFailure(RuntimeError):  # noqa: N818 - a noun of the architecture
    """A gang ended without success; `str` of it is one line."""

    node: int | None  # None: unknown
    rank: int | None  # None: the node itself
    type: str  # class of the exception, or `killed`, `exit`, `hung`, `node lost`
    message: str
    log: Path  # the log with the details
    traceback: str = ""
    user_error: bool = False  # the message tells the user everything
    host: str = ""  # name of the node
    gpu: int | None = None  # index of the rank's GPU on its node

    def __str__(self) -> str:
        """Returns one line: `rank R (GPU G) on node N (HOST): TYPE: MESSAGE (log: LOG)`; parts that are not known are
        left out, and without a node it is `all nodes`.
        """
        who = "all nodes"
        if self.node is not None:
            who = f"node {self.node}"
        if self.host:
            who += f" ({self.host})"
        if self.rank is not None:
            gpu = f" (GPU {self.gpu})" if self.gpu is not None else ""
            who = f"rank {self.rank}{gpu} on {who}"
        return f"{who}: {self.type}: {' '.join(self.message.split())} (log: {self.log})"


class PoolFailure(RuntimeError):  # noqa: N818 - as GangFailure
    """Actors of a pool died repeatedly without an answer in between; `str` of it is one line."""


@dataclass(frozen=True)
class Crowd:
    """The ranks of a gang: node and GPU of each."""

    hosts: Sequence[str]
    ranks_per_node: int
    device: str = "cpu"

    @property
    def size(self) -> int:
        return len(self.hosts) * self.ranks_per_node

    def failure_of(
        self, rank: int, kind: str, message: str, log: Path, traceback: str = "", user_error: bool = False
    ) -> GangFailure:
        """Returns the failure of one rank."""
        node, local = divmod(rank, self.ranks_per_node)
        gpu = local if self.device == "cuda" else None
        return GangFailure(node, rank, kind, message, log, traceback, user_error, self.hosts[node], gpu)


@dataclass(frozen=True)
class RankFailure:
    """The record that a rank writes of the exception that ended it; time in seconds since 1970."""

    rank: int
    time: float
    type: str
    message: str
    traceback: str
    user_error: bool

    @property
    def is_echo(self) -> bool:
        """Whether the exception looks like the loss of another rank."""
        return not self.user_error and bool(_ECHO.search(f"{self.type}: {self.message}"))


FAILURE_KINDS: dict[str, durable.Kind] = {  # types of the record's values
    "rank": int,
    "time": (int, float),
    **dict.fromkeys(("type", "message", "traceback"), str),
    "user_error": bool,
}


def read_failures(run: RunDirectory, world_size: int) -> list[RankFailure]:
    """Returns the records of failed ranks in a run directory, by rank; ranks without a record are left out, and so are
    damaged records, with a warning: how the process ended is known without them."""
    failures = []
    for rank in range(world_size):
        path = run.rank_failure(rank)
        if path.exists():
            try:
                record = durable.read_json(path, FAILURE_KINDS, "the record of a failed rank")
            except (ArtefactError, OSError) as error:
                log.warning("%s", error)
                continue
            failures.append(RankFailure(**{name: record[name] for name in FAILURE_KINDS}))
    return failures


def clear_failures(run: RunDirectory) -> None:
    """Removes the records of an earlier attempt, which may have had more ranks."""
    for record in run.rank_failures():
        record.unlink(missing_ok=True)


def root_cause(failures: Iterable[RankFailure], exits: Sequence[RankExit]) -> RankFailure | RankExit | None:
    """Returns the earliest failure that is not the consequence of another one; None without failures.

    In this order: an exception that is no echo of another rank's end; a rank killed by a signal without a record
    (except SIGTERM, which torchrun sends); a rank that left with an exit code; the earliest echo; a rank ended by
    SIGTERM.
    """
    # The record of a rank says more than its exit code.
    by_time = sorted(failures, key=lambda failure: failure.time)
    recorded_ranks = {failure.rank for failure in by_time}
    silent = sorted((rank for rank in exits if rank.rank not in recorded_ranks), key=lambda rank: rank.time)

    originals = [failure for failure in by_time if not failure.is_echo]
    killed = [rank for rank in silent if rank.exit_code < 0 and rank.exit_code != -signal.SIGTERM]
    exited = [rank for rank in silent if rank.exit_code > 0]
    return next(iter([*originals, *killed, *exited, *by_time, *silent]), None)


def may_be_echo(cause: RankFailure | RankExit) -> bool:
    """Returns whether the loss of another rank may have caused it."""
    if isinstance(cause, RankFailure):
        return cause.is_echo
    # NCCL's watchdog aborts a rank before it can write a record.
    return cause.exit_code == -signal.SIGABRT


def describe_exit(exit_code: int) -> tuple[str, str]:
    """Returns (type, message) of a process that left only an exit code; a negative one is the signal that killed it."""
    if exit_code >= 0:
        return "exit", f"left with exit code {exit_code}"
    message = f"killed by {signal_name(-exit_code)}"
    if -exit_code == signal.SIGKILL:
        message += "; the usual reason is lack of memory"
    return "killed", message


def explain(
    run: RunDirectory,
    crowd: Crowd,
    exits: Sequence[RankExit],
    lost: Mapping[int, str],
    exit_codes: Sequence[int | None],
) -> GangFailure:
    """Returns the failure of a gang, from everything known at its end; reads the records and logs of the run.

    A lost node is the cause, unless a rank failed for a reason that is no echo of that.

    Args:
        exits: failed ranks, as torchrun reports them.
        lost: lost nodes, with the reason.
        exit_codes: exit code of torchrun by node; None while it runs. Without another cause one of them is not 0.
    """
    cause = root_cause(read_failures(run, crowd.size), exits)

    # Ranks that lose a peer fail like that, so a lost node is the cause of such failures.
    if lost and (cause is None or may_be_echo(cause)):
        # a silent node comes last: it may have failed because another one was lost
        node = min(lost, key=lambda node: (lost[node] == SILENT, node))
        return GangFailure(node, None, NODE_LOST, lost[node], run.node_log(node), host=crowd.hosts[node])
    if isinstance(cause, RankFailure):
        log = run.rank_log(cause.rank)
        return crowd.failure_of(cause.rank, cause.type, cause.message, log, cause.traceback, cause.user_error)
    if cause is not None:
        # A rank that ended early has no log of its own yet.
        log = run.rank_log(cause.rank)
        if not log.exists():
            log = run.node_log(cause.rank // crowd.ranks_per_node)
        return crowd.failure_of(cause.rank, *describe_exit(cause.exit_code), log)

    # No rank failed: torchrun itself did.
    node, code = next((node, code) for node, code in enumerate(exit_codes) if code)
    kind, message = describe_exit(code or 0)
    log = run.node_log(node)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL:]) if log.exists() else ""
    return GangFailure(node, None, kind, f"torchrun {message}", log, traceback=tail, host=crowd.hosts[node])


class Journal:
    """Writes the events of a run and the state of its ranks."""

    def __init__(self, run: RunDirectory) -> None:
        """Appends to the events of `run`."""
        self._run = run
        self._live_at = 0.0

    def write(self, event: str, **fields: Any) -> None:
        """Appends one event with the present time. If a killed launcher left an incomplete line, the event starts a new
        line.

        Raises:
            OSError: the file cannot be written.
        """
        line = json.dumps({"time": time.time(), "event": event, **fields}).encode()
        with self._run.events.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            file.write(line + b"\n")

    def live(self, pulses: Sequence[Pulse]) -> None:
        """Writes the last heartbeats of the ranks, at most once in `LIVE_EVERY_S`; a failed write is only logged."""
        if time.monotonic() - self._live_at < LIVE_EVERY_S:
            return
        self._live_at = time.monotonic()
        ranks = [asdict(pulse) | {"phase": PHASE_WORDS[pulse.phase]} for pulse in pulses]
        try:
            durable.replace_text(self._run.live, json.dumps({"time": time.time(), "ranks": ranks}) + "\n")
        except OSError as error:  # only people read it: no reason to end training
            log.warning("could not write %s: %s", self._run.live, error)


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the events of a run in order, without lines that a killed launcher left incomplete; nothing without a
    file.

    Raises:
        ArtefactError: a complete line is no event.
    """
    if not path.exists():
        return
    for number, line in enumerate(path.read_text(errors="replace").split("\n"), start=1):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if not _is_event(event):
            raise ArtefactError(
                f"{path}:{number}: not an event: {line[:80]!r}; move the file away to continue without it"
            )
        yield event


_FIELDS: dict[str, dict[str, Any]] = {  # types of fields, where an event has them
    "started": {"nodes": list, "ranks_per_node": int, "device": str, "layout": str, "step": int},
    "failed": {"error": str},
}


def _is_event(event: Any) -> bool:
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return False

    fields = _FIELDS.get(event["event"], {})
    nodes = event.get("nodes")
    if isinstance(nodes, list) and not all(isinstance(node, dict) and {"host", "address"} <= {*node} for node in nodes):
        return False
    has_time = isinstance(event.get("time"), int | float)
    return has_time and all(isinstance(event[name], kind) for name, kind in fields.items() if name in event)
