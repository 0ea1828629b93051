"""Log-likelihoods of continuations: each context is computed once for all its continuations, without a cache.

Contexts and continuations are packed into rows without padding. A continuation sees its context and itself. With four
choices of 12 tokens after 240, this computes 288 tokens where a batch of whole sequences computes 1,008.

Dimensions: N packed tokens, R rows of logits, H query heads, G key/value heads, K d_head, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.generation.adapters import runs_of
from dist_lm.generation.decoder import Decoder
from dist_lm.generation.transfer import upload

PACKED_TOKENS = {"cpu": 1024, "cuda": 8192}  # most tokens of a forward pass, unless one tree alone has more
LOGIT_ROWS = {"cpu": 256, "cuda": 2048}  # most rows of logits in memory at once


@dataclass(frozen=True)
class Tree:
    """A context with its continuations, as token ids. The context has at least one token, as has a continuation."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]

    @property
    def inputs(self) -> int:
        """Tokens to compute: the last token of a continuation is predicted, but predicts nothing."""
        return len(self.context) + sum(len(continuation) - 1 for continuation in self.continuations)


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds one continuation."""

    logprobs: tuple[float, ...]  # nats; of each token given the context and the tokens before it
    is_greedy: bool  # every token is the likeliest one

    @property
    def total(self) -> float:
        """The log-probability of the continuation, nats."""
        return math.fsum(self.logprobs)


@dataclass(frozen=True)
class PackedTree:
    """The tokens `begin` to `end` of a packed pass: the context, then the continuations without their last tokens."""

    begin: int
    n_context: int  # tokens of the context
    end: int
    bias_TS: torch.Tensor | None  # mask of continuations: 0 for tokens of the tree that they see, -inf elsewhere
    window_bias_TS: torch.Tensor | None  # mask of all tokens, for layers with a window; None: the tree is no longer


@torch.inference_mode()
def likelihoods(decoder: Decoder, trees: Sequence[Tree], device: torch.device) -> Iterator[list[Likelihood]]:
    """Yields the likelihoods of each tree's continuations, in the order of the trees; several trees share a forward
    pass of at most PACKED_TOKENS tokens (a larger tree has one of its own).

    Args:
        decoder: a complete model; its cache is not touched.
    """
    max_tokens = PACKED_TOKENS[device.type]
    pack: list[Tree] = []
    for tree in trees:
        # Trees are packed greedily in their order, so that answers can be yielded in order.
        if pack and sum(packed.inputs for packed in pack) + tree.inputs > max_tokens:
            yield from _likelihoods_of_pack(decoder, pack, device)
            pack = []
        pack.append(tree)
    if pack:
        yield from _likelihoods_of_pack(decoder, pack, device)


def _likelihoods_of_pack(decoder: Decoder, pack: Sequence[Tree], device: torch.device) -> list[list[Likelihood]]:
    """Returns a list for each tree, in order, with the likelihoods of its continuations, in order.

    One forward pass computes all trees, without the cache. The logits are computed in blocks of LOGIT_ROWS rows, and
    the host waits for the device in each block.

    Args:
        pack: at least one tree with a continuation.
    """
    # Concatenate the trees. The first token of each continuation is predicted by the last token of the context.
    tokens, positions, rows, targets = list[int](), list[int](), list[int](), list[int]()
    packed_trees = list[PackedTree]()
    for tree in pack:
        begin, n_context = len(tokens), len(tree.context)
        last_of_context = begin + n_context - 1
        tokens += tree.context
        positions += range(n_context)
        for continuation in tree.continuations:
            n_inputs = len(continuation) - 1
            rows += [last_of_context, *range(len(tokens), len(tokens) + n_inputs)]
            tokens += continuation[:-1]
            positions += range(n_context, n_context + n_inputs)
            targets += continuation
        packed_trees.append(packed_tree(tree, begin, decoder.dtype, device, decoder.config.window))
    token_N, position_N, row_R, target_R = upload(device, *map(torch.tensor, (tokens, positions, rows, targets)))

    x_RD = hidden_of_trees(decoder, packed_trees, token_N, position_N)[row_R]

    # The logits of all rows may not fit in memory.
    logprobs, is_likeliest = list[float](), list[bool]()
    n_rows = LOGIT_ROWS[device.type]
    for x_rD, target_r in zip(x_RD.split(n_rows), target_R.split(n_rows), strict=True):
        logits_rV = decoder.logits(x_rD)
        target_logit_r = logits_rV.gather(1, target_r[:, None])[:, 0]
        logprobs += (target_logit_r - logits_rV.logsumexp(dim=1)).tolist()
        is_likeliest += (logits_rV.argmax(dim=1) == target_r).tolist()

    # The numbers of all continuations follow each other, in the order of the trees.
    likelihoods_of_trees = list[list[Likelihood]]()
    begin = 0
    for tree in pack:
        likelihoods_of_tree = list[Likelihood]()
        for continuation in tree.continuations:
            end = begin + len(continuation)
            likelihoods_of_tree.append(Likelihood(tuple(logprobs[begin:end]), all(is_likeliest[begin:end])))
            begin = end
        likelihoods_of_trees.append(likelihoods_of_tree)
    return likelihoods_of_trees


def hidden_of_trees(
    decoder: Decoder,
    packed_trees: Sequence[PackedTree],
    token_N: torch.Tensor,
    position_N: torch.Tensor,
    adapter: str = "",
) -> torch.Tensor:
    """Returns the hidden states (N, D) of packed trees, before the final norm.

    Args:
        adapter: name of the adapter of all tokens; empty: none.
    """

    def attend(layer: int, q_NHK: torch.Tensor, k_NGK: torch.Tensor, v_NGK: torch.Tensor) -> torch.Tensor:
        has_window = decoder.share.windows[layer] is not None
        attended = [_attend(tree, q_NHK, k_NGK, v_NGK, has_window, decoder.score_scale) for tree in packed_trees]
        return torch.cat(attended)

    return decoder.hidden(token_N, position_N, attend, runs_of([adapter], [len(token_N)]))


def packed_tree(tree: Tree, begin: int, dtype: torch.dtype, device: torch.device, window: int | None) -> PackedTree:
    """Returns a tree whose first token has the index `begin` in the packed pass, with its masks on the device.

    Args:
        window: of the layers with a window; None: no layer has one.
    """
    visible_TS = _visible(tree)
    n_context = len(tree.context)
    positions = [*range(n_context)]
    for continuation in tree.continuations:
        positions += range(n_context, n_context + len(continuation) - 1)

    window_bias_TS = None
    if window is not None and max(positions) >= window:
        # Distances are those of positions: other continuations stand between a continuation and its context.
        position_T = torch.tensor(positions)
        causal_TS = torch.ones(n_context, len(positions), dtype=torch.bool).tril()
        within_TS = position_T[:, None] - position_T < window
        window_bias_TS = _bias(torch.cat([causal_TS, visible_TS]) & within_TS, dtype, device)

    bias_TS = None
    if len(visible_TS):
        bias_TS = _bias(visible_TS, dtype, device)
    return PackedTree(begin, n_context, begin + len(positions), bias_TS, window_bias_TS)


def _visible(tree: Tree) -> torch.Tensor:
    """Returns what continuations see, bool (inputs of continuations, tokens of the tree): each sees the context and,
    causally, itself."""
    lengths = [len(continuation) - 1 for continuation in tree.continuations if len(continuation) > 1]
    sees_context = torch.ones(sum(lengths), len(tree.context), dtype=torch.bool)
    if not lengths:
        return sees_context
    sees_itself = torch.block_diag(*(torch.ones(length, length, dtype=torch.bool).tril() for length in lengths))
    return torch.cat([sees_context, sees_itself], 1)


def _bias(visible_TS: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns the mask on the device: 0 where visible, else -inf."""
    return torch.zeros(visible_TS.shape, dtype=dtype).masked_fill_(~visible_TS, float("-inf")).to(device)


def _attend(
    tree: PackedTree,
    q_NHK: torch.Tensor,
    k_NGK: torch.Tensor,
    v_NGK: torch.Tensor,
    has_window: bool,
    scale: float,
) -> torch.Tensor:
    """Returns the attention of the tokens of one tree, (tokens of the tree, H, K): the context is causal, continuations
    see what `bias_TS` says.

    Args:
        q_NHK, k_NGK, v_NGK: queries, keys and values of all packed tokens, those of other trees included.
        has_window: whether the layer has a window.
        scale: factor of attention scores.
    """
    q, k, v = (x_N[tree.begin : tree.end].transpose(0, 1)[None] for x_N in (q_NHK, k_NGK, v_NGK))
    is_grouped = k.shape[1] != q.shape[1]
    if has_window and tree.window_bias_TS is not None:
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=tree.window_bias_TS, scale=scale, enable_gqa=is_grouped)
        return o[0].transpose(0, 1)

    # Two calls, because the context needs no mask: it is causal, and longer than its continuations.
    context = slice(tree.n_context)
    o = F.scaled_dot_product_attention(
        q[:, :, context], k[:, :, context], v[:, :, context], is_causal=True, scale=scale, enable_gqa=is_grouped
    )
    if tree.bias_TS is not None:
        o_of_continuations = F.scaled_dot_product_attention(
            q[:, :, tree.n_context :], k, v, attn_mask=tree.bias_TS, scale=scale, enable_gqa=is_grouped
        )
        o = torch.cat([o, o_of_continuations], dim=2)
    return o[0].transpose(0, 1)
