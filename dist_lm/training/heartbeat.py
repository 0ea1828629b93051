"""Signals between a rank and its watchers: the rank reports its phase, and is asked to stop."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

# Each time so many seconds have passed without a step, people are told what the ranks do, and a rank that has not met
# the others writes its stacks to its log.
SLOW_START_S = 60.0


@dataclass
class StopRequest:
    """Stop flag, set by the signal handlers; all ranks agree on it at the next step boundary."""

    requested: bool = False


class Phase(IntEnum):
    """Phase of a rank, in the order of a step."""

    STARTING = 0  # imports packages
    JOINING = 1  # reads the configuration, waits for the other ranks
    LINKS = 2  # first collectives
    CORPORA = 3  # compares the corpora with those that the run began with
    LOADING = 4  # builds the model, reads a checkpoint
    PREPARING = 5  # packs documents, computes what a stage needs before its first step
    DATA = 6  # waits for the batch of a step
    GENERATING = 7  # the pool generates the rollouts of a step
    SCORING = 8  # forward passes over rankings or rollouts: log-probabilities of policy and reference, values, scores
    STEP = 9  # forward, backward, update
    EVALUATING = 10
    SAVING = 11
    CLOSING = 12  # work at the end of a stage
    TRACING = 13  # starts the profiler, or writes its trace


PHASE_WORDS = {  # the phase in words that continue 'rank N is'
    Phase.STARTING: "starting",
    Phase.JOINING: "joining the other ranks",
    Phase.LINKS: "in its first collective",
    Phase.CORPORA: "opening corpora",
    Phase.LOADING: "loading the model",
    Phase.PREPARING: "preparing data",
    Phase.DATA: "waiting for data",
    Phase.GENERATING: "generating",
    Phase.SCORING: "computing log-probabilities",
    Phase.STEP: "in a step",
    Phase.EVALUATING: "evaluating",
    Phase.SAVING: "saving",
    Phase.CLOSING: "closing the stage",
    Phase.TRACING: "profiling",
}


class Heartbeat(Protocol):
    """Receives the progress of a rank."""

    def beat(self, phase: Phase, step: int, share_done: float = 0.0) -> None:
        """Reports the phase.

        Args:
            step: completed steps.
            share_done: share of the phase that is done, in [0, 1]; 0: unknown.
        """


class Unheard:
    """The heartbeat of a rank without a watcher."""

    def beat(self, phase: Phase, step: int, share_done: float = 0.0) -> None:
        """Does nothing."""
