"""Files of a folder that two sides share: each sends what changed, and makes the changes of the other one.

Regular files and folders are shared, with rights and times. Links are sent by one side only, and never followed. Pipes,
sockets and devices are not shared.

This module runs inside the sandbox. Only the standard library is imported, and little of it. What comes from the other
side is hostile.
"""

from __future__ import annotations

import os
import stat

from dist_lm.sandbox.values import MalformedError

TYPE_CHECKING = False  # `typing` itself would take a third of a cold start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Change = tuple[bytes, str, int, int, bytes]  # path below the folder, kind, mode, time in ns, content

MAX_FILES = 2_000  # in a folder
MAX_FILE_BYTES = 2 << 20  # size of all files that one message carries
MAX_FOLDER_BYTES = 12 << 20  # size of all files of a folder: a test needs room for its own
_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}


class FailedError(Exception):
    """Raised where a test fails; says why."""


def checked(values: Any, *kinds: type) -> Any:
    """Returns the values if they are a tuple of these types.

    Raises:
        MalformedError: they are not.
    """
    if type(values) is not tuple or tuple(map(type, values)) != kinds:
        raise MalformedError("a message of another form")
    return values


class Folder:
    """Files below a folder that this side shares with the other one.

    Args:
        root: the folder; its own rights are not shared.
        sends_links: whether symbolic links of this side are shared, too; else it takes those of the other side.
    """

    def __init__(self, root: bytes, sends_links: bool) -> None:
        self.root = root
        self.sends_links = sends_links
        self._known: dict[bytes, tuple] = {}  # path -> what changes with the file

    def changes(self, is_shared: Callable[[bytes], bool] | None = None) -> list[Change]:
        """Returns what changed since the last call of this method or of `apply`.

        Args:
            is_shared: whether a path that the other side does not have is shared from now on; None: all are.

        Returns:
            (path, kind, mode, time in ns, content) of each: kind is file, folder, link, or none for what has gone.

        Raises:
            FailedError: there are too many files, or too much in them.
            OSError: a file cannot be read.
        """
        states: dict[bytes, tuple] = {}
        self._scan(b"", states)
        if is_shared is not None:
            states = {path: state for path, state in states.items() if path in self._known or is_shared(path)}
        changes: list[Change] = [(path, "none", 0, 0, b"") for path in self._known if path not in states]
        num_bytes = 0
        for path, (kind, mode, time_ns, *_) in states.items():
            if self._known.get(path) == states[path]:
                continue
            content = self._content(path, kind, MAX_FILE_BYTES - num_bytes)
            num_bytes += len(content)
            changes.append((path, kind, mode, time_ns, content))
        self._known = states
        return changes

    def apply(self, changes: Any) -> None:
        """Makes the changes of the other side: removes, then makes files, with rights and times. Paths through links
        are left out. Nothing is changed before all changes have the right form.

        Raises:
            FailedError: it changes what is not shared with it, or there are too many files, or too much in them.
            MalformedError: they are none, or lead out of the folder.
            OSError: the kernel refuses.
        """
        if type(changes) is not list:
            raise MalformedError("changes of another form")
        for change in changes:
            path, kind, *_ = checked(change, bytes, str, int, int, bytes)
            if not path or any(part in (b"", b".", b"..") for part in path.split(b"/")) or b"\0" in path:
                raise MalformedError("a path that leads out of the folder")
            if kind not in ("file", "folder", "none") and not (kind == "link" and not self.sends_links):
                raise MalformedError("a kind of file that is not shared")

        # Files that have gone go first, the deepest at the beginning: a folder may have become a file.
        for path, kind, *_ in sorted(changes, reverse=True):
            self._remove_other(path, kind)
        folders = []
        for path, kind, mode, time_ns, content in sorted(changes):
            if kind == "none" or not self._has_plain_parents(path):
                continue
            self._make(path, kind, mode & 0o777, content)
            if kind == "folder":
                folders.append((path, mode & 0o777, time_ns))
            elif kind == "file":
                os.utime(self._at(path), ns=(time_ns, time_ns))
        for path, mode, time_ns in reversed(folders):
            os.chmod(self._at(path), mode)
            os.utime(self._at(path), ns=(time_ns, time_ns))

        states: dict[bytes, tuple] = {}
        self._scan(b"", states)
        if sum(state[3] for state in states.values() if state[0] == "file") > MAX_FOLDER_BYTES:
            raise FailedError(f"more than {MAX_FOLDER_BYTES} bytes of files")
        shared = {*self._known, *(path for path, *_ in changes)}
        self._known = {path: state for path, state in states.items() if path in shared}

    def new_paths(self, changes: Any) -> list[bytes]:
        """Returns the paths that changes of the other side add; to be called before `apply`.

        Raises:
            MalformedError: they are none.
        """
        if type(changes) is not list:
            raise MalformedError("changes of another form")
        paths = [checked(change, bytes, str, int, int, bytes)[:2] for change in changes]
        return [path for path, kind in paths if kind != "none" and path not in self._known]

    def _at(self, path: bytes) -> bytes:
        return b"%s/%s" % (self.root, path)

    def _scan(self, folder: bytes, states: dict[bytes, tuple]) -> None:
        """Notes in `states` what lies below a folder, links not followed: path -> what changes with the file.

        Raises:
            FailedError: there are more than MAX_FILES files, or folders too deep.
        """
        for entry in self._entries(self._at(folder) if folder else self.root):
            path = b"%s/%s" % (folder, entry.name) if folder else entry.name
            status = entry.stat(follow_symlinks=False)
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "")
            if not kind or (kind == "link" and not self.sends_links):
                continue
            if len(states) >= MAX_FILES or path.count(b"/") > 100:
                raise FailedError(f"more than {MAX_FILES} files, or folders too deep")
            # Nobody can choose the time of a change.
            states[path] = (kind, status.st_mode, status.st_mtime_ns, status.st_size, status.st_ino, status.st_ctime_ns)
            if kind == "folder":
                states[path] = (kind, status.st_mode, status.st_mtime_ns)
                self._scan(path, states)

    def _entries(self, path: bytes) -> list[os.DirEntry[bytes]]:
        """Returns the entries of a folder. One that may not be read gets the rights 0700, and keeps them."""
        try:
            with os.scandir(path) as entries:
                return [*entries]
        except PermissionError:
            os.chmod(path, 0o700)
            with os.scandir(path) as entries:
                return [*entries]

    def _content(self, path: bytes, kind: str, most: int) -> bytes:
        """Returns the bytes of a file, or where a link leads; empty for a folder. The rights of a file stay what they
        are.

        Raises:
            FailedError: a file has more than `most` bytes.
        """
        if kind == "link":
            return os.readlink(self._at(path))
        if kind == "folder":
            return b""

        try:
            # A pipe put in the place of the file must not make this process wait, nor a link lead elsewhere.
            file = os.open(self._at(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except PermissionError:
            mode = os.stat(self._at(path), follow_symlinks=False).st_mode
            os.chmod(self._at(path), 0o600)
            file = os.open(self._at(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            os.fchmod(file, mode & 0o777)

        try:
            if os.fstat(file).st_size > most:
                raise FailedError(f"more than {MAX_FILE_BYTES} bytes of files")
            return os.read(file, most + 1)[:most]
        finally:
            os.close(file)

    def _has_plain_parents(self, path: bytes) -> bool:
        """Returns whether all folders above a path are folders, and no links."""
        parts = path.split(b"/")[:-1]
        for end in range(1, len(parts) + 1):
            try:
                status = os.lstat(self._at(b"/".join(parts[:end])))
            except OSError:
                return False
            if not stat.S_ISDIR(status.st_mode):
                return False
        return True

    def _remove_other(self, path: bytes, kind: str) -> None:
        """Removes what is at a path, unless it is a folder that stays one.

        Raises:
            FailedError: it is not shared.
        """
        if not self._has_plain_parents(path):
            return
        try:
            is_folder = stat.S_ISDIR(os.lstat(self._at(path)).st_mode)
        except OSError:
            return
        if path not in self._known:
            raise FailedError(f"the program changes {os.fsdecode(path)}, which it was not given")
        if not is_folder:
            os.unlink(self._at(path))
        elif kind != "folder":
            for entry in self._entries(self._at(path)):
                self._remove_other(b"%s/%s" % (path, entry.name), "none")
            os.rmdir(self._at(path))

    def _make(self, path: bytes, kind: str, mode: int, content: bytes) -> None:
        """Makes a file or link, or a folder if there is none; a folder stays writable for this user so far.

        Raises:
            OSError: the kernel refuses, or there is a file at that path.
        """
        if kind == "link":
            os.symlink(content, self._at(path))
            return
        if kind == "folder":
            if not os.path.isdir(self._at(path)):
                os.mkdir(self._at(path))
            os.chmod(self._at(path), 0o700 | mode)
            return
        file = os.open(self._at(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(file, view) :]
            os.fchmod(file, mode)
        finally:
            os.close(file)
