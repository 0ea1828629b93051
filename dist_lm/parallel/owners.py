"""Muon by owners: decides which rank orthogonalises which matrices. Imports no torch.

A matrix can only be orthogonalised whole, and ranks hold shards of it. So every matrix has one owner among the ranks
that hold a shard: they send it theirs, and it sends back to each its part of the step. Each attention head is a matrix
of its own; heads of one parameter stay together as long as they cost no more than the costliest single matrix.

Replicas (dp_replicate) hold the same shards. Either each of them has its own owners, and nothing is sent between them.
Or they share the work: an owner serves its replica, and every rank gives the parts that it got to its copies in the
other replicas. That pays where arithmetic is dear beside a message.
"""

import heapq
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from dist_lm.config.model import ModelConfig
from dist_lm.model.size import Shape, is_matrix, is_trained
from dist_lm.parallel.layout import PARAMETER_AXES, Layout, Placement, placements

ITERATIONS = 5  # of Newton-Schulz, in `training.muon`
BUCKET_BYTES = 256 << 20  # most bytes of whole matrices that a rank owns in a bucket

# FLOPs of a GPU in the time that one byte takes to come from another replica: 0.7 of 989 TFLOP/s beside 50 GB/s (H100).
GPU_FLOPS_PER_BYTE = 14_000.0
# CPUs of different kinds round differently. Two of them must not compute the same step, or replicas would drift apart:
# so a message costs nothing, and replicas always share the work.
CPU_FLOPS_PER_BYTE = 0.0

Box = tuple[tuple[int, int], ...]
"""(start, stop) in each dimension of a parameter."""


@dataclass(frozen=True)
class Cut:
    """How one parameter of padded `shape`, (I, J) or (N, I, J) for N matrices, is cut on the mesh."""

    shape: Shape
    dims: tuple[
        int | None, int | None, int | None
    ]  # dimension that each of PARAMETER_AXES cuts; None: the axis has copies

    @property
    def n_matrices(self) -> int:
        """Number of matrices."""
        return math.prod(self.shape[:-2])

    @property
    def matrix_size(self) -> int:
        """Entries of one matrix."""
        return math.prod(self.shape[-2:])

    @property
    def matrix_flops(self) -> int:
        """FLOPs of `training.muon.newton_schulz` of one matrix."""
        smaller, larger = sorted(self.shape[-2:])
        return ITERATIONS * (4 * smaller**2 * larger + 2 * smaller**3)

    @property
    def matrix_flops_of_squares(self) -> int:
        """FLOPs of `training.muon.newton_schulz_of_squares` of one matrix."""
        smaller, larger = sorted(self.shape[-2:])
        return 4 * smaller**2 * larger + (2 * ITERATIONS + 6 * (ITERATIONS - 1)) * smaller**3


def cut_of(placement: Placement) -> Cut:
    """Returns how a parameter is cut under its placement."""
    return Cut(placement.padded, (None, placement.fsdp_dim, placement.tp_dim))


@dataclass(frozen=True)
class Unit:
    """Consecutive matrices of one parameter, which have one owner."""

    parameter: int  # number of the parameter in the plan
    first: int  # number of the first matrix in the parameter
    end: int
    owner: int  # place in a replica, see `Plan`
    replica: int | None  # that of the owner; None: each replica has an owner at this place
    bucket: int  # units of one bucket are sent together

    @property
    def n_matrices(self) -> int:
        """Number of matrices."""
        return self.end - self.first


@dataclass(frozen=True)
class Plan:
    """Who owns what.

    A place is the number of a rank in its replica: rank r has the place r % n_places, because dp_replicate is the
    outermost axis.
    """

    layout: Layout
    cuts: tuple[Cut, ...]
    shares_replicas: bool
    units: tuple[Unit, ...]

    @property
    def n_places(self) -> int:
        """Number of ranks of a replica."""
        return self.layout.dp_shard * self.layout.tp

    @property
    def n_buckets(self) -> int:
        """Number of rounds of messages."""
        return 1 + max((unit.bucket for unit in self.units), default=-1)

    def piece(self, unit: Unit, place: int) -> Box:
        """Returns which entries of a unit the rank at a place holds, in coordinates of the parameter; maybe none."""
        return _piece(self.cuts[unit.parameter], unit.first, unit.end, self.layout, place)

    def is_source(self, unit: Unit, place: int) -> bool:
        """Returns whether the owner gets this place's piece: of copies on tp ranks, the one that lies with it."""
        cut = self.cuts[unit.parameter]
        return _copy(cut, self.layout, place) == _copy(cut, self.layout, unit.owner)

    def flops(self) -> list[int]:
        """Returns the FLOPs of each rank, or of the first replica if all replicas do the same."""
        loads: Counter[int] = Counter()
        for unit in self.units:
            loads[(unit.replica or 0) * self.n_places + unit.owner] += unit.n_matrices * self.matrix_flops(unit)
        n_ranks = self.n_places * (self.layout.dp_replicate if self.shares_replicas else 1)
        return [loads[rank] for rank in range(n_ranks)]

    def matrix_flops(self, unit: Unit) -> int:
        """Returns the FLOPs of one matrix of a unit."""
        return self.cuts[unit.parameter].matrix_flops

    def sent(self, rank: int) -> int:
        """Returns how many entries of matrices and steps a rank sends in a step to other ranks."""
        replica, place = divmod(rank, self.n_places)
        n_sent = 0
        n_given: Counter[tuple[int, int | None]] = Counter()  # by bucket and replica of the owner
        for unit in self.units:
            n_own = size_of(self.piece(unit, place))
            n_given[unit.bucket, unit.replica] += n_own
            if unit.replica not in (None, replica):
                continue
            if unit.owner != place:
                n_sent += n_own * self.is_source(unit, place)
                continue
            cut = self.cuts[unit.parameter]
            n_sent += unit.n_matrices * cut.matrix_size * self.n_places // _n_cuts(cut, self.layout) - n_own

        if self.shares_replicas:
            # All-gather of equal parts over the replicas: the largest part decides.
            for bucket in range(self.n_buckets):
                largest = max(n_given[bucket, other] for other in range(self.layout.dp_replicate))
                n_sent += largest * (self.layout.dp_replicate - 1)
        return n_sent


@dataclass(frozen=True)
class MessageCosts:
    """Cost of an entry of a matrix in a message, on a kind of device."""

    item_bytes: int
    flops_per_byte: float  # FLOPs in the time that one byte takes to come from another replica

    @property
    def bucket_entries(self) -> int:
        """Most entries of whole matrices that a rank owns in a bucket."""
        return BUCKET_BYTES // self.item_bytes

    @property
    def flops_per_entry(self) -> float:
        """FLOPs in the time that one entry takes to come from another replica."""
        return self.flops_per_byte * self.item_bytes


def message_costs(device: str) -> MessageCosts:
    """Returns the costs on `cuda`, where messages are bf16, or `cpu`."""
    if device == "cuda":
        return MessageCosts(2, GPU_FLOPS_PER_BYTE)
    return MessageCosts(4, CPU_FLOPS_PER_BYTE)


def matrix_cuts(model: ModelConfig, layout: Layout) -> tuple[Cut, ...]:
    """Returns how the matrices that are trained are cut, in the order of the model's parameters."""
    return tuple(
        cut_of(placement)
        for name, placement in placements(model, layout).items()
        if is_matrix(name) and is_trained(name, model)
    )


def plan_of_model(model: ModelConfig, layout: Layout, device: str) -> Plan:
    """Returns the plan for all matrices of a model that are trained, in the order of its parameters.

    Args:
        device: cuda | cpu.
    """
    costs = message_costs(device)
    return make_plan(matrix_cuts(model, layout), layout, costs.bucket_entries, costs.flops_per_entry)


def make_plan(cuts: Sequence[Cut], layout: Layout, bucket_entries: int, flops_per_entry: float) -> Plan:
    """Returns the plan for parameters that are cut in these ways; the same on every rank.

    Args:
        bucket_entries: most entries of the units that one rank owns in a bucket (at least one unit).
        flops_per_entry: see `sharing_pays`.
    """
    cuts = tuple(cuts)
    return _plan(cuts, layout, bucket_entries, sharing_pays(cuts, layout, flops_per_entry))


def sharing_pays(cuts: tuple[Cut, ...], layout: Layout, flops_per_entry: float) -> bool:
    """Returns whether replicas share the work: whether they save more time than they need to pass on the steps.

    Args:
        flops_per_entry: arithmetic of a rank in the time that it takes to receive an entry of a step from another
            replica; 0: replicas always share the work.
    """
    if layout.dp_replicate == 1 or not cuts:
        return False

    n_places = layout.dp_shard * layout.tp
    n_received = sum(cut.n_matrices * cut.matrix_size for cut in cuts) // n_places
    saved = heaviest_load(cuts, n_places).flops - heaviest_load(cuts, layout.world_size).flops
    return saved >= flops_per_entry * n_received


@dataclass(frozen=True)
class Load:
    """The work of one owner."""

    flops: int
    flops_of_squares: int  # by the way of CPUs
    entries: int  # of its matrices


@cache
def heaviest_load(cuts: tuple[Cut, ...], n_ranks: int) -> Load:
    """Returns the work of the busiest of `n_ranks` owners that all hold a part of every matrix: as `_plan` shares it,
    but without its holders, in microseconds a unit."""
    units = [(end - first, cuts[number]) for number, first, end in _units(cuts)]
    loads = [(0, 0, 0)] * n_ranks
    for n_matrices, cut in sorted(units, key=lambda unit: -unit[0] * unit[1].matrix_flops):
        flops, flops_of_squares, entries = loads[0]
        flops += n_matrices * cut.matrix_flops
        flops_of_squares += n_matrices * cut.matrix_flops_of_squares
        heapq.heapreplace(loads, (flops, flops_of_squares, entries + n_matrices * cut.matrix_size))
    return Load(*max(loads))


def _plan(cuts: tuple[Cut, ...], layout: Layout, bucket_entries: int, shares_replicas: bool) -> Plan:
    """Balances FLOPs: the costliest unit first, each to the least loaded of its holders (Graham 1969, LPT)."""
    units = _units(cuts)
    cost_of = [(end - first) * cuts[number].matrix_flops for number, first, end in units]
    n_places = layout.dp_shard * layout.tp
    n_ranks = layout.world_size if shares_replicas else n_places

    loads = [0] * n_ranks
    entries = [0] * n_ranks
    # A replica gives all that it owns to the others, so replicas are balanced too.
    replica_entries = [0] * layout.dp_replicate
    planned: dict[int, Unit] = {}
    for index in sorted(range(len(units)), key=lambda index: (-cost_of[index], index)):
        number, first, end = units[index]
        holders = _holders(cuts[number], first, end, layout, n_ranks)
        rank = min(holders, key=lambda rank: (loads[rank], replica_entries[rank // n_places], entries[rank], rank))
        replica, place = divmod(rank, n_places)
        bucket = entries[rank] // bucket_entries
        planned[index] = Unit(number, first, end, place, replica if shares_replicas else None, bucket)
        loads[rank] += cost_of[index]
        entries[rank] += (end - first) * cuts[number].matrix_size
        replica_entries[replica] += (end - first) * cuts[number].matrix_size
    return Plan(layout, cuts, shares_replicas, tuple(planned[index] for index in range(len(units))))


def _units(cuts: Sequence[Cut]) -> list[tuple[int, int, int]]:
    """Returns (parameter, first matrix, end) of all units."""
    costliest = max((cut.matrix_flops for cut in cuts), default=0)
    units = []
    for number, cut in enumerate(cuts):
        together = max(1, costliest // cut.matrix_flops)
        for first in range(0, cut.n_matrices, together):
            units.append((number, first, min(first + together, cut.n_matrices)))
    return units


def pieces(plan: Plan, unit: Unit) -> Iterator[tuple[int, Box]]:
    """Yields (place, piece) of every place of a replica that holds a part of a unit."""
    for place in range(plan.n_places):
        box = plan.piece(unit, place)
        if size_of(box):
            yield place, box


def size_of(box: Box) -> int:
    """Returns the number of entries of a box."""
    return math.prod(stop - start for start, stop in box)


def _n_cuts(cut: Cut, layout: Layout) -> int:
    """Returns in how many pieces the mesh cuts a parameter; other ranks hold copies."""
    return math.prod(
        getattr(layout, axis) for axis, dim in zip(PARAMETER_AXES, cut.dims, strict=True) if dim is not None
    )


def _coordinates(layout: Layout, rank: int) -> tuple[int, int, int]:
    """Returns the position of a rank on each of PARAMETER_AXES; a place is taken for a rank of the first replica."""
    replica, place = divmod(rank, layout.dp_shard * layout.tp)
    return replica, *divmod(place, layout.tp)


@cache
def _copy(cut: Cut, layout: Layout, place: int) -> tuple[int, ...]:
    """Returns the position of a place on the axes along which the parameter has copies."""
    position = zip(_coordinates(layout, place), cut.dims, strict=True)
    return tuple(index for index, dim in position if dim is None)


@cache
def _box(cut: Cut, layout: Layout, place: int) -> Box:
    """Returns the shard of a place, cut as `torch.chunk` cuts: shards of equal length, the last ones shorter."""
    box = [(0, size) for size in cut.shape]
    for axis, index, dim in zip(PARAMETER_AXES, _coordinates(layout, place), cut.dims, strict=True):
        if dim is None:
            continue
        size = cut.shape[dim]
        length = -(-size // getattr(layout, axis))
        start = min(index * length, size)
        box[dim] = (start, min(start + length, size))
    return tuple(box)


def _piece(cut: Cut, first: int, end: int, layout: Layout, place: int) -> Box:
    box = _box(cut, layout, place)
    if len(box) == 2:
        return box
    (start, stop), *rest = box
    start, stop = max(start, first), min(stop, end)
    return ((start, max(start, stop)), *rest)


@cache
def _holders(cut: Cut, first: int, end: int, layout: Layout, n_ranks: int) -> tuple[int, ...]:
    """Returns which of the first ranks hold a part of the matrices."""
    return tuple(rank for rank in range(n_ranks) if size_of(_piece(cut, first, end, layout, rank)))
