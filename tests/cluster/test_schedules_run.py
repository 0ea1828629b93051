"""Runs under other schedules and with averaged weights: what continues is what was never interrupted, at any layout.

A bar: a decay from a constant run reaches what a cosine reaches.
"""

from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dist_lm.config.root import save_config
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.generation.load import load_model
from dist_lm.stages.averaging import average
from dist_lm.stages.exporting.files import export
from dist_lm.stages.registry import load_config
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.training import checkpoint_files
from dist_lm.training.checkpoint_tensors import model_weights, stored_tensors
from tests.cluster.launched import code_metrics
from tests.training_run import copy_until, linked, numbers, prepare, train

pytestmark = pytest.mark.cluster

WSD = ("stage.schedule=wsd", "stage.ema_decay=0.9")
DECAY = ("stage.steps=20", "stage.decay_steps=5")
SEEDS, STEPS, DECAYED = (0, 1), 400, 80


def everything(checkpoint: Path) -> dict[str, bytes]:
    """All tensors of a checkpoint, optimizer and averages among them."""
    return {name: tensor.read().tobytes() for name, tensor in stored_tensors(checkpoint).items()}


def assert_same_from(step: int, run: RunDirectory, reference: RunDirectory) -> None:
    expected, found = numbers(reference), numbers(run)
    later = [one for one in expected if one > step]
    assert {one: found[one] for one in later} == {one: expected[one] for one in later}
    last = checkpoint_files.step_name(max(expected))
    assert everything(run.checkpoints / last) == everything(reference.checkpoints / last)


@pytest.mark.heavy
def test_more_steps_a_branch_and_a_resume_are_the_run_that_was_never_interrupted(
    tiny_work: WorkDirectory, tmp_path: Path
) -> None:
    work = linked(tiny_work, tmp_path)
    whole = prepare(work, "whole", *WSD, *DECAY)
    train(whole, 1)
    assert {"val/ema_loss", "val/ema_bits_per_byte"} <= numbers(whole)[20].keys()
    constant = prepare(work, "constant", *WSD, "stage.steps=10")
    train(constant, 1)

    branch = prepare(work, "branch", *WSD, *DECAY, f"stage.branch_from={constant.path}@10")
    train(branch, 1)
    assert min(numbers(branch)) == 11
    assert_same_from(10, branch, whole)

    config = load_config(constant.config)
    config.stage.steps, config.stage.decay_steps = 20, 5
    save_config(config, constant.config)
    constant.result.unlink()
    train(constant, 1)
    assert_same_from(10, constant, whole)

    resumed = work.run("language", "resumed")
    copy_until(whole, resumed, step=10)
    train(resumed, 1)
    assert numbers(resumed) == numbers(whole)
    assert_same_from(0, resumed, whole)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "layout", [pytest.param(layout, marks=pytest.mark.bars) for layout in ("parallel.tp=2", "parallel.dp_shard=2")]
)
def test_averages_are_those_computed_by_hand(tiny_work: WorkDirectory, tmp_path: Path, layout: str) -> None:
    decay, steps = 0.8, 6
    run = prepare(
        linked(tiny_work, tmp_path),
        "averaged",
        f"stage.ema_decay={decay}",
        f"stage.steps={steps}",
        "stage.checkpoint_every=1",
        "stage.keep_checkpoints=9",
        layout,
    )
    train(run, 2)
    weights = [model_weights(checkpoint) for checkpoint in checkpoint_files.steps_in(run.checkpoints)]
    assert len(weights) == steps
    factors = np.array([decay ** (steps - 1 - i) for i in range(steps)])
    factors /= factors.sum()
    console = Console(file=StringIO())
    ema = average(run, 0, True, "cpu", console)
    last = average(run, 4, False, "cpu", console)
    assert (ema.name, last.name) == ("ema_step_00000006", "last_4_step_00000006")
    for name, found in model_weights(ema).items():
        by_hand = sum(factor * one[name].astype(np.float64) for factor, one in zip(factors, weights, strict=True))
        np.testing.assert_allclose(found, by_hand, rtol=2e-6, atol=1e-8, err_msg=name)
    for name, found in model_weights(last).items():
        by_hand = sum(one[name].astype(np.float64) for one in weights[-4:]) / 4
        assert np.array_equal(found, np.asarray(by_hand).astype(np.float32)), name
    measured, on_ranks = durable.read_json(ema / checkpoint_files.AVERAGE)["metrics"], numbers(run)[steps]
    assert measured["val/loss"] == pytest.approx(on_ranks["val/ema_loss"], rel=1e-5)
    assert measured["val/bits_per_byte"] == pytest.approx(on_ranks["val/ema_bits_per_byte"], rel=1e-5)
    assert measured["val/loss"] != pytest.approx(on_ranks["val/loss"], rel=1e-4)
    assert load_model(last).name == "language/averaged/last_4_step_00000006"
    assert export(last, tmp_path / "exported") == last
    start = ("stage.eval_at_start=true", "stage.steps=1", f"stage.init_from={last}")
    next_run = prepare(run.work, "next", *start)
    train(next_run, 1)
    measured = durable.read_json(last / checkpoint_files.AVERAGE)["metrics"]
    assert numbers(next_run)[0]["val/loss"] == pytest.approx(measured["val/loss"], rel=1e-5)
    with pytest.raises(ArtefactError, match="last_4_step_00000006 exists: use it, or remove it first"):
        average(run, 4, False, "", console)
    with pytest.raises(ConfigError, match=r"--last=7: expected at most 6, the checkpoints of the run"):
        average(run, 7, False, "", console)


@pytest.mark.bars
@pytest.mark.timeout(3600)
@pytest.mark.cluster
def test_a_decay_from_a_constant_run_ends_within_one_per_cent_of_a_cosine(tmp_path: Path) -> None:
    """At nano on the local corpus: the constant run was planned longer than the cosine run, and is branched."""
    for seed in SEEDS:
        work, of_seed = tmp_path / f"work{seed}", f"seed={seed}"
        plain = (of_seed, "stage.schedule=cosine", f"stage.steps={STEPS}", "stage.checkpoint_every=0")
        cosine = code_metrics(work, "cosine", *plain)
        begins = STEPS - DECAYED
        wsd = (of_seed, "stage.schedule=wsd")
        constant = code_metrics(
            work, "constant", *wsd, f"stage.steps={begins + 20}", f"stage.checkpoint_every={begins}"
        )
        start = f"stage.branch_from={work}/runs/code/constant@{begins}"
        branch = code_metrics(work, "branch", *wsd, start, f"stage.steps={STEPS}", f"stage.decay_steps={DECAYED}")
        losses = {"cosine": cosine["val/loss"], "constant": constant["val/loss"], "branch": branch["val/loss"]}
        print(f"seed {seed}: val/loss {losses}, branch / cosine {losses['branch'] / losses['cosine']:.4f}")
        assert losses["branch"] <= 1.01 * losses["cosine"]
