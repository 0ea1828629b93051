"""Finds equal keys among more records than memory holds: each task sorts its records, each part merges a range of keys.

A run is a file of the records of one task, sorted by key. A part is a range of keys, and reads from every run only the
records of its range, which a binary search in the mapped file finds. So parts are independent of each other: they are
tasks too, on any node, and nothing is serial. A process holds the records of one part, about `PART_RECORDS` of 24
bytes, in three copies while it sorts them.

Keys are hashes, so that ranges of equal width hold about equally many records. A key that many records share, such as
that of an empty licence file, is in one part whatever the number of its records.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dist_lm.storage import durable

PART_RECORDS = 1 << 22
RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("task", "<u4"), ("number", "<u4")])
"""The key of a text in two halves (`high` holds its first eight bytes), and the place of its document."""


def records_of(keys: Sequence[bytes], task: int) -> np.ndarray:
    """Returns the records of the documents of a task, (documents,) RECORD, sorted by key and then by place.

    Args:
        keys: of each document in its order, 16 bytes.
        task: number of the task in the plan.
    """
    records = np.empty(len(keys), RECORD)
    halves = np.frombuffer(b"".join(keys), ">u8").reshape(-1, 2)
    records["high"], records["low"] = halves[:, 0], halves[:, 1]
    records["task"] = task
    records["number"] = np.arange(len(keys))
    return _sorted(records)


def write_run(path: Path, records: np.ndarray) -> None:
    """Writes a sorted run; the file is there whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    durable.write_bytes(path, records.tobytes())


def n_records(path: Path) -> int:
    """Returns the number of records of a run.

    Raises:
        OSError: there is no such file.
    """
    return path.stat().st_size // RECORD.itemsize


def n_parts(n_records: int) -> int:
    """Returns the number of parts, which depends on the number of records alone and not on the cluster."""
    return max(1, -(-n_records // PART_RECORDS))


def read_part(runs: Sequence[Path], part: int, parts: int) -> np.ndarray:
    """Returns the records of all runs whose keys are in one part, (records,) RECORD, sorted by key and then by place.

    Args:
        runs: files of `write_run`.
        part: from 0; `parts` in all divide the keys into ranges of equal width.

    Raises:
        OSError: a run cannot be read.
        ValueError: a run is truncated.
    """
    first = np.uint64(part * 2**64 // parts)
    last = np.uint64((part + 1) * 2**64 // parts - 1)
    slices = []
    for path in runs:
        if not path.stat().st_size:
            continue  # an empty file cannot be mapped
        run = np.memmap(path, RECORD, "r")
        begin = np.searchsorted(run["high"], first, "left")
        end = np.searchsorted(run["high"], last, "right")
        slices.append(np.array(run[begin:end]))
    return merged(slices)


def merged(slices: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the records of all slices, (records,) RECORD, sorted by key and then by place."""
    return _sorted(np.concatenate([np.empty(0, RECORD), *slices]))


def later_copies(records: np.ndarray) -> np.ndarray:
    """Returns the records that have the key of a record before them: (copies,) RECORD, by key.

    Args:
        records: sorted by key, so that of equal ones the first record stays: that of the first document, unless they
            were ordered anew.
    """
    is_copy = np.zeros(len(records), bool)
    is_copy[1:] = equals_next(records)
    return records[is_copy]


def among_runs(records: np.ndarray, runs: Sequence[Path]) -> np.ndarray:
    """Returns which records have the key of a record of a run: (records,) bool.

    A run costs a binary search for each record, in the mapped file.

    Args:
        records: (records,) RECORD, sorted by key; few beside those of all runs.
        runs: files of `write_run`.

    Raises:
        OSError: a run cannot be read.
        ValueError: a run is truncated.
    """
    is_among = np.zeros(len(records), bool)
    for path in runs:
        if not path.stat().st_size:
            continue  # an empty file cannot be mapped
        run = np.memmap(path, RECORD, "r")
        begins = np.searchsorted(run["high"], records["high"], "left")
        ends = np.searchsorted(run["high"], records["high"], "right")
        for position in np.flatnonzero(ends > begins).tolist():
            lows = run["low"][begins[position] : ends[position]]
            is_among[position] |= bool((lows == records["low"][position]).any())
    return is_among


def with_equal_keys(records: np.ndarray) -> np.ndarray:
    """Returns the records whose key another one has, too, (records,) RECORD, in their order.

    Args:
        records: sorted by key.
    """
    is_equal = equals_next(records)
    has_equal = np.zeros(len(records), bool)
    has_equal[:-1] = is_equal
    has_equal[1:] |= is_equal
    return records[has_equal]


def equals_next(records: np.ndarray) -> np.ndarray:
    """Returns which records have the key of the one behind them: (records - 1,) bool."""
    return (records["high"][:-1] == records["high"][1:]) & (records["low"][:-1] == records["low"][1:])


def _sorted(records: np.ndarray) -> np.ndarray:
    return records[np.lexsort([records[field] for field in ("number", "task", "low", "high")])]
