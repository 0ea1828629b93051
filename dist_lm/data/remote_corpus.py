"""Reads a corpus whose tars stay behind http, s3 or gs (`data.attach`), by pieces, through a cache on local disk.

Every answer of a server must be of the tar that was attached. Credentials come from the environment
(`data.sources.opening`).
"""

import hashlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from dist_lm.data.manifest import Shard, remote_path
from dist_lm.data.piece_cache import PieceCache
from dist_lm.data.sources.failures import brief, is_transient
from dist_lm.data.sources.http_file import WholeFilesError
from dist_lm.data.sources.opening import BUFFER, HttpFile, filesystem, open_raw, scheme_of
from dist_lm.errors import ArtefactError, ChangedInputError, UnreachableError
from dist_lm.storage import durable

log = logging.getLogger(__name__)

PIECE = 4 << 20  # bytes
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0  # between requests for the same piece
START_S = 15.0  # how long a server may fail before its first piece has come
OUTAGE_S = 600.0  # and later, in a run
SAY_EVERY_S = 60.0
CURE = "restore it; or, if the same file was uploaded again, run `dist-lm data attach` again"


@dataclass(frozen=True)
class RemoteCorpus:
    """The content of `remote.json`."""

    url: str  # of the folder
    cache: str  # folder on a local disk of each node
    cache_bytes: int
    tars: dict[str, dict[str, Any]]  # name -> what its server told: size, and ETag or time

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Returns the record of an attached corpus.

        Raises:
            ArtefactError: it is damaged.
            OSError: it cannot be read.
        """
        needed = {"url": str, "cache": str, "cache_bytes": int, "tars": dict}
        record = durable.read_json(remote_path(directory), needed, "the record of an attached corpus")
        return cls(**{name: record[name] for name in needed})


class RemoteFolder:
    """A folder of files behind a URL."""

    def __init__(self, url: str) -> None:
        self.url = url

    def path(self, name: str) -> str:
        """Returns the URL of a file."""
        return f"{self.url}/{name}"

    def content(self, name: str) -> bytes:
        """Returns a whole file.

        Raises:
            ArtefactError: it is missing, or cannot be read.
        """
        try:
            with open_raw(self.path(name)) as file:
                return file.read()
        except OSError as error:
            raise self._unreadable(name, error) from error

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yields the content of a file.

        Raises:
            ArtefactError: it is missing, or cannot be read.
        """
        try:
            with open_raw(self.path(name)) as file:
                while chunk := file.read(BUFFER):
                    yield chunk
        except OSError as error:
            raise self._unreadable(name, error) from error

    def identity(self, name: str) -> dict[str, Any]:
        """Asks the server for the size of a file, and for its ETag or time.

        Raises:
            ArtefactError: the file is missing, or its server does not answer or sends no parts of files.
        """
        try:
            if self._store is not None:
                return _identity_in_store(self._file_info(name))
            with HttpFile(self.path(name), random_access=True) as file:
                file.read(1)
                return dict(file.info or {})
        except OSError as error:
            raise self._unreadable(name, error) from error

    def part(self, name: str, identity: dict[str, Any], begin: int, size: int) -> bytes:
        """Returns `size` bytes of a file from `begin`. Asks once.

        Args:
            identity: of the file, as `identity` returned it.

        Raises:
            UnreachableError: the server does not send them now.
            ArtefactError: the file has changed, or cannot be read.
        """
        try:
            if self._store is not None:
                info = self._file_info(name)
                if (now := _identity_in_store(info)) != identity:
                    raise ChangedInputError(self.path(name), f"{now}, was {identity}")
                with self._store.open_input_file(info.path) as file:
                    content = file.read_at(size, begin)
            else:
                with HttpFile(self.path(name), random_access=True, attempts=1) as file:
                    file.info = dict(identity)  # an answer that tells otherwise is refused
                    file.seek(begin)
                    content = file.read(size)
        except ChangedInputError as error:
            words = error.words
            raise ArtefactError(f"{self.path(name)}: changed since it was attached ({words}): {CURE}") from error
        except OSError as error:
            raise self._unreadable(name, error) from error
        if len(content) != size:
            raise ArtefactError(f"{self.path(name)}: ends before byte {begin + size:,}: {CURE}")
        return content

    @cached_property
    def _store(self) -> Any:
        """The file system of pyarrow; None behind http. Kept, because to open it asks for the region of the bucket."""
        if scheme_of(self.url) in ("http", "https"):
            return None
        files: Any = filesystem(self.url)
        return files.fs

    def _file_info(self, name: str) -> Any:
        info = self._store.get_file_info(self.path(name).partition("://")[2])
        if not info.is_file:
            raise FileNotFoundError("there is no such file")
        return info

    def _unreadable(self, name: str, error: OSError) -> ArtefactError:
        # The cause of an error of http is the answer of the server.
        cause = error.__cause__ or error
        cure = "check the URL, and that this machine may read it"
        if isinstance(cause, WholeFilesError):
            cure = "serve it from a server that sends parts of files, or copy the corpus into work/corpora"
        elif is_transient(cause):
            cure = "run the command again when the server sends it; a run goes on from its last checkpoint"
            return UnreachableError(f"{self.path(name)}: cannot be read ({brief(cause)}): {cure}")
        return ArtefactError(f"{self.path(name)}: cannot be read ({brief(cause)}): {cure}")


def _identity_in_store(info: Any) -> dict[str, Any]:
    return {"size": info.size, "mtime_ns": info.mtime_ns}


class _Outage:
    """Knows since when a server has sent nothing; shared by the threads of a process."""

    def __init__(self) -> None:
        self.is_given_up = threading.Event()  # nobody waits for the server any more
        self._lock = threading.Lock()
        self._has_sent = False
        self._began: float | None = None  # time of the first request that failed
        self._said = -SAY_EVERY_S  # when a line was written

    @property
    def is_now(self) -> bool:
        """Whether the last request has failed."""
        return self._began is not None

    def end(self) -> None:
        """Notes that the server has sent a piece."""
        with self._lock:
            self._has_sent, self._began = True, None

    def go_on(self, error: UnreachableError) -> bool:
        """Notes that a request has failed; returns whether it may be sent again. Says so once in `SAY_EVERY_S`."""
        with self._lock:
            now = time.monotonic()
            if self._began is None:
                self._began = now
            most_s = OUTAGE_S if self._has_sent else START_S
            if now - self._began >= most_s or self.is_given_up.is_set():
                return False

            if now - self._said >= SAY_EVERY_S:
                self._said = now
                log.warning("%s; it is asked again, for %.0f s at most", error, self._began + most_s - now)
            return True


class RemoteTars:
    """Reads the tars of an attached corpus by number, through the cache. Several threads may call it."""

    def __init__(self, directory: Path, shards: Sequence[Shard]) -> None:
        """Sends no request yet.

        Raises:
            ArtefactError: `remote.json` is damaged or does not name a tar, or the cache cannot be used.
        """
        record = RemoteCorpus.read(directory)
        self._folder = RemoteFolder(record.url)
        self._cache = PieceCache(Path(record.cache), record.cache_bytes)
        self._names = [shard.name for shard in shards]
        self.paths = [self._folder.path(name) for name in self._names]
        if missing := [name for name in self._names if name not in record.tars]:
            raise ArtefactError(f"{remote_path(directory)} does not name {missing[0]}: run `dist-lm data attach` again")

        self._outage = _Outage()
        self._pending: set[tuple[int, int]] = set()  # (tar, piece) that a pool will fetch
        self._identities = [record.tars[name] for name in self._names]
        self._keys = []
        for shard, identity in zip(shards, self._identities, strict=True):
            key = f"{self._folder.path(shard.name)} {sorted(identity.items())} {shard.sha256} {PIECE}"
            self._keys.append(hashlib.sha256(key.encode()).hexdigest()[:32])

    @property
    def waits_for_store(self) -> bool:
        """Whether the server of the tars fails now and is asked again."""
        return self._outage.is_now

    def stop_waiting(self) -> None:
        """Makes further errors of the server final: they are raised, and no failed request is sent again."""
        self._outage.is_given_up.set()

    def read(self, tar: int, offset: int, size: int) -> bytes:
        """Returns `size` bytes of a tar from `offset`. Waits while the server fails, at most `OUTAGE_S`.

        Raises:
            ArtefactError: the tar has changed or cannot be read, or the cache cannot be used.
        """
        contents = []
        for piece in self._pieces(tar, offset, size):
            begin, n_bytes = self._extent(tar, piece)
            contents.append(
                self._cache.read(
                    self._name(tar, piece),
                    n_bytes,
                    max(offset - begin, 0),
                    min(offset + size - begin, n_bytes),
                    lambda begin=begin, n_bytes=n_bytes: self._fetch(tar, begin, n_bytes),
                )
            )
        return b"".join(contents)

    def forget(self, tar: int, offset: int, size: int) -> bool:
        """Drops the pieces that hold these bytes, because their content is wrong; returns True: they come again."""
        for piece in self._pieces(tar, offset, size):
            self._cache.forget(self._name(tar, piece))
        return True

    def read_ahead(self, tar: int, offset: int, size: int, pool: Executor) -> None:
        """Has a pool fetch the pieces that hold these bytes. An error is left to the reader, who asks again."""
        for piece in self._pieces(tar, offset, size):
            # Neighbours are in one piece, and a thread that waits for a piece of another fetches nothing.
            if (tar, piece) not in self._pending:
                self._pending.add((tar, piece))
                future = pool.submit(self._add, tar, piece)
                future.add_done_callback(lambda _, piece=piece: self._pending.discard((tar, piece)))

    def _add(self, tar: int, piece: int) -> None:
        begin, size = self._extent(tar, piece)
        self._cache.add(self._name(tar, piece), size, lambda: self._fetch_once(tar, begin, size))

    def _fetch_once(self, tar: int, begin: int, size: int) -> bytes:
        content = self._folder.part(self._names[tar], self._identities[tar], begin, size)
        self._outage.end()
        return content

    def _fetch(self, tar: int, begin: int, size: int) -> bytes:
        """Fetches a piece, and waits while the server fails.

        Raises:
            UnreachableError: it has failed for too long.
            ArtefactError: as `RemoteFolder.part`.
        """
        from tenacity import (
            RetryCallState,
            Retrying,
            retry_if_exception_type,
            sleep_using_event,
            wait_random_exponential,
        )

        def is_over(state: RetryCallState) -> bool:
            error = state.outcome and state.outcome.exception()
            assert isinstance(error, UnreachableError), "others are not repeated"
            return not self._outage.go_on(error)

        # Random waits, so that the ranks of a cluster do not ask a server that comes back all at once.
        retrying = Retrying(
            stop=is_over,
            wait=wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
            retry=retry_if_exception_type(UnreachableError),
            sleep=sleep_using_event(self._outage.is_given_up),
            reraise=True,
        )
        return retrying(self._fetch_once, tar, begin, size)

    def _pieces(self, tar: int, offset: int, size: int) -> range:
        end = offset + size
        if end > self._identities[tar]["size"]:
            raise ArtefactError(f"{self.paths[tar]}: ends before byte {end:,}: {CURE}")
        return range(offset // PIECE, -(-end // PIECE))

    def _extent(self, tar: int, piece: int) -> tuple[int, int]:
        """Returns the first byte of a piece, and its size."""
        begin = piece * PIECE
        return begin, min(PIECE, self._identities[tar]["size"] - begin)

    def _name(self, tar: int, piece: int) -> str:
        return f"{self._keys[tar]}-{piece:06d}"
