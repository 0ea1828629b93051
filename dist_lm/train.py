"""The program of one rank. torchrun starts it with one of two command lines.

    torchrun --nproc-per-node 2 -m dist_lm.train stage=code work_dir=work [key=value]
    torchrun --nproc-per-node 2 -m dist_lm.train RUN_DIR

The first needs neither a launcher nor Ray: rank 0 composes the configuration, compares it with the run, resolves the
layout and writes `config.yaml` (`dist_lm.prepare.without_launcher`). The second trains the run that a `config.yaml`
describes; this is what the launcher starts, watches and starts again. In both cases the other ranks wait until rank 0
has told them the hash of `config.yaml`, and then all do the same: they continue from the newest intact checkpoint of
the run, and write `result.json` after the last step.

USR1, TERM or Ctrl-C make all ranks agree on a step, write a checkpoint and leave with exit code 0 but without
`result.json`. Exit code 2: rank 0 has refused the command line, and one line says why. 1: a rank has failed, and
`logs/failure_RANK.json` says how.
"""

import errno
import faulthandler
import io
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO, cast

from dist_lm.cluster.agent import STACKS_SIGNAL
from dist_lm.cluster.flight_recorder import collectives_served
from dist_lm.cluster.heartbeat import VARIABLE as HEARTBEAT
from dist_lm.cluster.heartbeat import RememberedHeartbeat, Standstill, own_heartbeat
from dist_lm.cluster.node_facts import host_name
from dist_lm.cluster.torchrun import complete_environment
from dist_lm.config.root import Config
from dist_lm.errors import ArtefactError, UserError
from dist_lm.parallel.rendezvous import store_of_ranks
from dist_lm.prepare.run import Ranks, fit_to_ranks, rank_lock
from dist_lm.stages.registry import load_config
from dist_lm.stages.training.stage import TrainingStage, training_stage
from dist_lm.storage import durable
from dist_lm.storage.process import die_with_parent
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.console import Console
from dist_lm.tracking.metrics import LineFollower, MetricsFollower, write_warnings
from dist_lm.tracking.redact import redact_text, without_secrets
from dist_lm.training.heartbeat import SLOW_START_S, Phase, StopRequest

if TYPE_CHECKING:
    from torch.distributed import Store

log = logging.getLogger("dist_lm.train")

USAGE = """usage: torchrun --nproc-per-node N -m dist_lm.train stage=S [key=value]   (as for dist_lm.launch)
       torchrun --nproc-per-node N -m dist_lm.train RUN_DIR"""
PREPARED = "dist_lm/prepared"  # key of the store, under which rank 0 tells the others what it has prepared
PREPARED_WAIT_S = 3600.0  # rank 0 may wait for the locks of a run, and hashes large files
SEEN_S = 60.0  # a network file system may show a new file with a delay
POLL_S = 0.2
PROGRESS_EVERY_S = 1.0


def main() -> None:
    """Runs one rank of torchrun, and ends with it; the process starts itself again once with the full environment.

    Without arguments or torchrun it exits with the usage (code 1).

    Raises:
        OSError: the kernel refuses to end this process with its parent.
    """
    arguments = sys.argv[1:]
    if not arguments or "RANK" not in os.environ:
        sys.exit(USAGE)
    start_with_full_environment()
    die_with_parent()

    if names_run(arguments):
        run = RunDirectory(Path(arguments[0]).resolve())
        train_run(run)
    else:
        train_stage(arguments)


def names_run(arguments: Sequence[str]) -> bool:
    """Returns whether the command line is the path of a run directory, and not `key=value`."""
    return len(arguments) == 1 and (Path(arguments[0]).is_dir() or "=" not in arguments[0])


def train_run(run: RunDirectory) -> None:
    """Trains the run that a `config.yaml` describes; output goes to the log of the rank.

    Rank 0 first waits for ranks of an earlier attempt to end, and rewrites `config.yaml` if the layout was resolved for
    another number of ranks; the other ranks wait for it. Without `config.yaml` the process exits with code 2. A failure
    is recorded in the run directory and ends the process with code 1.

    Raises:
        OSError: the log cannot be opened.
    """
    rank, stop = int(os.environ["RANK"]), StopRequest()
    if not run.config.is_file():
        Console().error(f"{run.config}: there is no such file; expected the folder of a run, or stage=S [key=value]")
        sys.exit(2)
    terminal = Terminal.redirect(run.rank_log(rank))
    own_heartbeat(os.environ).beat(Phase.JOINING, 0)
    # Into the log, until the ranks have met (`joined`): a start that stands says where.
    faulthandler.dump_traceback_later(SLOW_START_S, repeat=True)

    with ExitStack() as locks, recorded_failure(run, rank, terminal):
        store = store_of_ranks(PREPARED_WAIT_S)

        def prepare() -> RunDirectory:
            locks.enter_context(rank_lock(run, log.warning, stopped=lambda: stop.requested))
            fit_to_ranks(run, Ranks.started(os.environ))
            return run

        if rank == 0:
            write_warnings(run.warnings, "dist_lm")
            stop_on_signals(stop)
        prepared_by_first_rank(store, rank, prepare)
        train(run, rank, stop, terminal)


def train_stage(arguments: Sequence[str]) -> None:
    """Prepares the run that a command line asks for, and trains it; returns at once if it is finished.

    If rank 0 refuses the command line (UserError), all ranks exit with code 2. After that, output goes to the log of
    the rank, and a failure is recorded in the run directory and ends the process with code 1.

    Raises:
        OSError: the log cannot be opened.
    """
    rank, stop = int(os.environ["RANK"]), StopRequest()
    with ExitStack() as locks:
        store = store_of_ranks(PREPARED_WAIT_S)

        def prepare() -> RunDirectory | None:
            from dist_lm.prepare.without_launcher import prepare_stage  # only rank 0 needs Hydra

            return prepare_stage(arguments, Ranks.started(os.environ), Console(), stop, locks)

        if rank == 0:
            stop_on_signals(stop)
        try:
            run = prepared_by_first_rank(store, rank, prepare)
        except UserError as error:
            Console().error(str(error))
            # The other ranks wait for the answer of rank 0.
            if rank == 0:
                store.set(PREPARED, json.dumps({"refused": True}))
            leave(2)
        except RefusedError:
            leave(2)  # rank 0 has said why
        if run is None:
            return

        terminal = Terminal.redirect(run.rank_log(rank))
        with recorded_failure(run, rank, terminal):
            if rank == 0:
                write_warnings(run.warnings, "dist_lm")
            train(run, rank, stop, terminal)


def train(run: RunDirectory, rank: int, stop: StopRequest, terminal: "Terminal") -> None:
    """Trains a prepared run to its last step or a stop; on rank 0 it shows progress and the result if no launcher does.

    It removes secrets from the environment and handles the signals of the process. What `TrainingStage.run_rank` raises
    passes through; so do errors of `load_config` (ConfigError) and of the summary.
    """
    # Rank 0 needed secrets to recognise them in the configuration; programs that ranks start must not inherit them.
    for name in os.environ.keys() - without_secrets(os.environ).keys():
        del os.environ[name]
    # Rank 0 has listened to signals since it began to wait for the locks.
    if rank != 0:
        stop_on_signals(stop)
    faulthandler.enable()
    # Works in a collective that never returns, too.
    faulthandler.register(STACKS_SIGNAL)

    config = load_config(run.config)
    stage = training_stage(config.stage.name)
    # A launcher that watches this rank (HEARTBEAT is set) shows progress and results itself.
    is_watched = HEARTBEAT in os.environ
    reports = rank == 0 and not is_watched
    if rank == 0:
        terminal.tell(f"rank 0 writes to {run.rank_log(0)}")

    with ExitStack() as stack:
        # A single rank waits for no other: it has no collectives to record.
        if int(os.environ["WORLD_SIZE"]) > 1:
            stack.enter_context(collectives_served(os.environ))
        heartbeat = own_heartbeat(os.environ)
        if reports:
            heartbeat = RememberedHeartbeat()
            stack.enter_context(progress_lines(config, run, terminal, heartbeat))
        stage.run_rank(run, stop, heartbeat)
    if reports:
        print_result(stage, config, run, terminal)


# --- rank 0 prepares, the others wait ---


class RefusedError(Exception):
    """Rank 0 has refused the command line, and tells the other ranks so."""


def prepared_by_first_rank(
    store: "Store", rank: int, prepare: Callable[[], RunDirectory | None]
) -> RunDirectory | None:
    """Calls `prepare` on rank 0, and waits for it on the others, which then see the same `config.yaml` (collective).

    Errors of `prepare` pass through on rank 0. The others then wait until the store has an answer, at most an hour;
    after that torch raises its error.

    Returns:
        The run that `prepare` returns; None: it is finished.

    Raises:
        RefusedError: rank 0 has refused the command line (on the others).
        ArtefactError: this node does not see the run directory.
    """
    if rank == 0:
        run = prepare()
        message = {"run": ""}
        if run:
            message = {"run": str(run.path.resolve()), "sha256": durable.sha256_of(run.config)}
        store.set(PREPARED, json.dumps(message))
        return run

    message = json.loads(store.get(PREPARED))
    if message.get("refused"):
        raise RefusedError
    if not message["run"]:
        return None
    run = RunDirectory(Path(message["run"]))
    await_config(run, message["sha256"])
    return run


def await_config(run: RunDirectory, sha256: str) -> None:
    """Waits up to a minute until this node sees the `config.yaml` that rank 0 has written.

    Args:
        sha256: hexadecimal hash of the file.

    Raises:
        ArtefactError: it does not appear.
    """
    deadline = time.monotonic() + SEEN_S
    while not (run.config.is_file() and durable.sha256_of(run.config) == sha256):
        if time.monotonic() > deadline:
            raise ArtefactError(
                f"{run.config}: {host_name()} does not see what rank 0 has written: expected work_dir on a file system "
                "that all nodes share"
            )
        time.sleep(POLL_S)


def start_with_full_environment() -> None:
    """Starts this program again with the environment that an agent of the launcher gives its ranks. Returns only in
    a process that has this environment already: one of an agent, or one that was started again.

    The number of threads decides the order of floating-point sums on CPUs, and the allocator and OpenMP read their
    settings only when a process starts. The process id stays, so torchrun does not notice.
    """
    environment = complete_environment(os.environ)
    if environment is not None:
        os.execve(sys.executable, sys.orig_argv, environment)  # noqa: S606  no shell is wanted


# --- signals and failures ---


def leave(code: int) -> NoReturn:
    """Ends this process at once: ranks that end together all show their own exit code, not that torchrun ended them."""
    with suppress(OSError):  # a full disk, or a closed terminal
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def stop_on_signals(stop: StopRequest) -> None:
    """Lets USR1, TERM and Ctrl-C set `stop`, which is read between steps; no other handler is called.

    The launcher passes on USR1 only; the others come from torchrun.
    """

    def request(number: int, frame: object) -> None:
        log.info("received %s", signal.Signals(number).name)
        stop.requested = True

    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, request)


@contextmanager
def recorded_failure(run: RunDirectory, rank: int, terminal: "Terminal") -> Iterator[None]:
    """Records an exception of the block, of any class, in the run directory and the log, tells the terminal, and ends
    the process with exit code 1.
    """
    try:
        yield
    except BaseException as error:
        try:
            log.error("%s", error if is_for_the_user(error, run) else traceback.format_exc())
            try:
                record_failure(run, rank, error)
            except OSError as unrecorded:  # a full disk, most likely the failure itself
                log.error("%s could not be written: %s", run.rank_failure(rank), unrecorded)
            terminal.tell(f"rank {rank}: {type(error).__name__}: {error} (log: {run.rank_log(rank)})")
        finally:
            # other ranks may wait in a collective for this one: leave at once, torchrun ends them
            leave(1)


def is_for_the_user(error: BaseException, run: RunDirectory) -> bool:
    """Returns whether the message is all a person needs, so that no traceback is shown: for a UserError, and for a work
    directory that is full or read-only.

    A full disk elsewhere belongs to this node alone: a restart on another node may succeed. An OSError of a full disk
    that names no file counts as one of the work directory.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        # A failed write, unlike a failed open, names no file. Ranks write only to the run, so the run is assumed.
        return error.filename is None or Path(str(error.filename)).is_relative_to(run.work.path)
    return isinstance(error, UserError)


def record_failure(run: RunDirectory, rank: int, error: BaseException) -> None:
    """Writes `logs/failure_RANK.json`, where the launcher looks for it: where, when, type, message, traceback, without
    secrets.

    Raises:
        OSError: the file cannot be written.
    """
    durable.write_sealed(
        run.rank_failure(rank),
        {
            "rank": rank,
            "node": host_name(),
            "time": time.time(),
            "type": type(error).__name__,
            "message": redact_text(str(error)),
            "traceback": redact_text(traceback.format_exc()),
            "user_error": is_for_the_user(error, run),
        },
    )


# --- what people see ---


class TerminalStream(io.TextIOBase):
    """Writes to the file descriptor of a terminal; if nobody reads it any more, the log says so once.

    Training goes on, while other streams would raise, and rich would end the process.
    """

    encoding = "utf-8"

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._is_gone = False

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def fileno(self) -> int:
        return self._descriptor

    def write(self, text: str) -> int:
        """Writes the text and returns its length, also if the terminal is gone."""
        if not self._is_gone:
            try:
                os.write(self._descriptor, text.encode(errors="replace"))
            except OSError as error:
                self._is_gone = True  # first: warnings are written here, too
                log.warning("the terminal is gone (%s), it missed: %s", error, text.rstrip())
        return len(text)


class Terminal:
    """The standard streams that the process had before its output went to its log."""

    def __init__(self, output: TextIO, errors: TextIO) -> None:
        self._errors = errors
        self.console = Console(output, errors, live=False)

    @classmethod
    def redirect(cls, log_file: Path) -> "Terminal":
        """Appends this process's output to its own log from now on, C++ libraries and `logging` included. Creates its
        folder.

        Returns the streams before. If the log cannot be opened, OSError.
        """
        log_file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sys.stdout.flush()
        sys.stderr.flush()
        output, errors = (cast("TextIO", TerminalStream(os.dup(number))) for number in (1, 2))
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        logging.basicConfig(
            level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
        )
        return cls(output, errors)

    def tell(self, line: str) -> None:
        """Writes a line to the old standard error."""
        self._errors.write(f"{line}\n")


@contextmanager
def progress_lines(
    config: Config, run: RunDirectory, terminal: Terminal, heartbeat: RememberedHeartbeat
) -> Iterator[None]:
    """Prints a line of progress about every ten seconds, and the warnings of rank 0, while the block trains. While it
    completes no step, a line each minute says what rank 0 does.

    A thread reads them from the files of the run, so that a slow terminal delays no step.
    """
    ended = threading.Event()

    def follow() -> None:
        metrics, warnings = MetricsFollower(run.metrics), LineFollower(run.warnings, from_end=True)
        standstill = Standstill(time.monotonic())
        with terminal.console.training(config.stage.name, config.stage.steps, since=time.time()) as progress:
            # One more round after the end shows the last lines.
            is_last = False
            while not is_last:
                is_last = ended.wait(PROGRESS_EVERY_S)
                for warning in warnings.poll():
                    terminal.console.warning(warning.decode(errors="replace"))
                for line in metrics.poll():
                    if progress.update(line):
                        standstill.moved(time.monotonic())
                standstill.heard([heartbeat.pulse()], time.monotonic())
                if not is_last and (words := standstill.line(time.monotonic())):
                    terminal.console.line(f"{words}; log: {run.rank_log(0)}")

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def print_result(stage: TrainingStage, config: Config, run: RunDirectory, terminal: Terminal) -> None:
    """Prints the summary of a finished run, or what the next command continues from.

    Raises:
        ArtefactError: a file of the run is damaged.
    """
    # The run may have been moved or copied since its configuration was composed.
    config = replace(config, work_dir=str(run.work.path), run_id=run.path.name)
    if run.result.exists():
        stage.summarize(config, terminal.console)
    else:
        terminal.console.line(f"stopped; the same command continues from {stage.progress(config)}")


if __name__ == "__main__":
    main()
