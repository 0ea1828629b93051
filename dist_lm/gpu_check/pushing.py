"""A check of weights sent directly into another process, as by `rlhf.pool.push`; the receiver is killed once."""

import hashlib
import multiprocessing
import time
from collections.abc import Callable
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

ADDRESS = "127.0.0.1"  # address of both processes
PATIENCE_S = 20.0  # longest wait for the other process
DTYPE = torch.bfloat16


def push(probe: Probe) -> None:
    """Checks CUDA IPC on one card, and the NCCL broadcast to a second one, if there is one.

    Notes GB/s of a push, and the seconds of one whose receiver is killed.

    Raises:
        CheckFailedError: the receiver has other weights, or the sender does not notice its end.
    """
    tiny = ("model=nano", "model.n_layers=2", "model.vocab_size=512")
    config = replace(probe.config("model=large", "model.n_layers=4", tiny=tiny).model, max_seq_len=64)
    first_device = probe.world.device
    receiver = _check(probe, config, IPC, first_device, _Child(config, probe.folder))

    # NCCL refuses two processes on one card; a rehearsal uses gloo, which does not.
    if probe.rehearsal or torch.cuda.device_count() > 1:
        second_device = probe.sized(torch.device("cuda", 1), rehearsal=first_device)
        receiver = _check(probe, config, BROADCAST, second_device, receiver)

    receiver.kill()


def _check(probe: Probe, config: ModelConfig, method: str, target: torch.device, receiver: "_Child") -> "_Child":
    """Sends two versions, a third whose receiver is killed half way, a fourth to a new receiver, which it returns.

    Args:
        method: IPC or BROADCAST.
        target: device of the receiver.

    Raises:
        CheckFailedError: as `push`.
    """
    device = probe.world.device
    shapes = parameter_shapes(config)
    # A rehearsal needs several buckets, too.
    bucket_bytes = probe.sized(BUCKET_BYTES, rehearsal=100_000)
    sender = Sender(
        config, DTYPE, device, lambda place: method, ADDRESS, PATIENCE_S, bucket_bytes, _stores_in(probe.folder)
    )
    warnings: list[str] = []

    def weights(version: int, kill: bool):
        generator = torch.Generator(device).manual_seed(version)
        for index, (name, shape) in enumerate(shapes.items()):
            if kill and index == len(shapes) // 2:
                receiver.kill()
            yield name, torch.randn(shape, generator=generator, device=device).to(DTYPE)

    def send(version: int, kill: bool = False) -> float:
        receiver.device = target

        started = time.perf_counter()
        pushed = sender.send(
            weights(version, kill), version, cast("list[Member]", [receiver]), lambda: True, warnings.append
        )
        seconds = time.perf_counter() - started

        assert isinstance(pushed, Held)

        # The receiver of a complete push has the bits that were sent.
        if not kill:
            expect(not warnings, f"{method}: {warnings[:1]}")
            received = receiver.digest()
            sent = _digest(unpacked(iter(pushed.buckets), config, DTYPE))
            expect(received == sent, f"{method}: the other process has other weights ({received})")
        return seconds

    send(0)
    probe.note(f"{method} GB/s", sum(sizes_of(config, DTYPE, bucket_bytes)) / send(1) / 1e9)

    # The sender must notice the loss and be able to push to the next receiver.
    probe.note(f"{method}, receiver killed s", send(2, kill=True))
    expect(len(warnings) == 1, f"{method}: the sender has not noticed that its receiver was killed")
    warnings.clear()
    receiver = _Child(config, probe.folder)
    send(3)

    sender.close()
    return receiver


def _digest(weights) -> str:
    sha256 = hashlib.sha256()
    for _, tensor in weights:
        sha256.update(tensor.cpu().view(torch.int16).numpy().tobytes())
    return sha256.hexdigest()


def _stores_in(folder: Path) -> Callable[[str], dist.Store]:
    """Returns a function that makes the store of a group as a file, because this check has no Ray."""
    return lambda group: dist.FileStore(str(folder / group), 2)


class _Child:
    """A receiver in a process of its own, with the interface of `Member`."""

    left = False
    place = Place("")

    def __init__(self, config: ModelConfig, stores: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child_end = context.Pipe()
        self._process = context.Process(target=_receive, args=(child_end, config, stores), daemon=True)
        self._process.start()
        assert self._process.pid

        self.pid = self._process.pid
        self.device = torch.device("cpu")  # device that receives
        self._pipe.recv()  # the child has imported torch

    def receive(self, offer: Offer, version: int) -> None:
        self._pipe.send((offer, self.device))

    def why_not(self) -> str | None:
        if self._process.is_alive():
            return None
        return f"process {self.pid} has ended"

    def forget_push(self) -> None:
        """See `Member`."""

    def digest(self) -> str:
        """Returns the digest of the received weights, or the reason why it received none."""
        if self._pipe.poll(PATIENCE_S):
            return self._pipe.recv()
        return "no answer"

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def __str__(self) -> str:
        return f"process {self.pid}"


def _receive(pipe: Connection, config: ModelConfig, stores: Path) -> None:
    """The program of the child, until it is killed: it does what `PoolActor.receive` does, without an engine.

    For each (offer, device) in the pipe it answers with the digest of the weights, or the reason why it has none.
    """
    die_with_parent()
    pipe.send("ready")

    receiver: Receiver | None = None
    while True:
        offer, device = pipe.recv()
        try:
            if receiver is None or receiver.offer.group != offer.group:
                # A new group of processes needs a new receiver; further versions use the same one.
                receiver = Receiver(offer, device, ADDRESS, store=_stores_in(stores))

            buckets = receiver.buckets(config, DTYPE)
            weights = dict(unpacked(buckets, config, DTYPE))
            # All buckets have been consumed by now.
            for _ in buckets:
                raise AssertionError
            pipe.send(_digest(weights.items()))
        except FAILURES as error:
            pipe.send(str(error))
