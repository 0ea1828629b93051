"""Our learner in `bench rlhf`: one run after the other, in one process."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from dist_lm.bench.case import configurations
from dist_lm.bench.rlhf_loops import ITERATIONS, ToyRun, ppo_config
from dist_lm.parallel.mesh import World, leave_groups

TINY = (
    *("model=nano", "model.d_model=16", "model.n_layers=1", "model.n_heads=2", "model.d_ff=32", "model.vocab_size=512"),
    *("model.max_seq_len=32", "stage.global_batch=4", "stage.seq_len=4"),
)


@pytest.fixture
def one_rank() -> Iterator[World]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, 0, torch.device("cpu"))
    leave_groups()


def test_a_run_goes_on_where_the_last_one_ended(one_rank: World) -> None:
    """Finds a learner that cannot be run, and a second run that is timed although it has nothing left to do."""
    (config,) = configurations((), TINY, quick=True)
    toy = ToyRun(config, one_rank, None, ppo_config(config, epochs=1))
    rewards = []
    for run in (1, 2):
        rewards.append(toy.run())
        assert toy._state.iteration == run * ITERATIONS
        assert 0 < toy.drawing_s < toy.iteration_s
    assert all(map(math.isfinite, rewards))
    assert rewards[0] != rewards[1]
