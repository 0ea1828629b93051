"""Finds the held-out texts that train texts contain: windows of eight words, compared by hash.

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
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from dist_lm.storage.process import cores

WINDOW = 8  # words
SHORT = 2 * WINDOW  # words below which a text has too few windows
CUT = 5  # words from which on a text is also found where its outer words are cut
MAX_SHARE = 0.5  # share of the windows of a held-out text that may be in train texts
BATCH_BYTES = 1 << 18
THREADS = 4  # at most; reading cannot feed more
BORDER = b" \xff "  # behind each text of a batch: no UTF-8, so windows across a border are in no held-out text
MARGIN = b" " * 24  # behind a batch, because words are read 8 bytes at a time
FILTER_BITS = (16, 27)  # smallest and largest bitmap
SPARSE = 5  # the bitmap has 2**SPARSE places a window
_ODD = np.array([0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)
_FIRST = np.array(  # masks of the first n bytes of 8
    [0, 0xFF, 0xFFFF, 0xFFFFFF, 2**32 - 1, 2**40 - 1, 2**48 - 1, 2**56 - 1, 2**64 - 1], np.uint64
)


@dataclass(frozen=True)
class Evidence:
    """The windows and the short texts of a `HeldOutIndex` that some train texts hold."""

    in_train: Mapping[int, np.ndarray]  # words of a window -> (windows,) bool: whether a train text has it
    contained_short: frozenset[int]  # texts below SHORT words that a train text holds


class HeldOutIndex:
    """Held-out texts, and which of their windows train texts have."""

    def __init__(
        self, texts: Sequence[str], protected: Sequence[bool] | None = None, *, refuses_parts: bool = True
    ) -> None:
        """Indexes the windows of held-out texts.

        Args:
            protected: for each text, whether `compare` refuses train texts that contain it. None: no text is protected.
            refuses_parts: whether `compare` also refuses a train text that is mostly part of protected texts.
        """
        self._refuses_parts = refuses_parts
        self._protected = np.array(protected or [False] * len(texts), bool)
        self._parts: dict[int, bytes] = {}  # text below SHORT words -> bytes that a train text must hold as they are
        self._contained_short: set[int] = set()  # texts below SHORT words that train texts hold

        windows_by_size: dict[int, list[tuple[np.ndarray, int]]] = {}  # words of a window -> (hashes, text)
        for number, text in enumerate(texts):
            raw = text.encode()
            words = word_hashes(np.frombuffer(b" " + raw + MARGIN, np.uint8))[1]
            if len(words) >= WINDOW:
                hashes = window_hashes(words, {WINDOW})[WINDOW]
                windows_by_size.setdefault(WINDOW, []).append((hashes, number))

            # A short text is found by its words as one window, and then compared letter by letter. The outer words
            # may be cut in a train text, so they are left out where enough words remain.
            if len(words) < SHORT:
                self._parts[number] = b""
                inner = words
                if len(words) >= CUT:
                    self._parts[number] = raw.strip()
                    inner = words[1:-1]
                size = len(inner)
                if 0 < size < WINDOW:  # larger ones are among the windows above
                    hashes = window_hashes(inner, {size})[size]
                    windows_by_size.setdefault(size, []).append((hashes, number))
        self._tables = {
            size: WindowTable(windows, self._protected) for size, windows in sorted(windows_by_size.items())
        }

    def compare(self, texts: Sequence[bytes]) -> np.ndarray:
        """Finds the windows of held-out texts that a batch of train texts in UTF-8 has, and remembers them in the
        index.

        Several threads may call it at once.

        Returns:
            (len(texts),) bool: texts that are refused, because they contain a protected text (see the module: more than
            half of its windows, or a short text letter by letter), or, with `refuses_parts`, more than half of their
            own windows are in protected texts. Their windows are not remembered. A protected text below `CUT` words
            refuses none.
        """
        raw = b" " + BORDER.join(texts) + BORDER + MARGIN
        begins = np.cumsum([1, *(len(text) + len(BORDER) for text in texts)])
        starts, words = word_hashes(np.frombuffer(raw, np.uint8))
        windows = window_hashes(words, set(self._tables))

        hits = []  # (size, table, train text of each hit, window id of each hit)
        for size, table in self._tables.items():
            indices, ids = table.find(windows[size])
            owners = np.searchsorted(begins, starts[indices], "right") - 1
            hits.append((size, table, owners, ids))

        refused = np.zeros(len(texts), bool)
        if self._protected.any():
            n_windows = np.diff(np.searchsorted(starts, begins)) - WINDOW  # windows of each text; its border is a word
            for size, table, owners, ids in hits:
                refused[self._holders(size, owners, ids, texts)] = True
                if size == WINDOW and self._refuses_parts:
                    n_copied = np.bincount(owners[table.protected[ids]], minlength=len(texts))
                    refused |= n_copied > MAX_SHARE * np.maximum(n_windows, 1)

        # Refused texts will not be in train, so what they contain is not leaked.
        for _, table, owners, ids in hits:
            ids_in_train = np.unique(ids[~refused[owners]])
            table.in_train[ids_in_train] = True
            for number in map(int, table.texts_of(ids_in_train)[0]):
                if number in self._parts and number not in self._contained_short and self._parts[number] in raw:
                    self._contained_short.add(number)
        return refused

    def contained(self) -> set[int]:
        """Returns the indices of the held-out texts that the train texts compared so far contain."""
        contained = set(self._contained_short)
        if WINDOW in self._tables:
            table = self._tables[WINDOW]
            is_contained = table.n_windows_in_train() > MAX_SHARE * table.n_windows
            contained.update(np.flatnonzero(is_contained).tolist())
        return contained

    def most_contained(self, text: bytes) -> int:
        """Returns the index of the protected held-out text that has the largest share of its windows in a train text.

        The first of several equal ones is returned, and so is the first protected text if none has a window in the
        train text. Without a protected text the index is 0.

        Args:
            text: a train text in UTF-8.

        Raises:
            ValueError: there are no held-out texts.
        """
        raw = b" " + text + BORDER + MARGIN
        windows = window_hashes(word_hashes(np.frombuffer(raw, np.uint8))[1], set(self._tables))
        shares = np.zeros(len(self._protected))
        for size, table in self._tables.items():
            numbers, _ = table.texts_of(np.unique(table.find(windows[size])[1]))
            n_common = np.bincount(numbers, minlength=len(shares))
            shares = np.maximum(shares, n_common / np.maximum(table.n_windows, 1))
        return int(np.where(self._protected, shares, -1).argmax())

    def take_evidence(self) -> Evidence:
        """Returns the evidence of the train texts compared so far, and forgets these train texts."""
        evidence = Evidence(
            {size: table.in_train.copy() for size, table in self._tables.items()}, frozenset(self._contained_short)
        )
        for table in self._tables.values():
            table.in_train[:] = False
        self._contained_short.clear()
        return evidence

    def merge(self, evidence: Evidence) -> None:
        """Adds the evidence of an index of the same held-out texts, as if its train texts had been compared here."""
        for size, in_train in evidence.in_train.items():
            self._tables[size].in_train |= in_train
        self._contained_short |= evidence.contained_short

    def _holders(self, size: int, owners: np.ndarray, ids: np.ndarray, texts: Sequence[bytes]) -> list[int]:
        """Returns the numbers of the train texts that contain a protected text; a number may come several times.

        Contained is one of which the train text has more than half of the windows, or, below `SHORT` words, one that
        stands letter by letter in it. A text below `CUT` words never counts.

        Args:
            size: words of a window.
            owners: (hits,) the train text of each hit.
            ids: (hits,) the window of each hit.
            texts: the train texts.
        """
        table = self._tables[size]
        is_protected = table.protected[ids]
        owner_and_id = np.unique(np.stack([owners[is_protected], ids[is_protected]]), axis=1)

        # A window may be in several held-out texts: count the hits of every (train text, held-out text).
        numbers, times = table.texts_of(owner_and_id[1])
        owner_and_text = np.stack([np.repeat(owner_and_id[0], times), numbers])
        pairs, n_hits = np.unique(owner_and_text, axis=1, return_counts=True)

        holders = []
        for owner, number, count in zip(*map(np.ndarray.tolist, pairs), n_hits.tolist(), strict=True):
            part = self._parts.get(number)
            holds_part = part and part in texts[owner]
            holds_windows = size == WINDOW and count > MAX_SHARE * table.n_windows[number]
            if self._protected[number] and (holds_part or holds_windows):
                holders.append(owner)
        return holders


class Comparison:
    """Compares train texts with held-out texts in threads, in batches of about `BATCH_BYTES`."""

    def __init__(self, held_out: HeldOutIndex) -> None:
        self._held_out = held_out
        self._threads = max(1, min(THREADS, cores() - 1))
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="containment")

        # the next batch
        self._names: list[bytes] = []
        self._contents: list[bytes] = []
        self._size = 0  # bytes

        self._batches: deque[tuple[list[bytes], Future[np.ndarray]]] = deque()  # names of their texts, refused texts
        self._refused: set[bytes] = set()

    def add(self, name: bytes, text: str) -> None:
        """Compares a train text in a thread, with the batch that it fills or with a later one.

        Waits while too many batches are unfinished. The text must be Unicode.

        Args:
            name: `finish` returns it if the text is refused.
        """
        content = text.encode()
        self._names.append(name)
        self._contents.append(content)
        self._size += len(content)
        if self._size >= BATCH_BYTES:
            self._submit()
            self._collect(2 * self._threads)

    def finish(self) -> set[bytes]:
        """Waits until all texts are compared, ends the threads, and returns the names of the texts that are refused."""
        # The last batch is smaller than `BATCH_BYTES`.
        self._submit()
        self._collect(0)
        self._pool.shutdown()
        return self._refused

    def _submit(self) -> None:
        if self._names:
            self._batches.append((self._names, self._pool.submit(self._held_out.compare, self._contents)))
            self._names, self._contents, self._size = [], [], 0

    def _collect(self, max_batches: int) -> None:
        """Waits until at most `max_batches` batches are unfinished, which bounds the memory for texts."""
        while len(self._batches) > max_batches:
            names, refused = self._batches.popleft()
            self._refused.update(names[index] for index in np.flatnonzero(refused.result()))


def word_hashes(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes every word of a text in UTF-8 that begins with a space and ends with `MARGIN`.

    A hash is of the first and last 16 bytes and the length: longer words that differ in between are one word. Memory is
    a multiple of the text.

    Args:
        raw: (bytes,) uint8.

    Returns:
        (words,) int64 offset of the first byte, and (words,) uint64 hash, of every word.
    """
    solid = raw > 0x20
    lead = (raw - np.uint8(0xE3)) <= 6  # first byte of the three of U+3000 to U+9FFF
    if lead.any():
        # Chinese and Japanese: every character begins a word, and the byte behind a character begins one too.
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

    # In place, because these arrays are as large as the text: most words have at most 8 bytes and end here.
    eight = np.ndarray((len(raw) - 7,), "<u8", raw, 0, (1,))  # the 8 bytes from every offset
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
    """Hashes every window of so many words, for all sizes in one pass. `words` is not changed.

    Args:
        words: (n,) uint64 hashes of words.
        sizes: words of a window.

    Returns:
        Size -> (n - size + 1,) uint64; empty where there are fewer words.
    """
    hashes_by_size = {}
    hashes = words.copy()
    for size in range(1, max(sizes, default=0) + 1):
        if size > 1:
            hashes = hashes[: max(0, len(words) - size + 1)]
            hashes *= _ODD[2]
            hashes += words[size - 1 :]
        if size in sizes:
            hashes_by_size[size] = hashes * _ODD[0]
    return hashes_by_size


class WindowTable:
    """The windows of one size of all sought texts, such as held-out ones. A window that several texts share has one
    id."""

    def __init__(self, windows: Sequence[tuple[np.ndarray, int]], protected: np.ndarray) -> None:
        """Sorts the windows by hash.

        Args:
            windows: (hashes, number) of each text, with one window at least in all.
            protected: (texts,) bool.
        """
        all_hashes = np.concatenate([hashes for hashes, _ in windows])
        n_hashes = [len(hashes) for hashes, _ in windows]
        texts = np.repeat(np.array([number for _, number in windows], np.int32), n_hashes)

        # Equal hashes become neighbours: a window is a run, and its id is the number of the run.
        order = np.argsort(all_hashes, kind="stable")
        self._hashes, first, times = np.unique(all_hashes[order], return_index=True, return_counts=True)
        self._texts = texts[order]  # texts that have window i: self._texts[first[i] : first[i] + times[i]]
        self._first, self._times = first, times

        self.n_windows = np.bincount(texts, minlength=len(protected))  # windows of each text
        self.protected = np.logical_or.reduceat(protected[self._texts], first)  # windows that a protected text has
        self.in_train = np.zeros(len(self._hashes), bool)  # windows that train texts have

        bits = int(np.clip(len(self._hashes).bit_length() + SPARSE, *FILTER_BITS))
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << bits, bool)
        self._filter[self._hashes >> self._shift] = True

    def find(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Finds the windows that the texts have: their indices in `windows`, and their ids here, (hits,) each.

        Args:
            windows: (n,) uint64 hashes.
        """
        # The bitmap rejects nearly all windows, so that few are searched for.
        bits = (windows >> self._shift).view(np.int64)
        indices = np.flatnonzero(self._filter.take(bits, mode="clip"))  # four times as fast as indexing
        candidates = windows[indices]
        ids = np.minimum(np.searchsorted(self._hashes, candidates), len(self._hashes) - 1)
        is_hit = self._hashes[ids] == candidates
        return indices[is_hit], ids[is_hit]

    def texts_of(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the numbers of the texts that have the windows `ids`, (sum of the second,) int32, window by window,
        and how many texts each window has, (len(ids),) int64."""
        times = self._times[ids]
        # All texts of all windows lie in one row; a text's rank counts from the begin of its window.
        begins = np.cumsum(times) - times
        rank_in_window = np.arange(times.sum()) - np.repeat(begins, times)
        return self._texts[np.repeat(self._first[ids], times) + rank_in_window], times

    def n_windows_in_train(self) -> np.ndarray:
        """Counts the windows of each text that train texts have: (texts,) int64."""
        is_in_train = np.repeat(self.in_train, self._times)
        return np.bincount(self._texts[is_in_train], minlength=len(self.n_windows))
