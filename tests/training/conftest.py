"""What tests of the trainer have in common."""

from collections.abc import Iterable
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.distributed as dist

from dist_lm.config.root import Config
from dist_lm.data.batch import Batch
from dist_lm.data.stream import StepData, StepStream
from dist_lm.parallel.layout import Layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.parallel.sharding import build_model
from dist_lm.training.heartbeat import StopRequest, Unheard
from dist_lm.training.objective import next_token
from dist_lm.training.optimizer import build_optimizer
from dist_lm.training.trainer import Trainer
from tests.training.fixed_steps import FixedSteps


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, 0, torch.device("cpu"))
    dist.destroy_process_group()


def step_data_of(config: Config) -> StepData:
    """A step whose tokens are all 0."""
    tokens = torch.zeros(config.stage.global_batch, config.stage.seq_len, dtype=torch.int64)
    return StepData(0, [Batch.plain(tokens)], tokens.numel())


def trainer_of(config: Config, world: World, stream: Iterable[StepData], checkpoints: Path) -> Trainer:
    """A trainer of one rank, which evaluates nothing and writes no metrics."""
    model = build_model(config.model, config.parallel, build_mesh(Layout(1, 1, 1), world.device), world.device, 0)
    return Trainer(
        config=config,
        world=world,
        adds_sums=True,
        model=model,
        optimizer=build_optimizer(model, config.stage),
        objective=next_token(config.stage.label_smoothing),
        stream=cast(StepStream, FixedSteps(stream)),
        evaluate=lambda model, everything, alive: {},
        checkpoints=checkpoints,
        metrics=None,
        stop=StopRequest(),
        heartbeat=Unheard(),
        flops_per_token=0,
        peak_flops=0.0,
    )
