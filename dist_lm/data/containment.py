"""Which held-out texts stand in train texts: windows of eight words, compared by hash.

A word is a run of bytes above 0x20 in UTF-8; in Chinese and Japanese, which have no spaces, a word is a character.
A text is contained if train texts hold more than half of its windows, whatever the indentation and in whichever train
texts the windows stand. A text that stands whole inside a train text is always found: at most its first and last
window, whose outer words may be cut, do not match. A text below 16 words has too few windows: it is contained if it
stands letter by letter in a train text (below five words: word by word).

Only hashes of held-out windows stay in memory, about 25 bytes a word. Train texts are hashed in batches: each word
once, then all windows by numpy, and a bitmap filters them. numpy releases the interpreter, so batches run in threads.
Hashes do not depend on the process: the result is the same for any order of texts and any number of threads.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from dist_lm.storage.process import cores

WINDOW = 8  # words
SHORT = 2 * WINDOW  # a text with fewer words has one window
CUT = 5  # a text of so many words is also found where its outer words are cut
MAX_SHARE = 0.5  # of the windows of a held-out text may be in train texts
BATCH_BYTES = 1 << 18
THREADS = 4  # at most; reading is slower than so many
BORDER = b" \xff "  # behind each text of a batch: no UTF-8, so windows across a border are in no held-out text
MARGIN = b" " * 24  # behind a batch: words are read 8 bytes at a time
FILTER_BITS = (16, 27)  # smallest and largest bitmap
SPARSE = 5  # the bitmap has 2**SPARSE places a window
_ODD = np.array([0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)
_FIRST = np.array(  # masks of the first n bytes of 8
    [0, 0xFF, 0xFFFF, 0xFFFFFF, 2**32 - 1, 2**40 - 1, 2**48 - 1, 2**56 - 1, 2**64 - 1], np.uint64
)


class HeldOut:
    """Held-out texts, and which of their windows train texts have."""

    def __init__(self, texts: Sequence[str], given: Sequence[bool] | None = None) -> None:
        """`given`: texts that a user holds out. A train text that contains one is refused by `note`."""
        self._given = np.array(given or [False] * len(texts), bool)
        self._parts: dict[int, bytes] = {}  # of each text below SHORT words: what a train text must hold as it is
        self._inside: set[int] = set()  # texts below SHORT words that train texts hold
        sizes: dict[int, list[tuple[np.ndarray, int]]] = {}  # words of a window -> (hashes, text)
        for number, text in enumerate(texts):
            raw = text.encode()
            words = word_hashes(np.frombuffer(b" " + raw + MARGIN, np.uint8))[1]
            if len(words) >= WINDOW:
                sizes.setdefault(WINDOW, []).append((window_hashes(words, {WINDOW})[WINDOW], number))
            if len(words) < SHORT:
                cut = len(words) >= CUT
                self._parts[number] = raw.strip() if cut else b""
                inner = words[1:-1] if cut else words
                if 0 < (size := len(inner)) < WINDOW:  # larger ones are among the windows above
                    sizes.setdefault(size, []).append((window_hashes(inner, {size})[size], number))
        self._tables = {size: _Table(found, self._given) for size, found in sorted(sizes.items())}

    def note(self, texts: Sequence[bytes]) -> np.ndarray:
        """Note the windows of train texts in UTF-8.

        Returns:
            (len(texts),) bool: texts that are refused, because a given text has more than half of its windows there,
            or the text has more than half of its own in given texts. Their windows are not noted.
        """
        raw = b" " + BORDER.join(texts) + BORDER + MARGIN
        begins = np.cumsum([1, *(len(text) + len(BORDER) for text in texts)])
        starts, words = word_hashes(np.frombuffer(raw, np.uint8))
        windows = window_hashes(words, set(self._tables))
        hits = []
        for size, table in self._tables.items():
            at, ids = table.find(windows[size])
            hits.append((size, table, np.searchsorted(begins, starts[at], "right") - 1, ids))
        refused = np.zeros(len(texts), bool)
        if self._given.any():
            n_windows = np.diff(np.searchsorted(starts, begins)) - WINDOW  # of each text; its border is a word
            for size, table, owners, ids in hits:
                refused[self._holders(size, owners, ids, texts)] = True
                if size == WINDOW:
                    copied = np.bincount(owners[table.given[ids]], minlength=len(texts))
                    refused |= copied > MAX_SHARE * np.maximum(n_windows, 1)
        for _, table, owners, ids in hits:
            kept = np.unique(ids[~refused[owners]])
            table.found[kept] = True
            for number in map(int, table.texts_of(kept)[0]):
                if number in self._parts and number not in self._inside and self._parts[number] in raw:
                    self._inside.add(number)
        return refused

    def contained(self) -> set[int]:
        """Indices of the texts that the noted train texts contain."""
        inside = set(self._inside)
        if WINDOW in self._tables:
            table = self._tables[WINDOW]
            inside.update(np.flatnonzero(table.windows_found() > MAX_SHARE * table.n_windows).tolist())
        return inside

    def _holders(self, size: int, owners: np.ndarray, ids: np.ndarray, texts: Sequence[bytes]) -> list[int]:
        """The train texts that contain a given text; `owners`: the train text of each hit in `ids`."""
        table = self._tables[size]
        given = table.given[ids]
        found = np.unique(np.stack([owners[given], ids[given]]), axis=1)
        numbers, times = table.texts_of(found[1])
        pairs, counts = np.unique(np.stack([np.repeat(found[0], times), numbers]), axis=1, return_counts=True)
        holders = []
        for owner, number, count in zip(*map(np.ndarray.tolist, pairs), counts.tolist(), strict=True):
            part = self._parts.get(number)
            whole = (part and part in texts[owner]) or (size == WINDOW and count > MAX_SHARE * table.n_windows[number])
            if self._given[number] and whole:
                holders.append(owner)
        return holders


class Notes:
    """Notes train texts in threads, in batches of about `BATCH_BYTES`."""

    def __init__(self, held_out: HeldOut) -> None:
        self._held_out = held_out
        self._threads = max(1, min(THREADS, cores() - 1))
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="containment")
        self._names: list[bytes] = []
        self._contents: list[bytes] = []  # of the next batch
        self._size = 0
        self._waiting: deque[tuple[list[bytes], Future[np.ndarray]]] = deque()
        self._refused: set[bytes] = set()

    def add(self, name: bytes, text: str) -> None:
        """Note a train text."""
        content = text.encode()
        self._names.append(name)
        self._contents.append(content)
        self._size += len(content)
        if self._size >= BATCH_BYTES:
            self._submit()
            self._collect(2 * self._threads)

    def finish(self) -> set[bytes]:
        """The names of the texts that are refused, once all are noted."""
        self._submit()
        self._collect(0)
        self._pool.shutdown()
        return self._refused

    def _submit(self) -> None:
        if self._names:
            self._waiting.append((self._names, self._pool.submit(self._held_out.note, self._contents)))
            self._names, self._contents, self._size = [], [], 0

    def _collect(self, most: int) -> None:
        """Wait until at most `most` batches are left."""
        while len(self._waiting) > most:
            names, answer = self._waiting.popleft()
            self._refused.update(names[index] for index in np.flatnonzero(answer.result()))


def seen_texts(held_out: Sequence[str], trained: Iterable[str]) -> set[int]:
    """Indices of the texts in `held_out` that `trained` contains."""
    index = HeldOut(held_out)
    notes = Notes(index)
    for text in trained:
        notes.add(b"", text)
    notes.finish()
    return index.contained()


def word_hashes(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`(start, hash)` of every word of a text in UTF-8 that begins with a space and ends with `MARGIN`.

    The hash is of the first and last 16 bytes and the length: longer words that differ in between are one word.
    """
    solid = raw > 0x20
    lead = (raw - np.uint8(0xE3)) <= 6  # of three bytes: U+3000 to U+9FFF
    if lead.any():
        begins = solid.copy()
        begins[1:] &= ~solid[:-1]
        begins |= lead
        begins[3:] |= lead[:-3] & solid[3:]
        starts = np.flatnonzero(begins)
        lengths = np.flatnonzero(solid[:-1] & (begins[1:] | ~solid[1:])) + 1 - starts
    else:
        edges = np.flatnonzero(solid[1:] != solid[:-1]) + 1
        starts = edges[::2].copy()
        lengths = edges[1::2] - starts
    eight = np.ndarray((len(raw) - 7,), "<u8", raw, 0, (1,))  # 8 bytes from every place
    hashes = eight[starts]
    hashes &= _FIRST.take(lengths, mode="clip")
    hashes *= _ODD[0]
    hashes ^= hashes >> np.uint64(29)
    long = np.flatnonzero(lengths > 8)
    begin, end = starts[long], starts[long] + lengths[long]
    hashes[long] += eight[end - 8] * _ODD[1] + lengths[long].astype(np.uint64) * _ODD[2]
    longer = lengths[long] > 16
    long, begin, end = long[longer], begin[longer], end[longer]
    hashes[long] ^= (eight[begin + 8] * _ODD[3]) ^ (eight[end - 16] * _ODD[2])
    hashes ^= hashes >> np.uint64(32)
    hashes *= _ODD[1]
    return starts, hashes


def window_hashes(words: np.ndarray, sizes: set[int]) -> dict[int, np.ndarray]:
    """Size -> hash of every window of so many words. The windows of all sizes are computed at once."""
    found = {}
    hashes = words.copy()
    for size in range(1, max(sizes, default=0) + 1):
        if size > 1:
            hashes = hashes[: max(0, len(words) - size + 1)]
            hashes *= _ODD[2]
            hashes += words[size - 1 :]
        if size in sizes:
            found[size] = hashes * _ODD[0]
    return found


class _Table:
    """The windows of one size of all held-out texts."""

    def __init__(self, windows: Sequence[tuple[np.ndarray, int]], given: np.ndarray) -> None:
        hashes = np.concatenate([own for own, _ in windows])
        texts = np.repeat(np.array([number for _, number in windows], np.int32), [len(own) for own, _ in windows])
        order = np.argsort(hashes, kind="stable")
        self._hashes, first, times = np.unique(hashes[order], return_index=True, return_counts=True)
        self._texts = texts[order]  # of each window, in the order of hashes
        self._first, self._times = first, times
        self.n_windows = np.bincount(texts, minlength=len(given))  # of each text
        self.given = np.logical_or.reduceat(given[self._texts], first)  # of each window: whether a given text has it
        self.found = np.zeros(len(self._hashes), bool)
        bits = int(np.clip(len(self._hashes).bit_length() + SPARSE, *FILTER_BITS))
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << bits, bool)
        self._filter[self._hashes >> self._shift] = True

    def find(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`(index, id)` of the windows that held-out texts have."""
        places = (windows >> self._shift).view(np.int64)
        at = np.flatnonzero(self._filter.take(places, mode="clip"))  # four times as fast as indexing
        own = windows[at]
        ids = np.minimum(np.searchsorted(self._hashes, own), len(self._hashes) - 1)
        there = self._hashes[ids] == own
        return at[there], ids[there]

    def texts_of(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`(texts, times)`: the texts that have the windows `ids`, window by window, and how many each window has."""
        times = self._times[ids]
        ends = np.cumsum(times)
        inside = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - times, times)
        return self._texts[np.repeat(self._first[ids], times) + inside], times

    def windows_found(self) -> np.ndarray:
        """The windows of each text that were found."""
        return np.bincount(self._texts[np.repeat(self.found, self._times)], minlength=len(self.n_windows))
