"""The documents of one split in one file, which every process of a node maps: its pages are in memory once.

`train.index` joins the indices of the tars (`data.index`). Like them it is a cache: the first process that opens the
split writes it. A process writes it again when it is missing or damaged, when a tar or an index was touched since, or
when its tars are not those of the manifest.

A new file is renamed into its place and never changes its length, so that no process of ours takes pages from another's
mapping. If a user cuts it in place, the ranks that have mapped it end (SIGBUS), and the next start makes it again.

Columns, each an array in the file:

    lengths     (documents,) int32    tokens; signed, so that no difference wraps
    n_bytes     (documents,) uint32   UTF-8 bytes of the text
    languages   (documents,) uint8    positions in `SplitIndex.languages`
    continues   (documents / 8,)      bits, the lowest first: of the repository of the document before
    member_*    (members,)            where a member lies in its tar
    unit_*      (units,)              24 bytes for up to 64 consecutive documents of a member
    checksums   (blocks,) uint32      CRC-32 of each KiB of tokens, then of each KiB of the mask, member by member;
                                      0: not known yet

Columns of members and units are compared with their CRC-32 when the file is opened, those of documents when they are
first used as a whole; the lengths of one unit have a checksum of their own. Checksums of blocks are filled in when a
member was compared with the manifest, by whichever process does that first. Where one differs, the member is compared
with the manifest once more, so a wrong checksum costs time and hides no damage.

Layout of the file: magic (8 bytes), columns, header (JSON), CRC-32 and length of the header (two uint32).
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import mmap
import os
import secrets
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from dist_lm.data.index import ShardIndex, open_index
from dist_lm.data.manifest import BUILD_COMMAND, Shard, index_path, token_dtype
from dist_lm.data.order import following
from dist_lm.errors import ArtefactError

UNIT = 64  # documents of a unit at most
CACHED_UNITS = 256  # units whose lengths were added up, in memory
BLOCK = 1024  # bytes with a checksum

DOCUMENTS = {"lengths": "<i4", "n_bytes": "<u4", "languages": "u1", "continues": "u1"}
MEMBERS = {
    "member_begin": "<i8",  # bytes from the start of the tar to the member
    "member_end": "<i8",
    "member_tokens": "<i8",  # bytes to its first token
    "member_mask": "<i8",  # bytes to the first element of its loss mask; -1: every token is learned
    "member_document": "<i8",  # documents of the split before it
    "member_token": "<i8",  # tokens of the split before it
    "member_block": "<i8",  # blocks of the split before it
    "member_tar": "<u4",
}
UNITS = {
    "unit_document": "<i8",  # documents of the split before it
    "unit_token": "<i8",  # tokens of the split before it
    "unit_member": "<u4",
    "unit_checksum": "<u4",  # CRC-32 of the lengths of its documents
}
CHECKSUMS = {"checksums": "<u4"}
_DTYPES = DOCUMENTS | MEMBERS | UNITS | CHECKSUMS
_TYPE_OF_CHECKSUM = np.dtype(CHECKSUMS["checksums"])

_MAGIC = b"DLMSPL1\n"
_SUFFIX = struct.Struct("<II")
_ALIGNMENT = 64


class SplitIndex:
    """The documents, members and units of one split, in the order of its tars."""

    def __init__(
        self, directory: Path, split: str, shards: Sequence[Shard], vocab_size: int, *, is_saved: bool = True
    ) -> None:
        """Maps the file of a split; makes it if it is missing or cannot be used.

        It reads 24 bytes for each unit and 60 for each member, and the times of each tar and of its index.

        Args:
            is_saved: whether the file lies beside the tars; False: it is made in memory.

        Raises:
            ArtefactError: a tar is missing or damaged, or differs from its entry in the manifest.
            OSError: a file cannot be read or written.
        """
        self._directory, self._split, self._shards, self._vocab_size = directory, split, shards, vocab_size
        self._identity = _identity(shards, vocab_size)
        self._descriptor, self._is_writable = -1, False
        self._unit_ends: dict[int, list[int]] = {}
        self._is_saved = is_saved and os.access(directory, os.W_OK)
        if not self._load():
            self._make()

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    # --- columns ---

    def column(self, name: str) -> np.ndarray:
        """Returns a column, read-only, after its first use was compared with its checksum; makes a damaged file again.

        Raises:
            ArtefactError, OSError: as for a new `SplitIndex`.
        """
        if name not in self._checked:
            self._checked.add(name)
            array = self.columns[name]
            if zlib.crc32(array.data) != self._header["columns"][name]["checksum"]:
                self._remake(name)
        return self.columns[name]

    def unit_ends(self, unit: int) -> list[int]:
        """Returns the tokens of the split before each document of a unit, and those before the end of its last.

        Only the entries of this unit are read. The results for `CACHED_UNITS` units stay in memory, because the order
        of documents and the reading of tokens ask for the same units.

        Raises:
            ArtefactError, OSError: as for a new `SplitIndex`.
        """
        ends = self._unit_ends.get(unit)
        if ends is not None:
            return ends

        self._check_lengths(unit)
        begin, end = self.unit_documents(unit)
        lengths = self.columns["lengths"][begin:end]
        ends = list(accumulate(lengths.tolist(), initial=self.columns["unit_token"].item(unit)))

        # All are dropped together, which needs no lock where several threads read. Two may pass the bound at once.
        if len(self._unit_ends) >= CACHED_UNITS:
            self._unit_ends = {}
        self._unit_ends[unit] = ends
        return ends

    def unit_lengths(self, units: np.ndarray) -> np.ndarray:
        """Returns the tokens of the documents of some units, 0 behind the last of a unit: (n, UNIT) int64.

        Raises:
            ArtefactError, OSError: as for a new `SplitIndex`.
        """
        if "lengths" not in self._checked:
            for unit in units[~self._is_checked_unit[units]].tolist():
                self._check_lengths(unit)

        firsts, place = self.columns["unit_document"], np.arange(UNIT)
        begins = firsts[units]
        n_documents = following(firsts, units, self.n_documents) - begins
        documents = np.minimum(begins[:, None] + place, self.n_documents - 1)
        return np.where(place < n_documents[:, None], self.columns["lengths"][documents], 0).astype(np.int64)

    def _check_lengths(self, unit: int) -> None:
        """Compares the lengths of a unit with their checksum when they are first used."""
        if "lengths" in self._checked or self._is_checked_unit[unit]:
            return
        begin, end = self.unit_documents(unit)
        if zlib.crc32(self.columns["lengths"][begin:end].data) != self.columns["unit_checksum"].item(unit):
            self._remake("lengths")
        self._is_checked_unit[unit] = True

    def unit_documents(self, unit: int) -> tuple[int, int]:
        """Returns the first document of a unit, and the one behind its last."""
        firsts = self.columns["unit_document"]
        end = firsts.item(unit + 1) if unit + 1 < len(firsts) else self.n_documents
        return firsts.item(unit), end

    def continues(self, documents: np.ndarray) -> np.ndarray:
        """Returns whether each document is of the repository of the one before it: bool, of the shape of the argument.

        Args:
            documents: numbers of int64.
        """
        return (self.column("continues")[documents >> 3] >> (documents & 7).astype(np.uint8) & 1).astype(bool)

    def record_checksums(self, first_block: int, checksums: Sequence[int]) -> None:
        """Notes the checksums of consecutive blocks, for all processes; if the file is not writable, does nothing."""
        # Written through the file, because a full disk ends a process that writes to a mapping.
        if self._is_writable:
            content = np.array(checksums, _TYPE_OF_CHECKSUM).tobytes()
            offset = self._header["columns"]["checksums"]["offset"] + first_block * _TYPE_OF_CHECKSUM.itemsize
            with contextlib.suppress(OSError):
                os.pwrite(self._descriptor, content, offset)

    # --- the file ---

    @property
    def path(self) -> Path:
        return split_index_path(self._directory, self._split)

    def _load(self) -> bool:
        """Maps the file of the split; returns False if there is none, or none that can be used."""
        try:
            # A file of another user is as good, but no checksums can be noted in it.
            is_writable = self._is_saved and os.access(self.path, os.W_OK)
            descriptor = os.open(self.path, os.O_RDWR if is_writable else os.O_RDONLY)
        except OSError:
            return False

        header = _read_header(descriptor)
        is_current = header is not None and header["times"] == self._times()
        if is_current and self._map(descriptor, is_writable=is_writable):
            return True
        os.close(descriptor)
        return False

    def _make(self) -> None:
        """Makes the file and maps it; in a folder that is not writable, in memory."""
        if not self._is_saved:
            self._make_in(os.memfd_create(self.path.name))
            return

        # Of the ranks of a node one makes the file, and the others map it.
        with _locked(self._directory):
            if self._load():
                return

            temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}.tmp")
            try:
                self._make_in(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644))
                # Another node, which the lock does not stop, may have been faster. Its file stays, because on a network
                # file system a process ends (SIGBUS) when the file that it has mapped is replaced.
                if not self._load():
                    os.fsync(self._descriptor)
                    temporary.replace(self.path)
            finally:
                temporary.unlink(missing_ok=True)

    def _make_in(self, descriptor: int) -> None:
        """Writes the file through a new descriptor, which the index then owns, and maps it. If that fails, the
        descriptor is closed.

        Raises:
            ArtefactError, OSError: as `_write`.
        """
        try:
            self._write(descriptor)
            is_mapped = self._map(descriptor, is_writable=True)
            assert is_mapped, "a new file can be used"
        except BaseException:
            os.close(descriptor)
            raise

    def _remake(self, column: str) -> None:
        logging.getLogger(__name__).warning("%s: %s are damaged: it is made again", self.path, column)
        with contextlib.suppress(OSError):
            # Another rank may have found the damage first: the file that it made stays.
            if os.path.samestat(os.fstat(self._descriptor), self.path.stat()):
                self.path.unlink()
        self._make()

    def _map(self, descriptor: int, *, is_writable: bool) -> bool:
        """Maps an open file, and returns whether it is whole and of these tars.

        If it is, the index owns the descriptor, and closes the one before. Otherwise nothing changes, and the caller
        closes it. The checksums of the long columns are not compared here.
        """
        header = _read_header(descriptor)
        if header is None or header["identity"] != self._identity:
            return False

        content = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        columns = {
            name: np.frombuffer(content, _DTYPES[name], column["count"], column["offset"])
            for name, column in header["columns"].items()
        }
        small = [*MEMBERS, *UNITS]
        if any(zlib.crc32(columns[name].data) != header["columns"][name]["checksum"] for name in small):
            return False

        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._is_writable = descriptor, is_writable
        self._header, self.columns, self._checked = header, columns, set(small)
        self._is_checked_unit = np.zeros(len(columns["unit_document"]), bool)  # units whose lengths were compared
        self.n_members = len(columns["member_tar"])
        self.languages: list[str] = header["languages"]
        self.n_documents: int = header["documents"]
        self.n_tokens: int = header["tokens"]
        self.has_mask: bool = header["has_mask"]
        self.has_repositories: bool = header["has_repositories"]
        return True

    def _times(self) -> list[list[int]]:
        """Returns the times of each tar and of its index, in ns; 0 for a file that is missing."""
        times = []
        for shard in self._shards:
            tar = self._directory / shard.name
            times.append([_modified_ns(path) for path in (tar, index_path(tar))])
        return times

    def _write(self, descriptor: int) -> None:
        """Writes the file, tar by tar. In memory are the documents of one tar, two bytes of every other one, and all
        members and units.

        Raises:
            ArtefactError: a tar is missing or damaged, differs from its entry, or has tokens of another width.
            OSError: a file cannot be read or written.
        """
        n_documents = sum(shard.counts.documents for shard in self._shards)
        file = _NewFile(descriptor)
        for name in DOCUMENTS:
            file.add(name, -(-n_documents // 8) if name == "continues" else n_documents)

        totals = _Totals()
        languages: dict[str, int] = {}  # in the order in which the tars name them
        parts: dict[str, list[np.ndarray]] = {name: [] for name in ["languages", "continues", *MEMBERS, *UNITS]}
        for number, shard in enumerate(self._shards):
            index = self.index_of(shard)
            file.put("lengths", totals.documents, index.documents["length"])
            file.put("n_bytes", totals.documents, index.documents["n_bytes"])
            codes = np.array([languages.setdefault(name, len(languages)) for name in index.languages], np.uint8)
            parts["languages"].append(codes[index.documents["language"]])
            parts["continues"].append(index.documents["continues"].astype(bool))
            for name, column in _members_and_units(index, number, totals).items():
                parts[name].append(np.asarray(column, _DTYPES[name]))

        # Codes follow the alphabet, and the last name is known behind the last tar.
        columns = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        alphabetic = sorted(languages)
        code_of = np.array([alphabetic.index(name) for name in languages], np.uint8)
        file.put("languages", 0, code_of[columns["languages"]])
        file.put("continues", 0, np.packbits(columns["continues"], bitorder="little"))

        for name in [*MEMBERS, *UNITS]:
            file.add(name, len(columns[name]))
            file.put(name, 0, columns[name])
        file.add("checksums", totals.blocks)
        file.finish(
            identity=self._identity,
            times=self._times(),
            languages=alphabetic,
            documents=n_documents,
            tokens=totals.tokens,
            has_mask=bool((columns["member_mask"] >= 0).any()),
            has_repositories=bool(columns["continues"][1:].any()),
        )

    def index_of(self, shard: Shard) -> ShardIndex:
        """Returns the index of a tar, built and saved if it is missing.

        Raises:
            ArtefactError, OSError: as `_write`.
        """
        tar = self._directory / shard.name
        index = open_index(tar, shard)
        # Read with another width, tokens would be halves or pairs.
        width = token_dtype(self._vocab_size).itemsize
        if index.token_bytes != width and len(index.documents):
            raise ArtefactError(
                f"{tar}: tokens of {index.token_bytes} bytes, but a vocabulary of {self._vocab_size:,} takes "
                f"{width}: build it again with `{BUILD_COMMAND}`"
            )
        return index


@dataclass
class _Totals:
    """Counts of what the tars hold that were added to the index so far."""

    documents: int = 0
    tokens: int = 0
    blocks: int = 0
    members: int = 0


class _NewFile:
    """A file that is being written, column by column."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._end = len(_MAGIC)
        self._columns: dict[str, dict[str, int]] = {}

    def add(self, name: str, count: int) -> None:
        """Reserves the place of a column of `count` elements."""
        offset = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        self._columns[name] = {"offset": offset, "count": count, "checksum": 0}
        self._end = offset + count * np.dtype(_DTYPES[name]).itemsize

    def put(self, name: str, first: int, elements: np.ndarray) -> None:
        """Writes elements of a column from number `first` on, behind all that were written before."""
        column, dtype = self._columns[name], np.dtype(_DTYPES[name])
        content = np.ascontiguousarray(elements, dtype)
        column["checksum"] = zlib.crc32(content.data, column["checksum"])
        _write_at(self._descriptor, content, column["offset"] + first * dtype.itemsize)

    def finish(self, **header: Any) -> None:
        """Writes the header, which completes the file."""
        encoded = json.dumps(header | {"columns": self._columns}).encode()
        # Nothing is written to `checksums` yet. With its space, no process fails to write them later.
        os.posix_fallocate(self._descriptor, 0, self._end + len(encoded) + _SUFFIX.size)
        _write_at(self._descriptor, _MAGIC, 0)
        _write_at(self._descriptor, encoded + _SUFFIX.pack(zlib.crc32(encoded), len(encoded)), self._end)


def _members_and_units(index: ShardIndex, tar: int, totals: _Totals) -> dict[str, Any]:
    """Returns the columns of the members and units of a tar, and adds it to the totals of the tars before it.

    Args:
        tar: its number in the split.
    """
    lengths = np.ascontiguousarray(index.documents["length"])
    n_documents = index.members["documents"].astype(np.int64)  # (members,)
    first = np.cumsum(n_documents) - n_documents
    tokens_before = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])  # (documents + 1,)

    # Blocks of the tokens of a member, then of its mask.
    n_tokens = tokens_before[first + n_documents] - tokens_before[first]
    n_blocks = -(-n_tokens * index.token_bytes // BLOCK)
    n_blocks += np.where(index.members["mask"] >= 0, -(-n_tokens // BLOCK), 0)

    # Documents are numbered in the tar up to here; columns count them in the split.
    unit_first = unit_begins(index.documents["continues"].astype(bool), first)
    unit_ends = [*unit_first[1:].tolist(), len(lengths)]
    columns = {
        "member_begin": index.members["begin"],
        "member_end": index.members["end"],
        "member_tokens": index.members["tokens"],
        "member_mask": index.members["mask"],
        "member_document": totals.documents + first,
        "member_token": totals.tokens + tokens_before[first],
        "member_block": totals.blocks + np.cumsum(n_blocks) - n_blocks,
        "member_tar": np.full(len(first), tar),
        "unit_document": totals.documents + unit_first,
        "unit_token": totals.tokens + tokens_before[unit_first],
        "unit_member": totals.members + np.searchsorted(first, unit_first, side="right") - 1,
        "unit_checksum": [zlib.crc32(lengths[i:j].data) for i, j in zip(unit_first.tolist(), unit_ends, strict=False)],
    }

    totals.documents += len(lengths)
    totals.tokens += int(tokens_before[-1])
    totals.blocks += int(n_blocks.sum())
    totals.members += len(first)
    return columns


def split_index_path(directory: Path, split: str) -> Path:
    """Returns the path of the index of a split of a corpus."""
    return directory / f"{split}.index"


def unit_begins(continues: np.ndarray, member_begins: np.ndarray) -> np.ndarray:
    """Returns the first document of each unit: (units,) int64, rising.

    A unit has at most `UNIT` documents of one member. It holds whole repositories; one of more documents, or of several
    members, is cut. The rest of a cut one is a unit of its own.

    Args:
        continues: (documents,) bool; whether a document is of the repository of the one before it.
        member_begins: (members,) int64; the first document of each, rising; every member has a document.
    """
    n_documents = len(continues)
    member_ends = np.append(member_begins[1:], n_documents)[: len(member_begins)]
    if not continues.any():
        counts = -(-(member_ends - member_begins) // UNIT)
        number_in_member = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(member_begins, counts) + number_in_member * UNIT

    # The last border at or before each document, and the first one behind it.
    numbers = np.arange(n_documents)
    last_border = np.maximum.accumulate(np.where(continues, 0, numbers))
    borders = np.append(np.flatnonzero(~continues), n_documents)

    begins = []
    for begin, member_end in zip(member_begins.tolist(), member_ends.tolist(), strict=True):
        while begin < member_end:
            begins.append(begin)
            end = min(begin + UNIT, member_end)
            if continues[begin]:
                end = min(end, int(borders[np.searchsorted(borders, begin, side="right")]))
            elif end < member_end and last_border.item(end) > begin:
                end = last_border.item(end)
            begin = end
    return np.array(begins, np.int64)


def _identity(shards: Sequence[Shard], vocab_size: int) -> str:
    """Hashes everything in the manifest that the index of a split depends on."""
    digest = hashlib.sha256(f"{vocab_size}".encode())
    for shard in shards:
        counts = f"{shard.counts.documents} {shard.counts.tokens} {shard.counts.bytes}"
        entry = f"\n{shard.name} {shard.size} {shard.sha256} {shard.index_sha256} {shard.members} {counts}"
        digest.update(entry.encode())
    return digest.hexdigest()


def _modified_ns(path: Path) -> int:
    """Returns when a file was changed last, in ns; 0 for a file that is missing."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _read_header(descriptor: int) -> dict[str, Any] | None:
    """Returns the header of a file; None if the file is damaged, or of another version."""
    size = os.fstat(descriptor).st_size
    if size < len(_MAGIC) + _SUFFIX.size or os.pread(descriptor, len(_MAGIC), 0) != _MAGIC:
        return None
    checksum, length = _SUFFIX.unpack(os.pread(descriptor, _SUFFIX.size, size - _SUFFIX.size))
    begin = size - _SUFFIX.size - length
    if length == 0 or begin < len(_MAGIC):
        return None

    encoded = os.pread(descriptor, length, begin)
    if zlib.crc32(encoded) != checksum:
        return None
    header = json.loads(encoded)
    ends = [
        column["offset"] + column["count"] * np.dtype(_DTYPES[name]).itemsize
        for name, column in header["columns"].items()
    ]
    return header if max(ends) == begin else None


def _write_at(descriptor: int, content: Any, offset: int) -> None:
    view = memoryview(content).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Waits until no other process of this node holds the folder; does nothing on a file system without locks."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
