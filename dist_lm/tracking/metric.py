"""What a metric is: a name with its unit and its meaning, as a value."""

from dataclasses import dataclass
from typing import Literal

Better = Literal["lower", "higher", ""]
"""Which way is good; empty: neither."""
TEXT_STAGES = ("language", "code", "tools")
"""Stages that predict tokens of text."""
LOOP_STAGES = (*TEXT_STAGES, "reward")
"""Stages that the trainer's loop runs."""
TRAINING_STAGES = (*LOOP_STAGES, "rlhf")
"""Every stage that trains."""
MEASURED_STAGES = (*TRAINING_STAGES, "generate")
"""Every stage that writes metrics."""


@dataclass(frozen=True)
class Metric:
    """A name that a metrics file may hold, or a family of them: a name with one `{slot}`.

    What stands for a slot is one or more characters; for `{completions}` they are digits.
    """

    name: str
    unit: str  # "nats/token", "tokens/s", "s", "GiB"; "" for a ratio or a count of its own
    meaning: str  # one sentence for a person
    better: Better
    stages: tuple[str, ...]
    group: str  # what it is shown together with
    only: str = ""  # why a run of such a stage may lack it; empty: every run has it

    @property
    def slot(self) -> str:
        """The name of what varies in a family; empty for a single metric."""
        return self.name.partition("{")[2].partition("}")[0]
