"""What frozen weights say of rollouts: each data-parallel rank asks about its own, then all know all.

Dimensions: B rollouts in all, T tokens of the longest completion, S rollouts of a batch, N their drawn tokens.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dist_lm.config.parallel import ParallelConfig
from dist_lm.parallel.mesh import data_mesh
from dist_lm.parallel.sharding import reshard
from dist_lm.rlhf.packed_rollouts import Dealing, RolloutBatch, whole_batches
from dist_lm.rlhf.rollouts import Rollouts
from dist_lm.training.forward import BoundModel


def dealing(mesh: DeviceMesh, parallel: ParallelConfig, micro_batch_tokens: int) -> Dealing:
    """How rollouts are shared out to the ranks of a mesh, of which this is one."""
    ranks = data_mesh(mesh)
    multiple = mesh["tp"].size() if parallel.sp else 1
    return Dealing(micro_batch_tokens, ranks.get_local_rank(), ranks.size(), multiple)


class OwnShare:
    """This rank's part of quantities of all rollouts: 0 where another rank knows."""

    def __init__(
        self, batches: Sequence[RolloutBatch], n_rollouts: int, longest: int, alive: Callable[[], None] = lambda: None
    ) -> None:
        """
        Args:
            batches: on the models' device.
            alive: called before every batch.
        """
        self._batches, self._shape, self._alive = batches, (n_rollouts, longest), alive

    @torch.no_grad()
    def logprobs(self, bound: BoundModel, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and entropy of every drawn token: (B, T) fp32 each."""
        logprob_BT, entropy_BT = self._empty(), self._empty()
        for batch in self._turns():
            found = bound.logprobs(batch, temperature)
            for into, values in ((logprob_BT, found.logprob_BT), (entropy_BT, found.entropy_BT)):
                into.view(-1)[batch.drawn_N] = values.flatten()[batch.counted_N]
        reshard(bound.model)
        return logprob_BT, entropy_BT

    @torch.no_grad()
    def values(self, bound: BoundModel) -> torch.Tensor:
        """Scores of what stands before every drawn token: (B, T) fp32."""
        value_BT = self._empty()
        for batch in self._turns():
            value_BT.view(-1)[batch.drawn_N] = bound.scores(batch, batch.counted_N).flatten()[batch.counted_N]
        reshard(bound.model)
        return value_BT

    def _turns(self) -> Iterator[RolloutBatch]:
        for batch in self._batches:
            self._alive()
            yield batch

    def _empty(self) -> torch.Tensor:
        return torch.zeros(self._shape, device=self._batches[0].tokens_BT.device)


@torch.no_grad()
def end_scores(
    bound: BoundModel,
    rollouts: Rollouts,
    shares: Dealing,
    device: torch.device,
    alive: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """This rank's part of the scores of whole rollouts, at the last real token of each: (B,) fp32.

    Args:
        device: the model's.
        alive: called before every batch.
    """
    score_B = torch.zeros(len(rollouts), device=device)
    for whole in whole_batches(rollouts, shares):
        alive()
        batch = whole.to(device)
        score_B[batch.rollout_S] = bound.scores(batch, batch.end_S).flatten()[batch.end_S]
    reshard(bound.model)
    return score_B


def add_up(parts: Sequence[torch.Tensor], counts: bool) -> list[torch.Tensor]:
    """The parts of all ranks together, the same bits on all of them (collective, one message).

    Args:
        counts: whether this rank's parts are added: on one of the ranks that see the same rollouts.
    """
    flat = torch.cat([part.flatten() for part in parts])
    shared = flat if counts else torch.zeros_like(flat)
    dist.all_reduce(shared)
    return [values.view_as(part) for values, part in zip(shared.split([p.numel() for p in parts]), parts, strict=True)]
