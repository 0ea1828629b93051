"""Lists the files of a source, with a reason for each one that is left out.

`path` of a source is a file, a folder, a glob or a URL (http, https, s3, gs), or a list of them. A file that is named,
or matched by a glob, is taken whatever its suffix. A folder is read to the bottom in the order of names; its hidden
files and folders, files of other suffixes, and files that `exclude` names are left out, and linked folders are read
once. Patterns of `exclude` see names relative to the folder that is read. If a glob matched the file or folder itself,
they see its name relative to the glob's last folder without magic letters; of a file that is named, its last part.
A zip is a folder of its members. Readers of rows leave out files of other splits than train (`splits.py`).
"""

import errno
import glob
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.inputs import Input, Inputs
from dist_lm.data.sources.archive import is_zip, members_of
from dist_lm.data.sources.failures import brief, unreadable
from dist_lm.data.sources.http_file import http_info
from dist_lm.data.sources.opening import COMPRESSIONS, filesystem, scheme_of
from dist_lm.data.sources.saved import ARROW, STATE, saved_data_set
from dist_lm.data.sources.splits import LEFT_OUT, SHARD, TRAIN, SplitRule, kind_of, split_of, split_rule
from dist_lm.errors import ArtefactError, ConfigError, UserError

AGAIN = "read already (linked or named twice)"
OwnRule = Callable[[str], str]  # name of a file in a folder -> why it is left out; empty: it is taken


def bare_name(name: str) -> str:
    """Returns the file name in lower case, without the suffix of a compression and the query of a URL.

    Raises:
        ConfigError: the scheme of a URL is not supported.
    """
    last = PurePosixPath(name.partition("?")[0] if scheme_of(name) else name).name.lower()
    stem, dot, suffix = last.rpartition(".")
    if stem and dot + suffix in COMPRESSIONS:
        return stem
    return last


def by_suffix(*suffixes: str) -> OwnRule:
    """Returns the rule that takes files of these suffixes, in upper or lower case, plain or compressed.

    The rule's docstring, which errors quote, names the suffixes. It raises ConfigError for an unsupported scheme.

    Args:
        suffixes: in lower case, with their dots.
    """

    def rule(name: str) -> str:
        suffix = PurePosixPath(bare_name(name)).suffix
        if suffix in suffixes:
            return ""
        return f"suffix {suffix}" if suffix else "no suffix"

    rule.__doc__ = f"{', '.join(suffixes)} (plain, .gz, .zst, .xz or .bz2)"
    return rule


def base_of(path: str) -> str:
    """Returns the base of names below a path: itself, or the last folder of a glob without magic letters.

    It has no slash at its end and no `file://`. An existing file or folder is itself, whatever its letters.

    Raises:
        ConfigError: the scheme of a URL is not supported.
    """
    base = path.rstrip("/")
    if not scheme_of(path):
        base = os.path.expanduser(path.removeprefix("file://")).rstrip("/")  # noqa: PTH111  a glob is no path
        if os.path.lexists(base):  # the name of a file may hold [
            return base
    while glob.has_magic(base):
        base = base.rpartition("/")[0]
    return base


def list_files(
    source: SourceConfig, rule: OwnRule, hidden: tuple[str, ...] = (".", "_"), *, of_rows: bool = True
) -> Inputs:
    """Returns the files of `source.path`, each taken or with the reason why it is left out. Asks the servers of URLs.

    Files are in the order of the paths, and in a path in the order of names. No file is read, except by `rule`, the
    directories of zips, and `state.json` of data sets that `datasets` saved.

    Args:
        rule: decides about files that are found in a folder; its docstring says what it takes.
        hidden: first letters of hidden names.
        of_rows: files are tables or lists: of a folder or glob the split is read that the source names, and zips in a
            folder are folders. Otherwise only zips that are named, or matched by a glob, are.

    Raises:
        ConfigError: a path does not exist, has an unsupported scheme or holds nothing to read (the message says what
            was left out), or shards of several splits of train, or `exclude` is no list of patterns. Without paths
            nothing is raised.
        ArtefactError: a folder, URL or zip cannot be listed. A UserError of `rule` passes.
    """
    import pathspec

    try:
        exclude = pathspec.GitIgnoreSpec.from_lines(source.exclude)
    except (ValueError, re.error) as error:
        raise ConfigError(
            f"corpus source reader={source.reader}: exclude={source.exclude}: expected patterns as in "
            f".gitignore ({error})"
        ) from error

    walk = _Walk(rule, hidden, exclude.match_file, of_rows)
    all_inputs: list[Input] = []
    for path in source.path or []:
        if of_rows:
            magic = path.removeprefix(base_of(path)) if glob.has_magic(path) else ""
            walk.split_rule = split_rule(source.split, magic, source.held_out)
        try:
            inputs = list(walk.remote(path) if scheme_of(path) else walk.local(path))
        except FileNotFoundError as error:
            # fsspec takes every error of a server for a missing file; the status tells.
            status = getattr(error.__cause__, "status", 404)
            if status not in (404, 410):
                raise ArtefactError(
                    f"corpus source reader={source.reader}: path={path}: the server answers {status} "
                    f"({brief(error.__cause__)}): try again later, or check the address and the right to read it"
                ) from error
            cause = f" ({brief(error.__cause__)})" if error.__cause__ else ""
            raise ConfigError(
                f"corpus source reader={source.reader}: path={path}: no such file, folder or URL{cause}"
            ) from error
        except UserError:
            raise
        except (OSError, ValueError) as error:  # an address that is none is a ValueError of pyarrow
            raise ArtefactError(f"corpus source: path={path}: cannot be listed: {brief(error)}") from error

        # Files that an earlier path listed are no reason for an error.
        if all(file.left_out not in ("", AGAIN) for file in inputs):
            raise ConfigError(
                f"corpus source reader={source.reader}: path={path}: nothing to read there: expected {rule.__doc__}; "
                f"{Inputs(tuple(inputs)).summary()}. A file that is named or matched by a glob is read whatever its "
                f"suffix{_name_a_split(inputs)}"
            )
        if of_rows and not source.split and not source.held_out:
            _require_one_split(source, path, inputs)
        all_inputs += inputs
    return Inputs(tuple(all_inputs))


@dataclass
class _Walk:
    """Lists paths of a source; remembers the files that it has listed, so that nothing is read twice."""

    rule: OwnRule
    hidden: tuple[str, ...]
    excluded: Callable[[str], bool]  # relative name -> whether `exclude` names it; folders end in /
    of_rows: bool  # as in `list_files`
    split_rule: SplitRule = lambda name: ""  # decides on files of folders and globs by their relative names
    matched: str = (
        ""  # the part that a glob matched of the folder that is listed, with a slash at its end: part of these names
    )
    listed: set[Any] = field(default_factory=set)  # (device, inode) of local files and folders, names of remote ones

    def local(self, path: str) -> Iterator[Input]:
        """Yields the inputs of a file, a folder or a glob of this machine, in the order of names.

        Raises:
            FileNotFoundError: there is none, or nothing that the glob matches.
            OSError: a folder cannot be listed.
            UserError: as `rule` raises it.
        """
        pattern = os.path.expanduser(path.removeprefix("file://"))  # noqa: PTH111  a glob is no path
        # An existing file may have the letters of a glob in its name.
        is_glob = glob.has_magic(pattern) and not os.path.lexists(pattern)
        if not is_glob:
            Path(pattern).stat()  # FileNotFoundError
            names = [pattern]
        else:
            _require_listable(pattern)
            names = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207  may be absolute
            names = [name.rstrip("/") for name in names]
            if not names:
                raise FileNotFoundError(path)

        base = base_of(path)
        rule: OwnRule = self._excluded_file
        if is_glob:
            rule = partial(self._excluded_below, base)
        searched_folders = {base.rpartition("/")[0]}  # a repository above the base is not looked for
        for name in names:
            if not is_utf8(name):
                yield _not_utf8(name)
                continue
            if is_glob:
                yield from _repositories_above(name, searched_folders)
            self.matched = ""
            if is_glob:
                self.matched = name.removeprefix(base + "/") + "/"
            if is_zip(name) and Path(name).is_file() and not rule(name):
                yield from self._zip(name, "", is_named=True)
            elif not Path(name).is_dir():
                yield self._file(name, rule)
            elif is_glob and rule(name + "/"):
                yield _local_input(name, "exclude")
            else:
                yield from self._folder(name, "")

    def _folder(self, folder: str, below: str) -> Iterator[Input]:
        """Yields the inputs of a folder to the bottom, in the order of names. A folder that was listed before is left
        out.

        Args:
            below: the folder's name relative to the path of the source, with a slash at its end unless it is empty.

        Raises:
            OSError: a folder cannot be listed.
            UserError: as `rule` raises it.
        """
        # Each folder once: a link to a folder above would never end.
        if self._was_listed(folder):
            yield _local_input(folder, AGAIN)
            return

        with os.scandir(folder) as children:
            names = sorted(child.name for child in children)
        saved = saved_data_set(folder) if STATE in names else None
        for name in names:
            path, relative = os.path.join(folder, name), below + name  # noqa: PTH118
            if not is_utf8(path):
                yield _not_utf8(path)
                continue

            # Patterns of .gitignore that end in / are about folders alone.
            is_folder = Path(path).is_dir()
            if is_folder:
                relative += "/"
            if name.startswith(self.hidden):
                yield _local_input(path, "hidden")
            elif self.excluded(relative):
                yield _local_input(path, "exclude")
            elif is_folder:
                yield from self._folder(path, relative)
            elif saved and name.endswith(ARROW) and name not in saved.files:
                yield _local_input(path, "not of the saved data set")
            elif self.of_rows and is_zip(name) and Path(path).is_file():
                yield from self._zip(path, relative + "/")
            else:
                # A saved data set knows its split, which its folder need not name.
                below_split = f"{saved.split}/{relative}" if saved else relative
                yield self._file(path, partial(self._found, below_split))

    def _zip(self, path: str, below: str, *, is_named: bool = False) -> Iterator[Input]:
        """Yields the inputs of the members of a zip, as of a folder; one that was listed before is left out.

        Args:
            below: the zip's name relative to the path of the source, with a slash at its end unless it is empty.
            is_named: the source names the zip: a single member is taken whatever its suffix.

        Raises:
            ArtefactError: the zip cannot be read; names it.
            UserError: as `rule` raises it.
        """
        if self._was_listed(path):
            yield _local_input(path, AGAIN)
            return
        try:
            members = members_of(path)
            mtime_ns = os.stat(path).st_mtime_ns  # noqa: PTH116
        except OSError as error:
            raise ArtefactError(f"{path}: cannot be read: {unreadable(error)}") from error

        hidden_parts: dict[str, None] = {}  # an ordered set
        visible = {}
        for member, entry in members.items():
            parts = member.split("/")
            depth = next((depth for depth, part in enumerate(parts) if self._is_hidden(part)), None)
            if depth is None:
                visible[member] = entry
            else:
                hidden_parts[f"{path}/{'/'.join(parts[: depth + 1])}{'/' if depth + 1 < len(parts) else ''}"] = None
        yield from (Input(name, left_out="hidden") for name in hidden_parts)

        for member, entry in visible.items():
            name = f"{path}/{member}"
            left_out = "exclude" if self.excluded(below + member) else ""
            if not left_out and not (is_named and len(visible) == 1):
                left_out = self._found(below + member, name)
            yield Input(name, entry.compress_size, mtime_ns, f"crc32 {entry.CRC:08x}", left_out=left_out)

    def _is_hidden(self, part: str) -> bool:
        return part.startswith(self.hidden) and part not in (".", "..")

    def _found(self, relative: str, name: str) -> str:
        """Decides on a file that was found in a folder, by its relative and its whole name."""
        return self.rule(name) or self.split_rule(self.matched + relative)

    def _file(self, name: str, rule: OwnRule) -> Input:
        """Returns the input of a file, and asks `rule` whether it is taken.

        A broken link, a pipe or device, and a file that was listed before are left out. A taken file is remembered.

        Raises:
            OSError: the file cannot be looked at.
            UserError: as `rule` raises it.
        """
        try:
            mode = os.stat(name).st_mode  # noqa: PTH116
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise
            return Input(name, left_out="broken link")

        # A rule may open the file, and a pipe would never answer.
        left_out = "no regular file"
        if stat.S_ISREG(mode):
            left_out = rule(name)
        if not left_out and self._was_listed(name):
            left_out = AGAIN
        return _local_input(name, left_out)

    def _excluded_file(self, name: str) -> str:
        """Decides on a file that was named: patterns see its last part."""
        return "exclude" if self.excluded(PurePosixPath(name.partition("?")[0]).name) else ""

    def _excluded_below(self, base: str, name: str) -> str:
        """Decides on a file or folder that a glob matched: patterns see its name below `base`."""
        relative = name.removeprefix(base + "/")
        if self.excluded(relative):
            return "exclude"
        return "" if name.endswith("/") else self.split_rule(relative)

    def _was_listed(self, name: str) -> bool:
        """Tells whether a file or folder was listed before, under this or another name, and remembers it.

        Raises:
            OSError: it cannot be looked at.
        """
        # Inodes, because a link or a mount gives a file a second name.
        status = os.stat(name)  # noqa: PTH116
        identity = (status.st_dev, status.st_ino)
        if identity in self.listed:
            return True
        self.listed.add(identity)
        return False

    def remote(self, url: str) -> Iterator[Input]:
        """Yields the inputs of a URL: one file of http, or a file, folder or glob of s3 and gs. Asks the server.

        Raises:
            ConfigError: the scheme is not supported.
            FileNotFoundError: there is none, or the server answers with an error.
            OSError, ValueError: the URL cannot be listed.
        """
        import fsspec.utils
        from pyarrow import fs

        scheme = scheme_of(url)
        if is_zip(url.partition("?")[0]):
            raise ConfigError(f"{url}: a zip behind a URL is not read: download it, and name the copy with path")
        if scheme in ("http", "https"):
            yield self._remote_input(url, http_info(url), self._excluded_file(url))
            return

        file_system: Any = filesystem(url)
        bucket_and_key = url.partition("://")[2].rstrip("/")
        folder = base_of(url).partition("://")[2]
        info = file_system.info(folder)
        if info["type"] == "file":
            yield self._remote_input(url, info, self._excluded_file(url))
            return

        # pyarrow lists, because fsspec's own `find` and `glob` pass over folders that cannot be listed.
        matches = re.compile(fsspec.utils.glob_translate(bucket_and_key)).fullmatch
        is_glob = folder != bucket_and_key
        remote_files = file_system.fs.get_file_info(fs.FileSelector(folder, recursive=True))
        for file in sorted(remote_files, key=lambda file: file.path):
            if file.type != fs.FileType.File or (is_glob and not matches(file.path)):
                continue
            name, relative = f"{scheme}://{file.path}", file.path.removeprefix(folder + "/")
            if self.excluded(relative):
                left_out = "exclude"
            elif is_glob:
                left_out = self.split_rule(relative)
            elif any(part.startswith(self.hidden) for part in relative.split("/")):
                left_out = "hidden"
            else:
                left_out = self._found(relative, name)
            yield self._remote_input(name, {"size": file.size, "mtime": file.mtime_ns}, left_out)

    def _remote_input(self, name: str, info: dict[str, Any], left_out: str) -> Input:
        """Returns the input of a remote file, as `remote_input`, and remembers the file as listed.

        Args:
            left_out: the reason why it is left out; empty: it is taken, unless it was listed before.
        """
        if not left_out and name in self.listed:
            left_out = AGAIN
        self.listed.add(name)
        return remote_input(name, info, left_out)


def remote_input(name: str, info: Mapping[str, Any], left_out: str = "") -> Input:
    """Returns the input of a remote file by the fields that its server tells; a size of -1 is unknown.

    Args:
        left_out: the reason why it is left out; empty: it is taken.
    """
    etag = str(info.get("ETag") or info.get("Last-Modified") or "")
    mtime_ns = info.get("mtime") or 0
    if isinstance(mtime_ns, datetime):
        mtime_ns = int(mtime_ns.timestamp() * 1e9)
    size = info.get("size")
    if size is None:
        size = -1
    return Input(name, size, mtime_ns, etag, left_out=left_out)


def _name_a_split(inputs: Sequence[Input]) -> str:
    """Returns advice if files of other splits were left out: the end of a sentence, else an empty text."""
    splits = sorted({file.left_out.removeprefix(LEFT_OUT) for file in inputs if file.left_out.startswith(LEFT_OUT)})
    return (
        f"; files of {', '.join(splits)} are read if the source names the split: split: {splits[0]}" if splits else ""
    )


def _require_one_split(source: SourceConfig, path: str, inputs: Sequence[Input]) -> None:
    """Refuses inputs whose shards belong to several splits of train, such as `train_sft` and `train_gen`, or `train`
    and `train_sft`: these splits hold different data. Returns nothing.

    The split is read from the names of shards. Files that are left out, are no shards, or belong to validation or test
    do not count.

    Args:
        path: the path of the source, for the message.

    Raises:
        ConfigError: names the splits and how to choose one.
    """
    files = [file for file in inputs if not file.left_out and SHARD.fullmatch(PurePosixPath(file.name).name)]
    splits = sorted({split_of(PurePosixPath(file.name).name) for file in files})
    of_train = [split for split in splits if kind_of(split) == TRAIN]
    if len(of_train) > 1:
        raise ConfigError(
            f"corpus source reader={source.reader}: path={path}: it holds the splits {', '.join(of_train)}: name one, "
            f"as split: {of_train[0]}"
        )


def is_utf8(name: str) -> bool:
    """Tells whether a name can be written. The system gives bytes of other encodings as lone surrogates."""
    return name.isascii() or name == name.encode(errors="replace").decode()


def _not_utf8(name: str) -> Input:
    return Input(name.encode(errors="backslashreplace").decode(), left_out="name is not UTF-8")


def _repositories_above(name: str, searched_folders: set[str]) -> Iterator[Input]:
    """Lists the `.git` of the folders above a file or folder that a glob matched: a glob matches no hidden name.

    Args:
        searched_folders: where the search ends; the folders that it visits are added.
    """
    while (name := name.rpartition("/")[0]) and name not in searched_folders:
        searched_folders.add(name)
        if os.path.lexists(f"{name}/.git"):
            yield _local_input(f"{name}/.git", "hidden")


def _require_listable(pattern: str) -> None:
    """Opens every folder that a glob looks into: `glob.glob` passes over those that may not be read. Returns nothing.

    Raises:
        OSError: a folder cannot be listed or entered; names it.
    """
    parts = pattern.split("/")
    for depth, part in enumerate(parts):
        outer = "/".join(parts[:depth]) + "/" if depth else "./"
        if glob.has_magic(outer + part):
            folders = outer + "**/" if part == "**" else outer
            for folder in glob.glob(folders, recursive=True):  # noqa: PTH207  may be absolute
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
