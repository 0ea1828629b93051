"""Ranks of a node share the files of a save: what these hold, how many they are, and what is left when a rank fails."""

import errno
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from dist_lm.parallel.mesh import World
from dist_lm.parallel.messages import all_gather
from dist_lm.parallel.node_memory import HAS_SHARED_MEMORY, NodeMemory
from dist_lm.parallel.values import logical, shard_of
from dist_lm.storage.process import is_alive
from dist_lm.training import checkpoint_files, checkpoint_plan, checkpoint_saver
from dist_lm.training.checkpoint_saver import CheckpointSaver, CheckpointWriteError
from dist_lm.training.checkpoint_tensors import stored_tensors
from dist_lm.training.state import TrainState
from tests.cluster.test_checkpoint_layouts import MODEL, TENSORS, Layout, bits, mesh_of, padded, value
from tests.cluster.test_checkpoint_process import DEADLINE_S, wait_until
from tests.cluster.test_checkpoint_saver import BLOCKED_S, Run, steps, values
from tests.parallel.ranks import RankGroup, RankGroups

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.heavy,
    pytest.mark.skipif(not HAS_SHARED_MEMORY, reason="each rank writes files of its own elsewhere"),
]

N_RANKS = 4


@contextmanager
def saver_of(world: World, checkpoints: Path, layout: Layout) -> Iterator[tuple[CheckpointSaver, dict]]:
    """A saver of `TENSORS`, and these as a rank holds them."""
    mesh = mesh_of(layout)
    tensors = {name: logical(padded(name, mesh), TENSORS[name][0]) for name in TENSORS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_saver, "tensors_of", lambda *arguments: dict(tensors))
        with CheckpointSaver(checkpoints, MODEL, world, keep=0, asynchronous=True) as saver:
            yield saver, tensors


def save(saver: CheckpointSaver, step: int) -> None:
    saver.save(torch.nn.Module(), torch.optim.SGD([torch.zeros(1)]), TrainState(step=step))


def save_on_nodes(world: World, checkpoints: Path, layout: Layout, per_node: int, by_process: bool) -> None:
    """Saves twice on nodes of so many ranks, and changes the tensors while each save is in flight."""
    world = replace(world, local_rank=world.rank % per_node)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_saver, "PROCESS_BYTES", 0 if by_process else 1 << 40)
        with saver_of(world, checkpoints, layout) as (saver, tensors):
            originals = {name: shard_of(tensor).clone() for name, tensor in tensors.items()}
            for step in (1, 2):
                for name, tensor in tensors.items():
                    shard_of(tensor).copy_(originals[name] * step)
                save(saver, step)
                for tensor in tensors.values():
                    shard_of(tensor).fill_(-1.0)
            saver.wait()
            assert by_process or saver.process is None


def require_values(directory: Path, factor: int = 1) -> list[str]:
    """Compares all tensors of a checkpoint bit by bit; the names of its files."""
    checkpoint_files.verify(directory)
    stored = stored_tensors(directory)
    assert stored.keys() == TENSORS.keys()
    for name, tensor in stored.items():
        assert np.array_equal(tensor.read().view(np.int32), bits(value(name) * factor).numpy().reshape(-1)), name
    return sorted(path.name for path in directory.glob("*.safetensors"))


@pytest.mark.parametrize("by_process", [False, True])
@pytest.mark.parametrize(
    ("layout", "per_node"), [((4, 1), 2), ((2, 2), 4), ((2, 2), 2), ((1, 4), 2), ((4, 1), 4)], ids=str
)
def test_a_node_has_one_file_with_what_its_ranks_save(
    ranks: RankGroups, tmp_path: Path, layout: Layout, per_node: int, by_process: bool
):
    """Finds rows of tensor parallelism that are not put together, a copy of the save before, or a file too many."""
    ranks.run(N_RANKS, save_on_nodes, tmp_path, layout, per_node, by_process)
    for step in (1, 2):
        names = require_values(tmp_path / checkpoint_files.step_name(step), step)
        assert names == [
            f"shard-{first + 1:05d}-model-00001-of-00001.safetensors" for first in range(0, N_RANKS, per_node)
        ]


def save_many_files(world: World, checkpoints: Path) -> list[int]:
    """The number of files that each rank of a node wrote."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_plan, "FILE_BYTES", 10_000)
        with saver_of(world, checkpoints, (4, 1)) as (saver, _):
            save(saver, 1)
            return all_gather(len(saver._plan), int)


def test_ranks_of_a_node_share_out_its_files(ranks: RankGroups, tmp_path: Path):
    """Finds a rank that writes all files of a large model while its neighbours wait."""
    written = ranks.run(N_RANKS, save_many_files, tmp_path)
    names = require_values(tmp_path / checkpoint_files.step_name(1))
    n_files = len(names)
    assert 1 < n_files <= sum(tensor.bytes for tensor in stored_tensors(tmp_path / "step_00000001").values()) // 10_000
    assert names == [f"shard-00001-model-{number:05d}-of-{n_files:05d}.safetensors" for number in range(1, n_files + 1)]
    assert max(written) - min(written) <= 1


def save_where_one_cannot_look(world: World, checkpoints: Path) -> None:
    """Saves on two nodes; rank 3 may not open the memory of rank 2."""
    world = replace(world, local_rank=world.rank % 2)

    def refuse(place: object) -> NodeMemory:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 3:
            patch.setattr(NodeMemory, "opened", refuse)
        with saver_of(world, checkpoints, (4, 1)) as (saver, _):
            save(saver, 1)


def test_a_node_whose_ranks_cannot_see_each_other_has_a_file_a_rank(ranks: RankGroups, tmp_path: Path):
    """Finds a shard that is written twice or never because one rank goes another way than its neighbour."""
    ranks.run(N_RANKS, save_where_one_cannot_look, tmp_path)
    names = require_values(tmp_path / checkpoint_files.step_name(1))
    assert [name[:11] for name in names] == ["shard-00001", "shard-00003", "shard-00004"]


def fill_the_disk(world: World, checkpoints: Path) -> list[str]:
    """What each rank is told of a save whose writer cannot write."""
    run = Run(world, checkpoints)
    message = ""
    with run.saver:
        run.fill(1.0)
        run.save(1)
        run.saver.wait()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 if world.is_first else soft, hard))
        try:
            run.save(2)
            run.saver.wait()
        except CheckpointWriteError as error:
            message = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        run.fill(3.0)
        run.save(3)
    return all_gather(message, str)


def test_a_full_disk_fails_the_save_on_all_ranks_and_names_the_writer(ranks: RankGroups, tmp_path: Path):
    """Finds ranks that wait for a writer that has failed, and an error that does not say which of them it was."""
    first, second = ranks.run(2, fill_the_disk, tmp_path)
    assert first == second
    assert "step_00000002 could not be written (rank 0: " in first
    assert "File too large" in first
    assert "step_00000001 is intact" in first
    assert steps(tmp_path) == ["step_00000001", "step_00000003"]
    assert values(tmp_path, 1) == {1.0}
    assert values(tmp_path, 3) == {3.0}


def die_while_it_is_read(world: World, checkpoints: Path) -> str:
    """Rank 1 dies while the process of rank 0 has its copy still to read; what rank 0 is told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_saver, "PROCESS_BYTES", 0)
        run = Run(world, checkpoints)
        run.fill(1.0)
        run.save(1)
        run.saver.wait()
        neighbour = psutil.Process(all_gather(os.getpid(), int)[1])

        if world.is_first:
            assert run.saver.process is not None
            writer = psutil.Process(run.saver.process.pid)
            writer.suspend()
            wait_until(lambda: writer.status() == psutil.STATUS_STOPPED, "the process stops")
        torch.distributed.barrier()
        run.save(2)
        if world.rank == 1:
            folder = checkpoints / f".{checkpoint_files.step_name(2)}"
            wait_until(folder.is_dir, "the save has begun")
            os._exit(1)
        wait_until(lambda: not is_alive(neighbour), "the neighbour dies")
        writer.resume()
        try:
            run.saver.wait()
        except RuntimeError as error:
            return type(error).__name__
        return "nothing"


def test_a_rank_that_dies_while_its_copy_is_read_leaves_the_checkpoint_before(tmp_path: Path):
    """Finds a writer that ends by SIGBUS or waits when the memory of its neighbour loses its owner."""
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    group = RankGroup(2, tmp_path / "store")
    try:
        for pipe in group.pipes:
            pipe.send((die_while_it_is_read, (checkpoints,), {}))
        with pytest.raises(EOFError):
            group.pipes[1].recv()
        assert group.pipes[0].poll(BLOCKED_S + DEADLINE_S), "rank 0 waits for a dead one"
        assert group.pipes[0].recv() == (None, "RuntimeError")
    finally:
        group.kill()
    assert steps(checkpoints) == ["step_00000001"]
    checkpoint_files.verify(checkpoints / "step_00000001")
    assert values(checkpoints, 1) == {1.0}
