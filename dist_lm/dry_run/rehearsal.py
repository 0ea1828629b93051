"""Takes one step of one rank with the real trainer, and observes every operation.

`python -m dist_lm.dry_run.rehearsal CONFIG RANK WORLD_SIZE` plays a rank of a world that does not exist: the model is
laid out over a fake process group, and the step runs on fake tensors, which have shapes and dtypes but no values. It
prints memory, work and messages of the step as one line of JSON. A process has one rank, so each played rank needs a
process of its own. With real tensors and ranks, `rehearse` measures a real step.
"""

import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_lm.cluster.torchrun import CPU_ALLOCATOR
from dist_lm.config.root import Config
from dist_lm.data.batch import Batch
from dist_lm.data.stream import StepData, StepStream
from dist_lm.dry_run.estimate import gradients_add_up, is_half, micro_batches_of, offloads
from dist_lm.dry_run.heap import BESIDE_TENSORS, HEAP_OF_PROGRAM, Heap
from dist_lm.dry_run.watch import LiveMemory, Watch, WorkCounter
from dist_lm.dry_run.work import StepMemory, Work
from dist_lm.model.quantised import quantised_matrices
from dist_lm.model.size import documents_apart, flops_per_token
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.layout import resolve_layout
from dist_lm.parallel.mesh import World, adds_sums, axis_of_group, build_mesh
from dist_lm.parallel.sharding import arrange_model, materialise
from dist_lm.parallel.values import shard_of
from dist_lm.stages.registry import load_config
from dist_lm.stages.training.stage import training_stage
from dist_lm.training.heartbeat import StopRequest, Unheard
from dist_lm.training.muon import CPU, GPU
from dist_lm.training.objective import LossSum, Objective, Prepare
from dist_lm.training.optimizer import ShardedAdamW, build_optimizer
from dist_lm.training.state import TrainState
from dist_lm.training.trainer import Trainer

PLAYED = 3  # micro-batches: the first gathers, the last reduces, and all between them do the same work


def main() -> None:
    """Plays one rank and prints its memory and work.

    Raises:
        ArtefactError: the configuration of the run cannot be read.
        ConfigError: a value is not accepted by this version.
    """
    path, rank, world_size = sys.argv[1:]
    # The garbage collector skips half a million objects of imported modules.
    gc.freeze()
    memory, work = play(load_config(Path(path)), int(rank), int(world_size))
    print(json.dumps({"memory": asdict(memory), "work": vars(work)}))


def play(config: Config, rank: int, world_size: int) -> tuple[StepMemory, Work]:
    """Returns memory and work of a step of `rank` on fake tensors.

    Once in a process: it initialises the process group, a fake one, which stays. At most PLAYED micro-batches are
    played; the second stands for all between the first and the last.

    Raises:
        ConfigError: the layout does not fit the model or `world_size`.
    """
    # Fake CUDA tensors would need a driver.
    cpu = torch.device("cpu")
    layout = resolve_layout(config.parallel, config.trained_shape, world_size)
    micro_batches, sequences = micro_batches_of(config, layout)
    offload = offloads(config)
    config = as_played(config, sequences)

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    mesh = build_mesh(layout, cpu)

    counter = WorkCounter(config.hardware, axis_of_group(mesh))

    # The model is built outside the fake mode, because DeviceMesh reads the values of its tensors.
    model = arrange_model(config.trained_shape, config.parallel, mesh, cpu, exchange=config.hardware.device == "cpu")

    is_cpu = config.hardware.device == "cpu"
    memory = LiveMemory(gloo=is_cpu, heap=heap_of_rank() if is_cpu else None)
    kernels = fused_norms() if config.hardware.device == "cuda" else nullcontext()
    with kernels, FakeTensorMode(allow_non_fake_inputs=True), Watch(memory, counter):
        materialise(model, config.parallel, cpu)
        arithmetic = GPU if config.hardware.device == "cuda" else CPU
        optimizer = build_optimizer(model, config.stage, config.stage.muon, arithmetic)
        stage = training_stage(config.stage.name)
        batches = [stage.example_batch(config) or random_batch(config) for _ in range(min(micro_batches, PLAYED))]
        world = World(rank, world_size, 0, cpu)
        step_memory = rehearse(
            config,
            mesh,
            world,
            model,
            optimizer,
            stage.objective(config),
            batches,
            memory,
            counter.next_part,
            stage.prepare(config),
        )

    if is_cpu:
        step_memory = replace(step_memory, overhead=memory.heap_peak + BESIDE_TENSORS - step_memory.peak)
    if offload:
        step_memory = step_memory.offloaded(gradients_add_up(config, layout))

    # Parts before the first micro-batch belong to the construction of the model.
    micro_batch_work = counter.parts[-len(batches) :]
    # The second stands for all between the first and the last.
    if micro_batches > PLAYED:
        micro_batch_work[1] = micro_batch_work[1] * (micro_batches - 2)
    return step_memory, sum(micro_batch_work[1:], micro_batch_work[0])


def heap_of_rank() -> Heap:
    """Returns the heap of a CPU rank before its model is built."""
    threshold, pad = (int(CPU_ALLOCATOR[key]) for key in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_"))
    return Heap(threshold, pad, HEAP_OF_PROGRAM)


@contextmanager
def fused_norms() -> Iterator[None]:
    """Plays RMSNorm by the kernel of LayerNorm inside the block.

    A GPU has one kernel for RMSNorm, which fake tensors of the CPU compose of eight operations. The kernel of LayerNorm
    reads, writes and keeps the same, and a mean for each token.
    """
    composed = functional.rms_norm

    def fused(
        input: torch.Tensor, normalized_shape: list[int], weight: torch.Tensor | None = None, eps: float | None = None
    ) -> torch.Tensor:
        return functional.layer_norm(input, normalized_shape, weight, None, eps or torch.finfo(input.dtype).eps)

    functional.rms_norm = fused
    try:
        yield
    finally:
        functional.rms_norm = composed


def as_played(config: Config, sequences: int) -> Config:
    """Returns a copy of the configuration for a fake step on the CPU that does the work of the planned hardware: its
    dtype and its kernels, without compilation and offloading.

    An automatic compute dtype becomes bf16 for a GPU, and `stage.document_mask` false where the hardware has a kernel
    for packed documents.

    Args:
        sequences: sequences of a micro-batch.
    """
    parallel = config.parallel
    stage = replace(config.stage, micro_batch=sequences)

    if config.hardware.device == "cuda" and parallel.compute_dtype in ("auto", "fastest"):
        parallel = replace(parallel, compute_dtype="bf16")

    if documents_apart(config.hardware.device, is_half(config), config.model.d_head):
        # Packed attention keeps the tensors of causal attention; fake tensors have no boundaries and would need a mask.
        stage.document_mask = False  # in this copy, also if it is no key of the stage

    # Offloading keeps the same tensors in another memory, which `play` accounts for.
    return replace(config, stage=stage, parallel=replace(parallel, compile="never", cpu_offload=False))


def rehearse(
    config: Config,
    mesh: DeviceMesh,
    world: World,
    model: Transformer,
    optimizer: ShardedAdamW,
    objective: Objective,
    micro_batches: Sequence[Batch],
    memory: LiveMemory,
    on_micro_batch: Callable[[], None] = lambda: None,
    prepare: Prepare | None = None,
) -> StepMemory:
    """Takes one step on `micro_batches` and returns its memory (collective, unless the process group is fake).

    Changes model and optimizer as a step of a run does, and resets the peak of `memory`.

    Args:
        memory: observer that has also observed the allocation of the model.
        on_micro_batch: called before each micro-batch.
        prepare: see `Trainer.prepare`.
    """
    live_bytes: list[int] = []

    def watched(model: Transformer, batch: Batch) -> LossSum:
        live_bytes.append(memory.live)
        on_micro_batch()
        return objective(model, batch)

    hook = optimizer.register_step_pre_hook(lambda *_: live_bytes.append(memory.live))

    # The trainer is the real one, so that the played step cannot differ from a step of a run.
    trainer = trainer_of_steps(config, world, model, optimizer, watched, adds_sums(mesh), prepare)

    memory.reset_peak()
    live_before = memory.live
    trainer.step(TrainState(), StepData(0, list(micro_batches), 0), config.stage.lr)
    hook.remove()

    parameters = sum(shard_of(parameter).nbytes for parameter in model.parameters())
    parameters += sum(matrix.nbytes for matrix in quantised_matrices(model).values())
    moments = sum(shard_of(tensor).nbytes for state in optimizer.state.values() for tensor in state.values())
    # Before the optimizer step, or before a later micro-batch, gradients are all that has been added. Before the first
    # one, parameters may be gathered, which `prepare` has left.
    gradients = max(live_bytes[1:]) - live_before
    return StepMemory(parameters, gradients, moments, memory.peak - parameters - moments - gradients)


def trainer_of_steps(
    config: Config,
    world: World,
    model: Transformer,
    optimizer: ShardedAdamW,
    objective: Objective,
    adds_sums: bool,
    prepare: Prepare | None = None,
) -> Trainer:
    """Returns a trainer for single steps, without data, evaluation, checkpoints and files.

    Only its `step` may be called.

    Args:
        adds_sums: whether this rank adds its loss and counts: one of the ranks that see the same data does.
        prepare: see `Trainer.prepare`.
    """
    return Trainer(
        config=config,
        world=world,
        adds_sums=adds_sums,
        model=model,
        optimizer=optimizer,
        objective=objective,
        stream=cast(StepStream, iter(())),
        evaluate=lambda model, everything, alive: {},
        checkpoints=Path(),
        metrics=None,
        stop=StopRequest(),
        heartbeat=Unheard(),
        flops_per_token=flops_per_token(config.trained_shape, config.stage.seq_len),
        peak_flops=1e12,
        bytes_per_token=1.0,
        prepare=prepare,
    )


def random_batch(config: Config) -> Batch:
    """Returns a micro-batch of random tokens; each sequence is one document."""
    stage = config.stage
    shape = (stage.micro_batch, stage.seq_len)
    tokens_BT = torch.randint(0, config.model.vocab_size, shape)
    return Batch.plain(tokens_BT, torch.randint(0, config.model.vocab_size, shape))


if __name__ == "__main__":
    main()
