"""Saving while training goes on: what is written is what was, one save at a time, and failures reach every rank."""

import os
from itertools import chain
from pathlib import Path
from threading import Event

import pytest
import torch

from dist_lm.config.cluster import ParallelConfig
from dist_lm.config.stage import StageConfig
from dist_lm.parallel.layout import resolve_layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.parallel.sharding import build_model
from dist_lm.training import checkpoint, checkpoint_files, checkpoint_saver
from dist_lm.training.checkpoint_saver import CheckpointSaver
from dist_lm.training.checkpoint_tensors import stored_tensors
from dist_lm.training.optimizer import build_optimizer
from dist_lm.training.state import TrainState
from tests.model.small_models import small_config
from tests.parallel.ranks import RankGroup, RankGroups
from tests.patience import patient

pytestmark = pytest.mark.cluster

CONFIG = small_config()  # five heads: over two ranks one of them is padding
BLOCKED_S = patient(60)


class Run:
    """A model, its optimizer and the saver of its checkpoints on all ranks."""

    def __init__(self, world: World, checkpoints: Path, tp: int = 1, asynchronous: bool = True) -> None:
        parallel = ParallelConfig(tp=tp, compute_dtype="fp32")
        self.mesh = build_mesh(resolve_layout(parallel, CONFIG, world.size), world.device)
        self.model = build_model(CONFIG, parallel, self.mesh, world.device, seed=0)
        self.optimizer = build_optimizer(self.model, StageConfig(name="any"))
        self.saver = CheckpointSaver(checkpoints, CONFIG, world, keep=2, asynchronous=asynchronous)

    def save(self, step: int, **state) -> None:
        self.saver.save(self.model, self.optimizer, TrainState(step=step, **state))

    def tensors(self) -> dict[str, torch.Tensor]:
        return checkpoint.tensors_of(self.model, self.optimizer, CONFIG)

    @torch.no_grad()
    def fill(self, value: float) -> None:
        for tensor in self.tensors().values():
            tensor.fill_(value)

    def hold(self) -> Event:
        """Let the thread wait before its next save, until the event is set."""
        go = Event()
        self.saver.thread.submit(go.wait, BLOCKED_S)
        return go


def values(checkpoints: Path, step: int) -> set[float]:
    """The distinct numbers in a checkpoint."""
    tensors = stored_tensors(checkpoints / checkpoint_files.step_name(step))
    return {number for tensor in tensors.values() for number in set(tensor.read().view("f4").tolist())}


def steps(checkpoints: Path) -> list[str]:
    return [path.name for path in checkpoint_files.steps_in(checkpoints)]


def save_and_go_on(world: World, checkpoints: Path, tp: int) -> list[str]:
    run = Run(world, checkpoints, tp)
    with run.saver:
        for step in (1, 2):  # the second into the buffers of the first
            go = run.hold()
            run.fill(step)
            run.save(step)
            during = steps(checkpoints)
            run.fill(-1.0)
            go.set()
    return during


@pytest.mark.heavy
@pytest.mark.parametrize("tp", [1, 2])
def test_a_checkpoint_holds_what_was_when_the_save_was_due(ranks: RankGroups, tmp_path: Path, tp: int):
    during = ranks.run(2, save_and_go_on, tmp_path, tp)
    assert during == ["step_00000001"]  # the second was not waited for, the first was
    assert values(tmp_path, 1) == {1.0}
    assert values(tmp_path, 2) == {2.0}


def three_saves(world: World, checkpoints: Path, asynchronous: bool) -> list[list[str]]:
    run = Run(world, checkpoints, asynchronous=asynchronous)
    seen = []
    with run.saver:
        for step in (1, 2, 3):
            run.save(step, best_val_loss=0.5, best_step=1)
            seen.append(steps(checkpoints))
    return seen


@pytest.mark.heavy
def test_a_save_waits_for_the_one_before_and_the_end_for_the_last(ranks: RankGroups, tmp_path: Path):
    seen = ranks.run(2, three_saves, tmp_path, asynchronous=True)
    for step, finished in enumerate(seen, start=1):
        assert all(checkpoint_files.step_name(earlier) in finished for earlier in range(1, step))
    latest = checkpoint_files.read_pointer(tmp_path, checkpoint_files.LATEST)
    assert latest == tmp_path / checkpoint_files.step_name(3)
    best = checkpoint_files.read_pointer(tmp_path, checkpoint_files.BEST)
    assert best == tmp_path / checkpoint_files.step_name(1)


@pytest.mark.heavy
def test_without_a_thread_of_its_own_a_save_is_done_when_it_returns(ranks: RankGroups, tmp_path: Path):
    seen = ranks.run(2, three_saves, tmp_path, asynchronous=False)
    assert [finished[-1] for finished in seen] == [checkpoint_files.step_name(step) for step in (1, 2, 3)]


def save_where_one_cannot(world: World, checkpoints: Path) -> list[str]:
    run = Run(world, checkpoints)
    messages = []
    with run.saver:
        run.save(1)
        run.save(2)  # there is a file where its folder would be
        try:
            run.save(3)
        except checkpoint_saver.CheckpointWriteError as error:
            messages.append(str(error))
        run.save(4)
    gathered: list = [None] * world.size
    torch.distributed.all_gather_object(gathered, messages)
    return list(chain.from_iterable(gathered))


@pytest.mark.heavy
def test_a_save_that_failed_is_reported_on_every_rank_when_the_next_is_due(ranks: RankGroups, tmp_path: Path):
    (tmp_path / ".step_00000002").touch()
    first, second = ranks.run(2, save_where_one_cannot, tmp_path)
    assert first == second
    assert "step_00000002 could not be written" in first
    assert "step_00000001 is intact" in first
    assert steps(tmp_path) == ["step_00000001", "step_00000004"]


def die_in_a_save(world: World, checkpoints: Path) -> str:
    run = Run(world, checkpoints)
    go = run.hold()
    run.save(1)
    if world.rank == 1:
        os._exit(1)
    go.set()
    try:
        run.saver.wait()
    except RuntimeError as error:
        return type(error).__name__
    return "nothing"


@pytest.mark.heavy
def test_a_rank_that_dies_in_a_save_leaves_nobody_waiting(tmp_path: Path):
    group = RankGroup(2, tmp_path / "store")
    try:
        for pipe in group.pipes:
            pipe.send((die_in_a_save, (tmp_path,), {}))
        with pytest.raises(EOFError):
            group.pipes[1].recv()
        assert group.pipes[0].poll(BLOCKED_S), "rank 0 waits for a dead one"
        assert group.pipes[0].recv() == (None, "RuntimeError")
    finally:
        group.kill()
    assert steps(tmp_path) == []
