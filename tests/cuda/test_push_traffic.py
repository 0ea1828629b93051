"""A push of weights from a card: what it asks of host and device, and how it uses NCCL and CUDA IPC."""

import contextlib
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_lm.cluster import pool_push
from dist_lm.cluster.pool_push import Held, Sender
from dist_lm.cluster.pool_weights import BROADCAST, IPC, Place
from dist_lm.cluster.push_link import NCCL_RAISES, Group, LinkError, SharedBucket, opened, sizes_of
from dist_lm.model.size import parameter_shapes
from tests.cuda.card import CARD, Traffic, is_pinned, stand_in
from tests.cuda.test_paged_engine import LARGE

pytestmark = pytest.mark.cuda

SHALLOW = replace(LARGE, n_layers=2)


class Sent:
    """A group whose broadcasts are done at once."""

    devices: list[str]

    def __init__(self, *_: Any) -> None: ...
    def broadcast(self, tensor: torch.Tensor, root: int, alive: Any) -> None:
        self.devices.append(tensor.device.type)

    def close(self) -> None: ...


@pytest.fixture
def member() -> Any:
    ignored = dict.fromkeys(("receive", "why_not", "forget_push"), lambda *_: None)
    return SimpleNamespace(pid=1, place=Place("node", "GPU-1"), left=False, **ignored)


@pytest.mark.parametrize("transport", [BROADCAST, IPC])
def test_weights_go_from_the_card_and_the_copy_for_later_waits_once_a_bucket(monkeypatch, member, transport):
    explicit = stand_in(monkeypatch)
    empty = torch.empty

    def tracked(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made = empty(*size, **options)
        made.untyped_storage().is_fake_pinned = pin_memory  # type: ignore[attr-defined]
        return made

    monkeypatch.setattr(torch, "empty", tracked)
    monkeypatch.setattr(SharedBucket, "handle", lambda bucket: ())
    monkeypatch.setattr(pool_push, "Group", Sent)
    Sent.devices = []
    warned: list[str] = []
    sender = Sender(SHALLOW, torch.bfloat16, CARD, lambda place: transport, "127.0.0.1", 5.0)
    shapes = parameter_shapes(SHALLOW)
    weights = ((name, empty(shape, dtype=torch.bfloat16, device=CARD)) for name, shape in shapes.items())
    buckets = len(sizes_of(SHALLOW, torch.bfloat16, pool_push.BUCKET_BYTES))
    assert buckets > 3
    with Traffic({}) as traffic:
        held = sender.send(weights, 1, [member], lambda: True, warned.append)
    assert not warned
    assert not +traffic.waits
    assert not traffic.uploads
    assert explicit == {"stream": buckets}
    assert Sent.devices == (["cuda"] * buckets if transport == BROADCAST else ["cpu"] * 2 * buckets)
    assert isinstance(held, Held)
    assert all(bucket.device.type == "cpu" and is_pinned(bucket) for bucket in held.buckets)
    with Traffic({}) as again:
        sender.send(held, 2, [member], lambda: True, warned.append)
    assert not +again.waits
    assert again.uploads == {"pinned": buckets}


def test_nccl_raises_and_ends_at_the_deadline(monkeypatch):
    found: dict[str, Any] = {}

    class Nccl:
        Options = SimpleNamespace

        def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
            found["environment"] = {name: os.environ.get(name) for name in NCCL_RAISES}

        def eager_connect_single_device(self, device: torch.device) -> None:
            found["device"] = device

        def broadcast(self, tensor: torch.Tensor, root: int) -> Any:
            return SimpleNamespace(is_completed=lambda: False)

        def abort(self) -> None:
            found["aborted"] = True

    monkeypatch.setattr(dist, "ProcessGroupNCCL", Nccl, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    group = Group("group", 0, 2, CARD, "127.0.0.1", 0.1, lambda name: dist.HashStore())
    assert found == {"environment": NCCL_RAISES, "device": CARD}
    assert not set(NCCL_RAISES) & set(os.environ)  # other groups of the rank keep theirs
    with pytest.raises(LinkError, match="no answer"):
        group.broadcast(torch.empty(8, device=CARD), 0)
    group.close()
    assert found["aborted"]


def test_a_bucket_is_opened_on_the_own_number_of_the_card(monkeypatch):
    given: list[Any] = []

    def open_it(*values: Any) -> None:
        given.extend(values)
        raise InterruptedError

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared_cuda", open_it)
    with pytest.raises(InterruptedError):
        opened((5, b"handle", 64, 0, b"counter", 0, b"event", True), 64, torch.device("cuda", 1))
    assert given == [1, b"handle", 64, 0, b"counter", 0, b"event", True]
