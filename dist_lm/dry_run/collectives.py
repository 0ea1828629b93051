"""Collectives as a dispatch mode sees them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

RESULT = -1  # instead of the position of an argument
c10d, functional = torch.ops.c10d, torch.ops._c10d_functional

# operator -> (kind, position of the whole tensor: what is gathered, or what is not yet scattered)
COLLECTIVES: Mapping[Any, tuple[str, int]] = {
    c10d._allgather_base_: ("all_gather", 0),
    c10d.allgather_: ("all_gather", 0),
    c10d.allgather_into_tensor_coalesced_: ("all_gather", 0),
    c10d._reduce_scatter_base_: ("reduce_scatter", 1),
    c10d.reduce_scatter_tensor_coalesced_: ("reduce_scatter", 1),
    c10d.alltoall_base_: ("all_to_all", 1),
    c10d.send: ("send", 0),  # what is received is sent by another rank
    c10d.allreduce_: ("all_reduce", 0),
    c10d.allreduce_coalesced_: ("all_reduce", 0),
    c10d.broadcast_: ("broadcast", 0),
    functional.all_gather_into_tensor: ("all_gather", RESULT),
    functional.reduce_scatter_tensor: ("reduce_scatter", 0),
    functional.all_reduce: ("all_reduce", 0),
    functional.all_reduce_: ("all_reduce", 0),
    functional.broadcast: ("broadcast", 0),
}


@dataclass(frozen=True)
class Collective:
    """One call."""

    kind: str  # all_gather | reduce_scatter | all_to_all | send | all_reduce | broadcast
    group: str  # name of the process group
    ranks: int  # of the group
    size: int  # bytes of the whole tensor


def collective_of(func: Any, args: Any, result: Any) -> Collective | None:
    """What `func(*args)` was, if it was a collective."""
    if func._overloadpacket not in COLLECTIVES:
        return None
    kind, position = COLLECTIVES[func._overloadpacket]
    whole = result if position == RESULT else args[position]
    tensors = [leaf for leaf in tree_leaves(whole) if isinstance(leaf, torch.Tensor)]
    group = next((a for a in reversed(args) if isinstance(a, str)), None) or _group_of(args)
    ranks = dist.distributed_c10d._resolve_process_group(cast(Any, group)).size()
    return Collective(kind, group, ranks, sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def _group_of(args: Any) -> str:
    scripts = [a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())]
    return dist.ProcessGroup.unbox(scripts[0]).group_name
