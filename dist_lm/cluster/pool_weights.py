"""Weights of a pool for its actors: the choice of a transport, and the transport through Ray's object store.

A stream of parameters becomes chunks in Ray's object store, so the sender holds one chunk and one parameter at a time.
The pool tells its actors about a version only when all its chunks are stored. Actors read them one by one.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dist_lm.config.model import ModelConfig
from dist_lm.config.pool import PUSH_AUTO, PUSH_DIRECT
from dist_lm.generation.decoder import WeightStream
from dist_lm.model.size import parameter_shapes

CHUNK_BYTES = 16 << 20  # smaller parameters are stored together; a larger one is a chunk of its own
LARGEST_SHARE = 8  # a chunk of several parameters is at most this part of the largest one

RAY, BROADCAST, IPC = "ray", "broadcast", "ipc"  # transports of a push; see `push_link`

Chunk = Mapping[str, np.ndarray]
"""Parameters by name; bf16 and fp16 as the int16 with the same bits."""


@dataclass(frozen=True)
class Place:
    """The memory in which a process holds weights."""

    node: str  # Ray's id
    gpu: str = ""  # UUID; empty: host memory

    @classmethod
    def of(cls, node: str, device: torch.device) -> "Place":
        """Returns the place of a device of this process."""
        return cls(node, gpu_of(device))


def gpu_of(device: torch.device) -> str:
    """Returns the UUID of a GPU; empty for the CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def choose_transport(push: str, sender: Place, actor: Place, tp: int = 1) -> str:
    """Returns how new weights reach an actor: RAY, BROADCAST or IPC.

    A direct way is taken if `push` asks for it, or between GPUs with auto: IPC if both are at one place, else
    BROADCAST. It is RAY where one end is on a GPU and the other is not, or for other places with `tp` above 1.

    Args:
        push: rlhf.pool.push.
        tp: GPUs of the actor's engine; the first one is at `actor`.
    """
    # A direct transport needs both ends on GPUs or both in host memory; auto takes it only between GPUs.
    same_kind = bool(sender.gpu) == bool(actor.gpu)
    is_direct = push == PUSH_DIRECT or (push == PUSH_AUTO and bool(sender.gpu))
    if not same_kind or not is_direct:
        return RAY
    # NCCL refuses two processes on one GPU.
    if sender == actor:
        return IPC
    # NCCL of an engine on several GPUs is set up on the loopback interface, once for its process
    return BROADCAST if tp == 1 else RAY


@dataclass(frozen=True)
class Stored:
    """All parameters of a model in Ray's object store, once for all actors."""

    chunks: Sequence[Any]  # Ray references to `Chunk`s


def store(weights: WeightStream, config: ModelConfig, dtype: torch.dtype) -> Stored:
    """Reads the parameters of a model to the end and stores them in `dtype` in the object store of Ray, which is
    connected. Returns references to the chunks.
    """
    import ray

    largest = dtype.itemsize * max(math.prod(shape) for shape in parameter_shapes(config).values())
    references = []
    for chunk in chunks_of(weights, dtype, min(CHUNK_BYTES, largest // LARGEST_SHARE)):
        references.append(ray.put(chunk))
        # Before the next one is gathered.
        del chunk
    return Stored(references)


def chunks_of(weights: WeightStream, dtype: torch.dtype, most: int) -> Iterator[Chunk]:
    """Yields chunks of up to `most` bytes, or of one larger parameter, with arrays in `dtype` on the host."""
    chunk: dict[str, np.ndarray] = {}
    size = 0
    for name, weight in weights:
        array = to_array(weight.to(dtype))
        del weight
        if chunk and size + array.nbytes > most:
            yield chunk
            chunk, size = {}, 0

        chunk[name] = array
        size += array.nbytes
        del array
        if size >= most:
            yield chunk
            chunk, size = {}, 0
    if chunk:
        yield chunk


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """Returns a tensor as an array, through pinned memory if it is on a GPU."""
    tensor = tensor.detach().contiguous()
    if tensor.device.type == "cuda":
        tensor = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)
    if tensor.dtype.itemsize <= 2:
        tensor = tensor.view(torch.int16)  # numpy has no bf16
    return tensor.numpy()


def to_tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Returns the tensor of an array of `to_array`, in memory of its own: arrays of the object store are read-only."""
    tensor = torch.from_numpy(array.copy())
    return tensor.view(dtype) if array.dtype == np.int16 else tensor


def read(chunks: Sequence[Any], dtype: torch.dtype) -> WeightStream:
    """Returns the parameters of `store`, as an actor reads them: one chunk is fetched at a time."""
    import ray

    for reference in chunks:
        chunk: Chunk = ray.get(reference)
        for name, array in chunk.items():
            yield name, to_tensor(array, dtype)
