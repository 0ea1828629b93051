"""A corpus on disk: webdataset tars, an index of every tar, and the split of a corpus that is mapped into memory.

Any token of any document can be read without reading the rest, because the index says where every document lies in its
tar. The index is a cache. It holds nothing that the tar does not hold, and it is built again when it is missing,
damaged or older than its tar. Nothing here unpickles: array headers are parsed as literals, and object arrays are
refused.

Layout of an index file: magic (8 bytes), CRC-32 of all that follows (uint32), header length (uint32), header (JSON),
entries. `data.shard_writer` describes the tars.
"""

import io
import json
import logging
import mmap
import os
import struct
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from dist_lm.data.manifest import BUILD_COMMAND, read_manifest, shard_state
from dist_lm.errors import ArtefactError
from dist_lm.storage import durable

ENTRY = np.dtype(
    [
        ("offset", "<i8"),  # bytes from the start of the tar to the document's first token
        ("mask_offset", "<i8"),  # bytes to the first element of its loss mask; -1: every token is learned
        ("length", "<u4"),  # tokens
        ("n_bytes", "<u4"),  # UTF-8 bytes of the text
        ("language", "u1"),  # position in `ShardIndex.languages`
    ]
)

_MAGIC = b"DLMIDX1\n"
_PREFIX = struct.Struct("<II")
_HEADER_BYTES = 256  # upper bound for the header of a one-dimensional npy array
_PARTS = ("tokens.npy", "lengths.npy", "bytes.npy", "languages.npy", "meta.json", "mask.npy")


@dataclass(frozen=True)
class ShardIndex:
    """The documents of one tar, in the order of the tar."""

    entries: np.ndarray  # (documents,) ENTRY
    languages: tuple[str, ...]  # names of the codes in `entries["language"]`
    token_bytes: int  # 2 or 4: tokens are uint16 or uint32
    tar_size: int  # bytes
    tar_mtime_ns: int
    tar_sha256: str


class MappedCorpus:
    """The documents of one split, numbered in the order of its tars.

    Read-only. Properties of all documents are arrays; there is no object for each document.
    """

    def __init__(self, directory: Path, split: str, tars: list[Path], indices: list[ShardIndex]) -> None:
        """Use `open` instead. `indices`: one for each tar."""
        self.directory = directory
        self.split = split
        self.languages = sorted({name for index in indices for name in index.languages})
        entries = [index.entries for index in indices]
        self.lengths = _column(entries, "length", np.int64)  # (documents,) tokens
        self.n_bytes = _column(entries, "n_bytes", np.int64)  # (documents,) UTF-8 bytes
        self.language_codes = np.concatenate([self._recode(index) for index in indices])  # (documents,) uint8
        self.n_documents = len(self.lengths)
        self.n_tokens = int(self.lengths.sum())

        self._shard = np.repeat(np.arange(len(tars)), [len(shard) for shard in entries])
        token_bytes = np.repeat([index.token_bytes for index in indices], [len(shard) for shard in entries])
        self._start = _column(entries, "offset", np.int64) // token_bytes  # tokens from the start of the tar
        self._mask_start = _column(entries, "mask_offset", np.int64)
        self.has_mask = bool((self._mask_start >= 0).any())
        self._bytes = [_map(tar) for tar in tars]
        self._tokens = [
            content.view(f"<u{index.token_bytes}") for content, index in zip(self._bytes, indices, strict=True)
        ]

    @classmethod
    def open(cls, directory: Path, split: str) -> "MappedCorpus":
        """Map every tar that the manifest lists for `split`.

        Compares sizes and the hashes stored in the indices. A tar that was touched since is hashed again.

        Raises:
            ArtefactError: the corpus or the split is missing, empty, or differs from the manifest.
        """
        manifest = read_manifest(directory)
        shards = manifest.splits[split].shards if split in manifest.splits else ()
        if not shards:
            raise ArtefactError(
                f"corpus {directory} has no {split} documents: give it more text or another "
                f"corpus.val_fraction, then `{BUILD_COMMAND}`"
            )
        tars = [directory / shard.name for shard in shards]
        for tar, shard in zip(tars, shards, strict=True):
            if (state := shard_state(tar, shard, hashes=False)) != "ok":
                raise ArtefactError(f"{tar}: {state}: build the corpus again with `{BUILD_COMMAND}`")
        indices = [open_index(tar) for tar in tars]
        for tar, shard, index in zip(tars, shards, indices, strict=True):
            if index.tar_sha256 != shard.sha256:
                raise ArtefactError(
                    f"{tar}: other contents than the manifest says (sha256): build it again with `{BUILD_COMMAND}`"
                )
        return cls(directory, split, tars, indices)

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a document: a view (stop - start,) uint16 or uint32, read-only."""
        begin = self._start.item(document)  # a Python integer is much faster than a NumPy one
        return self._tokens[self._shard.item(document)][begin + start : begin + stop]

    def mask(self, document: int, start: int, stop: int) -> np.ndarray:
        """The loss mask of tokens [start, stop): (stop - start,) uint8; ones if the document has no mask."""
        begin = self._mask_start.item(document)
        if begin < 0:
            return np.ones(stop - start, np.uint8)
        return self._bytes[self._shard.item(document)][begin + start : begin + stop]

    def _recode(self, index: ShardIndex) -> np.ndarray:
        """Language codes of one shard as positions in `self.languages`."""
        codes = np.array([self.languages.index(name) for name in index.languages], np.uint8)
        return codes[index.entries["language"]]


@dataclass(frozen=True)
class _Array:
    """A one-dimensional npy array inside a tar."""

    offset: int  # bytes from the start of the tar to its first element
    dtype: np.dtype
    length: int

    def read(self, file: io.BufferedReader) -> np.ndarray:
        file.seek(self.offset)
        return np.frombuffer(file.read(self.length * self.dtype.itemsize), dtype=self.dtype)


def index_path(tar: Path) -> Path:
    """The index beside `tar`."""
    return tar.with_suffix(".index")


def open_index(tar: Path) -> ShardIndex:
    """The index of `tar`: read from the file beside it if that is valid, else rebuilt and saved.

    Raises:
        ArtefactError: the tar is missing or is not a shard.
    """
    if not tar.is_file():
        raise ArtefactError(f"{tar} does not exist: build it with `{BUILD_COMMAND}`")
    index = load_index(index_path(tar))
    stat = tar.stat()
    if index is not None and index.tar_size == stat.st_size:
        if index.tar_mtime_ns == stat.st_mtime_ns:
            return index
        if index.tar_sha256 == durable.sha256_of(tar):  # copied or touched: same bytes, new time
            index = replace(index, tar_mtime_ns=stat.st_mtime_ns)
            _keep(index, tar)
            return index
    index = build_index(tar)
    _keep(index, tar)
    return index


def save_index(index: ShardIndex, path: Path) -> None:
    """Write `index` durably to `path`."""
    header = json.dumps(
        {
            "languages": index.languages,
            "token_bytes": index.token_bytes,
            "tar_size": index.tar_size,
            "tar_mtime_ns": index.tar_mtime_ns,
            "tar_sha256": index.tar_sha256,
        }
    ).encode()
    body = header + index.entries.tobytes()
    length = len(header)
    checksum = zlib.crc32(body, zlib.crc32(struct.pack("<I", length)))
    durable.write_bytes(path, _MAGIC + _PREFIX.pack(checksum, length) + body)


def load_index(path: Path) -> ShardIndex | None:
    """Read an index that `save_index` wrote; None if the file is missing or damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    start = len(_MAGIC) + _PREFIX.size
    if len(content) < start or not content.startswith(_MAGIC):
        return None
    checksum, length = _PREFIX.unpack_from(content, len(_MAGIC))
    body = memoryview(content)[start:]
    if zlib.crc32(body, zlib.crc32(struct.pack("<I", length))) != checksum:
        return None
    header = json.loads(bytes(body[:length]))
    if "token_bytes" not in header:
        return None  # of an earlier version
    return ShardIndex(
        entries=np.frombuffer(body[length:], dtype=ENTRY),
        languages=tuple(header["languages"]),
        token_bytes=header["token_bytes"],
        tar_size=header["tar_size"],
        tar_mtime_ns=header["tar_mtime_ns"],
        tar_sha256=header["tar_sha256"],
    )


def build_index(tar: Path) -> ShardIndex:
    """Index `tar` by reading every member once.

    Raises:
        ArtefactError: a member has the wrong form; the message names it.
    """
    stat = tar.stat()
    blocks: list[np.ndarray] = []
    languages: list[str] = []
    widths: set[int] = set()
    try:
        with tar.open("rb") as file:
            for key, parts in members(tar):
                entries, token_bytes = _member_entries(tar, key, parts, file, languages)
                blocks.append(entries)
                widths.add(token_bytes)
                if len(widths) > 1:
                    raise ArtefactError(f"{tar}: member {key} has tokens of another width than those before it")
    except (tarfile.TarError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(f"{tar} is damaged ({error}): build it again with `{BUILD_COMMAND}`") from error
    entries = np.concatenate(blocks) if blocks else np.zeros(0, ENTRY)
    return ShardIndex(
        entries, tuple(languages), max(widths, default=2), stat.st_size, stat.st_mtime_ns, durable.sha256_of(tar)
    )


def members(tar: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """The webdataset samples of `tar`: each key with its parts, in the order of the tar."""
    current, parts = "", {}
    with tarfile.open(tar, mode="r:") as archive:
        for info in archive:
            if not info.isfile():
                continue
            folder, _, name = info.name.rpartition("/")
            base, _, part = name.partition(".")
            key = f"{folder}/{base}" if folder else base
            if key != current and parts:
                yield current, parts
                parts = {}
            current = key
            parts[part] = info
    if parts:
        yield current, parts


def _column(entries: list[np.ndarray], name: str, dtype: type) -> np.ndarray:
    return np.concatenate([shard[name].astype(dtype) for shard in entries])


def _map(path: Path) -> np.ndarray:
    """The file as a read-only uint8 array. Slicing a `np.memmap` would cost several times as much."""
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _member_entries(
    tar: Path, key: str, parts: dict[str, tarfile.TarInfo], file: io.BufferedReader, languages: list[str]
) -> tuple[np.ndarray, int]:
    """The entries of one member, and the bytes of a token. Appends new language names to `languages`."""
    if missing := [part for part in _PARTS[:5] if part not in parts]:
        raise ArtefactError(f"{tar}: member {key} has no {missing[0]}; it was not written by stage=shards")
    tokens = _array(tar, parts["tokens.npy"], file, "<u2", "<u4")
    lengths = _array(tar, parts["lengths.npy"], file, "<u4").read(file)
    n_bytes = _array(tar, parts["bytes.npy"], file, "<u4").read(file)
    codes = _array(tar, parts["languages.npy"], file, "|u1").read(file)
    file.seek(parts["meta.json"].offset_data)
    names = json.loads(file.read(parts["meta.json"].size))["languages"]

    ends = np.cumsum(lengths, dtype=np.int64)
    whole = len(lengths) == len(n_bytes) == len(codes) and tokens.length == (ends[-1] if len(ends) else 0)
    if not whole:
        raise ArtefactError(f"{tar}: member {key} has arrays of different lengths; it is damaged")
    entries = np.zeros(len(lengths), ENTRY)
    starts = ends - lengths
    entries["offset"] = tokens.offset + tokens.dtype.itemsize * starts
    entries["length"], entries["n_bytes"], entries["mask_offset"] = lengths, n_bytes, -1
    if "mask.npy" in parts:
        mask = _array(tar, parts["mask.npy"], file, "|u1")
        if mask.length != tokens.length:
            raise ArtefactError(f"{tar}: member {key} has a loss mask of another length; it is damaged")
        entries["mask_offset"] = mask.offset + starts
    recode = np.zeros(256, np.uint8)
    for code in np.unique(codes):
        name = names[str(code)]
        if name not in languages:
            languages.append(name)
        recode[code] = languages.index(name)
    entries["language"] = recode[codes]
    return entries, tokens.dtype.itemsize


def _array(tar: Path, info: tarfile.TarInfo, file: io.BufferedReader, *dtypes: str) -> _Array:
    """Parse the npy header of a tar member without reading the elements. `dtypes`: those that are accepted."""
    file.seek(info.offset_data)
    head = io.BytesIO(file.read(min(info.size, _HEADER_BYTES)))
    version = npy.read_magic(head)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, found = read_header(head)
    accepted = [np.dtype(dtype) for dtype in dtypes]
    if found not in accepted or len(shape) != 1:
        expected = " or ".join(map(str, accepted))
        raise ArtefactError(f"{tar}: {info.name} is {found} {shape}, expected a row of {expected}")
    array = _Array(info.offset_data + head.tell(), found, int(np.prod(shape)))
    if head.tell() + array.length * array.dtype.itemsize != info.size or array.offset % array.dtype.itemsize:
        raise ArtefactError(f"{tar}: {info.name} is cut short; it is damaged")
    return array


def _keep(index: ShardIndex, tar: Path) -> None:
    """Save the index beside its tar. If the folder is read-only, every process rebuilds the index."""
    if os.access(tar.parent, os.W_OK):
        save_index(index, index_path(tar))
    else:
        logging.getLogger(__name__).warning("%s is not writable: its index is kept in memory only", tar.parent)
