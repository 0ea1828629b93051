"""Saving while training continues: a copy in host memory, and a process that writes it.

Every rank writes its shards as safetensors. Which rank writes which of them follows from the layout, so nothing is sent
to plan a save, and a plan is kept between saves. A thread of the rank speaks with the other ranks and with the process;
the process does what would take turns with training: files, hashes, index and manifest.

One save is in flight at most. The next save waits for it, so a crash loses less than two intervals. A failure is raised
on all ranks at their next save or wait; `has_failed` tells before.
"""

import heapq
import logging
import mmap
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from dist_lm.config.model import AdaptedModelConfig, ModelConfig
from dist_lm.errors import ArtefactError, UserError
from dist_lm.parallel.guarded_gloo import guarded
from dist_lm.parallel.mesh import World
from dist_lm.parallel.messages import all_gather, broadcast
from dist_lm.parallel.values import shard_box, shard_of
from dist_lm.training import checkpoint_files as files
from dist_lm.training import checkpoint_writer
from dist_lm.training.adapters import record_of
from dist_lm.training.checkpoint import DTYPES, Companion, tensors_of
from dist_lm.training.checkpoint_writer import SAVE_S, Plan, PlannedFile, PlannedPart, Publication, WriterProcess
from dist_lm.training.optimizer import ShardedAdamW
from dist_lm.training.state import TrainState

log = logging.getLogger(__name__)

FILE_BYTES = 1 << 30  # approximate size of one file
REPLICA_BYTES = 64 << 20  # at least so much is written by each of the ranks that hold the same shards: fewer files
ALIGNMENT = 64  # bytes; a multiple of the size of every entry
# A smaller copy is written by the thread: that is over before a process has started.
PROCESS_BYTES = 64 << 20

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointWriteError(UserError):
    """A checkpoint could not be written; earlier checkpoints are intact."""


class Writer(Protocol):
    """Writes the files of this rank: `TensorWriter` or `WriterProcess`."""

    def write(self, directory: Path) -> dict[str, str]:
        """Does `checkpoint_writer.write_files`."""
        ...

    def publish(self, checkpoint: Publication) -> None:
        """Does `checkpoint_writer.publish`."""
        ...


class TensorWriter:
    """Writes tensors themselves, in the thread that calls it."""

    publish = staticmethod(checkpoint_writer.publish)

    def __init__(self, plan: Plan, tensors: Mapping[str, torch.Tensor]) -> None:
        self._plan = plan
        self._tensors = tensors

    def write(self, directory: Path) -> dict[str, str]:
        """Writes what the tensors hold now; of each, a copy is in host memory if it lies elsewhere or in pieces."""
        return checkpoint_writer.write_files(directory, self._plan, self.bytes_of)

    def bytes_of(self, part: PlannedPart) -> np.ndarray:
        """Returns the bytes of a part in row-major order: (bytes,) uint8."""
        shard = shard_of(self._tensors[part.name]).detach()
        return shard.cpu().contiguous().flatten().view(torch.uint8).numpy()


class ShardCopy:
    """A copy of the shards that this rank writes, pinned if they are on CUDA; another process can map a large one."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        """Takes the memory.

        Raises:
            UserError: there is too little.
        """
        self.parts = [part for file in plan for part in file.parts]
        self.bytes = max((part.begin + part.bytes for part in self.parts), default=1)
        self.descriptor = -1  # of the memory; -1: no other process can map it
        self.is_pinned = False
        self._copied: torch.cuda.Event | None = None

        if sys.platform == "linux" and self.bytes >= PROCESS_BYTES:
            self.descriptor = _shared_memory(self.bytes)
        try:
            memory = mmap.mmap(self.descriptor, self.bytes)
        except OSError as error:
            raise UserError(
                f"no memory for the copy of {self.bytes:,} bytes that a save needs beside training ({error}): "
                "stage.checkpoint_async=false saves without it"
            ) from error
        self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        if device.type == "cuda":
            self._pin()

    def _pin(self) -> None:
        """Lets the GPU write into the memory while the CPU goes on."""
        error = torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), self.bytes, 0)  # type: ignore[union-attr]
        self.is_pinned = int(error) == 0
        if not self.is_pinned:
            log.warning("saves pause training for longer: memory of the copy cannot be pinned (CUDA error %s)", error)

    @torch.no_grad()
    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies the present values of the planned parts; on CUDA it only starts that, in the order of the stream."""
        for part in self.parts:
            self.values(part).copy_(shard_of(tensors[part.name]), non_blocking=self.is_pinned)
        if self.is_pinned:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> None:
        """Waits until the copy is complete."""
        if self._copied is not None:
            self._copied.synchronize()

    def values(self, part: PlannedPart) -> torch.Tensor:
        """Returns the place of a part in the copy, as a tensor of its shape."""
        return self._memory[part.begin : part.begin + part.bytes].view(DTYPES[part.dtype]).view(part.shape)

    def close(self) -> None:
        """Gives the memory back, unless somebody else still maps it or has views of it."""
        if self.is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())  # type: ignore[union-attr]
            self.is_pinned = False
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        del self._memory


def _shared_memory(n_bytes: int) -> int:
    """Returns the descriptor of memory that other processes can map; -1, with a warning, if the system gives none so
    large. The memory has no name in a file system: the size of /dev/shm does not limit it, and a kill leaves none."""
    descriptor = -1
    try:
        descriptor = os.memfd_create("checkpoint")
        # Takes all pages now: for want of one, the copy would end this process by SIGBUS.
        os.posix_fallocate(descriptor, 0, n_bytes)
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        log.warning(
            "saves slow training down: a thread writes them, as no process can share their copy of %s bytes (%s); "
            "if the limit on the size of files (ulimit -f) is lower, raise it",
            f"{n_bytes:,}",
            error,
        )
        return -1
    return descriptor


class CheckpointSaver:
    """Writes the checkpoints of a run; leaving it as a context manager waits for the last one, except after an error.

    Beside training it needs host memory for a copy of the parameters and moments that this rank writes, which stays
    between saves (pinned on CUDA), and the process that writes them about 45 MiB.
    """

    def __init__(
        self, checkpoints: Path, model_config: ModelConfig, world: World, *, keep: int, asynchronous: bool
    ) -> None:
        """
        Args:
            keep: number of newest checkpoints to keep; 0: all.
            asynchronous: False: `save` returns when the checkpoint is written.
        """
        self.checkpoints = checkpoints
        self.model_config = model_config
        self.world = world
        self.keep = keep
        self.asynchronous = asynchronous

        # The thread has its own process group: its messages must not mix with those of training.
        with guarded():
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=SAVE_S))
        assert isinstance(group, dist.ProcessGroup)
        self.group = group

        # A new thread starts on GPU 0, whatever the GPU of the rank is.
        on_gpu = world.device.type == "cuda"
        initializer = {"initializer": torch.cuda.set_device, "initargs": (world.device,)} if on_gpu else {}
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint", **initializer)
        self.in_flight: Future[Path] | None = None

        # Kept between saves; made by the first one.
        self.copy: ShardCopy | None = None
        self.process: WriterProcess | None = None
        self._plan: Plan = ()
        self._planned_for: list[tuple[str, torch.Size, torch.dtype]] = []

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
            # Later work, such as an evaluation, must not share its cores with the threads of this group. The barrier is
            # there because a rank that leaves earlier would break the last messages of its peers.
            dist.barrier(group=self.group)
            dist.destroy_process_group(self.group)
        # After a failure other ranks may be gone, and a save that waits for them never ends; behind a save that does,
        # the thread ends the process.
        self.thread.submit(self._close)
        self.thread.shutdown(wait=error is None)

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: TrainState,
        companions: Sequence[Companion] = (),
        attached: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        """Saves `state` and the present values of the tensors (collective), after the previous save is complete.

        It returns when the copy in host memory is made (on CUDA: ordered) and the writing has begun; if not
        asynchronous, when the checkpoint is written. `write` says what else changes in the folder.

        Args:
            companions: more models for the same checkpoint.
            attached: files of the stage, by name; those of the first rank are written.

        Raises:
            CheckpointWriteError: on every rank, if the previous save failed (or this save, if not asynchronous).
        """
        # One save at a time: the copy in host memory belongs to the save in flight.
        self.wait()

        for saved in (optimizer, *(companion.optimizer for companion in companions)):
            if isinstance(saved, ShardedAdamW):
                saved.gather_variances()
        tensors = tensors_of(model, optimizer, self.model_config)
        for companion in companions:
            tensors |= companion.tensors()

        # The synchronous mode takes the same thread and process group: one code path to test.
        self.in_flight = self.thread.submit(self._write, self._writer(tensors), state, attached)
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Waits until the save in flight is complete (collective).

        Raises:
            CheckpointWriteError: on every rank, if it failed.
        """
        in_flight, self.in_flight = self.in_flight, None
        if in_flight is not None:
            in_flight.result()

    @property
    def has_failed(self) -> bool:
        """Whether the save in flight has failed; some ranks may see it earlier than others."""
        in_flight = self.in_flight
        return in_flight is not None and in_flight.done() and in_flight.exception() is not None

    def _writer(self, tensors: dict[str, torch.Tensor]) -> Writer:
        """Returns what writes the present values of the tensors; if asynchronous, from a copy that it makes here."""
        described = [(name, shard_of(tensor).shape, tensor.dtype) for name, tensor in tensors.items()]
        if described != self._planned_for:
            self._close()
            self._plan, self._planned_for = plan_of(tensors, self.world), described
        if not self.asynchronous:
            return TensorWriter(self._plan, tensors)

        # Training changes the tensors in place, so a copy is written.
        if self.copy is None:
            self.copy = ShardCopy(self._plan, self.world.device)
        self.copy.take(tensors)
        if self.copy.descriptor < 0:
            return TensorWriter(self._plan, {part.name: self.copy.values(part) for part in self.copy.parts})

        if self.process is None or self.process.has_ended:
            self.process = WriterProcess(self._plan, self.copy.descriptor, self.copy.bytes)
        return self.process

    def _write(self, writer: Writer, state: TrainState, attached: Mapping[str, bytes]) -> Path:
        """Writes a checkpoint (collective, in the thread), logs the time and returns its directory.

        Raises:
            CheckpointWriteError: on every rank, if any rank could not write.
        """
        started = time.perf_counter()
        if self.copy is not None:
            self.copy.wait()
        path = _write(self.checkpoints, writer, state, self.model_config, self.world, self.group, self.keep, attached)
        log.info("%s written in %.1f s", path.name, time.perf_counter() - started)
        return path

    def _close(self) -> None:
        """Ends the process and gives the copy back."""
        if self.process is not None:
            self.process.end()
        if self.copy is not None:
            self.copy.close()
        self.process = self.copy = None


def write(
    checkpoints: Path,
    tensors: dict[str, torch.Tensor],
    state: TrainState,
    model_config: ModelConfig,
    world: World,
    group: dist.ProcessGroup | None = None,
    keep: int = 0,
    attached: Mapping[str, bytes] = MappingProxyType({}),
) -> Path:
    """Writes `tensors` as the checkpoint of `state.step`, moves LATEST and BEST, removes old checkpoints (collective).

    A checkpoint of the same step, and those of later steps, are removed, as are leftovers of killed saves. A BEST that
    cannot be written is only logged.

    Args:
        tensors: by name, of logical shape; each rank writes its shards.
        group: all ranks, with a CPU backend; None: the default group.
        keep: number of newest checkpoints to keep; 0: all.
        attached: files of the stage, by name; those of the first rank are written.

    Returns:
        The directory of the checkpoint.

    Raises:
        CheckpointWriteError: on every rank, if any rank could not write; earlier checkpoints stay.
    """
    writer = TensorWriter(plan_of(tensors, world), tensors)
    return _write(checkpoints, writer, state, model_config, world, group, keep, attached)


def _write(
    checkpoints: Path,
    writer: Writer,
    state: TrainState,
    model_config: ModelConfig,
    world: World,
    group: dist.ProcessGroup | None,
    keep: int,
    attached: Mapping[str, bytes],
) -> Path:
    """Does what `write` says with the files of a writer."""
    # A folder that starts with a dot is no checkpoint, so a killed save leaves nothing to load.
    target = checkpoints / files.step_name(state.step)
    temporary = checkpoints / f".{target.name}"
    if world.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
    dist.barrier(group)

    # Every rank writes its files and learns whether all ranks could.
    digests, failure = {}, None
    try:
        digests = writer.write(temporary)
    except OSError as error:
        failure = str(error)
    written = all_gather((digests, failure), tuple[dict[str, str], str | None], group)
    failure = next((error for _, error in written if error), None)

    # The first rank adds state and manifest, and makes the checkpoint visible.
    if world.is_first and not failure:
        try:
            digests = {name: digest for rank_digests, _ in written for name, digest in rank_digests.items()}
            digests |= files.attach(temporary, attached)
            adapters = record_of(model_config, target) if isinstance(model_config, AdaptedModelConfig) else None
            writer.publish(Publication(temporary, target, digests, state, asdict(model_config.plain), adapters))
        except (OSError, ArtefactError) as error:
            failure = str(error)
    failure = broadcast(failure, str | None, group)

    if failure:
        if world.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        previous = files.read_pointer(checkpoints, files.LATEST)
        consequence = f"{previous.name} is intact" if previous else "there is no earlier checkpoint"
        raise CheckpointWriteError(
            f"checkpoint {target} could not be written ({failure}); {consequence}: free space or repair the folder, "
            "then run the same command again"
        )

    if world.is_first:
        try:
            files.tidy(checkpoints, state, keep)
        except OSError as error:  # the checkpoint itself is intact
            log.warning("BEST of %s could not be written (%s)", checkpoints, error)
    return target


# --- the plan of a rank ---


def plan_of(tensors: Mapping[str, torch.Tensor], world: World) -> Plan:
    """Returns the files that this rank writes. No message is needed: ranks that hold the same shards share them out by
    a rule that each of them knows, and parts without entries are left out.

    Args:
        tensors: all tensors of the checkpoint, by name, of logical shape.
    """
    written_here = {name: tensors[name] for name in names_to_write(tensors, world) if shard_of(tensors[name]).numel()}
    numbers = file_numbers(written_here, FILE_BYTES)

    parts_of_file: dict[int, list[PlannedPart]] = {}
    begin = 0
    for name, tensor in written_here.items():
        shard = shard_of(tensor)
        offsets = tuple(int(cut.start) for cut in shard_box(tensor))
        part = PlannedPart(name, DTYPE_NAMES[shard.dtype], offsets, tuple(shard.shape), begin, shard.nbytes)
        parts_of_file.setdefault(numbers[name], []).append(part)
        begin += -(-shard.nbytes // ALIGNMENT) * ALIGNMENT

    last = max(numbers.values(), default=0)
    return tuple(
        PlannedFile(f"shard-{world.rank + 1:05d}-model-{number:05d}-of-{last:05d}{files.TENSORS}", tuple(parts))
        for number, parts in parts_of_file.items()
    )


def names_to_write(tensors: Mapping[str, torch.Tensor], world: World) -> list[str]:
    """Returns the tensors whose shards this rank writes. Of the ranks with the same shards, so many write that each has
    `REPLICA_BYTES`; the largest tensors are shared out first."""
    sharing: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in tensors.items():
        sharing.setdefault(replicas_of(tensor, world), []).append(name)

    names = set()
    for ranks, shared_names in sharing.items():
        sizes = {name: shard_of(tensors[name]).nbytes for name in shared_names}
        n_writers = min(len(ranks), max(1, sum(sizes.values()) // REPLICA_BYTES))
        loads = [(0, rank) for rank in ranks[:n_writers]]
        for name in sorted(shared_names, key=lambda name: -sizes[name]):
            n_bytes, writer = loads[0]
            heapq.heapreplace(loads, (n_bytes + sizes[name], writer))
            if writer == world.rank:
                names.add(name)
    return [name for name in tensors if name in names]


def replicas_of(tensor: torch.Tensor, world: World) -> tuple[int, ...]:
    """Returns the ranks that hold the same shard as this one, in ascending order: all ranks for a plain tensor."""
    if not isinstance(tensor, DTensor):
        return tuple(range(world.size))
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    box = tuple(
        slice(None) if placement.is_replicate() else place
        for place, placement in zip(coordinate, tensor.placements, strict=True)
    )
    return tuple(sorted(tensor.device_mesh.mesh[box].flatten().tolist()))


def file_numbers(tensors: Mapping[str, torch.Tensor], file_bytes: int) -> dict[str, int]:
    """Returns the number of each tensor's file, from 1: a new file starts when the shards fill `file_bytes`."""
    numbers: dict[str, int] = {}
    n_bytes = 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + n_bytes // file_bytes
        n_bytes += shard_of(tensor).nbytes
    return numbers
