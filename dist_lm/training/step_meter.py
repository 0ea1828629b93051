"""What steps take on this rank, from one line of metrics to the next, and what ranks tell each other of it."""

import math
import time

import torch
import torch.distributed as dist

from dist_lm.parallel.mesh import World
from dist_lm.training.laps import laps_on
from dist_lm.training.own_work import slowest_of, working_s
from dist_lm.training.update_size import UpdateSize

PARTS = ("forward", "backward", "optimizer", "communication")


class StepMeter:
    """Told as a step gets on: `begin`, `data_came`, `end`, and asked for a line, or for one with details."""

    def __init__(self, world: World, optimizer: torch.optim.Optimizer) -> None:
        self.laps = laps_on(world.device)
        self._update = UpdateSize(optimizer)
        self._world = world
        self._on_gpu = world.device.type == "cuda"  # whose passes are not this thread's work
        self._began = self._data_came = self._worked = 0.0
        self._own_s = 0.0  # since ranks last compared
        self._restart()

    def begin(self, detailed: bool) -> None:
        """A step begins: its batch is asked for.

        Args:
            detailed: `details` will be asked for behind it.
        """
        if detailed:
            self._update.watch()
        self._began = time.perf_counter()

    def data_came(self) -> None:
        """The batch is there."""
        self._data_came = time.perf_counter()
        self._worked = 0.0 if self._on_gpu else working_s()

    def end(self, tokens: int) -> None:
        """The step is done; `tokens`: of all ranks, without padding."""
        waited = self._data_came - self._began
        self._steps += 1
        self._tokens += tokens
        self._waited += waited
        self._elapsed += time.perf_counter() - self._began
        parts = self.laps.take()
        self._parts = {part: self._parts[part] + parts.get(part, 0.0) for part in PARTS}
        self._own_s += waited + (parts.get("optimizer", 0.0) if self._on_gpu else working_s() - self._worked)

    def line(self) -> dict[str, float]:
        """Means over the steps since the last line."""
        found = {
            "perf/tokens_per_s": self._tokens / self._elapsed,
            "perf/tokens_per_s_per_rank": self._tokens / self._elapsed / self._world.size,
            "perf/step_s": self._elapsed / self._steps,
            "perf/data_wait_s": self._waited / self._steps,
        }
        found |= {f"perf/{part}_s": seconds / self._steps for part, seconds in self._parts.items()}
        self._restart()
        return found

    def details(self) -> dict[str, float]:
        """How far the last step went, and who held up those since the last details (collective)."""
        world = self._world
        shared = torch.zeros(2 + world.size, dtype=torch.float64, device=world.device)
        shared[:2] = self._update.squares()
        shared[2 + world.rank] = self._own_s
        dist.all_reduce(shared)
        moved, size, *own_s_R = shared.tolist()
        self._own_s = 0.0
        slowest, ratio = slowest_of(own_s_R)
        return {
            "train/update_ratio": math.sqrt(moved / size) if size else 0.0,
            "perf/slowest_rank": slowest,
            "perf/straggler_ratio": ratio,
        }

    def _restart(self) -> None:
        self._steps = self._tokens = 0
        self._elapsed = self._waited = 0.0
        self._parts = dict.fromkeys(PARTS, 0.0)
