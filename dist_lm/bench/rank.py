"""The program of one rank of a benchmark: `python -m dist_lm.bench.rank PARENT MODULE DEVICE`.

It reads requests from standard input until that is closed, a JSON object a line, and answers each with one:

    {"do": "build", "way": W, "config": PATH}  builds a way, does its first steps  -> {"losses": [...], "facts": {...}}
    {"do": "time", "way": W, "steps": N}       times N training steps              -> {"seconds": S}
    {"do": "forget"}                           frees what was built                -> {}
"""

import gc
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_lm.bench.trial import Trial
from dist_lm.config.file import load_config
from dist_lm.config.root import Config
from dist_lm.parallel.mesh import World, process_group
from dist_lm.storage.process import die_with_parent

FIRST_STEPS = 3  # their losses show whether gradients and optimizer agree too

Build = Callable[[str, Config, World], Trial]


def serve(requests: Iterable[str], build: Build, world: World) -> Iterable[dict[str, Any]]:
    """The answers to `requests` (collective: every rank gets the same)."""
    trials: dict[str, Trial] = {}
    for line in requests:
        request = json.loads(line)
        match request["do"]:
            case "build":
                trial = build(request["way"], load_config(Path(request["config"])), world)
                trials[request["way"]] = trial
                losses = trial.losses() if trial.losses else [trial.step() for _ in range(FIRST_STEPS)]
                yield {"losses": losses, "facts": trial.facts()}
            case "time":
                yield {"seconds": seconds_of(trials[request["way"]], request["steps"], world)}
            case "forget":
                trials.clear()
                gc.collect()
                yield {}


def seconds_of(trial: Trial, steps: int, world: World) -> float:
    """How long `steps` steps take, from when all ranks are ready."""
    dist.barrier()
    started = trial.clock()
    for _ in range(steps):
        trial.step()
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return trial.clock() - started


def main() -> None:
    """Serve until standard input ends."""
    parent, module, device = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    die_with_parent(parent)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    build: Build = importlib.import_module(module).build
    with process_group(device) as world:
        for answer in serve(sys.stdin, build, world):
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
