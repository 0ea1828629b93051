"""A run on a corpus behind http: the numbers of the run on the same corpus in the work directory."""

from pathlib import Path

import pytest

from dist_lm.data.attach import attach
from dist_lm.data.manifest import read_manifest, recorded_content
from dist_lm.stages.registry import load_config
from dist_lm.stages.shards.identity import with_folders
from dist_lm.stages.shards.stage import inspect_corpora, train_tokens
from dist_lm.storage.run_directory import WorkDirectory
from tests.data.file_server import serving
from tests.training_run import linked, numbers, prepare, train

SHORT = ("stage.steps=4", "stage.init_from=none", "stage.eval_every=2", "stage.checkpoint_every=2")


@pytest.mark.heavy  # trains two runs
def test_a_run_over_http_has_the_numbers_of_a_local_one(tiny_work: WorkDirectory, tmp_path: Path) -> None:
    """Finds a plan that builds what is attached, ranks that fetch a piece twice, a content that is not recorded, and
    other numbers."""
    near = linked(tiny_work, tmp_path / "near")
    local = prepare(near, "local", *SHORT, stage="code")
    train(local, ranks=2)

    far = WorkDirectory(tmp_path / "far")
    far.path.mkdir()
    (far.path / "tokenizer").symlink_to(tiny_work.tokenizer)
    with serving(tiny_work.path / "corpora") as served:
        attach(f"{served.url}/code", far.corpus("remote"), tmp_path / "cache", 1 << 30)
        chosen = "corpus.folders={code: remote}"
        remote = prepare(far, "remote", *SHORT, chosen, stage="code")
        config = with_folders(load_config(remote.config), ["code"])
        assert inspect_corpora(config, ["code"], train_tokens).ready
        served.sent.clear()
        train(remote, ranks=2)
        splits = read_manifest(near.corpus("code")).splits.values()
        assert 0 < sum(served.sent) <= sum(shard.size for split in splits for shard in split.shards)

    assert numbers(remote) == numbers(local)
    assert recorded_content(remote)["code"] == recorded_content(local)["code"]
    assert served.url not in remote.config.read_text()
