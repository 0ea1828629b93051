"""Where every document lies in a shard, so that a mapped tar can be read at any token.

The index is a cache: it holds nothing that the tar does not, and is built again when it is missing, damaged
or older than its tar. Nothing here unpickles: array headers are parsed as literals, and object arrays are
refused.

File layout: magic (8 bytes), CRC-32 of all that follows (uint32), header length (uint32), header (JSON),
entries.
"""

import io
import json
import logging
import os
import struct
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from dist_lm.errors import ArtefactError
from dist_lm.storage import durable

BUILD_COMMAND = "python -m dist_lm.launch stage=shards"

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
_HEADER_BYTES = 256  # of an npy array: far more than a one-dimensional one needs
_PARTS = ("tokens.npy", "lengths.npy", "bytes.npy", "languages.npy", "meta.json", "mask.npy")


@dataclass(frozen=True)
class ShardIndex:
    """The documents of one tar, in the order in which they lie there."""

    entries: np.ndarray  # (documents,) ENTRY
    languages: tuple[str, ...]  # names of the codes in `entries["language"]`
    tar_size: int  # bytes
    tar_mtime_ns: int
    tar_sha256: str


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
    """The index of `tar`: the file beside it if that can be trusted, else a new one, which is kept if
    possible.

    Raises `ArtefactError` if the tar is missing or is not a shard.
    """
    if not tar.is_file():
        raise ArtefactError(f"{tar} does not exist: build it with `{BUILD_COMMAND}`")
    index = load_index(index_path(tar))
    stat = tar.stat()
    if index is not None and index.tar_size == stat.st_size:
        if index.tar_mtime_ns == stat.st_mtime_ns:
            return index
        if index.tar_sha256 == durable.sha256_of(tar):  # copied or touched: the same bytes under a new time
            index = ShardIndex(index.entries, index.languages, index.tar_size, stat.st_mtime_ns, index.tar_sha256)
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
    """What `save_index` wrote; None if there is no such file or it is not whole."""
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
    return ShardIndex(
        entries=np.frombuffer(body[length:], dtype=ENTRY),
        languages=tuple(header["languages"]),
        tar_size=header["tar_size"],
        tar_mtime_ns=header["tar_mtime_ns"],
        tar_sha256=header["tar_sha256"],
    )


def build_index(tar: Path) -> ShardIndex:
    """Read every member of `tar` once. Raises `ArtefactError` naming the member that does not fit."""
    stat = tar.stat()
    blocks: list[np.ndarray] = []
    languages: list[str] = []
    try:
        with tar.open("rb") as file:
            for key, parts in members(tar):
                blocks.append(_member_entries(tar, key, parts, file, languages))
    except (tarfile.TarError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(f"{tar} is damaged ({error}): build it again with `{BUILD_COMMAND}`") from error
    entries = np.concatenate(blocks) if blocks else np.zeros(0, ENTRY)
    return ShardIndex(entries, tuple(languages), stat.st_size, stat.st_mtime_ns, durable.sha256_of(tar))


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


def _member_entries(
    tar: Path, key: str, parts: dict[str, tarfile.TarInfo], file: io.BufferedReader, languages: list[str]
) -> np.ndarray:
    """The entries of one member; new names are appended to `languages`."""
    if missing := [part for part in _PARTS[:5] if part not in parts]:
        raise ArtefactError(f"{tar}: member {key} has no {missing[0]}; it was not written by stage=shards")
    tokens = _array(tar, parts["tokens.npy"], file, "<u2")
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
    entries["offset"] = tokens.offset + 2 * starts
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
    return entries


def _array(tar: Path, info: tarfile.TarInfo, file: io.BufferedReader, dtype: str) -> _Array:
    """Parse the npy header at a member of the tar, without reading its elements."""
    file.seek(info.offset_data)
    head = io.BytesIO(file.read(min(info.size, _HEADER_BYTES)))
    version = npy.read_magic(head)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, found = read_header(head)
    array = _Array(info.offset_data + head.tell(), np.dtype(dtype), int(np.prod(shape)))
    if found != array.dtype or len(shape) != 1:
        raise ArtefactError(f"{tar}: {info.name} is {found} {shape}, expected a row of {array.dtype}")
    if head.tell() + array.length * array.dtype.itemsize != info.size or array.offset % array.dtype.itemsize:
        raise ArtefactError(f"{tar}: {info.name} is cut short; it is damaged")
    return array


def _keep(index: ShardIndex, tar: Path) -> None:
    """Save the index beside its tar. A folder that cannot be written costs a rebuild each time, no more."""
    if os.access(tar.parent, os.W_OK):
        save_index(index, index_path(tar))
    else:
        logging.getLogger(__name__).warning("%s is not writable: its index is kept in memory only", tar.parent)
