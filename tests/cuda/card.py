"""A GPU that is not there: what `torch.cuda` says of it, a step of training on it, and a count of what the step asks.

A fake process group stands in for the other ranks. Collectives return at once, so shapes, dtypes, devices and the
number of messages are those of a real step, and values are not.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_lm.config.root import Config
from dist_lm.data.batch import Batch
from dist_lm.data.stream import StepData
from dist_lm.dry_run.rehearsal import trainer_of_steps
from dist_lm.dry_run.watch import ANSWER, Watch, collective_of
from dist_lm.parallel.layout import resolve_layout
from dist_lm.parallel.mesh import World, axis_of_group, build_mesh
from dist_lm.parallel.sharding import arrange_model, materialise
from dist_lm.stages.training.stage import training_stage
from dist_lm.training.muon import GPU
from dist_lm.training.optimizer import build_optimizer
from dist_lm.training.state import TrainState
from dist_lm.training.trainer import Trainer

CARD = torch.device("cuda", 0)
aten = torch.ops.aten
# Operators whose result has a shape or a value that the host must wait for.
WAITS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.unique_consecutive, aten._unique2)


class Stream:
    """The only stream."""

    device, priority, stream_id, cuda_stream = CARD, 0, 0, 0

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> "Event":
        return Event()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None: ...


class Event:
    """Work that is done at once."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "Event") -> float:
        return 1.0


class Traffic(TorchDispatchMode):
    """What the operations in the block ask of the card and of other ranks.

    The compiler skips functions in the block, so nothing in it is compiled.
    """

    def __init__(self, axes: dict[str, str]) -> None:
        """`axes`: axis of the mesh by name of its process group."""
        super().__init__()
        self._axes = axes
        self.messages: Counter[tuple[str, str]] = Counter()  # (kind, axis)
        self.sent: Counter[tuple[str, str]] = Counter()  # bytes of the whole tensors
        self.waits: Counter[str] = Counter()  # the host waits for the card
        self.uploads: Counter[str] = Counter()  # from the host: `pinned` (asynchronous) or `pageable`

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        result = func(*args, **kwargs)
        if collective := collective_of(func, args, result):
            key = (collective.kind, self._axes.get(collective.group, "world"))
            self.messages[key] += 1
            self.sent[key] += collective.size
        elif func._overloadpacket in WAITS and args[0].device.type == "cuda":
            self.waits[str(func._overloadpacket)] += 1
        elif func._overloadpacket is aten.index and any(t.dtype == torch.bool for t in tree_leaves(args[1])):
            self.waits["index by a mask"] += 1
        elif func._overloadpacket in (aten._to_copy, aten.copy_):
            source, target = (args[0], result) if func._overloadpacket is aten._to_copy else (args[1], args[0])
            last = args[2] if len(args) > 2 else False
            self._copied(source, target, kwargs.get("non_blocking", last))
        return result

    def _copied(self, source: torch.Tensor, target: torch.Tensor, asynchronous: bool) -> None:
        if source.device.type == target.device.type or "meta" in (source.device.type, target.device.type):
            return
        host = source if target.device.type == "cuda" else target
        at_once = asynchronous and is_pinned(host)
        if target.device.type == "cuda":
            self.uploads["pinned" if at_once else "pageable"] += 1
        elif not at_once:
            self.waits["device to host"] += 1


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Make `torch.cuda` answer for a card; returns the explicit synchronisations, counted as they happen."""
    explicit: Counter[str] = Counter()
    stream = Stream()

    def counted(name: str) -> Any:
        return lambda *_, **__: explicit.update([name])

    monkeypatch.setattr(Stream, "synchronize", counted("stream"), raising=False)
    monkeypatch.setattr(Event, "synchronize", counted("event"), raising=False)
    answers = {
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "set_device": lambda device: None,
        "current_device": lambda: 0,
        "device_count": lambda: 8,
        "is_initialized": lambda: True,
        "empty_cache": lambda: None,
        "max_memory_allocated": lambda device=None: 0,
        "synchronize": counted("device"),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(FakeTensorMode, "avoid_device_init", property(lambda self: True))
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch.Tensor, "is_pinned", is_pinned)
    tolist = FakeTensor.tolist

    def read(tensor: FakeTensor) -> Any:
        if tensor.device.type != "cuda":
            return tolist(tensor)
        explicit["tolist"] += 1  # one copy, not one for each entry
        return [ANSWER] * tensor.numel()

    monkeypatch.setattr(FakeTensor, "tolist", read)
    return explicit


def pinned(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    """Stands in for `Tensor.pin_memory`."""
    copy = tensor.clone()
    copy.untyped_storage().is_fake_pinned = True  # type: ignore[attr-defined]
    return copy


def is_pinned(tensor: torch.Tensor, *_: Any) -> bool:
    """Stands in for `Tensor.is_pinned`."""
    return getattr(tensor.untyped_storage(), "is_fake_pinned", False)


@dataclass(frozen=True)
class Played:
    """A trainer of rank 0 on the card, in a world of ranks that are not there."""

    trainer: Trainer
    config: Config
    axes: dict[str, str]

    def batches(self, count: int) -> list[Batch]:
        """Micro-batches as the stream delivers them: in pinned host memory."""
        stage, config = training_stage(self.config.stage.name), self.config
        with unset_fake_temporarily():
            example = stage.example_batch(config)
            return [example.pin_memory() if example else text(config) for _ in range(count)]

    def step(self, batches: Sequence[Batch]) -> None:
        """One step of the trainer."""
        with torch.enable_grad():
            self.trainer.step(TrainState(), StepData(0, list(batches), 0), 1e-4)

    def watched_step(self, micro_batches: int) -> Traffic:
        """One step of the trainer, and what it asked."""
        batches = self.batches(micro_batches)
        with Watch(), Traffic(self.axes) as traffic:
            self.step(batches)
        return traffic


@contextlib.contextmanager
def played(config: Config, ranks: int) -> Iterator[Played]:
    """Build the model, its optimizer and a trainer as rank 0 of `ranks`."""
    layout = resolve_layout(config.parallel, config.model, ranks)
    torch.compiler.reset()
    with unset_fake_temporarily(), torch.no_grad():
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        try:
            # built outside the fake mode, because DeviceMesh reads the values of its tensors
            mesh = build_mesh(layout, CARD)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "empty", empty_on_card)
                model = arrange_model(config.model, config.parallel, mesh, CARD, exchange=False)
            with FakeTensorMode(allow_non_fake_inputs=True):
                materialise(model, config.parallel, CARD)
                # As GPUs of one kind agree on it; a fake card has no name to compare.
                optimizer = build_optimizer(model, config.stage, config.stage.muon, GPU)
                objective = training_stage(config.stage.name).objective(config)
                world = World(0, ranks, 0, CARD)
                trainer = trainer_of_steps(config, world, model, optimizer, objective, adds_sums=True)
                yield Played(trainer, config, axis_of_group(mesh))
        finally:
            dist.destroy_process_group()


def empty_on_card(*size: Any, device: Any = None, _empty: Any = torch.empty, **options: Any) -> torch.Tensor:
    """`torch.empty`, whose tensors on the card are fake: FSDP makes one."""
    fake = device is not None and torch.device(device).type == "cuda"
    with FakeTensorMode() if fake else contextlib.nullcontext():
        return _empty(*size, device=device, **options)


def text(config: Config, documents: int = 3, pinned: bool = True) -> Batch:
    """A micro-batch of packed documents with values, in pinned host memory, as the stream delivers it, or pageable."""
    shape = (config.stage.micro_batch, config.stage.seq_len)
    with unset_fake_temporarily():
        batch = Batch.plain(torch.zeros(shape, dtype=torch.int64))
        document_T = torch.arange(shape[1]) * documents // shape[1]
        batch = replace(batch, document_BT=document_T.repeat(shape[0], 1))
        return batch.pin_memory() if pinned else batch.to(torch.device("cpu"))
