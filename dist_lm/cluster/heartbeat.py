"""Heartbeats of the ranks of one node: a few words of memory that ranks write and their agent reads.

No message is sent and no file system is asked, so a step pays nothing for it. The memory belongs to the agent and is
gone with it.
"""

import mmap
import os
import statistics
import struct
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dist_lm.training.heartbeat import Heartbeat, Phase, Unheard

VARIABLE = "DIST_LM_HEARTBEAT"  # environment variable: where the memory of the node's ranks is
_SLOT = struct.Struct("@qqdd")  # phase, completed steps, time of the beat and median step (s, monotonic clock)
_STEPS_REMEMBERED = 64
INSIDE = (Phase.GENERATING, Phase.STEP)  # what comes after the data of a step belongs to it


@dataclass(frozen=True)
class Pulse:
    """What a rank was last heard doing."""

    rank: int
    phase: Phase
    step: int  # completed steps
    age_s: float  # since it said so
    median_step_s: float  # of its last steps; 0: none yet
    state: str = ""  # of its process, in the kernel's letters: T stopped, D waiting for a device


class HeartbeatBoard:
    """The agent's side: the memory, and what is written in it."""

    def __init__(self, ranks: int) -> None:
        """Room for `ranks` local ranks."""
        self._ranks = ranks
        if hasattr(os, "memfd_create"):
            self._file = os.fdopen(os.memfd_create("dist_lm-heartbeat"), "r+b")
            self.path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        else:
            self._file = tempfile.NamedTemporaryFile(prefix="dlm-heartbeat-")  # noqa: SIM115 - kept while the ranks run
            self.path = self._file.name
        self._file.truncate(_SLOT.size * ranks)
        self._memory = mmap.mmap(self._file.fileno(), _SLOT.size * ranks)
        self._started = time.monotonic()

    def read(self, first_rank: int, states: Mapping[int, str]) -> tuple[Pulse, ...]:
        """The pulse of every rank.

        Args:
            first_rank: global number of local rank 0.
            states: process states by local rank, where they are known.
        """
        now, pulses = time.monotonic(), []
        for local in range(self._ranks):
            phase, step, at, median = _SLOT.unpack_from(self._memory, _SLOT.size * local)
            age = now - (at or self._started)
            pulses.append(Pulse(first_rank + local, Phase(phase), step, age, median, states.get(local, "")))
        return tuple(pulses)


class RankHeartbeat:
    """The rank's side: one slot of the memory."""

    def __init__(self, path: Path, local_rank: int) -> None:
        """Write to the slot of `local_rank`."""
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self._offset = _SLOT.size * local_rank
        self._step_began: float | None = None
        self._durations: deque[float] = deque(maxlen=_STEPS_REMEMBERED)

    def beat(self, phase: Phase, step: int) -> None:
        """See `Heartbeat`; a step lasts from waiting for its data to whatever follows it."""
        now = time.monotonic()
        if phase is Phase.DATA or (phase not in INSIDE and self._step_began is not None):
            if self._step_began is not None:
                self._durations.append(now - self._step_began)
            self._step_began = now if phase is Phase.DATA else None
        median = statistics.median(self._durations) if self._durations else 0.0
        # not pack_into, which clears the slot first: a reader would take that for a rank that never beat
        self._memory[self._offset : self._offset + _SLOT.size] = _SLOT.pack(phase, step, now, median)


def own_heartbeat(environ: Mapping[str, str]) -> Heartbeat:
    """The heartbeat of this process, as the agent that started it arranged; unheard without one."""
    path = environ.get(VARIABLE)
    return RankHeartbeat(Path(path), int(environ["LOCAL_RANK"])) if path else Unheard()
