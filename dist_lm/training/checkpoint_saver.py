"""Saving while training continues: a copy in host memory, and a thread that writes it.

Every rank writes its shards as safetensors, through torch's distributed checkpoint. Nothing is pickled into a file.

One save is in flight at most. The next save waits for it, so a crash loses less than two intervals. All ranks learn of
a failure at their next save or wait.
"""

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType, TracebackType

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from dist_lm.config.model import AdaptedModelConfig, ModelConfig
from dist_lm.errors import ArtefactError, UserError
from dist_lm.parallel.guarded_gloo import guarded
from dist_lm.parallel.mesh import World
from dist_lm.parallel.messages import all_gather, broadcast
from dist_lm.parallel.values import shard_of
from dist_lm.storage import durable
from dist_lm.training import checkpoint_files as files
from dist_lm.training.adapters import record_of
from dist_lm.training.checkpoint import Companion, contents_of, index_of, tensors_of
from dist_lm.training.checkpoint_tensors import stored_tensors
from dist_lm.training.optimizer import ShardedAdamW
from dist_lm.training.state import TrainState

log = logging.getLogger(__name__)

SAVE_S = 6 * 3600.0  # timeout of a message between savers: a slow disk is no hang, and heartbeats tell of those
FILE_BYTES = 1 << 30  # approximate size of one file, which is assembled in memory before it is written


class CheckpointWriteError(UserError):
    """A checkpoint could not be written; earlier checkpoints are intact."""


class CheckpointSaver:
    """Writes the checkpoints of a run; leaving it as a context manager waits for the last one, except after an error.

    Beside training it needs host memory for a copy of this rank's parameters and moments, which stays between saves
    (pinned on CUDA), and about `FILE_BYTES` more while it writes.
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
        is written. `write` says what else changes in the folder.

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
        path = write(
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
    # A folder that starts with a dot is no checkpoint, so a killed save leaves nothing to load.
    target = checkpoints / files.step_name(state.step)
    temporary = checkpoints / f".{target.name}"
    if world.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
    dist.barrier(group)

    # Every rank writes its files and learns whether all ranks could.
    written = all_gather(_write_shards(temporary, tensors, world.rank, group), tuple[dict[str, str], str | None], group)
    failure = next((error for _, error in written if error), None)

    # The first rank adds state and manifest, and makes the checkpoint visible.
    if world.is_first and not failure:
        try:
            digests = {name: digest for rank_digests, _ in written for name, digest in rank_digests.items()}
            _publish(temporary, target, digests, state, model_config, attached)
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


def _write_shards(
    directory: Path, tensors: dict[str, torch.Tensor], rank: int, group: dist.ProcessGroup | None
) -> tuple[dict[str, str], str | None]:
    """Writes this rank's shards and makes them durable (collective). It raises nothing for a disk that fails.

    Returns:
        SHA-256 by file name of this rank's files, and None; or no files, and the error.
    """
    try:
        # safetensors and not torch's own format, which pickles its metadata.
        writer = dcp.HuggingFaceStorageWriter(
            str(directory), fqn_to_index_mapping=file_numbers(tensors, FILE_BYTES), save_distributed=True
        )
        dcp.save(tensors, storage_writer=writer, process_group=group)
        paths = sorted(directory.glob(f"shard-{rank + 1:05d}-*"))
        for path in paths:
            durable.fsync(path)
        return {path.name: durable.sha256_of(path) for path in paths}, None
    except CheckpointException as error:
        return {}, "; ".join(sorted({str(cause) for cause, _ in error.failures.values()}))
    except OSError as error:
        return {}, str(error)


def file_numbers(tensors: dict[str, torch.Tensor], file_bytes: int) -> dict[str, int]:
    """Returns the number of each tensor's file, from 1: a new file starts when the shards fill `file_bytes`.

    torch uses the numbers of the first rank for all ranks; its shards are at least as large as those of other ranks.
    """
    numbers: dict[str, int] = {}
    n_bytes = 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + n_bytes // file_bytes
        n_bytes += shard_of(tensor).nbytes
    return numbers


def _publish(
    temporary: Path,
    target: Path,
    digests: dict[str, str],
    state: TrainState,
    config: ModelConfig,
    attached: Mapping[str, bytes],
) -> None:
    """Adds attached files, index, state and manifest to the written shards, renames the folder `temporary` to `target`,
    which it replaces, and points LATEST at it. `digests` (SHA-256 by file name) gets the added files.

    Raises:
        OSError: a file or the folder cannot be written.
        ArtefactError: the shards of the ranks do not make up all tensors.
    """
    # A rank that continues reads one index instead of the header of every file. This refuses missing parts, too. Files
    # are opened by the names that ranks sent: a network file system may list a folder as it was before they wrote.
    index = index_of(contents_of(stored_tensors(temporary, names=digests)))
    digests |= files.attach(temporary, attached)
    durable.write_text(temporary / files.INDEX, json.dumps(index, separators=(",", ":")))
    digests[files.INDEX] = durable.sha256_of(temporary / files.INDEX)
    adapters = record_of(config, target) if isinstance(config, AdaptedModelConfig) else None
    files.write_state(temporary, state, asdict(config.plain), adapters)
    digests[files.STATE] = durable.sha256_of(temporary / files.STATE)
    files.write_manifest(temporary, digests)

    # A damaged checkpoint of this step was skipped when the run continued, and the step is saved again.
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    durable.fsync(target.parent)
    files.write_pointer(target.parent, files.LATEST, target)
