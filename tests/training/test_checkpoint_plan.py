"""Which rank saves and writes which shards follows from the layout alone: each once, in few files a node."""

import errno
import math
import mmap
import os
import resource
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import HuggingFaceStorageReader, load

from dist_lm.errors import UserError
from dist_lm.training import checkpoint_plan
from dist_lm.training.checkpoint_plan import file_numbers, joined_boxes, names_to_save, plan_of, saved_shards
from dist_lm.training.checkpoint_saver import ShardCopy, TensorWriter
from dist_lm.training.checkpoint_writer import Piece, PlannedPart, put_together, write_files

CPU = torch.device("cpu")


def on_meta(*sizes: int) -> dict[str, torch.Tensor]:
    return {f"model.{number}": torch.empty(size, device="meta") for number, size in enumerate(sizes)}


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(0, 1000), max_size=20), n_ranks=st.integers(1, 9), replica_bytes=st.integers(1, 5000))
def test_ranks_with_the_same_tensors_save_each_once_and_equally_much(sizes, n_ranks, replica_bytes):
    """Finds a tensor that no rank saves, or two do, and a rank that saves far more than others."""
    tensors = on_meta(*sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_plan, "REPLICA_BYTES", replica_bytes)
        names = [names_to_save(tensors, rank, n_ranks) for rank in range(n_ranks)]
    assert Counter(name for of_rank in names for name in of_rank) == Counter(list(tensors))

    loads = [sum(tensors[name].nbytes for name in of_rank) for of_rank in names]
    saving = loads[: min(n_ranks, max(1, sum(loads) // replica_bytes))]
    assert sum(saving) == sum(loads)
    assert max(saving) - min(saving) <= max((tensor.nbytes for tensor in tensors.values()), default=0)


def test_what_is_small_is_in_one_file():
    """Finds scalars that are spread over all ranks: whoever continues would open a file for each."""
    tensors = on_meta(*[1] * 64)
    plans = [plan_of(tensors, 8, [rank]) for rank in range(8)]
    assert [len(plan) for plan in plans] == [1] + [0] * 7


def test_no_two_parts_share_memory_of_the_copy():
    """Finds an overlap, and entries whose address is no multiple of their size."""
    tensors = {name: torch.empty(3, dtype=dtype) for name, dtype in (("a", torch.bfloat16), ("b", torch.float64))}
    tensors["c"] = torch.empty(())
    ends = [0]
    for shard in saved_shards(tensors, 0, 1):
        assert shard.begin >= ends[-1]
        assert shard.begin % tensors[shard.name].itemsize == 0
        assert shard.bytes == tensors[shard.name].nbytes == math.prod(shard.shape) * tensors[shard.name].itemsize
        ends.append(shard.begin + shard.bytes)


SHAPE = (7, 10)  # of the tensor that a grid of ranks holds


def grid_piece(rank: int, rows: tuple[int, int], columns: tuple[int, int]) -> Piece:
    shape = (rows[1] - rows[0], columns[1] - columns[0])
    return Piece(rank, 0, (rows[0], columns[0]), shape)


@settings(deadline=None, max_examples=50)
@given(
    row_cuts=st.sets(st.integers(1, SHAPE[0] - 1)),
    column_cuts=st.sets(st.integers(1, SHAPE[1] - 1)),
    order=st.randoms(use_true_random=False),
)
def test_the_shards_of_a_grid_are_one_part_with_the_entries_of_the_tensor(row_cuts, column_cuts, order):
    """Finds shards of tensor parallelism put one after the other although their rows alternate, and a part too many."""
    rows, columns = sorted({0, *row_cuts, SHAPE[0]}), sorted({0, *column_cuts, SHAPE[1]})
    boxes = [(one, other) for one in pairwise(rows) for other in pairwise(columns)]
    pieces = [grid_piece(rank, *box) for rank, box in enumerate(boxes)]
    order.shuffle(pieces)

    (joined,) = joined_boxes(pieces)
    value = np.arange(math.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    copies = {
        rank: np.ascontiguousarray(value[slice(*one), slice(*other)]).reshape(-1).view(np.uint8)
        for rank, (one, other) in enumerate(boxes)
    }
    part = PlannedPart("model.a", "I16", (0, 0), SHAPE, value.nbytes, tuple(joined))
    assert np.array_equal(put_together(part, copies).view(np.int16).reshape(SHAPE), value)


def test_shards_that_make_up_no_box_are_several_parts():
    """Finds a part with a hole: half a grid and one shard more."""
    pieces = [grid_piece(0, (0, 2), (0, 5)), grid_piece(1, (0, 2), (5, 10)), grid_piece(2, (2, 4), (0, 5))]
    groups = joined_boxes(pieces)
    assert sorted(len(group) for group in groups) == [1, 2]
    assert joined_boxes([pieces[0], grid_piece(1, (4, 6), (0, 5))]) == [[pieces[0]], [grid_piece(1, (4, 6), (0, 5))]]


@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=20), file_bytes=st.integers(1, 3000))
def test_parts_go_to_files_in_order_and_fill_them_evenly(sizes, file_bytes):
    """Finds a file too many, one without parts, parts out of order, and a file with far more than its share."""
    numbers = file_numbers(sizes, file_bytes)
    n_files = max(1, sum(sizes) // file_bytes)
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(1, numbers[-1] + 1))
    assert numbers[-1] <= n_files

    loads = Counter()
    for size, number in zip(sizes, numbers, strict=True):
        loads[number] += size
    assert max(loads.values()) <= sum(sizes) / n_files + max(sizes)


def test_torch_reads_the_files(tmp_path):
    """Finds headers that torch's own reader of sharded safetensors does not take."""
    tensors = {
        "model.a": torch.randn(3, 5),
        "model.b": torch.randn(7).bfloat16(),
        "optimizer.a.step": torch.tensor(4.0),
    }
    plan = plan_of(tensors, 1, [0])
    write_files(tmp_path, plan, TensorWriter(plan, tensors).bytes_of)

    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load(loaded, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.skipif(sys.platform != "linux", reason="no process maps the copy elsewhere")
def test_a_copy_beyond_the_limit_on_files_stays_in_the_rank(caplog):
    """Finds a run that trains up to its first save, and ends there because `ulimit -f` is smaller than the copy."""
    tensors = {"model.a": torch.arange(4096.0)}
    shards = saved_shards(tensors, 0, 1)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        copy = ShardCopy(shards, CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert copy.memory is None
    assert "File too large" in caplog.text
    assert "ulimit -f" in caplog.text

    copy.take(tensors)
    assert torch.equal(copy.values(copy.shards[0]), tensors["model.a"])
    copy.close()


def test_a_copy_without_memory_names_the_setting_that_does_without(monkeypatch):
    """Finds a bare OSError, which says neither what was too large nor what to do."""

    def refuse(*arguments):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(UserError, match=r"copy of 12 bytes .*Cannot allocate memory.*stage\.checkpoint_async=false"):
        ShardCopy(saved_shards({"model.a": torch.zeros(3)}, 0, 1), CPU)


@pytest.mark.skipif(sys.platform != "linux", reason="no process maps the copy elsewhere")
def test_the_copy_has_its_memory_before_it_is_written():
    """Finds pages that are missing when the copy is made: writing there ends the rank by SIGBUS, without a word."""
    copy = ShardCopy(saved_shards({"model.a": torch.zeros(1 << 20)}, 0, 1), CPU)
    assert copy.memory is not None
    assert os.fstat(copy.memory.fileno()).st_blocks * 512 >= copy.bytes
    copy.close()
