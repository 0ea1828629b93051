"""Opens files and URLs: http requests that break are sent again, and content is decompressed by suffix.

Credentials and the endpoint of s3 and gs come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...).
"""

import io
import re
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from dist_lm.errors import ConfigError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
OTHER_COMPRESSIONS = re.compile(rb"PK\x03\x04|BZh[1-9]1AY&SY|\xfd7zXZ\x00|7z\xbc\xaf\x27\x1c")  # zip, bz2, xz, 7z
REMOTE = ("http", "https", "s3", "gs")
BUFFER = 1 << 20  # bytes
HTTP_BLOCK = 5 << 20  # bytes of a request when a file is read from begin to end
ATTEMPTS, FIRST_WAIT_S, LONGEST_WAIT_S = 5, 1.0, 30.0  # for each request
# Packages whose own errors mean that bytes did not arrive.
TRANSPORTS = {"aiohttp", "fsspec", "http", "httpcore", "httpx", "httpx2", "requests", "urllib3"}


def scheme_of(name: str) -> str:
    """Returns the scheme of a URL, such as `https`; empty for a local path.

    Raises:
        ConfigError: the scheme is none of `REMOTE`.
    """
    scheme, separator, _ = name.partition("://")
    if not separator or scheme == "file" or not scheme.isalnum():
        return ""
    if scheme not in REMOTE:
        raise ConfigError(f"corpus source: path={name}: expected a local path, or a URL of {', '.join(REMOTE)}")
    return scheme


def filesystem(name: str) -> "AbstractFileSystem":
    """Returns the file system of a URL; one of s3 unless the scheme is http, https or gs. For s3 the region of the
    bucket is asked for.

    Raises:
        ConfigError: the scheme is not supported.
        OSError: the bucket cannot be found.
    """
    import fsspec

    scheme = scheme_of(name)
    if scheme in ("http", "https"):
        return fsspec.filesystem("http", client_kwargs={"trust_env": True})
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow import fs

    if scheme == "gs":
        # The default is to try for a quarter of an hour.
        return ArrowFSWrapper(fs.GcsFileSystem(retry_time_limit=timedelta(seconds=LONGEST_WAIT_S)))
    bucket = name.partition("://")[2].partition("/")[0]
    # Unlike S3FileSystem(), from_uri honours AWS_ENDPOINT_URL and finds the region of the bucket.
    return ArrowFSWrapper(fs.FileSystem.from_uri(f"s3://{bucket}")[0])


def open_raw(name: str, *, random_access: bool = False) -> IO[bytes]:
    """Returns a file or URL, opened as it is stored, without decompression; the caller closes it.

    Args:
        random_access: fetch exactly the bytes that are read. Otherwise a URL is read ahead.

    Raises:
        ConfigError: the scheme of the URL is not supported.
        OSError: it cannot be opened.
    """
    scheme = scheme_of(name)
    if not scheme:
        return Path(name.removeprefix("file://")).expanduser().open("rb")
    files: Any = filesystem(name)
    if scheme in ("http", "https"):
        # Without a cache each read is a request of exactly these bytes.
        file = files.open(name, cache_type="none" if random_access else "readahead", block_size=HTTP_BLOCK)
        return Persistent(file, name)  # type: ignore[return-value]
    return files.open(name.partition("://")[2])  # pyarrow tries again by itself


def open_content(name: str) -> io.BufferedReader:
    """Returns a file or URL, opened and decompressed by suffix (.gz, .tgz, .zst, .zstd); the caller closes it.

    Reading a truncated or damaged one ends in OSError or ValueError.

    Raises:
        ConfigError: the scheme of the URL is not supported.
        OSError: it cannot be opened.
    """
    raw: Any = open_raw(name)
    suffix = PurePosixPath(name.partition("?")[0] if scheme_of(name) else name).suffix.lower()
    compressions = {**COMPRESSIONS, ".tgz": "gzip"}
    if suffix in compressions:
        import pyarrow

        raw = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), compressions[suffix])
    if isinstance(raw, io.BufferedReader):
        return raw
    return io.BufferedReader(raw, BUFFER)


class Persistent(io.RawIOBase):
    """A file behind http; a request that breaks is sent again, if the server knows ranges."""

    def __init__(self, file: Any, name: str) -> None:
        self._file = file
        self._name = name
        self._position = 0  # bytes from the start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        from fsspec.implementations.http import HTTPFile

        return isinstance(self._file, HTTPFile)  # for servers without ranges fsspec has another class

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size or 0}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fills `buffer` from the position, as far as the file reaches, and moves the position.

        Returns the number of bytes; 0 is the end of the file. Waits between attempts.

        Raises:
            OSError: `ATTEMPTS` failed, or another attempt would not help.
        """
        from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

        # Without ranges, a second request would begin at the first byte again.
        retrying = Retrying(
            stop=stop_after_attempt(ATTEMPTS if self.seekable() else 1),
            wait=wait_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
            retry=retry_if_exception(is_transient),
            reraise=True,
        )
        try:
            content = retrying(self._read, len(buffer))
        except Exception as error:  # aiohttp's own errors are no OSError
            raise OSError(f"{self._name}: byte {self._position:,}: {brief(error)}") from error

        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _read(self, size: int) -> bytes:
        if self.seekable():
            self._file.seek(self._position)  # a failed attempt may have moved it
        return self._file.read(size)


def is_transient(error: BaseException) -> bool:
    """Returns whether the same request may succeed later: broken connections, time-outs, overloaded servers.

    The status of a server's answer decides, if the error has one: 408, 425, 429 and 500 or more are transient. Without
    a status, every OSError and every error of a package of `TRANSPORTS` is transient, except missing files, folders in
    place of files, refused rights, and the hub's offline mode. Other errors are not.
    """
    # The answer of a server, if there is one, decides.
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    if isinstance(status, int):
        return status in (408, 425, 429) or status >= 500
    if isinstance(error, ConnectionError | TimeoutError):
        # With HF_HUB_OFFLINE=1, which the user set, no attempt succeeds.
        return "OfflineModeIsEnabled" not in f"{type(error).__name__} {error}"
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False  # among them: a data set that does not exist, or is gated
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in TRANSPORTS


def unreadable(error: BaseException) -> str:
    """Returns why a file cannot be read, for people: one line.

    The error of the system or of a request explains itself; any other one means that the content is wrong.
    """
    if "requires too much memory" in str(error):  # words of zstd
        return "its zstd window is over 128 MiB: compress it again without --long"
    if "decrypt" in str(error).lower():  # words of pyarrow for parquet
        return "the file is encrypted: decrypt it"
    if isinstance(error, OSError) and (error.errno or error.__cause__):
        return brief(error)
    return f"{brief(error)}: the file is truncated, damaged or of another format"


def brief(error: BaseException | None) -> str:
    """Returns the type and first line of an error, at most 300 characters of it."""
    message = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {message[:300]}".rstrip(": .")
