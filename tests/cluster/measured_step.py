"""`torchrun -m tests.cluster.measured_step CONFIG MICRO_BATCHES`: resident memory of a real step, and what is counted.

Rank 0 prints JSON: bytes of the peak above what the process held before it built the model. `resident` is the kernel's
figure (VmHWM), `tensors` that of the observer that a dry run uses.
"""

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from dist_lm.dry_run.rehearsal import random_batch, rehearse
from dist_lm.dry_run.watch import LiveMemory, Watch
from dist_lm.parallel.layout import resolve_layout
from dist_lm.parallel.mesh import build_mesh, process_group
from dist_lm.parallel.sharding import build_model
from dist_lm.stages.registry import load_config
from dist_lm.stages.training.stage import training_stage
from dist_lm.training.optimizer import build_optimizer


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def main() -> None:
    config, micro_batches = load_config(Path(sys.argv[1])), int(sys.argv[2])
    with process_group("cpu") as world:
        mesh = build_mesh(resolve_layout(config.parallel, config.model, world.size), world.device)
        torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # the libraries' own memory
        dist.barrier()
        before = resident("VmRSS")
        memory = LiveMemory(gloo=True)
        with Watch(memory):
            model = build_model(config.model, config.parallel, mesh, world.device, config.seed)
            optimizer = build_optimizer(model, config.stage)
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
            objective = training_stage(config.stage.name).objective(config)
            batches = [random_batch(config) for _ in range(micro_batches)]
            step = rehearse(config, mesh, world, model, optimizer, objective, batches, memory)
        if world.is_first:
            print(json.dumps({"resident": resident("VmHWM") - before, "tensors": step.peak}), flush=True)
        del model, optimizer


if __name__ == "__main__":
    main()
