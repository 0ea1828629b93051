"""Heartbeats of ranks, and the hang that they show.

A rank writes a few words of memory that it shares with the agent of its node, so a heartbeat costs neither a message
nor a file access. The memory belongs to the agent and ends with it.
"""

import mmap
import os
import statistics
import struct
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_lm.training.heartbeat import PHASE_WORDS, Heartbeat, Phase, Unheard

VARIABLE = "DIST_LM_HEARTBEAT"  # environment variable of a rank: path of the shared memory
_SLOT = struct.Struct("@qqdd")  # phase, completed steps, time of the beat, median step time (s, monotonic clock)
_STEPS_REMEMBERED = 64
INSIDE = (Phase.GENERATING, Phase.STEP)  # phases that belong to the step begun by DATA


@dataclass(frozen=True)
class Pulse:
    """The last heartbeat of a rank."""

    rank: int
    phase: Phase
    step: int  # completed steps
    age_s: float
    median_step_s: float  # median duration of its last steps; 0: none yet
    state: str = ""  # state of its process, if known, in the kernel's letters: T stopped, D waiting for a device


class HeartbeatBoard:
    """The agent's side of the shared memory."""

    def __init__(self, ranks: int) -> None:
        """Create one slot for each of `ranks` local ranks."""
        self._ranks = ranks
        # Memory without a name in the file system: nothing is left behind if the agent is killed.
        if hasattr(os, "memfd_create"):
            self._file = os.fdopen(os.memfd_create("dist_lm-heartbeat"), "r+b")
            self.path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        else:
            self._file = tempfile.NamedTemporaryFile(prefix="dlm-heartbeat-")  # noqa: SIM115 - open while ranks run
            self.path = self._file.name
        self._file.truncate(_SLOT.size * ranks)
        self._memory = mmap.mmap(self._file.fileno(), _SLOT.size * ranks)
        self._started = time.monotonic()

    def read(self, first_rank: int, states: Mapping[int, str]) -> tuple[Pulse, ...]:
        """Returns the pulse of every local rank. The age of a rank without a heartbeat counts from the creation of the
        board.

        Args:
            first_rank: global number of local rank 0.
            states: known process states, by local rank.
        """
        now, pulses = time.monotonic(), []
        for local in range(self._ranks):
            phase, step, at, median = _SLOT.unpack_from(self._memory, _SLOT.size * local)
            age = now - (at or self._started)
            pulses.append(Pulse(first_rank + local, Phase(phase), step, age, median, states.get(local, "")))
        return tuple(pulses)


class RankHeartbeat:
    """The rank's side: one slot of the shared memory."""

    def __init__(self, path: Path, local_rank: int) -> None:
        """Write to the slot of `local_rank`."""
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self._offset = _SLOT.size * local_rank
        self._step_began: float | None = None
        self._durations: deque[float] = deque(maxlen=_STEPS_REMEMBERED)

    def beat(self, phase: Phase, step: int) -> None:
        """Writes a heartbeat, see `Heartbeat`. A step lasts from phase DATA to the next phase outside `INSIDE`."""
        now = time.monotonic()
        # A step lasts from one wait for data to the next, or to the first phase that is no part of a step.
        if phase is Phase.DATA or (phase not in INSIDE and self._step_began is not None):
            if self._step_began is not None:
                self._durations.append(now - self._step_began)
            self._step_began = now if phase is Phase.DATA else None
        median = statistics.median(self._durations or [0.0])
        # pack_into clears the slot first, which a reader would take for a rank without any heartbeat
        self._memory[self._offset : self._offset + _SLOT.size] = _SLOT.pack(phase, step, now, median)


def own_heartbeat(environ: Mapping[str, str]) -> Heartbeat:
    """The heartbeat that the agent set up for this process, or `Unheard` without an agent."""
    if path := environ.get(VARIABLE):
        return RankHeartbeat(Path(path), int(environ["LOCAL_RANK"]))
    return Unheard()


@dataclass(frozen=True)
class Patience:
    """Longest silence of all ranks before the gang counts as hung."""

    steps: float  # in a training step: this many times the median step time,
    least_s: float  # but at least this long
    otherwise_s: float  # in other phases, and in the first step, which may compile

    def limit_s(self, pulse: Pulse) -> float:
        """The limit in seconds for a gang whose newest heartbeat is `pulse`."""
        if pulse.phase in (Phase.DATA, Phase.STEP) and pulse.median_step_s > 0:
            return max(self.least_s, self.steps * pulse.median_step_s)
        return self.otherwise_s


@dataclass(frozen=True)
class Hang:
    """A gang that makes no progress."""

    rank: int | None  # the rank that the others wait for, if it can be told
    message: str


def find_hang(pulses: Sequence[Pulse], patience: Patience) -> Hang | None:
    """Returns the hang that the pulses of all ranks show; None if there is none.

    Ranks move in step, so one rank that stands still stops all others. Therefore the newest heartbeat of any rank
    counts. The rank to blame is one whose process is stopped, or else the one behind all others; None in the result if
    it cannot be told.
    """
    if not pulses:
        return None
    last = min(pulses, key=lambda pulse: pulse.age_s)
    limit = patience.limit_s(last)
    if last.age_s <= limit:
        return None
    usual = f", a step takes {last.median_step_s:.2g} s" if last.median_step_s else ""
    text = f"no heartbeat of any rank for {last.age_s:.0f} s (limit {limit:.0f} s{usual})"

    blamed = _blamed(pulses)
    if blamed is None:
        return Hang(None, f"{text}; all ranks are {PHASE_WORDS[last.phase]} at step {last.step}")
    how = " and its process is stopped" if blamed.state == "T" else ""
    phase = PHASE_WORDS[blamed.phase]
    return Hang(blamed.rank, f"{text}; it is {phase} at step {blamed.step}{how}, the others wait for it")


def _blamed(pulses: Sequence[Pulse]) -> Pulse | None:
    """Returns the rank that the others wait for: one whose process is stopped, else one of those that are furthest
    behind, if they are no more than half; None if it cannot be told.
    """
    stopped = [pulse for pulse in pulses if pulse.state == "T"]
    if stopped:
        return stopped[0]

    # If most ranks are behind, they wait for something else.
    least_progress = min((pulse.step, pulse.phase) for pulse in pulses)
    behind = [pulse for pulse in pulses if (pulse.step, pulse.phase) == least_progress]
    if len(behind) < len(pulses) and len(behind) <= max(1, len(pulses) // 2):
        return behind[0]
    return None
