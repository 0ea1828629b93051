"""Checks that use the launcher as a user does: all stages, and recovery of a run whose rank dies or hangs.

All text is generated, so that no check depends on installed or reachable data.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import psutil

from dist_lm.cluster.events import read_events
from dist_lm.gpu_check.probe import MARK, Probe, expect
from dist_lm.storage import process
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory

STAGES = ("language", "code", "tools", "reward", "rlhf")  # the stages that train
POLL_S = 0.1
WAIT_S = 120.0  # seconds within which a run must reach a step
GENERATED = (
    "corpus.corpora.language=[{reader: 'dist_lm.demo.bash:read_bash', language: bash, limit: 300}]",
    "corpus.corpora.code=[{reader: 'dist_lm.demo.sql:read_sql', language: sql, limit: 300}]",
    "corpus.corpora.tools=[{reader: tools, language: tools, limit: 150}]",
    "corpus.corpora.rankings=[{reader: synthetic_rankings, language: synthetic, limit: 30}]",
    "corpus.val_fraction=0.2",  # so that some of the few documents are held out
    *("model.vocab_size=1024", "experiment=smoke", "tracking=none", "parallel.compile=never"),
)
TINY = ("model.d_model=40", "model.d_ff=80", "model.n_layers=1")  # the model of a rehearsal
# A few steps on few sequences, for a rehearsal of all stages.
SMALL = (
    *TINY,
    *("stages.tools.questions.per_kind=1", "stages.tools.questions.max_new_tokens=16"),
    *(f"stages.{stage}.{key}" for stage in STAGES[:-1] for key in ("steps=4", "global_batch=2", "eval_sequences=4")),
    *("stages.language.micro_batch=2", "stages.code.micro_batch=2"),
    *(
        f"stages.{stage}.sampling.{key}"
        for stage in STAGES[:2]
        for key in ("samples_per_prompt=1", "max_new_tokens=16")
    ),
)


def smoke(probe: Probe) -> None:
    """Checks that every stage runs for a few steps, by one launcher that is waited for; notes the seconds of each.

    Raises:
        CheckFailedError: the launcher failed, or a stage has no result.
    """
    work = WorkDirectory(probe.folder / "work")
    # A check may use one card, so engines and trainer share it.
    one_card = ("cluster.ranks_per_node=1", "rlhf.pool.placement=shared")

    with launched(probe, work, "stage=rlhf", *one_card, *probe.sized((), rehearsal=SMALL)) as launcher:
        code = launcher.wait()

    expect(code == 0, f"the launcher ended with exit code {code}: {last_line(probe)}")

    for stage in STAGES:
        run = work.run(stage, "default")
        expect(run.result.is_file(), f"stage {stage} has no result")
        probe.note(f"{stage} s", json.loads(run.result.read_text())["seconds"])


def kill(probe: Probe) -> None:
    """Kills a rank after a checkpoint, and checks that the gang ends and continues from the checkpoint."""
    _disturbed(probe, psutil.Process.kill, "killed by SIGKILL")


def hang(probe: Probe) -> None:
    """Stops a rank, so that the others wait for it in a collective, and checks that the run continues."""
    _disturbed(probe, psutil.Process.suspend, "hung", "cluster.hang_min_s=10", "cluster.hang_steps=5")


def _disturbed(probe: Probe, disturb: Callable[[psutil.Process], None], expected_words: str, *overrides: str) -> None:
    """Trains, disturbs the newest rank after the first checkpoint, and checks that the run ends well from a second
    attempt.

    Notes the seconds until the failure was found, and from there to the restart.

    Args:
        expected_words: words in type or message of the failure in events.jsonl.

    Raises:
        CheckFailedError: no checkpoint or no failure came in time, the failure is another one or not the only one, the
            second attempt began at step 0, or the launcher failed or left ranks behind.
    """
    work = WorkDirectory(probe.folder / "work")
    run = work.run("language", "default")
    # Many steps, so that the run does not end before the failure is found.
    card = ("stage.steps=3000", "stage.checkpoint_every=100")
    tiny = (*TINY, "stage.global_batch=4", "stage.micro_batch=2", "stage.steps=300", "stage.checkpoint_every=20")
    settings = (f"cluster.ranks_per_node={probe.ranks}", "stage.eval_every=0", *probe.sized(card, rehearsal=tiny))

    with launched(probe, work, "stage=language", *settings, *overrides) as launcher:
        wait_until((run.checkpoints / "LATEST").exists, launcher, "a checkpoint", probe)
        victim = ranks()[-1]
        disturbed_at = time.time()
        disturb(victim)
        wait_until(lambda: bool(_failures(run)), launcher, "the failure in events.jsonl", probe)
        code = launcher.wait()

    expect(code == 0, f"the launcher ended with exit code {code}: {last_line(probe)}")

    (failure,) = _failures(run)
    words = f"{failure['type']}: {failure['error']}"
    expect(expected_words in words, f"expected a failure with the words '{expected_words}', found: {words}")

    probe.note("found after s", failure["time"] - disturbed_at)

    started = [event for event in read_events(run.events) if event["event"] == "started"]
    expect(
        len(started) == 2 and started[1]["step"] > 0, f"expected a second attempt from a checkpoint, found {started}"
    )

    probe.note("restarted after s", started[1]["time"] - failure["time"])

    # A rank that stays would hold the memory of its card.
    remaining = [rank.pid for rank in ranks()]
    expect(not remaining, f"ranks of the run are left: {remaining}")


def _failures(run: RunDirectory) -> list[dict]:
    return [event for event in read_events(run.events) if event["event"] == "failed"]


@contextmanager
def launched(probe: Probe, work: WorkDirectory, *overrides: str) -> Iterator[subprocess.Popen]:
    """Yields the launcher, started in a process of its own with output to launch.txt.

    When the block is left before it has ended, it is terminated and waited for, without a limit.
    """
    own_overrides = (f"device={probe.device_type}", f"work_dir={work.path}")
    with (probe.folder / "launch.txt").open("wb") as output:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "dist_lm.launch", *overrides, *GENERATED, *own_overrides],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=partial(process.die_with_parent, os.getpid()),
        )

        try:
            yield launcher
        finally:
            if launcher.poll() is None:
                launcher.terminate()
                launcher.wait()


def last_line(probe: Probe) -> str:
    """Returns the last line of the launcher's output."""
    lines = [line.strip() for line in (probe.folder / "launch.txt").read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "no output")


def wait_until(holds: Callable[[], bool], launcher: subprocess.Popen, what: str, probe: Probe) -> None:
    """Waits for a condition while the launcher runs; fails the check after `WAIT_S` seconds.

    Raises:
        CheckFailedError: the condition did not come, or the launcher has ended.
    """
    deadline = time.monotonic() + WAIT_S
    while not holds():
        expect(launcher.poll() is None, f"the launcher ended before {what}: {last_line(probe)}")
        expect(time.monotonic() < deadline, f"{what}: not within {WAIT_S:g} s")
        time.sleep(POLL_S)


def ranks() -> list[psutil.Process]:
    """Returns the live processes of ranks that this check has started, the newest last; it knows them by the mark in
    their environment."""
    processes = []
    for candidate in process.marked(os.environ[MARK], MARK):
        title = process.title(candidate)
        if "dist_lm.train" in title and "dist_lm.cluster.torchrun" not in title:
            processes.append(candidate)
    return sorted(processes, key=lambda rank: rank.create_time())
