"""One way of doing a benchmark's work, built in a rank: a training step to be timed, on made-up tokens.

Dimensions: B sequences, T tokens.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from dist_lm.config.root import Config
from dist_lm.data.batch import Batch
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World
from dist_lm.parallel.sharding import layout_of
from dist_lm.training.heartbeat import StopRequest
from dist_lm.training.objective import next_token
from dist_lm.training.optimizer import build_optimizer
from dist_lm.training.step import accumulate_gradients, update

MIB = 2**20


@dataclass(frozen=True)
class Trial:
    """What a rank times, and what it can say without timing."""

    step: Callable[[], float]  # one training step; its loss
    facts: Callable[[], dict[str, float]] = dict  # asked once, after the first steps; names end with their unit
    clock: Callable[[], float] = time.perf_counter  # seconds, by which steps are timed
    losses: Callable[[], list[float]] | None = None  # what it is compared with others by; none: those of first steps


def made_up_batch(config: Config, rows: slice, device: torch.device) -> Batch:
    """Rows of a global batch of random tokens, the same at every call; no targets are masked."""
    stage, generator = config.stage, torch.Generator().manual_seed(config.seed)
    shape = (stage.global_batch, stage.seq_len + 1)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)[rows]
    position_BT = torch.arange(stage.seq_len).expand(len(tokens), -1)
    return Batch(
        tokens_BT=tokens[:, :-1].contiguous(),
        targets_BT=tokens[:, 1:].contiguous(),
        loss_mask_BT=torch.ones(position_BT.shape),
        document_BT=torch.zeros_like(position_BT),
        position_BT=position_BT,
        sequence_B=torch.arange(stage.global_batch)[rows],
    ).to(device)


def own_rows(config: Config, mesh: DeviceMesh) -> slice:
    """The rows of the global batch that this rank's data-parallel coordinate takes."""
    layout = layout_of(mesh)
    index = mesh.get_local_rank("dp_replicate") * layout.dp_shard + mesh.get_local_rank("dp_shard")
    size = config.stage.global_batch // layout.dp
    return slice(index * size, (index + 1) * size)


class OwnTraining:
    """Our model with our optimizer on rows of the made-up batch."""

    def __init__(self, model: Transformer, config: Config, rows: slice, world: World) -> None:
        self.model = model
        self.optimizer = build_optimizer(model, config.stage)
        model.document_mask = config.stage.document_mask
        self.objective = next_token()
        self.batches = [made_up_batch(config, rows, world.device)]
        self.grad_clip = config.stage.grad_clip

    def step(self) -> float:
        """The step of training, clipping and bookkeeping included, where every rank has data of its own; its loss."""
        sums = accumulate_gradients(self.model, self.objective, self.batches)
        stop = StopRequest()
        return update(self.model, self.optimizer, sums, grad_clip=self.grad_clip, counts=True, stop=stop).loss

    def forward_backward(self) -> float:
        """Gradients of the summed loss, reduced over ranks; the mean loss of this rank's rows."""
        sums = accumulate_gradients(self.model, self.objective, self.batches)
        total, count = sums.total_count.tolist()
        return total / count

    def bare_step(self) -> float:
        """Forward, backward and AdamW, nothing else; the mean loss of this rank's rows."""
        loss = self.forward_backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


def peak_mib(run: Callable[[], object], device: torch.device) -> float:
    """The most memory in tensors that `run` holds at once beyond what is there before, MiB."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    results = profile.profiler.kineto_results if profile.profiler else None
    assert results is not None
    events: list[Any] = [event for event in results.events() if event.name() == "[memory]"]
    held = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0) / MIB
