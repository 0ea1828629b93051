"""Speed of a busy Python thread of the rank while a checkpoint is saved beside it, against the same thread alone.

Time in which the thread waits for a core does not count, because other programs cause it, too. Time in which it stands
still counts: it waits for Python's lock, or for the copy.
"""

import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from dist_lm.bench.case import Case, Comparison, GroupSize, configurations, describe
from dist_lm.bench.rank import OwnTraining, Trial
from dist_lm.config.root import Config
from dist_lm.parallel.layout import Layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.parallel.sharding import build_model
from dist_lm.training import checkpoint
from dist_lm.training.checkpoint_saver import CheckpointSaver
from dist_lm.training.state import TrainState

ALONE, SAVING, TORCH = "no save", "during a save", "torch's async_save"
SHAPES = (("model=tiny", "model.n_layers=16", "model.vocab_size=4096", "stage.global_batch=1", "stage.seq_len=64"),)
LOOPS = 100  # loops of a step: its time is that of so many, however many fit into a save
ADDITIONS = 50_000  # of a loop, about 2 ms
ALONE_S = 0.5
RUN_QUEUE = Path("/proc/thread-self/schedstat")  # nanoseconds: on a core, waiting for one


def cases(overrides: Sequence[str], quick: bool) -> list[Case]:
    """Returns one case: of the model of SHAPES, or of that of `overrides`.

    Raises:
        ConfigError, ArtefactError, UserError: as `compose_config`.
    """
    return [_case(config) for config in configurations(SHAPES, overrides, quick)]


def _case(config: Config) -> Case:
    return Case(
        name=describe(config),
        config=config,
        variants=dict.fromkeys((ALONE, SAVING, TORCH), GroupSize(1)),
        comparisons=[Comparison(SAVING, peer=TORCH, ceiling=ALONE), Comparison(TORCH, ceiling=ALONE)],
        rounds=12,
        amount=LOOPS,
        unit="loops/s",
    )


def build(variant: str, config: Config, world: World) -> Trial:
    """Builds one variant in one process, with a model that has taken a step.

    Raises:
        ConfigError: bf16 is asked for on a GPU without it.
        StrangerError: another user has connected to a port of this rank.
    """
    mesh = build_mesh(Layout(1, 1, 1), world.device)
    model = build_model(config.model, config.parallel, mesh, world.device, seed=0)
    training = OwnTraining(model, config, slice(0, 1), world)
    training.step()

    busy = BusyThread(SAVES[variant](training, world))
    return Trial(busy.step, clock=lambda: busy.seconds)


class BusyThread:
    """A loop in pure Python that runs as long as a save does."""

    def __init__(self, saves: Iterator[Callable[[], bool]]) -> None:
        """
        Args:
            saves: each element has begun a save, and tells whether it is complete.
        """
        self._saves = saves
        self.seconds = 0.0  # of all steps, each as if it had `LOOPS` loops

    def step(self) -> float:
        """Loops beside one save; returns 0, as there is no loss."""
        is_complete = next(self._saves)
        n_loops, began = 0, _seconds_with_a_core()
        while not is_complete():
            _loop()
            n_loops += 1
        self.seconds += (_seconds_with_a_core() - began) * LOOPS / max(1, n_loops)
        return 0.0


def _loop() -> int:
    total = 0
    for number in range(ADDITIONS):
        total += number
    return total


def _seconds_with_a_core() -> float:
    """Returns the time without that in which this thread waited for a core, where the system counts it."""
    seconds = time.perf_counter()
    if RUN_QUEUE.exists():
        seconds -= int(RUN_QUEUE.read_text().split()[1]) / 1e9
    return seconds


def no_saves(training: OwnTraining, world: World) -> Iterator[Callable[[], bool]]:
    """Yields waits of `ALONE_S` seconds."""
    while True:
        end = time.perf_counter() + ALONE_S
        yield lambda end=end: time.perf_counter() >= end


def own_saves(training: OwnTraining, world: World) -> Iterator[Callable[[], bool]]:
    """Yields saves by `CheckpointSaver`.

    Raises:
        StrangerError: another user has connected to a port of this rank.
    """
    with tempfile.TemporaryDirectory(prefix="dlm-bench-") as folder:
        config = training.model.config
        with CheckpointSaver(Path(folder), config, world, keep=1, asynchronous=True) as saver:
            for step in itertools.count(1):
                saver.save(training.model, training.optimizer, TrainState(step=step))
                assert saver.in_flight
                yield saver.in_flight.done
                saver.wait()


def torch_saves(training: OwnTraining, world: World) -> Iterator[Callable[[], bool]]:
    """Yields saves by a thread of torch, of the same tensors as safetensors."""
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    with tempfile.TemporaryDirectory(prefix="dlm-bench-") as folder:
        for step in itertools.count(1):
            path = Path(folder) / str(step)
            tensors = checkpoint.tensors_of(training.model, training.optimizer, training.model.config)
            writer = dcp.HuggingFaceStorageWriter(str(path), save_distributed=True)
            complete = dcp.async_save(tensors, storage_writer=writer, process_group=group)
            assert isinstance(complete, Future)
            yield complete.done
            complete.result()
            shutil.rmtree(path)


SAVES = {ALONE: no_saves, SAVING: own_saves, TORCH: torch_saves}
