"""Keeps the result of a task on disk: a folder that is there whole, with the hash of each of its files, or not at all.

Tasks are repeated after a kill, on any node. A result that is finished and undamaged is not made again; two processes
that make the same result do not disturb each other, because results of one task are equal.
"""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_lm.errors import ArtefactError
from dist_lm.storage import durable

HASHES = "result.json"  # SHA-256 of each other file of a result


def is_finished(result: Path) -> bool:
    """Returns whether a result is there and undamaged; reads it whole.

    Raises:
        OSError: it cannot be read.
    """
    try:
        hashes = durable.read_json(result / HASHES).get("files")
    except ArtefactError:
        return False
    if not isinstance(hashes, dict):
        return False
    paths = {path.name: path for path in result.iterdir() if path.name != HASHES}
    return paths.keys() == hashes.keys() and all(durable.sha256_of(paths[name]) == hashes[name] for name in paths)


def has_result(result: Path) -> bool:
    """Returns whether a result is there, maybe damaged; reads nothing."""
    return (result / HASHES).is_file()


@contextmanager
def writing(result: Path) -> Iterator[Path]:
    """Gives an empty folder to a block, whose files become the result when the block ends; an error leaves nothing.

    A damaged result is replaced.

    Raises:
        OSError: files cannot be written.
    """
    result.parent.mkdir(parents=True, exist_ok=True)
    temporary = result.with_name(f".{result.name}.{secrets.token_hex(8)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.iterdir():
            durable.fsync(path)
        hashes = {path.name: durable.sha256_of(path) for path in sorted(temporary.iterdir())}
        durable.write_sealed(temporary / HASHES, {"files": hashes})
        _rename(temporary, result)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    durable.fsync(result.parent)


def _rename(temporary: Path, result: Path) -> None:
    """Gives a finished folder its name; an unfinished folder of that name is removed first.

    If another process has finished the same task in the meantime, its result stays, and so does `temporary`.

    Raises:
        OSError: the folder cannot be renamed, or an unfinished one not removed.
    """
    if result.exists() and not is_finished(result):
        shutil.rmtree(result)
    try:
        temporary.rename(result)
    except OSError:
        # Another process has finished the same task in the meantime.
        if not is_finished(result):
            raise
