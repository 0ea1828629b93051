"""The conf group `tracking`: who is told about the metrics, besides metrics.jsonl."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from dist_lm.errors import require


@dataclass
class TrackingConfig:
    """Who is told about the metrics, besides metrics.jsonl."""

    name: str = MISSING  # wandb | none
    project: str = "dist_lm"
    entity: str | None = None
    mode: str = "auto"  # auto (online with a key, else offline) | online | offline
    tags: list[str] = field(default_factory=list)
    finish_s: float = 30.0  # online: how long the end of a run waits for a server that answers

    def __post_init__(self) -> None:
        require(self.finish_s >= 0, "tracking.finish_s", self.finish_s, ">= 0 seconds")
        require(self.name in ("wandb", "none"), "tracking.name", self.name, "wandb or none")
        require(self.mode in ("auto", "online", "offline"), "tracking.mode", self.mode, "auto, online or offline")
