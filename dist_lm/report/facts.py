"""What a report is made of, as values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dist_lm.config.model import ModelConfig
from dist_lm.data.manifest import Manifest
from dist_lm.parallel.layout import Layout

State = Literal["finished", "running", "unfinished"]


@dataclass(frozen=True)
class Series:
    """One metric of one run: a value a step, by rising step."""

    steps: np.ndarray  # int64
    values: np.ndarray  # float64; NaN where the value was not finite


@dataclass(frozen=True)
class Checkpoint:
    """One that was written."""

    step: int
    time: float  # seconds since 1970
    marks: str = ""  # "newest", "best", both, or neither; "gone": not kept
    stall_s: float | None = None  # that training stood still for it


@dataclass(frozen=True)
class Samples:
    """What a run wrote of the model, from its newest file."""

    source: str = ""  # name of that file
    rows: tuple[Mapping[str, Any], ...] = ()  # of many, the first ones
    total: int = 0  # rows of the file
    files: int = 0  # there are


@dataclass(frozen=True)
class RunFacts:
    """One run of a training stage, or of stage `generate`."""

    path: Path
    label: str  # what it is called in the report: no two runs have the same
    stage: str
    run_id: str
    state: State
    config: Mapping[str, Any]  # without its secrets
    model: ModelConfig | None  # None: the configuration is of another version
    layout: Layout | None  # of the newest attempt
    series: Mapping[str, Series]
    clock: Series  # seconds since 1970 by step
    result: Mapping[str, Any]
    events: tuple[Mapping[str, Any], ...]
    links: Mapping[str, Any]
    checkpoints: tuple[Checkpoint, ...]
    samples: Samples

    @property
    def attempt(self) -> Mapping[str, Any]:
        """The newest `started` event; empty without one."""
        return next((event for event in reversed(self.events) if event["event"] == "started"), {})

    @property
    def step(self) -> int:
        """The newest step that was measured."""
        return int(self.clock.steps[-1]) if len(self.clock.steps) else 0

    @property
    def steps(self) -> int | None:
        """That it shall have."""
        return self.config.get("stage", {}).get("steps")

    @property
    def corpora(self) -> frozenset[str]:
        """The corpora the run reads, by name: its own, those in its mix, the pretraining text of stage rlhf."""
        stage, rlhf = self.config.get("stage", {}), self.config.get("rlhf") or {}
        names = {*(stage.get("mix") or {})}
        if self.stage == "rlhf" and rlhf.get("pretrain_coefficient"):
            names |= {rlhf.get("pretrain_corpus"), *(rlhf.get("pretrain_mix") or {})}
        if not (self.stage == "rlhf" and rlhf.get("prompts_from")):
            names.add(stage.get("corpus"))
        return frozenset(str(name) for name in names if name)

    def last(self, name: str) -> float | None:
        """The newest finite value of a metric."""
        series = self.series.get(name)
        finite = series.values[np.isfinite(series.values)] if series else np.zeros(0)
        return float(finite[-1]) if len(finite) else None


@dataclass(frozen=True)
class WorkFacts:
    """What the runs of a work directory share."""

    path: Path
    corpora: Mapping[str, Manifest]  # that the runs of the report read
    tokenizer: Mapping[str, Any]  # report.json
    pipeline: Mapping[str, Any]  # the command that is reported on; empty: runs were named one by one


@dataclass(frozen=True)
class Facts:
    """All that one report shows."""

    title: str
    runs: tuple[RunFacts, ...]
    works: tuple[WorkFacts, ...] = field(default=())

    def by_stage(self) -> dict[str, list[RunFacts]]:
        """Runs in their order, by stage, in the order of its first run."""
        stages: dict[str, list[RunFacts]] = {}
        for run in self.runs:
            stages.setdefault(run.stage, []).append(run)
        return stages
