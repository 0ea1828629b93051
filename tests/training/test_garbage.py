"""Garbage is collected after chosen steps, never inside one, and as before once training has ended."""

import gc
import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from dist_lm.data.batch import Batch
from dist_lm.data.stream import StepData
from dist_lm.dry_run.rehearsal import trainer_of_steps
from dist_lm.model.transformer import Transformer
from dist_lm.prepare.compose import compose_config
from dist_lm.training import trainer as trainer_module
from dist_lm.training.objective import next_token
from dist_lm.training.optimizer import build_optimizer
from dist_lm.training.state import TrainState
from dist_lm.training.trainer import COLLECT_EVERY, ScheduledCollection, without_collection
from tests.conftest import TINY
from tests.training.fixed_steps import FixedSteps


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """As in a process of a run: on, with nothing frozen."""
    gc.enable()
    gc.unfreeze()
    yield
    gc.freeze()
    gc.enable()


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """Generations of the collections, as they happen."""
    seen: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seen.append(info["generation"])

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


def make_garbage(n_cycles: int) -> None:
    """Makes more objects than the collector leaves alone."""
    for _ in range(n_cycles):
        cycle: list = []
        cycle.append(cycle)


@pytest.mark.heavy
@pytest.mark.parametrize("error", [None, KeyError], ids=["ended", "failed"])
@pytest.mark.parametrize("enabled", [True, False], ids=["on before", "off before"])
def test_afterwards_the_collector_is_as_before(enabled, error):
    """A later stage in the same process would never collect, or would collect although its caller has said no."""
    if not enabled:
        gc.disable()
    try:
        with ScheduledCollection():
            assert not gc.isenabled()
            assert gc.get_freeze_count() > 0
            if error is not None:
                raise error
    except KeyError:
        pass
    assert gc.isenabled() is enabled
    assert gc.get_freeze_count() == 0


def test_what_somebody_else_has_frozen_stays_frozen():
    """A server that forks ranks freezes its objects; to unfreeze them would copy its pages in every rank."""
    gc.freeze()
    with ScheduledCollection():
        pass
    assert gc.get_freeze_count() > 0


@pytest.mark.heavy
def test_a_collection_at_the_end_of_the_schedule_alone_and_its_cost_once(collections, caplog):
    """Collections inside steps hold up all ranks; without the scheduled ones memory grows."""
    caplog.set_level(logging.INFO, trainer_module.__name__)
    with ScheduledCollection() as schedule:
        collections.clear()
        for step in range(1, 2 * COLLECT_EVERY + 1):
            make_garbage(1000)
            schedule.after_step(step)
        assert collections == [2, 2]
    assert caplog.text.count("the first time took") == 1


@pytest.mark.heavy
def test_long_work_between_steps_collects_by_itself(collections):
    """An evaluation may take hours: what it drops must not wait for the next collection of the schedule."""
    with ScheduledCollection() as schedule:
        collections.clear()
        with schedule.automatic():
            make_garbage(2000)
        assert collections
        assert not gc.isenabled()
    with without_collection():
        collections.clear()
        make_garbage(2000)
        assert not collections
    assert gc.isenabled()


@pytest.mark.heavy
def test_no_collection_inside_a_step(one_rank, tmp_path, collections, monkeypatch):
    """The trainer's own loop: passes, update and data without a collection, one after each second step."""
    monkeypatch.setattr(trainer_module, "COLLECT_EVERY", 2)
    config = compose_config(["stage=language", *TINY, "stage.steps=4", "stage.eval_every=3"])
    model = Transformer(config.model)
    tokens = torch.zeros(config.stage.global_batch, config.stage.seq_len, dtype=torch.int64)
    inside: list[list[int]] = []
    evaluates_with_collector: list[bool] = []

    def objective(model, batch):
        make_garbage(2000)
        loss = next_token(0.0)(model, batch)
        inside.append([*collections])
        return loss

    def evaluate(model, everything, alive):
        evaluates_with_collector.append(gc.isenabled())
        return {"val/loss": 1.0}

    trainer = trainer_of_steps(config, one_rank, model, build_optimizer(model, config.stage), objective, True)
    data = FixedSteps(StepData(0, [Batch.plain(tokens)], tokens.numel()) for _ in range(4))
    trainer = replace(trainer, stream=data, evaluate=evaluate, checkpoints=tmp_path)
    trainer.run(TrainState())

    # Before the first step set-up is collected; then there is one collection after the second step, of the schedule.
    counts = [len(generations) for generations in inside]
    assert [count - counts[0] for count in counts[:3]] == [0, 0, 1]
    assert evaluates_with_collector[-1]
