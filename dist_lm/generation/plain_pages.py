"""Keys and values in pages, and attention over them in plain PyTorch: batched products that read pages where they lie.

A query's scores with a page are one small product, whatever the batch, and what several pages give is added up in their
order: a sequence gets the same bits whatever it is batched with and wherever its pages lie. Libraries round by where in
memory a row begins, too: heads are padded with zeros so that all of them begin alike.

Dimensions: N tokens, B sequences, H query heads, G key/value heads, R = H // G, K d_head, W page size, n slots,
P pages of the longest sequence, S = P * W.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.generation.page_plan import FEWEST_SLOTS, DecodePlan, plan_decode
from dist_lm.generation.paged_cache import HeadShape, PageStore, Piece

ALIGNED = 16  # fp32 numbers in 64 bytes


class PlainPages(PageStore):
    """The cache of all layers."""

    def __init__(
        self, shape: HeadShape, n_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._room = -shape.d_head % ALIGNED
        pages = (max(n_pages, FEWEST_SLOTS), shape.kv_heads, page_size, shape.d_head + self._room)
        super().__init__((shape.n_layers, *pages), dtype, device)
        self._page_size = page_size
        self._group_G = torch.arange(shape.kv_heads, device=device)

    def plan(self, pages: Sequence[Sequence[int]], positions: Sequence[int]) -> DecodePlan:
        """See `PagedCache`."""
        return plan_decode(pages, positions, self._page_size, self.key.device)

    def places(self, written_N: torch.Tensor) -> torch.Tensor:
        """See `PagedCache`."""
        written_N1, width = written_N[:, None], self._page_size
        return ((written_N1 // width * len(self._group_G) + self._group_G) * width + written_N1 % width).flatten()

    def write(self, layer: int, place_X: torch.Tensor, key_NGK: torch.Tensor, value_NGK: torch.Tensor) -> None:
        """See `PagedCache`."""
        for cache, new_NGK in ((self.key, key_NGK), (self.value, value_NGK)):
            new = F.pad(new_NGK, (0, self._room)) if self._room else new_NGK
            cache[layer].view(-1, new.shape[-1]).index_copy_(0, place_X, new.reshape(-1, new.shape[-1]))

    def decode(self, layer: int, q_BHK: torch.Tensor, plan: DecodePlan) -> torch.Tensor:
        """See `PagedCache`."""
        q_BHK = F.pad(q_BHK, (0, self._room)) if self._room else q_BHK
        n_rows, heads, width = q_BHK.shape
        reads = self._reads(layer, plan)
        groups, page = reads[0][0].shape[1:3]
        scores = [
            torch.bmm(
                q_BHK.index_select(0, row).view(-1, heads // groups, width),
                key.flatten(0, 1).transpose(1, 2),
            ).view(-1, heads * page)
            for key, _, row in reads
        ]
        score_nX = scores[0] if len(scores) == 1 else torch.cat(scores)
        score_BPHW = score_nX.index_select(0, plan.slot_X).view(n_rows, -1, heads, page)
        n_pages = score_BPHW.shape[1]
        weight_BHS = (score_BPHW.transpose(1, 2).flatten(2) + plan.bias_B1S).softmax(dim=-1).to(q_BHK.dtype)
        weight_BPHW = weight_BHS.view(n_rows, heads, n_pages, page).transpose(1, 2)
        weight_nX = weight_BPHW.reshape(n_rows * n_pages, heads * page).index_select(0, plan.place_n)
        # one slot more, of zeros: what a sequence gets of pages that it has not
        output_nX = q_BHK.new_zeros(len(score_nX) + 1, heads * width)
        begin = 0
        for _, value, row in reads:
            own = slice(begin, begin + len(row))
            into = output_nX[own].view(-1, heads // groups, width)
            torch.bmm(weight_nX[own].view(-1, heads // groups, page), value.flatten(0, 1), out=into)
            begin = own.stop
        output_BPX = output_nX.index_select(0, plan.summed_X).view(n_rows, -1, heads * width)
        return output_BPX.sum(dim=1).view(n_rows, heads, width)[..., : width - self._room]

    def _reads(self, layer: int, plan: DecodePlan) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(keys (n, G, W, K), values, sequence that reads each) of every read of a plan."""
        key, value = self.key[layer], self.value[layer]
        if plan.n_pages:
            reads = [(key[: plan.n_pages], value[: plan.n_pages], plan.row_n)]
        else:
            reads = [(key.index_select(0, plan.page_n), value.index_select(0, plan.page_n), plan.row_n)]
        copied = key[:0], value[:0]
        for shared in plan.shared:
            if not shared.again:
                copied = key.index_select(0, shared.page_S), value.index_select(0, shared.page_S)
            reads.append((copied[0], copied[1], shared.row_S))
        return reads

    def prefill(
        self,
        layer: int,
        q_NHK: torch.Tensor,
        key_NGK: torch.Tensor,
        value_NGK: torch.Tensor,
        pieces: Sequence[Piece],
    ) -> torch.Tensor:
        """See `PagedCache`."""
        if self._is_one_call(pieces, q_NHK):
            n_rows = len(pieces)
            q_BHTK, key_BGTK, value_BGTK = (
                x.contiguous().unflatten(0, (n_rows, -1)).transpose(1, 2) for x in (q_NHK, key_NGK, value_NGK)
            )
            output = F.scaled_dot_product_attention(
                q_BHTK, key_BGTK, value_BGTK, is_causal=True, scale=1.0, enable_gqa=q_BHTK.shape[1] != key_BGTK.shape[1]
            )
            return output.transpose(1, 2).flatten(0, 1)
        outputs, begin = [], 0
        for piece in pieces:
            own = slice(begin, begin + len(piece.tokens))
            begin = own.stop
            if piece.start == 0:
                # contiguous: the beginning of every row must not depend on what else there is
                key, value, bias = key_NGK[own].contiguous(), value_NGK[own].contiguous(), None
                key, value = key.transpose(0, 1), value.transpose(0, 1)
            else:
                n_keys = piece.start + len(piece.tokens)
                pages = torch.tensor(piece.pages, device=q_NHK.device)
                key, value = (
                    cache[layer].index_select(0, pages).transpose(0, 1).flatten(1, 2)[:, :n_keys, : q_NHK.shape[-1]]
                    for cache in (self.key, self.value)
                )
                bias = _causal_bias(piece.start, n_keys, q_NHK)
            output = F.scaled_dot_product_attention(
                q_NHK[own].contiguous().transpose(0, 1)[None],
                key[None],
                value[None],
                attn_mask=bias,
                is_causal=bias is None,
                scale=1.0,
                enable_gqa=key.shape[0] != q_NHK.shape[1],
            )
            outputs.append(output[0].transpose(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _is_one_call(self, pieces: Sequence[Piece], q_NHK: torch.Tensor) -> bool:
        """Whether several beginnings of one length give each other the bits that they have alone: where heads of all of
        them begin on whole vectors."""
        n_tokens = len(pieces[0].tokens)
        alike = all(piece.start == 0 and len(piece.tokens) == n_tokens for piece in pieces)
        return len(pieces) > 1 and alike and q_NHK.shape[-1] % ALIGNED == 0


def _causal_bias(start: int, n_keys: int, like: torch.Tensor) -> torch.Tensor:
    key_S = torch.arange(n_keys, device=like.device)
    visible_TS = key_S <= key_S[start:, None]
    return torch.zeros(visible_TS.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible_TS, float("-inf"))
