"""Weights straight from one process into another, as `rlhf.pool.push` sends them; the receiver is killed once, too."""

import hashlib
import multiprocessing
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist

from dist_lm.cluster.pool_actor import Member
from dist_lm.cluster.pool_push import BUCKET_BYTES, Held, Sender
from dist_lm.cluster.pool_weights import BROADCAST, IPC, Place
from dist_lm.cluster.push_link import FAILURES, Offer, Receiver, sizes_of, unpacked
from dist_lm.config.model import ModelConfig
from dist_lm.gpu_check.probe import Probe, expect
from dist_lm.model.size import parameter_shapes
from dist_lm.storage.process import die_with_parent

ADDRESS = "127.0.0.1"  # of both processes
PATIENCE_S = 20.0
DTYPE = torch.bfloat16


def push(probe: Probe) -> None:
    """By CUDA IPC on one card, and by NCCL broadcast to a second one."""
    tiny = ("model=nano", "model.n_layers=2", "model.vocab_size=512")
    config = replace(probe.config("model=large", "model.n_layers=4", tiny=tiny).model, max_seq_len=64)
    own = probe.world.device
    second = torch.device("cuda", 1) if own.type == "cuda" else own
    several = probe.rehearsal or torch.cuda.device_count() > 1
    receiver = _Child(config, probe.folder)
    for way, device in ((IPC, own), *([(BROADCAST, second)] if several else [])):
        receiver = _check(probe, config, way, device, receiver)
    receiver.kill()


def _check(probe: Probe, config: ModelConfig, way: str, other: torch.device, receiver: "_Child") -> "_Child":
    """Two versions, a third one whose receiver is killed half way, and a fourth one to another. Returns that one."""
    device, shapes = probe.world.device, parameter_shapes(config)
    bucket_bytes = BUCKET_BYTES if device.type == "cuda" else 100_000
    sender = Sender(config, DTYPE, device, lambda place: way, ADDRESS, PATIENCE_S, bucket_bytes, _Stores(probe.folder))
    warned: list[str] = []

    def weights(version: int, kill: bool):
        generator = torch.Generator(device).manual_seed(version)
        for number, (name, shape) in enumerate(shapes.items()):
            if kill and number == len(shapes) // 2:
                receiver.kill()
            yield name, torch.randn(shape, generator=generator, device=device).to(DTYPE)

    def send(version: int, kill: bool = False) -> float:
        receiver.device = other
        began = time.perf_counter()
        held = sender.send(
            weights(version, kill), version, cast("list[Member]", [receiver]), lambda: True, warned.append
        )
        seconds = time.perf_counter() - began
        assert isinstance(held, Held)
        if not kill:
            expect(not warned, f"{way}: {warned[:1]}")
            found, sent = receiver.digest(), _digest(unpacked(iter(held.buckets), config, DTYPE))
            expect(found == sent, f"{way}: the other process has other weights ({found})")
        return seconds

    send(0)
    probe.note(f"{way} GB/s", sum(sizes_of(config, DTYPE, bucket_bytes)) / send(1) / 1e9)
    probe.note(f"{way}, receiver killed s", send(2, kill=True))
    expect(len(warned) == 1, f"{way}: the sender has not noticed that its receiver was killed")
    warned.clear()
    receiver = _Child(config, probe.folder)
    send(3)
    sender.close()
    return receiver


def _digest(weights) -> str:
    found = hashlib.sha256()
    for _, value in weights:
        found.update(value.cpu().view(torch.int16).numpy().tobytes())
    return found.hexdigest()


class _Stores:
    """A file for each group: this check has no Ray."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, group: str) -> dist.Store:
        return dist.FileStore(str(self._folder / group), 2)


class _Child:
    """A `Member` in a process of its own."""

    left = False
    place = Place("")

    def __init__(self, config: ModelConfig, stores: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_receive, args=(theirs, config, stores), daemon=True)
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid
        self.device = torch.device("cpu")  # that receives
        self._pipe.recv()  # it has imported torch

    def receive(self, offer: Offer, version: int) -> None:
        self._pipe.send((offer, self.device))

    def why_not(self) -> str | None:
        return None if self._process.is_alive() else f"process {self.pid} has ended"

    def forget_push(self) -> None:
        """See `Member`."""

    def digest(self) -> str:
        """Of the weights that it got, or why it got none."""
        return self._pipe.recv() if self._pipe.poll(PATIENCE_S) else "no answer"

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def __str__(self) -> str:
        return f"process {self.pid}"


def _receive(pipe: Connection, config: ModelConfig, stores: Path) -> None:
    """The program of the child: what `PoolActor.receive` does, without an engine."""
    die_with_parent()
    pipe.send("ready")
    receiver: Receiver | None = None
    while True:
        offer, device = pipe.recv()
        try:
            if receiver is None or receiver.offer.group != offer.group:
                receiver = Receiver(offer, device, ADDRESS, store=_Stores(stores))
            buckets = receiver.buckets(config, DTYPE)
            weights = dict(unpacked(buckets, config, DTYPE))
            for _ in buckets:
                raise AssertionError
            pipe.send(_digest(weights.items()))
        except FAILURES as error:
            pipe.send(str(error))
