"""Two commands on one fresh work directory build what they share once."""

import io
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dist_lm.config.root import Config
from dist_lm.launcher.pipeline import build_artefact
from dist_lm.launcher.plan import PlannedStage
from dist_lm.stages.stage import Action, Artefact, ArtefactStage
from dist_lm.tracking.console import Console

DEADLINE_S = 30.0


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
