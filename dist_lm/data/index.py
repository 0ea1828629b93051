"""Builds, saves and reads the index of a tar: offsets of members and documents, by which any token is read alone.

The index file beside a tar is a cache. It holds nothing that the tar does not hold, and it is built again if it is
missing, damaged, older than its tar, or not the one that the manifest names. Nothing here unpickles: array headers are
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

from dist_lm.data.manifest import BUILD_COMMAND, Counts, Shard, index_path, is_attached, shard_state
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
        """The hash of the content, the time of the tar excluded."""
        head = json.dumps([self.languages, self.token_bytes, len(self.documents)]).encode()
        return hashlib.sha256(head + self.documents.tobytes() + self.members.tobytes()).hexdigest()

    def counts(self, language: int | None = None) -> Counts:
        """Returns documents, tokens and UTF-8 bytes of one language (a code) or of all (None); zeros for an unknown
        code.
        """
        documents = self.documents
        if language is not None:
            documents = documents[documents["language"] == language]
        return Counts(
            documents=len(documents),
            tokens=int(documents["length"].sum(dtype=np.int64)),
            bytes=int(documents["n_bytes"].sum(dtype=np.int64)),
        )


def open_index(tar: Path, shard: Shard) -> ShardIndex:
    """Returns the index of `tar`: read from the file beside it if the manifest names it, else rebuilt and saved.

    A tar that was touched since the index was written is hashed, which reads it whole; so is one without a usable
    index. In a folder that is not writable nothing is saved, and a warning is logged. The index of an attached corpus
    is only read.

    Raises:
        ArtefactError: the tar is missing or damaged, or differs from its entry `shard` in the manifest.
        OSError: the tar or the index cannot be read, or the index cannot be written.
    """
    if is_attached(tar.parent):
        index = load_index(index_path(tar))
        if index is None or index.sha256 != shard.index_sha256:
            raise ArtefactError(f"{index_path(tar)} is missing or damaged: run `dist-lm data attach` again")
        return index

    # The size costs a `stat`; the hash, which reads the tar, waits until the index gives a reason.
    if (state := shard_state(tar, shard, hashes=False)) != "ok":
        raise ArtefactError(f"{tar}: {state}: build it again with `{BUILD_COMMAND}`")

    mtime_ns = tar.stat().st_mtime_ns
    index = load_index(index_path(tar))
    if index is not None and index.sha256 != shard.index_sha256:
        index = None
    if index is None or index.tar_mtime_ns != mtime_ns:
        if (state := shard_state(tar, shard, hashes=True)) != "ok":
            raise ArtefactError(f"{tar}: {state}: build it again with `{BUILD_COMMAND}`")
        index = build_index(tar) if index is None else replace(index, tar_mtime_ns=mtime_ns)

        # If the folder is read-only, every process rebuilds the index.
        if os.access(tar.parent, os.W_OK):
            save_index(index, index_path(tar))
        else:
            logging.getLogger(__name__).warning("%s is not writable: its index is kept in memory only", tar.parent)

    # A cached and a rebuilt index alike must be the one that the manifest describes.
    if (index.sha256, index.counts(), len(index.members)) != (shard.index_sha256, shard.counts, shard.n_members):
        raise ArtefactError(f"{tar}: other documents than the manifest says: build it again with `{BUILD_COMMAND}`")
    return index


def save_index(index: ShardIndex, path: Path) -> None:
    """Writes `index` durably to `path`, in place of an existing file.

    Raises:
        OSError: the file cannot be written.
    """
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
    """Returns the index that `save_index` wrote to `path`; None if the file is missing, damaged or of another version.

    Whether it fits its tar is not checked. The arrays are read-only.

    Raises:
        OSError: the file is there and cannot be read.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        return None

    body_begin = len(_MAGIC) + _PREFIX.size
    if len(content) < body_begin or not content.startswith(_MAGIC):
        return None

    # The checksum covers the length of the header too: a wrong one would shift all arrays.
    checksum, length = _PREFIX.unpack_from(content, len(_MAGIC))
    body = memoryview(content)[body_begin:]
    if zlib.crc32(body, zlib.crc32(struct.pack("<I", length))) != checksum:
        return None

    header = json.loads(bytes(body[:length]))
    members_begin = length + header["documents"] * DOCUMENT.itemsize
    return ShardIndex(
        documents=np.frombuffer(body[length:members_begin], dtype=DOCUMENT),
        members=np.frombuffer(body[members_begin:], dtype=MEMBER),
        languages=tuple(header["languages"]),
        token_bytes=header["token_bytes"],
        tar_mtime_ns=header["tar_mtime_ns"],
    )


def build_index(tar: Path) -> ShardIndex:
    """Returns the index of `tar`, made from the lengths, sizes and languages of every member; tokens are not read.

    Nothing is written. A tar without members gives an empty index.

    Raises:
        ArtefactError: the tar is damaged, or a member has the wrong form; the message names it.
        OSError: the tar cannot be read.
    """
    documents: list[np.ndarray] = []
    member_rows: list[tuple[int, ...]] = []
    languages: list[str] = []
    widths: set[int] = set()
    try:
        with tar.open("rb") as file:
            for key, parts in members(tar):
                member_documents, tokens, mask_offset = _member(tar, key, parts, file, languages)
                begin = min(part.offset for part in parts.values())
                end = max(part.offset_data + part.size for part in parts.values())
                member_rows.append((begin, end, tokens.offset, mask_offset, len(member_documents)))
                documents.append(member_documents)

                # Offsets are computed from one width, so all members must have it.
                widths.add(tokens.dtype.itemsize)
                if len(widths) > 1:
                    raise ArtefactError(f"{tar}: member {key} has tokens of another width than those before it")
    except (tarfile.TarError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(f"{tar} is damaged ({error}): build it again with `{BUILD_COMMAND}`") from error

    return ShardIndex(
        documents=np.concatenate([np.zeros(0, DOCUMENT), *documents]),
        members=np.array(member_rows, MEMBER),
        languages=tuple(languages),
        token_bytes=max(widths, default=2),
        tar_mtime_ns=tar.stat().st_mtime_ns,
    )


def member_checksums(tar: Path, index: ShardIndex) -> list[int]:
    """Computes the CRC-32 of all bytes of each member, headers included.

    Raises:
        OSError: the tar cannot be read.
    """
    checksums = []
    with tar.open("rb") as file:
        for begin, end in zip(index.members["begin"].tolist(), index.members["end"].tolist(), strict=True):
            file.seek(begin)
            checksums.append(zlib.crc32(file.read(end - begin)))
    return checksums


def members(tar: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Yields the webdataset samples of `tar`: each key with its parts, in the order of the tar.

    Parts have the rest of their file name, such as `tokens.npy`; the key has the folder in the tar. Contents are not
    read, and what is no regular file is passed over.

    Raises:
        tarfile.TarError: the tar is damaged.
        OSError: it cannot be read.
    """
    # Consecutive files of one key are a sample, as webdataset reads them.
    current_key, parts = "", {}

    with tarfile.open(tar, mode="r:") as archive:
        for info in archive:
            if not info.isfile():
                continue
            folder, slash, name = info.name.rpartition("/")
            base, _, part = name.partition(".")
            key = folder + slash + base
            if key != current_key and parts:
                yield current_key, parts
                parts = {}
            current_key = key
            parts[part] = info
    if parts:
        yield current_key, parts


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
    """Reads the documents of one member, where its tokens are, and the offset of its mask (-1: it has none).

    Offsets are bytes in the tar; the documents are (n,) `DOCUMENT`.

    Args:
        parts: of the member, by names such as `tokens.npy`.
        file: the tar, open.
        languages: of the tar; new names are appended, so that a language has one code in all members.

    Raises:
        ArtefactError: a part is missing, of another type, or of another length.
        ValueError, KeyError, TypeError: npy header or JSON of a part is damaged.
    """
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
    # Parts that no document of the member needs are not written.
    if "continues.npy" in parts:
        documents["continues"] = _array(tar, parts["continues.npy"], file, "|u1").read(file)

    mask_offset = -1
    if "mask.npy" in parts:
        mask = _array(tar, parts["mask.npy"], file, "|u1")
        mask_offset = mask.offset
        if mask.length != tokens.length:
            raise ArtefactError(f"{tar}: member {key} has a loss mask of another length; it is damaged")

    code_in_tar = np.zeros(256, np.uint8)
    for code in np.unique(codes):
        name = names[str(code)]
        if name not in languages:
            languages.append(name)
        code_in_tar[code] = languages.index(name)
    documents["language"] = code_in_tar[codes]
    return documents, tokens, mask_offset


def _array(tar: Path, info: tarfile.TarInfo, file: io.BufferedReader, *dtypes: str) -> _Array:
    """Returns offset, type and length of the array in a tar member, from its npy header; the elements are not read.

    Args:
        file: the tar, open; its position moves.
        dtypes: the accepted ones.

    Raises:
        ArtefactError: the array is not one row of such a type, or is cut short.
        ValueError: the header is damaged.
    """
    file.seek(info.offset_data)
    head = io.BytesIO(file.read(min(info.size, _HEADER_BYTES)))
    version = npy.read_magic(head)
    # Shapes and types are parsed as literals; nothing is unpickled.
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read_header(head)
    accepted = [np.dtype(name) for name in dtypes]
    if dtype not in accepted or len(shape) != 1:
        expected = " or ".join(map(str, accepted))
        raise ArtefactError(f"{tar}: {info.name} is {dtype} {shape}, expected a row of {expected}")

    # Elements past the end would be read from the next member.
    array = _Array(info.offset_data + head.tell(), dtype, int(np.prod(shape)))
    if head.tell() + array.length * array.dtype.itemsize != info.size:
        raise ArtefactError(f"{tar}: {info.name} is cut short; it is damaged")
    return array
