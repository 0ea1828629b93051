"""Loading tensors: each rank fills its shards from a checkpoint that any layout wrote.

Tensors have logical shapes, without the padding of tensor parallelism, so a checkpoint loads at any layout. The first
rank reads where their parts lie and tells the others. Each rank then opens only the files that hold entries of its
shards: a checkpoint of many files and ranks would otherwise be opened files times ranks times.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dist_lm.config.model import AdaptedModelConfig, ModelConfig
from dist_lm.config.stage import TrainingGroup
from dist_lm.errors import ArtefactError
from dist_lm.model.quantised import quantised_matrices, round_trip
from dist_lm.model.size import ADAPTERS, is_matrix, is_trained, parameter_shapes
from dist_lm.parallel.mesh import World
from dist_lm.parallel.messages import all_gather, on_first_rank
from dist_lm.parallel.values import add_changes, fill, logical, shard_box, shard_of
from dist_lm.training import checkpoint_files as files
from dist_lm.training.adapters import adapted_model, check_same_adapters
from dist_lm.training.checkpoint_tensors import (
    LARGEST,
    StoredTensor,
    as_fp32,
    model_tensors,
    own_parameters,
    stored_tensors,
)
from dist_lm.training.optimizer import VARIANCE, named_state
from dist_lm.training.state import TrainState

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
"""Types of tensors in a checkpoint, by the names that safetensors gives them."""

SCALAR_HEAD = f"{files.MODEL}scalar_head."  # begins the names of its tensors

LONG_ROW = 64 << 10  # bytes; shorter rows are read whole, with what is not wanted: a call costs more
BLOCK = 1 << 20  # bytes of rows that are read at once

Box = tuple[slice, ...]


@dataclass(frozen=True)
class PartsOfTensor:
    """Places of the parts of one tensor; P parts of D dimensions."""

    dtype: str  # a key of `DTYPES`
    shape: list[int]  # of the whole tensor
    file_P: np.ndarray  # int64 (P,): places in `Contents.files`
    start_P: np.ndarray  # int64 (P,): byte offsets in these files
    offset_PD: np.ndarray  # int64 (P, D): indices in the tensor of the first entry of each part
    size_PD: np.ndarray  # int64 (P, D): shapes of the parts

    def in_box(self, box: Box) -> np.ndarray:
        """Returns the numbers of the parts that have entries in a box of the tensor, int64 (P',): none in an empty
        box."""
        begin_D, end_D = _ends(box)
        meets_PD = np.maximum(begin_D, self.offset_PD) < np.minimum(end_D, self.offset_PD + self.size_PD)
        return np.flatnonzero(meets_PD.all(axis=1))

    def fill(self, box: Box) -> bool:
        """Returns whether the parts hold every entry of a box once."""
        numbers = self.in_box(box)
        begin_D, end_D = _ends(box)
        begin_PD = np.maximum(begin_D, self.offset_PD[numbers])
        end_PD = np.minimum(end_D, self.offset_PD[numbers] + self.size_PD[numbers])
        return files.are_tiles(begin_PD, end_PD, begin_D, end_D)


def _ends(box: Box) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first indices of a box, and those after its last ones: int64 (D,) each."""
    begin_D = np.array([cut.start for cut in box], dtype=np.int64)
    end_D = np.array([cut.stop for cut in box], dtype=np.int64)
    return begin_D, end_D


@dataclass(frozen=True)
class Contents:
    """Content of the headers of a checkpoint: all its files, and its tensors by name."""

    files: list[str]
    tensors: dict[str, PartsOfTensor]


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
        MessageError: another rank has sent something else.
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
        MessageError: another rank has sent something else.
    """
    _load_parameters(checkpoint, model, model_config)

    # One matrix at a time: the base as a whole would need the memory that four bits save.
    if model_config.is_in_4bit:
        base = model_tensors(checkpoint)
        for name, matrix in quantised_matrices(model).items():
            matrix.quantise(torch.from_numpy(as_fp32(base[name])))


def _load_parameters(checkpoint: Path, model: nn.Module, model_config: ModelConfig) -> None:
    """Does what `load_weights` says for the parameters of `model`, in place; matrices in four bits are none
    (collective). A new scalar head keeps its values.

    Raises:
        ArtefactError: the checkpoint is damaged or does not fit the model.
    """
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


def read(checkpoint: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fills `tensors`, by their names in the checkpoint, in place from the parts that any layout wrote (collective).

    Raises:
        ArtefactError: on every rank, if a tensor is missing in the checkpoint or has another shape there, if its parts
            leave holes or overlap, or if any rank cannot read a file or a header.
        MessageError: another rank has sent something else.
    """
    contents = on_first_rank(lambda: read_contents(checkpoint), Contents)
    _check(checkpoint, contents, tensors)

    failure = None
    try:
        _fill(checkpoint, contents, tensors)
    except ArtefactError as error:
        failure = str(error)

    # A rank that stops alone would leave the others waiting.
    for reason in all_gather(failure, str | None):
        if reason:
            raise ArtefactError(f"checkpoint {checkpoint} cannot be loaded: {reason}")


def read_contents(checkpoint: Path) -> Contents:
    """Returns where the parts of all tensors lie: from the index of the checkpoint, else from the header of each file.

    Raises:
        ArtefactError: the index or a header cannot be read, or the index names a file elsewhere.
    """
    path = checkpoint / files.INDEX
    if not path.is_file():  # an earlier version or an import wrote it
        return contents_of(stored_tensors(checkpoint))

    try:
        index = json.loads(path.read_text())
        # Another path would bring any file that the user may read into the weights.
        names = [str(name) for name in index["files"]]
        for name in names:
            if Path(name).name != name or not name.endswith(files.TENSORS):
                raise ValueError(f"{name!r} is no name of a file of tensors")

        tensors = {}
        for name, entry in index["tensors"].items():
            n_dims = len(entry["shape"])
            table = np.array(entry["parts"], dtype=np.int64).reshape(-1, 2 + 2 * n_dims)
            if (table < 0).any() or (table > LARGEST).any() or (table[:, 0] >= len(names)).any():
                raise ValueError(f"{name} has a part of impossible size or place")
            tensors[name] = PartsOfTensor(
                str(entry["dtype"]),
                [int(size) for size in entry["shape"]],
                file_P=table[:, 0],
                start_P=table[:, 1],
                offset_PD=table[:, 2 : 2 + n_dims],
                size_PD=table[:, 2 + n_dims :],
            )
        return Contents(names, tensors)
    # A rank that stops with another error would leave the others waiting.
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ArtefactError(f"checkpoint {checkpoint}: {files.INDEX} cannot be read ({error})") from error


def contents_of(stored: Mapping[str, StoredTensor]) -> Contents:
    """Returns where the parts of tensors lie as arrays, which are short to send and fast to search."""
    names = sorted({part.file.name for tensor in stored.values() for part in tensor.parts})
    file_numbers = {name: number for number, name in enumerate(names)}
    tensors = {}
    for name, tensor in stored.items():
        by_dimension = (len(tensor.parts), len(tensor.shape))
        tensors[name] = PartsOfTensor(
            tensor.dtype,
            list(tensor.shape),
            file_P=np.array([file_numbers[part.file.name] for part in tensor.parts], dtype=np.int64),
            start_P=np.array([part.start for part in tensor.parts], dtype=np.int64),
            offset_PD=np.array([part.offsets for part in tensor.parts], dtype=np.int64).reshape(by_dimension),
            size_PD=np.array([part.shape for part in tensor.parts], dtype=np.int64).reshape(by_dimension),
        )
    return Contents(names, tensors)


def _check(checkpoint: Path, contents: Contents, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuses a checkpoint that cannot fill `tensors`; every rank comes to the same end.

    Raises:
        ArtefactError: names the tensor that is missing, or has another shape or a type that no checkpoint holds.
    """
    for name, tensor in tensors.items():
        parts = contents.tensors.get(name)
        if parts is None:
            raise ArtefactError(f"checkpoint {checkpoint} cannot be loaded: it has no tensor {name}")
        if parts.shape != list(tensor.shape):
            raise ArtefactError(
                f"checkpoint {checkpoint} cannot be loaded: {name} has shape {parts.shape} there, "
                f"expected {list(tensor.shape)}"
            )
        if parts.dtype not in DTYPES:
            raise ArtefactError(
                f"checkpoint {checkpoint} cannot be loaded: {name} has type {parts.dtype}, "
                f"expected one of {', '.join(DTYPES)}"
            )


@torch.no_grad()
def _fill(checkpoint: Path, contents: Contents, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fills this rank's shards; each file with entries of them is opened once.

    Raises:
        ArtefactError: names the tensor whose parts leave holes in the shard or overlap there, or the file that cannot
            be read.
    """
    boxes = {name: shard_box(tensor) for name, tensor in tensors.items()}
    for name, box in boxes.items():
        # A hole would keep its former values.
        if not contents.tensors[name].fill(box):
            raise ArtefactError(f"the parts of {name} do not hold every entry once")

    for file, needed in needed_parts(contents, boxes).items():
        try:
            with (checkpoint / file).open("rb") as opened:
                for name, number in needed:
                    parts, shard = contents.tensors[name], shard_of(tensors[name])
                    common, in_part, in_shard = _common_box(parts, number, boxes[name])
                    shard[in_shard].copy_(_entries(opened, parts, number, in_part).reshape(common))
        except files.ShortFileError as error:  # it was cut short since its header was read
            raise ArtefactError(str(error)) from error
        except OSError as error:  # a bad disk
            raise ArtefactError(f"{file}: {error}") from error


def needed_parts(contents: Contents, boxes: Mapping[str, Box]) -> dict[str, list[tuple[str, int]]]:
    """Returns, by file, the (tensor, number of the part) that have entries in boxes of tensors; other files are left
    out."""
    needed: dict[str, list[tuple[str, int]]] = {}
    for name, box in boxes.items():
        parts = contents.tensors[name]
        for number in parts.in_box(box).tolist():
            needed.setdefault(contents.files[parts.file_P[number]], []).append((name, number))
    return needed


def _common_box(parts: PartsOfTensor, number: int, box: Box) -> tuple[list[int], Box, Box]:
    """Returns the shape of what a part and a box of the tensor have in common, where it is in the part, and where it is
    in the box."""
    begins, in_part, in_box = [], [], []
    for cut, offset, size in zip(box, parts.offset_PD[number].tolist(), parts.size_PD[number].tolist(), strict=True):
        begin, end = max(cut.start, offset), min(cut.stop, offset + size)
        begins.append(end - begin)
        in_part.append(slice(begin - offset, end - offset))
        in_box.append(slice(begin - cut.start, end - cut.start))
    return begins, tuple(in_part), tuple(in_box)


def _entries(file: BufferedReader, parts: PartsOfTensor, number: int, box: Box) -> torch.Tensor:
    """Reads the entries in a box of one part, one after the other.

    Raises:
        OSError: the file cannot be read.
        files.ShortFileError: it is shorter than the part.
    """
    dtype = DTYPES[parts.dtype]
    # numpy has no bfloat16, so entries are opaque and only have the right size.
    entries = np.empty([cut.stop - cut.start for cut in box], np.dtype(f"V{dtype.itemsize}"))
    read_entries(file, int(parts.start_P[number]), parts.size_PD[number].tolist(), box, entries)
    return torch.from_numpy(entries.reshape(-1).view(np.uint8)).view(dtype)


def read_entries(file: BufferedReader, start: int, shape: Sequence[int], box: Box, target: np.ndarray) -> None:
    """Fills an array with the entries in a box of a part. Needs BLOCK bytes of memory beside it.

    Args:
        start: byte offset in the file of the first entry of the part, which is stored in row-major order.
        shape: of the part.
        target: contiguous, has the shape of the box and entries of the right size.

    Raises:
        OSError: the file cannot be read.
        files.ShortFileError: it is shorter than the part.
    """
    has_whole_rows = all(cut == slice(0, size) for cut, size in zip(box[1:], shape[1:], strict=True))
    row_bytes = target.itemsize * math.prod(shape[1:])
    first_row = box[0].start if box else 0
    if has_whole_rows:
        files.read_exactly(file, start + first_row * row_bytes, target.reshape(-1).view(np.uint8).data)
        return

    if row_bytes >= LONG_ROW:
        for row in range(len(target)):
            read_entries(file, start + (first_row + row) * row_bytes, shape[1:], box[1:], target[row])
        return

    n_at_once = max(1, BLOCK // max(1, row_bytes))
    for begin in range(0, len(target), n_at_once):
        rows = np.empty((min(n_at_once, len(target) - begin), *shape[1:]), target.dtype)
        files.read_exactly(file, start + (first_row + begin) * row_bytes, rows.reshape(-1).view(np.uint8).data)
        target[begin : begin + len(rows)] = rows[:, *box[1:]]


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
    """Returns the first damage that any rank finds, in words, the same on every rank; None: there is none. Each rank
    reads a share of the files (collective). A missing or damaged manifest is such a damage, too.
    """
    try:
        manifest = on_first_rank(lambda: files.read_manifest(checkpoint), files.Manifest)
    except ArtefactError as error:
        return str(error)

    # Every file is read completely, so the ranks divide them.
    damage = files.first_damage(checkpoint, share=(world.rank, world.size), manifest=manifest)
    damage_of_rank = all_gather(damage, str | None)
    return next((damage for damage in damage_of_rank if damage), None)
