"""The launcher as a process of its own, on the tiny model."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from dist_lm.config.root import save_config
from dist_lm.prepare.compose import compose_config
from dist_lm.storage.process import is_alive
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tracking.metrics import read_metrics
from tests.conftest import TINY
from tests.patience import patient
from tests.training_run import linked, train

DEADLINE_S = patient(480)
CODE_STEPS = "stage.steps=60"  # of runs that are disturbed on the way
OF_BOTH = ("seq_len=32", "global_batch=4", "micro_batch=2", "warmup_steps=2")
OF_LANGUAGE = (*OF_BOTH, "steps=4")
SETTINGS = (
    *TINY,
    "stage=code",
    *(f"stage.{key}" for key in OF_BOTH),
    *(f"stages.language.{key}" for key in OF_LANGUAGE),
    "stage.steps=6",
    "stage.sampling.samples_per_prompt=1",
    "stage.sampling.max_new_tokens=4",
)


def code_metrics(work: Path, run_id: str, *words: str) -> dict[str, float]:
    """The last metrics of a run of stage code at nano, trained from nothing; it is evaluated at its end alone."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "dist_lm.launch", "stage=code", f"work_dir={work}", f"run_id={run_id}"),
            *("stage.init_from=none", "stage.eval_every=0", "tracking=none", "stage.sampling.samples_per_prompt=0"),
            *words,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(RunDirectory(work / "runs" / "code" / run_id).result.read_text())["metrics"]


def train_language(work: WorkDirectory) -> None:
    """The run that stage code starts from by SETTINGS, as the launcher would build it, in forked ranks."""
    run = work.run("language", "default")
    run.create()
    settings = ("stage=language", *TINY, *(f"stage.{key}" for key in OF_LANGUAGE), f"work_dir={work.path}")
    save_config(compose_config(settings), run.config)
    train(run, 2)


def start(work: WorkDirectory, *overrides: str) -> subprocess.Popen:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "dist_lm.launch", *SETTINGS),
            *(f"work_dir={work.path}", f"cluster.connect_timeout_s={patient(20):.0f}", *overrides),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    with ending(process):
        out, err = process.communicate(timeout=DEADLINE_S)
    return process.returncode, out, err


@contextmanager
def ending(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """A launcher in a session of its own; killed with its children if it still runs at the end of the block."""
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """Everything the launcher started, so far."""
    return psutil.Process(process.pid).children(recursive=True)


def wait_until(condition, process: subprocess.Popen, what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    pytest.fail(f"{what}: not within {DEADLINE_S} s")


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=patient(120))
    assert not [process for process in alive if is_alive(process)]


def steps_of(run: RunDirectory) -> list[int]:
    return [line["step"] for line in read_metrics(run.metrics)] if run.metrics.exists() else []


def ranks_on(run: RunDirectory) -> list[psutil.Process]:
    """The ranks of a run, the one started last at the end."""
    found = []
    for candidate in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            words = candidate.cmdline()
            is_rank = "dist_lm.train" in words and "dist_lm.cluster.torchrun" not in words
            if is_rank and str(run.path.resolve()) in words and is_alive(candidate):
                found.append(candidate)
    return sorted(found, key=lambda rank: rank.create_time())


def follow_on(undisturbed: WorkDirectory, directory: Path) -> WorkDirectory:
    """A work directory in which the language stage is done."""
    work = linked(undisturbed, directory)
    (work.path / "runs").mkdir()
    (work.path / "runs" / "language").symlink_to(undisturbed.path / "runs" / "language")
    return work
