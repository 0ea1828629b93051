"""Ranks on several kinds of GPU agree on how Muon computes."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from dist_lm.parallel.mesh import World
from dist_lm.training.muon import GPU, GPU_WITHOUT_BF16, Arithmetic
from dist_lm.training.muon_exchange import agreed_arithmetic
from tests.parallel.ranks import RankGroups

H100, H200, V100 = ("NVIDIA H100 80GB HBM3", GPU), ("NVIDIA H200", GPU), ("Tesla V100-SXM2-32GB", GPU_WITHOUT_BF16)


def agree(world: World, devices: list[tuple[str, Arithmetic]]) -> Arithmetic:
    """What all ranks have agreed on (collective)."""
    name, arithmetic = devices[world.rank]
    agreed = agreed_arithmetic(arithmetic, name, torch.device("cpu"))
    settings = torch.tensor([agreed.dtype is None, agreed.by_squares, agreed.flops_per_byte])
    of_all_ranks = [torch.empty_like(settings) for _ in range(world.size)]
    dist.all_gather(of_all_ranks, settings)
    assert all(torch.equal(other, settings) for other in of_all_ranks)
    return agreed


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ([H100, H100], GPU),
        ([H100, H200], replace(GPU, flops_per_byte=0.0)),
        ([V100, V100], GPU_WITHOUT_BF16),
        ([H100, V100], replace(GPU_WITHOUT_BF16, flops_per_byte=0.0)),
        ([V100, H100], replace(GPU_WITHOUT_BF16, flops_per_byte=0.0)),
    ],
    ids=["one kind", "two kinds", "one kind without bf16", "last without bf16", "first without bf16"],
)
def test_replicas_on_several_kinds_of_gpu_share_the_work(ranks: RankGroups, devices, expected):
    """Finds replicas that compute the same step on two kinds of GPU, and messages in a dtype that a rank lacks."""
    assert ranks.run(2, agree, devices) == expected
