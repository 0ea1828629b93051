"""Keeps pieces of remote files in a folder on local disk, which all processes of a node share.

The folder never holds more than its limit: room for a piece is made before the piece is written, and the pieces that
were read last stay. A piece is written beside its place and renamed, so a kill leaves no half one. Of the processes
that need a piece at once, one fetches it and the others wait.

Nothing is flushed to disk. After a loss of power a piece may be cut or hold anything: its size is compared here, its
content by whoever has checksums and calls `forget`.
"""

import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dist_lm.errors import ArtefactError

KEPT_AFTER_REMOVAL = 0.9  # share of the limit, so that not every new piece lists the folder
PART = ".part"  # ends the name of a piece that is fetched
TOTAL = "total"  # a file with the bytes of the pieces
_TOTAL = struct.Struct("<q")


class PieceCache:
    """A folder of pieces. Several threads and processes may use it."""

    def __init__(self, directory: Path, most_bytes: int) -> None:
        """Makes the folder if it is missing.

        Raises:
            ArtefactError: it cannot be made, or belongs to another user, who could change what is read.
        """
        self.directory, self._most_bytes = directory, most_bytes
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = directory.stat().st_uid
        except OSError as error:
            raise self._unusable(error) from error
        if owner != os.getuid():
            raise ArtefactError(f"{directory}: this cache belongs to another user: attach with another --cache")

    def read(self, name: str, size: int, begin: int, end: int, fetch: Callable[[], bytes]) -> bytes:
        """Returns bytes [begin, end) of a piece, which are read from the folder, or fetched and stored in it.

        Of several callers that need the piece at once, in any thread or process, one fetches it and the others wait. If
        the folder would pass its limit, the pieces that were not read for the longest time are removed. Nothing is
        flushed to disk: after a loss of power a file may be cut, which is noticed, or hold anything, which is not.

        Args:
            name: name of the file.
            size: bytes of the whole piece. A file of another length is removed and fetched again.
            fetch: returns the whole piece, of `size` bytes; called if the folder does not have it.

        Raises:
            ArtefactError: the folder cannot be used. What `fetch` raises passes, except an OSError, which becomes this.
            AssertionError: `fetch` returned another number of bytes; nothing is stored.
        """
        path = self.directory / name
        while True:
            try:
                content = self._stored(path, size, begin, end)
                if content is not None:
                    return content
                piece = self._add(path, size, fetch)
            except OSError as error:
                raise self._unusable(error) from error
            # None: another process has added it in the meantime.
            if piece is not None:
                return piece[begin:end]

    def add(self, name: str, size: int, fetch: Callable[[], bytes]) -> None:
        """Fetches a piece that the folder does not have; returns nothing.

        Raises:
            ArtefactError: as `read`.
        """
        try:
            if self._stored(self.directory / name, size, 0, 0) is None:
                self._add(self.directory / name, size, fetch)
        except OSError as error:
            raise self._unusable(error) from error

    def forget(self, name: str) -> None:
        """Removes a piece whose content is wrong, if it is there."""
        (self.directory / name).unlink(missing_ok=True)

    def _stored(self, path: Path, size: int, begin: int, end: int) -> bytes | None:
        """Returns bytes [begin, end) of a piece, or None if the folder does not have the whole piece.

        A file of another length than `size` was cut, and it is removed. A read sets the file's times to now, by which
        the pieces that were read last stay in the cache.

        Raises:
            OSError: the file cannot be opened, read or removed.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            if os.fstat(descriptor).st_size != size:
                path.unlink(missing_ok=True)
                return None
            os.utime(descriptor)
            return os.pread(descriptor, end - begin, begin)
        finally:
            os.close(descriptor)

    def _add(self, path: Path, size: int, fetch: Callable[[], bytes]) -> bytes | None:
        """Fetches and stores a piece, and returns it; None if another process has stored it."""
        part = path.with_name(path.name + PART)
        with _held(part) as descriptor:
            if path.exists():
                part.unlink()
                return None
            try:
                content = fetch()
                assert len(content) == size, f"{path.name}: {len(content)} bytes, expected {size}"
                self._make_room(size)
                _write(descriptor, content)
                part.rename(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        return content

    def _make_room(self, size: int) -> None:
        """Counts a piece that is about to be written; removes old pieces if the folder would pass its limit."""
        with _held(self.directory / TOTAL) as descriptor:
            encoded = os.pread(descriptor, _TOTAL.size, 0)
            # Without a count, as in a new folder, the pieces are listed.
            total = _TOTAL.unpack(encoded)[0] + size if len(encoded) == _TOTAL.size else self._most_bytes + 1
            if total > self._most_bytes:
                total = self._remove_oldest(size)
            os.pwrite(descriptor, _TOTAL.pack(total), 0)

    def _remove_oldest(self, size: int) -> int:
        """Removes the pieces that were not read for the longest time; returns the bytes that are left.

        Pieces that are being fetched count with `size` bytes, because their processes may have counted them already.
        """
        pieces: list[tuple[int, int, str]] = []  # (time of the last read in ns, bytes, path)
        total = 0
        for entry in os.scandir(self.directory):
            if entry.name == TOTAL:
                continue
            # What a killed process left is not locked.
            if entry.name.endswith(PART):
                total += 0 if _remove_abandoned_part(entry.path) else size
                continue
            with suppress(FileNotFoundError):
                status = entry.stat()
                pieces.append((status.st_mtime_ns, status.st_size, entry.path))
                total += status.st_size

        if total <= self._most_bytes:
            return total
        for _, n_bytes, path in sorted(pieces):
            Path(path).unlink(missing_ok=True)
            total -= n_bytes
            if total <= KEPT_AFTER_REMOVAL * self._most_bytes:
                break
        return total

    def _unusable(self, error: OSError) -> ArtefactError:
        return ArtefactError(
            f"{self.directory}: the cache cannot be used ({error.strerror or error}): make room, or attach with "
            "another --cache or a smaller --cache-gib"
        )


@contextmanager
def _held(path: Path) -> Iterator[int]:
    """Yields a descriptor of a file, made if it is missing, when no other holder of the file is left."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # The holder before may have renamed or removed the file: then others hold the next one of this name.
            if _is_named(descriptor, path):
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove_abandoned_part(path: str) -> bool:
    """Removes the file of a piece, unless a process still fetches the piece. Returns whether the file is gone, which
    it is, too, if another process has removed it.

    Raises:
        OSError: the file cannot be opened, locked or removed.
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        Path(path).unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _write(descriptor: int, content: bytes) -> None:
    os.ftruncate(descriptor, 0)
    view, offset = memoryview(content), 0
    while offset < len(view):
        offset += os.pwrite(descriptor, view[offset:], offset)
