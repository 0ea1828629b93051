"""The files of a source, listed with a reason for each one that is left out.

`path` of a source is a file, a folder, a glob or a URL (http, https, s3, gs), or a list of them. A file that is named,
or matched by a glob, is taken whatever its suffix. A folder is read to the bottom in the order of names; its hidden
files and folders, files of other suffixes, and files that `exclude` names are left out, and linked folders are read
once. Patterns of `exclude` see names relative to the folder that is read. What a glob matched itself, they see relative
to the glob's last folder without magic letters; of a file that is named, its last part.
"""

import errno
import glob
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.inputs import Input, Inputs
from dist_lm.data.sources.opening import COMPRESSIONS, brief, filesystem, scheme_of
from dist_lm.errors import ArtefactError, ConfigError, UserError

AGAIN = "read already (linked or named twice)"
OwnRule = Callable[[str], str]  # name of a file in a folder -> why it is left out; empty: it is taken


def bare_name(name: str) -> str:
    """The file name in lower case, without the suffix of a compression and the query of a URL."""
    last = PurePosixPath(name.partition("?")[0] if scheme_of(name) else name).name.lower()
    stem, dot, suffix = last.rpartition(".")
    return stem if stem and dot + suffix in COMPRESSIONS else last


def by_suffix(*suffixes: str) -> OwnRule:
    """The rule that takes files of these suffixes, in upper or lower case, plain or compressed."""

    def rule(name: str) -> str:
        bare = bare_name(name)
        found = PurePosixPath(bare).suffix
        return "" if found in suffixes else f"suffix {found}" if found else "no suffix"

    rule.__doc__ = f"{', '.join(suffixes)} (plain, .gz or .zst)"
    return rule


def base_of(place: str) -> str:
    """What names below a place are relative to: the place, or the last folder of a glob without magic letters."""
    path = place if scheme_of(place) else os.path.expanduser(place.removeprefix("file://"))  # noqa: PTH111  a glob is no path
    path = path.rstrip("/")
    if not scheme_of(place) and os.path.lexists(path):  # the name of a file may hold [
        return path
    while glob.has_magic(path):
        path = path.rpartition("/")[0]
    return path


def list_files(source: SourceConfig, rule: OwnRule, hidden: tuple[str, ...] = (".", "_")) -> Inputs:
    """The files of `source.path`.

    Args:
        rule: decides about files that are found in a folder; its docstring says what it takes.
        hidden: first letters of hidden names.

    Raises:
        ConfigError: a place does not exist or holds nothing to read; the message says what was left out.
        ArtefactError: a folder or URL cannot be listed.
    """
    import pathspec

    try:
        exclude = pathspec.GitIgnoreSpec.from_lines(source.exclude)
    except (ValueError, re.error) as error:
        raise ConfigError(
            f"corpus source reader={source.reader}: exclude={source.exclude}: expected patterns as in "
            f".gitignore ({error})"
        ) from error
    walk = _Walk(rule, hidden, exclude.match_file)
    found: list[Input] = []
    for place in source.path or []:
        try:
            inputs = list(walk.remote(place) if scheme_of(place) else walk.local(place))
        except FileNotFoundError as error:
            answer = getattr(error.__cause__, "status", 404)  # of a server; fsspec takes every error for a missing file
            if answer not in (404, 410):
                raise ArtefactError(
                    f"corpus source reader={source.reader}: path={place}: the server answers {answer} "
                    f"({brief(error.__cause__)}): try again later, or check the address and the right to read it"
                ) from error
            why = f" ({brief(error.__cause__)})" if error.__cause__ else ""
            raise ConfigError(
                f"corpus source reader={source.reader}: path={place}: no such file, folder or URL{why}"
            ) from error
        except UserError:
            raise
        except (OSError, ValueError) as error:  # an address that is none is a ValueError of pyarrow
            raise ArtefactError(f"corpus source: path={place}: cannot be listed: {brief(error)}") from error
        if all(one.left_out not in ("", AGAIN) for one in inputs):
            raise ConfigError(
                f"corpus source reader={source.reader}: path={place}: nothing to read there: expected {rule.__doc__}; "
                f"{Inputs(tuple(inputs)).summary()}. A file that is named or matched by a glob is read whatever its "
                "suffix"
            )
        found += inputs
    return Inputs(tuple(found))


@dataclass
class _Walk:
    """Lists places; remembers what it has listed, so that nothing is read twice."""

    rule: OwnRule
    hidden: tuple[str, ...]
    excluded: Callable[[str], bool]  # relative name; folders end in /
    seen: set[Any] = field(default_factory=set)  # (device, inode) of local files and folders, names of remote ones

    def local(self, place: str) -> Iterator[Input]:
        path = os.path.expanduser(place.removeprefix("file://"))  # noqa: PTH111  a glob is no path
        is_glob = glob.has_magic(path) and not os.path.lexists(path)
        if not is_glob:
            names = [path]
            Path(path).stat()  # FileNotFoundError
        else:
            _require_listable(path)
            names = sorted(glob.glob(path, recursive=True))  # noqa: PTH207  may be absolute
            names = [name.rstrip("/") for name in names]
            if not names:
                raise FileNotFoundError(place)
        base = base_of(place)
        rule = partial(self._excluded_below, base) if is_glob else self._excluded_file
        folders = {base.rpartition("/")[0]}  # of a glob, that need no look for .git
        for name in names:
            if not is_utf8(name):
                yield _not_utf8(name)
                continue
            if is_glob:
                yield from _repositories_above(name, folders)
            if not Path(name).is_dir():
                yield self._file(name, rule)
            elif is_glob and rule(name + "/"):
                yield _local_input(name, "exclude")
            else:
                yield from self._folder(name, "")

    def _folder(self, folder: str, below: str) -> Iterator[Input]:
        """`below`: the folder's name relative to the place, with a slash at its end unless it is empty."""
        if self._again(folder):
            yield _local_input(folder, AGAIN)
            return
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries)
        for name in names:
            path, relative = os.path.join(folder, name), below + name  # noqa: PTH118
            if not is_utf8(path):
                yield _not_utf8(path)
                continue
            is_folder = Path(path).is_dir()
            if name.startswith(self.hidden):
                yield _local_input(path, "hidden")
            elif self.excluded(relative + "/" if is_folder else relative):
                yield _local_input(path, "exclude")
            elif is_folder:
                yield from self._folder(path, relative + "/")
            else:
                yield self._file(path, self.rule)

    def _file(self, name: str, rule: OwnRule) -> Input:
        """`rule` may open the file, so it is asked about regular files alone: a pipe would never answer."""
        try:
            kind = os.stat(name).st_mode  # noqa: PTH116
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise
            return Input(name, left_out="broken link")
        left_out = rule(name) if stat.S_ISREG(kind) else "no regular file"
        return _local_input(name, left_out or (AGAIN if self._again(name) else ""))

    def _excluded_file(self, name: str) -> str:
        """For a file that was named: patterns see its last part."""
        return "exclude" if self.excluded(PurePosixPath(name.partition("?")[0]).name) else ""

    def _excluded_below(self, base: str, name: str) -> str:
        """For a file or folder that a glob matched."""
        return "exclude" if self.excluded(name.removeprefix(base + "/")) else ""

    def _again(self, name: str) -> bool:
        status = os.stat(name)  # noqa: PTH116
        key = (status.st_dev, status.st_ino)
        if key in self.seen:
            return True
        self.seen.add(key)
        return False

    def remote(self, place: str) -> Iterator[Input]:
        scheme = scheme_of(place)
        import fsspec.utils
        from pyarrow import fs

        files: Any = filesystem(place)
        if scheme in ("http", "https"):
            yield self._remote_input(place, files.info(place), self._excluded_file(place))
            return
        bucket_and_key = place.partition("://")[2].rstrip("/")
        folder = base_of(place).partition("://")[2]
        info = files.info(folder)
        if info["type"] == "file":
            yield self._remote_input(place, info, self._excluded_file(place))
            return
        matches = re.compile(fsspec.utils.glob_translate(bucket_and_key)).fullmatch
        # fsspec's own `find` and `glob` pass over what cannot be listed
        entries = files.fs.get_file_info(fs.FileSelector(folder, recursive=True))
        for entry in sorted(entries, key=lambda entry: entry.path):
            if entry.type != fs.FileType.File:
                continue
            name, relative = f"{scheme}://{entry.path}", entry.path.removeprefix(folder + "/")
            if folder != bucket_and_key:
                left_out = "" if matches(entry.path) else None
            elif any(part.startswith(self.hidden) for part in relative.split("/")):
                left_out = "hidden"
            else:
                left_out = self.rule(name)
            if left_out is not None:
                one = {"size": entry.size, "mtime": entry.mtime_ns}
                left_out = "exclude" if self.excluded(relative) else left_out
                yield self._remote_input(name, one, left_out)

    def _remote_input(self, name: str, info: dict[str, Any], left_out: str) -> Input:
        if not left_out and name in self.seen:
            left_out = AGAIN
        self.seen.add(name)
        etag = str(info.get("ETag") or info.get("Last-Modified") or "")
        changed = info.get("mtime") or 0
        mtime_ns = int(changed.timestamp() * 1e9) if isinstance(changed, datetime) else changed
        size = info.get("size")
        return Input(name, -1 if size is None else size, mtime_ns, etag, left_out=left_out)


def is_utf8(name: str) -> bool:
    """Whether a name can be written; the system gives bytes of other encodings as lone surrogates."""
    return name.isascii() or name == name.encode(errors="replace").decode()


def _not_utf8(name: str) -> Input:
    return Input(name.encode(errors="backslashreplace").decode(), left_out="name is not UTF-8")


def _repositories_above(name: str, seen: set[str]) -> Iterator[Input]:
    """The `.git` of the folders above a file or folder that a glob matched: a glob matches no hidden name.

    Args:
        seen: folders that need no look, with the one above the place; those that are looked at are added.
    """
    while (name := name.rpartition("/")[0]) and name not in seen:
        seen.add(name)
        if os.path.lexists(f"{name}/.git"):
            yield _local_input(f"{name}/.git", "hidden")


def _require_listable(pattern: str) -> None:
    """Open every folder that a glob looks into: `glob.glob` passes over those that may not be read.

    Raises:
        OSError: names the folder.
    """
    parts = pattern.split("/")
    for place, part in enumerate(parts):
        outer = "/".join(parts[:place]) + "/" if place else "./"
        if glob.has_magic(outer + part):
            for folder in glob.glob(outer + "**/" if part == "**" else outer, recursive=True):  # noqa: PTH207
                os.scandir(folder).close()
                os.stat(os.path.join(folder, "."))  # noqa: PTH116, PTH118  may be listed, but not entered


def _local_input(name: str, left_out: str) -> Input:
    try:
        status = os.stat(name)  # noqa: PTH116
    except OSError:
        return Input(name, left_out=left_out)
    if stat.S_ISDIR(status.st_mode):
        return Input(name + "/", left_out=left_out)
    return Input(name, status.st_size, status.st_mtime_ns, left_out=left_out)
