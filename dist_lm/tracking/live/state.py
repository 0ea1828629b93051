"""What the live view shows, as values: the stages of a pipeline, what is being worked on, the last warning."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from dist_lm.tracking.live.training_state import TrainingState

StageState = Literal["waiting", "running", "done"]
TextOrCall = str | Callable[[], str]
"""Progress text, or what makes it: called only when it is drawn, so that counting costs little."""


@dataclass
class Work:
    """One piece of work on its way, counted or not."""

    label: str
    total: int | None
    began: float  # by the clock of the view, s
    done: int = 0
    text: TextOrCall = ""
    training: TrainingState | None = None

    def words(self) -> str:
        """How far it is."""
        return self.text if isinstance(self.text, str) else self.text()


@dataclass
class StageLine:
    """A stage of the pipeline."""

    name: str
    state: StageState
    detail: str  # what is planned, or what there is
    began: float | None = None
    ended: float | None = None


@dataclass
class LiveState:
    """All of it. Times are of one clock, in seconds."""

    began: float
    title: str = ""
    stages: list[StageLine] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)  # under way, the innermost last
    over: list[str] = field(default_factory=list)  # works of the stage that are over
    warning: str = ""
    warnings: int = 0
    warned_at: float = 0.0

    def begin(self, name: str, now: float) -> None:
        """A stage is being worked on."""
        stage = self._stage(name)
        stage.state, stage.began, self.over = "running", now, []

    def done(self, name: str, now: float, detail: str = "") -> None:
        """A stage is finished; of one that left no words of its own the last work's stay."""
        stage = self._stage(name)
        stage.state, stage.ended = "done", now
        stage.detail = detail or stage.detail

    def open(self, work: Work) -> None:
        """A piece of work begins."""
        self.works.append(work)

    def close(self, work: Work, text: str | None) -> None:
        """A piece of work is over; None: it failed."""
        self.works.remove(work)
        running = self.running
        if text is None or running is None:
            return
        if work.training:
            running.detail = work.training.headline() or text
        else:
            self.over.append(f"{work.label}: {text}")
            running.detail = self.over[-1]

    def warn(self, text: str, now: float) -> None:
        """A warning was given."""
        self.warning, self.warnings, self.warned_at = text, self.warnings + 1, now

    @property
    def running(self) -> StageLine | None:
        """The stage that is being worked on."""
        return next((stage for stage in self.stages if stage.state == "running"), None)

    @property
    def training(self) -> TrainingState | None:
        """The training that is under way."""
        return next((work.training for work in reversed(self.works) if work.training), None)

    def _stage(self, name: str) -> StageLine:
        return next(stage for stage in self.stages if stage.name == name)
