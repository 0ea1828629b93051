"""A slow GPU shows in the time of its blocks, where waiting for other ranks does not count. The GPU here is a clock."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from dist_lm.config.cluster import ParallelConfig
from dist_lm.config.stage import StageConfig
from dist_lm.data.batch import Batch
from dist_lm.parallel.layout import Layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.parallel.sharding import build_model
from dist_lm.prepare.compose import compose_config
from dist_lm.training.heartbeat import StopRequest
from dist_lm.training.objective import next_token
from dist_lm.training.optimizer import build_optimizer
from dist_lm.training.step import accumulate_gradients, update
from dist_lm.training.step_meter import BlockTimes, StepMeter
from tests.conftest import TINY

FORWARD, BACKWARD, WAIT = 2, 3, 100  # seconds


class Gpu:
    """A GPU with a clock; it has reached the events up to `done`."""

    def __init__(self):
        self.now = 0.0
        self.done = float("inf")

    def works(self, seconds: float) -> None:
        self.now += seconds

    def mark(self, *_) -> "Mark":
        return Mark(self)


class Mark:
    def __init__(self, gpu: Gpu):
        self.gpu, self.at = gpu, gpu.now

    def record(self, stream: object) -> None:
        self.at = self.gpu.now

    def query(self) -> bool:
        return self.at <= self.gpu.done

    def elapsed_time(self, end_event: "Mark", /) -> float:
        assert self.query()
        assert end_event.query()
        return 1000 * (end_event.at - self.at)


class Work(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gpu):
        ctx.gpu = gpu
        gpu.works(FORWARD)
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        ctx.gpu.works(BACKWARD)
        return gradient * 2, None


class WaitForOthers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gpu):
        ctx.gpu = gpu
        gpu.works(WAIT)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.gpu.works(WAIT)
        return gradient, None


class Block(nn.Module):
    def __init__(self, gpu: Gpu):
        super().__init__()
        self.gpu = gpu

    def forward(self, x, other):
        return Work.apply(x, self.gpu), None


def passes(blocks, gpu: Gpu) -> torch.Tensor:
    start = torch.ones(3, requires_grad=True)
    x = start
    for block in blocks:
        x, _ = block(WaitForOthers.apply(x, gpu), None)
    if x.requires_grad:
        WaitForOthers.apply(x, gpu).sum().backward()
    return start.grad if start.grad is not None else x


def test_the_blocks_of_both_passes_count_and_waits_do_not():
    gpu = Gpu()
    blocks = [Block(gpu) for _ in range(3)]
    plain = passes(blocks, gpu)
    times = BlockTimes(blocks, gpu.mark)
    times.measuring = True
    for _ in range(2):  # micro-batches
        assert torch.equal(passes(blocks, gpu), plain)
    assert times.take() == 2 * 3 * (FORWARD + BACKWARD)
    assert times.take() == 0


def test_what_the_gpu_has_not_reached_is_read_later():
    gpu = Gpu()
    blocks = [Block(gpu) for _ in range(2)]
    times = BlockTimes(blocks, gpu.mark)
    times.measuring = True
    gpu.done = WAIT + FORWARD  # the first block
    passes(blocks, gpu)
    assert times.take() == FORWARD
    assert times.take() == 0
    gpu.done = gpu.now
    assert times.take() == FORWARD + 2 * BACKWARD


def test_evaluations_do_not_count():
    gpu = Gpu()
    blocks = [Block(gpu)]
    times = BlockTimes(blocks, gpu.mark)
    passes(blocks, gpu)
    times.measuring = True
    with torch.no_grad():
        passes(blocks, gpu)
    assert times.take() == FORWARD


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield build_mesh(Layout(1, 1, 1), torch.device("cpu"))
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_fsdp_waits_outside_the_blocks(mesh, monkeypatch, mode):
    gpu = Gpu()
    config = compose_config(["stage=language", *TINY])
    parallel = ParallelConfig(cpu_offload=True, activation_checkpointing=mode)  # FSDP on one rank
    model = build_model(config.model, parallel, mesh, torch.device("cpu"), 0)
    wait = FSDPParamGroup.wait_for_unshard
    waits = []

    def waiting(group):
        gpu.works(WAIT)
        waits.append(group)
        wait(group)

    monkeypatch.setattr(FSDPParamGroup, "wait_for_unshard", waiting)
    marks = []
    times = BlockTimes(model.blocks, lambda: marks.append(1) or gpu.mark())
    times.measuring = True
    batch = Batch.plain(torch.zeros(2, 17, dtype=torch.int64))
    accumulate_gradients(model, next_token(), [batch, batch])
    assert len(waits) >= 2 * 2 * len(model.blocks)
    assert len(marks) == 2 * 4 * len(model.blocks)
    assert times.take() == 0


def test_a_slow_gpu_has_more_work_time_than_others(mesh, monkeypatch):
    """Every rank takes the same wall time: the fast GPU waits."""
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: gpu.mark())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    config = compose_config(["stage=language", *TINY])
    found = []
    for slowness in (1, 3):
        model = build_model(config.model, ParallelConfig(), mesh, torch.device("cpu"), 0)
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *_, wait=WAIT / slowness: gpu.works(wait))
        optimizer = build_optimizer(model, StageConfig(name="test"))
        meter = StepMeter(World(0, 2, 0, torch.device("cuda", 0)), optimizer, 9, model.blocks)
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *_, work=FORWARD * slowness: gpu.works(work))
        meter.begin(detailed=False)
        meter.data_came()
        batch = Batch.plain(torch.zeros(2, 17, dtype=torch.int64))
        sums = accumulate_gradients(model, next_token(), [batch], laps=meter.laps)
        update(model, optimizer, sums, grad_clip=1.0, adds_sums=True, stop=StopRequest(), laps=meter.laps)
        meter.end(1, 100)
        found.append(meter._work_s)
        with torch.no_grad():
            next_token()(model, batch)  # an evaluation
        assert meter._blocks
        assert meter._blocks.take() == 0
    assert found[1] == pytest.approx(3 * found[0], rel=0.1)
    assert found[0] > FORWARD * config.model.n_layers
