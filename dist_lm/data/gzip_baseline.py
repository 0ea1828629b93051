"""What `gzip -9` makes of the held-out documents, one by one: the figure that bits per byte stands beside."""

import gzip
from collections.abc import Iterable


def gzip_bits_per_byte(documents: Iterable[tuple[str, bytes]]) -> dict[str, float]:
    """Bits of the gzip file per byte of text: keys `all` and each language.

    Args:
        documents: (language, UTF-8 text) of each document.
    """
    sums: dict[str, tuple[int, int]] = {}
    for language, text in documents:
        compressed = len(gzip.compress(text, compresslevel=9, mtime=0))
        for key in ("all", language):
            bits, size = sums.get(key, (0, 0))
            sums[key] = (bits + 8 * compressed, size + len(text))
    return {key: bits / size for key, (bits, size) in sums.items() if size}
