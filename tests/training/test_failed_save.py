"""A checkpoint that cannot be written ends the run soon: what is trained after it could be lost."""

from itertools import repeat

import pytest

from dist_lm.prepare.compose import compose_config
from dist_lm.training.checkpoint_saver import CheckpointWriteError
from dist_lm.training.state import TrainState
from tests.conftest import TINY
from tests.training.conftest import step_data_of, trainer_of

EVERY = 400  # steps between checkpoints


@pytest.mark.heavy
def test_a_failed_save_ends_the_run_before_the_next_one_is_due(one_rank, tmp_path):
    """Finds a run that trains to the next checkpoint and then loses all steps since the one before the failed one."""
    config = compose_config(
        ["stage=language", *TINY, f"stage.steps={10 * EVERY}", f"stage.checkpoint_every={EVERY}", "stage.eval_every=0"]
    )
    # An endless stream would hide a run that never notices.
    trainer = trainer_of(config, one_rank, repeat(step_data_of(config), EVERY - 1), tmp_path)

    (tmp_path / f".step_{EVERY:08d}").touch()  # a file where the folder would be
    with pytest.raises(CheckpointWriteError, match=f"step_{EVERY:08d} could not be written"):
        trainer.run(TrainState(step=EVERY - 1))
