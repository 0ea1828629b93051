"""Two commands on one work directory build and train what they share once."""

import io
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dist_lm.cluster.ray_cluster import Node
from dist_lm.config.root import Config
from dist_lm.errors import ConfigError
from dist_lm.launcher.pipeline import build_artefact
from dist_lm.launcher.process import Interrupt
from dist_lm.launcher.stage_run import run_training_stage
from dist_lm.prepare.plan import PlannedStage
from dist_lm.stages.stage import Action, Artefact, ArtefactStage
from dist_lm.tracking.console import Console
from tests.patience import patient
from tests.prepare.planned import make_run, plan_of

DEADLINE_S = patient(30.0)


class Shared(ArtefactStage):
    """A stage whose artefact takes until somebody waits for it."""

    name = "shared"

    def __init__(self) -> None:
        self.started, self.awaited = threading.Event(), threading.Event()
        self.builders: list[str] = []

    def inspect(self, config: Config) -> Artefact:
        return Artefact(bool(self.builders), "")

    def build(self, config: Config, console: Console) -> None:
        self.started.set()
        assert self.awaited.wait(DEADLINE_S)
        self.builders.append(threading.current_thread().name)

    def output(self, config: Config) -> Path:
        return Path(config.work_dir)


def test_the_second_command_waits_by_name_and_uses_what_the_first_built(monkeypatch, tmp_path):
    config: Any = SimpleNamespace(work_dir=str(tmp_path))
    shared = Shared()
    stage = PlannedStage(shared, config, Action.BUILD, "")
    console, lines = Console(errors=io.StringIO()), []

    def line(text: str) -> None:
        lines.append(text)
        shared.awaited.set()

    monkeypatch.setattr(console, "line", line)
    first = threading.Thread(target=build_artefact, args=(stage, console), name="first", daemon=True)
    first.start()
    assert shared.started.wait(DEADLINE_S)
    build_artefact(stage, console)
    first.join(DEADLINE_S)
    assert shared.builders == ["first"]
    assert len(lines) == 1
    assert "shared: waiting for process" in lines[0]


def run_as_planned(planned: PlannedStage) -> bool:
    cluster: Any = SimpleNamespace(nodes=lambda: [Node("a", "127.0.0.1", cpus=2, gpus=0)])
    return run_training_stage(planned, cluster, Console(output=io.StringIO(), errors=io.StringIO()), Interrupt())


@pytest.mark.heavy
def test_a_run_that_another_command_has_finished_since_the_plan_is_used(work):
    planned = plan_of(work, target="language").target
    assert planned.action is Action.BUILD
    run = make_run(work, "language", done=True)
    before = {path: path.read_bytes() for path in (run.config, run.result)}
    assert run_as_planned(planned)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.heavy
def test_a_run_that_another_command_has_begun_with_other_settings_since_the_plan_is_refused(work):
    planned = plan_of(work, target="language").target
    run = make_run(work, "language", "stage.dropout=0.5", checkpoint=True)
    before = run.config.read_bytes()
    with pytest.raises(ConfigError, match=r"stage\.dropout=0.* \(was 0\.5\)"):
        run_as_planned(planned)
    assert run.config.read_bytes() == before
