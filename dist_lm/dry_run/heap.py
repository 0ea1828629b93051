"""Plays glibc's malloc: the memory that it holds for the tensors of a CPU rank.

It follows `malloc/malloc.c` of glibc 2.41 for one arena. A request takes the smallest free block that it fits; else it
takes from the end of the heap, which grows by the request and a pad. Only if the end has no room, a request of the
threshold's size gets a mapping of its own, which goes back to the kernel when it is freed; the heap never shrinks.
Memory of the heap that was written to stays resident. Arenas of other threads are not played.
"""

from bisect import bisect_left, insort

MIB = 1 << 20
HEAP_OF_PROGRAM = 117 * MIB
"""Bytes that a rank's libraries have allocated before the model (measured by mallinfo2: 116 to 117 MiB)."""
BESIDE_TENSORS = 23 * MIB
"""Bytes of a rank that come with its first step and belong to no tensor: code of libraries, read from their files (17
to 19 MiB), and small objects (5 MiB); measured by /proc/self/status and mallinfo2."""
BETWEEN_TENSORS = 64 << 10
"""Bytes behind each tensor that small objects take. Without them, a tensor would fit exactly where one of its size was
freed. The one fitted number here, of 0, 4, 16 and 64 KiB (docs/decisions.md)."""

HEADER, GRAIN, SMALLEST = 8, 16, 32  # of malloc's chunks
ALIGNMENT = 64  # of torch's tensors on a CPU
PAGE = 4096


class Heap:
    """The heap of one process; sizes and addresses are bytes. Finding one of n free blocks takes O(log n)."""

    def __init__(self, threshold: int, pad: int, used: int) -> None:
        """
        Args:
            threshold: smallest size that may get a mapping of its own (MALLOC_MMAP_THRESHOLD_).
            pad: the heap grows by so much more than needed (MALLOC_TOP_PAD_).
            used: allocated before; it lies in front and is not counted in `resident`.
        """
        self._threshold = threshold
        self._pad = pad
        self._top = 0  # address behind the last block
        self._end = -used % max(pad, PAGE)  # address that the heap has grown to
        self._written = 0  # address behind the last byte that was written to
        self._mapped = 0  # bytes of mappings
        self._sizes: dict[int, int] = {}  # address of an allocated block -> size
        self._mappings: dict[int, int] = {}  # number below 0 -> size
        self._n_mappings = 0
        self._free: list[tuple[int, int]] = []  # (size, address), sorted
        self._free_size: dict[int, int] = {}  # address of a free block -> size
        self._free_start: dict[int, int] = {}  # address behind a free block -> its address

    @property
    def resident(self) -> int:
        """Returns the bytes that are in memory now."""
        return self._written + self._mapped

    def allocate(self, size: int) -> int:
        """Allocates the memory of a tensor and returns its address, for `free`."""
        # posix_memalign asks for more than it keeps, so that it finds an aligned address inside.
        chunk = _chunk(size)
        asked = _chunk(chunk + ALIGNMENT + SMALLEST)

        position = bisect_left(self._free, (asked, 0))
        if position < len(self._free):
            length, start = self._free[position]
            self._take(start)
        else:
            if self._end - self._top < asked + SMALLEST:
                if asked >= self._threshold:
                    return self._map(size)
                growth = asked + SMALLEST + self._pad - (self._end - self._top)
                self._end += _rounded_up(growth, PAGE)
            start, length = self._top, asked
            self._top += asked

        # The front of an aligned block and what is left behind it are free again.
        first = _rounded_up(start + GRAIN, ALIGNMENT) - GRAIN
        if 0 < first - start < SMALLEST:
            first += ALIGNMENT
        end = start + length
        if end - first - chunk >= SMALLEST:
            end = first + chunk
            self._release(end, start + length - end)
        if first > start:
            self._release(start, first - start)
        self._sizes[first] = end - first
        self._written = max(self._written, end)
        return first

    def free(self, address: int) -> None:
        """Frees what `allocate` returned."""
        if address < 0:
            self._mapped -= self._mappings.pop(address)
        else:
            self._release(address, self._sizes.pop(address))

    def _map(self, size: int) -> int:
        self._n_mappings += 1
        number = -self._n_mappings
        self._mappings[number] = _rounded_up(size + GRAIN + ALIGNMENT, PAGE)
        self._mapped += self._mappings[number]
        return number

    def _release(self, start: int, size: int) -> None:
        """Joins a block with free neighbours, and with the end of the heap."""
        if start in self._free_start:
            before = self._free_start[start]
            size += self._take(before)
            start = before
        if start + size in self._free_size:
            size += self._take(start + size)
        if start + size == self._top:
            self._top = start
            return
        insort(self._free, (size, start))
        self._free_size[start] = size
        self._free_start[start + size] = start

    def _take(self, start: int) -> int:
        """Removes a free block and returns its size."""
        size = self._free_size.pop(start)
        del self._free_start[start + size]
        del self._free[bisect_left(self._free, (size, start))]
        return size


def _chunk(size: int) -> int:
    """Returns the size of malloc's chunk for a request."""
    return max(SMALLEST, _rounded_up(size + HEADER, GRAIN))


def _rounded_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
