"""Saving and loading tensors: every rank writes its shards as safetensors, through torch's distributed checkpoint.

Tensors have logical shapes, without the padding of tensor parallelism, so a checkpoint loads at any layout. Nothing is
pickled.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from dist_lm.config.model import AdaptedModelConfig, ModelConfig
from dist_lm.config.stage import TrainingGroup
from dist_lm.errors import ArtefactError, UserError
from dist_lm.model.quantised import quantised_matrices, round_trip
from dist_lm.model.size import ADAPTERS, is_matrix, is_trained, parameter_shapes
from dist_lm.parallel.mesh import World
from dist_lm.parallel.messages import all_gather, broadcast, on_first_rank
from dist_lm.parallel.values import add_changes, fill, logical, shard_of
from dist_lm.storage import durable
from dist_lm.training import checkpoint_files as files
from dist_lm.training.adapters import adapted_model, check_same_adapters, record_of
from dist_lm.training.checkpoint_reader import read
from dist_lm.training.checkpoint_tensors import as_fp32, model_tensors, own_parameters
from dist_lm.training.optimizer import VARIANCE, named_state
from dist_lm.training.state import TrainState

log = logging.getLogger(__name__)

FILE_BYTES = 1 << 30  # approximate size of one file, which is assembled in memory before it is written

SCALAR_HEAD = f"{files.MODEL}scalar_head."  # begins the names of its tensors


class CheckpointWriteError(UserError):
    """A checkpoint could not be written; earlier checkpoints are intact."""


@dataclass(frozen=True)
class Companion:
    """A second model in the same checkpoint: the critic beside the policy."""

    prefix: str  # begins the names of its tensors: `value.`
    model: nn.Module
    optimizer: torch.optim.Optimizer
    config: ModelConfig

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the `tensors_of` this model."""
        return tensors_of(self.model, self.optimizer, self.config, self.prefix)


def tensors_of(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, model_config: ModelConfig, prefix: str = ""
) -> dict[str, torch.Tensor]:
    """Returns all tensors by their names in a checkpoint, of logical shape.

    They share memory with the model and the optimizer, so loading writes into them. A model with adapters has only its
    trained tensors in a checkpoint.

    Args:
        optimizer: None: parameters alone.
        prefix: begins the names; empty for the first model of a checkpoint.
    """
    # Frozen parameters are those of the base, which is a checkpoint of its own.
    shapes = parameter_shapes(model_config)
    tensors = {
        f"{prefix}{files.MODEL}{name}": logical(parameter.detach(), shapes[name])
        for name, parameter in model.named_parameters()
        if is_trained(name, model_config)
    }
    if optimizer is not None:
        for name, tensor in named_state(model, optimizer):
            parameter_name, _, key = name.rpartition(".")
            if key != VARIANCE:  # the variance has its logical shape already
                tensor = logical(tensor, shapes[parameter_name])
            tensors[f"{prefix}{files.OPTIMIZER}{name}"] = tensor
    return tensors


def weights_of(model: nn.Module, model_config: ModelConfig) -> dict[str, torch.Tensor]:
    """Returns the parameters by their names in a checkpoint, of logical shape, adapters excluded."""
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
        except OSError as error:
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
    """Adds attached files, state and manifest to the written shards, renames the folder `temporary` to `target`, which
    it replaces, and points LATEST at it. `digests` (SHA-256 by file name) gets the added files.

    Raises:
        OSError: a file or the folder cannot be written.
    """
    digests |= files.attach(temporary, attached)
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


def load(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    model_config: ModelConfig,
    companions: Sequence[Companion] = (),
) -> TrainState:
    """Fills `model` (and `optimizer`, unless None) in place from a checkpoint written at any layout (collective).

    Hashes are not verified here, see `find_intact`. In a model with adapters it fills only the trained parameters;
    `load_weights` fills the base.

    Args:
        companions: more models to fill.

    Returns:
        The state of the run that was saved with the tensors.

    Raises:
        ArtefactError: the checkpoint cannot be read, lacks a tensor, or belongs to another model or other adapters; the
            message names the keys that differ.
    """
    state, saved_model = files.read_state(checkpoint)
    files.check_same_model(checkpoint, saved_model, model_config)
    # Adapters change which tensors a checkpoint holds, so both sides must agree on them.
    if model_config.lora is not None or files.read_adapters(checkpoint) is not None:
        check_same_adapters(checkpoint, model_config)

    models = [tensors_of(model, optimizer, model_config), *(companion.tensors() for companion in companions)]
    read(checkpoint, {name: tensor for tensors in models for name, tensor in tensors.items()})
    for tensors in models:
        # A checkpoint mixed from two saves would show here.
        steps = {float(tensor) for name, tensor in tensors.items() if name.endswith(".step")}
        assert len(steps) <= 1, "optimizer step counters disagree"
    return state


def load_weights(checkpoint: Path, model: nn.Module, model_config: ModelConfig) -> None:
    """Fills the parameters of `model`, adapters excluded, from the checkpoint it starts from (collective). Matrices in
    four bits are quantised anew.

    Adapters of that checkpoint are merged. A model with a scalar head may start from one with a token head: then the
    scalar head keeps its initial values.

    Raises:
        ArtefactError: the checkpoint cannot be read, its base is gone or has changed, or it belongs to another model;
            the message names the keys that differ.
    """
    _load_parameters(checkpoint, model, model_config)

    # One matrix at a time: the base as a whole would need the memory that four bits save.
    if model_config.is_in_4bit:
        base = model_tensors(checkpoint)
        for name, matrix in quantised_matrices(model).items():
            matrix.quantise(torch.from_numpy(as_fp32(base[name])))


def _load_parameters(checkpoint: Path, model: nn.Module, model_config: ModelConfig) -> None:
    """Does what `load_weights` says for the parameters of `model`; matrices in four bits are none (collective)."""
    saved_model = files.read_state(checkpoint)[1]
    files.check_start(checkpoint, saved_model, model_config)
    if files.read_adapters(checkpoint) is not None:
        _load_merged(checkpoint, model, model_config)
        return

    tensors = weights_of(model, model_config)
    # A new scalar head has no weights in a checkpoint of a language model.
    if saved_model["head"] != model_config.head:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(SCALAR_HEAD)}
    read(checkpoint, tensors)


def _load_merged(checkpoint: Path, model: nn.Module, model_config: ModelConfig) -> None:
    """Fills the parameters of `model`, but not its adapters, with those of the base of a checkpoint of adapters plus
    their changes (collective).

    Raises:
        ArtefactError: the base is missing or has changed, a checkpoint cannot be read, or it belongs to another model.
    """
    adapted = adapted_model(checkpoint)
    _load_parameters(Path(adapted.base), model, model_config)
    if adapted.is_in_4bit:
        # The adapters were trained beside rounded matrices, and a scale belongs to entries of several ranks.
        base = model_tensors(Path(adapted.base))
        fill(model, model_config, lambda name, _: round_trip(name, torch.from_numpy(as_fp32(base[name]))), is_matrix)
    factors = {
        name: torch.from_numpy(as_fp32(tensor))
        for name, tensor in own_parameters(checkpoint).items()
        if ADAPTERS in name
    }
    add_changes(model, adapted, parameter_shapes(model_config), factors)

    # What is trained beside the adapters, a scalar head or rows of the embedding, is in their checkpoint.
    trained = {
        f"{files.MODEL}{name}"
        for name in parameter_shapes(adapted)
        if ADAPTERS not in name and is_trained(name, adapted)
    }
    if tensors := {name: tensor for name, tensor in weights_of(model, model_config).items() if name in trained}:
        read(checkpoint, tensors)


def with_base(model: ModelConfig, checkpoints: Path, stage: TrainingGroup, world: World) -> AdaptedModelConfig:
    """Returns the model of a run of adapters with its base (collective).

    The base is that of the newest intact checkpoint of the run or of stage.branch_from, else stage.init_from. All files
    of the base are verified, and read by the ranks in shares.

    Raises:
        ArtefactError: on every rank, if the base is missing, damaged or has changed, all checkpoints of the run are
            damaged, or the run has other adapters.
    """
    assert isinstance(model, AdaptedModelConfig)
    # The base is recorded in the checkpoint, so a run continues with the base it began with.
    resume_from = newest_intact(checkpoints, world)
    if resume_from is None and stage.branch_from:
        resume_from = find_intact(Path(stage.branch_from), world)
    if resume_from is None:
        base = find_intact(Path(stage.init_from), world).resolve()
        return AdaptedModelConfig.of(model, model.lora, str(base), files.fingerprint(base))

    check_same_adapters(resume_from, model)
    saved = adapted_model(resume_from)
    find_intact(Path(saved.base), world)
    return AdaptedModelConfig.of(model, model.lora, saved.base, saved.base_sha256)


def newest_intact(checkpoints: Path, world: World) -> Path | None:
    """Returns the newest intact checkpoint, the same on every rank; None if there are no checkpoints (collective). The
    damaged ones that it skips are logged.

    Raises:
        ArtefactError: on every rank, if all checkpoints are damaged.
    """
    paths = on_first_rank(lambda: files.steps_in(checkpoints), list[Path])
    return files.newest_intact(paths, lambda checkpoint: _first_damage(checkpoint, world))


def find_intact(path: Path, world: World) -> Path:
    """Returns the checkpoint that `path` names (see `files.find_checkpoint`), after verifying all its files, the same
    on every rank (collective).

    Raises:
        ArtefactError: on every rank, if there is no checkpoint or it is damaged.
    """
    checkpoint = on_first_rank(lambda: files.find_checkpoint(path), Path)
    return files.require_intact(checkpoint, lambda checkpoint: _first_damage(checkpoint, world))


def _first_damage(checkpoint: Path, world: World) -> str | None:
    """Returns the first damage that any rank finds; each rank reads a share of the files (collective)."""
    try:
        manifest = on_first_rank(lambda: files.read_manifest(checkpoint), files.Manifest)
    except ArtefactError as error:
        return str(error)

    # Every file is read completely, so the ranks divide them.
    damage = files.first_damage(checkpoint, share=(world.rank, world.size), manifest=manifest)
    damage_of_rank = all_gather(damage, str | None)
    return next((damage for damage in damage_of_rank if damage), None)
