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

from dist_lm.tracking.readable import duration
from dist_lm.training.heartbeat import PHASE_WORDS, SLOW_START_S, Heartbeat, Phase, Unheard

VARIABLE = "DIST_LM_HEARTBEAT"  # environment variable of a rank: path of the shared memory
_SLOT = struct.Struct("@qqddd")  # phase, completed steps, time of the beat, median step time (s), share that is done
_STEPS_REMEMBERED = 64
INSIDE = (Phase.GENERATING, Phase.SCORING, Phase.STEP)  # phases that belong to the step begun by DATA


@dataclass(frozen=True)
class Pulse:
    """The last heartbeat of a rank."""

    rank: int
    phase: Phase
    step: int  # completed steps
    age_s: float
    median_step_s: float  # median duration of its last steps; 0: none yet
    state: str = ""  # state of its process, if known, in the kernel's letters: T stopped, D waiting for a device
    share_done: float = 0.0  # share of its phase, in [0, 1]; 0: unknown


class HeartbeatBoard:
    """The agent's side of the shared memory."""

    def __init__(self, ranks: int) -> None:
        """Creates one slot for each of `ranks` local ranks."""
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
            phase, step, at, median, share_done = _SLOT.unpack_from(self._memory, _SLOT.size * local)
            age = now - (at or self._started)
            pulses.append(Pulse(first_rank + local, Phase(phase), step, age, median, states.get(local, ""), share_done))
        return tuple(pulses)


class RankHeartbeat:
    """The rank's side: one slot of the shared memory."""

    def __init__(self, path: Path, local_rank: int) -> None:
        """Writes to the slot of `local_rank`."""
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self._offset = _SLOT.size * local_rank
        self._step_began: float | None = None
        self._waits_for_step: int | None = None  # in phase DATA
        self._durations: deque[float] = deque(maxlen=_STEPS_REMEMBERED)

    def beat(self, phase: Phase, step: int, share_done: float = 0.0) -> None:
        """Writes a heartbeat, see `Heartbeat`. A step lasts from phase DATA to the next phase outside `INSIDE`."""
        now = time.monotonic()
        # A step lasts from one wait for data to the next, or to the first phase that is no part of a step. A rank that
        # still waits for the data of a step begins no other one.
        still_waits = phase is Phase.DATA and step == self._waits_for_step
        self._waits_for_step = step if phase is Phase.DATA else None
        is_border = phase is Phase.DATA or (phase not in INSIDE and self._step_began is not None)
        if is_border and not still_waits:
            if self._step_began is not None:
                self._durations.append(now - self._step_began)
            self._step_began = now if phase is Phase.DATA else None
        median = statistics.median(self._durations or [0.0])
        # pack_into clears the slot first, which a reader would take for a rank without any heartbeat
        self._memory[self._offset : self._offset + _SLOT.size] = _SLOT.pack(phase, step, now, median, share_done)


class RememberedHeartbeat:
    """The heartbeat of a rank without a watcher that shows its own progress: another thread reads the last beat."""

    def __init__(self) -> None:
        self._last = (Phase.JOINING, 0, time.monotonic(), 0.0)

    def beat(self, phase: Phase, step: int, share_done: float = 0.0) -> None:
        self._last = (phase, step, time.monotonic(), share_done)

    def pulse(self) -> Pulse:
        """Returns the last beat, as that of rank 0."""
        phase, step, beaten_at, share_done = self._last
        return Pulse(0, phase, step, time.monotonic() - beaten_at, 0.0, share_done=share_done)


def own_heartbeat(environ: Mapping[str, str]) -> Heartbeat:
    """Returns the heartbeat that the agent set up for this process, or `Unheard` without an agent."""
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
        """Returns the limit in seconds for a gang whose newest heartbeat is `pulse`."""
        if pulse.phase in (Phase.DATA, Phase.SCORING, Phase.STEP) and pulse.median_step_s > 0:
            return max(self.least_s, self.steps * pulse.median_step_s)
        return self.otherwise_s


def in_words(phase: Phase, share_done: float) -> str:
    """Returns the phase in words, with the share that is done where it is known: `generating (38 %)`."""
    return PHASE_WORDS[phase] + share_in_words(share_done)


def share_in_words(share_done: float) -> str:
    """Returns ` (38 %)` behind the words of a phase; empty for an unknown share."""
    return f" ({100 * share_done:.0f} %)" if share_done else ""


def doing(pulses: Sequence[Pulse]) -> dict[Phase, str]:
    """Returns what the ranks in each phase do, in words, with the mean share that is done."""
    words = {}
    for phase in {pulse.phase for pulse in pulses}:
        shares = [pulse.share_done for pulse in pulses if pulse.phase is phase]
        words[phase] = in_words(phase, sum(shares) / len(shares))
    return words


def doings(pulses: Sequence[Pulse], since: Mapping[int, float]) -> str:
    """Returns what the ranks do, those that do the same together, with the shortest time that one has done it:
    `2 ranks loading the model for 65 s, rank 1 starting for 70 s`.

    Args:
        since: seconds since a rank began its phase, by rank.
    """
    if not pulses:
        return "no rank has reported yet: agents start their processes, which import packages"
    ranks_of: dict[Phase, list[int]] = {}
    for pulse in pulses:
        ranks_of.setdefault(pulse.phase, []).append(pulse.rank)

    texts, words_of = [], doing(pulses)
    for phase, ranks in ranks_of.items():
        names = f"rank {ranks[0]}" if len(ranks) == 1 else f"{len(ranks):,} ranks"
        words = words_of[phase]
        if phase is Phase.STARTING:
            words += " (importing packages)"
        texts.append(f"{names} {words} for {duration(min(since[rank] for rank in ranks))}")
    return ", ".join(texts)


class Standstill:
    """Says once a minute what the ranks of an attempt do while they complete no step. Times are in seconds."""

    def __init__(self, now: float) -> None:
        """The attempt begins."""
        self._began = self._moved_at = self._told_at = now
        self._has_begun = False  # whether this attempt has completed a step
        self._step = 0
        self._pulses: Sequence[Pulse] = ()
        self._phases: dict[int, tuple[Phase, float]] = {}  # phase of each rank, and when it was first seen in it

    def heard(self, pulses: Sequence[Pulse], now: float) -> None:
        """Notes the last heartbeats of the ranks; a later step than before counts as progress, as `moved` does.

        Args:
            now: seconds, by the clock of the other methods.
        """
        was_in_step = any(pulse.phase in (Phase.DATA, *INSIDE) for pulse in self._pulses)
        self._pulses = pulses
        # A rank that evaluates beats again and again: its phase is older than its last heartbeat.
        for pulse in pulses:
            if pulse.rank not in self._phases or self._phases[pulse.rank][0] is not pulse.phase:
                self._phases[pulse.rank] = (pulse.phase, now - pulse.age_s)

        newest = max(pulses, key=lambda pulse: pulse.step, default=None)
        if newest and newest.step > self._step:
            self._step = newest.step
            # A run that continues begins at a later step, which this attempt has not made.
            if was_in_step:
                self.moved(now)

    def moved(self, now: float) -> None:
        """A step was completed, or its metrics were written."""
        self._has_begun, self._moved_at = True, now

    def line(self, now: float) -> str:
        """Returns what the ranks do, in one line, if a minute has passed without a step or line; else an empty text."""
        if now - max(self._moved_at, self._told_at) < SLOW_START_S:
            return ""
        self._told_at = now
        since = {rank: now - seen_at for rank, (_, seen_at) in self._phases.items()}
        words = f"no step after {duration(now - self._began)}"
        if self._has_begun:
            words = f"no further step for {duration(now - self._moved_at)}"
        return f"{words}: {doings(self._pulses, since)}"


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
