"""One rank of a benchmark: the trials it times, and the program `python -m dist_lm.bench.rank PARENT BENCHMARK DEVICE`.

A trial is one variant of a case, mostly a training step on made-up tokens. The program reads requests from standard
input until that is closed, one JSON object per line, and writes one answer for each:

    {"do": "build", "variant": W, "config": PATH}  builds it, runs its first steps  -> {"losses": [...], "facts": {...}}
    {"do": "time", "variant": W, "steps": N}       times N training steps           -> {"seconds": S}
    {"do": "forget"}                               frees what was built             -> {}

Dimensions: B sequences, T tokens.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dist_lm.bench.case import benchmark_at
from dist_lm.config.root import Config
from dist_lm.data.batch import Batch
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World, data_place, process_group
from dist_lm.stages.registry import load_config
from dist_lm.storage.process import die_with_parent
from dist_lm.training.heartbeat import StopRequest
from dist_lm.training.objective import next_token
from dist_lm.training.optimizer import build_optimizer
from dist_lm.training.step import accumulate_gradients, update

MIB = 2**20
FIRST_STEPS = 3  # steps whose losses are compared; from the second on they also compare gradients and optimizer


@dataclass(frozen=True)
class Trial:
    """The work that a rank times, and the facts that it reports without timing."""

    step: Callable[[], float]  # one training step; returns its loss
    facts: Callable[[], dict[str, float]] = dict  # called once after the first steps; names end with their unit
    clock: Callable[[], float] = time.perf_counter  # seconds, by which steps are timed
    losses: Callable[[], list[float]] | None = None  # losses to compare with other variants; None: of the first steps


def made_up_batch(config: Config, rows: slice, device: torch.device) -> Batch:
    """Returns the sequences `rows` of a global batch of random tokens, on `device`: (rows, stage.seq_len), the same at
    every call; all targets count, and each row is one document.
    """
    stage = config.stage
    # The seed is the same in all ranks and variants: they take their rows from one batch.
    generator = torch.Generator().manual_seed(config.seed)
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
    """Returns the rows of the global batch that this rank's data-parallel coordinate trains on."""
    index, n_places = data_place(mesh)
    size = config.stage.global_batch // n_places
    return slice(index * size, (index + 1) * size)


class OwnTraining:
    """Trains our model with our optimizer on rows of the made-up batch."""

    def __init__(self, model: Transformer, config: Config, rows: slice, world: World) -> None:
        self.model = model
        self.optimizer = build_optimizer(model, config.stage)
        model.document_mask = config.stage.document_mask
        self.objective = next_token()
        self.batches: Sequence[Batch] = [made_up_batch(config, rows, world.device)]
        self.grad_clip = config.stage.grad_clip

    def step(self) -> float:
        """Takes a whole training step, with clipping and bookkeeping; every rank has its own data. Returns its loss."""
        sums = accumulate_gradients(self.model, self.objective, self.batches)
        stop = StopRequest()
        return update(self.model, self.optimizer, sums, grad_clip=self.grad_clip, adds_sums=True, stop=stop).loss

    def forward_backward(self) -> float:
        """Computes gradients of the summed loss, reduced over ranks; returns the mean loss of this rank's rows."""
        sums = accumulate_gradients(self.model, self.objective, self.batches)
        total, count = sums.total_and_count.tolist()
        return total / count

    def bare_step(self) -> float:
        """Runs forward, backward and AdamW, nothing else; returns the mean loss of this rank's rows."""
        loss = self.forward_backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


def peak_mib(run: Callable[[], object], device: torch.device) -> float:
    """Runs `run` once and returns the peak memory of the tensors that it allocates, beyond those that exist before,
    MiB. On a CPU it runs under the profiler, and on a GPU the peak counter of the device is reset."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / MIB

    # A CPU has no such counter: the profiler records every allocation, and their running sum has the peak.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    kineto = profile.profiler.kineto_results if profile.profiler else None
    assert kineto is not None
    events: list[Any] = [event for event in kineto.events() if event.name() == "[memory]"]
    allocated = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(allocated, default=0) / MIB


@cache
def two_cores() -> tuple[int | None, int | None]:
    """Returns (a core for this process, one for another), the first and the last that it may use; None each if there is
    only one, or the system cannot pin a process. The first call decides for the life of the process."""
    # Not every system can pin a process.
    cores: list[int] = []
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return None, None
    return cores[0], cores[-1]


def pin(process: int, core: int | None) -> None:
    """Keeps a process (0: this one) on a core; None leaves it as it is."""
    if core is not None:
        os.sched_setaffinity(process, [core])


# --- the program ---


def serve(
    requests: Iterable[str], build: Callable[[str, Config, World], Trial], world: World
) -> Iterable[dict[str, Any]]:
    """Yields the answer to each request, as the module's text shows both (collective: every rank gets the same
    requests). Times are in seconds.

    Args:
        requests: JSON lines.
        build: (variant, configuration, world) -> its trial.

    Raises:
        ConfigError: a configuration cannot be used. What `build` and the trials raise passes.
        ArtefactError: a configuration is missing or damaged.
    """
    trials: dict[str, Trial] = {}
    for line in requests:
        request = json.loads(line)
        match request["do"]:
            case "build":
                trial = build(request["variant"], load_config(Path(request["config"])), world)
                trials[request["variant"]] = trial
                losses = trial.losses() if trial.losses else [trial.step() for _ in range(FIRST_STEPS)]
                yield {"losses": losses, "facts": trial.facts()}
            case "time":
                yield {"seconds": seconds_of(trials[request["variant"]], request["steps"], world)}
            case "forget":
                trials.clear()
                # The next case needs the memory now, also that of reference cycles.
                gc.collect()
                yield {}


def seconds_of(trial: Trial, steps: int, world: World) -> float:
    """Takes `steps` steps and returns their seconds on this rank, from the moment when all ranks are ready
    (collective), by the clock of the trial; a GPU's work is waited for."""
    dist.barrier()
    began = trial.clock()
    for _ in range(steps):
        trial.step()
    # CUDA runs asynchronously: without this the clock would stop before the work ends.
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return trial.clock() - began


def main() -> None:
    """Serves requests of standard input until that ends, as one rank of the group that the environment names. It dies
    with its parent; prints of libraries go to standard error.

    Raises:
        OSError: the kernel refuses to tie this process to its parent.
        ConfigError: this rank should have a GPU and the node has too few.
        StrangerError: another user has connected to a port of this rank.
        ArtefactError: a configuration is missing or damaged.
    """
    parent, import_path, device = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    die_with_parent(parent)

    # Answers keep the old standard output; prints of libraries must not mix with them.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    build = benchmark_at(import_path).build
    with process_group(device) as world:
        for answer in serve(sys.stdin, build, world):
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
