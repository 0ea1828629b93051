"""A node that dies takes no metrics of finished steps with it: they are flushed to disk before what ends the steps."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dist_lm.rlhf.state import KlController, RlhfState
from dist_lm.stages.rlhf.program import Saving
from dist_lm.stages.training.eval_tasks import Evaluated, discard_weights, weights_file
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tracking.metrics import MetricsWriter
from dist_lm.training.heartbeat import Unheard
from dist_lm.training.state import TrainState
from dist_lm.training.trainer import Trainer


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of files in the order in which they are flushed to disk, saved or removed."""
    happened: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: happened.append(Path(f"/proc/self/fd/{file}").readlink().name))
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok: happened.append(path.name))
    return happened


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = WorkDirectory(tmp_path).run("language", "default")
    run.create()
    return run


@pytest.fixture
def parts(run: RunDirectory, events: list[str]) -> Any:
    """What saves a checkpoint of step 4."""
    saver = SimpleNamespace(save=lambda *given: events.append("checkpoint"), wait=lambda: None)
    with MetricsWriter(run.metrics) as metrics:
        metrics.write(4, {"val/loss": 2.0})
        yield SimpleNamespace(
            saver=saver, metrics=metrics, heartbeat=Unheard(), tasks=None, model=None, optimizer=None, run=run
        )


def test_before_a_checkpoint(parts: Any, events: list[str]):
    Trainer._save(parts, parts.saver, TrainState(step=4), 2.0, True)
    assert events == ["metrics.jsonl", "checkpoint"]


def test_before_a_checkpoint_of_rlhf(parts: Any, events: list[str]):
    begun: Any = SimpleNamespace(models=SimpleNamespace(policy=parts), companions=(), critic_base=None)
    reporter: Any = SimpleNamespace(
        alive=lambda phase: None, metrics=parts.metrics, tokens=0, tokenizer=SimpleNamespace(sha256="")
    )
    Saving(parts.saver, begun, reporter, is_first=False)(RlhfState(KlController(0.1), iteration=4))
    assert events == ["metrics.jsonl", "checkpoint"]


def test_before_the_weights_of_an_evaluation_are_removed(parts: Any, events: list[str]):
    discard_weights(cast(Evaluated, parts), 4)
    assert events == ["metrics.jsonl", weights_file(parts.run, 4).name]
