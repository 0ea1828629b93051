"""The way from the training loop to the loss is short enough to read."""

import traceback
from pathlib import Path

import pytest
import torch.nn.functional as F  # noqa: N812  the name the field uses

import dist_lm
from dist_lm.config.cluster import ParallelConfig
from dist_lm.prepare.compose import compose_config
from dist_lm.training.state import TrainState
from tests.conftest import TINY
from tests.training.conftest import step_data_of, trainer_of

PACKAGE = Path(dist_lm.__file__).parent
MOST = 7


class FirstLossError(Exception):
    pass


@pytest.mark.heavy
@pytest.mark.parametrize("offload", [False, True], ids=["plain", "FSDP"])
def test_at_most_seven_frames_lead_from_the_loop_to_the_loss(one_rank, tmp_path, monkeypatch, offload):
    config = compose_config(["stage=language", *TINY, "stage.steps=1", "stage.label_smoothing=0.1"])
    config.parallel = ParallelConfig(cpu_offload=offload)
    trainer = trainer_of(config, one_rank, [step_data_of(config)], tmp_path)
    names: list[str] = []

    def reached(*args, **kwargs):
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(PACKAGE)]
        names.extend(f"{Path(frame.filename).stem}.{frame.name}" for frame in frames)
        raise FirstLossError

    monkeypatch.setattr(F, "cross_entropy", reached)
    with pytest.raises(FirstLossError):
        trainer.run(TrainState())
    assert names[0] == "trainer.run"
    assert names[-1] == "cross_entropy.token_losses"
    assert len(names) <= MOST, names
