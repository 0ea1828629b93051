"""Ranks that tests share: what one function leaves behind costs the next ones nothing."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dist_lm.parallel.layout import Layout
from dist_lm.parallel.mesh import World, build_mesh, data_mesh
from dist_lm.training.checkpoint_saver import CheckpointSaver
from tests.parallel.parity_cases import model_of
from tests.parallel.ranks import RankFailureError

TASKS = Path("/proc/self/task")


def sum_on_a_mesh(world: World) -> tuple[float, int]:
    """The sum of a sharded tensor, and the threads of this rank while it has all groups of a mesh."""
    mesh = build_mesh(Layout(1, 2, 2), world.device)
    sharded = distribute_tensor(torch.ones(8, 8), mesh, [Replicate(), Shard(0), Shard(1)])
    total = (sharded + sharded).sum()
    assert isinstance(total, DTensor)
    dist.all_reduce(torch.ones(1), group=data_mesh(mesh).get_group())
    return float(total.full_tensor()), n_threads()


def threads_without_a_mesh(world: World) -> int:
    return n_threads()


def n_threads() -> int:
    return len(list(TASKS.iterdir()))


@pytest.mark.heavy
@pytest.mark.skipif(not TASKS.is_dir(), reason="counts threads in /proc")
def test_groups_end_with_the_function_that_made_them(ranks):
    before = ranks.run(4, threads_without_a_mesh)
    with_a_mesh = [ranks.run(4, sum_on_a_mesh) for _ in range(5)]
    # equal meshes of different functions: each function must use groups of its own
    assert [total for total, _ in with_a_mesh] == [128.0] * 5
    assert len({threads for _, threads in with_a_mesh}) == 1
    assert before == ranks.run(4, threads_without_a_mesh) < with_a_mesh[0][1]


def threads_before_and_after_saving(world: World, checkpoints: str) -> tuple[int, int, int]:
    """Threads before the saver of checkpoints opens, while it is open, and after it has closed."""
    before = n_threads()
    with CheckpointSaver(Path(checkpoints), model_of((5, 5)), world, keep=1, asynchronous=True) as saver:
        dist.barrier(group=saver.group)
        while_open = n_threads()
    del saver
    return before, while_open, n_threads()


@pytest.mark.skipif(not TASKS.is_dir(), reason="counts threads in /proc")
def test_the_group_of_the_checkpoint_saver_ends_with_it(ranks, tmp_path):
    before, while_open, after = ranks.run(2, threads_before_and_after_saving, str(tmp_path))
    assert after == before < while_open


def fail_on_one_rank(world: World) -> None:
    if world.rank == 1:
        raise ValueError("this rank fails")


def test_a_failure_is_that_of_the_rank_and_the_next_function_gets_new_ranks(ranks):
    with pytest.raises(RankFailureError, match=r"rank 1:\n(.*\n)*ValueError: this rank fails"):
        ranks.run(2, fail_on_one_rank)
    assert ranks.run(2, threads_without_a_mesh) > 0
