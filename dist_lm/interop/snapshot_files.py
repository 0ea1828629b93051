"""The files of a folder that somebody else wrote: found inside of it alone, and parsed in a process with limits.

What is read here is small: configuration, tokenizer, chat template and the headers of weights, never weights.
"""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_lm.errors import ArtefactError, shown_value
from dist_lm.interop.foreign_files import tensors_of_header
from dist_lm.sandbox import limited

LENGTH_BYTES = 8  # size of the field with the length of a header of safetensors, little-endian
HEADER_BYTES = 100_000_000  # the longest header that safetensors itself reads
MOST_BYTES = 256 << 20  # size of a file that is read whole; the largest tokenizers have 40 MB


def file_in(folder: Path, name: str) -> Path | None:
    """Returns the path of a file of the folder, with links resolved; None: there is no such file.

    A link may lead to another file of the folder. In the cache of huggingface_hub the folders of commits hold links
    into `blobs` of the same repository, which is fine too.

    Raises:
        ArtefactError: the file is a link that leaves the folder, or leads nowhere, or it is no regular file.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None

    # A link to a file of the user would copy it into the run, and from there into an export.
    target = path.resolve()
    root = _root_of(folder)
    where = f"{folder}/{shown_value(name)}"
    if not target.is_relative_to(root):
        raise ArtefactError(f"{where} is a link that leaves {root}: replace it by the file, if you trust it")
    if not target.exists():
        raise ArtefactError(f"{where} is a link to a file that does not exist: copy the model again")
    if not target.is_file():
        raise ArtefactError(f"{where} is not a regular file: expected a folder of a model as transformers saves it")
    return target


def _root_of(folder: Path) -> Path:
    """Returns the folder, with links resolved, that links of a snapshot must not leave."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return folder.parents[1]
    return folder


def content_in(folder: Path, name: str) -> bytes | None:
    """Returns the content of a file of the folder; None: there is no such file.

    Raises:
        ArtefactError: as `file_in`; or the file cannot be read, or has more than `MOST_BYTES`.
    """
    path = file_in(folder, name)
    if path is None:
        return None
    try:
        # Whoever can exchange the file after the check must not win a link or a pipe by it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ArtefactError(f"{path} is not a regular file")
            if status.st_size > MOST_BYTES:
                raise ArtefactError(f"{path}: {status.st_size:,} bytes: expected at most {MOST_BYTES:,}")
            return file.read(MOST_BYTES)
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({error.strerror})") from error


def tensor_entries(file: Path) -> list[tuple[str, str, list[int], int]]:
    """Returns (name, dtype, shape, byte offset in the file) of the tensors in a safetensors file of somebody else.

    Only the header is read, by a process with limits.

    Raises:
        ArtefactError: the file cannot be read, is no safetensors file, or is cut short; or tensors overlap. The message
            names the tensor.
        UserError: as `parsed`.
    """
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            length = int.from_bytes(opened.read(LENGTH_BYTES), "little")
            # Any file has eight first bytes; the format has no longer header.
            if size < LENGTH_BYTES or length > min(HEADER_BYTES, size - LENGTH_BYTES):
                raise ArtefactError(f"{file}: not a safetensors file (a header of {length} bytes, a file of {size})")
            header = opened.read(length)
    except OSError as error:
        raise ArtefactError(f"{file}: not a safetensors file ({error})") from error

    start = LENGTH_BYTES + length
    entries = parsed(str(file), tensors_of_header, header, size - start, str(file))
    return [(name, dtype, shape, start + offset) for name, dtype, shape, offset in entries]


def parsed(where: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what `function` returns for `arguments`, computed in the process with limits (`dist_lm.sandbox.limited`).

    Args:
        where: the file, for messages.

    Raises:
        ArtefactError: the function needs too much time or memory, or fails in a way that it does not foresee.
        UserError: that of the function; or this machine starts no such process.
    """
    try:
        return limited.call(function, *arguments)
    except limited.LimitError as error:
        raise ArtefactError(f"{where}: reading it {error}") from error
