"""What a rank checks of its corpora before it trains."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_lm.config.root import Config
from dist_lm.data.manifest import read_manifest
from dist_lm.errors import ArtefactError
from dist_lm.parallel.mesh import World
from dist_lm.stages.training.program import check_corpora
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training import checkpoint_files
from dist_lm.training.state import TrainState
from tests.conftest import TINY, composed
from tests.data.synthetic_corpus import documents, write


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """The other ranks are not there: each comes alone to the barrier."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def checked(run: RunDirectory, config: Config, rank: int) -> None:
    tokenizer = Tokenizer.load(run.work.tokenizer_model)
    check_corpora(run, config, tokenizer, World(rank, 2, rank, torch.device("cpu")))


def started(work: WorkDirectory) -> tuple[RunDirectory, Config]:
    config = composed(["stage=language", *TINY, f"work_dir={work.path}"])
    run = work.run("language", config.run_id)
    run.create()
    return run, config


def rewrite(directory: Path, seed: int) -> None:
    """Documents keyed by `seed`, with the tokenizer of the corpus."""
    recipe = read_manifest(directory).recipe
    made = [replace(one, tokens=one.tokens % recipe.vocab_size) for one in documents([9] * 50, seed)]
    write(directory, made, made[:5], vocab_size=recipe.vocab_size, tokenizer=recipe.tokenizer_sha256)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_resumes_only_on_the_content_that_the_run_began_with(work: WorkDirectory, rank: int) -> None:
    run, config = started(work)
    checked(run, config, 0)
    recorded = durable.read_json(run.corpora)
    assert recorded["language"] == {**read_manifest(work.corpus("language")).content, "folder": "language"}
    rewrite(work.corpus("language"), seed=1)
    checked(run, config, 0)  # nothing was learned of the other content
    assert durable.read_json(run.corpora) != recorded

    directory = run.checkpoints / checkpoint_files.step_name(5)
    directory.mkdir()
    checkpoint_files.write_state(directory, TrainState(step=5), {})
    checkpoint_files.write_pointer(run.checkpoints, checkpoint_files.LATEST, directory)
    checked(run, config, rank)
    before = durable.read_json(run.corpora)
    rewrite(work.corpus("language"), seed=1)
    checked(run, config, rank)  # the same documents in new tars
    rewrite(work.corpus("language"), seed=2)
    with pytest.raises(
        ArtefactError, match=r"runs/language/default began on other content of corpus language: .*train"
    ):
        checked(run, config, rank)
    assert durable.read_json(run.corpora) == before


def test_a_rank_refuses_shards_of_another_tokenizer(work: WorkDirectory) -> None:
    run, config = started(work)
    content = bytearray(work.tokenizer_model.read_bytes())
    content[-1] ^= 1
    work.tokenizer_model.write_bytes(content)
    with pytest.raises(ArtefactError, match="written with tokenizer"):
        checked(run, config, 1)
