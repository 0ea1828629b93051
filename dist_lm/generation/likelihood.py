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

from dist_lm.generation.decoder import Decoder
from dist_lm.generation.transfer import upload

PACKED_TOKENS = {"cpu": 1024, "cuda": 8192}  # of a forward pass, unless one tree alone has more
LOGIT_ROWS = {"cpu": 256, "cuda": 2048}  # whose logits exist at the same time


@dataclass(frozen=True)
class Tree:
    """A context with its continuations, as token ids. The context has at least one token, as has a continuation."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]

    @property
    def inputs(self) -> int:
        """Tokens to compute: the last token of a continuation is predicted, but predicts nothing."""
        return len(self.context) + sum(len(one) - 1 for one in self.continuations)


@dataclass(frozen=True)
class Likelihood:
    """Of one continuation."""

    logprobs: tuple[float, ...]  # nats, of each token after those before it
    is_greedy: bool  # every token is the likeliest one

    @property
    def total(self) -> float:
        """The log-probability of the continuation, nats."""
        return math.fsum(self.logprobs)


@dataclass(frozen=True)
class _Place:
    """A tree in a packed pass: its tokens are `begin` to `end`, the context first."""

    begin: int
    context: int  # tokens
    end: int
    bias_TS: torch.Tensor | None  # of continuations: 0 for tokens of the tree that they see, -inf for others


@torch.inference_mode()
def likelihoods(decoder: Decoder, trees: Sequence[Tree], device: torch.device) -> Iterator[list[Likelihood]]:
    """The likelihoods of each tree's continuations, in the order of the trees.

    Args:
        decoder: a whole model; its cache is not touched.
    """
    most = PACKED_TOKENS[device.type]
    pack: list[Tree] = []
    for tree in trees:
        if pack and sum(one.inputs for one in pack) + tree.inputs > most:
            yield from _of_pack(decoder, pack, device)
            pack = []
        pack.append(tree)
    if pack:
        yield from _of_pack(decoder, pack, device)


def _of_pack(decoder: Decoder, pack: Sequence[Tree], device: torch.device) -> list[list[Likelihood]]:
    tokens, positions, rows, targets = list[int](), list[int](), list[int](), list[int]()
    places = list[_Place]()
    for tree in pack:
        begin, last = len(tokens), len(tokens) + len(tree.context) - 1
        tokens += tree.context
        positions += range(len(tree.context))
        for one in tree.continuations:
            rows += [last, *range(len(tokens), len(tokens) + len(one) - 1)]
            tokens += one[:-1]
            positions += range(len(tree.context), len(tree.context) + len(one) - 1)
            targets += one
        places.append(_Place(begin, len(tree.context), len(tokens), _bias(tree, decoder.dtype, device)))
    token_N, position_N, row_R, target_R = upload(device, *map(torch.tensor, (tokens, positions, rows, targets)))

    def attend(layer: int, q_NHK: torch.Tensor, key_NGK: torch.Tensor, value_NGK: torch.Tensor) -> torch.Tensor:
        return torch.cat([_attend(place, q_NHK, key_NGK, value_NGK) for place in places])

    x_RD = decoder.hidden(token_N, position_N, attend)[row_R]
    logprobs, greedy = list[float](), list[bool]()
    step = LOGIT_ROWS[device.type]
    for x, target in zip(x_RD.split(step), target_R.split(step), strict=True):
        logits_RV = decoder.logits(x)
        chosen = logits_RV.gather(1, target[:, None])[:, 0]
        logprobs += (chosen - logits_RV.logsumexp(dim=1)).tolist()
        greedy += (logits_RV.argmax(dim=1) == target).tolist()
    found, begin = list[list[Likelihood]](), 0
    for tree in pack:
        own = list[Likelihood]()
        for one in tree.continuations:
            end = begin + len(one)
            own.append(Likelihood(tuple(logprobs[begin:end]), all(greedy[begin:end])))
            begin = end
        found.append(own)
    return found


def _bias(tree: Tree, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    lengths = [len(one) - 1 for one in tree.continuations if len(one) > 1]
    if not lengths:
        return None
    causal = [torch.ones(length, length, dtype=torch.bool).tril() for length in lengths]
    seen_TS = torch.cat([torch.ones(sum(lengths), len(tree.context), dtype=torch.bool), torch.block_diag(*causal)], 1)
    return torch.zeros(seen_TS.shape, dtype=dtype).masked_fill_(~seen_TS, float("-inf")).to(device)


def _attend(place: _Place, q_NHK: torch.Tensor, key_NGK: torch.Tensor, value_NGK: torch.Tensor) -> torch.Tensor:
    """Attention (tokens of the tree, H, K)."""
    q, key, value = (x[place.begin : place.end].transpose(0, 1)[None] for x in (q_NHK, key_NGK, value_NGK))
    grouped, context = key.shape[1] != q.shape[1], place.context
    parts = [
        F.scaled_dot_product_attention(
            q[:, :, :context],
            key[:, :, :context],
            value[:, :, :context],
            is_causal=True,
            scale=1.0,
            enable_gqa=grouped,
        )
    ]
    if place.bias_TS is not None:
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, context:], key, value, attn_mask=place.bias_TS, scale=1.0, enable_gqa=grouped
            )
        )
    return torch.cat(parts, dim=2)[0].transpose(0, 1)
