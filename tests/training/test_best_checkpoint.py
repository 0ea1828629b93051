"""The scores of checkpoints: which one is the best, and that no held-out data is evaluated twice for it."""

import math
from dataclasses import replace

import pytest
import torch

from dist_lm.data.batch import Batch
from dist_lm.data.stream import StepData
from dist_lm.dry_run.rehearsal import trainer_of_steps
from dist_lm.parallel.layout import Layout
from dist_lm.parallel.mesh import build_mesh
from dist_lm.parallel.sharding import build_model
from dist_lm.prepare.compose import compose_config
from dist_lm.training import checkpoint_files
from dist_lm.training.objective import next_token
from dist_lm.training.optimizer import build_optimizer
from dist_lm.training.state import TrainState
from tests.conftest import TINY
from tests.training.fixed_steps import FixedSteps


@pytest.fixture
def trained(one_rank, tmp_path):
    """(overrides, scores of the evaluations in turn) -> state after 3 steps, and which evaluations took all."""

    def train(overrides: list[str], scores: list[float]) -> tuple[TrainState, list[bool]]:
        every = ("stage.steps=3", "stage.eval_every=1", "stage.checkpoint_every=1", "stage.eval_at_start=false")
        config = compose_config(["stage=language", *TINY, *every, *overrides])
        mesh = build_mesh(Layout(1, 1, 1), one_rank.device)
        model = build_model(config.model, config.parallel, mesh, one_rank.device, 0)
        tokens = torch.zeros(config.stage.global_batch, config.stage.seq_len, dtype=torch.int64)
        evaluations: list[bool] = []

        def evaluate(model, everything, alive) -> dict[str, float]:
            evaluations.append(everything)
            return {"val/loss": scores[len(evaluations) - 1]}

        optimizer = build_optimizer(model, config.stage)
        trainer = trainer_of_steps(config, one_rank, model, optimizer, next_token(0.0), adds_sums=True)
        trainer = replace(
            trainer,
            stream=FixedSteps(StepData(0, [Batch.plain(tokens)], tokens.numel()) for _ in range(3)),
            evaluate=evaluate,
            checkpoints=tmp_path,
        )
        return trainer.run(TrainState()), evaluations

    return train


@pytest.mark.heavy
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_never_the_best(trained, tmp_path, broken: float):
    state, _ = trained([], [broken, 3.0, 2.0, 4.0])
    assert (state.best_step, state.best_val_loss) == (2, 3.0)
    best = checkpoint_files.read_pointer(tmp_path, checkpoint_files.BEST)
    assert best is not None
    assert best.name == checkpoint_files.step_name(2)


@pytest.mark.heavy
def test_the_last_score_is_on_the_same_sequences_as_the_others(trained):
    state, evaluations = trained(["stage.eval_sequences=4"], [3.0, 3.0, 1.0, 2.0])
    assert evaluations == [False, False, True, False]
    assert (state.best_step, state.best_val_loss) == (3, 2.0)


@pytest.mark.heavy
def test_all_sequences_are_evaluated_once_at_the_end(trained):
    state, evaluations = trained(["stage.eval_sequences=0"], [3.0, 3.0, 2.0])
    assert evaluations == [False, False, True]
    assert (state.best_step, state.best_val_loss) == (3, 2.0)
