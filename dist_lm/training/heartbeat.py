"""Signals between a rank and its watchers: the rank reports its phase, and is asked to stop."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol


@dataclass
class StopRequest:
    """Stop flag, set by the signal handlers; all ranks agree on it at the next step boundary."""

    requested: bool = False


class Phase(IntEnum):
    """Phase of a rank, in the order of a step."""

    STARTING = 0  # reads the configuration, joins the process group
    LINKS = 1  # first collectives
    LOADING = 2  # builds the model, reads a checkpoint
    DATA = 3  # waits for the batch of a step
    GENERATING = 4  # the pool generates the rollouts of a step
    STEP = 5  # forward, backward, update
    EVALUATING = 6
    SAVING = 7
    CLOSING = 8  # work at the end of a stage
    TRACING = 9  # starts the profiler, or writes its trace

    @property
    def words(self) -> str:
        """The phase in words that continue 'rank N is'."""
        return {
            Phase.STARTING: "starting",
            Phase.LINKS: "in its first collective",
            Phase.LOADING: "loading",
            Phase.DATA: "waiting for data",
            Phase.GENERATING: "generating",
            Phase.STEP: "in a step",
            Phase.EVALUATING: "evaluating",
            Phase.SAVING: "saving",
            Phase.CLOSING: "closing the stage",
            Phase.TRACING: "profiling",
        }[self]


class Heartbeat(Protocol):
    """Receives the progress of a rank."""

    def beat(self, phase: Phase, step: int) -> None:
        """Reports the phase; `step`: completed steps."""


class Unheard:
    """The heartbeat of a rank without a watcher."""

    def beat(self, phase: Phase, step: int) -> None:
        """Does nothing."""
