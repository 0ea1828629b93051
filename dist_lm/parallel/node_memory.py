"""Values with large arrays, in memory that the processes of a node share.

A value is written once, as `messages.encode` has it, into memory without a name. Other processes get a file
descriptor of it, over a socket or from `/proc`, and use the arrays where they lie: a process that writes to one gets a
copy of the pages that it changes. The memory is free when the last process has let go of it, so a process that is
killed leaves nothing behind.
"""

import mmap
import os
import sys
from typing import Any, Self

import torch
import torch.distributed as dist

from dist_lm.parallel.messages import decode, pieces_of

HAS_SHARED_MEMORY = sys.platform == "linux"
MOST_PIECES = 512  # of one system call; Linux takes 1,024


class NodeMemory:
    """The bytes of an encoded value, in memory without a name. Read-only once written.

    It lives as long as this object, an array that was read from it, or another process that has opened it.
    """

    def __init__(self, descriptor: int) -> None:
        """Takes over an open file descriptor."""
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size  # bytes

    @classmethod
    def of(cls, value: Any) -> Self:
        """Writes a value.

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
    def opened(cls, process: int, descriptor: int) -> Self:
        """Opens the memory of another process of this user on this node, by its number there.

        Raises:
            OSError: there is none.
        """
        return cls(os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC))

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


def share_memory(memory: NodeMemory | None, local_rank: int) -> NodeMemory:
    """Returns the first rank's memory on every rank (collective): the ranks of its node open it, and each other node
    has one copy, which its first rank receives.

    Args:
        memory: read on the first rank alone.
        local_rank: number of this rank on its node; ranks of a node have consecutive numbers.

    Raises:
        OSError: a rank cannot open the memory of another, or has no memory left.
    """
    own_rank = dist.get_rank()
    first_of_node = own_rank - local_rank
    size_and_firsts = _gathered([memory.size if memory else 0, first_of_node])
    size = size_and_firsts[0][0]
    firsts = sorted({first for _, first in size_and_firsts})
    if own_rank in firsts:
        memory = _passed_on(memory, size, firsts, firsts.index(own_rank))

    # Whoever has the memory keeps it open until all others have opened it.
    holders = _gathered([os.getpid(), memory.fileno() if memory else -1])
    if memory is None or own_rank != first_of_node:
        memory = NodeMemory.opened(*holders[first_of_node])
    dist.barrier()
    return memory


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


def _gathered(numbers: list[int]) -> list[list[int]]:
    """Returns as many numbers of each rank (collective)."""
    own = torch.tensor(numbers, dtype=torch.int64)
    gathered = torch.empty(dist.get_world_size() * len(numbers), dtype=torch.int64)
    dist.all_gather_into_tensor(gathered, own)
    return gathered.view(-1, len(numbers)).tolist()
