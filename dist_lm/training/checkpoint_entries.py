"""Reads entries of a tensor from the file that holds a part of it.

Files are read and never mapped. A mapped file that shrinks, or lies on a disk or a mount that fails, ends the process
with SIGBUS; a read raises an error, so that a server keeps its weights and ranks end together.
"""

import math
import os
from collections.abc import Sequence
from io import BufferedReader

import numpy as np

Box = tuple[slice, ...]  # indices of each dimension

LONG_ROW = 64 << 10  # bytes; shorter rows are read whole, with what is not wanted: a call costs more
BLOCK = 1 << 20  # bytes of rows that are read at once


class ShortFileError(ValueError):
    """A file ends before the entries that its header announces."""


def read_part(file: BufferedReader, start: int, target: np.ndarray) -> None:
    """Fills an array with all entries of a part, as `read_entries` does; the array has the shape of the part."""
    read_entries(file, start, target.shape, tuple(slice(0, size) for size in target.shape), target)


def read_entries(file: BufferedReader, start: int, shape: Sequence[int], box: Box, target: np.ndarray) -> None:
    """Fills an array with the entries in a box of a part. Needs BLOCK bytes of memory beside it.

    Args:
        start: byte offset in the file of the first entry of the part, which is stored in row-major order.
        shape: of the part.
        box: of the part.
        target: has the shape of the box and entries of the right size; its rows may lie apart.

    Raises:
        ShortFileError: the file ends before.
        OSError: the file cannot be read.
    """
    has_whole_rows = all(cut == slice(0, size) for cut, size in zip(box[1:], shape[1:], strict=True))
    row_bytes = target.itemsize * math.prod(shape[1:])
    first_row = box[0].start if box else 0
    if has_whole_rows and target.flags.c_contiguous:
        _read_exactly(file, start + first_row * row_bytes, target)
        return

    if row_bytes >= LONG_ROW and len(shape) > 1:
        for row in range(len(target)):
            read_entries(file, start + (first_row + row) * row_bytes, shape[1:], box[1:], target[row])
        return

    n_at_once = max(1, BLOCK // max(1, row_bytes))
    for begin in range(0, len(target), n_at_once):
        rows = np.empty((min(n_at_once, len(target) - begin), *shape[1:]), target.dtype)
        _read_exactly(file, start + (first_row + begin) * row_bytes, rows)
        target[begin : begin + len(rows)] = rows[:, *box[1:]]


def _read_exactly(file: BufferedReader, start: int, target: np.ndarray) -> None:
    content = target.reshape(-1).view(np.uint8).data
    position = 0
    # The kernel reads at most 2 GiB at once.
    while position < content.nbytes:
        n_read = os.preadv(file.fileno(), [content[position:]], start + position)
        if n_read == 0:
            raise ShortFileError(f"{file.name} is shorter than its header says: it ends before byte {start + position}")
        position += n_read
