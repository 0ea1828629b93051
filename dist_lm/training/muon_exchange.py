"""Muon on several ranks: shards of matrices travel to their owners, and steps travel back.

`parallel.owners` plans which rank owns which matrix; `training.muon` has the arithmetic. A rank sends its shards to
owners in buckets: while one bucket is computed, the next one is under way. Some matrices are started by another rank,
in a bucket of their own, which hands them on to their owners in place of steps.

Dimensions: N matrices of one shape, I rows, J columns.
"""

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dist_lm.parallel.gloo import gather_by_exchange
from dist_lm.parallel.layout import PARAMETER_AXES, Layout
from dist_lm.parallel.owners import Box, Cut, Unit, make_plan, pieces, size_of
from dist_lm.parallel.values import shard_of
from dist_lm.training.muon import (
    ALL_ITERATIONS,
    GPU_WITHOUT_BF16,
    Arithmetic,
    Stepped,
    arithmetic_of,
    orthogonal,
)

Pieces = list[list[tuple[Unit, Box]]]
"""Pieces of units, for each rank of a group."""


@dataclass(frozen=True)
class Message:
    """An exchange under way: parts of a flat tensor from every rank of a group."""

    received: torch.Tensor
    sent: torch.Tensor  # must live until the exchange is complete
    work: Any

    def wait(self) -> torch.Tensor:
        """Waits for the exchange, on a GPU in its stream, and returns `received`: the parts of all ranks, by rank."""
        if self.work is not None:
            self.work.wait()
        return self.received


@dataclass
class Bucket:
    """The units that are sent together, as this rank sees them; pieces are listed by rank of the replica."""

    owned: list[Unit]  # matrices that this rank owns; in the bucket of starts: those that it starts
    given: Pieces  # this rank's pieces that an owner needs
    taken: Pieces  # pieces of this rank's own units
    returned: Pieces  # pieces of the steps of this rank's own units; of starts: the units, for their owners
    received: Pieces  # pieces of the steps that an owner returns to this rank; of starts: the units that it owns
    shared: Pieces  # this rank's pieces of all steps, by replica of the owner; empty if replicas share no work
    is_starts: bool = False  # units in it are started and handed on to their owners

    def iterations(self, unit: Unit) -> range:
        """Returns which iterations a unit of this bucket goes through here."""
        if unit.start is None:
            return ALL_ITERATIONS
        if self.is_starts:
            return ALL_ITERATIONS[: unit.start.n_iterations]
        return ALL_ITERATIONS[unit.start.n_iterations :]


class Owners:
    """Brings matrices to their owners and steps back, in buckets: while a rank computes one, the next one is sent."""

    def __init__(self, parameters: Sequence[torch.Tensor], arithmetic: Arithmetic) -> None:
        """Plans who owns what (nothing is sent).

        Args:
            parameters: DTensors on one mesh, which has all ranks.
        """
        parameter = parameters[0]
        assert isinstance(parameter, DTensor)
        mesh = parameter.device_mesh
        assert mesh.size() == dist.get_world_size(), "the mesh of a matrix has all ranks"
        self.arithmetic = arithmetic
        self.device = torch.device(mesh.device_type)
        self.dtype = arithmetic.dtype or parameter.dtype
        self.plan = make_plan(
            [_cut(parameter) for parameter in parameters],
            _layout(mesh),
            arithmetic.bucket_bytes // self.dtype.itemsize,
            arithmetic.flops_per_byte * self.dtype.itemsize,
            # GPUs of several kinds share all work whatever a message costs (0), which says nothing of handing on.
            hands_on=not arithmetic.by_squares and arithmetic.flops_per_byte > 0,
        )

        self.replica, self.place = divmod(dist.get_rank(), self.plan.n_places)
        self.group = _group(mesh)
        self.replicas = mesh.get_group("dp_replicate") if self.plan.shares_replicas else None
        self.buckets = [self._bucket(number) for number in range(self.plan.n_buckets)]

    def _bucket(self, number: int) -> Bucket:
        """Returns what this rank sends and receives for the units of a bucket."""
        # The group may have more ranks than the replica.
        ranks = dist.get_process_group_ranks(self.group)
        peer_at = {rank % self.plan.n_places: peer for peer, rank in enumerate(ranks) if self._is_in_replica(rank)}
        n_replicas = self.plan.layout.dp_replicate if self.plan.shares_replicas else 0

        bucket = Bucket([], *([[] for _ in ranks] for _ in range(4)), shared=[[] for _ in range(n_replicas)])
        bucket.is_starts = number == 0 and any(unit.start for unit in self.plan.units)
        for unit in self.plan.units:
            is_here = unit.replica in (None, self.replica)
            if is_here and bucket.is_starts and unit.start is not None:
                self._add_shards(bucket, unit, peer_at)
                self._add_start(bucket, unit, peer_at)
            if number != unit.bucket:
                continue

            box = self.plan.piece(unit, self.place)
            if unit.replica is not None and size_of(box):
                bucket.shared[unit.replica].append((unit, box))
            if not is_here:
                continue
            if unit.start is None:
                self._add_shards(bucket, unit, peer_at)
            if size_of(box):
                bucket.received[peer_at[unit.owner]].append((unit, box))
            if unit.owner == self.place:
                bucket.owned.append(unit)
                for place, piece in pieces(self.plan, unit):
                    bucket.returned[peer_at[place]].append((unit, piece))
        return bucket

    def _add_shards(self, bucket: Bucket, unit: Unit, peer_at: Mapping[int, int]) -> None:
        """Adds the way of a unit's shards to the rank that gathers them."""
        box = self.plan.piece(unit, self.place)
        if size_of(box) and self.plan.is_source(unit, self.place):
            bucket.given[peer_at[unit.gatherer]].append((unit, box))
        if unit.gatherer == self.place:
            for place, piece in pieces(self.plan, unit):
                if self.plan.is_source(unit, place):
                    bucket.taken[peer_at[place]].append((unit, piece))

    def _add_start(self, bucket: Bucket, unit: Unit, peer_at: Mapping[int, int]) -> None:
        """Adds the way of a unit from the rank that starts it to its owner."""
        assert unit.start is not None
        if unit.start.place == self.place:
            bucket.owned.append(unit)
            bucket.returned[peer_at[unit.owner]].append((unit, self.plan.whole(unit)))
        if unit.owner == self.place:
            bucket.received[peer_at[unit.start.place]].append((unit, self.plan.whole(unit)))

    def _is_in_replica(self, rank: int) -> bool:
        return rank // self.plan.n_places == self.replica

    def steps(self, stepped: Sequence[Stepped]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yields (number in `stepped`, a part of this rank's shard of the parameter, the step of that part).

        Every entry of every shard is yielded once (collective).

        The step is the orthogonalised direction. Variances are updated: those of this rank's own matrices alone.
        """
        gathering = self._gather(stepped, self.buckets[0])
        returning: tuple[Bucket, Message] | None = None
        started: dict[Unit, torch.Tensor] = {}
        for bucket, following in zip(self.buckets, [*self.buckets[1:], None], strict=True):
            # All ranks send in the same order: the next bucket before the steps of this one.
            gathered = gathering.wait()
            if following is not None:
                gathering = self._gather(stepped, following)
            steps = self._orthogonal(stepped, bucket, gathered, started)
            del gathered
            message = self._send_back(bucket, steps)

            # The units of bucket 0 come while bucket 1 is computed. Their owners finish them in the last one.
            if returning is not None and returning[0].is_starts:
                started = {unit: part for (unit, _), part in _parts(returning[0].received, returning[1].wait())}
            elif returning is not None:
                yield from self._received(stepped, *returning)
            returning = (bucket, message)
        assert returning is not None, "there is a bucket"
        yield from self._received(stepped, *returning)

    def _gather(self, stepped: Sequence[Stepped], bucket: Bucket) -> Message:
        """Starts to send this rank's pieces of directions to their owners (collective)."""

        # Units part a parameter along its first dimension alone.
        directions = (
            stepped[unit.parameter].direction(self._rows(unit, box)) for peer in bucket.given for unit, box in peer
        )
        return self._exchange(directions, bucket.given, bucket.taken, stepped[0].gradient.device)

    def _orthogonal(
        self, stepped: Sequence[Stepped], bucket: Bucket, gathered: torch.Tensor, started: dict[Unit, torch.Tensor]
    ) -> dict[Unit, torch.Tensor]:
        """Returns the steps of the units that this rank owns, each (n, I, J) or (I, J); in the bucket of starts, the
        units after their first iterations.

        Args:
            started: units that other ranks have started; those of this bucket are taken out.
        """
        # Matrices of one shape are computed together.
        alike: dict[tuple[range, tuple[int, ...]], list[Unit]] = {}
        for unit in bucket.owned:
            shape = self.plan.cuts[unit.parameter].shape[-2:]
            alike.setdefault((bucket.iterations(unit), shape), []).append(unit)
        stacks: dict[tuple[range, tuple[int, ...]], torch.Tensor] = {}
        wholes: dict[Unit, torch.Tensor] = {}
        for (iterations, shape), units in alike.items():
            stack_NIJ = gathered.new_empty(sum(unit.n_matrices for unit in units), *shape)
            stacks[iterations, shape] = stack_NIJ
            wholes |= self._units(stack_NIJ, units)
        for (unit, box), part in _parts(bucket.taken, gathered):
            wholes[unit][_within(unit, box)] = part
        for unit in wholes.keys() & started.keys():
            wholes[unit].copy_(started.pop(unit))
        del wholes

        steps: dict[Unit, torch.Tensor] = {}
        for (iterations, shape), units in alike.items():
            stack_NIJ = orthogonal(stacks.pop((iterations, shape)), self.arithmetic, iterations)
            steps |= self._units(stack_NIJ, units)
        if bucket.is_starts:
            return steps

        for unit, step in steps.items():
            if (variance := stepped[unit.parameter].variance) is not None:
                neuron_sq = variance.neuron_sq
                if neuron_sq.dim() == 3:
                    neuron_sq = neuron_sq[unit.first : unit.end]
                replace(variance, neuron_sq=neuron_sq).normalise_(step)
        return steps

    def _units(self, stack_NIJ: torch.Tensor, units: Sequence[Unit]) -> dict[Unit, torch.Tensor]:
        """Returns the part of a stack that belongs to each of its units, in the shape of its parameter."""
        parts = stack_NIJ.split([unit.n_matrices for unit in units])
        shapes = [self.plan.cuts[unit.parameter].shape for unit in units]
        return {
            unit: part.view(shape) if len(shape) == 2 else part
            for unit, shape, part in zip(units, shapes, parts, strict=True)
        }

    def _send_back(self, bucket: Bucket, steps: dict[Unit, torch.Tensor]) -> Message:
        """Starts to send the steps of this rank's units to all that hold a piece (collective)."""
        parts = (steps[unit][_within(unit, box)] for peer in bucket.returned for unit, box in peer)
        return self._exchange(parts, bucket.returned, bucket.received, self.device)

    def _received(
        self, stepped: Sequence[Stepped], bucket: Bucket, message: Message
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yields the parts of this rank's shards with their steps (collective if replicas share the work)."""
        received, pieces_of_peers = message.wait(), bucket.received
        if self.replicas is not None:
            received, pieces_of_peers = self._of_all_replicas(bucket, received), bucket.shared
        received = received.to(shard_of(stepped[0].parameter).device)  # to offloaded shards in one copy
        for (unit, box), step in _parts(pieces_of_peers, received):
            yield unit.parameter, shard_of(stepped[unit.parameter].parameter)[self._rows(unit, box)], step

    def _of_all_replicas(self, bucket: Bucket, received: torch.Tensor) -> torch.Tensor:
        """Returns this rank's pieces of the steps of all replicas, in the order of `bucket.shared`, given those of its
        own one (collective)."""
        assert self.replicas is not None
        # One message of equal parts, as all-gather takes them.
        sizes = [_size(of_replica) for of_replica in bucket.shared]
        longest = max(sizes)
        if not longest:
            return received  # all copies of this rank hold nothing either
        steps_of_rank = torch.zeros(longest, dtype=self.dtype, device=self.device)
        step_of = dict(_parts(bucket.received, received))
        for piece, target in _parts([bucket.shared[self.replica]], steps_of_rank):
            target.copy_(step_of[piece])
        del step_of

        gathered = torch.empty(len(bucket.shared) * longest, dtype=self.dtype, device=self.device)
        if dist.get_backend(self.replicas) == dist.Backend.GLOO:
            gather_by_exchange(gathered, steps_of_rank, self.replicas)
        else:
            dist.all_gather_into_tensor(gathered, steps_of_rank, group=self.replicas)
        return torch.cat([part[:size] for part, size in zip(gathered.split(longest), sizes, strict=True)])

    def _exchange(self, parts: Iterable[torch.Tensor], sent: Pieces, received: Pieces, device: torch.device) -> Message:
        """Starts to send parts to the ranks of the group (collective).

        Args:
            parts: the tensors of `sent`, in its order; each is copied once, into the message.
            sent: which pieces go to each rank.
            received: which pieces come from each rank.
            device: that of the parts.
        """
        sizes = [[_size(peer) for peer in pieces_of_peers] for pieces_of_peers in (sent, received)]
        outgoing = torch.empty(sum(sizes[0]), dtype=self.dtype, device=device)
        for (_, target), part in zip(_parts(sent, outgoing), parts, strict=True):
            target.copy_(part)
        outgoing = outgoing.to(self.device)  # offloaded shards go to the GPU in one copy
        if self.group.size() == 1:
            return Message(outgoing, outgoing, None)

        incoming = torch.empty(sum(sizes[1]), dtype=self.dtype, device=self.device)
        work = dist.all_to_all_single(incoming, outgoing, sizes[1], sizes[0], group=self.group, async_op=True)
        return Message(incoming, outgoing, work)

    def gather_variances(self, stepped_variances: Sequence[torch.Tensor]) -> None:
        """Gives every rank the mean squares of all neurons, in place (collective).

        Between two calls a rank has those of its own units, and old ones of all others.

        Args:
            stepped_variances: `neuron_sq` of every parameter of the plan, in its order.
        """
        variances_of_rank = [torch.zeros_like(neuron_sq) for neuron_sq in stepped_variances]
        for unit in self.plan.units:
            # Replicas that share no work have computed the same: the first one says what all have.
            if unit.owner == self.place and (unit.replica or 0) == self.replica:
                rows = slice(unit.first, unit.end) if variances_of_rank[unit.parameter].dim() == 3 else slice(None)
                variances_of_rank[unit.parameter][rows] = stepped_variances[unit.parameter][rows]

        flat = torch.cat([neuron_sq.flatten() for neuron_sq in variances_of_rank])
        dist.all_reduce(flat)
        sums = flat.split([neuron_sq.numel() for neuron_sq in variances_of_rank])
        for neuron_sq, summed in zip(stepped_variances, sums, strict=True):
            neuron_sq.copy_(summed.view_as(neuron_sq))

    def _rows(self, unit: Unit, box: Box) -> slice:
        """Returns where a piece of this rank lies in its shard, along the first dimension."""
        cut = self.plan.cuts[unit.parameter]
        start = self.plan.piece(replace(unit, first=0, end=cut.n_matrices), self.place)[0][0]
        return slice(box[0][0] - start, box[0][1] - start)


def _within(unit: Unit, box: Box) -> tuple[slice, ...]:
    """Returns where a piece lies in its unit."""
    first = unit.first if len(box) == 3 else 0
    (start, stop), *rest = box
    return (slice(start - first, stop - first), *(slice(*extent) for extent in rest))


def _size(peer: Sequence[tuple[Unit, Box]]) -> int:
    return sum(size_of(box) for _, box in peer)


def _parts(peers: Pieces, flat: torch.Tensor) -> Iterator[tuple[tuple[Unit, Box], torch.Tensor]]:
    """Yields every piece with its part of a flat tensor, in its shape."""
    offset = 0
    for unit, box in (piece for peer in peers for piece in peer):
        shape = [stop - start for start, stop in box]
        yield (unit, box), flat[offset : offset + math.prod(shape)].view(shape)
        offset += math.prod(shape)


def owners_of(parameters: Sequence[torch.Tensor], arithmetic: Arithmetic) -> Owners | None:
    """Returns the owners of these parameters; None if this rank has all of them whole: it is alone, or the model is
    split over no ranks."""
    if not parameters or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    if not isinstance(parameters[0], DTensor):
        return None
    return Owners(parameters, arithmetic)


def arithmetic_of_ranks(device: torch.device) -> Arithmetic:
    """Returns how the devices of all ranks orthogonalise (collective, if there are several ranks on GPUs)."""
    arithmetic = arithmetic_of(device)
    if device.type != "cuda" or not dist.is_initialized() or dist.get_world_size() == 1:
        return arithmetic
    return agreed_arithmetic(arithmetic, torch.cuda.get_device_name(device), device)


def agreed_arithmetic(arithmetic: Arithmetic, kind: str, device: torch.device) -> Arithmetic:
    """Returns `arithmetic` if the devices of all ranks are of one kind, else one that suits all kinds (collective).

    Two kinds of GPU round differently. They must not compute the same step, or replicas would drift apart: so replicas
    share the work. Messages have a dtype that all of them multiply.

    Args:
        kind: name of this rank's device.
        device: that of the message.
    """
    # An all-reduce compares the names without sending them to all: all are equal if highest and lowest are.
    checksum = zlib.crc32(kind.encode())
    summary = torch.tensor([checksum, -checksum, arithmetic.dtype is None], dtype=torch.int64, device=device)
    dist.all_reduce(summary, op=dist.ReduceOp.MAX)
    highest, negated_lowest, lacks_bf16 = summary.tolist()

    if highest == -negated_lowest:
        return arithmetic
    if lacks_bf16:
        arithmetic = GPU_WITHOUT_BF16
    return replace(arithmetic, flops_per_byte=0.0)


def _layout(mesh: DeviceMesh) -> Layout:
    """Returns the layout of a mesh that may lack axes of one rank."""
    sizes = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))
    return Layout(*(sizes.get(axis, 1) for axis in PARAMETER_AXES))


def _cut(parameter: torch.Tensor) -> Cut:
    """Returns how a parameter is cut."""
    assert isinstance(parameter, DTensor)
    dims = {
        axis: placement.dim
        for axis, placement in zip(parameter.device_mesh.mesh_dim_names or (), parameter.placements, strict=True)
        if isinstance(placement, Shard)
    }
    replicate, shard, tp = (dims.get(axis) for axis in PARAMETER_AXES)
    return Cut(tuple(parameter.shape), (replicate, shard, tp))


def _group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """Returns a group that has all ranks of this replica: that of a single axis if the other has one rank, else all
    ranks."""
    sizes = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))
    axes = [axis for axis in PARAMETER_AXES[1:] if axis in sizes]
    parted = [axis for axis in axes if sizes[axis] > 1]
    if len(parted) > 1:
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    return mesh.get_group((parted or axes)[0])
