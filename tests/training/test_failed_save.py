"""A checkpoint that cannot be written ends the run soon: what is trained after it could be lost."""

from itertools import repeat

import pytest
import torch

from dist_lm.config.cluster import ParallelConfig
from dist_lm.data.batch import Batch
from dist_lm.data.stream import StepData
from dist_lm.parallel.layout import Layout
from dist_lm.parallel.mesh import build_mesh
from dist_lm.parallel.sharding import build_model
from dist_lm.prepare.compose import compose_config
from dist_lm.training.checkpoint_saver import CheckpointWriteError
from dist_lm.training.heartbeat import StopRequest, Unheard
from dist_lm.training.objective import next_token
from dist_lm.training.optimizer import build_optimizer
from dist_lm.training.state import TrainState
from dist_lm.training.trainer import Trainer
from tests.conftest import TINY

EVERY = 400  # steps between checkpoints


@pytest.mark.heavy
def test_a_failed_save_ends_the_run_before_the_next_one_is_due(one_rank, tmp_path):
    """Finds a run that trains to the next checkpoint and then loses all steps since the one before the failed one."""
    config = compose_config(
        ["stage=language", *TINY, f"stage.steps={10 * EVERY}", f"stage.checkpoint_every={EVERY}", "stage.eval_every=0"]
    )
    mesh = build_mesh(Layout(1, 1, 1), one_rank.device)
    model = build_model(config.model, ParallelConfig(), mesh, one_rank.device, 0)
    tokens = torch.zeros(config.stage.global_batch, config.stage.seq_len, dtype=torch.int64)
    trainer = Trainer(
        config=config,
        world=one_rank,
        adds_sums=True,
        model=model,
        optimizer=build_optimizer(model, config.stage),
        objective=next_token(),
        # An endless stream would hide a run that never notices.
        stream=repeat(StepData(0, [Batch.plain(tokens)], tokens.numel()), EVERY - 1),
        evaluate=lambda model, everything, alive: {},
        checkpoints=tmp_path,
        metrics=None,
        stop=StopRequest(),
        heartbeat=Unheard(),
        flops_per_token=0,
        peak_flops=0.0,
    )

    (tmp_path / f".step_{EVERY:08d}").touch()  # a file where the folder would be
    with pytest.raises(CheckpointWriteError, match=f"step_{EVERY:08d} could not be written"):
        trainer.run(TrainState(step=EVERY - 1))
