"""The journal of a run: one line for each event of its gangs, and a snapshot of the ranks that run now.

events.jsonl: `time` (seconds since 1970), `event`, and the fields of the event:
  started    attempt, nodes [{host, address}], ranks_per_node, device, layout, step (of the checkpoint it continues),
             slowest_link_mb_per_s (measured between two nodes before the start; null: not measured)
  failed     error (one line), type, rank, host, restarts_left
  growing    nodes (of the next attempt)
  stopped    signal
  finished   steps
"""

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_lm.cluster.heartbeat import Pulse
from dist_lm.errors import ArtefactError
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory

log = logging.getLogger(__name__)

LIVE_EVERY_S = 2.0


class Journal:
    """Writes the events of a run and the state of its ranks."""

    def __init__(self, run: RunDirectory) -> None:
        """Append to the events of `run`."""
        self._run = run
        self._live_at = 0.0

    def write(self, event: str, **values: Any) -> None:
        """Append one event. If a killed launcher left an incomplete line, the event starts a new line."""
        line = json.dumps({"time": time.time(), "event": event, **values}).encode()
        with self._run.events.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line + b"\n")

    def live(self, pulses: Sequence[Pulse]) -> None:
        """Write the last heartbeats of the ranks, at most once in `LIVE_EVERY_S`."""
        if time.monotonic() - self._live_at < LIVE_EVERY_S:
            return
        self._live_at = time.monotonic()
        ranks = [asdict(pulse) | {"phase": pulse.phase.words} for pulse in pulses]
        try:
            durable.replace_text(self._run.live, json.dumps({"time": time.time(), "ranks": ranks}) + "\n")
        except OSError as error:  # only people read it: no reason to end training
            log.warning("could not write %s: %s", self._run.live, error)


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a run in order, without lines that a killed launcher left incomplete.

    Raises:
        ArtefactError: a complete line is no event.
    """
    if not path.exists():
        return
    for number, line in enumerate(path.read_text(errors="replace").split("\n"), start=1):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if not _is_event(event):
            raise ArtefactError(
                f"{path}:{number}: not an event: {line[:80]!r}; move the file away to continue without it"
            )
        yield event


def _is_event(value: Any) -> bool:
    return (
        isinstance(value, dict) and isinstance(value.get("event"), str) and isinstance(value.get("time"), int | float)
    )
