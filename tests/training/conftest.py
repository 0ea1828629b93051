"""What tests of the trainer have in common."""

import pytest
import torch
import torch.distributed as dist

from dist_lm.parallel.mesh import World


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, 0, torch.device("cpu"))
    dist.destroy_process_group()
