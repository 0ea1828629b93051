"""Reads files behind http and https. A time limit counts silence: seconds without a byte, however long a file takes.

A request that breaks or falls silent is sent again from the byte where it stopped. If the server sends only whole
files, it is asked for the file again, and what was read before must come again. Silence is said after `QUIET_S`.
"""

import asyncio
import hashlib
import io
import logging
import re
from collections.abc import Coroutine
from concurrent import futures
from typing import Any, TypeVar

from dist_lm.data.sources.failures import brief, is_transient
from dist_lm.errors import ChangedInputError, UserError

log = logging.getLogger(__name__)

QUIET_S = 10.0  # without a byte, after which a line says so
SILENCE_S = 60.0  # without a byte, after which a request is given up
ATTEMPTS, FIRST_WAIT_S, LONGEST_WAIT_S = 5, 1.0, 30.0  # requests in a row that bring no byte
BLOCK = 5 << 20  # bytes of a request when a file is read from begin to end
SKIP = 1 << 20  # bytes read at a time to come back to a position
CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
IDENTITY = {"Accept-Encoding": "identity"}  # the size of another encoding would be that of the answer
CURE = "run the command again later, or download the file and name the copy with path"

Result = TypeVar("Result")


def http_filesystem() -> Any:
    """Returns fsspec's file system of http, with the proxies of the environment and without time limits of its own."""
    import aiohttp
    import fsspec

    # The default ends each request after five minutes, however fast its bytes come.
    timeout = aiohttp.ClientTimeout(total=None)
    return fsspec.filesystem("http", client_kwargs={"trust_env": True, "timeout": timeout})


def http_info(url: str) -> dict[str, Any]:
    """Returns what a server tells about a file: `size` in bytes (None: unknown), ETag and Last-Modified if it has them.

    Raises:
        FileNotFoundError: there is none, or the server answers with an error, which is the cause.
        TimeoutError: it does not answer.
    """
    return _awaited(http_filesystem()._info(url), url)


class HttpFile(io.RawIOBase):
    """A file behind http, read from any position on."""

    def __init__(self, url: str, *, random_access: bool = False, attempts: int | None = None) -> None:
        """Sends no request yet.

        Args:
            attempts: requests in a row that may bring no byte; None: `ATTEMPTS`.
            random_access: request exactly the bytes of each read, which takes a server that sends parts of files.
                Otherwise blocks are requested.
        """
        self.info: dict[str, Any] | None = None  # size, ETag and Last-Modified of the last answer
        self.may_grow = False  # a later answer may be of a larger file
        self._url = url
        self._random_access = random_access
        self._most_attempts = attempts or ATTEMPTS
        self._position = 0  # bytes from the start
        self._answer: Any = None  # open response of aiohttp
        self._answer_position = 0  # position of its next byte
        self._sends_parts = True  # until an answer is a whole file
        self._attempts = 0  # requests for a whole file
        self._hash = hashlib.sha256()  # hashes the bytes up to the position; only used if the server sends whole files

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to a position and returns it. Only a seek from the end may send a request.

        Raises:
            OSError: the server does not tell the length in time, or has no such file.
        """
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position}.get(whence)
        if base is None:
            base = http_info(self._url)["size"] or 0
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Reads bytes from the position on; returns their number, 0 at the end of the file.

        With random access, `buffer` is filled as far as the file reaches.

        Raises:
            ChangedInputError: an answer is of another file than the one before.
            OSError: so many requests in a row as allowed brought no byte, or another one would not help.
        """
        room = memoryview(buffer)
        n_read = 0
        while n_read < len(room):
            content = self._next_bytes(len(room) - n_read)
            room[n_read : n_read + len(content)] = content
            n_read += len(content)
            if not content or not self._random_access:
                break
        return n_read

    def close(self) -> None:
        self._drop_answer()
        super().close()

    def _next_bytes(self, most: int) -> bytes:
        """Returns up to `most` bytes from the position on, and moves it; none at the end of the file.

        Raises:
            ChangedInputError, OSError: as `readinto`.
        """
        from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential

        def say(state: RetryCallState) -> None:
            error = state.outcome and state.outcome.exception()
            log.warning(
                "%s: byte %s: %s; it is asked again (%d of %d)",
                *(self._url, f"{self._position:,}", brief(error), state.attempt_number + 1, self._most_attempts),
            )

        # Each byte that arrives begins the count of attempts anew.
        retrying = Retrying(
            stop=stop_after_attempt(self._most_attempts),
            wait=wait_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
            retry=retry_if_exception(is_transient),
            before_sleep=say,
            reraise=True,
        )
        try:
            content = retrying(self._attempt, most)
        except UserError:
            raise
        except Exception as error:  # aiohttp's own errors are no OSError
            raise OSError(f"{self._url}: byte {self._position:,}: {brief(error)}: {CURE}") from error

        self._position += len(content)
        if not self._sends_parts:
            self._hash.update(content)
        return content

    def _attempt(self, most: int) -> bytes:
        """Reads up to `most` bytes from the open answer, or requests one at the position first; empty at the end of the
        file. The position stays. A failed answer is closed.

        Raises:
            ChangedInputError, OSError: as `_request`; or the server sends a part without a byte.
        """
        try:
            if self._answer is not None and self._answer_position == self._position:
                content = self._read_answer(most)
                if content or not self._sends_parts:
                    return content

            # Before the first request, at the end of a block, or after a seek.
            self._drop_answer()
            if self._is_at_end():
                return b""
            self._request(most)
            if self._answer is None:
                return b""
            content = self._read_answer(most)
            # It counts as an attempt: requests that bring nothing must end.
            if not content and self._sends_parts:
                raise OSError("the server sent a part without a byte")
            return content
        except BaseException:
            self._drop_answer()
            raise

    def _is_at_end(self) -> bool:
        size = self.info["size"] if self.info else None
        return size is not None and self._position >= size

    def _request(self, most: int) -> None:
        """Opens an answer whose next byte is that of the position; none if the file ends there.

        Raises:
            ChangedInputError: the file is not the one that was opened.
            OSError: the server answers with another place; aiohttp's own errors pass.
            TimeoutError: nothing came for `SILENCE_S`.
        """
        first = self._position
        last = first + (most if self._random_access else BLOCK) - 1
        headers = IDENTITY | {"Range": f"bytes={first}-{last}"}
        file_system = http_filesystem()

        async def get() -> Any:
            session = await file_system.set_session()
            answer = await session.get(file_system.encode_url(self._url), headers=headers)
            # A range behind the end of the file: servers of an empty file refuse even its first byte.
            if answer.status != 416:
                answer.raise_for_status()
            return answer

        self._answer = _awaited(get(), self._url, first)
        if self._answer.status == 416:
            self.info = (self.info or {}) | {"size": first}
            self._drop_answer()
            return

        part = CONTENT_RANGE.fullmatch(self._answer.headers.get("Content-Range", ""))
        self._compare(part)
        if self._answer.status == 206 and part:
            self._answer_position = int(part[1])
        else:
            self._come_back()

        # An answer at another place would be read as if it were this one.
        if self._answer_position != first:
            raise OSError(f"the server sends byte {self._answer_position:,} when asked for byte {first:,}")

    def _compare(self, part: re.Match[str] | None) -> None:
        """Keeps what an answer tells about the file; refuses a later answer that tells otherwise.

        Raises:
            ChangedInputError: names the difference.
        """
        headers = self._answer.headers
        size = None
        if part and part[2] != "*":
            size = int(part[2])
        elif self._answer.status == 200 and not headers.get("Content-Encoding"):
            size = self._answer.content_length

        info = {"size": size, **{name: headers[name] for name in ("ETag", "Last-Modified") if name in headers}}
        before, self.info = self.info or {}, info
        if self.may_grow and (size or 0) > (before.get("size") or 0):
            return
        for name in info.keys() & before.keys():
            if None not in (info[name], before[name]) and info[name] != before[name]:
                raise ChangedInputError(self._url, f"{name} {info[name]}, was {before[name]}")

    def _come_back(self) -> None:
        """Reads the answer with the whole file up to the position; these bytes must be those that were read before.

        Raises:
            OSError: the file was requested too often, or bytes are needed in another order than they come.
            ChangedInputError: the server sends other bytes than before.
        """
        self._answer_position = 0
        if self._random_access:
            raise WholeFilesError("the server sends no parts of files, which this format needs")
        if self._sends_parts and self._position:
            raise WholeFilesError("the server sent a part of the file before, and now all of it")
        self._sends_parts = False
        self._attempts += 1
        if self._attempts > ATTEMPTS:
            raise WholeFilesError(f"the server sends only whole files, and {ATTEMPTS} of them broke off")

        skipped = hashlib.sha256()
        while self._answer_position < self._position:
            content = self._read_answer(min(SKIP, self._position - self._answer_position))
            if not content:
                break
            skipped.update(content)
        if skipped.digest() != self._hash.digest():
            raise ChangedInputError(self._url, "the server sends other bytes than before")

    def _read_answer(self, most: int) -> bytes:
        content = _awaited(self._answer.content.read(most), self._url, self._answer_position)
        self._answer_position += len(content)
        return content

    def _drop_answer(self) -> None:
        """Closes the open answer, if there is one, with its connection."""
        answer, self._answer = self._answer, None
        if answer is not None:
            # In the loop's own thread, where the connection lives.
            http_filesystem().loop.call_soon_threadsafe(answer.close)


class WholeFilesError(OSError):
    """A server sends only whole files where parts are needed. Another request would not help."""

    status = 200  # as of the answer; `is_transient` takes it for final


def _awaited(coroutine: Coroutine[Any, Any, Result], url: str, position: int = 0) -> Result:
    """Runs a request in fsspec's thread and returns its result; a warning is logged when nothing has come for
    `QUIET_S`.

    The request is cancelled when this function is left by an error.

    Args:
        url: for the line about silence.
        position: offset of the byte that is waited for.

    Raises:
        TimeoutError: nothing came for `SILENCE_S`. What the request raises passes.
    """
    future = asyncio.run_coroutine_threadsafe(coroutine, http_filesystem().loop)
    try:
        if not futures.wait([future], timeout=min(QUIET_S, SILENCE_S)).done:
            log.warning(
                "%s: byte %s: nothing came for %g s; the request is given up after %g s",
                *(url, f"{position:,}", QUIET_S, SILENCE_S),
            )
        if not futures.wait([future], timeout=max(0.0, SILENCE_S - QUIET_S)).done:
            raise TimeoutError(f"nothing came for {SILENCE_S:g} s")
        return future.result()
    finally:
        future.cancel()
