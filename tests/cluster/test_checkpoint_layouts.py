"""Tensors that any layout wrote are read by any other, bit for bit, and no file has anything of the padding.

The tensors are made by hand: what they stand for is in `TENSORS`. Padding is NaN, so that it shows wherever it goes.
"""

import math
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dist_lm.config.model import ModelConfig
from dist_lm.errors import ArtefactError
from dist_lm.parallel.mesh import World
from dist_lm.parallel.values import logical
from dist_lm.training import checkpoint, checkpoint_files, checkpoint_plan, checkpoint_saver
from dist_lm.training.checkpoint_tensors import stored_tensors
from dist_lm.training.state import TrainState
from tests.parallel.ranks import RankGroups

pytestmark = [pytest.mark.cluster, pytest.mark.heavy]

MODEL = ModelConfig(name="any", d_model=8, n_layers=1, n_heads=4, d_ff=8, max_seq_len=8, vocab_size=8)

TENSORS: dict[str, tuple[tuple[int, ...], int | None, int]] = {
    "model.query": ((25, 3, 8), 0, 2),  # heads over tp 8: chunks of 4, the last ranks with 1 and none
    "model.down": ((8, 21), 1, 0),  # a narrowed shard whose rows are apart in memory
    "model.embedding": ((515, 8), 0, 1),
    "model.norm": ((9,), None, 0),  # the same on all tp ranks, unevenly cut by FSDP
    "optimizer.query.exp_avg": ((25, 3, 8), 0, 2),
    "optimizer.down.exp_avg_sq": ((8, 21), 1, 0),
    "optimizer.norm.exp_avg": ((9,), None, 0),
    "optimizer.query.step": ((), None, 0),
}
"""name -> (logical shape, dimension that tensor parallelism cuts, dimension that FSDP cuts)"""

Layout = tuple[int, int]
LAYOUTS: tuple[Layout, ...] = ((1, 8), (2, 4), (1, 4), (2, 2), (4, 1), (1, 1))
"""(dp_shard, tp)"""


def value(name: str) -> torch.Tensor:
    """Every bit of fp32 in use, no NaN."""
    shape = TENSORS[name][0]
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(shape, generator=generator) * 10 ** torch.randint(-20, 20, shape, generator=generator).float()


def padded(name: str, mesh: DeviceMesh) -> torch.Tensor:
    """The tensor as training holds it: filled up with NaN, then cut."""
    shape, tp_dim, fsdp_dim = TENSORS[name]
    full = value(name)
    if not shape:
        return full
    if tp_dim is not None:
        size = list(shape)
        size[tp_dim] = -shape[tp_dim] % mesh.size(1)
        full = torch.cat([full, torch.full(size, math.nan)], tp_dim)
    placements = [Shard(fsdp_dim), Replicate() if tp_dim is None else Shard(tp_dim)]
    return distribute_tensor(full, mesh, placements, src_data_rank=None)


def mesh_of(layout: Layout) -> DeviceMesh:
    return init_device_mesh("cpu", layout, mesh_dim_names=("dp_shard", "tp"))


def write(world: World, checkpoints: Path, layout: Layout) -> None:
    mesh = mesh_of(layout)
    tensors = {name: logical(padded(name, mesh), TENSORS[name][0]) for name in TENSORS}
    checkpoint_saver.write(checkpoints, tensors, TrainState(step=1), MODEL, world)


def read(world: World, written: list[Path], layout: Layout) -> list[tuple[str, str]]:
    """(checkpoint, tensor) that is not what was written, or whose padding was touched, on any rank."""
    mesh = mesh_of(layout)
    expected = {name: padded(name, mesh) for name in TENSORS}
    wrong = []
    for directory in written:
        found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        for name, tensor in found.items():
            local(tensor)[local(expected[name]).isnan()] = math.nan
        checkpoint.read(directory, {name: logical(tensor, TENSORS[name][0]) for name, tensor in found.items()})
        wrong += [
            (str(directory), name) for name in TENSORS if not torch.equal(bits(found[name]), bits(expected[name]))
        ]
    gathered: list = [None] * world.size
    dist.all_gather_object(gathered, wrong)
    return sorted(set(chain.from_iterable(gathered)))


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return local(tensor).contiguous().view(torch.int32)


@pytest.fixture(scope="module")
def written(ranks: RankGroups, tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Path]:
    """A checkpoint of every layout."""
    found = {}
    for layout in LAYOUTS:
        checkpoints = tmp_path_factory.mktemp("checkpoints")
        ranks.run(math.prod(layout), write, checkpoints, layout)
        found[layout] = checkpoints / checkpoint_files.step_name(1)
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_reads_what_every_layout_wrote(ranks: RankGroups, written: dict[Layout, Path], layout: Layout):
    assert ranks.run(math.prod(layout), read, list(written.values()), layout) == []


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_files_hold_the_logical_tensors_and_nothing_else(written: dict[Layout, Path], layout: Layout):
    checkpoint_files.verify(written[layout])
    stored = stored_tensors(written[layout])
    assert stored.keys() == TENSORS.keys()
    for name, tensor in stored.items():
        assert tensor.shape == TENSORS[name][0]
        assert np.array_equal(tensor.read().view(np.int32), bits(value(name)).numpy().reshape(-1))
    files = [file.read_bytes() for file in written[layout].glob("*.safetensors")]
    numbers = sum(len(content) - 8 - int.from_bytes(content[:8], "little") for content in files)
    assert numbers == sum(tensor.bytes for tensor in stored.values())


def test_a_tensor_of_another_shape_is_refused_by_name(ranks: RankGroups, written: dict[Layout, Path]):
    assert "model.norm" in ranks.run(1, message_of_wider, written[1, 4])


def message_of_wider(world: World, directory: Path) -> str:
    try:
        checkpoint.read(directory, {"model.norm": torch.zeros(10)})
    except ArtefactError as error:
        return str(error)
    return ""


def write_by_replicas(world: World, checkpoints: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    placements = [Replicate(), Shard(0)]
    tensors = {name: value(name) for name in TENSORS}
    for name, tensor in tensors.items():
        if tensor.dim():
            tensors[name] = distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_plan, "REPLICA_BYTES", 1)
        checkpoint_saver.write(checkpoints, tensors, TrainState(step=1), MODEL, world)


def test_replicas_share_the_writing_of_each_shard(ranks: RankGroups, tmp_path: Path):
    """Finds a shard that both replicas write, or none, and replicas that leave all writing to one of them."""
    ranks.run(4, write_by_replicas, tmp_path)
    directory = tmp_path / checkpoint_files.step_name(1)
    checkpoint_files.verify(directory)
    for name, tensor in stored_tensors(directory).items():
        assert np.array_equal(tensor.read().view(np.int32), bits(value(name)).numpy().reshape(-1))
    assert len(list(directory.glob("*.safetensors"))) == 4
