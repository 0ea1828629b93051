"""Checks on several cards, in one process group under torchrun: collectives, FSDP and tensor parallelism."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from dist_lm.config.root import Config
from dist_lm.data.batch import Batch
from dist_lm.dry_run.rehearsal import random_batch
from dist_lm.gpu_check.probe import Probe, expect
from dist_lm.gpu_check.training import LARGE, TINY, Training, note_speed, whole_model
from dist_lm.parallel.mesh import measure_all_reduce
from dist_lm.parallel.sharding import compute_dtype
from dist_lm.training.heartbeat import StopRequest
from dist_lm.training.objective import next_token
from dist_lm.training.optimizer import build_optimizer, set_learning_rate
from dist_lm.training.step import accumulate_gradients, update
from dist_lm.training.step_meter import matmul_flops

STEPS, MICRO_BATCHES = 3, 2
LOSS_ERROR = 1e-4  # relative, fp32
PARITY = (
    *("model=tiny", "model.n_layers=4", "stage.seq_len=256", "stage.micro_batch=1", "stage.grad_clip=0"),
    *("stage.lr=1e-3", "parallel.compute_dtype=fp32", "parallel.compile=never", "stage.document_mask=false"),
)


def nccl(probe: Probe) -> None:
    """Checks sums over all ranks in the dtypes that training sends; notes the bandwidth of an all-reduce, GB/s.

    Raises:
        CheckFailedError: a sum differs.
    """
    world = probe.world
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        summed = torch.full((1000 * world.size,), float(world.rank + 1), dtype=dtype, device=world.device)
        expected = float(sum(range(1, world.size + 1)))

        # A reduce-scatter and an all-gather together are an all-reduce.
        own_part = torch.empty(1000, dtype=dtype, device=world.device)
        dist.reduce_scatter_tensor(own_part, summed.clone())
        gathered = torch.empty_like(summed)
        dist.all_gather_into_tensor(gathered, own_part)

        dist.all_reduce(summed)

        for name, actual in (("all_reduce", summed), ("reduce_scatter and all_gather", gathered)):
            expect(bool((actual == expected).all()), f"{name} of {dtype}: {actual[:3].tolist()}, expected {expected}")

    for size in (4 << 20, probe.sized(512, rehearsal=16) << 20):
        links = measure_all_reduce(world, size)
        probe.note(f"all-reduce of {size >> 20} MiB GB/s", links.bus_gb_per_s)


def fsdp(probe: Probe) -> None:
    """Checks parameters split over all ranks by FSDP."""
    _parity(probe, f"parallel.dp_shard={probe.world.size}")
    _speed(probe, f"parallel.dp_shard={probe.world.size}")


def tp(probe: Probe) -> None:
    """Checks heads, hidden units and vocabulary split over all ranks, with and without split sequences.

    Raises:
        CheckFailedError: the losses are too far from those of an unsplit model.
        StrangerError: another user has connected to a port of this rank.
    """
    size = probe.world.size
    for sp in ("false", "true"):
        _parity(probe, "parallel.dp_shard=1", f"parallel.tp={size}", f"parallel.sp={sp}")
    _speed(probe, "parallel.dp_shard=1", f"parallel.tp={size}")


def cp(probe: Probe) -> None:
    """Checks sequences split over all ranks, which exchange tokens for heads around attention.

    Raises:
        CheckFailedError: the losses are too far from those of an unsplit model.
    """
    _parity(probe, "parallel.dp_shard=1", f"parallel.cp={probe.world.size}")
    _speed(probe, "parallel.dp_shard=1", f"parallel.cp={probe.world.size}")


def _parity(probe: Probe, *overrides: str) -> None:
    """Compares losses of a few steps in fp32 with those of an unsplit model that takes the full batch on each rank.

    Notes the largest relative error.

    Raises:
        CheckFailedError: it is above LOSS_ERROR.
    """
    config = probe.config(*PARITY, *overrides, tiny=TINY)
    training = Training(probe, config)
    dp = training.layout.dp
    index = probe.world.rank // (training.layout.cp * training.layout.tp)
    unsplit_step = _unsplit_steps(probe, config)

    name = " ".join(override.removeprefix("parallel.") for override in overrides)

    worst = 0.0
    for step in range(STEPS):
        full_batch = _batches(config, step, dp)
        loss = training.step([batch.to(probe.world.device) for batch in full_batch[index::dp]]).loss

        expected = unsplit_step(full_batch)
        worst = max(worst, abs(loss / expected - 1))
        expect(worst <= LOSS_ERROR, f"{name}: loss {loss} at step {step}, {expected} on one card")

    probe.note(f"{name}, loss error", worst)


def _batches(config: Config, step: int, dp: int) -> list[Batch]:
    """Returns the micro-batches of all data-parallel ranks."""
    # Every rank draws all of them, so no rank has to send any.
    torch.manual_seed(step)
    return [random_batch(config) for _ in range(MICRO_BATCHES * dp)]


def _unsplit_steps(probe: Probe, config: Config) -> Callable[[list[Batch]], float]:
    """Returns a function that takes a step of an unsplit model on the micro-batches of all ranks and returns its
    loss."""
    world = probe.world

    model = whole_model(config.model, config.seed, world.device)
    model.document_mask = False

    optimizer = build_optimizer(model, config.stage, config.stage.muon)
    set_learning_rate(optimizer, config.stage.lr)

    def step(batches: list[Batch]) -> float:
        sums = accumulate_gradients(model, next_token(), [batch.to(world.device) for batch in batches])
        return update(model, optimizer, sums, grad_clip=0.0, adds_sums=world.is_first, stop=StopRequest()).loss

    return step


def _speed(probe: Probe, *overrides: str) -> None:
    config = probe.config(*LARGE, "parallel.compile=auto", "stage.micro_batch=4", *overrides, tiny=TINY)
    training = Training(probe, config)
    peak = matmul_flops(training.device, compute_dtype(config.parallel, training.device), config.hardware)
    note_speed(probe, training, probe.sized("compiled", rehearsal="eager"), 4, peak)
