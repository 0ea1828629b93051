"""What happened to the gangs of a run, an event a line, and how the present one stands: for people and for tests.

events.jsonl: `time` (seconds since 1970), `event`, and what belongs to it:
  started    attempt, nodes [{host, address}], ranks_per_node, device, layout, step (it continues from),
             slowest_link_mb_per_s (between two nodes, as tried before the start; null: not tried)
  failed     error (one line), type, rank, host, restarts_left
  growing    nodes (it will have)
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
    """Writes the events of a run, and what its ranks are doing."""

    def __init__(self, run: RunDirectory) -> None:
        """Append to the events of `run`."""
        self._run = run
        self._live_at = 0.0

    def write(self, event: str, **values: Any) -> None:
        """Append one event, in a line of its own also behind half a line that a killed launcher left."""
        line = json.dumps({"time": time.time(), "event": event, **values}).encode()
        with self._run.events.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line + b"\n")

    def live(self, pulses: Sequence[Pulse]) -> None:
        """Note what ranks were last heard doing; often enough is every few seconds."""
        if time.monotonic() - self._live_at < LIVE_EVERY_S:
            return
        self._live_at = time.monotonic()
        ranks = [asdict(pulse) | {"phase": pulse.phase.words} for pulse in pulses]
        try:
            durable.replace_text(self._run.live, json.dumps({"time": time.time(), "ranks": ranks}) + "\n")
        except OSError as error:  # for people to look at: no reason to end ranks that train
            log.warning("%s could not be written: %s", self._run.live, error)


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a run, in order; half a line that a killed launcher left is passed over.

    Raises:
        ArtefactError: a whole line is no event.
    """
    if not path.exists():
        return
    for number, line in enumerate(path.read_text(errors="replace").split("\n"), start=1):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if not _is_event(event):
            raise ArtefactError(f"{path}:{number}: not an event: {line[:80]!r}; move the file away to go on without it")
        yield event


def _is_event(value: Any) -> bool:
    return (
        isinstance(value, dict) and isinstance(value.get("event"), str) and isinstance(value.get("time"), int | float)
    )
