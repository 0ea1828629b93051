"""Decompresses xz and bz2 in bounded memory, and refuses content that is out of proportion to what is stored."""

import bz2
import io
import lzma
from typing import Any

from dist_lm.data.sources.failures import RefusedContentError

BLOCK = 1 << 20  # stored bytes that are read at a time
MEMORY = 128 << 20  # bytes of a decoder of xz: the window of `xz -9` takes 65 MiB, and headers may claim 4 GiB
# Text shrinks to a third or a tenth, tables of equal rows to a hundredth. Only bombs exceed both limits.
UNSUSPICIOUS = 1 << 30  # bytes of content, however few are stored
MOST_TIMES = 1000  # bytes of content for each stored one, beyond that


def check_proportion(n_content: int, n_stored: int) -> None:
    """Refuses content that only a bomb has; returns nothing. Both numbers are bytes.

    Raises:
        RefusedContentError: says the limit and the way out.
    """
    if n_content > max(UNSUSPICIOUS, MOST_TIMES * n_stored):
        raise RefusedContentError(
            f"its content is more than {MOST_TIMES:,} times its size, as of a file that is made to fill a machine: "
            "look at it, and unpack it if it is what you want to read"
        )


class Decompressed(io.RawIOBase):
    """The content of an open xz or bz2 file. Several streams in one file are read as one."""

    def __init__(self, raw: Any, compression: str) -> None:
        """`raw`: a file at its start; closed with this one. `compression`: xz or bz2."""
        self._raw = raw
        self._is_xz = compression == "xz"
        self._decoder: Any = self._new_decoder()
        self._unread = b""  # stored bytes of the next stream
        self._n_stored = self._n_content = 0

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """Fills a part of `buffer`; returns the number of bytes, 0 at the end.

        Raises:
            RefusedContentError: the content is out of proportion, or its decoder would need more than `MEMORY`.
            OSError: the file is truncated or damaged, or has other bytes behind its last stream.
        """
        content = b""
        while not content and len(buffer):
            if self._decoder.eof and not self._begin_stream():
                return 0

            stored = b""
            if self._decoder.needs_input:
                stored = self._read_stored()
                if not stored:
                    raise OSError("the end of the compressed stream is missing")
            try:
                content = self._decoder.decompress(stored, len(buffer))
            except lzma.LZMAError as error:
                if "Memory usage" in str(error):
                    raise RefusedContentError(
                        f"its decoder needs more than {MEMORY >> 20} MiB: compress it again with xz -9 or less"
                    ) from error
                raise OSError(f"{error}") from None

        self._n_content += len(content)
        check_proportion(self._n_content, self._n_stored)
        buffer[: len(content)] = content
        return len(content)

    def _new_decoder(self) -> Any:
        if self._is_xz:
            return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MEMORY)
        return bz2.BZ2Decompressor()

    def _read_stored(self) -> bytes:
        """Returns the next stored bytes; none at the end."""
        stored = self._unread or self._raw.read(BLOCK)
        self._unread = b""
        self._n_stored += len(stored)
        return stored

    def _begin_stream(self) -> bool:
        """Returns whether another stream follows the one that ended."""
        self._unread = self._decoder.unused_data
        self._n_stored -= len(self._unread)
        while stored := self._read_stored():
            # xz files may have zeros behind a stream.
            if self._is_xz:
                stored = stored.lstrip(b"\0")
            if stored:
                self._unread = stored
                self._n_stored -= len(stored)
                self._decoder = self._new_decoder()
                return True
        return False
