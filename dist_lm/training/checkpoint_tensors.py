"""The tensors of a checkpoint, read without a process group, and a writer of one file.

The files are safetensors: 8 bytes with the length of a JSON header, the header, then the numbers. The header has name,
dtype and shape of every part, and its offsets in the tensor (an entry of torch's distributed checkpoint).
"""

import json
import math
import os
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dist_lm.errors import ArtefactError
from dist_lm.interop.foreign_files import ITEM_BYTES
from dist_lm.interop.snapshot_files import LENGTH_BYTES, tensor_entries
from dist_lm.model.size import Shape, is_matrix, parameter_shapes
from dist_lm.storage import durable, outputs
from dist_lm.training import checkpoint_files as files
from dist_lm.training.adapters import adapted_model

ALIGNMENT = 8  # bytes; the numbers start at a multiple, so that other programs can map them
LARGEST = 1 << 62  # most bytes, and entries of a dimension: sums of two still fit into 64 bits
MOST_DIMENSIONS = 8  # most dimensions of a tensor; ours have three
METADATA, PLACES = "__metadata__", "DCP_SHARDING_INFO"


@dataclass(frozen=True)
class Part:
    """A box of a tensor in one file: what one rank wrote."""

    file: Path
    start: int  # byte offset in the file
    item_bytes: int
    offsets: Shape  # indices of its first entry in the tensor
    shape: Shape


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of logical shape, stored in parts."""

    name: str
    dtype: str  # as safetensors names it, such as F32
    shape: Shape
    parts: tuple[Part, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * self.parts[0].item_bytes

    def read(self) -> np.ndarray:
        """Returns the bytes of the tensor in row-major order: (bytes,) uint8.

        Raises:
            ArtefactError: a file cannot be read, or was cut short since its header was read.
        """
        # numpy has no bfloat16, so entries are opaque and only have the right size.
        array = np.empty(self.shape, np.dtype(f"V{self.parts[0].item_bytes}"))
        for part in self.parts:
            box = tuple(slice(start, start + size) for start, size in zip(part.offsets, part.shape, strict=True))
            target = array[*box, ...]  # the ellipsis makes a view, of a scalar too
            entries = target if target.flags.c_contiguous else np.empty_like(target, order="C")
            try:
                with part.file.open("rb") as file:
                    files.read_exactly(file, part.start, entries.reshape(-1).view(np.uint8).data)
            except (OSError, files.ShortFileError) as error:
                raise ArtefactError(f"{part.file}: {self.name} cannot be read ({error})") from error
            if entries is not target:
                target[...] = entries
        return array.reshape(-1).view(np.uint8)


@dataclass(frozen=True)
class ComputedTensor:
    """A tensor whose bytes are computed when they are written."""

    dtype: str  # as safetensors names it, such as F32
    shape: Shape
    bytes: int
    make: Callable[[], np.ndarray]  # the bytes in row-major order: (bytes,) uint8

    def read(self) -> np.ndarray:
        """Computes the bytes in row-major order: (bytes,) uint8."""
        return self.make()


def model_weights(directory: Path) -> dict[str, np.ndarray]:
    """Reads the parameters of a checkpoint, by their names in the model, fp32. Adapters are merged.

    Raises:
        ArtefactError: a file cannot be read, a part of a tensor is missing, or the base is gone or has changed.
    """
    return {name: as_fp32(tensor) for name, tensor in model_tensors(directory).items()}


def model_tensors(directory: Path) -> dict[str, StoredTensor | ComputedTensor]:
    """Returns the parameters of a checkpoint by their names in the model, sorted by name or in the order of the model.
    Adapters are merged into the parameters of their base.

    Raises:
        ArtefactError: a file cannot be read, a part of a tensor is missing, or the base is gone or has changed.
    """
    if files.read_adapters(directory) is not None:
        return _merged_tensors(directory)
    return dict(own_parameters(directory))


def own_parameters(directory: Path) -> dict[str, StoredTensor]:
    """Returns the parameters in the files of a checkpoint, by their names in the model; without the base of adapters.

    Raises:
        ArtefactError: a file cannot be read, or a part of a tensor is missing.
    """
    return {
        name.removeprefix(files.MODEL): tensor
        for name, tensor in stored_tensors(directory).items()
        if name.startswith(files.MODEL)
    }


def _merged_tensors(directory: Path) -> dict[str, StoredTensor | ComputedTensor]:
    """Returns the parameters of a base with the adapters of a checkpoint, in the order of the model; each is computed
    when it is read. A base that was in four bits is rounded as it was then. All files of the base are verified now.

    Raises:
        ArtefactError: the base is missing, damaged or has changed, or the checkpoint cannot be read.
    """
    from dist_lm.model.lora import adapter_of  # needs torch, which reading a plain checkpoint does not

    config, trained = adapted_model(directory), own_parameters(directory)
    base = model_tensors(files.require_intact(Path(config.base)))
    if config.is_in_4bit:
        base = {name: _rounded(name, tensor) for name, tensor in base.items()}
    merged: dict[str, StoredTensor | ComputedTensor] = {}
    for name, shape in parameter_shapes(config.plain).items():
        merged[name] = trained.get(name) or base[name]  # a scalar head is trained, and the base may lack it
        a, b = (trained.get(f"{adapter_of(name)}{factor}") for factor in ("a", "b"))
        if a is not None and b is not None:
            make = partial(_merge, name, base[name], a, b, config.scale)
            merged[name] = ComputedTensor("F32", shape, base[name].bytes, make)
    return merged


def _rounded(name: str, weight: StoredTensor | ComputedTensor) -> StoredTensor | ComputedTensor:
    """Returns a parameter of a base as it is in four bits (see `quantised.round_trip`), in fp32 and computed when it is
    read; a parameter that is no matrix is returned as it is.
    """
    if not is_matrix(name):
        return weight

    def round_now() -> np.ndarray:
        import torch

        from dist_lm.model.quantised import round_trip  # needs torch

        rounded = round_trip(name, torch.from_numpy(as_fp32(weight)))
        return rounded.flatten().view(torch.uint8).numpy()

    return ComputedTensor("F32", weight.shape, weight.bytes, round_now)


def _merge(
    name: str, weight: StoredTensor | ComputedTensor, a: StoredTensor, b: StoredTensor, scale: float
) -> np.ndarray:
    """Returns the fp32 weight `name` plus the change by its adapter (factors `a` and `b`), as bytes (uint8),
    row-major."""
    import torch

    from dist_lm.model.lora import change  # needs torch

    a_array, b_array, weight_array = (as_fp32(tensor) for tensor in (a, b, weight))
    added = change(name, torch.from_numpy(a_array), torch.from_numpy(b_array), scale)
    merged = torch.from_numpy(weight_array.copy()).add_(added)
    return merged.flatten().view(torch.uint8).numpy()


def as_fp32(tensor: StoredTensor | ComputedTensor) -> np.ndarray:
    """Reads an fp32 tensor."""
    return tensor.read().view(np.float32).reshape(tensor.shape)


def stored_tensors(directory: Path, names: Collection[str] | None = None) -> dict[str, StoredTensor]:
    """Returns the tensors of a checkpoint by name (`model.PARAMETER`, `optimizer.PARAMETER.exp_avg`), sorted by name;
    reads headers alone. A folder without files of tensors gives none.

    Args:
        names: names of the files; None: all files of tensors in the folder.

    Raises:
        ArtefactError: a file cannot be read, or a part of a tensor is missing or there twice.
    """
    if names is None:
        names = [path.name for path in directory.glob(f"*{files.TENSORS}")]

    # Every rank writes files of its own, so the parts of one tensor may lie in many files.
    dtypes: dict[str, str] = {}
    parts: dict[str, list[Part]] = {}
    for file in (directory / name for name in sorted(names)):
        header, start = read_header(file)
        try:
            sharding = json.loads(header.pop(METADATA)[PLACES])
            for name, entry in header.items():
                shape = tuple(entry["shape"])
                first, last = entry["data_offsets"]
                n_elements = math.prod(shape)
                if n_elements == 0:
                    continue  # this rank holds padding alone

                item_bytes = (last - first) // n_elements
                offsets = tuple(sharding[name]["saved_offsets"])
                if not all(type(size) is int and 0 <= size <= LARGEST for size in (first, *shape, *offsets)):
                    raise ValueError(f"{name} has shape {list(shape)} at {list(offsets)}, byte {first}")
                parts.setdefault(name, []).append(Part(file, start + first, item_bytes, offsets, shape))
                dtypes[name] = entry["dtype"]
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ArtefactError(f"{file}: the header is not that of a checkpoint ({error!r})") from error
    return {name: _from_parts(directory, name, dtypes[name], parts[name]) for name in sorted(parts)}


def index_of(stored: Mapping[str, StoredTensor]) -> dict[str, object]:
    """Returns the JSON that `checkpoint.read_contents` reads: for each part of a tensor, the number of its file, the
    byte offset there, the indices of its first entry in the tensor and its shape, one after the other."""
    names = sorted({part.file.name for tensor in stored.values() for part in tensor.parts})
    file_numbers = {name: number for number, name in enumerate(names)}
    tensors = {}
    for name, tensor in stored.items():
        rows = [[file_numbers[part.file.name], part.start, *part.offsets, *part.shape] for part in tensor.parts]
        tensors[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "parts": rows}
    return {"files": names, "tensors": tensors}


def tensors_in(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a safetensors file that somebody else wrote, by name, each with one part.

    Only the header is read, by a process with limits.

    Raises:
        ArtefactError: the file cannot be read, is no safetensors file, or is cut short; or tensors overlap. The message
            names the tensor.
        UserError: no process can be started for reading the file.
    """
    tensors = {}
    for name, dtype, shape, start in tensor_entries(file):
        part = Part(file, start, ITEM_BYTES[dtype], (0,) * len(shape), tuple(shape))
        tensors[name] = StoredTensor(name, dtype, tuple(shape), (part,))
    return tensors


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Returns (header of a safetensors file, byte offset of the numbers); what the header says is not checked.

    Raises:
        ArtefactError: `file` is missing or is no safetensors file.
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(LENGTH_BYTES), "little")
            # Any file has eight first bytes; a length beyond the file tells that it is no safetensors file.
            if length > file.stat().st_size:
                raise ValueError(f"a header of {length} bytes")
            return dict(json.loads(opened.read(length))), LENGTH_BYTES + length
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ArtefactError(f"{file}: not a safetensors file ({error})") from error


def _from_parts(directory: Path, name: str, dtype: str, parts: list[Part]) -> StoredTensor:
    """Returns the tensor that the parts of all files make up.

    Raises:
        ArtefactError: the parts do not hold every element of the tensor once.
    """
    n_dims = len(parts[0].shape)
    agree = all(len(sizes) == n_dims for part in parts for sizes in (part.offsets, part.shape))
    if not agree or n_dims > MOST_DIMENSIONS:
        raise ArtefactError(
            f"checkpoint {directory}: expected the same number of dimensions in all parts of {name}, "
            f"{MOST_DIMENSIONS} at most"
        )

    # No header has the shape of the tensor; the farthest part ends at its corner.
    shape = tuple(max(part.offsets[dim] + part.shape[dim] for part in parts) for dim in range(n_dims))
    tensor = StoredTensor(name, dtype, shape, tuple(parts))

    n_elements = sum(math.prod(part.shape) for part in parts)
    if n_elements != tensor.elements:
        raise ArtefactError(
            f"checkpoint {directory}: {name} has {n_elements:,} of {tensor.elements:,} elements; a file of tensors is "
            "missing, or a file is there that does not belong to the checkpoint"
        )

    begin_PD = np.array([part.offsets for part in parts], dtype=np.int64)
    size_PD = np.array([part.shape for part in parts], dtype=np.int64)
    if not files.are_tiles(begin_PD, begin_PD + size_PD, np.zeros(n_dims, np.int64), np.array(shape, dtype=np.int64)):
        raise ArtefactError(f"checkpoint {directory}: parts of {name} overlap and leave holes")
    return tensor


def consolidate(path: Path, output: Path, with_optimizer: bool = False) -> int:
    """Writes the model of the checkpoint at `path` to the single file `output`; returns the number of tensors.

    Parameters have their names in the model, moments are `optimizer.PARAMETER.exp_avg`. One tensor is in memory at a
    time. `output` appears when it is complete; after an error nothing is left. Every file of the checkpoint is verified
    first. Adapters are merged.

    Args:
        path: a checkpoint, a run, or what else `find_checkpoint` takes.
        with_optimizer: whether moments are written, too.

    Raises:
        ConfigError: `output` exists, or its folder does not.
        ArtefactError: `output` does not end in `.safetensors` or cannot be written, or the checkpoint is missing or
            damaged.
    """
    if output.suffix != files.TENSORS:
        raise ArtefactError(f"--output={output}: expected a name that ends in {files.TENSORS}")
    outputs.new_file("--output", output, makes_folders=False)

    # Check all files first: a damaged checkpoint must not leave half an output.
    directory = files.require_intact(files.find_checkpoint(path))
    tensors = model_tensors(directory)
    if with_optimizer:
        stored = stored_tensors(directory)
        tensors |= {name: tensor for name, tensor in stored.items() if name.startswith(files.OPTIMIZER)}
    state, model = files.read_state(directory)
    metadata = {"format": "pt", "step": str(state.step), "tokens": str(state.tokens), "model": json.dumps(model)}

    # Write under a hidden name and rename, so that `output` is complete whenever it exists.
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(8)}.tmp")
    try:
        write_tensors(temporary, tensors, metadata)
        durable.rename_to_new(temporary, output)
    except FileExistsError as error:
        raise ArtefactError(f"--output={output}: another process has made the file meanwhile; name another") from error
    except OSError as error:
        raise ArtefactError(
            f"--output={output}: could not be written ({error}); free space or name another file"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(tensors)


def write_tensors(
    path: Path, tensors: Mapping[str, StoredTensor | ComputedTensor], metadata: Mapping[str, str]
) -> None:
    """Writes tensors and metadata as a new safetensors file, and flushes it to disk; one tensor is in memory at a time.

    Raises:
        FileExistsError: `path` exists.
        OSError: the file cannot be written; an incomplete file may stay.
    """
    header: dict[str, object] = {METADATA: dict(metadata)}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.bytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    # JSON ignores trailing spaces, so the header can be padded.
    encoded += b" " * (-len(encoded) % ALIGNMENT)

    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(LENGTH_BYTES, "little"))
        file.write(encoded)
        for tensor in tensors.values():
            file.write(tensor.read().data)
        file.flush()
        os.fsync(file.fileno())
