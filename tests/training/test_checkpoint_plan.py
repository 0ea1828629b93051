"""Which rank writes which shards follows from the layout alone: each once, in few files, about equally many bytes."""

import errno
import math
import mmap
import os
import resource
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import HuggingFaceStorageReader, load

from dist_lm.errors import UserError
from dist_lm.parallel.mesh import World
from dist_lm.training import checkpoint_saver
from dist_lm.training.checkpoint_saver import ShardCopy, TensorWriter, names_to_write, plan_of
from dist_lm.training.checkpoint_writer import write_files

CPU = torch.device("cpu")


def on_meta(*sizes: int) -> dict[str, torch.Tensor]:
    return {f"model.{number}": torch.empty(size, device="meta") for number, size in enumerate(sizes)}


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(0, 1000), max_size=20), n_ranks=st.integers(1, 9), replica_bytes=st.integers(1, 5000))
def test_ranks_with_the_same_tensors_write_each_once_and_equally_much(sizes, n_ranks, replica_bytes):
    """Finds a tensor that no rank writes, or two do, and a rank that writes far more than others."""
    tensors = on_meta(*sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_saver, "REPLICA_BYTES", replica_bytes)
        names = [names_to_write(tensors, World(rank, n_ranks, rank, CPU)) for rank in range(n_ranks)]
    assert Counter(name for of_rank in names for name in of_rank) == Counter(list(tensors))

    loads = [sum(tensors[name].nbytes for name in of_rank) for of_rank in names]
    writing = loads[: min(n_ranks, max(1, sum(loads) // replica_bytes))]
    assert sum(writing) == sum(loads)
    assert max(writing) - min(writing) <= max((tensor.nbytes for tensor in tensors.values()), default=0)


def test_what_is_small_is_in_one_file():
    """Finds scalars that are spread over all ranks: whoever continues would open a file for each."""
    tensors = on_meta(*[1] * 64)
    plans = [plan_of(tensors, World(rank, 8, rank, CPU)) for rank in range(8)]
    assert [len(plan) for plan in plans] == [1] + [0] * 7


def test_no_two_parts_share_memory_of_the_copy():
    """Finds an overlap, and entries whose address is no multiple of their size."""
    tensors = {name: torch.empty(3, dtype=dtype) for name, dtype in (("a", torch.bfloat16), ("b", torch.float64))}
    tensors["c"] = torch.empty(())
    (file,) = plan_of(tensors, World(0, 1, 0, CPU))
    ends = [0]
    for part in file.parts:
        assert part.begin >= ends[-1]
        assert part.begin % tensors[part.name].itemsize == 0
        assert part.bytes == tensors[part.name].nbytes == math.prod(part.shape) * tensors[part.name].itemsize
        ends.append(part.begin + part.bytes)


def test_torch_reads_the_files(tmp_path):
    """Finds headers that torch's own reader of sharded safetensors does not take."""
    tensors = {
        "model.a": torch.randn(3, 5),
        "model.b": torch.randn(7).bfloat16(),
        "optimizer.a.step": torch.tensor(4.0),
    }
    plan = plan_of(tensors, World(0, 1, 0, CPU))
    write_files(tmp_path, plan, TensorWriter(plan, tensors).bytes_of)

    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load(loaded, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.skipif(sys.platform != "linux", reason="no process maps the copy elsewhere")
def test_a_copy_beyond_the_limit_on_files_stays_in_the_rank(monkeypatch, caplog):
    """Finds a run that trains up to its first save, and ends there because `ulimit -f` is smaller than the copy."""
    monkeypatch.setattr(checkpoint_saver, "PROCESS_BYTES", 0)
    tensors = {"model.a": torch.arange(4096.0)}
    plan = plan_of(tensors, World(0, 1, 0, CPU))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        copy = ShardCopy(plan, CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert copy.descriptor == -1
    assert "File too large" in caplog.text
    assert "ulimit -f" in caplog.text

    copy.take(tensors)
    assert torch.equal(copy.values(copy.parts[0]), tensors["model.a"])
    copy.close()


def test_a_copy_without_memory_names_the_setting_that_does_without(monkeypatch):
    """Finds a bare OSError, which says neither what was too large nor what to do."""

    def refuse(*arguments):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(UserError, match=r"copy of 12 bytes .*Cannot allocate memory.*stage\.checkpoint_async=false"):
        ShardCopy(plan_of({"model.a": torch.zeros(3)}, World(0, 1, 0, CPU)), CPU)


@pytest.mark.skipif(sys.platform != "linux", reason="no process maps the copy elsewhere")
def test_the_copy_has_its_memory_before_it_is_written(monkeypatch):
    """Finds pages that are missing when the copy is made: writing there ends the rank by SIGBUS, without a word."""
    monkeypatch.setattr(checkpoint_saver, "PROCESS_BYTES", 0)
    copy = ShardCopy(plan_of({"model.a": torch.zeros(1 << 20)}, World(0, 1, 0, CPU)), CPU)
    assert os.fstat(copy.descriptor).st_blocks * 512 >= copy.bytes
    copy.close()
