"""USR1 whenever it comes: a checkpoint of the step that is reached, and the run goes on from it."""

import os
import shutil
import signal

import pytest

from dist_lm.training import checkpoint_files
from tests.cluster.launched import CODE_STEPS, finish, follow_on, start, steps_of, wait_until
from tests.training_run import numbers, train

pytestmark = [pytest.mark.heavy, pytest.mark.cluster]
COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs g++")


@pytest.mark.parametrize(
    ("when", "overrides"),
    [
        pytest.param("evaluating", ("stage.eval_every=1", "stage.eval_sequences=64"), marks=pytest.mark.bars),
        ("saving", ("stage.checkpoint_every=1", "stage.checkpoint_async=false")),
        pytest.param("compiling", ("parallel.compile=always",), marks=[COMPILER, pytest.mark.bars]),
    ],
)
def test_a_run_stopped_at_any_time_loses_no_step(undisturbed, shared_ray, tmp_path, when, overrides):
    work = follow_on(undisturbed, tmp_path)
    run = work.run("code", "default")
    process = start(work, CODE_STEPS, *overrides, *shared_ray.overrides())
    if when == "compiling":
        log = run.rank_log(0)
        wait_until(lambda: log.exists() and "from step 0" in log.read_text(), process, "the first step begins")
    else:  # most of the time is spent in what the case is about
        wait_until(lambda: any(step >= 3 for step in steps_of(run)), process, "step 3")
    os.kill(process.pid, signal.SIGUSR1)
    code, _, err = finish(process)
    assert code == 128 + signal.SIGUSR1, err
    latest = checkpoint_files.read_pointer(run.checkpoints, checkpoint_files.LATEST)
    assert latest is not None
    assert latest.name == checkpoint_files.step_name(max(steps_of(run)))
    if when == "compiling":
        assert max(steps_of(run)) == 1
    train(run, ranks=2)  # the same command does it too, see test_launch_run.py
    expected, found = numbers(undisturbed.run("code", "default")), numbers(run)
    assert found.keys() == expected.keys()
    for step, values in expected.items():
        assert found[step]["train/tokens"] == values["train/tokens"]
        assert found[step]["train/loss"] == pytest.approx(values["train/loss"], rel=1e-5)
