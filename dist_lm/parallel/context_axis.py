"""The context-parallel axis: each rank holds a part of the tokens of every sequence.

Everything but attention works on tokens alone. Around attention, the ranks exchange tokens for heads by all-to-all
(DeepSpeed-Ulysses, Jacobs et al. 2023): a rank then attends with some of the heads over all tokens, so masks, windows
and documents of any length are those of one process, and every rank has the same work whatever the documents. Query
heads are dealt out as evenly as their number allows. A key head goes to each rank whose query heads read it: where
there are fewer key heads than ranks, several ranks get the same one.

Dimensions: B sequences, T tokens of a sequence, t tokens of it on a rank, H query heads and G key/value heads before
the exchange, h and g after it, K d_head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_gather_single, all_to_all_single_autograd, wait_tensor

from dist_lm.model.attention import Visibility, attend
from dist_lm.parallel.tensor_parallel import repeat_heads


@dataclass(frozen=True)
class ContextAxis:
    """The ranks that share the tokens of their sequences, in the order of the tokens."""

    group: ProcessGroup
    size: int
    rank: int

    def held(self, n_tokens: int) -> slice:
        """Returns which of the `n_tokens` tokens of a sequence this rank holds.

        Raises:
            ValueError: the ranks cannot have equal parts.
        """
        if n_tokens % self.size:
            raise ValueError(f"{n_tokens} tokens of a sequence over {self.size} ranks of parallel.cp")
        n_held = n_tokens // self.size
        return slice(self.rank * n_held, (self.rank + 1) * n_held)

    def whole(self, part_Bt: torch.Tensor) -> torch.Tensor:
        """Returns the numbers of all tokens, (B, T), from the part of each rank (collective).

        Every rank must compute the same from them: in the backward pass it takes its own part of the gradient, which
        is then complete.
        """
        return _Gather.apply(part_Bt, self)

    def attend(
        self, q_BtHK: torch.Tensor, k_BtGK: torch.Tensor, v_BtGK: torch.Tensor, visibility: Visibility
    ) -> torch.Tensor:
        """Returns what `model.attention.attend` computes over all tokens, for the tokens of this rank: (B, t, H, K)
        (collective).

        Args:
            visibility: of all tokens.
        """
        n_queries, n_keys = q_BtHK.shape[2], k_BtGK.shape[2]
        queries_of_rank = dealt_heads(n_queries, self.size)
        group_size = n_queries // n_keys
        keys_of_rank = [
            range(queries.start // group_size, (queries.stop - 1) // group_size + 1) for queries in queries_of_rank
        ]
        queries, keys = queries_of_rank[self.rank], keys_of_rank[self.rank]

        q_BThK = self._to_all_tokens(q_BtHK, queries_of_rank)
        k_BTgK = self._to_all_tokens(k_BtGK, keys_of_rank)
        v_BTgK = self._to_all_tokens(v_BtGK, keys_of_rank)

        # A kernel repeats every key head equally often; here the border between ranks may cut through a group.
        key_of_query = [query // group_size for query in queries]
        queries_of_key = [key_of_query.count(key) for key in keys]
        if len(set(queries_of_key)) > 1:
            k_BTgK, v_BTgK = repeat_heads(k_BTgK, queries_of_key), repeat_heads(v_BTgK, queries_of_key)

        o_BThK = attend(q_BThK, k_BTgK, v_BTgK, visibility)
        return self._to_all_heads(o_BThK, queries_of_rank)

    def _to_all_tokens(self, x_BtHK: torch.Tensor, heads_of_rank: Sequence[range]) -> torch.Tensor:
        """Sends each rank its heads of this rank's tokens; returns this rank's heads of all tokens, (B, T, h, K)."""
        n_sequences, n_held, n_heads, d_head = x_BtHK.shape
        n_sent = [len(heads) for heads in heads_of_rank]
        n_received = n_sent[self.rank]

        # Heads come first, because an all-to-all cuts the first dimension.
        sent_HBtK = x_BtHK.permute(2, 0, 1, 3).contiguous()
        if sum(n_sent) > n_heads:  # some heads are sent to several ranks
            sent_HBtK = torch.cat([sent_HBtK[heads.start : heads.stop] for heads in heads_of_rank])
        received = all_to_all_single_autograd(sent_HBtK, [n_received] * self.size, n_sent, self.group)

        # From each rank come the same heads of other tokens.
        received = wait_tensor(received).view(self.size, n_received, n_sequences, n_held, d_head)
        return received.permute(2, 0, 3, 1, 4).reshape(n_sequences, self.size * n_held, n_received, d_head)

    def _to_all_heads(self, x_BThK: torch.Tensor, heads_of_rank: Sequence[range]) -> torch.Tensor:
        """Sends each rank its tokens of this rank's heads; returns all heads of this rank's tokens, (B, t, H, K)."""
        n_sequences, n_tokens, n_heads, d_head = x_BThK.shape
        n_held = n_tokens // self.size
        n_received = [len(heads) for heads in heads_of_rank]

        sent = x_BThK.view(n_sequences, self.size, n_held, n_heads, d_head).permute(1, 3, 0, 2, 4)
        sent_hBtK = sent.reshape(self.size * n_heads, n_sequences, n_held, d_head)
        received = all_to_all_single_autograd(sent_hBtK, n_received, [n_heads] * self.size, self.group)
        return wait_tensor(received).permute(1, 2, 0, 3)


def dealt_heads(n_heads: int, n_ranks: int) -> list[range]:
    """Returns the heads of each rank: consecutive ones, whose numbers differ by one at most."""
    borders = [rank * n_heads // n_ranks for rank in range(n_ranks + 1)]
    return [range(start, stop) for start, stop in pairwise(borders)]


class _Gather(torch.autograd.Function):
    """An all-gather of tokens from which every rank computes the same, so its backward pass sends nothing."""

    @staticmethod
    def forward(ctx, part_Bt: torch.Tensor, axis: ContextAxis) -> torch.Tensor:
        ctx.axis = axis
        parts_RBt = wait_tensor(all_gather_single(part_Bt[None].contiguous(), 0, axis.group))
        return torch.cat(parts_RBt.unbind(), dim=1)

    @staticmethod
    def backward(ctx, gradient_BT: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient_BT[:, ctx.axis.held(gradient_BT.shape[1])].contiguous(), None
