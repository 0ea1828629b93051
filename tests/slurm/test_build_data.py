"""Batch jobs that build corpora by tasks: `slurm/build_data.sh`."""

from pathlib import Path

import pytest

from dist_lm.prepare.compose import compose_config
from dist_lm.stages.shards.stage import STAGE as SHARDS
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tracking.console import Console
from tests.conftest import TINY_MODEL
from tests.slurm.batch_job import BatchJob
from tests.slurm.real_slurm import RealSlurm
from tests.stages.test_builds_by_tasks import files_of
from tests.training_run import linked

pytestmark = [pytest.mark.slurm, pytest.mark.bars, pytest.mark.timeout(2400)]


def test_two_nodes_build_the_bytes_of_one_machine(
    slurm: RealSlurm, fresh: WorkDirectory, tiny_work: WorkDirectory, tmp_path: Path
) -> None:
    """Finds a job whose tasks run on one of its nodes alone, bytes that depend on the node, and a job that does not end
    when its corpus is complete."""
    (fresh.path / "corpora").unlink()  # they are shared by other tests
    nodes = fresh.path / "nodes"
    nodes.mkdir()
    sources = ",".join(
        f"{{reader:'tests.slurm.node_reader:read_on_node',language:english,licence:MIT,subset:part{number},"
        f"data_dir:'{nodes}'}}"
        for number in range(6)
    )
    settings = (
        *(*TINY_MODEL, "tokenizer=keep", "corpus.build=tasks", "corpus.val_fraction=0.2"),
        *("stage.corpora=[ours]", f"corpus.corpora={{ours:[{sources}]}}"),
    )
    job = BatchJob(slurm, fresh, "slurm/build_data.sh", *settings, "cluster.connect_timeout_s=120")
    job.finish()
    assert job.starts() == 1
    assert len(list(nodes.iterdir())) == 2
    assert not list((fresh.path / "builds").iterdir())

    local = linked(tiny_work, tmp_path / "local")
    (local.path / "corpora").unlink()
    SHARDS.build(compose_config(["stage=shards", *settings, f"work_dir={local.path}"]), Console())
    files = files_of({"ours": fresh.corpus("ours")})
    assert len([name for name in files if name.startswith("ours/train-") and name.endswith(".tar")]) == 6
    assert files == files_of({"ours": local.corpus("ours")})
