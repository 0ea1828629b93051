"""Tells failures that another attempt may mend from others, and says them in one line."""

# Packages whose own errors mean that bytes did not arrive.
TRANSPORTS = {"aiohttp", "fsspec", "http", "httpcore", "httpx", "httpx2", "requests", "urllib3"}


class RefusedContentError(OSError):
    """Raised for content that is not read although it is no damage; the message is the end of a sentence about it."""


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
    if isinstance(error, RefusedContentError):
        return str(error)
    if "requires too much memory" in str(error):  # words of zstd
        return "its zstd window is over 128 MiB: compress it again without --long"
    if "decrypt" in str(error).lower():  # words of pyarrow for parquet
        return "the file is encrypted: decrypt it"
    if isinstance(error, OSError) and (error.errno or error.__cause__):
        return brief(error)
    return f"{brief(error)}: the file is truncated, damaged or of another format: replace or remove it"


def brief(error: BaseException | None) -> str:
    """Returns the type and first line of an error, at most 300 characters of it."""
    message = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {message[:300]}".rstrip(": .")
