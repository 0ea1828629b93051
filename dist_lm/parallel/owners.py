"""Muon by owners: decides which rank orthogonalises which matrices. Imports no torch.

A matrix can only be orthogonalised whole, and ranks hold shards of it. So every matrix has one owner among the ranks
that hold a shard: they send it theirs, and it sends back to each its part of the step. Each attention head is a matrix
of its own; heads of one parameter stay together as long as they cost no more than the costliest single matrix.

Replicas (dp_replicate) hold the same shards. Either each of them has its own owners, and nothing is sent between them.
Or they share the work: an owner serves its replica, and every rank gives the parts that it got to its copies in the
other replicas. That pays where arithmetic is dear beside a message.

Equal matrices that owners do not divide evenly would leave some owners with one more. There, on GPUs, a rank with less
to do takes the first iterations of a matrix and hands it on to its owner (McNaughton 1959, "Scheduling with deadlines
and loss functions": work that may change hands is balanced as evenly as its longest piece allows).
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from dist_lm.config.model import ModelConfig
from dist_lm.model.size import Shape, is_matrix, is_trained
from dist_lm.parallel.layout import PARAMETER_AXES, Layout, Placement, placements

ITERATIONS = 5  # iterations of Newton-Schulz in `training.muon`
BUCKET_BYTES = 256 << 20  # most bytes of whole matrices that a rank owns in a bucket
LEVEL = 1.1  # the busiest rank is relieved until it has this many times the mean load, or the costliest matrix

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
    # the dimension that each of PARAMETER_AXES cuts; None: the axis has copies
    dims: tuple[int | None, int | None, int | None]

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
class Start:
    """The first iterations of a unit, in bucket 0, by a rank that has less to do than the owner."""

    place: int  # in the owner's replica
    n_iterations: int  # from 1 to ITERATIONS - 1


@dataclass(frozen=True)
class Unit:
    """Consecutive matrices of one parameter, which have one owner."""

    parameter: int  # number of the parameter in the plan
    first: int  # number of the first matrix in the parameter
    end: int
    owner: int  # place in a replica, see `Plan`
    replica: int | None  # the owner's replica; None: each replica has an owner at this place
    bucket: int  # units of one bucket are sent together
    start: Start | None = None  # None: the owner does all iterations

    @property
    def n_matrices(self) -> int:
        """Number of matrices."""
        return self.end - self.first

    @property
    def gatherer(self) -> int:
        """The place that gets the shards."""
        return self.owner if self.start is None else self.start.place


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
        """Returns whether the gatherer gets this place's piece: of copies on tp ranks, the one that lies with it."""
        cut = self.cuts[unit.parameter]
        return _copy(cut, self.layout, place) == _copy(cut, self.layout, unit.gatherer)

    def whole(self, unit: Unit) -> Box:
        """Returns all entries of a unit, in coordinates of the parameter."""
        shape = self.cuts[unit.parameter].shape
        if len(shape) == 2:
            return tuple((0, size) for size in shape)
        return ((unit.first, unit.end), *((0, size) for size in shape[1:]))

    def flops(self) -> list[int]:
        """Returns the FLOPs of each rank, or of the first replica if all replicas do the same."""
        loads: Counter[int] = Counter()
        for unit in self.units:
            first_rank = (unit.replica or 0) * self.n_places
            flops = unit.n_matrices * self.matrix_flops(unit)
            if unit.start is not None:
                started = flops // ITERATIONS * unit.start.n_iterations
                loads[first_rank + unit.start.place] += started
                flops -= started
            loads[first_rank + unit.owner] += flops
        n_ranks = self.n_places * (self.layout.dp_replicate if self.shares_replicas else 1)
        return [loads[rank] for rank in range(n_ranks)]

    def matrix_flops(self, unit: Unit) -> int:
        """Returns the FLOPs of one matrix of a unit."""
        return self.cuts[unit.parameter].matrix_flops

    def sent(self, rank: int) -> int:
        """Returns how many entries of matrices and steps a rank sends in a step to other ranks."""
        replica, place = divmod(rank, self.n_places)
        n_sent = 0
        n_given: Counter[tuple[int, int | None]] = Counter()  # (bucket, replica of the owner) -> entries
        for unit in self.units:
            n_own = size_of(self.piece(unit, place))
            n_given[unit.bucket, unit.replica] += n_own
            if unit.replica not in (None, replica):
                continue
            if unit.gatherer != place:
                n_sent += n_own * self.is_source(unit, place)
            if unit.start is not None and unit.start.place == place:
                n_sent += size_of(self.whole(unit))
            if unit.owner == place:
                cut = self.cuts[unit.parameter]
                n_sent += size_of(self.whole(unit)) * self.n_places // _n_cuts(cut, self.layout) - n_own

        if self.shares_replicas:
            # All-gather of equal parts over the replicas: the largest part decides.
            for bucket in range(self.n_buckets):
                largest = max(n_given[bucket, replica] for replica in range(self.layout.dp_replicate))
                n_sent += largest * (self.layout.dp_replicate - 1)
        return n_sent


@dataclass(frozen=True)
class MessageCosts:
    """Cost of an entry of a matrix in a message, on a kind of device."""

    item_bytes: int
    flops_per_byte: float  # FLOPs in the time that one byte takes to come from another replica
    hands_on: bool  # whether a rank may hand on a matrix after some iterations; not by the way of CPUs

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
        return MessageCosts(2, GPU_FLOPS_PER_BYTE, hands_on=True)
    return MessageCosts(4, CPU_FLOPS_PER_BYTE, hands_on=False)


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
    cuts = matrix_cuts(model, layout)
    return make_plan(cuts, layout, costs.bucket_entries, costs.flops_per_entry, hands_on=costs.hands_on)


def make_plan(
    cuts: Sequence[Cut], layout: Layout, bucket_entries: int, flops_per_entry: float, *, hands_on: bool = False
) -> Plan:
    """Returns the plan for parameters that are cut in these ways; the same on every rank.

    Args:
        bucket_entries: most entries of the units that one rank owns in a bucket (at least one unit).
        flops_per_entry: see `sharing_pays`.
        hands_on: whether ranks may hand on matrices after some iterations, where that saves more than it costs.
    """
    cuts = tuple(cuts)
    shares_replicas = sharing_pays(cuts, layout, flops_per_entry)
    return _plan(cuts, layout, bucket_entries, shares_replicas, flops_per_entry if hands_on else math.inf)


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
    flops_of_squares: int  # the same by the arithmetic of CPUs
    entries: int  # entries of its matrices
    n_more_buckets: int  # 2 if matrices are handed on: those of starts and of what owners finish


@cache
def heaviest_load(cuts: tuple[Cut, ...], n_ranks: int, handing_on: float = math.inf) -> Load:
    """Returns the work of the busiest of `n_ranks` owners that all hold a part of every matrix.

    It shares the work as `_plan` does, but knows no holders and replicas, so it takes microseconds for each unit.

    Args:
        handing_on: FLOPs that handing on an entry costs; infinite: nothing is handed on.
    """
    units = [(end - first, cuts[number]) for number, first, end in _units(cuts)]
    cost_of = [n_matrices * cut.matrix_flops for n_matrices, cut in units]
    size_of_unit = [n_matrices * cut.matrix_size for n_matrices, cut in units]

    loads = [(0, 0, 0, rank) for rank in range(n_ranks)]
    owned: list[list[int]] = [[] for _ in range(n_ranks)]
    for index in sorted(range(len(units)), key=lambda index: -cost_of[index]):
        n_matrices, cut = units[index]
        flops, flops_of_squares, entries, rank = loads[0]
        flops += cost_of[index]
        flops_of_squares += n_matrices * cut.matrix_flops_of_squares
        heapq.heapreplace(loads, (flops, flops_of_squares, entries + size_of_unit[index], rank))
        owned[rank].append(index)

    flops_of = {rank: flops for flops, _, _, rank in loads}
    flops_of_ranks = [flops_of[rank] for rank in range(n_ranks)]
    starts, flops = _starts(flops_of_ranks, owned, cost_of, size_of_unit, lambda _: range(n_ranks), n_ranks, handing_on)
    _, flops_of_squares, entries, _ = max(loads)
    return Load(flops, flops_of_squares, entries, 2 if starts else 0)


def _plan(
    cuts: tuple[Cut, ...], layout: Layout, bucket_entries: int, shares_replicas: bool, flops_per_entry: float
) -> Plan:
    """Balances FLOPs: the costliest unit first, each to the least loaded of its holders (Graham 1969, LPT).

    Args:
        flops_per_entry: FLOPs that handing on an entry costs; infinite: nothing is handed on.
    """
    units = _units(cuts)
    cost_of = [(end - first) * cuts[number].matrix_flops for number, first, end in units]
    size_of_unit = [(end - first) * cuts[number].matrix_size for number, first, end in units]
    n_places = layout.dp_shard * layout.tp
    n_ranks = layout.world_size if shares_replicas else n_places

    def holders_of(index: int) -> Sequence[int]:
        number, first, end = units[index]
        return _holders(cuts[number], first, end, layout, n_ranks)

    loads = [0] * n_ranks
    entries = [0] * n_ranks
    # A replica gives all that it owns to the others, so replicas are balanced too.
    replica_entries = [0] * layout.dp_replicate
    owned: list[list[int]] = [[] for _ in range(n_ranks)]  # units of each rank, the costliest first
    for index in sorted(range(len(units)), key=lambda index: (-cost_of[index], index)):
        rank = min(
            holders_of(index),
            key=lambda rank: (loads[rank], replica_entries[rank // n_places], entries[rank], rank),
        )
        owned[rank].append(index)
        loads[rank] += cost_of[index]
        entries[rank] += size_of_unit[index]
        replica_entries[rank // n_places] += size_of_unit[index]

    starts, _ = _starts(loads, owned, cost_of, size_of_unit, holders_of, n_places, flops_per_entry)

    # Bucket 0 has all starts. Owners finish these units after their other ones, when they have come.
    first_bucket = 1 if starts else 0
    bucket_of: dict[int, int] = {}
    for indices in owned:
        n_before = 0
        for index in indices:
            if index not in starts:
                bucket_of[index] = first_bucket + n_before // bucket_entries
                n_before += size_of_unit[index]
    last_bucket = 1 + max(bucket_of.values(), default=first_bucket)

    planned: dict[int, Unit] = {}
    for rank, indices in enumerate(owned):
        replica, place = divmod(rank, n_places)
        for index in indices:
            bucket = bucket_of.get(index, last_bucket)
            owner_replica = replica if shares_replicas else None
            planned[index] = Unit(*units[index], place, owner_replica, bucket, starts.get(index))
    return Plan(layout, cuts, shares_replicas, tuple(planned[index] for index in range(len(units))))


def _starts(
    loads: Sequence[int],
    owned: Sequence[Sequence[int]],
    cost_of: Sequence[int],
    size_of_unit: Sequence[int],
    holders_of: Callable[[int], Sequence[int]],
    n_places: int,
    flops_per_entry: float,
) -> tuple[dict[int, Start], int]:
    """Returns which units another rank of the owner's replica starts, and the largest load with them. They bring the
    largest load to LEVEL times the mean or the costliest unit, or as near as whole iterations allow. None if that saves
    less than the messages cost.

    Args:
        loads: FLOPs of each rank.
        owned: units of each rank, the costliest first.
        cost_of: FLOPs of each unit.
        size_of_unit: entries of each unit.
        holders_of: returns the ranks that hold a part of a unit.
        n_places: ranks of a replica.
        flops_per_entry: FLOPs that handing on an entry costs; infinite: nothing is handed on.
    """
    enough = LEVEL * max(sum(loads) / len(loads), max(cost_of, default=0))
    eased = list(loads)
    starts: dict[int, Start] = {}
    handed_on: Counter[int] = Counter()  # entries by rank
    for first in range(0, len(loads), n_places):
        replica = range(first, first + n_places)
        while True:
            busiest = max(replica, key=eased.__getitem__)
            whole_units = [index for index in owned[busiest] if index not in starts]
            if eased[busiest] <= enough or not whole_units:
                break

            index = whole_units[0]
            idlest = min((rank for rank in holders_of(index) if rank in replica), key=eased.__getitem__)
            iteration = cost_of[index] // ITERATIONS
            # The fewest iterations that leave the busier of the two with least.
            busier = [max(eased[busiest] - n * iteration, eased[idlest] + n * iteration) for n in range(ITERATIONS)]
            n_iterations = busier.index(min(busier))
            if n_iterations == 0 or n_iterations * iteration < flops_per_entry * size_of_unit[index]:
                break
            starts[index] = Start(idlest - first, n_iterations)
            eased[busiest] -= n_iterations * iteration
            eased[idlest] += n_iterations * iteration
            handed_on[idlest] += size_of_unit[index]

    # Other replicas may have a rank that nobody can relieve.
    saved = max(loads) - max(eased)
    if not saved or saved < flops_per_entry * max(handed_on.values()):
        return {}, max(loads)
    return starts, max(eased)


def _units(cuts: Sequence[Cut]) -> list[tuple[int, int, int]]:
    """Returns (parameter, first matrix, end) of all units."""
    costliest = max((cut.matrix_flops for cut in cuts), default=0)
    units = []
    for number, cut in enumerate(cuts):
        n_together = max(1, costliest // cut.matrix_flops)
        for first in range(0, cut.n_matrices, n_together):
            units.append((number, first, min(first + n_together, cut.n_matrices)))
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
