"""Process groups, devices and meshes, and the first message over them. Nothing else chooses a device or a backend."""

import gc
import importlib.util
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.attention import activate_flash_attention_impl

from dist_lm.errors import ConfigError, require
from dist_lm.parallel.guarded_gloo import guarded
from dist_lm.parallel.layout import PARAMETER_AXES, Layout
from dist_lm.parallel.rendezvous import store_of_ranks
from dist_lm.parallel.tensor_axis import TensorAxis

log = logging.getLogger(__name__)

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
LINK_BYTES = 4 << 20  # size of the all-reduce that is timed
LINK_ROUNDS = 3
BF16_CAPABILITY = (8, 0)  # compute capability of the first GPUs with bf16 instructions (Ampere)

FLASH_3 = "flash_attn_interface"  # module of FlashAttention 3
FLASH_3_CAPABILITY = (9, 0)  # compute capability of the GPUs that it is written for (Hopper)


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
    """Returns the device of this rank: its GPU if there is one or `device` asks for one, else the CPU.

    Args:
        device: auto | cpu | cuda.
        local_rank: number of the rank on its node, and of its GPU.

    Raises:
        ConfigError: this rank should have a GPU (`cuda`, or `auto` on a node with GPUs) and the node has too few.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"device={device}: local rank {local_rank} has no GPU, this node has {torch.cuda.device_count()}; "
            "lower cluster.ranks_per_node or use device=cpu"
        )
    return torch.device("cuda", local_rank)


def lacks_bf16(device: torch.device) -> bool:
    """Returns whether the device is a GPU without bf16 instructions, such as V100 or T4; flash kernels refuse it, too.

    Returns False for a GPU that this process cannot query: it is planned for another node and assumed to be recent.
    """
    if device.type != "cuda" or device.index is None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) < BF16_CAPABILITY


@cache
def use_flash_attention_3(device: torch.device) -> bool:
    """Makes FlashAttention 3 compute attention on a GPU that has it (compute capability 9.0), if its package is
    installed, for the whole process. Returns whether it does; otherwise FlashAttention 2 goes on.

    A package that cannot be loaded is logged.
    """
    if device.type != "cuda" or importlib.util.find_spec(FLASH_3) is None:
        return False
    if torch.cuda.get_device_capability(device) != FLASH_3_CAPABILITY:
        return False
    try:
        activate_flash_attention_impl("FA3")
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch or CUDA
        log.warning("%s cannot be loaded, so FlashAttention 2 computes attention: %s", FLASH_3, error)
        return False
    return True


def option_device(device: str) -> torch.device:
    """Returns the device that the option `--device` of a verb names, for a single process.

    Raises:
        ConfigError: names the option.
    """
    require(device in ("auto", "cpu", "cuda"), "--device", device, "auto, cpu or cuda")
    require(device != "cuda" or torch.cuda.is_available(), "--device", device, "cpu or auto: there is no GPU here")
    return choose_device(device, 0)


@contextmanager
def process_group(device: str, timeout_s: float = 600.0) -> Iterator[World]:
    """Joins the process group of the ranks that torchrun started, and leaves it cleanly (collective).

    NCCL moves tensors on CUDA, gloo moves tensors in host memory.

    A gloo process that ends with live collectives may abort after its work is done, so a clean exit has a last barrier.
    After an exception in the block there is no barrier, and the groups stay until the process ends.

    On CUDA the GPU of the rank becomes the current device. The environment variables RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR and MASTER_PORT must be set.

    Args:
        device: auto | cpu | cuda.
        timeout_s: seconds that a collective waits for other ranks.

    Raises:
        ConfigError: this rank should have a GPU and the node has too few.
        StrangerError: another user has connected to a port of this rank.
    """
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    rank_device = choose_device(device, local_rank)
    if rank_device.type == "cuda":
        torch.cuda.set_device(rank_device)
        use_flash_attention_3(rank_device)
    with guarded():
        dist.init_process_group(
            store=dist.PrefixStore("default_pg", store_of_ranks(timeout_s)),
            rank=rank,
            world_size=world_size,
            **_group_options(rank_device, timeout_s),
        )

    yield World(rank, world_size, local_rank, rank_device)

    # Not in a `finally`: after an exception the barrier would wait for ranks that may be gone.
    dist.barrier()
    leave_groups()


def leave_groups() -> None:
    """Destroys all process groups of this process, those of meshes included.

    Threads of a group end with the last reference to it: fairscale holds one, garbage may hold others.
    """
    initialize._MODEL_PARALLEL_GROUP = None
    gc.collect()
    dist.destroy_process_group()


def _group_options(device: torch.device, timeout_s: float) -> dict[str, Any]:
    """Returns the arguments of `dist.init_process_group` that depend on the device of a rank."""
    options: dict[str, Any] = {"backend": "gloo", "timeout": timedelta(seconds=timeout_s)}
    if device.type == "cuda":
        # gloo works beside NCCL because checkpoints and the norms of offloaded gradients use host memory.
        options |= {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    return options


def join_ranks(device: torch.device, store: dist.Store, rank: int, size: int, timeout_s: float) -> TensorAxis:
    """Joins the ranks that share one model on this machine through a given `store`, and returns their axis
    (collective).

    Messages stay on the loopback interface. The group is the default group of this process.

    Args:
        timeout_s: seconds to wait for other ranks, here and in each collective.

    Raises:
        RuntimeError: torch's, if other ranks do not come in time.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)

    # All ranks are on this machine; another interface may be slower, or filtered.
    with _interface(LOOPBACK), guarded():
        dist.init_process_group(store=store, rank=rank, world_size=size, **_group_options(device, timeout_s))
    dist.barrier()  # all ranks have found each other, so none needs the store any more

    group = dist.group.WORLD
    assert group
    initialize._MODEL_PARALLEL_GROUP = group  # as in `build_mesh`
    return TensorAxis(group, size, rank, sp=False, functional=False)


@contextmanager
def _interface(name: str) -> Iterator[None]:
    """Makes gloo and NCCL connect over a network interface inside the block, by environment variables, the only way
    they know; afterwards these are as before."""
    variables = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    previous = {variable: os.environ.get(variable) for variable in variables}
    os.environ.update(dict.fromkeys(variables, name))
    try:
        yield
    finally:
        for variable, setting in previous.items():
            if setting is None:
                del os.environ[variable]
            else:
                os.environ[variable] = setting


def leave_ranks(device: torch.device) -> None:
    """Leaves the group of `join_ranks` without waiting for its ranks; a collective that is stuck in NCCL ends."""
    initialize._MODEL_PARALLEL_GROUP = None
    if not dist.is_initialized():
        return
    if device.type == "cuda":
        dist.distributed_c10d._abort_process_group()  # destroy_process_group of NCCL waits for all ranks
    else:
        dist.destroy_process_group()


def build_mesh(layout: Layout, device: torch.device) -> DeviceMesh:
    """Returns the mesh over all ranks (collective); fairscale's regions use its tp groups.

    Its axes are dp_replicate, dp_shard and tp. With context parallelism they are dp_replicate, dp_data, cp and tp, and
    dp_shard stands for dp_data and cp together: parameters are split over both.

    A second mesh in a process makes tensor-parallel models on the first one unusable, see `TensorAxis.check_current`.

    Raises:
        StrangerError: another user has connected to a port of this rank.
    """
    sizes = {"dp_replicate": layout.dp_replicate, "dp_shard": layout.dp_shard, "tp": layout.tp}
    if layout.cp > 1:
        sizes = {"dp_replicate": layout.dp_replicate, "dp_data": layout.dp_shard, "cp": layout.cp, "tp": layout.tp}
    with guarded():
        mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        if layout.cp > 1:
            mesh["dp_data", "cp"]._flatten("dp_shard")

    # fairscale has one group per process (`TensorAxis.check_current`). Its `initialize_model_parallel` would create a
    # second communicator for every group of the mesh.
    initialize._MODEL_PARALLEL_GROUP = mesh.get_group("tp")
    return mesh


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Returns both dp axes as one axis: the ranks that see different data and share gradients."""
    with guarded():
        return mesh[_data_axes(mesh)]._flatten("dp")


def _data_axes(mesh: DeviceMesh) -> tuple[str, str]:
    """Returns the axes along which ranks see different data."""
    return ("dp_replicate", "dp_data") if has_context_axis(mesh) else ("dp_replicate", "dp_shard")


def has_context_axis(mesh: DeviceMesh) -> bool:
    """Returns whether ranks of `mesh` share the tokens of a sequence."""
    return "cp" in (mesh.mesh_dim_names or ())


def axes_of_parameters(mesh: DeviceMesh, *axes: str) -> DeviceMesh:
    """Returns the part of `mesh` with the given ones of PARAMETER_AXES."""
    # torch would have users keep a flattened axis themselves, beside its mesh.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Slicing a flattened dim", UserWarning)
        return mesh[axes]


def axis_of_group(mesh: DeviceMesh) -> dict[str, str]:
    """Returns the axis of each process group of the mesh, by the name of the group; dp_shard has the ranks of cp."""
    names = {str(axes_of_parameters(mesh, axis).get_group().group_name): axis for axis in PARAMETER_AXES}
    if has_context_axis(mesh):
        names[str(mesh.get_group("cp").group_name)] = "cp"
    return names


def data_place(mesh: DeviceMesh) -> tuple[int, int]:
    """Returns (this rank's number among the ranks that see different data, their number)."""
    replicate, shard = (mesh[axis] for axis in _data_axes(mesh))
    place = replicate.get_local_rank() * shard.size() + shard.get_local_rank()
    return place, replicate.size() * shard.size()


def adds_sums(mesh: DeviceMesh) -> bool:
    """Returns whether this rank adds its sums over a batch: True on exactly one of the ranks that see the same data."""
    axes = ("tp", "cp") if has_context_axis(mesh) else ("tp",)
    return all(mesh.get_local_rank(axis) == 0 for axis in axes)


@dataclass(frozen=True)
class LinkSpeed:
    """The measured time of an all-reduce over all ranks."""

    ranks: int
    bytes: int
    seconds: float  # best of LINK_ROUNDS
    bus_gb_per_s: float  # bytes that a rank sends and receives per second: 2 (n - 1) / n * bytes (as in nccl-tests)


def measure_all_reduce(world: World, size: int = LINK_BYTES) -> LinkSpeed:
    """Times an all-reduce of `size` bytes (collective). Returns the same on every rank: the time of the slowest rank,
    in its best round of LINK_ROUNDS.

    It is the first collective of a run: it shows that all ranks reach each other over the network that training uses.
    """
    # The barrier before each round keeps the wait for a late rank out of the measured time.
    message = torch.ones(size // 4, dtype=torch.float32, device=world.device)
    times = []
    for _ in range(1 + LINK_ROUNDS):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(message)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        times.append(time.perf_counter() - started)

    # The first round sets up connections, so it does not count.
    best = torch.tensor([min(times[1:])], dtype=torch.float64, device=world.device)
    dist.all_reduce(best, op=dist.ReduceOp.MAX)
    seconds = float(best)
    sent_bytes = 2 * (world.size - 1) / world.size * size
    return LinkSpeed(world.size, size, seconds, sent_bytes / seconds / 1e9)
