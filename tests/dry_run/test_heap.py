"""The heap that a dry run plays for CPU ranks."""

import random
from itertools import pairwise

from dist_lm.dry_run.heap import MIB, Heap
from dist_lm.dry_run.watch import LiveMemory


def heap(threshold: int = 64 * MIB, pad: int = MIB) -> Heap:
    return Heap(threshold, pad, used=0)


def test_freed_memory_of_the_heap_stays_resident_and_is_used_again():
    """Finds a heap that counts live bytes alone, and one that never reuses a hole."""
    played = heap()
    kept = [played.allocate(8 * MIB) for _ in range(4)]
    full = played.resident
    for address in kept[:3]:
        played.free(address)
    assert played.resident == full >= 32 * MIB
    played.allocate(20 * MIB)  # only three joined holes have so much
    assert played.resident == full


def test_a_hole_does_not_fit_its_own_size():
    """posix_memalign asks for more than it keeps; finds a heap that forgets it."""
    played = heap()
    address = played.allocate(8 * MIB)
    played.allocate(MIB)
    before = played.resident
    played.free(address)
    played.allocate(8 * MIB)
    assert played.resident >= before + 8 * MIB


def test_large_blocks_go_back_to_the_kernel_unless_the_end_of_the_heap_has_room():
    """Finds a threshold that is ignored, or that counts before the room at the end does."""
    mapped = heap()
    mapped.free(mapped.allocate(64 * MIB))
    assert mapped.resident == 0

    roomy = heap(pad=256 * MIB)
    roomy.allocate(MIB)  # the heap grows by the pad
    roomy.free(roomy.allocate(64 * MIB))
    assert roomy.resident >= 65 * MIB


def test_blocks_never_overlap():
    """Finds joined or split blocks that are handed out twice."""
    draw = random.Random(0)
    played, blocks = heap(), {}
    for _ in range(2000):
        if blocks and draw.random() < 0.5:
            address = draw.choice([*blocks])
            del blocks[address]
            played.free(address)
        else:
            size = draw.choice((24, 1000, 70_000, 3 * MIB))
            blocks[played.allocate(size)] = size
    ordered = sorted(blocks.items())
    assert all(first + size <= second for (first, size), (second, _) in pairwise(ordered))
    assert played.resident >= sum(blocks.values())


def test_without_a_heap_nothing_is_held():
    """A GPU's allocator is not malloc."""
    memory = LiveMemory(gloo=False)
    memory.reset_peak()
    assert memory.heap_peak == 0
