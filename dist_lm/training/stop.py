"""A wish to stop, set from outside the loop."""

from dataclasses import dataclass


@dataclass
class StopRequest:
    """Set by a signal handler; agreed on by all ranks at the next step boundary."""

    requested: bool = False
