"""The tensors of a checkpoint without torch and without a process group: found by headers, read, written to one file.

The files are safetensors: 8 bytes with the length of a JSON header, the header, then the numbers. The header has name,
dtype and shape of every part, and its place in the whole tensor (an entry of torch's distributed checkpoint).
"""

import json
import math
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_lm.errors import ArtefactError
from dist_lm.model.size import Shape
from dist_lm.storage import durable
from dist_lm.training import checkpoint_files as files

LENGTH_BYTES = 8  # of the field with the length of the header, little-endian
ALIGNMENT = 8  # bytes; the numbers start at a multiple, so that they can be mapped
METADATA, PLACES = "__metadata__", "DCP_SHARDING_INFO"


@dataclass(frozen=True)
class Part:
    """A box of a tensor in one file."""

    file: Path
    start: int  # byte offset in the file
    item_bytes: int
    offsets: Shape  # indices of its first entry in the whole tensor
    shape: Shape


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor of logical shape."""

    name: str
    dtype: str  # name of safetensors, such as F32
    shape: Shape
    parts: tuple[Part, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * self.parts[0].item_bytes

    def read(self) -> np.ndarray:
        """The bytes of the whole tensor in row-major order: (bytes,) uint8."""
        # opaque entries of the right size: numpy has no bfloat16
        whole = np.empty(self.shape, np.dtype(f"V{self.parts[0].item_bytes}"))
        for part in self.parts:
            box = tuple(slice(start, start + size) for start, size in zip(part.offsets, part.shape, strict=True))
            whole[box] = np.memmap(part.file, whole.dtype, "r", part.start, part.shape)
        return whole.reshape(-1).view(np.uint8)


@dataclass(frozen=True)
class MadeTensor:
    """A whole tensor whose bytes are computed when they are written."""

    dtype: str  # name of safetensors, such as F32
    shape: Shape
    bytes: int
    make: Callable[[], np.ndarray]

    def read(self) -> np.ndarray:
        """The bytes in row-major order: (bytes,) uint8."""
        return self.make()


def model_weights(directory: Path) -> dict[str, np.ndarray]:
    """The parameters of a checkpoint, by their names in the model, fp32.

    Raises:
        ArtefactError: a file cannot be read, or a part of a tensor is missing.
    """
    return {
        name: tensor.read().view(np.float32).reshape(tensor.shape) for name, tensor in model_tensors(directory).items()
    }


def model_tensors(directory: Path) -> dict[str, StoredTensor | MadeTensor]:
    """The parameters of a checkpoint by their names in the model, sorted by name or in the order of the model. Adapters
    are merged into the parameters of their base.

    Raises:
        ArtefactError: a file cannot be read, a part of a tensor is missing, or the base is gone or has changed.
    """
    if files.read_adapters(directory) is not None:
        from dist_lm.training.adapters import merged_tensors  # needs torch

        return merged_tensors(directory)
    return {
        name.removeprefix(files.MODEL): tensor
        for name, tensor in stored_tensors(directory).items()
        if name.startswith(files.MODEL)
    }


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name, sorted by name.

    Raises:
        ArtefactError: a file cannot be read, or a part of a tensor is missing.
    """
    dtypes: dict[str, str] = {}
    parts: dict[str, list[Part]] = {}
    for file in sorted(directory.glob(f"*{files.TENSORS}")):
        header, start = read_header(file)
        try:
            places = json.loads(header.pop(METADATA)[PLACES])
            for name, entry in header.items():
                shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
                if size := math.prod(shape):  # a rank may hold padding alone
                    offsets = tuple(places[name]["saved_offsets"])
                    parts.setdefault(name, []).append(Part(file, start + first, (last - first) // size, offsets, shape))
                    dtypes[name] = entry["dtype"]
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(f"{file}: the header is not that of a checkpoint ({error!r})") from error
    return {name: _whole(directory, name, dtypes[name], parts[name]) for name in sorted(parts)}


def tensors_in(file: Path) -> dict[str, StoredTensor]:
    """The tensors of any safetensors file, each of them whole.

    Raises:
        ArtefactError: the file cannot be read.
    """
    header, start = read_header(file)
    header.pop(METADATA, None)
    found = {}
    try:
        for name, entry in header.items():
            shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
            part = Part(file, start + first, (last - first) // max(math.prod(shape), 1), (0,) * len(shape), shape)
            found[name] = StoredTensor(name, entry["dtype"], shape, (part,))
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(f"{file}: the header is not that of safetensors ({error!r})") from error
    if found and file.stat().st_size < max(tensor.parts[0].start + tensor.bytes for tensor in found.values()):
        raise ArtefactError(f"{file}: cut short: expected more bytes by its header; copy it again")
    return found


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """(header of a safetensors file, byte offset of the numbers).

    Raises:
        ArtefactError: `file` is no safetensors file.
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(LENGTH_BYTES), "little")
            if length > file.stat().st_size:
                raise ValueError(f"a header of {length} bytes")
            return dict(json.loads(opened.read(length))), LENGTH_BYTES + length
    except (OSError, ValueError, TypeError) as error:
        raise ArtefactError(f"{file}: not a safetensors file ({error})") from error


def _whole(directory: Path, name: str, dtype: str, parts: list[Part]) -> StoredTensor:
    shape = tuple(max(part.offsets[dim] + part.shape[dim] for part in parts) for dim in range(len(parts[0].shape)))
    tensor = StoredTensor(name, dtype, shape, tuple(parts))
    found = sum(math.prod(part.shape) for part in parts)
    if found != tensor.elements:
        raise ArtefactError(
            f"checkpoint {directory}: {name} has {found:,} of {tensor.elements:,} elements; a file of tensors is "
            "missing, or a file is there that does not belong to the checkpoint"
        )
    return tensor


def consolidate(path: Path, output: Path, with_optimizer: bool = False) -> int:
    """Write the model of the checkpoint at `path` to the single file `output`; returns the number of tensors.

    Parameters have their names in the model, moments are `optimizer.PARAMETER.exp_avg`. One tensor is in memory at a
    time. `output` appears when it is complete.

    Raises:
        ArtefactError: `output` exists or cannot be written, or the checkpoint is damaged.
    """
    if output.suffix != files.TENSORS:
        raise ArtefactError(f"--output={output}: expected a name that ends in {files.TENSORS}")
    if output.exists():
        raise ArtefactError(f"--output={output}: the file exists; name another file or remove it first")
    if not output.parent.is_dir():
        raise ArtefactError(f"--output={output}: the folder {output.parent} does not exist; create it first")
    directory = files.require_intact(files.find_checkpoint(path))
    tensors = model_tensors(directory)
    if with_optimizer:
        stored = stored_tensors(directory)
        tensors |= {name: tensor for name, tensor in stored.items() if name.startswith(files.OPTIMIZER)}
    state, model = files.read_state(directory)
    metadata = {"format": "pt", "step": str(state.step), "tokens": str(state.tokens), "model": json.dumps(model)}
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(8)}.tmp")
    try:
        write_tensors(temporary, tensors, metadata)
        temporary.rename(output)
        durable.fsync_directory(output.parent)
    except OSError as error:
        raise ArtefactError(
            f"--output={output}: could not be written ({error}); free space or name another file"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(tensors)


def write_tensors(path: Path, tensors: Mapping[str, StoredTensor | MadeTensor], metadata: Mapping[str, str]) -> None:
    """Write the new file `path`, and flush it to disk; one tensor is in memory at a time."""
    header: dict[str, object] = {METADATA: dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end + tensor.bytes]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        end = offsets[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(LENGTH_BYTES, "little"))
        file.write(encoded)
        for tensor in tensors.values():
            file.write(tensor.read().data)
        file.flush()
        os.fsync(file.fileno())
