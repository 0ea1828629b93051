"""Reads the files of a source as they were when they were listed, however often they are read.

A build reads its sources several times: to choose val, to compare, to tokenize. If a file changed in between, text that
one pass held out could be train in the next. So a snapshot lists the files once. It hashes what the first whole reading
of a file reads, and every later reading must read the same bytes. A plain text that grew is read up to its old end; any
other change is an error that names the file.
"""

import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.inputs import Input, Inputs, difference, inputs_of
from dist_lm.data.sources.archive import StoredMember
from dist_lm.data.sources.listing import remote_input
from dist_lm.data.sources.opening import (
    BUFFER,
    HttpFile,
    compression_of,
    decompressed,
    filesystem,
    open_raw,
    scheme_of,
    unpacked,
)
from dist_lm.errors import ChangedInputError

SECOND_NS = 10**9
DIGEST = 16  # bytes kept of the hash of a file
STORES = ("s3", "gs")  # schemes whose files tell their time only when asked


class Snapshot:
    """The files of one source, and what their first reading read.

    Memory grows by about 150 bytes a file that is read, beside the listing.
    """

    def __init__(self, list_files: Callable[[], Inputs]) -> None:
        """`list_files`: called once, when the files are first needed."""
        self._list_files = list_files
        self._digests: dict[str, bytes] = {}  # name -> hash of the bytes that its first whole reading read

    @classmethod
    def of(cls, source: SourceConfig) -> "Snapshot":
        """Returns a snapshot of the files that the reader of `source` lists."""
        return cls(partial(inputs_of, source))

    @cached_property
    def listing(self) -> Inputs:
        """The files of the source, listed once.

        Raises:
            ConfigError, ArtefactError: as `inputs_of`.
        """
        return self._list_files()

    @contextmanager
    def reading(self, file: Input) -> Iterator["FileReading"]:
        """Gives one file to a block that reads it whole.

        What the block read is compared with earlier readings when it ends. A block that is left early, by an error or
        because its generator is closed, is not compared.

        Args:
            file: one of `listing.taken`.

        Raises:
            ChangedInputError: the file is not as it was listed, or the bytes differ from those of the first reading.
        """
        reading = FileReading(file)
        try:
            yield reading
            digest = reading.finish(is_first=file.name not in self._digests)
        finally:
            reading.close()
        if digest != self._digests.setdefault(file.name, digest):
            raise ChangedInputError(file.name, "other contents than at the first reading")


class FileReading:
    """One reading of a listed file."""

    def __init__(self, listed: Input) -> None:
        self.name = listed.name
        self._listed = listed
        self._file: _ListedFile | None = None

    def open_raw(self, *, random_access: bool = False, may_grow: bool = False) -> io.RawIOBase:
        """Returns the file as it is stored, up to the size that was listed.

        Args:
            random_access: as in `opening.open_raw`.
            may_grow: whether a file that is larger now is read up to its old end.

        Raises:
            ChangedInputError: the file is not as it was listed, or missing.
            OSError: it cannot be opened.
        """
        assert self._file is None, "a reading opens its file once"
        try:
            raw = open_raw(self.name, random_access=random_access)
        except FileNotFoundError as error:
            raise ChangedInputError(self.name, "it is missing") from error
        if isinstance(raw, HttpFile):
            raw.may_grow = may_grow
        self._file = _ListedFile(raw, self._listed, may_grow and not isinstance(raw, StoredMember))
        self._file.check(self._file.as_opened())
        return self._file

    def open_content(self, *, may_grow: bool = False) -> io.BufferedReader:
        """Returns the file decompressed by suffix; reading a truncated one ends in OSError.

        Args:
            may_grow: as in `open_raw`; a compressed file never may.

        Raises:
            ChangedInputError, OSError: as `open_raw`.
        """
        compression = compression_of(self.name)
        raw = self.open_raw(may_grow=may_grow and not compression)
        return io.BufferedReader(decompressed(unpacked(raw, self.name), compression), BUFFER)

    def open_seekable(self) -> Any:
        """Returns the file as it is stored, for random access; of a member of a zip its content, in a temporary file.

        Raises:
            ChangedInputError, OSError: as `open_raw`; or OSError: the member is damaged, or the disk is full.
        """
        raw = self.open_raw(random_access=True)
        content = unpacked(raw, self.name)
        if content is raw:
            return raw
        copy = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
        shutil.copyfileobj(content, copy, BUFFER)
        copy.seek(0)
        return copy

    def has_grown(self) -> bool:
        """Tells whether the file is larger now than it was listed, so that its last line may be unfinished."""
        return self._file is not None and self._file.has_grown()

    def finish(self, *, is_first: bool) -> bytes:
        """Returns the hash of the bytes that were read.

        Args:
            is_first: no earlier reading tells whether the file changed while it was read.

        Raises:
            ChangedInputError: the file changed while it was read.
        """
        if self._file is None:
            return b""
        # Stores are asked once: a request for each file in each pass would be too slow, and the hash tells later.
        if is_first or scheme_of(self.name) not in STORES:
            self._file.check(self._file.now())
        return self._file.digest()

    def close(self) -> None:
        """Closes the file; the reader may have closed its content before."""
        if self._file is not None:
            self._file.release()


class _ListedFile(io.RawIOBase):
    """A stored file up to the size that was listed; hashes what is read."""

    def __init__(self, raw: Any, listed: Input, may_grow: bool) -> None:
        self._raw = raw
        self._listed = listed
        self._may_grow = may_grow
        self._position = self._hashed_to = 0  # bytes from the start; the hash covers what was read up to the second one
        self._hash = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._raw.seekable()

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to a position and returns it; the end is the one that was listed."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: max(0, self._listed.size)}[whence]
        self._position = self._raw.seek(base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fills `buffer` from the position, as far as the listed size reaches; returns the number of bytes.

        Raises:
            ChangedInputError: the file ends before its listed size.
            OSError: it cannot be read.
        """
        room = memoryview(buffer)
        if self._listed.size >= 0:
            room = room[: max(0, self._listed.size - self._position)]
        if not room:
            return 0

        content = self._raw.read(len(room))
        if not content and self._listed.size >= 0:
            raise ChangedInputError(self._listed.name, f"{self._position:,} bytes, was {self._listed.size:,}")
        room[: len(content)] = content

        # Places to which the reader jumps are hashed too: equal hashes mean equal bytes in equal places.
        if self._position != self._hashed_to:
            self._hash.update(b"at %d" % self._position)
        self._hash.update(content)
        self._position += len(content)
        self._hashed_to = self._position
        return len(content)

    def release(self) -> None:
        """Closes the stored file, which `close` does not: `now` asks for its state behind the last byte."""
        self._raw.close()

    def digest(self) -> bytes:
        return self._hash.digest()[:DIGEST]

    def has_grown(self) -> bool:
        return self._may_grow and self.now().size > self._listed.size >= 0

    def check(self, now: Input) -> None:
        """Refuses a file that is not as it was listed; returns nothing. `now`: what is known about it.

        Raises:
            ChangedInputError: names the difference.
        """
        # A larger plain text may be the old one with lines behind it; the hash of the old part tells.
        if self._may_grow and now.size > self._listed.size >= 0:
            return
        if words := difference(self._listed, now):
            raise ChangedInputError(self._listed.name, words)

    def as_opened(self) -> Input:
        """Returns what opening the file told about it; what it did not tell is as it was listed."""
        if scheme_of(self._listed.name) in STORES:
            return replace(self._listed, size=self._raw.size)
        return self.now()

    def now(self) -> Input:
        """Returns size and time of the open file, or what the server tells; what it does not tell is as listed.

        Raises:
            ChangedInputError, OSError: as `_store_info`.
        """
        name = self._listed.name
        if not scheme_of(name):
            # By descriptor, because another file may have its name by now.
            status = os.fstat(self._raw.fileno())
            if isinstance(self._raw, StoredMember):  # the zip has another size than its member
                return replace(self._listed, mtime_ns=status.st_mtime_ns)
            return Input(name, status.st_size, status.st_mtime_ns)

        # Before the first answer over http, nothing is known.
        info = self._raw.info if isinstance(self._raw, HttpFile) else _store_info(name)
        from_server, listed = remote_input(name, info or {}), self._listed
        now = listed
        if from_server.size >= 0 and listed.size >= 0:
            now = replace(now, size=from_server.size)
        if from_server.etag and listed.etag:
            now = replace(now, etag=from_server.etag)
        # A store lists milliseconds, and tells of one file in seconds.
        if from_server.mtime_ns and abs(from_server.mtime_ns - listed.mtime_ns) >= SECOND_NS:
            now = replace(now, mtime_ns=from_server.mtime_ns)
        return now


def _store_info(name: str) -> dict[str, Any]:
    """Asks s3 or gs for size and time of a file.

    Raises:
        ChangedInputError: there is none.
        OSError: the store does not answer.
    """
    try:
        return filesystem(name).info(name.partition("://")[2])
    except FileNotFoundError as error:
        raise ChangedInputError(name, "it is missing") from error
