"""Sorted runs find the same copies as a dictionary in the order of the documents, however keys are divided."""

import multiprocessing
import random
import resource
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dist_lm.data.sorted_runs import (
    RECORD,
    among_runs,
    later_copies,
    merged,
    n_parts,
    n_records,
    read_part,
    records_of,
    write_run,
)

KEY = 16  # bytes
# Keys at the borders of parts, and keys that differ in one half alone.
EDGES = [bytes(KEY), b"\xff" * KEY, bytes(8) + b"\xff" * 8, b"\xff" * 8 + bytes(8), b"\x80" + bytes(15), b"\x7f" * KEY]


def random_tasks(generator: random.Random) -> list[list[bytes]]:
    """Returns the keys of several tasks, of which some have no document."""
    keys = EDGES + [generator.randbytes(KEY) for _ in range(40)]
    return [[generator.choice(keys) for _ in range(generator.choice([0, 1, 30]))] for _ in range(8)]


def copies_by_hand(tasks: Sequence[Sequence[bytes]]) -> set[tuple[int, int]]:
    keys: set[bytes] = set()
    copies = set()
    for task, keys_of_task in enumerate(tasks):
        for number, key in enumerate(keys_of_task):
            if key in keys:
                copies.add((task, number))
            keys.add(key)
    return copies


def write_runs(folder: Path, tasks: Sequence[Sequence[bytes]]) -> list[Path]:
    runs = []
    for task, keys in enumerate(tasks):
        runs.append(folder / f"{task}.run")
        write_run(runs[-1], records_of(keys, task))
    return runs


@pytest.mark.parametrize("seed", range(3))
def test_keys_of_runs_are_those_of_a_set(tmp_path, seed):
    """Would find a key that is taken for another one with an equal half, and a run without documents that is an
    error."""
    *tasks, sought = random_tasks(random.Random(seed))
    sought = sorted({*sought, *EDGES[::2]})
    expected = {key for keys in tasks for key in keys}
    is_among = among_runs(records_of(sought, 9), write_runs(tmp_path, tasks))
    assert is_among.tolist() == [key in expected for key in sought]


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_copies_are_those_of_a_dictionary(tmp_path, parts):
    """Would find a record at the border of a part that is in none or in two, and a copy that stays in place of the
    first document."""
    for seed in range(3):
        tasks = random_tasks(random.Random(seed))
        runs = write_runs(tmp_path, tasks)
        copies = [record for part in range(parts) for record in later_copies(read_part(runs, part, parts))]

        places = {(int(record["task"]), int(record["number"])) for record in copies}
        assert len(copies) == len(places)
        assert places == copies_by_hand(tasks)


def test_the_order_of_runs_does_not_count(tmp_path):
    """Would find a result that depends on which task ended first."""
    runs = write_runs(tmp_path, random_tasks(random.Random(0)))
    expected = read_part(runs, 1, 3)
    assert np.array_equal(read_part(runs[::-1], 1, 3), expected)


def test_a_truncated_run_is_refused(tmp_path):
    """Would find documents that are lost with the end of a run."""
    (run,) = write_runs(tmp_path, [[bytes([number]) * KEY for number in range(5)]])
    run.write_bytes(run.read_bytes()[:-1])
    with pytest.raises(ValueError):
        read_part([run], 0, 1)


def test_parts_grow_with_the_records():
    """Would find a process whose memory grows with the corpus."""
    assert n_parts(0) == 1
    assert n_parts(50_000_000) == 12


@pytest.mark.bars
def test_fifty_million_keys_are_merged_below_a_gigabyte(tmp_path):
    """Would find a merge whose memory grows with the corpus. Measured: the figure of docs/large_corpora.md."""
    generator = np.random.default_rng(0)
    for task in range(25):
        records = np.empty(2_000_000, RECORD)
        for half in ("high", "low"):
            records[half] = generator.integers(0, 2**64, len(records), np.uint64)
        records["task"] = task
        records["number"] = np.arange(len(records))
        write_run(tmp_path / f"{task}.run", merged([records]))
    runs = sorted(tmp_path.glob("*.run"))

    parts = n_parts(sum(map(n_records, runs)))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        peaks = [process.submit(peak_of_part, runs, part, parts).result() for part in range(parts)]
    print(f"peak memory of a process: {max(peaks) / 2**20:.0f} MiB")
    assert max(peaks) < 10**9


def peak_of_part(runs: Sequence[Path], part: int, parts: int) -> int:
    """Merges one part in a process of its own; returns the largest memory of that process so far, bytes."""
    assert not len(later_copies(read_part(runs, part, parts)))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
