"""Values with large arrays, in memory that the processes of a node share.

A value is written once, as `messages.encode` has it, into memory without a name. Other processes open it in `/proc` and
use the arrays where they lie: a process that writes to one gets a copy of the pages that it changes. The memory is free
when the last process has let go of it, so a process that is killed leaves nothing behind.
"""

import errno
import logging
import mmap
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist

from dist_lm.parallel.messages import decode, pieces_of

log = logging.getLogger(__name__)

HAS_SHARED_MEMORY = sys.platform == "linux"
MOST_PIECES = 512  # of one system call; Linux takes 1,024


class MemoryPlace(NamedTuple):
    """Where the memory of a process is found, and what tells it from any other file."""

    process: int
    descriptor: int
    device: int  # of the file system, with `inode`: no two files of a node have both
    inode: int


NOWHERE = MemoryPlace(-1, -1, -1, -1)


class NodeMemory:
    """Memory without a name: the bytes of an encoded value, which nobody changes, or those of a copy for a save.

    It lives as long as this object, an array that was read from it, or another process that has opened it.
    """

    def __init__(self, descriptor: int) -> None:
        """Takes over an open file descriptor."""
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size  # bytes

    @classmethod
    def of(cls, value: Any) -> Self:
        """Writes a value to new memory and returns that.

        Raises:
            TypeError: it is of none of the types that `messages.decode` reads.
            OSError: no memory is left.
        """
        descriptor = os.memfd_create("dist_lm")
        try:
            pieces = [memoryview(piece) for piece in pieces_of(value)]
            while pieces:
                written = os.writev(descriptor, pieces[:MOST_PIECES])
                # A call writes 2 GiB at most.
                while pieces and written >= len(pieces[0]):
                    written -= len(pieces.pop(0))
                if pieces:
                    pieces[0] = pieces[0][written:]
            return cls(descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def opened(cls, place: MemoryPlace) -> Self:
        """Returns the memory of another process of this user on this node, opened to read.

        Raises:
            OSError: the process has ended or closed it, this process may not open it, or another file is in its place
                (FileNotFoundError).
        """
        path = Path(f"/proc/{place.process}/fd/{place.descriptor}")
        # In another PID namespace the number is another process's; to open a pipe of it could wait forever.
        status = path.stat()
        if (status.st_dev, status.st_ino) != (place.device, place.inode):
            raise FileNotFoundError(errno.ENOENT, "another file than the memory", str(path))
        return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    @property
    def place(self) -> MemoryPlace:
        """Where other processes find this memory while it is open here."""
        status = os.fstat(self._descriptor)
        return MemoryPlace(os.getpid(), self._descriptor, status.st_dev, status.st_ino)

    def fileno(self) -> int:
        return self._descriptor

    def read(self, expected: Any) -> Any:
        """Returns the value, whose arrays lie in this memory; a change of one is not seen elsewhere.

        Args:
            expected: its type, see `messages.decode`.

        Raises:
            MessageError: the bytes are not such a value.
        """
        # Pages are shared until this process writes to them.
        mapped = mmap.mmap(self._descriptor, self.size, access=mmap.ACCESS_COPY)
        return decode(memoryview(mapped), expected)

    def close(self) -> None:
        """Gives up the descriptor; arrays that were read stay."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


def share_memory(memory: NodeMemory | None, local_rank: int) -> NodeMemory | None:
    """Returns the first rank's memory on every rank (collective): the ranks of its node open it, and each other node
    has one copy, which its first rank receives.

    Returns None on every rank if one of them cannot open the memory of another: a container or a security module can
    forbid it, and ranks of one node can have PID namespaces of their own.

    Args:
        memory: read on the first rank alone.
        local_rank: number of this rank on its node; ranks of a node have consecutive numbers.

    Raises:
        OSError: the first rank of a node has no memory left.
    """
    own_rank = dist.get_rank()
    first_of_node = own_rank - local_rank
    size_and_firsts = _gathered([memory.size if memory else 0, first_of_node])
    size = size_and_firsts[0][0]
    firsts = sorted({first for _, first in size_and_firsts})
    if own_rank in firsts:
        memory = _passed_on(memory, size, firsts, firsts.index(own_rank))

    memory_places = _gathered(list(memory.place if memory else NOWHERE))
    if own_rank != first_of_node:
        try:
            memory = NodeMemory.opened(MemoryPlace(*memory_places[first_of_node]))
        except OSError as error:
            log.info("rank %d cannot open the memory of rank %d: %s", own_rank, first_of_node, error)

    # Whoever has the memory keeps it open until all others have tried to open it, and all go on in the same way.
    if all(has_memory for (has_memory,) in _gathered([memory is not None])):
        return memory
    if memory:
        memory.close()
    return None


def open_memories(
    memory: NodeMemory | None, local_rank: int, group: dist.ProcessGroup | None = None
) -> dict[int, NodeMemory] | None:
    """Returns the memory of each rank of this node, by rank, in ascending order (collective).

    Returns None on every rank of the node if one of them has no memory or cannot open that of another, see
    `share_memory`. This does not affect other nodes.

    Args:
        local_rank: number of this rank on its node; ranks of a node have consecutive numbers.
        group: all ranks; None: the default group.
    """
    own_rank = dist.get_rank(group)
    first_of_node = own_rank - local_rank
    firsts_and_places = _gathered([first_of_node, *(memory.place if memory else NOWHERE)], group)
    ranks = [rank for rank, (first, *_) in enumerate(firsts_and_places) if first == first_of_node]

    memories: dict[int, NodeMemory] = {}
    for rank in ranks:
        place = MemoryPlace(*firsts_and_places[rank][1:])
        try:
            opened = memory if rank == own_rank else NodeMemory.opened(place)
        except OSError as error:
            log.info("rank %d cannot open the memory of rank %d: %s", own_rank, rank, error)
            continue
        if opened is not None:
            memories[rank] = opened

    # Ranks of a node go on in the same way, or two of them would write the same shards.
    has_all = _gathered([len(memories) == len(ranks)], group)
    if all(has_all[rank][0] for rank in ranks):
        return memories
    for rank, opened in memories.items():
        if rank != own_rank:
            opened.close()
    return None


def _passed_on(memory: NodeMemory | None, size: int, firsts: list[int], number: int) -> NodeMemory:
    """Returns the memory on the first rank of a node: a tree of nodes passes it on, each to two others.

    Args:
        firsts: the first ranks of all nodes; `number` is the place of this one.
    """
    is_source = memory is not None
    if memory is None:
        descriptor = os.memfd_create("dist_lm")
        os.ftruncate(descriptor, size)
        memory = NodeMemory(descriptor)

    receivers = firsts[2 * number + 1 : 2 * number + 3]
    if is_source and not receivers:
        return memory
    with mmap.mmap(memory.fileno(), size, access=mmap.ACCESS_COPY if is_source else mmap.ACCESS_WRITE) as mapped:
        content = torch.frombuffer(mapped, dtype=torch.uint8)
        if not is_source:
            dist.recv(content, firsts[(number - 1) // 2])
        for receiver in receivers:
            dist.send(content, receiver)
        # A mapping ends after the tensors that lie in it.
        del content
    return memory


def _gathered(numbers: list[int], group: dist.ProcessGroup | None = None) -> list[list[int]]:
    """Returns as many numbers of each rank (collective)."""
    own_numbers = torch.tensor(numbers, dtype=torch.int64)
    gathered = torch.empty(dist.get_world_size(group) * len(numbers), dtype=torch.int64)
    dist.all_gather_into_tensor(gathered, own_numbers, group=group)
    return gathered.view(-1, len(numbers)).tolist()
