"""One step of one rank, taken by the trainer itself, with its memory watched.

With fake tensors (`fake_rank`) it says what a step would hold; with real ones, what one holds.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch.distributed.device_mesh import DeviceMesh

from dist_lm.config.root import Config
from dist_lm.data.batch import Batch
from dist_lm.data.stream import StepData, StepStream
from dist_lm.dry_run.live_memory import LiveMemory
from dist_lm.dry_run.work import StepMemory
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World
from dist_lm.parallel.padding import shard_of
from dist_lm.training.heartbeat import Unheard
from dist_lm.training.objective import LossModel, LossSum, Objective
from dist_lm.training.state import TrainState
from dist_lm.training.stop import StopRequest
from dist_lm.training.trainer import Trainer


def rehearse(
    config: Config,
    mesh: DeviceMesh,
    world: World,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    micro_batches: Sequence[Batch],
    memory: LiveMemory,
    on_micro_batch: Callable[[], None] = lambda: None,
) -> StepMemory:
    """Take one step on `micro_batches` (collective, unless the process group is fake).

    Args:
        memory: it has watched since before the model had memory.
        on_micro_batch: called before each micro-batch.
    """
    held: list[int] = []

    def watched(model: LossModel, batch: Batch) -> LossSum:
        held.append(memory.live)
        on_micro_batch()
        return objective(model, batch)

    hook = optimizer.register_step_pre_hook(lambda *_: held.append(memory.live))
    trainer = Trainer(
        config=config,
        world=world,
        counts_once=mesh.get_local_rank("tp") == 0,
        model=model,
        optimizer=optimizer,
        objective=watched,
        stream=cast(StepStream, iter(())),
        evaluate=lambda bound, everything, alive: {},
        heartbeat=Unheard(),
        checkpoints=Path(),
        metrics=None,
        stop=StopRequest(),
        flops_per_token=0,
        peak_flops=0.0,
    )
    memory.reset_peak()
    trainer.step(TrainState(), StepData(0, list(micro_batches), 0), config.stage.lr)
    hook.remove()
    parameters = sum(_bytes(parameter) for parameter in model.parameters())
    moments = sum(_bytes(tensor) for state in optimizer.state.values() for tensor in state.values())
    gradients = max(held) - held[0]
    return StepMemory(parameters, gradients, moments, memory.peak - parameters - moments - gradients)


def random_batch(config: Config) -> Batch:
    """A micro-batch of one document a sequence."""
    stage = config.stage
    shape = (stage.micro_batch, stage.seq_len)
    tokens_BT = torch.randint(0, config.model.vocab_size, shape)
    return Batch(
        tokens_BT=tokens_BT,
        targets_BT=torch.randint(0, config.model.vocab_size, shape),
        loss_mask_BT=torch.ones(shape),
        document_BT=torch.zeros_like(tokens_BT),
        position_BT=torch.arange(stage.seq_len).repeat(stage.micro_batch, 1),
        sequence_B=torch.arange(stage.micro_batch),
    )


def _bytes(tensor: torch.Tensor) -> int:
    return shard_of(tensor).nbytes
