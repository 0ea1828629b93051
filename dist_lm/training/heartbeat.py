"""A rank's sign of life: what it is doing, said again whenever it gets on."""

from enum import IntEnum
from typing import Protocol


class Phase(IntEnum):
    """What a rank is doing, in the order of a step."""

    STARTING = 0  # reading the configuration, meeting the other ranks
    LINKS = 1  # the first collectives
    LOADING = 2  # building the model, reading a checkpoint
    DATA = 3  # waiting for the batch of a step
    GENERATING = 4  # the answers that a step learns from are being written
    STEP = 5  # forward, backward, update
    EVALUATING = 6
    SAVING = 7
    CLOSING = 8  # the report at the end of a stage

    @property
    def words(self) -> str:
        """What the rank is doing, for people."""
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
        }[self]


class Heartbeat(Protocol):
    """Where a rank says that it gets on."""

    def beat(self, phase: Phase, step: int) -> None:
        """`step`: completed steps."""


class Unheard:
    """The heartbeat of a rank that nobody watches."""

    def beat(self, phase: Phase, step: int) -> None:
        """Nothing."""
