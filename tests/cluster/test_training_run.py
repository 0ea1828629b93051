"""Training as its users meet it: the same numbers on any number of ranks, and after any kill.

Runs to which signals are sent, or whose disk is full, are `torchrun -m dist_lm.train RUN_DIR`, the others do the same
in forked ranks; the tiny model, with dropout, gradient accumulation, evaluation and checkpoints on.
"""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_lm.config.corpus import TokenizerConfig
from dist_lm.config.root import save_config
from dist_lm.model.size import GROUPS
from dist_lm.stages.registry import load_config
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tokenizer.train import train_tokenizer
from dist_lm.tracking.console import Console
from dist_lm.tracking.metrics import read_metrics
from dist_lm.training import checkpoint_files
from dist_lm.training.profile_summary import read_profile, summarize
from tests.conftest import VOCAB_SIZE, texts
from tests.forked_run import forked_ranks, run_forked
from tests.training_run import (
    DEADLINE_S,
    STEPS,
    copy_until,
    finish,
    linked,
    numbers,
    prepare,
    start,
    tolerance,
    train,
    unwritten,
)

pytestmark = pytest.mark.cluster
COMPARED = (
    *("train/loss", "train/grad_norm", "train/tokens", "train/update_ratio", "val/loss", "val/bits_per_byte"),
    *(f"train/grad_norm_{group}" for group in GROUPS),
)


def wait_for_step(run: RunDirectory, step: int, ended: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if run.metrics.exists() and any(line["step"] >= step for line in read_metrics(run.metrics)):
            return
        assert not ended(), run.rank_log(0).read_text()
        time.sleep(0.02)
    pytest.fail(f"step {step} was not reached in {DEADLINE_S} s")


def rank_pids(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def reference(tiny_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Two ranks, never disturbed."""
    work = linked(tiny_work, tmp_path_factory.mktemp("reference"))
    run = prepare(work, "two", "stage.keep_checkpoints=9")
    train(run, ranks=2)
    return run


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ("stage.micro_batch=8",)),
        (2, ("parallel.cp=2",)),
        pytest.param(2, ("parallel=ddp",), marks=pytest.mark.bars),
        pytest.param(2, ("parallel.reshard_after_forward=false",), marks=pytest.mark.bars),
        pytest.param(4, ("parallel.dp_replicate=2", "parallel.dp_shard=2"), marks=pytest.mark.bars),
    ],
    ids=["one rank", "parts of sequences", "ddp", "kept gathered", "hsdp on four"],
)
def test_the_loss_curve_does_not_depend_on_the_layout(reference, tiny_work, tmp_path, ranks, overrides):
    run = prepare(linked(tiny_work, tmp_path), "other", *overrides)
    train(run, ranks)
    expected, found = numbers(reference), numbers(run)
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    for step in expected:
        for key in COMPARED:
            if key in expected[step]:
                assert found[step][key] == pytest.approx(expected[step][key], rel=tolerance(key)), (step, key)


def test_a_run_writes_every_metric_of_its_stage(reference):
    assert unwritten(reference, "language") == set()


@pytest.mark.heavy
@pytest.mark.parametrize("after_a_checkpoint", [pytest.param(False, marks=pytest.mark.heavy), True])
def test_a_run_killed_at_a_random_step_ends_bit_identical(reference, tiny_work, tmp_path, after_a_checkpoint):
    step = random.randrange(6, 9) if after_a_checkpoint else random.randrange(1, 5)
    print(f"killed after step {step}")
    run = prepare(linked(tiny_work, tmp_path), "two")
    with forked_ranks(run, ranks=2) as processes:
        wait_for_step(run, step, lambda: any(process.exitcode is not None for process in processes))
    assert not run.result.exists()
    train(run, ranks=2)
    assert numbers(run) == numbers(reference)
    assert samples(run) == samples(reference)


@pytest.mark.heavy
def test_a_profile_changes_no_number_and_says_where_the_steps_went(reference, tiny_work, tmp_path):
    run = linked(tiny_work, tmp_path).run("language", "two")
    copy_until(reference, run, STEPS - 5)
    config = load_config(run.config)
    config.profile.steps = [STEPS - 2, STEPS - 1]
    save_config(config, run.config)
    train(run, ranks=2)
    assert numbers(run) == numbers(reference)
    assert list(run.traces()) == [0, 1]
    for path in run.traces().values():
        profile = read_profile(path)
        assert profile.steps == (STEPS - 2, STEPS - 1)
        assert {"data", "forward", "backward", "optimizer"} < profile.parts.keys()
        assert profile.hidden + profile.exposed > 0
        assert any(name.startswith("gloo:") for name in profile.operators)
        assert profile.compute + profile.exposed + profile.idle == pytest.approx(profile.step)
    shown = io.StringIO()
    summarize(run, Console(shown))
    assert "aten::" in shown.getvalue()


def samples(run: RunDirectory) -> dict[str, str]:
    return {path.name: path.read_text() for path in run.samples.iterdir()}


@pytest.mark.heavy
def test_a_signal_to_one_rank_stops_all_after_a_checkpoint(reference, tiny_work, tmp_path):
    run = prepare(linked(tiny_work, tmp_path), "two", "stage.checkpoint_every=0")
    process = start(run, ranks=2)
    wait_for_step(run, 2, lambda: process.poll() is not None)
    os.kill(rank_pids(process)[1], signal.SIGUSR1)
    assert finish(process) == 0
    assert not run.result.exists()
    stopped_at = max(numbers(run))
    latest = checkpoint_files.read_pointer(run.checkpoints, checkpoint_files.LATEST)
    assert latest is not None
    assert latest.name == checkpoint_files.step_name(stopped_at)
    train(run, ranks=2)
    assert numbers(run) == numbers(reference)


@pytest.mark.heavy
def test_a_damaged_checkpoint_is_passed_over_loudly(reference, tiny_work, tmp_path):
    run = linked(tiny_work, tmp_path).run("language", "two")
    shutil.copytree(reference.path, run.path)
    run.result.unlink()
    newest = checkpoint_files.steps_in(run.checkpoints)[-1]
    shard = next(newest.glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    train(run, ranks=2)
    assert f"{shard.name} is damaged" in run.rank_log(0).read_text()
    assert f"{shard.name} is damaged" in run.warnings.read_text()  # the launcher shows it
    assert numbers(run) == numbers(reference)


@pytest.mark.heavy
def test_a_checkpoint_of_another_model_is_refused_by_name(reference, tiny_work, tmp_path):
    run = prepare(linked(tiny_work, tmp_path), "wider", "model.d_ff=100", f"stage.init_from={reference.path}")
    assert run_forked(run, ranks=1) != 0
    failure = json.loads(run.rank_failure(0).read_text())
    assert failure["user_error"]
    assert "model.d_ff=100 (checkpoint: 80)" in failure["message"]


@pytest.mark.heavy
def test_a_disk_that_fills_up_leaves_the_checkpoint_before_usable(reference, tiny_work, tmp_path):
    run = linked(tiny_work, tmp_path).run("language", "two")
    copy_until(reference, run, step=5)
    # no file of the next checkpoint fits; metrics and logs, far smaller, still do
    assert finish(start(run, ranks=2, largest_file=20_000)) != 0
    failure = min((json.loads(path.read_text()) for path in run.logs.glob("failure_*")), key=lambda f: f["time"])
    assert failure["user_error"], failure["traceback"]
    assert "step_00000010 could not be written" in failure["message"]
    assert "step_00000005 is intact" in failure["message"]
    train(run, ranks=2)
    assert numbers(run) == numbers(reference)


@pytest.mark.heavy
def test_a_failure_that_cannot_be_recorded_still_ends_the_rank_and_is_in_its_log(tiny_work, tmp_path):
    run = prepare(linked(tiny_work, tmp_path), "three", "parallel.dp_shard=3")
    run.rank_failure(0).mkdir()  # nothing can be written there
    assert run_forked(run, ranks=1) != 0
    log = run.rank_log(0).read_text()
    assert "parallel.dp_shard=3" in log
    assert "could not be written" in log


@pytest.mark.heavy
def test_shards_of_another_tokenizer_are_refused_by_the_ranks(tiny_work, tmp_path):
    work = WorkDirectory(tmp_path)
    shutil.copytree(tiny_work.path, work.path, dirs_exist_ok=True)
    other = TokenizerConfig(vocab_size=VOCAB_SIZE)
    other_texts = [d.text for language in ("english", "python", "bash") for d in texts(language, 300)]
    train_tokenizer([*other_texts, *map(str.upper, other_texts)], work.tokenizer_model, other)
    run = prepare(work, "swapped")
    assert run_forked(run, ranks=1) != 0
    assert "was written with tokenizer" in json.loads(run.rank_failure(0).read_text())["message"]


def test_best_is_the_evaluated_checkpoint_with_the_lowest_loss(reference):
    evaluated = {step: line["val/loss"] for step, line in numbers(reference).items() if "val/loss" in line}
    best = checkpoint_files.read_pointer(reference.checkpoints, checkpoint_files.BEST)
    assert best is not None
    state, _ = checkpoint_files.read_state(best)
    assert best.name == checkpoint_files.step_name(state.best_step)
    assert state.best_step in evaluated
    if state.best_step != STEPS:  # the last one is judged by the same sequences, but reports all
        assert state.best_val_loss == evaluated[state.best_step]


@pytest.mark.heavy
def test_weights_of_the_stage_before_are_the_start(reference, tiny_work, tmp_path):
    work = linked(tiny_work, tmp_path)
    first = prepare(
        work,
        "first",
        "stage.steps=1",
        "stage.lr=1e-9",
        "stage.muon.lr=1e-9",
        "stage.warmup_steps=0",
        f"stage.init_from={reference.path}",
    )
    train(first, ranks=1)
    last = numbers(reference)[STEPS]["val/loss"]
    assert numbers(first)[1]["val/loss"] == pytest.approx(last, rel=1e-5)


@pytest.mark.heavy
def test_a_world_that_the_layout_cannot_make_is_one_line(tiny_work, tmp_path):
    run = prepare(linked(tiny_work, tmp_path), "three", "parallel.dp_shard=3")
    assert run_forked(run, ranks=2) != 0
    failure = json.loads(run.rank_failures()[0].read_text())  # of the rank that failed first, which ends the other
    assert failure["user_error"]
    assert "parallel.dp_shard=3" in failure["message"]
