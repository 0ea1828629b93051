"""The queue of stages of a command, and the build of artefacts.

The queue is written to the work directory for `dist-lm cluster status` and reports. Commands do not read it to decide
what to continue: `plan.py` inspects the artefacts.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from dist_lm.cluster.node_facts import host_name
from dist_lm.prepare.plan import Plan, PlannedStage
from dist_lm.stages.stage import Action, ArtefactStage
from dist_lm.storage import durable
from dist_lm.storage.lock import locked
from dist_lm.storage.run_directory import CommandState, StageState, WorkDirectory
from dist_lm.tracking.console import Console
from dist_lm.tracking.redact import redact_command, redact_text

LOOK_S = 1.0  # a test of the lock holds it briefly: wait this long before calling it taken
Tell = Callable[[str, Literal["running", "done"], str], None]
"""Called with name, new state and detail of a stage; an empty detail means no change."""


@dataclass
class QueuedStage:
    """One stage in the queue."""

    name: str
    state: StageState
    detail: str
    seconds: float | None = None  # duration in this command, once the stage has ended


class Pipeline:
    """The stages of a plan and their states. Every change is written to the work directory."""

    def __init__(self, plan: Plan, command: Sequence[str], job: str | None, tell: Tell | None) -> None:
        """Writes the queue; see `queue_of`."""
        self._tell = tell
        self._began = 0.0  # when the running stage began, monotonic seconds

        config = plan.target.config
        self._path = WorkDirectory(Path(config.work_dir)).pipeline(plan.target.name, config.run_id)
        self._stages = [
            QueuedStage(stage.name, "done" if stage.action is Action.READY else "waiting", stage.detail)
            for stage in plan.stages
        ]

        self._facts: dict[str, Any] = {
            "run_id": config.run_id,
            "command": redact_command(command),
            "host": host_name(),
            "process": os.getpid(),
            "job": job,
            "started": time.time(),
        }
        self._write("running")

    def begin(self, name: str) -> None:
        """Stage `name` begins."""
        self._began = time.monotonic()
        self._set(name, "running")

    def done(self, name: str, detail: str = "") -> None:
        """Stage `name` is done."""
        self._set(name, "done", detail, time.monotonic() - self._began)

    def end(self, state: CommandState, error: str = "") -> None:
        """Writes how the command ended. A stage that was running gets the state `failed` or `stopped` too, with its
        seconds.

        Args:
            error: text for reports; secrets are removed.
        """
        for stage in self._stages:
            if stage.state == "running" and state in ("failed", "stopped"):
                stage.state, stage.seconds = state, time.monotonic() - self._began
        self._write(state, error)

    def _set(
        self, name: str, state: Literal["running", "done"], detail: str = "", seconds: float | None = None
    ) -> None:
        stage = next(stage for stage in self._stages if stage.name == name)
        stage.state, stage.seconds = state, seconds
        if self._tell:
            self._tell(name, state, detail)
        self._write("running")

    def rows(self) -> list[tuple[str, Literal["waiting", "done"], str]]:
        """(name, state, detail) of each stage before the first one begins."""
        return [(stage.name, "done" if stage.state == "done" else "waiting", stage.detail) for stage in self._stages]

    @property
    def stages(self) -> tuple[QueuedStage, ...]:
        """The stages with their current states."""
        return tuple(self._stages)

    def _write(self, state: CommandState, error: str = "") -> None:
        stages = [asdict(stage) for stage in self._stages]
        # The command may hold secrets, and errors may quote addresses with passwords.
        durable.write_sealed(
            self._path,
            self._facts | {"state": state, "error": redact_text(error), "updated": time.time(), "stages": stages},
        )


@contextmanager
def queue_of(plan: Plan, command: Sequence[str], job: str | None, tell: Tell | None = None) -> Iterator[Pipeline]:
    """Yields the queue of a command, which is written to the work directory and locked inside the block.

    Args:
        job: id of the batch job.
        tell: called when a stage begins or is done.

    Raises:
        ArtefactError: the same command is already running; the message names host and process. Or the file system has
            no locks.
        OSError: the lock file cannot be opened.
    """
    config = plan.target.config
    work, name = WorkDirectory(Path(config.work_dir)), plan.target.name
    path = work.pipeline(name, config.run_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    what = f"stage={name} run_id={config.run_id} in {config.work_dir}"
    # The same command twice would plan the same stages; other commands may run in the same work directory.
    with locked(work.pipeline_lock(path.stem), what=what, job=job, wait_s=LOOK_S):
        yield Pipeline(plan, command, job, tell)


def build_artefact(planned: PlannedStage, console: Console) -> str:
    """Builds the files of an artefact stage and returns the detail for the plan. Files that are there already are used.

    Only one command at a time builds in a work directory: others wait without a limit, and say so on the console.

    Raises:
        ArtefactError: existing files were made with other settings, or input files are missing or damaged.
        ConfigError: the stage refuses its sources, or the text does not fit the vocabulary size.
        UserError: what the build needs cannot be reached or is not installed.
        OSError: the lock file cannot be opened or written.
    """
    stage, config = cast(ArtefactStage, planned.stage), planned.config
    work = WorkDirectory(Path(config.work_dir))

    def wait_for(owner: str) -> None:
        console.line(f"{stage.name}: waiting for {owner}, which is building in {work.path}")

    with locked(work.build_lock, wait_s=math.inf, on_wait=wait_for):
        # Another command may have built it during the wait.
        artefact = stage.inspect(config)
        if artefact.ready:
            return artefact.detail

        stage.build(config, console)
        return stage.inspect(config).detail
