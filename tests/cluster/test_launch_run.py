"""The launcher and its ranks together, under a local Ray, on the tiny model."""

import json
import os
import signal

import pytest

from dist_lm.cluster.events import read_events
from dist_lm.storage.run_directory import WorkDirectory
from tests.cluster.launched import (
    CODE_STEPS,
    assert_gone,
    family,
    finish,
    follow_on,
    ranks_on,
    start,
    steps_of,
    train_language,
    wait_until,
)
from tests.training_run import linked, numbers

pytestmark = pytest.mark.cluster


@pytest.mark.bars  # .ci/run runs the quick start
def test_one_command_builds_the_stage_before_and_ends_with_samples(tiny_work, tmp_path):
    work = linked(tiny_work, tmp_path)
    code, out, err = finish(start(work, "tracking=wandb", "tracking.mode=offline"))
    assert code == 0, err
    assert "bits per byte on the held-out documents" in out
    for stage, steps in (("language", 4), ("code", 6)):
        run = work.run(stage, "default")
        assert json.loads(run.result.read_text())["steps"] == steps
        assert list(run.samples.glob("*.jsonl"))
        assert list(run.wandb.glob("offline-run-*"))
    metrics = json.loads(work.run("code", "default").result.read_text())["metrics"]
    assert {"code/parses_bash", "code/parses_python", "code/parses_sql", "val/bits_per_byte_sql"} <= metrics.keys()
    again_code, again, _ = finish(start(work, "tracking=wandb", "tracking.mode=offline"))
    assert again_code == 0
    plan = dict(line.split()[:2] for line in again.splitlines() if line.split()[1:2] == ["there"])
    assert plan.keys() == {"tokenizer", "shards", "language", "code"}


def stop_at_step_2(work: WorkDirectory, number: signal.Signals, whole_group: bool) -> None:
    """A launch that `number` stops, and all that it has to leave behind, or not."""
    run = work.run("code", "default")
    process = start(work, CODE_STEPS)
    wait_until(lambda: any(step >= 2 for step in steps_of(run)), process, "step 2")
    started = family(process)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    code, out, err = finish(process)
    assert code == 128 + number, err
    assert "the same command continues" in out
    assert not run.result.exists()
    assert (run.checkpoints / "LATEST").exists()
    assert_gone(started)


@pytest.mark.bars  # test_preemption.py stops a run by a signal
def test_term_to_the_process_group_checkpoints_and_stops_everything(undisturbed, tmp_path):
    stop_at_step_2(follow_on(undisturbed, tmp_path), signal.SIGTERM, whole_group=True)


@pytest.mark.heavy
def test_after_ctrl_c_the_same_command_continues_and_replaces_a_rank_that_dies_with_the_same_numbers(
    undisturbed, tmp_path
):
    work = follow_on(undisturbed, tmp_path)
    run = work.run("code", "default")
    stop_at_step_2(work, signal.SIGINT, whole_group=False)
    before = (run.checkpoints / "LATEST").read_text()
    process = start(work, CODE_STEPS, "stage.checkpoint_every=5")
    wait_until(lambda: (run.checkpoints / "LATEST").read_text() != before, process, "a checkpoint")
    ranks_on(run)[-1].kill()
    code, _, err = finish(process)
    assert code == 0, err
    assert "killed by SIGKILL" in err
    assert "continuing from step_" in err
    assert numbers(run) == numbers(undisturbed.run("code", "default"))
    events = [event["event"] for event in read_events(run.events)]
    assert events[-4:] == ["started", "failed", "started", "finished"]


@pytest.mark.heavy
def test_a_launcher_killed_leaves_nothing_behind_and_the_same_command_continues(undisturbed, tmp_path):
    work = follow_on(undisturbed, tmp_path)
    run = work.run("code", "default")
    process = start(work, CODE_STEPS, "stage.checkpoint_every=10")
    wait_until(lambda: any(step >= 12 for step in steps_of(run)), process, "step 12")
    started = family(process)
    os.kill(process.pid, signal.SIGKILL)
    finish(process)
    assert_gone(started)
    code, _, err = finish(start(work, CODE_STEPS))
    assert code == 0, err
    assert numbers(run) == numbers(undisturbed.run("code", "default"))


@pytest.mark.heavy
def test_ranks_that_hang_are_found_their_stacks_logged_and_the_run_goes_on(undisturbed, shared_ray, tmp_path):
    work = follow_on(undisturbed, tmp_path)
    run = work.run("code", "default")
    process = start(
        work,
        CODE_STEPS,
        "stage.checkpoint_every=5",
        "cluster.hang_min_s=20",
        "cluster.hang_steps=5",
        *shared_ray.overrides(),
    )
    wait_until((run.checkpoints / "LATEST").exists, process, "a checkpoint")
    hung = ranks_on(run)[-1]
    number = int(hung.environ()["RANK"])
    hung.suspend()
    code, _, err = finish(process)
    assert code == 0, err
    assert f"rank {number} on node 0" in err
    assert "hung: no heartbeat" in err
    assert "its process is stopped" in err
    assert "most recent call first" in run.rank_log(1 - number).read_text()
    waits = json.loads(run.collectives(1 - number).read_text())["gloo"]["entries"][-1]
    assert waits["profiling_name"].startswith("gloo:")
    assert json.loads(run.collectives(number).read_text()) == {"error": "the rank does not answer: timed out"}
    assert numbers(run) == numbers(undisturbed.run("code", "default"))


@pytest.mark.heavy
def test_a_run_that_fails_for_good_shows_why(undisturbed, shared_ray, tmp_path):
    work = follow_on(undisturbed, tmp_path)
    run = work.run("code", "default")
    process = start(work, CODE_STEPS, "cluster.max_restarts=0", *shared_ray.overrides())
    wait_until(lambda: any(step >= 2 for step in steps_of(run)), process, "step 2")
    ranks_on(run)[-1].kill()
    code, _, err = finish(process)
    assert code == 1
    last = err.strip().splitlines()[-1]
    assert "killed by SIGKILL" in last
    assert "rank" in last
    assert str(run.logs) in last


@pytest.mark.bars
def test_a_failing_rank_shows_its_own_words(tiny_work, tmp_path):
    work = linked(tiny_work, tmp_path)
    train_language(work)
    code, _, err = finish(start(work, "stage.lr=1e30", "stage.grad_clip=0", "stage.max_nonfinite_steps=2"))
    assert code == 2
    assert "gradients were NaN or infinite in 2 steps in a row" in err
    assert "Traceback" not in err
