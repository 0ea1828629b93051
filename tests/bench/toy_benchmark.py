"""A benchmark of nothing: `build` for the ranks of a group, with ways that misbehave."""

import sys

import torch.distributed as dist

from dist_lm.bench.rank import Trial


def build(way, config, world):
    if way == "fails" and world.rank == 1:
        sys.exit("the reason, in its own words")
    if way == "prints":
        print("this is for people")
    calls = []

    def step() -> float:
        dist.barrier()
        calls.append(way)
        return {"other": 2.0}.get(way, 1.0)

    return Trial(step, lambda: {"size MiB": 10.0 * (1 + world.rank)})
