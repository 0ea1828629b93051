"""`python -m dist_lm.dry_run.fake_rank CONFIG RANK WORLD_SIZE`: one step of one rank of a world that is not there.

The model is laid out over a fake process group of the whole world, then takes a real step on fake tensors: they have
shapes, dtypes and sizes, but no values. What the step holds, computes and sends is printed as one line of JSON.

The rank of a process group belongs to the process, so every rank to look at takes a process of its own.
"""

import gc
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_lm.config.file import load_config
from dist_lm.config.root import Config
from dist_lm.dry_run.estimate import gradients_add_up, is_half, micro_batches_of, offloads
from dist_lm.dry_run.live_memory import LiveMemory
from dist_lm.dry_run.rehearsal import random_batch, rehearse
from dist_lm.dry_run.step_meter import StepMeter
from dist_lm.dry_run.watch import Watch
from dist_lm.dry_run.work import StepMemory, Work
from dist_lm.model.kernels import documents_apart
from dist_lm.parallel.layout import AXES, resolve_layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.parallel.sharding import arrange_model, materialise
from dist_lm.stages.registry import training_stage
from dist_lm.training.optimizer import build_optimizer

PLAYED = 2  # micro-batches: all but the last one do the same


def main() -> None:
    """Play one rank and print its report."""
    path, rank, world_size = sys.argv[1:]
    gc.freeze()  # the modules: half a million objects that a collection need not look at
    memory, work = play(load_config(Path(path)), int(rank), int(world_size))
    print(json.dumps({"memory": asdict(memory), "work": vars(work)}))


def play(config: Config, rank: int, world_size: int) -> tuple[StepMemory, Work]:
    """One step of `rank` of `world_size`."""
    cpu = torch.device("cpu")  # the fake tensors of a GPU would need its driver
    layout = resolve_layout(config.parallel, config.model, world_size)
    micro_batches, size = micro_batches_of(config, layout)
    offload, config = offloads(config), as_played(config, size)
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    mesh = build_mesh(layout, cpu)
    meter = StepMeter(config.hardware, {mesh.get_group(axis).group_name: axis for axis in AXES})
    # the mesh looks at its values: it is laid out before there are only fake ones
    model = arrange_model(config.model, config.parallel, mesh, cpu, exchange=config.hardware.device == "cpu")
    memory = LiveMemory(gloo=config.hardware.device == "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True), Watch(memory, meter):
        materialise(model, config.parallel, cpu)
        optimizer = build_optimizer(model, config.stage, config.stage.muon)
        stage = training_stage(config.stage.name)
        make_batch = stage.made_up_batch or random_batch
        batches = [make_batch(config) for _ in range(min(micro_batches, PLAYED))]
        world = World(rank, world_size, 0, cpu)
        step = rehearse(
            config, mesh, world, model, optimizer, stage.objective(config), batches, memory, meter.next_part
        )
    if offload:
        step = step.offloaded(gradients_add_up(config, layout))
    first, *last = meter.parts[-len(batches) :]
    return step, sum(last, first * max(1, micro_batches - 1))


def as_played(config: Config, sequences: int) -> Config:
    """Micro-batches of `sequences`, and what a GPU would do, where a fake step on the CPU has to be told."""
    parallel, stage = config.parallel, config.stage
    stage = replace(stage, micro_batch=sequences)
    if config.hardware.device == "cuda" and parallel.compute_dtype in ("auto", "fastest"):
        parallel = replace(parallel, compute_dtype="bf16")
    if documents_apart(config.hardware.device, is_half(config), config.model.d_head):
        # they keep what causal attention keeps, where fake tensors, which have no boundaries, take a mask
        stage = replace(stage, document_mask=False)
    # offloaded: the same tensors, and the report says where they are
    return replace(config, stage=stage, parallel=replace(parallel, compile="never", cpu_offload=False))


if __name__ == "__main__":
    main()
