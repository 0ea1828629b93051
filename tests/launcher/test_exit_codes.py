"""The exit code says what to do next: batch scripts go by it."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from dist_lm import launch
from dist_lm.cluster.events import GangFailure
from dist_lm.cluster.recruit import NoNodesError
from dist_lm.launcher.muster import NodesLostError
from dist_lm.prepare.compose import compose_config
from dist_lm.prepare.plan import Plan, make_plan
from dist_lm.tracking.console import Console
from tests.conftest import TINY_MODEL


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return make_plan("tokenizer", lambda stage: compose_config([f"stage={stage}", *TINY_MODEL, f"work_dir={tmp_path}"]))


@pytest.mark.parametrize(
    ("ending", "code", "state"),
    [
        (0, 0, "done"),
        (10, 138, "stopped"),
        (NodesLostError("two nodes are left"), 75, "stopped"),
        (NoNodesError("no nodes are free"), 75, "stopped"),
        (GangFailure(0, 0, "ValueError", "nan", Path("log")), 1, "failed"),
        (GangFailure(0, 0, "ConfigError", "seq_len", Path("log"), user_error=True), 2, "failed"),
    ],
)
def test_the_exit_code_and_the_pipeline_say_how_it_ended(plan, monkeypatch, tmp_path, ending, code, state):
    def run_missing(*arguments: Any) -> int:
        if isinstance(ending, Exception):
            raise ending
        return ending

    monkeypatch.setattr(launch, "run_missing", run_missing)
    monkeypatch.setattr("sys.argv", ["launch"])
    assert launch.carry_out(plan, Console(errors=io.StringIO())) == code
    (pipeline,) = (tmp_path / "pipelines").glob("*.json")
    assert json.loads(pipeline.read_text())["state"] == state


def test_the_status_of_an_unexpected_error_is_one_line(plan, monkeypatch, tmp_path):
    def run_missing(*arguments: Any) -> int:
        raise RuntimeError("\n".join(["Ray says that " + "much " * 200] * 20))

    monkeypatch.setattr(launch, "run_missing", run_missing)
    monkeypatch.setattr("sys.argv", ["launch"])
    with pytest.raises(RuntimeError):
        launch.carry_out(plan, Console(errors=io.StringIO()))
    (pipeline,) = (tmp_path / "pipelines").glob("*.json")
    error = json.loads(pipeline.read_text())["error"]
    assert error.startswith("Ray says")
    assert len(error.splitlines()) == 1
    assert len(error) <= 300
