"""Stage rlhf with adapters: resumed to the bit, with the critic's base by hash, and the engine gets merged weights."""

import json
import shutil
from pathlib import Path

import pytest

from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.training import checkpoint_files as files
from dist_lm.training.checkpoint_tensors import stored_tensors
from tests.cluster.test_rlhf_run import prepare
from tests.training_run import copy_until, linked, numbers, train, write_untrained

pytestmark = [pytest.mark.cluster, pytest.mark.bars]
LORA = ("stage.lora.rank=4", "stage.steps=3", "stage.checkpoint_every=1", "rlhf.lr=1e-2", "rlhf.value_lr=1e-2")


@pytest.fixture(scope="module")
def work(tiny_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> WorkDirectory:
    made = linked(tiny_work, tmp_path_factory.mktemp("adapters"))
    write_untrained(made, "tools", 0)
    return made


@pytest.fixture(scope="module")
def reference(work: WorkDirectory) -> RunDirectory:
    run = prepare(work, *LORA)
    train(run, ranks=1)
    return run


def test_a_resumed_run_ends_bit_identical_and_holds_adapters_alone(
    reference: RunDirectory, work: WorkDirectory, tmp_path: Path
):
    own = linked(work, tmp_path)
    shutil.copytree(work.path / "runs" / "tools", own.path / "runs" / "tools")
    run = own.run("rlhf", "default")
    copy_until(reference, run, step=1)
    train(run, ranks=1)
    assert numbers(run) == numbers(reference)
    assert numbers(run)[3]["rlhf/kl"] != 0
    newest = files.find_checkpoint(run.path)
    names = {name.removeprefix("value.") for name in stored_tensors(newest)}
    assert all(".adapters." in name or "scalar_head" in name for name in names)
    base = files.find_checkpoint(own.run("tools", "default").path)  # of this work directory, found by its place
    assert json.loads(files.read_attached(newest, "critic.json"))["base"] == str(base)
