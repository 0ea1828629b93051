"""Saving while training continues: a copy in host memory, and a process that writes it.

Files are safetensors, and hold what all ranks of a node save: their writer reads the copies of these ranks where they
lie, so no tensor is sent. The plan of a save follows from the layout and is kept (`checkpoint_plan`). A thread of the
rank speaks with the other ranks and with the process; the process does what would take turns with training: files,
hashes, index and manifest.

One save is in flight at most. The next save waits for it, so a crash loses less than two intervals. A failure is raised
on all ranks at their next save or wait; `has_failed` tells before.
"""

import logging
import mmap
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from dist_lm.config.model import AdaptedModelConfig, ModelConfig
from dist_lm.errors import ArtefactError, UserError
from dist_lm.parallel.guarded_gloo import guarded
from dist_lm.parallel.mesh import World
from dist_lm.parallel.messages import all_gather, broadcast
from dist_lm.parallel.node_memory import HAS_SHARED_MEMORY, NodeMemory, open_memories
from dist_lm.parallel.values import shard_of
from dist_lm.training import checkpoint_files as files
from dist_lm.training import checkpoint_writer
from dist_lm.training.adapters import record_of
from dist_lm.training.checkpoint import Companion, tensors_of
from dist_lm.training.checkpoint_plan import SavedShard, plan_of, saved_shards
from dist_lm.training.checkpoint_writer import (
    SAVE_S,
    Plan,
    PlannedPart,
    Publication,
    WriterProcess,
    mapped,
    put_together,
)
from dist_lm.training.optimizer import ShardedAdamW
from dist_lm.training.state import TrainState

log = logging.getLogger(__name__)

# Smaller files are written by the thread: that is over before a process has started.
PROCESS_BYTES = 64 << 20


class CheckpointWriteError(UserError):
    """A checkpoint could not be written; earlier checkpoints are intact."""


class Writer(Protocol):
    """Writes the files of this rank: `TensorWriter`, `CopyWriter` or `WriterProcess`."""

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


class CopyWriter:
    """Writes from copies of shards, in the thread that calls it."""

    publish = staticmethod(checkpoint_writer.publish)

    def __init__(self, plan: Plan, copies: Mapping[int, np.ndarray]) -> None:
        """
        Args:
            copies: of the ranks in the plan, by rank: (bytes,) uint8.
        """
        self._plan = plan
        self._copies = copies

    def write(self, directory: Path) -> dict[str, str]:
        """Writes what the copies hold now."""
        return checkpoint_writer.write_files(directory, self._plan, partial(put_together, copies=self._copies))


class ShardCopy:
    """A copy of the shards that this rank saves, pinned if they are on CUDA; other processes can map it on Linux."""

    def __init__(self, shards: Sequence[SavedShard], device: torch.device) -> None:
        """Takes the memory.

        Raises:
            UserError: there is too little.
        """
        self.shards = shards
        self.bytes = max((shard.begin + shard.bytes for shard in shards), default=1)
        self.memory = _shared_memory(self.bytes) if HAS_SHARED_MEMORY else None  # None: no other process can map it
        self.is_pinned = False
        self._copied: torch.cuda.Event | None = None

        try:
            memory = mmap.mmap(self.memory.fileno() if self.memory else -1, self.bytes)
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
        """Copies the present values of the shards; on CUDA it only starts that, in the order of the stream."""
        for shard in self.shards:
            self.values(shard).copy_(shard_of(tensors[shard.name]), non_blocking=self.is_pinned)
        if self.is_pinned:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> None:
        """Waits until the copy is complete."""
        if self._copied is not None:
            self._copied.synchronize()

    def values(self, shard: SavedShard) -> torch.Tensor:
        """Returns the place of a shard in the copy, as a tensor of its shape."""
        return self._memory[shard.begin : shard.begin + shard.bytes].view(shard.dtype).view(shard.shape)

    def array(self) -> np.ndarray:
        """Returns the copy: (bytes,) uint8."""
        return self._memory.numpy()

    def close(self) -> None:
        """Gives the memory back, unless somebody else still maps it or has views of it."""
        if self.is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())  # type: ignore[union-attr]
            self.is_pinned = False
        if self.memory is not None:
            self.memory.close()
            self.memory = None
        del self._memory


def _shared_memory(n_bytes: int) -> NodeMemory | None:
    """Returns memory that other processes can map; None, with a warning, if the system gives none so large. The memory
    has no name in a file system: the size of /dev/shm does not limit it, and a kill leaves none."""
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
        return None
    return NodeMemory(descriptor)


class CheckpointSaver:
    """Writes the checkpoints of a run; leaving it as a context manager waits for the last one, except after an error.

    Beside training it needs host memory for a copy of the parameters and moments that this rank saves, which stays
    between saves (pinned on CUDA). The process that writes needs about 45 MiB, and room for the largest part that
    several ranks hold. A synchronous save has no copies, so each rank writes files of its own.
    """

    def __init__(
        self, checkpoints: Path, model_config: ModelConfig, world: World, *, keep: int, asynchronous: bool
    ) -> None:
        """Makes the process group and the thread of the saver (collective); memory and the process that writes come
        with the first save.

        Args:
            keep: number of newest checkpoints to keep; 0: all.
            asynchronous: False: `save` returns when the checkpoint is written.

        Raises:
            StrangerError: another user has connected to a port of this rank.
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
        self._memories: dict[int, NodeMemory] | None = None  # of the ranks of this node; None: they cannot share
        self._plan: Plan = ()
        self._planned_for: list[tuple[str, torch.Size, torch.dtype, tuple[Placement, ...]]] = []

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
        """Returns what writes the present values of the tensors (collective). If asynchronous, it writes copies that
        all ranks make here, so training may go on; else the tensors may not change before it has written.

        Raises:
            UserError: the memory for the copy is not there.
        """
        # All ranks see the same, so they make new plans together.
        described = [
            (name, tensor.shape, tensor.dtype, tensor.placements if isinstance(tensor, DTensor) else ())
            for name, tensor in tensors.items()
        ]
        is_planned = described == self._planned_for
        self._planned_for = described
        rank, n_ranks = self.world.rank, self.world.size
        if not self.asynchronous:
            if not is_planned:
                self._plan = plan_of(tensors, n_ranks, [rank])
            return TensorWriter(self._plan, tensors)

        # Training changes the tensors in place, so a copy is written.
        if self.copy is None or not is_planned:
            self._close()
            self.copy = ShardCopy(saved_shards(tensors, rank, n_ranks), self.world.device)
            self._memories = open_memories(self.copy.memory, self.world.local_rank, self.group)

            # Ranks of a node share its files out; if they cannot read each other's copies, each has files of its own.
            node = [rank] if self._memories is None else list(self._memories)
            self._plan = plan_of(tensors, n_ranks, node)[node.index(rank) :: len(node)]
        self.copy.take(tensors)
        return self._writer_of_copies(self.copy)

    def _writer_of_copies(self, copy: ShardCopy) -> Writer:
        """Returns what writes the planned files from the copies: the process, if they are large."""
        parts = [part for file in self._plan for part in file.parts]
        ranks = {piece.rank for part in parts for piece in part.pieces}
        if self._memories is None:
            return CopyWriter(self._plan, {self.world.rank: copy.array()})

        descriptors = {rank: self._memories[rank].fileno() for rank in sorted(ranks)}
        if not parts or sum(part.bytes for part in parts) < PROCESS_BYTES:
            return CopyWriter(self._plan, {rank: mapped(memory) for rank, memory in descriptors.items()})

        if self.process is None or self.process.has_ended:
            self.process = WriterProcess(self._plan, descriptors)
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
        """Ends the process and gives the copies back."""
        if self.process is not None:
            self.process.end()
        if self.copy is not None:
            self.copy.close()
        for memory in (self._memories or {}).values():
            memory.close()
        self.process = self.copy = self._memories = None


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
        tensors: by name, of logical shape; each rank writes its shards into files of its own.
        group: all ranks, with a CPU backend; None: the default group.
        keep: number of newest checkpoints to keep; 0: all.
        attached: files of the stage, by name; those of the first rank are written.

    Returns:
        The directory of the checkpoint.

    Raises:
        CheckpointWriteError: on every rank, if any rank could not write; earlier checkpoints stay.
    """
    writer = TensorWriter(plan_of(tensors, world.size, [world.rank]), tensors)
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
    """Does what `write` says with the files of a writer (collective); returns the folder of the checkpoint on every
    rank.

    Raises:
        CheckpointWriteError: a rank could not write its files, or the first one not publish them (on every rank);
            earlier checkpoints are intact.
    """
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
        failure = f"rank {world.rank}: {error}"
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
