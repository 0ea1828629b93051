"""Values in memory that the ranks of a node share."""

import os
from dataclasses import dataclass

import numpy as np
import psutil
import pytest

from dist_lm.parallel.mesh import World
from dist_lm.parallel.messages import all_gather
from dist_lm.parallel.node_memory import HAS_SHARED_MEMORY, NodeMemory, share_memory

pytestmark = pytest.mark.skipif(not HAS_SHARED_MEMORY, reason="needs Linux")


@dataclass(frozen=True)
class Value:
    name: str
    small: np.ndarray
    large: np.ndarray


def value_of(n: int) -> Value:
    return Value("x", np.array([True, False, True]), np.arange(n, dtype=np.int64))


def test_a_value_is_read_as_written_and_a_change_of_one_reader_is_its_own():
    """Finds arrays at a wrong place, and a reader that writes into the arrays of another."""
    memory = NodeMemory.of(value_of(1000))
    one, other = memory.read(Value), memory.read(Value)
    memory.close()
    one.large[:] = 7
    assert other.large.tolist() == list(range(1000))
    assert (other.name, other.small.tolist()) == ("x", [True, False, True])
    assert other.large.flags.aligned


def test_a_value_of_many_arrays_is_written_whole():
    """Finds a write that ends with the pieces of one system call."""
    values = [np.full(3, i) for i in range(2000)]
    read = NodeMemory.of(values).read(list[np.ndarray])
    assert [array.tolist() for array in read] == [[i] * 3 for i in range(2000)]


def test_another_file_in_the_place_of_the_memory_is_not_opened():
    """Finds a rank that reads another value, or waits for a pipe, because a process number is of another namespace."""
    memory, other = NodeMemory.of(value_of(3)), NodeMemory.of(value_of(4))
    reader, writer = os.pipe()
    assert NodeMemory.opened(memory.place).read(Value).large.tolist() == [0, 1, 2]
    for descriptor in (other.fileno(), writer):
        with pytest.raises(FileNotFoundError):
            NodeMemory.opened(memory.place._replace(descriptor=descriptor))
    os.close(reader)
    os.close(writer)


def shared(world: World, per_node: int, n: int) -> list:
    """Returns, for each rank: whether it read the value, and the inode of the memory that it has mapped."""
    local_rank = world.rank % per_node
    n_before = psutil.Process().num_fds()
    for size in (n, 3):
        memory = share_memory(NodeMemory.of(value_of(size)) if world.is_first else None, local_rank)
        assert memory is not None
        inode = os.fstat(memory.fileno()).st_ino
        value = memory.read(Value)
        memory.close()
        assert value.large.tolist() == list(range(size))
        inodes = all_gather(inode, int)
    del value, memory
    assert psutil.Process().num_fds() <= n_before
    return inodes


@pytest.mark.cluster
@pytest.mark.parametrize(("ranks_in_all", "per_node"), [(2, 2), (4, 2), (4, 1)])
def test_ranks_of_a_node_share_one_copy_and_each_node_has_its_own(ranks, ranks_in_all, per_node):
    """Finds a rank that copies what its node has, nodes that wait for each other, and descriptors that stay open."""
    inodes = ranks.run(ranks_in_all, shared, per_node, 100_000)
    nodes = [inodes[first : first + per_node] for first in range(0, ranks_in_all, per_node)]
    assert all(len(set(of_node)) == 1 for of_node in nodes)
    assert len(set(inodes)) == len(nodes)
