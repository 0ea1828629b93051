"""Two commands on one fresh work directory build what they share once."""

import io
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dist_lm.launcher.artefact_build import build_artefact
from dist_lm.launcher.plan import Action, PlannedStage
from dist_lm.stages.artefact import Artefact
from dist_lm.stages.registry import StageInfo
from dist_lm.tracking.console import Console

DEADLINE_S = 30.0


class Shared(ModuleType):
    """A stage whose artefact takes until somebody waits for it."""

    def __init__(self) -> None:
        super().__init__("dist_lm.stages.shared")
        self.started, self.awaited = threading.Event(), threading.Event()
        self.builders: list[str] = []

    def inspect(self, config: object) -> Artefact:
        return Artefact(bool(self.builders), "")

    def build(self, config: object, console: Console) -> None:
        self.started.set()
        assert self.awaited.wait(DEADLINE_S)
        self.builders.append(threading.current_thread().name)


@pytest.fixture
def shared(monkeypatch) -> Shared:
    stage = Shared()
    monkeypatch.setitem(sys.modules, stage.__name__, stage)
    return stage


def test_the_second_command_waits_by_name_and_uses_what_the_first_built(shared, monkeypatch, tmp_path):
    config: Any = SimpleNamespace(work_dir=str(tmp_path))
    stage = PlannedStage(StageInfo("shared", trains=False, needs=()), config, Action.BUILD, "")
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
