"""New weights of a pool straight into its actors, beside Ray's object store (`rlhf.pool.push`).

A push goes through the links of `push_link`. The sender also keeps the version in host memory, for actors that start
later. If a link fails, the push goes on into host memory alone, and the pool loads the version through Ray's store into
all actors that lack it. So an actor that dies delays a push, and never ends it.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist

from dist_lm.cluster.pool_actor import Member
from dist_lm.cluster.pool_weights import IPC, RAY, Place, Stored, choose_transport, store
from dist_lm.cluster.push_link import (
    FAILURES,
    HOST,
    SENDER,
    Alive,
    Group,
    LinkError,
    Offer,
    RayStore,
    SharedBucket,
    packed,
    unpacked,
    wait_for_copies,
)
from dist_lm.cluster.ray_cluster import in_thread
from dist_lm.config.model import ModelConfig
from dist_lm.generation.decoder import WeightStream
from dist_lm.model.size import parameter_count

BUCKET_BYTES = 64 << 20  # pinned memory comes in powers of two
LOOK_EVERY_S = 0.1  # between two looks at the actors of a link
MOST_FAILURES = 3  # in a row; then Ray's object store is used for the rest of the run


@dataclass
class Held:
    """A complete version in host memory."""

    buckets: Sequence[torch.Tensor]
    config: ModelConfig
    dtype: torch.dtype

    @cached_property
    def chunks(self) -> Sequence[Any]:
        """References to all parameters in Ray's object store, put there when first asked for; see `Stored`."""
        return store(unpacked(iter(self.buckets), self.config, self.dtype), self.config, self.dtype).chunks


@dataclass(eq=False)
class Link:
    """The sender's end of a link: to all actors of a broadcast, or to one actor that shares its GPU."""

    transport: str
    members: Sequence[Member]
    pids: tuple[int, ...]
    name: str = field(default_factory=lambda: secrets.token_hex(8))
    group: Group | None = None

    def join(
        self, device: torch.device, address: str, patience_s: float, store: Callable[[str], dist.Store], alive: Alive
    ) -> None:
        """Waits for the actors, once; later calls return at once.

        Args:
            device: holds the weights in this process.
            address: this node's.
            patience_s: longest wait in seconds.
            alive: called meanwhile; may raise to give up.

        Raises:
            LinkError: not connected in time, or an actor has given up.
            RuntimeError: `torch.distributed` failed.
        """
        if self.group:
            return
        if self.transport == IPC:
            device, address = HOST, "127.0.0.1"

        # NCCL waits without a limit for an actor that is lost now; the thread is left to it.
        size = 1 + len(self.members)
        group = in_thread(partial(Group, self.name, SENDER, size, device, address, patience_s, store), "push")

        # Meanwhile this process shows signs of life, and sees whether an actor has given up.
        until = time.monotonic() + patience_s
        while not group.done():
            alive()
            if time.monotonic() > until:
                raise LinkError(f"not connected within {patience_s:g} s")
            wait([group], LOOK_EVERY_S / 10)
        self.group = group.result()

    def give(self, bucket: torch.Tensor, alive: Alive) -> None:
        """Sends a full bucket, and waits until it may change.

        Raises:
            LinkError, RuntimeError: see `Group.broadcast`; LinkError also if an actor has given up.
        """
        assert self.group
        if self.transport == IPC:
            # The actor reads the bucket where it lies: one message says that it is full, the answer that it was read.
            flag = torch.zeros(1)
            self.group.broadcast(flag, SENDER, alive)
            self.group.broadcast(flag, 1, alive)
        else:
            self.group.broadcast(bucket, SENDER, alive)

    def close(self) -> None:
        """Leaves the group."""
        if self.group:
            self.group.close()
            self.group = None


class Sender:
    """Sends versions from this process to the actors of a pool. Not for several threads, `hold` excepted."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        transport_to: Callable[[Place], str],
        address: str,
        patience_s: float,
        bucket_bytes: int = BUCKET_BYTES,
        store: Callable[[str], dist.Store] = RayStore,
    ) -> None:
        """
        Args:
            device: holds the weights in this process.
            transport_to: gives the transport to an actor whose weights are at a place, see `choose_transport`.
            address: this node's.
            patience_s: longest time for actors to join and to take a bucket.
            store: makes the store through which groups find their members.
        """
        self._config = config
        self._dtype = dtype
        self._device = device
        self._transport_to = transport_to
        self._join = (device, address, patience_s, store)
        self._patience_s = patience_s
        self._bucket_bytes = min(bucket_bytes, dtype.itemsize * parameter_count(config))
        self._bucket: SharedBucket | None = None
        self._links: list[Link] = []
        self._failures = 0
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def is_on(self) -> bool:
        """Whether pushes have not failed `MOST_FAILURES` times in a row."""
        return self._failures < MOST_FAILURES

    def hold(self, weights: WeightStream) -> Held:
        """Reads a version to its end into host memory, for a later `send`; from any thread.

        Raises:
            ArtefactError: the weights do not fit the model.
        """
        buckets = [*packed(weights, self._config, self._dtype, lambda: self._on_host(self._bucket_bytes))]
        wait_for_copies(self._device)
        return Held(buckets, self._config, self._dtype)

    def send(
        self,
        weights: WeightStream | Held,
        version: int,
        members: Sequence[Member],
        keep_going: Callable[[], bool],
        warn: Callable[[str], None],
    ) -> Held | Stored:
        """Sends a version to the actors that a link reaches, and returns it for later actors: in host memory, or in
        Ray's store if no link reaches any. The actors' calls may still be open at the end.

        If a link fails, all links are given up, and actors read the version through Ray's store.

        Args:
            members: actors that are up and have no work.
            keep_going: called at least every `LOOK_EVERY_S` seconds, as a sign of life; its answer is not used.
            warn: receives a line if a link fails; its actors then lack the version.

        Raises:
            ArtefactError: the weights do not fit the model.
            UserError: an actor rejected the weights.
        """
        self._choose_links(members)
        if not self._links:
            return weights if isinstance(weights, Held) else store(weights, self._config, self._dtype)
        bucket = self._bucket = self._bucket or SharedBucket.create(self._bucket_bytes, self._device)
        kept_buckets: list[torch.Tensor] = []

        def attempt(step: Callable[[Link, Alive], None]) -> None:
            for link in self._links:
                try:
                    step(link, _watch(link, keep_going))
                except FAILURES as error:
                    self._fail(link, version, error, warn)
                    return

        # Actors must be in their `receive` call before this process waits for them.
        for link in self._links:
            self._offer(link, version)
        attempt(lambda link, alive: link.join(*self._join, alive))
        # A held version lies in host memory, so its copies need not wait for what the device computes.
        stream = None
        if isinstance(weights, Held):
            stream = self._copy_stream
        with torch.cuda.stream(stream):
            for full in self._filled(weights, bucket.bucket):
                if not isinstance(weights, Held):
                    kept_buckets.append(self._on_host(len(full)).copy_(full, non_blocking=True))
                wait_for_copies(self._device)
                keep_going()
                attempt(lambda link, alive, full=full: link.give(full, alive))
        if self._links:
            self._failures = 0
        return weights if isinstance(weights, Held) else Held(kept_buckets, self._config, self._dtype)

    def close(self) -> None:
        """Leaves all links."""
        for link in self._links:
            link.close()
        self._links = []
        if self._bucket:
            self._bucket.close()
            self._bucket = None

    def _choose_links(self, members: Sequence[Member]) -> None:
        """Sets the links to those for these members. Links whose members are the same are kept, unless one of them has
        lost its last version; others are closed. There are none once pushes have failed too often.
        """
        groups: dict[tuple[str, int], list[Member]] = {}
        for member in members:
            assert member.place
            transport = self._transport_to(member.place)
            if transport != RAY and self.is_on:
                groups.setdefault((transport, member.pid if transport == IPC else 0), []).append(member)

        # A group of processes cannot change its members: a link is kept only if it has the same ones.
        old_links = {(link.transport, link.pids): link for link in self._links}
        for key in [key for key, link in old_links.items() if any(member.left for member in link.members)]:
            old_links.pop(key).close()
        links = []
        for (transport, _), group in groups.items():
            pids = tuple(member.pid for member in group)
            links.append(old_links.pop((transport, pids), None) or Link(transport, group, pids))
        for link in old_links.values():
            link.close()
        self._links = links

    def _offer(self, link: Link, version: int) -> None:
        assert self._bucket
        for rank, member in enumerate(link.members, 1):
            handle = self._bucket.handle() if link.transport == IPC and not link.group else ()
            size = 1 + len(link.members)
            offer = Offer(link.transport, link.name, rank, size, self._bucket_bytes, self._patience_s, handle)
            member.receive(offer, version)

    def _filled(self, weights: WeightStream | Held, bucket: torch.Tensor) -> Iterator[torch.Tensor]:
        if not isinstance(weights, Held):
            yield from packed(weights, self._config, self._dtype, lambda: bucket)
            return
        for on_host in weights.buckets:
            yield bucket[: len(on_host)].copy_(on_host, non_blocking=True)

    def _on_host(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")

    def _fail(self, failed: Link, version: int, error: Exception, warn: Callable[[str], None]) -> None:
        """Counts the failure and gives up all links, with a warning. No actor may take what it reads from now on for a
        version.
        """
        self._failures += 1

        # Actors that have read half a version would take the next bytes for its rest.
        for link in self._links:
            for member in link.members:
                member.forget_push()
        self.close()
        names = ", ".join(map(str, failed.members))
        rest = "they go through Ray's store"
        if not self.is_on:
            rest += f"; this was the failure {MOST_FAILURES} in a row, so later ones go there too"
        warn(f"generation: {failed.transport} of weights {version} to {names}: {error}; {rest}")


def _watch(link: Link, keep_going: Callable[[], bool]) -> Alive:
    """Returns a function that keeps this process alive, and raises LinkError if an actor of the link has given up, or
    the UserError by which one rejected the weights.
    """
    looked_at = time.monotonic()

    def alive() -> None:
        nonlocal looked_at
        if time.monotonic() - looked_at < LOOK_EVERY_S:
            return
        looked_at = time.monotonic()
        keep_going()
        for member in link.members:
            if reason := member.why_not():
                raise LinkError(reason)

    return alive


def sender_for(
    push: str, config: ModelConfig, dtype: torch.dtype, device: torch.device, *, tp: int, patience_s: float
) -> Sender:
    """Returns the sender of this process, which is connected to Ray.

    Args:
        push: rlhf.pool.push.
        tp: GPUs of an actor's engine.
        patience_s: longest time for actors to join and to take a bucket.
    """
    import ray

    node_id = ray.get_runtime_context().get_node_id()
    (address,) = [node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == node_id]
    sender_place = Place.of(node_id, device)

    def transport_to(actor: Place) -> str:
        return choose_transport(push, sender_place, actor, tp)

    return Sender(config, dtype, device, transport_to, address, patience_s)
