"""A benchmark of nothing: `build` for the ranks of a group, with variants that misbehave."""

import sys

import torch.distributed as dist

from dist_lm.bench.rank import Trial


def build(variant, config, world):
    if variant == "fails" and world.rank == 1:
        sys.exit("the reason, in its own words")
    if variant == "prints":
        print("this is for people")
    calls = []

    def step() -> float:
        dist.barrier()
        calls.append(variant)
        return {"other": 2.0}.get(variant, 1.0)

    return Trial(step, lambda: {"size MiB": 10.0 * (1 + world.rank)})
