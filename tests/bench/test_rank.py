"""Ranks of a benchmark take their part of one batch."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_lm.bench.case import configurations
from dist_lm.bench.rank import made_up_batch, own_rows
from dist_lm.parallel.layout import Layout
from dist_lm.parallel.mesh import build_mesh, leave_groups


@pytest.mark.parametrize(("rank", "rows"), [(0, [0, 1]), (1, [0, 1]), (2, [2, 3]), (3, [2, 3]), (7, [6, 7])])
@pytest.mark.parametrize("layout", [Layout(2, 2, 2), Layout(1, 4, 2)])
def test_places_of_data_share_the_batch(layout: Layout, rank: int, rows: list[int]) -> None:
    """Finds places whose rows overlap or are left out, and ranks of one tensor group with different rows."""
    (config,) = configurations((), ["model=nano", "stage.global_batch=8", "stage.seq_len=16"], quick=True)
    dist.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
    try:
        own = own_rows(config, build_mesh(layout, torch.device("cpu")))
    finally:
        leave_groups()
    batch = made_up_batch(config, own, torch.device("cpu"))
    assert batch.sequence_B.tolist() == rows
    assert torch.equal(batch.tokens_BT, made_up_batch(config, slice(None), torch.device("cpu")).tokens_BT[rows])
