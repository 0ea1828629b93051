"""Adapters as their users meet them: resumed to the bit, checkpoints that name the base, read by later programs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.generation.load import load_model
from dist_lm.model.lora import adapter_of
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.registry import load_config
from dist_lm.stages.training.stage import training_stage
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.training import checkpoint_files as files
from dist_lm.training.checkpoint_tensors import model_weights, stored_tensors
from tests.conftest import TINY
from tests.forked_run import run_forked
from tests.training_run import copy_until, linked, numbers, prepare, train, write_untrained

pytestmark = pytest.mark.cluster
STEPS = 6
SHORT = (f"stage.steps={STEPS}", "stage.checkpoint_every=3", "stage.eval_every=3", "stage.warmup_steps=2")
FOUR_BITS = ("stage.lora.rank=2", "stage.lora.load_in_4bit=true")
LORA = (*SHORT, "stage.lora.rank=3", "stage.lora.alpha=6", "stage.eval_at_start=true")


@pytest.fixture(scope="module")
def work(tiny_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> WorkDirectory:
    made = linked(tiny_work, tmp_path_factory.mktemp("adapters"))
    write_untrained(made, "language", 0)
    return made


@pytest.fixture(scope="module")
def reference(work: WorkDirectory) -> RunDirectory:
    """Two ranks that share every layer, never disturbed."""
    run = prepare(work, "lora", *LORA, *start_at(work), "parallel.tp=2", "stage.keep_checkpoints=9", stage="code")
    train(run, ranks=2)
    return run


def start_at(work: WorkDirectory) -> tuple[str]:
    return (f"stage.init_from={work.run('language', 'default').path}",)


def own_copy(work: WorkDirectory, directory: Path) -> WorkDirectory:
    made = linked(work, directory)
    shutil.copytree(work.path / "runs", made.path / "runs")
    return made


@pytest.mark.heavy
def test_a_checkpoint_holds_adapters_alone(reference):
    names = {name.removesuffix(".exp_avg") for name in stored_tensors(newest(reference))}
    assert names
    assert all(".adapters." in name for name in names)


@pytest.mark.heavy
def test_the_first_step_is_that_of_the_base(reference, work):
    plain = prepare(work, "plain", *start_at(work), *SHORT, "stage.eval_at_start=true", "stage.steps=1", stage="code")
    train(plain, ranks=1)
    assert numbers(reference)[0]["val/loss"] == pytest.approx(numbers(plain)[0]["val/loss"], rel=1e-6)
    assert numbers(reference)[1]["train/loss"] == pytest.approx(numbers(plain)[1]["train/loss"], rel=1e-6)
    assert numbers(reference)[STEPS]["val/loss"] < numbers(reference)[0]["val/loss"]


@pytest.mark.bars  # test_training_run.py resumes a run of whole weights
def test_a_resumed_run_ends_bit_identical(reference, work, tmp_path):
    run = own_copy(work, tmp_path).run("code", "resumed")
    copy_until(reference, run, step=STEPS // 2)
    train(run, ranks=2)
    assert numbers(run) == numbers(reference)
    for name, tensor in stored_tensors(newest(reference)).items():
        assert np.array_equal(stored_tensors(newest(run))[name].read(), tensor.read()), name


@pytest.mark.bars
def test_the_loss_curve_does_not_depend_on_the_layout(reference, work):
    run = prepare(work, "one", *LORA, *start_at(work), stage="code")
    train(run, ranks=1)
    for step, line in numbers(reference).items():
        for name in {"train/loss", "val/loss"} & line.keys():
            assert numbers(run)[step][name] == pytest.approx(line[name], rel=1e-5), (step, name)


def newest(run: RunDirectory) -> Path:
    found = files.read_pointer(run.checkpoints, files.LATEST)
    assert found is not None
    return found


@pytest.mark.heavy
def test_what_reads_a_run_gets_merged_weights(reference, work):
    base, own = model_weights(newest(work.run("language", "default"))), stored_tensors(newest(reference))
    loaded = load_model(reference.path)
    changed = {name for name, value in loaded.weights.items() if not np.array_equal(value.numpy(), base[name])}
    assert changed == {name for name in base if f"{files.MODEL}{adapter_of(name)}a" in own}
    assert json.loads(reference.result.read_text())["trained_parameters"] == sum(
        tensor.elements for name, tensor in own.items() if name.startswith(files.MODEL)
    )


@pytest.mark.bars  # test_what_reads_a_run_gets_merged_weights opens the same weights
def test_a_later_stage_starts_from_merged_weights(reference, work):
    once = ("stage.steps=1", "stage.lr=1e-9", "stage.muon.lr=0", "stage.warmup_steps=0")
    run = prepare(work, "after", f"stage.init_from={reference.path}", *once, stage="code")
    train(run, ranks=1)
    found, expected = model_weights(newest(run)), model_weights(newest(reference))
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.bars
def test_adapters_of_adapters_are_merged_in_turn(reference, work):
    again = prepare(work, "again", f"stage.init_from={reference.path}", *LORA, "stage.steps=2", stage="code")
    train(again, ranks=1)
    assert numbers(again)[0]["val/loss"] == pytest.approx(numbers(reference)[STEPS]["val/loss"], rel=1e-5)
    first, second = model_weights(newest(reference)), model_weights(newest(again))
    assert max(np.abs(first[name] - second[name]).max() for name in first) > 1e-5


def name_elsewhere(checkpoint: Path, directory: Path) -> None:
    state = checkpoint / files.STATE
    content = json.loads(state.read_text())
    content["adapters"]["base"] = str(directory / "elsewhere")
    state.write_text(json.dumps(content))


@pytest.mark.heavy
def test_a_base_that_changed_or_is_gone_is_refused_by_name(reference, work, tmp_path):
    made = own_copy(work, tmp_path)
    run, base = made.run("code", "lora"), made.run("language", "default")
    absolute = newest(work.run("language", "default"))
    name_elsewhere(newest(run), tmp_path)  # the path from the checkpoint still finds it
    assert model_weights(newest(run)).keys() == model_weights(absolute).keys()
    write_untrained(made, "language", 1)
    with pytest.raises(ArtefactError, match=f"{base.path}.*has changed since"):
        model_weights(newest(run))
    shutil.rmtree(base.path)
    with pytest.raises(ArtefactError, match="elsewhere, which is gone"):
        model_weights(newest(run))


@pytest.mark.heavy
def test_a_launch_names_a_base_that_is_gone(reference, work, tmp_path):
    made = own_copy(work, tmp_path)
    run = made.run("code", "lora")
    run.result.unlink()
    name_elsewhere(newest(run), tmp_path)
    shutil.rmtree(made.run("language", "default").path)
    config = load_config(run.config)
    config.work_dir = str(made.path)
    with pytest.raises(ArtefactError, match="elsewhere, which is gone"):
        training_stage("code").look(config, is_target=True, rebuilt=())


@pytest.mark.bars
def test_other_adapters_are_refused_on_resume(reference, work, tmp_path):
    run = own_copy(work, tmp_path).run("code", "other")
    copy_until(reference, run, step=3)
    text = run.config.read_text()
    run.config.write_text(text.replace("rank: 3", "rank: 4"))
    assert run_forked(run, ranks=2) != 0
    assert "stage.lora={'rank': 3" in json.loads(run.rank_failures()[0].read_text())["message"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("stage.lora.rank=-1",), "stage.lora.rank=-1"),
        (("stage.lora.rank=41",), "stage.lora.rank=41: expected 1 to 40"),
        (("stage.lora.rank=2", "stage.lora.targets=[querys]"), "stage.lora.targets=querys"),
        (("stage.lora.rank=2", "stage.lora.targets=[gate]"), "model.ffn=gelu has no gate"),
        (("stage.lora.rank=2", "stage.lora.alpha=0"), "stage.lora.alpha=0"),
        (("stage.lora.rank=2", "stage.init_from=none"), "stage.init_from=none"),
        (("stage.lora.load_in_4bit=true",), "stage.lora.load_in_4bit=True: expected false without stage.lora.rank"),
        ((*FOUR_BITS, "parallel.tp=2"), "parallel.tp=2: expected 1 (parallel.dp_replicate has the ranks)"),
        ((*FOUR_BITS, "parallel.dp_shard=2"), "parallel.dp_shard=2: expected 1"),
        ((*FOUR_BITS, "parallel.cpu_offload=true"), "parallel.cpu_offload=True: expected false"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(overrides, message):
    with pytest.raises(ConfigError) as refused:
        compose_config(["stage=code", *TINY, *overrides])
    assert message in str(refused.value)


def test_a_stage_without_a_start_has_nothing_to_adapt(tiny_work):
    overrides = ("stage.init_from=auto", "stage.lora.rank=2", f"work_dir={tiny_work.path}", "run_id=new")
    config = compose_config(["stage=language", *TINY, *overrides])
    with pytest.raises(ConfigError, match=r"stage\.init_from=none: expected a checkpoint"):
        training_stage("language").look(config, is_target=True, rebuilt=())
