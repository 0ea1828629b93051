"""The files that rank 0 writes for other programs: metrics.jsonl and its warnings.

metrics.jsonl has a JSON object a line: `step`, `time` (seconds since 1970), and metrics by their names in
`tracking.registry`. A step may have several lines (its own, then one for a checkpoint); readers merge them. JSON has
neither NaN nor infinity: such a value is written as null and read as None.
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_lm.errors import ArtefactError
from dist_lm.storage import durable
from dist_lm.tracking.registry import metric_of

TAIL_BYTES = 64 << 10  # `last_metrics` reads this much of the end of a file
MetricsLine = dict[str, Any]
"""`step` (int), `time` (float) and metrics by name (float, int, or None where the value was not finite)."""


class MetricsWriter:
    """Appends to a metrics file; each line has reached the operating system when `write` returns."""

    def __init__(self, path: Path) -> None:
        """Opens `path` for appending; an incomplete last line, left by a killed writer, is cut off."""
        self._path = path
        if path.exists():
            _cut_torn_line(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float], at: float | None = None) -> None:
        """Appends one line; a value that is not finite becomes null. The line has reached the operating system on
        return, not the disk (see `sync`).

        Args:
            at: time of the line in seconds since 1970; None: now.

        Raises:
            UnknownMetricError: a name is not in the registry; nothing is written.
            OSError: the line cannot be written.
        """
        # An unknown name is refused before anything is written.
        for name in metrics:
            metric_of(name)

        if at is None:
            at = time.time()
        line = {"step": step, "time": at}
        line |= {name: value if math.isfinite(value) else None for name, value in metrics.items()}

        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Flushes the lines to disk; called before a checkpoint is written that counts their steps as completed."""
        os.fsync(self._file.fileno())

    def truncate_after(self, step: int) -> None:
        """Removes the lines whose step is after `step`, which a resumed run writes again, in one durable replacement of
        the file; then goes on appending.

        Raises:
            ArtefactError: a line before the last one is damaged.
        """
        lines = [line for line in read_metrics(self._path) if line["step"] <= step]
        self._file.close()
        durable.write_text(self._path, "".join(json.dumps(line) + "\n" for line in lines))

        # The old descriptor still belongs to the replaced file.
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Closes the file; nothing more can be written."""
        self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: Path) -> Iterator[MetricsLine]:
    """Yields every complete line of a metrics file, in order; the file is read while they are taken.

    Raises:
        ArtefactError: a complete line is not a metrics line; the message has its number.
        FileNotFoundError: there is no file.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.endswith(b"\n"):
                yield _parse(raw, f"{path}:{number}")


def is_late(line: Mapping[str, Any]) -> bool:
    """Returns whether a line has only scores of tasks, which may belong to an earlier step than the line before."""
    names = line.keys() - {"step", "time"}
    return bool(names) and all(name.startswith("eval/") for name in names)


def last_metrics(path: Path) -> MetricsLine:
    """Returns the newest value of every metric in the last 64 KiB of a metrics file; empty if there is no file.

    `step` and `time` are those of the newest line that is not late; values that are not finite are left out.

    Raises:
        ArtefactError: a complete line is not a metrics line.
    """
    if not path.exists():
        return {}

    with path.open("rb") as file:
        start = max(0, path.stat().st_size - TAIL_BYTES)
        file.seek(start)
        lines = file.read().splitlines(keepends=True)

    # The first line of the tail is incomplete, unless the tail is the complete file.
    merged: MetricsLine = {}
    if start:
        lines = lines[1:]
    for raw in lines:
        if raw.endswith(b"\n"):
            line = _parse(raw, f"{path} near its end")
            # A late line brings new scores, but its step and time are older than those of the lines before.
            if is_late(line):
                line = {name: line[name] for name in line if name not in ("step", "time")}
            merged |= {name: value for name, value in line.items() if value is not None}

    return merged


class LineFollower:
    """Reads the lines that another process appends to a file, which may not exist yet."""

    def __init__(self, path: Path, from_end: bool = False) -> None:
        """Follows `path`; with `from_end` the lines that the file has now are skipped."""
        self._path = path
        self._inode = -1
        self._offset = 0
        if from_end:
            self.poll()

    def poll(self) -> list[bytes]:
        """Returns the complete lines since the last call, without their ends; none while there is no file.

        A file that was replaced or became shorter is read again from its start.
        """
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []

        with file:
            status = os.fstat(file.fileno())
            # A replaced file has another inode.
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._inode = status.st_ino
                self._offset = 0

            file.seek(self._offset)
            complete, newline, _ = file.read().rpartition(b"\n")
        # An incomplete line is read again by the next call.

        self._offset += len(complete) + len(newline)
        return complete.splitlines()


class MetricsFollower:
    """Follows a metrics file; after a resumed run has dropped lines, callers must go by `step`, not count lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines = LineFollower(path)

    def poll(self) -> list[MetricsLine]:
        """Returns the lines since the last call.

        Raises:
            ArtefactError: a complete line is not a metrics line.
        """
        return [_parse(raw, str(self._path)) for raw in self._lines.poll()]


def _parse(raw: bytes, location: str) -> MetricsLine:
    """Returns a line of a metrics file; null is None.

    Raises:
        ArtefactError: `raw` is no JSON object with an integer `step`; the message begins with `location`.
    """
    try:
        line = json.loads(raw)
    except ValueError:
        line = None

    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        raise ArtefactError(f"{location}: not a metrics line: {raw[:80]!r}; move the file away to continue without it")

    return line


def _cut_torn_line(path: Path) -> None:
    # An append to a torn line would join two lines into one that cannot be read.
    content = path.read_bytes()
    complete = content.rfind(b"\n") + 1
    if complete < len(content):
        os.truncate(path, complete)


def write_warnings(path: Path, package: str) -> None:
    """Appends the warnings that this process logs under `package` to `path`, one line each."""
    handler = logging.FileHandler(path)
    handler.addFilter(lambda record: record.levelno == logging.WARNING)
    handler.setFormatter(_OneLine("%(message)s"))
    logging.getLogger(package).addHandler(handler)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return " ".join(super().format(record).split())
