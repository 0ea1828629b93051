"""Filling the shards of a rank from a checkpoint that any layout wrote.

The first rank reads the headers of all files and sends what they say to the others. Each rank then opens only the files
that hold entries of its shards: a checkpoint of many files and ranks would otherwise be opened files times ranks times.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dist_lm.errors import ArtefactError
from dist_lm.parallel.messages import all_gather, on_first_rank
from dist_lm.parallel.values import shard_box, shard_of
from dist_lm.training.checkpoint_tensors import StoredTensor, stored_tensors

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

Box = tuple[slice, ...]


@dataclass(frozen=True)
class PartsOfTensor:
    """Where the parts of one tensor lie; P parts of D dimensions."""

    dtype: str  # a key of `DTYPES`
    shape: list[int]  # of the whole tensor
    file_P: np.ndarray  # int64 (P,): places in `Contents.files`
    start_P: np.ndarray  # int64 (P,): byte offsets in these files
    offset_PD: np.ndarray  # int64 (P, D): indices in the tensor of the first entry of each part
    size_PD: np.ndarray  # int64 (P, D): shapes of the parts

    def in_box(self, box: Box) -> np.ndarray:
        """Returns the numbers of the parts that have entries in a box of the tensor, int64 (P',): none in an empty
        box."""
        begin_D, end_D = (np.array([getattr(cut, side) for cut in box], dtype=np.int64) for side in ("start", "stop"))
        last_PD = np.minimum(end_D, self.offset_PD + self.size_PD)
        meets_PD = np.maximum(begin_D, self.offset_PD) < last_PD
        return np.flatnonzero(meets_PD.all(axis=1))


@dataclass(frozen=True)
class Contents:
    """What the headers of a checkpoint say: all its files, and its tensors by name."""

    files: list[str]
    tensors: dict[str, PartsOfTensor]


def read(checkpoint: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fills `tensors`, by their names in the checkpoint, in place from the parts that any layout wrote (collective).

    Raises:
        ArtefactError: on every rank, if a tensor is missing in the checkpoint or has another shape there, or any rank
            cannot read a file or a header.
    """
    contents = on_first_rank(lambda: contents_of(stored_tensors(checkpoint)), Contents)
    _check(checkpoint, contents, tensors)

    failure = None
    try:
        _fill(checkpoint, contents, tensors)
    except (OSError, ValueError) as error:  # a bad disk; a file that was cut short since its header was read
        failure = f"{checkpoint}: {error}"

    # A rank that stops alone would leave the others waiting.
    for reason in all_gather(failure, str | None):
        if reason:
            raise ArtefactError(f"checkpoint {checkpoint} cannot be loaded: {reason}")


def contents_of(stored: Mapping[str, StoredTensor]) -> Contents:
    """Returns the tensors of a checkpoint as arrays, which are short to send and fast to search."""
    files = sorted({part.file.name for tensor in stored.values() for part in tensor.parts})
    places = {name: place for place, name in enumerate(files)}

    def array(rows: list[int] | list[tuple[int, ...]], tensor: StoredTensor) -> np.ndarray:
        return np.array(rows, dtype=np.int64).reshape(len(tensor.parts), -1)

    tensors = {}
    for name, tensor in stored.items():
        tensors[name] = PartsOfTensor(
            dtype=tensor.dtype,
            shape=list(tensor.shape),
            file_P=array([places[part.file.name] for part in tensor.parts], tensor)[:, 0],
            start_P=array([part.start for part in tensor.parts], tensor)[:, 0],
            offset_PD=array([part.offsets for part in tensor.parts], tensor),
            size_PD=array([part.shape for part in tensor.parts], tensor),
        )
    return Contents(files, tensors)


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
        OSError: a file cannot be read.
        ValueError: a file is shorter than its header says.
    """
    boxes = {name: shard_box(tensor) for name, tensor in tensors.items()}
    for file, needed in needed_parts(contents, boxes).items():
        content = np.memmap(checkpoint / file, np.uint8, "r")
        for name, number in needed:
            parts, shard = contents.tensors[name], shard_of(tensors[name])
            common, in_part, in_shard = _common_box(parts, number, boxes[name])
            shard[in_shard].copy_(_entries(content, parts, number, in_part).reshape(common))


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


def _entries(content: np.ndarray, parts: PartsOfTensor, number: int, box: Box) -> torch.Tensor:
    """Returns a copy of the entries in a box of one part, one after the other.

    Args:
        content: the bytes of the part's file.

    Raises:
        ValueError: the file is shorter than the part.
    """
    dtype = DTYPES[parts.dtype]
    # numpy has no bfloat16, so entries are opaque and only have the right size.
    opaque = np.dtype(f"V{dtype.itemsize}")
    try:
        array = np.ndarray(parts.size_PD[number].tolist(), opaque, content.data, int(parts.start_P[number]))
    except TypeError as error:
        raise ValueError(f"a file is shorter than its header says ({error})") from None
    # The copy is aligned, which numbers in a file need not be.
    entries = np.array(array[box], order="C").reshape(-1).view(np.uint8)
    return torch.from_numpy(entries).view(dtype)
