"""The index of a tar: where its members and documents lie, so that any token can be read without reading the rest.

The index file beside a tar is a cache. It holds nothing that the tar does not hold, and it is built again if it is
missing, damaged, older than its tar, or another one than the manifest names. Nothing here unpickles: array headers are
parsed as literals, and object arrays are refused.

Layout of an index file: magic (8 bytes), CRC-32 of all that follows (uint32), header length (uint32), header (JSON),
documents, members. `data.shard_writer` describes the tars.
"""

import hashlib
import io
import json
import logging
import os
import struct
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from dist_lm.data.manifest import BUILD_COMMAND, Counts, Shard, shard_state
from dist_lm.errors import ArtefactError
from dist_lm.storage import durable

DOCUMENT = np.dtype(
    [
        ("length", "<u4"),  # tokens
        ("n_bytes", "<u4"),  # UTF-8 bytes of the text
        ("language", "u1"),  # position in `ShardIndex.languages`
        ("continues", "u1"),  # 1: of the repository of the document before it
    ]
)
MEMBER = np.dtype(
    [
        ("begin", "<i8"),  # bytes from the start of the tar to the header of its first part
        ("end", "<i8"),  # bytes to the end of its last part
        ("tokens", "<i8"),  # bytes to its first token
        ("mask", "<i8"),  # bytes to the first element of its loss mask; -1: every token is learned
        ("documents", "<u4"),
    ]
)

_MAGIC = b"DLMIDX4\n"
_PREFIX = struct.Struct("<II")
_HEADER_BYTES = 256  # upper bound for the header of a one-dimensional npy array
_PARTS = ("tokens.npy", "lengths.npy", "bytes.npy", "languages.npy", "meta.json")


@dataclass(frozen=True)
class ShardIndex:
    """The documents and members of one tar, in the order of the tar."""

    documents: np.ndarray  # (documents,) DOCUMENT
    members: np.ndarray  # (members,) MEMBER
    languages: tuple[str, ...]  # names of the codes in `documents["language"]`
    token_bytes: int  # 2 or 4: tokens are uint16 or uint32
    tar_mtime_ns: int

    @cached_property
    def sha256(self) -> str:
        """Hash of the content, the time of the tar excluded."""
        head = json.dumps([self.languages, self.token_bytes, len(self.documents)]).encode()
        return hashlib.sha256(head + self.documents.tobytes() + self.members.tobytes()).hexdigest()

    def counts(self, language: int | None = None) -> Counts:
        """Amounts of text, of one language or of all."""
        chosen = self.documents if language is None else self.documents[self.documents["language"] == language]
        return Counts(
            documents=len(chosen),
            tokens=int(chosen["length"].sum(dtype=np.int64)),
            bytes=int(chosen["n_bytes"].sum(dtype=np.int64)),
        )


def index_path(tar: Path) -> Path:
    """The index beside `tar`."""
    return tar.with_suffix(".index")


def open_index(tar: Path, shard: Shard) -> ShardIndex:
    """The index of `tar`: read from the file beside it if that is the one of the manifest, else rebuilt and saved.

    A tar that was touched since is hashed.

    Raises:
        ArtefactError: the tar is missing or differs from its entry `shard` in the manifest.
    """
    if (state := shard_state(tar, shard, hashes=False)) != "ok":
        raise ArtefactError(f"{tar}: {state}: build it again with `{BUILD_COMMAND}`")
    mtime_ns = tar.stat().st_mtime_ns
    index = load_index(index_path(tar))
    known = index is not None and index.sha256 == shard.index_sha256
    if index is None or not known or index.tar_mtime_ns != mtime_ns:
        if (state := shard_state(tar, shard, hashes=True)) != "ok":
            raise ArtefactError(f"{tar}: {state}: build it again with `{BUILD_COMMAND}`")
        index = replace(index, tar_mtime_ns=mtime_ns) if index is not None and known else build_index(tar)
        _keep(index, tar)
    if (index.sha256, index.counts(), len(index.members)) != (shard.index_sha256, shard.counts, len(shard.checksums())):
        raise ArtefactError(f"{tar}: other documents than the manifest says: build it again with `{BUILD_COMMAND}`")
    return index


def save_index(index: ShardIndex, path: Path) -> None:
    """Write `index` durably to `path`."""
    header = json.dumps(
        {
            "languages": index.languages,
            "token_bytes": index.token_bytes,
            "documents": len(index.documents),
            "tar_mtime_ns": index.tar_mtime_ns,
        }
    ).encode()
    body = header + index.documents.tobytes() + index.members.tobytes()
    length = len(header)
    checksum = zlib.crc32(body, zlib.crc32(struct.pack("<I", length)))
    durable.write_bytes(path, _MAGIC + _PREFIX.pack(checksum, length) + body)


def load_index(path: Path) -> ShardIndex | None:
    """Read an index that `save_index` wrote; None if the file is missing or damaged."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        return None
    start = len(_MAGIC) + _PREFIX.size
    if len(content) < start or not content.startswith(_MAGIC):
        return None
    checksum, length = _PREFIX.unpack_from(content, len(_MAGIC))
    body = memoryview(content)[start:]
    if zlib.crc32(body, zlib.crc32(struct.pack("<I", length))) != checksum:
        return None
    header = json.loads(bytes(body[:length]))
    members = length + header["documents"] * DOCUMENT.itemsize
    return ShardIndex(
        documents=np.frombuffer(body[length:members], dtype=DOCUMENT),
        members=np.frombuffer(body[members:], dtype=MEMBER),
        languages=tuple(header["languages"]),
        token_bytes=header["token_bytes"],
        tar_mtime_ns=header["tar_mtime_ns"],
    )


def build_index(tar: Path) -> ShardIndex:
    """Index `tar` by reading every member once.

    Raises:
        ArtefactError: a member has the wrong form; the message names it.
    """
    documents: list[np.ndarray] = []
    places: list[tuple[int, ...]] = []
    languages: list[str] = []
    widths: set[int] = set()
    try:
        with tar.open("rb") as file:
            for key, parts in members(tar):
                own, tokens, mask_offset = _member(tar, key, parts, file, languages)
                begin = min(part.offset for part in parts.values())
                end = max(part.offset_data + part.size for part in parts.values())
                places.append((begin, end, tokens.offset, mask_offset, len(own)))
                documents.append(own)
                widths.add(tokens.dtype.itemsize)
                if len(widths) > 1:
                    raise ArtefactError(f"{tar}: member {key} has tokens of another width than those before it")
    except (tarfile.TarError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(f"{tar} is damaged ({error}): build it again with `{BUILD_COMMAND}`") from error
    return ShardIndex(
        documents=np.concatenate([np.zeros(0, DOCUMENT), *documents]),
        members=np.array(places, MEMBER),
        languages=tuple(languages),
        token_bytes=max(widths, default=2),
        tar_mtime_ns=tar.stat().st_mtime_ns,
    )


def member_checksums(tar: Path, index: ShardIndex) -> list[int]:
    """CRC-32 of all bytes of each member."""
    with tar.open("rb") as file:
        found = []
        for begin, end in zip(index.members["begin"].tolist(), index.members["end"].tolist(), strict=True):
            file.seek(begin)
            found.append(zlib.crc32(file.read(end - begin)))
    return found


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


@dataclass(frozen=True)
class _Array:
    """A one-dimensional npy array inside a tar."""

    offset: int  # bytes from the start of the tar to its first element
    dtype: np.dtype
    length: int

    def read(self, file: io.BufferedReader) -> np.ndarray:
        file.seek(self.offset)
        return np.frombuffer(file.read(self.length * self.dtype.itemsize), dtype=self.dtype)


def _member(
    tar: Path, key: str, parts: dict[str, tarfile.TarInfo], file: io.BufferedReader, languages: list[str]
) -> tuple[np.ndarray, _Array, int]:
    """The documents of one member, its tokens, and the offset of its mask. Appends new names to `languages`."""
    if missing := [part for part in _PARTS if part not in parts]:
        raise ArtefactError(f"{tar}: member {key} has no {missing[0]}; it was not written by stage=shards")
    tokens = _array(tar, parts["tokens.npy"], file, "<u2", "<u4")
    lengths = _array(tar, parts["lengths.npy"], file, "<u4").read(file)
    n_bytes = _array(tar, parts["bytes.npy"], file, "<u4").read(file)
    codes = _array(tar, parts["languages.npy"], file, "|u1").read(file)
    file.seek(parts["meta.json"].offset_data)
    names = json.loads(file.read(parts["meta.json"].size))["languages"]

    if not len(lengths) == len(n_bytes) == len(codes) or tokens.length != lengths.sum(dtype=np.int64):
        raise ArtefactError(f"{tar}: member {key} has arrays of different lengths; it is damaged")
    documents = np.zeros(len(lengths), DOCUMENT)
    documents["length"], documents["n_bytes"] = lengths, n_bytes
    if "continues.npy" in parts:
        documents["continues"] = _array(tar, parts["continues.npy"], file, "|u1").read(file)
    mask_offset = -1
    if "mask.npy" in parts:
        mask = _array(tar, parts["mask.npy"], file, "|u1")
        mask_offset = mask.offset
        if mask.length != tokens.length:
            raise ArtefactError(f"{tar}: member {key} has a loss mask of another length; it is damaged")
    recode = np.zeros(256, np.uint8)
    for code in np.unique(codes):
        name = names[str(code)]
        if name not in languages:
            languages.append(name)
        recode[code] = languages.index(name)
    documents["language"] = recode[codes]
    return documents, tokens, mask_offset


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
    if head.tell() + array.length * array.dtype.itemsize != info.size:
        raise ArtefactError(f"{tar}: {info.name} is cut short; it is damaged")
    return array


def _keep(index: ShardIndex, tar: Path) -> None:
    """Save the index beside its tar. If the folder is read-only, every process rebuilds the index."""
    if os.access(tar.parent, os.W_OK):
        save_index(index, index_path(tar))
    else:
        logging.getLogger(__name__).warning("%s is not writable: its index is kept in memory only", tar.parent)
