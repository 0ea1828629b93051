"""Weights straight from the memory of a trainer's rank into that of actors, bucket by bucket: both ends of the link.

broadcast: one group of the sender and its actors; NCCL between GPUs, gloo without GPUs.
ipc: sender and actor share a GPU, which NCCL refuses. The actor reads the sender's bucket in place, through a CUDA IPC
handle; without GPUs the bucket is an anonymous file. A gloo group of the two says that the bucket is full, and taken.

The ends of a group find each other through Ray's key-value store, which demands Ray's token, so no store opens a port.
As between ranks, gloo listens on the node's address (for ipc on the loopback interface), guarded, and NCCL where it is
told to.
"""

import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_lm.cluster.pool_weights import IPC
from dist_lm.cluster.ray_cluster import environment
from dist_lm.cluster.torchrun import LOOPBACK, interface_of
from dist_lm.config.model import ModelConfig
from dist_lm.errors import ArtefactError
from dist_lm.generation.decoder import WeightStream
from dist_lm.model.size import parameter_count, parameter_shapes
from dist_lm.parallel.guarded_gloo import GuardedGloo

POLL_S = 0.0005
NAMESPACE = "dist_lm_push"  # for keys in Ray's store
SENDER = 0  # rank of the sender in every group
HOST = torch.device("cpu")
FAILURES = (RuntimeError, OSError)
"""What a link raises when its other end is lost (`torch.distributed` raises RuntimeError)."""
# NCCL must not end this process, as it does by default: a failed broadcast is raised by `wait`, and the sender goes on
NCCL_RAISES = {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}

Alive = Callable[[], None]
"""Called while an end waits; may raise to give up."""


class LinkError(RuntimeError):
    """The other end of a link does not answer."""


@dataclass(frozen=True)
class Offer:
    """A version for one actor: how it is sent, and where."""

    transport: str  # BROADCAST | IPC
    group: str  # name; an actor that has joined it keeps it
    rank: int  # the actor's, in the group
    size: int
    bucket_bytes: int
    patience_s: float  # for the other end: to join, and to give or take a bucket
    handle: tuple[Any, ...] = ()  # opens the bucket, for ipc


# --- buckets ---


def packed(
    weights: WeightStream, config: ModelConfig, dtype: torch.dtype, bucket: Callable[[], torch.Tensor]
) -> Iterator[torch.Tensor]:
    """Yields the bytes of all parameters in `dtype`, one after the other, in buckets; all but the last one are full.

    The copies may still run on the device, see `wait_for_copies`.

    Args:
        weights: in the order of `parameter_shapes`; read to the end.
        bucket: called for each bucket; it may return the same memory again once the bucket before has been used.

    Raises:
        ArtefactError: names the parameter that is missing or has another shape.
    """
    shapes = iter(parameter_shapes(config).items())
    target, n_used = bucket(), 0
    for name, weight in weights:
        expected = next(shapes, None)
        if (name, tuple(weight.shape)) != expected:
            raise ArtefactError(f"weights: {name} has shape {tuple(weight.shape)}, expected (name, shape) {expected}")

        # Bytes, so that a bucket may end in the middle of a parameter.
        source = weight.detach().to(dtype).contiguous().view(-1).view(torch.uint8)
        while len(source):
            if n_used == len(target):
                yield target
                target, n_used = bucket(), 0
            n_copied = min(len(source), len(target) - n_used)
            target[n_used : n_used + n_copied].copy_(source[:n_copied], non_blocking=True)
            source, n_used = source[n_copied:], n_used + n_copied

    if missing := next(shapes, None):
        raise ArtefactError(f"weights: {missing[0]} is missing")
    yield target[:n_used]


def unpacked(buckets: Iterator[torch.Tensor], config: ModelConfig, dtype: torch.dtype) -> WeightStream:
    """Yields the parameters that `packed` packed; each has memory of its own, on the device of the buckets.

    Raises:
        RuntimeError: the buckets end before the last parameter.
    """
    source = next(buckets)
    for name, shape in parameter_shapes(config).items():
        weight = torch.empty(shape, dtype=dtype, device=source.device)
        target = weight.view(-1).view(torch.uint8)
        while len(target):
            if not len(source):
                source = next(buckets)
            n_copied = min(len(source), len(target))
            target[:n_copied].copy_(source[:n_copied], non_blocking=True)
            source, target = source[n_copied:], target[n_copied:]
        yield name, weight


def sizes_of(config: ModelConfig, dtype: torch.dtype, bucket_bytes: int) -> list[int]:
    """Returns the bytes in each bucket of `packed`."""
    total = dtype.itemsize * parameter_count(config)
    return [min(bucket_bytes, total - begin) for begin in range(0, total, bucket_bytes)]


def wait_for_copies(device: torch.device) -> None:
    """Waits until the device has finished all copies asked for by this thread."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@dataclass
class SharedBucket:
    """A bucket that other processes of this node can open."""

    bucket: torch.Tensor
    file: int | None  # descriptor, without GPUs

    @classmethod
    def create(cls, size: int, device: torch.device) -> "SharedBucket":
        """Returns a bucket of `size` bytes, for other processes of the node to open: memory of the GPU, or an anonymous
        file in host memory.

        On a GPU, expandable segments are turned off for the allocation; a user who has set none finds them off
        afterwards.
        """
        if device.type == "cuda":
            # handles of expandable segments need rights over the other process that containers withhold
            settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
            torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
            bucket = torch.empty(size, dtype=torch.uint8, device=device)
            torch._C._accelerator_setAllocatorSettings(settings or "expandable_segments:False")
            return cls(bucket, None)

        # it has no name in the file system, so a killed process leaves nothing behind
        file = os.memfd_create(f"dist_lm_push_{secrets.token_hex(8)}")
        os.ftruncate(file, size)
        return cls(opened(_handle_of(file), size, device), file)

    def handle(self) -> tuple[Any, ...]:
        """Returns plain values by which one other process can open the bucket, see `opened`."""
        return self.bucket.untyped_storage()._share_cuda_() if self.file is None else _handle_of(self.file)

    def close(self) -> None:
        """Others can no longer open it."""
        if self.file is not None:
            os.close(self.file)


def _handle_of(file: int) -> tuple[str, str]:
    path = Path(f"/proc/{os.getpid()}/fd/{file}")
    return str(path), str(path.readlink())


def opened(handle: tuple[Any, ...], size: int, device: torch.device) -> torch.Tensor:
    """Returns the bucket of another process, in place, as uint8 of `size`.

    Args:
        handle: `SharedBucket.handle` of the other process.

    Raises:
        LinkError: the other process has closed the bucket, or has ended (without GPUs).
        RuntimeError: CUDA cannot open the memory.
    """
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        # handle[0]: the GPU's number over there.
        storage = torch.UntypedStorage._new_shared_cuda(index, *handle[1:])
        return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)[:size]
    path, name = handle
    if not Path(path).is_symlink() or str(Path(path).readlink()) != name:
        raise LinkError("the sender has closed its bucket")
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


# --- groups ---


class RayStore(dist.Store):
    """The few calls by which a group finds its members, over Ray's key-value store."""

    def __init__(self, group: str) -> None:
        super().__init__()
        self._prefix = f"{group}/"

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
        from ray.experimental.internal_kv import _internal_kv_put

        _internal_kv_put(self._prefix + key, value, namespace=NAMESPACE)

    def get(self, key: str) -> bytes:
        from ray.experimental.internal_kv import _internal_kv_get

        self.wait([key])
        return _internal_kv_get(self._prefix + key, namespace=NAMESPACE)

    def check(self, keys: list[str]) -> bool:
        from ray.experimental.internal_kv import _internal_kv_exists

        return all(_internal_kv_exists(self._prefix + key, namespace=NAMESPACE) for key in keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:  # type: ignore[override]
        timeout = timeout or self.timeout  # type: ignore[attr-defined]
        until = time.monotonic() + timeout.total_seconds()
        while not self.check(keys):
            if time.monotonic() > until:
                raise LinkError(f"a member of the group has not come within {timeout.total_seconds():g} s")
            time.sleep(0.01)

    def clone(self) -> "RayStore":
        return self

    def forget(self) -> None:
        """Deletes all keys of the group."""
        from ray.experimental.internal_kv import _internal_kv_del

        _internal_kv_del(self._prefix, del_by_prefix=True, namespace=NAMESPACE)


class Group:
    """Processes that broadcast to each other, apart from torch's default group. Its constructor waits for them all."""

    def __init__(
        self,
        name: str,
        rank: int,
        size: int,
        device: torch.device,
        address: str,
        patience_s: float,
        store: Callable[[str], dist.Store] = RayStore,
    ) -> None:
        """Joins the group `name`, and waits until all its ranks have.

        Args:
            device: holds the tensors to broadcast; a GPU uses NCCL, the CPU gloo.
            address: this node's in the network of the group.
            patience_s: longest wait for the others in seconds, to join and in each broadcast.
            store: makes the store of the group from `name`.

        Raises:
            RuntimeError: the others did not join in time.
            StrangerError: another user has connected to a port of this rank (gloo).
        """
        # Kept here, as torch holds only the store's C++ half.
        self._store = store(name)
        self._patience_s = patience_s
        timeout, interface = timedelta(seconds=patience_s), interface_of(address)
        self._store.set_timeout(timeout)

        # An interface that the user has set stands, except for groups inside this machine.
        if device.type == "cuda":
            network = {"NCCL_SOCKET_IFNAME": f"={interface}"} if interface not in (None, LOOPBACK) else {}
            with environment(NCCL_RAISES | _unset(network), ()), torch.cuda.device(device):
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = timeout
                self._backend: Any = dist.ProcessGroupNCCL(self._store, rank, size, options)
                self._backend.eager_connect_single_device(device)
        else:
            network = {"GLOO_SOCKET_IFNAME": interface} if interface else {}
            with environment(network if interface == LOOPBACK else _unset(network), ()):
                self._backend = GuardedGloo(self._store, rank, size, timeout)

    def broadcast(self, tensor: torch.Tensor, root: int, alive: Alive = lambda: None) -> None:
        """Sends or receives a tensor, and waits until this end is done with it.

        Args:
            root: rank that sends.
            alive: called while waiting; may raise to give up.

        Raises:
            LinkError: not done in time.
            RuntimeError: a member is lost.
        """
        # `work.wait` would block this process, which must show signs of life.
        work = self._backend.broadcast(tensor, root)
        until = time.monotonic() + self._patience_s
        while not work.is_completed():
            if time.monotonic() > until:
                raise LinkError(f"no answer for {self._patience_s:g} s")
            alive()
            time.sleep(POLL_S)
        work.wait()  # raises what went wrong

    def close(self) -> None:
        """Leaves the group without waiting for the others; a broadcast that is stuck ends."""
        self._backend.abort()
        if isinstance(self._store, RayStore):
            self._store.forget()


def _unset(variables: dict[str, str]) -> dict[str, str]:
    """Returns the variables that the environment does not set."""
    return {name: setting for name, setting in variables.items() if name not in os.environ}


# --- the actor's end ---


class Receiver:
    """The end of an actor, for all versions that come through one group."""

    def __init__(self, offer: Offer, device: torch.device, address: str, **store: Any) -> None:
        """Joins the group of `offer`.

        Args:
            device: holds the engine's weights.
            address: this node's.

        Raises:
            LinkError: the other members of the group do not come in time.
            RuntimeError: a member is lost, or see `opened`.
        """
        self.offer = offer
        self._device = device
        self._shared: torch.Tensor | None = None
        group_device = device
        if offer.transport == IPC:
            self._shared = opened(offer.handle, offer.bucket_bytes, device)
            group_device, address = HOST, "127.0.0.1"
        self._group = Group(offer.group, offer.rank, offer.size, group_device, address, offer.patience_s, **store)

    def buckets(self, config: ModelConfig, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Yields the buckets of the next version (uint8); each is valid until the next one is asked for. Read it to the
        end.

        Raises:
            LinkError: the sender does not go on.
            RuntimeError: the sender is lost.
        """
        bucket, flag = self._shared, torch.zeros(1)
        if bucket is None:
            bucket = torch.empty(self.offer.bucket_bytes, dtype=torch.uint8, device=self._device)
        for size in sizes_of(config, dtype, self.offer.bucket_bytes):
            # A broadcast brings the bytes; with ipc they are in the sender's bucket, and a flag says so.
            self._group.broadcast(flag if self._shared is not None else bucket[:size], SENDER)
            yield bucket[:size]
            # With ipc the sender waits until its bucket is free again.
            if self._shared is not None:
                wait_for_copies(self._device)
                self._group.broadcast(flag, self.offer.rank)

    def close(self) -> None:
        self._group.close()
