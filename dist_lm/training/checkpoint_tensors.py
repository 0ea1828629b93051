"""Which tensors a checkpoint holds, and where: from the headers of its files. No torch, no process group.

A file of tensors is safetensors: 8 bytes with the length of a JSON header, the header, then the numbers. Beside name,
dtype and shape of each part the header has where in the whole tensor the part belongs (an entry of torch's distributed
checkpoint).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_lm.errors import ArtefactError
from dist_lm.model.size import Shape
from dist_lm.training import checkpoint_files as files

LENGTH_BYTES = 8  # of the header's length, little-endian
NUMPY = {"F16": np.float16, "F32": np.float32, "F64": np.float64}  # by safetensors' names
METADATA, PLACES = "__metadata__", "DCP_SHARDING_INFO"


@dataclass(frozen=True)
class Part:
    """A box of a tensor, in one file."""

    file: Path
    start: int  # byte in the file
    item_bytes: int
    offsets: Shape  # of its first entry in the whole tensor
    shape: Shape


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor, with logical shape."""

    name: str
    dtype: str  # as safetensors calls it: F32
    shape: Shape
    parts: tuple[Part, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * self.parts[0].item_bytes

    def read(self) -> np.ndarray:
        """The bytes of the whole tensor, row by row: (bytes,) uint8, in memory."""
        # entries of so many bytes, whatever they mean: numpy knows no bfloat16
        whole = np.empty(self.shape, np.dtype(f"V{self.parts[0].item_bytes}"))
        for part in self.parts:
            box = tuple(slice(start, start + size) for start, size in zip(part.offsets, part.shape, strict=True))
            whole[box] = np.memmap(part.file, whole.dtype, "r", part.start, part.shape)
        return whole.reshape(-1).view(np.uint8)


def model_weights(directory: Path) -> dict[str, np.ndarray]:
    """The parameters of a checkpoint by the names that the model gives them, fp32.

    Raises:
        ArtefactError: a file cannot be read, or a tensor lacks a part of it.
    """
    return {
        name.removeprefix(files.MODEL): _fp32(tensor)
        for name, tensor in stored_tensors(directory).items()
        if name.startswith(files.MODEL)
    }


def _fp32(tensor: StoredTensor) -> np.ndarray:
    content = tensor.read()
    if tensor.dtype == "BF16":  # the upper half of an fp32
        return (content.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
    return content.view(NUMPY[tensor.dtype]).reshape(tensor.shape).astype(np.float32, copy=False)


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name, in the order of their names.

    Raises:
        ArtefactError: a file cannot be read, or a tensor lacks a part of it.
    """
    dtypes: dict[str, str] = {}
    parts: dict[str, list[Part]] = {}
    for file in sorted(directory.glob(f"*{files.TENSORS}")):
        header, start = read_header(file)
        try:
            places = json.loads(header.pop(METADATA)[PLACES])
            for name, entry in header.items():
                shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
                if size := math.prod(shape):  # a rank may have nothing but padding
                    offsets = tuple(places[name]["saved_offsets"])
                    parts.setdefault(name, []).append(Part(file, start + first, (last - first) // size, offsets, shape))
                    dtypes[name] = entry["dtype"]
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(f"{file}: its header is not that of a checkpoint ({error!r})") from error
    return {name: _whole(directory, name, dtypes[name], parts[name]) for name in sorted(parts)}


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """(the header of a safetensors file, the byte at which the numbers begin).

    Raises:
        ArtefactError: it is not such a file.
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
            f"checkpoint {directory}: {name} has {found:,} of {tensor.elements:,} elements; a file with tensors is "
            "missing, or one is there that is not part of it"
        )
    return tensor
