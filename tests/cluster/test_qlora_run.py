"""A base in four bits as its users meet it: resumed to the bit, and later programs read the rounded base."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_lm.errors import UserError
from dist_lm.model.lora import adapter_of, change
from dist_lm.model.quantised import round_trip
from dist_lm.model.size import ADAPTERS
from dist_lm.stages.registry import load_config
from dist_lm.stages.training.stage import training_stage
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.training import checkpoint_files as files
from dist_lm.training.checkpoint_tensors import as_fp32, model_weights, own_parameters, stored_tensors
from tests.training_run import copy_until, linked, numbers, prepare, train, write_untrained

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.cluster
STEPS = 6
SHORT = (f"stage.steps={STEPS}", "stage.checkpoint_every=3", "stage.eval_every=3", "stage.warmup_steps=2")
LORA = ("stage.lora.rank=3", "stage.lora.alpha=6", "stage.eval_at_start=true", "stage.keep_checkpoints=9")
QLORA = (*SHORT, *LORA, "stage.lora.load_in_4bit=true", "stage.lora.targets=[attention]", "parallel=ddp")


@pytest.fixture(scope="module")
def work(tiny_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> WorkDirectory:
    new_work = linked(tiny_work, tmp_path_factory.mktemp("four_bits"))
    write_untrained(new_work, "language", 0)
    return new_work


@pytest.fixture(scope="module")
def reference(work: WorkDirectory) -> RunDirectory:
    """Two replicas, never disturbed."""
    run = prepare(work, "qlora", *QLORA, start_at(work.run("language", "default")), stage="code")
    train(run, ranks=2)
    return run


def start_at(run: RunDirectory) -> str:
    return f"stage.init_from={run.path}"


def newest(run: RunDirectory) -> Path:
    checkpoint = files.read_pointer(run.checkpoints, files.LATEST)
    assert checkpoint is not None
    return checkpoint


@pytest.mark.heavy
def test_a_checkpoint_holds_adapters_alone(reference: RunDirectory):
    names = {name.removesuffix(".exp_avg") for name in stored_tensors(newest(reference))}
    assert names
    assert all(ADAPTERS in name for name in names)


@pytest.mark.heavy
def test_a_resumed_run_ends_bit_identical(reference: RunDirectory, work: WorkDirectory, tmp_path: Path):
    """Finds bits that change from start to start."""
    own = linked(work, tmp_path)
    shutil.copytree(work.run("language", "default").path, own.run("language", "default").path)
    run = own.run("code", "resumed")
    copy_until(reference, run, step=STEPS // 2)
    train(run, ranks=2)
    assert numbers(run) == numbers(reference)
    for name, tensor in stored_tensors(newest(reference)).items():
        assert np.array_equal(stored_tensors(newest(run))[name].read(), tensor.read()), name


@pytest.mark.heavy
def test_readers_get_adapters_merged_into_the_rounded_base(reference: RunDirectory, work: WorkDirectory):
    """Finds a merge into the base before rounding, and matrices without adapters that are not rounded."""
    base = model_weights(newest(work.run("language", "default")))
    factors = {name: torch.from_numpy(as_fp32(t)) for name, t in own_parameters(newest(reference)).items()}
    merged = model_weights(newest(reference))
    for name, weight in base.items():
        expected = round_trip(name, torch.from_numpy(weight))
        prefix = adapter_of(name)
        if f"{prefix}a" in factors:
            expected = expected + change(name, factors[f"{prefix}a"], factors[f"{prefix}b"], 2.0)
        np.testing.assert_allclose(merged[name], expected.numpy(), rtol=0, atol=1e-7, err_msg=name)
    assert not np.array_equal(merged["blocks.0.feed_forward.up.weight"], base["blocks.0.feed_forward.up.weight"])


@pytest.mark.heavy
def test_the_first_and_the_last_step_are_those_of_whole_models(reference: RunDirectory, work: WorkDirectory):
    """A later stage on another layout starts where the run ended. Finds a base that is loaded without rounding."""
    once = ("stage.steps=1", "stage.lr=1e-9", "stage.muon.lr=0", "stage.warmup_steps=0", "stage.eval_at_start=true")
    after = prepare(work, "after", *once, start_at(reference), "parallel.tp=2", stage="code")
    train(after, ranks=2)
    assert numbers(after)[0]["val/loss"] == pytest.approx(numbers(reference)[STEPS]["val/loss"], rel=1e-5)
    before = prepare(work, "before", *once, start_at(work.run("language", "default")), stage="code")
    train(before, ranks=1)
    rounding = numbers(reference)[0]["val/loss"] / numbers(before)[0]["val/loss"] - 1
    assert 1e-7 < abs(rounding) < 0.05


@pytest.mark.heavy
def test_a_plan_without_the_package_names_the_extra(
    reference: RunDirectory, work: WorkDirectory, monkeypatch: pytest.MonkeyPatch
):
    config = load_config(reference.config)
    config.run_id = "new"
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'dist_lm\[qlora\]'"):
        training_stage("code").look(config, is_target=True, rebuilt=())


@pytest.mark.bars
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_loss_falls_by_nine_tenths_of_what_lora_gains(work: WorkDirectory, seed: int):
    """From a base that has learned text, adapters learn code."""
    steps = ("stage.steps=150", "stage.checkpoint_every=0", "stage.eval_every=0", f"seed={seed}")
    base = prepare(work, f"base{seed}", *steps, stage="language")
    train(base, ranks=1)
    gains = {}
    for kind, four_bits in (("lora", "false"), ("qlora", "true")):
        adapters = (*LORA, "stage.lora.rank=8", "stage.lora.alpha=16", f"stage.lora.load_in_4bit={four_bits}")
        run = prepare(work, f"{kind}{seed}", *steps, *adapters, "stage.lr=5e-3", start_at(base), stage="code")
        train(run, ranks=1)
        gains[kind] = numbers(run)[150]["val/loss"]
        before = numbers(run)[0]["val/loss"]
        if kind == "lora":
            start = before  # the base without rounding
    share = (start - gains["qlora"]) / (start - gains["lora"])
    print(f"seed {seed}: before {start:.4f}, LoRA {gains['lora']:.4f}, QLoRA {gains['qlora']:.4f}, share {share:.3f}")
    assert share >= 0.9
