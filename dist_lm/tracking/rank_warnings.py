"""Warnings of the first rank on their way to the person at the launcher: a line each in a file of the run."""

import logging
from pathlib import Path


def write_warnings(path: Path, package: str) -> None:
    """Append what this process logs as a warning under `package` to `path`; errors end a run and are shown as such."""
    handler = logging.FileHandler(path)
    handler.addFilter(lambda record: record.levelno == logging.WARNING)
    handler.setFormatter(_OneLine("%(message)s"))
    logging.getLogger(package).addHandler(handler)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return " ".join(super().format(record).split())


class WarningFollower:
    """The lines that come to a file after this is made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def poll(self) -> list[str]:
        """The complete lines that came since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            complete, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(complete) + len(newline)
        return complete.decode(errors="replace").split("\n") if newline else []
