"""Stages run in the order of the plan: what trains on a cluster, what builds in the launcher wherever it comes."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from dist_lm import launch
from dist_lm.cluster import ray_cluster
from dist_lm.launcher import pipeline, stage_run
from dist_lm.prepare.compose import compose_config
from dist_lm.prepare.plan import Plan, PlannedStage
from dist_lm.stages.registry import stage_named
from dist_lm.stages.stage import Action
from dist_lm.tracking.console import Console


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done, in order; nothing is."""
    names: list[str] = []

    @contextmanager
    def connect(config: Any) -> Iterator[None]:
        names.append("connect")
        yield

    def run(stage: PlannedStage, *rest: Any) -> bool:
        names.append(stage.name)
        return stage.name != "language"  # where it is stopped

    monkeypatch.setattr(ray_cluster, "connect", connect)
    monkeypatch.setattr(pipeline, "build_artefact", lambda stage, console: names.append(stage.name))
    monkeypatch.setattr(stage_run, "run_training_stage", run)
    return names


def run_missing(*names: str) -> int:
    config = compose_config(["stage=language", "tracking=none"])
    stages = tuple(PlannedStage(stage_named(name), config, Action.BUILD, "") for name in names)
    queue: Any = SimpleNamespace(begin=lambda name: None, done=lambda name, leaves="": None)
    return launch.run_missing(Plan(stages), Console(), queue, None)


def test_an_artefact_may_come_behind_a_training_stage(done: list[str]) -> None:
    assert run_missing("shards", "tools", "rankings", "reward") == 0
    assert done == ["shards", "connect", "tools", "rankings", "reward"]


def test_artefacts_alone_take_no_cluster(done: list[str]) -> None:
    assert run_missing("tokenizer", "shards") == 0
    assert done == ["tokenizer", "shards"]


def test_nothing_is_built_behind_a_stage_that_was_stopped(done: list[str]) -> None:
    run_missing("language", "rankings")
    assert done == ["connect", "language"]


def test_a_signal_ends_an_artefact_behind_a_training_stage_at_once(done: list[str], monkeypatch, capsys) -> None:
    def build(stage: PlannedStage, console: Console) -> str:
        done.append(f"{stage.name} begun")
        signal.raise_signal(signal.SIGTERM)
        done.append(f"{stage.name} done")
        return ""

    monkeypatch.setattr(pipeline, "build_artefact", build)
    assert run_missing("tools", "rankings", "reward") == signal.SIGTERM
    assert done == ["connect", "tools", "rankings begun"]
    assert "stopped in stage rankings; the same command continues" in capsys.readouterr().out


def test_no_artefact_is_begun_after_a_signal(done: list[str], monkeypatch) -> None:
    def run(stage: PlannedStage, *rest: Any) -> bool:
        signal.raise_signal(signal.SIGUSR1)
        return True  # its last step was done

    monkeypatch.setattr(stage_run, "run_training_stage", run)
    assert run_missing("tools", "rankings") == signal.SIGUSR1
    assert done == ["connect"]
