"""Stage tools: conversations packed beside text, the same numbers on any number of ranks and after a kill."""

import json
import subprocess
import sys

import pytest

from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from tests.conftest import TINY
from tests.training_run import DEADLINE_S, STEPS, copy_until, linked, numbers, prepare, tolerance, train, unwritten

pytestmark = pytest.mark.cluster
MIXED = (
    "stage.init_from=none",
    "stage.mix={code: 0.2, language: 0.1}",
    "stage.seq_len=200",
    "stage.dropout=0",
    "parallel.compute_dtype=fp32",  # layouts are compared
)


@pytest.fixture(scope="module")
def reference(tiny_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """One rank, never disturbed."""
    run = prepare(linked(tiny_work, tmp_path_factory.mktemp("reference")), "one", *MIXED, stage="tools")
    train(run, ranks=1)
    return run


@pytest.mark.heavy
def test_losses_before_and_after_are_those_of_every_corpus_and_kind(reference):
    found = numbers(reference)
    kinds = {"val/loss", "val/loss_tools_single", "val/loss_tools_none", "val/loss_code", "val/loss_language"}
    assert found.keys() == set(range(STEPS + 1))
    for step in (0, 10, STEPS):
        assert kinds <= found[step].keys()
    for name in kinds:
        assert found[STEPS][name] < found[0][name]


@pytest.mark.heavy
def test_a_run_writes_every_metric_of_its_stage(reference):
    assert unwritten(reference, "tools") == set()


@pytest.mark.heavy
def test_the_model_is_asked_before_the_first_step_and_after_the_last(reference):
    found = numbers(reference)
    asked = {"tools/parses", "tools/name_exact", "tools/args_exact_single", "tools/call_exact", "tools/false_refusals"}
    for step in (0, STEPS):
        assert asked <= found[step].keys()
        lines = (reference.samples / f"step_{step:08d}.jsonl").read_bytes().splitlines()
        assert [json.loads(line)["kind"] for line in lines] == ["single"] * 4
    assert not asked & found[10].keys()
    assert json.loads(reference.result.read_text())["before"].keys() >= asked


@pytest.mark.bars  # `test_training_run.py` has it of text, `test_sft.py` of conversations in one process
def test_the_loss_curve_does_not_depend_on_the_layout(reference, tiny_work, tmp_path):
    run = prepare(linked(tiny_work, tmp_path), "two", *MIXED, "stage.micro_batch=3", stage="tools")
    train(run, ranks=2)
    expected, found = numbers(reference), numbers(run)
    assert found.keys() == expected.keys()
    for step, line in expected.items():
        for key, value in line.items():
            assert found[step][key] == pytest.approx(value, rel=tolerance(key)), (step, key)


@pytest.mark.heavy
def test_a_run_that_goes_on_from_a_checkpoint_ends_bit_identical(reference, tiny_work, tmp_path):
    run = linked(tiny_work, tmp_path).run("tools", "one")
    copy_until(reference, run, step=10)
    train(run, ranks=1)
    assert numbers(run) == numbers(reference)


@pytest.mark.heavy
def test_conversations_longer_than_a_sequence_are_left_out_loudly(tiny_work, tmp_path):
    settings = (*MIXED, "stage.seq_len=60", "stage.steps=1", "stage.checkpoint_every=0")
    run = prepare(linked(tiny_work, tmp_path), "short", *settings, stage="tools")
    packing = train(run, ranks=1)["packing"]
    assert packing["left_out"] > 0 < packing["documents"]
    assert 0 < packing["padding"] < 0.5
    assert "conversations" in run.warnings.read_text()
    assert "are longer than stage.seq_len=60 and are left out" in run.warnings.read_text()


@pytest.mark.bars  # .ci/run runs the quick start
def test_one_command_trains_all_stages_and_shows_what_was_forgotten(tiny_work, tmp_path):
    work = linked(tiny_work, tmp_path)
    prefixes = ("stage", "stages.code", "stages.language")
    settings = [f"{prefix}.{key}" for prefix in prefixes for key in ("steps=4", "warmup_steps=1", "global_batch=4")]
    settings += [
        f"{prefix}.{key}" for prefix in prefixes[1:] for key in ("seq_len=32", "sampling.samples_per_prompt=0")
    ]
    command = ["stage=pipeline", *TINY, *settings, "stage.seq_len=200", f"work_dir={work.path}"]
    done = subprocess.run(
        [sys.executable, "-m", "dist_lm.launch", *command],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "loss on held-out documents" in done.stdout
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.rstrip().endswith("%")}
    assert {"all", "code", "language", "tools_single"} <= rows.keys()
    assert "calls of tools never trained on" in done.stdout
    result = json.loads(work.run("tools", "default").result.read_text())
    assert result["before"].keys() >= {"val/loss", "val/loss_code", "val/loss_language"}
    start = json.loads(work.run("code", "default").result.read_text())["metrics"]
    # the same documents, in longer sequences
    assert result["before"]["val/loss_code"] == pytest.approx(start["val/loss"], rel=0.2)
