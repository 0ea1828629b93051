"""Runs checks one after the other, each in processes of its own, which a failure or an overrun of its budget ends.

Whatever a check does to the GPU or to its own process, the next check starts clean.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from dist_lm.bench.case import GroupSize
from dist_lm.bench.rank_groups import environment_of
from dist_lm.cluster.torchrun import CUDA
from dist_lm.errors import ConfigError, require
from dist_lm.gpu_check import probe, results
from dist_lm.gpu_check.checks import CHECKS, REHEARSAL_S, Check, chosen
from dist_lm.gpu_check.results import Machine, Result, Results
from dist_lm.launcher.process import Stopped, stopped_by_signals
from dist_lm.parallel.rendezvous import BACKEND
from dist_lm.storage import durable, process
from dist_lm.tracking.readable import duration
from dist_lm.tracking.redact import without_secrets

RESULTS, LOG = "results.json", "log.txt"
MARKER = "made_by_gpu_check"  # file that marks a folder that may be replaced
GRACE_S = 3.0  # seconds from SIGTERM to SIGKILL
# A program, so that no torch is loaded here: it would hold memory of the card.
LIST_GPUS = """
import json, torch
gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
device = torch.cuda.get_device_name(0) if gpus else ""
print(json.dumps({"device": device, "gpus": gpus, "torch": torch.__version__, "cuda": torch.version.cuda}))
"""


def check_gpus(
    only: Sequence[str], gpus: int, folder: Path, page: Path | None, *, rehearse: bool, say: Callable[[str], None]
) -> bool:
    """Runs the checks one after the other and says a line for each, then the table. Returns whether all passed.

    results.json is written after each check.

    Args:
        only: names of checks; empty: all checks that `gpus` GPUs can run.
        gpus: number of GPUs to use.
        folder: for results.json and a folder of each check. Earlier results of the same machine are kept.
        page: a page whose table is replaced, before the first check and after the last; None: no page.
        rehearse: run tiny sizes on the CPU.
        say: prints lines.

    Raises:
        ConfigError: no GPU, too few GPUs, an unknown check, a folder that cannot be used, or a page with `rehearse`.
        ArtefactError: results.json or `page` cannot be used.
        SystemExit: stopped by a signal, code 128 + its number; the check that ran is ended and has no result.
        OSError: a file cannot be read.
    """
    require(gpus > 0, "--gpus", gpus, "a positive integer")
    if page is not None and rehearse:
        raise ConfigError(f"--table={page}: a rehearsal measures no card; leave out --table or --rehearse")

    checks = chosen(only, gpus)
    machine = machine_of(gpus, rehearse)

    # Problems with the output are reported before the first check runs.
    file = folder.resolve() / RESULTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for check in checks:
            _check_replaceable(file.parent / check.name)
    except OSError as error:
        raise ConfigError(f"--output={folder}: expected a folder that can be written to ({error.strerror})") from error

    all_results = results.read_results(file)
    if all_results is None or all_results.machine != machine:
        all_results = Results(machine)
    if page is not None:
        # A page without markers fails here.
        results.rewrite(page, results.table(CHECKS, all_results))

    check = checks[0]
    try:
        with stopped_by_signals():
            for check in checks:
                result = run_check(check, gpus, file.parent / check.name, rehearse=rehearse)
                all_results.checks[check.name] = result
                all_results.write(file)
                log = "" if result.passed else f"  ({file.parent / check.name / LOG})"
                say(f"{check.name:<11}{result.status} in {duration(result.seconds)}  {result}{log}".rstrip())
    except (Stopped, KeyboardInterrupt) as stop:
        number = getattr(stop, "number", signal.SIGINT)
        note = f"; {file} holds the results before it" if file.exists() else ""
        say(f"{check.name:<11}stopped by {signal.Signals(number).name}{note}")
        raise SystemExit(128 + number) from None

    rows = results.table(checks, all_results)
    # A page shows all checks, those without a result too.
    if page is not None:
        rows = results.table(CHECKS, all_results)
        results.rewrite(page, rows)

    say(f"\n{rows}\n{file}")
    return all(all_results.checks[check.name].passed for check in checks)


def machine_of(gpus: int, rehearse: bool) -> Machine:
    """Returns the cards and the software of this machine; for a rehearsal, a CPU without asking for cards.

    Raises:
        ConfigError: there is no GPU, or there are fewer than `gpus`.
    """
    if rehearse:
        return {"device": "CPU", "gpus": 0, "torch": metadata.version("torch"), "cuda": None, "rehearsal": True}

    listing = subprocess.run([sys.executable, "-c", LIST_GPUS], capture_output=True, text=True, check=False)
    if listing.returncode:
        raise ConfigError(f"gpu check: torch cannot use CUDA: {(listing.stderr.strip().splitlines() or [''])[-1]}")

    machine = json.loads(listing.stdout)
    if not machine["gpus"]:
        raise ConfigError(
            f"gpu check: no GPU that torch {machine['torch']} can use; --rehearse runs tiny sizes on the CPU"
        )

    require(gpus <= machine["gpus"], "--gpus", gpus, f"at most {machine['gpus']}, the GPUs of this machine")
    return machine | {"rehearsal": False}


def run_check(check: Check, gpus: int, folder: Path, *, rehearse: bool) -> Result:
    """Runs one check in processes of its own and returns its result, after all its processes have ended.

    A check that fails, or takes longer than its budget, is a result, no error. Facts are those noted until then.

    Args:
        folder: folder of the check; its content is replaced.

    Raises:
        ConfigError: the folder was not created by this function, or cannot be replaced.
        ArtefactError: a file is damaged.
        OSError: a file cannot be read.
    """
    _check_replaceable(folder)
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        (folder / MARKER).touch()
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: {error.strerror}: choose another --output") from error

    log = folder / LOG
    mark = secrets.token_hex(8)
    budget_s = REHEARSAL_S if rehearse else check.budget_s
    started = time.monotonic()
    code = None

    with log.open("wb") as output, tempfile.TemporaryDirectory(prefix="dlm-store-") as private:
        store = Path(private) / "store"
        child = subprocess.Popen(
            command_of(check, gpus, folder, rehearse=rehearse),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(check, gpus, store, rehearse=rehearse) | {probe.MARK: mark},
            # A Ctrl-C goes to this process, which ends it.
            start_new_session=True,
        )
        try:
            code = child.wait(budget_s)
        except subprocess.TimeoutExpired:
            pass  # `code` stays None
        finally:
            # A check may have started processes in other sessions, so they are found by their mark.
            process.end(lambda: process.marked(mark, probe.MARK), GRACE_S)
            child.wait()

    seconds = time.monotonic() - started
    facts = durable.read_json(folder / probe.FACTS)
    date = time.strftime("%Y-%m-%d")

    if code == 0:
        return Result("passed", seconds, date, facts=facts)
    if code is None:
        return Result("over budget", seconds, date, f"not done after {budget_s:g} s", facts)
    return Result("failed", seconds, date, _failure(folder, code), facts)


def _check_replaceable(folder: Path) -> None:
    """Raises ConfigError for a folder that this program did not create."""
    if folder.is_symlink() or (folder.exists() and not (folder / MARKER).is_file()):
        raise ConfigError(
            f"{folder}: not made by `gpu check`, which would replace it: move it, or use another --output"
        )


def command_of(check: Check, gpus: int, folder: Path, *, rehearse: bool) -> list[str]:
    """Returns the command line of a check: its program, under torchrun with a rank for each GPU if it runs on all.

    Args:
        gpus: number of ranks, or of GPUs that the program may use.
        folder: the program writes its results there.
        rehearse: run on the CPU, at tiny sizes.
    """
    mode = probe.REHEARSAL if rehearse else probe.CARD
    program = [probe.__name__, check.name, str(folder), str(gpus), mode]

    if check.runs != "all":
        return [sys.executable, "-m", *program]

    # torchrun reports failed ranks to a file descriptor; here it is that of the log.
    torchrun = [sys.executable, "-m", "dist_lm.cluster.torchrun", str(os.getpid()), "2"]
    return [*torchrun, "--rdzv-backend", BACKEND, "--nproc-per-node", str(gpus), "-m", *program]


def _environment(check: Check, gpus: int, store: Path, *, rehearse: bool) -> dict[str, str]:
    """Returns the environment of a check: that of a rank; for one that starts the launcher, this one without
    secrets."""
    if check.runs == "launcher":
        return without_secrets(os.environ)

    # The ranks of a check on all GPUs share the cores.
    threads = process.cores()
    if check.runs == "all":
        threads = max(1, threads // gpus)

    size = GroupSize(1, threads)
    if rehearse:
        return environment_of(size, 0, store, "cpu")
    return CUDA | environment_of(size, 0, store, "cuda")


def _failure(folder: Path, code: int) -> str:
    """Returns the reason that a rank wrote, or else how the process ended and the last line of its log, if it has any.

    Args:
        code: exit code of the process; negative: minus the signal that ended it.
    """
    reason_file = folder / probe.FAILURE
    if reason_file.is_file() and (reason := reason_file.read_text().strip()):
        return reason

    ending = f"killed by {process.signal_name(-code)}" if code < 0 else f"exit code {code}"

    lines = [line.strip() for line in (folder / LOG).read_text(errors="replace").splitlines() if line.strip()]
    if lines:
        return f"{ending}; last line of its log: {lines[-1][: probe.LONGEST_REASON]}"
    return ending
