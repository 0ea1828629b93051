"""A small model that is ready to answer, and a run that holds it."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_lm.config.root import save_config
from dist_lm.generation.load import LoadedModel
from dist_lm.generation.session import Session
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World
from dist_lm.prepare.compose import compose_config
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training import checkpoint, checkpoint_saver
from dist_lm.training.state import TrainState
from tests.conftest import TINY

OVERRIDES = ("stage=code", *TINY, "model.init_std=0.2", "run_id=small")


@pytest.fixture(scope="session")
def small_model() -> Transformer:
    """Never trained; its weights are large enough that it has opinions."""
    model = Transformer(compose_config([*OVERRIDES]).model)
    initialise(model, seed=0)
    return model.requires_grad_(requires_grad=False)


@pytest.fixture(scope="session")
def small_run(
    tiny_work: WorkDirectory, small_model: Transformer, tmp_path_factory: pytest.TempPathFactory
) -> RunDirectory:
    """A run of stage `code` with that model as its checkpoint of step 20: do not write to it, use `own_run`."""
    work = WorkDirectory(tmp_path_factory.mktemp("generation") / "work")
    work.path.mkdir()
    for name in ("tokenizer", "corpora"):
        (work.path / name).symlink_to(tiny_work.path / name)
    run = work.run("code", "small")
    run.create()
    config = compose_config([*OVERRIDES, f"work_dir={work.path}"])
    save_config(config, run.config)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = World(0, 1, 0, torch.device("cpu"))
    tensors = checkpoint.tensors_of(small_model, None, config.model)
    checkpoint_saver.write(run.checkpoints, tensors, TrainState(step=20), config.model, world)
    dist.destroy_process_group()
    return run


@pytest.fixture
def own_run(small_run: RunDirectory, tmp_path: Path) -> RunDirectory:
    """A run of one's own."""
    shutil.copytree(small_run.work.path, tmp_path / "work", symlinks=True)
    return WorkDirectory(tmp_path / "work").run("code", "small")


@pytest.fixture(scope="session")
def session(small_model: Transformer, tiny_work: WorkDirectory) -> Session:
    tokenizer = Tokenizer.load(tiny_work.tokenizer_model)
    loaded = LoadedModel("small", small_model.config, dict(small_model.named_parameters()), tokenizer, run=None)
    return Session(loaded, torch.device("cpu"), answers=3)
