"""Checks of the paths that a command writes to. They need no other package, so that a verb makes them before it imports
torch or reads anything: a refusal takes no minute.
"""

import os
import tempfile
from pathlib import Path

from dist_lm.errors import ConfigError, one_line


def new_file(option: str, path: Path, *, force: bool | None = None, makes_folders: bool = True) -> None:
    """Refuses a path where a new file cannot be written, or a file that is there already; returns nothing.

    Args:
        option: what named the path, such as `--out`.
        force: whether an existing file is replaced; None: the command has no such option.
        makes_folders: missing folders above it are no error.

    Raises:
        ConfigError: names the option, the path and the way out.
    """
    file_to_write(option, path, makes_folders=makes_folders)
    if os.path.lexists(path) and not force:
        way_out = "or remove it first" if force is None else "or give --force to replace it"
        raise ConfigError(one_line(f"{option} {path}: there is such a file: choose another name, {way_out}"))


def file_to_write(option: str, path: Path | None, *, makes_folders: bool = False) -> None:
    """Refuses a path where no file can be written, whether or not there is one; returns nothing.

    Args:
        option: what named the path, such as `--json`.
        path: None is no error: nothing is written.
        makes_folders: missing folders above it are no error.

    Raises:
        ConfigError: names the option, the path and the way out.
    """
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(one_line(f"{option} {path}: this is a folder: expected a file"))
    folder_to_write(option, path, path.absolute().parent, makes_folders=makes_folders)


def new_folder(option: str, path: Path) -> None:
    """Refuses a folder that is there already, or that cannot be made; returns nothing.

    Raises:
        ConfigError: names the option, the path and the way out.
    """
    if os.path.lexists(path):
        raise ConfigError(one_line(f"{option}: {path} exists: give another name, or remove it first"))
    folder_to_write(option, path)


def folder_to_write(option: str, path: Path, folder: Path | None = None, *, makes_folders: bool = True) -> None:
    """Refuses a folder where nothing can be written; returns nothing.

    Args:
        option: what named the path, such as `--output`.
        path: for the message.
        folder: None: the path itself.
        makes_folders: a missing one is no error, if it can be made.

    Raises:
        ConfigError: names the option, the path and the way out.
    """
    folder = folder or path.absolute()
    # The nearest folder that is there decides whether the missing ones can be made.
    if makes_folders:
        folder = next(above for above in (folder, *folder.parents) if os.path.lexists(above))
    if not folder.is_dir():
        problem = f"cannot be written: expected a folder that exists, and {folder} is none"
        raise ConfigError(one_line(f"{option} {path}: {problem}"))
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        problem = f"{folder} cannot be written to ({error.strerror}): choose a folder of your own"
        raise ConfigError(one_line(f"{option} {path}: {problem}")) from error
