"""Reads the rows of Arrow files: those that `datasets` saved (`data-00000-of-00002.arrow`) and Feather.

Both hold the stream of Apache Arrow's IPC format: messages of a length, metadata and a body; Feather has it between a
magic word and a footer. A file may claim any length, number of rows, or size of a compressed column, and pyarrow would
allocate it. So the messages are framed here, and those claims are compared with the bytes that are there.
"""

import io
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from dist_lm.data.sources.failures import RefusedContentError
from dist_lm.data.sources.formats import BATCH, NumberedRow, decoded_rows
from dist_lm.data.sources.snapshot import FileReading
from dist_lm.errors import ArtefactError

FILE_MAGIC = b"ARROW1\0\0"
FEATHER_V1 = b"FEA1"
CONTINUATION = b"\xff\xff\xff\xff"
RECORD_BATCH, DICTIONARY_BATCH = 3, 2  # types of a message's header (format/Message.fbs)
LONGEST_METADATA = 64 << 20  # bytes; a column takes about 100
LONGEST_BATCH = 2 << 30  # bytes of a batch, decompressed
ROWS_WITHOUT_BYTES = 4096  # rows of a batch whose columns may be null in no byte
ROWS_A_BYTE = 8  # a column with any value has a bit for each row
SHARING = re.compile("dictionary|view|run_end_encoded")  # types whose rows may share values


def arrow_rows(reading: FileReading, wanted_columns: Sequence[str] | None) -> Iterator[NumberedRow]:
    """Yields (row number from 1, row, columns of the file), with one batch in memory.

    A row with broken text is yielded as its problem.

    Args:
        wanted_columns: only these are decoded, as far as the file has them; None: all.

    Raises:
        ArtefactError: the file is Feather of version 1.
        RefusedContentError: a batch is larger than `LONGEST_BATCH`, or claims more than it holds.
        ChangedInputError: as `FileReading.open_content`.
        OSError, ValueError: the file cannot be read or is damaged.
    """
    import pyarrow

    with reading.open_content() as file:
        start = file.read(len(FILE_MAGIC))
        if start.startswith(FEATHER_V1):
            raise ArtefactError(f"{reading.name}: Feather of version 1 is not read: write it again, as version 2")
        if start == FILE_MAGIC:
            start = b""

        try:
            number = 0
            with pyarrow.ipc.open_stream(_Messages(file, start)) as stream:
                columns = stream.schema.names
                # A value that many rows refer to is there again for each row that is decoded.
                step = 1 if SHARING.search(str(stream.schema)) else BATCH
                read_columns = [column for column in columns if wanted_columns is None or column in wanted_columns]
                for batch in stream:
                    # Offsets of a damaged batch point outside of its buffers.
                    _validate(batch)
                    batch = batch.select(read_columns)
                    for first in range(0, batch.num_rows, step):
                        for row in decoded_rows(batch.slice(first, step)):
                            number += 1
                            yield number, row, columns
            # Bytes behind the stream are read too, so that they are hashed and a truncated file is noticed.
            while file.read(1 << 20):
                pass
        except MemoryError as error:
            raise OSError(f"a batch does not fit into memory ({error})") from None


def _validate(batch: Any) -> None:
    """Refuses a batch whose buffers do not fit its columns; returns nothing. Broken text passes.

    Raises:
        ValueError: what is wrong.
    """
    try:
        batch.validate(full=True)
    except ValueError as error:
        # Only the rows of broken texts are broken.
        if "UTF8" not in str(error) and "UTF-8" not in str(error):
            raise
        batch.validate()


class _Messages(io.RawIOBase):
    """The stream in an open file, message by message, each checked before it is given on."""

    def __init__(self, file: Any, start: bytes) -> None:
        """`start`: bytes of the stream that were read from `file` already."""
        self._file = file
        self._start = start
        self._message = memoryview(b"")  # the part that was not read yet

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills a part of `buffer`; returns the number of bytes, 0 behind the last message.

        Raises:
            RefusedContentError, OSError: as `_next`.
        """
        if not self._message:
            self._message = memoryview(self._next())
        part = self._message[: len(buffer)]
        buffer[: len(part)] = part
        self._message = self._message[len(part) :]
        return len(part)

    def _next(self) -> bytes:
        """Returns the next message with its length; no bytes at the end of the stream.

        Raises:
            RefusedContentError: it is too long, or claims more than it holds.
            OSError: the file ends in it, or it is damaged.
        """
        # Releases before 0.15 wrote the length alone.
        prefix = self._exactly(4)
        if prefix == CONTINUATION:
            prefix += self._exactly(4)
        length = int.from_bytes(prefix[-4:], "little", signed=True)
        if length == 0:
            return b""
        if not 0 < length <= LONGEST_METADATA:
            raise OSError(f"metadata of {length:,} bytes")

        metadata = self._exactly(length)
        try:
            kind, body_length, batch = _header(metadata)
            if not 0 <= body_length <= LONGEST_BATCH:
                raise RefusedContentError(
                    f"a batch of {body_length:,} bytes, at most {LONGEST_BATCH >> 30} GiB are read: write it with "
                    "fewer rows a batch, as by save_to_disk"
                )
            body = self._exactly(body_length)
            if kind in (RECORD_BATCH, DICTIONARY_BATCH):
                _check_claims(batch, body)
        except (struct.error, IndexError) as error:
            raise OSError(f"damaged metadata ({error})") from None
        return prefix + metadata + body

    def _exactly(self, length: int) -> bytes:
        content = self._start[:length]
        self._start = self._start[length:]
        if len(content) < length:
            content += self._file.read(length - len(content))
        # A stream has an end mark: without it, a file that was cut between two messages would lose rows in silence.
        if len(content) < length:
            raise OSError("the file ends before the end of its stream")
        return content


class _Table:
    """A table of FlatBuffers: fields by number, each at an offset that a list before the table tells."""

    def __init__(self, buffer: bytes, position: int) -> None:
        self._buffer = buffer
        self._position = position
        self._fields = position - _number("<i", buffer, position)
        self._n_bytes = _number("<H", buffer, self._fields)

    def at(self, field: int) -> int:
        """Returns the position of a field; 0: the table has its default."""
        entry = 4 + 2 * field
        if entry + 2 > self._n_bytes:
            return 0
        offset = _number("<H", self._buffer, self._fields + entry)
        return self._position + offset if offset else 0

    def number(self, form: str, field: int) -> int:
        position = self.at(field)
        return _number(form, self._buffer, position) if position else 0

    def table(self, field: int) -> "_Table | None":
        position = self.at(field)
        return _Table(self._buffer, position + _number("<I", self._buffer, position)) if position else None

    def pairs(self, field: int) -> Iterator[tuple[int, int]]:
        """Yields the elements of a vector of two 64-bit integers each."""
        if position := self.at(field):
            position += _number("<I", self._buffer, position)
            for index in range(_number("<I", self._buffer, position)):
                yield struct.unpack_from("<qq", self._buffer, position + 4 + 16 * index)


def _number(form: str, buffer: bytes, position: int) -> int:
    # struct would count a negative position from the end.
    if position < 0:
        raise IndexError(f"an offset of {position}")
    return struct.unpack_from(form, buffer, position)[0]


def _header(metadata: bytes) -> tuple[int, int, _Table | None]:
    """Returns the type of a message, the length of its body, and its record batch (of a dictionary: that in it)."""
    message = _Table(metadata, _number("<I", metadata, 0))
    kind, header = message.number("<B", 1), message.table(2)
    if kind == DICTIONARY_BATCH and header:
        header = header.table(1)
    return kind, message.number("<q", 3), header


def _check_claims(batch: _Table | None, body: bytes) -> None:
    """Refuses a record batch that claims more rows or bytes than its body can hold; returns nothing.

    Raises:
        RefusedContentError: says what it claims.
        OSError: it has no batch, or a buffer that lies outside of the body.
    """
    if batch is None:
        raise OSError("a message without its batch")
    n_rows, is_compressed = batch.number("<q", 0), batch.at(3) > 0
    n_bytes = 0
    for offset, length in batch.pairs(2):
        if offset < 0 or length < 0 or offset + length > len(body):
            raise OSError("a column lies outside of its batch")
        # A compressed buffer begins with its true length; -1: it is not compressed.
        claimed = _number("<q", body, offset) if is_compressed and length >= 8 else length
        n_bytes += length if claimed < 0 else claimed

    if n_bytes > LONGEST_BATCH:
        raise RefusedContentError(
            f"a batch claims {n_bytes:,} bytes, at most {LONGEST_BATCH >> 30} GiB are read: write it with fewer rows a "
            "batch, as by save_to_disk"
        )
    # Elements of lists are counted like rows.
    for n_values in (n_rows, *(length for length, _ in batch.pairs(1))):
        if not 0 <= n_values <= ROWS_WITHOUT_BYTES + ROWS_A_BYTE * n_bytes:
            raise RefusedContentError(f"a batch claims {n_values:,} rows or elements in {n_bytes:,} bytes")
