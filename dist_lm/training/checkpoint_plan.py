"""Which shards each rank saves, and into which files: values that follow from the layout alone.

Every rank computes the same for all ranks of its node, so nothing is sent to plan a save.
"""

import heapq
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby

import torch
from torch.distributed.tensor import DTensor

from dist_lm.model.size import Shape
from dist_lm.parallel.values import coordinate_of_rank, shard_of_rank
from dist_lm.training import checkpoint_files as files
from dist_lm.training.checkpoint import DTYPES
from dist_lm.training.checkpoint_writer import Piece, Plan, PlannedFile, PlannedPart

FILE_BYTES = 1 << 30  # a node has as many files as these are in what its ranks save, and one at least
REPLICA_BYTES = 64 << 20  # at least so much is saved by each of the ranks that hold the same shards: fewer files
ALIGNMENT = 64  # bytes; a multiple of the size of every entry

DTYPE_NAMES = dict(zip(DTYPES.values(), DTYPES, strict=True))

Box = tuple[Shape, Shape, list[Piece]]  # indices of the first entry, shape, the pieces that make it up


@dataclass(frozen=True)
class SavedShard:
    """A shard that a rank saves, and its place in the copy that this rank makes."""

    name: str
    dtype: torch.dtype
    offsets: Shape  # indices of its first entry in the tensor
    shape: Shape
    begin: int  # byte offset in the copy

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def saved_shards(tensors: Mapping[str, torch.Tensor], rank: int, n_ranks: int) -> tuple[SavedShard, ...]:
    """Returns the shards that a rank saves, in the order of the tensors; shards without entries are left out.

    No message is needed: ranks that hold the same shards share them out by a rule that each of them knows.

    Args:
        tensors: all tensors of the checkpoint, by name, of logical shape.
        rank: any rank of the job, not only this one.
        n_ranks: all ranks of the job.
    """
    shards = []
    begin = 0
    boxes: dict[Hashable, tuple[Shape, Shape]] = {}
    for name in names_to_save(tensors, rank, n_ranks):
        tensor = tensors[name]
        # The tensors of all blocks, and their moments, have the same few boxes.
        key = (tensor.shape, _layout_of(tensor))
        offsets, shape = boxes[key] = boxes.get(key) or shard_of_rank(tensor, rank)
        if math.prod(shape):
            shards.append(SavedShard(name, tensor.dtype, offsets, shape, begin))
            begin += -(-shards[-1].bytes // ALIGNMENT) * ALIGNMENT
    return tuple(shards)


def _layout_of(tensor: torch.Tensor) -> Hashable:
    """Returns mesh and placements of a tensor: the places of its shards follow from these and its shape. None for a
    plain tensor, which every rank holds whole."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None


def names_to_save(tensors: Mapping[str, torch.Tensor], rank: int, n_ranks: int) -> list[str]:
    """Returns the names of the tensors whose shards a rank saves, in the order of `tensors`; perhaps none.

    Ranks that hold the same shards share them out, the largest first: each shard is saved by one of them, and so many
    of them save that each has `REPLICA_BYTES` at least.

    Args:
        tensors: all tensors of the checkpoint, by name.
        rank: any rank of the job, not only this one.
        n_ranks: all ranks of the job.
    """
    sharing: dict[tuple[int, ...], list[str]] = {}
    replicas: dict[Hashable, tuple[int, ...]] = {}
    for name, tensor in tensors.items():
        layout = _layout_of(tensor)
        ranks = replicas[layout] = replicas.get(layout) or replicas_of(tensor, rank, n_ranks)
        sharing.setdefault(ranks, []).append(name)

    names = set()
    for ranks, shared_names in sharing.items():
        # The mean size of the shards is the same on all ranks, also where shards are uneven: so all shards of a tensor
        # are saved by one replica, and those of a node lie side by side.
        n_shards = n_ranks // len(ranks)
        sizes = {name: tensors[name].numel() * tensors[name].itemsize // n_shards for name in shared_names}
        n_savers = min(len(ranks), max(1, sum(sizes.values()) // REPLICA_BYTES))
        loads = [(0, saver) for saver in ranks[:n_savers]]
        for name in sorted(shared_names, key=lambda name: -sizes[name]):
            n_bytes, saver = loads[0]
            heapq.heapreplace(loads, (n_bytes + sizes[name], saver))
            if saver == rank:
                names.add(name)
    return [name for name in tensors if name in names]


def replicas_of(tensor: torch.Tensor, rank: int, n_ranks: int) -> tuple[int, ...]:
    """Returns the ranks that hold the same shard as a rank, in ascending order: all ranks for a plain tensor."""
    if not isinstance(tensor, DTensor):
        return tuple(range(n_ranks))
    box = tuple(
        slice(None) if placement.is_replicate() else coordinate
        for coordinate, placement in zip(coordinate_of_rank(tensor.device_mesh, rank), tensor.placements, strict=True)
    )
    return tuple(sorted(tensor.device_mesh.mesh[box].flatten().tolist()))


def plan_of(tensors: Mapping[str, torch.Tensor], n_ranks: int, node: Sequence[int]) -> Plan:
    """Returns the files of what the ranks of a node save. It follows from the layout alone, as `saved_shards` does.

    Args:
        tensors: all tensors of the checkpoint, by name, of logical shape.
        node: the ranks; whoever writes a file reads the copies that these have made.
    """
    pieces_of: dict[str, list[Piece]] = {name: [] for name in tensors}
    for member in node:
        for shard in saved_shards(tensors, member, n_ranks):
            pieces_of[shard.name].append(Piece(member, shard.begin, shard.offsets, shard.shape))

    # Shards that lie side by side are one part: a file has one part of a tensor at most.
    parts, further_parts = [], []
    for name, pieces in pieces_of.items():
        of_tensor = [_part_of(name, tensors[name].dtype, box_pieces) for box_pieces in joined_boxes(pieces)]
        parts += of_tensor[:1]
        further_parts += enumerate(of_tensor[1:])

    numbers = file_numbers([part.bytes for part in parts], FILE_BYTES)
    last = max(numbers, default=0)
    numbers += [last + 1 + offset for offset, _ in further_parts]
    parts += [part for _, part in further_parts]

    last = max(numbers, default=0)
    return tuple(
        PlannedFile(
            f"shard-{node[0] + 1:05d}-model-{file:05d}-of-{last:05d}{files.TENSORS}",
            tuple(part for part, number in zip(parts, numbers, strict=True) if number == file),
        )
        for file in range(1, last + 1)
    )


def file_numbers(sizes: Sequence[int], file_bytes: int) -> list[int]:
    """Returns the number of each part's file, from 1. Files get about equally many bytes, `file_bytes` and more on
    average; all of the parts make one file if they are less.

    Args:
        sizes: bytes of the parts.
    """
    total = sum(sizes)
    n_files = max(1, total // file_bytes)
    starts = list(accumulate(sizes, initial=0))[:-1]
    positions = [start * n_files // total for start in starts]

    # A part that is larger than a file leaves no number without a file.
    numbers = {position: number for number, position in enumerate(sorted(set(positions)), start=1)}
    return [numbers[position] for position in positions]


def joined_boxes(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Returns the pieces of a tensor in groups, each of which makes up a box: those of a grid are one group."""
    boxes = [(piece.offsets, piece.shape, [piece]) for piece in pieces]
    for dim in range(len(pieces[0].shape) if pieces else 0):
        # Boxes that differ along `dim` alone become neighbours.
        across = partial(_other_dimensions, dim)
        boxes.sort(key=lambda box: (across(box), box[0][dim]))
        merged: list[Box] = []

        # A box grows along its row while the next one begins where it ends; a gap begins a new box.
        for _, row in groupby(boxes, across):
            (offsets, shape, members), *rest = row
            for next_offsets, next_shape, next_members in rest:
                if offsets[dim] + shape[dim] == next_offsets[dim]:
                    shape = (*shape[:dim], shape[dim] + next_shape[dim], *shape[dim + 1 :])
                    members = members + next_members
                else:
                    merged.append((offsets, shape, members))
                    offsets, shape, members = next_offsets, next_shape, next_members
            merged.append((offsets, shape, members))

        boxes = merged
    return [members for _, _, members in boxes]


def _other_dimensions(dim: int, box: Box) -> tuple[Shape, Shape]:
    """Returns offsets and sizes of a box along all dimensions but one."""
    offsets, shape, _ = box
    return offsets[:dim] + offsets[dim + 1 :], shape[:dim] + shape[dim + 1 :]


def _part_of(name: str, dtype: torch.dtype, pieces: Sequence[Piece]) -> PlannedPart:
    """Returns the box that pieces of a tensor make up."""
    begin = tuple(map(min, zip(*(piece.offsets for piece in pieces), strict=True)))
    ends = ([first + size for first, size in zip(piece.offsets, piece.shape, strict=True)] for piece in pieces)
    shape = tuple(max(end) - first for first, end in zip(begin, zip(*ends, strict=True), strict=True))
    return PlannedPart(name, DTYPE_NAMES[dtype], begin, shape, math.prod(shape) * dtype.itemsize, tuple(pieces))
