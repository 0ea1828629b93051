"""Process group, device and device mesh: chosen here and nowhere else."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dist_lm.errors import ConfigError, require
from dist_lm.parallel.layout import Layout
from dist_lm.parallel.tensor_axis import TensorAxis

DATA_AXES = ("dp_replicate", "dp_shard")
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


@dataclass(frozen=True)
class World:
    """This process among all ranks."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def choose_device(device: str, local_rank: int) -> torch.device:
    """The device of this rank: its GPU when there is one (or `device` asks for it), else the CPU.

    Raises:
        ConfigError: `device=cuda` and no such GPU.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"device={device}: local rank {local_rank} has no GPU, this node has {torch.cuda.device_count()}; "
            "lower cluster.ranks_per_node or use device=cpu"
        )
    return torch.device("cuda", local_rank)


def option_device(device: str) -> torch.device:
    """What `--device` of a verb asks for, in a process alone on its machine.

    Raises:
        ConfigError: names the option.
    """
    require(device in ("auto", "cpu", "cuda"), "--device", device, "auto, cpu or cuda")
    require(device != "cuda" or torch.cuda.is_available(), "--device", device, "cpu or auto: there is no GPU here")
    return choose_device(device, 0)


@contextmanager
def process_group(device: str, timeout_s: float = 600.0) -> Iterator[World]:
    """Join the ranks that torchrun started and leave them in good order.

    NCCL moves tensors on CUDA, gloo those in host memory.

    A gloo process that ends with live collectives may abort after its work is done, so a clean exit meets the other
    ranks once more. After an exception it does not wait for anybody.

    Args:
        timeout_s: how long a collective waits for other ranks.
    """
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group(
        _backends(chosen),
        timeout=timedelta(seconds=timeout_s),
        device_id=chosen if chosen.type == "cuda" else None,
    )
    yield World(rank, size, local_rank, chosen)
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()


def _backends(device: torch.device) -> str:
    # gloo beside NCCL: checkpoints are written, and offloaded gradients measured, from host memory
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def join_ranks(device: torch.device, store: dist.Store, rank: int, size: int, timeout_s: float) -> TensorAxis:
    """Join the ranks that share one model on this machine; whoever started them gave them a `store`.

    Messages of the host stay on the loopback interface.

    Args:
        timeout_s: how long others are waited for, here and in each collective.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    named = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    before = {name: os.environ.get(name) for name in named}
    os.environ.update(dict.fromkeys(named, LOOPBACK))
    try:
        dist.init_process_group(
            _backends(device),
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    dist.barrier()  # behind it nobody needs the store to find others any more
    group = dist.group.WORLD
    assert group
    initialize._MODEL_PARALLEL_GROUP = group  # as in `build_mesh`
    return TensorAxis(group, size, rank, sp=False, functional=False)


def leave_ranks(device: torch.device) -> None:
    """Give up the group of `join_ranks`, whatever the others do; a collective that is stuck in NCCL ends."""
    initialize._MODEL_PARALLEL_GROUP = None
    if not dist.is_initialized():
        return
    if device.type == "cuda":
        dist.distributed_c10d._abort_process_group()  # NCCL's orderly way waits for all ranks
    else:
        dist.destroy_process_group()


def build_mesh(layout: Layout, device: torch.device) -> DeviceMesh:
    """The mesh (dp_replicate, dp_shard, tp) over all ranks; its tp groups are those of fairscale's regions too."""
    mesh = init_device_mesh(
        device.type,
        (layout.dp_replicate, layout.dp_shard, layout.tp),
        mesh_dim_names=(*DATA_AXES, "tp"),
    )
    # fairscale knows one group a process (`TensorAxis.check_current`); its `initialize_model_parallel` would make a
    # second communicator for every group of the mesh
    initialize._MODEL_PARALLEL_GROUP = mesh.get_group("tp")
    return mesh


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Both dp axes as one: the ranks that see different data and share gradients."""
    return mesh[DATA_AXES]._flatten("dp")
