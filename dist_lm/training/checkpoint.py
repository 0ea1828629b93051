"""Saving and loading tensors: every rank its own shards, as safetensors through torch's distributed checkpoint.

Tensors have their logical shapes, without what tensor parallelism pads, so any layout loads what any other saved.
Nothing is pickled.
"""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from dist_lm.config.model import ModelConfig
from dist_lm.errors import ArtefactError, UserError
from dist_lm.model.size import parameter_shapes
from dist_lm.parallel.mesh import World
from dist_lm.parallel.values import logical, shard_of
from dist_lm.storage import durable
from dist_lm.training import checkpoint_files as files
from dist_lm.training.optimizer import named_state
from dist_lm.training.state import TrainState

log = logging.getLogger(__name__)

FILE_BYTES = 1 << 30  # of one file, about: it is put together in memory before it is written


Found = TypeVar("Found")


class CheckpointWriteError(UserError):
    """A checkpoint could not be written; the ones before are untouched."""


@dataclass(frozen=True)
class Companion:
    """A model that is trained beside the one that a checkpoint is named after: a critic."""

    prefix: str  # before the names of its tensors: `value.`
    model: nn.Module
    optimizer: torch.optim.Optimizer
    config: ModelConfig

    def tensors(self) -> dict[str, torch.Tensor]:
        """As `tensors_of`."""
        return tensors_of(self.model, self.optimizer, self.config, self.prefix)


def tensors_of(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, model_config: ModelConfig, prefix: str = ""
) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by its name there, of logical shape; loading writes into these very tensors."""
    shapes = parameter_shapes(model_config)
    tensors = {
        f"{prefix}{files.MODEL}{name}": logical(parameter.detach(), shapes[name])
        for name, parameter in model.named_parameters()
    }
    if optimizer is not None:
        for name, value in named_state(model, optimizer):
            tensors[f"{prefix}{files.OPTIMIZER}{name}"] = logical(value, shapes[name.rpartition(".")[0]])
    return tensors


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
    """Write `tensors` as the checkpoint of `state.step`, point LATEST and BEST, drop old ones (collective).

    Args:
        group: all ranks, with a CPU backend; none: the default group.
        keep: newest checkpoints kept; 0: all.
        attached: files of the stage's own by name, with their contents; the first rank's are written.

    Raises:
        CheckpointWriteError: on every rank, when any rank could not write.
    """
    target = checkpoints / files.step_name(state.step)
    temporary = checkpoints / f".{target.name}"
    if world.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
    dist.barrier(group)
    gathered: list = [None] * world.size
    dist.all_gather_object(gathered, _write_own_files(temporary, tensors, world.rank, group), group)
    outcome = [next((failure for _, failure in gathered if failure), None)]
    if world.is_first and not outcome[0]:
        try:
            digests = {name: digest for part, _ in gathered for name, digest in part.items()}
            _finish(temporary, target, digests, state, model_config, attached)
        except OSError as error:
            outcome = [str(error)]
    dist.broadcast_object_list(outcome, group=group)
    if outcome[0]:
        if world.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        previous = files.read_pointer(checkpoints, files.LATEST)
        kept = f"{previous.name} is intact" if previous else "there was none before it"
        raise CheckpointWriteError(
            f"checkpoint {target} could not be written ({outcome[0]}); {kept}: free space or mend the folder, "
            "then run the same command again"
        )
    if world.is_first:
        try:
            files.tidy(checkpoints, state, keep)
        except OSError as error:  # the checkpoint itself is whole
            log.warning("BEST of %s could not be written (%s)", checkpoints, error)
    return target


def _write_own_files(
    directory: Path, tensors: dict[str, torch.Tensor], rank: int, group: dist.ProcessGroup | None
) -> tuple[dict[str, str], str | None]:
    """This rank's shards, durable (collective): SHA-256 by file name, and why it could not, if so."""
    try:
        writer = dcp.HuggingFaceStorageWriter(
            str(directory), fqn_to_index_mapping=file_numbers(tensors, FILE_BYTES), save_distributed=True
        )
        dcp.save(tensors, storage_writer=writer, process_group=group)
        own = sorted(directory.glob(f"shard-{rank + 1:05d}-*"))
        for path in own:
            durable.fsync_file(path)
        return {path.name: durable.sha256_of(path) for path in own}, None
    except CheckpointException as error:
        return {}, "; ".join(sorted({str(cause) for cause, _ in error.failures.values()}))
    except OSError as error:
        return {}, str(error)


def file_numbers(tensors: dict[str, torch.Tensor], file_bytes: int) -> dict[str, int]:
    """Which file of a rank each tensor goes to, from 1: a new one when this rank's shards fill `file_bytes`.

    torch takes the first rank's answer for all of them: it holds at least as much of every tensor as any other.
    """
    numbers, written = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + written // file_bytes
        written += shard_of(tensor).nbytes
    return numbers


def _finish(
    temporary: Path,
    target: Path,
    digests: dict[str, str],
    state: TrainState,
    config: ModelConfig,
    attached: Mapping[str, bytes],
) -> None:
    digests |= files.attach(temporary, attached)
    files.write_state(temporary, state, asdict(config))
    digests[files.STATE] = durable.sha256_of(temporary / files.STATE)
    files.write_manifest(temporary, digests)
    if target.exists():  # the same step saved again after a damaged checkpoint was passed over
        shutil.rmtree(target)
    temporary.rename(target)
    durable.fsync_directory(target.parent)
    files.write_pointer(target.parent, files.LATEST, target)


def load(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    model_config: ModelConfig,
    companions: Sequence[Companion] = (),
) -> TrainState:
    """Fill `model` (and `optimizer`, unless None) from a checkpoint written at any layout (collective).

    Args:
        companions: filled too.

    Raises:
        ArtefactError: it belongs to another model; the message names the keys that differ.
    """
    state, saved_model = files.read_state(checkpoint)
    files.check_same_model(checkpoint, saved_model, model_config)
    own = tensors_of(model, optimizer, model_config)
    parts = [own, *(companion.tensors() for companion in companions)]
    read(checkpoint, {name: tensor for part in parts for name, tensor in part.items()})
    for part in parts:
        moved = [value for name, value in part.items() if name.endswith(".step")]
        assert all(float(value) == float(moved[0]) for value in moved), "optimizer step counters disagree"
    return state


def load_weights(checkpoint: Path, model: nn.Module, model_config: ModelConfig) -> None:
    """Fill the parameters of `model` from a checkpoint that it starts from (collective).

    A model of scores may start from one of tokens: it takes all weights but the head's, and its own head stays.

    Raises:
        ArtefactError: the checkpoint belongs to another model; the message names the keys that differ.
    """
    saved_model = files.read_state(checkpoint)[1]
    files.check_start(checkpoint, saved_model, model_config)
    tensors = tensors_of(model, None, model_config)
    if files.head_of(saved_model) != model_config.head:
        tensors = {
            name: tensor for name, tensor in tensors.items() if not name.startswith(f"{files.MODEL}scalar_head.")
        }
    read(checkpoint, tensors)


def read(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill `tensors`, each from the parts of it that any layout wrote (collective).

    Raises:
        ArtefactError: one is not there, or has another shape there.
    """
    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)))
    except CheckpointException as error:
        causes = "; ".join(sorted({str(cause) for cause, _ in error.failures.values()}))
        raise ArtefactError(f"checkpoint {checkpoint} cannot be loaded: {causes}") from error


def newest_intact(checkpoints: Path, world: World) -> Path | None:
    """The checkpoint to continue from, the same on every rank: the newest that is whole (collective).

    Raises:
        ArtefactError: on every rank, when there are checkpoints and all are damaged.
    """
    found = _as_on_first_rank(lambda: files.steps_in(checkpoints), world)
    return files.newest_intact(found, lambda checkpoint: _damage_seen(checkpoint, world))


def find_intact(path: Path, world: World) -> Path:
    """The checkpoint that `path` names, verified (collective).

    Raises:
        ArtefactError: on every rank, when there is none or it is damaged.
    """
    found = _as_on_first_rank(lambda: files.find_checkpoint(path), world)
    return files.require_intact(found, lambda checkpoint: _damage_seen(checkpoint, world))


def _damage_seen(checkpoint: Path, world: World) -> str | None:
    """The first damage that a rank sees; each reads a share of the files (collective)."""
    seen: list[str | None] = [None] * world.size
    dist.all_gather_object(seen, files.first_damage(checkpoint, share=(world.rank, world.size)))
    return next((damage for damage in seen if damage), None)


def _as_on_first_rank(look: Callable[[], Found], world: World) -> Found:
    """What `look` finds on the first rank: others may see an older state of a network file system (collective).

    Raises:
        ArtefactError: on every rank, what `look` raised.
    """
    answer: list = [None, None]
    if world.is_first:
        try:
            answer[0] = look()
        except ArtefactError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer)
    if answer[1]:
        raise ArtefactError(answer[1])
    return answer[0]
