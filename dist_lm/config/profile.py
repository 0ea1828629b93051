"""The conf group `profile`: which steps of a run are traced."""

from dataclasses import dataclass, field

from dist_lm.errors import require


@dataclass
class ProfileConfig:
    """Traces of some steps, written by every rank to `profile/` in the run directory."""

    steps: list[int] = field(default_factory=list)  # [first, last], both included, first >= 1; []: no profile

    def __post_init__(self) -> None:
        valid = not self.steps or (len(self.steps) == 2 and 0 < self.steps[0] < self.steps[1])
        require(valid, "profile.steps", self.steps, "[first, last] with 0 < first < last, or []")
