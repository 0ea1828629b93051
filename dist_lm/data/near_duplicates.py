"""Finds texts that are nearly the same: MinHash signatures name candidates, and their exact similarity decides.

The similarity of two texts is the Jaccard index of their sets of five-word windows: the windows that both have, among
those that either has. A word is one of `data.containment`. Texts are taken in order, and a text is dropped if a text
before it, which was not dropped itself, is found to be at least as similar as asked. So each dropped text resembles one
that is left, and chains of slightly changed texts do not drag each other out.

Comparing all pairs would take too long. A signature has 120 numbers: the smallest hash of the text's windows under each
of 120 hash functions, which two texts share with the probability of their similarity (Broder, "On the resemblance and
containment of documents", 1997). Its 20 bands of 6 numbers are compared as a whole: a pair with similarity s has a band
in common with probability 1 - (1 - s^6)^20, which is 0.998 at 0.8 (Leskovec et al., "Mining of Massive Datasets", 3.4);
the other 2 of 1,000 pairs at 0.8 both stay.

Texts are read twice. The first reading writes the bands of all texts to a temporary file, 160 bytes a text; the second
one writes the windows of texts that have a band in common with another one. In memory are four bytes a text, one band
of all texts, and about 12 bytes for each band of a text that another text has, too. Nothing depends on the process: the
same texts in the same order always give the same result.

Many texts that are half alike, such as filled-in forms, share bands and are all kept. So that they cost no square of
their number, a text is compared with at most `COMPARED` others, those with most bands in common.

Dimensions: W windows of a text, T texts, B bands.
"""

import itertools
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, TypeVar

import numpy as np

from dist_lm.data.containment import MARGIN, WindowTable, window_hashes, word_hashes

WINDOW = 5  # words
BANDS, ROWS = 20, 6
BLOCK = 1 << 16  # texts whose bands stand together in the file
PART = 1 << 22  # texts whose hashes of a band are sorted at once
HELD = 64  # texts of a band that later ones are compared with
COMPARED = 64  # texts that a text is compared with
CHUNK = 1 << 12  # windows that are hashed at once: their hashes under all functions take 2 MiB
_GENERATOR = np.random.Generator(np.random.PCG64(20_26))
_FACTORS = _GENERATOR.integers(0, 2**32, (BANDS * ROWS, 1), np.uint32) | np.uint32(1)
_MIXERS = _GENERATOR.integers(0, 2**64, ROWS, np.uint64) | np.uint64(1)

Key = TypeVar("Key")
Texts = Callable[[], Iterator[tuple[bytes, str]]]
"""Yields (key, text) in the same order at each call; no key comes twice."""


def near_duplicates(
    texts: Texts, similarity: float, order_of_texts: Callable[[], np.ndarray] | None = None
) -> dict[bytes, bytes]:
    """Returns the keys of the texts to drop, each with the key of the text before it that it resembles; a text is
    compared with those before it that stay.

    Args:
        texts: yields (key, text); called twice, and must give the same in the same order.
        similarity: the least Jaccard index of five-word windows at which a text is dropped, in (0, 1].
        order_of_texts: returns the numbers of the texts in the order in which 'before' is meant, (T,) int64; called
            after the first reading. None: the order of reading.

    Raises:
        OSError: a temporary file cannot be written.
    """
    shared_bands = common_bands(text_bands(text) for _, text in texts())
    if order_of_texts is None:
        in_order = ((key, partial(text_windows, text)) for key, text in texts())
        return dict(search(shared_bands, in_order, similarity))

    # Texts are compared in another order than they are read, so the windows of all candidates are written first.
    with tempfile.TemporaryFile() as file:
        candidate_windows, keys = _WindowFile(file), []
        is_candidate = shared_bands.bits > 0
        for (key, text), is_written in zip(texts(), is_candidate.tolist(), strict=True):
            if is_written:
                keys.append(key)
                candidate_windows.add(text_windows(text))

        numbers = order_of_texts()
        numbers = numbers[is_candidate[numbers]]
        places = (np.cumsum(is_candidate) - 1)[numbers].tolist()  # in the file
        in_order = ((keys[place], partial(candidate_windows.windows, place)) for place in places)
        return dict(search(shared_bands.of(numbers), in_order, similarity))


def search(
    shared_bands: "SharedBands",
    texts: Iterable[tuple[Key, Callable[[], np.ndarray]]],
    similarity: float,
    is_old: Sequence[bool] | None = None,
) -> Iterator[tuple[Key, Key]]:
    """Yields the key of each text to drop, with the key of the text before it that it resembles.

    Args:
        texts: key of each text, and a function that returns its `text_windows`, which is called if it is needed.
        similarity: as in `near_duplicates`.
        is_old: for each text, whether it was compared with the other old ones before, and stays beside them.
    """
    holders = _Holders(shared_bands)
    keys: list[Key] = []  # of texts that stay
    old_texts: set[int] = set()  # of these, the old ones
    with tempfile.TemporaryFile() as file:
        kept_windows = _WindowFile(file)
        for number, (key, windows_of_text) in enumerate(texts):
            buckets = holders.take_buckets(number)
            if not buckets:
                continue

            windows = windows_of_text()
            text_is_old = is_old is not None and is_old[number]
            compared = [holders.texts(bucket) for bucket in buckets]
            if text_is_old:
                compared = [[text for text in bucket if text not in old_texts] for bucket in compared]
            candidates = _candidates(compared)
            resembled = _resembled(windows, candidates, kept_windows, similarity)
            if resembled is not None:
                yield key, keys[resembled]
                continue

            keys.append(key)
            index = kept_windows.add(windows)
            if text_is_old:
                old_texts.add(index)
            for bucket in buckets:
                holders.add(bucket, index)


def resembling(texts: Iterable[str], sought: Sequence[str], similarity: float) -> Iterator[tuple[int, int]]:
    """Yields (its number, number of the sought text that it resembles most) for each text that is similar enough to
    one. No signature is needed, because the windows of the sought texts are in memory: all such texts are found.

    Args:
        sought: at least one.
        similarity: the least Jaccard index of five-word windows, in (0, 1].
    """
    windows_of_sought = [text_windows(text) for text in sought]
    table = WindowTable([(windows, i) for i, windows in enumerate(windows_of_sought)], np.zeros(len(sought), bool))
    for number, text in enumerate(texts):
        windows = text_windows(text)
        _, ids = table.find(windows)
        if not len(ids):
            continue

        n_common = np.bincount(table.texts_of(ids)[0], minlength=len(sought))
        jaccard_indices = n_common / (len(windows) + table.n_windows - n_common)
        best = int(jaccard_indices.argmax())
        if jaccard_indices[best] >= similarity:
            yield number, best


def _candidates(buckets: Sequence[Sequence[int]]) -> list[int]:
    """Returns the texts with most bands in common, of equal ones the earliest first."""
    n_common = Counter(itertools.chain.from_iterable(buckets))
    return sorted(n_common, key=lambda text: (-n_common[text], text))[:COMPARED]


def _resembled(
    windows: np.ndarray, candidates: Sequence[int], kept_windows: "_WindowFile", similarity: float
) -> int | None:
    """Returns the first of the candidates that is similar enough; None: there is none."""
    for candidate in candidates:
        if jaccard(windows, kept_windows.windows(candidate)) >= similarity:
            return candidate
    return None


def text_bands(text: str) -> np.ndarray:
    """Returns `band_hashes` of a text, (B,) uint64."""
    return band_hashes(_windows_in_order(text))


def text_signature(text: str) -> np.ndarray:
    """Returns `signature` of a text, (B x ROWS,) uint32. The smallest numbers of several texts are the signature of all
    their windows together."""
    return signature(_windows_in_order(text))


def text_windows(text: str) -> np.ndarray:
    """Returns the hashes of the five-word windows of a text, (W,) uint64, rising and without repeats; of a text with
    fewer words, the hash of all of them; of a text without a word, 0."""
    return np.unique(_windows_in_order(text))


def _windows_in_order(text: str) -> np.ndarray:
    """Returns the same hashes in the order of the text, with repeats."""
    raw = np.frombuffer(b" " + text.encode() + MARGIN, np.uint8)
    words = word_hashes(raw)[1]
    size = min(WINDOW, len(words))
    if size == 0:
        return np.zeros(1, np.uint64)
    return window_hashes(words, {size})[size]


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """Returns the share of common windows among all windows of two texts.

    Args:
        left, right: (W,) uint64, rising and without repeats.
    """
    n_common = len(np.intersect1d(left, right, assume_unique=True))
    return n_common / (len(left) + len(right) - n_common)


def band_hashes(windows: np.ndarray) -> np.ndarray:
    """Returns a hash of each band of a text's signature, (B,) uint64.

    Two texts have a band in common with probability 1 - (1 - s^ROWS)^BANDS.

    Args:
        windows: (W,) uint64, W > 0.
    """
    return bands_of_signature(signature(windows))


def bands_of_signature(smallest: np.ndarray) -> np.ndarray:
    """Returns `band_hashes` of the windows of a signature, (B,) uint64."""
    return (smallest.reshape(BANDS, ROWS) * _MIXERS).sum(axis=1)


def signature(windows: np.ndarray) -> np.ndarray:
    """Returns the smallest hash of the windows under each hash function, (B x ROWS,) uint32.

    Args:
        windows: (W,) uint64, W > 0.
    """
    # Windows are hashes already, so that a product with an odd number orders them anew; 32 bits are four times as fast.
    high_bits = (windows >> np.uint64(32)).astype(np.uint32)
    smallest = np.full(BANDS * ROWS, np.iinfo(np.uint32).max, np.uint32)
    for begin in range(0, len(windows), CHUNK):
        products = _FACTORS * high_bits[begin : begin + CHUNK]
        np.minimum(smallest, products.min(axis=1), out=smallest)
    return smallest


@dataclass(frozen=True)
class SharedBands:
    """The bands that each text has in common with other texts. A bucket is a hash of a band that several texts have."""

    bits: np.ndarray  # (T,) uint32: bit b is set if another text has band b, too
    buckets: list[np.ndarray]  # by band: numbers of the buckets of the texts with its bit, in their order, uint32
    sizes: np.ndarray  # (buckets,) uint8: texts with this hash, at most HELD

    def of(self, numbers: np.ndarray) -> "SharedBands":
        """Returns the bands of some texts, in another order.

        Args:
            numbers: of texts, all with a bit among them.
        """
        bits = self.bits[numbers]
        buckets = []
        for band, buckets_of_band in enumerate(self.buckets):
            bit = np.uint32(1 << band)
            bucket_of_text = np.zeros(len(self.bits), np.uint32)
            bucket_of_text[(self.bits & bit) > 0] = buckets_of_band
            buckets.append(bucket_of_text[numbers[(bits & bit) > 0]])
        return SharedBands(bits, buckets, self.sizes)


def common_bands(bands: Iterator[np.ndarray]) -> SharedBands:
    """Returns which bands the texts have in common.

    Args:
        bands: of each text, (B,) uint64; they go through a temporary file.

    Raises:
        OSError: the temporary file cannot be written.
    """
    with tempfile.TemporaryFile() as file:
        n_texts = 0
        # Bands are written block by block, band by band, so that each is read in long pieces.
        while block := list(itertools.islice(bands, BLOCK)):
            file.write(np.stack(block, axis=1).tobytes())
            n_texts += len(block)

        bits = np.zeros(n_texts, np.uint32)
        buckets: list[np.ndarray] = []
        sizes = [np.empty(0, np.uint8)]
        n_buckets = 0
        n_parts = max(1, -(-n_texts // PART))
        lowest = [part * 2**64 // n_parts for part in range(n_parts)]  # hash of each part
        for band in range(BANDS):
            hashes = _read_band(file, band, n_texts)
            bucket_of = np.zeros(n_texts, np.uint32)
            for low, high in zip(lowest, [*lowest[1:], 2**64], strict=True):
                is_in_part = (hashes >= np.uint64(low)) & (hashes <= np.uint64(high - 1))
                numbers = np.flatnonzero(is_in_part)
                # Sorted, equal hashes are neighbours.
                numbers = numbers[np.argsort(hashes[numbers])]
                is_first = np.ones(len(numbers), bool)
                is_first[1:] = hashes[numbers[1:]] != hashes[numbers[:-1]]
                counts = np.diff(np.append(np.flatnonzero(is_first), len(numbers)))

                is_bucket = counts > 1
                numbers = numbers[np.repeat(is_bucket, counts)]
                counts = counts[is_bucket]
                bits[numbers] |= np.uint32(1 << band)
                bucket_of[numbers] = np.repeat(np.arange(n_buckets, n_buckets + len(counts)), counts)
                sizes.append(np.minimum(counts, HELD).astype(np.uint8))
                n_buckets += len(counts)
            buckets.append(bucket_of[(bits >> np.uint32(band) & np.uint32(1)).astype(bool)])
    return SharedBands(bits, buckets, np.concatenate(sizes))


def _read_band(file: BinaryIO, band: int, n_texts: int) -> np.ndarray:
    """Returns one band of all texts, (T,) uint64, from the file of `common_bands`."""
    hashes = np.empty(n_texts, np.uint64)
    for begin in range(0, n_texts, BLOCK):
        size = min(BLOCK, n_texts - begin)
        file.seek(hashes.itemsize * (begin * BANDS + band * size))
        hashes[begin : begin + size] = np.frombuffer(file.read(hashes.itemsize * size), np.uint64)
    return hashes


class _Holders:
    """The texts that stay, by bucket: at most `HELD` of each. Arrays, because a group may have a million texts."""

    def __init__(self, shared_bands: SharedBands) -> None:
        self._shared = shared_bands
        self._next = [0] * BANDS  # by band: position in its buckets
        ends = np.cumsum(shared_bands.sizes, dtype=np.int64)
        self._begins = ends - shared_bands.sizes
        self._texts = np.empty(int(ends[-1]) if len(ends) else 0, np.uint32)
        self._n_texts = np.zeros(len(ends), np.uint8)

    def take_buckets(self, number: int) -> list[int]:
        """Returns the buckets of a text. To be called for each text, in order."""
        bits = int(self._shared.bits[number])
        buckets = []
        for band in range(BANDS):
            if bits >> band & 1:
                buckets.append(int(self._shared.buckets[band][self._next[band]]))
                self._next[band] += 1
        return buckets

    def texts(self, bucket: int) -> list[int]:
        """Returns the texts that a bucket holds, in order."""
        begin = self._begins[bucket]
        return self._texts[begin : begin + self._n_texts[bucket]].tolist()

    def add(self, bucket: int, text: int) -> None:
        """Adds a text to a bucket that is not full."""
        n_texts = self._n_texts[bucket]
        if n_texts < self._shared.sizes[bucket]:
            self._texts[self._begins[bucket] + n_texts] = text
            self._n_texts[bucket] = n_texts + 1


class _WindowFile:
    """The windows of texts, in a file, because together they are as large as the texts."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._ends = array("Q", [0])  # text i has the windows from _ends[i] to _ends[i + 1]

    def add(self, windows: np.ndarray) -> int:
        """Writes the windows of a text, and returns the number that it has here."""
        self._file.seek(0, 2)
        self._file.write(windows.tobytes())
        self._ends.append(self._ends[-1] + len(windows))
        return len(self._ends) - 2

    def windows(self, number: int) -> np.ndarray:
        begin, end = self._ends[number], self._ends[number + 1]
        self._file.seek(8 * begin)
        return np.frombuffer(self._file.read(8 * (end - begin)), np.uint64)
