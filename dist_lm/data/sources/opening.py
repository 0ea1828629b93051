"""Opens files and URLs as they are stored, and decompresses content by suffix.

Credentials and the endpoint of s3 and gs come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...).
"""

import io
import os
import re
from datetime import timedelta
from typing import IO, TYPE_CHECKING, Any

from dist_lm.data.sources.archive import StoredMember, UnpackedMember, members_of, zip_of
from dist_lm.data.sources.decompression import Decompressed
from dist_lm.data.sources.http_file import HttpFile, http_filesystem
from dist_lm.errors import ConfigError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".xz": "xz", ".bz2": "bz2"}
MAGIC = re.compile(rb"(?P<zip>PK\x03\x04)|(?P<bz2>BZh[1-9]1AY&SY)|(?P<xz>\xfd7zXZ\x00)|7z\xbc\xaf\x27\x1c")
REMOTE = ("http", "https", "s3", "gs")
BUFFER = 1 << 20  # bytes
LONGEST_TRY_S = 30.0  # for a request of gs


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
    scheme = scheme_of(name)
    if scheme in ("http", "https"):
        return http_filesystem()
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow import fs

    if scheme == "gs":
        # The default is to try for a quarter of an hour.
        return ArrowFSWrapper(fs.GcsFileSystem(retry_time_limit=timedelta(seconds=LONGEST_TRY_S)))
    bucket = name.partition("://")[2].partition("/")[0]
    # Unlike S3FileSystem(), from_uri honours AWS_ENDPOINT_URL and finds the region of the bucket.
    return ArrowFSWrapper(fs.FileSystem.from_uri(f"s3://{bucket}")[0])


def open_raw(name: str, *, random_access: bool = False) -> IO[bytes]:
    """Returns a file or URL, opened as it is stored, without decompression; the caller closes it. Of a member of a zip
    these are its packed bytes.

    Args:
        random_access: fetch exactly the bytes that are read. Otherwise a URL is read ahead.

    Raises:
        ConfigError: the scheme of the URL is not supported.
        OSError: it cannot be opened.
    """
    scheme = scheme_of(name)
    if not scheme and (stored := _stored_member(name)):
        return stored
    if not scheme:
        # A Path would cost a small file as much time as its reading.
        return open(os.path.expanduser(name.removeprefix("file://")), "rb", buffering=0)  # noqa: PTH111, PTH123
    if scheme in ("http", "https"):
        return HttpFile(name, random_access=random_access)  # type: ignore[return-value]
    files: Any = filesystem(name)
    return files.open(name.partition("://")[2])  # pyarrow tries again by itself


def open_content(name: str) -> io.BufferedReader:
    """Returns a file or URL, opened and decompressed by suffix (`COMPRESSIONS`, .tgz); the caller closes it.

    Reading a truncated or damaged one ends in OSError or ValueError.

    Raises:
        ConfigError: the scheme of the URL is not supported.
        OSError: it cannot be opened.
    """
    return io.BufferedReader(decompressed(unpacked(open_raw(name), name), compression_of(name)), BUFFER)


def _stored_member(name: str) -> Any:
    """Returns the stored bytes of a local name that is a member of a zip; None for other names.

    Raises:
        OSError: as `StoredMember`.
    """
    path, member = zip_of(os.path.expanduser(name.removeprefix("file://")))  # noqa: PTH111  a Path would drop ./
    return StoredMember(path, member) if path else None


def unpacked(raw: Any, name: str) -> Any:
    """Returns the content of an open file as a file: of a member of a zip what was packed, else the file itself.

    Args:
        raw: what `open_raw` returned for `name`, or a file that reads it, at its start.

    Raises:
        ConfigError: the scheme of the URL is not supported.
        OSError, RefusedContentError: the zip cannot be read, or has what is refused.
    """
    if scheme_of(name):
        return raw
    path, member = zip_of(os.path.expanduser(name.removeprefix("file://")))  # noqa: PTH111
    return UnpackedMember(raw, members_of(path)[member]) if path else raw


def compression_of(name: str) -> str:
    """Returns the compression of a file or URL by its suffix, as `COMPRESSIONS` names it; empty for a plain one.

    Raises:
        ConfigError: the scheme of the URL is not supported.
    """
    bare = name.partition("?")[0] if scheme_of(name) else name
    suffix = os.path.splitext(bare)[1].lower()  # noqa: PTH122  as in `open_raw`
    return {**COMPRESSIONS, ".tgz": "gzip"}.get(suffix, "")


def compressed_without_suffix(content: bytes) -> str:
    """Returns why content that begins as zip, bz2, xz or 7z files do cannot be read, and the way out; empty for other
    content.

    Args:
        content: of a file, decompressed by suffix: its first 10 bytes or more.
    """
    match = MAGIC.match(content)
    if not match:
        return ""
    if not match.lastgroup:
        return "7z files are not read: unpack it, or compress it with gzip, zstd, xz or bz2"
    return (
        f"this is a {match.lastgroup} file without its suffix, or compressed twice: rename it to end in "
        f".{match.lastgroup}, or unpack it"
    )


def decompressed(raw: Any, compression: str) -> Any:
    """Returns the content of an open file as a file. `compression`: as returned by `compression_of`."""
    if not compression:
        return raw
    # pyarrow knows no xz, and sets no limits.
    if compression in ("xz", "bz2"):
        return Decompressed(raw, compression)
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), compression)
