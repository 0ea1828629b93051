"""Writes files that survive a crash: under a temporary name, flushed to disk, then renamed."""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_lm.errors import ArtefactError

TEMPORARY_NAME = re.compile(r"\A\.(.+)\.[0-9a-f]{16}\.tmp\Z")
"""Name of a file that is being written, which a kill leaves behind; group 1 is its final name."""

CHECKSUM = "content_sha256"  # key of the checksum in files of `write_sealed`

Kind = type | tuple[type, ...]
"""Type of a value of JSON, or several."""

_WAY_OUT = "move it away to continue without it"


def fsync(path: Path) -> None:
    """Flushes the contents of a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces `path` by `content` atomically: a reader sees the old file or the new one, never a part of one.

    When it returns, file and folder entry are on disk. The folder must exist.

    Raises:
        OSError: the content cannot be written; `path` is as it was, unless only the folder could not be flushed. The
            temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # several nodes may write at once
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

    # Without this a crash could undo the rename, although the content itself is on disk.
    fsync(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Removes the temporary files that a killed process left in a folder, to which nobody else may write now."""
    for path in folder.iterdir():
        if TEMPORARY_NAME.match(path.name):
            path.unlink()


def write_new_text(path: Path, text: str) -> None:
    """Writes text in UTF-8 to a file that must not exist, as `write_bytes` does.

    Raises:
        FileExistsError: there is one by now; it is left as it is.
        OSError: the text cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        write_bytes(temporary, text.encode())
        rename_to_new(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def rename_to_new(temporary: Path, path: Path) -> None:
    """Renames a file of the same folder to a name that must be free, and flushes the folder to disk.

    Raises:
        FileExistsError: another process has made such a file; it is left as it is.
        OSError: the file cannot be renamed.
    """
    # A rename would replace a file that appeared in the meantime; a link does not.
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        # Between this look and the rename the file may still appear, which a link would have told.
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists") from None
        temporary.replace(path)
    else:
        temporary.unlink()
    fsync(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Replaces `path` by `text` in UTF-8, atomically but not flushed to disk: for files rewritten every few seconds.

    After a crash of the machine the file may be empty or old.

    Raises:
        OSError: the text cannot be written; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes text with `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON value with `write_bytes`, indented and with sorted keys."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object with `write_json`, and the checksum of its other keys under `CHECKSUM`; `read_json` compares
    it."""
    write_json(path, {**value, CHECKSUM: _checksum(value)})


def read_json(
    path: Path, needed: Mapping[str, Kind] | None = None, what: str = "a JSON object of dist_lm"
) -> dict[str, Any]:
    """Returns the JSON object in a file, without its checksum; an empty one if the file is missing.

    Args:
        needed: types of the values that the caller uses, by key.
        what: what the file should be, for messages.

    Raises:
        ArtefactError: the file holds no JSON object, is not UTF-8, differs from its checksum (files of earlier releases
            have none), or lacks a needed value.
        OSError: it cannot be read.
    """
    if not path.exists():
        return {}

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # nested too deeply
        raise ArtefactError(f"{path}: no JSON ({error}); {_WAY_OUT}") from error
    if not isinstance(content, dict):
        raise ArtefactError(f"{path}: not {what}; {_WAY_OUT}")

    if isinstance(content.get(CHECKSUM), str) and content.pop(CHECKSUM) != _checksum(content):
        raise damaged(path, "it differs from its checksum")

    for key, kind in (needed or {}).items():
        if not isinstance(content.get(key), kind):
            raise ArtefactError(f"{path}: not {what}; {_WAY_OUT} (`{key}` is missing or has another type)")
    return content


def damaged(path: Path, what: str) -> ArtefactError:
    """Returns the error for a small file whose content cannot be used.

    Args:
        what: what is wrong with it, such as a key and its value.
    """
    return ArtefactError(f"{path}: is damaged ({what}); {_WAY_OUT}")


def _checksum(value: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a JSON object as it is after reading it: keys are texts, in any order."""
    as_read = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Returns the hexadecimal SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_lines(path: Path) -> Iterator[Any]:
    """Yields the JSON value of every line that is not blank.

    Lines end with a newline only: `str.splitlines` would also split at U+2028, U+2029 and U+0085, which JSON permits in
    strings.

    Raises:
        ValueError: a line is no JSON or no UTF-8.
        OSError: the file cannot be read.
    """
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)
