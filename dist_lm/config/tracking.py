"""The conf groups `tracking` (targets of metrics besides metrics.jsonl) and `profile` (traced steps)."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from dist_lm.errors import require


@dataclass
class TrackingConfig:
    """Targets of metrics besides metrics.jsonl."""

    name: str = MISSING  # wandb | none
    project: str = "dist_lm"
    entity: str | None = None
    mode: str = "auto"  # auto (online with a login, else offline) | online | offline
    tags: list[str] = field(default_factory=list)
    finish_s: float = 30.0  # online: longest wait, s, at the end of a run for a server that answers

    def __post_init__(self) -> None:
        require(self.finish_s >= 0, "tracking.finish_s", self.finish_s, ">= 0 seconds")
        require(self.name in ("wandb", "none"), "tracking.name", self.name, "wandb or none")
        require(self.mode in ("auto", "online", "offline"), "tracking.mode", self.mode, "auto, online or offline")


@dataclass
class ProfileConfig:
    """Traces of some steps, written by every rank to `profile/` in the run directory."""

    steps: list[int] = field(default_factory=list)  # [first, last], both included, first >= 1; []: no profile

    def __post_init__(self) -> None:
        valid = not self.steps or (len(self.steps) == 2 and 0 < self.steps[0] < self.steps[1])
        require(valid, "profile.steps", self.steps, "[first, last] with 0 < first < last, or []")
