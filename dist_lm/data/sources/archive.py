"""Zip files of this machine: their members are files, named as if the zip were a folder (`/data/a.zip/notes/b.jsonl`).

The directory of a zip is read once. A member is read where the directory says it lies, and must be what it says. A zip
whose members share bytes, or that would unpack to more than a thousand times its size, is made to fill a machine, and
is refused before anything is unpacked.
"""

import io
import os
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from dist_lm.data.sources.decompression import check_proportion
from dist_lm.data.sources.failures import RefusedContentError
from dist_lm.tracking.readable import counted, listed

SUFFIX = ".zip"
ARCHIVE = re.compile(r"[.](?:zip|tgz|7z|rar|tar(?:[.](?:gz|zst|zstd|xz|bz2))?)$", re.IGNORECASE)
NAMED = 3  # archives that a hint names
MEMBER = re.compile(r"(.*?[.]zip)/(.+)", re.IGNORECASE | re.DOTALL)
MOST_MEMBERS = 1_000_000  # the directory stays in memory while its zip is read
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile unpacks the others without a limit of memory
SIGNATURE = b"PK\x03\x04"
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field
ENCRYPTED = 0x1  # flag of a member
ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, struct.error)


def is_zip(name: str) -> bool:
    """Tells whether a name is that of a zip file."""
    return name.lower().endswith(SUFFIX)


def unread_archives(names: Collection[str]) -> str:
    """Returns one line for people about archives that a source leaves out, with the way out; empty without any.

    Args:
        names: names of files, archives or not.
    """
    suffix_of = {name: match[0].lower() for name in sorted(names) if (match := ARCHIVE.search(name))}
    if not suffix_of:
        return ""

    suffixes = Counter(suffix_of.values())
    kinds = ", ".join(f"{suffix}: {count}" for suffix, count in suffixes.most_common())
    way_out = "unpack what should be read"
    if SUFFIX in suffixes:
        way_out += ", or name the zip beside the folder"
    return f"not opened: {counted(len(suffix_of), 'archive')} ({kinds}): {listed([*suffix_of], NAMED)}: {way_out}"


def zip_of(name: str) -> tuple[str, str]:
    """Returns the zip and the member that a name is of; two empty texts if it is of no zip on this machine."""
    match = MEMBER.fullmatch(name)
    while match:
        # A folder may be named like a zip.
        if Path(match[1]).is_file():
            return match[1], match[2]
        match = re.compile(rf"({re.escape(match[1])}/.*?[.]zip)/(.+)", re.IGNORECASE | re.DOTALL).fullmatch(name)
    return "", ""


def members_of(path: str) -> dict[str, zipfile.ZipInfo]:
    """Returns the members of a zip by name, in the order of a walk through folders; folders are left out.

    Raises:
        RefusedContentError: a member is encrypted or packed by an unusual method, a name is there twice, or the zip is
            one that is made to fill a machine.
        OSError: the zip cannot be opened, or is damaged.
    """
    status = os.stat(path)  # noqa: PTH116
    return _members(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=2)
def _members(path: str, size: int, mtime_ns: int) -> dict[str, zipfile.ZipInfo]:
    """Returns what `members_of` does, and remembers it; `size` and `mtime_ns` are those of the file, by which another
    one is read anew.

    Raises:
        OSError: the file is no zip, or damaged.
        RefusedContentError: the zip has too many members, one that is not unpacked, or looks like a bomb.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except ERRORS as error:
        raise OSError(f"no zip file that can be read ({error})") from None
    except ValueError as error:  # offsets of a damaged directory
        raise OSError(f"damaged directory ({error})") from None

    if len(entries) > MOST_MEMBERS:
        raise RefusedContentError(f"it has {len(entries):,} members, at most {MOST_MEMBERS:,} are read: divide it")
    check_proportion(sum(entry.file_size for entry in entries), size)

    members: dict[str, zipfile.ZipInfo] = {}
    end = 0  # end of the member before, in the zip
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.header_offset < end:
            raise RefusedContentError("its members share bytes, as in a zip that is made to fill a machine")
        # The least that a member takes: an extra field may stand behind its name.
        end = entry.header_offset + LOCAL_HEADER.size + len(entry.orig_filename) + entry.compress_size
        if entry.is_dir():
            continue
        _check(entry)
        if entry.filename in members:
            raise RefusedContentError(f"it has two members {entry.filename}: unpack it")
        members[entry.filename] = entry
    return dict(sorted(members.items(), key=lambda item: item[0].split("/")))


def _check(entry: zipfile.ZipInfo) -> None:
    """Refuses a member of a zip archive that this package does not unpack.

    Raises:
        RefusedContentError: the member is encrypted, packed by a method that is not in `METHODS`, or so much larger
            than its packed form as only a bomb is.
    """
    if entry.flag_bits & ENCRYPTED:
        raise RefusedContentError(f"its member {entry.filename} is encrypted: unpack it with the password")
    if entry.compress_type not in METHODS:
        raise RefusedContentError(
            f"its member {entry.filename} is packed by method {entry.compress_type}, which is not read: unpack it, or "
            "pack it with zip"
        )
    check_proportion(entry.file_size, entry.compress_size)


class StoredMember(io.RawIOBase):
    """The bytes of a member as they are stored in its zip."""

    def __init__(self, path: str, member: str) -> None:
        """Opens the zip.

        Raises:
            FileNotFoundError: there is no such zip or member.
            OSError: as `members_of`, or the member does not lie where the directory says.
        """
        entry = members_of(path).get(member)
        if entry is None:
            raise FileNotFoundError(f"{path} has no member {member}")
        self.entry = entry

        self._file: IO[bytes] = Path(path).open("rb", buffering=0)  # noqa: SIM115  closed with this file
        try:
            self._file.seek(self.entry.header_offset)
            signature, n_name, n_extra = LOCAL_HEADER.unpack(self._file.read(LOCAL_HEADER.size))
            if signature != SIGNATURE:
                raise OSError("a member does not lie where the directory says")
        except struct.error:
            self._file.close()
            raise OSError("a member lies behind the end") from None
        except OSError:
            self._file.close()
            raise

        # These lengths may differ from those in the directory.
        self._start = self.entry.header_offset + LOCAL_HEADER.size + n_name + n_extra
        self._file.seek(self._start)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file.fileno()

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.entry.compress_size}[whence]
        self._position = base + offset
        self._file.seek(self._start + self._position)
        return self._position

    def readinto(self, buffer: Any) -> int:
        room = min(len(buffer), max(0, self.entry.compress_size - self._position))
        content = self._file.read(room)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()


class UnpackedMember(io.RawIOBase):
    """The content of a member. Reading to its end compares it with the CRC of the directory."""

    def __init__(self, stored: Any, entry: zipfile.ZipInfo) -> None:
        """`stored`: its stored bytes, from their start; closed with this file."""
        self._stored = stored
        try:
            self._content = zipfile.ZipExtFile(stored, "r", entry)
        except ERRORS as error:
            raise OSError(f"{error}") from None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills a part of `buffer`; returns the number of bytes, 0 at the end.

        Raises:
            OSError: the member is truncated or damaged.
        """
        try:
            content = self._content.read1(len(buffer))
        except ERRORS as error:
            raise OSError(f"{error}".strip() or "the end of the member is missing") from None
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._stored.close()
        super().close()
