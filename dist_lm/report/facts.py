"""The content of a report: what is read from runs and work directories, as values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dist_lm.config.model import ModelConfig
from dist_lm.config.phases import phased_corpora
from dist_lm.data.manifest import Manifest
from dist_lm.parallel.layout import Layout
from dist_lm.report.conversations import IterationConversations

State = Literal["finished", "running", "unfinished"]


@dataclass(frozen=True)
class Series:
    """One metric of one run: a value for each step, in order of steps."""

    steps: np.ndarray  # int64
    values: np.ndarray  # float64; NaN where the value was not finite

    @property
    def finite(self) -> np.ndarray:
        """Returns the finite values."""
        return self.values[np.isfinite(self.values)]

    def by_step(self) -> dict[int, float]:
        """Returns the values by their steps."""
        return dict(zip(self.steps.tolist(), self.values.tolist(), strict=True))


EMPTY = Series(np.zeros(0, np.int64), np.zeros(0))
"""The series of a metric that was never measured."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was written."""

    step: int
    time: float  # seconds since 1970
    marks: str = ""  # "newest", "best", both, or neither; "gone": deleted
    stall_s: float | None = None  # seconds that training waited for it


@dataclass(frozen=True)
class Samples:
    """Samples of the model, from the newest file of a run."""

    source: str = ""  # name of the file
    rows: tuple[Mapping[str, Any], ...] = ()  # a selection of the rows
    total: int = 0  # number of rows of the file
    files: int = 0  # number of files of the run


@dataclass(frozen=True)
class Share:
    """A part of a horizontal bar; `start` and `width` are percentages of its length."""

    label: str
    size: str
    start: float
    width: float
    colour: int
    words: str  # explanation, displayed while the pointer is on the part


@dataclass(frozen=True)
class RunFacts:
    """One run of a training stage, or of stage `generate`."""

    path: Path
    label: str  # unique in the report
    stage: str
    run_id: str
    state: State
    config: Mapping[str, Any]  # without secrets
    folders: Mapping[str, str]  # corpus -> its folder in the work directory
    model: ModelConfig | None  # None: written by another version
    layout: Layout | None  # layout of the newest attempt; None: unknown
    series: Mapping[str, Series]
    clock: Series  # time of each step, in seconds since 1970
    result: Mapping[str, Any]
    events: tuple[Mapping[str, Any], ...]
    links: Mapping[str, Any]
    checkpoints: tuple[Checkpoint, ...]
    samples: Samples
    conversations: tuple[IterationConversations, ...] = ()  # some iterations of a run with an environment

    @property
    def attempt(self) -> Mapping[str, Any]:
        """Returns the newest `started` event; empty without one."""
        return newest_attempt(self.events)

    @property
    def step(self) -> int:
        """Returns the newest measured step."""
        return int(self.clock.steps.max(initial=0))

    @property
    def steps(self) -> int | None:
        """Returns the planned number of steps; None for a stage without steps."""
        return self.config.get("stage", {}).get("steps")

    @property
    def corpora(self) -> frozenset[str]:
        """Returns the names of the corpora that the run reads: its own (not with `rlhf.prompts_from`), its mix or those
        of its phases, its pretraining text (with `rlhf.pretrain_coefficient`)."""
        stage = self.config.get("stage", {})
        rlhf = self.config.get("rlhf") or {}

        names = {*(stage.get("mix") or {}), *phased_corpora(stage.get("phases") or ())}
        if rlhf.get("pretrain_coefficient"):
            names |= {rlhf.get("pretrain_corpus"), *(rlhf.get("pretrain_mix") or {})}
        if not rlhf.get("prompts_from"):
            names.add(stage.get("corpus"))

        return frozenset(str(name) for name in names if name)

    @property
    def loops(self) -> bool:
        """Returns whether the trainer's loop ran it: then a rank holds gradients and moments of one model."""
        return "lr" in self.config.get("stage", {}) and "rlhf" not in self.config

    def finite(self, name: str) -> np.ndarray:
        """Returns the finite values of a metric; empty without any."""
        return self.series.get(name, EMPTY).finite


def newest_attempt(events: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Returns the newest `started` event of a run; empty without one."""
    return next((event for event in reversed(events) if event["event"] == "started"), {})


@dataclass(frozen=True)
class WorkFacts:
    """The files that runs of a work directory share."""

    path: Path
    corpora: Mapping[str, Manifest]  # corpora that the runs read, by folder
    tokenizer: Mapping[str, Any]  # content of report.json
    pipeline: Mapping[str, Any]  # the reported command; empty if runs were named one by one


@dataclass(frozen=True)
class Facts:
    """Everything that a report shows."""

    title: str
    runs: tuple[RunFacts, ...]
    works: tuple[WorkFacts, ...] = field(default=())

    def by_stage(self) -> dict[str, list[RunFacts]]:
        """Returns the runs of each stage, in their order."""
        stages: dict[str, list[RunFacts]] = {}
        for run in self.runs:
            stages.setdefault(run.stage, []).append(run)
        return stages
