"""Muon: the update of a matrix is its momentum made orthogonal, so a step moves all singular directions equally.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". Muon steps the matrices inside blocks;
AdamW steps embedding, head, norms and biases. NorMuon (Li et al. 2025, arXiv 2510.05491) then divides the update of
each neuron by the root of its mean square over the steps.

A matrix is orthogonalised whole, by one rank, its owner (`parallel.owners`): ranks send it their shards, and it sends
each its part of the step.

Dimensions: N matrices of one shape, I rows, J columns.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dist_lm.parallel.gloo import gather_by_exchange
from dist_lm.parallel.layout import AXES, Layout
from dist_lm.parallel.mesh import lacks_bf16
from dist_lm.parallel.owners import (
    BUCKET_BYTES,
    CPU_FLOPS_PER_BYTE,
    GPU_FLOPS_PER_BYTE,
    ITERATIONS,
    Box,
    Cut,
    Unit,
    make_plan,
    pieces,
    size_of,
)
from dist_lm.parallel.values import shard_of

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # steepest at 0: singular values from 0.01 to 1 become about 0.7 to 1.2
EPSILON = 1e-7
VARIANCE_EPSILON = 1e-8
STACK_BYTES = 256 << 20  # most bytes of whole matrices that a single rank handles at once


@dataclass(frozen=True)
class Arithmetic:
    """How a kind of device orthogonalises, and how much at once."""

    dtype: torch.dtype | None  # of matrices, also in messages; None: that of the gradients
    by_squares: bool  # whether it takes `newton_schulz_of_squares`
    flops_per_byte: float  # FLOPs in the time that one byte takes to come from another replica
    bucket_bytes: int = BUCKET_BYTES  # most bytes of matrices that a rank owns in one exchange


CPU = Arithmetic(None, True, CPU_FLOPS_PER_BYTE)
GPU = Arithmetic(torch.bfloat16, False, GPU_FLOPS_PER_BYTE)
GPU_WITHOUT_BF16 = Arithmetic(None, False, 1_000.0)  # V100: 0.7 of 16 TFLOP/s beside 12.5 GB/s


def arithmetic_of(device: torch.device) -> Arithmetic:
    """Returns how a device orthogonalises."""
    if device.type != "cuda":
        return CPU
    return GPU_WITHOUT_BF16 if lacks_bf16(device) else GPU


def orthogonal(matrices_NIJ: torch.Tensor, arithmetic: Arithmetic | None = None) -> torch.Tensor:
    """Returns matrices with the same singular vectors and singular values of about 0.7 to 1.2, (N, I, J), in the same
    dtype. The input stays as it is.

    Args:
        arithmetic: None: that of the device of the matrices.
    """
    arithmetic = arithmetic or arithmetic_of(matrices_NIJ.device)
    x_NIJ = matrices_NIJ.to(arithmetic.dtype or matrices_NIJ.dtype)

    # x x^T is smaller for a wide matrix.
    is_tall = x_NIJ.shape[-2] > x_NIJ.shape[-1]
    if is_tall:
        x_NIJ = x_NIJ.mT

    x_NIJ = x_NIJ / (x_NIJ.norm(dim=(-2, -1), keepdim=True) + EPSILON)
    x_NIJ = newton_schulz_of_squares(x_NIJ) if arithmetic.by_squares else newton_schulz(x_NIJ)

    if is_tall:
        x_NIJ = x_NIJ.mT
    return x_NIJ.to(matrices_NIJ.dtype)


def newton_schulz(x_NIJ: torch.Tensor) -> torch.Tensor:
    """Returns x after ITERATIONS times x <- (a + b s + c s^2) x with s = x x^T; the Frobenius norm of x must be at most
    1."""
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        # Sums inside products: fewer passes over the matrices, and fewer roundings in bf16.
        square_NII = x_NIJ @ x_NIJ.mT
        factor_NII = torch.baddbmm(square_NII, square_NII, square_NII, beta=b, alpha=c)
        x_NIJ = torch.baddbmm(x_NIJ, factor_NII, x_NIJ, beta=a)
    return x_NIJ


def newton_schulz_of_squares(x_NIJ: torch.Tensor) -> torch.Tensor:
    """Returns the same as `newton_schulz` with a single product with x: q = a + b s + c s^2 turns s into q s q, because
    all of these matrices commute.

    It takes half the work if J is four times I. It squares the condition number of x, which fp32 allows and bf16 does
    not.
    """
    a, b, c = NEWTON_SCHULZ

    def factor(square_NII: torch.Tensor) -> torch.Tensor:
        q_NII = torch.baddbmm(square_NII, square_NII, square_NII, beta=b, alpha=c)
        q_NII.diagonal(dim1=-2, dim2=-1).add_(a)
        return q_NII

    square_NII = x_NIJ @ x_NIJ.mT
    product_NII = factor_NII = factor(square_NII)
    for _ in range(ITERATIONS - 1):
        square_NII = factor_NII @ square_NII @ factor_NII
        factor_NII = factor(square_NII)
        product_NII = factor_NII @ product_NII
    return product_NII @ x_NIJ


@dataclass(frozen=True)
class Variance:
    """NorMuon of one parameter."""

    # Average over the steps of the sum of squares of each neuron's update, of `neuron_shape`, on `device_of_whole`.
    neuron_sq: torch.Tensor
    beta: float

    def normalise_(self, step: torch.Tensor) -> None:
        """Moves `neuron_sq` towards the squares of the update, then divides the update of each neuron by its root; both
        in place.

        The norm of each matrix stays, as in the authors' normuon.py and in nanochat; algorithm 1 of Li et al. 2025 sets
        it to 0.2 sqrt(I J). The sum of squares, where they have the mean, cancels out.

        Args:
            step: whole orthogonal directions of the parameter; entries outside `neuron_sq` are padding and 0.
        """
        input_dim = -1 if self.neuron_sq.shape[-1] == 1 else -2
        # Squares in the dtype of `neuron_sq`, also of a step in bf16.
        lengths = torch.linalg.vector_norm(step, dim=input_dim, keepdim=True, dtype=self.neuron_sq.dtype)
        squares = lengths.square()
        logical = tuple(slice(size) for size in self.neuron_sq.shape)
        self.neuron_sq.lerp_(squares[logical], 1 - self.beta)

        factor = torch.zeros_like(squares)
        factor[logical] = 1 / (self.neuron_sq.sqrt() + VARIANCE_EPSILON)

        # The matrix keeps its norm, so a learning rate means the same with and without NorMuon.
        norm = squares.sum(dim=(-2, -1), keepdim=True).sqrt()
        divided_norm = (squares * factor.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
        step.mul_(factor * (norm / (divided_norm + VARIANCE_EPSILON)))


@dataclass(frozen=True)
class Stepped:
    """A parameter that Muon steps, and what its step depends on."""

    parameter: torch.Tensor  # a DTensor, or a plain tensor if every rank holds all of it
    gradient: torch.Tensor  # this rank's shard, with padding
    average: torch.Tensor  # this rank's shard of the momentum
    momentum: float
    variance: Variance | None  # NorMuon

    def direction(self, part: slice = slice(None)) -> torch.Tensor:
        """Returns Nesterov's momentum for a part of this rank's shard, along its first dimension."""
        return self.gradient[part].lerp(self.average[part], self.momentum)


def orthogonal_steps(
    stepped: Sequence[Stepped], owners: "Owners | None" = None
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yields (number in `stepped`, a part of this rank's shard of the parameter, the step of that part), until every
    entry of every shard was yielded once; with owners it is collective.

    The step is the orthogonalised direction. Every attention head has a matrix per projection. Variances are updated:
    with owners, those of a rank's own matrices alone.

    Args:
        owners: of these parameters; None: this rank holds all of each parameter.
    """
    if owners is not None:
        yield from owners.steps(stepped)
        return

    # Parameters of one shape go through in stacks: few kernels.
    for numbers in _stacks(stepped):
        shards = [shard_of(stepped[number].parameter) for number in numbers]
        directions = torch.stack([stepped[number].direction() for number in numbers])
        directions = directions.to(device_of_whole(stepped[numbers[0]].parameter))
        stack = orthogonal(directions.view(-1, *directions.shape[-2:])).view_as(directions)

        for number, shard, step in zip(numbers, shards, stack, strict=True):
            if (variance := stepped[number].variance) is not None:
                variance.normalise_(step)
            yield number, shard, step.to(shard.device)


def _stacks(stepped: Sequence[Stepped]) -> Iterator[list[int]]:
    """Yields numbers of parameters with the same shape, in groups of at most `STACK_BYTES` (at least one)."""
    alike: dict[torch.Size, list[int]] = {}
    for number, moved in enumerate(stepped):
        alike.setdefault(moved.parameter.shape, []).append(number)
    for shape, numbers in alike.items():
        # Whole fp32 matrices: a stack must not fill the memory that activations have left.
        stack_size = max(1, STACK_BYTES // (4 * math.prod(shape)))
        yield from (numbers[start : start + stack_size] for start in range(0, len(numbers), stack_size))


Pieces = list[list[tuple[Unit, Box]]]
"""Pieces of units, for each rank of a group."""


@dataclass(frozen=True)
class Message:
    """An exchange under way: parts of a flat tensor from every rank of a group."""

    received: torch.Tensor
    sent: torch.Tensor  # must live until the exchange is complete
    work: Any

    def wait(self) -> torch.Tensor:
        """Waits for the exchange, on a GPU in its stream, and returns what has come."""
        if self.work is not None:
            self.work.wait()
        return self.received


@dataclass
class Bucket:
    """The units that are sent together, as this rank sees them; pieces are listed by rank of the replica."""

    owned: list[Unit]  # by this rank
    given: Pieces  # this rank's pieces that an owner needs
    taken: Pieces  # pieces of this rank's own units
    returned: Pieces  # pieces of the steps of this rank's own units
    received: Pieces  # pieces of the steps that an owner returns to this rank
    shared: Pieces  # this rank's pieces of all steps, by replica of the owner; empty if replicas share no work


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
        for unit in self.plan.units:
            if unit.bucket != number:
                continue
            box = self.plan.piece(unit, self.place)
            if unit.replica is not None and size_of(box):
                bucket.shared[unit.replica].append((unit, box))
            if unit.replica not in (None, self.replica):
                continue

            owner = peer_at[unit.owner]
            if size_of(box):
                bucket.received[owner].append((unit, box))
                if self.plan.is_source(unit, self.place):
                    bucket.given[owner].append((unit, box))
            if unit.owner == self.place:
                bucket.owned.append(unit)
                for place, piece in pieces(self.plan, unit):
                    bucket.returned[peer_at[place]].append((unit, piece))
                    if self.plan.is_source(unit, place):
                        bucket.taken[peer_at[place]].append((unit, piece))
        return bucket

    def _is_in_replica(self, rank: int) -> bool:
        return rank // self.plan.n_places == self.replica

    def steps(self, stepped: Sequence[Stepped]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yields what `orthogonal_steps` yields (collective)."""
        gathering = self._gather(stepped, self.buckets[0])
        returning: tuple[Bucket, Message] | None = None
        for bucket, following in zip(self.buckets, [*self.buckets[1:], None], strict=True):
            # All ranks send in the same order: the next bucket before the steps of this one.
            gathered = gathering.wait()
            if following is not None:
                gathering = self._gather(stepped, following)
            steps = self._orthogonal(stepped, bucket, gathered)
            del gathered
            message = self._send_back(bucket, steps)
            if returning is not None:
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
        self, stepped: Sequence[Stepped], bucket: Bucket, gathered: torch.Tensor
    ) -> dict[Unit, torch.Tensor]:
        """Returns the steps of the units that this rank owns, each (n, I, J) or (I, J)."""
        # Matrices of one shape are computed together.
        alike: dict[tuple[int, ...], list[Unit]] = {}
        for unit in bucket.owned:
            alike.setdefault(self.plan.cuts[unit.parameter].shape[-2:], []).append(unit)
        stacks: dict[tuple[int, ...], torch.Tensor] = {}
        wholes: dict[Unit, torch.Tensor] = {}
        for shape, units in alike.items():
            stacks[shape] = gathered.new_empty(sum(unit.end - unit.first for unit in units), *shape)
            wholes |= self._units(stacks[shape], units)
        for (unit, box), part in _parts(bucket.taken, gathered):
            wholes[unit][_within(unit, box)] = part
        del wholes

        steps: dict[Unit, torch.Tensor] = {}
        for shape, units in alike.items():
            steps |= self._units(orthogonal(stacks.pop(shape), self.arithmetic), units)
        for unit, step in steps.items():
            if (variance := stepped[unit.parameter].variance) is not None:
                neuron_sq = variance.neuron_sq
                if neuron_sq.dim() == 3:
                    neuron_sq = neuron_sq[unit.first : unit.end]
                replace(variance, neuron_sq=neuron_sq).normalise_(step)
        return steps

    def _units(self, stack_NIJ: torch.Tensor, units: Sequence[Unit]) -> dict[Unit, torch.Tensor]:
        """Returns the part of a stack that belongs to each of its units, in the shape of its parameter."""
        parts = stack_NIJ.split([unit.end - unit.first for unit in units])
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
        own = torch.zeros(longest, dtype=self.dtype, device=self.device)
        step_of = dict(_parts(bucket.received, received))
        for piece, target in _parts([bucket.shared[self.replica]], own):
            target.copy_(step_of[piece])
        del step_of

        gathered = torch.empty(len(bucket.shared) * longest, dtype=self.dtype, device=self.device)
        if dist.get_backend(self.replicas) == dist.Backend.GLOO:
            gather_by_exchange(gathered, own, self.replicas)
        else:
            dist.all_gather_into_tensor(gathered, own, group=self.replicas)
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
        own = [torch.zeros_like(neuron_sq) for neuron_sq in stepped_variances]
        for unit in self.plan.units:
            # Replicas that share no work have computed the same: the first one says what all have.
            if unit.owner == self.place and (unit.replica or 0) == self.replica:
                rows = slice(unit.first, unit.end) if own[unit.parameter].dim() == 3 else slice(None)
                own[unit.parameter][rows] = stepped_variances[unit.parameter][rows]

        flat = torch.cat([neuron_sq.flatten() for neuron_sq in own])
        dist.all_reduce(flat)
        sums = flat.split([neuron_sq.numel() for neuron_sq in own])
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
    """Returns the owners of these parameters; None if this rank is alone, and owns all of them."""
    if not parameters or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return Owners(parameters, arithmetic)


def _layout(mesh: DeviceMesh) -> Layout:
    """Returns the layout of a mesh that may lack axes of one rank."""
    sizes = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))
    return Layout(*(sizes.get(axis, 1) for axis in AXES))


def _cut(parameter: torch.Tensor) -> Cut:
    """Returns how a parameter is cut."""
    assert isinstance(parameter, DTensor)
    dims = {
        axis: placement.dim
        for axis, placement in zip(parameter.device_mesh.mesh_dim_names or (), parameter.placements, strict=True)
        if isinstance(placement, Shard)
    }
    replicate, shard, tp = (dims.get(axis) for axis in AXES)
    return Cut(tuple(parameter.shape), (replicate, shard, tp))


def _group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """Returns a group that has all ranks of this replica: that of a single axis if the other has one rank, else all
    ranks."""
    sizes = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))
    axes = [axis for axis in AXES[1:] if axis in sizes]
    parted = [axis for axis in axes if sizes[axis] > 1]
    if len(parted) > 1:
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    return mesh.get_group((parted or axes)[0])


def device_of_whole(parameter: torch.Tensor) -> torch.device | str:
    """Returns the device on which `orthogonal_steps` computes: the GPU of the mesh also for a shard in host memory."""
    if isinstance(parameter, DTensor):
        return parameter.device_mesh.device_type
    return parameter.device
