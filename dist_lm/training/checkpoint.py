"""Saving and loading tensors: every rank writes its shards as safetensors, through torch's distributed checkpoint.

Tensors have logical shapes, without the padding of tensor parallelism, so a checkpoint loads at any layout. Nothing is
pickled.
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

from dist_lm.config.model import AdaptedModelConfig, ModelConfig
from dist_lm.errors import ArtefactError, UserError
from dist_lm.model.size import ADAPTERS, is_trained, parameter_shapes
from dist_lm.parallel.mesh import World
from dist_lm.parallel.values import logical, shard_of
from dist_lm.storage import durable
from dist_lm.training import checkpoint_files as files
from dist_lm.training.optimizer import VARIANCE, named_state
from dist_lm.training.state import TrainState

log = logging.getLogger(__name__)

FILE_BYTES = 1 << 30  # approximate size of one file, which is assembled in memory before it is written

Found = TypeVar("Found")


class CheckpointWriteError(UserError):
    """A checkpoint could not be written; earlier checkpoints are intact."""


@dataclass(frozen=True)
class Companion:
    """A second model in the same checkpoint: the critic beside the policy."""

    prefix: str  # of the names of its tensors: `value.`
    model: nn.Module
    optimizer: torch.optim.Optimizer
    config: ModelConfig

    def tensors(self) -> dict[str, torch.Tensor]:
        """`tensors_of` this model."""
        return tensors_of(self.model, self.optimizer, self.config, self.prefix)


def tensors_of(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, model_config: ModelConfig, prefix: str = ""
) -> dict[str, torch.Tensor]:
    """All tensors by their names in a checkpoint, of logical shape; loading writes into these tensors. Of a model with
    adapters only what is trained."""
    shapes = parameter_shapes(model_config)
    tensors = {
        f"{prefix}{files.MODEL}{name}": logical(parameter.detach(), shapes[name])
        for name, parameter in model.named_parameters()
        if is_trained(name, model_config)
    }
    if optimizer is not None:
        for name, value in named_state(model, optimizer):
            parameter, _, key = name.rpartition(".")
            whole = value if key == VARIANCE else logical(value, shapes[parameter])
            tensors[f"{prefix}{files.OPTIMIZER}{name}"] = whole
    return tensors


def weights_of(model: nn.Module, model_config: ModelConfig) -> dict[str, torch.Tensor]:
    """The parameters by their names in a checkpoint, of logical shape, adapters excluded."""
    shapes = parameter_shapes(model_config)
    return {
        f"{files.MODEL}{name}": logical(parameter.detach(), shapes[name])
        for name, parameter in model.named_parameters()
        if ADAPTERS not in name
    }


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
    """Write `tensors` as the checkpoint of `state.step`, update LATEST and BEST, remove old checkpoints (collective).

    Args:
        group: all ranks, with a CPU backend; None: the default group.
        keep: number of newest checkpoints to keep; 0: all.
        attached: files of the stage, by name; those of the first rank are written.

    Raises:
        CheckpointWriteError: on every rank, if any rank could not write.
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
        kept = f"{previous.name} is intact" if previous else "there is no earlier checkpoint"
        raise CheckpointWriteError(
            f"checkpoint {target} could not be written ({outcome[0]}); {kept}: free space or repair the folder, "
            "then run the same command again"
        )
    if world.is_first:
        try:
            files.tidy(checkpoints, state, keep)
        except OSError as error:  # the checkpoint itself is intact
            log.warning("BEST of %s could not be written (%s)", checkpoints, error)
    return target


def _write_own_files(
    directory: Path, tensors: dict[str, torch.Tensor], rank: int, group: dist.ProcessGroup | None
) -> tuple[dict[str, str], str | None]:
    """Write this rank's shards and make them durable (collective): SHA-256 by file name, and the error if it failed."""
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
    """Number of the file, from 1, that each tensor goes to: a new file starts when the shards fill `file_bytes`.

    torch uses the numbers of the first rank for all ranks; its shards are at least as large as those of other ranks.
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
    record = None
    if isinstance(config, AdaptedModelConfig):
        from dist_lm.training.adapters import record_of

        record = record_of(config, target)
    files.write_state(temporary, state, asdict(config.plain), record)
    digests[files.STATE] = durable.sha256_of(temporary / files.STATE)
    files.write_manifest(temporary, digests)
    if target.exists():  # a damaged checkpoint of this step was skipped, and the step is saved again
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
    """Fill `model` (and `optimizer`, unless None) from a checkpoint written at any layout (collective). Of a model with
    adapters only what is trained; `load_weights` fills its base.

    Args:
        companions: more models to fill.

    Raises:
        ArtefactError: the checkpoint belongs to another model; the message names the keys that differ.
    """
    state, saved_model = files.read_state(checkpoint)
    files.check_same_model(checkpoint, saved_model, model_config)
    if model_config.lora is not None or files.read_adapters(checkpoint) is not None:
        from dist_lm.training.adapters import check_same_adapters

        check_same_adapters(checkpoint, model_config)
    own = tensors_of(model, optimizer, model_config)
    parts = [own, *(companion.tensors() for companion in companions)]
    read(checkpoint, {name: tensor for part in parts for name, tensor in part.items()})
    for part in parts:
        moved = [value for name, value in part.items() if name.endswith(".step")]
        assert all(float(value) == float(moved[0]) for value in moved), "optimizer step counters disagree"
    return state


def load_weights(checkpoint: Path, model: nn.Module, model_config: ModelConfig) -> None:
    """Fill the parameters of `model`, adapters excluded, from the checkpoint it starts from (collective). Adapters of
    that checkpoint are merged.

    A model with a scalar head may start from one with a token head: then its own head keeps its initial values.

    Raises:
        ArtefactError: the checkpoint belongs to another model; the message names the keys that differ.
    """
    saved_model = files.read_state(checkpoint)[1]
    files.check_start(checkpoint, saved_model, model_config)
    if files.read_adapters(checkpoint) is not None:
        from dist_lm.training.adapters import load_merged

        load_merged(checkpoint, model, model_config)
        return
    tensors = weights_of(model, model_config)
    if saved_model["head"] != model_config.head:
        tensors = {
            name: tensor for name, tensor in tensors.items() if not name.startswith(f"{files.MODEL}scalar_head.")
        }
    read(checkpoint, tensors)


def read(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill `tensors` from the parts that any layout wrote (collective).

    Raises:
        ArtefactError: a tensor is missing in the checkpoint or has another shape there.
    """
    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)))
    except CheckpointException as error:
        causes = "; ".join(sorted({str(cause) for cause, _ in error.failures.values()}))
        raise ArtefactError(f"checkpoint {checkpoint} cannot be loaded: {causes}") from error


def newest_intact(checkpoints: Path, world: World) -> Path | None:
    """The newest intact checkpoint, the same on every rank (collective).

    Raises:
        ArtefactError: on every rank, if all checkpoints are damaged.
    """
    found = _as_on_first_rank(lambda: files.steps_in(checkpoints), world)
    return files.newest_intact(found, lambda checkpoint: _damage_seen(checkpoint, world))


def find_intact(path: Path, world: World) -> Path:
    """The checkpoint that `path` names, after verifying it (collective).

    Raises:
        ArtefactError: on every rank, if there is no checkpoint or it is damaged.
    """
    found = _as_on_first_rank(lambda: files.find_checkpoint(path), world)
    return files.require_intact(found, lambda checkpoint: _damage_seen(checkpoint, world))


def _damage_seen(checkpoint: Path, world: World) -> str | None:
    """The first damage that any rank finds; each rank reads a share of the files (collective)."""
    seen: list[str | None] = [None] * world.size
    dist.all_gather_object(seen, files.first_damage(checkpoint, share=(world.rank, world.size)))
    return next((damage for damage in seen if damage), None)


def _as_on_first_rank(look: Callable[[], Found], world: World) -> Found:
    """The result of `look` on the first rank, because other ranks may see an older state of a network file system
    (collective).

    Raises:
        ArtefactError: on every rank, the error that `look` raised.
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
