"""Saving while training continues: a copy in host memory, and a thread that writes it.

One save is in flight at most. The next save waits for it, so a crash loses less than two intervals. All ranks learn of
a failure at their next save or wait.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType, TracebackType

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from dist_lm.config.model import ModelConfig
from dist_lm.parallel.guarded_gloo import guarded
from dist_lm.parallel.mesh import World
from dist_lm.training import checkpoint
from dist_lm.training.checkpoint import Companion
from dist_lm.training.optimizer import ShardedAdamW
from dist_lm.training.state import TrainState

log = logging.getLogger(__name__)


class CheckpointSaver:
    """Writes the checkpoints of a run; leaving it as a context manager waits for the last one, except after an error.

    Beside training it needs host memory for a copy of this rank's parameters and moments, which stays between saves
    (pinned on CUDA), and about `checkpoint.FILE_BYTES` more while it writes.
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
            group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self.group = group

        on_gpu = world.device.type == "cuda"
        # Staging copies tensors to host memory, pinned on a GPU, while the step that follows is computed.
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_gpu,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=on_gpu,
            )
        )

        # A new thread starts on GPU 0, whatever the GPU of the rank is.
        initializer = {"initializer": torch.cuda.set_device, "initargs": (world.device,)} if on_gpu else {}
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint", **initializer)
        self.in_flight: Future[Path] | None = None

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
        # After a failure other ranks may be gone, and a save that waits for them never ends.
        self.thread.shutdown(wait=error is None)
        self.stager.close()

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: TrainState,
        companions: Sequence[Companion] = (),
        attached: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        """Saves `state` and the present values of the tensors (collective), after the previous save is complete.

        It returns when the copy in host memory is made and a thread writes it; if not asynchronous, when the checkpoint
        is written. `checkpoint.write` says what else changes in the folder.

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
        tensors = checkpoint.tensors_of(model, optimizer, self.model_config)
        for companion in companions:
            tensors |= companion.tensors()
        if self.asynchronous:
            # Training changes the tensors in place, so the thread writes a copy.
            tensors = self.stager.stage(tensors)
            assert isinstance(tensors, dict)

        # The synchronous mode takes the same thread and process group: one code path to test.
        self.in_flight = self.thread.submit(self._write, tensors, state, attached)
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

    def _write(self, tensors: dict[str, torch.Tensor], state: TrainState, attached: Mapping[str, bytes]) -> Path:
        """Writes a checkpoint (collective, in the thread), logs the time and returns its directory.

        Raises:
            CheckpointWriteError: on every rank, if any rank could not write.
        """
        started = time.perf_counter()
        path = checkpoint.write(
            self.checkpoints,
            tensors,
            state,
            self.model_config,
            self.world,
            group=self.group,
            keep=self.keep,
            attached=attached,
        )
        log.info("%s written in %.1f s", path.name, time.perf_counter() - started)
        return path
