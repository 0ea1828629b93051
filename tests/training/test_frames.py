"""The way from the training loop to the loss is short enough to read."""

import traceback
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

import dist_lm
from dist_lm.config.cluster import ParallelConfig
from dist_lm.data.batch import Batch
from dist_lm.data.stream import StepData
from dist_lm.parallel.layout import Layout
from dist_lm.parallel.mesh import build_mesh
from dist_lm.parallel.sharding import build_model
from dist_lm.prepare.compose import compose_config
from dist_lm.training.heartbeat import StopRequest, Unheard
from dist_lm.training.objective import next_token
from dist_lm.training.optimizer import build_optimizer
from dist_lm.training.state import TrainState
from dist_lm.training.trainer import Trainer
from tests.conftest import TINY

PACKAGE = Path(dist_lm.__file__).parent
MOST = 7


class FirstLossError(Exception):
    pass


@pytest.mark.heavy
@pytest.mark.parametrize("offload", [False, True], ids=["plain", "FSDP"])
def test_at_most_seven_frames_lead_from_the_loop_to_the_loss(one_rank, tmp_path, monkeypatch, offload):
    config = compose_config(["stage=language", *TINY, "stage.steps=1", "stage.label_smoothing=0.1"])
    config.parallel = ParallelConfig(cpu_offload=offload)
    mesh = build_mesh(Layout(1, 1, 1), one_rank.device)
    model = build_model(config.model, config.parallel, mesh, one_rank.device, 0)
    tokens = torch.zeros(config.stage.global_batch, config.stage.seq_len, dtype=torch.int64)
    trainer = Trainer(
        config=config,
        world=one_rank,
        adds_sums=True,
        model=model,
        optimizer=build_optimizer(model, config.stage),
        objective=next_token(config.stage.label_smoothing),
        stream=iter([StepData(0, [Batch.plain(tokens)], tokens.numel())]),
        evaluate=lambda model, everything, alive: {},
        checkpoints=tmp_path,
        metrics=None,
        stop=StopRequest(),
        heartbeat=Unheard(),
        flops_per_token=0,
        peak_flops=0.0,
    )
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
